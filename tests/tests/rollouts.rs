//! Updates, deleted pods and killed engines under constant load on a real node. A short run proves that it works at all;
//! `make soak` makes each of them a hundred times and leaves the figures in docs/soak.

#![allow(clippy::unwrap_used)] // Functions that stories share are tests too.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use plimsoll_tests::cluster::{shared_node, wait_until};
use plimsoll_tests::http::Connection;
use plimsoll_tests::install;
use plimsoll_tests::load::{Outcome, under_load};
use plimsoll_tests::over::Over;
use plimsoll_tests::stage::{READY_MAX, Stage};
use serde_json::{Value, json};

/// Updates and deletions of a short run.
const TIMES: u32 = 2;
/// Clients of the constant load.
const CLIENTS: usize = 4;
/// Streams on each pod when one engine is killed.
const STREAMS: usize = 3;
const NAME: &str = "plim";

fn times() -> u32 {
    let wanted = std::env::var("PLIMSOLL_SOAK_ROLLOUTS");
    wanted.map_or(TIMES, |times| times.parse().expect("PLIMSOLL_SOAK_ROLLOUTS is a number"))
}

#[test]
fn updates_and_deleted_pods_lose_no_request_and_a_killed_engine_only_its_own_streams() {
    let Some(node) = shared_node() else { return };
    install::install(&node, &[]).unwrap();
    let stage = Stage::new(&node, "rollouts").unwrap();
    stage.claim_with("models", NAME, &install::root().join("tests/model")).unwrap();
    stage.apply(&manifest()).unwrap();
    stage.wait_ready(NAME).unwrap();
    let address = stage.service(NAME).unwrap();

    let updates =
        loaded(&stage, address, || (0..times()).for_each(|number| update(&stage, number)));
    let deletions = loaded(&stage, address, || (0..times()).for_each(|_| delete_a_pod(&stage)));
    let kills = times().div_ceil(10);
    let broken: Vec<usize> = (0..kills).map(|_| kill_an_engine(&stage)).collect();

    let figures = json!({
        "clients": CLIENTS, "replicas": 2,
        "surgeUpdates": figures(times(), &updates), "gracefulDeletions": figures(times(), &deletions),
        "killedEngines": {"times": kills, "streamsOnThePod": STREAMS, "streamsLost": broken,
            "streamsLostOnTheOtherPod": 0},
    });
    eprintln!("{figures:#}");
    if let Ok(folder) = std::env::var("PLIMSOLL_SOAK_RESULTS") {
        std::fs::write(format!("{folder}/rollouts.json"), format!("{figures:#}\n")).unwrap();
    }
    for (what, (outcome, _)) in [("updates", &updates), ("deletions", &deletions)] {
        assert!(outcome.lost.is_empty(), "{what} lost {}: {:#?}", outcome.lost.len(), outcome.lost);
        assert!(outcome.answered > 20 * u64::from(times()), "{what}: {outcome:?}");
    }
}

fn manifest() -> String {
    json!({
        "apiVersion": "plimsoll.dev/v1alpha1", "kind": "LLMDeployment",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"source": format!("pvc://models/{NAME}")},
            "workload": {"concurrency": 8},
            "resources": {"cpu": "50m", "memory": "1Gi"},
            "replicas": 2,
        },
    })
    .to_string()
}

fn figures(times: u32, (outcome, took): &(Outcome, Duration)) -> Value {
    json!({"times": times, "seconds": took.as_secs(), "answered": outcome.answered,
        "connectionsAskedToLeave": outcome.closed, "lost": outcome.lost.len()})
}

/// A story under constant load, and how long it took.
fn loaded(stage: &Stage<'_>, address: SocketAddr, story: impl FnOnce()) -> (Outcome, Duration) {
    let connect = || stage.connect(address);
    let body = json!({"model": NAME, "prompt": "The lantern", "max_tokens": 8});
    under_load(CLIENTS, &connect, "/v1/completions", &body, || {
        let began = Instant::now();
        story();
        began.elapsed()
    })
}

/// A spec that makes another revision; returns when it alone counts and answers. Its predecessors may still drain.
fn update(stage: &Stage<'_>, number: u32) {
    let before = stage.get(&["llmd", NAME]).unwrap()["status"]["revision"].clone();
    let patch = json!({"spec": {"podTemplate": {"metadata": {"annotations": {"update": number.to_string()}}}}});
    stage.run(&["patch", "llmd", NAME, "--type=merge", "--patch", &patch.to_string()]).unwrap();
    wait_until(&format!("update {number}"), READY_MAX, || {
        let object = stage.get(&["llmd", NAME])?;
        let status = &object["status"];
        let rollout = &status["rollout"];
        let done = status["revision"] != before
            && rollout["state"] == "Complete"
            && rollout["strategy"] == "Surge";
        Ok((done && rollout["revision"] == status["revision"]).then_some(()))
    })
    .unwrap();
}

/// What a drained node or `kubectl delete pod` does.
fn delete_a_pod(stage: &Stage<'_>) {
    let before = stage.pods(NAME).unwrap();
    stage.run(&["delete", "pod", &before[0], "--wait=false"]).unwrap();
    two_answer(stage, &before[0]);
}

/// Waits for two pods that answer, neither of them `gone`. They say so themselves: status follows a moment later.
fn two_answer(stage: &Stage<'_>, gone: &str) {
    wait_until(&format!("another pod than {gone} answers"), READY_MAX, || {
        let ready = stage.get(&["llmd", NAME])?["status"]["readyReplicas"] == 2;
        let stay = staying(stage)?;
        let answers = |pod: &Value| {
            let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
            pod["metadata"]["name"] != gone
                && conditions.any(|held| held["type"] == "Ready" && held["status"] == "True")
        };
        Ok((ready && stay.len() == 2 && stay.iter().all(answers)).then_some(()))
    })
    .unwrap();
}

/// Pods that are not on their way out.
fn staying(stage: &Stage<'_>) -> Result<Vec<Value>> {
    let pods = stage.get(&["pods", &format!("--selector=plimsoll.dev/name={NAME}")])?;
    let mut pods = pods["items"].as_array().cloned().unwrap_or_default();
    pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    Ok(pods)
}

/// Kills the engine of one pod while both have streams; returns how many broke on it. None may break on the other.
fn kill_an_engine(stage: &Stage<'_>) -> usize {
    let here = staying(stage).unwrap();
    let address = |pod: &Value| -> SocketAddr {
        format!("{}:8000", pod["status"]["podIP"].as_str().unwrap()).parse().unwrap()
    };
    let (killed, spared) = (&here[0], &here[1]);
    let over = AtomicBool::new(false);
    let (lost, kept) = std::thread::scope(|scope| {
        let ends = Over(&over);
        let streams = |pod: &Value| {
            let address = address(pod);
            let over = &over;
            (0..STREAMS)
                .map(|_| scope.spawn(move || breaks(stage, address, over)))
                .collect::<Vec<_>>()
        };
        let (on_killed, on_spared) = (streams(killed), streams(spared));
        std::thread::sleep(Duration::from_secs(1));
        kill(killed["metadata"]["uid"].as_str().unwrap()).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        drop(ends);
        let broken = |streams: Vec<std::thread::ScopedJoinHandle<'_, bool>>| {
            streams.into_iter().map(|stream| stream.join().unwrap()).filter(|broke| *broke).count()
        };
        (broken(on_killed), broken(on_spared))
    });
    assert_eq!(kept, 0, "streams on the other pod go on");
    assert!((1..=STREAMS).contains(&lost), "{lost} of {STREAMS} streams broke");
    let name = killed["metadata"]["name"].as_str().unwrap();
    wait_until("the killed engine answers again", READY_MAX, || {
        let pod = stage.get(&["pod", name])?;
        let restarted = pod["status"]["containerStatuses"][0]["restartCount"] != 0;
        let ready = stage.get(&["llmd", NAME])?["status"]["readyReplicas"] == 2;
        Ok((restarted && ready).then_some(()))
    })
    .unwrap();
    stage.run(&["delete", "pod", name, "--wait=false"]).unwrap();
    two_answer(stage, name);
    lost
}

/// Streams from one pod until the first one breaks; false where none did.
fn breaks(stage: &Stage<'_>, address: SocketAddr, over: &AtomicBool) -> bool {
    let body = json!({"model": NAME, "prompt": "The lantern", "max_tokens": 400, "stream": true,
        "temperature": 1, "seed": 7});
    while !over.load(Ordering::Relaxed) {
        let connection: Result<Connection> = stage.connect(address);
        let answer =
            connection.and_then(|mut connection| connection.post("/v1/completions", &body));
        match answer {
            Ok(answer) if answer.status == 200 && answer.events().is_ok() => {}
            Ok(_) | Err(_) => return true,
        }
    }
    false
}

/// SIGKILL for the engine of the pod with this uid.
fn kill(uid: &str) -> Result<()> {
    let of_pod = [uid.to_owned(), uid.replace('-', "_")];
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let read = |file: &str| std::fs::read_to_string(path.join(file)).unwrap_or_default();
        if read("comm").trim() != "plimsoll-engine" {
            continue;
        }
        let group = read("cgroup");
        if of_pod.iter().any(|uid| group.contains(uid.as_str())) {
            let id = path
                .file_name()
                .and_then(|name| name.to_str())
                .context("a process has a number")?;
            // SAFETY: a signal to a process of the node that this test started.
            unsafe { libc::kill(id.parse()?, libc::SIGKILL) };
            return Ok(());
        }
    }
    bail!("no engine runs in pod {uid}")
}
