//! The binary: one verb, one exit code.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use plimsoll_contract::exit::ExitReport;
use plimsoll_engine::cli::{Cli, InspectArgs, Verb};
use plimsoll_engine::{exit, inspect, logs, serve};

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
