//! Monitors and rules where the cluster knows their kinds, which come and go while the operator runs; the policy around
//! the pods; the protection of pods that load.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt;
use plimsoll_crds::LLMDeployment;
use serde_json::{Value, json};

use crate::QUIET;
use crate::gitops::judges;
use crate::world::World;

/// A definition that takes whatever it is given.
fn definition(kind: &str) -> Value {
    let plural = format!("{}s", kind.to_lowercase());
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.monitoring.coreos.com")},
        "spec": {
            "group": "monitoring.coreos.com", "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object", "properties": {"spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}}],
        },
    })
}

const KINDS: [&str; 2] = ["PodMonitor", "PrometheusRule"];

fn install(world: &World) {
    for kind in KINDS {
        world.kubectl(&["apply", "-f", "-"], &definition(kind));
    }
}

fn uninstall(world: &World) {
    for kind in KINDS {
        world.kubectl(&["delete", "--wait=true", "--timeout=30s", "-f", "-"], &definition(kind));
    }
}

/// The child of that kind, as soon as there is one.
async fn child(world: &World, kind: &str) -> Value {
    let words = [
        "get",
        kind,
        "assistant",
        "--namespace",
        &world.namespace,
        "--ignore-not-found",
        "-o",
        "json",
    ];
    for _ in 0..200 {
        // An unknown kind is an error; it is there in a moment.
        let told = world.try_kubectl(&words).unwrap_or_default();
        if !told.trim().is_empty() {
            return serde_json::from_str(&told).unwrap();
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("no {kind} came about");
}

#[tokio::test(flavor = "multi_thread")]
async fn monitors_and_rules_come_when_the_cluster_learns_their_kinds_and_their_going_hurts_nobody()
{
    let Some(world) = World::new("monitoring").await else { return };
    let operator = world.operator(&["--monitor-label", "release=prometheus"]);
    world.bring_up("assistant", json!({})).await;
    install(&world);
    for kind in KINDS {
        let body = child(&world, kind).await;
        assert_eq!(body["metadata"]["ownerReferences"][0]["name"], "assistant", "{body:#}");
        assert_eq!(body["metadata"]["labels"]["release"], "prometheus", "{body:#}");
        assert_eq!(judges(&["monitoring"], &body).trim(), kind);
    }
    let at_rest = world.requests_during(QUIET).await;
    assert!(at_rest.is_empty(), "{at_rest:#?}");
    // Changed by hand, it comes back.
    let patch = [
        "patch",
        "podmonitor",
        "assistant",
        "--namespace",
        &world.namespace,
        "--type=merge",
        "-p",
        r#"{"spec":{"podMetricsEndpoints":[]}}"#,
    ];
    world.try_kubectl(&patch).unwrap();
    for _ in 0..200 {
        if child(&world, "PodMonitor").await["spec"]["podMetricsEndpoints"][0]["port"] == "http" {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert_eq!(child(&world, "PodMonitor").await["spec"]["podMetricsEndpoints"][0]["port"], "http");

    uninstall(&world);
    world.merge::<LLMDeployment>("assistant", json!({"spec": {"replicas": 2}})).await;
    world.run_pod("assistant", true).await;
    world
        .status("assistant", "two replicas", |status| (status.ready_replicas == 2).then_some(()))
        .await;
    install(&world);
    for kind in KINDS {
        child(&world, kind).await;
    }
    uninstall(&world);
    assert!(operator.stop());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_stands_around_the_pods_and_follows_the_spec_without_a_new_revision() {
    let Some(world) = World::new("policy").await else { return };
    let _operator = world.operator(&["--clients", "namespace"]);
    world.bring_up("assistant", json!({})).await;
    let revision = world.status("assistant", "a revision", |status| status.revision.clone()).await;
    let peers = |policy: &NetworkPolicy| {
        policy.spec.as_ref()?.ingress.as_ref()?.first()?.from.as_ref().map(Vec::len)
    };
    assert_eq!(peers(&world.get::<NetworkPolicy>("assistant").await.unwrap()), Some(3));
    let anyone = json!({"spec": {"network": {"clients": "Anyone"}}});
    world.merge::<LLMDeployment>("assistant", anyone).await;
    world
        .eventually("assistant", "everyone is let in", |policy: &NetworkPolicy| {
            peers(policy).is_none().then_some(())
        })
        .await;
    world.delete::<NetworkPolicy>("assistant").await;
    world.eventually("assistant", "the policy again", |_: &NetworkPolicy| Some(())).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    let after = world.status("assistant", "a revision", |status| status.revision.clone()).await;
    assert_eq!(revision, after);
}

#[tokio::test(flavor = "multi_thread")]
async fn llmkube_660_karpenter_takes_no_node_from_a_pod_that_loads() {
    let Some(world) = World::new("karpenter").await else { return };
    world.label_node("node-0", json!({"karpenter.sh/nodepool": "gpus"})).await;
    let _operator = world.operator(&[]);
    world.declare("assistant", json!({})).await;
    world.finish_inspect(&crate::world::facts(), 0).await;
    world.condition("assistant", "Ready", "False", "CreatingPods").await;
    let name = world.run_pod("assistant", false).await;
    world.condition("assistant", "Ready", "False", "EngineLoading").await;
    let protected = |pod: &Pod| pod.annotations().contains_key("karpenter.sh/do-not-disrupt");
    assert!(protected(&world.get::<Pod>(&name).await.unwrap()));
    let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
    world.merge_status::<Pod>(&name, ready).await;
    world.eventually(&name, "the pod may go", |pod: &Pod| (!protected(pod)).then_some(())).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
}
