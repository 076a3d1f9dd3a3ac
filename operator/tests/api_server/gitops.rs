//! What GitOps tools see: whether they take an object for done, for failed or for under way at each step of its life, and
//! that the same manifest applied again and again changes nothing. The judges are the tools' own libraries.

use std::io::Write as _;
use std::process::{Command, Stdio};

use plimsoll_crds::LLMDeployment;
use plimsoll_tests::cluster::Tools;
use plimsoll_tests::install::root;
use serde_json::{Value, json};

use crate::QUIET;
use crate::world::{World, facts};

/// In the order kstatus, Flux, Argo CD.
type Judgement = [&'static str; 3];

const UNDER_WAY: Judgement = ["InProgress", "InProgress", "Progressing"];
const DONE: Judgement = ["Current", "Current", "Healthy"];
const FAILED: Judgement = ["Failed", "Failed", "Degraded"];
/// kstatus takes an object that is not Ready for one on its way; the other two were told better.
const ASLEEP: Judgement = ["InProgress", "Current", "Suspended"];
const AT_ZERO: Judgement = ["InProgress", "Current", "Healthy"];

#[tokio::test(flavor = "multi_thread")]
async fn argo_cd_29599_kserve_3973_every_state_has_its_health_and_none_is_progressing_for_ever() {
    let Some(world) = World::new("health").await else { return };
    world.declare("assistant", json!({})).await;
    judged(&world, "nobody has looked", UNDER_WAY).await;
    let _operator = world.operator(&[]);
    world.condition("assistant", "ModelReady", "False", "Inspecting").await;
    judged(&world, "inspecting", UNDER_WAY).await;
    world.finish_inspect(&facts(), 0).await;
    world.condition("assistant", "Ready", "False", "CreatingPods").await;
    judged(&world, "creating pods", UNDER_WAY).await;
    world.run_pod("assistant", true).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    judged(&world, "serving", DONE).await;

    change(&world, json!({"contextTokens": 1024})).await;
    world.condition("assistant", "Ready", "False", "RollingOut").await;
    judged(&world, "rolling out", UNDER_WAY).await;
    change(&world, json!({"contextTokens": null})).await;
    world.condition("assistant", "Ready", "True", "Serving").await;
    judged(&world, "back again", DONE).await;
    change(&world, json!({"suspend": true})).await;
    world.condition("assistant", "Ready", "False", "Suspended").await;
    judged(&world, "suspended", ASLEEP).await;
    change(&world, json!({"suspend": false, "replicas": 0})).await;
    world.condition("assistant", "Ready", "False", "ScaledToZero").await;
    judged(&world, "scaled to zero", AT_ZERO).await;
    change(&world, json!({"replicas": 1, "model": {"source": "file:///etc"}})).await;
    world.condition("assistant", "Stalled", "True", "SourceNotAllowed").await;
    judged(&world, "stalled", FAILED).await;
}

/// A change, and the wait until the operator has seen it.
async fn change(world: &World, spec: Value) {
    let changed: LLMDeployment = world.merge("assistant", json!({"spec": spec})).await;
    world
        .status("assistant", "the change is seen", |status| {
            (status.observed_generation == changed.metadata.generation).then_some(())
        })
        .await;
}

async fn judged(world: &World, when: &str, expected: Judgement) {
    let object: LLMDeployment = world.get("assistant").await.unwrap();
    let object = serde_json::to_value(object).unwrap();
    let told = judge(&object);
    let said = ["kstatus", "flux", "argo"].map(|judge| told[judge]["status"].as_str().unwrap());
    assert_eq!(said, expected, "{when}: {told:#}\n{:#}", object["status"]);
}

fn judge(object: &Value) -> Value {
    let health = root().join("gitops/argo-cd/plimsoll.dev/LLMDeployment/health.lua");
    let flux = root().join("gitops/flux/kustomization.yaml");
    let output =
        judges(&["health", &health.display().to_string(), &flux.display().to_string()], object);
    serde_json::from_str(&output).unwrap()
}

pub fn judges(arguments: &[&str], object: &Value) -> String {
    let mut command = Command::new(Tools::find().unwrap().judges);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(object.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{object:#}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn kserve_5353_the_same_manifest_every_minute_is_no_drift() {
    let Some(world) = World::new("drift").await else { return };
    let _operator = world.operator(&[]);
    let manifest = |name: &str| {
        json!({
            "apiVersion": "plimsoll.dev/v1alpha1", "kind": "LLMDeployment",
            "metadata": {"name": name, "namespace": world.namespace},
            "spec": {
                "model": {"source": "pvc://models/tiny"}, "workload": {"concurrency": 4},
                "network": {"clients": "Namespace"}, "resources": {"memory": "2048Mi"},
            },
        })
    };
    // Each tool in its own way, and each its own object: two that apply one object by turns do write.
    let by_client = ["apply", "-f", "-"];
    let by_server = ["apply", "--server-side", "--field-manager=argocd-controller", "-f", "-"];
    let ways = [("by-client", &by_client[..]), ("by-server", &by_server[..])];
    for (index, (name, words)) in ways.into_iter().enumerate() {
        world.kubectl(words, &manifest(name));
        if index == 0 {
            world.finish_inspect(&facts(), 0).await;
        }
        world.condition(name, "Ready", "False", "CreatingPods").await;
        world.run_pod(name, true).await;
        world.condition(name, "Ready", "True", "Serving").await;
    }
    // What the last change still brings.
    tokio::time::sleep(QUIET).await;
    for (name, words) in ways {
        let before: LLMDeployment = world.get(name).await.unwrap();
        for _ in 0..5 {
            world.kubectl(words, &manifest(name));
        }
        // Argo CD compares by a dry run of the apply, as `diff` does; a difference is an error.
        world.kubectl(&["diff", "-f", "-"], &manifest(name));
        unchanged(&before, &world.get(name).await.unwrap());
    }
}

fn unchanged(before: &LLMDeployment, after: &LLMDeployment) {
    assert_eq!(after.metadata.generation, Some(1));
    assert_eq!(
        after.metadata.resource_version, before.metadata.resource_version,
        "{before:#?} {after:#?}"
    );
    for entry in after.metadata.managed_fields.iter().flatten() {
        let ours = entry.manager.as_deref() == Some("plimsoll");
        assert_eq!(ours, entry.subresource.as_deref() == Some("status"), "{entry:?}");
    }
}
