//! Pods enter; the memory, CPU and GPUs that each asks of its node leave, as the scheduler counts them. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::{Quota, cards};
use crate::amount;

/// What a pod asks of its node, or several together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    pub memory_bytes: u64,
    pub cpu_millis: u64,
    pub gpus: u64,
}

impl Asked {
    pub fn plus(self, other: Asked) -> Asked {
        Asked {
            memory_bytes: self.memory_bytes + other.memory_bytes,
            cpu_millis: self.cpu_millis + other.cpu_millis,
            gpus: self.gpus + other.gpus,
        }
    }

    fn most(self, other: Asked) -> Asked {
        Asked {
            memory_bytes: self.memory_bytes.max(other.memory_bytes),
            cpu_millis: self.cpu_millis.max(other.cpu_millis),
            gpus: self.gpus.max(other.gpus),
        }
    }
}

/// What others' pods leave less of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Neighbours {
    /// By node.
    pub asked: BTreeMap<String, Asked>,
    /// Only pods of one namespace could be seen.
    pub namespaced: bool,
    /// What the object's namespace may still ask for.
    pub quota: Quota,
}

/// The node of a bound pod and what it asks for there: its containers together, or what starting up takes if that is
/// more, and the overhead of its runtime. What it asks for as a whole counts in place of its containers.
pub fn asked(pod: &Pod) -> Option<(&str, Asked)> {
    let spec = pod.spec.as_ref()?;
    let node = spec.node_name.as_deref()?;
    let mut sidecars = Asked::default();
    let mut starting = Asked::default();
    for container in spec.init_containers.iter().flatten() {
        let needed = sidecars.plus(requests(container.resources.as_ref()));
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars = needed;
        }
        starting = starting.most(needed);
    }
    let of = |container: &Container| requests(container.resources.as_ref());
    let running = spec.containers.iter().map(of).fold(sidecars, Asked::plus);
    let parts = running.most(starting);
    let whole = requests(spec.resources.as_ref());
    let given = |whole: u64, parts: u64| if whole > 0 { whole } else { parts };
    let asked = Asked {
        memory_bytes: given(whole.memory_bytes, parts.memory_bytes),
        cpu_millis: given(whole.cpu_millis, parts.cpu_millis),
        // A pod as a whole cannot ask for devices.
        gpus: parts.gpus,
    };
    Some((node, asked.plus(amounts(spec.overhead.as_ref()))))
}

fn requests(resources: Option<&ResourceRequirements>) -> Asked {
    amounts(resources.and_then(|resources| resources.requests.as_ref()))
}

fn amounts(amounts: Option<&BTreeMap<String, Quantity>>) -> Asked {
    let of = |kind: &str| amounts.and_then(|amounts| amounts.get(kind));
    Asked {
        memory_bytes: of("memory").and_then(|found| amount::units(&found.0)).unwrap_or(0),
        cpu_millis: of("cpu").and_then(|found| amount::millis(&found.0)).unwrap_or(0),
        gpus: of(cards::RESOURCE).and_then(|found| amount::units(&found.0)).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn of_pod(spec: Value) -> Option<(String, u64, u64)> {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap();
        asked(&pod)
            .map(|(node, asked)| (node.to_owned(), asked.memory_bytes / MIB, asked.cpu_millis))
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
    fn a_pod_holds_the_gpus_that_its_containers_ask_for() {
        let gpus =
            |gpus: &str| json!({"resources": {"requests": {cards::RESOURCE: gpus}}, "name": "g"});
        let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "a",
            "initContainers": [gpus("1")], "containers": [gpus("2"), gpus("1"), {"name": "without"}]}});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        assert_eq!(asked(&pod).unwrap().1.gpus, 3);
    }

    #[test]
    fn a_pod_asks_for_what_the_scheduler_counts() {
        let on_a = |mebibytes, millis| Some(("a".to_owned(), mebibytes, millis));
        let two = json!([container(100, false), container(50, false), {"name": "without"}]);
        assert_eq!(of_pod(json!({"nodeName": "a", "containers": two})), on_a(150, 2000));
        assert_eq!(of_pod(json!({"containers": two})), None, "not bound yet");
        // Starting takes 30 beside the sidecar's 20, less than running; then 400 beside it, more.
        let start = |mebibytes| json!([container(20, true), container(mebibytes, false)]);
        let pod = |starts: Value, more: Value| {
            let mut pod = json!({"nodeName": "a", "containers": two, "initContainers": starts});
            pod.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            pod
        };
        assert_eq!(of_pod(pod(start(30), json!({}))), on_a(170, 3000));
        assert_eq!(of_pod(pod(start(400), json!({}))), on_a(420, 3000));
        let overhead = json!({"overhead": {"memory": "10Mi"}});
        assert_eq!(of_pod(pod(start(400), overhead)), on_a(430, 3000));
        let whole = json!({"resources": {"requests": {"memory": "200Mi"}}});
        assert_eq!(of_pod(pod(start(400), whole)), on_a(200, 3000));
    }
}
