//! Runs the scaling loop, the HorizontalPodAutoscaler's algorithm and KEDA's on the same traffic. The table goes between the
//! marks of a page, one run goes into a file for tests/scaling/plot.py: `scaling SEEDS docs/scaling.md RUN.csv`. Without
//! files the table is printed. `make soak-scaling` calls it.

// The parts are the operator's own; the example uses some of each.
#[allow(dead_code)]
#[path = "../src/scale/decide.rs"]
mod decide;
#[allow(dead_code)]
#[path = "../src/scale/rivals.rs"]
mod rivals;
#[allow(dead_code)]
#[path = "../src/scale/signals.rs"]
mod signals;
#[allow(dead_code)]
#[path = "../src/scale/simulation.rs"]
mod simulation;

use std::fmt::Write as _;

use rivals::{Hpa, Keda, Measure};
use simulation::{Ours, Outcome, Scenario, Shape, run};

const SEEDS_DEFAULT: u64 = 200;
const SHAPES: [(Shape, &str); 5] = [
    (Shape::Steady, "steady"),
    (Shape::Step, "one step up and down"),
    (Shape::Ramp, "ramp up and down"),
    (Shape::Waves, "waves of 40 min"),
    (Shape::Bursts, "bursts of 2 min, every 15 min"),
];
/// The run that is plotted.
const PLOTTED: (Shape, u64) = (Shape::Step, 3);

/// Between these the page has its table.
const MARKS: [&str; 2] = ["<!-- table of `make soak-scaling` -->\n", "<!-- end of the table -->\n"];

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let seeds = arguments.first().and_then(|text| text.parse().ok()).unwrap_or(SEEDS_DEFAULT);
    let table = table(seeds);
    let [_, page, run_file] = arguments.as_slice() else {
        print!("{table}");
        return Ok(());
    };
    let text = std::fs::read_to_string(page)?;
    let (head, rest) = text.split_once(MARKS[0]).expect("the page has the first mark");
    let (_, tail) = rest.split_once(MARKS[1]).expect("the page has the second mark");
    std::fs::write(page, [head, MARKS[0], &table, MARKS[1], tail].concat())?;
    let scenario = Scenario::random(PLOTTED.0, PLOTTED.1);
    std::fs::write(run_file, csv(&scenario, &run(&scenario, &mut Ours::new())))
}

fn table(seeds: u64) -> String {
    let mut text = format!(
        "Means of {seeds} runs of 2 h each.\n\n\
         | traffic | chosen by | late minutes | replica-hours | changes | changes of direction |\n\
         |---|---|---|---|---|---|\n"
    );
    for (shape, words) in SHAPES {
        let mut of: [Vec<Outcome>; 4] = Default::default();
        for seed in 0..seeds {
            let scenario = Scenario::random(shape, seed);
            of[0].push(run(&scenario, &mut Ours::new()));
            of[1].push(run(&scenario, &mut Hpa::new(Measure::InFlight)));
            of[2].push(run(&scenario, &mut Hpa::new(Measure::Waiting)));
            of[3].push(run(&scenario, &mut Keda::new()));
        }
        let names = ["spec.scaling", "HPA, in flight", "HPA, waiting", "KEDA, waiting"];
        for (name, outcomes) in names.iter().zip(&of) {
            let mean = |value: fn(&Outcome) -> f64| {
                outcomes.iter().map(value).sum::<f64>() / outcomes.len() as f64
            };
            writeln!(
                text,
                "| {words} | {name} | {:.1} | {:.1} | {:.1} | {:.1} |",
                mean(|outcome| outcome.late_minutes.into()),
                mean(|outcome| outcome.replica_hours),
                mean(|outcome| outcome.changes.into()),
                mean(|outcome| outcome.turns(0).into()),
            )
            .expect("writing to memory does not fail");
        }
    }
    text
}

fn csv(scenario: &Scenario, outcome: &Outcome) -> String {
    let one = scenario.one_replica();
    let mut text = String::from("seconds,requests_per_second,desired,ready,ttft_ms\n");
    for point in &outcome.points {
        let ttft = outcome.ttft_by_minute.get((point.at / 60) as usize).copied().unwrap_or(0.0);
        writeln!(
            text,
            "{},{:.3},{},{},{:.0}",
            point.at,
            point.load * one,
            point.desired,
            point.ready,
            ttft * 1000.0
        )
        .expect("writing to memory does not fail");
    }
    text
}
