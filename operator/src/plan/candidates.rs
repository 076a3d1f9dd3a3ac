//! Every way to run the model on the machines there are, feasible or not: what the engine can run × machine class. Pure.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

use plimsoll_contract::abilities::{ABILITIES, Ability, Backend};

use super::cards::{Card, Gpus, PRODUCT_LABEL};
use super::{CPU_CLASS, NodeResources, OpenTo, explain};
use crate::spec::Spec;

/// Part of the largest node's CPU that a pod requests where the spec names none: three neighbours fit beside it.
const CPU_SHARE_DEFAULT: u32 = 4;
/// The least CPU that is requested.
const CPU_MILLIS_MIN: u32 = 100;
/// Beside a GPU one CPU plans steps and one talks HTTP; more than half of a small node is not asked for.
const GPU_CPU_MILLIS: u32 = 2000;
/// Host memory that the engine of a GPU needs: its code and CUDA's, the tokenizer, buffers through which weights pass.
pub const GPU_HOST_BYTES: u64 = 1280 << 20;

/// A class of machine, by the best of its nodes: one pod has to fit on one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub class: String,
    pub best: NodeResources,
    /// Nodes of this class.
    pub nodes: u64,
    /// The card that the model runs on; None on a CPU.
    pub card: Option<Card>,
}

impl Machine {
    /// How many of an object's pods come together on one node while it is updated, if nodes take turns.
    pub fn pods_on_best(&self, spec: &Spec) -> u64 {
        (u64::from(spec.replicas.max(1)) + 1).div_ceil(self.nodes)
    }

    pub fn backend(&self) -> Backend {
        if self.card.is_some() { Backend::Cuda } else { Backend::Cpu }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Position in the engine's order of preference; lower is better.
    pub preference: usize,
    pub ability: Ability,
    pub machine: Machine,
    pub tensor_parallel: u32,
    /// Bytes that one pod may use: what is left of its card; or what others leave of the node, or what the spec allows of
    /// that.
    pub capacity: u64,
}

impl fmt::Display for Candidate {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtype = explain::dtype(self.ability.weights);
        write!(out, "None · {dtype} · TP {} · {}", self.tensor_parallel, self.machine.class)
    }
}

/// GPUs come first.
pub fn candidates(spec: &Spec, nodes: &[NodeResources]) -> Vec<Candidate> {
    let machines = gpu_machines(spec, nodes).into_iter().chain(cpu_machine(spec, nodes));
    machines.flat_map(|machine| on_machine(spec, machine)).collect()
}

fn on_machine(spec: &Spec, machine: Machine) -> impl Iterator<Item = Candidate> {
    let capacity = match &machine.card {
        Some(card) => card.free_bytes(),
        None => spec.budget.memory_bytes.unwrap_or(u64::MAX).min(machine.best.free_bytes()),
    };
    let abilities = ABILITIES.iter().enumerate();
    let backend = machine.backend();
    abilities.filter(move |(_, ability)| ability.backend == backend).map(
        move |(preference, ability)| Candidate {
            preference,
            ability: *ability,
            machine: machine.clone(),
            tensor_parallel: 1,
            capacity,
        },
    )
}

/// What would be candidates if their GPUs could be used, each with the reason why not; nodes that are alike in that stand
/// together.
pub fn unusable(nodes: &[NodeResources]) -> Vec<(String, String)> {
    let mut alike: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for node in nodes {
        if let Gpus::Unusable { class, why } = &node.gpus {
            alike.entry((class, why)).or_default().push(&node.name);
        }
    }
    let gpu = ABILITIES.iter().find(|ability| ability.backend == Backend::Cuda);
    let dtype = gpu.map_or("-", |ability| explain::dtype(ability.weights));
    alike
        .into_iter()
        .map(|((class, why), mut names)| {
            names.sort_unstable();
            let candidate = format!("None · {dtype} · TP 1 · {class}");
            (candidate, explain::of_nodes(&names, why))
        })
        .collect()
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
        let nodes = alike.len() as u64;
        Some(Machine { class: card.class(), best: best.clone(), nodes, card: Some(card.clone()) })
    };
    kinds.into_values().filter_map(machine).collect()
}

fn cpu_machine(spec: &Spec, nodes: &[NodeResources]) -> Option<Machine> {
    let open = nodes.iter().filter(|node| node.open_to == OpenTo::All);
    let best = roomiest(spec, open.clone())?;
    let nodes = open.count() as u64;
    Some(Machine { class: CPU_CLASS.to_owned(), best: best.clone(), nodes, card: None })
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
