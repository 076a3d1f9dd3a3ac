//! Nodes enter; classes of machines leave, each by the best of its nodes, and those classes that no pod may use, with the
//! reason. Pure.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use plimsoll_contract::abilities::Backend;

use super::cards::{Card, Gpus, PRODUCT_LABEL};
use super::{NodeResources, OpenTo, explain};
use crate::spec::Spec;

/// Part of the largest node's CPU that a pod requests where the spec names none: three neighbours fit beside it.
const CPU_SHARE_DEFAULT: u32 = 4;
/// The least CPU that is requested.
const CPU_MILLIS_MIN: u32 = 100;
/// Beside a GPU one CPU plans steps and one talks HTTP; more than half of a small node is not asked for.
const GPU_CPU_MILLIS: u32 = 2000;

/// Host memory that the engine of a GPU needs: its code and CUDA's, the tokenizer, buffers through which weights pass.
pub const GPU_HOST_BYTES: u64 = 1280 << 20;

/// Class of every machine without a card that counts.
pub const CPU_CLASS: &str = "cpu";

/// A class of machine, by the best of its nodes: one pod has to fit on one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub class: String,
    pub best: NodeResources,
    /// Nodes of this class.
    pub nodes: u64,
    /// The card that the model runs on; None on a CPU.
    pub card: Option<Card>,
    /// Cards of each node, and those of them that are free.
    pub gpus: Vec<(u32, u32)>,
}

impl Machine {
    /// How many of an object's pods come together on one node while it is updated, if nodes take turns.
    pub fn pods_on_best(&self, spec: &Spec) -> u64 {
        (u64::from(spec.replicas.max(1)) + 1).div_ceil(self.nodes)
    }

    pub fn backend(&self) -> Backend {
        if self.card.is_some() { Backend::Cuda } else { Backend::Cpu }
    }

    /// Cards of the node that has most of them.
    pub fn gpus_of_a_node(&self) -> u32 {
        self.gpus.iter().map(|(all, _)| *all).max().unwrap_or(0)
    }

    /// Whether a pod with this many cards finds them free at the moment.
    pub fn has_free(&self, cards: u32) -> bool {
        self.card.is_none() || self.gpus.iter().any(|(_, free)| *free >= cards)
    }
}

/// GPUs come first; then the CPUs.
pub fn machines(spec: &Spec, nodes: &[NodeResources]) -> Vec<Machine> {
    gpu_machines(spec, nodes).into_iter().chain(cpu_machine(spec, nodes)).collect()
}

/// Classes that would be candidates if their GPUs could be used, each with the reason why not; nodes that are alike in that
/// stand together.
pub fn unusable(nodes: &[NodeResources]) -> Vec<(String, String)> {
    let mut alike: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for node in nodes {
        if let Gpus::Unusable { class, why } = &node.gpus {
            alike.entry((class, why)).or_default().push(&node.name);
        }
    }
    let sentence = |((class, why), mut names): ((&str, &str), Vec<&str>)| {
        names.sort_unstable();
        (class.to_owned(), explain::of_nodes(&names, why))
    };
    alike.into_iter().map(sentence).collect()
}

/// CPU to request for one pod.
pub fn cpu_request(spec: &Spec, machine: &Machine) -> u32 {
    let there_is = machine.best.cpu_millis;
    let usual = match machine.backend() {
        Backend::Cpu => there_is / CPU_SHARE_DEFAULT,
        Backend::Cuda => GPU_CPU_MILLIS.min(there_is / 2),
    };
    let share = u64::from(machine.best.free_cpu_millis()) / machine.pods_on_best(spec);
    let usual = usual.min(u32::try_from(share).expect("a part of 32 bits"));
    spec.budget.cpu_millis.unwrap_or_else(|| usual.max(CPU_MILLIS_MIN))
}

/// One for each kind of card, or for the one that the pod template selects. The least memory among its nodes counts, since
/// a pod may land on any of them.
fn gpu_machines(spec: &Spec, nodes: &[NodeResources]) -> Vec<Machine> {
    let selector = spec.pod_template.as_ref().map(|over| &over["spec"]["nodeSelector"]);
    let wanted = selector.and_then(|selector| selector[PRODUCT_LABEL].as_str());
    let mut kinds: BTreeMap<&str, Vec<(&NodeResources, &Card)>> = BTreeMap::new();
    for node in nodes {
        if let Gpus::Card(card) = &node.gpus
            && wanted.is_none_or(|wanted| wanted == card.product)
        {
            kinds.entry(&card.product).or_default().push((node, card));
        }
    }
    let machine = |alike: Vec<(&NodeResources, &Card)>| {
        let card = alike.iter().map(|(_, card)| *card).min_by_key(|card| card.free_bytes())?;
        let best = roomiest(spec, alike.iter().map(|(node, _)| *node))?;
        let mut gpus: Vec<_> =
            alike.iter().map(|(node, _)| (node.gpu_count, node.free_gpus())).collect();
        gpus.sort_unstable();
        let nodes = alike.len() as u64;
        Some(Machine {
            class: card.class(),
            best: best.clone(),
            nodes,
            card: Some(card.clone()),
            gpus,
        })
    };
    kinds.into_values().filter_map(machine).collect()
}

fn cpu_machine(spec: &Spec, nodes: &[NodeResources]) -> Option<Machine> {
    let open = nodes.iter().filter(|node| node.open_to == OpenTo::All);
    let best = roomiest(spec, open.clone())?;
    let nodes = open.count() as u64;
    Some(Machine {
        class: CPU_CLASS.to_owned(),
        best: best.clone(),
        nodes,
        card: None,
        gpus: Vec::new(),
    })
}

/// The node with the most memory left among those with enough CPU; with too little CPU everywhere, the one with the most, so
/// that the refusal can say how much there is.
fn roomiest<'a>(
    spec: &Spec,
    nodes: impl Iterator<Item = &'a NodeResources> + Clone,
) -> Option<&'a NodeResources> {
    let wanted = spec.budget.cpu_millis.unwrap_or(0);
    let enough = nodes.clone().filter(|node| node.free_cpu_millis() >= wanted);
    // Equal nodes are told apart by name, so that their order does not matter.
    enough
        .max_by_key(|node| (node.free_bytes(), node.free_cpu_millis(), Reverse(&node.name)))
        .or_else(|| nodes.max_by_key(|n| (n.free_cpu_millis(), n.free_bytes(), Reverse(&n.name))))
}
