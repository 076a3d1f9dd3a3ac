use k8s_openapi::api::core::v1::PodTemplateSpec;
use plimsoll_contract::facts::ModelFacts;
use plimsoll_contract::flags;
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

pub fn settings() -> Settings {
    Settings {
        engine_image: "example/engine:1".to_owned(),
        allow_host_path: false,
        hub_endpoint: Some("http://hub.example".to_owned()),
        home: "plimsoll-system".to_owned(),
        clients: Clients::Cluster,
        monitor_labels: BTreeMap::from([("release".to_owned(), "prometheus".to_owned())]),
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
    template_on(node(), spec, place)
}

fn node() -> plan::NodeResources {
    plan::NodeResources {
        name: "node".to_owned(),
        memory_bytes: 16 << 30,
        asked_bytes: 0,
        asked_cpu_millis: 0,
        pods_seen: plan::PodsSeen::All,
        cpu_millis: 8000,
        gpus: plan::cards::Gpus::None,
        gpu_count: 0,
        asked_gpus: 0,
        open_to: plan::OpenTo::All,
    }
}

fn gpu_node() -> plan::NodeResources {
    let card = plan::cards::Card {
        product: "NVIDIA-L4".to_owned(),
        memory_bytes: 22 << 30,
        driver_bytes: 1 << 30,
        used_bytes: 0,
    };
    plan::NodeResources { gpus: plan::cards::Gpus::Card(card), gpu_count: 1, ..node() }
}

fn template_on(node: plan::NodeResources, spec: &Spec, place: &Place) -> Value {
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
    for (update, surge) in [(plan::Update::Surge, 1), (plan::Update::InPlace, 0)] {
        let deployment = deployment::deployment(&identity, "hash", &pods, 2, update, Some("{}"));
        assert_eq!(deployment.body["spec"]["strategy"]["rollingUpdate"]["maxSurge"], surge);
        is_exactly_of_its_kind(&deployment);
    }
    is_exactly_of_its_kind(&service::service(&identity));
    is_exactly_of_its_kind(&service::service_account(&identity));
    is_exactly_of_its_kind(&policy::disruption_budget(&identity, 2).unwrap());
    for clients in [Clients::Namespace, Clients::Cluster, Clients::Anyone] {
        is_exactly_of_its_kind(&network_policy::network_policy(
            &identity,
            &pods,
            clients,
            &settings(),
        ));
    }
    let labels = settings().monitor_labels;
    let monitor = monitoring::pod_monitor(&identity, &labels);
    assert_eq!(monitor.body["metadata"]["labels"]["release"], "prometheus");
    is_exactly_of_its_kind(&monitor);
    is_exactly_of_its_kind(&monitoring::prometheus_rule(&identity, &labels, Promises::default()));
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
        let pods = [
            &template(&spec, &place)["spec"],
            &template_on(gpu_node(), &spec, &place)["spec"],
            &job.body["spec"]["template"]["spec"],
        ];
        for pod in pods {
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
fn what_we_render_ourselves_reaches_out_of_its_pod_only_for_a_folder_of_the_node() {
    let spec = everything();
    let claim = Place::Claim { claim: "models".to_owned(), path: String::new() };
    for place in [Place::PerPod, Place::Download { key: "k".to_owned() }, claim] {
        for node in [node(), gpu_node()] {
            let pod = template_on(node, &spec, &place);
            assert!(!reach::template_reaches_out(&pod, "assistant"), "{pod}");
            assert!(reach::template_reaches_out(&pod, "another"));
        }
    }
    let host = template(&spec, &Place::Host { path: "/m".to_owned() });
    assert!(reach::template_reaches_out(&host, "assistant"));
}

/// The whole pod as a person would write it.
#[test]
fn a_pod_on_a_gpu_asks_for_one_of_its_product_and_little_else() {
    let spec = spec(json!({
        "model": {"source": "pvc://models/tiny"}, "workload": {"concurrency": 8},
        "resources": {"memory": "2Gi"},
    }));
    let place = Place::Claim { claim: "models".to_owned(), path: "tiny".to_owned() };
    let pod = template_on(gpu_node(), &spec, &place);
    is_exactly::<PodTemplateSpec>(&pod);
    let golden: Value = serde_yaml_ng::from_str(include_str!("gpu_pod.yaml")).unwrap();
    assert_eq!(pod, golden, "{}", serde_yaml_ng::to_string(&pod).unwrap());
}

#[test]
fn tolerations_and_selectors_of_the_overlay_stand_beside_those_of_a_gpu_pod() {
    let mut spec = everything();
    let theirs = json!({"key": "team", "operator": "Exists"});
    let ours = json!({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"});
    let overlay = |tolerations: Value| {
        Some(json!({"spec": {"tolerations": tolerations, "nodeSelector": {"zone": "a"}}}))
    };
    spec.pod_template = overlay(json!([theirs]));
    let pod = template_on(gpu_node(), &spec, &Place::PerPod);
    assert_eq!(pod["spec"]["tolerations"], json!([theirs, ours]));
    let selector = json!({"nvidia.com/gpu.product": "NVIDIA-L4", "zone": "a"});
    assert_eq!(pod["spec"]["nodeSelector"], selector);
    spec.pod_template = overlay(json!([ours]));
    let pod = template_on(gpu_node(), &spec, &Place::PerPod);
    assert_eq!(pod["spec"]["tolerations"], json!([ours]));
    assert_eq!(template(&everything(), &Place::PerPod)["spec"].get("tolerations"), None);
}

fn limit_and_request(node: plan::NodeResources, fields: Value) -> (u64, u64) {
    let mut wishes = json!({"model": {"source": "hf://org/tiny"}, "contextTokens": 1024});
    wishes.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let pod = template_on(node, &spec(wishes), &Place::PerPod);
    let resources = &pod["spec"]["containers"][0]["resources"];
    let bytes =
        |kind: &str| crate::amount::units(resources[kind]["memory"].as_str().unwrap()).unwrap();
    (bytes("limits"), bytes("requests"))
}

#[test]
fn a_limit_leaves_room_for_the_peak_of_a_start_and_never_exceeds_what_there_is() {
    const MIB: u64 = 1 << 20;
    let (limit, request) = limit_and_request(node(), json!({}));
    assert_eq!(limit, request + 64 * MIB, "a small plan gets the least headroom");
    let cache = json!({"cache": {"tokens": 1_048_576}});
    let (limit, request) = limit_and_request(node(), cache);
    assert!(request > 3 << 30, "{request}");
    assert!(limit.abs_diff(request + request / 16) <= 2 * MIB, "{limit} of {request}");

    // A budget is the limit, and the cache makes room within it.
    let load = json!({"concurrency": 64, "promptTokens": 1000, "outputTokens": 24});
    let budget = |memory: &str| json!({"workload": load, "resources": {"memory": memory}});
    let (limit, request) = limit_and_request(node(), budget("512Mi"));
    assert_eq!(limit, 512 * MIB);
    assert!(request <= 448 * MIB, "{request}");
    assert_eq!(limit_and_request(node(), budget("4Gi")).0, 4 << 30);
    let left = plan::NodeResources { asked_bytes: (16 << 30) - 500 * MIB, ..node() };
    assert_eq!(limit_and_request(left, budget("4Gi")).0, 500 * MIB);
}

#[test]
fn the_kill_comes_after_drain_grace_and_drain() {
    let pod = template(&everything(), &Place::PerPod);
    assert!(pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap() > 10 + 45);
    let arguments = pod["spec"]["containers"][0]["args"].to_string();
    assert!(arguments.contains("--drain-timeout=45s"), "{arguments}");
}

#[test]
fn kserve_5062_kubeai_179_aibrix_782_a_start_gets_time_by_the_bytes_it_reads() {
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
fn where_pods_download_for_themselves_the_inspect_job_asks_the_hub_for_headers_alone() {
    let job = |place: &Place| {
        let job = model::inspect_job("team", "k", &[], &everything(), place, None, &settings());
        job.body["spec"]["template"]["spec"].clone()
    };
    let pod = job(&Place::PerPod);
    assert_eq!(pod.get("initContainers"), None);
    let inspect = &pod["containers"][0];
    assert_eq!(inspect["args"][1], "hf://org/tiny@main");
    assert_eq!(inspect["env"][0]["value"], "http://hub.example");
    let names = |list: &Value| {
        let names = list.as_array().unwrap().iter().map(|held| held["name"].as_str().unwrap());
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(names(&pod["volumes"]), ["tmp", "hub-token"]);
    assert_eq!(names(&inspect["volumeMounts"]), ["tmp", "hub-token"]);
    // Elsewhere no hub is asked by a container that only reads.
    let shared = job(&Place::Download { key: "k".to_owned() });
    assert_eq!(shared["containers"][0]["args"][1], "/models/model");
    assert_eq!(shared["containers"][0].get("env"), None);
    assert_eq!(shared["initContainers"][0]["args"][1], "hf://org/tiny@main");
}

/// Flags of the containers of a pod that run `verb`, those that come as variables among them.
fn flags_of(pod: &Value, verb: &str) -> Vec<String> {
    let kinds = ["containers", "initContainers"];
    let all = kinds.iter().flat_map(|kind| pod[*kind].as_array().into_iter().flatten());
    let mut found = Vec::new();
    for container in all.filter(|container| container["args"][0] == verb) {
        let arguments = container["args"].as_array().unwrap().iter().map(|a| a.as_str().unwrap());
        let flags = arguments.filter_map(|argument| argument.strip_prefix("--"));
        found.extend(flags.map(|flag| flag.split('=').next().unwrap().to_owned()));
        if container["env"][0]["name"] == flags::ENDPOINT_VARIABLE {
            found.push("endpoint".to_owned());
        }
    }
    found
}

#[test]
fn the_flags_that_are_rendered_are_those_of_the_contract() {
    let plain = everything();
    let mut without_reuse = everything();
    without_reuse.prefix_reuse = false;
    let mut found = [("serve", Vec::new()), ("fetch", Vec::new()), ("inspect", Vec::new())];
    for spec in [plain, without_reuse] {
        let place = Place::PerPod;
        let job = model::inspect_job("team", "k", &[], &spec, &place, None, &settings());
        let pods =
            [template(&spec, &place)["spec"].clone(), job.body["spec"]["template"]["spec"].clone()];
        for (verb, found) in &mut found {
            found.extend(pods.iter().flat_map(|pod| flags_of(pod, verb)));
            found.sort();
            found.dedup();
        }
    }
    let [serve, fetch, inspect] = found.map(|(_, found)| found);
    assert_eq!(serve, flags::SERVE);
    assert_eq!(fetch, flags::FETCH);
    assert_eq!(inspect, flags::INSPECT);
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
fn pods_of_a_download_that_one_node_holds_stay_together() {
    let required = |pod: &Value| {
        let affinity = &pod["spec"]["affinity"]["podAffinity"];
        affinity["requiredDuringSchedulingIgnoredDuringExecution"].clone()
    };
    let ours = json!({"labelSelector": {"matchLabels": {"plimsoll.dev/download": "k"}},
        "topologyKey": "kubernetes.io/hostname"});
    let theirs = json!({"labelSelector": {"matchLabels": {"app": "cache"}}, "topologyKey": "zone"});
    let shared = Place::Download { key: "k".to_owned() };
    let mut spec = everything();
    let pod = template(&spec, &shared);
    is_exactly::<PodTemplateSpec>(&pod);
    assert_eq!(required(&pod), json!([ours]));
    assert_eq!(pod["metadata"]["labels"]["plimsoll.dev/download"], "k");

    let list = json!({"requiredDuringSchedulingIgnoredDuringExecution": [theirs]});
    spec.pod_template = Some(json!({"metadata": {"labels": {"plimsoll.dev/download": "other"}},
        "spec": {"affinity": {"podAffinity": list}}}));
    let pod = template(&spec, &shared);
    assert_eq!(required(&pod), json!([theirs, ours]));
    assert_eq!(pod["metadata"]["labels"]["plimsoll.dev/download"], "k");

    let many =
        json!({"model": {"source": "hf://org/tiny"}, "storage": {"accessMode": "ReadWriteMany"}});
    for pod in [template(&self::spec(many), &shared), template(&everything(), &Place::PerPod)] {
        assert_eq!(pod["spec"].get("affinity"), None, "{pod}");
    }
}

#[test]
fn several_nodes_share_a_download_only_through_storage_that_several_may_mount() {
    let once = everything();
    let shared = Place::Download { key: "k".to_owned() };
    let (place, note) = Place::choose(&once, "k", 1);
    assert_eq!(place, shared);
    assert!(note.unwrap().contains("no more than one node takes pods"));
    let (place, note) = Place::choose(&once, "k", 2);
    assert_eq!(place, Place::PerPod);
    assert!(note.unwrap().contains("ReadWriteMany"));
    let many = spec(json!({
        "model": {"source": "hf://org/tiny"}, "storage": {"accessMode": "ReadWriteMany"},
    }));
    let (place, note) = Place::choose(&many, "k", 9);
    assert_eq!(place, shared);
    assert!(note.unwrap().contains("because storage is ReadWriteMany"));
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
