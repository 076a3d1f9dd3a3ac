//! In: the status before and after a pass. Out: the events that tell of the transitions between them, and their way to
//! the API server. A pass that changes nothing says nothing. An event that cannot be sent is logged and lost.

use std::sync::Mutex;

use k8s_openapi::Resource as _;
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource, ResourceExt};
use plimsoll_crds::{
    ConditionType, LLMDeployment, LLMDeploymentStatus, OfferStatus, RolloutState, RolloutStatus,
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
        let change = after.plan.as_ref().and_then(|plan| plan.changed.as_ref());
        let change = change.map_or_else(String::new, |change| {
            format!("against plan {}: {}; ", change.from, values(&change.values))
        });
        let note = format!("{name}: {change}{why}");
        events.push(of_revision(event(EventType::Normal, "PlanChosen", "Plan", note), &name));
    }
    let hash = |status: &LLMDeploymentStatus| Some(status.offered.as_ref()?.hash.clone());
    if let Some(offered) = &after.offered
        && before.and_then(hash).as_ref() != Some(&offered.hash)
    {
        let OfferStatus { hash, revision, cause, values: changed, why } = offered;
        let changed = values(changed);
        let note = format!("spec.plan.pinnedHash: {hash} would run ({cause:?}): {changed}; {why}");
        let offered = event(EventType::Normal, "PlanOffered", "Plan", note);
        events.push(of_revision(offered, revision));
    }
    let (was, is) = (held(before, ConditionType::Ready), held(Some(after), ConditionType::Ready));
    if let Some(is) = is {
        let was_ready = was.as_ref().is_some_and(|was| was.status == "True");
        if was_ready != (is.status == "True") {
            let kind = if was_ready { EventType::Warning } else { EventType::Normal };
            events.push(event(kind, &is.reason, "Serve", is.message));
        }
    }
    events.extend(scaled(before, after));
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

/// What the scaling loop decided, or what keeps it from deciding.
fn scaled(before: Option<&LLMDeploymentStatus>, after: &LLMDeploymentStatus) -> Option<Event> {
    let before = before?.scaling.as_ref()?;
    let after = after.scaling.as_ref()?;
    if let Some(last) = after.recent.first().filter(|last| Some(*last) != before.recent.first()) {
        let note = format!("{} to {} replicas: {}", last.from, last.to, last.why);
        return Some(event(EventType::Normal, "Scaled", "Scale", note));
    }
    let limit = after.limit.as_ref().filter(|_| after.limit != before.limit)?;
    let note = format!("{} replicas, and no more: {limit}", after.desired);
    Some(event(EventType::Warning, "ScalingLimited", "Scale", note))
}

fn values(changed: &[String]) -> String {
    if changed.is_empty() { "no value differs".to_owned() } else { changed.join(", ") }
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
            Some(of_revision(event(EventType::Warning, "Outage", "Roll", note), name))
        }
        (RolloutState::Stopped, _) if before.state != RolloutState::Stopped => {
            let note = format!("rollout to {name} has stopped; older pods go on serving");
            Some(of_revision(event(EventType::Warning, "RolloutStopped", "Roll", note), name))
        }
        _ => None,
    }
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

/// Events are alike, and counted in the words of the first, when all but their notes is; those of two revisions are not.
fn of_revision(event: Event, name: &str) -> Event {
    let secondary = ObjectReference {
        api_version: Some(ControllerRevision::API_VERSION.to_owned()),
        kind: Some(ControllerRevision::KIND.to_owned()),
        name: Some(name.to_owned()),
        ..ObjectReference::default()
    };
    Event { secondary: Some(secondary), ..event }
}

/// Events of which is remembered that they were told.
const REMEMBERED_MAX: usize = 256;

/// Tells events to the API server. Of two that are alike within minutes the second only raises a count: so those told are
/// remembered, until there are too many or `forget` is called.
pub struct Teller {
    client: Client,
    reporter: Reporter,
    recorder: Mutex<(Recorder, usize)>,
}

impl Teller {
    pub fn new(client: Client, reporter: Reporter) -> Teller {
        let recorder = Mutex::new((Recorder::new(client.clone(), reporter.clone()), 0));
        Teller { client, reporter, recorder }
    }

    pub async fn publish(&self, object: &LLMDeployment, events: &[Event]) {
        let recorder = self.for_more(events.len());
        for event in events {
            if let Err(error) = recorder.publish(event, &object.object_ref(&())).await {
                tracing::warn!(%error, object = object.name_any(), "an event was lost");
            }
        }
    }

    fn for_more(&self, events: usize) -> Recorder {
        let mut held = self.recorder.lock().expect("no holder panics");
        if held.1 + events > REMEMBERED_MAX {
            *held = (self.empty(), 0);
        }
        held.1 += events;
        held.0.clone()
    }

    pub fn forget(&self) {
        *self.recorder.lock().expect("no holder panics") = (self.empty(), 0);
    }

    fn empty(&self) -> Recorder {
        Recorder::new(self.client.clone(), self.reporter.clone())
    }
}

#[cfg(test)]
mod tests {
    use plimsoll_crds::{PlanCause, PlanStatus};
    use serde_json::{Value, json};

    use super::*;
    use crate::revision::fixtures;

    fn status(scaling: Value) -> LLMDeploymentStatus {
        serde_json::from_value(json!({"scaling": scaling})).expect("a status")
    }

    #[test]
    fn a_decision_and_a_new_limit_are_told_once_with_their_figures() {
        let at = "2026-01-01T00:00:00Z";
        let decision = json!({"at": at, "from": 1, "to": 3, "why": "12.0 requests wait"});
        let none = status(json!({"desired": 1, "why": "it begins"}));
        let scaled = json!({"desired": 3, "why": "w", "recent": [decision]});
        let one = status(scaled.clone());
        let notes = |before: Option<&LLMDeploymentStatus>, after: &LLMDeploymentStatus| {
            let events = transitions(before, after).into_iter();
            events.map(|event| (event.reason, event.note.unwrap_or_default())).collect::<Vec<_>>()
        };
        let told = notes(Some(&none), &one);
        assert_eq!(told, [("Scaled".to_owned(), "1 to 3 replicas: 12.0 requests wait".to_owned())]);
        assert_eq!(notes(Some(&one), &one), []);
        assert_eq!(notes(None, &one), [], "what was decided before is no news");
        let mut limited = scaled;
        limited["limit"] = "spec.scaling.max is 3".into();
        let limited = status(limited);
        let told = notes(Some(&one), &limited);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].0, "ScalingLimited");
        assert!(told[0].1.contains("3 replicas, and no more: spec.scaling.max is 3"), "{told:?}");
    }

    fn plan(hash: &str) -> PlanStatus {
        fixtures::plan(&json!({
            "hash": hash,
            "changed": {"from": "old", "cause": "SpecChanged", "values": ["cache.tokens: 128 → 64"]},
        }))
    }

    fn offer(hash: &str) -> OfferStatus {
        OfferStatus {
            hash: hash.to_owned(),
            revision: format!("assistant-{hash}"),
            cause: PlanCause::BetterPlan,
            values: vec!["accelerator: cpu → nvidia-l4".to_owned()],
            why: "GPUs come first".to_owned(),
        }
    }

    #[test]
    fn a_changed_plan_and_an_offer_are_told_once_with_every_value() {
        let before = LLMDeploymentStatus::default();
        let mut after = LLMDeploymentStatus {
            revision: Some("assistant-1".to_owned()),
            plan: Some(plan("new")),
            offered: Some(offer("2")),
            ..before.clone()
        };
        let told = transitions(Some(&before), &after);
        let note = |index: usize| told[index].note.clone().unwrap();
        assert_eq!(note(0), "assistant-1: against plan old: cache.tokens: 128 → 64; it fits");
        assert_eq!(
            note(1),
            "spec.plan.pinnedHash: 2 would run (BetterPlan): accelerator: cpu → nvidia-l4; GPUs come first"
        );
        assert_eq!(told.len(), 2);
        assert!(transitions(Some(&after), &after).is_empty());
        // Another offer is another event, not one more of the first.
        let second = after.clone();
        after.offered = Some(offer("3"));
        let again = transitions(Some(&second), &after);
        assert_eq!(again.len(), 1);
        assert_ne!(again[0].secondary, told[1].secondary);
        after.offered = None;
        assert!(transitions(Some(&second), &after).is_empty());
    }
}
