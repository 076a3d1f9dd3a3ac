//! The binary: one verb, one exit code.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use plimsoll_contract::exit::ExitReport;
use plimsoll_engine::bench::{BenchOptions, Ceilings, Steps, SuiteOptions};
use plimsoll_engine::cli::{BenchArgs, Cli, FetchArgs, HubArgs, InspectArgs, Verb};
use plimsoll_engine::fetch::{Hub, HubSource, peek};
use plimsoll_engine::{bench, exit, fetch, inspect, logs, serve};

fn main() -> ExitCode {
    match Cli::parse().verb {
        Verb::Serve(args) => {
            logs::start(args.log_format);
            let file = exit::termination_message_file(args.termination_message_file.as_deref());
            exit::finish(file.as_deref(), || serve::run(&args))
        }
        Verb::Inspect(args) => {
            let file = exit::termination_message_file(args.termination_message_file.as_deref());
            exit::finish(file.as_deref(), || print_facts(&args, file.as_deref()))
        }
        Verb::Fetch(args) => {
            let file = exit::termination_message_file(args.termination_message_file.as_deref());
            exit::finish(file.as_deref(), || download(&args))
        }
        Verb::Bench(args) => exit::finish(None, || measure(&args)),
    }
}

/// To standard output for people, to the termination message for the operator.
fn print_facts(args: &InspectArgs, message_file: Option<&Path>) -> Result<(), ExitReport> {
    let Some(source) = &args.source else { return print_device(args) };
    let facts = if source.starts_with("hf://") {
        let hub = hub(&args.hub)?;
        HubSource::parse(source).and_then(|source| peek::facts(&source, &hub, &mut told))
    } else {
        inspect::facts(source)
    };
    let facts = facts.map_err(|error| error.report())?;
    let json = inspect::json(&facts);
    if let Some(file) = message_file {
        let failed = |e| exit::internal(format!("failed to write {}: {e}", file.display()));
        std::fs::write(file, &json).map_err(failed)?;
    }
    print!("{}", if args.json { json + "\n" } else { inspect::table(&facts) });
    Ok(())
}

fn print_device(args: &InspectArgs) -> Result<(), ExitReport> {
    let facts = inspect::device_facts();
    print!(
        "{}",
        if args.json { inspect::device_json(&facts) + "\n" } else { inspect::device_table(&facts) }
    );
    Ok(())
}

fn download(args: &FetchArgs) -> Result<(), ExitReport> {
    let source = HubSource::parse(&args.source).map_err(|error| error.report())?;
    let commit = fetch::fetch(&source, &args.into, &hub(&args.hub)?, &mut told)
        .map_err(|error| error.report())?;
    println!("{commit}");
    Ok(())
}

fn told(file: &str) {
    eprintln!("fetching {file}");
}

fn hub(args: &HubArgs) -> Result<Hub, ExitReport> {
    let token = args.token_file.as_deref().map(std::fs::read_to_string).transpose();
    let token = token.map_err(|e| exit::internal(format!("failed to read the token: {e}")))?;
    let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
    Ok(Hub { endpoint: args.endpoint.clone(), token })
}

fn measure(args: &BenchArgs) -> Result<(), ExitReport> {
    let Some(model) = args.model.clone() else { return compare(args) };
    let options = BenchOptions {
        model,
        device: args.device,
        dtype: args.dtype.map(Into::into),
        requests: args.requests.iter().map(|&n| n as usize).collect(),
        prompt_tokens: args.prompt_tokens,
        output_tokens: args.output_tokens,
        rounds: args.rounds as usize,
        step_tokens_max: args.step_tokens_max,
        steps_in_flight: args.steps_in_flight.map(|steps| steps as usize),
    };
    let report = bench::run(&options)?;
    print!("{}", if args.json { report.json() + "\n" } else { report.table() });
    Ok(())
}

/// The workloads of docs/perf.md; each figure also goes to standard error as it comes.
fn compare(args: &BenchArgs) -> Result<(), ExitReport> {
    let options = SuiteOptions {
        name: args.random_weights.clone().expect("the command line demands one or the other"),
        only: args.only.clone(),
        ceilings: Ceilings { read_tbps: args.read_tbps, bf16_tflops: args.bf16_tflops },
        // As the peers had it.
        step_tokens_max: args.step_tokens_max.unwrap_or(8192),
        steps_in_flight: args.steps_in_flight.unwrap_or(2) as usize,
        portable: args.portable,
        eager: args.eager,
        batch_invariant: args.batch_invariant,
    };
    let mut show = |name: &str, figure: f64, steps: &Steps| {
        let Steps { count, busy_p50, idle_p50, idle_p99 } = steps;
        eprintln!(
            "{name} {figure:.3} ({count} steps: {busy_p50:.0} us busy, {idle_p50:.1} idle, p99 {idle_p99:.1})"
        );
    };
    let report = bench::run_suite(&options, &mut show)?;
    print!("{}", if args.json { report.json() + "\n" } else { report.table() });
    Ok(())
}
