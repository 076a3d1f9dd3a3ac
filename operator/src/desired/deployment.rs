//! In: the pod template of a revision, how it replaces older ones and what that has to remember, and the number of replicas.
//! Out: the Deployment. Never here: the pod itself.

use k8s_openapi::api::apps::v1::Deployment;
use serde_json::{Value, json};

use super::{Identity, names, pod};
use crate::apply::Want;
use crate::plan::Update;

/// Beyond what its pods may take to start: pulling an image, waiting for a node that an autoscaler brings.
const PROGRESS_MARGIN_SECONDS: u64 = 600;

pub fn deployment(
    identity: &Identity,
    revision_hash: &str,
    pod_template: &Value,
    replicas: u32,
    update: Update,
    remember: Option<&str>,
) -> Want<Deployment> {
    let (surge, unavailable) = match update {
        Update::Surge => (1, 0),
        Update::InPlace => (0, 1),
    };
    let mut metadata = identity.metadata();
    metadata["labels"][names::REVISION] = revision_hash.into();
    if let Some(remember) = remember {
        metadata["annotations"][names::ROLLOUT] = remember.into();
    }
    Want::new(json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": PROGRESS_MARGIN_SECONDS + start_seconds(pod_template),
            "selector": {"matchLabels": names::selector(&identity.name)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable},
            },
            "template": pod_template,
        },
    }))
}

/// What the engine's startup probe allows.
fn start_seconds(pod_template: &Value) -> u64 {
    let probe = pod::engine_of(pod_template).map(|engine| &engine["startupProbe"]);
    let field = |name: &str| probe.and_then(|probe| probe[name].as_u64());
    field("failureThreshold").unwrap_or(0) * field("periodSeconds").unwrap_or(1)
}
