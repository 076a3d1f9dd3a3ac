//! The binary: one verb, one exit code.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use plimsoll_contract::exit::ExitReport;
use plimsoll_engine::bench::{
    Arrivals, BenchOptions, Ceilings, KernelsOptions, SeedModel, ServeOptions, Steps, SuiteOptions,
};
use plimsoll_engine::cli::{
    BenchArgs, BenchKernelsArgs, BenchSeedArgs, BenchServeArgs, BenchVerb, Cli, FetchArgs,
    InspectArgs, LoadArgs, Verb,
};
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
    let facts = inspect::facts(source).map_err(|error| error.report())?;
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
    let source = fetch::HubSource::parse(&args.source).map_err(|error| error.report())?;
    let token = args.token_file.as_deref().map(std::fs::read_to_string).transpose();
    let token = token.map_err(|e| exit::internal(format!("failed to read the token: {e}")))?;
    let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
    let mut progress = |file: &str| eprintln!("fetching {file}");
    let commit = fetch::fetch(&source, &args.into, token, &args.endpoint, &mut progress)
        .map_err(|error| error.report())?;
    println!("{commit}");
    Ok(())
}

fn measure(args: &BenchArgs) -> Result<(), ExitReport> {
    match &args.verb {
        None => measure_load(&args.load),
        Some(BenchVerb::Serve(args)) => measure_server(args),
        Some(BenchVerb::Kernels(args)) => measure_kernels(args),
        Some(BenchVerb::Seed(args)) => measure_seed(args),
    }
}

fn measure_load(args: &LoadArgs) -> Result<(), ExitReport> {
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
fn compare(args: &LoadArgs) -> Result<(), ExitReport> {
    let name = args.random_weights.clone().expect("the command line demands one or the other");
    let usual = SuiteOptions::of(&name);
    let options = SuiteOptions {
        only: args.only.clone(),
        ceilings: Ceilings { read_tbps: args.read_tbps, bf16_tflops: args.bf16_tflops },
        step_tokens_max: args.step_tokens_max.unwrap_or(usual.step_tokens_max),
        steps_in_flight: args.steps_in_flight.map_or(usual.steps_in_flight, |n| n as usize),
        portable: args.portable,
        eager: args.eager,
        batch_invariant: args.batch_invariant,
        ..usual
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

/// Failures are in the report; that not one request succeeded is one of the process too.
fn measure_server(args: &BenchServeArgs) -> Result<(), ExitReport> {
    let options = ServeOptions {
        url: args.url.clone(),
        api_key_file: args.api_key_file.clone(),
        model: args.served_name.clone(),
        workload: args.workload.clone(),
        requests: args.requests.map(|requests| requests as usize),
        arrivals: match args.rate {
            Some(rate) => Arrivals::Open { rate },
            None => Arrivals::Closed { concurrency: args.concurrency as usize },
        },
        seed: args.seed,
        vocabulary: args.vocabulary,
        warm_up: args.warm_up as usize,
        silence_max: args.silence_max,
    };
    serve::allow_many_connections();
    let report = bench::run_serve(&options)?;
    tell(&report.table(), &report.json(), args.json.as_deref())?;
    if report.completed > 0 {
        return Ok(());
    }
    let first = report.failures.values().next().map_or("", |failures| &failures.first);
    Err(exit::internal(format!("none of {} requests succeeded: {first}", report.requests)))
}

fn measure_kernels(args: &BenchKernelsArgs) -> Result<(), ExitReport> {
    let numbers = |list: &[u32]| list.iter().map(|&n| n as usize).collect();
    let options = KernelsOptions {
        name: args.model.clone(),
        rows: numbers(&args.rows),
        contexts: numbers(&args.contexts),
        prompts: numbers(&args.prompts),
        kv_tokens: args.kv_tokens,
        ceilings: Ceilings { read_tbps: args.read_tbps, bf16_tflops: args.bf16_tflops },
        portable: args.portable,
    };
    let report = bench::run_kernels(&options, &mut |step| eprintln!("{step}"))?;
    tell(&report.table(), &report.json(), args.json.as_deref())
}

fn measure_seed(args: &BenchSeedArgs) -> Result<(), ExitReport> {
    let BenchSeedArgs { model, random_weights, device, dtype, json } = args;
    let model = match (model, random_weights) {
        (Some(dir), _) => SeedModel::Checkpoint {
            dir: dir.clone(),
            device: *device,
            dtype: dtype.map(Into::into),
        },
        (None, Some(name)) => SeedModel::Random(name.clone()),
        (None, None) => unreachable!("the command line demands one or the other"),
    };
    let report = bench::run_seed(&model)?;
    tell(&report.table(), &report.json(), json.as_deref())
}

/// A table for people; JSON where a file was named for it.
fn tell(table: &str, json: &str, file: Option<&Path>) -> Result<(), ExitReport> {
    print!("{table}");
    let Some(file) = file else { return Ok(()) };
    std::fs::write(file, json.to_owned() + "\n")
        .map_err(|e| exit::internal(format!("failed to write {}: {e}", file.display())))
}
