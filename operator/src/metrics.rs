//! In: what reconciles did, and the objects in the cache at the moment of a scrape. Out: Prometheus text.
//! Conditions are read from the cache at each scrape, so that no series outlives its object.

use std::fmt::Write as _;
use std::time::Duration;

use kube::ResourceExt;
use plimsoll_crds::LLMDeployment;
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};

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
            HistogramOpts::new(
                "plimsoll_operator_reconcile_duration_seconds",
                "Time of a reconcile",
            )
            .buckets(RECONCILE_BUCKETS.to_vec()),
            &["result"],
        )
        .expect(valid);
        let reconciles = IntCounterVec::new(
            Opts::new("plimsoll_operator_reconcile_total", "Reconciles by result"),
            &["result"],
        )
        .expect(valid);
        let errors = IntCounter::new(
            "plimsoll_operator_reconcile_errors_total",
            "Reconciles that failed and are tried again",
        )
        .expect(valid);
        let writes = IntCounterVec::new(
            Opts::new("plimsoll_operator_writes_total", "Writes to the API server by kind"),
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

    pub fn wrote(&self, kind: &str) {
        self.writes.with_label_values(&[kind]).inc();
    }

    /// The exposition, with one condition series per object and condition.
    pub fn text<'a>(&self, objects: impl Iterator<Item = &'a LLMDeployment>) -> String {
        let mut bytes = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut bytes)
            .expect("writing to memory does not fail");
        let mut text = String::from_utf8(bytes).expect("the encoder writes UTF-8");
        write_conditions(objects, &mut text);
        text
    }
}

fn write_conditions<'a>(objects: impl Iterator<Item = &'a LLMDeployment>, text: &mut String) {
    text.push_str(
        "# HELP plimsoll_llmdeployment_condition Conditions of LLMDeployments; 1 for the status that holds\n\
         # TYPE plimsoll_llmdeployment_condition gauge\n",
    );
    for object in objects {
        let namespace = object.namespace().unwrap_or_default();
        let name = object.name_any();
        let conditions = object.status.iter().flat_map(|status| &status.conditions);
        for condition in conditions {
            writeln!(
                text,
                "plimsoll_llmdeployment_condition{{namespace=\"{namespace}\",name=\"{name}\",\
                 type=\"{}\",status=\"{}\",reason=\"{}\"}} 1",
                condition.type_, condition.status, condition.reason
            )
            .expect("writing to memory does not fail");
        }
    }
}
