use k8s_openapi::jiff::Timestamp;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::revision::fixtures;

fn revision() -> Revision {
    fixtures::revision("new", &json!({}))
}

/// One pod: of which revision, on a node, ready, and what its engine said at its end.
#[derive(Clone, Debug)]
struct Play {
    hash: &'static str,
    node: bool,
    ready: bool,
    ended: Option<&'static str>,
}

fn pod(play: &Play) -> Arc<Pod> {
    let said = |holds: bool| if holds { "True" } else { "False" };
    let ended = play.ended.map(|reason| {
        let message = json!({"reason": reason, "message": "3 GiB of 2 GiB"}).to_string();
        json!({"terminated": {"exitCode": 10, "message": message}})
    });
    let body = json!({
        "metadata": {"name": "p", "labels": {names::REVISION: play.hash}},
        "spec": {"containers": [], "nodeName": play.node.then_some("node")},
        "status": {
            "conditions": [
                {"type": "PodScheduled", "status": said(play.node), "message": "0/1 nodes have room"},
                {"type": "Ready", "status": said(play.ready)}],
            "containerStatuses": [{"name": "engine", "image": "i", "imageID": "i", "ready": play.ready,
                "restartCount": 1, "lastState": ended}],
        },
    });
    Arc::new(serde_json::from_value(body).unwrap())
}

/// An object of one replica that was planned, and of which nothing was seen.
pub fn nothing() -> Findings<'static> {
    Findings {
        namespace: "team",
        name: "assistant",
        generation: Some(3),
        trouble: None,
        model: Some(Said::yes(Reason::ModelFound, "llama")),
        facts: None,
        planned: Some(Said::yes(Reason::PlanChosen, "it fits")),
        revision: None,
        stood: true,
        revision_is_current: true,
        rollout: None,
        offered: None,
        exhausted: None,
        measured: None,
        suspended: false,
        replicas: 1,
        held_to: None,
        scaling: None,
        pods: &[],
        deployment: None,
    }
}

fn told(revision: &Revision, replicas: u32, pods: &[Arc<Pod>]) -> LLMDeploymentStatus {
    let found = Findings { revision: Some(revision), replicas, pods, ..nothing() };
    compute(&found, None, &Time(Timestamp::UNIX_EPOCH))
}

/// A pod whose volumes do not come, as its kubelet tells it.
fn unmounted() -> Arc<Pod> {
    let mut pod = Pod::clone(&play("new", true, false, None));
    let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "lastTransitionTime": "1969-12-31T23:58:00Z"});
    let secret = json!({"secretName": "keys", "items": [{"key": "token", "path": "keys"}]});
    pod.spec.as_mut().unwrap().volumes =
        serde_json::from_value(json!([{"name": "api-keys", "secret": secret}])).unwrap();
    let status = json!({"conditions": [
        condition("PodScheduled", "True"), condition("PodReadyToStartContainers", "False")]});
    pod.status = serde_json::from_value(status).unwrap();
    Arc::new(pod)
}

#[test]
fn a_volume_that_does_not_come_is_told_with_what_it_needs() {
    let status = told(&revision(), 1, &[unmounted()]);
    assert_eq!(held(&status, "Ready"), Some(("False", "VolumeNotMounted")));
    assert_eq!(held(&status, "EngineLoaded"), Some(("False", "VolumeNotMounted")));
    let ready = status.conditions.iter().find(|held| held.type_ == "Ready").unwrap();
    assert!(ready.message.contains("Secret keys (key token)"), "{}", ready.message);
}

fn held<'a>(status: &'a LLMDeploymentStatus, kind: &str) -> Option<(&'a str, &'a str)> {
    let condition = status.conditions.iter().find(|held| held.type_ == kind)?;
    Some((condition.status.as_str(), condition.reason.as_str()))
}

fn play(hash: &'static str, node: bool, ready: bool, ended: Option<&'static str>) -> Arc<Pod> {
    pod(&Play { hash, node, ready, ended })
}

#[test]
fn ready_says_the_first_thing_that_is_not_as_it_should_be() {
    let revision = revision();
    let cases: [(&str, Vec<Arc<Pod>>, &str, &str); 9] = [
        ("no pod yet", vec![], "False", "CreatingPods"),
        ("no node", vec![play("new", false, false, None)], "False", "Unschedulable"),
        ("loading", vec![play("new", true, false, None)], "False", "EngineLoading"),
        ("ready", vec![play("new", true, true, None)], "True", "Serving"),
        ("only an old pod", vec![play("old", true, true, None)], "False", "RollingOut"),
        (
            "old serves, new loads",
            vec![play("old", true, true, None), play("new", true, false, None)],
            "False",
            "RollingOut",
        ),
        ("does not fit", vec![play("new", true, false, Some("DoesNotFit"))], "False", "DoesNotFit"),
        ("fell over once", vec![play("new", true, false, Some("Internal"))], "False", "Internal"),
        ("fell over and is up", vec![play("new", true, true, Some("Internal"))], "True", "Serving"),
    ];
    for (what, pods, status, reason) in cases {
        let told = told(&revision, 1, &pods);
        assert_eq!(held(&told, "Ready"), Some((status, reason)), "{what}");
    }
}

#[test]
fn stalled_stands_only_where_a_person_must_act() {
    let revision = revision();
    let stalled = told(&revision, 1, &[play("new", true, false, Some("CorruptWeights"))]);
    assert_eq!(held(&stalled, "Stalled"), Some(("True", "CorruptWeights")));
    assert_eq!(held(&stalled, "Reconciling"), None);
    let passing = told(&revision, 1, &[play("new", true, false, Some("DeviceLost"))]);
    assert_eq!(held(&passing, "Stalled"), None);
    assert_eq!(held(&passing, "Reconciling"), Some(("True", "DeviceLost")));
}

fn first(found: &Findings<'_>) -> LLMDeploymentStatus {
    compute(found, None, &Time(Timestamp::UNIX_EPOCH))
}

#[test]
fn what_ran_out_of_memory_twice_is_stalled_with_both_figures() {
    let revision = revision();
    let figures = "an engine needed 4 GiB where 3 were planned; planned anew, it needed 5";
    let ended = [play("new", true, false, Some("OutOfDeviceMemory"))];
    let seen = || Findings { revision: Some(&revision), pods: &ended, ..nothing() };
    let (once, twice) = (seen(), Findings { exhausted: Some(figures), ..seen() });
    assert_eq!(held(&first(&once), "Reconciling"), Some(("True", "OutOfDeviceMemory")));
    let status = first(&twice);
    assert_eq!(held(&status, "Stalled"), Some(("True", "OutOfMemoryAgain")));
    assert_eq!(held(&status, "EngineLoaded"), Some(("False", "OutOfMemoryAgain")));
    let ready = status.conditions.iter().find(|held| held.type_ == "Ready").unwrap();
    assert!(ready.message.contains(figures), "{}", ready.message);
    // An engine that answers again is no matter for anybody.
    let answers = [play("new", true, true, Some("OutOfDeviceMemory"))];
    let up = first(&Findings { pods: &answers, ..twice });
    assert_eq!(held(&up, "Ready"), Some(("True", "Serving")));
    assert_eq!(held(&up, "Stalled"), None);
}

/// kserve#3973: GitOps tools showed "progressing" for ever.
#[test]
fn kserve_3973_what_waits_for_a_person_is_stalled_and_what_ran_before_stays_available() {
    let revision = revision();
    let waits = Said::no(Reason::PlanNotPinned, "waits for spec.plan.pinnedHash: 5f2c81d0");
    let pods = [play("new", true, true, None)];
    let status = first(&Findings {
        planned: Some(waits),
        revision: Some(&revision),
        revision_is_current: false,
        pods: &pods,
        ..nothing()
    });
    assert_eq!(held(&status, "Stalled"), Some(("True", "PlanNotPinned")));
    assert_eq!(held(&status, "Reconciling"), None);
    assert_eq!(held(&status, "Planned"), Some(("False", "PlanNotPinned")));
    assert_eq!(held(&status, "Available"), Some(("True", "Serving")));
}

#[test]
fn what_waits_is_the_plan_while_nothing_runs_and_an_offer_beside_what_does() {
    let runs = revision();
    let mut waiting = revision();
    waiting.name = "assistant-waits".to_owned();
    waiting.content.plan.hash = "w".to_owned();
    let alone = first(&Findings { offered: Some(&waiting), ..nothing() });
    assert_eq!((alone.plan.unwrap().hash.as_str(), alone.offered), ("w", None));
    let beside = Findings { revision: Some(&runs), offered: Some(&waiting), ..nothing() };
    let beside = first(&beside);
    assert_eq!(beside.plan.unwrap().hash, "p");
    let offered = beside.offered.unwrap();
    assert_eq!((offered.hash.as_str(), offered.revision.as_str()), ("w", "assistant-waits"));
}

#[test]
fn what_was_measured_stands_as_long_as_its_revision() {
    let runs = revision();
    let measured = MeasuredStatus { peak_memory_bytes: Some(7), ..MeasuredStatus::default() };
    let found = Findings { revision: Some(&runs), measured: Some(measured), ..nothing() };
    let before = first(&found);
    assert_eq!(before.measured, Some(measured));
    let after = |name: &str| {
        let standing = Revision { name: name.to_owned(), ..runs.clone() };
        let found = Findings { revision: Some(&standing), ..nothing() };
        compute(&found, Some(&before), &Time(Timestamp::UNIX_EPOCH)).measured
    };
    assert_eq!(after("assistant-new"), Some(measured), "an operator that starts has no news");
    assert_eq!(after("assistant-other"), None);
}

#[test]
fn pods_of_every_revision_count_as_available_and_as_replicas_and_only_current_ones_as_ready() {
    let revision = revision();
    let status =
        told(&revision, 1, &[play("old", true, true, None), play("new", true, false, None)]);
    assert_eq!(held(&status, "Available"), Some(("True", "Serving")));
    assert_eq!((status.replicas, status.ready_replicas), (2, 0));
}

#[test]
fn a_scaled_down_object_is_neither_ready_nor_at_work() {
    let revision = revision();
    let status = told(&revision, 0, &[]);
    assert_eq!(held(&status, "Ready"), Some(("False", "ScaledToZero")));
    assert_eq!(held(&status, "Reconciling"), None);
    let leaving = told(&revision, 0, &[play("new", true, true, None)]);
    assert_eq!(held(&leaving, "Reconciling"), Some(("True", "ScaledToZero")));
}

#[test]
fn a_condition_keeps_its_time_until_its_status_turns() {
    let revision = revision();
    let pods = [play("new", true, true, None)];
    let first = told(&revision, 1, &pods);
    let found = |pods: &[Arc<Pod>], before: &LLMDeploymentStatus| {
        let later = Time(Timestamp::from_second(60).unwrap());
        let found = Findings { generation: Some(4), revision: Some(&revision), pods, ..nothing() };
        compute(&found, Some(before), &later)
    };
    let second = found(&pods, &first);
    let time = |status: &LLMDeploymentStatus| {
        let ready = status.conditions.iter().find(|held| held.type_ == "Ready").unwrap();
        ready.last_transition_time.0.as_second()
    };
    assert_eq!((time(&first), time(&second)), (0, 0));
    assert_eq!(time(&found(&[], &second)), 60);
}

fn plays() -> impl Strategy<Value = Vec<Play>> {
    let one = (
        prop::sample::select(vec!["new", "old"]),
        any::<bool>(),
        any::<bool>(),
        prop::option::of(prop::sample::select(vec!["DoesNotFit", "Internal", "CorruptWeights"])),
    )
        .prop_map(|(hash, node, ready, ended)| Play {
            hash,
            node,
            ready: ready && node,
            ended,
        });
    prop::collection::vec(one, 0..6)
}

proptest! {
    #[test]
    fn ready_is_never_said_of_fewer_current_pods_than_asked_for(plays in plays(), replicas in 0u32..4) {
        let revision = revision();
        let pods: Vec<_> = plays.iter().map(pod).collect();
        let status = told(&revision, replicas, &pods);
        let answering = plays.iter().filter(|play| play.hash == "new" && play.ready).count();
        let ready = held(&status, "Ready").unwrap().0 == "True";
        prop_assert_eq!(ready, replicas > 0 && answering >= replicas as usize);
        let stalled = held(&status, "Stalled").is_some();
        let reconciling = held(&status, "Reconciling").is_some();
        prop_assert!(!(stalled && reconciling));
        prop_assert!(!ready || (!stalled && !reconciling));
        prop_assert!(ready || stalled || reconciling || replicas == 0);
        let again = serde_json::to_value(&status).unwrap();
        prop_assert_eq!(serde_json::from_value::<LLMDeploymentStatus>(again).unwrap(), status);
    }
}

#[test]
fn scaling_active_says_what_the_loop_says_and_a_new_operator_leaves_it() {
    let revision = revision();
    let pods = [pod(&Play { hash: "new", node: true, ready: true, ended: None })];
    let told = |said: Option<Said>, before: Option<&LLMDeploymentStatus>, seconds: i64| {
        let found = Findings {
            generation: Some(seconds),
            revision: Some(&revision),
            held_to: Some("maxGPUs is 1"),
            scaling: Some(Scaled { status: None, said }),
            pods: &pods,
            ..nothing()
        };
        compute(&found, before, &Time(Timestamp::from_second(seconds).unwrap()))
    };
    let active = |status: &LLMDeploymentStatus| {
        let held = status.conditions.iter().find(|held| held.type_ == "ScalingActive").unwrap();
        (held.status.clone(), held.reason.clone(), held.observed_generation)
    };
    let text = str::to_owned;
    let first = told(None, None, 1);
    assert_eq!(active(&first), (text("Unknown"), text("Accepted"), Some(1)));
    let ready = first.conditions.iter().find(|held| held.type_ == "Ready").unwrap();
    assert!(ready.message.contains("no more because maxGPUs is 1"), "{}", ready.message);
    let amiss = told(Some(Said::no(Reason::MetricsMissing, "none")), Some(&first), 2);
    assert_eq!(active(&amiss), (text("False"), text("MetricsMissing"), Some(2)));
    let restarted = told(None, Some(&amiss), 3);
    assert_eq!(active(&restarted), (text("False"), text("MetricsMissing"), Some(3)));
}
