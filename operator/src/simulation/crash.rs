//! Every story is told with an operator that ends at its first write, its second, and so on, before the write is done and
//! after it. Whatever the write, the next operator brings about the same objects, and one more pass writes nothing.

use serde_json::{Value, json};

use super::world::Moment;
use super::*;

/// Tells `acts` without a fault, then once for every write and moment.
fn survives_every_write(acts: impl Fn() -> Vec<Act>) {
    let undisturbed = World::new();
    tell(&undisturbed, &mut Story::new(acts()));
    assert_silent(&undisturbed);
    let expected = undisturbed.standing();
    let writes = undisturbed.writes();
    assert!(writes.len() > 5, "there is something to interrupt: {writes:#?}");
    for number in 1..=writes.len() {
        for moment in [Moment::Before, Moment::After] {
            let world = World::new();
            world.end_at(number, moment);
            tell(&world, &mut Story::new(acts()));
            let write = &writes[number - 1];
            let standing = world.standing();
            assert!(
                standing == expected,
                "ended {moment:?} write {number} ({} {}): {}",
                write.method,
                write.key.resource,
                difference(&expected, &standing)
            );
            assert_silent(&world);
        }
    }
}

fn declare(spec: Value) -> Act {
    act(move |world| world.declare("assistant", spec.clone()))
}

fn change(spec: Value) -> Act {
    act(move |world| world.merge("llmdeployments", "assistant", json!({"spec": spec})))
}

#[test]
fn a_new_object_survives_an_end_at_every_write() {
    survives_every_write(|| vec![declare(json!({}))]);
}

#[test]
fn a_download_survives_an_end_at_every_write() {
    survives_every_write(|| vec![declare(json!({"model": {"source": "hf://org/tiny@main"}}))]);
}

#[test]
fn scaling_and_suspending_survive_an_end_at_every_write() {
    survives_every_write(|| {
        vec![
            declare(json!({})),
            change(json!({"replicas": 3})),
            change(json!({"replicas": 1})),
            change(json!({"suspend": true})),
            change(json!({"suspend": false, "replicas": 2})),
        ]
    });
}

#[test]
fn an_update_and_the_way_back_survive_an_end_at_every_write() {
    survives_every_write(|| {
        vec![
            declare(json!({"replicas": 2})),
            change(json!({"contextTokens": 1024})),
            change(json!({"contextTokens": null})),
        ]
    });
}

#[test]
fn another_model_survives_an_end_at_every_write() {
    survives_every_write(|| {
        vec![
            declare(json!({"model": {"source": "hf://org/tiny"}})),
            change(json!({"model": {"source": "hf://org/other"}})),
        ]
    });
}

#[test]
fn a_shared_model_survives_an_end_at_every_write() {
    survives_every_write(|| {
        vec![
            act(|world| {
                world.declare("assistant", json!({"resources": {"cpu": "1", "memory": "1Gi"}}));
                world.declare("other", json!({"resources": {"cpu": "1", "memory": "1Gi"}}));
            }),
            change(json!({"model": {"source": "pvc://elsewhere/model"}})),
        ]
    });
}

#[test]
fn a_deletion_and_the_same_name_again_survive_an_end_at_every_write() {
    survives_every_write(|| {
        vec![
            declare(json!({"replicas": 2})),
            act(|world| world.delete("llmdeployments", "assistant")),
            declare(json!({"contextTokens": 512})),
        ]
    });
}

#[test]
fn a_repair_survives_an_end_at_every_write() {
    survives_every_write(|| {
        vec![
            declare(json!({})),
            act(|world| {
                world.merge("deployments", "assistant", json!({"spec": {"replicas": 5}}));
                world.delete("services", "assistant");
                world.delete("configmaps", "assistant");
            }),
        ]
    });
}

#[test]
fn a_way_back_in_place_survives_an_end_at_every_write() {
    survives_every_write(|| {
        vec![
            declare(json!({"rollout": {"strategy": "Recreate"}})),
            change(json!({"podTemplate": {"metadata": {"annotations": {"fate": "corrupt"}}}})),
            change(json!({"contextTokens": 1024, "podTemplate": null})),
        ]
    });
}

#[test]
fn following_the_operator_survives_an_end_at_every_write() {
    survives_every_write(|| {
        vec![
            declare(json!({"replicas": 2})),
            // As if another operator had made it.
            act(|world| {
                let revisions = world.store().all("controllerrevisions");
                let (key, mut revision) = revisions.into_iter().next().unwrap();
                revision["data"]["engineImage"] = "plimsoll/engine:0".into();
                world.delete("controllerrevisions", &key.name);
                world.create("controllerrevisions", &key.name, revision);
            }),
            change(json!({"rollout": {"operatorUpgrade": "Follow"}})),
        ]
    });
}

#[test]
fn a_revision_that_never_serves_survives_an_end_at_every_write() {
    survives_every_write(|| {
        vec![
            declare(json!({})),
            change(json!({"podTemplate": {"metadata": {"annotations": {"fate": "corrupt"}}}})),
            change(json!({"podTemplate": null})),
        ]
    });
}

#[test]
fn what_a_lost_watch_did_not_tell_is_repaired_all_the_same() {
    for kind in
        ["deployments", "services", "serviceaccounts", "poddisruptionbudgets", "networkpolicies"]
    {
        let world = World::new();
        tell(&world, &mut Story::new(vec![declare(json!({"replicas": 2}))]));
        live(&world, settings(), async || {
            rest(&world).await;
            world.miss(kind);
            world.delete(kind, "assistant");
            rest(&world).await;
            assert!(world.get(kind, "assistant").is_some(), "{kind} deleted");
            world.miss(kind);
            let instance = "app.kubernetes.io/instance";
            world.merge(kind, "assistant", json!({"metadata": {"labels": {instance: "edited"}}}));
            rest(&world).await;
            let held = world.get(kind, "assistant").unwrap();
            assert_eq!(held["metadata"]["labels"][instance], "assistant", "{kind} edited");
        });
    }
}

#[test]
fn a_job_whose_pod_is_gone_before_it_was_heard_is_run_again() {
    let world = World::new();
    world.declare("assistant", json!({}));
    live(&world, settings(), async || {
        while world.store().all("jobs").is_empty() {
            wait(&world, 1).await;
        }
    });
    for _ in 0..5 {
        world.tick();
    }
    let pods = world.store().all("pods");
    pods.iter().for_each(|(key, _)| world.delete("pods", &key.name));
    for _ in 0..5 {
        world.tick();
    }
    let (_, job) = world.store().all("jobs").remove(0);
    assert_eq!(job["status"]["conditions"][0]["type"], "Complete");
    assert!(world.store().all("pods").is_empty());
    tell(&world, &mut Story::new(vec![]));
    assert_eq!(world.condition("assistant", "Ready").unwrap().1, "Serving");
}
