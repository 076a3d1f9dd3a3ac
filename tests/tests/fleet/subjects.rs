//! In: a running fleet. Out: an operator to be measured in it, Plimsoll or LeaderWorkerSet: its kinds, what an object of
//! it looks like, and how it is started. Never here: measuring.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::ByteString;
use plimsoll_crds::generated;
use plimsoll_tests::cluster::{Daemon, Fleet, wait_until};
use plimsoll_tests::install;
use serde_json::{Value, json};

use crate::watch::condition;

const ESTABLISHED_MAX: Duration = Duration::from_secs(30);

#[derive(Clone, Copy)]
pub struct Kind {
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub plural: &'static str,
}

const fn kind(
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
) -> Kind {
    Kind { group, version, kind, plural }
}

/// An operator that can be measured.
pub struct Subject {
    pub name: &'static str,
    /// The API user whose requests are counted.
    pub user: &'static str,
    pub object: Kind,
    /// What the operator itself makes for each object.
    pub children: &'static [Kind],
    /// On children and pods: their object's name.
    pub label: &'static str,
    pub is_ready: fn(&Value) -> bool,
    pub spec: fn() -> Value,
    pub prepare: fn(&Fleet) -> Result<()>,
    pub start: fn(&Fleet) -> Result<Daemon>,
}

/// Of all objects. On several nodes every pod downloads it for itself, so that no volume is needed.
pub const SOURCE: &str = "hf://example/small";

pub const PLIMSOLL: Subject = Subject {
    name: "plimsoll",
    user: "operator",
    object: kind("plimsoll.dev", "v1alpha1", "LLMDeployment", "llmdeployments"),
    children: &[
        kind("apps", "v1", "Deployment", "deployments"),
        kind("", "v1", "Service", "services"),
        kind("", "v1", "ServiceAccount", "serviceaccounts"),
        kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies"),
        kind("apps", "v1", "ControllerRevision", "controllerrevisions"),
    ],
    label: "plimsoll.dev/name",
    is_ready: |status| condition(status, "Ready"),
    spec: || json!({"model": {"source": SOURCE}}),
    prepare: |fleet| {
        fleet.kubectl().apply(&generated::crd_yaml())?;
        let wait = ["wait", "--for=condition=Established", "crd/llmdeployments.plimsoll.dev"];
        fleet.kubectl().run(&wait).map(drop)
    },
    start: |fleet| {
        let kubeconfig = fleet.kubeconfig_for("operator", Some("system:masters"))?;
        let kubeconfig = kubeconfig.display().to_string();
        let program = install::built("plimsoll")?.display().to_string();
        let words = [program.as_str(), "run", "--lease-namespace", "default"].map(String::from);
        fleet.program("operator", &words, &[("KUBECONFIG", &kubeconfig)])
    },
};

pub const LEADER_WORKER_SET: Subject = Subject {
    name: "leaderWorkerSet",
    user: "operator",
    object: kind("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet", "leaderworkersets"),
    children: &[
        kind("apps", "v1", "StatefulSet", "statefulsets"),
        kind("", "v1", "Service", "services"),
        kind("apps", "v1", "ControllerRevision", "controllerrevisions"),
    ],
    label: "leaderworkerset.sigs.k8s.io/name",
    is_ready: |status| condition(status, "Available"),
    spec: || {
        let container = json!({"name": "engine", "image": "example/engine:1",
            "resources": {"requests": {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "1"},
                "limits": {"nvidia.com/gpu": "1"}}});
        json!({"replicas": 1, "leaderWorkerTemplate": {"size": 1,
            "workerTemplate": {"spec": {"containers": [container]}}}})
    },
    prepare: |fleet| {
        for file in std::fs::read_dir(lws_folder()?.join("config/crd/bases"))? {
            let crd = std::fs::read_to_string(file?.path())?;
            // Too large for the annotation that client-side apply keeps.
            fleet.kubectl().run_with_input(&["apply", "--server-side", "-f", "-"], &crd)?;
        }
        let crd = "crd/leaderworkersets.leaderworkerset.x-k8s.io";
        let wait = ["wait", "--for=condition=Established", crd];
        // One that was stored a moment ago has no conditions yet, and kubectl takes that for an error.
        wait_until("its kind is established", ESTABLISHED_MAX, || {
            Ok(fleet.kubectl().run(&wait).ok())
        })
        .map(drop)
    },
    start: start_lws,
};

/// A checkout of sigs.k8s.io/lws in which `make soak-fleet` built `manager`.
fn lws_folder() -> Result<PathBuf> {
    Ok(PathBuf::from(std::env::var("PLIMSOLL_LWS").context("PLIMSOLL_LWS names no checkout")?))
}

const LWS_PORT: u16 = 9443;

/// With its webhooks on: they are called by URL, with certificates of the cluster's authority.
fn start_lws(fleet: &Fleet) -> Result<Daemon> {
    let kubeconfig = fleet.kubeconfig_for("operator", Some("system:masters"))?;
    let (authority, serving) = fleet.serving_certificate("lws")?;
    let certificates = fleet.folder().join("lws-certificates");
    std::fs::create_dir_all(&certificates)?;
    std::fs::copy(&serving.certificate, certificates.join("tls.crt"))?;
    std::fs::copy(&serving.key, certificates.join("tls.key"))?;
    let config = json!({"apiVersion": "config.lws.x-k8s.io/v1alpha1", "kind": "Configuration",
        "leaderElection": {"leaderElect": false}, "internalCertManagement": {"enable": false},
        "metrics": {"bindAddress": "127.0.0.1:8443"},
        "webhook": {"port": LWS_PORT, "certDir": certificates}});
    let path = fleet.folder().join("lws.yaml");
    std::fs::write(&path, config.to_string())?;
    let program = lws_folder()?.join("manager").display().to_string();
    // Its default logs are those of development, which no manifest of its own asks for.
    let words = [program, format!("--config={}", path.display()), "--zap-log-level=info".into()];
    let kubeconfig = kubeconfig.display().to_string();
    let env = [("KUBECONFIG", kubeconfig.as_str()), ("POD_NAMESPACE", "default")];
    let operator = fleet.program("lws", &words, &env)?;
    register_webhooks(fleet, &authority)?;
    Ok(operator)
}

/// The webhooks of its manifests, by URL in the place of a Service.
fn register_webhooks(fleet: &Fleet, authority: &std::path::Path) -> Result<()> {
    let text = std::fs::read_to_string(lws_folder()?.join("config/webhook/manifests.yaml"))?;
    let bundle = ByteString(std::fs::read(authority)?);
    for document in text.split("\n---\n") {
        let mut webhooks: Value = serde_yaml_ng::from_str(document)?;
        for webhook in webhooks["webhooks"].as_array_mut().into_iter().flatten() {
            let path = webhook["clientConfig"]["service"]["path"].as_str().unwrap_or_default();
            let url = format!("https://{}:{LWS_PORT}{path}", fleet.address());
            webhook["clientConfig"] = json!({"url": url, "caBundle": bundle});
            let name = webhook["name"].as_str().unwrap_or_default();
            if name.contains("pod") {
                // As config/webhook/*-patch.yaml of its repository has it: of pods only its own.
                webhook["objectSelector"] = json!({"matchExpressions": [
                    {"key": LEADER_WORKER_SET.label, "operator": "Exists"}]});
            }
        }
        fleet.kubectl().apply(&webhooks.to_string())?;
    }
    Ok(())
}
