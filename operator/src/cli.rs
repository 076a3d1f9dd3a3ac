//! The command line: verbs and their flags, each with a default, a line of help, and an owner, by whom `--help` groups
//! them. Nothing is done here.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::run::RunArgs;

/// Owner of what whoever installs the chart decides.
pub const CHART_VALUES: &str = "Set by the chart, each from the value that is named";
/// Owner of what the chart knows by itself.
pub const CHART: &str = "Set by the chart for every operator";
/// Owner of all others.
const YOU: &str = "Set by you";

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

/// The engine, and how it is known to a hub.
#[derive(Args)]
#[command(next_help_heading = YOU)]
pub struct LocalArgs {
    /// The engine's program [default: beside this program, then in PATH]
    #[arg(long, value_name = "PROGRAM")]
    pub engine: Option<PathBuf>,
    /// A file with an access token of the model hub, in place of spec.model.credentials [default: none]
    #[arg(long, value_name = "FILE")]
    pub hub_token_file: Option<PathBuf>,
}

#[derive(Args)]
#[command(next_help_heading = YOU)]
pub struct UpArgs {
    /// A file with an LLMDeployment; a path relative to it is allowed in spec.model.source: file://../model
    #[arg(value_name = "FILE", help_heading = None)]
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
    /// Where hf:// models are kept [default: $XDG_CACHE_HOME/plimsoll/models, or ~/.cache/plimsoll/models]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    #[command(flatten)]
    pub local: LocalArgs,
}

#[derive(Args)]
#[command(next_help_heading = YOU)]
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
    use clap::{Arg, Command, CommandFactory};

    use super::*;

    fn flags(verb: &Command) -> impl Iterator<Item = &Arg> {
        verb.get_arguments().filter(|flag| !flag.is_positional() && flag.get_id() != "help")
    }

    #[test]
    fn every_flag_has_a_line_of_help_an_owner_and_a_default_or_is_required() {
        for verb in Cli::command().get_subcommands() {
            for flag in flags(verb) {
                let name = format!("{} {}", verb.get_name(), flag.get_id());
                let help =
                    flag.get_help().unwrap_or_else(|| panic!("{name} has no help")).to_string();
                let has_default =
                    !flag.get_default_values().is_empty() || help.contains("[default");
                assert!(has_default || flag.is_required_set(), "{name} has no default");
                let owners: &[&str] =
                    if verb.get_name() == "run" { &[CHART_VALUES, CHART] } else { &[YOU] };
                let owner = flag.get_help_heading();
                assert!(owner.is_some_and(|owner| owners.contains(&owner)), "{name}: {owner:?}");
            }
        }
    }

    /// Of the template as text.
    #[test]
    fn the_chart_sets_every_flag_of_run_from_the_value_that_its_help_names() {
        let template = include_str!("../../charts/plimsoll/templates/deployment.yaml");
        let command = Cli::command();
        let run = command.find_subcommand("run").unwrap();
        for flag in flags(run) {
            let name = flag.get_long().unwrap();
            let variable = flag.get_env().and_then(|name| name.to_str());
            let is_set = match variable {
                Some(variable) => template.contains(&format!("- name: {variable}\n")),
                None => template.contains(&format!("- --{name}")),
            };
            assert!(is_set, "the chart does not set --{name}");
            if flag.get_help_heading() == Some(CHART_VALUES) {
                let help = flag.get_help().unwrap().to_string();
                let value = help.split_once("(value ").and_then(|(_, rest)| rest.split_once(')'));
                let (value, _) = value.unwrap_or_else(|| panic!("--{name} names no value"));
                // Values of an older release may lack the map that holds them, so that the two may stand apart.
                let (map, entry) = value.split_once('.').unwrap_or((value, value));
                let read = template.contains(&format!(".Values.{map}")) && template.contains(entry);
                assert!(read, "--{name}: {value}");
            }
        }
        let set = template.lines().filter_map(|line| line.trim().strip_prefix("- --"));
        for line in set {
            let name = line.split('=').next().unwrap();
            assert!(flags(run).any(|flag| flag.get_long() == Some(name)), "--{name} is no flag");
        }
    }
}
