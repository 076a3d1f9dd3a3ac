//! `bench seed`: the method by which quantized models were first compared here: 49 short prompts one after the other, ten
//! tokens each, sampled. Enters: a checkpoint on any device, or a shape with random weights on a GPU. Leaves: the mean
//! and the median of a request's latency.

use std::path::{Path, PathBuf};

use plimsoll_contract::abilities::Dtype;
use plimsoll_contract::exit::ExitReport;
use serde::Serialize;

use super::suite::{SuiteOptions, run_suite};
use super::workloads::{SEED_OUTPUT_TOKENS, Suite, requests};
use super::{BenchOptions, Numbers, limits, load};
use crate::backend::place::{DeviceArg, Place};
use crate::exit::internal;
use crate::metrics::Metrics;
use crate::model::Checkpoint;
use crate::step;

#[derive(Clone, Debug)]
pub enum SeedModel {
    Checkpoint {
        dir: PathBuf,
        device: DeviceArg,
        /// The device's best one where none is given.
        dtype: Option<Dtype>,
    },
    /// A named shape, on a GPU.
    Random(String),
}

#[derive(Clone, Debug, Serialize)]
pub struct SeedReport {
    pub model: String,
    /// As people call it.
    pub device: String,
    pub dtype: Dtype,
    pub requests: usize,
    pub output_tokens: u32,
    /// Of a request, from its submission to its last token on the host.
    pub seed_average_ms: f64,
    pub seed_median_ms: f64,
}

pub fn run_seed(model: &SeedModel) -> Result<SeedReport, ExitReport> {
    match model {
        SeedModel::Checkpoint { dir, device, dtype } => checkpoint(dir, *device, *dtype),
        SeedModel::Random(name) => random(name),
    }
}

fn checkpoint(
    dir: &Path,
    device: DeviceArg,
    dtype: Option<Dtype>,
) -> Result<SeedReport, ExitReport> {
    let place = Place::choose(device)?;
    let ability = place.ability(dtype)?;
    let checkpoint = Checkpoint::open(dir).map_err(|error| error.report())?;
    let longest = requests("seed").into_iter().flatten().map(|(prompt, _)| prompt).max();
    let options = BenchOptions {
        model: dir.to_owned(),
        device,
        dtype,
        requests: vec![1],
        prompt_tokens: longest.expect("the method has prompts"),
        output_tokens: SEED_OUTPUT_TOKENS,
        rounds: 1,
        step_tokens_max: None,
        steps_in_flight: None,
    };
    let limits = limits(&options, ability.backend);
    let (backend, _) =
        load(&place, &checkpoint, ability, &limits).map_err(|error| error.report())?;
    let metrics = Metrics::new("bench", limits.context_tokens);
    let engine = step::start(backend, limits, metrics);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime without drivers needs nothing from the system");
    let mut suite = Suite {
        engine: &engine,
        runtime: &runtime,
        vocabulary: checkpoint.facts().vocabulary,
        numbers: Numbers(1),
        show: &mut |_, _| (),
    };
    let (average, median) = suite.seed();
    Ok(report(dir.display().to_string(), place.name(), ability.weights, average, median))
}

fn random(name: &str) -> Result<SeedReport, ExitReport> {
    let options = SuiteOptions { only: vec!["seed".into()], ..SuiteOptions::of(name) };
    let suite = run_suite(&options, &mut |_, _, _| ())?;
    let figure = |name: &str| {
        let figure = suite.figures.get(name).copied();
        figure.ok_or_else(|| internal(format!("the workloads leave {name}")))
    };
    let (average, median) = (figure("seed_average_ms")?, figure("seed_median_ms")?);
    Ok(report(name.to_owned(), suite.device.clone(), Dtype::Bf16, average, median))
}

fn report(
    model: String,
    device: String,
    dtype: Dtype,
    seed_average_ms: f64,
    seed_median_ms: f64,
) -> SeedReport {
    SeedReport {
        model,
        device,
        dtype,
        requests: requests("seed").map_or(0, |requests| requests.len()),
        output_tokens: SEED_OUTPUT_TOKENS,
        seed_average_ms,
        seed_median_ms,
    }
}

impl SeedReport {
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report holds only names and numbers")
    }

    /// Markdown.
    pub fn table(&self) -> String {
        format!(
            "{} in {} on {}: {} sampled tokens a request, {} requests one by one\n\n\
             | milliseconds a request | mean | median |\n|---|---|---|\n| seed | {:.2} | {:.2} |\n",
            self.model,
            self.dtype.name(),
            self.device,
            self.output_tokens,
            self.requests,
            self.seed_average_ms,
            self.seed_median_ms,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_method_runs_on_a_cpu() {
        let dir = format!("{}/../tests/model", env!("CARGO_MANIFEST_DIR")).into();
        let model = SeedModel::Checkpoint { dir, device: DeviceArg::Cpu, dtype: None };
        let report = run_seed(&model).unwrap();
        assert_eq!((report.requests, report.output_tokens, report.dtype), (49, 10, Dtype::F32));
        assert!(report.seed_median_ms > 0.0 && report.seed_average_ms > 0.0, "{report:?}");
        assert!(report.table().contains("10 sampled tokens a request, 49 requests"));
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        // Reading a number back may lose its last bit.
        let read = json["seed_median_ms"].as_f64().unwrap();
        assert!((read - report.seed_median_ms).abs() < 1e-9, "{read} {report:?}");
    }
}
