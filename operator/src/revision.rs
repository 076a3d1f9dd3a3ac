//! In: a spec and the revisions that stand. Out: the revision that answers to the spec, a new one where none does, and
//! those to forget. A revision is a ControllerRevision: what was decided, once. Children are rendered from it alone, so
//! losing the status loses nothing and another operator version changes no pod. Pure.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment};
use kube::ResourceExt;
use plimsoll_crds::{LLMDeploymentSpec, ModelStatus, PlanStatus};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::apply::Want;
use crate::desired::{Identity, names};
use crate::fields::digest;
use crate::plan::Update;

/// Says by which renderer a revision was made. Never compared: an old template is as good as a new one.
pub const TEMPLATE_VERSION: u32 = 2;
/// Revisions kept beside the one that runs, so that going back needs no new plan.
pub const HISTORY_MAX: usize = 5;

/// What a revision freezes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Content {
    pub template_version: u32,
    /// The engine that the operator brought when it was made; unknown of older ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_image: Option<String>,
    /// Digest of the spec it answers to, without what scales, suspends, lets clients in or says how pods are replaced.
    pub spec_digest: String,
    /// Key of the model source, so that its download is kept while this revision runs.
    pub model_key: String,
    /// Whether its pods read a claim that the inspect Job fills.
    pub shared_download: bool,
    /// What is to say about where the model lies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage_note: Option<String>,
    /// How its pods take the places of older ones.
    #[serde(default, skip_serializing_if = "is_surge")]
    pub update: Update,
    pub model: ModelStatus,
    pub plan: PlanStatus,
    pub pod_template: Value,
}

/// As every revision was before there was a choice.
fn is_surge(update: &Update) -> bool {
    *update == Update::Surge
}

/// One committed revision.
#[derive(Clone, Debug, PartialEq)]
pub struct Revision {
    /// `NAME-HASH`.
    pub name: String,
    /// The label its pods carry.
    pub hash: String,
    /// Grows with each new one.
    pub number: i64,
    pub content: Content,
}

/// Everything of the spec that decides what a pod is. Scaling and suspending change how many there are, the network who
/// reaches them.
pub fn spec_digest(spec: &LLMDeploymentSpec) -> String {
    let mut value = serde_json::to_value(spec).expect("a spec is plain data");
    let fields = value.as_object_mut().expect("a spec is an object");
    for field in ["replicas", "suspend", "network"] {
        fields.shift_remove(field);
    }
    if let Some(rollout) = fields.get_mut("rollout").and_then(Value::as_object_mut) {
        // How pods are replaced is no part of what they are.
        let before = rollout.len();
        rollout.shift_remove("strategy");
        rollout.shift_remove("operatorUpgrade");
        if rollout.is_empty() && before > 0 {
            fields.shift_remove("rollout");
        }
    }
    digest(&value, 16)
}

/// The revisions that can be read, newest first. One that cannot is nobody's.
pub fn committed(seen: &[Arc<ControllerRevision>], uid: &str) -> Vec<Revision> {
    let owned = seen.iter().filter(|stored| {
        stored.owner_references().iter().any(|owner| owner.uid == uid)
            && stored.metadata.deletion_timestamp.is_none()
    });
    let mut revisions: Vec<Revision> = owned.filter_map(|stored| read(stored)).collect();
    revisions.sort_by_key(|revision| std::cmp::Reverse(revision.number));
    revisions
}

fn read(stored: &ControllerRevision) -> Option<Revision> {
    let content = Content::deserialize(&stored.data.0).ok()?;
    Some(Revision {
        name: stored.name_any(),
        hash: stored.labels().get(names::REVISION)?.clone(),
        number: stored.revision?,
        content,
    })
}

/// The revision made for this very spec.
pub fn answering<'a>(revisions: &'a [Revision], spec_digest: &str) -> Option<&'a Revision> {
    revisions.iter().find(|revision| revision.content.spec_digest == spec_digest)
}

/// Whether this operator would make its pods from another template or with another engine than `revision` has.
pub fn is_outdated(revision: &Revision, engine_image: &str) -> bool {
    let Content { template_version, engine_image: held, .. } = &revision.content;
    *template_version != TEMPLATE_VERSION || held.as_deref() != Some(engine_image)
}

/// The revision whose children stand; without a Deployment the newest.
pub fn running<'a>(revisions: &'a [Revision], deployed_hash: Option<&str>) -> Option<&'a Revision> {
    let deployed =
        deployed_hash.and_then(|hash| revisions.iter().find(|revision| revision.hash == hash));
    deployed.or(revisions.first())
}

/// A revision for `content`, not committed yet. Its pods carry its hash.
pub fn new(object_name: &str, revisions: &[Revision], mut content: Content) -> Revision {
    let identity = json!({
        "spec": content.spec_digest, "model": content.model, "template": content.pod_template,
    });
    let mut hash = digest(&identity, 8);
    while revisions.iter().any(|held| held.hash == hash) {
        // Made anew because the operator changed, with the same outcome: another revision all the same.
        hash = digest(&json!([hash, content.template_version, content.engine_image]), 8);
    }
    content.pod_template["metadata"]["labels"][names::REVISION] = hash.as_str().into();
    let newest = revisions.iter().map(|revision| revision.number).max().unwrap_or(0);
    Revision { name: format!("{object_name}-{hash}"), hash, number: newest + 1, content }
}

/// The object to store.
pub fn wanted(identity: &Identity, revision: &Revision) -> Want<ControllerRevision> {
    let mut metadata = identity.metadata_named(&revision.name);
    metadata["labels"][names::REVISION] = revision.hash.as_str().into();
    Want::new(json!({
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": metadata,
        "revision": revision.number,
        "data": revision.content,
    }))
}

/// Names of revisions beyond the history, beside the one that stands and the one to go back to.
pub fn to_forget<'a>(
    revisions: &'a [Revision],
    standing: &str,
    good: Option<&str>,
) -> Vec<&'a str> {
    let others = revisions.iter().filter(|revision| revision.name != standing).skip(HISTORY_MAX);
    let dispensable = others.filter(|revision| Some(revision.hash.as_str()) != good);
    dispensable.map(|revision| revision.name.as_str()).collect()
}

/// Label of the revision that the Deployment stands for.
pub fn deployed_hash(deployment: Option<&Deployment>) -> Option<&str> {
    deployment?.labels().get(names::REVISION).map(String::as_str)
}

#[cfg(test)]
mod tests;
