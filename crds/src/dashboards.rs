//! In: nothing but the names of metrics. Out: three Grafana dashboards as JSON: the fleet, one deployment, the operator.
//! The chart carries them; a test on a real node asks a real Prometheus for every series they show. Pure.

use plimsoll_contract::metrics as engine;
use plimsoll_contract::metrics::Names;
use plimsoll_contract::metrics::operator;
use serde_json::{Value, json};

use self::panel::{
    Panel, dashboard, data_source, lines, mean, quantile, rate, stat, table, variable,
};

mod panel;
#[cfg(test)]
mod tests;

/// A dashboard and the name of its file.
pub struct Dashboard {
    pub file: &'static str,
    pub body: Value,
}

pub fn all() -> [Dashboard; 3] {
    let namespace = |all| variable("namespace", "Namespace", "namespace", "", all);
    let within = r#"{namespace="$namespace"}"#;
    let deployment = variable("llmdeployment", "LLMDeployment", "name", within, false);
    let fleet = json!([data_source(), namespace(true)]);
    let one = json!([data_source(), namespace(false), deployment]);
    let of_fleet = [fleet_at_a_glance(), fleet_over_time()];
    let of_one =
        [one_at_a_glance(), what_users_feel(), what_engines_do(), what_the_plan_promised()];
    let body = |uid: &str, title: &str, variables: Value, panels: Vec<Panel>| {
        dashboard(uid, &format!("Plimsoll / {title}"), variables, &panels)
    };
    [
        Dashboard {
            file: "plimsoll-fleet.json",
            body: body("plimsoll-fleet", "fleet", fleet, of_fleet.into_iter().flatten().collect()),
        },
        Dashboard {
            file: "plimsoll-deployment.json",
            body: body(
                "plimsoll-deployment",
                "one deployment",
                one,
                of_one.into_iter().flatten().collect(),
            ),
        },
        Dashboard {
            file: "plimsoll-operator.json",
            body: body("plimsoll-operator", "operator", json!([data_source()]), the_operator()),
        },
    ]
}

/// Selects the series of all chosen namespaces.
fn fleet(metric: &str) -> String {
    format!(r#"{metric}{{namespace=~"$namespace"}}"#)
}

/// Selects what the operator says of `Ready`, in all chosen namespaces.
fn readiness(more: &str) -> String {
    let metric = operator::CONDITION;
    format!(r#"{metric}{{namespace=~"$namespace",type="Ready"{more}}}"#)
}

/// Selects the engines of the chosen deployment.
fn one(metric: &str) -> String {
    format!(r#"{metric}{{namespace="$namespace",llmdeployment="$llmdeployment"}}"#)
}

/// Selects what the operator says of the chosen deployment.
fn said(metric: &str, more: &str) -> String {
    format!(r#"{metric}{{namespace="$namespace",name="$llmdeployment"{more}}}"#)
}

fn fleet_at_a_glance() -> Vec<Panel> {
    let sum = |names: Names| format!("sum({})", fleet(names.ours));
    let ready = format!("count({})", readiness(r#",status="True""#));
    let others = format!("count({}) or vector(0)", readiness(r#",status!="True""#));
    let why = format!("max by (namespace, name, reason) ({})", readiness(r#",status!="True""#));
    let reasons = format!("count by (reason) ({})", readiness(""));
    let generated = rate("", &fleet(engine::GENERATION_TOKENS.ours));
    vec![
        stat("Ready", "Objects whose pods answer, as many as asked for", ready),
        stat("Not ready", "Objects that are not, for whatever reason", others),
        stat("Running", "Choices being computed", sum(engine::REQUESTS_RUNNING)),
        stat("Waiting", "Choices in queues", sum(engine::REQUESTS_WAITING)),
        stat("Generated", "Tokens per second of all engines", generated)
            .in_unit("tokens/s")
            .wide(8),
        table("What is not ready, and why", "docs/status.md holds the remedies", why).wide(12),
        lines("Reasons of Ready", "Objects by the reason of their condition Ready", "short")
            .of(reasons, "{{reason}}"),
    ]
}

fn fleet_over_time() -> Vec<Panel> {
    let by = "namespace, llmdeployment";
    let each = "{{namespace}}/{{llmdeployment}}";
    let late = |names: Names| quantile(0.95, by, names, &fleet);
    let waiting = format!("sum by ({by}) ({})", fleet(engine::REQUESTS_WAITING.ours));
    let usage = format!("max by ({by}) ({})", fleet(engine::KV_CACHE_USAGE.ours));
    let planned = format!("sum by (namespace, name) ({})", fleet(operator::PLAN_MEMORY_BYTES));
    vec![
        lines("Tokens generated", "Per second", "tokens/s")
            .of(rate(by, &fleet(engine::GENERATION_TOKENS.ours)), each),
        lines("Requests waiting", "Choices in the queue", "short").of(waiting, each),
        lines("Time to first token, 95th percentile", "From arrival", "s")
            .of(late(engine::TIME_TO_FIRST_TOKEN), each),
        lines("Time per token, 95th percentile", "Mean of a request after its first token", "s")
            .of(late(engine::TIME_PER_OUTPUT_TOKEN), each),
        lines("KV cache in use", "Of the fullest pod", "percentunit").of(usage, each),
        lines("Memory of one pod, as planned", "Weights, KV cache, workspace and process", "bytes")
            .of(planned, "{{namespace}}/{{name}}"),
    ]
}

fn one_at_a_glance() -> Vec<Panel> {
    let sum = |names: Names| format!("sum({})", one(names.ours));
    let is_ready = said(operator::CONDITION, r#",type="Ready",status="True""#);
    let ready = format!("max({is_ready}) or vector(0)");
    let conditions = format!("max by (type, status, reason) ({})", said(operator::CONDITION, ""));
    let restarts = format!("sum({})", said(operator::ENGINE_RESTARTS, ""));
    let start = format!("max({})", one(engine::STARTUP_SECONDS));
    vec![
        stat("Ready", "1 while pods of the current revision answer, as many as asked for", ready),
        stat("Running", "Choices being computed", sum(engine::REQUESTS_RUNNING)),
        stat("Waiting", "Choices in the queue", sum(engine::REQUESTS_WAITING)),
        stat("Pods restarted", "Containers that ended and were started anew", restarts),
        stat("Start", "From the process's start until it answers", start).in_unit("s").wide(8),
        table("Conditions", "docs/status.md holds reasons and remedies", conditions).wide(12),
        lines("Requests", "Choices that run and that wait", "short")
            .of(sum(engine::REQUESTS_RUNNING), "running")
            .of(sum(engine::REQUESTS_WAITING), "waiting"),
    ]
}

/// Latencies, and how requests end.
fn what_users_feel() -> Vec<Panel> {
    let quantiles = |panel: Panel, names: Names| {
        let of = |share: f64| quantile(share, "", names, &one);
        panel.of(of(0.5), "p50").of(of(0.95), "p95").of(of(0.99), "p99")
    };
    let mean = |names: Names| mean("", names, &one);
    let refused = rate("reason", &one(engine::ADMISSION_REJECTIONS.ours));
    vec![
        quantiles(lines("Time to first token", "From arrival", "s"), engine::TIME_TO_FIRST_TOKEN),
        quantiles(lines("Time between tokens", "Of a stream", "s"), engine::INTER_TOKEN_LATENCY),
        quantiles(
            lines("Whole request", "From arrival to the last token", "s"),
            engine::E2E_REQUEST_LATENCY,
        ),
        lines("Where requests spend their time", "Mean seconds of each phase", "s")
            .of(mean(engine::REQUEST_QUEUE_TIME), "queue")
            .of(mean(engine::REQUEST_PREFILL_TIME), "prefill")
            .of(mean(engine::REQUEST_DECODE_TIME), "decode"),
        lines("Size of requests", "Mean tokens of prompts and answers", "short")
            .of(mean(engine::REQUEST_PROMPT_TOKENS), "prompt")
            .of(mean(engine::REQUEST_GENERATION_TOKENS), "answer"),
        lines("How requests end", "Per second; refusals are by their reason", "reqps")
            .of(
                rate("finished_reason", &one(engine::REQUESTS_FINISHED.ours)),
                "{{finished_reason}}",
            )
            .of(refused, "refused: {{reason}}"),
    ]
}

fn what_engines_do() -> Vec<Panel> {
    let per_second = |names: Names| rate("", &one(names.ours));
    let usage = format!("max by (pod) ({})", one(engine::KV_CACHE_USAGE.ours));
    let found = per_second(engine::PREFIX_CACHE_HITS);
    let looked_up = per_second(engine::PREFIX_CACHE_QUERIES);
    vec![
        lines("Tokens", "Per second; those found in the cache cost next to nothing", "tokens/s")
            .of(per_second(engine::GENERATION_TOKENS), "generated")
            .of(per_second(engine::PROMPT_TOKENS), "of prompts")
            .of(per_second(engine::PROMPT_TOKENS_CACHED), "found in the cache"),
        lines("KV cache in use", "By pod", "percentunit").of(usage, "{{pod}}"),
        lines("Prefix cache", "Share of prompt tokens that were found", "percentunit")
            .of(format!("{found} / {looked_up}"), "found"),
        lines("Preemptions", "Per second: choices that gave their pages up to older ones", "ops")
            .of(rate("pod", &one(engine::PREEMPTIONS.ours)), "{{pod}}"),
        lines("Rows of a step", "Mean number of tokens that a step computes", "short")
            .of(mean("pod", engine::ITERATION_TOKENS, &one), "{{pod}}"),
    ]
}

fn what_the_plan_promised() -> Vec<Panel> {
    let planned = format!("max by (part) ({})", said(operator::PLAN_MEMORY_BYTES, ""));
    let help = "Of one pod. What the plan counts on, and what weights and KV cache really take";
    vec![
        lines("Memory: planned and taken", help, "bytes")
            .of(planned, "planned: {{part}}")
            .of(format!("max({})", one(engine::WEIGHTS_BYTES)), "taken: weights")
            .of(format!("max({})", one(engine::KV_CACHE_BYTES)), "taken: kv"),
    ]
}

/// Whether it leads, how long it takes, what it writes.
fn the_operator() -> Vec<Panel> {
    let count = |kind: &str| format!(r#"count({}{{type="{kind}"}})"#, operator::CONDITION);
    let bucket = format!("{}_bucket", operator::RECONCILE_SECONDS);
    let slowest = format!("histogram_quantile(0.99, {})", rate("le", &bucket));
    let restarts = format!("sum by (namespace, name) ({})", operator::ENGINE_RESTARTS);
    let failures = format!("sum({})", operator::RECONCILE_ERRORS);
    vec![
        stat("Leads", "Operators that hold the Lease: 1", format!("sum({})", operator::LEADING))
            .wide(6),
        stat("Objects", "LLMDeployments that it sees", count("Ready")).wide(6),
        stat("Stalled", "Objects that wait for a person", count("Stalled") + " or vector(0)")
            .wide(6),
        stat("Failures", "Reconciles that failed and were tried again", failures).wide(6),
        lines("Reconciles", "Per second", "ops")
            .of(rate("result", operator::RECONCILES), "{{result}}"),
        lines("Time of a reconcile, 99th percentile", "A silent one: well under 1 ms", "s")
            .of(slowest, "p99"),
        lines("Writes", "Per second to the API server; none at rest", "ops")
            .of(rate("kind", operator::WRITES), "{{kind}}"),
        lines("Restarts of engines", "Containers that ended and were started anew", "short")
            .of(restarts, "{{namespace}}/{{name}}"),
    ]
}
