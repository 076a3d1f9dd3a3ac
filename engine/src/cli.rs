//! The command line. Enters: arguments. Leaves: typed options for one verb. Every flag has a default or is required,
//! and a line of help; the engine's team owns them all.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use plimsoll_contract::abilities::Dtype;

use crate::backend::place::DeviceArg;
use crate::bench::Ceilings;

#[derive(Debug, Parser)]
#[command(
    name = "plimsoll-engine",
    version,
    about = "Serves a language model over OpenAI's API",
    max_term_width = 100
)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Load a model and answer requests until told to stop.
    Serve(ServeArgs),
    /// Print what is known of a checkpoint before any weight is read.
    Inspect(InspectArgs),
    /// Download a model from a hub into a directory; safe to repeat.
    Fetch(FetchArgs),
    /// Measure tokens per second of a model, without HTTP; or, by its verbs, a server, kernels, the seed method.
    Bench(BenchArgs),
}

#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Directory of the checkpoint: config.json, tokenizer.json, *.safetensors.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Address for the API, the probes and the metrics; port 0 takes a free one.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,
    /// Name that clients ask for [default: the directory's name].
    #[arg(long, value_name = "NAME")]
    pub served_name: Option<String>,
    /// What computes.
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    pub device: DeviceArg,
    /// Type to compute in and to keep weights and KV pages in [default: bf16 on a GPU, f32 on a CPU].
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,
    /// Tokens the KV cache holds [default: as many as fit].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub kv_tokens: Option<u64>,
    /// Longest sequence, prompt and output [default: what the model was trained for].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub context_tokens: Option<u32>,
    /// Sequences that run at once [default: 256 on a GPU, 32 on a CPU].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub running_max: Option<u32>,
    /// Requests that may wait; one more is answered with 429.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub waiting_max: u32,
    /// Rows of one step: running sequences plus prompt tokens [default: 2048 on a GPU, 512 on a CPU].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub step_tokens_max: Option<u32>,
    /// Steps planned ahead of the one being computed: 1 or 2 [default: 2 on a GPU, 1 on a CPU].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=2))]
    pub steps_in_flight: Option<u32>,
    /// On a GPU, split sums in one way whatever the batch, so that company changes no bit of an answer; slower.
    #[arg(long)]
    pub batch_invariant: bool,
    /// Compute every prompt anew instead of reusing what is cached.
    #[arg(long)]
    pub no_prefix_reuse: bool,
    /// File with one API key per line, read again when it changes [default: no key is needed].
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// After SIGTERM, time to go on accepting requests while clients learn to go elsewhere.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub drain_grace: Duration,
    /// After that, time for running requests to finish.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub drain_timeout: Duration,
    /// Bytes the process may use [default: the cgroup's limit or what is available].
    #[arg(long, value_name = "N")]
    pub memory_bytes: Option<u64>,
    /// Where the reason of a failure is written as JSON [default: /dev/termination-log, if it exists].
    #[arg(long, value_name = "FILE")]
    pub termination_message_file: Option<PathBuf>,
    /// How to write logs; auto is text on a terminal and JSON otherwise.
    #[arg(long, value_enum, default_value_t = LogFormat::Auto)]
    pub log_format: LogFormat,
}

#[derive(Clone, Debug, Args)]
pub struct InspectArgs {
    /// Where the checkpoint lies: DIR or file:///DIR; or a config.json, which tells all but the files.
    #[arg(value_name = "SOURCE", required_unless_present = "device")]
    pub source: Option<String>,
    /// Print what is known of this machine's GPU instead; without one that can be used, the reason.
    #[arg(long, conflicts_with = "source")]
    pub device: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Also write the facts as JSON here; or, after a failure, its reason [default: /dev/termination-log, if it exists].
    #[arg(long, value_name = "FILE")]
    pub termination_message_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct FetchArgs {
    /// The model: hf://ORG/NAME or hf://ORG/NAME@REVISION.
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// Directory for its files; made if it is not there.
    #[arg(long, value_name = "DIR")]
    pub into: PathBuf,
    /// File with the hub's access token [default: none].
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// The hub's address.
    #[arg(long, value_name = "URL", env = "HF_ENDPOINT", default_value = "https://huggingface.co")]
    pub endpoint: String,
    /// Where the reason of a failure is written as JSON [default: /dev/termination-log, if it exists].
    #[arg(long, value_name = "FILE")]
    pub termination_message_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub verb: Option<BenchVerb>,
    #[command(flatten)]
    pub load: LoadArgs,
}

#[derive(Clone, Debug, Subcommand)]
pub enum BenchVerb {
    /// Drive a running server over HTTP: TTFT, TPOT, ITL, end-to-end latency, throughput, and failures by kind.
    Serve(BenchServeArgs),
    /// Time each kernel of a step by itself on the GPU, beside what the card's bandwidth and FLOP allow.
    Kernels(BenchKernelsArgs),
    /// 49 short prompts one by one, ten sampled tokens each: the latency of a request.
    Seed(BenchSeedArgs),
}

#[derive(Clone, Debug, Args)]
pub struct BenchServeArgs {
    /// Where the server answers: http://HOST:PORT.
    #[arg(long, value_name = "URL")]
    pub url: String,
    /// File whose first line is the API key to send [default: none is sent].
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Model to ask for [default: the first that the server lists].
    #[arg(long, value_name = "NAME")]
    pub served_name: Option<String>,
    /// The requests that are sent: lengths of prompts and outputs, as in docs/perf.md.
    #[arg(long, value_name = "NAME", default_value = "mixed600", value_parser = clap::builder::PossibleValuesParser::new(crate::bench::WORKLOADS))]
    pub workload: String,
    /// How many of them; its list begins anew where these are more [default: as many as the workload has].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub requests: Option<u32>,
    /// Closed loop: so many requests in flight, the next is sent when one ends.
    #[arg(long, value_name = "N", default_value_t = 256, conflicts_with = "rate", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub concurrency: u32,
    /// Open loop: so many requests a second on average, at the times of a Poisson process.
    #[arg(long, value_name = "N", value_parser = rate)]
    pub rate: Option<f64>,
    /// Seed of the prompts' token ids and of the times at which requests come.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Prompts are made of token ids below this: at most the model's vocabulary.
    #[arg(long, value_name = "N", default_value_t = 120_000, value_parser = clap::value_parser!(u32).range(2..))]
    pub vocabulary: u32,
    /// Requests that are sent before those that count, all at once.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(0..=65536))]
    pub warm_up: u32,
    /// A server that sends nothing for so long has failed a request.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub silence_max: Duration,
    /// Also write the report as JSON here.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct BenchKernelsArgs {
    /// A published shape, whose weights are made on the GPU.
    #[arg(value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(crate::model::NAMES))]
    pub model: String,
    /// Sequences of a decode step, each with one row.
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "1,8,32,128,256", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub rows: Vec<u32>,
    /// Tokens that each of them has in the KV cache.
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "128,1024,8192", value_parser = clap::value_parser!(u32).range(1..=131_072))]
    pub contexts: Vec<u32>,
    /// Tokens of a prompt that is one step.
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "512,2048,8192", value_parser = clap::value_parser!(u32).range(2..=65536))]
    pub prompts: Vec<u32>,
    /// Tokens that the KV cache holds: what needs more is left out, and said to be.
    #[arg(long, value_name = "N", default_value_t = 278_528, value_parser = clap::value_parser!(u32).range(64..))]
    pub kv_tokens: u32,
    /// TB/s that the card reads at most, for the floors.
    #[arg(long, value_name = "N", default_value_t = Ceilings::H200.read_tbps)]
    pub read_tbps: f64,
    /// TFLOP/s that the card computes at most in bf16, for the floors.
    #[arg(long, value_name = "N", default_value_t = Ceilings::H200.bf16_tflops)]
    pub bf16_tflops: f64,
    /// Use the kernels that run on every card, also on Hopper.
    #[arg(long)]
    pub portable: bool,
    /// Also write the report as JSON here.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct BenchSeedArgs {
    /// Directory of the checkpoint.
    #[arg(long, value_name = "DIR", required_unless_present = "random_weights")]
    pub model: Option<PathBuf>,
    /// A published shape instead, with random weights made on the GPU.
    #[arg(long, value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(crate::model::NAMES), conflicts_with = "model")]
    pub random_weights: Option<String>,
    /// What computes (with --random-weights always the GPU).
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto, conflicts_with = "random_weights")]
    pub device: DeviceArg,
    /// Type to compute in [default: bf16 on a GPU, f32 on a CPU].
    #[arg(long, value_enum, conflicts_with = "random_weights")]
    pub dtype: Option<DtypeArg>,
    /// Also write the report as JSON here.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct LoadArgs {
    /// Directory of the checkpoint.
    #[arg(long, value_name = "DIR", required_unless_present = "random_weights")]
    pub model: Option<PathBuf>,
    /// Compare engines instead: a published shape with random weights made on the GPU, on the workloads of docs/perf.md.
    #[arg(long, value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(crate::model::NAMES), conflicts_with = "model")]
    pub random_weights: Option<String>,
    /// Only the workloads whose name begins so (with --random-weights).
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// TB/s that the card reads at most, for the floors (with --random-weights).
    #[arg(long, value_name = "N", default_value_t = Ceilings::H200.read_tbps)]
    pub read_tbps: f64,
    /// TFLOP/s that the card computes at most in bf16, for the floors (with --random-weights).
    #[arg(long, value_name = "N", default_value_t = Ceilings::H200.bf16_tflops)]
    pub bf16_tflops: f64,
    /// Use the kernels that run on every card, also on Hopper (with --random-weights).
    #[arg(long)]
    pub portable: bool,
    /// Queue every step kernel by kernel instead of replaying recorded ones (with --random-weights).
    #[arg(long)]
    pub eager: bool,
    /// Split sums in one way whatever the batch, so that company changes no bit (with --random-weights).
    #[arg(long)]
    pub batch_invariant: bool,
    /// What computes (with --random-weights always the GPU).
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto, conflicts_with = "random_weights")]
    pub device: DeviceArg,
    /// Type to compute in [default: bf16 on a GPU, f32 on a CPU].
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,
    /// Requests at once, one row of the table each.
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "1,32", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub requests: Vec<u32>,
    /// Tokens of each prompt; they are random.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub prompt_tokens: u32,
    /// Tokens generated for each request.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub output_tokens: u32,
    /// Rounds after one that warms up; the median counts.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Rows of one step [default: 2048 on a GPU, 512 on a CPU; with --random-weights 8192].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub step_tokens_max: Option<u32>,
    /// Steps planned ahead of the one being computed: 1 or 2 [default: 2 on a GPU, 1 on a CPU].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=2))]
    pub steps_in_flight: Option<u32>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    F32,
    F16,
    Bf16,
}

impl From<DtypeArg> for Dtype {
    fn from(dtype: DtypeArg) -> Dtype {
        match dtype {
            DtypeArg::F32 => Dtype::F32,
            DtypeArg::F16 => Dtype::F16,
            DtypeArg::Bf16 => Dtype::Bf16,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Auto,
    Text,
    Json,
}

/// `500ms`, `10s`, `2m`; a bare number is seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "expected a time such as 10s or 500ms")?;
    match unit {
        "ms" => Ok(Duration::from_millis(number)),
        "s" | "" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number.saturating_mul(60))),
        _ => Err(format!("unknown unit `{unit}`; use ms, s or m")),
    }
}

/// Requests a second.
fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| "expected a number of requests a second above 0, such as 12.5".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_every_flag_has_help() {
        Cli::command().debug_assert();
        let cli = Cli::command();
        let verbs = cli.get_subcommands();
        for verb in verbs.flat_map(|verb| std::iter::once(verb).chain(verb.get_subcommands())) {
            for arg in verb.get_arguments() {
                let id = arg.get_id();
                assert!(id == "help" || id == "version" || arg.get_help().is_some(), "{id}");
            }
        }
    }

    #[test]
    fn a_verb_of_bench_takes_the_place_of_its_load() {
        let bench = |line: &str| {
            let words = ["plimsoll-engine", "bench"].into_iter().chain(line.split_whitespace());
            let Verb::Bench(args) = Cli::try_parse_from(words)?.verb else { panic!("{line}") };
            Ok::<BenchArgs, clap::Error>(args)
        };
        assert!(bench("").is_err(), "a model or a verb");
        assert!(bench("--model m").unwrap().verb.is_none());
        assert!(bench("seed").is_err() && bench("serve").is_err() && bench("kernels").is_err());
        let Some(BenchVerb::Serve(args)) = bench("serve --url http://h").unwrap().verb else {
            panic!("parsed another verb")
        };
        assert_eq!((args.workload.as_str(), args.concurrency, args.rate), ("mixed600", 256, None));
        assert!(bench("serve --url http://h --rate 0").is_err());
        assert!(bench("serve --url http://h --rate 3 --concurrency 2").is_err());
        assert!(bench("--model m serve --url http://h").is_err());
        assert!(bench("kernels llama-3.1-8b --rows 1,8").is_ok());
        assert!(bench("seed --random-weights llama-3.2-1b --device cpu").is_err());
    }

    #[test]
    fn times_are_written_with_a_unit() {
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("7"), Ok(Duration::from_secs(7)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("1h").is_err());
        assert!(duration("s").is_err());
        assert!(duration("").is_err());
    }

    #[test]
    fn serve_needs_a_model_and_nothing_else() {
        assert!(Cli::try_parse_from(["plimsoll-engine", "serve"]).is_err());
        let cli = Cli::try_parse_from(["plimsoll-engine", "serve", "--model", "m"]).unwrap();
        let Verb::Serve(args) = cli.verb else { panic!("parsed another verb") };
        assert_eq!(args.drain_grace, Duration::from_secs(10));
        assert_eq!(args.drain_timeout, Duration::from_secs(60));
    }
}
