use super::*;

#[test]
fn every_family_has_exactly_one_series_under_each_name() {
    let metrics = Metrics::new("m", 1024);
    metrics.kv_cache_is(7);
    let text = metrics.render();
    let running = text.lines().filter(|line| line.starts_with("vllm:num_requests_running{"));
    assert_eq!(
        running.collect::<Vec<_>>(),
        [r#"vllm:num_requests_running{engine="0",model_name="m"} 0"#]
    );
}
