//! What a hundred objects cost: time to children, memory, and requests at rest. The figures are printed for docs/perf.md;
//! what is asserted holds on any machine.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use kube::ResourceExt;
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::json;

use crate::world::{Operator, World, facts};

const OBJECTS: usize = 100;
/// Clients that create at once, as in the comparison with other operators.
const CLIENTS: usize = 8;
const REST: Duration = Duration::from_secs(20);
/// Measured at about half of this; peers written in Go take 90 to 150 MB for ten times as many.
const RSS_BYTES_MAX: u64 = 64 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_objects_get_their_children_and_cost_nothing_at_rest() {
    let Some(world) = World::new("hundred").await else { return };
    let operator = world.operator(&[]);
    world.declare("first", json!({})).await;
    world.finish_inspect(&facts(), 0).await;
    world.condition("first", "Ready", "False", "CreatingPods").await;
    let empty = resident_bytes(&operator);

    let writes_before = world.writes().len();
    let children = Arc::new(Mutex::new(HashMap::<String, Instant>::new()));
    let seen = children.clone();
    let deployments = world.api::<Deployment>();
    let watching = tokio::spawn(async move {
        let events = watcher(deployments, watcher::Config::default()).applied_objects();
        events
            .for_each(|deployment| {
                if let Ok(deployment) = deployment {
                    seen.lock().unwrap().entry(deployment.name_any()).or_insert_with(Instant::now);
                }
                std::future::ready(())
            })
            .await;
    });
    let began = Instant::now();
    let declared: Vec<(String, Instant)> = futures::stream::iter(0..OBJECTS)
        .map(|index| {
            let world = &world;
            async move {
                let name = format!("object-{index}");
                world.declare(&name, json!({})).await;
                (name, Instant::now())
            }
        })
        .buffer_unordered(CLIENTS)
        .collect()
        .await;
    let created = began.elapsed();
    for (name, _) in &declared {
        world.condition(name, "Ready", "False", "CreatingPods").await;
    }
    let told = began.elapsed();
    watching.abort();
    let mut delays: Vec<Duration> = {
        let children = children.lock().unwrap();
        declared.iter().map(|(name, at)| children[name].saturating_duration_since(*at)).collect()
    };
    delays.sort();

    let at_rest = world.requests_during(REST).await;
    let writes = world.writes().len() - writes_before;
    let full = resident_bytes(&operator);
    assert!(operator.stop());
    let before = world.writes().len();
    let operator = world.operator(&[]);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let at_restart = world.writes().len() - before;
    println!(
        "{OBJECTS} objects, {CLIENTS} clients: created in {created:.1?}; object -> Deployment p50 {} p90 {} \
         max {} ms; every status written after {told:.1?}; {:.1} writes per object; operator RSS {:.1} MiB empty, \
         {:.1} MiB with them; at rest for {REST:?}: {} requests beside watches; at a restart: {at_restart} writes; \
         load {}",
        delays[OBJECTS / 2].as_millis(),
        delays[OBJECTS * 9 / 10].as_millis(),
        delays[OBJECTS - 1].as_millis(),
        writes as f64 / OBJECTS as f64,
        mib(empty),
        mib(full),
        at_rest.len(),
        std::fs::read_to_string("/proc/loadavg").unwrap().trim(),
    );
    assert!(at_rest.is_empty(), "{at_rest:#?}");
    assert_eq!(at_restart, 0, "{}", operator.log());
    assert!(full < RSS_BYTES_MAX, "{full} bytes");
    assert!(writes <= OBJECTS * 9, "{writes} writes");
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn resident_bytes(operator: &Operator) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", operator.process())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}
