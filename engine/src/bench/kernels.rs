//! `bench kernels`: each kernel of a step by itself, beside its floor: its bytes at the read ceiling or its FLOP at the
//! compute ceiling, whichever take longer. Enters: a shape's name and steps. Leaves: a table and JSON. A small kernel is
//! ruled by its launch, some 2 µs, and what is small enough to stay in the L2 may beat the floor of memory.

use std::sync::Arc;

use plimsoll_contract::abilities::PAGE_TOKENS;
use plimsoll_contract::exit::ExitReport;
use plimsoll_contract::memory::StepLimits;
use serde::Serialize;

use super::Ceilings;
use crate::backend::cuda::parts::{Part, StepKind};
use crate::backend::cuda::{CudaBackend, CudaOptions, Source};
use crate::backend::place::{DeviceArg, Place};
use crate::exit::internal;
use crate::model::{Config, Plan, named};

#[derive(Clone, Debug)]
pub struct KernelsOptions {
    pub name: String,
    /// Sequences of a decode step.
    pub rows: Vec<usize>,
    /// What each of them has in the cache; every number of rows meets every context for which there is room.
    pub contexts: Vec<usize>,
    pub prompts: Vec<usize>,
    /// What the cache holds.
    pub kv_tokens: u32,
    pub ceilings: Ceilings,
    /// The kernels that run on every card, also on Hopper.
    pub portable: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct KernelsReport {
    pub model: String,
    pub quant: &'static str,
    pub engine: String,
    pub device: String,
    pub portable: bool,
    pub ceilings: Ceilings,
    pub kernels: Vec<KernelRow>,
    /// Steps for which the cache has no room.
    pub left_out: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct KernelRow {
    pub step: String,
    pub kernel: &'static str,
    /// In a step.
    pub launches: usize,
    /// Of one launch, as the next four.
    pub time_us: f64,
    pub bytes: f64,
    pub flop: f64,
    pub floor_us: f64,
    /// What `floor_us` is of `time_us`.
    pub share: f64,
}

/// What a launch moves and computes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Cost {
    bytes: f64,
    flop: f64,
}

impl Cost {
    fn seconds(self, ceilings: Ceilings) -> f64 {
        let memory = self.bytes / (ceilings.read_tbps * 1e12);
        memory.max(self.flop / (ceilings.bf16_tflops * 1e12))
    }
}

/// `show` is told of each step as it comes.
pub fn run_kernels(
    options: &KernelsOptions,
    show: &mut dyn FnMut(&str),
) -> Result<KernelsReport, ExitReport> {
    let config = named(&options.name)
        .ok_or_else(|| internal(format!("no shape is called {}", options.name)))?;
    let Place::Cuda(device) = Place::choose(DeviceArg::Cuda)? else {
        return Err(internal("--device cuda leads to a GPU or to a refusal"));
    };
    let pages = options.kv_tokens.div_ceil(PAGE_TOKENS);
    let (steps, too_large): (Vec<StepKind>, Vec<StepKind>) =
        steps(options).into_iter().partition(|step| step.pages() <= pages as usize);
    let plan = Plan::new(&config);
    let source = Source::Random { plan: &plan, seed: 1 };
    let cuda = cuda_options(options, pages);
    let mut backend = CudaBackend::load(Arc::clone(&device), source, cuda, &mut |_| ())
        .map_err(|error| error.report())?;
    backend.fill_pages().map_err(|error| internal(error.to_string()))?;
    let mut kernels = Vec::new();
    for step in steps {
        let name = step_name(step);
        show(&name);
        let parts = backend.time_parts(step).map_err(|error| internal(error.to_string()))?;
        kernels.extend(
            parts
                .into_iter()
                .map(|(part, seconds)| row(&config, &name, step, part, seconds, options.ceilings)),
        );
    }
    Ok(KernelsReport {
        model: options.name.clone(),
        quant: "bf16",
        engine: format!("plimsoll {}", env!("CARGO_PKG_VERSION")),
        device: device.name().unwrap_or_default(),
        portable: options.portable,
        ceilings: options.ceilings,
        kernels,
        left_out: too_large.into_iter().map(step_name).collect(),
    })
}

fn steps(options: &KernelsOptions) -> Vec<StepKind> {
    let contexts = &options.contexts;
    let decode = options
        .rows
        .iter()
        .flat_map(|&rows| contexts.iter().map(move |&context| StepKind::Decode { rows, context }));
    decode.chain(options.prompts.iter().map(|&tokens| StepKind::Prompt { tokens })).collect()
}

/// Room for the largest step of each kind.
fn cuda_options(options: &KernelsOptions, pages: u32) -> CudaOptions {
    let most = |numbers: &[usize]| numbers.iter().copied().max().unwrap_or(0) as u32;
    let (rows, prompt) = (most(&options.rows).max(1), most(&options.prompts));
    CudaOptions {
        kv_pages: pages,
        step: StepLimits { step_tokens_max: prompt.max(rows), running_max: rows },
        context_tokens: (most(&options.contexts) + 1).max(prompt),
        recorded: false,
        portable: options.portable,
        batch_invariant: false,
    }
}

fn step_name(step: StepKind) -> String {
    match step {
        StepKind::Decode { rows, context } => format!("decode {rows} x {context}"),
        StepKind::Prompt { tokens } => format!("prompt {tokens}"),
    }
}

fn row(
    config: &Config,
    name: &str,
    step: StepKind,
    part: Part,
    seconds: f64,
    ceilings: Ceilings,
) -> KernelRow {
    let cost = cost(config, step, part);
    let floor = cost.seconds(ceilings);
    KernelRow {
        step: name.to_owned(),
        kernel: part.name(),
        launches: if part.is_of_a_layer() { config.layers } else { 1 },
        time_us: seconds * 1e6,
        bytes: cost.bytes,
        flop: cost.flop,
        floor_us: floor * 1e6,
        share: floor / seconds,
    }
}

/// Every operand read once and every result written once; FLOP of products and of attention alone. Of the whole step all
/// parts that a greedy one has.
fn cost(config: &Config, step: StepKind, part: Part) -> Cost {
    let hidden = config.hidden as f64;
    let attended = (config.heads * config.head_dim) as f64;
    let kept = (config.kv_heads * config.head_dim) as f64;
    let intermediate = config.intermediate as f64;
    let vocabulary = config.vocabulary as f64;
    // The largest logit of each 64, with its token.
    let bests = vocabulary / 64.0 * 8.0;
    // Query-key pairs, and tokens whose keys and values are read.
    let (rows, pairs, kv_tokens) = match step {
        StepKind::Decode { rows, context } => {
            let tokens = (rows * (context + 1)) as f64;
            (rows as f64, tokens, tokens)
        }
        StepKind::Prompt { tokens } => {
            let tokens = tokens as f64;
            (tokens, tokens * (tokens + 1.0) / 2.0, tokens)
        }
    };
    let product = |weights: f64, in_and_out: f64| Cost {
        bytes: 2.0 * (weights + rows * in_and_out),
        flop: 2.0 * rows * weights,
    };
    let moved = |bytes: f64| Cost { bytes, flop: 0.0 };
    match part {
        Part::Step => whole(config, step),
        Part::Embed => moved(rows * 6.0 * hidden),
        Part::Qkv => {
            let out = attended + 2.0 * kept;
            product(hidden * out, hidden + out)
        }
        Part::RopeKv => moved(2.0 * rows * (2.0 * attended + 4.0 * kept)),
        Part::Attention => Cost {
            bytes: 4.0 * kv_tokens * kept + 4.0 * rows * attended,
            flop: 4.0 * pairs * attended,
        },
        // The residual stream is read and written, and written once more for the next norm.
        Part::Output => product(attended * hidden, attended + 3.0 * hidden),
        Part::GateUp => product(2.0 * intermediate * hidden, hidden + intermediate),
        Part::Down => product(intermediate * hidden, intermediate + 3.0 * hidden),
        Part::Head => product(vocabulary * hidden, hidden + bests / 2.0),
        Part::HeadLogits => product(vocabulary * hidden, hidden + bests / 2.0 + 2.0 * vocabulary),
        Part::Greedy => moved(rows * bests),
        Part::Sample => moved(rows * 4.0 * vocabulary),
    }
}

fn whole(config: &Config, step: StepKind) -> Cost {
    let sampled = [Part::Step, Part::HeadLogits, Part::Sample];
    let parts = Part::of(step).iter().filter(|part| !sampled.contains(part));
    parts.fold(Cost::default(), |sum, &part| {
        let launches = if part.is_of_a_layer() { config.layers as f64 } else { 1.0 };
        let Cost { bytes, flop } = cost(config, step, part);
        Cost { bytes: sum.bytes + launches * bytes, flop: sum.flop + launches * flop }
    })
}

impl KernelsReport {
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report holds only names and numbers")
    }

    /// Markdown, a table for each step.
    pub fn table(&self) -> String {
        let Ceilings { read_tbps, bf16_tflops } = self.ceilings;
        let mut text = format!(
            "{} in {} on {}; floors at {read_tbps:.2} TB/s and {bf16_tflops:.0} TFLOP/s\n",
            self.model, self.quant, self.device
        );
        let mut step = "";
        for row in &self.kernels {
            if row.step != step {
                step = &row.step;
                text += &format!(
                    "\n{step}\n\n| kernel | µs | launches | µs a step | MB | GFLOP | floor, µs | share |\n\
                     |---|---|---|---|---|---|---|---|\n"
                );
            }
            text += &format!(
                "| {} | {:.2} | {} | {:.0} | {:.2} | {:.2} | {:.2} | {:.0} % |\n",
                row.kernel,
                row.time_us,
                row.launches,
                row.time_us * row.launches as f64,
                row.bytes / 1e6,
                row.flop / 1e9,
                row.floor_us,
                row.share * 100.0,
            );
        }
        if !self.left_out.is_empty() {
            text += &format!(
                "\nleft out, for they need more than --kv-tokens: {}\n",
                self.left_out.join(", ")
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DECODE: StepKind = StepKind::Decode { rows: 1, context: 255 };

    fn options() -> KernelsOptions {
        KernelsOptions {
            name: "llama-3.1-8b".into(),
            rows: vec![1, 256],
            contexts: vec![128, 8192],
            prompts: vec![512],
            kv_tokens: 278_528,
            ceilings: Ceilings::H200,
            portable: false,
        }
    }

    #[test]
    fn a_step_costs_what_the_table_of_aims_says() {
        let config = named("llama-3.1-8b").unwrap();
        let milliseconds = |step| cost(&config, step, Part::Step).seconds(Ceilings::H200) * 1e3;
        assert!((milliseconds(DECODE) - 3.40).abs() < 0.02, "{}", milliseconds(DECODE));
        let long = StepKind::Decode { rows: 1, context: 8256 };
        assert!((milliseconds(long) - 3.64).abs() < 0.02, "{}", milliseconds(long));
        let prompt = StepKind::Prompt { tokens: 8192 };
        assert!((milliseconds(prompt) - 176.0).abs() < 3.0, "{}", milliseconds(prompt));
    }

    #[test]
    fn a_kernel_costs_its_operands() {
        let config = named("llama-3.1-8b").unwrap();
        // 6,144 × 4,096 weights, a row of 4,096 in and of 6,144 out.
        let qkv = cost(&config, DECODE, Part::Qkv);
        assert_eq!(qkv.bytes, 2.0 * (6144.0 * 4096.0 + 4096.0 + 6144.0));
        assert_eq!(qkv.flop, 2.0 * 6144.0 * 4096.0);
        // Keys and values of 256 tokens: 8 heads of 128, two bytes each; queries in and out.
        let attention = cost(&config, DECODE, Part::Attention);
        assert_eq!(attention.bytes, 256.0 * 4096.0 + 2.0 * 2.0 * 4096.0);
        assert_eq!(attention.flop, 4.0 * 256.0 * 4096.0);
    }

    #[test]
    fn a_row_and_the_table_show_the_share() {
        let config = named("llama-3.1-8b").unwrap();
        let row = row(&config, "decode 1 x 255", DECODE, Part::GateUp, 60e-6, Ceilings::H200);
        assert_eq!((row.launches, row.kernel), (32, "gate and up"));
        assert!((row.floor_us - 53.15).abs() < 0.1 && (row.share - 0.886).abs() < 0.002, "{row:?}");
        let report = KernelsReport {
            model: "llama-3.1-8b".into(),
            quant: "bf16",
            engine: String::new(),
            device: "card".into(),
            portable: false,
            ceilings: Ceilings::H200,
            kernels: vec![row],
            left_out: vec!["decode 256 x 8192".into()],
        };
        let table = report.table();
        assert!(table.contains("| gate and up | 60.00 | 32 | 1920 |"), "{table}");
        assert!(table.contains("| 89 % |") && table.contains("left out"), "{table}");
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["kernels"][0]["launches"], 32);
    }

    #[test]
    fn steps_are_every_pair_and_every_prompt_and_the_largest_has_room() {
        let options = options();
        let steps = steps(&options);
        assert_eq!(steps.len(), 5);
        let pages = options.kv_tokens.div_ceil(PAGE_TOKENS) as usize;
        let full = StepKind::Decode { rows: 256, context: 1024 };
        assert!(full.pages() <= pages && steps[3].pages() > pages, "{steps:?}");
        let cuda = cuda_options(&options, pages as u32);
        assert_eq!((cuda.step.running_max, cuda.step.step_tokens_max), (256, 512));
        assert_eq!(cuda.context_tokens, 8193);
    }
}
