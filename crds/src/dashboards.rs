//! In: nothing but the names of metrics. Out: three Grafana dashboards as JSON: the fleet, one deployment, the operator.
//! The chart carries them; a test on a real node asks a real Prometheus for every series they show. Pure.

use plimsoll_contract::metrics as engine;
use plimsoll_contract::metrics::Names;
use plimsoll_contract::metrics::operator;
use serde_json::{Value, json};

/// Grafana divides a row into as many columns.
const COLUMNS: u32 = 24;
/// The layout of Grafana 10, which later ones read too.
const SCHEMA_VERSION: u32 = 39;

/// A dashboard and the name of its file.
pub struct Dashboard {
    pub file: &'static str,
    pub body: Value,
}

pub fn all() -> [Dashboard; 3] {
    [
        Dashboard { file: "plimsoll-fleet.json", body: fleet() },
        Dashboard { file: "plimsoll-deployment.json", body: deployment() },
        Dashboard { file: "plimsoll-operator.json", body: operator_itself() },
    ]
}

#[derive(Clone, Copy)]
enum Kind {
    /// One number, as of now.
    Stat,
    /// Lines over time.
    Lines,
    /// One row per series, as of now.
    Table,
}

struct Panel {
    title: &'static str,
    help: &'static str,
    kind: Kind,
    /// Grafana's name of the unit.
    unit: &'static str,
    width: u32,
    /// Expression and legend.
    series: Vec<(String, &'static str)>,
}

/// Every LLMDeployment that the operator sees, side by side.
fn fleet() -> Value {
    let of = |metric: &str| format!(r#"{metric}{{namespace=~"$namespace"}}"#);
    let by = "namespace, llmdeployment";
    let each = "{{namespace}}/{{llmdeployment}}";
    let ready = |status: &str| {
        let metric = operator::CONDITION;
        format!(r#"count({metric}{{namespace=~"$namespace",type="Ready",status{status}"True"}})"#)
    };
    let not_ready = format!(
        r#"max by (namespace, name, reason) ({}{{namespace=~"$namespace",type="Ready",status!="True"}})"#,
        operator::CONDITION
    );
    let reasons = format!(
        r#"count by (reason) ({}{{namespace=~"$namespace",type="Ready"}})"#,
        operator::CONDITION
    );
    let usage = format!("max by ({by}) ({})", of(engine::KV_CACHE_USAGE.ours));
    let planned = format!("sum by (namespace, name) ({})", of(operator::PLAN_MEMORY_BYTES));
    let panels = vec![
        stat("Ready", "Objects whose pods answer, as many as asked for", ready("=")),
        stat(
            "Not ready",
            "Objects that are not, for whatever reason",
            ready("!=") + " or vector(0)",
        ),
        stat(
            "Running",
            "Choices being computed",
            format!("sum({})", of(engine::REQUESTS_RUNNING.ours)),
        ),
        stat("Waiting", "Choices in queues", format!("sum({})", of(engine::REQUESTS_WAITING.ours))),
        Panel {
            unit: "tokens/s",
            width: 8,
            ..stat(
                "Generated",
                "Tokens per second of all engines",
                rate("", &of(engine::GENERATION_TOKENS.ours)),
            )
        },
        Panel {
            width: 12,
            ..table(
                "What is not ready, and why",
                "The reasons and their remedies stand in docs/status.md",
                not_ready,
            )
        },
        lines(
            "Reasons of Ready",
            "Objects by the reason of their condition Ready",
            "short",
            vec![(reasons, "{{reason}}")],
        ),
        lines(
            "Tokens generated",
            "Per second",
            "tokens/s",
            vec![(rate(by, &of(engine::GENERATION_TOKENS.ours)), each)],
        ),
        lines(
            "Requests waiting",
            "Choices in the queue",
            "short",
            vec![(format!("sum by ({by}) ({})", of(engine::REQUESTS_WAITING.ours)), each)],
        ),
        lines(
            "Time to first token, 95th percentile",
            "From arrival",
            "s",
            vec![(quantile(0.95, by, engine::TIME_TO_FIRST_TOKEN, &of), each)],
        ),
        lines(
            "Time per token, 95th percentile",
            "Mean of a request after its first token",
            "s",
            vec![(quantile(0.95, by, engine::TIME_PER_OUTPUT_TOKEN, &of), each)],
        ),
        lines("KV cache in use", "Of the fullest pod", "percentunit", vec![(usage, each)]),
        lines(
            "Memory of one pod, as planned",
            "Weights, KV cache, workspace and process",
            "bytes",
            vec![(planned, "{{namespace}}/{{name}}")],
        ),
    ];
    let variables =
        json!([data_source(), variable("namespace", "Namespace", "namespace", "", true)]);
    dashboard("plimsoll-fleet", "Plimsoll / fleet", variables, panels)
}

/// One LLMDeployment: what its users feel, what its engines do, what its plan promised.
fn deployment() -> Value {
    let of = |metric: &str| {
        format!(r#"{metric}{{namespace="$namespace",llmdeployment="$llmdeployment"}}"#)
    };
    let said = |metric: &str, more: &str| {
        format!(r#"{metric}{{namespace="$namespace",name="$llmdeployment"{more}}}"#)
    };
    let sum = |names: Names| format!("sum({})", of(names.ours));
    let quantiles = |names: Names| {
        [(0.5, "p50"), (0.95, "p95"), (0.99, "p99")]
            .map(|(share, legend)| (quantile(share, "", names, &of), legend))
            .to_vec()
    };
    let ready = format!(
        "max({}) or vector(0)",
        said(operator::CONDITION, r#",type="Ready",status="True""#)
    );
    let conditions = format!("max by (type, status, reason) ({})", said(operator::CONDITION, ""));
    let found = rate("", &of(engine::PREFIX_CACHE_HITS.ours));
    let looked_up = rate("", &of(engine::PREFIX_CACHE_QUERIES.ours));
    let planned = format!("max by (part) ({})", said(operator::PLAN_MEMORY_BYTES, ""));
    let mut panels = vec![
        stat("Ready", "1 while pods of the current revision answer, as many as asked for", ready),
        stat("Running", "Choices being computed", sum(engine::REQUESTS_RUNNING)),
        stat("Waiting", "Choices in the queue", sum(engine::REQUESTS_WAITING)),
        stat(
            "Pods restarted",
            "Containers that ended and were started anew",
            format!("sum({})", said(operator::ENGINE_RESTARTS, "")),
        ),
        Panel {
            unit: "s",
            width: 8,
            ..stat(
                "Start",
                "From the process's start until it answers",
                format!("max({})", of(engine::STARTUP_SECONDS)),
            )
        },
        Panel {
            width: 12,
            ..table(
                "Conditions",
                "The reasons and their remedies stand in docs/status.md",
                conditions,
            )
        },
        lines(
            "Requests",
            "Choices that run and that wait",
            "short",
            vec![
                (sum(engine::REQUESTS_RUNNING), "running"),
                (sum(engine::REQUESTS_WAITING), "waiting"),
            ],
        ),
    ];
    panels.extend(what_users_feel(&of, &quantiles));
    panels.extend([
        lines(
            "Tokens",
            "Per second; those found in the cache cost next to nothing",
            "tokens/s",
            vec![
                (rate("", &of(engine::GENERATION_TOKENS.ours)), "generated"),
                (rate("", &of(engine::PROMPT_TOKENS.ours)), "of prompts"),
                (
                    rate("", &of(engine::PROMPT_TOKENS_CACHED.ours)),
                    "of prompts, found in the cache",
                ),
            ],
        ),
        lines(
            "KV cache in use",
            "By pod",
            "percentunit",
            vec![(format!("max by (pod) ({})", of(engine::KV_CACHE_USAGE.ours)), "{{pod}}")],
        ),
        lines(
            "Prefix cache",
            "Share of prompt tokens that were found",
            "percentunit",
            vec![(format!("{found} / {looked_up}"), "found")],
        ),
        lines(
            "Preemptions",
            "Per second: choices that gave their pages up to older ones",
            "ops",
            vec![(rate("pod", &of(engine::PREEMPTIONS.ours)), "{{pod}}")],
        ),
        lines(
            "Rows of a step",
            "Mean number of tokens that a step computes",
            "short",
            vec![(mean("pod", engine::ITERATION_TOKENS, &of), "{{pod}}")],
        ),
        lines(
            "Memory: planned and taken",
            "Of one pod. What the plan counts on, and what weights and KV cache really take",
            "bytes",
            vec![
                (planned, "planned: {{part}}"),
                (format!("max({})", of(engine::WEIGHTS_BYTES)), "taken: weights"),
                (format!("max({})", of(engine::KV_CACHE_BYTES)), "taken: kv"),
            ],
        ),
    ]);
    let variables = json!([
        data_source(),
        variable("namespace", "Namespace", "namespace", "", false),
        variable("llmdeployment", "LLMDeployment", "name", r#"{namespace="$namespace"}"#, false),
    ]);
    dashboard("plimsoll-deployment", "Plimsoll / one deployment", variables, panels)
}

/// Latencies, and how requests end.
fn what_users_feel(
    of: &dyn Fn(&str) -> String,
    quantiles: &dyn Fn(Names) -> Vec<(String, &'static str)>,
) -> Vec<Panel> {
    let ended = rate("finished_reason", &of(engine::REQUESTS_FINISHED.ours));
    let refused = rate("reason", &of(engine::ADMISSION_REJECTIONS.ours));
    vec![
        lines("Time to first token", "From arrival", "s", quantiles(engine::TIME_TO_FIRST_TOKEN)),
        lines("Time between tokens", "Of a stream", "s", quantiles(engine::INTER_TOKEN_LATENCY)),
        lines(
            "Whole request",
            "From arrival to the last token",
            "s",
            quantiles(engine::E2E_REQUEST_LATENCY),
        ),
        lines(
            "Where requests spend their time",
            "Mean seconds in the queue, in the prompt, in the answer",
            "s",
            vec![
                (mean("", engine::REQUEST_QUEUE_TIME, of), "queue"),
                (mean("", engine::REQUEST_PREFILL_TIME, of), "prefill"),
                (mean("", engine::REQUEST_DECODE_TIME, of), "decode"),
            ],
        ),
        lines(
            "Size of requests",
            "Mean tokens of prompts and answers",
            "short",
            vec![
                (mean("", engine::REQUEST_PROMPT_TOKENS, of), "prompt"),
                (mean("", engine::REQUEST_GENERATION_TOKENS, of), "answer"),
            ],
        ),
        lines(
            "How requests end",
            "Per second; refusals are by their reason",
            "reqps",
            vec![(ended, "{{finished_reason}}"), (refused, "refused: {{reason}}")],
        ),
    ]
}

/// The operator itself: whether it leads, how long it takes, what it writes.
fn operator_itself() -> Value {
    let p99 = format!(
        "histogram_quantile(0.99, sum by (le) (rate({}_bucket[$__rate_interval])))",
        operator::RECONCILE_SECONDS
    );
    let panels = vec![
        stat("Leads", "Operators that hold the Lease: 1", format!("sum({})", operator::LEADING)),
        stat(
            "Objects",
            "LLMDeployments that it sees",
            format!(r#"count({}{{type="Ready"}})"#, operator::CONDITION),
        ),
        stat(
            "Stalled",
            "Objects that wait for a person",
            format!(r#"count({}{{type="Stalled"}}) or vector(0)"#, operator::CONDITION),
        ),
        stat(
            "Failures",
            "Reconciles that failed and are tried again, since it started",
            format!("sum({})", operator::RECONCILE_ERRORS),
        ),
        lines(
            "Reconciles",
            "Per second",
            "ops",
            vec![(rate("result", operator::RECONCILES), "{{result}}")],
        ),
        lines(
            "Time of a reconcile, 99th percentile",
            "A silent one takes well under a millisecond",
            "s",
            vec![(p99, "p99")],
        ),
        lines(
            "Writes",
            "Per second to the API server; none at rest",
            "ops",
            vec![(rate("kind", operator::WRITES), "{{kind}}")],
        ),
        lines(
            "Restarts of engines",
            "Containers that ended and were started anew",
            "short",
            vec![(
                format!("sum by (namespace, name) ({})", operator::ENGINE_RESTARTS),
                "{{namespace}}/{{name}}",
            )],
        ),
    ];
    dashboard("plimsoll-operator", "Plimsoll / operator", json!([data_source()]), panels)
}

fn stat(title: &'static str, help: &'static str, expression: String) -> Panel {
    Panel { title, help, kind: Kind::Stat, unit: "short", width: 4, series: vec![(expression, "")] }
}

fn table(title: &'static str, help: &'static str, expression: String) -> Panel {
    Panel { kind: Kind::Table, ..stat(title, help, expression) }
}

fn lines(
    title: &'static str,
    help: &'static str,
    unit: &'static str,
    series: Vec<(String, &'static str)>,
) -> Panel {
    Panel { title, help, kind: Kind::Lines, unit, width: COLUMNS / 2, series }
}

fn grouped(by: &str) -> String {
    if by.is_empty() { "sum".to_owned() } else { format!("sum by ({by})") }
}

/// Per second, of a counter.
fn rate(by: &str, selector: &str) -> String {
    format!("{} (rate({selector}[$__rate_interval]))", grouped(by))
}

fn quantile(share: f64, by: &str, names: Names, of: &dyn Fn(&str) -> String) -> String {
    let bucket = of(&format!("{}_bucket", names.ours));
    let by = if by.is_empty() { "le".to_owned() } else { format!("le, {by}") };
    format!("histogram_quantile({share}, {})", rate(&by, &bucket))
}

/// Of a histogram.
fn mean(by: &str, names: Names, of: &dyn Fn(&str) -> String) -> String {
    let part = |suffix: &str| rate(by, &of(&format!("{}{suffix}", names.ours)));
    format!("{} / {}", part("_sum"), part("_count"))
}

fn data_source() -> Value {
    json!({"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"})
}

/// A choice among the values that a label of the conditions has.
fn variable(name: &str, title: &str, label: &str, selector: &str, all: bool) -> Value {
    json!({
        "name": name, "label": title, "type": "query", "refresh": 2, "sort": 1,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": format!("label_values({}{selector}, {label})", operator::CONDITION),
        "includeAll": all, "multi": all,
    })
}

fn dashboard(uid: &str, title: &str, variables: Value, panels: Vec<Panel>) -> Value {
    let (mut x, mut y, mut row_height) = (0, 0, 0);
    let mut placed = Vec::new();
    for (index, panel) in panels.iter().enumerate() {
        let height = match panel.kind {
            Kind::Stat => 4,
            Kind::Lines | Kind::Table => 8,
        };
        if x + panel.width > COLUMNS {
            (x, y, row_height) = (0, y + row_height, 0);
        }
        placed
            .push(panel.placed(index + 1, json!({"x": x, "y": y, "w": panel.width, "h": height})));
        x += panel.width;
        row_height = row_height.max(height);
    }
    json!({
        "uid": uid, "title": title, "tags": ["plimsoll"], "schemaVersion": SCHEMA_VERSION,
        "editable": true, "graphTooltip": 1, "refresh": "30s", "timezone": "",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables}, "panels": placed,
    })
}

impl Panel {
    fn placed(&self, id: usize, place: Value) -> Value {
        let (kind, options) = match self.kind {
            Kind::Stat => ("stat", json!({"colorMode": "value", "graphMode": "area"})),
            Kind::Lines => {
                ("timeseries", json!({"legend": {"displayMode": "list", "placement": "bottom"}}))
            }
            Kind::Table => ("table", json!({})),
        };
        let is_table = matches!(self.kind, Kind::Table);
        let targets = self.series.iter().enumerate().map(|(index, (expression, legend))| {
            json!({
                "refId": char::from(b'A' + u8::try_from(index).expect("a panel has few series")).to_string(),
                "expr": expression, "legendFormat": legend,
                "instant": is_table, "range": !is_table, "format": if is_table { "table" } else { "time_series" },
            })
        });
        let mut body = json!({
            "id": id, "type": kind, "title": self.title, "description": self.help, "gridPos": place,
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "targets": targets.collect::<Vec<_>>(),
            "fieldConfig": {"defaults": {"unit": self.unit, "min": 0}, "overrides": []},
            "options": options,
        });
        if is_table {
            let noise = json!({"Time": true, "Value": true});
            body["transformations"] =
                json!([{"id": "organize", "options": {"excludeByName": noise}}]);
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn panels(dashboard: &Dashboard) -> &Vec<Value> {
        dashboard.body["panels"].as_array().unwrap()
    }

    #[test]
    fn no_panel_lies_on_another_or_beyond_the_edge() {
        for dashboard in all() {
            let mut taken = BTreeSet::new();
            for panel in panels(&dashboard) {
                let place = |side: &str| panel["gridPos"][side].as_u64().unwrap();
                assert!(place("x") + place("w") <= u64::from(COLUMNS), "{}", panel["title"]);
                for x in place("x")..place("x") + place("w") {
                    for y in place("y")..place("y") + place("h") {
                        assert!(taken.insert((x, y)), "{} in {}", panel["title"], dashboard.file);
                    }
                }
            }
        }
    }

    #[test]
    fn gaie_1905_no_panel_asks_for_a_name_that_the_contract_does_not_hold() {
        let contract = include_str!("../contract/src/metrics.rs");
        for dashboard in all() {
            for target in
                panels(&dashboard).iter().flat_map(|panel| panel["targets"].as_array().unwrap())
            {
                let expression = target["expr"].as_str().unwrap();
                let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
                let names: Vec<&str> = words.filter(|word| word.starts_with("plimsoll_")).collect();
                assert!(!names.is_empty(), "{expression}");
                for name in names {
                    let family = ["_bucket", "_sum", "_count"]
                        .iter()
                        .find_map(|end| name.strip_suffix(end))
                        .unwrap_or(name);
                    assert!(
                        contract.contains(&format!("\"{family}\"")),
                        "{family} in {expression}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_variable_that_a_panel_uses_is_declared() {
        for dashboard in all() {
            let text = dashboard.body["panels"].to_string();
            let declared = dashboard.body["templating"]["list"].as_array().unwrap();
            for name in ["namespace", "llmdeployment"] {
                let used = text.contains(&format!("${name}"));
                assert_eq!(
                    used,
                    declared.iter().any(|variable| variable["name"] == name),
                    "{name} in {}",
                    dashboard.file
                );
            }
        }
    }
}
