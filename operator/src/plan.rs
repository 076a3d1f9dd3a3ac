//! A spec, a model's facts and the nodes enter; the chosen plan and the rejected ones with their arithmetic leave. Pure,
//! deterministic, and the same for `run`, `up` and `plan`. Steps: machines → candidates → limits → memory → cost → rank →
//! explain.

use plimsoll_contract::abilities::{CacheStrategy, Dtype, KvDtype, Quantization};
use plimsoll_contract::facts::ModelFacts;
use plimsoll_contract::memory::MemoryPlan;
use plimsoll_crds::Reason;
use serde_json::json;

use crate::fields::digest;
use crate::spec::Spec;

mod calibration;
mod candidates;
pub mod cards;
mod cost;
pub mod explain;
mod figures;
mod limits;
mod machines;
mod memory;
mod neighbours;
mod nodes;
pub mod outcome;
mod prices;
mod quota;
mod rank;
mod room;
#[cfg(test)]
pub mod tests;
pub mod what_if;

use candidates::Candidate;
pub use cost::Predicted;
pub use machines::{CPU_CLASS, GPU_HOST_BYTES};
pub use memory::headroom;
pub use neighbours::{Asked, Neighbours, asked};
pub use nodes::{NodeResources, OpenTo, PodsSeen, nodes};
pub use outcome::{Miss, PlanOutcome, Rejected, Unit, status};
pub use prices::{DATE as PRICES_DATE, Prices};
pub use quota::{Quota, is_scoped, quota};
pub use room::{Update, pods as room_for, room};

/// Requests that run at once where the spec names no concurrency.
pub const CONCURRENCY_DEFAULT: u32 = 32;
/// Tokens of one request where the spec names none.
pub const REQUEST_TOKENS_DEFAULT: u32 = 2048;
/// Rows of one step; larger steps make decode rows wait longer for a neighbour's prefill.
pub const STEP_TOKENS_MAX: u32 = 512;
/// The same on a GPU, which few rows leave idle: what its engine takes where it is told nothing.
pub const GPU_RUNNING_DEFAULT: u32 = 256;
pub const GPU_STEP_TOKENS_MAX: u32 = 2048;

/// All that a plan is made from.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    pub spec: &'a Spec,
    pub facts: &'a ModelFacts,
    pub nodes: &'a [NodeResources],
    pub quota: Quota,
    /// What engines took beyond their plans, by class: measured feedback.
    pub overruns: &'a [Overrun],
    pub prices: &'a Prices,
    pub scope: Scope,
}

impl<'a> Question<'a> {
    /// What runs, where nothing is known but the nodes.
    pub fn of(
        spec: &'a Spec,
        facts: &'a ModelFacts,
        nodes: &'a [NodeResources],
        prices: &'a Prices,
    ) -> Question<'a> {
        let (quota, overruns) = (Quota::default(), &[]);
        Question { spec, facts, nodes, quota, overruns, prices, scope: Scope::Runnable }
    }
}

/// Bytes by which an engine on this class needed more than its plan said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overrun {
    pub class: String,
    pub bytes: u64,
}

/// Which candidates are weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those that the engine of this version can run.
    Runnable,
    /// Every format that is planned; chosen is what runs, all the same.
    Everything,
}

/// How one pod runs the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Eight digits of the digest of the plan's values; never of the sentences.
    pub hash: String,
    /// Its values, in short, as those of candidates that were not taken.
    pub candidate: String,
    pub quantization: Quantization,
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
    /// None where nothing is known of the machine's speed.
    pub predicted: Option<Predicted>,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachePlan {
    pub strategy: CacheStrategy,
    pub dtype: KvDtype,
    pub tokens: u64,
}

/// A candidate that can be had.
pub struct Feasible<'a> {
    candidate: Candidate<'a>,
    fitted: memory::Fitted,
    predicted: Option<Predicted>,
}

/// Why a candidate cannot be had.
struct Refusal {
    reason: Reason,
    why: String,
    miss: Option<Miss>,
    /// The least that it would take, where that was worked out.
    memory: Option<MemoryPlan>,
}

impl Refusal {
    fn new(reason: Reason, why: String) -> Refusal {
        Refusal { reason, why, miss: None, memory: None }
    }
}

/// Chooses among what runs, with nothing known but the nodes.
pub fn plan(spec: &Spec, facts: &ModelFacts, nodes: &[NodeResources]) -> PlanOutcome {
    choose(&Question::of(spec, facts, nodes, &Prices::default()))
}

/// Chooses. The same inputs, in whatever order nodes come, give the same outcome.
pub fn choose(question: &Question<'_>) -> PlanOutcome {
    choose_among(question).0
}

/// The same, with every plan that runs and can be had beside it, the best first: the chosen one leads them.
pub fn choose_among(question: &Question<'_>) -> (PlanOutcome, Vec<Plan>) {
    let Question { spec, nodes, .. } = *question;
    let (allowed, left_out) = allowed(spec, machines::machines(spec, nodes));
    let (feasible, mut refused) = weighed(question, &allowed);
    for (class, why) in machines::unusable(nodes).into_iter().chain(left_out) {
        refused.push(Rejected::class(&class, why));
    }
    let objective = spec.preferences.objective;
    let runnable = || feasible.iter().enumerate().filter(|(_, one)| one.candidate.runnable);
    let best = runnable().next().map(|(at, _)| at);
    let plans: Vec<Plan> = runnable()
        .map(|(at, one)| assemble(spec, one, explain::chosen(question, &feasible, at)))
        .collect();
    let others = feasible.iter().enumerate().filter(|(index, _)| Some(*index) != best);
    let mut rejected: Vec<_> = others
        .map(|(_, other)| {
            let why = explain::passed_over(best.map(|best| &feasible[best]), other, objective);
            Rejected::passed_over(other, why)
        })
        .collect();
    rejected.extend(refused);
    (PlanOutcome { chosen: plans.first().cloned(), rejected }, plans)
}

/// What can be had, the best first, and what cannot.
fn weighed<'a>(
    question: &Question<'_>,
    allowed: &'a [machines::Machine],
) -> (Vec<Feasible<'a>>, Vec<Rejected>) {
    let mut feasible = Vec::new();
    let mut refused = Vec::new();
    for candidate in candidates::candidates(question, allowed) {
        match weigh(question, &candidate) {
            Ok((fitted, predicted)) => feasible.push(Feasible { candidate, fitted, predicted }),
            Err(refusal) => refused.push(Rejected::refused(&candidate, refusal)),
        }
    }
    rank::nearest(&mut refused);
    rank::rank(&mut feasible, question.spec.preferences.objective);
    (feasible, refused)
}

/// Classes that the spec allows, and those that it leaves out.
fn allowed(
    spec: &Spec,
    machines: Vec<machines::Machine>,
) -> (Vec<machines::Machine>, Vec<(String, String)>) {
    let classes = &spec.preferences.classes;
    let (allowed, others): (Vec<_>, Vec<_>) = machines
        .into_iter()
        .partition(|machine| classes.is_empty() || classes.contains(&machine.class));
    let sentence = |machine: machines::Machine| (machine.class, explain::left_out(classes));
    (allowed, others.into_iter().map(sentence).collect())
}

/// Whether a candidate can be had: limits, memory, and the bounds on its speed.
fn weigh(
    question: &Question<'_>,
    candidate: &Candidate<'_>,
) -> Result<(memory::Fitted, Option<Predicted>), Refusal> {
    let Question { spec, facts, prices, .. } = *question;
    limits::check(question, candidate)?;
    let fitted = memory::fit(spec, facts, candidate)?;
    let predicted = cost::predict(facts, candidate, &fitted, &spec.workload, prices);
    let slo = spec.preferences.slo;
    let broken = |why: String, miss: Option<Miss>| {
        let memory = Some(fitted.memory);
        Refusal { miss, memory, ..Refusal::new(Reason::SloUnattainable, why) }
    };
    match predicted {
        None if slo.is_stated() => Err(broken(explain::no_speed(candidate), None)),
        None => Ok((fitted, None)),
        Some(times) => {
            for (name, time, bound) in
                [("TTFT", times.ttft, slo.ttft), ("TPOT", times.tpot, slo.tpot)]
            {
                if let Some(bound) = bound.filter(|bound| time > *bound) {
                    let miss = Some(Miss::new(Unit::Microseconds, time, bound));
                    return Err(broken(explain::too_slow(name, time, bound), miss));
                }
            }
            Ok((fitted, predicted))
        }
    }
}

fn assemble(spec: &Spec, best: &Feasible<'_>, why: String) -> Plan {
    let Feasible { candidate, fitted, predicted } = best;
    let mut plan = Plan {
        hash: String::new(),
        candidate: candidate.to_string(),
        quantization: candidate.ability.quantization,
        dtype: candidate.ability.weights,
        cache: CachePlan {
            strategy: candidate.ability.strategy,
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
        cpu_millis: machines::cpu_request(spec, candidate.machine),
        memory: fitted.memory,
        capacity: candidate.capacity,
        predicted: *predicted,
        why,
    };
    plan.hash = hash(&plan);
    plan
}

/// Of the values alone: a better sentence, another prediction, or a larger node, changes no hash. The class tells the device
/// too.
fn hash(plan: &Plan) -> String {
    let Plan {
        hash: _,
        candidate: _,
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
        predicted: _,
        why: _,
    } = plan;
    let CachePlan { strategy, dtype: kv, tokens } = cache;
    let cache = json!({"strategy": strategy.name(), "dtype": kv.name(), "tokens": tokens});
    let values = (
        quantization.name(),
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
    // An engine that has these abilities takes them under these names; what is usual is not said.
    let CachePlan { strategy, dtype: kv, tokens: _ } = plan.cache;
    if plan.quantization != Quantization::None {
        flags.push(format!("--quantization={}", plan.quantization.name().to_lowercase()));
    }
    if kv != KvDtype::from(plan.dtype) {
        flags.push(format!("--kv-dtype={}", kv.name()));
    }
    if strategy != CacheStrategy::Dynamic {
        flags.push(format!("--cache-strategy={}", strategy.name().to_lowercase()));
    }
    if plan.tensor_parallel > 1 {
        flags.push(format!("--tensor-parallel={}", plan.tensor_parallel));
    }
    flags
}
