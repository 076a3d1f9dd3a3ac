//! The operator's binary against a real API server: children, silence, repair, ownership, revisions, exit reasons,
//! leadership. Schedulers, kubelets and garbage collectors are absent here; the cluster tests have them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on stops where it stands")]

mod figures;
mod gate;
mod gitops;
mod lifecycle;
mod monitoring;
mod scaling;
mod stops;
mod world;

use std::time::Duration;

use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Service, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;
use plimsoll_crds::LLMDeployment;
use serde_json::json;

use world::{World, facts};

const QUIET: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread")]
async fn an_object_becomes_children_of_one_revision_and_ready_follows_its_pods() {
    let Some(world) = World::new("children").await else { return };
    let _operator = world.operator(&[]);
    world.declare("assistant", json!({})).await;

    world.condition("assistant", "ModelReady", "False", "Inspecting").await;
    world.condition("assistant", "Reconciling", "True", "Inspecting").await;
    assert!(world.get::<Deployment>("assistant").await.is_none(), "nothing runs before the facts");
    let job = world.finish_inspect(&facts(), 0).await;
    world.condition("assistant", "Ready", "False", "CreatingPods").await;
    world.eventually_gone::<Job>(&job.name_any()).await;

    let revision = world.status("assistant", "a revision", |status| status.revision.clone()).await;
    let stored: ControllerRevision = world.get(&revision).await.unwrap();
    let deployment: Deployment = world.get("assistant").await.unwrap();
    let hash = &stored.labels()["plimsoll.dev/revision"];
    assert_eq!(revision, format!("assistant-{hash}"));
    let spec = deployment.spec.clone();
    let pod_labels = spec.template.metadata.clone().unwrap().labels.unwrap();
    assert_eq!(&pod_labels["plimsoll.dev/revision"], hash);
    let service: Service = world.get("assistant").await.unwrap();
    let selector = service.spec.unwrap().selector.unwrap();
    assert!(selector.iter().all(|(name, value)| pod_labels.get(name) == Some(value)));
    let account: ServiceAccount = world.get("assistant").await.unwrap();
    assert_eq!(account.automount_service_account_token, Some(false));
    assert!(world.get::<PodDisruptionBudget>("assistant").await.is_none());
    let owner = &deployment.owner_references()[0];
    assert_eq!((owner.controller, owner.block_owner_deletion), (Some(true), Some(true)));

    let pod = world.run_pod("assistant", false).await;
    world.condition("assistant", "Scheduled", "True", "PodsScheduled").await;
    world.condition("assistant", "Ready", "False", "EngineLoading").await;
    let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
    world.merge_status::<Pod>(&pod, ready).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    let object: LLMDeployment = world.get("assistant").await.unwrap();
    let status = object.status.unwrap();
    assert_eq!(status.observed_generation, object.metadata.generation);
    assert!(
        status.conditions.iter().all(|held| held.observed_generation == object.metadata.generation)
    );
    assert!(!status.conditions.iter().any(|held| held.type_ == "Reconciling"));
    assert_eq!((status.replicas, status.ready_replicas), (1, 1));
    assert_eq!(status.url.unwrap(), format!("http://assistant.{}.svc", world.namespace));
    world.told("Serving", &[]).await;
    let events = world.list::<Event>("").await;
    let reasons: Vec<_> = events.iter().filter_map(|event| event.reason.as_deref()).collect();
    assert_eq!(reasons.iter().filter(|reason| **reason == "Serving").count(), 1, "{reasons:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manifest_of_the_readme_is_planned_as_it_stands() {
    let Some(world) = World::new("readme").await else { return };
    let _operator = world.operator(&[]);
    let readme = include_str!("../../../README.md");
    let manifest = readme.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next());
    let object: serde_json::Value = serde_yaml_ng::from_str(manifest.unwrap()).unwrap();
    let name = object["metadata"]["name"].as_str().unwrap().to_owned();
    world.create::<LLMDeployment>(object).await;
    world.condition(&name, "ModelReady", "False", "Inspecting").await;
    world.finish_inspect(&facts(), 0).await;
    world.condition(&name, "Planned", "True", "PlanChosen").await;
    world.eventually(&name, "a Deployment", |held: &Deployment| Some(held.clone())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_rest_and_after_a_restart_nothing_is_written() {
    let Some(world) = World::new("rest").await else { return };
    let operator = world.operator(&["--engine-image", "example/engine:1"]);
    // Quantities as people write them and the API server does not keep them.
    let resources =
        json!({"requests": {"cpu": "1000m", "memory": "2048Mi"}, "limits": {"memory": "2048Mi"}});
    let engine = json!({"name": "engine", "resources": resources});
    let overlay = json!({"spec": {"containers": [engine], "imagePullSecrets": []}});
    world.bring_up("assistant", json!({"replicas": 2, "podTemplate": overlay})).await;
    let metrics = operator.ask("/metrics");
    assert!(metrics.contains("type=\"Ready\",status=\"True\",reason=\"Serving\"} 1"), "{metrics}");
    assert!(metrics.contains("plimsoll_operator_reconcile_total{result=\"success\"}"), "{metrics}");
    assert!(operator.ask("/readyz").starts_with("HTTP/1.1 200"));
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");
    assert!(operator.stop());

    // The next version of the operator would render another image; the revision stands.
    let before = world.writes().len();
    let operator = world.operator(&["--engine-image", "example/engine:2"]);
    world
        .eventually::<Lease, _>("plimsoll-operator", "the next operator leads", |lease| {
            lease.spec.as_ref()?.holder_identity.as_deref().filter(|held| !held.is_empty())?;
            Some(())
        })
        .await;
    tokio::time::sleep(QUIET).await;
    let after = world.writes().split_off(before);
    assert!(after.is_empty(), "{after:#?}\n{}", operator.log());
    assert_eq!(world.list::<ControllerRevision>("").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn children_changed_or_deleted_by_hand_come_back() {
    let Some(world) = World::new("repair").await else { return };
    let _operator = world.operator(&[]);
    world.bring_up("assistant", json!({})).await;
    let replicas = |deployment: &Deployment| deployment.spec.replicas.filter(|count| *count == 1);
    world.merge::<Deployment>("assistant", json!({"spec": {"replicas": 5}})).await;
    world.eventually("assistant", "one replica again", replicas).await;
    let patch = json!({"spec": {"ports": [{"name": "http", "port": 81, "targetPort": "http"}]}});
    world.merge::<Service>("assistant", patch).await;
    world
        .eventually("assistant", "port 80 again", |service: &Service| {
            let ports = service.spec.as_ref()?.ports.as_ref()?;
            ports.iter().any(|port| port.port == 80).then_some(())
        })
        .await;
    world.delete::<Service>("assistant").await;
    world.delete::<Deployment>("assistant").await;
    world.eventually("assistant", "the Service again", |_: &Service| Some(())).await;
    world.eventually("assistant", "the Deployment again", replicas).await;
    world
        .merge::<ServiceAccount>(
            "assistant",
            json!({"metadata": {"labels": {"app.kubernetes.io/managed-by": null}}}),
        )
        .await;
    world
        .eventually("assistant", "our label again", |account: &ServiceAccount| {
            account.labels().get("app.kubernetes.io/managed-by").cloned()
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_status_comes_back_and_changes_no_child() {
    let Some(world) = World::new("lost").await else { return };
    let _operator = world.operator(&[]);
    world.bring_up("assistant", json!({})).await;
    let before = world.get::<LLMDeployment>("assistant").await.unwrap().status.unwrap();
    let writes = world.writes().len();
    world.merge_status::<LLMDeployment>("assistant", json!(null)).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    let after = world.get::<LLMDeployment>("assistant").await.unwrap().status.unwrap();
    assert_eq!(
        (before.revision, before.plan, before.model),
        (after.revision, after.plan, after.model)
    );
    let kinds: Vec<_> =
        world.writes().split_off(writes).into_iter().map(|write| write.resource).collect();
    assert!(kinds.iter().all(|kind| kind == "llmdeployments" || kind == "events"), "{kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_of_someone_else_is_never_taken_over() {
    let Some(world) = World::new("foreign").await else { return };
    let theirs = json!({"metadata": {"name": "assistant", "labels": {"app": "theirs"}},
        "spec": {"ports": [{"port": 9}], "selector": {"app": "theirs"}}});
    let theirs: Service = world.create(theirs).await;
    let _operator = world.operator(&[]);
    world.declare("assistant", json!({})).await;
    world.finish_inspect(&facts(), 0).await;
    let message = world.condition("assistant", "Stalled", "True", "ChildRejected").await;
    assert!(message.contains("Service assistant"), "{message}");
    let after: Service = world.get("assistant").await.unwrap();
    assert_eq!(theirs.metadata.resource_version, after.metadata.resource_version);
}

#[tokio::test(flavor = "multi_thread")]
async fn scaling_and_suspending_change_the_number_of_pods_and_no_revision() {
    let Some(world) = World::new("scale").await else { return };
    let _operator = world.operator(&[]);
    world.bring_up("assistant", json!({})).await;
    let wants = |count: i32| {
        move |deployment: &Deployment| (deployment.spec.replicas == Some(count)).then_some(())
    };
    let scale = kube::api::Patch::Merge(json!({"spec": {"replicas": 3}}));
    let objects: kube::Api<LLMDeployment> = world.api();
    objects.patch_scale("assistant", &Default::default(), &scale).await.unwrap();
    world.eventually("assistant", "three replicas", wants(3)).await;
    world.eventually("assistant", "a budget", |_: &PodDisruptionBudget| Some(())).await;
    world.condition("assistant", "Ready", "False", "CreatingPods").await;
    let selector = objects.get_scale("assistant").await.unwrap().status.unwrap().selector;
    assert_eq!(selector.as_deref(), Some("plimsoll.dev/name=assistant"));
    world.merge::<LLMDeployment>("assistant", json!({"spec": {"suspend": true}})).await;
    world.eventually("assistant", "no replica", wants(0)).await;
    world.eventually_gone::<PodDisruptionBudget>("assistant").await;
    world.condition("assistant", "Ready", "False", "Suspended").await;
    let suspend = json!({"spec": {"suspend": false, "replicas": 1}});
    world.merge::<LLMDeployment>("assistant", suspend).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    assert_eq!(world.list::<ControllerRevision>("").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_spec_is_a_new_revision_and_ready_counts_its_pods_only() {
    let Some(world) = World::new("revisions").await else { return };
    let _operator = world.operator(&[]);
    world.bring_up("assistant", json!({})).await;
    let old = world.status("assistant", "a revision", |status| status.revision.clone()).await;
    let spec = json!({"spec": {"podTemplate": {"metadata": {"annotations": {"team": "a"}}}}});
    world.merge::<LLMDeployment>("assistant", spec).await;
    world.condition("assistant", "Ready", "False", "RollingOut").await;
    world.condition("assistant", "Available", "True", "Serving").await;
    world.run_pod("assistant", true).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    assert!(world.list::<Job>("").await.is_empty(), "the facts were known");

    // Going back takes the revision that stands.
    world.merge::<LLMDeployment>("assistant", json!({"spec": {"podTemplate": null}})).await;
    world
        .status("assistant", "the old revision", |status| {
            (status.revision.as_ref() == Some(&old)).then_some(())
        })
        .await;
    for team in 0..8 {
        let annotations = json!({"team": format!("t{team}")});
        let spec = json!({"spec": {"podTemplate": {"metadata": {"annotations": annotations}}}});
        let changed: LLMDeployment = world.merge("assistant", spec).await;
        world
            .status("assistant", "the change seen", |status| {
                (status.observed_generation == changed.metadata.generation).then_some(())
            })
            .await;
    }
    assert_eq!(
        world.list::<ControllerRevision>("").await.len(),
        7,
        "five beside the one that stands and the last that served, to go back to"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_one_source_share_one_inspect_job_and_its_facts() {
    let Some(world) = World::new("shared").await else { return };
    let _operator = world.operator(&[]);
    world.declare("one", json!({})).await;
    world.declare("two", json!({})).await;
    for name in ["one", "two"] {
        world.condition(name, "ModelReady", "False", "Inspecting").await;
    }
    let around = world.list::<NetworkPolicy>("plimsoll.dev/model").await;
    let names: Vec<String> = around.iter().map(NetworkPolicy::name_any).collect();
    assert_eq!(names, [world.inspect_job().await.name_any()], "a policy of the Job's name");
    world.finish_inspect(&facts(), 0).await;
    for name in ["one", "two"] {
        world.condition(name, "Planned", "True", "PlanChosen").await;
    }
    let kept = world.list::<ConfigMap>("plimsoll.dev/model").await;
    assert_eq!(kept.len(), 1);
    let left = world.list::<NetworkPolicy>("plimsoll.dev/model").await;
    assert!(left.is_empty(), "the policy goes with its Job");
    world
        .eventually(&kept[0].name_any(), "two owners", |facts: &ConfigMap| {
            (facts.owner_references().len() == 2).then_some(())
        })
        .await;
    world.declare("three", json!({})).await;
    world.condition("three", "Planned", "True", "PlanChosen").await;
    let jobs = world
        .requests()
        .into_iter()
        .filter(|seen| seen.resource == "jobs" && seen.verb == "create" && seen.code == 201);
    assert_eq!(jobs.count(), 1);

    // Another source gives up the share; the last one takes the facts along.
    let elsewhere = json!({"spec": {"model": {"source": "pvc://elsewhere/model"}}});
    for name in ["one", "two", "three"] {
        world.merge::<LLMDeployment>(name, elsewhere.clone()).await;
    }
    world.finish_inspect(&facts(), 0).await;
    world.eventually_gone::<ConfigMap>(&kept[0].name_any()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_person_must_mend_stalls_with_the_engines_reason() {
    let Some(world) = World::new("exits").await else { return };
    let _operator = world.operator(&[]);
    world.declare("assistant", json!({})).await;
    let report = json!({"reason": "UnsupportedModel", "message": "architecture FooForCausalLM is not known"});
    world.finish_inspect(&report, 14).await;
    let message = world.condition("assistant", "Stalled", "True", "UnsupportedModel").await;
    assert!(message.contains("FooForCausalLM") && message.contains("inspect-"), "{message}");

    // Deleting the Job tries again.
    let job = world.inspect_job().await.name_any();
    world.delete::<Job>(&job).await;
    world.delete::<Pod>(&format!("{job}-pod")).await;
    world.condition("assistant", "Reconciling", "True", "Inspecting").await;
    world.finish_inspect(&facts(), 0).await;
    world.condition("assistant", "Planned", "True", "PlanChosen").await;
    let pod = world.run_pod("assistant", false).await;
    let report = json!({"reason": "DoesNotFit", "message": "needs 3 GiB, has 2 GiB"}).to_string();
    let ended = json!({"terminated": {"exitCode": 10, "message": report}});
    let container = json!({"name": "engine", "image": "i", "imageID": "i", "ready": false, "restartCount": 1,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": ended});
    world.merge_status::<Pod>(&pod, json!({"containerStatuses": [container]})).await;
    let message = world.condition("assistant", "Stalled", "True", "DoesNotFit").await;
    assert!(message.contains("3 GiB"), "{message}");
    world.condition("assistant", "EngineLoaded", "False", "DoesNotFit").await;
    let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
    world.merge_status::<Pod>(&pod, ready).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    world
        .status("assistant", "no Stalled", |status| {
            (!status.conditions.iter().any(|held| held.type_ == "Stalled")).then_some(())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_counts_what_pods_of_others_ask_for_and_not_its_own() {
    let Some(world) = World::new("neighbours").await else { return };
    let _operator = world.operator(&[]);
    let asks = json!({"name": "c", "image": "i", "resources": {"requests": {"memory": "14Gi"}}});
    let spec = json!({"nodeName": "node-0", "containers": [asks]});
    world.create::<Pod>(json!({"metadata": {"name": "neighbour"}, "spec": spec})).await;
    world.bring_up("assistant", json!({})).await;
    let planned_for = |context: i64, capacity: i64| {
        world.status("assistant", "the plan", move |status| {
            let plan = status.plan.as_ref()?;
            let is_it = plan.context_tokens == context && plan.memory_bytes.capacity == capacity;
            is_it.then(|| plan.why.clone())
        })
    };
    let why = planned_for(2048, 2 << 30).await;
    assert!(why.contains("16.0 GiB less 14.0 GiB for other pods of this namespace"), "{why}");
    // Its own pod runs by now and asks for memory, which the next revision will have instead.
    world.merge::<LLMDeployment>("assistant", json!({"spec": {"contextTokens": 1024}})).await;
    planned_for(1024, 2 << 30).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_one_pod_more_has_no_room_an_update_replaces_pods_in_place_and_says_so() {
    let Some(world) = World::new("room").await else { return };
    let _operator = world.operator(&[]);
    let asks = json!({"name": "c", "image": "i", "resources": {"requests": {"cpu": "7"}}});
    let spec = json!({"nodeName": "node-0", "containers": [asks]});
    world.create::<Pod>(json!({"metadata": {"name": "neighbour"}, "spec": spec})).await;
    world.bring_up("assistant", json!({"resources": {"cpu": "800m"}})).await;
    let deployment: Deployment = world.get("assistant").await.unwrap();
    let strategy = serde_json::to_value(deployment.spec.strategy).unwrap();
    assert_eq!(strategy["rollingUpdate"], json!({"maxSurge": 0, "maxUnavailable": 1}));
    let why = world.status("assistant", "a plan", |status| status.plan.clone()).await.why;
    assert!(why.contains("room for 1 replica and no pod more"), "{why}");
    world.told("PlanChosen", &["no pod more"]).await;
    // With less to ask for, one more fits.
    let less = json!({"spec": {"resources": {"cpu": "400m"}}});
    world.merge::<LLMDeployment>("assistant", less).await;
    world
        .eventually("assistant", "a surge again", |held: &Deployment| {
            let strategy = serde_json::to_value(&held.spec.strategy).unwrap();
            (strategy["rollingUpdate"]["maxSurge"] == 1).then_some(())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_a_labelled_gpu_gets_the_pod_and_one_without_labels_is_named() {
    let Some(world) = World::new("gpu").await else { return };
    world.add_gpu_node("gpu-0", json!({"nvidia.com/gpu.product": "NVIDIA-H200"})).await;
    let _operator = world.operator(&[]);
    world.bring_up("assistant", json!({})).await;
    let plan = world.status("assistant", "a plan", |status| status.plan.clone()).await;
    assert_eq!(plan.accelerator, "cpu");
    let unusable = plan.rejected.iter().find(|other| other.candidate.contains("nvidia-h200"));
    let why = &unusable.unwrap().why;
    assert!(why.starts_with("gpu-0: ") && why.contains("install GPU feature discovery"), "{why}");

    // What runs is left alone when the label comes, and the GPU is offered; the next spec is planned with it.
    world.label_node("gpu-0", json!({"nvidia.com/gpu.memory": "143771"})).await;
    world.status("assistant", "an offer", |status| status.offered.clone()).await;
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");
    let plan = world.status("assistant", "a plan", |status| status.plan.clone()).await;
    assert_eq!(plan.accelerator, "cpu");
    let taint = json!([{"key": "team", "operator": "Exists"}]);
    let overlay = json!({"spec": {"podTemplate": {"spec": {"tolerations": taint}}}});
    world.merge::<LLMDeployment>("assistant", overlay).await;
    let plan = world
        .status("assistant", "a plan for the GPU", |status| {
            status.plan.clone().filter(|plan| plan.accelerator == "nvidia-h200")
        })
        .await;
    assert_eq!((plan.quantization.as_str(), plan.dtype.as_str()), ("None", "BF16"));
    assert_eq!(plan.memory_bytes.capacity, (143_771 - 1024 - 640) << 20);
    assert!(plan.why.contains("on the nvidia-h200 of gpu-0"), "{}", plan.why);
    let pod = world
        .eventually("assistant", "a GPU pod", |held: &Deployment| {
            let pod = held.spec.template.spec.clone()?;
            pod.node_selector.is_some().then_some(pod)
        })
        .await;
    assert_eq!(pod.node_selector.unwrap()["nvidia.com/gpu.product"], "NVIDIA-H200");
    let tolerations = serde_json::to_value(pod.tolerations.unwrap()).unwrap();
    let ours = json!({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"});
    assert_eq!(tolerations, json!([taint[0], ours]));
    let engine = serde_json::to_value(&pod.containers[0]).unwrap();
    assert_eq!(engine["resources"]["limits"], json!({"memory": "2560Mi", "nvidia.com/gpu": "1"}));
    let requests = json!({"cpu": "2", "memory": "1280Mi", "nvidia.com/gpu": "1"});
    assert_eq!(engine["resources"]["requests"], requests);
    let arguments = engine["args"].to_string();
    assert!(arguments.contains("--device=cuda") && !arguments.contains("--memory-bytes"));
    world.run_pod("assistant", true).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_does_not_fit_a_bad_overlay_and_a_forbidden_source_stall() {
    let Some(world) = World::new("stalls").await else { return };
    let _operator = world.operator(&[]);
    world.declare("assistant", json!({"resources": {"memory": "1Mi"}})).await;
    world.finish_inspect(&facts(), 0).await;
    world.condition("assistant", "Stalled", "True", "DoesNotFit").await;
    let overlay = json!({"resources": null, "podTemplate": {"spec": {"containers": [
        {"name": "engine", "imagePullPolicy": "Perhaps"}]}}});
    world.merge::<LLMDeployment>("assistant", json!({"spec": overlay})).await;
    let message = world.condition("assistant", "Stalled", "True", "ChildRejected").await;
    assert!(message.contains("imagePullPolicy"), "{message}");
    assert!(world.get::<Deployment>("assistant").await.is_none());
    let reaching = json!({"podTemplate": {"spec": {"containers": null, "hostNetwork": true}}});
    world.merge::<LLMDeployment>("assistant", json!({"spec": reaching})).await;
    let message = world.condition("assistant", "Stalled", "True", "InvalidSpec").await;
    assert!(message.contains("hostNetwork"), "{message}");
    world.merge::<LLMDeployment>("assistant", json!({"spec": {"podTemplate": null}})).await;
    world.condition("assistant", "Reconciling", "True", "CreatingPods").await;
    world.declare("local", json!({"model": {"source": "file:///models/tiny"}})).await;
    world.condition("local", "Stalled", "True", "SourceNotAllowed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spec_that_reaches_out_stalls_and_what_ran_before_it_stays_in_repair() {
    let Some(world) = World::new("reach").await else { return };
    let _operator = world.operator(&[]);
    world.bring_up("assistant", json!({})).await;
    let reaching = json!({"spec": {"podTemplate": {"spec": {"hostPID": true}}}});
    world.merge::<LLMDeployment>("assistant", reaching).await;
    let message = world.condition("assistant", "Stalled", "True", "InvalidSpec").await;
    assert!(message.contains("spec.hostPID"), "{message}");
    world.merge::<Deployment>("assistant", json!({"spec": {"replicas": 5}})).await;
    let replicas = |held: &Deployment| held.spec.replicas.filter(|count| *count == 1);
    world.eventually("assistant", "one replica again", replicas).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_started_without_host_paths_says_so_of_what_runs_and_leaves_it_alone() {
    let Some(world) = World::new("barred").await else { return };
    let operator = world.operator(&["--allow-host-path"]);
    let source = json!({"model": {"source": "file:///models/tiny"}, "replicas": 2});
    world.bring_up("assistant", source).await;
    assert!(operator.stop());

    let _operator = world.operator(&[]);
    let message = world.condition("assistant", "Stalled", "True", "SourceNotAllowed").await;
    assert!(message.contains("--allow-host-path"), "{message}");
    world.condition("assistant", "Available", "True", "Serving").await;
    let pods = world.list::<Pod>("plimsoll.dev/name").await;
    assert_eq!(pods.len(), 2);
    world.delete::<Deployment>("assistant").await;
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.iter().all(|seen| seen.resource != "deployments"), "{at_rest:#?}");
    assert!(world.get::<Deployment>("assistant").await.is_none(), "it is not rendered again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_model_is_downloaded_once_where_storage_allows_and_per_pod_where_not() {
    let Some(world) = World::new("hub").await else { return };
    let _operator = world.operator(&["--hub-endpoint", "http://hub.example"]);
    let source =
        json!({"source": "hf://org/tiny@main", "credentials": {"secretRef": {"name": "hf"}}});
    world.declare("assistant", json!({"model": source})).await;
    let job = world.inspect_job().await;
    let pod = job.spec.unwrap().template.spec.unwrap();
    let fetch = &pod.init_containers.unwrap()[0];
    assert_eq!(fetch.args.as_ref().unwrap()[..2], ["fetch", "hf://org/tiny@main"]);
    assert_eq!(fetch.env.as_ref().unwrap()[0].value.as_deref(), Some("http://hub.example"));
    let claims = world.list::<PersistentVolumeClaim>("plimsoll.dev/model").await;
    assert_eq!(claims.len(), 1);
    let mut told = facts();
    told["revision"] = "0123abcd".into();
    world.finish_inspect(&told, 0).await;
    let status = world.status("assistant", "a model", |status| status.model.clone()).await;
    assert_eq!(status.revision.as_deref(), Some("0123abcd"));
    let message = world.condition("assistant", "ModelReady", "True", "ModelFound").await;
    assert!(message.contains("no more than one node takes pods"), "{message}");
    let deployment: Deployment =
        world.eventually("assistant", "a Deployment", |held: &Deployment| Some(held.clone())).await;
    assert!(deployment.spec.template.spec.unwrap().init_containers.is_none());

    world.set_nodes(2).await;
    let other = json!({"spec": {"model": {"source": "hf://org/other"}}});
    world.merge::<LLMDeployment>("assistant", other).await;
    told["revision"] = "4567cdef".into();
    world.condition("assistant", "ModelReady", "False", "Inspecting").await;
    let job = world.finish_inspect(&told, 0).await;
    let pod = job.spec.unwrap().template.spec.unwrap();
    assert_eq!(pod.init_containers, None, "the headers are enough");
    assert_eq!(pod.containers[0].args.as_ref().unwrap()[..2], ["inspect", "hf://org/other@main"]);
    let template = world
        .eventually("assistant", "an init container", |held: &Deployment| {
            held.spec.template.spec.as_ref()?.init_containers.clone()
        })
        .await;
    assert_eq!(template[0].args.as_ref().unwrap()[1], "hf://org/other@4567cdef");
    let message = world.condition("assistant", "ModelReady", "True", "ModelFound").await;
    assert!(message.contains("ReadWriteMany"), "{message}");

    // What older pods may serve from is given up only once the new revision answers.
    let old = world.list::<PersistentVolumeClaim>("plimsoll.dev/model").await;
    assert!(old[0].metadata.deletion_timestamp.is_none(), "{old:#?}");
    world.run_pod("assistant", true).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    for _ in 0..200 {
        let claims = world.list::<PersistentVolumeClaim>("plimsoll.dev/model").await;
        if claims.iter().all(|claim| claim.metadata.deletion_timestamp.is_some()) {
            world.set_nodes(1).await;
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the download of a model that nothing serves is still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_download_is_made_again_at_the_commit_that_the_revision_pins() {
    let Some(world) = World::new("lost").await else { return };
    let _operator = world.operator(&[]);
    world.declare("assistant", json!({"model": {"source": "hf://org/tiny@main"}})).await;
    let mut told = facts();
    told["revision"] = "0123abcd".into();
    let first = world.finish_inspect(&told, 0).await;
    world.condition("assistant", "Planned", "True", "PlanChosen").await;
    world.eventually("assistant", "a Deployment", |held: &Deployment| Some(held.clone())).await;
    let claims = world.list::<PersistentVolumeClaim>("plimsoll.dev/model").await;
    let claim = claims[0].name_any();
    let unprotected = json!({"metadata": {"finalizers": null}});
    world.merge::<PersistentVolumeClaim>(&claim, unprotected).await;
    world.delete::<PersistentVolumeClaim>(&claim).await;
    let again = world.inspect_job().await;
    assert_ne!(again.uid(), first.uid());
    let pod = again.spec.unwrap().template.spec.unwrap();
    let arguments = pod.init_containers.unwrap()[0].args.clone().unwrap();
    assert_eq!(arguments[1], "hf://org/tiny@0123abcd", "not what the branch is by then");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mended_spec_gets_an_inspect_job_of_its_own() {
    let Some(world) = World::new("mended").await else { return };
    let _operator = world.operator(&[]);
    world.declare("assistant", json!({"model": {"source": "hf://org/gated"}})).await;
    let report = json!({"reason": "ModelUnauthorized", "message": "the hub says 401"});
    let failed = world.finish_inspect(&report, 13).await;
    world.condition("assistant", "Stalled", "True", "ModelUnauthorized").await;
    let mended = json!({"spec": {"model": {"credentials": {"secretRef": {"name": "hub"}}}}});
    world.merge::<LLMDeployment>("assistant", mended).await;
    world.condition("assistant", "ModelReady", "False", "Inspecting").await;
    let job = world.inspect_job().await;
    assert_ne!(job.uid(), failed.uid());
    let pod = job.spec.unwrap().template.spec.unwrap();
    let arguments = pod.init_containers.unwrap()[0].args.clone().unwrap();
    assert!(arguments.contains(&"--token-file".to_owned()), "{arguments:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_operator_leads_and_the_next_takes_over_when_it_ends() {
    let Some(world) = World::new("leader").await else { return };
    let holder = |lease: &Lease| {
        lease.spec.as_ref()?.holder_identity.clone().filter(|holder| !holder.is_empty())
    };
    let first = world.operator(&[]);
    let led = world.eventually("plimsoll-operator", "a leader", holder).await;
    let second = world.operator(&[]);
    tokio::time::sleep(QUIET).await;
    assert!(second.log().contains("leading") != first.log().contains("leading"), "one leads");
    assert!(first.stop(), "a leader that is asked to end does so in order");
    world
        .eventually("plimsoll-operator", "another leader", |lease: &Lease| {
            holder(lease).filter(|holder| *holder != led)
        })
        .await;
    world.declare("assistant", json!({})).await;
    world.condition("assistant", "ModelReady", "False", "Inspecting").await;

    // Someone who takes the Lease away ends the operator that held it.
    let stolen = json!({"spec": {"holderIdentity": "thief"}});
    world.merge::<Lease>("plimsoll-operator", stolen).await;
    let gone = || {
        !std::path::Path::new(&format!("/proc/{}/stat", second.process())).exists()
            || second.log().contains("no longer leading")
    };
    for _ in 0..400 {
        if gone() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("an operator without a Lease goes on: {}", second.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_of_two_installations_in_one_namespace_ask_for_leases_of_their_own() {
    let Some(world) = World::new("two-leases").await else { return };
    let holder = |lease: &Lease| {
        lease.spec.as_ref()?.holder_identity.clone().filter(|holder| !holder.is_empty())
    };
    let _first = world.operator(&[]);
    let first = world.eventually("plimsoll-operator", "a leader", holder).await;
    let _second = world.operator(&["--lease-name", "another"]);
    let second = world.eventually("another", "a leader of its own", holder).await;
    assert_ne!(first, second);
    let waiting = world.operator(&["--lease-name", "another"]);
    for _ in 0..200 {
        if waiting.log().contains("waiting: another operator holds the Lease") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("who waits does not say so: {}", waiting.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_object_is_left_to_the_garbage_collector_and_every_child_names_its_owner() {
    let Some(world) = World::new("deletion").await else { return };
    let _operator = world.operator(&[]);
    let object = world.bring_up("assistant", json!({"replicas": 2})).await;
    let uid = object.uid().unwrap();
    let mut owners = Vec::new();
    owners.extend(
        world.list::<Service>("").await.iter().map(|held| held.owner_references().to_vec()),
    );
    owners.extend(
        world.list::<Deployment>("").await.iter().map(|held| held.owner_references().to_vec()),
    );
    owners.extend(
        world
            .list::<PodDisruptionBudget>("")
            .await
            .iter()
            .map(|held| held.owner_references().to_vec()),
    );
    owners.extend(
        world
            .list::<ControllerRevision>("")
            .await
            .iter()
            .map(|held| held.owner_references().to_vec()),
    );
    owners.extend(
        world
            .list::<ConfigMap>("plimsoll.dev/model")
            .await
            .iter()
            .map(|held| held.owner_references().to_vec()),
    );
    assert_eq!(owners.len(), 5);
    assert!(owners.iter().flatten().all(|owner| owner.uid == uid));
    let writes = world.writes().len();
    world.delete::<LLMDeployment>("assistant").await;
    tokio::time::sleep(QUIET).await;
    let after = world.writes().split_off(writes);
    assert!(after.is_empty(), "{after:#?}");

    // The same name again, while the children of the first still stand: they are not taken over.
    world.declare("assistant", json!({"replicas": 2})).await;
    world.condition("assistant", "Ready", "False", "CreatingPods").await;
    let deployment: Deployment = world.get("assistant").await.unwrap();
    assert_eq!(deployment.owner_references()[0].uid, uid);
}
