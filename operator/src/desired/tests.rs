use k8s_openapi::api::core::v1::PodTemplateSpec;
use plimsoll_contract::facts::ModelFacts;
use plimsoll_crds::{LLMDeployment, LLMDeploymentSpec};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::model::Place;
use super::*;
use crate::observe::Cached;
use crate::plan;
use crate::spec::Spec;

fn facts() -> ModelFacts {
    serde_json::from_value(json!({
        "family": "llama", "architecture": "LlamaForCausalLM",
        "parameters": {"embedding": 1_048_576, "attention": 900_000, "mlp": 3_500_000, "norm": 3_328, "head": 0},
        "revision": "c0ffee", "diskBytes": {"BF16": 3_000_000_000_u64}, "layers": 6, "hidden": 256,
        "intermediate": 768, "heads": 4, "kvHeads": 2, "headDim": 64, "vocabulary": 4096,
        "contextTokens": 2048, "tiedHead": true, "chatTemplate": true,
    }))
    .unwrap()
}

fn settings() -> Settings {
    Settings {
        engine_image: "example/engine:1".to_owned(),
        allow_host_path: false,
        hub_endpoint: Some("http://hub.example".to_owned()),
    }
}

fn identity() -> Identity {
    Identity { namespace: "team".to_owned(), name: "assistant".to_owned(), uid: "u-1".to_owned() }
}

fn spec(fields: Value) -> Spec {
    let spec: LLMDeploymentSpec = serde_json::from_value(fields).unwrap();
    Spec::parse(&LLMDeployment::new("assistant", spec)).unwrap()
}

fn template(spec: &Spec, place: &Place) -> Value {
    let node = plan::NodeResources {
        name: "node".to_owned(),
        memory_bytes: 16 << 30,
        asked_bytes: 0,
        pods_seen: plan::PodsSeen::All,
        cpu_millis: 8000,
    };
    let facts = facts();
    let plan = plan::plan(spec, &facts, &[node]).chosen.unwrap();
    let settings = settings();
    let inputs = pod::Inputs {
        name: "assistant",
        spec,
        plan: &plan,
        facts: &facts,
        place,
        settings: &settings,
    };
    pod::template(&inputs)
}

fn everything() -> Spec {
    spec(json!({
        "model": {"source": "hf://org/tiny", "credentials": {"secretRef": {"name": "hf"}}},
        "auth": {"apiKeysSecretRef": {"name": "keys"}},
        "rollout": {"drainSeconds": 45},
        "storage": {"storageClassName": "fast"},
    }))
}

/// What typed Kubernetes objects drop would be a misspelt field.
fn is_exactly<K: Serialize + DeserializeOwned>(body: &Value) {
    let typed: K = serde_json::from_value(body.clone()).unwrap();
    assert_eq!(&serde_json::to_value(typed).unwrap(), body);
}

fn is_exactly_of_its_kind<K: Cached>(want: &Want<K>) {
    is_exactly::<K>(&want.body);
    assert_eq!(want.body["kind"], K::kind(&()).as_ref());
}

#[test]
fn every_object_is_spelt_as_its_kind() {
    let (spec, identity) = (everything(), identity());
    let place = Place::Download { key: "k".to_owned() };
    let pods = template(&spec, &place);
    is_exactly::<PodTemplateSpec>(&pods);
    is_exactly_of_its_kind(&deployment::deployment(&identity, "hash", &pods, 2));
    is_exactly_of_its_kind(&service::service(&identity));
    is_exactly_of_its_kind(&service::service_account(&identity));
    is_exactly_of_its_kind(&policy::disruption_budget(&identity, 2).unwrap());
    let owners = [identity.co_owner()];
    is_exactly_of_its_kind(&model::claim("team", "k", &owners, &spec.storage));
    is_exactly_of_its_kind(&model::facts("team", "k", &owners, "hf://org/tiny", &facts()));
    for place in [place, Place::PerPod, Place::Host { path: "/m".to_owned() }] {
        is_exactly_of_its_kind(&model::inspect_job(
            "team",
            "k",
            &owners,
            &spec,
            &place,
            None,
            &settings(),
        ));
    }
}

#[test]
fn every_pod_keeps_to_the_restricted_level() {
    let spec = everything();
    for place in [Place::PerPod, Place::Download { key: "k".to_owned() }] {
        let job = model::inspect_job("team", "k", &[], &spec, &place, None, &settings());
        for pod in [&template(&spec, &place)["spec"], &job.body["spec"]["template"]["spec"]] {
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
            assert_eq!(pod["securityContext"]["runAsUser"], 65532);
            assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
            assert_eq!(pod["automountServiceAccountToken"], false);
            let containers = ["containers", "initContainers"];
            let all =
                containers.iter().flat_map(|kind| pod[*kind].as_array().into_iter().flatten());
            for container in all {
                let security = &container["securityContext"];
                assert_eq!(security["allowPrivilegeEscalation"], false);
                assert_eq!(security["readOnlyRootFilesystem"], true);
                assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}));
            }
        }
    }
}

#[test]
fn the_kill_comes_after_drain_grace_and_drain() {
    let pod = template(&everything(), &Place::PerPod);
    assert!(pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap() > 10 + 45);
    let arguments = pod["spec"]["containers"][0]["args"].to_string();
    assert!(arguments.contains("--drain-timeout=45s"), "{arguments}");
}

#[test]
fn a_start_gets_time_by_the_bytes_it_reads() {
    let pod = template(&everything(), &Place::PerPod);
    let probe = &pod["spec"]["containers"][0]["startupProbe"];
    let seconds =
        probe["periodSeconds"].as_u64().unwrap() * probe["failureThreshold"].as_u64().unwrap();
    assert!((140..160).contains(&seconds), "3 GB three times at 100 MiB/s and a minute: {seconds}");
}

#[test]
fn a_pod_that_downloads_for_itself_takes_the_commit_that_was_inspected() {
    let pod = template(&everything(), &Place::PerPod);
    let fetch = &pod["spec"]["initContainers"][0];
    assert_eq!(fetch["args"][1], "hf://org/tiny@c0ffee");
    assert_eq!(fetch["args"][4], "--token-file");
    assert_eq!(fetch["env"][0]["value"], "http://hub.example");
    let shared = template(&everything(), &Place::Download { key: "k".to_owned() });
    assert_eq!(shared["spec"].get("initContainers"), None);
}

#[test]
fn the_overlay_cannot_move_a_pod_out_of_the_selector() {
    let mut spec = everything();
    spec.pod_template = Some(json!({
        "metadata": {"labels": {names::NAME: "other", "team": "a"}},
        "spec": {"nodeSelector": {"disk": "fast"}, "containers": [{"name": "engine", "env": [{"name": "A", "value": "1"}]}]},
    }));
    let pod = template(&spec, &Place::PerPod);
    assert_eq!(pod["metadata"]["labels"][names::NAME], "assistant");
    assert_eq!(pod["metadata"]["labels"]["team"], "a");
    assert_eq!(pod["spec"]["containers"][0]["env"][0]["name"], "A");
    assert_eq!(pod["spec"]["containers"].as_array().unwrap().len(), 1);
    let job = model::inspect_job("team", "k", &[], &spec, &Place::PerPod, None, &settings());
    assert_eq!(job.body["spec"]["template"]["spec"]["nodeSelector"]["disk"], "fast");
}

#[test]
fn several_nodes_share_a_download_only_through_storage_that_several_may_mount() {
    let once = everything();
    assert_eq!(Place::choose(&once, "k", 1), (Place::Download { key: "k".to_owned() }, None));
    let (place, note) = Place::choose(&once, "k", 2);
    assert_eq!(place, Place::PerPod);
    assert!(note.unwrap().contains("ReadWriteMany"));
    let many = spec(json!({
        "model": {"source": "hf://org/tiny"}, "storage": {"accessMode": "ReadWriteMany"},
    }));
    assert_eq!(Place::choose(&many, "k", 9), (Place::Download { key: "k".to_owned() }, None));
}

#[test]
fn the_directory_is_where_the_source_says() {
    let claim = |path: &str| Place::Claim { claim: "models".to_owned(), path: path.to_owned() };
    assert_eq!(claim("").directory(), "/models");
    assert_eq!(claim("llama/1b").directory(), "/models/llama/1b");
    assert_eq!(Place::Host { path: "/m".to_owned() }.directory(), "/models");
}

#[test]
fn one_replica_has_no_budget() {
    assert!(policy::disruption_budget(&identity(), 1).is_none());
    assert!(policy::disruption_budget(&identity(), 0).is_none());
}

#[test]
fn an_overlay_that_reaches_into_the_node_is_recognised() {
    let reaching = [
        (json!({"hostNetwork": true}), "hostNetwork"),
        (json!({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}), "a hostPath volume"),
        (
            json!({"containers": [{"name": "engine", "securityContext": {"privileged": true}}]}),
            "privileged: true",
        ),
    ];
    for (spec, field) in reaching {
        assert_eq!(pod::escape(&json!({"spec": spec})), Some(field));
    }
    let harmless = json!({"spec": {"hostNetwork": false, "volumes": [{"name": "v", "emptyDir": {}}],
        "nodeSelector": {"a": "b"}}});
    assert_eq!(pod::escape(&harmless), None);
    assert_eq!(pod::escape(&json!({"metadata": {}})), None);
}
