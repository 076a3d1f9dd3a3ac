//! Predictions beside the engine's bench: the committed figures are read, and the table and the plot that docs show are
//! compared with what is committed. `PLIMSOLL_WRITE=1` writes them.

use std::fmt::Write;
use std::path::Path;

use plimsoll_contract::abilities::{Ability, Backend};

use super::super::calibration::{CALIBRATIONS, Calibration, speeds};
use super::super::cost::{Basis, Roofline};
use super::super::figures;
use super::*;

/// TTFT and TPOT have to be within a tenth.
const TOLERANCE: f64 = 0.10;
/// Points that the efficiencies were fitted to (`tests/gpu/fit.py`); all others were not used.
const FITTED: [(&str, &str); 8] = [
    ("llama-3.1-8b", "decode_bs1_ms_per_token"),
    ("llama-3.1-8b", "decode_bs256_tok_s"),
    ("llama-3.1-8b", "prefill_512_ms"),
    ("llama-3.1-8b", "prefill_8192_ms"),
    ("llama-3.2-1b", "decode_bs1_ms_per_token"),
    ("llama-3.2-1b", "decode_bs256_tok_s"),
    ("llama-3.2-1b", "prefill_512_ms"),
    ("llama-3.2-1b", "prefill_2048_ms"),
];

/// The shape of Llama-3.1-8B.
pub fn eight_billion() -> ModelFacts {
    ModelFacts {
        parameters: ParametersByRole {
            embedding: 525_336_576,
            attention: 1_342_177_280,
            mlp: 5_637_144_576,
            norm: 266_240,
            head: 525_336_576,
        },
        layers: 32,
        hidden: 4096,
        intermediate: 14_336,
        head_dim: 128,
        tied_head: false,
        ..facts()
    }
}

struct Point {
    model: &'static str,
    workload: String,
    measured_ms: f64,
    predicted_ms: f64,
}

impl Point {
    fn error(&self) -> f64 {
        self.predicted_ms / self.measured_ms - 1.0
    }

    fn was_fitted(&self) -> bool {
        FITTED.contains(&(self.model, self.workload.as_str()))
    }
}

/// Every figure of one step or one prompt, of the bench and of the whole steps beside the kernels alone.
fn points(calibration: &'static Calibration) -> Vec<Point> {
    let mut points = Vec::new();
    for (model, facts) in [("llama-3.2-1b", facts()), ("llama-3.1-8b", eight_billion())] {
        let roofline = roofline(calibration, &facts);
        let read =
            |name: String| std::fs::read_to_string(root().join(calibration.source).join(name));
        let mut point = |workload: String, seconds: f64, measured_ms: f64| {
            points.push(Point { model, workload, measured_ms, predicted_ms: seconds * 1e3 });
        };
        let bench: Value = serde_json::from_str(&read(format!("{model}.json")).unwrap()).unwrap();
        let step = bench["step_tokens_max"].as_u64().unwrap() as u32;
        let figure = |name: &str| bench[name].as_f64().unwrap();
        // A decode of 128 or 256 tokens after a prompt: the mean context counts.
        for (name, context) in
            [("decode_bs1_ms_per_token", 256.0), ("decode_bs1_ctx8k_ms_per_token", 8256.0)]
        {
            point(name.to_owned(), roofline.decode(1.0, context, 0.0), figure(name));
        }
        for batch in [8.0, 32.0, 64.0, 128.0, 256.0] {
            let name = format!("decode_bs{batch}_tok_s");
            let measured = batch / figure(&name) * 1e3;
            point(name, roofline.decode(batch, 192.0, 0.0), measured);
        }
        for tokens in [512, 2048, 8192] {
            let name = format!("prefill_{tokens}_ms");
            let measured = figure(&name);
            point(name, roofline.prefill(tokens, step), measured);
        }
        let kernels = read(format!("kernels_{model}.md")).unwrap_or_default();
        for (name, numbers, measured_ms) in whole_steps(&kernels) {
            let seconds = match numbers[..] {
                [rows, context] => roofline.decode(rows, context, 0.0),
                [tokens] => roofline.prefill(tokens as u32, step),
                _ => panic!("{name} is neither a decode nor a prompt"),
            };
            point(name, seconds, measured_ms);
        }
    }
    points
}

fn roofline(calibration: &Calibration, facts: &ModelFacts) -> Roofline {
    let card = figures::of_product(calibration.product).unwrap();
    Roofline::of(facts, Ability::plain(Backend::Cuda, Dtype::Bf16), speeds(&card), 1)
}

/// `decode 8 x 1024` with its numbers and milliseconds, as `bench kernels` writes them: a heading, and the row of the whole
/// step in the table below it.
fn whole_steps(text: &str) -> Vec<(String, Vec<f64>, f64)> {
    let mut heading = "";
    let mut steps = Vec::new();
    for line in text.lines() {
        if line.starts_with("decode ") || line.starts_with("prompt ") {
            heading = line;
        } else if let Some(row) = line.strip_prefix("| whole step | ") {
            let microseconds: f64 = row.split(' ').next().unwrap().parse().unwrap();
            let numbers = heading.split(' ').filter_map(|word| word.parse().ok()).collect();
            steps.push((heading.to_owned(), numbers, microseconds / 1e3));
        }
    }
    steps
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

#[test]
fn predictions_are_within_a_tenth_of_what_was_measured_and_not_fitted() {
    for calibration in CALIBRATIONS {
        let points = points(calibration);
        let fitted = points.iter().filter(|point| point.was_fitted()).count();
        assert_eq!(fitted, 8);
        assert!(points.len() - fitted >= 12, "{} points", points.len());
        for point in points {
            let Point { model, workload, measured_ms, predicted_ms } = &point;
            let said =
                format!("{model} {workload}: {predicted_ms:.3} ms, measured {measured_ms:.3}");
            assert!(point.error().abs() <= TOLERANCE, "{said}");
        }
    }
}

/// docs/perf.md, Over HTTP: the 1B, so many of mixed600's requests in flight, and the median time between tokens in
/// milliseconds. None of it was fitted.
const IN_FLIGHT: [(u32, f64); 4] = [(1, 0.92), (8, 1.00), (64, 1.72), (256, 3.86)];

#[test]
fn requests_at_once_slow_each_other_by_what_is_predicted() {
    let load = |concurrency: u32| json!({"workload": {"promptTokens": 220, "outputTokens": 187, "concurrency": concurrency}});
    let h100 = super::gpus::gpu_node("h100", CALIBRATIONS[0].product, 81_559);
    for (concurrency, measured) in IN_FLIGHT {
        let plan = plan(&spec(load(concurrency)), &facts(), std::slice::from_ref(&h100));
        let predicted = plan.chosen.unwrap().predicted.unwrap();
        assert_eq!(predicted.basis, Basis::Measured);
        let off = predicted.tpot as f64 / 1e3 / measured - 1.0;
        assert!(off.abs() <= TOLERANCE, "{concurrency} in flight: {predicted:?}, off by {off:.3}");
    }
}

#[test]
fn planned_memory_is_within_a_fortieth_of_what_the_driver_counted() {
    for (model, facts) in [("llama-3.2-1b", facts()), ("llama-3.1-8b", eight_billion())] {
        let path = root().join(CALIBRATIONS[0].source).join(format!("{model}.json"));
        let bench: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        // As the bench sets its limits: 256 sequences, 24 pages for each.
        let limits = plimsoll_contract::memory::StepLimits {
            step_tokens_max: bench["step_tokens_max"].as_u64().unwrap() as u32,
            running_max: 256,
        };
        let facts = ModelFacts { context_tokens: 8192 + 129 + 64, ..facts };
        let bf16 = Ability::plain(Backend::Cuda, Dtype::Bf16);
        let planned = plimsoll_contract::memory::plan(&facts, bf16, limits, 256 * 24 * 64).total();
        let planned = planned + cards::CONTEXT_BYTES;
        let used = bench["used_bytes"].as_u64().unwrap();
        let off = planned as f64 / used as f64 - 1.0;
        // What is put by for the context and for kernels is more than a small model takes of it.
        assert!((0.0..=0.025).contains(&off), "{model}: planned {planned}, used {used}");
    }
}

#[test]
fn the_table_and_the_plot_of_the_docs_are_these_predictions() {
    let written = |calibration: &'static Calibration| {
        let points = points(calibration);
        let folder = root().join(calibration.source);
        [
            (folder.join("predicted.md"), table(&points)),
            (folder.join("predicted.svg"), plot(&points)),
        ]
    };
    for (path, contents) in CALIBRATIONS.iter().flat_map(written) {
        if std::env::var_os("PLIMSOLL_WRITE").is_some() {
            std::fs::write(&path, &contents).unwrap();
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(committed == contents, "{} is stale: PLIMSOLL_WRITE=1 writes it", path.display());
    }
}

fn table(points: &[Point]) -> String {
    let mut text = String::from(
        "# Predictions beside the bench\n\n\
         Written by the test `the_table_and_the_plot_of_the_docs_are_these_predictions` from the figures beside it, on the card that \
         they name; formulae: docs/planner.md. The fitted points set six efficiencies; the others were not used.\n\n\
         | model | workload | predicted, ms | measured, ms | off by | |\n|---|---|---|---|---|---|\n",
    );
    for point in points {
        let Point { model, workload, measured_ms, predicted_ms } = point;
        let used = if point.was_fitted() { "fitted" } else { "" };
        let off = point.error() * 100.0;
        writeln!(
            text,
            "| {model} | {workload} | {predicted_ms:.3} | {measured_ms:.3} | {off:+.1} % | {used} |"
        )
        .unwrap();
    }
    text + "\n![predicted against measured](predicted.svg)\n"
}

/// Deviation of every point in per cent; filled where the point was not fitted.
fn plot(points: &[Point]) -> String {
    let y = |error: f64| 170.0 - error * 1200.0;
    let mut text = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 760 440\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"760\" height=\"440\" fill=\"white\"/>\n\
         <text x=\"60\" y=\"22\" font-size=\"15\">Prediction less measurement, in per cent (hollow: used for the fit)</text>\n",
    );
    for percent in [-10i32, -5, 0, 5, 10] {
        let at = y(f64::from(percent) / 100.0);
        writeln!(
            text,
            "<line x1=\"60\" y1=\"{at:.0}\" x2=\"740\" y2=\"{at:.0}\" stroke=\"{}\"/>\
             <text x=\"52\" y=\"{:.0}\" text-anchor=\"end\">{percent:+} %</text>",
            if percent.abs() == 10 { "#c0392b" } else { "#ddd" },
            at + 4.0,
        )
        .unwrap();
    }
    for (index, point) in points.iter().enumerate() {
        let x = 68.0 + index as f64 * 13.0;
        let fill = if point.was_fitted() { "white" } else { "#2c3e50" };
        let name = point.workload.replace("_ms_per_token", "").replace("_tok_s", "");
        let name = name.replace("_ms", "").replace('_', " ");
        let model = point.model.rsplit('-').next().unwrap();
        writeln!(
            text,
            "<circle cx=\"{x:.0}\" cy=\"{:.1}\" r=\"4\" fill=\"{fill}\" stroke=\"#2c3e50\"/>\
             <text transform=\"translate({:.0},430) rotate(-90)\" font-size=\"10\">{model} {name}</text>",
            y(point.error()),
            x + 4.0,
        )
        .unwrap();
    }
    text + "</svg>\n"
}
