//! How many pods of a chosen plan find room on the nodes there are, and so how an update replaces them. Pure. What the
//! nodes have left counts: memory, CPU and GPUs that no other pod asks for.

use serde::{Deserialize, Serialize};

use super::cards::Gpus;
use super::{Device, GPU_HOST_BYTES, NodeResources, OpenTo, Plan, explain};
use crate::spec::Spec;

/// How pods of one revision give way to those of the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Update {
    /// A new pod is Ready before an old one leaves, so that an update loses no request. Takes room for one pod more.
    #[default]
    Surge,
    /// An old pod leaves before a new one starts.
    InPlace,
}

/// How to update, and the sentence that says so.
pub fn room(spec: &Spec, plan: &Plan, nodes: &[NodeResources]) -> (Update, String) {
    let replicas = u64::from(spec.replicas.max(1));
    let held = pods(plan, nodes);
    let one_more = (replicas + 1) * u64::from(plan.tensor_parallel);
    let gpus_max = match plan.device {
        Device::Cpu => None,
        Device::Cuda { .. } => spec.preferences.gpus_max.map(u64::from),
    };
    if let Some(bound) = gpus_max.filter(|bound| held > replicas && one_more > *bound) {
        return (Update::InPlace, explain::room_within(replicas, bound));
    }
    let update = if held > replicas { Update::Surge } else { Update::InPlace };
    let waiting = match plan.device {
        Device::Cuda { .. } if held < replicas => free_cards(plan, nodes),
        _ => String::new(),
    };
    (update, explain::room(replicas, held, &waiting))
}

/// How many cards of the plan's kind there are, and how many of them no other pod holds.
fn free_cards(plan: &Plan, nodes: &[NodeResources]) -> String {
    let mine: Vec<_> = nodes.iter().filter(|node| takes(plan, node)).collect();
    let all = mine.iter().map(|node| u64::from(node.gpu_count)).sum();
    let free = mine.iter().map(|node| u64::from(node.free_gpus())).sum();
    explain::free_cards(&plan.accelerator, free, all)
}

fn takes(plan: &Plan, node: &NodeResources) -> bool {
    match (&plan.device, &node.gpus) {
        (Device::Cpu, _) => node.open_to == OpenTo::All,
        (Device::Cuda { product }, Gpus::Card(card)) => card.product == *product,
        (Device::Cuda { .. }, _) => false,
    }
}

fn pods(plan: &Plan, nodes: &[NodeResources]) -> u64 {
    let memory = match plan.device {
        Device::Cpu => plan.memory.total(),
        Device::Cuda { .. } => GPU_HOST_BYTES,
    };
    let on = |node: &NodeResources| {
        let by_cpu = u64::from(node.free_cpu_millis()) / u64::from(plan.cpu_millis.max(1));
        let by_gpu = match plan.device {
            Device::Cpu => u64::MAX,
            Device::Cuda { .. } => u64::from(node.free_gpus() / plan.tensor_parallel.max(1)),
        };
        (node.free_bytes() / memory.max(1)).min(by_cpu).min(by_gpu)
    };
    nodes.iter().filter(|node| takes(plan, node)).map(on).sum()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, node, spec};
    use super::*;
    use serde_json::{Value, json};

    const GIB: u64 = 1 << 30;

    fn planned(fields: Value, nodes: &[NodeResources]) -> (Plan, Update, String) {
        let spec = spec(fields);
        let plan = super::super::plan(&spec, &facts(), nodes).chosen.unwrap();
        let (update, said) = room(&spec, &plan, nodes);
        (plan, update, said)
    }

    #[test]
    fn the_cache_gives_way_to_the_other_replicas_and_one_pod_more() {
        // A third of 24 GiB, less headroom, where half of it would be polite to others.
        let (plan, update, said) = planned(json!({"replicas": 2}), &[node(24 * GIB)]);
        assert!(plan.memory.total() <= 8 * GIB, "{:?}", plan.memory);
        assert!(plan.memory.total() > 7 * GIB, "{:?}", plan.memory);
        assert_eq!(update, Update::Surge);
        assert_eq!(said, "room for 2 replicas and one pod more while they are replaced");
        // On three nodes each has one of them.
        let three = [node(24 * GIB), node(24 * GIB), node(24 * GIB)];
        let (spread, update, _) = planned(json!({"replicas": 2}), &three);
        assert!(spread.memory.total() > 8 * GIB && update == Update::Surge, "{:?}", spread.memory);
    }

    #[test]
    fn what_the_workload_asks_for_does_not_give_way_and_then_pods_are_replaced_in_place() {
        let load = |replicas: u32| {
            json!({"replicas": replicas, "resources": {"memory": "12Gi"},
                "workload": {"promptTokens": 1024, "outputTokens": 1024, "concurrency": 32}})
        };
        let (plan, update, said) = planned(load(1), &[node(16 * GIB)]);
        assert_eq!((plan.cache.tokens, update), (65_536, Update::InPlace));
        assert_eq!(
            said,
            "room for 1 replica and no pod more, so that an update ends an old pod before it starts a new one"
        );
        let (_, update, said) = planned(load(2), &[node(16 * GIB)]);
        assert_eq!(update, Update::InPlace);
        assert!(
            said.starts_with("room for 1 of 2 replicas at the moment; the others wait"),
            "{said}"
        );
    }

    #[test]
    fn cpu_that_other_pods_ask_for_is_not_counted_on() {
        let busy = |asked_cpu_millis| NodeResources { asked_cpu_millis, ..node(64 * GIB) };
        let (plan, update, _) = planned(json!({}), &[busy(7500)]);
        assert_eq!(
            (plan.cpu_millis, update),
            (250, Update::Surge),
            "half of what is left, for two"
        );
        let (_, update, said) = planned(json!({"resources": {"cpu": "500m"}}), &[busy(7500)]);
        assert_eq!(update, Update::InPlace, "{said}");
        let spec = spec(json!({"resources": {"cpu": "1"}}));
        let refusal = super::super::plan(&spec, &facts(), &[busy(7500)]).refusal().unwrap();
        assert!(
            refusal.1.contains("the most that other pods leave of a node is 0.5"),
            "{refusal:?}"
        );
    }
}
