//! Replicas follow real load: engines whose CPU is limited, so that another replica adds what one lacks, a real Prometheus
//! behind TLS, and requests that come whether or not there is room for them.
//!
//! `make soak-scaling` runs the long story, which writes its figures to `docs/scaling/run.csv`.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use plimsoll_tests::cluster::{Prometheus, wait_until};
use plimsoll_tests::install;
use plimsoll_tests::over::Over;
use plimsoll_tests::stage::{Stage, condition};
use plimsoll_tests::traffic::{Traffic, with_traffic};
use serde_json::{Value, json};

/// Where the long story writes its figures.
const SOAK: &str = "PLIMSOLL_SOAK_SCALING";
/// Between two looks of the loop and two scrapes: as users have it, or quick.
const INTERVAL_SECONDS: u64 = 15;
const INTERVAL_SECONDS_QUICK: u64 = 1;
/// Requests per second that are more than one limited pod finishes.
const PLENTY: f64 = 8.0;
const PATH: &str = "/v1/completions";

/// How often the operator of this run looks.
pub fn interval_seconds() -> u64 {
    if std::env::var_os(SOAK).is_some() { INTERVAL_SECONDS } else { INTERVAL_SECONDS_QUICK }
}

fn body() -> Value {
    json!({"model": "plim", "prompt": "The lantern", "max_tokens": 192, "ignore_eos": true, "stream": true})
}

/// A model whose pods may use 0.3 CPUs each.
fn limited(max: u32, stabilization_seconds: u64) -> String {
    let engine = json!({"name": "engine", "resources": {"limits": {"cpu": "300m"}}});
    json!({
        "apiVersion": "plimsoll.dev/v1alpha1", "kind": "LLMDeployment", "metadata": {"name": "plim"},
        "spec": {
            "model": {"source": "pvc://models/plim"},
            "workload": {"concurrency": 4, "promptTokens": 16, "outputTokens": 192},
            "contextTokens": 512,
            "resources": {"cpu": "100m"},
            "scaling": {"max": max, "queuePerReplica": 4,
                "stabilizationWindowSeconds": stabilization_seconds},
            "podTemplate": {"spec": {"containers": [engine]}},
        },
    })
    .to_string()
}

/// Debian's Prometheus finds no pods by itself: the test lists them in a file that it watches.
fn targets(stage: &Stage<'_>) -> Value {
    let pods = stage.get(&["pods", "--selector=plimsoll.dev/name"]).unwrap();
    let items = pods["items"].as_array().into_iter().flatten();
    let running = items.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    let target = |pod: &Value| {
        let address = format!("{}:8000", pod["status"]["podIP"].as_str()?);
        let labels = json!({"namespace": stage.namespace, "pod": pod["metadata"]["name"]});
        Some(json!({"targets": [address], "labels": labels}))
    };
    running.filter_map(target).collect()
}

/// Runs `story` beside a Prometheus that scrapes the engines of the namespace.
fn with_prometheus<T>(stage: &Stage<'_>, story: impl FnOnce() -> T) -> T {
    let file = stage.node.folder().join(format!("{}-targets.json", stage.namespace));
    std::fs::write(&file, targets(stage).to_string()).unwrap();
    let every = format!("{}s", interval_seconds());
    let jobs = json!([{"job_name": "engines", "scrape_interval": every,
        "file_sd_configs": [{"files": [file]}]}]);
    let _prometheus = Prometheus::start_with_tls(stage.node, &jobs).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let next = file.with_extension("next");
                std::fs::write(&next, targets(stage).to_string()).unwrap();
                std::fs::rename(&next, &file).unwrap();
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        let _over = Over(&over);
        story()
    })
}

/// Replicas wanted and ready.
fn replicas(stage: &Stage<'_>) -> (u64, u64) {
    let status = stage.get(&["llmd", "plim"]).unwrap()["status"].clone();
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    (number(&status["scaling"]["desired"]), number(&status["readyReplicas"]))
}

fn wait_for_replicas(stage: &Stage<'_>, count: u64, patience: Duration) {
    let what = format!("{count} replicas are wanted and ready");
    let reached = wait_until(&what, patience, || {
        let (desired, ready) = replicas(stage);
        Ok((desired == count && ready == count).then_some(()))
    });
    reached.unwrap();
}

/// Decisions so far, oldest first, as (from, to).
fn decisions(stage: &Stage<'_>) -> Vec<(u64, u64)> {
    let status = stage.get(&["llmd", "plim"]).unwrap()["status"]["scaling"].clone();
    let recent = status["recent"].as_array().cloned().unwrap_or_default();
    let pair = |it: &Value| Some((it["from"].as_u64()?, it["to"].as_u64()?));
    recent.iter().rev().filter_map(pair).collect()
}

#[test]
fn replicas_follow_real_load_up_and_down_and_no_request_is_lost() {
    let Some(node) = super::installed() else { return };
    let stage = Stage::new(&node, "scaling").unwrap();
    stage.claim_with("models", "plim", &install::root().join("tests/model")).unwrap();
    stage.apply(&limited(2, 10)).unwrap();
    stage.wait_ready("plim").unwrap();
    let address = stage.service("plim").unwrap();
    let connect = || stage.connect(address);
    with_prometheus(&stage, || {
        let active = wait_until("the loop knows enough", Duration::from_secs(30), || {
            let object = stage.get(&["llmd", "plim"])?;
            let held = condition(&object, "ScalingActive").cloned();
            Ok(held.filter(|held| held["status"] == "True"))
        });
        assert_eq!(active.unwrap()["reason"], "ScalingOnMetrics");
        with_traffic(&connect, PATH, &body(), |traffic| {
            traffic.set(PLENTY);
            wait_for_replicas(&stage, 2, Duration::from_secs(60));
            traffic.set(0.0);
            wait_for_replicas(&stage, 1, Duration::from_secs(60));
            assert!(traffic.lost().is_empty(), "{:#?}", traffic.lost());
        });
    });
    assert_eq!(decisions(&stage), [(1, 2), (2, 1)]);
    let events = stage.run(&["get", "events", "--field-selector=reason=Scaled"]).unwrap();
    assert!(events.contains("1 to 2 replicas") && events.contains("wait per replica"), "{events}");
}

/// A HorizontalPodAutoscaler without metrics still keeps its bounds, which takes our scale subresource both ways.
#[test]
fn an_hpa_and_kubectl_scale_reach_the_object_through_its_scale() {
    let Some(node) = super::installed() else { return };
    let stage = Stage::new(&node, "outside").unwrap();
    stage.claim_with("models", "plim", &install::root().join("tests/model")).unwrap();
    let five_lines = "{apiVersion: plimsoll.dev/v1alpha1, kind: LLMDeployment, metadata: {name: plim}, \
                      spec: {model: {source: 'pvc://models/plim'}}}";
    stage.apply(five_lines).unwrap();
    stage.wait_ready("plim").unwrap();
    let scale_is = |count: u64| {
        let reached = wait_until(&format!("{count} replicas"), Duration::from_secs(60), || {
            let asked = stage.get(&["llmd", "plim"])?["spec"]["replicas"].as_u64();
            let deployed = stage.get(&["deployment", "plim"])?["spec"]["replicas"].as_u64();
            Ok(([asked, deployed] == [Some(count), Some(count)]).then_some(()))
        });
        reached.unwrap();
    };
    stage.run(&["scale", "llmd/plim", "--replicas=2"]).unwrap();
    scale_is(2);
    let target =
        json!({"apiVersion": "plimsoll.dev/v1alpha1", "kind": "LLMDeployment", "name": "plim"});
    let metric = json!({"type": "Resource", "resource":
        {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}});
    let autoscaler = json!({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "plim"}, "spec":
        {"scaleTargetRef": target, "minReplicas": 3, "maxReplicas": 4, "metrics": [metric]}});
    stage.apply(&autoscaler.to_string()).unwrap();
    scale_is(3);
    let held = stage.get(&["hpa", "plim"]).unwrap();
    let able = condition(&held, "AbleToScale").unwrap();
    assert_eq!(able["status"], "True", "{held:#}");
    assert_eq!(held["status"]["desiredReplicas"], 3, "{held:#}");
}

/// What one pod finishes per second, measured by giving it more than it can do.
fn measure_one(traffic: &Traffic) -> f64 {
    traffic.set(PLENTY);
    std::thread::sleep(Duration::from_secs(10));
    let before = traffic.arrivals().len();
    std::thread::sleep(Duration::from_secs(10));
    let finished = traffic.arrivals().len() - before;
    traffic.set(0.0);
    finished as f64 / 10.0
}

/// One step of load up and down with ten minutes of noise at the top.
#[test]
#[ignore = "takes 31 minutes of a quiet machine: make soak-scaling"]
fn soak_a_step_leads_to_three_replicas_and_back_with_no_flapping_under_noise() {
    let target = std::env::var_os(SOAK).expect("make soak-scaling says where figures go");
    let Some(node) = super::installed() else { return };
    let stage = Stage::new(&node, "soak").unwrap();
    stage.claim_with("models", "plim", &install::root().join("tests/model")).unwrap();
    let pinned = limited(1, 120);
    stage.apply(&pinned).unwrap();
    stage.wait_ready("plim").unwrap();
    let address = stage.service("plim").unwrap();
    let connect = || stage.connect(address);
    let mut figures = String::from("seconds,requests_per_second,desired,ready,ttft_ms\n");
    let mut told = String::new();
    let mut outcome = None;
    let lost = with_prometheus(&stage, || {
        let one = with_traffic(&connect, PATH, &body(), measure_one);
        writeln!(told, "one replica finishes {one:.2} requests/s").expect("memory takes it");
        stage.apply(&limited(4, 120)).unwrap();
        with_traffic(&connect, PATH, &body(), |traffic| {
            let mut watch = |what: &str, seconds: u64, rate: &mut dyn FnMut(u64) -> f64| {
                let began = Instant::now();
                while began.elapsed() < Duration::from_secs(seconds) {
                    traffic.set(rate(began.elapsed().as_secs()));
                    std::thread::sleep(Duration::from_secs(5));
                    note(&mut figures, &stage, traffic);
                }
                let now = (replicas(&stage), decisions(&stage));
                writeln!(told, "{what}: {now:?}").expect("memory takes it");
                now
            };
            let low = watch("low", 90, &mut |_| 0.3 * one);
            let high = watch("high", 240, &mut |_| 1.8 * one);
            // Every 10 s another rate, from 1.6 to 2.2 times what one finishes.
            let mut seed = 7u64;
            let mut drawn = 0;
            let noisy = watch("noise", 600, &mut |at| {
                if at / 10 >= drawn {
                    drawn += 1;
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                }
                one * (1.6 + 0.6 * (seed >> 33) as f64 / (1u64 << 31) as f64)
            });
            // Two falls, each after a window of its own, which begins anew with every look that finds three requests in flight.
            let back = watch("back", 720, &mut |_| 0.3 * one);
            outcome = Some([low, high, noisy, back]);
            traffic.lost()
        })
    });
    eprintln!("{told}{}", stage.run(&["get", "llmd", "plim", "--output=yaml"]).unwrap());
    std::fs::write(PathBuf::from(target), &figures).unwrap();
    let [low, high, noisy, back] = outcome.unwrap();
    assert!(lost.is_empty(), "{lost:#?}");
    assert_eq!((low.0, low.1), ((1, 1), vec![]), "one is enough");
    assert_eq!(high.0, (3, 3), "{told}");
    assert_eq!(noisy, high, "it flapped: {told}");
    assert_eq!(back.0, (1, 1), "{told}");
}

fn note(figures: &mut String, stage: &Stage<'_>, traffic: &Traffic) {
    let now = traffic.seconds();
    let (desired, ready) = replicas(stage);
    let recent = traffic.arrivals().into_iter().filter_map(|arrival| {
        let first = arrival.first_piece.ok()?;
        let came = (arrival.at + first).as_secs_f64();
        (now - came <= 15.0).then_some(first.as_secs_f64() * 1000.0)
    });
    let mut waits: Vec<f64> = recent.collect();
    waits.sort_by(f64::total_cmp);
    let p90 = waits.get((waits.len() * 9 / 10).min(waits.len().saturating_sub(1))).copied();
    let p90 = p90.unwrap_or(0.0);
    writeln!(figures, "{now:.0},{:.2},{desired},{ready},{p90:.0}", traffic.rate())
        .expect("writing to memory does not fail");
}
