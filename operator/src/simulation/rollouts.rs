//! Rollouts that go wrong, children that other hands touch: what stands, what is said, what it cost.

use serde_json::{Value, json};

use super::world::{NAMESPACE, Write};
use super::*;

const GOOD: &str = "assistant";

fn declared(spec: Value) -> Arc<World> {
    let world = World::new();
    tell(&world, &mut Story::new(vec![act(move |world| world.declare(GOOD, spec.clone()))]));
    assert_eq!(said(&world, "Ready").1, "Serving");
    world
}

fn change(world: &Arc<World>, spec: Value) {
    let change = move |world: &World| world.merge("llmdeployments", GOOD, json!({"spec": spec}));
    tell(world, &mut Story::new(vec![act(change)]));
}

fn said(world: &World, kind: &str) -> (String, String, String) {
    world.condition(GOOD, kind).unwrap_or_default()
}

fn status(world: &World) -> Value {
    world.get("llmdeployments", GOOD).unwrap()["status"].clone()
}

fn fate(fate: &str) -> Value {
    json!({"podTemplate": {"metadata": {"annotations": {"fate": fate}}}})
}

#[test]
fn a_bad_revision_under_surge_stops_with_the_reason_and_old_pods_serve_until_the_spec_is_set_back()
{
    let world = declared(json!({"replicas": 2}));
    let good = status(&world)["revision"].clone();
    change(&world, fate("corrupt"));
    let (ready, reason, message) = said(&world, "Ready");
    assert_eq!((ready.as_str(), reason.as_str()), ("False", "CorruptWeights"));
    assert!(
        message.contains("truncated") && message.contains("2 older pods go on serving"),
        "{message}"
    );
    assert!(message.contains("set it back"), "{message}");
    assert_eq!(said(&world, "Stalled").1, "CorruptWeights");
    assert_eq!(said(&world, "Available").0, "True");
    assert_eq!(world.serving(GOOD).len(), 2);
    assert_eq!(status(&world)["rollout"]["state"], "Stopped");
    assert!(world.told().iter().any(|note| note.contains("has stopped")), "{:?}", world.told());
    let pods = world.store().all("pods").len();
    change(&world, json!({"podTemplate": null}));
    assert_eq!(said(&world, "Ready").1, "Serving");
    assert_eq!(status(&world)["revision"], good, "the revision that stood is taken again");
    assert!(world.store().all("pods").len() < pods, "the bad pod is gone");
    assert_silent(&world);
}

#[test]
fn under_a_spec_that_cannot_work_what_runs_is_kept_repaired_and_told() {
    let world = declared(json!({"replicas": 2}));
    let before = status(&world);
    change(&world, json!({"model": {"source": "nowhere://"}, "replicas": 3}));
    assert_eq!(said(&world, "Stalled").1, "InvalidSpec");
    assert_eq!(said(&world, "Available").0, "True");
    let kept = ["revision", "plan", "model", "url", "replicas", "readyReplicas"];
    for field in kept {
        assert_eq!(status(&world)[field], before[field], "{field}");
    }
    assert_silent(&world);
    for (resource, name) in [("services", GOOD), ("deployments", GOOD)] {
        world.delete(resource, name);
        live(&world, settings(), async || rest(&world).await);
        assert!(world.get(resource, name).is_some(), "{resource}");
    }
    assert_eq!(said(&world, "Stalled").1, "InvalidSpec");
    change(&world, json!({"suspend": true}));
    assert!(world.serving(GOOD).is_empty());
    change(&world, json!({"suspend": false}));
    assert_eq!(world.serving(GOOD).len(), 3, "none are left, so as many as the spec has");
    change(&world, json!({"model": {"source": "pvc://models/tiny"}}));
    assert_eq!(said(&world, "Ready").1, "Serving");
    assert_eq!(
        status(&world)["revision"],
        before["revision"],
        "the revision of the spec that worked"
    );
    assert_eq!(world.serving(GOOD).len(), 3);
    assert_silent(&world);
}

#[test]
fn a_changed_spec_is_told_of_while_what_it_needs_cannot_be_written() {
    let world = declared(json!({}));
    let before = status(&world);
    live(&world, settings(), async || {
        rest(&world).await;
        world.refuse(Some("controllerrevisions"));
        world.merge("llmdeployments", GOOD, json!({"spec": {"contextTokens": 1024}}));
        wait(&world, 60).await;
        let object = world.get("llmdeployments", GOOD).unwrap();
        assert_eq!(status(&world)["observedGeneration"], object["metadata"]["generation"]);
        let (ready, reason, message) = said(&world, "Ready");
        assert_eq!((ready.as_str(), reason.as_str()), ("False", "Accepted"), "{message}");
        assert!(message.contains("ControllerRevision") && message.contains(": "), "{message}");
        assert_eq!(said(&world, "Reconciling").0, "True");
        assert_eq!(said(&world, "Available").0, "True");
        assert_eq!(status(&world)["revision"], before["revision"]);
        world.refuse(None);
        wait(&world, 120).await;
    });
    assert_eq!(said(&world, "Ready").1, "Serving");
    assert_ne!(status(&world)["revision"], before["revision"]);
}

#[test]
fn a_spec_is_not_called_in_force_while_a_child_of_it_cannot_be_written() {
    let changes = [
        ("networkpolicies", json!({"network": {"clients": "Namespace"}})),
        ("deployments", json!({"contextTokens": 1024})),
    ];
    for (resource, spec) in changes {
        let world = declared(json!({}));
        live(&world, settings(), async || {
            rest(&world).await;
            world.refuse(Some(resource));
            world.merge("llmdeployments", GOOD, json!({"spec": spec}));
            for _ in 0..30 {
                wait(&world, 4).await;
                let object = world.get("llmdeployments", GOOD).unwrap();
                let told = &object["status"]["observedGeneration"];
                let is_told = told == &object["metadata"]["generation"];
                assert!(!is_told || said(&world, "Ready").0 == "False", "{resource}");
            }
            assert_eq!(said(&world, "Ready").1, "Accepted", "{resource}");
            assert_eq!(said(&world, "Available").0, "True", "{resource}");
            world.refuse(None);
            wait(&world, 120).await;
        });
        assert_eq!(said(&world, "Ready").1, "Serving", "{resource}");
        assert!(
            !world.told().iter().any(|note| note.contains("another hand")),
            "{:?}",
            world.told()
        );
        assert_silent(&world);
    }
}

#[test]
fn under_a_spec_that_cannot_work_and_a_server_that_takes_no_write_pods_are_told_as_they_are() {
    let world = declared(json!({}));
    change(&world, json!({"model": {"source": "nowhere://"}}));
    live(&world, settings(), async || {
        rest(&world).await;
        world.refuse(Some("deployments"));
        world.merge("deployments", GOOD, json!({"spec": {"replicas": 0}}));
        wait(&world, 60).await;
        assert_eq!(said(&world, "Stalled").1, "InvalidSpec");
        assert_eq!(said(&world, "Available").0, "False");
        world.refuse(None);
        wait(&world, 120).await;
        assert_eq!(said(&world, "Available").0, "True");
    });
}

#[test]
fn a_revision_that_does_not_come_up_under_surge_stops_after_the_deadline() {
    let world = declared(json!({}));
    change(&world, fate("slow"));
    assert_eq!(said(&world, "Ready").1, "RollingOut");
    live(&world, settings(), async || {
        wait(&world, 700).await;
        rest(&world).await;
    });
    let (_, reason, message) = said(&world, "Stalled");
    assert_eq!(reason, "RolloutStopped", "{message}");
    assert!(message.contains("1 older pods go on serving"), "{message}");
    assert_eq!(world.serving(GOOD).len(), 1);
}

#[test]
fn a_bad_revision_in_place_gives_way_to_the_last_good_one_and_its_outage_is_told() {
    let world = declared(json!({"rollout": {"strategy": "Recreate"}}));
    let good = status(&world)["revision"].clone();
    change(&world, fate("corrupt"));
    let (ready, reason, message) = said(&world, "Ready");
    assert_eq!((ready.as_str(), reason.as_str()), ("False", "RolledBack"));
    assert!(message.contains("CorruptWeights") && message.contains("set it back"), "{message}");
    assert_eq!(said(&world, "Stalled").1, "RolledBack");
    assert_eq!(said(&world, "Available").0, "True");
    assert_eq!(status(&world)["revision"], good);
    assert_eq!(world.serving(GOOD).len(), 1);
    let rollout = &status(&world)["rollout"];
    assert_eq!(
        (&rollout["state"], &rollout["strategy"]),
        (&json!("RolledBack"), &json!("Recreate"))
    );
    let outage = rollout["outageSeconds"].as_i64().unwrap();
    assert!((3..30).contains(&outage), "{outage}");
    let told = format!("no pod answered for {outage} s");
    assert!(world.told().iter().any(|note| note.contains(&told)), "{:?}", world.told());
    assert_silent(&world);

    // Once more, by hand.
    let forget = json!({"metadata": {"annotations": {"plimsoll.dev/rollout": null}}});
    let before = world.written();
    tell(
        &world,
        &mut Story::new(vec![act(move |world| world.merge("deployments", GOOD, forget.clone()))]),
    );
    assert!(world.written() > before + 1, "it was tried");
    assert_eq!(said(&world, "Ready").1, "RolledBack");
    // And the spec as it was.
    change(&world, json!({"podTemplate": null}));
    assert_eq!(said(&world, "Ready").1, "Serving");
    assert_eq!(status(&world)["rollout"]["state"], "Complete");
    assert_silent(&world);
}

#[test]
fn a_good_revision_in_place_tells_what_it_cost() {
    let world = declared(json!({"rollout": {"strategy": "Recreate"}}));
    assert_eq!(
        status(&world)["rollout"]["outageSeconds"],
        Value::Null,
        "the first start is no outage"
    );
    change(&world, json!({"contextTokens": 1024}));
    let rollout = &status(&world)["rollout"];
    assert_eq!(rollout["state"], "Complete");
    assert!((2..20).contains(&rollout["outageSeconds"].as_i64().unwrap()), "{rollout}");
    assert!(rollout["why"].as_str().unwrap().contains("Recreate"), "{rollout}");
    change(&world, json!({"contextTokens": 512, "rollout": {"strategy": "Surge"}}));
    assert_eq!(status(&world)["rollout"]["outageSeconds"], Value::Null);
}

#[test]
fn where_the_room_for_one_pod_more_is_gone_an_update_goes_on_in_place_and_says_so() {
    let world = declared(json!({"resources": {"cpu": "3"}}));
    // Planned with room for two; then another pod comes.
    let asks = json!({"name": "c", "resources": {"requests": {"cpu": "4"}}});
    let neighbour = json!({"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [asks], "nodeName": "node-0"},
        "status": {"phase": "Running", "conditions": []}});
    live(&world, settings(), async || {
        world.merge("llmdeployments", GOOD, json!({"spec": {"contextTokens": 1024}}));
        // The plan is made before the neighbour comes, the pod after it.
        while world.get("deployments", GOOD).unwrap()["metadata"]["generation"] == 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        world.create("pods", "neighbour", neighbour.clone());
        wait(&world, 60).await;
        let (_, reason, message) = said(&world, "Ready");
        assert_eq!(reason, "Unschedulable", "{message}");
        assert_eq!(world.serving(GOOD).len(), 1, "the old pod serves while there is hope");
        wait(&world, 90).await;
        rest(&world).await;
    });
    assert_eq!(said(&world, "Ready").1, "Serving");
    let rollout = &status(&world)["rollout"];
    assert_eq!((&rollout["state"], &rollout["strategy"]), (&json!("Complete"), &json!("Recreate")));
    assert!(rollout["why"].as_str().unwrap().contains("found no node for 120 s"), "{rollout}");
    assert!(rollout["outageSeconds"].as_i64().unwrap() < 20, "{rollout}");
    assert_silent(&world);
}

#[test]
fn what_another_hand_changed_or_deleted_is_put_right_and_named_in_an_event() {
    let world = declared(json!({}));
    let patch = json!({"spec": {"ports": [{"name": "http", "port": 81, "protocol": "TCP"}]}});
    let hands: Vec<Act> = vec![
        act(|world| world.merge("deployments", GOOD, json!({"spec": {"replicas": 5}}))),
        act(move |world| world.merge("services", GOOD, patch.clone())),
        act(|world| world.delete("serviceaccounts", GOOD)),
    ];
    let before = world.standing();
    tell(&world, &mut Story::new(hands));
    assert_eq!(world.standing(), before);
    let told = world.told();
    for expected in [
        "Deployment assistant: spec.replicas was changed by another hand",
        "Service assistant: spec.ports",
        "ServiceAccount assistant was deleted by another hand",
    ] {
        assert!(told.iter().any(|note| note.starts_with(expected)), "{expected}: {told:#?}");
    }
    // What people change through the object is no repair.
    let count =
        |world: &World| world.told().iter().filter(|note| note.contains("another hand")).count();
    let repairs = count(&world);
    change(&world, json!({"replicas": 3, "contextTokens": 512}));
    assert_eq!(count(&world), repairs);
}

#[test]
fn a_child_of_someone_else_is_left_alone_and_named() {
    let world = World::new();
    let theirs = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"labels": {"app": "theirs"}},
        "spec": {"replicas": 0, "selector": {"matchLabels": {"app": "theirs"}}, "template": {"spec": {}}}});
    world.create("deployments", GOOD, theirs);
    let version =
        |world: &World| world.get("deployments", GOOD).unwrap()["metadata"]["generation"].clone();
    let held = version(&world);
    tell(&world, &mut Story::new(vec![act(|world| world.declare(GOOD, json!({})))]));
    let (_, reason, message) = said(&world, "Stalled");
    assert_eq!(reason, "ChildRejected");
    assert!(
        message.contains("Deployment assistant") && message.contains("belongs to"),
        "{message}"
    );
    assert_eq!(version(&world), held);
    let tried = world.writes().into_iter().filter(|write| write.key.resource == "deployments");
    let done: Vec<bool> = tried.map(|write| write.done).collect();
    assert_eq!(done, [false], "asked for once as if it were free, and refused");
    assert_eq!(world.store().all("deployments").len(), 1);
    assert!(world.store().objects.keys().any(|key| key.namespace == NAMESPACE));
}

#[test]
fn children_of_all_come_before_words_about_any_and_all_are_told_of() {
    const OBJECTS: usize = 60;
    let world = World::new();
    let mut story = Story::new(vec![
        // Whoever comes first learns the model.
        act(|world| world.declare("first", json!({}))),
        act(|world| (0..OBJECTS).for_each(|index| world.declare(&format!("o-{index}"), json!({})))),
    ]);
    tell(&world, &mut story);
    let of_them = |write: &Write| write.key.name.starts_with("o-");
    let kinds: Vec<String> = world
        .writes()
        .into_iter()
        .filter(of_them)
        .map(|write| write.key.resource)
        .filter(|resource| ["deployments", "llmdeployments"].contains(&resource.as_str()))
        .collect();
    let first_word = kinds.iter().position(|kind| kind == "llmdeployments").unwrap();
    assert!(first_word > OBJECTS - 20, "{first_word} children before the first word: {kinds:?}");
    for index in 0..OBJECTS {
        let object = world.get("llmdeployments", &format!("o-{index}")).unwrap();
        assert_eq!(object["status"]["observedGeneration"], 1, "{object}");
    }
    assert_silent(&world);
}
