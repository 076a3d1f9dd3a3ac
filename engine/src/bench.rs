//! `bench`: tokens per second of a checkpoint without HTTP, through the same scheduler and step loop that serve it; and
//! its verbs: a server over HTTP, each kernel by itself, the seed method. Enters: a model directory, or the name of a
//! shape and a seed, and a load. Leaves: a table and JSON. Never here: text, and sockets but in `serve`.

mod kernels;
mod seed;
mod serve;
mod suite;
mod workloads;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use plimsoll_contract::abilities::{Ability, Backend as Kind, Dtype, PAGE_TOKENS};
use plimsoll_contract::exit::ExitReport;
use plimsoll_contract::memory::StepLimits;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::cuda::{CudaBackend, CudaOptions, Source};
use crate::backend::place::{DeviceArg, Place};
use crate::batch::{AdapterIndex, SamplingParams, TokenId};
use crate::memory::rss_bytes;
use crate::metrics::Metrics;
use crate::model::{Checkpoint, LoadError, Shard};
use crate::request::{Event, PrefixSalt, Request, StopRules};
use crate::step::{self, EngineHandle, Limits, RequestStream};

#[derive(Clone, Debug)]
pub struct BenchOptions {
    pub model: PathBuf,
    pub device: DeviceArg,
    /// The device's best one where none is given.
    pub dtype: Option<Dtype>,
    /// Requests that run at once, one row of the table each.
    pub requests: Vec<usize>,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
    /// Rounds per row after one that warms up; the median counts.
    pub rounds: usize,
    /// As `serve` has it where none is given; so too the next.
    pub step_tokens_max: Option<u32>,
    pub steps_in_flight: Option<usize>,
}

#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    pub model: PathBuf,
    /// As people call it.
    pub device: String,
    pub dtype: Dtype,
    /// Of the CPU, where that computes.
    pub threads: Option<usize>,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
    /// From opening the checkpoint to a backend that can take a step.
    pub load_seconds: f64,
    /// Resident memory after the last round; absent where the system does not say.
    pub rss_bytes: Option<u64>,
    pub rows: Vec<BenchRow>,
}

#[derive(Clone, Debug, Serialize)]
pub struct BenchRow {
    pub requests: usize,
    /// Output tokens of all requests over the time from the first submission to the last token.
    pub output_tokens_per_second: f64,
    pub slowest_round: f64,
    pub fastest_round: f64,
    /// Median over requests.
    pub first_token_milliseconds: f64,
    /// Mean time between two tokens of one request.
    pub between_tokens_milliseconds: f64,
}

/// What one round brought.
struct Round {
    seconds: f64,
    first_tokens: Vec<Duration>,
}

pub use kernels::{KernelsOptions, KernelsReport, run_kernels};
pub use seed::{SeedModel, SeedReport, run_seed};
pub use serve::{Arrivals, Failures, ServeOptions, ServeReport, Spread, run_serve};
pub use suite::{Ceilings, Steps, SuiteOptions, SuiteReport, run_suite};
pub use workloads::NAMES as WORKLOADS;

pub fn run(options: &BenchOptions) -> Result<BenchReport, ExitReport> {
    let begun = Instant::now();
    let place = Place::choose(options.device)?;
    let ability = place.ability(options.dtype)?;
    let checkpoint = Checkpoint::open(&options.model).map_err(|error| error.report())?;
    let vocabulary = checkpoint.facts().vocabulary;
    let limits = limits(options, ability.backend);
    let (backend, threads) =
        load(&place, &checkpoint, ability, &limits).map_err(|error| error.report())?;
    let load_seconds = begun.elapsed().as_secs_f64();
    let engine = step::start(backend, limits.clone(), Metrics::new("bench", limits.context_tokens));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime without drivers needs nothing from the system");
    let mut numbers = Numbers(1);
    let rows = options.requests.iter().map(|&requests| {
        let mut round =
            || runtime.block_on(round(&engine, options, requests, vocabulary, &mut numbers));
        round();
        row(options, requests, (0..options.rounds.max(1)).map(|_| round()).collect())
    });
    let rows = rows.collect();
    Ok(BenchReport {
        model: options.model.clone(),
        device: place.name(),
        dtype: ability.weights,
        threads,
        prompt_tokens: options.prompt_tokens,
        output_tokens: options.output_tokens,
        load_seconds,
        rss_bytes: rss_bytes(),
        rows,
    })
}

/// A backend and, where it is the CPU, the number of its threads.
fn load(
    place: &Place,
    checkpoint: &Checkpoint,
    ability: Ability,
    limits: &Limits,
) -> Result<(Box<dyn Backend>, Option<usize>), LoadError> {
    let running_max = limits.running_max as u32;
    match place {
        Place::Cpu => {
            let options = CpuOptions {
                dtype: ability.weights,
                kv_pages: limits.kv_pages.clone(),
                running_max,
                shard: Shard::WHOLE,
            };
            let backend = CpuBackend::load(checkpoint, options, &mut |_| ())?;
            let threads = backend.threads();
            Ok((Box::new(backend), Some(threads)))
        }
        Place::Cuda(device) => {
            let options = CudaOptions {
                kv_pages: limits.kv_pages[0],
                step: StepLimits { step_tokens_max: limits.step_tokens_max, running_max },
                context_tokens: limits.context_tokens,
                ..CudaOptions::default()
            };
            let source = Source::Checkpoint(checkpoint);
            let backend = CudaBackend::load(device.clone(), source, options, &mut |_| ())?;
            Ok((Box::new(backend), None))
        }
    }
}

/// Room for the largest row, so that nothing waits or is preempted.
fn limits(options: &BenchOptions, kind: Kind) -> Limits {
    let (step_tokens_max, steps_in_flight) = match kind {
        Kind::Cpu => (512, 1),
        Kind::Cuda => (2048, 2),
    };
    let most = options.requests.iter().copied().max().unwrap_or(1).max(1);
    let context_tokens = options.prompt_tokens + options.output_tokens;
    let pages = (context_tokens.div_ceil(PAGE_TOKENS) + 1) * most as u32;
    Limits {
        running_max: most,
        waiting_max: most,
        step_tokens_max: options.step_tokens_max.unwrap_or(step_tokens_max),
        context_tokens,
        kv_pages: vec![pages],
        steps_in_flight: options.steps_in_flight.unwrap_or(steps_in_flight),
        prefix_reuse: false,
    }
}

async fn round(
    engine: &EngineHandle,
    options: &BenchOptions,
    requests: usize,
    vocabulary: u32,
    numbers: &mut Numbers,
) -> Round {
    let prompts: Vec<Arc<[TokenId]>> = (0..requests)
        .map(|_| (0..options.prompt_tokens).map(|_| numbers.below(vocabulary)).collect())
        .collect();
    let begun = Instant::now();
    let mut running = JoinSet::new();
    let greedy = Arc::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() });
    for prompt in prompts {
        let request = request(prompt, options.output_tokens, &greedy);
        let stream = engine.submit(request).expect("the limits fit the load");
        running.spawn(listen(stream, begun, options.output_tokens));
    }
    let ends = running.join_all().await;
    Round {
        seconds: ends.iter().map(|end| end.last).max().unwrap_or_default().as_secs_f64(),
        first_tokens: ends.iter().map(|end| end.first).collect(),
    }
}

/// When a request's first and last token came, after the round began.
struct Ends {
    first: Duration,
    last: Duration,
}

async fn listen(mut stream: RequestStream, begun: Instant, expected: u32) -> Ends {
    let mut ends = Ends { first: Duration::ZERO, last: Duration::ZERO };
    let mut tokens = 0;
    while let Some(event) = stream.next().await {
        match event {
            Event::Prompt { .. } | Event::Finished { .. } => {}
            Event::Failed { message, .. } => panic!("the backend failed: {message}"),
            Event::Token { .. } => {
                ends.last = begun.elapsed();
                if tokens == 0 {
                    ends.first = ends.last;
                }
                tokens += 1;
            }
        }
    }
    assert_eq!(tokens, expected, "every request runs to its end");
    ends
}

fn request(prompt: Arc<[TokenId]>, output_tokens: u32, sampling: &Arc<SamplingParams>) -> Request {
    Request {
        prompt,
        choices: 1,
        sampling: Arc::clone(sampling),
        stop: StopRules {
            stop_tokens: Arc::new(BTreeSet::new()),
            output_tokens_max: output_tokens,
        },
        salt: PrefixSalt { adapter: AdapterIndex::BASE, tenant: None },
    }
}

fn row(options: &BenchOptions, requests: usize, rounds: Vec<Round>) -> BenchRow {
    let tokens = (requests as u64 * u64::from(options.output_tokens)) as f64;
    let rates = sorted(rounds.iter().map(|round| tokens / round.seconds));
    let first = sorted(rounds.iter().flat_map(|r| &r.first_tokens).map(Duration::as_secs_f64));
    let median = rates[rates.len() / 2];
    let first = first[first.len() / 2];
    let steps = f64::from(options.output_tokens.saturating_sub(1).max(1));
    BenchRow {
        requests,
        output_tokens_per_second: median,
        slowest_round: rates[0],
        fastest_round: rates[rates.len() - 1],
        first_token_milliseconds: first * 1e3,
        between_tokens_milliseconds: (tokens / median - first).max(0.0) / steps * 1e3,
    }
}

fn sorted(numbers: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers
}

/// Prompts need no good randomness, only to differ and to be the same in every run.
pub struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((self.0 >> 33) % u64::from(n)) as u32
    }
}

/// CPU time of this process so far, all threads together.
fn cpu_time() -> Duration {
    // SAFETY: all zeros are a value of this struct of numbers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: it only writes `usage`, which outlives the call.
    let known = unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) } == 0;
    assert!(known, "a process may always ask for its own usage");
    let of = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec.unsigned_abs())
            + Duration::from_micros(time.tv_usec.unsigned_abs())
    };
    of(usage.ru_utime) + of(usage.ru_stime)
}

impl BenchReport {
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("a report holds only names and numbers")
    }

    /// Markdown, as docs/perf.md has it.
    pub fn table(&self) -> String {
        let rss =
            self.rss_bytes.map_or("unknown".into(), |b| format!("{:.0} MiB", b as f64 / 1048576.0));
        let mut text = format!(
            "{} in {} on {}, {} prompt and {} output tokens; loaded in {:.3} s, RSS {rss}\n\n\
             | requests | output tokens/s | slowest … fastest | first token, ms | between tokens, ms |\n|---|---|---|---|---|\n",
            self.model.display(),
            self.dtype.name(),
            self.threads
                .map_or(self.device.clone(), |n| format!("{} with {n} threads", self.device)),
            self.prompt_tokens,
            self.output_tokens,
            self.load_seconds,
        );
        for row in &self.rows {
            text += &format!(
                "| {} | {:.0} | {:.0} … {:.0} | {:.1} | {:.2} |\n",
                row.requests,
                row.output_tokens_per_second,
                row.slowest_round,
                row.fastest_round,
                row.first_token_milliseconds,
                row.between_tokens_milliseconds,
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> BenchOptions {
        BenchOptions {
            model: format!("{}/../tests/goldens/llama3-rope", env!("CARGO_MANIFEST_DIR")).into(),
            device: DeviceArg::Cpu,
            dtype: None,
            requests: vec![1, 3],
            prompt_tokens: 70,
            output_tokens: 5,
            rounds: 2,
            step_tokens_max: Some(64),
            steps_in_flight: None,
        }
    }

    #[test]
    fn a_type_that_the_device_does_not_run_is_refused_with_what_to_choose() {
        let refused = run(&BenchOptions { dtype: Some(Dtype::Bf16), ..options() }).unwrap_err();
        assert!(
            refused.message.contains("--dtype bf16 does not run on the CPU"),
            "{}",
            refused.message
        );
        assert!(refused.message.contains("choose f32 or f16"), "{}", refused.message);
    }

    #[test]
    fn a_bench_reports_a_row_for_each_number_of_requests() {
        let report = run(&options()).unwrap();
        assert_eq!((report.dtype, report.device.as_str()), (Dtype::F32, "CPU"));
        assert_eq!(report.rows.iter().map(|row| row.requests).collect::<Vec<_>>(), [1, 3]);
        assert!(report.rows.iter().all(|row| row.output_tokens_per_second > 0.0));
        assert_eq!(report.table().lines().count(), 6);
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["rows"][1]["requests"], 3);
    }
}
