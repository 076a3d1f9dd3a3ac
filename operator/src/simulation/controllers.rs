//! What runs in a cluster beside us, in simple steps, one per second: garbage collection, Jobs, Deployments, the scheduler
//! and the kubelets. A pod's fate is told by its annotation `fate`: none serves, `corrupt` ends with that reason, `silent`
//! ends without a word, `slow` never becomes ready.

use std::collections::BTreeSet;

use plimsoll_tests::facts::small_model;
use serde_json::{Value, json};

use super::store::{Key, Store};
use crate::amount;
use crate::fields::digest;

/// How long a pod takes to leave.
const DRAIN_SECONDS: i64 = 2;
/// Restarts after which a pod that fails changes no more, so that the world can come to rest.
const RESTARTS_MAX: i64 = 5;

/// One second.
pub fn tick(store: &mut Store) {
    store.seconds += 1;
    let version = store.version();
    if store.calm_at == Some(version) {
        return;
    }
    collect_garbage(store);
    for (key, job) in store.all("jobs") {
        run_job(store, &key, &job);
    }
    for (key, deployment) in store.all("deployments") {
        roll(store, &key, &deployment);
    }
    for (key, pod) in store.all("pods") {
        step_pod(store, &key, pod);
    }
    let calm = store.version() == version && !waits(store);
    store.calm_at = calm.then_some(version);
}

/// Whether something will happen by the passing of time alone: a pod that leaves, a Deployment's deadline.
fn waits(store: &Store) -> bool {
    store.objects.iter().any(|(key, object)| match key.resource.as_str() {
        "pods" => !object["metadata"]["deletionTimestamp"].is_null(),
        "deployments" => object["status"]["conditions"][0]["reason"] == "ReplicaSetUpdated",
        _ => false,
    })
}

fn collect_garbage(store: &mut Store) {
    let uid = |object: &Value| object["uid"].as_str().map(str::to_owned);
    let uids: BTreeSet<_> =
        store.objects.values().filter_map(|object| uid(&object["metadata"])).collect();
    let gone = |owner: &Value| uid(owner).is_none_or(|uid| !uids.contains(&uid));
    let orphaned = |object: &Value| {
        let owners = object["metadata"]["ownerReferences"].as_array();
        owners.is_some_and(|owners| !owners.is_empty() && owners.iter().all(gone))
    };
    let orphans: Vec<Key> = store
        .objects
        .iter()
        .filter(|(_, object)| orphaned(object))
        .map(|(key, _)| key.clone())
        .collect();
    for key in orphans {
        store.delete(&key, &Value::Null).expect("it is there");
    }
}

/// Pods of an owner, with those on their way out.
fn pods_of(store: &Store, owner: &Value) -> Vec<(Key, Value)> {
    let uid = &owner["metadata"]["uid"];
    let owned = |pod: &Value| pod["metadata"]["ownerReferences"][0]["uid"] == *uid;
    store.all("pods").into_iter().filter(|(_, pod)| owned(pod)).collect()
}

fn make_pod(store: &mut Store, owner: &Key, of: &Value, number: u64) {
    let template = &of["spec"]["template"];
    let name = format!("{}-{number}", owner.name);
    let reference = json!({"apiVersion": of["apiVersion"], "kind": of["kind"], "name": owner.name,
        "uid": of["metadata"]["uid"], "controller": true});
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "spec": template["spec"], "metadata": {
        "labels": template["metadata"]["labels"], "annotations": template["metadata"]["annotations"],
        "ownerReferences": [reference]}, "status": {"phase": "Pending"}});
    let key = Key::new("pods", &owner.namespace, &name);
    // A pod of the same name may still be leaving; then the next tick tries again.
    store.create(&key, pod, false).ok();
}

fn run_job(store: &mut Store, key: &Key, job: &Value) {
    if job["status"]["conditions"].is_array() || !job["metadata"]["deletionTimestamp"].is_null() {
        return;
    }
    let pods = pods_of(store, job);
    let Some((_, pod)) = pods.last() else {
        let number = store.version();
        return make_pod(store, key, job, number);
    };
    let kind = match pod["status"]["phase"].as_str() {
        Some("Succeeded") => "Complete",
        Some("Failed") => "Failed",
        _ => return,
    };
    let mut job = job.clone();
    job["status"]["conditions"] =
        json!([{"type": kind, "status": "True", "lastTransitionTime": store.now().to_string()}]);
    store.put(key, job);
}

/// Which template a pod was made from; our revision label tells it.
fn made_from(pod_or_template: &Value) -> &Value {
    &pod_or_template["metadata"]["labels"]["plimsoll.dev/revision"]
}

/// One step of a rolling update, as the Deployment's controller takes it.
fn roll(store: &mut Store, key: &Key, deployment: &Value) {
    let spec = &deployment["spec"];
    let count = |field: &Value| usize::try_from(field.as_u64().unwrap_or(0)).expect("few pods");
    let wanted = count(&spec["replicas"]);
    let rolling = &spec["strategy"]["rollingUpdate"];
    let (surge, unavailable) = (count(&rolling["maxSurge"]), count(&rolling["maxUnavailable"]));
    let mut pods = pods_of(store, deployment);
    pods.retain(|(_, pod)| pod["metadata"]["deletionTimestamp"].is_null());
    let (new, old): (Vec<_>, Vec<_>) =
        pods.iter().partition(|(_, pod)| made_from(pod) == made_from(&spec["template"]));
    let ready = pods.iter().filter(|(_, pod)| is_ready(pod)).count();
    if new.len() > wanted {
        let (worst, _) = new.iter().max_by_key(|(_, pod)| !is_ready(pod)).expect("there are more");
        store.delete(worst, &Value::Null).expect("it is there");
    } else if new.len() < wanted && pods.len() < wanted + surge {
        make_pod(store, key, deployment, store.version());
    } else if let Some((key, pod)) = old.iter().max_by_key(|(_, pod)| !is_ready(pod))
        && (!is_ready(pod) || ready > wanted.saturating_sub(unavailable))
    {
        store.delete(key, &Value::Null).expect("it is there");
    }
    tell_progress(
        store,
        key,
        new.len(),
        new.iter().filter(|(_, pod)| is_ready(pod)).count(),
        wanted,
    );
}

/// The status of a Deployment, with the condition that says whether it makes progress.
fn tell_progress(store: &mut Store, key: &Key, updated: usize, ready: usize, wanted: usize) {
    let mut deployment = store.get(key).expect("it is there").clone();
    let generation = deployment["metadata"]["generation"].clone();
    let progress = digest(&json!([generation, updated, ready, wanted]), 8);
    let status = &deployment["status"];
    let held = &status["conditions"][0];
    let since = match status["progress"] == progress.as_str() {
        true => status["since"].as_i64().unwrap_or(store.seconds),
        false => store.seconds,
    };
    let deadline = deployment["spec"]["progressDeadlineSeconds"].as_i64().unwrap_or(600);
    let (says, reason) = if ready >= wanted {
        ("True", "NewReplicaSetAvailable")
    } else if store.seconds - since >= deadline
        || held["reason"] == "ProgressDeadlineExceeded" && status["progress"] == progress.as_str()
    {
        ("False", "ProgressDeadlineExceeded")
    } else {
        ("True", "ReplicaSetUpdated")
    };
    deployment["status"] = json!({"observedGeneration": generation, "replicas": updated, "readyReplicas": ready,
        "progress": progress, "since": since,
        "conditions": [{"type": "Progressing", "status": says, "reason": reason}]});
    store.put(key, deployment);
}

pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|held| held["type"] == "Ready" && held["status"] == "True")
}

/// The scheduler's and the kubelet's next step for a pod.
fn step_pod(store: &mut Store, key: &Key, mut pod: Value) {
    if let Some(since) = pod["metadata"]["deletionTimestamp"].as_str() {
        let since: k8s_openapi::jiff::Timestamp = since.parse().expect("we wrote it");
        if store.now().as_second() - since.as_second() >= DRAIN_SECONDS {
            store.remove(key);
        }
        return;
    }
    let now = store.now().to_string();
    let condition = |kind: &str, status: &str, message: &str| json!({"type": kind, "status": status, "lastTransitionTime": now, "message": message});
    if pod["spec"]["nodeName"].is_null() {
        match room(store, &pod) {
            Some(node) => {
                pod["spec"]["nodeName"] = node.into();
                pod["status"]["conditions"] = json!([condition("PodScheduled", "True", "")]);
            }
            None if pod["status"]["conditions"].is_array() => return,
            None => {
                let message = "0/1 nodes are available: 1 Insufficient cpu.";
                pod["status"]["conditions"] = json!([condition("PodScheduled", "False", message)]);
            }
        }
    } else if pod["status"]["phase"] == "Pending" {
        pod["status"]["phase"] = "Running".into();
        pod["status"]["containerStatuses"] = json!([container(&pod, json!({"running": {}}), 0)]);
    } else if pod["status"]["phase"] == "Running" {
        live(&mut pod, &now);
    }
    store.put(key, pod);
}

fn container(pod: &Value, state: Value, restarts: i64) -> Value {
    let name = &pod["spec"]["containers"][0]["name"];
    json!({"name": name, "image": "i", "imageID": "i", "ready": false, "restartCount": restarts, "state": state})
}

/// What a running pod's engine does in its next second.
fn live(pod: &mut Value, now: &str) {
    if pod["spec"]["containers"][0]["name"] == "inspect" {
        let said = small_model().to_string();
        pod["status"]["phase"] = "Succeeded".into();
        let ended = json!({"terminated": {"exitCode": 0, "message": said, "reason": "Completed"}});
        pod["status"]["containerStatuses"] = json!([container(pod, ended, 0)]);
        return;
    }
    let restarts = pod["status"]["containerStatuses"][0]["restartCount"].as_i64().unwrap_or(0);
    let said = match pod["metadata"]["annotations"]["fate"].as_str() {
        None => {
            if !is_ready(pod) {
                let ready = json!({"type": "Ready", "status": "True", "lastTransitionTime": now});
                let held = pod["status"]["conditions"].as_array_mut().expect("it was scheduled");
                held.push(ready);
            }
            return;
        }
        Some("slow") => return,
        Some("corrupt") => {
            json!({"reason": "CorruptWeights", "message": "model.safetensors is truncated"})
                .to_string()
        }
        Some(_) => String::new(),
    };
    if restarts < RESTARTS_MAX {
        let waiting = json!({"waiting": {"reason": "CrashLoopBackOff"}});
        let mut status = container(pod, waiting, restarts + 1);
        status["lastState"] = json!({"terminated": {"exitCode": 15, "message": said}});
        pod["status"]["containerStatuses"] = json!([status]);
    }
}

/// A node that has left what the pod asks for.
fn room(store: &Store, pod: &Value) -> Option<String> {
    let pods = store.all("pods");
    let fits = |node: &Value| {
        let here = pods.iter().filter(|(_, other)| {
            let over = matches!(other["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
            other["spec"]["nodeName"] == node["metadata"]["name"] && !over
        });
        ["cpu", "memory", "nvidia.com/gpu"].into_iter().all(|resource| {
            let taken: u64 = here.clone().map(|(_, other)| asked(other, resource)).sum();
            let there = quantity(&node["status"]["allocatable"][resource]);
            taken + asked(pod, resource) <= there
        })
    };
    let nodes = store.all("nodes");
    let node = nodes.iter().map(|(_, node)| node).find(|node| fits(node))?;
    node["metadata"]["name"].as_str().map(str::to_owned)
}

/// In thousandths of the unit.
fn asked(pod: &Value, resource: &str) -> u64 {
    let containers = pod["spec"]["containers"].as_array();
    let of = |container: &Value| quantity(&container["resources"]["requests"][resource]);
    containers.into_iter().flatten().map(of).sum()
}

fn quantity(amount: &Value) -> u64 {
    amount.as_str().and_then(amount::millis).unwrap_or(0)
}
