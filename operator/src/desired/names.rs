//! Names and labels of everything we make. One place, because selectors, watches and users depend on them.

use serde_json::{Value, json};

pub const KIND: &str = "LLMDeployment";
pub const API_VERSION: &str = "plimsoll.dev/v1alpha1";

/// The one field manager, and the value of the managed-by label our watches select on.
pub const MANAGER: &str = "plimsoll";
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// The LLMDeployment a child or pod belongs to; the selector of Service, Deployment and /scale.
pub const NAME: &str = "plimsoll.dev/name";
/// The revision a pod runs, by its hash.
pub const REVISION: &str = "plimsoll.dev/revision";
/// The model source an inspect Job, its pods, a download or stored facts belong to.
pub const MODEL: &str = "plimsoll.dev/model";
/// The download that a pod mounts and that one node alone can hold.
pub const DOWNLOAD: &str = "plimsoll.dev/download";
/// Annotation on children: digest of what we last sent.
pub const APPLIED: &str = "plimsoll.dev/applied";
/// Annotation on the Deployment: what a rollout has to remember.
pub const ROLLOUT: &str = "plimsoll.dev/rollout";
/// On an inspect Job: the uid of the object that made it, and the digest of what it was rendered from.
pub const MADE_FOR: &str = "plimsoll.dev/made-for";

/// On everything that the chart and we make, and what it says of the operator's pods.
pub const APP_NAME: &str = "app.kubernetes.io/name";
pub const OPERATOR: &str = "plimsoll-operator";
/// On every namespace: its own name.
pub const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";
/// On a namespace: its pods may reach engines that let in their own namespace only.
pub const CLIENTS: &str = "plimsoll.dev/clients";
/// On a pod: Karpenter takes no node from under it.
pub const DO_NOT_DISRUPT: &str = "karpenter.sh/do-not-disrupt";
/// On a node: Karpenter made it.
pub const NODE_POOL: &str = "karpenter.sh/nodepool";

/// The container that answers requests.
pub const ENGINE: &str = "engine";
/// The init container that downloads.
pub const FETCH: &str = "fetch";
/// The Service's port and the container's, and the name both have.
pub const PORT_SERVICE: u16 = 80;
pub const PORT_ENGINE: u16 = 8000;
pub const PORT_NAME: &str = "http";

/// The claim that holds a downloaded model, and the ConfigMap that holds its facts.
pub fn model(key: &str) -> String {
    format!("model-{key}")
}

/// The Job that downloads and inspects a model.
pub fn inspect_job(key: &str) -> String {
    format!("inspect-{key}")
}

/// Selects the pods of one object, of whatever revision.
pub fn selector(name: &str) -> Value {
    json!({ NAME: name })
}

/// Labels of every child of one object.
pub fn labels(name: &str) -> Value {
    json!({
        APP_NAME: "plimsoll-engine",
        "app.kubernetes.io/instance": name,
        MANAGED_BY: MANAGER,
        NAME: name,
    })
}

/// Labels of what the objects of one model source share.
pub fn model_labels(key: &str) -> Value {
    json!({
        APP_NAME: "plimsoll-model",
        MANAGED_BY: MANAGER,
        MODEL: key,
    })
}
