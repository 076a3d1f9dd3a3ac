//! Metric names. `plimsoll_*` are ours; the `vllm:*` aliases are what routers, autoscalers and dashboards already read.
//! Exactly one series per alias family and model.

/// Bucket bounds of time to first token, in seconds (those of the alias's first owner, so that quantiles compare).
pub const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Bucket bounds of inter-token latency, in seconds.
pub const ITL_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];

/// Our gauges that the operator and its dashboards read.
pub const REQUESTS_RUNNING: &str = "plimsoll_requests_running";
pub const REQUESTS_WAITING: &str = "plimsoll_requests_waiting";
pub const KV_CACHE_USAGE_RATIO: &str = "plimsoll_kv_cache_usage_ratio";
pub const TIME_TO_FIRST_TOKEN_SECONDS: &str = "plimsoll_time_to_first_token_seconds";
pub const INTER_TOKEN_LATENCY_SECONDS: &str = "plimsoll_inter_token_latency_seconds";
