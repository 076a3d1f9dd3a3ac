//! A spec, a model's facts and the nodes enter; the chosen plan and the rejected ones with their arithmetic leave. Pure,
//! deterministic, and the same for `run`, `up` and `plan`. Steps: candidates → memory → rank → explain.

use plimsoll_contract::abilities::Dtype;
use plimsoll_contract::facts::ModelFacts;
use plimsoll_contract::memory::MemoryPlan;
use plimsoll_crds::{
    CacheStatus, MemoryStatus, PlanStatus, REJECTED_MAX, Reason, RejectedStatus, bounded,
};
use serde::Serialize;

use crate::fields::digest;
use crate::spec::Spec;

mod candidates;
pub mod cards;
pub mod explain;
mod memory;
mod neighbours;
mod nodes;
mod rank;
mod room;
#[cfg(test)]
pub mod tests;

pub use candidates::GPU_HOST_BYTES;
pub use memory::headroom;
pub use neighbours::{Asked, Neighbours, asked};
pub use nodes::{NodeResources, OpenTo, PodsSeen, nodes};
pub use room::{Update, room};

/// The class of machine that computes on its CPU.
pub const CPU_CLASS: &str = "cpu";
/// Requests that run at once where the spec names no concurrency.
pub const CONCURRENCY_DEFAULT: u32 = 32;
/// Tokens of one request where the spec names none.
pub const REQUEST_TOKENS_DEFAULT: u32 = 2048;
/// Rows of one step; larger steps make decode rows wait longer for a neighbour's prefill.
pub const STEP_TOKENS_MAX: u32 = 512;
/// The same on a GPU, which few rows leave idle: what its engine takes where it is told nothing.
pub const GPU_RUNNING_DEFAULT: u32 = 256;
pub const GPU_STEP_TOKENS_MAX: u32 = 2048;

/// How one pod runs the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Eight digits of the digest of the plan's values; never of the sentences.
    pub hash: String,
    pub quantization: &'static str,
    /// Type that weights are kept and computed in.
    pub dtype: Dtype,
    pub cache: CachePlan,
    pub tensor_parallel: u32,
    /// Class of machine.
    pub accelerator: String,
    pub device: Device,
    pub context_tokens: u32,
    pub running_max: u32,
    pub step_tokens_max: u32,
    /// CPU to request for one pod.
    pub cpu_millis: u32,
    pub memory: MemoryPlan,
    /// Bytes that the memory had to fit into.
    pub capacity: u64,
    pub why: String,
}

/// What computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    /// One GPU of this product, as nodes are labelled with it.
    Cuda {
        product: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CachePlan {
    pub strategy: &'static str,
    pub dtype: Dtype,
    pub tokens: u64,
}

/// A candidate that was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its values, in short: `None · F32 · TP 1 · cpu`.
    pub candidate: String,
    /// What the refusal means for the object, if every candidate is refused.
    pub reason: Reason,
    /// One sentence with the arithmetic.
    pub why: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanOutcome {
    pub chosen: Option<Plan>,
    /// The best first, at most [`REJECTED_MAX`].
    pub rejected: Vec<Rejected>,
}

impl PlanOutcome {
    /// Why nothing was chosen. None where something was.
    pub fn refusal(&self) -> Option<(Reason, String)> {
        if self.chosen.is_some() {
            return None;
        }
        let Some(first) = self.rejected.first() else {
            return Some((Reason::NoNodes, "no node that pods may run on".to_owned()));
        };
        // One sentence where all candidates fail alike, as with a context that no type of cache can lengthen.
        if self.rejected.iter().all(|rejected| rejected.why == first.why) {
            return Some((first.reason, first.why.clone()));
        }
        let sentences: Vec<_> = self
            .rejected
            .iter()
            .map(|Rejected { candidate, why, .. }| format!("{candidate}: {why}"))
            .collect();
        Some((first.reason, bounded(&sentences.join("; "))))
    }
}

/// Chooses. The same inputs, in whatever order nodes come, give the same outcome.
pub fn plan(spec: &Spec, facts: &ModelFacts, nodes: &[NodeResources]) -> PlanOutcome {
    let candidates = candidates::candidates(spec, nodes);
    let mut feasible = Vec::new();
    let mut rejected = Vec::new();
    for candidate in candidates {
        match memory::fit(spec, facts, &candidate) {
            Ok(fitted) => feasible.push((candidate, fitted)),
            Err((reason, why)) => {
                rejected.push(Rejected { candidate: candidate.to_string(), reason, why });
            }
        }
    }
    for (candidate, why) in candidates::unusable(nodes) {
        rejected.push(Rejected { candidate, reason: Reason::DoesNotFit, why });
    }
    rank::rank(&mut feasible);
    let Some(((candidate, fitted), others)) = feasible.split_first() else {
        rejected.truncate(REJECTED_MAX);
        return PlanOutcome { chosen: None, rejected };
    };
    let mut passed_over: Vec<_> = others
        .iter()
        .map(|(other, room)| Rejected {
            candidate: other.to_string(),
            reason: Reason::PlanChosen,
            why: explain::passed_over(candidate, fitted, other, room),
        })
        .collect();
    passed_over.extend(rejected);
    passed_over.truncate(REJECTED_MAX);
    let why = explain::chosen(spec, candidate, fitted);
    PlanOutcome { chosen: Some(assemble(spec, candidate, fitted, why)), rejected: passed_over }
}

/// Every plan that fits, the best first, whatever is chosen of them.
pub fn feasible(spec: &Spec, facts: &ModelFacts, nodes: &[NodeResources]) -> Vec<Plan> {
    let fitted = |candidate: candidates::Candidate| {
        let fitted = memory::fit(spec, facts, &candidate).ok()?;
        Some((candidate, fitted))
    };
    let mut feasible: Vec<_> =
        candidates::candidates(spec, nodes).into_iter().filter_map(fitted).collect();
    rank::rank(&mut feasible);
    let plan = |(candidate, fitted): &(candidates::Candidate, memory::Fitted)| {
        assemble(spec, candidate, fitted, explain::chosen(spec, candidate, fitted))
    };
    feasible.iter().map(plan).collect()
}

fn assemble(
    spec: &Spec,
    candidate: &candidates::Candidate,
    fitted: &memory::Fitted,
    why: String,
) -> Plan {
    let mut plan = Plan {
        hash: String::new(),
        quantization: "None",
        dtype: candidate.ability.weights,
        cache: CachePlan {
            strategy: "Dynamic",
            dtype: candidate.ability.kv,
            tokens: fitted.memory.kv_tokens,
        },
        tensor_parallel: candidate.tensor_parallel,
        accelerator: candidate.machine.class.clone(),
        device: match &candidate.machine.card {
            Some(card) => Device::Cuda { product: card.product.clone() },
            None => Device::Cpu,
        },
        context_tokens: fitted.context_tokens,
        running_max: fitted.limits.running_max,
        step_tokens_max: fitted.limits.step_tokens_max,
        cpu_millis: candidates::cpu_request(spec, &candidate.machine),
        memory: fitted.memory,
        capacity: candidate.capacity,
        why,
    };
    plan.hash = hash(&plan);
    plan
}

/// Of the values alone: a better sentence, or a larger node, changes no hash. The class tells the device too.
fn hash(plan: &Plan) -> String {
    let Plan {
        hash: _,
        quantization,
        dtype,
        cache,
        tensor_parallel,
        accelerator,
        device: _,
        context_tokens,
        running_max,
        step_tokens_max,
        cpu_millis,
        memory,
        capacity: _,
        why: _,
    } = plan;
    let values = (
        quantization,
        dtype,
        cache,
        tensor_parallel,
        accelerator,
        context_tokens,
        running_max,
        step_tokens_max,
        cpu_millis,
        memory,
    );
    digest(&serde_json::to_value(values).expect("a plan is plain data"), 8)
}

impl Device {
    fn flag(&self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda { .. } => "cuda",
        }
    }
}

/// The engine's flags for a plan: all but where the model lies, where to listen and where keys are.
pub fn flags(plan: &Plan, spec: &Spec) -> Vec<String> {
    let mut flags = vec![
        format!("--served-name={}", spec.served_name),
        // Always said: left to itself an engine takes whatever GPU it sees, planned or not.
        format!("--device={}", plan.device.flag()),
        format!("--dtype={}", plan.dtype.name()),
        format!("--kv-tokens={}", plan.cache.tokens),
        format!("--context-tokens={}", plan.context_tokens),
        format!("--running-max={}", plan.running_max),
        format!("--step-tokens-max={}", plan.step_tokens_max),
        format!("--drain-timeout={}s", spec.drain_seconds),
    ];
    if !spec.prefix_reuse {
        flags.push("--no-prefix-reuse".to_owned());
    }
    flags
}

/// As status writes it.
pub fn status(outcome: &PlanOutcome, chosen: &Plan) -> PlanStatus {
    let MemoryPlan { weights, workspace, process, kv, kv_tokens: _ } = chosen.memory;
    PlanStatus {
        hash: chosen.hash.clone(),
        quantization: chosen.quantization.to_owned(),
        dtype: explain::dtype(chosen.dtype).to_owned(),
        cache: CacheStatus {
            strategy: chosen.cache.strategy.to_owned(),
            dtype: explain::dtype(chosen.cache.dtype).to_owned(),
            tokens: signed(chosen.cache.tokens),
        },
        tensor_parallel: chosen.tensor_parallel.cast_signed(),
        accelerator: chosen.accelerator.clone(),
        context_tokens: chosen.context_tokens.into(),
        concurrency: chosen.running_max.cast_signed(),
        step_tokens: Some(chosen.step_tokens_max.cast_signed()),
        cpu_millis: Some(chosen.cpu_millis.cast_signed()),
        memory_bytes: MemoryStatus {
            weights: signed(weights),
            kv: signed(kv),
            workspace: signed(workspace),
            process: signed(process),
            total: signed(chosen.memory.total()),
            capacity: signed(chosen.capacity),
        },
        why: bounded(&chosen.why),
        rejected: outcome
            .rejected
            .iter()
            .map(|Rejected { candidate, why, .. }| RejectedStatus {
                candidate: candidate.clone(),
                why: bounded(why),
            })
            .collect(),
        changed: None,
    }
}

fn signed(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}
