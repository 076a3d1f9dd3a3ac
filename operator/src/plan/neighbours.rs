//! Pods enter; the memory that each asks of its node leaves, as the scheduler counts it. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::amount;

/// What others' pods leave less of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Neighbours {
    /// Bytes by node.
    pub asked: BTreeMap<String, u64>,
    /// Only pods of one namespace could be seen.
    pub namespaced: bool,
}

/// The node of a bound pod and the bytes it asks for there: its containers together, or what starting up takes if that is
/// more, and the overhead of its runtime.
pub fn memory_asked(pod: &Pod) -> Option<(&str, u64)> {
    let spec = pod.spec.as_ref()?;
    let node = spec.node_name.as_deref()?;
    let overhead = memory(spec.overhead.as_ref());
    let whole = requests(spec.resources.as_ref());
    if whole > 0 {
        return Some((node, whole + overhead));
    }
    let mut sidecars = 0;
    let mut starting = 0;
    for container in spec.init_containers.iter().flatten() {
        let bytes = requests(container.resources.as_ref());
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars += bytes;
            starting = starting.max(sidecars);
        } else {
            starting = starting.max(sidecars + bytes);
        }
    }
    let of = |container: &Container| requests(container.resources.as_ref());
    let running: u64 = sidecars + spec.containers.iter().map(of).sum::<u64>();
    Some((node, running.max(starting) + overhead))
}

fn requests(resources: Option<&ResourceRequirements>) -> u64 {
    memory(resources.and_then(|resources| resources.requests.as_ref()))
}

fn memory(amounts: Option<&BTreeMap<String, Quantity>>) -> u64 {
    let memory = amounts.and_then(|amounts| amounts.get("memory"));
    memory.and_then(|quantity| amount::units(&quantity.0)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn asked(spec: Value) -> Option<(String, u64)> {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap();
        memory_asked(&pod).map(|(node, bytes)| (node.to_owned(), bytes / MIB))
    }

    fn container(mebibytes: u64, sidecar: bool) -> Value {
        let mut container = json!({"name": "c",
            "resources": {"requests": {"memory": format!("{mebibytes}Mi"), "cpu": "1"}}});
        if sidecar {
            container["restartPolicy"] = "Always".into();
        }
        container
    }

    #[test]
    fn a_pod_asks_for_what_the_scheduler_counts() {
        let on_a = |mebibytes| Some(("a".to_owned(), mebibytes));
        let two = json!([container(100, false), container(50, false), {"name": "without"}]);
        assert_eq!(asked(json!({"nodeName": "a", "containers": two})), on_a(150));
        assert_eq!(asked(json!({"containers": two})), None, "not bound yet");
        // Starting takes 30 beside the sidecar's 20, less than running; then 400 beside it, more.
        let start = |mebibytes| json!([container(20, true), container(mebibytes, false)]);
        let pod = |starts: Value, more: Value| {
            let mut pod = json!({"nodeName": "a", "containers": two, "initContainers": starts});
            pod.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            pod
        };
        assert_eq!(asked(pod(start(30), json!({}))), on_a(170));
        assert_eq!(asked(pod(start(400), json!({}))), on_a(420));
        let overhead = json!({"overhead": {"memory": "10Mi"}});
        assert_eq!(asked(pod(start(400), overhead)), on_a(430));
        let whole = json!({"resources": {"requests": {"memory": "200Mi"}}});
        assert_eq!(asked(pod(start(400), whole)), on_a(200));
    }
}
