//! In: the status before and after a pass. Out: the events that tell of the transitions between them, and their way to
//! the API server. A pass that changes nothing says nothing. An event that cannot be sent is logged and lost.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Resource, ResourceExt};
use plimsoll_crds::{
    ConditionType, LLMDeployment, LLMDeploymentStatus, RolloutState, RolloutStatus,
};

use crate::apply::{Applied, Want};
use crate::observe::Cached;

/// Events take at most 1 KiB of text.
const NOTE_CHARACTERS_MAX: usize = 900;

/// What is worth an event: Ready turned, Stalled came or changed its reason, another revision runs.
pub fn transitions(
    before: Option<&LLMDeploymentStatus>,
    after: &LLMDeploymentStatus,
) -> Vec<Event> {
    let mut events = Vec::new();
    let held = |status: Option<&LLMDeploymentStatus>, kind: ConditionType| {
        let conditions = &status?.conditions;
        conditions.iter().find(|held| held.type_ == kind.name()).cloned()
    };
    let revision = |status: &LLMDeploymentStatus| status.revision.clone();
    if after.revision.is_some() && before.and_then(revision) != after.revision {
        let name = after.revision.clone().unwrap_or_default();
        let why = after.plan.as_ref().map(|plan| plan.why.as_str()).unwrap_or_default();
        events.push(event(EventType::Normal, "PlanChosen", "Plan", format!("{name}: {why}")));
    }
    let (was, is) = (held(before, ConditionType::Ready), held(Some(after), ConditionType::Ready));
    if let Some(is) = is {
        let was_ready = was.as_ref().is_some_and(|was| was.status == "True");
        if was_ready != (is.status == "True") {
            let kind = if was_ready { EventType::Warning } else { EventType::Normal };
            events.push(event(kind, &is.reason, "Serve", is.message));
        }
    }
    events
        .extend(rolled(before.and_then(|before| before.rollout.as_ref()), after.rollout.as_ref()));
    let was = held(before, ConditionType::Stalled);
    if let Some(is) = held(Some(after), ConditionType::Stalled)
        && was.is_none_or(|was| was.reason != is.reason)
    {
        events.push(event(EventType::Warning, &is.reason, "Stall", is.message));
    }
    events
}

/// A rollout that came to its end, with what it cost.
fn rolled(before: Option<&RolloutStatus>, after: Option<&RolloutStatus>) -> Option<Event> {
    let (before, after) = (before?, after?);
    let name = &after.revision;
    let outage = after
        .outage_seconds
        .map(|seconds| format!("no pod answered for {seconds} s; {}", after.why));
    let told = before.outage_seconds != after.outage_seconds;
    match (after.state, outage) {
        (RolloutState::Complete | RolloutState::RolledBack, Some(outage)) if told => {
            let note = format!("rollout to {name}: {outage}");
            Some(about(name, event(EventType::Warning, "Outage", "Roll", note)))
        }
        (RolloutState::Stopped, _) if before.state != RolloutState::Stopped => {
            let note = format!("rollout to {name} has stopped; older pods go on serving");
            Some(about(name, event(EventType::Warning, "RolloutStopped", "Roll", note)))
        }
        _ => None,
    }
}

/// An event that names the revision it is about, so that it is not counted as one of another.
fn about(revision: &str, event: Event) -> Event {
    let related = ObjectReference {
        api_version: Some("apps/v1".to_owned()),
        kind: Some("ControllerRevision".to_owned()),
        name: Some(revision.to_owned()),
        ..ObjectReference::default()
    };
    Event { secondary: Some(related), ..event }
}

/// A child of ours that another hand had touched and that was put right.
#[derive(Clone, Debug, PartialEq)]
pub struct Repair {
    child: ObjectReference,
    note: String,
}

/// What is to be told of a child that took a write, where it was there before (`stood`); None where no other hand had
/// touched it.
pub fn repair<K: Cached>(want: &Want<K>, applied: &Applied, stood: bool) -> Option<Repair> {
    let (kind, name) = (K::kind(&()), want.name());
    let (field, note) = match applied {
        Applied::Repaired(field) => (
            Some(field.clone()),
            format!(
                "{kind} {name}: {field} was changed by another hand and is set back; \
                 change the LLMDeployment instead"
            ),
        ),
        Applied::Created if stood => {
            (None, format!("{kind} {name} was deleted by another hand and is made again"))
        }
        Applied::Created | Applied::Changed | Applied::Unchanged => return None,
    };
    let child = ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(kind.into_owned()),
        namespace: Some(want.namespace().to_owned()),
        name: Some(name.to_owned()),
        field_path: field,
        ..ObjectReference::default()
    };
    Some(Repair { child, note })
}

/// Events of what was put right. The child is part of each, because events that differ in their words alone are counted as
/// one.
pub fn repairs(told: &[Repair]) -> Vec<Event> {
    let tell = |Repair { child, note }: &Repair| Event {
        secondary: Some(child.clone()),
        ..event(EventType::Warning, "Repaired", "Repair", note.clone())
    };
    told.iter().map(tell).collect()
}

fn event(type_: EventType, reason: &str, action: &str, note: String) -> Event {
    let note = note.chars().take(NOTE_CHARACTERS_MAX).collect();
    Event {
        type_,
        reason: reason.to_owned(),
        note: Some(note),
        action: action.to_owned(),
        secondary: None,
    }
}

pub async fn publish(recorder: &Recorder, object: &LLMDeployment, events: &[Event]) {
    for event in events {
        if let Err(error) = recorder.publish(event, &object.object_ref(&())).await {
            tracing::warn!(%error, object = object.name_any(), "an event was lost");
        }
    }
}
