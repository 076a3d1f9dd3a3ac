use serde_json::{Value, json};

use super::*;
use crate::revision::fixtures;

const NOW: &str = "2026-01-01T00:10:00Z";

fn revision(hash: &str, update: Update) -> Revision {
    fixtures::revision(hash, &json!({"specDigest": hash, "update": update}))
}

fn deployment(hash: &str, memory: Option<Value>, progress: &str) -> Deployment {
    let annotations = memory.map(|memory| json!({names::ROLLOUT: memory.to_string()}));
    serde_json::from_value(json!({
        "metadata": {"name": "assistant", "generation": 2, "labels": {names::REVISION: hash}, "annotations": annotations},
        "spec": {"selector": {}, "template": {}},
        "status": {"observedGeneration": 2, "conditions": [{"type": "Progressing", "status": "True", "reason": progress}]},
    }))
    .unwrap()
}

/// What a pod does, in one word.
fn pod(hash: &str, does: &str) -> Arc<Pod> {
    let ended = |message: Value| {
        json!([{"name": "engine", "image": "i", "imageID": "i", "ready": false,
        "restartCount": 5, "lastState": {"terminated": {"exitCode": 1, "message": message.to_string()}}}])
    };
    let containers = match does {
        "corrupt" => ended(json!({"reason": "CorruptWeights", "message": "cut short"})),
        "silent" => ended(json!("")),
        _ => json!([]),
    };
    let waits = does.starts_with("waits");
    let since = if does == "waits long" { "2026-01-01T00:08:00Z" } else { "2026-01-01T00:09:30Z" };
    let said = |holds: bool| if holds { "True" } else { "False" };
    let body = json!({
        "metadata": {"name": "p", "labels": {names::REVISION: hash}},
        "spec": {"containers": [], "nodeName": (!waits).then_some("node")},
        "status": {"containerStatuses": containers, "conditions": [
            {"type": "PodScheduled", "status": said(!waits), "message": "0/1 nodes have room", "lastTransitionTime": since},
            {"type": "Ready", "status": said(does == "serves")}]},
    });
    Arc::new(serde_json::from_value(body).unwrap())
}

struct Play<'a> {
    to: &'a str,
    planned: Update,
    strategy: RolloutStrategy,
    deployment: Option<Deployment>,
    pods: Vec<Arc<Pod>>,
}

fn play(play: Play<'_>) -> Rollout {
    let to = revision(play.to, play.planned);
    let revisions = [to.clone(), revision("old", Update::Surge)];
    step(&Inputs {
        to: &to,
        revisions: &revisions,
        deployment: play.deployment.as_ref(),
        pods: &play.pods,
        strategy: play.strategy,
        replicas: 1,
        now: NOW.parse().unwrap(),
    })
}

fn memory(fields: Value) -> Option<Value> {
    let mut memory = json!({"to": "new"});
    for (name, field) in fields.as_object().unwrap() {
        memory[name] = field.clone();
    }
    Some(memory)
}

#[test]
fn a_first_revision_stands_and_there_is_nothing_to_remember() {
    let first = play(Play {
        to: "new",
        planned: Update::InPlace,
        strategy: RolloutStrategy::Auto,
        deployment: None,
        pods: vec![],
    });
    assert_eq!((first.revision.hash.as_str(), first.update), ("new", Update::InPlace));
    assert_eq!(first.memory.kept(), None);
    // Nor does it go back anywhere when it fails.
    let failed = play(Play {
        to: "new",
        planned: Update::InPlace,
        strategy: RolloutStrategy::Auto,
        deployment: Some(deployment("new", None, "")),
        pods: vec![pod("new", "corrupt")],
    });
    assert_eq!((failed.revision.hash.as_str(), failed.memory.failed), ("new", None));
}

#[test]
fn the_strategy_of_the_spec_goes_before_the_plan_and_auto_follows_it() {
    use RolloutStrategy::{Auto, Recreate, Surge};
    for (strategy, planned, expected) in [
        (Auto, Update::Surge, Update::Surge),
        (Auto, Update::InPlace, Update::InPlace),
        (Surge, Update::InPlace, Update::Surge),
        (Recreate, Update::Surge, Update::InPlace),
    ] {
        let pods = vec![pod("old", "serves")];
        let deployment = Some(deployment("old", None, ""));
        let rollout = play(Play { to: "new", planned, strategy, deployment, pods });
        assert_eq!(rollout.update, expected, "{strategy:?} {planned:?}");
        assert_eq!(rollout.memory.good.as_deref(), Some("old"), "what served is remembered");
        assert_eq!(rollout.revision.hash, "new");
    }
}

#[test]
fn a_pod_that_finds_no_node_for_two_minutes_takes_an_old_ones_place_under_auto_alone() {
    let waiting = |does: &str, strategy| {
        play(Play {
            to: "new",
            planned: Update::Surge,
            strategy,
            deployment: Some(deployment("new", memory(json!({"good": "old"})), "")),
            pods: vec![pod("old", "serves"), pod("new", does)],
        })
    };
    let patient = waiting("waits", RolloutStrategy::Auto);
    assert_eq!((patient.update, patient.again), (Update::Surge, Some(Duration::from_secs(90))));
    let out_of_patience = waiting("waits long", RolloutStrategy::Auto);
    assert_eq!(out_of_patience.update, Update::InPlace);
    assert!(out_of_patience.why.contains("0/1 nodes have room"), "{}", out_of_patience.why);
    assert_eq!(waiting("waits long", RolloutStrategy::Surge).update, Update::Surge);
    // It stays so once the old pod has left and the new one has its node.
    let kept = serde_json::to_value(&out_of_patience.memory).unwrap();
    let later = play(Play {
        to: "new",
        planned: Update::Surge,
        strategy: RolloutStrategy::Auto,
        deployment: Some(deployment("new", Some(kept), "")),
        pods: vec![pod("new", "loads")],
    });
    assert_eq!((later.update, later.memory), (Update::InPlace, out_of_patience.memory));
}

#[test]
fn a_revision_that_fails_in_place_gives_way_to_the_one_that_served_and_under_surge_it_does_not() {
    let failing = |does: &str, progress: &str, strategy| {
        play(Play {
            to: "new",
            planned: Update::Surge,
            strategy,
            deployment: Some(deployment("new", memory(json!({"good": "old"})), progress)),
            pods: vec![pod("new", does)],
        })
    };
    use RolloutStrategy::{Recreate, Surge};
    for (does, progress, strategy, stands) in [
        ("corrupt", "", Recreate, "old"),
        ("silent", "", Recreate, "old"),
        ("loads", "ProgressDeadlineExceeded", Recreate, "old"),
        ("loads", "", Recreate, "new"),
        ("serves", "ProgressDeadlineExceeded", Recreate, "new"),
        // Going back would find no room either.
        ("waits long", "ProgressDeadlineExceeded", Recreate, "new"),
        ("corrupt", "", Surge, "new"),
        ("loads", "ProgressDeadlineExceeded", Surge, "new"),
    ] {
        let rollout = failing(does, progress, strategy);
        assert_eq!(rollout.revision.hash, stands, "{does} {progress} {strategy:?}");
        let to = revision("new", Update::Surge);
        let trouble = rollout.trouble(&to);
        assert_eq!(trouble.is_some(), stands == "old");
        if let Some(said) = trouble {
            assert_eq!(said.reason, Reason::RolledBack);
            assert!(said.message.contains("assistant-new failed and assistant-old serves again"));
        }
    }
}

#[test]
fn what_failed_stays_down_until_the_spec_changes_or_the_memory_is_taken_away() {
    let held = memory(json!({"good": "old", "failed": "CorruptWeights: cut short"}));
    let again = |to, held| {
        play(Play {
            to,
            planned: Update::Surge,
            strategy: RolloutStrategy::Recreate,
            deployment: Some(deployment("old", held, "")),
            pods: vec![pod("old", "serves")],
        })
    };
    assert_eq!(again("new", held.clone()).revision.hash, "old");
    let back = again("old", held.clone());
    assert_eq!((back.revision.hash.as_str(), back.memory.kept()), ("old", None));
    let other = again("other", held);
    assert_eq!(
        (other.revision.hash.as_str(), other.memory.good.as_deref()),
        ("other", Some("old"))
    );
    assert_eq!(again("new", None).revision.hash, "new", "tried once more");
}

#[test]
fn a_pod_that_fails_after_its_rollout_is_over_is_no_reason_to_go_back() {
    let with = |does: &str, held| {
        play(Play {
            to: "new",
            planned: Update::Surge,
            strategy: RolloutStrategy::Recreate,
            deployment: Some(deployment("new", held, "")),
            pods: vec![pod("new", does)],
        })
    };
    let over = with("serves", memory(json!({"good": "old"})));
    assert_eq!(over.memory.kept(), None, "nothing is kept of what is over");
    assert!(over.replaces);
    assert_eq!(with("silent", None).revision.hash, "new");
}

#[test]
fn an_outage_is_counted_once_from_the_last_answer_to_the_next() {
    let to = revision("new", Update::InPlace);
    let rollout = Rollout {
        revision: to.clone(),
        update: Update::InPlace,
        why: "why".into(),
        memory: Memory { to: "new".into(), ..Memory::default() },
        replaces: true,
        again: None,
    };
    let before = |state: &str, outage: Option<i64>, available: &str| -> LLMDeploymentStatus {
        serde_json::from_value(json!({
            "conditions": [{"type": "Available", "status": available, "reason": "r", "message": "",
                "lastTransitionTime": "2026-01-01T00:09:18Z"}],
            "rollout": {"revision": "assistant-new", "state": state, "strategy": "Recreate", "why": "then",
                "outageSeconds": outage},
        }))
        .unwrap()
    };
    let told = |before: &LLMDeploymentStatus, pods: &[Arc<Pod>]| {
        let engines = pods::engines(pods, Some("new"), NOW.parse().unwrap());
        let seen = Seen { before: Some(before), deployment: None, replicas: 1 };
        status(&rollout, &to, &engines, &seen, NOW.parse().unwrap())
    };
    let serves = [pod("new", "serves")];
    let silent = told(&before("Progressing", None, "False"), &[pod("new", "loads")]);
    assert_eq!((silent.state, silent.outage_seconds), (RolloutState::Progressing, None));
    let over = told(&before("Progressing", None, "False"), &serves);
    assert_eq!((over.state, over.outage_seconds), (RolloutState::Complete, Some(42)));
    assert_eq!((over.strategy, over.why.as_str()), (RolloutStrategy::Recreate, "then"));
    let later = told(&before("Complete", Some(42), "True"), &serves);
    assert_eq!(later.outage_seconds, Some(42));
    let killed = told(&before("Complete", Some(42), "False"), &serves);
    assert_eq!(killed.outage_seconds, Some(42), "not the rollout's");
    assert_eq!(told(&before("Progressing", None, "True"), &serves).outage_seconds, None);
}
