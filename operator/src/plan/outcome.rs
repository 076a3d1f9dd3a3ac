//! What planning came to: the chosen plan, and the others with why they lost; as types, and as status shows them. Pure.

use plimsoll_contract::memory::MemoryPlan;
use plimsoll_crds::{
    CacheStatus, MemoryStatus, PlanStatus, PredictedStatus, REJECTED_MAX, Reason, RejectedStatus,
    bounded,
};

use super::candidates::Candidate;
use super::{Feasible, Plan, Predicted, Refusal, explain};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanOutcome {
    pub chosen: Option<Plan>,
    /// All others: those that could be had, the best first; then the nearest misses.
    pub rejected: Vec<Rejected>,
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
    /// Whether the engine of this version can do it.
    pub runnable: bool,
    /// By how much it missed, where it missed by an amount.
    pub miss: Option<Miss>,
    /// What one device would hold, or the least of it; where that was worked out.
    pub memory: Option<MemoryPlan>,
    pub capacity: u64,
    pub predicted: Option<Predicted>,
}

/// Of what a candidate needed more than there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    pub unit: Unit,
    pub needed: u64,
    pub bound: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Gpus,
    Microseconds,
}

impl Miss {
    pub fn new(unit: Unit, needed: u64, bound: u64) -> Miss {
        Miss { unit, needed, bound }
    }

    pub fn short(&self) -> u64 {
        self.needed.saturating_sub(self.bound)
    }

    /// In thousandths of the bound.
    pub fn permille(&self) -> u64 {
        self.short().saturating_mul(1000) / self.bound.max(1)
    }
}

impl Rejected {
    pub(super) fn refused(candidate: &Candidate<'_>, refusal: Refusal) -> Rejected {
        let Refusal { reason, why, miss, memory } = refusal;
        Rejected {
            candidate: candidate.to_string(),
            reason,
            why,
            runnable: candidate.runnable,
            miss,
            memory,
            capacity: candidate.capacity,
            predicted: None,
        }
    }

    pub(super) fn passed_over(other: &Feasible<'_>, why: String) -> Rejected {
        let Feasible { candidate, fitted, predicted } = other;
        let runnable = candidate.runnable;
        Rejected {
            candidate: candidate.to_string(),
            reason: if runnable { Reason::PlanChosen } else { Reason::UnsupportedModel },
            why,
            runnable,
            miss: None,
            memory: Some(fitted.memory),
            capacity: candidate.capacity,
            predicted: *predicted,
        }
    }

    /// Every candidate on a class of machine.
    pub(super) fn class(class: &str, why: String) -> Rejected {
        Rejected {
            candidate: explain::any_on(class),
            reason: Reason::DoesNotFit,
            why,
            runnable: false,
            miss: None,
            memory: None,
            capacity: 0,
            predicted: None,
        }
    }
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
            .take(REJECTED_MAX)
            .map(|Rejected { candidate, why, .. }| format!("{candidate}: {why}"))
            .collect();
        Some((first.reason, bounded(&sentences.join("; "))))
    }
}

/// As status writes it.
pub fn status(outcome: &PlanOutcome, chosen: &Plan) -> PlanStatus {
    PlanStatus {
        hash: chosen.hash.clone(),
        quantization: chosen.quantization.name().to_owned(),
        dtype: explain::dtype(chosen.dtype).to_owned(),
        cache: CacheStatus {
            strategy: chosen.cache.strategy.name().to_owned(),
            dtype: explain::kv_dtype(chosen.cache.dtype).to_owned(),
            tokens: signed(chosen.cache.tokens),
        },
        tensor_parallel: chosen.tensor_parallel.cast_signed(),
        accelerator: chosen.accelerator.clone(),
        context_tokens: chosen.context_tokens.into(),
        concurrency: chosen.running_max.cast_signed(),
        step_tokens: Some(chosen.step_tokens_max.cast_signed()),
        cpu_millis: Some(chosen.cpu_millis.cast_signed()),
        memory_bytes: memory(&chosen.memory, chosen.capacity),
        predicted: chosen.predicted.as_ref().map(predicted),
        why: bounded(&chosen.why),
        rejected: outcome
            .rejected
            .iter()
            .take(REJECTED_MAX)
            .map(|Rejected { candidate, why, .. }| RejectedStatus {
                candidate: candidate.clone(),
                why: bounded(why),
            })
            .collect(),
        changed: None,
    }
}

pub fn memory(memory: &MemoryPlan, capacity: u64) -> MemoryStatus {
    let MemoryPlan { weights, workspace, process, kv, kv_tokens: _ } = *memory;
    MemoryStatus {
        weights: signed(weights),
        kv: signed(kv),
        workspace: signed(workspace),
        process: signed(process),
        total: signed(memory.total()),
        capacity: signed(capacity),
    }
}

pub fn predicted(times: &Predicted) -> PredictedStatus {
    let Predicted { ttft, tpot, tokens_per_second, microdollars, basis } = *times;
    PredictedStatus {
        ttft_microseconds: signed(ttft),
        tpot_microseconds: signed(tpot),
        tokens_per_second: signed(tokens_per_second),
        microdollars_per_million_tokens: microdollars.map(signed),
        basis: basis.name().to_owned(),
    }
}

fn signed(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}
