//! In: whose it is, what it promises, the labels that a Prometheus looks for. Out: the PodMonitor that has its engines
//! scraped and the PrometheusRule that watches over it, for clusters that know these kinds. Never here: whether they do.

use std::collections::BTreeMap;

use kube::CustomResource;
use plimsoll_crds::alerts::{self, Watched};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Identity, names};
use crate::apply::Want;
use crate::spec::preferences::Slo;

/// A kind of the Prometheus operator, as far as we need it: its fields are compared and sent, never read.
#[derive(CustomResource, Clone, Debug, Serialize, Deserialize)]
#[kube(
    group = "monitoring.coreos.com",
    version = "v1",
    kind = "PodMonitor",
    namespaced,
    schema = "disabled"
)]
pub struct PodMonitorSpec {
    #[serde(flatten)]
    fields: Map<String, Value>,
}

/// The same of rules.
#[derive(CustomResource, Clone, Debug, Serialize, Deserialize)]
#[kube(
    group = "monitoring.coreos.com",
    version = "v1",
    kind = "PrometheusRule",
    namespaced,
    schema = "disabled"
)]
pub struct PrometheusRuleSpec {
    #[serde(flatten)]
    fields: Map<String, Value>,
}

/// The definitions of both kinds.
pub const POD_MONITORS: &str = "podmonitors.monitoring.coreos.com";
pub const PROMETHEUS_RULES: &str = "prometheusrules.monitoring.coreos.com";

/// Series of engines carry the name of their object, by which alerts and dashboards find them.
pub fn pod_monitor(identity: &Identity, labels: &BTreeMap<String, String>) -> Want<PodMonitor> {
    let meta_label =
        format!("__meta_kubernetes_pod_label_{}", names::NAME.replace(['.', '/'], "_"));
    Want::new(json!({
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata(identity, labels),
        "spec": {
            "selector": {"matchLabels": names::selector(&identity.name)},
            "podMetricsEndpoints": [{
                "port": names::PORT_NAME,
                "path": "/metrics",
                "relabelings": [{"sourceLabels": [meta_label], "targetLabel": "llmdeployment"}],
            }],
        },
    }))
}

pub fn prometheus_rule(
    identity: &Identity,
    labels: &BTreeMap<String, String>,
    promises: Promises,
) -> Want<PrometheusRule> {
    let Promises { ttft_seconds, tpot_seconds } = promises;
    let Identity { namespace, name, .. } = identity;
    let alerts = alerts::of_object(&Watched { namespace, name, ttft_seconds, tpot_seconds });
    let group = format!("plimsoll.{namespace}.{name}");
    Want::new(json!({
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": metadata(identity, labels),
        "spec": {"groups": alerts::groups(&group, &alerts)},
    }))
}

/// What the object promises its users at the 95th percentile, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Promises {
    pub ttft_seconds: Option<f64>,
    pub tpot_seconds: Option<f64>,
}

impl Promises {
    pub fn of(slo: Slo) -> Promises {
        let [ttft_seconds, tpot_seconds] = slo.seconds();
        Promises { ttft_seconds, tpot_seconds }
    }
}

/// Labels of the installation come first: none of them replaces one of ours.
fn metadata(identity: &Identity, labels: &BTreeMap<String, String>) -> Value {
    let mut metadata = identity.metadata();
    let ours = metadata["labels"].take();
    metadata["labels"] = json!(labels);
    crate::fields::overlay(&mut metadata["labels"], &ours);
    metadata
}
