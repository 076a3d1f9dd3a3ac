//! `bench --random-weights NAME`: the workloads by which engines are compared, on a GPU, with the floor of each figure
//! beside it. Enters: a shape's name. Leaves: a table, and JSON with the keys of the peers' files.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use plimsoll_contract::exit::ExitReport;
use plimsoll_contract::memory::StepLimits;
use serde::Serialize;

use super::Numbers;
use super::workloads::{CONTEXT_TOKENS, Figures, RUNNING_MAX, Suite};
use crate::backend::cuda::clock::StepTime;
use crate::backend::cuda::{CudaBackend, CudaOptions, Source};
use crate::backend::place::{DeviceArg, Place};
use crate::exit::internal;
use crate::memory::rss_bytes;
use crate::metrics::Metrics;
use crate::model::{Config, Plan, named};
use crate::step::{self, Limits};

#[derive(Clone, Debug)]
pub struct SuiteOptions {
    pub name: String,
    /// Only workloads whose name begins with one of these; none: all.
    pub only: Vec<String>,
    /// What the card reads and computes at most, as measured in the same run.
    pub ceilings: Ceilings,
    pub step_tokens_max: u32,
    pub steps_in_flight: usize,
    /// Products of the portable family alone.
    pub portable: bool,
    /// Every step queued kernel by kernel.
    pub eager: bool,
    /// Fixed splits, so that company changes no bit.
    pub batch_invariant: bool,
}

impl SuiteOptions {
    /// Everything, as the peers had it, on the card that the table of aims names.
    pub fn of(name: &str) -> SuiteOptions {
        SuiteOptions {
            name: name.to_owned(),
            only: Vec::new(),
            ceilings: Ceilings::H200,
            step_tokens_max: 8192,
            steps_in_flight: 2,
            portable: false,
            eager: false,
            batch_invariant: false,
        }
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceilings {
    /// TB/s of reading.
    pub read_tbps: f64,
    /// TFLOP/s of dense bf16 products.
    pub bf16_tflops: f64,
}

impl Ceilings {
    /// As measured on an H200, for runs that bring none of their own.
    pub const H200: Ceilings = Ceilings { read_tbps: 4.42, bf16_tflops: 750.0 };
}

#[derive(Clone, Debug, Serialize)]
pub struct SuiteReport {
    pub model: String,
    pub quant: &'static str,
    pub engine: String,
    pub device: String,
    pub weights: &'static str,
    pub load_s: f64,
    pub ceilings: Ceilings,
    pub step_tokens_max: u32,
    pub steps_in_flight: usize,
    pub rss_bytes: Option<u64>,
    /// Device memory as planned, and as the driver counts it, context included.
    pub planned_bytes: u64,
    pub used_bytes: u64,
    #[serde(flatten)]
    pub figures: Figures,
    /// Of each figure, in its unit: what bytes and FLOP at the ceilings allow.
    pub floors: BTreeMap<String, f64>,
    /// Of each workload's steps: how long the device worked and waited, in microseconds.
    pub steps: BTreeMap<String, Steps>,
}

/// Percentiles over a workload's steps, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Steps {
    pub count: usize,
    pub busy_p50: f64,
    pub idle_p50: f64,
    pub idle_p99: f64,
}

impl Steps {
    fn of(times: &[StepTime]) -> Steps {
        let at = |part: fn(&StepTime) -> f64, share: f64| {
            let mut all: Vec<f64> = times.iter().map(part).collect();
            all.sort_by(f64::total_cmp);
            let index = (share * all.len() as f64) as usize;
            all.get(index.min(all.len().saturating_sub(1))).copied().unwrap_or(0.0) * 1e6
        };
        Steps {
            count: times.len(),
            busy_p50: at(|t| t.busy, 0.5),
            idle_p50: at(|t| t.idle, 0.5),
            idle_p99: at(|t| t.idle, 0.99),
        }
    }
}

pub fn run_suite(
    options: &SuiteOptions,
    show: &mut dyn FnMut(&str, f64, &Steps),
) -> Result<SuiteReport, ExitReport> {
    let begun = Instant::now();
    let config = named(&options.name)
        .ok_or_else(|| internal(format!("no shape is called {}", options.name)))?;
    let Place::Cuda(device) = Place::choose(DeviceArg::Cuda)? else {
        return Err(internal("--device cuda leads to a GPU or to a refusal"));
    };
    let plan = Plan::new(&config);
    let limits = limits(options);
    let cuda = CudaOptions {
        kv_pages: limits.kv_pages[0],
        step: StepLimits {
            step_tokens_max: options.step_tokens_max,
            running_max: RUNNING_MAX as u32,
        },
        context_tokens: CONTEXT_TOKENS,
        recorded: !options.eager,
        portable: options.portable,
        batch_invariant: options.batch_invariant,
    };
    let free = || device.memory().map(|(free, total)| (total - free) as u64).unwrap_or(0);
    let context_bytes = free();
    let source = Source::Random { plan: &plan, seed: 1 };
    let mut backend = CudaBackend::load(Arc::clone(&device), source, cuda, &mut |_| ())
        .map_err(|error| error.report())?;
    let planned_bytes = backend.planned_bytes() + context_bytes;
    let clock = backend.clock();
    let load_s = begun.elapsed().as_secs_f64();
    let metrics = Metrics::new("bench", limits.context_tokens);
    let engine = step::start(Box::new(backend), limits, metrics);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime without drivers needs nothing from the system");
    let mut steps = BTreeMap::new();
    let mut note = |name: &str, figure: f64| {
        let of = Steps::of(&clock.take());
        show(name, figure, &of);
        steps.insert(name.to_owned(), of);
    };
    let mut suite = Suite {
        engine: &engine,
        runtime: &runtime,
        vocabulary: config.vocabulary as u32,
        numbers: Numbers(1),
        show: &mut note,
    };
    let figures = suite.run(&options.only);
    let floors = figures
        .keys()
        .filter_map(|name| Some((name.clone(), floor(&config, name, options.ceilings)?)));
    let floors = floors.collect();
    Ok(SuiteReport {
        model: options.name.clone(),
        quant: "bf16",
        engine: format!("plimsoll {}", env!("CARGO_PKG_VERSION")),
        device: device.name().unwrap_or_default(),
        weights: "made on the GPU, normal(0, 0.02)",
        load_s,
        ceilings: options.ceilings,
        step_tokens_max: options.step_tokens_max,
        steps_in_flight: options.steps_in_flight,
        rss_bytes: rss_bytes(),
        planned_bytes,
        used_bytes: free(),
        figures,
        floors,
        steps,
    })
}

/// Room for the fullest workload: 256 sequences of a conversation's length, or a few long ones.
fn limits(options: &SuiteOptions) -> Limits {
    Limits {
        running_max: RUNNING_MAX,
        waiting_max: 1024,
        step_tokens_max: options.step_tokens_max,
        context_tokens: CONTEXT_TOKENS,
        kv_pages: vec![RUNNING_MAX as u32 * 24],
        steps_in_flight: options.steps_in_flight,
        prefix_reuse: false,
    }
}

/// The least a figure can be (or, for tokens per second, the most): weights and KV read once at the read ceiling, or FLOP
/// at the compute ceiling, whichever takes longer. None for workloads of many steps.
fn floor(config: &Config, name: &str, ceilings: Ceilings) -> Option<f64> {
    let (hidden, heads) = (config.hidden as f64, (config.heads * config.head_dim) as f64);
    let kv_heads = (config.kv_heads * config.head_dim) as f64;
    let per_layer = hidden * (heads + 2.0 * kv_heads)
        + heads * hidden
        + 3.0 * hidden * config.intermediate as f64;
    let layers = per_layer * config.layers as f64;
    let head = hidden * config.vocabulary as f64;
    let seconds = |rows: f64, head_rows: f64, kv_tokens: f64, attended: f64| {
        let bytes = 2.0 * (layers + head) + kv_tokens * 4.0 * kv_heads * config.layers as f64;
        let flop = 2.0 * rows * layers
            + 2.0 * head_rows * head
            + 4.0 * heads * attended * config.layers as f64;
        (bytes / (ceilings.read_tbps * 1e12)).max(flop / (ceilings.bf16_tflops * 1e12))
    };
    // Decode runs from 128 tokens of context to 256 or 384: the mean counts.
    if let Some(batch) = name.strip_prefix("decode_bs").and_then(|rest| rest.strip_suffix("_tok_s"))
    {
        let batch: f64 = batch.parse().ok()?;
        return Some(batch / seconds(batch, batch, batch * 192.0, batch * 192.0));
    }
    if let Some(tokens) = name.strip_prefix("prefill_").and_then(|rest| rest.strip_suffix("_ms")) {
        let tokens: f64 = tokens.parse().ok()?;
        return Some(seconds(tokens, 1.0, 0.0, tokens * tokens / 2.0) * 1e3);
    }
    match name {
        "decode_bs1_ms_per_token" => Some(seconds(1.0, 1.0, 256.0, 256.0) * 1e3),
        "decode_bs1_ctx8k_ms_per_token" => Some(seconds(1.0, 1.0, 8256.0, 8256.0) * 1e3),
        // Ten steps, of which the first takes the prompt.
        "seed_average_ms" | "seed_median_ms" => Some(10.0 * seconds(1.0, 1.0, 13.0, 13.0) * 1e3),
        _ => None,
    }
}

impl SuiteReport {
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report holds only names and numbers")
    }

    /// Markdown.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{} in bf16 on {}, {} rows a step, {} in flight; made in {:.1} s; memory planned {:.2} GiB, used {:.2} GiB\n\n\
             | workload | figure | floor | share |\n|---|---|---|---|\n",
            self.model,
            self.device,
            self.step_tokens_max,
            self.steps_in_flight,
            self.load_s,
            self.planned_bytes as f64 / (1u64 << 30) as f64,
            self.used_bytes as f64 / (1u64 << 30) as f64,
        );
        for (name, figure) in &self.figures {
            let (floor, share) = match self.floors.get(name) {
                Some(floor) => {
                    let share =
                        if name.ends_with("tok_s") { figure / floor } else { floor / figure };
                    (format!("{floor:.2}"), format!("{:.0} %", share * 100.0))
                }
                None => ("".into(), "".into()),
            };
            text += &format!("| {name} | {figure:.2} | {floor} | {share} |\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floors_are_those_of_the_table_of_aims() {
        let floor = |model, name| floor(&named(model).unwrap(), name, Ceilings::H200).unwrap();
        assert!((floor("llama-3.2-1b", "decode_bs1_ms_per_token") - 0.56).abs() < 0.01);
        assert!((floor("llama-3.1-8b", "decode_bs1_ms_per_token") - 3.40).abs() < 0.02);
        assert!((floor("llama-3.1-8b", "decode_bs1_ctx8k_ms_per_token") - 3.64).abs() < 0.02);
        assert!((floor("llama-3.1-8b", "prefill_8192_ms") - 176.0).abs() < 3.0);
        assert!((floor("llama-3.2-1b", "prefill_2048_ms") - 5.5).abs() < 0.3);
        assert!((floor("llama-3.2-1b", "seed_median_ms") - 5.6).abs() < 0.1);
    }
}
