//! The operator against a simulated API server, in one process and with a clock that waits for nobody: the real
//! reconcile, its queue, caches and writer on one side of kube's client; objects, watches, garbage collection,
//! Deployments, Jobs and pods in simple steps on the other. Operators end where a test says, and the next one goes on.
//!
//! `PLIMSOLL_SOAK_SEEDS` makes a long run of what chance decides.

#![allow(clippy::unwrap_used)] // Functions that stories share are tests too.

mod complaints;
mod controllers;
mod crash;
mod faults;
mod merge;
mod models;
mod rollouts;
mod seeds;
mod server;
mod store;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kube::runtime::events::Reporter;
use plimsoll_crds::Clients;
use serde_json::Value;
use tokio::sync::watch;

use crate::apply::{Sharing, Taken};
use crate::desired::Settings;
use crate::events::Teller;
use crate::metrics::Metrics;
use crate::neighbours::Readings;
use crate::observe;
use crate::plan::Prices;
use crate::reconcile::{Considered, Context};
use crate::run;
use world::World;

/// Seconds without a change and without a write after which a world is at rest; more than the operator waits before it
/// looks again at what no watch tells.
const REST_SECONDS: u32 = 35;
/// Seconds within which every world comes to rest.
const REST_SECONDS_MAX: u32 = 3_000;

/// What people do, one after the other; the world comes to rest between.
type Act = Box<dyn Fn(&World)>;

/// Acts, and how far they are. Goes on where the operator that saw its beginning ended.
struct Story {
    acts: Vec<Act>,
    done: usize,
}

impl Story {
    fn new(acts: Vec<Act>) -> Story {
        Story { acts, done: 0 }
    }

    /// Rests first, because the operator that saw the last act may have ended.
    async fn tell(&mut self, world: &World) {
        rest(world).await;
        while let Some(act) = self.acts.get(self.done) {
            self.done += 1;
            act(world);
            rest(world).await;
        }
    }
}

fn act(act: impl Fn(&World) + 'static) -> Act {
    Box::new(act)
}

/// Lets time pass until nothing changes any more.
async fn rest(world: &World) {
    let mut still = 0;
    for _ in 0..REST_SECONDS_MAX {
        let before = (world.store().version(), world.written());
        wait(world, 1).await;
        still = if before == (world.store().version(), world.written()) { still + 1 } else { 0 };
        if still == REST_SECONDS {
            return;
        }
    }
    let writes = world.writes();
    panic!("no rest; the last writes: {:#?}", &writes[writes.len().saturating_sub(12)..]);
}

/// Lets seconds pass.
async fn wait(world: &World, seconds: u32) {
    for _ in 0..seconds {
        tokio::time::sleep(Duration::from_secs(1)).await;
        world.tick();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// At a write.
    Killed,
    /// With its story.
    Told,
}

/// One operator, with a runtime of its own that ends as a process does: at once.
fn live(world: &Arc<World>, settings: Settings, story: impl AsyncFnOnce()) -> Ended {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let client = server::client(world);
        let (caches, triggers) = observe::start(&client, None);
        let reporter = Reporter {
            controller: "plimsoll.dev/operator".to_owned(),
            instance: Some("simulated".into()),
        };
        let clock = world.clone();
        let context = Arc::new(Context {
            teller: Teller::new(client.clone(), reporter),
            client,
            namespace: None,
            caches,
            advices: Arc::default(),
            metrics: Arc::new(Metrics::new()),
            sharing: Sharing::default(),
            taken: Taken::default(),
            settings,
            clock: Arc::new(move || clock.clock()),
            considered: Considered::default(),
            readings: Readings::default(),
            prices: Prices::listed(&[]).unwrap(),
            measurements: Arc::default(),
        });
        let (_stop, stopped) = watch::channel(false);
        tokio::select! {
            biased;
            () = world.ended() => Ended::Killed,
            () = run::control(context, triggers, stopped) => panic!("the operator ended by itself"),
            () = story() => Ended::Told,
        }
    })
}

fn settings() -> Settings {
    Settings {
        engine_image: "plimsoll/engine:1".to_owned(),
        allow_host_path: false,
        hub_endpoint: None,
        home: "plimsoll-system".to_owned(),
        clients: Clients::Cluster,
        monitor_labels: BTreeMap::new(),
    }
}

/// Tells a story to its end, with a new operator after each that was ended.
fn tell(world: &Arc<World>, story: &mut Story) {
    while live(world, settings(), async || story.tell(world).await) == Ended::Killed {
        // What others do while nobody operates.
        world.tick();
    }
}

/// A further operator writes nothing.
fn assert_silent(world: &Arc<World>) {
    let (before, stood) = (world.written(), world.everything());
    live(world, settings(), async || rest(world).await);
    let writes = world.writes().split_off(before);
    let changed = difference(&stood, &world.everything());
    assert!(writes.is_empty(), "a further pass wrote: {changed}: {writes:#?}");
}

/// The first place in which two worlds differ that should be the same.
fn difference(expected: &Value, found: &Value) -> String {
    match (expected, found) {
        (Value::Object(expected), Value::Object(found)) => {
            let names: BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
            let absent = Value::Null;
            let of = |side: &serde_json::Map<String, Value>, name: &String| {
                side.get(name).unwrap_or(&absent).clone()
            };
            names
                .into_iter()
                .map(|name| (name, of(expected, name), of(found, name)))
                .find(|(_, expected, found)| expected != found)
                .map_or_else(String::new, |(name, expected, found)| {
                    format!("{name}.{}", difference(&expected, &found))
                })
        }
        _ => format!(": {expected} expected, {found} found"),
    }
}
