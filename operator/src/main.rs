//! The `plimsoll` program: the command line enters, one verb runs, an exit code leaves.

mod amount;
mod apply;
mod ask;
mod change;
mod cli;
mod decide;
mod desired;
mod engine;
mod events;
mod exhausted;
mod facts;
mod fields;
mod inspect;
mod leader;
mod lifecycle;
mod local;
mod manifest;
mod measure;
mod measured;
mod memory;
mod metrics;
mod neighbours;
mod observe;
mod plan;
mod pods;
mod reconcile;
mod revision;
mod rollout;
mod run;
mod scale;
mod show;
#[cfg(test)]
mod simulation;
mod spec;
mod status;
mod up;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Verb};

fn main() -> ExitCode {
    let result = match Cli::parse().verb {
        Verb::Run(args) => run::run(args),
        Verb::Up(args) => up::up(&args),
        Verb::Plan(args) => local::print_plan(&args),
        Verb::Crd => print_crd(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("plimsoll: {error:#}");
        ExitCode::FAILURE
    })
}

fn print_crd() -> anyhow::Result<ExitCode> {
    std::io::stdout().write_all(plimsoll_crds::generated::crd_yaml().as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
