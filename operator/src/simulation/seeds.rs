//! Thousands of small worlds, each from a seed: people who change their minds, operators that end anywhere, an API server
//! that is slow, says no, does what it says it did not, forgets watches and sends them late, a clock that jumps. Once
//! that is over, the cluster comes to what the spec says, and one more pass writes nothing.

use serde_json::{Value, json};

use super::faults::Chance;
use super::world::{Moment, NAMESPACE};
use super::*;

/// Worlds of a short run.
const SEEDS: u64 = 60;
/// Acts of one world.
const ACTS_MAX: u64 = 6;
/// More than a watch or a reconcile that has failed often waits before it tries again, and than the deadline of a
/// Deployment whose pods never serve.
const SETTLE_SECONDS: u32 = 750;
/// The operator's clock is off by up to this.
const SKEW_SECONDS_MAX: u64 = 7_200;

/// The first seed of a run, to see one world again.
fn first() -> u64 {
    std::env::var("PLIMSOLL_SOAK_FIRST")
        .map_or(0, |seed| seed.parse().expect("PLIMSOLL_SOAK_FIRST is a number"))
}

fn seeds() -> u64 {
    std::env::var("PLIMSOLL_SOAK_SEEDS")
        .map_or(SEEDS, |seeds| seeds.parse().expect("PLIMSOLL_SOAK_SEEDS is a number"))
}

#[test]
fn whatever_goes_wrong_the_cluster_comes_to_what_the_spec_says() {
    let workers = std::thread::available_parallelism().unwrap().get() as u64;
    let some_worlds = |worker: u64| {
        let seeds = (first() + worker..first() + seeds()).step_by(workers as usize);
        seeds.map(|seed| (seed, outcome_of(seed))).collect::<Vec<_>>()
    };
    // A world has a runtime of its own, so that worlds go on side by side.
    let told: Vec<_> = std::thread::scope(|scope| {
        let working: Vec<_> =
            (0..workers).map(|worker| scope.spawn(move || some_worlds(worker))).collect();
        working.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    let (mut writes, mut ends, mut failed) = (0, 0, Vec::new());
    for (seed, told) in told {
        match told {
            Some((written, ended)) => {
                writes += written;
                ends += ended;
            }
            None => failed.push(seed),
        }
    }
    failed.sort_unstable();
    let figures = json!({"worlds": seeds(), "writes": writes, "operatorsEnded": ends,
        "failed": failed.len()});
    eprintln!("{figures}");
    if let Ok(folder) = std::env::var("PLIMSOLL_SOAK_RESULTS") {
        std::fs::write(format!("{folder}/simulation.json"), format!("{figures:#}\n")).unwrap();
    }
    assert!(failed.is_empty(), "worlds that did not come to rest: seeds {failed:?}");
    assert!(ends >= seeds() / 4, "operators do end: {ends}");
}

/// Nothing where the world did not come to what it should.
fn outcome_of(seed: u64) -> Option<(usize, u64)> {
    let told = std::panic::catch_unwind(|| one_world(seed)).ok();
    if told.is_none() {
        eprintln!("that was seed {seed}");
    }
    told
}

/// Writes, and operators that ended.
fn one_world(seed: u64) -> (usize, u64) {
    let world = World::new();
    let mut chance = Chance(seed);
    world.set_faults(Some(seed ^ 0x5eed));
    let mut acts = 1 + chance.below(ACTS_MAX);
    let mut ends = 0;
    world.declare("assistant", json!({}));
    loop {
        if chance.one_in(2) {
            let moment = if chance.one_in(2) { Moment::Before } else { Moment::After };
            world.end_at(world.written() + 1 + chance.below(25) as usize, moment);
        }
        let ended = live(&world, settings(), async || {
            while acts > 0 {
                acts -= 1;
                wait(&world, chance.below(40) as u32).await;
                something_happens(&world, &mut chance);
            }
            wait(&world, 20).await;
            world.set_faults(None);
            world.end_never();
            wait(&world, SETTLE_SECONDS).await;
            rest(&world).await;
        });
        if ended == Ended::Told {
            break;
        }
        ends += 1;
        for _ in 0..chance.below(20) {
            world.tick();
        }
    }
    let written = world.written();
    check(&world);
    assert_silent(&world);
    (written, ends)
}

fn something_happens(world: &World, chance: &mut Chance) {
    let change = |spec: Value| world.merge("llmdeployments", "assistant", json!({"spec": spec}));
    match chance.below(12) {
        0 | 1 => change(json!({"replicas": chance.below(4)})),
        2 | 3 => change(json!({"contextTokens": 512 << chance.below(3)})),
        4 => change(json!({"suspend": chance.one_in(2)})),
        5 => change(json!({"model": {"source": format!("pvc://models/{}", chance.below(2))}})),
        6 => world.merge("deployments", "assistant", json!({"spec": {"replicas": 7}})),
        7 => {
            let child = ["deployments", "services", "serviceaccounts"][chance.below(3) as usize];
            world.delete(child, "assistant");
        }
        8 => {
            *world.skew.lock().unwrap() =
                chance.below(2 * SKEW_SECONDS_MAX) as i64 - SKEW_SECONDS_MAX as i64
        }
        9 => {
            let pods = world.store().all("pods");
            if let Some((key, _)) = pods.first() {
                world.delete("pods", &key.name);
            }
        }
        10 => {
            let fate = ["corrupt", "silent"][chance.below(2) as usize];
            change(json!({"podTemplate": {"metadata": {"annotations": {"fate": fate}}}}));
        }
        _ => {
            world.delete("llmdeployments", "assistant");
            if chance.one_in(2) {
                world.declare("assistant", json!({"replicas": 1 + chance.below(2)}));
            }
        }
    }
    // Sooner or later a mistake is mended.
    if chance.one_in(2) {
        change(json!({"podTemplate": null}));
    }
}

/// What must hold of a world at rest.
fn check(world: &World) {
    let Some(object) = world.get("llmdeployments", "assistant") else {
        let store = world.store();
        let left = store
            .objects
            .keys()
            .filter(|key| key.namespace == NAMESPACE && key.resource != "events");
        let left: Vec<_> = left.collect();
        assert!(left.is_empty(), "a deleted object leaves nothing: {left:#?}");
        return;
    };
    let spec = &object["spec"];
    let suspended = spec["suspend"] == true;
    let replicas = if suspended { 0 } else { spec["replicas"].as_u64().unwrap() };
    let bad = !spec["podTemplate"].is_null();
    let (status, reason, message) = world.condition("assistant", "Ready").expect("Ready is said");
    let expected = match (suspended, replicas, bad) {
        (true, ..) => ("False", "Suspended"),
        (_, 0, _) => ("False", "ScaledToZero"),
        (_, _, false) => ("True", "Serving"),
        (_, _, true) => ("False", reason.as_str()),
    };
    assert_eq!((status.as_str(), reason.as_str()), expected, "{message}\n{object:#}");
    assert_eq!(object["status"]["observedGeneration"], object["metadata"]["generation"]);
    let deployment = world.get("deployments", "assistant").expect("a Deployment");
    assert_eq!(deployment["spec"]["replicas"], replicas);
    if !bad {
        let hash = deployment["metadata"]["labels"]["plimsoll.dev/revision"].as_str().unwrap();
        assert_eq!(
            world.serving("assistant"),
            vec![hash; replicas as usize],
            "only the standing revision"
        );
        assert_eq!(object["status"]["revision"], format!("assistant-{hash}"));
    }
    for child in ["services", "serviceaccounts"] {
        assert!(world.get(child, "assistant").is_some(), "{child}");
    }
    assert_eq!(world.get("poddisruptionbudgets", "assistant").is_some(), replicas > 1);
}
