//! In: a spec and the revisions that stand. Out: the revision that answers to the spec, a new one where none does, and
//! those to forget. A revision is a ControllerRevision: what was decided, once. Children are rendered from it alone, so
//! losing the status loses nothing and another operator version changes no pod. Pure.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment};
use kube::ResourceExt;
use plimsoll_crds::{LLMDeployment, LLMDeploymentSpec, ModelStatus, PlanCause, PlanStatus};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::apply::Want;
use crate::desired::{Identity, names};
use crate::exhausted::Learned;
use crate::fields::digest;
use crate::plan::Update;
use crate::spec::PlanPolicy;

/// Says by which renderer a revision was made. Never compared: an old template is as good as a new one.
pub const TEMPLATE_VERSION: u32 = 3;
/// Revisions kept beside the one that runs, so that going back needs no new plan.
pub const HISTORY_MAX: usize = 5;
/// Plans kept that wait for a person, so that a pin which was written a little late still names one.
pub const WAITING_MAX: usize = 2;

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
    /// What led to it.
    #[serde(default, skip_serializing_if = "is_spec_changed")]
    pub cause: PlanCause,
    /// Hash of the revision of the same spec that it was planned against. None where the spec was new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<String>,
    /// Nothing is rendered from it before a person has pinned its plan.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub waits_for_pin: bool,
    /// What an engine was found to need, and what its plan therefore holds beside the sum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned: Option<Learned>,
    pub model: ModelStatus,
    pub plan: PlanStatus,
    pub pod_template: Value,
}

fn is_spec_changed(cause: &PlanCause) -> bool {
    *cause == PlanCause::SpecChanged
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
/// reaches them; who decides on plans changes which of them runs.
pub fn spec_digest(spec: &LLMDeploymentSpec) -> String {
    let mut value = serde_json::to_value(spec).expect("a spec is plain data");
    let fields = value.as_object_mut().expect("a spec is an object");
    for field in ["replicas", "scaling", "suspend", "network", "plan"] {
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

/// The revision that answers to this very spec, as far as plans go the way its policy wants. Of several that one which
/// stands already, and else the newest that no other has replaced: so a pin that is taken out again changes nothing.
pub fn answering<'a>(
    revisions: &'a [Revision],
    spec_digest: &str,
    policy: &PlanPolicy,
    deployed_hash: Option<&str>,
) -> Option<&'a Revision> {
    let of_spec =
        || revisions.iter().filter(|revision| revision.content.spec_digest == spec_digest);
    let deployed = of_spec().find(|revision| Some(revision.hash.as_str()) == deployed_hash);
    let Some(pinned) = &policy.pinned_hash else {
        let by_itself = |revision: &&Revision| {
            !revision.content.waits_for_pin && !is_replaced(revisions, revision)
        };
        return deployed.or_else(|| of_spec().find(by_itself).filter(|_| !policy.manual));
    };
    let named = |revision: &&Revision| revision.content.plan.hash == *pinned;
    deployed.filter(named).or_else(|| of_spec().find(named))
}

/// Whether this operator would make its pods from another template or with another engine than `revision` has.
pub fn is_outdated(revision: &Revision, engine_image: &str) -> bool {
    let Content { template_version, engine_image: held, .. } = &revision.content;
    *template_version != TEMPLATE_VERSION || held.as_deref() != Some(engine_image)
}

fn is_replaced(revisions: &[Revision], revision: &Revision) -> bool {
    revisions.iter().any(|other| {
        !other.content.waits_for_pin && other.content.replaces.as_ref() == Some(&revision.hash)
    })
}

/// What was planned for this spec and waits for a person, while nothing answers to the spec.
pub fn proposal<'a>(revisions: &'a [Revision], spec_digest: &str) -> Option<&'a Revision> {
    revisions.iter().find(|revision| {
        let Content { waits_for_pin, cause, spec_digest: held, .. } = &revision.content;
        *waits_for_pin && *cause == PlanCause::SpecChanged && held == spec_digest
    })
}

/// What is offered in place of `standing`.
pub fn offered<'a>(revisions: &'a [Revision], standing: &Revision) -> Option<&'a Revision> {
    revisions.iter().find(|revision| {
        let Content { waits_for_pin, replaces, spec_digest, .. } = &revision.content;
        *waits_for_pin
            && replaces.as_ref() == Some(&standing.hash)
            && *spec_digest == standing.content.spec_digest
            && revision.hash != standing.hash
    })
}

/// The revision whose children stand; without a Deployment the newest that may.
pub fn running<'a>(revisions: &'a [Revision], deployed_hash: Option<&str>) -> Option<&'a Revision> {
    let deployed =
        deployed_hash.and_then(|hash| revisions.iter().find(|revision| revision.hash == hash));
    deployed.or_else(|| revisions.iter().find(|revision| !revision.content.waits_for_pin))
}

/// A revision for `content`, not committed yet. Its pods carry its hash. What is only offered is told apart from one that ran
/// with the same pods.
pub fn new(object_name: &str, revisions: &[Revision], mut content: Content) -> Revision {
    let mut identity = json!({
        "spec": content.spec_digest, "model": content.model, "template": content.pod_template,
    });
    if let Some(standing) = content.replaces.as_ref().filter(|_| content.waits_for_pin) {
        identity["offeredFor"] = standing.as_str().into();
    }
    let mut hash = digest(&identity, 8);
    let Content { template_version, engine_image, .. } = &content;
    // Made anew for another operator, with the same outcome: another revision all the same.
    while revisions.iter().any(|held| {
        held.hash == hash
            && (held.content.template_version, &held.content.engine_image)
                != (*template_version, engine_image)
    }) {
        hash = digest(&json!([hash, template_version, engine_image]), 8);
    }
    content.pod_template["metadata"]["labels"][names::REVISION] = hash.as_str().into();
    let newest = revisions.iter().map(|revision| revision.number).max().unwrap_or(0);
    Revision { name: format!("{object_name}-{hash}"), hash, number: newest + 1, content }
}

/// Whether pods of `revision` are made from this very template.
pub fn has_pods_of(revision: &Revision, template: &Value) -> bool {
    let mut held = revision.content.pod_template.clone();
    if let Some(labels) = held["metadata"]["labels"].as_object_mut() {
        labels.shift_remove(names::REVISION);
    }
    held == *template
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

/// Names of revisions beyond the history, beside the one that stands and the hash to go back to. What only waited for a person
/// has a shorter one.
pub fn to_forget<'a>(
    revisions: &'a [Revision],
    standing: Option<&str>,
    good: Option<&str>,
) -> Vec<&'a str> {
    let others = || revisions.iter().filter(|revision| Some(revision.name.as_str()) != standing);
    let (waiting, ran): (Vec<_>, Vec<_>) =
        others().partition(|revision| revision.content.waits_for_pin);
    let surplus = ran.into_iter().skip(HISTORY_MAX).chain(waiting.into_iter().skip(WAITING_MAX));
    let dispensable = surplus.filter(|revision| Some(revision.hash.as_str()) != good);
    dispensable.map(|revision| revision.name.as_str()).collect()
}

/// The hash in the name of a revision of this object.
pub fn hash_of<'a>(name: &'a str, object_name: &str) -> Option<&'a str> {
    name.strip_prefix(object_name)?.strip_prefix('-')
}

/// Hash of the revision that the Deployment stands for; without one, which somebody may have deleted, that of the revision
/// which status names.
pub fn standing_hash(object: &LLMDeployment, deployment: Option<&Deployment>) -> Option<String> {
    let deployed = deployment.and_then(|held| held.labels().get(names::REVISION).cloned());
    let told = || {
        let name = object.status.as_ref()?.revision.as_ref()?;
        hash_of(name, &object.name_any()).map(str::to_owned)
    };
    deployed.or_else(told)
}

#[cfg(test)]
pub mod fixtures;
#[cfg(test)]
mod tests;
