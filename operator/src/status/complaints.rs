//! What users of other operators complain of: a status that lies. Each test has the name of the thread that tells it.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::tests::nothing;
use super::*;
use crate::revision::fixtures;

/// A pod of the revision `hash` with this status; on a node unless it says that it has none.
fn pod(hash: &str, status: Value) -> Arc<Pod> {
    let waits = status["conditions"][0]["status"] == "False"
        && status["conditions"][0]["type"] == "PodScheduled";
    let body = json!({
        "metadata": {"name": format!("assistant-{hash}"), "labels": {names::REVISION: hash}},
        "spec": {"containers": [], "nodeName": (!waits).then_some("node")},
        "status": status,
    });
    Arc::new(serde_json::from_value(body).unwrap())
}

fn serving(hash: &str) -> Arc<Pod> {
    pod(hash, json!({"conditions": [{"type": "Ready", "status": "True"}]}))
}

/// Ends again and again; `message` is what it left, if anything.
fn falling(message: Option<&str>) -> Arc<Pod> {
    pod(
        "new",
        json!({
            "conditions": [{"type": "Ready", "status": "False"}],
            "containerStatuses": [{"name": "engine", "image": "i", "imageID": "i", "ready": false, "restartCount": 7,
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"exitCode": 1, "message": message}}}],
        }),
    )
}

fn unscheduled() -> Arc<Pod> {
    let words = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.";
    pod(
        "new",
        json!({"conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}]}),
    )
}

fn told(
    pods: &[Arc<Pod>],
    deployment: Option<&Deployment>,
    before: Option<&LLMDeploymentStatus>,
    second: i64,
) -> LLMDeploymentStatus {
    let revision = fixtures::revision("new", &json!({}));
    let found = Findings { revision: Some(&revision), pods, deployment, ..nothing() };
    compute(&found, before, &Time(Timestamp::from_second(second).unwrap()))
}

fn now(pods: &[Arc<Pod>]) -> LLMDeploymentStatus {
    told(pods, None, None, 0)
}

fn held<'a>(status: &'a LLMDeploymentStatus, kind: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|held| held.type_ == kind)
}

fn ready(status: &LLMDeploymentStatus) -> (&str, &str) {
    let held = held(status, "Ready").unwrap();
    (&held.status, &held.reason)
}

#[test]
fn kserve_1859_what_falls_over_again_and_again_is_not_ready() {
    assert_eq!(ready(&now(&[falling(None)])), ("False", "EngineCrashLooping"));
}

#[test]
fn dynamo_3567_pods_of_the_revision_before_make_nothing_ready() {
    let status = now(&[serving("old")]);
    assert_eq!(ready(&status), ("False", "RollingOut"));
    assert_eq!(status.ready_replicas, 0);
    assert_eq!(held(&status, "Available").unwrap().status, "True");
}

#[test]
fn airunway_23_nothing_at_all_is_not_ready() {
    assert_eq!(ready(&now(&[])), ("False", "CreatingPods"));
}

#[test]
fn dynamo_8170_no_room_and_a_crash_are_two_words() {
    let status = now(&[unscheduled()]);
    assert_eq!(ready(&status), ("False", "Unschedulable"));
    assert!(held(&status, "Scheduled").unwrap().message.contains("3 Insufficient nvidia.com/gpu"));
    assert_eq!(ready(&now(&[falling(None)])), ("False", "EngineCrashLooping"));
}

#[test]
fn aibrix_1860_what_cannot_be_loaded_fails_and_says_so() {
    let report = json!({"reason": "CorruptWeights", "message": "model.safetensors is truncated"})
        .to_string();
    let status = now(&[falling(Some(&report))]);
    assert_eq!(ready(&status), ("False", "CorruptWeights"));
    assert_eq!(held(&status, "Stalled").unwrap().reason, "CorruptWeights");
    assert!(held(&status, "Reconciling").is_none());
}

#[test]
fn kaito_2203_a_quota_is_named_where_it_refuses_pods() {
    let words = "pods \"assistant-x\" is forbidden: exceeded quota: gpus";
    let deployment: Deployment = serde_json::from_value(json!({"metadata": {}, "status": {"conditions": [
        {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": words}]}}))
    .unwrap();
    let status = told(&[], Some(&deployment), None, 0);
    assert!(held(&status, "Ready").unwrap().message.contains("exceeded quota: gpus"));
}

#[test]
fn nim_271_a_pod_that_is_missing_for_a_moment_makes_nobody_act_and_moves_no_other_time() {
    let before = told(&[serving("new")], None, None, 100);
    let missing = told(&[], None, Some(&before), 200);
    assert_eq!(ready(&missing), ("False", "CreatingPods"));
    assert!(held(&missing, "Stalled").is_none());
    let back = told(&[serving("new")], None, Some(&missing), 300);
    let at = |status: &LLMDeploymentStatus, kind: &str| {
        held(status, kind).unwrap().last_transition_time.0.as_second()
    };
    assert_eq!(at(&back, "Ready"), 300);
    assert_eq!((at(&back, "ModelReady"), at(&back, "Planned")), (100, 100));
}
