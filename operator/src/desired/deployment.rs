//! In: the pod template of a revision, how it replaces older ones, and the number of replicas. Out: the Deployment. Never here: the pod itself.

use k8s_openapi::api::apps::v1::Deployment;
use serde_json::{Value, json};

use super::{Identity, names};
use crate::apply::Want;
use crate::plan::Update;

pub fn deployment(
    identity: &Identity,
    revision_hash: &str,
    pod_template: &Value,
    replicas: u32,
    update: Update,
) -> Want<Deployment> {
    let (surge, unavailable) = match update {
        Update::Surge => (1, 0),
        Update::InPlace => (0, 1),
    };
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
                "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable},
            },
            "template": pod_template,
        },
    }))
}
