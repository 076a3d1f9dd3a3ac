//! In: what one pass found. Out: the status, whole. Pure; the time of a transition comes in as an argument. Never here:
//! a client, or a word that docs/status.md does not list.
//!
//! Ready is the sum of the others. Reconciling and Stalled stand there only while they are true, as kstatus reads them.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use plimsoll_contract::facts::ModelFacts;
use plimsoll_crds::{
    ConditionType, LLMDeploymentStatus, MeasuredStatus, ModelStatus, Reason, RolloutState,
    RolloutStatus, ScalingStatus, bounded,
};

use crate::desired::names;
use crate::facts::Model;
use crate::lifecycle;
use crate::pods::{self, Engines};
use crate::revision::Revision;

/// Something said about the object: whether, in one word why, and a sentence.
#[derive(Clone, Debug, PartialEq)]
pub struct Said {
    /// None where nobody knows yet.
    pub holds: Option<bool>,
    pub reason: Reason,
    pub message: String,
}

impl Said {
    pub fn yes(reason: Reason, message: impl Into<String>) -> Said {
        Said { holds: Some(true), reason, message: message.into() }
    }

    pub fn no(reason: Reason, message: impl Into<String>) -> Said {
        Said { holds: Some(false), reason, message: message.into() }
    }

    /// What a status says of `kind`.
    pub fn before(status: &LLMDeploymentStatus, kind: ConditionType) -> Option<Said> {
        let held = status.conditions.iter().find(|held| held.type_ == kind.name())?;
        let reason = Reason::ALL.iter().find(|reason| reason.name() == held.reason)?;
        let holds = match held.status.as_str() {
            "True" => Some(true),
            "False" => Some(false),
            _ => None,
        };
        Some(Said { holds, reason: *reason, message: held.message.clone() })
    }

    fn unknown(message: &str) -> Said {
        Said { holds: None, reason: Reason::Accepted, message: message.to_owned() }
    }
}

/// What one pass found.
pub struct Findings<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub generation: Option<i64>,
    /// What keeps the whole object from going on: a spec that cannot work, a child that is not ours.
    pub trouble: Option<Said>,
    /// None while the pass did not come that far.
    pub model: Option<Said>,
    /// Facts of a model for which there is no revision yet.
    pub facts: Option<&'a ModelFacts>,
    pub planned: Option<Said>,
    /// The revision whose children stand, and whether it answers to the spec of this generation.
    pub revision: Option<&'a Revision>,
    /// Whether all of its children were made; until then it is not named.
    pub stood: bool,
    pub revision_is_current: bool,
    /// How its pods take the places of older ones.
    pub rollout: Option<RolloutStatus>,
    /// A plan that waits for a person.
    pub offered: Option<&'a Revision>,
    /// Engines of this revision run out of memory, and no other plan helps: with what figures.
    pub exhausted: Option<&'a str>,
    /// What engines of this revision measured, where there is news.
    pub measured: Option<MeasuredStatus>,
    pub suspended: bool,
    /// Pods that the spec asks for; zero while suspended.
    pub replicas: u32,
    /// What keeps them from being as many as the spec asks for.
    pub held_to: Option<&'a str>,
    /// None where the number of replicas is left to the spec.
    pub scaling: Option<Scaled>,
    pub pods: &'a [Arc<Pod>],
    pub deployment: Option<&'a Deployment>,
}

/// What the scaling loop made of the object.
pub struct Scaled {
    pub status: Option<ScalingStatus>,
    /// None before the loop had anything to say; what was said before then stays.
    pub said: Option<Said>,
}

/// The status that tells `found`. Times of conditions that did not change come from `before`.
pub fn compute(
    found: &Findings<'_>,
    before: Option<&LLMDeploymentStatus>,
    now: &Time,
) -> LLMDeploymentStatus {
    let hash = found.revision.map(|revision| revision.hash.as_str());
    let stood = found.revision.filter(|_| found.stood);
    let engines = pods::engines(found.pods, hash, now.0);
    let said = conditions(found, &engines);
    let mut conditions: Vec<Condition> = said
        .into_iter()
        .map(|(kind, said)| condition(kind, said, found.generation, before, now))
        .collect();
    conditions.extend(found.scaling.as_ref().map(|scaled| scaling(scaled, found, before, now)));
    LLMDeploymentStatus {
        observed_generation: found.generation,
        conditions,
        replicas: count(engines.current + engines.older),
        ready_replicas: count(engines.ready),
        selector: Some(format!("{}={}", names::NAME, found.name)),
        url: stood.map(|_| format!("http://{}.{}.svc", found.name, found.namespace)),
        revision: stood.map(|revision| revision.name.clone()),
        model: found
            .facts
            .map(model)
            .or_else(|| found.revision.map(|revision| revision.content.model.clone())),
        // Where nothing runs yet, what waits is all there is to look at.
        plan: found.revision.or(found.offered).map(|revision| revision.content.plan.clone()),
        offered: found.offered.filter(|_| found.revision.is_some()).map(lifecycle::offer),
        measured: found.measured.or_else(|| measured_before(found, before)),
        rollout: found.rollout.clone(),
        scaling: found.scaling.as_ref().and_then(|scaled| scaled.status.clone()),
    }
}

/// An operator that has just started has not looked at Prometheus yet, and leaves what its forerunner said.
fn scaling(
    scaled: &Scaled,
    found: &Findings<'_>,
    before: Option<&LLMDeploymentStatus>,
    now: &Time,
) -> Condition {
    let kind = ConditionType::ScalingActive;
    let earlier = || {
        let held = before?.conditions.iter().find(|held| held.type_ == kind.name())?;
        Some(Condition { observed_generation: found.generation, ..held.clone() })
    };
    match (&scaled.said, earlier()) {
        (None, Some(earlier)) => earlier,
        (said, _) => {
            let said = said.clone().unwrap_or_else(|| Said::unknown("no pod was looked at yet"));
            condition(kind, said, found.generation, before, now)
        }
    }
}

/// What was measured stands as long as its revision does.
fn measured_before(
    found: &Findings<'_>,
    before: Option<&LLMDeploymentStatus>,
) -> Option<MeasuredStatus> {
    let name = found.revision.map(|revision| &revision.name);
    before.filter(|before| before.revision.as_ref() == name)?.measured
}

fn count(pods: usize) -> i32 {
    i32::try_from(pods).unwrap_or(i32::MAX)
}

/// All conditions in the order people read them.
fn conditions(found: &Findings<'_>, engines: &Engines) -> Vec<(ConditionType, Said)> {
    let waiting = "waits for the steps before it";
    let model = found.model.clone().unwrap_or_else(|| Said::unknown(waiting));
    let planned = found.planned.clone().unwrap_or_else(|| Said::unknown(waiting));
    let scheduled = scheduled(found, engines);
    let loaded = loaded(found, engines);
    let ready = ready(found, [&model, &planned, &scheduled, &loaded], engines);
    let available = match engines.ready + engines.older_ready {
        0 => Said::no(ready.reason, "no pod answers"),
        some => Said::yes(Reason::Serving, format!("{some} pods answer")),
    };
    let mut all = vec![
        (ConditionType::Ready, ready.clone()),
        (ConditionType::ModelReady, model),
        (ConditionType::Planned, planned),
        (ConditionType::Scheduled, scheduled),
        (ConditionType::EngineLoaded, loaded),
        (ConditionType::Available, available),
    ];
    let serving = ready.holds == Some(true);
    let at_rest = found.replicas == 0 && found.pods.is_empty() && found.revision_is_current;
    if !serving && ready.reason.needs_a_person() {
        all.push((ConditionType::Stalled, Said { holds: Some(true), ..ready }));
    } else if !serving && !at_rest {
        all.push((ConditionType::Reconciling, Said { holds: Some(true), ..ready }));
    }
    all
}

fn scheduled(found: &Findings<'_>, engines: &Engines) -> Said {
    let wanted = found.replicas as usize;
    if found.revision.is_none() {
        return Said::unknown("there is no revision to run yet");
    }
    if let Some(why) = &engines.unschedulable {
        return Said::no(Reason::Unschedulable, why.as_str());
    }
    if engines.current < wanted {
        let have = format!("{} of {wanted} pods exist", engines.current);
        let message = match refusal_of_pods(found.deployment) {
            Some(why) => format!("{have}: {why}"),
            None => have,
        };
        return Said::no(Reason::CreatingPods, message);
    }
    if engines.scheduled < engines.current {
        let message = format!("{} of {} pods have a node", engines.scheduled, engines.current);
        return Said::no(Reason::CreatingPods, message);
    }
    Said::yes(Reason::PodsScheduled, format!("{} pods have a node", engines.scheduled))
}

/// The controller's words where pods are not even let in: a quota, the pod security level, a webhook.
fn refusal_of_pods(deployment: Option<&Deployment>) -> Option<&str> {
    let conditions = deployment?.status.as_ref()?.conditions.as_ref()?;
    let held = conditions.iter().find(|held| held.type_.as_deref() == Some("ReplicaFailure"))?;
    (held.status.as_deref() == Some("True")).then_some(held.message.as_deref()).flatten()
}

fn loaded(found: &Findings<'_>, engines: &Engines) -> Said {
    let wanted = found.replicas as usize;
    if found.revision.is_none() {
        return Said::unknown("there is no revision to run yet");
    }
    if engines.ready >= wanted {
        return Said::yes(Reason::EngineReady, format!("{} engines are ready", engines.ready));
    }
    match (&engines.trouble, found.exhausted) {
        (Some((Reason::OutOfDeviceMemory | Reason::DoesNotFit, message)), Some(figures)) => {
            Said::no(Reason::OutOfMemoryAgain, format!("{figures}; {message}"))
        }
        (Some((reason, message)), _) => Said::no(*reason, message.as_str()),
        (None, _) => {
            let message = format!("{} of {wanted} engines have loaded the model", engines.ready);
            Said::no(Reason::EngineLoading, message)
        }
    }
}

/// The first thing that is not as it should be, in the order in which things come about.
fn ready(found: &Findings<'_>, parts: [&Said; 4], engines: &Engines) -> Said {
    let [model, planned, scheduled, loaded] = parts;
    if let Some(trouble) = &found.trouble {
        return trouble.clone();
    }
    if let Some(part) = [model, planned].into_iter().find(|part| part.holds != Some(true)) {
        return Said { holds: Some(false), ..part.clone() };
    }
    if found.suspended {
        return Said::no(Reason::Suspended, "spec.suspend is true");
    }
    if found.replicas == 0 {
        return Said::no(Reason::ScaledToZero, found.held_to.unwrap_or("spec.replicas is 0"));
    }
    if !found.revision_is_current {
        return Said::no(Reason::Accepted, "the revision for this spec is being made");
    }
    if loaded.holds == Some(true) {
        let mut message = format!("{} of {} replicas answer", engines.ready, found.replicas);
        if let Some(why) = found.held_to {
            message.push_str(&format!("; they are no more because {why}"));
        }
        return Said::yes(Reason::Serving, message);
    }
    // What an engine said about itself tells more than that a pod is missing.
    let part =
        if engines.trouble.is_some() || scheduled.holds == Some(true) { loaded } else { scheduled };
    let passing = matches!(part.reason, Reason::EngineLoading | Reason::CreatingPods);
    let stopped = found.rollout.as_ref().is_some_and(|held| held.state == RolloutState::Stopped);
    if stopped {
        let needs = part.reason.needs_a_person();
        let reason = if needs { part.reason } else { Reason::RolloutStopped };
        let message = format!(
            "{}; the rollout has stopped and {} older pods go on serving: correct the spec, or set it back",
            part.message, engines.older_ready
        );
        return Said::no(reason, message);
    }
    if engines.older > 0 && passing {
        let message = format!("{}; {} older pods serve until then", part.message, engines.older);
        return Said::no(Reason::RollingOut, message);
    }
    if engines.older_ready > 0 {
        let message =
            format!("{}; {} older pods serve until then", part.message, engines.older_ready);
        return Said { message, ..part.clone() };
    }
    part.clone()
}

fn condition(
    kind: ConditionType,
    said: Said,
    generation: Option<i64>,
    before: Option<&LLMDeploymentStatus>,
    now: &Time,
) -> Condition {
    let status = match said.holds {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    };
    let held = before
        .and_then(|before| before.conditions.iter().find(|held| held.type_ == kind.name()))
        .filter(|held| held.status == status);
    Condition {
        type_: kind.name().to_owned(),
        status: status.to_owned(),
        reason: said.reason.name().to_owned(),
        message: bounded(&said.message),
        observed_generation: generation,
        last_transition_time: held
            .map_or_else(|| now.clone(), |held| held.last_transition_time.clone()),
    }
}

/// What status shows of the facts.
pub fn model(facts: &ModelFacts) -> ModelStatus {
    ModelStatus {
        family: facts.family.name().to_owned(),
        parameters: i64::try_from(facts.parameters.total()).unwrap_or(i64::MAX),
        revision: facts.revision.clone(),
        context_tokens: i64::from(facts.context_tokens),
    }
}

pub fn model_ready(model: &ModelStatus, note: Option<&str>) -> Said {
    let mut message = format!("{} with {} parameters", model.family, model.parameters);
    if let Some(commit) = &model.revision {
        message.push_str(&format!(" at commit {commit}"));
    }
    if let Some(note) = note {
        message.push_str(&format!("; {note}"));
    }
    Said::yes(Reason::ModelFound, message)
}

/// Why the facts are not there yet. `key` names the Job that a person may want to look at or delete.
pub fn model_missing(model: &Model, key: &str) -> Said {
    let job = names::inspect_job(key);
    match model {
        Model::Known(_) | Model::Told(_) => Said::yes(Reason::ModelFound, "the facts are known"),
        Model::Unseen => Said::no(Reason::Inspecting, format!("Job {job} was created")),
        Model::Looking { reason, message } => Said::no(*reason, format!("{message} (Job {job})")),
        Model::Failed { report, retry } => {
            let next =
                if *retry { "it is tried again by itself" } else { "delete it to try again" };
            Said::no(report.reason.into(), format!("{} (Job {job}; {next})", report.message))
        }
    }
}

pub fn source_not_allowed() -> Said {
    let message = "spec.model.source is file://, which this operator does not allow: \
                   use hf:// or pvc://, or start the operator with --allow-host-path";
    Said::no(Reason::SourceNotAllowed, message)
}

/// `field` of the overlay is none of those that keep within the pod.
pub fn overlay_not_allowed(field: &str) -> Said {
    let message = format!(
        "spec.podTemplate sets {field}, which this operator does not allow: remove it, \
         or start the operator with --allow-host-path"
    );
    Said::no(Reason::InvalidSpec, message)
}

#[cfg(test)]
mod complaints;
#[cfg(test)]
mod tests;
