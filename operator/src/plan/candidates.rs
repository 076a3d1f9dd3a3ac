//! Every way to run the model on the machines there are, feasible or not: what the engine can run × machine class. Pure.

use std::cmp::Reverse;
use std::fmt;

use plimsoll_contract::abilities::{ABILITIES, Ability, Backend};

use super::{NodeResources, explain};
use crate::spec::Spec;

/// Part of the largest node's CPU that a pod requests where the spec names none: three neighbours fit beside it.
const CPU_SHARE_DEFAULT: u32 = 4;
/// The least CPU that is requested.
const CPU_MILLIS_MIN: u32 = 100;

/// A class of machine, by the best of its nodes: one pod has to fit on one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub class: String,
    pub best: NodeResources,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Position in the engine's order of preference; lower is better.
    pub preference: usize,
    pub ability: Ability,
    pub machine: Machine,
    pub tensor_parallel: u32,
    /// Bytes that one pod may use: what others leave of the node, or what the spec allows of that.
    pub capacity: u64,
}

impl fmt::Display for Candidate {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtype = explain::dtype(self.ability.weights);
        write!(out, "None · {dtype} · TP {} · {}", self.tensor_parallel, self.machine.class)
    }
}

pub fn candidates(spec: &Spec, nodes: &[NodeResources]) -> Vec<Candidate> {
    let Some(cpu) = cpu_machine(spec, nodes) else { return Vec::new() };
    let capacity = spec.budget.memory_bytes.unwrap_or(u64::MAX).min(cpu.best.free_bytes());
    let runs_here = |ability: &Ability| match ability.backend {
        Backend::Cpu => true,
    };
    ABILITIES
        .iter()
        .enumerate()
        .filter(|(_, ability)| runs_here(ability))
        .map(|(preference, ability)| Candidate {
            preference,
            ability: *ability,
            machine: cpu.clone(),
            tensor_parallel: 1,
            capacity,
        })
        .collect()
}

/// CPU to request for one pod.
pub fn cpu_request(spec: &Spec, machine: &Machine) -> u32 {
    spec.budget
        .cpu_millis
        .unwrap_or_else(|| (machine.best.cpu_millis / CPU_SHARE_DEFAULT).max(CPU_MILLIS_MIN))
}

/// The node with the most memory left among those with enough CPU; with too little CPU everywhere, the one with the most, so
/// that the refusal can say how much there is.
fn cpu_machine(spec: &Spec, nodes: &[NodeResources]) -> Option<Machine> {
    let wanted = spec.budget.cpu_millis.unwrap_or(0);
    let enough = nodes.iter().filter(|node| node.cpu_millis >= wanted);
    // Equal nodes are told apart by name, so that their order does not matter.
    let best = enough
        .max_by_key(|node| (node.free_bytes(), node.cpu_millis, Reverse(&node.name)))
        .or_else(|| {
            nodes.iter().max_by_key(|n| (n.cpu_millis, n.free_bytes(), Reverse(&n.name)))
        })?;
    Some(Machine { class: "cpu".to_owned(), best: best.clone() })
}
