//! The life of a plan: published, pinned, offered, given up with its machines, made again once after it ran out of memory,
//! and held against what engines measure.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{Api, ResourceExt};
use plimsoll_crds::{LLMDeployment, LLMDeploymentStatus, MeasuredStatus, OfferStatus, PlanCause};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::QUIET;
use crate::world::{World, facts};

fn h200() -> Value {
    json!({"nvidia.com/gpu.product": "NVIDIA-H200", "nvidia.com/gpu.memory": "143771"})
}

impl World {
    async fn pin(&self, name: &str, hash: Option<&str>) {
        let plan = json!({"spec": {"plan": {"pinnedHash": hash}}});
        self.merge::<LLMDeployment>(name, plan).await;
    }

    async fn offered(&self, name: &str) -> OfferStatus {
        self.status(name, "an offer", |status| status.offered.clone()).await
    }

    async fn not_offered(&self, name: &str) {
        let gone = |status: &LLMDeploymentStatus| status.offered.is_none().then_some(());
        self.status(name, "no offer", gone).await;
    }

    async fn plan_hash(&self, name: &str) -> String {
        self.status(name, "a plan", |status| Some(status.plan.as_ref()?.hash.clone())).await
    }

    /// Waits until the plan that runs has this hash.
    async fn runs(&self, name: &str, hash: &str) -> LLMDeploymentStatus {
        self.status(name, &format!("plan {hash} runs"), |status| {
            let runs = status.revision.is_some() && status.plan.as_ref()?.hash == hash;
            runs.then(|| status.clone())
        })
        .await
    }

    async fn delete_node(&self, name: &str) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        nodes.delete(name, &Default::default()).await.unwrap();
    }

    /// Plays the kubelet: the engine of a pod ended so, and starts again.
    async fn end_engine(&self, pod: &str, ended: Value) {
        let container = json!({"name": "engine", "image": "i", "imageID": "i", "ready": false, "restartCount": 1,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": ended}});
        let status = json!({"containerStatuses": [container], "conditions": [
            {"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}]});
        self.merge_status::<Pod>(pod, status).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manual_plan_is_published_and_runs_once_its_hash_is_committed() {
    let Some(world) = World::new("manual").await else { return };
    let _operator = world.operator(&[]);
    world.declare("assistant", json!({"plan": {"apply": "Manual"}})).await;
    world.finish_inspect(&facts(), 0).await;
    let message = world.condition("assistant", "Stalled", "True", "PlanNotPinned").await;
    let first = world.plan_hash("assistant").await;
    assert!(message.contains(&format!("waits for spec.plan.pinnedHash: {first}")), "{message}");
    world.condition("assistant", "Planned", "False", "PlanNotPinned").await;
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");
    assert!(world.get::<Deployment>("assistant").await.is_none(), "nothing runs unseen");

    world.pin("assistant", Some(&first)).await;
    world.runs("assistant", &first).await;
    world.run_pod("assistant", true).await;
    world.condition("assistant", "Ready", "True", "Serving").await;

    // Another spec, another plan: what ran goes on until somebody commits the new hash.
    let spec = json!({"spec": {"contextTokens": 1024, "workload": {"concurrency": 4}}});
    world.merge::<LLMDeployment>("assistant", spec).await;
    let message = world.condition("assistant", "Stalled", "True", "PinnedPlanGone").await;
    let offered = world.offered("assistant").await;
    assert!(message.contains(&first) && message.contains(&offered.hash), "{message}");
    assert!(offered.values.contains(&"contextTokens: 2,048 → 1,024".to_owned()), "{offered:?}");
    assert_eq!(offered.cause, PlanCause::SpecChanged);
    world.condition("assistant", "Available", "True", "Serving").await;
    world.runs("assistant", &first).await;
    world.told("PlanOffered", &["contextTokens: 2,048 → 1,024", &offered.hash]).await;

    world.pin("assistant", Some(&offered.hash)).await;
    let status = world.runs("assistant", &offered.hash).await;
    let changed = status.plan.unwrap().changed.unwrap();
    assert_eq!(changed.from, first);
    assert_eq!(changed.values, offered.values);
    world.not_offered("assistant").await;
    world.told("PlanChosen", &[&format!("against plan {first}: "), "2,048 → 1,024"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_better_plan_is_offered_and_runs_only_once_somebody_takes_it() {
    let Some(world) = World::new("better").await else { return };
    let _operator = world.operator(&[]);
    world.bring_up("assistant", json!({})).await;
    let first = world.plan_hash("assistant").await;
    world.add_gpu_node("gpu-0", h200()).await;
    let offered = world.offered("assistant").await;
    assert_eq!(offered.cause, PlanCause::BetterPlan);
    let change = "accelerator: cpu → nvidia-h200".to_owned();
    assert!(offered.values.contains(&change), "{offered:?}");
    world.condition("assistant", "Ready", "True", "Serving").await;
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");
    world.runs("assistant", &first).await;

    // The node goes, and the offer with it.
    world.delete_node("gpu-0").await;
    world.not_offered("assistant").await;
    assert_eq!(world.list::<ControllerRevision>("").await.len(), 1);
    world.add_gpu_node("gpu-0", h200()).await;
    assert_eq!(world.offered("assistant").await.hash, offered.hash, "the same plan again");

    world.pin("assistant", Some(&offered.hash)).await;
    let status = world.runs("assistant", &offered.hash).await;
    assert_eq!(status.plan.unwrap().accelerator, "nvidia-h200");
    world.run_pod("assistant", true).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    // Without the pin it stays; with the old hash it goes back.
    world.pin("assistant", None).await;
    tokio::time::sleep(QUIET).await;
    world.runs("assistant", &offered.hash).await;
    world.pin("assistant", Some(&first)).await;
    world.runs("assistant", &first).await;
    world.set_nodes(1).await;
}

/// defilantech/LLMKube#192: an upgrade of the operator rolled every deployment, and hung without a spare GPU.
#[tokio::test(flavor = "multi_thread")]
async fn llmkube_192_a_new_operator_rolls_nothing_even_where_it_would_plan_otherwise() {
    let Some(world) = World::new("upgrade").await else { return };
    let operator = world.operator(&["--engine-image", "example/engine:1"]);
    world.bring_up("assistant", json!({})).await;
    let before: Deployment = world.get("assistant").await.unwrap();
    assert!(operator.stop());
    world.add_gpu_node("gpu-0", h200()).await;
    let _operator = world.operator(&["--engine-image", "example/engine:2"]);
    world.offered("assistant").await;
    tokio::time::sleep(QUIET).await;
    let after: Deployment = world.get("assistant").await.unwrap();
    assert_eq!(after.metadata.generation, before.metadata.generation);
    world.condition("assistant", "Ready", "True", "Serving").await;
    world.set_nodes(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_class_of_which_no_node_is_left_is_left_after_patience() {
    let Some(world) = World::new("class").await else { return };
    world.add_gpu_node("gpu-0", h200()).await;
    let _operator = world.operator(&[]);
    world.bring_up("assistant", json!({})).await;
    let first = world.plan_hash("assistant").await;
    let pods = world.list::<Pod>("plimsoll.dev/name").await;
    world.delete_node("gpu-0").await;
    let waits_since = |minutes: i64| {
        let since = k8s_openapi::jiff::Timestamp::now().as_second() - 60 * minutes;
        let since = k8s_openapi::jiff::Timestamp::from_second(since).unwrap().to_string();
        json!({"conditions": [{"type": "Ready", "status": "False"}, {"type": "PodScheduled",
            "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available", "lastTransitionTime": since}]})
    };
    let pod = pods[0].name_any();
    world.merge_status::<Pod>(&pod, waits_since(1)).await;
    let message = world.condition("assistant", "Planned", "True", "PlanChosen").await;
    world
        .status("assistant", "patience", |status| {
            let planned = status.conditions.iter().find(|held| held.type_ == "Planned")?;
            planned.message.contains("no node of class nvidia-h200 is left").then_some(())
        })
        .await;
    world.runs("assistant", &first).await;
    assert!(!message.is_empty());

    world.merge_status::<Pod>(&pod, waits_since(11)).await;
    let status = world
        .status("assistant", "a plan for the CPU", |status| {
            status.plan.clone().filter(|plan| plan.accelerator == "cpu")
        })
        .await;
    let changed = status.changed.unwrap();
    assert_eq!((changed.from, changed.cause), (first.clone(), PlanCause::ClassGone));
    // The class comes back: what served there is offered, under the hash it had.
    world.add_gpu_node("gpu-1", h200()).await;
    world.offered("assistant").await;
    world.pin("assistant", Some(&first)).await;
    world.runs("assistant", &first).await;
    world.set_nodes(1).await;
}

/// dynamo#10104: a generated deployment ran out of memory at every start, for ever, and nothing was learned from it.
#[tokio::test(flavor = "multi_thread")]
async fn dynamo_10104_out_of_memory_is_planned_anew_once_and_then_stalls_with_both_figures() {
    let Some(world) = World::new("memory").await else { return };
    let operator = world.operator(&[]);
    world.bring_up("assistant", json!({"resources": {"memory": "1Gi"}})).await;
    let before = world.runs("assistant", &world.plan_hash("assistant").await).await.plan.unwrap();
    let report = |needed: i64| {
        let memory = json!({"neededBytes": needed, "availableBytes": before.memory_bytes.capacity});
        let report = json!({"reason": "OutOfDeviceMemory", "message": "refused", "memory": memory});
        json!({"exitCode": 11, "message": report.to_string()})
    };
    let more = before.memory_bytes.total + (100 << 20);
    let pod = world.list::<Pod>("plimsoll.dev/name").await[0].name_any();
    world.end_engine(&pod, report(more)).await;
    let after = world
        .status("assistant", "another plan", |status| {
            status.plan.clone().filter(|plan| plan.hash != before.hash)
        })
        .await;
    assert_eq!(after.memory_bytes.process, before.memory_bytes.process + (100 << 20));
    let changed = after.changed.unwrap();
    assert_eq!((changed.from, changed.cause), (before.hash, PlanCause::OutOfMemory));
    assert!(after.why.contains("100 MiB more than the sum"), "{}", after.why);
    let message = world.condition("assistant", "Planned", "True", "PlanChosen").await;
    assert!(message.contains("an engine needed at least"), "{message}");

    // Once more, and that is all, for an operator too that was not there the first time: both figures, and no third plan.
    assert!(operator.stop());
    let _operator = world.operator(&[]);
    world.delete::<Pod>(&pod).await;
    let pod = world.run_pod("assistant", false).await;
    world.end_engine(&pod, report(more + (50 << 20))).await;
    let message = world.condition("assistant", "Stalled", "True", "OutOfMemoryAgain").await;
    assert_eq!(message.matches("an engine needed at least").count(), 2, "{message}");
    assert_eq!(world.list::<ControllerRevision>("").await.len(), 2);
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");
    // A person changes the spec: what was learned is kept, and there is another try.
    world.merge::<LLMDeployment>("assistant", json!({"spec": {"contextTokens": 512}})).await;
    let why = world
        .status("assistant", "a plan for the new spec", |status| {
            let plan = status.plan.as_ref()?;
            (plan.context_tokens == 512).then(|| plan.why.clone())
        })
        .await;
    assert!(why.contains("100 MiB more than the sum"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_killed_at_its_limit_gets_a_higher_one_and_with_manual_once_somebody_says_so() {
    let Some(world) = World::new("killed").await else { return };
    let _operator = world.operator(&[]);
    world.declare("assistant", json!({"plan": {"apply": "Manual"}})).await;
    world.finish_inspect(&facts(), 0).await;
    let first = world.plan_hash("assistant").await;
    world.pin("assistant", Some(&first)).await;
    world.runs("assistant", &first).await;
    let limit = |held: &Deployment| {
        let engine = held.spec.template.spec.as_ref()?.containers[0].clone();
        Some(engine.resources?.limits?["memory"].0.clone())
    };
    let before = world.eventually("assistant", "a limit", limit).await;
    let pod = world.run_pod("assistant", false).await;
    world.end_engine(&pod, json!({"exitCode": 137, "reason": "OOMKilled"})).await;
    let offered = world.offered("assistant").await;
    assert_eq!(offered.cause, PlanCause::OutOfMemory);
    assert!(offered.why.contains("an engine needed at least"), "{offered:?}");
    world.condition("assistant", "Ready", "False", "OutOfDeviceMemory").await;
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");
    assert_eq!(world.eventually("assistant", "a limit", limit).await, before);
    world.pin("assistant", Some(&offered.hash)).await;
    world.runs("assistant", &offered.hash).await;
    let higher = |held: &Deployment| limit(held).filter(|after| *after != before);
    world.eventually("assistant", "another limit", higher).await;
}

/// kserve#5353 again: what a controller writes into a spec is a drift for ever in the eyes of Argo CD.
#[tokio::test(flavor = "multi_thread")]
async fn kserve_5353_a_committed_pin_is_no_drift() {
    let Some(world) = World::new("gitops").await else { return };
    let _operator = world.operator(&[]);
    let plan = json!({"apply": "Manual"});
    world.declare("assistant", json!({"plan": plan})).await;
    world.finish_inspect(&facts(), 0).await;
    let hash = world.plan_hash("assistant").await;
    let spec = json!({"model": {"source": "pvc://models/tiny"},
        "plan": {"apply": "Manual", "pinnedHash": hash}});
    let committed = json!({"apiVersion": "plimsoll.dev/v1alpha1", "kind": "LLMDeployment",
        "metadata": {"name": "assistant", "namespace": world.namespace}, "spec": spec});
    let apply = || async {
        let params = kube::api::PatchParams::apply("argocd-controller").force();
        let patch = kube::api::Patch::Apply(&committed);
        world.api::<LLMDeployment>().patch("assistant", &params, &patch).await.unwrap()
    };
    let first = apply().await;
    world.runs("assistant", &hash).await;
    world.run_pod("assistant", true).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    let settled = apply().await;
    assert_eq!(settled.metadata.generation, first.metadata.generation);
    for _ in 0..3 {
        assert_eq!(apply().await.metadata.resource_version, settled.metadata.resource_version);
    }
    let ours = settled.metadata.managed_fields.unwrap().into_iter().filter(|held| {
        let manager = held.manager.as_deref().unwrap_or_default();
        manager != "argocd-controller" && held.subresource.is_none()
    });
    let ours: Vec<_> = ours.filter_map(|held| held.manager).collect();
    assert!(!ours.iter().any(|manager| manager == "plimsoll"), "{ours:?}");
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");
}

/// restate-operator#138: a field that the API server writes otherwise led to eight reconciles a second, for ever.
#[tokio::test(flavor = "multi_thread")]
async fn restate_operator_138_measuring_costs_a_write_only_when_a_value_moved() {
    let Some(world) = World::new("measured").await else { return };
    let engine = FakeEngine::start().await;
    engine.tell(300 << 20, 1.5, 10, 2.0, 1000);
    let _operator = world.operator(&["--measure-seconds", "1"]);
    world.bring_up("assistant", json!({})).await;
    let pod = world.list::<Pod>("plimsoll.dev/name").await[0].name_any();
    world
        .merge_status::<Pod>(&pod, json!({"podIP": engine.ip, "podIPs": [{"ip": engine.ip}]}))
        .await;
    let measured = |wanted: MeasuredStatus| {
        world.status("assistant", "what was measured", move |status| {
            (status.measured? == wanted).then_some(())
        })
    };
    let first = MeasuredStatus {
        peak_memory_bytes: Some(300 << 20),
        ttft_microseconds: Some(150_000),
        tpot_microseconds: Some(2000),
    };
    measured(first).await;
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");
    // Five percent more is no news; twice as much is.
    engine.tell(315 << 20, 3.1, 20, 2.0, 1000);
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");
    engine.tell(600 << 20, 3.1, 20, 2.0, 1000);
    measured(MeasuredStatus { peak_memory_bytes: Some(600 << 20), ..first }).await;
    let series = |kind: &str, bytes: i64| {
        format!(
            "plimsoll_llmdeployment_memory_bytes{{namespace=\"{}\",name=\"assistant\",kind=\"{kind}\"}} {bytes}",
            world.namespace
        )
    };
    let mut told = _operator.ask("/metrics");
    // What is served comes from the operator's cache, which hears of the write after us.
    for _ in 0..100 {
        if told.contains(&series("measured", 600 << 20)) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        told = _operator.ask("/metrics");
    }
    assert!(told.contains(&series("measured", 600 << 20)), "{told}");
    let object: LLMDeployment = world.get("assistant").await.unwrap();
    let plan = object.status.unwrap().plan.unwrap();
    assert!(told.contains(&series("predicted", plan.memory_bytes.total)), "{told}");
    let info = format!("hash=\"{}\",quantization=\"None\",dtype=\"F32\"", plan.hash);
    assert!(told.contains("plimsoll_llmdeployment_plan_info{") && told.contains(&info), "{told}");
    // Another revision was not measured yet.
    engine.silence();
    world.merge::<LLMDeployment>("assistant", json!({"spec": {"contextTokens": 512}})).await;
    let gone = |status: &LLMDeploymentStatus| status.measured.is_none().then_some(());
    world.status("assistant", "nothing measured", gone).await;
}

/// What an engine would say at /metrics, on the port of engines at an address of its own.
struct FakeEngine {
    ip: String,
    exposition: Arc<Mutex<Option<String>>>,
}

impl FakeEngine {
    async fn start() -> FakeEngine {
        let ip = format!("127.19.{}.1", std::process::id() % 250);
        let listener = TcpListener::bind((ip.as_str(), 8000)).await.unwrap();
        let exposition = Arc::new(Mutex::new(None::<String>));
        let told = exposition.clone();
        tokio::spawn(async move {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut request = [0; 1024];
                let _ = socket.read(&mut request).await;
                let answer = match told.lock().unwrap().clone() {
                    Some(text) => format!(
                        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
                        text.len()
                    ),
                    None => "HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n".to_owned(),
                };
                let _ = socket.write_all(answer.as_bytes()).await;
            }
        });
        FakeEngine { ip, exposition }
    }

    /// Peak, and seconds and number of first and of next tokens since its start.
    fn tell(&self, peak: i64, ttft: f64, first: u32, itl: f64, next: u32) {
        let labels = r#"{engine="0",model_name="m"}"#;
        let text = format!(
            "plimsoll_peak_memory_bytes{{engine=\"0\",kind=\"process\",model_name=\"m\"}} {peak}\n\
             plimsoll_time_to_first_token_seconds_sum{labels} {ttft}\n\
             plimsoll_time_to_first_token_seconds_count{labels} {first}\n\
             plimsoll_inter_token_latency_seconds_sum{labels} {itl}\n\
             plimsoll_inter_token_latency_seconds_count{labels} {next}\n"
        );
        *self.exposition.lock().unwrap() = Some(text);
    }

    fn silence(&self) {
        *self.exposition.lock().unwrap() = None;
    }
}
