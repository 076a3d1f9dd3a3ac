//! In: the status before and after a pass. Out: the events that tell of the transitions between them, and their way to
//! the API server. A pass that changes nothing says nothing. An event that cannot be sent is logged and lost.

use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Resource, ResourceExt};
use plimsoll_crds::{ConditionType, LLMDeployment, LLMDeploymentStatus};

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
    events.extend(scaled(before, after));
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

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
}
