//! Nodes as the cluster describes them enter; what a pod may count on leaves. Pure.

use std::borrow::Borrow;

use k8s_openapi::api::core::v1::Node;

use super::Neighbours;
use crate::amount;

/// What one machine offers to pods: allocatable, not capacity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeResources {
    pub name: String,
    pub memory_bytes: u64,
    /// What of it others' pods ask for, as far as they were seen.
    pub asked_bytes: u64,
    pub pods_seen: PodsSeen,
    pub cpu_millis: u32,
}

/// Whose pods could be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodsSeen {
    All,
    OneNamespace,
}

impl NodeResources {
    /// What is left for a pod.
    pub fn free_bytes(&self) -> u64 {
        self.memory_bytes.saturating_sub(self.asked_bytes)
    }
}

/// Nodes that take pods: not cordoned, and untainted as long as there is any such node. Where every node is tainted, the
/// pod template has to tolerate it, and all of them count.
pub fn nodes<N: Borrow<Node>>(nodes: &[N], neighbours: &Neighbours) -> Vec<NodeResources> {
    let open = |node: &&Node| {
        node.spec.as_ref().is_none_or(|spec| !spec.unschedulable.unwrap_or_default())
    };
    let open: Vec<&Node> = nodes.iter().map(Borrow::borrow).filter(open).collect();
    let untainted: Vec<&Node> =
        open.iter().copied().filter(|node| !keeps_pods_away(node)).collect();
    let usable = if untainted.is_empty() { open } else { untainted };
    usable.into_iter().filter_map(|node| resources(node, neighbours)).collect()
}

fn keeps_pods_away(node: &Node) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    taints.is_some_and(|taints| {
        taints.iter().any(|taint| taint.effect == "NoSchedule" || taint.effect == "NoExecute")
    })
}

/// None while a node has not said what it has.
fn resources(node: &Node, neighbours: &Neighbours) -> Option<NodeResources> {
    let allocatable = node.status.as_ref()?.allocatable.as_ref()?;
    let name = node.metadata.name.clone()?;
    Some(NodeResources {
        asked_bytes: neighbours.asked.get(&name).copied().unwrap_or(0),
        pods_seen: if neighbours.namespaced { PodsSeen::OneNamespace } else { PodsSeen::All },
        name,
        memory_bytes: amount::units(&allocatable.get("memory")?.0)?,
        cpu_millis: u32::try_from(amount::millis(&allocatable.get("cpu")?.0)?).unwrap_or(u32::MAX),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, spec: serde_json::Value) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": name}, "spec": spec,
            "status": {"allocatable": {"cpu": "1930m", "memory": "16384256Ki"}},
        }))
        .unwrap()
    }

    #[test]
    fn cordoned_and_tainted_nodes_do_not_count_beside_free_ones() {
        let tainted = json!({"taints": [{"key": "control", "effect": "NoSchedule"}]});
        let all = [
            node("free", json!({})),
            node("cordoned", json!({"unschedulable": true})),
            node("control", tainted.clone()),
        ];
        let free = NodeResources {
            name: "free".to_owned(),
            memory_bytes: 16_384_256 << 10,
            asked_bytes: 5 << 20,
            pods_seen: PodsSeen::All,
            cpu_millis: 1930,
        };
        assert_eq!(free.free_bytes(), (16_384_256 << 10) - (5 << 20));
        let asked = [("free".to_owned(), 5 << 20), ("control".to_owned(), 9 << 20)].into();
        let neighbours = Neighbours { asked, namespaced: false };
        assert_eq!(nodes(&all, &neighbours), [free]);
        assert_eq!(nodes(&[node("control", tainted)], &neighbours).len(), 1);
        assert_eq!(nodes(&[node("cordoned", json!({"unschedulable": true}))], &neighbours), []);
    }

    #[test]
    fn a_node_that_has_not_reported_yet_does_not_count() {
        assert_eq!(nodes(&[Node::default()], &Neighbours::default()), []);
    }
}
