//! What the engine tells Prometheus. The step loop observes; `/metrics` renders. Each measurement is observed once and
//! appears under our name and under the alias that existing dashboards read (see [`plimsoll_contract::metrics`]).
//! Nothing here decides anything.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use plimsoll_contract::abilities::PAGE_TOKENS;
use plimsoll_contract::facts::Gpu;
use plimsoll_contract::metrics::{self as names, Names};
use prometheus::core::Collector;
use prometheus::local::{LocalHistogram, LocalIntCounter};
use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::memory;
use crate::request::Refusal;
use crate::scheduler::{End, Totals};

/// The same metric under our name and under the alias.
struct Both<M> {
    ours: M,
    alias: M,
}

impl Both<IntGauge> {
    fn set(&self, value: usize) {
        self.ours.set(value as i64);
        self.alias.set(value as i64);
    }
}

impl Both<Gauge> {
    fn set(&self, value: f64) {
        self.ours.set(value);
        self.alias.set(value);
    }
}

impl Both<IntCounter> {
    fn add(&self, value: u64) {
        self.ours.inc_by(value);
        self.alias.inc_by(value);
    }
}

impl Both<IntCounterVec> {
    fn add_one(&self, label: &str) {
        self.ours.with_label_values(&[label]).inc();
        self.alias.with_label_values(&[label]).inc();
    }
}

impl Both<Histogram> {
    fn observe(&self, value: f64) {
        self.ours.observe(value);
        self.alias.observe(value);
    }

    fn observe_duration(&self, value: Duration) {
        self.observe(value.as_secs_f64());
    }
}

/// Tokens as a step tells of them one by one, added to the metrics at once: hundreds of observations that others may read
/// at any time would take a quarter of the loop's time.
pub struct TokenTally {
    tokens: Both<LocalIntCounter>,
    inter_token: Both<LocalHistogram>,
}

impl TokenTally {
    pub fn next_token(&self, since_last: Duration) {
        let Both { ours, alias } = &self.tokens;
        ours.inc();
        alias.inc();
        let Both { ours, alias } = &self.inter_token;
        ours.observe(since_last.as_secs_f64());
        alias.observe(since_last.as_secs_f64());
    }

    pub fn flush(&self) {
        let Both { ours, alias } = &self.tokens;
        ours.flush();
        alias.flush();
        let Both { ours, alias } = &self.inter_token;
        ours.flush();
        alias.flush();
    }
}

/// State after a step, or when idle.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Choices that run, and that wait.
    pub running: usize,
    pub waiting: usize,
    /// 0 to 1; pages that are only kept for reuse are not in use.
    pub kv_usage: f64,
}

/// Everything about a choice that has ended. Phases that it did not reach are absent.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    pub end: End,
    pub prompt_tokens: u32,
    pub generated_tokens: u32,
    /// From arrival to the end.
    pub total: Duration,
    /// From arrival to its first step.
    pub queued: Option<Duration>,
    /// From its first step to its first token.
    pub prefill: Option<Duration>,
    /// From its first token to its last.
    pub decode: Option<Duration>,
}

/// What start-up cost.
#[derive(Clone, Copy, Debug)]
pub struct Startup {
    pub seconds: f64,
    pub weights_load_seconds: f64,
    pub weights_bytes: u64,
    pub kv_cache_bytes: u64,
}

pub struct Metrics {
    registry: Registry,
    labels: HashMap<String, String>,
    running: Both<IntGauge>,
    waiting: Both<IntGauge>,
    kv_usage: Both<Gauge>,
    prefix_queries: Both<IntCounter>,
    prefix_hits: Both<IntCounter>,
    preemptions: Both<IntCounter>,
    prompt_tokens: Both<IntCounter>,
    prompt_tokens_cached: Both<IntCounter>,
    generation_tokens: Both<IntCounter>,
    finished: Both<IntCounterVec>,
    rejections: Both<IntCounterVec>,
    first_token: Both<Histogram>,
    inter_token: Both<Histogram>,
    per_output_token: Both<Histogram>,
    total: Both<Histogram>,
    queued: Both<Histogram>,
    prefill: Both<Histogram>,
    decode: Both<Histogram>,
    inference: Both<Histogram>,
    request_prompt_tokens: Both<Histogram>,
    request_generated_tokens: Both<Histogram>,
    longest_choice: Both<Histogram>,
    params_n: Both<Histogram>,
    params_max_tokens: Both<Histogram>,
    iteration_tokens: Both<Histogram>,
    startup_seconds: Gauge,
    weights_load_seconds: Gauge,
    weights_bytes: IntGauge,
    kv_cache_bytes: IntGauge,
    peak_memory: IntGaugeVec,
    /// What the process holds of the card now; set where there is one.
    device_held: OnceLock<DeviceHeld>,
}

/// Bytes of a card, or None where its driver does not answer.
type DeviceHeld = Box<dyn Fn() -> Option<u64> + Send + Sync>;

impl Metrics {
    /// All families, at zero. `context_tokens` bounds the buckets of token counts.
    pub fn new(model_name: &str, context_tokens: u32) -> Arc<Metrics> {
        let labels = [("model_name", model_name), ("engine", "0")];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let new = Families { registry: Registry::new(), labels: HashMap::from(labels) };
        let token_counts = names::token_count_buckets(context_tokens);
        let seconds = names::REQUEST_SECONDS_BUCKETS;
        let metrics = Metrics {
            running: new.int_gauge(names::REQUESTS_RUNNING, "Choices being computed"),
            waiting: new.int_gauge(names::REQUESTS_WAITING, "Choices waiting to be computed"),
            kv_usage: new.gauge(names::KV_CACHE_USAGE, "Share of KV pages in use, 0 to 1"),
            prefix_queries: new.counter(
                names::PREFIX_CACHE_QUERIES,
                "Prompt tokens looked up in the prefix cache",
            ),
            prefix_hits: new
                .counter(names::PREFIX_CACHE_HITS, "Prompt tokens found in the prefix cache"),
            preemptions: new
                .counter(names::PREEMPTIONS, "Times a choice gave its pages up to an older one"),
            prompt_tokens: new.counter(names::PROMPT_TOKENS, "Prompt tokens processed"),
            prompt_tokens_cached: new.counter(
                names::PROMPT_TOKENS_CACHED,
                "Prompt tokens that did not have to be computed",
            ),
            generation_tokens: new.counter(names::GENERATION_TOKENS, "Tokens generated"),
            finished: new.counters(names::REQUESTS_FINISHED, "Choices ended", "finished_reason"),
            rejections: new.counters(names::ADMISSION_REJECTIONS, "Requests refused", "reason"),
            first_token: new.histogram(
                names::TIME_TO_FIRST_TOKEN,
                "Seconds from arrival to the first token",
                names::TTFT_BUCKETS,
            ),
            inter_token: new.histogram(
                names::INTER_TOKEN_LATENCY,
                "Seconds between a choice's tokens",
                names::ITL_BUCKETS,
            ),
            per_output_token: new.histogram(
                names::TIME_PER_OUTPUT_TOKEN,
                "Mean seconds per token after the first, per choice",
                names::ITL_BUCKETS,
            ),
            total: new.histogram(
                names::E2E_REQUEST_LATENCY,
                "Seconds from arrival to the end",
                seconds,
            ),
            queued: new.histogram(
                names::REQUEST_QUEUE_TIME,
                "Seconds from arrival to the first step",
                seconds,
            ),
            prefill: new.histogram(
                names::REQUEST_PREFILL_TIME,
                "Seconds from the first step to the first token",
                seconds,
            ),
            decode: new.histogram(
                names::REQUEST_DECODE_TIME,
                "Seconds from the first token to the last",
                seconds,
            ),
            inference: new.histogram(
                names::REQUEST_INFERENCE_TIME,
                "Seconds from the first step to the last token",
                seconds,
            ),
            request_prompt_tokens: new.histogram(
                names::REQUEST_PROMPT_TOKENS,
                "Prompt tokens of a choice that has ended",
                &token_counts,
            ),
            request_generated_tokens: new.histogram(
                names::REQUEST_GENERATION_TOKENS,
                "Tokens generated for a choice that has ended",
                &token_counts,
            ),
            longest_choice: new.histogram(
                names::REQUEST_MAX_GENERATION_TOKENS,
                "Tokens generated for the longest choice of a request that has ended",
                &token_counts,
            ),
            params_n: new.histogram(
                names::REQUEST_PARAMS_N,
                "Choices a request asked for",
                names::CHOICES_BUCKETS,
            ),
            params_max_tokens: new.histogram(
                names::REQUEST_PARAMS_MAX_TOKENS,
                "Output tokens a request allowed per choice",
                &token_counts,
            ),
            iteration_tokens: new.histogram(
                names::ITERATION_TOKENS,
                "Rows of a step",
                names::ITERATION_TOKENS_BUCKETS,
            ),
            startup_seconds: new.own(
                names::STARTUP_SECONDS,
                "Seconds from start to ready",
                Gauge::with_opts,
            ),
            weights_load_seconds: new.own(
                names::WEIGHTS_LOAD_SECONDS,
                "Seconds to load weights",
                Gauge::with_opts,
            ),
            weights_bytes: new.own(
                names::WEIGHTS_BYTES,
                "Bytes of weights in memory",
                IntGauge::with_opts,
            ),
            kv_cache_bytes: new.own(
                names::KV_CACHE_BYTES,
                "Bytes of all KV pages",
                IntGauge::with_opts,
            ),
            peak_memory: new.own(
                names::PEAK_MEMORY_BYTES,
                "The most bytes held so far, as of the last look at the metrics",
                |opts| IntGaugeVec::new(opts, &["kind"]),
            ),
            device_held: OnceLock::new(),
            labels: new.labels,
            registry: new.registry,
        };
        for end in [End::Stop, End::Length, End::Aborted, End::Failed] {
            metrics.finished.ours.with_label_values(&[reason(end)]);
            metrics.finished.alias.with_label_values(&[reason(end)]);
        }
        Arc::new(metrics)
    }

    /// The text format, version 0.0.4.
    pub fn render(&self) -> String {
        self.look_at_memory();
        let families = self.registry.gather();
        TextEncoder::new().encode_to_string(&families).expect("our own families are valid")
    }

    /// The kernel keeps the peak of the host's memory; of a card's we keep the most that any look has seen. Engines take
    /// what they need when they start, so that no peak lies between two looks.
    fn look_at_memory(&self) {
        let most = |kind: &str, bytes: u64| {
            let gauge = self.peak_memory.with_label_values(&[kind]);
            gauge.set(gauge.get().max(i64::try_from(bytes).unwrap_or(i64::MAX)));
        };
        if let Some(bytes) = memory::peak_bytes("/".as_ref()) {
            most(names::KIND_PROCESS, bytes);
        }
        if let Some(bytes) = self.device_held.get().and_then(|held| held()) {
            most(names::KIND_DEVICE, bytes);
        }
    }

    /// Called once, when a GPU computes: how to ask what this process holds of it.
    pub fn device_memory_is(&self, held: impl Fn() -> Option<u64> + Send + Sync + 'static) {
        let first = self.device_held.set(Box::new(held)).is_ok();
        assert!(first, "an engine has one device");
    }

    /// Called once, when the engine is ready.
    pub fn started(&self, startup: Startup) {
        self.startup_seconds.set(startup.seconds);
        self.weights_load_seconds.set(startup.weights_load_seconds);
        self.weights_bytes.set(startup.weights_bytes as i64);
        self.kv_cache_bytes.set(startup.kv_cache_bytes as i64);
    }

    /// Called once, by the step loop: the KV cache's shape, as labels.
    pub fn kv_cache_is(&self, pages: usize) {
        let new = Families { registry: self.registry.clone(), labels: self.labels.clone() };
        let size = [("block_size", PAGE_TOKENS as usize), ("num_gpu_blocks", pages)];
        let info = new.gauge_with(names::CACHE_CONFIG, "Shape of the KV cache", &size);
        info.set(1);
    }

    /// Called once, when the engine is ready: the GPU that computes, or the CPU where there is none.
    pub fn device_is(&self, gpu: Option<&Gpu>) {
        let new = Families { registry: self.registry.clone(), labels: self.labels.clone() };
        let info = [
            ("device", gpu.map_or("CPU", |gpu| &gpu.name)),
            ("driver", gpu.and_then(|gpu| gpu.driver.as_deref()).unwrap_or("")),
            ("compute_capability", gpu.map_or("", |gpu| &gpu.compute_capability)),
        ];
        let help = "What computes";
        new.own(names::DEVICE_INFO, help, |opts| {
            let label = |opts: Opts, (name, value): &(&str, &str)| opts.const_label(*name, *value);
            IntGauge::with_opts(info.iter().fold(opts, label))
        })
        .set(1);
        let Some(gpu) = gpu else { return };
        let help =
            "Bytes of the device's memory; free is what was left when the engine became ready";
        let memory =
            new.own(names::DEVICE_MEMORY_BYTES, help, |opts| IntGaugeVec::new(opts, &["kind"]));
        memory.with_label_values(&["total"]).set(gpu.memory_bytes as i64);
        memory.with_label_values(&["free"]).set(gpu.memory_free_bytes as i64);
    }

    pub fn refused(&self, refusal: &Refusal) {
        self.rejections.add_one(match refusal {
            Refusal::NeverFits { .. } => "never_fits",
            Refusal::QueueFull { .. } => "queue_full",
            Refusal::ShuttingDown => "shutting_down",
        });
    }

    pub fn accepted(&self, choices: u32, output_tokens_max: u32) {
        self.params_n.observe(f64::from(choices));
        self.params_max_tokens.observe(f64::from(output_tokens_max));
    }

    pub fn loaded(&self, load: Load) {
        self.running.set(load.running);
        self.waiting.set(load.waiting);
        self.kv_usage.set(load.kv_usage);
    }

    /// What the scheduler counted since the last call.
    pub fn counted(&self, before: Totals, now: Totals) {
        self.preemptions.add(now.preemptions - before.preemptions);
        self.prefix_queries.add(now.prefix_queries - before.prefix_queries);
        self.prefix_hits.add(now.prefix_hits - before.prefix_hits);
    }

    pub fn stepped(&self, rows: u32) {
        self.iteration_tokens.observe(f64::from(rows));
    }

    /// A request's prompt is computed for the first time.
    pub fn prompt_computed(&self, tokens: u32, cached: u32) {
        self.prompt_tokens.add(u64::from(tokens));
        self.prompt_tokens_cached.add(u64::from(cached));
    }

    pub fn first_token(&self, since_arrival: Duration) {
        self.generation_tokens.add(1);
        self.first_token.observe_duration(since_arrival);
    }

    /// For the tokens after the first.
    pub fn token_tally(&self) -> TokenTally {
        let Both { ours, alias } = &self.generation_tokens;
        let tokens = Both { ours: ours.local(), alias: alias.local() };
        let Both { ours, alias } = &self.inter_token;
        TokenTally { tokens, inter_token: Both { ours: ours.local(), alias: alias.local() } }
    }

    /// All choices of a request have ended.
    pub fn request_ended(&self, longest_choice: u32) {
        self.longest_choice.observe(f64::from(longest_choice));
    }

    /// A choice has ended.
    pub fn finished(&self, finished: Finished) {
        let Finished { end, prompt_tokens, generated_tokens, total, queued, prefill, decode } =
            finished;
        self.finished.add_one(reason(end));
        self.request_prompt_tokens.observe(f64::from(prompt_tokens));
        self.request_generated_tokens.observe(f64::from(generated_tokens));
        self.total.observe_duration(total);
        if let Some(queued) = queued {
            self.queued.observe_duration(queued);
        }
        if let (Some(prefill), Some(decode)) = (prefill, decode) {
            self.prefill.observe_duration(prefill);
            self.decode.observe_duration(decode);
            self.inference.observe_duration(prefill + decode);
            if generated_tokens > 1 {
                self.per_output_token.observe_duration(decode / (generated_tokens - 1));
            }
        }
    }
}

fn reason(end: End) -> &'static str {
    match end {
        End::Stop => "stop",
        End::Length => "length",
        End::Aborted => "abort",
        End::Failed => "error",
    }
}

/// Makes families and registers them.
struct Families {
    registry: Registry,
    labels: HashMap<String, String>,
}

impl Families {
    fn own<M: Collector + Clone + 'static>(
        &self,
        name: &str,
        help: &str,
        make: impl Fn(Opts) -> prometheus::Result<M>,
    ) -> M {
        let opts = Opts::new(name, help).const_labels(self.labels.clone());
        let metric = make(opts).expect("names and labels are constants");
        self.registry.register(Box::new(metric.clone())).expect("each family is made once");
        metric
    }

    fn both<M: Collector + Clone + 'static>(
        &self,
        names: Names,
        help: &str,
        make: impl Fn(Opts) -> prometheus::Result<M>,
    ) -> Both<M> {
        Both { ours: self.own(names.ours, help, &make), alias: self.own(names.alias, help, &make) }
    }

    fn int_gauge(&self, names: Names, help: &str) -> Both<IntGauge> {
        self.both(names, help, IntGauge::with_opts)
    }

    fn gauge(&self, names: Names, help: &str) -> Both<Gauge> {
        self.both(names, help, Gauge::with_opts)
    }

    fn gauge_with(&self, names: Names, help: &str, labels: &[(&str, usize)]) -> Both<IntGauge> {
        self.both(names, help, |opts| {
            let add = |opts: Opts, (name, value): &(&str, usize)| {
                opts.const_label(*name, value.to_string())
            };
            IntGauge::with_opts(labels.iter().fold(opts, add))
        })
    }

    fn counter(&self, names: Names, help: &str) -> Both<IntCounter> {
        self.both(names, help, IntCounter::with_opts)
    }

    fn counters(&self, names: Names, help: &str, label: &str) -> Both<IntCounterVec> {
        self.both(names, help, |opts| IntCounterVec::new(opts, &[label]))
    }

    fn histogram(&self, names: Names, help: &str, buckets: &[f64]) -> Both<Histogram> {
        self.both(names, help, |opts| {
            let opts = HistogramOpts::from(opts).buckets(buckets.to_vec());
            Histogram::with_opts(opts)
        })
    }
}

#[cfg(test)]
mod tests;
