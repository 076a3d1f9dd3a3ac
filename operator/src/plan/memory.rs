//! Does a candidate fit, and how much KV cache has room beside it? Pure; the sum is the contract's, which the engine
//! computes again before it loads.

use std::borrow::Cow;

use plimsoll_contract::abilities::{Ability, Backend, CacheStrategy, PAGE_TOKENS};
use plimsoll_contract::facts::ModelFacts;
use plimsoll_contract::memory::{self, MemoryPlan, StepLimits};
use plimsoll_crds::Reason;

use super::candidates::Candidate;
use super::machines::GPU_HOST_BYTES;
use super::{
    CONCURRENCY_DEFAULT, GPU_RUNNING_DEFAULT, GPU_STEP_TOKENS_MAX, Miss, REQUEST_TOKENS_DEFAULT,
    Refusal, STEP_TOKENS_MAX, Unit, explain,
};
use crate::spec::Spec;

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
    /// KV tokens that lie in the host's memory.
    pub host_tokens: u64,
}

impl Fitted {
    /// KV tokens that serve what the spec asks for.
    pub fn served_tokens(&self) -> u64 {
        (self.memory.kv_tokens + self.host_tokens).min(self.demanded_tokens)
    }

    pub fn carries_workload(&self) -> bool {
        self.served_tokens() == self.demanded_tokens
    }
}

/// The largest KV cache worth having, or the sum that refuses the candidate. On several GPUs all sizes are those of one.
pub fn fit(spec: &Spec, facts: &ModelFacts, candidate: &Candidate<'_>) -> Result<Fitted, Refusal> {
    let Candidate { ability, capacity, machine, .. } = *candidate;
    let limits = limits(spec, ability.backend);
    let need = Need::of(spec, facts, ability.strategy, limits.running_max);
    let sizes = Sizes::of(facts, candidate, limits, need.context_wanted);

    // What lies in the host's memory needs no room on the card, but for the page that is being written.
    let host_tokens_max = sizes.host_tokens_max(spec, candidate);
    let on_card = |tokens: u64| tokens.saturating_sub(host_tokens_max).max(1);
    let least = sizes.plan(on_card(need.least));
    if least.total() > capacity {
        return Err(Refusal {
            reason: Reason::DoesNotFit,
            why: explain::does_not_fit(spec, candidate, &least),
            miss: Some(Miss::new(Unit::Bytes, least.total(), capacity)),
            memory: Some(least),
        });
    }
    let room = |bytes: u64| sizes.tokens_in(bytes);
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
            let of_use = u64::from(limits.running_max) * need.context_wanted;
            let wanted = match spec.cache_tokens {
                Some(_) => need.wanted,
                None => need.wanted.max(of_use),
            };
            wanted.min(room(capacity)).max(on_card(need.least))
        }
    };
    if ability.strategy == CacheStrategy::Offloaded && tokens >= need.demanded {
        let why = explain::nothing_to_offload(need.demanded);
        return Err(Refusal::new(Reason::UnsupportedModel, why));
    }
    let memory = sizes.plan(tokens);
    let host_tokens = host_tokens_max.min(need.wanted.saturating_sub(memory.kv_tokens));
    let context = need.context_wanted.min(memory.kv_tokens + host_tokens);
    Ok(Fitted {
        memory,
        limits,
        context_tokens: u32::try_from(context).expect("no longer than what was wanted"),
        demanded_tokens: in_pages(need.demanded),
        host_tokens,
    })
}

fn limits(spec: &Spec, backend: Backend) -> StepLimits {
    let (running_usual, step_tokens_max) = match backend {
        Backend::Cpu => (CONCURRENCY_DEFAULT, STEP_TOKENS_MAX),
        Backend::Cuda => (GPU_RUNNING_DEFAULT, GPU_STEP_TOKENS_MAX),
    };
    let running_max = spec.workload.concurrency.unwrap_or(running_usual);
    StepLimits { step_tokens_max, running_max }
}

/// What one device holds of the model, and what its KV takes.
struct Sizes<'a> {
    shard: Cow<'a, ModelFacts>,
    ability: Ability,
    limits: StepLimits,
    /// What engines on such a machine were found to need beside the sum: counted with the process.
    overrun: u64,
    /// Everything but KV.
    fixed: u64,
    page: u64,
}

impl<'a> Sizes<'a> {
    fn of(
        facts: &'a ModelFacts,
        candidate: &Candidate<'_>,
        limits: StepLimits,
        context: u64,
    ) -> Sizes<'a> {
        let ability = candidate.ability;
        let shard = match candidate.tensor_parallel {
            1 => Cow::Borrowed(facts),
            ranks => Cow::Owned(memory::shard(facts, ranks)),
        };
        let whole = memory::kv_bytes(&shard, ability, u64::from(PAGE_TOKENS));
        let page = match (ability.strategy, facts.sliding_window) {
            // Layers with a window keep that part of a sequence of full length which is in sight.
            (CacheStrategy::SlidingWindow, Some(window)) => {
                let layers = u64::from(facts.layers);
                let windowed = u64::from(window.layers).min(layers);
                let seen = u64::from(window.tokens).min(context.max(1));
                let kept = (layers - windowed) * context.max(1) + windowed * seen;
                let part =
                    u128::from(whole) * u128::from(kept) / u128::from(layers * context.max(1));
                u64::try_from(part).expect("a part of the whole")
            }
            _ => whole,
        };
        let overrun = candidate.overrun;
        let fixed = memory::plan(&shard, ability, limits, 0).total() + overrun;
        Sizes { shard, ability, limits, overrun, fixed, page: page.max(1) }
    }

    fn plan(&self, tokens: u64) -> MemoryPlan {
        let plan = memory::plan(&self.shard, self.ability, self.limits, tokens);
        let pages = plan.kv_tokens / u64::from(PAGE_TOKENS);
        MemoryPlan { kv: pages * self.page, process: plan.process + self.overrun, ..plan }
    }

    /// Tokens whose KV has room beside everything else.
    fn tokens_in(&self, bytes: u64) -> u64 {
        (bytes.saturating_sub(self.fixed) / self.page) * u64::from(PAGE_TOKENS)
    }

    /// Tokens whose KV may lie in the host's memory: at most half of what the engine itself leaves of it.
    fn host_tokens_max(&self, spec: &Spec, candidate: &Candidate<'_>) -> u64 {
        if self.ability.strategy != CacheStrategy::Offloaded {
            return 0;
        }
        let budget = spec.budget.memory_bytes.unwrap_or(u64::MAX);
        let free = budget.min(candidate.machine.best.free_bytes()).saturating_sub(GPU_HOST_BYTES);
        let ranks = u64::from(candidate.tensor_parallel);
        free / 2 / (self.page * ranks) * u64::from(PAGE_TOKENS)
    }
}

/// KV tokens by how much they matter.
struct Need {
    /// Without these the plan is refused.
    least: u64,
    /// What the spec asks for.
    demanded: u64,
    /// What would be of use; at least as much as the others.
    wanted: u64,
    context_wanted: u64,
}

impl Need {
    fn of(spec: &Spec, facts: &ModelFacts, strategy: CacheStrategy, running_max: u32) -> Need {
        let trained = u64::from(facts.context_tokens);
        let context = spec.context_tokens.map(u64::from);
        let context_wanted = context.unwrap_or(trained);
        let request = spec.workload.request(REQUEST_TOKENS_DEFAULT);
        let request = request.map(|(prompt, output)| u64::from(prompt) + u64::from(output));
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
        if strategy == CacheStrategy::Static {
            // Every sequence that may run holds its longest length, and nothing else is of use.
            let held = u64::from(running_max) * least;
            return Need { least: held, demanded, wanted: held, context_wanted: least };
        }
        Need { least, demanded, wanted: demanded.max(context_wanted).max(load), context_wanted }
    }
}

fn in_pages(tokens: u64) -> u64 {
    tokens.next_multiple_of(u64::from(PAGE_TOKENS))
}
