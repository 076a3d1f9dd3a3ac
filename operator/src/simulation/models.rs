//! What is looked for in a model while several want it, while its Job ends, and while what it was made from changes.

use serde_json::json;

use super::*;

/// More than the Job of the simulation takes.
const LATE: Duration = Duration::from_secs(10);

fn declare(world: &World, name: &str) {
    let spec = json!({"model": {"source": "hf://org/tiny@main"},
        "resources": {"cpu": "1", "memory": "1Gi"}});
    world.declare(name, spec);
}

async fn job_of(world: &World) -> Value {
    while world.store().all("jobs").is_empty() {
        wait(world, 1).await;
    }
    world.store().all("jobs").remove(0).1
}

/// The policy that stands around the Job of a model, by its label.
fn policies_of_jobs(world: &World) -> usize {
    let policies = world.store().all("networkpolicies");
    let of_job = |policy: &Value| policy["metadata"]["labels"]["plimsoll.dev/model"].is_string();
    policies.iter().filter(|(_, policy)| of_job(policy)).count()
}

#[test]
fn who_joins_while_the_job_ends_hears_what_it_said_and_leaves_nothing_behind() {
    for shared in ["persistentvolumeclaims", "networkpolicies", "jobs"] {
        let world = World::new();
        live(&world, settings(), async || {
            declare(&world, "first");
            job_of(&world).await;
            world.delay(shared, LATE);
            declare(&world, "second");
            wait(&world, 20).await;
            // The one whose write came too late, and one that waited behind it.
            for name in ["first", "second"] {
                let (_, reason, message) = world.condition(name, "Ready").unwrap();
                assert_eq!(reason, "Serving", "{shared}: {name}: {message}");
            }
            assert_eq!(world.store().all("jobs").len(), 0, "{shared}");
            assert_eq!(policies_of_jobs(&world), 0, "{shared}: it goes with the Job");
            rest(&world).await;
        });
        assert_silent(&world);
    }
}

#[test]
fn no_pod_of_an_outgrown_job_runs_without_its_policy() {
    let world = World::new();
    live(&world, settings(), async || {
        declare(&world, "first");
        let first = job_of(&world).await;
        while world.store().all("pods").is_empty() {
            wait(&world, 1).await;
        }
        let here = json!({"spec": {"nodeSelector": {"disk": "fast"}}});
        world.merge("llmdeployments", "first", json!({"spec": {"podTemplate": here}}));
        let mut jobs = BTreeSet::from([first["metadata"]["uid"].to_string()]);
        for _ in 0..60 {
            // Every step of the operator, not only every second of the cluster.
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_millis(100)).await;
                let runs = world.store().all("pods").iter().any(|(_, pod)| {
                    pod["spec"]["containers"][0]["name"] == "inspect"
                        && pod["status"]["phase"] != "Succeeded"
                });
                assert!(!runs || policies_of_jobs(&world) == 1, "a pod runs without its policy");
                let held = world.store().all("jobs");
                jobs.extend(held.iter().map(|(_, job)| job["metadata"]["uid"].to_string()));
            }
            world.tick();
        }
        assert_eq!(jobs.len(), 2, "the outgrown one and another");
        assert_eq!(world.condition("first", "Ready").unwrap().1, "Serving");
        assert_eq!(policies_of_jobs(&world), 0, "it goes with the last Job");
    });
}
