//! What users of other operators complained about, each with its thread, told to this one.

use serde_json::{Value, json};

use super::world::NAMESPACE;
use super::*;

fn hash_of(world: &World) -> String {
    let deployment = world.get("deployments", "assistant").unwrap();
    deployment["metadata"]["labels"]["plimsoll.dev/revision"].as_str().unwrap().to_owned()
}

fn declared(spec: Value) -> Arc<World> {
    let world = World::new();
    tell(&world, &mut Story::new(vec![act(move |world| world.declare("assistant", spec.clone()))]));
    world
}

fn after(world: &Arc<World>, spec: Value) {
    let change = move |world: &World| {
        world.merge("llmdeployments", "assistant", json!({"spec": spec}));
    };
    tell(world, &mut Story::new(vec![act(change)]));
}

fn fate(fate: &str) -> Value {
    json!({"podTemplate": {"metadata": {"annotations": {"fate": fate}}}})
}

/// kserve#1859, kserve#2037: Ready while the pods are in a crash loop.
#[test]
fn kserve_1859_pods_that_crash_are_never_called_ready() {
    let world = declared(fate("silent"));
    let (status, reason, message) = world.condition("assistant", "Ready").unwrap();
    assert_eq!((status.as_str(), reason.as_str()), ("False", "EngineCrashLooping"), "{message}");
}

/// dynamo#3567: a rollout is called successful because old pods are counted.
#[test]
fn dynamo_3567_old_pods_do_not_make_a_rollout_successful() {
    let world = declared(json!({"replicas": 2}));
    after(&world, fate("slow"));
    assert_eq!(world.serving("assistant").len(), 2, "the old ones");
    let object = world.get("llmdeployments", "assistant").unwrap();
    assert_eq!(object["status"]["readyReplicas"], 0);
    assert_eq!(object["status"]["rollout"]["state"], "Progressing");
    assert_eq!(world.condition("assistant", "Ready").unwrap().0, "False");
    assert_eq!(world.condition("assistant", "Available").unwrap().0, "True");
}

/// LLMKube#192, opendatahub-io/kserve#1435, kserve PR#5085: another version of the operator restarts every model, and
/// waits for ever where there is no spare GPU.
#[test]
fn llmkube_192_another_operator_rolls_no_pod_until_it_is_told_to_follow() {
    let world = declared(json!({}));
    // As an operator of another template left it: without the probe, with an engine of its own time.
    let first = hash_of(&world);
    let name = format!("assistant-{first}");
    let mut older = world.get("controllerrevisions", &name).unwrap();
    older["data"]["templateVersion"] = 0.into();
    let pod = &mut older["data"]["podTemplate"]["spec"]["containers"][0];
    pod.as_object_mut().unwrap().shift_remove("livenessProbe");
    pod["image"] = "plimsoll/engine:0".into();
    world.delete("controllerrevisions", &name);
    world.create("controllerrevisions", &name, older);
    tell(&world, &mut Story::new(vec![]));
    let image = |world: &World| {
        let deployment = world.get("deployments", "assistant").unwrap();
        deployment["spec"]["template"]["spec"]["containers"][0]["image"].clone()
    };
    assert_eq!(image(&world), "plimsoll/engine:0", "what the revision says stands");
    assert_silent(&world);

    after(&world, json!({"replicas": 2}));
    assert_eq!(
        (image(&world), hash_of(&world)),
        ("plimsoll/engine:0".into(), first.clone()),
        "scaling rolls nothing"
    );
    after(&world, json!({"rollout": {"operatorUpgrade": "Follow"}}));
    assert_eq!(image(&world), "plimsoll/engine:1");
    assert_ne!(hash_of(&world), first);
    assert_eq!(world.serving("assistant"), vec![hash_of(&world); 2]);
    assert_silent(&world);
}

/// LLMKube#607: a selector that cannot be changed leads into a hot loop.
#[test]
fn llmkube_607_a_selector_that_cannot_change_is_told_and_is_no_hot_loop() {
    let world = declared(json!({}));
    let mut other = world.get("deployments", "assistant").unwrap();
    other["spec"]["selector"] = json!({"matchLabels": {"app": "other"}});
    world.delete("deployments", "assistant");
    world.create("deployments", "assistant", other);
    let before = world.written();
    live(&world, settings(), async || wait(&world, 600).await);
    let (status, reason, message) = world.condition("assistant", "Stalled").unwrap();
    assert_eq!((status.as_str(), reason.as_str()), ("True", "ChildRejected"), "{message}");
    assert!(message.contains("Deployment assistant") && message.contains("immutable"), "{message}");
    let mut tries = world.writes().split_off(before);
    tries.retain(|write| write.key.resource == "deployments");
    assert!(tries.iter().all(|write| !write.done));
    // Two tries at each look, twice a minute, and some looks more while pods still come.
    assert!(tries.len() <= 2 * (2 * 10 + 10), "{}", tries.len());
}

/// kserve#5452, LLMKube#856: no say in how pods are replaced.
#[test]
fn kserve_5452_how_pods_are_replaced_is_the_users_choice_and_rolls_nothing_by_itself() {
    let world = declared(json!({}));
    let first = hash_of(&world);
    for (strategy, surge) in [("Recreate", 0), ("Surge", 1), ("Auto", 1)] {
        after(&world, json!({"rollout": {"strategy": strategy}}));
        let deployment = world.get("deployments", "assistant").unwrap();
        assert_eq!(
            deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"], surge,
            "{strategy}"
        );
        assert_eq!(hash_of(&world), first);
    }
}

/// dynamo#13559, kthena#1589: pods are killed seconds after they were told to end.
#[test]
fn dynamo_13559_a_pod_gets_its_whole_drain_before_it_is_killed() {
    let world = declared(json!({"rollout": {"drainSeconds": 300}}));
    let deployment = world.get("deployments", "assistant").unwrap();
    let pod = &deployment["spec"]["template"]["spec"];
    let arguments = pod["containers"][0]["args"].to_string();
    assert!(arguments.contains("--drain-timeout=300s"), "{arguments}");
    // Ten seconds in which endpoints catch up come before the drain.
    assert!(pod["terminationGracePeriodSeconds"].as_u64().unwrap() > 310);
}

/// restate-operator#138: a field that the API server writes its own way is applied 30,000 times an hour.
#[test]
fn restate_operator_138_what_the_server_writes_its_own_way_is_applied_once() {
    let resources =
        json!({"requests": {"cpu": "1000m", "memory": "2048Mi"}, "limits": {"memory": "2048Mi"}});
    let engine = json!({"name": "engine", "resources": resources});
    let world = declared(
        json!({"podTemplate": {"spec": {"containers": [engine], "imagePullSecrets": []}}}),
    );
    assert_eq!(world.condition("assistant", "Ready").unwrap().1, "Serving");
    let deployment = world.get("deployments", "assistant").unwrap();
    let held = &deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"];
    assert_eq!(held, &json!({"cpu": "1", "memory": "2Gi"}));
    assert_silent(&world);
    let applied = world.writes().into_iter().filter(|write| write.key.resource == "deployments");
    assert_eq!(applied.count(), 1);
}

/// k8s-nim-operator#271, #634: a read that fails once turns the status over.
#[test]
fn k8s_nim_operator_271_a_passing_failure_turns_no_condition() {
    let world = declared(json!({"replicas": 2}));
    let told = |world: &World| world.get("llmdeployments", "assistant").unwrap()["status"].clone();
    let before = told(&world);
    for seed in 0..4 {
        world.set_faults(Some(seed));
        live(&world, settings(), async || {
            for _ in 0..20 {
                wait(&world, 10).await;
                assert_eq!(told(&world), before);
            }
        });
    }
}

/// kserve#1859 again: what cannot be written must not keep status from telling of the pods.
#[test]
fn kserve_1859_while_children_cannot_be_written_status_tells_of_the_pods_as_they_are() {
    let world = declared(json!({}));
    let ready = || world.condition("assistant", "Ready").unwrap().0;
    live(&world, settings(), async || {
        rest(&world).await;
        assert_eq!(ready(), "True");
        world.refuse(Some("deployments"));
        world.merge("deployments", "assistant", json!({"spec": {"replicas": 0}}));
        wait(&world, 60).await;
        assert_eq!(ready(), "False");
        world.refuse(None);
        wait(&world, 120).await;
        assert_eq!(ready(), "True");
    });
}

/// kaito#1132: an update is minutes without an answer.
#[test]
fn kaito_1132_under_surge_no_fewer_pods_serve_than_before() {
    let world = declared(json!({"replicas": 2}));
    let change = json!({"spec": {"contextTokens": 1024}});
    live(&world, settings(), async || {
        world.merge("llmdeployments", "assistant", change.clone());
        for _ in 0..60 {
            wait(&world, 1).await;
            assert!(world.serving("assistant").len() >= 2);
        }
    });
    let object = world.get("llmdeployments", "assistant").unwrap();
    assert_eq!(object["status"]["rollout"]["state"], "Complete");
    assert_eq!(object["status"]["rollout"]["outageSeconds"], Value::Null);
    assert_eq!(world.serving("assistant"), vec![hash_of(&world); 2]);
}

/// kserve#4798, kserve PR#5398: what is broken cannot be deleted.
#[test]
fn kserve_4798_deletion_needs_no_operator_and_nothing_that_works() {
    let world = declared(fate("corrupt"));
    let theirs =
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"labels": {"app": "theirs"}}});
    world.delete("services", "assistant");
    world.create("services", "assistant", theirs);
    after(&world, json!({"model": {"source": "nowhere://"}, "replicas": 3}));
    let (_, reason, message) = world.condition("assistant", "Stalled").unwrap();
    assert_eq!(reason, "InvalidSpec", "{message}");
    // No operator from here on.
    world.delete("llmdeployments", "assistant");
    for _ in 0..10 {
        world.tick();
    }
    let store = world.store();
    let ours =
        store.objects.keys().filter(|key| key.namespace == NAMESPACE && key.resource != "events");
    let left: Vec<_> = ours.map(|key| key.resource.as_str()).collect();
    assert_eq!(left, ["services"], "theirs is left, ours is gone");
}
