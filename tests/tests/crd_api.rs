//! The CRD on a real API server: what it refuses and in which words, what it keeps, what kubectl shows of it.

// Helpers of tests are tests: a panic is how they report.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::Command;

use plimsoll_tests::cluster::{ApiServer, Kubectl, shared_api_server, wait_until};
use plimsoll_tests::install::root;

const CRD: &str = "llmdeployments.plimsoll.dev";

fn install(server: &ApiServer) -> Kubectl {
    let kubectl = server.kubectl().clone();
    let file = root().join("crds").join(format!("{CRD}.yaml")).display().to_string();
    kubectl.run(&["apply", "--server-side", "-f", &file]).unwrap();
    let crd = format!("crd/{CRD}");
    kubectl.run(&["wait", "--for=condition=Established", &crd, "--timeout=30s"]).unwrap();
    let soon = std::time::Duration::from_secs(30);
    wait_until("the kind is served", soon, || {
        Ok(kubectl.run(&["get", "llmd", "--all-namespaces"]).ok())
    })
    .unwrap();
    kubectl
}

fn manifest(name: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: plimsoll.dev/v1alpha1, kind: LLMDeployment, metadata: {{name: {name}}}, spec: {spec}}}"
    )
}

/// Would it be taken? Nothing is kept.
fn rehearse(kubectl: &Kubectl, manifest: &str) -> Result<String, String> {
    let words = ["create", "--dry-run=server", "-f", "-"];
    kubectl.run_with_input(&words, manifest).map_err(|error| format!("{error:#}"))
}

/// Spec, field, words of the remedy.
const REFUSED: &[(&str, &str, &str)] = &[
    ("{model: {source: 's3://a/b'}}", "spec.model.source", "must start with hf://"),
    ("{model: {source: 'hf://a'}}", "spec.model.source", "hf://ORG/NAME"),
    ("{model: {source: 'hf://a/b@'}}", "spec.model.source", "hf://ORG/NAME"),
    ("{model: {source: 'pvc://Models/x'}}", "spec.model.source", "pvc://CLAIM/PATH"),
    ("{model: {source: 'file://model'}}", "spec.model.source", "absolute path"),
    ("{model: {source: 'pvc://models/../x'}}", "spec.model.source", "must not contain '..'"),
    ("{model: {source: 'hf://a/b', name: 'a b'}}", "spec.model.name", "may hold letters"),
    ("{model: {source: 'pvc://m/x'}, storage: {size: 1Gi}}", "spec.storage", "remove it"),
    (
        "{model: {source: 'pvc://m/x', credentials: {secretRef: {name: x}}}}",
        "spec.model.credentials",
        "remove them",
    ),
    (
        "{model: {source: 'hf://a/b', credentials: {secretRef: {name: X_Y}}}}",
        "spec.model.credentials.secretRef.name",
        "lower-case letters",
    ),
    (
        "{model: {source: 'hf://a/b'}, auth: {apiKeysSecretRef: {name: x, key: a b}}}",
        "spec.auth.apiKeysSecretRef.key",
        "holds letters",
    ),
    (
        "{model: {source: 'hf://a/b'}, contextTokens: 1000, cache: {tokens: 500}}",
        "spec.cache.tokens",
        "raise cache.tokens",
    ),
    (
        "{model: {source: 'hf://a/b'}, contextTokens: 100, workload: {promptTokens: 90, outputTokens: 20}}",
        "spec.workload",
        "lower the workload",
    ),
    ("{model: {source: 'hf://a/b'}, contextTokens: 1}", "spec.contextTokens", "equal to 64"),
    ("{model: {source: 'hf://a/b'}, workload: {concurrency: 0}}", "concurrency", "equal to 1"),
    ("{model: {source: 'hf://a/b'}, replicas: -1}", "spec.replicas", "equal to 0"),
    ("{model: {source: 'hf://a/b'}, replicas: 1001}", "spec.replicas", "equal to 1000"),
    ("{model: {source: 'hf://a/b'}, storage: {size: lots}}", "spec.storage.size", "50Gi"),
    ("{model: {source: 'hf://a/b'}, storage: {accessMode: Any}}", "accessMode", "ReadWriteMany"),
    ("{model: {source: 'hf://a/b'}, resources: {memory: 4gb}}", "spec.resources.memory", "4Gi"),
    ("{model: {source: 'hf://a/b'}, resources: {cpu: 0}}", "spec.resources.cpu", "500m"),
    ("{model: {source: 'hf://a/b'}, cache: {dtype: F64}}", "spec.cache.dtype", "\"F16\""),
    ("{model: {source: 'hf://a/b'}, rollout: {drainSeconds: 9999}}", "drainSeconds", "3600"),
    // kserve#1247: what goes to zero must be held by somebody while it comes back.
    (
        "{model: {source: 'hf://a/b'}, scaling: {min: 0, max: 3}}",
        "spec.scaling.min",
        "needs the gateway that holds requests",
    ),
    ("{model: {source: 'hf://a/b'}, scaling: {min: 4, max: 3}}", "spec.scaling.min", "raise max"),
    ("{model: {source: 'hf://a/b'}, scaling: {min: 1}}", "spec.scaling.max", "equired"),
    (
        "{model: {source: 'hf://a/b'}, scaling: {max: 3, stabilizationWindowSeconds: 1}}",
        "stabilizationWindowSeconds",
        "equal to 10",
    ),
    ("{model: {source: 'hf://a/b'}, slo: {ttftMilliseconds: 0}}", "ttftMilliseconds", "equal to 1"),
    ("{model: {sorce: 'hf://a/b'}}", "spec.model.sorce", "unknown field"),
    ("{}", "spec.model", "Required value"),
];

#[test]
fn what_cannot_work_is_refused_with_field_and_remedy() {
    let Some(server) = shared_api_server() else { return };
    let kubectl = install(&server);
    for (spec, field, words) in REFUSED {
        let refusal = rehearse(&kubectl, &manifest("a", spec)).expect_err(spec);
        assert!(refusal.contains(field), "{spec}: {field} in {refusal}");
        assert!(refusal.contains(words), "{spec}: {words} in {refusal}");
    }
    for name in ["9lives", &"a".repeat(54), "a.b"] {
        let spec = "{model: {source: 'hf://a/b'}}";
        let refusal = rehearse(&kubectl, &manifest(name, spec)).expect_err(name);
        assert!(refusal.contains("at most 53 lower-case letters"), "{name}: {refusal}");
    }
}

/// Without an API server the door of `plimsoll` stands in its place.
#[test]
fn plimsoll_itself_refuses_the_same_and_names_the_same_fields() {
    let here = std::env::current_exe().unwrap();
    let program = here.ancestors().nth(2).unwrap().join("plimsoll");
    let file = std::env::temp_dir().join(format!("plimsoll-refused-{}.yaml", std::process::id()));
    for (spec, field, _) in REFUSED {
        std::fs::write(&file, manifest("a", spec)).unwrap();
        let output = Command::new(&program).arg("plan").arg("-f").arg(&file).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{spec}");
        assert!(told.contains(field), "{spec}: {field} in {told}");
    }
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn what_can_work_is_taken_and_the_examples_are() {
    let Some(server) = shared_api_server() else { return };
    let kubectl = install(&server);
    for spec in [
        "{model: {source: 'hf://a/b'}}",
        "{model: {source: 'hf://a/b@refs/pr/1', name: org/chat:v1}}",
        "{model: {source: 'pvc://models'}, replicas: 0, suspend: true}",
        "{model: {source: 'file:///srv/models/my model+1'}}",
        "{model: {source: 'hf://a/b'}, resources: {cpu: 2, memory: 1.5Gi}}",
        "{model: {source: 'hf://a/b'}, cache: {dtype: F16, tokens: 64, prefixReuse: false}, auth: null}",
        "{model: {source: 'hf://a/b'}, scaling: {min: 1, max: 4, queuePerReplica: 2}, slo: {tpotMilliseconds: 40}}",
        "{model: {source: 'hf://a/b'}, accelerators: {maxGPUs: 8}}",
        "{model: {source: 'hf://a/b'}, podTemplate: {spec: {tolerations: [{key: gpu}]}}}",
    ] {
        rehearse(&kubectl, &manifest("a", spec)).unwrap();
    }
    for example in ["llmdeployment", "hub", "pvc"] {
        let file = example_file(example);
        kubectl.run(&["create", "--dry-run=server", "-f", &file.display().to_string()]).unwrap();
    }
}

fn example_file(name: &str) -> PathBuf {
    root().join("examples").join(format!("{name}.yaml"))
}

#[test]
fn spec_is_kept_as_written_but_for_replicas() {
    let Some(server) = shared_api_server() else { return };
    let kubectl = install(&server);
    let spec = "{model: {source: 'hf://a/b'}, podTemplate: {spec: {whatever: [1, {a: b}]}}}";
    kubectl.apply(&manifest("kept", spec)).unwrap();
    let kept = kubectl.get(&["llmd", "kept"]).unwrap();
    let expected = serde_json::json!({
        "model": {"source": "hf://a/b"},
        "podTemplate": {"spec": {"whatever": [1, {"a": "b"}]}},
        "replicas": 1,
    });
    assert_eq!(kept["spec"], expected);
}

#[test]
fn kubeai_scaling_goes_through_the_subresource_with_a_selector() {
    let Some(server) = shared_api_server() else { return };
    let kubectl = install(&server);
    kubectl.apply(&manifest("scaled", "{model: {source: 'hf://a/b'}}")).unwrap();
    let status = r#"{"status": {"replicas": 1, "selector": "plimsoll.dev/name=scaled"}}"#;
    let patch = ["patch", "llmd", "scaled", "--subresource=status", "--type=merge", "-p", status];
    kubectl.run(&patch).unwrap();
    kubectl.run(&["scale", "llmd/scaled", "--replicas=3"]).unwrap();
    let path = "/apis/plimsoll.dev/v1alpha1/namespaces/default/llmdeployments/scaled/scale";
    let scale = kubectl.run(&["get", "--raw", path]).unwrap();
    let scale: serde_json::Value = serde_json::from_str(&scale).unwrap();
    assert_eq!(scale["spec"]["replicas"], 3);
    assert_eq!(scale["status"]["replicas"], 1);
    assert_eq!(scale["status"]["selector"], "plimsoll.dev/name=scaled");
}

/// A tool that applies what stands in Git, and somebody who scales beside it.
#[test]
fn keda_5572_a_manifest_without_replicas_leaves_scaling_to_others() {
    let Some(server) = shared_api_server() else { return };
    let kubectl = install(&server);
    let by_client = ["apply", "-f", "-"];
    let by_server = ["apply", "--server-side", "--field-manager=argocd-controller", "-f", "-"];
    for (name, words) in [("heals-a", &by_client[..]), ("heals-b", &by_server[..])] {
        let manifest = manifest(name, "{model: {source: 'hf://a/b'}}");
        kubectl.run_with_input(words, &manifest).unwrap();
        kubectl.run(&["scale", &format!("llmd/{name}"), "--replicas=3"]).unwrap();
        kubectl.run_with_input(words, &manifest).unwrap();
        assert_eq!(kubectl.get(&["llmd", name]).unwrap()["spec"]["replicas"], 3, "{name}");
        kubectl.run_with_input(&["diff", "-f", "-"], &manifest).unwrap();
    }
}

#[test]
fn aibrix_1609_tables_show_status_at_a_glance() {
    let Some(server) = shared_api_server() else { return };
    let kubectl = install(&server);
    kubectl.apply(&manifest("shown", "{model: {source: 'hf://a/b'}}")).unwrap();
    let status = r#"{"status": {"replicas": 2, "url": "http://shown.default.svc", "revision": "shown-1",
        "conditions": [{"type": "Ready", "status": "False", "reason": "EngineLoading", "message": "m",
            "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1}],
        "plan": {"hash": "0123abcd", "quantization": "None", "dtype": "F32", "accelerator": "cpu",
            "cache": {"strategy": "Dynamic", "dtype": "F32", "tokens": 64}, "tensorParallel": 1,
            "contextTokens": 64, "concurrency": 1, "why": "w",
            "memoryBytes": {"weights": 1, "kv": 1, "workspace": 1, "process": 1, "total": 4, "capacity": 5}}}}"#;
    let patch = ["patch", "llmd", "shown", "--subresource=status", "--type=merge", "-p", status];
    kubectl.run(&patch).unwrap();
    let table = kubectl.run(&["get", "llmd", "shown"]).unwrap();
    let words = |line: usize| -> Vec<String> {
        table.lines().nth(line).unwrap().split_whitespace().map(String::from).collect()
    };
    let columns = ["NAME", "READY", "REASON", "MODEL", "QUANT", "KV", "TP", "REPLICAS", "AGE"];
    assert_eq!(words(0), columns);
    let row = ["shown", "False", "EngineLoading", "hf://a/b", "None", "F32", "1", "2"];
    assert_eq!(words(1)[..8], row);
    // A category lists; it names no single object.
    let wide = kubectl.run(&["get", "plimsoll", "-o", "wide"]).unwrap();
    assert!(wide.contains("http://shown.default.svc") && wide.contains("shown-1"), "{wide}");
    assert!(kubectl.run(&["get", "all"]).unwrap().contains("llmdeployment.plimsoll.dev/shown"));
}

#[test]
fn explain_reads_like_documentation() {
    let Some(server) = shared_api_server() else { return };
    let kubectl = install(&server);
    // Documentation is published a moment after the kind is served.
    let soon = std::time::Duration::from_secs(30);
    wait_until("the kind is explained", soon, || Ok(kubectl.run(&["explain", "llmd"]).ok()))
        .unwrap();
    for (field, words) in [
        ("llmd", "A language model, served"),
        ("llmd.spec.model.source", "PersistentVolumeClaim"),
        ("llmd.spec.workload.concurrency", "Requests that run at once in one pod. Absent: 32."),
        ("llmd.spec.scaling", "docs/scaling.md"),
        ("llmd.status.scaling.why", "with the figures"),
        ("llmd.status.plan.rejected.why", "with the arithmetic"),
        ("llmd.status.conditions.reason", "docs/status.md"),
    ] {
        let told = kubectl.run(&["explain", field]).unwrap();
        let told = told.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(told.contains(words), "{field}: {told}");
    }
}
