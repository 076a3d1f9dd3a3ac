//! Does a candidate fit, and how much KV cache has room beside it? Pure; the sum is the contract's, which the engine
//! computes again before it loads.

use plimsoll_contract::abilities::{Backend, CUDA_HEAD_DIM_MAX, PAGE_TOKENS};
use plimsoll_contract::facts::ModelFacts;
use plimsoll_contract::memory::{self, MemoryPlan, StepLimits};
use plimsoll_crds::Reason;

use super::candidates::{Candidate, GPU_HOST_BYTES};
use super::{
    CONCURRENCY_DEFAULT, GPU_RUNNING_DEFAULT, GPU_STEP_TOKENS_MAX, REQUEST_TOKENS_DEFAULT,
    STEP_TOKENS_MAX, explain,
};
use crate::spec::{Spec, Workload};

/// What the sum does not hold: while weights are read, pages of files and buffers come on top for a moment. A limit that
/// is the sum itself would end the engine there.
pub const HEADROOM_BYTES_MIN: u64 = 64 << 20;
/// Part of the sum that is added where it is more than that.
pub const HEADROOM_SHARE: u64 = 16;

pub fn headroom(total: u64) -> u64 {
    (total / HEADROOM_SHARE).max(HEADROOM_BYTES_MIN)
}

/// The most of `capacity` whose headroom still lies within it.
fn less_headroom(capacity: u64) -> u64 {
    let by_share = capacity - capacity / (HEADROOM_SHARE + 1);
    by_share.min(capacity.saturating_sub(HEADROOM_BYTES_MIN))
}

/// A candidate's memory, once it fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fitted {
    pub memory: MemoryPlan,
    pub limits: StepLimits,
    pub context_tokens: u32,
    /// KV tokens that the spec asks for, in so many words.
    pub demanded_tokens: u64,
}

impl Fitted {
    /// KV tokens that serve what the spec asks for.
    pub fn served_tokens(&self) -> u64 {
        self.memory.kv_tokens.min(self.demanded_tokens)
    }

    pub fn carries_workload(&self) -> bool {
        self.served_tokens() == self.demanded_tokens
    }
}

/// The largest KV cache worth having, or the reason and the sum that refuse the candidate.
pub fn fit(
    spec: &Spec,
    facts: &ModelFacts,
    candidate: &Candidate,
) -> Result<Fitted, (Reason, String)> {
    refuse_what_memory_cannot_mend(spec, facts, candidate)?;
    let Candidate { ability, capacity, ref machine, .. } = *candidate;
    let (running_usual, step_tokens_max) = match ability.backend {
        Backend::Cpu => (CONCURRENCY_DEFAULT, STEP_TOKENS_MAX),
        Backend::Cuda => (GPU_RUNNING_DEFAULT, GPU_STEP_TOKENS_MAX),
    };
    let running_max = spec.workload.concurrency.unwrap_or(running_usual);
    let limits = StepLimits { step_tokens_max, running_max };
    let need = Need::of(spec, facts);
    let sum = |tokens: u64| {
        let mut memory = memory::plan(facts, ability, limits, tokens);
        memory.process += unplanned_bytes(spec, candidate);
        memory
    };
    let fixed = sum(0).total();
    let page = memory::kv_bytes(facts, ability, u64::from(PAGE_TOKENS)).max(1);
    let room = |bytes: u64| (bytes.saturating_sub(fixed) / page) * u64::from(PAGE_TOKENS);

    let least = sum(need.least);
    if least.total() > capacity {
        return Err((Reason::DoesNotFit, explain::does_not_fit(spec, candidate, &least)));
    }
    let tokens = match ability.backend {
        Backend::Cpu => {
            // Without a budget of its own a pod leaves half of the node to others, beyond what it cannot do without. Those
            // who are there already count as such others.
            let half = capacity.min(machine.best.memory_bytes / 2);
            let polite = if spec.budget.memory_bytes.is_some() { capacity } else { half };
            // The cache makes room for the headroom, and for the other replicas and one pod more while they are replaced. What
            // the workload asks for makes room for the headroom alone, and what the pod cannot do without for nothing.
            let share = machine.best.free_bytes() / machine.pods_on_best(spec);
            let roomy = need.wanted.min(room(less_headroom(polite.min(share))));
            let owed = need.demanded.min(room(less_headroom(polite)));
            roomy.max(owed).max(need.least)
        }
        Backend::Cuda => {
            // A card belongs to one pod, so that the rest of it may keep what was computed: at most as much as all
            // requests of a step could have, each at its longest.
            let of_use = u64::from(running_max) * need.context_wanted;
            let wanted = match spec.cache_tokens {
                Some(_) => need.wanted,
                None => need.wanted.max(of_use),
            };
            wanted.min(room(capacity)).max(need.least)
        }
    };
    let memory = sum(tokens);
    let context = need.context_wanted.min(memory.kv_tokens);
    Ok(Fitted {
        memory,
        limits,
        context_tokens: u32::try_from(context).expect("no longer than what was wanted"),
        demanded_tokens: in_pages(need.demanded),
    })
}

/// What engines on such a machine were found to need beside the sum.
fn unplanned_bytes(spec: &Spec, candidate: &Candidate) -> u64 {
    let here = spec.unplanned.as_ref().filter(|found| found.class == candidate.machine.class);
    here.map_or(0, |found| found.bytes)
}

fn refuse_what_memory_cannot_mend(
    spec: &Spec,
    facts: &ModelFacts,
    candidate: &Candidate,
) -> Result<(), (Reason, String)> {
    if let Some(method) = &facts.quantization {
        return Err((Reason::UnsupportedModel, explain::quantized_on_disk(method)));
    }
    if let Some(context) = spec.context_tokens.filter(|context| *context > facts.context_tokens) {
        return Err((
            Reason::InvalidSpec,
            explain::context_too_long(context, facts.context_tokens),
        ));
    }
    let Workload { prompt_tokens, output_tokens, .. } = spec.workload;
    let request = u64::from(prompt_tokens.unwrap_or(0)) + u64::from(output_tokens.unwrap_or(0));
    if request > u64::from(facts.context_tokens) {
        return Err((
            Reason::InvalidSpec,
            explain::request_too_long(request, facts.context_tokens),
        ));
    }
    if let Some(wanted) = spec.cache_dtype.filter(|dtype| *dtype != candidate.ability.kv) {
        let why = explain::other_cache_dtype(wanted, candidate.ability.kv);
        return Err((Reason::InvalidSpec, why));
    }
    let wanted_cpu = spec.budget.cpu_millis.unwrap_or(0);
    let cpu_millis = candidate.machine.best.free_cpu_millis();
    if wanted_cpu > cpu_millis {
        let why = explain::too_little_cpu(wanted_cpu, cpu_millis);
        return Err((Reason::DoesNotFit, why));
    }
    if candidate.ability.backend == Backend::Cuda {
        refuse_what_a_card_cannot_mend(spec, facts, candidate)?;
    }
    Ok(())
}

/// A card does not help where the kernels do not take the model, or where the host beside it is too small.
fn refuse_what_a_card_cannot_mend(
    spec: &Spec,
    facts: &ModelFacts,
    candidate: &Candidate,
) -> Result<(), (Reason, String)> {
    if facts.head_dim > CUDA_HEAD_DIM_MAX {
        let why = explain::heads_too_wide(facts.head_dim, CUDA_HEAD_DIM_MAX);
        return Err((Reason::UnsupportedModel, why));
    }
    let host = &candidate.machine.best;
    let left = spec.budget.memory_bytes.unwrap_or(u64::MAX).min(host.free_bytes());
    if left < GPU_HOST_BYTES {
        return Err((Reason::DoesNotFit, explain::too_little_host(spec, host, GPU_HOST_BYTES)));
    }
    Ok(())
}

/// KV tokens by how much they matter.
struct Need {
    /// Without these the plan is refused.
    least: u64,
    /// What the spec asks for; at least `least`.
    demanded: u64,
    /// What would be of use; at least `demanded`.
    wanted: u64,
    context_wanted: u64,
}

impl Need {
    fn of(spec: &Spec, facts: &ModelFacts) -> Need {
        let trained = u64::from(facts.context_tokens);
        let context = spec.context_tokens.map(u64::from);
        let context_wanted = context.unwrap_or(trained);
        let request = request_tokens(&spec.workload);
        let usual = u64::from(REQUEST_TOKENS_DEFAULT);
        let request_or_usual = request.unwrap_or(usual).min(context_wanted);
        let concurrency = u64::from(spec.workload.concurrency.unwrap_or(CONCURRENCY_DEFAULT));
        if let Some(tokens) = spec.cache_tokens {
            let context_wanted = context_wanted.min(tokens);
            return Need { least: tokens, demanded: tokens, wanted: tokens, context_wanted };
        }
        let least = context.unwrap_or(request_or_usual);
        let load = concurrency * request_or_usual;
        let says_load = request.is_some() || spec.workload.concurrency.is_some();
        let demanded = if says_load { load.max(least) } else { least };
        Need { least, demanded, wanted: demanded.max(context_wanted).max(load), context_wanted }
    }
}

/// Tokens of one request as far as the spec says; a missing half is what the usual length leaves, at least one token.
fn request_tokens(workload: &Workload) -> Option<u64> {
    let usual = u64::from(REQUEST_TOKENS_DEFAULT);
    match (workload.prompt_tokens, workload.output_tokens) {
        (Some(prompt), Some(output)) => Some(u64::from(prompt) + u64::from(output)),
        (Some(one), None) | (None, Some(one)) => Some(usual.max(u64::from(one) + 1)),
        (None, None) => None,
    }
}

fn in_pages(tokens: u64) -> u64 {
    tokens.next_multiple_of(u64::from(PAGE_TOKENS))
}
