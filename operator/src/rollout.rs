//! In: the revision that answers to the spec, what stands, the pods, the time. Out: which revision is to stand, how its
//! pods take the places of older ones, and what is to be said of it. Pure. What has to outlive a restart of the operator
//! (where to go back to, that there was no room, what failed) is kept in one annotation of the Deployment and changes in
//! the very write that acts on it.
//!
//! Under surge a bad revision stops by itself: no old pod leaves before a new one is ready. In place it takes a pod's
//! room first, so that its failure is answered by going back to the last revision that served.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use plimsoll_crds::{
    LLMDeploymentStatus, Reason, RolloutState, RolloutStatus, RolloutStrategy, bounded,
};
use serde::{Deserialize, Serialize};

use crate::desired::names;
use crate::facts::{scheduling, unschedulable};
use crate::plan::Update;
use crate::pods::{self, Engines};
use crate::revision::Revision;
use crate::status::Said;

/// How long one pod more may wait for a node before pods are replaced in place; cluster autoscalers take less to decide.
const ROOM_PATIENCE: Duration = Duration::from_secs(120);
/// Characters of a sentence that is kept in the annotation.
const KEPT_CHARACTERS_MAX: usize = 400;

/// What a rollout has to remember.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// Hash of the revision that is rolled out.
    pub to: String,
    /// Hash of the last other revision whose pods answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub good: Option<String>,
    /// The scheduler's words when one pod more had no room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_room: Option<String>,
    /// Why `to` was given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Memory {
    /// As the annotation holds it; None where there is nothing to remember.
    pub fn kept(&self) -> Option<String> {
        let remembers = self.good.is_some() || self.no_room.is_some() || self.failed.is_some();
        remembers.then(|| serde_json::to_string(self).expect("texts are JSON"))
    }
}

/// What to look at.
pub struct Inputs<'a> {
    /// The revision that answers to the spec.
    pub to: &'a Revision,
    pub revisions: &'a [Revision],
    pub deployment: Option<&'a Deployment>,
    pub pods: &'a [Arc<Pod>],
    pub strategy: RolloutStrategy,
    /// Pods that the spec asks for; zero while suspended.
    pub replicas: u32,
    pub now: Timestamp,
}

/// What is to stand.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    pub revision: Revision,
    pub update: Update,
    /// Why pods are replaced so, as a sentence.
    pub why: String,
    pub memory: Memory,
    /// Whether it takes the place of a revision that served.
    pub replaces: bool,
    /// When to look again, though no watch will tell.
    pub again: Option<Duration>,
}

/// One step of a rollout to `to`.
pub fn step(inputs: &Inputs<'_>) -> Rollout {
    let Inputs { to, revisions, pods, strategy, replicas, now, .. } = *inputs;
    let mut memory = remembered(inputs);
    let replaces = memory.good.is_some();
    let engines = pods::engines(pods, Some(&to.hash), now);
    if replicas > 0 && engines.settled(replicas) {
        // It is over. What a pod does later is no reason to go back.
        memory = Memory { to: to.hash.clone(), ..Memory::default() };
    }
    let surges = strategy == RolloutStrategy::Auto && to.content.update == Update::Surge;
    let mut again = None;
    if surges && memory.no_room.is_none() && engines.older > 0 {
        (memory.no_room, again) = out_of_room(pods, &to.hash, now);
    }
    let (update, why) = how(strategy, to.content.update, memory.no_room.as_deref());
    let good = memory.good.as_ref();
    let good = good.and_then(|good| revisions.iter().find(|held| held.hash == *good));
    if let Some(good) = good {
        if update == Update::InPlace && memory.failed.is_none() {
            memory.failed = failure(&engines, inputs.deployment, to);
        }
        if memory.failed.is_some() {
            return Rollout { revision: good.clone(), update, why, memory, replaces, again };
        }
    }
    Rollout { revision: to.clone(), update, why, memory, replaces, again }
}

/// What stands where nothing could be decided: the revision that runs, as it runs.
pub fn hold(
    running: &Revision,
    deployment: Option<&Deployment>,
    strategy: RolloutStrategy,
) -> Rollout {
    let memory = read(deployment)
        .unwrap_or_else(|| Memory { to: running.hash.clone(), ..Memory::default() });
    let (update, why) = how(strategy, running.content.update, memory.no_room.as_deref());
    Rollout { revision: running.clone(), update, why, memory, replaces: false, again: None }
}

/// Label of the revision that the Deployment stands for.
fn deployed_hash(deployment: Option<&Deployment>) -> Option<&str> {
    deployment?.labels().get(names::REVISION).map(String::as_str)
}

/// The annotation of this rollout, or a new one that remembers where it comes from.
fn remembered(inputs: &Inputs<'_>) -> Memory {
    let Inputs { to, deployment, pods, now, .. } = *inputs;
    let held = read(deployment);
    if let Some(held) = held.clone().filter(|held| held.to == to.hash) {
        return held;
    }
    let from = deployed_hash(deployment).filter(|from| *from != to.hash);
    let served = |hash: &&str| pods::engines(pods, Some(hash), now).ready > 0;
    let good = from.filter(served).map(str::to_owned);
    let good = good.or(held.and_then(|held| held.good)).filter(|good| *good != to.hash);
    Memory { to: to.hash.clone(), good, ..Memory::default() }
}

fn read(deployment: Option<&Deployment>) -> Option<Memory> {
    serde_json::from_str(deployment?.annotations().get(names::ROLLOUT)?).ok()
}

/// How pods are replaced, and the sentence that says why.
fn how(strategy: RolloutStrategy, planned: Update, no_room: Option<&str>) -> (Update, String) {
    let in_place = "pods are replaced in place";
    match (strategy, planned, no_room) {
        (RolloutStrategy::Surge, ..) => {
            (Update::Surge, "spec.rollout.strategy is Surge".to_owned())
        }
        (RolloutStrategy::Recreate, ..) => {
            (Update::InPlace, format!("{in_place}, because spec.rollout.strategy is Recreate"))
        }
        (RolloutStrategy::Auto, _, Some(words)) => (
            Update::InPlace,
            format!(
                "{in_place}, because one pod more found no node for {} s: {words}",
                ROOM_PATIENCE.as_secs()
            ),
        ),
        (RolloutStrategy::Auto, Update::InPlace, None) => (
            Update::InPlace,
            format!("{in_place}, because the plan found no room for one pod more"),
        ),
        (RolloutStrategy::Auto, Update::Surge, None) => {
            (Update::Surge, "there was room for one pod more when the plan was made".to_owned())
        }
    }
}

/// The scheduler's words once a pod of the new revision has waited too long for a node, or how long it may still wait.
fn out_of_room(
    pods: &[Arc<Pod>],
    hash: &str,
    now: Timestamp,
) -> (Option<String>, Option<Duration>) {
    let mut left = None;
    for pod in pods::of_revision(pods, hash) {
        let Some(words) = unschedulable(pod) else { continue };
        let since = scheduling(pod).and_then(|held| held.last_transition_time.as_ref());
        let Some(since) = since else { continue };
        let waited = Duration::try_from(now.duration_since(since.0)).unwrap_or_default();
        let more = ROOM_PATIENCE.saturating_sub(waited);
        if more.is_zero() {
            return (Some(kept(words)), None);
        }
        left = Some(left.map_or(more, |left: Duration| left.min(more)));
    }
    (None, left)
}

/// Why the pods of `to` will not serve, where that is certain: an engine that says so, one that ends again and again, or a
/// Deployment that has made no progress for as long as a start may take. None of it depends on our clock.
fn failure(engines: &Engines, deployment: Option<&Deployment>, to: &Revision) -> Option<String> {
    if deployed_hash(deployment) != Some(to.hash.as_str()) || engines.current == 0 {
        return None;
    }
    if let Some((reason, words)) = &engines.trouble
        && (reason.needs_a_person() || *reason == Reason::EngineCrashLooping)
    {
        return Some(kept(&format!("{}: {words}", reason.name())));
    }
    let words = engines.trouble.as_ref().map(|(_, words)| words.as_str());
    (engines.unschedulable.is_none() && overdue(deployment))
        .then(|| kept(words.unwrap_or("its pods did not become ready in time")))
}

/// Whether the Deployment's controller has seen no progress for longer than a start may take.
pub fn overdue(deployment: Option<&Deployment>) -> bool {
    let Some(status) = deployment.and_then(|held| held.status.as_ref()) else { return false };
    let generation = deployment.and_then(|held| held.metadata.generation);
    let conditions = status.conditions.iter().flatten();
    let exceeded = |reason: Option<&str>| reason == Some("ProgressDeadlineExceeded");
    status.observed_generation >= generation
        && conditions.into_iter().any(|held| exceeded(held.reason.as_deref()))
}

fn kept(words: &str) -> String {
    words.chars().take(KEPT_CHARACTERS_MAX).collect()
}

impl Rollout {
    /// What keeps the whole object from being Ready though everything stands as decided: the spec's revision failed.
    pub fn trouble(&self, to: &Revision) -> Option<Said> {
        let failed = self.memory.failed.as_ref().filter(|_| self.revision.hash != to.hash)?;
        let message = format!(
            "{} failed and {} serves again: {failed}; correct the spec, or set it back",
            to.name, self.revision.name
        );
        Some(Said::no(Reason::RolledBack, message))
    }
}

/// What status shows of the rollout to `to`: how far it is, and how long no pod answered meanwhile. An outage is counted
/// when it is over, from the time at which the status before said that nothing answers.
pub fn status(
    rollout: &Rollout,
    to: &Revision,
    engines: &Engines,
    seen: &Seen<'_>,
    now: Timestamp,
) -> RolloutStatus {
    let held = seen.before.and_then(|before| before.rollout.as_ref());
    let held = held.filter(|held| held.revision == to.name);
    let state = state(rollout, engines, seen, held.map(|held| held.state));
    let done = held.filter(|_| state == RolloutState::Complete);
    let counted = held.and_then(|held| held.outage_seconds);
    let under_way = held.is_some_and(|held| match held.state {
        RolloutState::Complete => false,
        // The good revision is back; what happens to it later is another matter.
        RolloutState::RolledBack => counted.is_none(),
        RolloutState::Progressing | RolloutState::Stopped => true,
    });
    let answers = engines.ready + engines.older_ready > 0;
    let over = (under_way && answers && rollout.replaces).then(|| silent_since(seen.before));
    let over = over.flatten().map(|since| (now.as_second() - since.as_second()).max(0));
    RolloutStatus {
        revision: to.name.clone(),
        state,
        // As it was done, where it is done.
        strategy: done.map_or_else(|| named(rollout.update), |done| done.strategy),
        why: done.map_or_else(|| bounded(&rollout.why), |done| done.why.clone()),
        outage_seconds: counted.map_or(over, |counted| Some(counted + over.unwrap_or(0))),
    }
}

/// What a status is told from, beside the pods.
pub struct Seen<'a> {
    pub before: Option<&'a LLMDeploymentStatus>,
    pub deployment: Option<&'a Deployment>,
    pub replicas: u32,
}

/// `engines` counts the pods of the revision that the spec asks for.
fn state(
    rollout: &Rollout,
    engines: &Engines,
    seen: &Seen<'_>,
    held: Option<RolloutState>,
) -> RolloutState {
    let trouble = engines.trouble.as_ref().map(|(reason, _)| *reason);
    let stopped = trouble.is_some_and(Reason::needs_a_person) || overdue(seen.deployment);
    if rollout.memory.failed.is_some() {
        RolloutState::RolledBack
    } else if held == Some(RolloutState::Complete) || engines.settled(seen.replicas) {
        RolloutState::Complete
    } else if stopped && engines.older_ready > 0 && engines.ready < seen.replicas as usize {
        RolloutState::Stopped
    } else {
        RolloutState::Progressing
    }
}

fn named(update: Update) -> RolloutStrategy {
    match update {
        Update::Surge => RolloutStrategy::Surge,
        Update::InPlace => RolloutStrategy::Recreate,
    }
}

/// Since when the status before says that nothing answers.
fn silent_since(before: Option<&LLMDeploymentStatus>) -> Option<Timestamp> {
    let silent = |held: &&Condition| held.type_ == "Available" && held.status == "False";
    before?.conditions.iter().find(silent).map(|held| held.last_transition_time.0)
}

#[cfg(test)]
mod tests;
