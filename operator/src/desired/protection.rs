//! In: pods of one object and the nodes of the cluster. Out: which of them are protected from Karpenter no longer. A pod
//! starts with an annotation that keeps its node: one that is taken away while gigabytes are being read begins again
//! elsewhere, and again. Once the pod answers, it can be drained like any other.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;

use super::names;
use crate::pods::is_ready;
use crate::spec::Spec;

/// Whether the object's author wrote the annotation, and so decides.
pub fn is_the_users(spec: &Spec) -> bool {
    let annotations = spec.pod_template.as_ref().map(|over| &over["metadata"]["annotations"]);
    annotations.is_some_and(|annotations| annotations.get(names::DO_NOT_DISRUPT).is_some())
}

/// Protected pods that answer. Only where Karpenter made the node does anyone read the annotation.
pub fn over<'a>(pods: &'a [Arc<Pod>], nodes: &[Arc<Node>]) -> Vec<&'a Arc<Pod>> {
    let of_karpenter = |name: &str| {
        let node = nodes.iter().find(|node| node.name_any() == name);
        node.is_some_and(|node| node.labels().contains_key(names::NODE_POOL))
    };
    let over = |pod: &&Arc<Pod>| {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        pod.annotations().contains_key(names::DO_NOT_DISRUPT)
            && pod.metadata.deletion_timestamp.is_none()
            && is_ready(pod)
            && node.is_some_and(of_karpenter)
    };
    pods.iter().filter(over).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, node: &str, ready: bool, protected: bool) -> Arc<Pod> {
        let mut body = json!({
            "metadata": {"name": name}, "spec": {"containers": [], "nodeName": node},
            "status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
        });
        if protected {
            body["metadata"]["annotations"] = json!({names::DO_NOT_DISRUPT: "true"});
        }
        Arc::new(serde_json::from_value(body).unwrap())
    }

    #[test]
    fn llmkube_660_a_pod_is_protected_until_it_answers_and_no_longer() {
        let node = |name: &str, labels: serde_json::Value| {
            let body = json!({"metadata": {"name": name, "labels": labels}});
            Arc::new(serde_json::from_value::<Node>(body).unwrap())
        };
        let nodes =
            [node("spot", json!({names::NODE_POOL: "gpus"})), node("fixed", json!({"a": "b"}))];
        let pods = [
            pod("loads", "spot", false, true),
            pod("answers", "spot", true, true),
            pod("was-released", "spot", true, false),
            pod("on-a-node-of-its-owner", "fixed", true, true),
        ];
        let names: Vec<String> = over(&pods, &nodes).iter().map(|pod| pod.name_any()).collect();
        assert_eq!(names, ["answers"]);
    }
}
