//! In: whose it is and how many replicas. Out: the PodDisruptionBudget, where there is more than one pod to protect.

use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde_json::json;

use super::{Identity, names};
use crate::apply::Want;

/// One pod at a time may be evicted. A single replica has no budget: it would only block draining a node.
pub fn disruption_budget(identity: &Identity, replicas: u32) -> Option<Want<PodDisruptionBudget>> {
    (replicas > 1).then(|| {
        Want::new(json!({
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": identity.metadata(),
            "spec": {
                "maxUnavailable": 1,
                "selector": {"matchLabels": names::selector(&identity.name)},
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
            },
        }))
    })
}
