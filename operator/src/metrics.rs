//! In: what reconciles did, and the objects in the cache at the moment of a scrape. Out: Prometheus text.
//! What tells of objects is read from the caches at each scrape, so that no series outlives its object.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use kube::ResourceExt;
use plimsoll_contract::metrics::operator as names;
use plimsoll_crds::LLMDeployment;
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};

const TO_MEMORY: &str = "writing to memory does not fail";
/// Bucket bounds of one reconcile, in seconds: a silent one takes well under a millisecond, a writing one some tens.
const RECONCILE_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// What the operator counts about itself.
pub struct Metrics {
    registry: Registry,
    reconcile_seconds: HistogramVec,
    reconciles: IntCounterVec,
    errors: IntCounter,
    writes: IntCounterVec,
    prometheus_looks: IntCounterVec,
}

impl Metrics {
    pub fn new() -> Self {
        let valid = "names and labels are valid";
        let reconcile_seconds = HistogramVec::new(
            HistogramOpts::new(names::RECONCILE_SECONDS, "Time of a reconcile")
                .buckets(RECONCILE_BUCKETS.to_vec()),
            &["result"],
        )
        .expect(valid);
        let reconciles =
            IntCounterVec::new(Opts::new(names::RECONCILES, "Reconciles by result"), &["result"])
                .expect(valid);
        let errors =
            IntCounter::new(names::RECONCILE_ERRORS, "Reconciles that failed and are tried again")
                .expect(valid);
        let writes = IntCounterVec::new(
            Opts::new(names::WRITES, "Writes to the API server by kind"),
            &["kind"],
        )
        .expect(valid);
        let prometheus_looks = IntCounterVec::new(
            Opts::new(
                "plimsoll_operator_scaling_looks_total",
                "Looks of the scaling loop at Prometheus by result",
            ),
            &["result"],
        )
        .expect(valid);
        let registry = Registry::new();
        let distinct = "names are distinct";
        registry.register(Box::new(reconcile_seconds.clone())).expect(distinct);
        registry.register(Box::new(reconciles.clone())).expect(distinct);
        registry.register(Box::new(errors.clone())).expect(distinct);
        registry.register(Box::new(writes.clone())).expect(distinct);
        registry.register(Box::new(prometheus_looks.clone())).expect(distinct);
        Metrics { registry, reconcile_seconds, reconciles, errors, writes, prometheus_looks }
    }

    pub fn asked_prometheus(&self, failed: bool) {
        let result = if failed { "error" } else { "success" };
        self.prometheus_looks.with_label_values(&[result]).inc();
    }

    pub fn reconciled(&self, took: Duration, failed: bool) {
        let result = if failed { "error" } else { "success" };
        self.reconcile_seconds.with_label_values(&[result]).observe(took.as_secs_f64());
        self.reconciles.with_label_values(&[result]).inc();
        if failed {
            self.errors.inc();
        }
    }

    /// How many there were.
    pub fn reconciles(&self) -> u64 {
        let counts =
            ["success", "error"].map(|result| self.reconciles.with_label_values(&[result]).get());
        counts.into_iter().sum()
    }

    pub fn wrote(&self, kind: &str) {
        self.writes.with_label_values(&[kind]).inc();
    }

    /// The exposition, with the series of every object and engine pod there is at this moment.
    pub fn text(&self, seen: &Scraped<'_>) -> String {
        let mut bytes = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut bytes)
            .expect("writing to memory does not fail");
        let mut text = String::from_utf8(bytes).expect("the encoder writes UTF-8");
        family(&mut text, names::LEADING, "gauge", "1 in the process that holds the Lease");
        line(&mut text, names::LEADING, &[], i64::from(seen.leading));
        write_conditions(seen.objects, &mut text);
        write_plan_parts(seen.objects, &mut text);
        write_plans(seen.objects, &mut text);
        write_restarts(seen.restarts, &mut text);
        text
    }
}

/// What a scrape reads beside the counters.
pub struct Scraped<'a> {
    pub leading: bool,
    pub objects: &'a [Arc<LLMDeployment>],
    /// Of engine pods, by namespace, object and pod: containers that ended and were started anew.
    pub restarts: &'a [([String; 3], i64)],
}

fn write_conditions(objects: &[Arc<LLMDeployment>], text: &mut String) {
    family(text, names::CONDITION, "gauge", "Conditions of LLMDeployments; 1 for what holds");
    for object in objects {
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        for held in object.status.iter().flat_map(|status| &status.conditions) {
            let labels = [
                ("namespace", namespace.as_str()),
                ("name", &name),
                ("type", &held.type_),
                ("status", &held.status),
                ("reason", &held.reason),
            ];
            line(text, names::CONDITION, &labels, 1);
        }
    }
}

fn write_plan_parts(objects: &[Arc<LLMDeployment>], text: &mut String) {
    family(text, names::PLAN_MEMORY_BYTES, "gauge", "Bytes of one pod that the plan counts on");
    for object in objects {
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        let plan = object.status.as_ref().and_then(|status| status.plan.as_ref());
        let Some(bytes) = plan.map(|plan| &plan.memory_bytes) else { continue };
        for (part, bytes) in [
            ("weights", bytes.weights),
            ("kv", bytes.kv),
            ("workspace", bytes.workspace),
            ("process", bytes.process),
        ] {
            let labels = [("namespace", namespace.as_str()), ("name", &name), ("part", part)];
            line(text, names::PLAN_MEMORY_BYTES, &labels, bytes);
        }
    }
}

/// What every object runs with, and its memory as planned and as measured: an alert holds one against the other.
fn write_plans(objects: &[Arc<LLMDeployment>], text: &mut String) {
    let running = || {
        objects.iter().filter_map(|object| {
            let status = object.status.as_ref().filter(|status| status.revision.is_some())?;
            let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
            Some((namespace, name, status.plan.as_ref()?, status.measured.unwrap_or_default()))
        })
    };
    family(text, names::PLAN_INFO, "gauge", "The plan that runs; always 1");
    for (namespace, name, plan, _) in running() {
        let tensor_parallel = plan.tensor_parallel.to_string();
        let labels = [
            ("namespace", namespace.as_str()),
            ("name", &name),
            ("hash", &plan.hash),
            ("quantization", &plan.quantization),
            ("dtype", &plan.dtype),
            ("cache_dtype", &plan.cache.dtype),
            ("cache_strategy", &plan.cache.strategy),
            ("tensor_parallel", &tensor_parallel),
            ("accelerator", &plan.accelerator),
        ];
        line(text, names::PLAN_INFO, &labels, 1);
    }
    let help = "Memory of one engine: the plan's sum, and the most that one has held";
    family(text, names::MEMORY_BYTES, "gauge", help);
    for (namespace, name, plan, measured) in running() {
        let kinds = [
            ("predicted", Some(plan.memory_bytes.total)),
            ("measured", measured.peak_memory_bytes),
        ];
        for (kind, bytes) in kinds {
            let labels = [("namespace", namespace.as_str()), ("name", &name), ("kind", kind)];
            if let Some(bytes) = bytes {
                line(text, names::MEMORY_BYTES, &labels, bytes);
            }
        }
    }
}

/// Of engine pods only; those of Jobs start once.
fn write_restarts(restarts: &[([String; 3], i64)], text: &mut String) {
    let help = "Containers of engine pods that ended and were started anew";
    family(text, names::ENGINE_RESTARTS, "counter", help);
    for ([namespace, name, pod], restarts) in restarts {
        let labels = [("namespace", namespace.as_str()), ("name", name), ("pod", pod)];
        line(text, names::ENGINE_RESTARTS, &labels, *restarts);
    }
}

fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}").expect(TO_MEMORY);
}

/// Values of labels are names of Kubernetes or words of ours: nothing in them wants escaping.
fn line(text: &mut String, name: &str, labels: &[(&str, &str)], value: i64) {
    let labels: Vec<String> =
        labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
    let labels =
        if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
    writeln!(text, "{name}{labels} {value}").expect(TO_MEMORY);
}
