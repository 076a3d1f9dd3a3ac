//! Several objects of one model: who joins while its Job runs, ends or is outgrown, and what becomes of a download that is
//! lost on the way.

use serde_json::json;

use super::*;

/// More than the Job of the simulation takes.
const LATE: Duration = Duration::from_secs(10);
/// Everything waited for here comes within this.
const SECONDS_MAX: u32 = 60;

fn declare(world: &World, name: &str) {
    let spec = json!({"model": {"source": "hf://org/tiny@main"},
        "resources": {"cpu": "1", "memory": "1Gi"}});
    world.declare(name, spec);
}

/// Seconds pass until there is a first one of `resource`.
async fn until_there(world: &World, resource: &str) -> Value {
    for _ in 0..SECONDS_MAX {
        if let Some((_, found)) = world.store().all(resource).into_iter().next() {
            return found;
        }
        wait(world, 1).await;
    }
    panic!("no {resource} came");
}

fn is_around_a_job(policy: &Value) -> bool {
    policy["metadata"]["labels"]["plimsoll.dev/model"].is_string()
}

fn policies_of_jobs(world: &World) -> usize {
    let policies = world.store().all("networkpolicies");
    policies.iter().filter(|(_, policy)| is_around_a_job(policy)).count()
}

fn jobs_made(world: &World) -> usize {
    made(world, "jobs", |_| true)
}

/// How many objects came that are as they should be.
fn made(world: &World, resource: &str, is_meant: impl Fn(&Value) -> bool) -> usize {
    let store = world.store();
    let made = store.log.iter().filter(|change| {
        change.key.resource == resource
            && change.before.is_none()
            && change.after.as_ref().is_some_and(&is_meant)
    });
    made.count()
}

/// At no moment did a pod of an inspect Job run without its policy.
fn assert_pods_were_guarded(world: &World) {
    let (mut pods, mut policies) = (BTreeSet::new(), BTreeSet::new());
    for change in &world.store().log {
        let (key, after) = (change.key.name.clone(), change.after.as_ref());
        let held = match change.key.resource.as_str() {
            "pods" => (
                &mut pods,
                after.is_some_and(|pod| {
                    pod["spec"]["containers"][0]["name"] == "inspect"
                        && pod["status"]["phase"] != "Succeeded"
                }),
            ),
            "networkpolicies" => (&mut policies, after.is_some_and(is_around_a_job)),
            _ => continue,
        };
        match held {
            (set, true) => set.insert(key),
            (set, false) => set.remove(&key),
        };
        assert!(pods.is_empty() || !policies.is_empty(), "{pods:?} without a policy: {change:?}");
    }
}

#[test]
fn who_joins_while_the_job_ends_hears_what_it_said_and_leaves_nothing_behind() {
    for shared in ["persistentvolumeclaims", "networkpolicies", "jobs"] {
        let world = World::new();
        live(&world, settings(), async || {
            declare(&world, "first");
            until_there(&world, "jobs").await;
            world.delay(shared, LATE);
            declare(&world, "second");
            // Its write is on the way, and whoever comes now waits behind it.
            wait(&world, 1).await;
            declare(&world, "third");
            wait(&world, 20).await;
            assert_eq!(world.take_delay(shared), Duration::ZERO, "{shared}: it was late");
            for name in ["first", "second", "third"] {
                let (_, reason, message) = world.condition(name, "Ready").unwrap();
                assert_eq!(reason, "Serving", "{shared}: {name}: {message}");
            }
            assert_eq!(world.store().all("jobs").len(), 0, "{shared}");
            assert_eq!(jobs_made(&world), 1, "{shared}");
            assert_eq!(policies_of_jobs(&world), 0, "{shared}: it goes with the Job");
            assert_eq!(made(&world, "networkpolicies", is_around_a_job), 1, "{shared}");
            rest(&world).await;
        });
        // Nobody was told of it as of a failure.
        for change in &world.store().log {
            let told = change.after.as_ref().map(|after| after["status"].to_string());
            assert!(!told.unwrap_or_default().contains("failed to write"), "{shared}: {change:?}");
        }
        assert_pods_were_guarded(&world);
        assert_silent(&world);
    }
}

#[test]
fn an_outgrown_job_gives_way_to_one_of_the_same_object_and_no_pod_runs_without_its_policy() {
    let world = World::new();
    live(&world, settings(), async || {
        declare(&world, "first");
        until_there(&world, "pods").await;
        let here = json!({"spec": {"nodeSelector": {"disk": "fast"}}});
        world.merge("llmdeployments", "first", json!({"spec": {"podTemplate": here}}));
        rest(&world).await;
        assert_eq!(jobs_made(&world), 2);
        assert_eq!(world.condition("first", "Ready").unwrap().1, "Serving");
        assert_eq!(policies_of_jobs(&world), 0, "it goes with the last Job");
    });
    assert_pods_were_guarded(&world);
    assert_silent(&world);
}

#[test]
fn a_download_is_known_only_once_a_job_has_filled_its_claim() {
    let world = World::new();
    tell(&world, &mut Story::new(vec![act(|world| declare(world, "first"))]));
    assert_eq!(jobs_made(&world), 1);
    let lose = |resource: &str| {
        let (key, _) = world.store().all(resource).remove(0);
        world.delete(resource, &key.name);
    };
    live(&world, settings(), async || {
        rest(&world).await;
        lose("persistentvolumeclaims");
        until_there(&world, "jobs").await;
        // Somebody deletes it while it fills the claim.
        lose("jobs");
        rest(&world).await;
    });
    assert_eq!(jobs_made(&world), 3, "the claim is filled all the same");
    assert_eq!(world.store().all("configmaps").len(), 1);
    assert_eq!(world.condition("first", "ModelReady").unwrap().0, "True");
    assert_pods_were_guarded(&world);
    assert_silent(&world);
}
