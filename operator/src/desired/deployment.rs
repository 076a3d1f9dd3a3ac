//! In: the pod template of a revision and the number of replicas. Out: the Deployment. Never here: the pod itself.

use k8s_openapi::api::apps::v1::Deployment;
use serde_json::{Value, json};

use super::{Identity, names};
use crate::apply::Want;

/// A new pod is Ready before an old one leaves, so that an update loses no request.
pub fn deployment(
    identity: &Identity,
    revision_hash: &str,
    pod_template: &Value,
    replicas: u32,
) -> Want<Deployment> {
    let mut metadata = identity.metadata();
    metadata["labels"][names::REVISION] = revision_hash.into();
    Want::new(json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": names::selector(&identity.name)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "template": pod_template,
        },
    }))
}
