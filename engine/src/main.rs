//! The binary: one verb, one exit code.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use plimsoll_contract::exit::ExitReport;
use plimsoll_engine::bench::BenchOptions;
use plimsoll_engine::cli::{BenchArgs, Cli, FetchArgs, InspectArgs, Verb};
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
    let facts = inspect::facts(&args.source).map_err(|error| error.report())?;
    let json = inspect::json(&facts);
    if let Some(file) = message_file {
        let failed = |e| exit::internal(format!("failed to write {}: {e}", file.display()));
        std::fs::write(file, &json).map_err(failed)?;
    }
    print!("{}", if args.json { json + "\n" } else { inspect::table(&facts) });
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
    let options = BenchOptions {
        model: args.model.clone(),
        dtype: args.dtype.into(),
        requests: args.requests.iter().map(|&n| n as usize).collect(),
        prompt_tokens: args.prompt_tokens,
        output_tokens: args.output_tokens,
        rounds: args.rounds as usize,
        step_tokens_max: args.step_tokens_max,
        steps_in_flight: args.steps_in_flight as usize,
    };
    let report = bench::run(&options).map_err(|error| error.report())?;
    print!("{}", if args.json { report.json() + "\n" } else { report.table() });
    Ok(())
}
