//! In: an object's name and what it promises. Out: the alerts that watch over it, and those over the operator, as
//! Prometheus evaluates them. The operator renders them into a PrometheusRule, the chart carries those over the operator,
//! docs/alerts.md lists all of them. Pure; names come from the contract, so that none is asked for that nobody exports.

use plimsoll_contract::metrics as engine;
use plimsoll_contract::metrics::operator;
use serde_json::{Value, json};

/// How soon a person should look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Now: users notice.
    Critical,
    /// Today: it gets worse or costs more than it should.
    Warning,
}

impl Severity {
    pub fn name(self) -> &'static str {
        match self {
            Severity::Critical => "critical",
            Severity::Warning => "warning",
        }
    }
}

/// One rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Alert {
    pub name: &'static str,
    pub severity: Severity,
    /// How long it must hold, in minutes.
    pub for_minutes: u32,
    pub expression: String,
    /// One sentence.
    pub summary: String,
    /// What to do about it.
    pub remedy: &'static str,
    /// The object it speaks of: its namespace and name.
    pub object: Option<(String, String)>,
}

/// What alerts over one object are made from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Watched<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    /// What the object promises at the 95th percentile, in seconds; None promises nothing.
    pub ttft_seconds: Option<f64>,
    pub tpot_seconds: Option<f64>,
}

/// The share of the plan's bytes by which the engine may be off.
const PLAN_OFF_RATIO: f64 = 0.1;
/// Use of the KV cache beyond which it is as good as full.
const KV_FULL_RATIO: f64 = 0.95;
/// Restarts within half an hour that are a loop.
const RESTARTS_MAX: u32 = 3;

/// The alerts over one object, in the order of docs/alerts.md.
pub fn of_object(watched: &Watched<'_>) -> Vec<Alert> {
    let mut alerts = vec![not_ready(watched), queue_growing(watched)];
    let ttft = ("PlimsollSloBurnTtft", "first token", engine::TIME_TO_FIRST_TOKEN.ours);
    let tpot = ("PlimsollSloBurnTpot", "next token", engine::TIME_PER_OUTPUT_TOKEN.ours);
    for (rule, promise) in [(ttft, watched.ttft_seconds), (tpot, watched.tpot_seconds)] {
        alerts.extend(promise.map(|seconds| slo_burn(watched, rule, seconds)));
    }
    alerts.extend([
        kv_full(watched),
        preemption_storm(watched),
        reload_loop(watched),
        plan_off(watched),
    ]);
    alerts
}

fn not_ready(watched: &Watched<'_>) -> Alert {
    let not_true = r#"type="Ready",status!="True",reason!~"Suspended|ScaledToZero""#;
    alert(watched, "PlimsollNotReady", Severity::Critical, 15)
        .when(format!("max({}) == 1", watched.object(operator::CONDITION, not_true)))
        .says("is not Ready")
        .remedy("`kubectl describe llmd NAME`: the reason of `Ready` and its remedy stand in status.md. A model that takes longer to download or load than this is no fault: silence it.")
}

/// A queue that only grows, or one that is full and turns requests away.
fn queue_growing(watched: &Watched<'_>) -> Alert {
    let waiting = format!("sum({})", watched.engine(engine::REQUESTS_WAITING.ours, ""));
    let refused = watched.engine(engine::ADMISSION_REJECTIONS.ours, r#"reason="queue_full""#);
    alert(watched, "PlimsollQueueGrowing", Severity::Warning, 5)
        .when(format!(
            "(min_over_time({waiting}[10m:1m]) > 0 \
             and avg_over_time({waiting}[5m:1m]) > 1.2 * avg_over_time({waiting}[5m:1m] offset 10m)) \
             or sum(rate({refused}[5m])) > 0"
        ))
        .says("gets more requests than it answers: the queue grows, or is full")
        .remedy("Raise `spec.replicas`, or let it be scaled. `spec.workload.concurrency` says how many requests one pod runs at once; more need more memory.")
}

/// Both windows: the short one ends the alert soon after the cause, the long one keeps blips silent.
fn slo_burn(
    watched: &Watched<'_>,
    (name, what, histogram): (&'static str, &str, &str),
    seconds: f64,
) -> Alert {
    let bucket = watched.engine(&format!("{histogram}_bucket"), "");
    let late = |window: &str| {
        format!("histogram_quantile(0.95, sum by (le) (rate({bucket}[{window}]))) > {seconds}")
    };
    alert(watched, name, Severity::Critical, 2)
        .when(format!("{} and {}", late("5m"), late("1h")))
        .says(&format!("takes longer than {seconds} s to the {what} at the 95th percentile"))
        .remedy("Look at the queue first: what waits is late. Then more replicas, or a plan with a faster card. If the promise was never real, change `spec.slo`.")
}

fn kv_full(watched: &Watched<'_>) -> Alert {
    let usage = watched.engine(engine::KV_CACHE_USAGE.ours, "");
    let waiting = watched.engine(engine::REQUESTS_WAITING.ours, "");
    alert(watched, "PlimsollKvCacheFull", Severity::Warning, 10)
        .when(format!("max({usage}) > {KV_FULL_RATIO} and sum({waiting}) > 0"))
        .says("has its KV cache full while requests wait for it")
        .remedy("More replicas, a larger `spec.cache.tokens` where memory allows it, or a lower `spec.contextTokens`.")
}

/// More often than every second request gives its pages up and is computed again.
fn preemption_storm(watched: &Watched<'_>) -> Alert {
    let preempted = watched.engine(engine::PREEMPTIONS.ours, "");
    let finished = watched.engine(engine::REQUESTS_FINISHED.ours, "");
    alert(watched, "PlimsollPreemptionStorm", Severity::Warning, 10)
        .when(format!(
            "sum(rate({preempted}[5m])) > 0.5 * sum(rate({finished}[5m])) \
             and sum(rate({preempted}[5m])) > 0.05"
        ))
        .says("computes requests again and again, because their pages are taken for older ones")
        .remedy("Lower `spec.workload.concurrency`, raise `spec.cache.tokens`, or add replicas: more runs at once than the cache carries.")
}

fn reload_loop(watched: &Watched<'_>) -> Alert {
    let restarts = watched.object(operator::ENGINE_RESTARTS, "");
    // Half a restart below the bound, because `increase` extrapolates.
    let bound = f64::from(RESTARTS_MAX) - 0.5;
    alert(watched, "PlimsollReloadLoop", Severity::Critical, 0)
        .when(format!("sum(increase({restarts}[30m])) > {bound}"))
        .says("loads its model again and again: three restarts within half an hour")
        .remedy("`kubectl describe llmd NAME`: the engine's own words stand in the condition EngineLoaded.")
}

fn plan_off(watched: &Watched<'_>) -> Alert {
    let weights = watched.engine(engine::WEIGHTS_BYTES, "");
    let cache = watched.engine(engine::KV_CACHE_BYTES, "");
    let planned = |part: &str| {
        let part = format!("part=\"{part}\"");
        format!("max({})", watched.object(operator::PLAN_MEMORY_BYTES, &part))
    };
    alert(watched, "PlimsollPlanOff", Severity::Warning, 15)
        .when(format!(
            "abs(max({weights} + {cache}) / ({} + {}) - 1) > {PLAN_OFF_RATIO}",
            planned("weights"),
            planned("kv")
        ))
        .says("takes more than a tenth more or less memory for weights and KV cache than its plan says")
        .remedy("A defect of the planner or of the engine: please report it with `kubectl get llmd NAME -o yaml`.")
}

/// The alerts over the operator itself, which the chart carries.
pub fn of_operator() -> Vec<Alert> {
    let rate = |metric: &str| format!("sum(rate({metric}[10m]))");
    vec![
        over_operator("PlimsollOperatorAbsent", Severity::Critical, 5)
            .when(format!("absent({} == 1)", operator::LEADING))
            .says("No Plimsoll operator leads: models go on serving, and nothing is repaired, scaled or updated")
            .remedy("`kubectl get pods` in the operator's namespace. If it runs, its metrics do not reach Prometheus."),
        over_operator("PlimsollReconcileErrors", Severity::Warning, 15)
            .when(format!("{} > 0.1 * {}", rate(operator::RECONCILE_ERRORS), rate(operator::RECONCILES)))
            .says("More than a tenth of the operator's reconciles fail")
            .remedy("The operator's log names object and cause: most often rights that are missing after an upgrade, or an API server in trouble."),
        over_operator("PlimsollWritesAtRest", Severity::Warning, 30)
            .when(format!("{} > 5", rate(operator::WRITES)))
            .says("The operator has written more than 5 objects a second for half an hour")
            .remedy("Where nobody creates objects at that rate, someone changes what Plimsoll keeps: `plimsoll_operator_writes_total` tells the kind, the operator's log the name."),
    ]
}

/// Groups of rules, as a rule file and a PrometheusRule hold them.
pub fn groups(group: &str, alerts: &[Alert]) -> Value {
    json!([{"name": group, "rules": alerts.iter().map(Alert::rule).collect::<Vec<_>>()}])
}

fn alert(watched: &Watched<'_>, name: &'static str, severity: Severity, for_minutes: u32) -> Alert {
    let object = Some((watched.namespace.to_owned(), watched.name.to_owned()));
    Alert { object, ..over_operator(name, severity, for_minutes) }
}

fn over_operator(name: &'static str, severity: Severity, for_minutes: u32) -> Alert {
    let (expression, summary, remedy, object) = (String::new(), String::new(), "", None);
    Alert { name, severity, for_minutes, expression, summary, remedy, object }
}

impl Alert {
    fn when(self, expression: String) -> Alert {
        Alert { expression, ..self }
    }

    fn says(self, what: &str) -> Alert {
        let summary = match &self.object {
            Some((namespace, name)) => format!("{namespace}/{name} {what}"),
            None => what.to_owned(),
        };
        Alert { summary, ..self }
    }

    fn remedy(self, remedy: &'static str) -> Alert {
        Alert { remedy, ..self }
    }

    /// As Prometheus reads it. Labels say of which object it speaks, whatever the expression aggregates away.
    pub fn rule(&self) -> Value {
        let mut labels = json!({"severity": self.severity.name()});
        if let Some((namespace, name)) = &self.object {
            labels["namespace"] = namespace.as_str().into();
            labels["llmdeployment"] = name.as_str().into();
        }
        let mut rule = json!({
            "alert": self.name,
            "expr": self.expression,
            "labels": labels,
            "annotations": {"summary": self.summary, "description": self.remedy},
        });
        if self.for_minutes > 0 {
            rule["for"] = format!("{}m", self.for_minutes).into();
        }
        rule
    }
}

impl Watched<'_> {
    /// A selector of this object's engines.
    fn engine(&self, metric: &str, more: &str) -> String {
        self.select(metric, "llmdeployment", more)
    }

    /// A selector of what the operator says of this object.
    fn object(&self, metric: &str, more: &str) -> String {
        self.select(metric, "name", more)
    }

    fn select(&self, metric: &str, label: &str, more: &str) -> String {
        let Watched { namespace, name, .. } = self;
        let comma = if more.is_empty() { "" } else { "," };
        format!("{metric}{{namespace=\"{namespace}\",{label}=\"{name}\"{comma}{more}}}")
    }
}

#[cfg(test)]
mod tests;
