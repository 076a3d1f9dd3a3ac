//! The operator stopped at every single write between an object and its readiness: whoever comes after it finds its way
//! from what the API server holds, and leaves what one operator alone would have left.

use std::time::Duration;

use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use kube::ResourceExt;
use serde_json::json;

use crate::gate::{Gate, Moment};
use crate::world::World;

/// More than a way to readiness takes; a way without end is a failure.
const WRITES_MAX: u32 = 60;
/// An event follows the status that it tells of.
const LAST_WRITES: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_is_stopped_at_any_write_is_followed_by_one_that_goes_on() {
    let Some(world) = World::new("stops").await else { return };
    for write in 1..=WRITES_MAX {
        for moment in [Moment::Before, Moment::After] {
            if !is_stopped_and_followed(&world, write, moment).await {
                eprintln!("stopped before and after each of {} writes", write - 1);
                assert!(write > 10, "an object, its model and its children take more");
                return;
            }
        }
    }
    panic!("more than {WRITES_MAX} writes");
}

/// False where the way to readiness has fewer writes.
async fn is_stopped_and_followed(world: &World, write: u32, moment: Moment) -> bool {
    let name = format!("stopped-{write}-{moment:?}").to_lowercase();
    let gate = Gate::open(world, write, moment).await;
    let operator = world.operator_by(&gate.kubeconfig, &name);
    // A source of its own, or the facts would be there already; little memory, because the pods of all stay on one node.
    let spec = json!({"model": {"source": format!("pvc://models/{name}")}, "resources": {"memory": "384Mi"}});
    let story = world.bring_up(&name, spec);
    tokio::pin!(story);
    tokio::select! {
        () = gate.has_shut() => {}
        _ = &mut story => {
            return tokio::time::timeout(LAST_WRITES, gate.has_shut()).await.is_ok();
        }
    }
    drop(operator);
    let _heir = world.operator(&["--lease-name", &format!("after-{name}")]);
    story.await;
    nothing_is_missing_or_left_over(world, &name).await;
    true
}

async fn nothing_is_missing_or_left_over(world: &World, name: &str) {
    assert!(world.get::<Deployment>(name).await.is_some());
    assert!(world.get::<Service>(name).await.is_some());
    assert!(world.get::<ServiceAccount>(name).await.is_some());
    let revisions = world.list::<ControllerRevision>(&format!("plimsoll.dev/name={name}")).await;
    assert_eq!(revisions.len(), 1, "{revisions:#?}");
    let facts = world.list::<ConfigMap>("plimsoll.dev/model").await;
    let uid = world.get::<plimsoll_crds::LLMDeployment>(name).await.unwrap().uid();
    let owned = facts.iter().filter(|held| {
        held.owner_references().iter().any(|owner| Some(&owner.uid) == uid.as_ref())
    });
    assert_eq!(owned.count(), 1, "{facts:#?}");
    for job in world.list::<Job>("plimsoll.dev/model").await {
        world.eventually_gone::<Job>(&job.name_any()).await;
    }
}
