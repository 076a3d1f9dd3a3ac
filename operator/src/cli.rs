//! The command line: verbs and their flags, each with an owner, a default and a line of help. Nothing is done here.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::run::RunArgs;

/// Declare a model; Plimsoll plans how to run it, runs it, and says why.
#[derive(Parser)]
#[command(name = "plimsoll", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Subcommand)]
pub enum Verb {
    /// Watch LLMDeployments in a cluster, and run them
    Run(RunArgs),
    /// Serve a manifest on this machine, with no cluster: the engine as a child process
    Up(UpArgs),
    /// Print the plan for a manifest, and why, without running anything
    Plan(PlanArgs),
    /// Print the CustomResourceDefinition
    Crd,
}

/// Where the engine and the model's files come from; owned by `local`.
#[derive(Args)]
pub struct LocalArgs {
    /// The engine's program [default: beside this program, then in PATH]
    #[arg(long, value_name = "PROGRAM")]
    pub engine: Option<PathBuf>,
    /// A file with an access token of the model hub, in place of spec.model.credentials [default: none]
    #[arg(long, value_name = "FILE")]
    pub hub_token_file: Option<PathBuf>,
    /// Where hf:// models are kept [default: $XDG_CACHE_HOME/plimsoll/models, or ~/.cache/plimsoll/models]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
}

#[derive(Args)]
pub struct UpArgs {
    /// A file with an LLMDeployment; a path relative to it is allowed in spec.model.source: file://../model
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Where to serve; port 0 takes a free one
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,
    /// A file with one API key per line, in place of spec.auth [default: none]
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Ask this once the model is ready, and print the answer as it comes [default: nothing]
    #[arg(long, value_name = "QUESTION")]
    pub ask: Option<String>,
    /// Leave after the answer to --ask in place of serving on [default: off]
    #[arg(long, requires = "ask")]
    pub once: bool,
    #[command(flatten)]
    pub local: LocalArgs,
}

#[derive(Args)]
pub struct PlanArgs {
    /// A file with an LLMDeployment
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Facts of the model as `plimsoll-engine inspect --json` prints them [default: ask the engine]
    #[arg(long, value_name = "FILE")]
    pub facts: Option<PathBuf>,
    /// Memory to plan for, for instance 64Gi [default: what this machine has available]
    #[arg(long, value_name = "QUANTITY")]
    pub node_memory: Option<String>,
    /// CPUs to plan for, for instance 16 [default: those of this machine]
    #[arg(long, value_name = "QUANTITY")]
    pub node_cpu: Option<String>,
    /// The model's config.json in place of its files: no weights are read [default: the files of spec.model.source]
    #[arg(long, value_name = "FILE", conflicts_with = "facts")]
    pub config: Option<PathBuf>,
    /// Machines to plan for: GPUs of a class on one node, as nvidia-h200=8, or on several, as nvidia-h200=2x8; nodes without
    /// GPUs, as cpu=4. Hosts have 256Gi and 32 CPUs, unless --node-memory and --node-cpu say otherwise [default: this machine]
    #[arg(long, value_name = "CLASS=GPUS,…", value_delimiter = ',')]
    pub nodes: Vec<String>,
    /// A file of `CLASS: US dollars for an hour of one GPU`, in YAML or JSON [default: a dated list, docs/planner.md]
    #[arg(long, value_name = "FILE")]
    pub prices: Option<PathBuf>,
    /// List every candidate in the table, in place of the best eight [default: off]
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub local: LocalArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
    Yaml,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_flag_has_a_line_of_help_and_a_default_or_is_required() {
        for verb in Cli::command().get_subcommands() {
            for flag in verb.get_arguments().filter(|flag| flag.get_id() != "help") {
                let name = format!("{} {}", verb.get_name(), flag.get_id());
                let help =
                    flag.get_help().unwrap_or_else(|| panic!("{name} has no help")).to_string();
                let has_default =
                    !flag.get_default_values().is_empty() || help.contains("[default");
                assert!(has_default || flag.is_required_set(), "{name} has no default");
            }
        }
    }
}
