//! The scaling loop against a real API server. Prometheus is played here, so that it can be wrong in every way; the cluster
//! tests have a real one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, ResourceQuota};
use kube::ResourceExt;
use plimsoll_crds::{LLMDeployment, ScalingStatus};
use serde_json::{Value, json};

use crate::world::{Operator, World};

const QUIET: Duration = Duration::from_secs(4);

/// What the played Prometheus holds.
#[derive(Default)]
struct Held {
    namespace: String,
    /// By pod: waiting, running.
    pods: BTreeMap<String, (f64, f64)>,
    /// Samples are this old, in seconds.
    age: f64,
    /// The bearer token that it wants.
    token: Option<String>,
    asked: usize,
}

#[derive(Clone)]
struct Prometheus {
    held: Arc<Mutex<Held>>,
    address: String,
}

impl Prometheus {
    async fn start(world: &World) -> Prometheus {
        let held = Held { namespace: world.namespace.clone(), ..Held::default() };
        let held = Arc::new(Mutex::new(held));
        let router =
            Router::new().route("/behind/api/v1/query", post(answer)).with_state(held.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}/behind", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Prometheus { held, address }
    }

    fn set(&self, change: impl FnOnce(&mut Held)) {
        change(&mut self.held.lock().unwrap());
    }

    /// Every pod that there is has as much to do.
    async fn load_each(&self, world: &World, waiting: f64, running: f64) {
        let pods: Vec<Pod> = world.list("plimsoll.dev/name").await;
        let names = pods.iter().map(|pod| (pod.name_any(), (waiting, running)));
        self.set(|held| held.pods = names.collect());
    }

    fn operator(&self, world: &World, more: &[&str]) -> Operator {
        let flags = ["--prometheus-address", &self.address, "--scaling-interval", "1"];
        world.operator(&[&flags[..], more].concat())
    }
}

async fn answer(
    State(held): State<Arc<Mutex<Held>>>,
    headers: HeaderMap,
    query: String,
) -> (StatusCode, String) {
    let mut held = held.lock().unwrap();
    held.asked += 1;
    let wanted = held.token.as_ref().map(|token| format!("Bearer {token}"));
    let given = headers.get("authorization").and_then(|value| value.to_str().ok());
    if wanted.is_some() && given != wanted.as_deref() {
        return (StatusCode::UNAUTHORIZED, "no such token".to_owned());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let mut result = Vec::new();
    let labels = |pod: &String| json!({"namespace": held.namespace, "pod": pod});
    if query.contains("label_replace") {
        result.push(json!({"metric": {"signal": "clock"}, "value": [now, now.to_string()]}));
    } else {
        for (pod, (waiting, running)) in &held.pods {
            let gauges =
                [("plimsoll_requests_waiting", waiting), ("plimsoll_requests_running", running)];
            for (name, value) in gauges {
                let mut metric = labels(pod);
                metric["__name__"] = name.into();
                let sample = json!([now - held.age, value.to_string()]);
                result.push(json!({"metric": metric, "values": [sample]}));
            }
        }
    }
    (StatusCode::OK, json!({"status": "success", "data": {"result": result}}).to_string())
}

fn scaled(max: u32) -> Value {
    let scaling = json!({"max": max, "queuePerReplica": 4, "stabilizationWindowSeconds": 10});
    json!({"scaling": scaling, "workload": {"concurrency": 4}})
}

async fn desired(world: &World, count: i32) -> ScalingStatus {
    let what = format!("{count} replicas wanted");
    let status = world.status("assistant", &what, |status| {
        status.scaling.clone().filter(|scaling| scaling.desired == count)
    });
    let scaling = status.await;
    let deployed = |held: &Deployment| (held.spec.replicas == Some(count)).then_some(());
    world.eventually("assistant", &format!("{count} replicas deployed"), deployed).await;
    scaling
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_follow_the_queue_and_only_decisions_are_written() {
    let Some(world) = World::new("scaling").await else { return };
    let prometheus = Prometheus::start(&world).await;
    let _operator = prometheus.operator(&world, &[]);
    world.bring_up("assistant", scaled(3)).await;
    prometheus.load_each(&world, 0.0, 1.0).await;
    world.condition("assistant", "ScalingActive", "True", "ScalingOnMetrics").await;
    assert_eq!(desired(&world, 1).await.recent, []);
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");

    prometheus.load_each(&world, 30.0, 4.0).await;
    let scaling = desired(&world, 2).await;
    assert!(scaling.why.contains("30.0 requests wait per replica, above 4"), "{scaling:?}");
    assert_eq!((scaling.recent[0].from, scaling.recent[0].to), (1, 2));
    world.told("Scaled", &["1 to 2 replicas: 30.0 requests"]).await;
    world.run_pod("assistant", true).await;
    prometheus.load_each(&world, 30.0, 4.0).await;
    desired(&world, 3).await;
    world.run_pod("assistant", true).await;
    prometheus.load_each(&world, 30.0, 4.0).await;
    let limited =
        world.status("assistant", "the limit", |status| status.scaling.as_ref()?.limit.clone());
    assert_eq!(limited.await, "spec.scaling.max is 3");
    world.condition("assistant", "Ready", "True", "Serving").await;
    let under_load = world.requests_during(QUIET).await;
    let writes: Vec<_> = under_load.iter().filter(|event| event.is_write()).collect();
    assert!(writes.is_empty(), "{writes:#?}");

    // Nothing of spec is ours, so no GitOps tool finds a difference to fight over (keda#5572).
    let object: LLMDeployment = world.get("assistant").await.unwrap();
    let managed = object.metadata.managed_fields.unwrap();
    let ours = managed.iter().filter(|it| it.manager.as_deref() == Some("plimsoll"));
    for fields in ours.filter_map(|it| it.fields_v1.as_ref()) {
        assert!(fields.0.get("f:spec").is_none(), "{fields:?}");
    }
    assert_eq!(object.spec.replicas, 1);

    prometheus.load_each(&world, 0.0, 0.0).await;
    let scaling = desired(&world, 2).await;
    assert!(scaling.why.starts_with("for 10 s 2 would have done"), "{scaling:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubeai_265_neither_a_restart_nor_missing_stale_or_partial_metrics_take_replicas_away() {
    let Some(world) = World::new("blind").await else { return };
    let prometheus = Prometheus::start(&world).await;
    let operator = prometheus.operator(&world, &[]);
    world.bring_up("assistant", scaled(2)).await;
    prometheus.load_each(&world, 30.0, 4.0).await;
    desired(&world, 2).await;
    world.run_pod("assistant", true).await;
    prometheus.load_each(&world, 0.0, 0.0).await;
    assert!(operator.stop());

    // Idle pods from here on: one would go after 10 s, were the trouble overlooked.
    let patience = Duration::from_secs(14);
    prometheus.set(|held| held.age = 60.0);
    let operator = prometheus.operator(&world, &[]);
    world.condition("assistant", "ScalingActive", "False", "MetricsMissing").await;
    prometheus.set(|held| {
        held.age = 0.0;
        held.pods.pop_first();
    });
    world.condition("assistant", "ScalingActive", "False", "MetricsPartial").await;
    tokio::time::sleep(patience).await;
    desired(&world, 2).await;
    prometheus.set(|held| held.token = Some("secret".to_owned()));
    let message =
        world.condition("assistant", "ScalingActive", "False", "PrometheusUnreachable").await;
    assert!(message.contains("401") && message.contains("no such token"), "{message}");
    desired(&world, 2).await;
    assert!(operator.stop());

    let token = std::env::temp_dir().join(format!("plimsoll-token-{}", world.namespace));
    std::fs::write(&token, "secret\n").unwrap();
    prometheus.load_each(&world, 0.0, 0.0).await;
    let flags = ["--prometheus-token-file", &token.display().to_string()];
    let _operator = prometheus.operator(&world, &flags);
    world.condition("assistant", "ScalingActive", "True", "ScalingOnMetrics").await;
    desired(&world, 1).await;
    std::fs::remove_file(token).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_bounds_what_is_asked_for_and_says_so() {
    let Some(world) = World::new("quota").await else { return };
    let prometheus = Prometheus::start(&world).await;
    let _operator = prometheus.operator(&world, &[]);
    world.bring_up("assistant", scaled(9)).await;
    let hard = json!({"pods": "3"});
    world
        .create::<ResourceQuota>(json!({"metadata": {"name": "team"}, "spec": {"hard": hard}}))
        .await;
    // No controller counts here: the test says what is used.
    let used = |pods: &str| json!({"hard": hard, "used": {"pods": pods}});
    world.merge_status::<ResourceQuota>("team", used("3")).await;
    prometheus.load_each(&world, 300.0, 4.0).await;
    let limit =
        world.status("assistant", "the limit", |status| status.scaling.as_ref()?.limit.clone());
    assert_eq!(limit.await, "ResourceQuota team allows 3 of pods");
    desired(&world, 1).await;
    world.merge_status::<ResourceQuota>("team", used("2")).await;
    desired(&world, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_prometheus_scaling_says_so_and_keeps_what_there_is() {
    let Some(world) = World::new("unset").await else { return };
    let _operator = world.operator(&["--scaling-interval", "1"]);
    world.bring_up("assistant", scaled(3)).await;
    world.condition("assistant", "ScalingActive", "False", "PrometheusNotSet").await;
    // Taken out of the loop's hands, the number is the spec's again, and nothing of the loop stays in status.
    let by_hand = json!({"spec": {"scaling": null, "replicas": 2}});
    world.merge::<LLMDeployment>("assistant", by_hand).await;
    let gone = |status: &plimsoll_crds::LLMDeploymentStatus| {
        let told = status.conditions.iter().any(|held| held.type_ == "ScalingActive");
        (status.scaling.is_none() && !told).then_some(())
    };
    world.status("assistant", "no trace of the loop", gone).await;
    let two = |held: &Deployment| (held.spec.replicas == Some(2)).then_some(());
    world.eventually("assistant", "two replicas", two).await;
}

/// crossplane-contrib's kubernetes provider saw an operator of another project set back what the HPA had set.
#[tokio::test(flavor = "multi_thread")]
async fn production_stack_903_what_an_autoscaler_sets_through_scale_is_never_set_back() {
    let Some(world) = World::new("outside").await else { return };
    let operator = world.operator(&[]);
    world.bring_up("assistant", json!({})).await;
    let objects: kube::Api<LLMDeployment> = world.api();
    let scale = kube::api::Patch::Merge(json!({"spec": {"replicas": 3}}));
    objects.patch_scale("assistant", &Default::default(), &scale).await.unwrap();
    let three = |held: &Deployment| (held.spec.replicas == Some(3)).then_some(());
    world.eventually("assistant", "three replicas", three).await;
    // A change by a person who does not speak of replicas, and a new operator.
    let annotated = json!({"spec": {"podTemplate": {"metadata": {"annotations": {"team": "a"}}}}});
    let changed: LLMDeployment = world.merge("assistant", annotated).await;
    assert!(operator.stop());
    let _operator = world.operator(&[]);
    let seen = |status: &plimsoll_crds::LLMDeploymentStatus| {
        (status.observed_generation == changed.metadata.generation).then_some(())
    };
    world.status("assistant", "the change seen", seen).await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(objects.get_scale("assistant").await.unwrap().spec.unwrap().replicas, Some(3));
    world.eventually("assistant", "still three replicas", three).await;
}
