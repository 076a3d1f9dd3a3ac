//! Nodes as the cluster describes them enter; what a pod may count on leaves. Pure.

use std::borrow::Borrow;

use k8s_openapi::api::core::v1::Node;

use super::Neighbours;
use super::cards::{self, Gpus};
use crate::amount;

/// What one machine offers to pods: allocatable, not capacity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeResources {
    pub name: String,
    pub memory_bytes: u64,
    /// What of it others' pods ask for, as far as they were seen.
    pub asked_bytes: u64,
    pub asked_cpu_millis: u32,
    pub pods_seen: PodsSeen,
    pub cpu_millis: u32,
    pub gpus: Gpus,
    /// Cards that its device plugin offers, and those of them that others' pods hold, as far as they were seen.
    pub gpu_count: u32,
    pub asked_gpus: u32,
    pub open_to: OpenTo,
}

/// Which pods may run on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenTo {
    All,
    /// Those that tolerate the taint of nodes with GPUs, as pods that ask for one do.
    GpuPods,
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

    pub fn free_cpu_millis(&self) -> u32 {
        self.cpu_millis.saturating_sub(self.asked_cpu_millis)
    }

    pub fn free_gpus(&self) -> u32 {
        self.gpu_count.saturating_sub(self.asked_gpus)
    }
}

/// Nodes that take pods: not cordoned, and untainted as long as there is any such node. Where every node is tainted, the
/// pod template has to tolerate it, and all of them count. The usual taint of nodes with GPUs keeps only those pods away
/// that ask for none.
pub fn nodes<N: Borrow<Node>>(nodes: &[N], neighbours: &Neighbours) -> Vec<NodeResources> {
    let open = |node: &&Node| {
        node.spec.as_ref().is_none_or(|spec| !spec.unschedulable.unwrap_or_default())
    };
    let open: Vec<&Node> = nodes.iter().map(Borrow::borrow).filter(open).collect();
    let all_tainted = open.iter().all(|node| taint(node) != Taint::None);
    let all_closed = open.iter().all(|node| taint(node) == Taint::Other);
    let usable = open.into_iter().filter_map(|node| {
        let open_to = match taint(node) {
            Taint::None => OpenTo::All,
            Taint::Gpu | Taint::Other if all_tainted => OpenTo::All,
            Taint::Gpu => OpenTo::GpuPods,
            Taint::Other => return None,
        };
        let mut resources = resources(node, neighbours)?;
        resources.open_to = open_to;
        if taint(node) == Taint::Other && !all_closed {
            resources.gpus = Gpus::None;
        }
        Some(resources)
    });
    usable.filter(|node| node.open_to == OpenTo::All || node.gpus != Gpus::None).collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Taint {
    None,
    /// Tolerated by pods that ask for a GPU.
    Gpu,
    Other,
}

fn taint(node: &Node) -> Taint {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let mut repelling =
        taints.filter(|taint| taint.effect == "NoSchedule" || taint.effect == "NoExecute");
    let tolerated = |taint: &k8s_openapi::api::core::v1::Taint| {
        taint.key == cards::RESOURCE && taint.effect == "NoSchedule"
    };
    match repelling.next() {
        None => Taint::None,
        Some(first) if tolerated(first) && repelling.all(tolerated) => Taint::Gpu,
        Some(_) => Taint::Other,
    }
}

/// None while a node has not said what it has.
fn resources(node: &Node, neighbours: &Neighbours) -> Option<NodeResources> {
    let allocatable = node.status.as_ref()?.allocatable.as_ref()?;
    let name = node.metadata.name.clone()?;
    let asked = neighbours.asked.get(&name).copied().unwrap_or_default();
    Some(NodeResources {
        asked_bytes: asked.memory_bytes,
        asked_cpu_millis: u32::try_from(asked.cpu_millis).unwrap_or(u32::MAX),
        pods_seen: if neighbours.namespaced { PodsSeen::OneNamespace } else { PodsSeen::All },
        name,
        memory_bytes: amount::units(&allocatable.get("memory")?.0)?,
        cpu_millis: u32::try_from(amount::millis(&allocatable.get("cpu")?.0)?).unwrap_or(u32::MAX),
        gpus: cards::of_node(node),
        gpu_count: cards::offered(node),
        asked_gpus: u32::try_from(asked.gpus).unwrap_or(u32::MAX),
        open_to: OpenTo::All,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Asked;
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
            asked_cpu_millis: 930,
            pods_seen: PodsSeen::All,
            cpu_millis: 1930,
            gpus: Gpus::None,
            gpu_count: 0,
            asked_gpus: 0,
            open_to: OpenTo::All,
        };
        assert_eq!(free.free_bytes(), (16_384_256 << 10) - (5 << 20));
        assert_eq!(free.free_cpu_millis(), 1000);
        let asked = |memory_bytes| Asked { memory_bytes, cpu_millis: 930, gpus: 0 };
        let asked =
            [("free".to_owned(), asked(5 << 20)), ("control".to_owned(), asked(9 << 20))].into();
        let neighbours = Neighbours { asked, ..Neighbours::default() };
        assert_eq!(nodes(&all, &neighbours), [free]);
        assert_eq!(nodes(&[node("control", tainted)], &neighbours).len(), 1);
        assert_eq!(nodes(&[node("cordoned", json!({"unschedulable": true}))], &neighbours), []);
    }

    #[test]
    fn the_taint_of_gpu_nodes_keeps_away_only_pods_that_ask_for_none() {
        let gpu_taint =
            json!({"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"});
        let gpu_node = |name: &str, taints: serde_json::Value| {
            let mut node = node(name, json!({"taints": taints}));
            let status = node.status.as_mut().unwrap();
            let one = serde_json::from_value(json!("1")).unwrap();
            status.allocatable.as_mut().unwrap().insert("nvidia.com/gpu".to_owned(), one);
            let labels =
                json!({"nvidia.com/gpu.product": "NVIDIA-L4", "nvidia.com/gpu.memory": "23034"});
            node.metadata.labels = serde_json::from_value(labels).unwrap();
            node
        };
        let seen = |all: &[Node]| {
            let seen = nodes(all, &Neighbours::default());
            seen.into_iter()
                .map(|node| (node.name, node.open_to, matches!(node.gpus, Gpus::Card(_))))
                .collect::<Vec<_>>()
        };
        let row = |name: &str, open_to, gpu| (name.to_owned(), open_to, gpu);
        let plain = || node("plain", json!({}));
        let tainted = || gpu_node("gpu", json!([gpu_taint]));
        let dedicated =
            || gpu_node("dedicated", json!([gpu_taint, {"key": "team", "effect": "NoSchedule"}]));
        assert_eq!(
            seen(&[plain(), tainted(), dedicated()]),
            [row("plain", OpenTo::All, false), row("gpu", OpenTo::GpuPods, true)]
        );
        assert_eq!(
            seen(&[tainted(), dedicated()]),
            [row("gpu", OpenTo::All, true), row("dedicated", OpenTo::All, false)]
        );
        assert_eq!(seen(&[dedicated()]), [row("dedicated", OpenTo::All, true)]);
        assert_eq!(seen(&[plain(), gpu_node("g", json!([]))])[1], row("g", OpenTo::All, true));
    }

    #[test]
    fn a_node_that_has_not_reported_yet_does_not_count() {
        assert_eq!(nodes(&[Node::default()], &Neighbours::default()), []);
    }
}
