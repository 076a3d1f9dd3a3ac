//! Every way to run the model on the machines there are, feasible or not: quantization × type of KV × cache strategy × GPUs
//! that share the weights × class of machine. Pure.

use std::fmt;

use plimsoll_contract::abilities::{
    ABILITIES, Ability, Backend, CacheStrategy, Dtype, KvDtype, Quantization,
};

use super::machines::Machine;
use super::{Overrun, Question, Scope, explain};

/// Numbers of GPUs that share one copy of the weights, where the spec names none.
const DEGREES: [u32; 4] = [1, 2, 4, 8];

/// Types of KV that a GPU's cache may have one day, by expected quality.
const GPU_KV: [KvDtype; 4] = [KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8, KvDtype::Int4];

#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Position by expected quality, then by simplicity; lower is better.
    pub preference: usize,
    pub ability: Ability,
    pub machine: &'a Machine,
    pub tensor_parallel: u32,
    /// Whether the engine of this version can do it.
    pub runnable: bool,
    /// Bytes that one pod may use of each card: what is left of it; or what others leave of the node, or what the spec allows
    /// of that.
    pub capacity: u64,
    /// What an engine on this class needed beside its plan's sum, and the next sum counts with the process.
    pub overrun: u64,
}

impl fmt::Display for Candidate<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{} · TP {} · {}",
            Format(self.ability),
            self.tensor_parallel,
            self.machine.class
        )
    }
}

/// What a candidate is beside its place: `None · BF16`, `W4A16 · KV FP8 · Offloaded`. What is usual is not said.
pub struct Format(pub Ability);

impl fmt::Display for Format {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ability { quantization, weights, kv, strategy, .. } = self.0;
        write!(out, "{}", quantization.name())?;
        if quantization == Quantization::None {
            write!(out, " · {}", explain::dtype(weights))?;
        }
        if kv != KvDtype::from(weights) {
            write!(out, " · KV {}", explain::kv_dtype(kv))?;
        }
        if strategy != CacheStrategy::Dynamic {
            write!(out, " · {}", strategy.name())?;
        }
        Ok(())
    }
}

/// In the order of machines; on each in the order of preference.
pub fn candidates<'a>(question: &Question<'_>, machines: &'a [Machine]) -> Vec<Candidate<'a>> {
    let formats = [Backend::Cpu, Backend::Cuda].map(|backend| formats(question, backend));
    let mut all = Vec::new();
    for machine in machines {
        let formats = match machine.backend() {
            Backend::Cpu => &formats[0],
            Backend::Cuda => &formats[1],
        };
        let degrees = degrees(question, machine);
        let capacity = capacity(question, machine);
        let overrun = overrun(question, machine);
        for (preference, ability) in formats.iter().enumerate() {
            let degrees = degrees.iter().filter(|degree| {
                question.scope == Scope::Everything || ability.runs_on(**degree) || **degree == 1
            });
            all.extend(degrees.map(|degree| Candidate {
                preference,
                ability: *ability,
                machine,
                tensor_parallel: *degree,
                runnable: ability.runs_on(*degree),
                capacity,
                overrun,
            }));
        }
    }
    all
}

/// What the engine runs on a backend, or what it may run one day; of the latter only what the spec asks for, where it asks.
fn formats(question: &Question<'_>, backend: Backend) -> Vec<Ability> {
    let runnable = ABILITIES.iter().copied().filter(|ability| ability.backend == backend);
    if question.scope == Scope::Runnable || backend == Backend::Cpu {
        return runnable.collect();
    }
    let wishes = &question.spec.preferences;
    let on_disk = question.facts.quantization.as_deref().and_then(Quantization::on_disk);
    let mut all = Vec::new();
    for quantization in asked(&Quantization::ALL, on_disk.or(wishes.quantization)) {
        for kv in asked(&GPU_KV, wishes.cache_dtype) {
            for strategy in asked(&CacheStrategy::ALL, wishes.cache_strategy) {
                let plain = Ability::plain(backend, Dtype::Bf16);
                all.push(Ability { quantization, kv, strategy, ..plain });
            }
        }
    }
    all
}

/// What is asked for, or everything.
fn asked<T: Copy + PartialEq>(all: &[T], wanted: Option<T>) -> Vec<T> {
    all.iter().copied().filter(|one| wanted.is_none_or(|wanted| wanted == *one)).collect()
}

/// Numbers of GPUs for one pod on a class of machine. A number that no node has is a candidate too where the spec asks for
/// it, so that the refusal can say so.
fn degrees(question: &Question<'_>, machine: &Machine) -> Vec<u32> {
    let Some(card) = &machine.card else { return vec![1] };
    match (question.spec.preferences.tensor_parallel, question.scope) {
        (Some(wanted), Scope::Everything) => vec![wanted],
        _ if card.is_slice() => vec![1],
        _ => {
            let of_a_node = machine.gpus_of_a_node();
            DEGREES.into_iter().filter(|degree| *degree == 1 || *degree <= of_a_node).collect()
        }
    }
}

fn capacity(question: &Question<'_>, machine: &Machine) -> u64 {
    match &machine.card {
        Some(card) => card.free_bytes(),
        None => {
            let budget = question.spec.budget.memory_bytes.unwrap_or(u64::MAX);
            budget.min(machine.best.free_bytes())
        }
    }
}

fn overrun(question: &Question<'_>, machine: &Machine) -> u64 {
    let of_class = |overrun: &&Overrun| overrun.class == machine.class;
    question.overruns.iter().find(of_class).map_or(0, |overrun| overrun.bytes)
}
