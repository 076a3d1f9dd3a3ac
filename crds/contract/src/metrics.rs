//! Metric names. `plimsoll_*` are ours; the `vllm:*` aliases are what routers, autoscalers and dashboards already read.
//! Exactly one series per alias family and model.

/// One measurement under both of its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    pub ours: &'static str,
    pub alias: &'static str,
}

const fn names(ours: &'static str, alias: &'static str) -> Names {
    Names { ours, alias }
}

// Gauges.
pub const REQUESTS_RUNNING: Names = names("plimsoll_requests_running", "vllm:num_requests_running");
pub const REQUESTS_WAITING: Names = names("plimsoll_requests_waiting", "vllm:num_requests_waiting");
/// 0 to 1, whatever the alias calls it.
pub const KV_CACHE_USAGE: Names =
    names("plimsoll_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc");
/// Always 1; the labels `block_size` and `num_gpu_blocks` carry the news.
pub const CACHE_CONFIG: Names = names("plimsoll_cache_config_info", "vllm:cache_config_info");

// Counters.
pub const PREFIX_CACHE_QUERIES: Names =
    names("plimsoll_prefix_cache_queries_total", "vllm:prefix_cache_queries_total");
pub const PREFIX_CACHE_HITS: Names =
    names("plimsoll_prefix_cache_hits_total", "vllm:prefix_cache_hits_total");
pub const PREEMPTIONS: Names = names("plimsoll_preemptions_total", "vllm:num_preemptions_total");
pub const PROMPT_TOKENS: Names = names("plimsoll_prompt_tokens_total", "vllm:prompt_tokens_total");
pub const PROMPT_TOKENS_CACHED: Names =
    names("plimsoll_prompt_tokens_cached_total", "vllm:prompt_tokens_cached_total");
pub const GENERATION_TOKENS: Names =
    names("plimsoll_generation_tokens_total", "vllm:generation_tokens_total");
/// By `finished_reason`: stop, length, abort or error.
pub const REQUESTS_FINISHED: Names =
    names("plimsoll_requests_finished_total", "vllm:request_success_total");
/// By `reason`: queue_full, never_fits or shutting_down.
pub const ADMISSION_REJECTIONS: Names =
    names("plimsoll_admission_rejections_total", "vllm:admission_rejections_total");

// Histograms.
pub const TIME_TO_FIRST_TOKEN: Names =
    names("plimsoll_time_to_first_token_seconds", "vllm:time_to_first_token_seconds");
pub const INTER_TOKEN_LATENCY: Names =
    names("plimsoll_inter_token_latency_seconds", "vllm:inter_token_latency_seconds");
pub const TIME_PER_OUTPUT_TOKEN: Names = names(
    "plimsoll_request_time_per_output_token_seconds",
    "vllm:request_time_per_output_token_seconds",
);
pub const E2E_REQUEST_LATENCY: Names =
    names("plimsoll_e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds");
pub const REQUEST_QUEUE_TIME: Names =
    names("plimsoll_request_queue_time_seconds", "vllm:request_queue_time_seconds");
pub const REQUEST_PREFILL_TIME: Names =
    names("plimsoll_request_prefill_time_seconds", "vllm:request_prefill_time_seconds");
pub const REQUEST_DECODE_TIME: Names =
    names("plimsoll_request_decode_time_seconds", "vllm:request_decode_time_seconds");
pub const REQUEST_INFERENCE_TIME: Names =
    names("plimsoll_request_inference_time_seconds", "vllm:request_inference_time_seconds");
pub const REQUEST_PROMPT_TOKENS: Names =
    names("plimsoll_request_prompt_tokens", "vllm:request_prompt_tokens");
pub const REQUEST_GENERATION_TOKENS: Names =
    names("plimsoll_request_generation_tokens", "vllm:request_generation_tokens");
/// The longest choice of a request.
pub const REQUEST_MAX_GENERATION_TOKENS: Names =
    names("plimsoll_request_max_num_generation_tokens", "vllm:request_max_num_generation_tokens");
pub const REQUEST_PARAMS_N: Names = names("plimsoll_request_params_n", "vllm:request_params_n");
pub const REQUEST_PARAMS_MAX_TOKENS: Names =
    names("plimsoll_request_params_max_tokens", "vllm:request_params_max_tokens");
pub const ITERATION_TOKENS: Names =
    names("plimsoll_iteration_tokens_total", "vllm:iteration_tokens_total");

// Ours alone: set once, when the model is loaded.
pub const STARTUP_SECONDS: &str = "plimsoll_startup_seconds";
pub const WEIGHTS_LOAD_SECONDS: &str = "plimsoll_weights_load_seconds";
pub const WEIGHTS_BYTES: &str = "plimsoll_weights_bytes";
pub const KV_CACHE_BYTES: &str = "plimsoll_kv_cache_bytes";

// Ours alone: what computes.
/// Always 1; the labels `device`, `driver` and `compute_capability` carry the news.
pub const DEVICE_INFO: &str = "plimsoll_device_info";
/// By `kind`: total, or free when the engine became ready.
pub const DEVICE_MEMORY_BYTES: &str = "plimsoll_device_memory_bytes";

/// What the operator says about itself and about the objects it keeps. Its series of objects carry their `namespace` and
/// `name`; those of engines carry `namespace` and `llmdeployment`, which the PodMonitor adds.
pub mod operator {
    /// 1 in the process that holds the Lease, 0 in those that wait for it.
    pub const LEADING: &str = "plimsoll_operator_leading";
    /// By `result`: success or error.
    pub const RECONCILE_SECONDS: &str = "plimsoll_operator_reconcile_duration_seconds";
    /// By `result`: success or error.
    pub const RECONCILES: &str = "plimsoll_operator_reconcile_total";
    pub const RECONCILE_ERRORS: &str = "plimsoll_operator_reconcile_errors_total";
    /// By `kind` of the object written.
    pub const WRITES: &str = "plimsoll_operator_writes_total";
    /// By `type`, `status` and `reason`: 1 for what holds.
    pub const CONDITION: &str = "plimsoll_llmdeployment_condition";
    /// By `part`: weights, kv, workspace, process; what the plan counts on, in bytes of one pod.
    pub const PLAN_MEMORY_BYTES: &str = "plimsoll_llmdeployment_plan_memory_bytes";
    /// The values of the plan that runs, as labels; always 1.
    pub const PLAN_INFO: &str = "plimsoll_llmdeployment_plan_info";
    /// By `kind`: predicted, the plan's sum; measured, the most that an engine of it has held.
    pub const MEMORY_BYTES: &str = "plimsoll_llmdeployment_memory_bytes";
    /// By `pod`: how often its containers ended and were started anew.
    pub const ENGINE_RESTARTS: &str = "plimsoll_llmdeployment_engine_restarts_total";
}

/// By `kind`: the most that the process held of the host's memory, and on a GPU of the card's. What a plan is held against.
pub const PEAK_MEMORY_BYTES: &str = "plimsoll_peak_memory_bytes";
/// Values of the label `kind` of [`PEAK_MEMORY_BYTES`].
pub const KIND_PROCESS: &str = "process";
pub const KIND_DEVICE: &str = "device";

// Bucket bounds are those of the aliases' first owner, so that quantiles compare.

/// Bounds of time to first token, in seconds.
pub const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Bounds of the time between tokens, in seconds.
pub const ITL_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
/// Bounds of whole requests and their phases, in seconds.
pub const REQUEST_SECONDS_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Bounds of the rows of a step.
pub const ITERATION_TOKENS_BUCKETS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
/// Bounds of a request's number of choices.
pub const CHOICES_BUCKETS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// Bounds of token counts per request: 1, 2, 5, 10, 20, 50 and so on, up to the context length.
pub fn token_count_buckets(context_tokens: u32) -> Vec<f64> {
    let decades = (0..).map(|exponent| 10u64.pow(exponent));
    let bounds = decades.flat_map(|decade| [decade, 2 * decade, 5 * decade]);
    let bounds = bounds.take_while(|&bound| bound <= u64::from(context_tokens.max(1)));
    bounds.map(|bound| bound as f64).collect()
}
