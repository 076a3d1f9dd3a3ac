//! The text that `/metrics` shows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// Type of each family, and its series without their values.
fn families(text: &str) -> BTreeMap<String, (String, Vec<String>)> {
    let mut families = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
        let mut words = line.split(' ').skip(2).map(str::to_owned);
        let (name, kind) = (words.next().expect("a name"), words.next().expect("a type"));
        assert!(families.insert(name, (kind, Vec::new())).is_none(), "twice: {line}");
    }
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let series = line.rsplit_once(' ').expect("a value").0;
        let name = series.split('{').next().expect("a name");
        let stems = ["", "_bucket", "_sum", "_count"];
        let stem = stems.iter().find_map(|end| families.get_key_value(name.strip_suffix(end)?));
        let stem = stem.expect("a family").0.clone();
        families.get_mut(&stem).expect("found just now").1.push(series.to_owned());
    }
    families
}

fn all() -> Arc<Metrics> {
    let metrics = Metrics::new("m", 1024);
    metrics.kv_cache_is(7);
    metrics.refused(&Refusal::ShuttingDown);
    metrics
}

#[test]
fn the_aliases_have_the_types_that_dashboards_expect() {
    let families = families(&all().render());
    let kind = |name: &str| families.get(name).map(|family| family.0.as_str());
    for (name, expected) in [
        ("vllm:num_requests_running", "gauge"),
        ("vllm:num_requests_waiting", "gauge"),
        ("vllm:kv_cache_usage_perc", "gauge"),
        ("vllm:cache_config_info", "gauge"),
        ("vllm:prefix_cache_queries_total", "counter"),
        ("vllm:prefix_cache_hits_total", "counter"),
        ("vllm:num_preemptions_total", "counter"),
        ("vllm:prompt_tokens_total", "counter"),
        ("vllm:prompt_tokens_cached_total", "counter"),
        ("vllm:generation_tokens_total", "counter"),
        ("vllm:request_success_total", "counter"),
        ("vllm:admission_rejections_total", "counter"),
        ("vllm:time_to_first_token_seconds", "histogram"),
        ("vllm:inter_token_latency_seconds", "histogram"),
        ("vllm:request_time_per_output_token_seconds", "histogram"),
        ("vllm:e2e_request_latency_seconds", "histogram"),
        ("vllm:request_queue_time_seconds", "histogram"),
        ("vllm:request_prefill_time_seconds", "histogram"),
        ("vllm:request_decode_time_seconds", "histogram"),
        ("vllm:request_inference_time_seconds", "histogram"),
        ("vllm:request_prompt_tokens", "histogram"),
        ("vllm:request_generation_tokens", "histogram"),
        ("vllm:request_max_num_generation_tokens", "histogram"),
        ("vllm:request_params_n", "histogram"),
        ("vllm:request_params_max_tokens", "histogram"),
        ("vllm:iteration_tokens_total", "histogram"),
    ] {
        assert_eq!(kind(name), Some(expected), "{name}");
    }
    let aliases = families.keys().filter(|name| name.starts_with("vllm:")).count();
    assert_eq!(aliases, 26, "an alias that this test does not know");
}

#[test]
fn each_series_appears_once_and_carries_model_and_engine() {
    let text = all().render();
    let mut seen = BTreeSet::new();
    for series in families(&text).values().flat_map(|family| &family.1) {
        assert!(seen.insert(series.clone()), "twice: {series}");
        assert!(series.contains(r#"model_name="m""#), "{series}");
        assert!(series.contains(r#"engine="0""#), "{series}");
    }
    let info =
        r#"vllm:cache_config_info{block_size="64",engine="0",model_name="m",num_gpu_blocks="7"} 1"#;
    assert!(text.lines().any(|line| line == info));
}

#[test]
fn every_reason_to_finish_is_there_before_anybody_has() {
    let text = all().render();
    for reason in ["stop", "length", "abort", "error"] {
        let label = format!(r#"finished_reason="{reason}""#);
        let series = text.lines().filter(|line| line.contains(&label) && line.ends_with(" 0"));
        assert_eq!(series.count(), 2, "{reason}");
    }
}

/// As the aliases' first owner has them; token counts as for a model of 1,024 tokens.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1., 2.5, 5., 7.5, 10., 20.,
    40., 80., 160., 640., 2560.,
];
const BETWEEN_TOKENS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1., 2.5, 5., 7.5, 10., 20., 40.,
    80.,
];
const REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1., 1.5, 2., 2.5, 5., 10., 15., 20., 30., 40., 50., 60., 120., 240., 480., 960.,
    1920., 7680.,
];
const TOKENS: &[f64] = &[1., 2., 5., 10., 20., 50., 100., 200., 500., 1000.];
const ROWS: &[f64] = &[1., 8., 16., 32., 64., 128., 256., 512., 1024., 2048., 4096., 8192., 16384.];
const CHOICES: &[f64] = &[1., 2., 5., 10., 20.];

#[test]
fn the_bounds_of_every_histogram_are_those_that_dashboards_know() {
    let text = all().render();
    let expected = BTreeMap::from([
        ("time_to_first_token_seconds", FIRST_TOKEN),
        ("inter_token_latency_seconds", BETWEEN_TOKENS),
        ("request_time_per_output_token_seconds", BETWEEN_TOKENS),
        ("e2e_request_latency_seconds", REQUEST),
        ("request_queue_time_seconds", REQUEST),
        ("request_prefill_time_seconds", REQUEST),
        ("request_decode_time_seconds", REQUEST),
        ("request_inference_time_seconds", REQUEST),
        ("request_prompt_tokens", TOKENS),
        ("request_generation_tokens", TOKENS),
        ("request_max_num_generation_tokens", TOKENS),
        ("request_params_n", CHOICES),
        ("request_params_max_tokens", TOKENS),
        ("iteration_tokens_total", ROWS),
    ]);
    let mut found = BTreeMap::<&str, Vec<f64>>::new();
    for line in text.lines().filter(|line| line.contains("_bucket{")) {
        let (name, labels) = line.split_once("_bucket{").unwrap();
        let bound = labels.split_once(r#"le=""#).unwrap().1.split('"').next().unwrap();
        found.entry(name).or_default().push(bound.parse().unwrap());
    }
    assert_eq!(found.len(), 2 * expected.len(), "a histogram that this test does not know");
    for (name, bounds) in expected {
        let all: Vec<f64> = bounds.iter().copied().chain([f64::INFINITY]).collect();
        for prefix in ["plimsoll_", "vllm:"] {
            assert_eq!(found[format!("{prefix}{name}").as_str()], all, "{prefix}{name}");
        }
    }
}

#[test]
fn what_start_up_cost_is_shown_as_gauges() {
    let metrics = all();
    metrics.started(Startup {
        seconds: 1.5,
        weights_load_seconds: 0.5,
        weights_bytes: 12,
        kv_cache_bytes: 34,
    });
    let text = metrics.render();
    for (name, value) in [
        ("plimsoll_startup_seconds", "1.5"),
        ("plimsoll_weights_load_seconds", "0.5"),
        ("plimsoll_weights_bytes", "12"),
        ("plimsoll_kv_cache_bytes", "34"),
    ] {
        let line = format!(r#"{name}{{engine="0",model_name="m"}} {value}"#);
        assert!(text.lines().any(|found| found == line), "{line}");
    }
}

#[test]
fn the_device_shows_its_name_driver_and_memory_and_a_cpu_only_itself() {
    let gpu = Gpu {
        name: "NVIDIA H200".into(),
        memory_bytes: 150,
        memory_free_bytes: 50,
        compute_capability: "9.0".into(),
        multiprocessors: 132,
        driver: Some("580.95".into()),
    };
    let metrics = all();
    metrics.device_is(Some(&gpu));
    let text = metrics.render();
    for line in [
        r#"plimsoll_device_info{compute_capability="9.0",device="NVIDIA H200",driver="580.95",engine="0",model_name="m"} 1"#,
        r#"plimsoll_device_memory_bytes{engine="0",kind="total",model_name="m"} 150"#,
        r#"plimsoll_device_memory_bytes{engine="0",kind="free",model_name="m"} 50"#,
    ] {
        let found = |found: &str| sorted(found) == sorted(line);
        assert!(text.lines().any(found), "{line} in {text}");
    }
    let metrics = all();
    metrics.device_is(None);
    let text = metrics.render();
    assert!(text.contains(r#"device="CPU""#) && !text.contains("device_memory_bytes"), "{text}");
}

#[test]
fn the_peak_of_memory_is_shown_and_never_falls() {
    let metrics = all();
    let peak = |kind: &str| {
        let text = metrics.render();
        let line = text.lines().find(|line| {
            line.starts_with("plimsoll_peak_memory_bytes")
                && line.contains(&format!(r#"kind="{kind}""#))
        });
        line.map(|line| line.rsplit(' ').next().expect("a value").parse::<f64>().expect("a number"))
    };
    assert!(peak("process").expect("this process holds some") > 1e6);
    assert_eq!(peak("device"), None, "a CPU has no card");
    let held = Arc::new(AtomicU64::new(7 << 30));
    let now = held.clone();
    metrics.device_memory_is(move || Some(now.load(Ordering::Relaxed)));
    assert_eq!(peak("device"), Some(7.0 * f64::from(1 << 30)));
    held.store(1, Ordering::Relaxed);
    assert_eq!(peak("device"), Some(7.0 * f64::from(1 << 30)));
}

/// A series with its labels in one order.
fn sorted(line: &str) -> Vec<&str> {
    let mut parts: Vec<&str> = line.split(['{', ',', '}']).collect();
    parts.sort_unstable();
    parts
}
