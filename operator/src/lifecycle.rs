//! In: what the spec says of plans, the plans that are possible today, the one that runs. Out: which of them runs next, or
//! waits for a person; whether a better one may be offered; whether a class of machine is gone. Pure. A plan never gives way
//! to a better one by itself: what serves goes on serving.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use plimsoll_crds::{OfferStatus, PlanStatus, Reason};

use crate::plan::cards::{self, Gpus};
use crate::plan::{self, Plan, explain};
use crate::revision::Revision;
use crate::spec::PlanPolicy;
use crate::status::Said;

/// A class of machine counts as gone after a pod has waited for it so long: node pools that are replaced or grow from nothing
/// bring theirs back before.
pub const CLASS_GONE_PATIENCE: Duration = Duration::from_secs(10 * 60);

/// One of the plans that fit, and what it waits for.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice<'a> {
    pub plan: &'a Plan,
    /// None: it runs. Else it is shown, and a person decides.
    pub waits: Option<Reason>,
}

/// The plan that is pinned, or else the best; `feasible` has the best first. None where nothing fits.
pub fn choose<'a>(policy: &PlanPolicy, feasible: &'a [Plan]) -> Option<Choice<'a>> {
    let best = feasible.first()?;
    let choice = match &policy.pinned_hash {
        Some(pinned) => match feasible.iter().find(|plan| plan.hash == *pinned) {
            Some(plan) => Choice { plan, waits: None },
            None => Choice { plan: best, waits: Some(Reason::PinnedPlanGone) },
        },
        None if policy.manual => Choice { plan: best, waits: Some(Reason::PlanNotPinned) },
        None => Choice { plan: best, waits: None },
    };
    Some(choice)
}

/// What `Planned` says while `proposal` waits for a person.
pub fn waits(policy: &PlanPolicy, proposal: &PlanStatus) -> Said {
    let hash = &proposal.hash;
    let changes = match &proposal.changed {
        Some(change) if change.values.is_empty() => "; no value of it differs".to_owned(),
        Some(change) => format!("; against {}: {}", change.from, change.values.join(", ")),
        None => String::new(),
    };
    let why = &proposal.why;
    match &policy.pinned_hash {
        Some(pinned) => {
            let unpin = if policy.manual { "" } else { ", or remove it" };
            let message = format!(
                "spec.plan.pinnedHash is {pinned}, and no plan that is possible now has that hash; the best is {hash}: \
                 set spec.plan.pinnedHash: {hash}{unpin}{changes}; {why}"
            );
            Said::no(Reason::PinnedPlanGone, message)
        }
        None => {
            let message = format!("waits for spec.plan.pinnedHash: {hash}{changes}; {why}");
            Said::no(Reason::PlanNotPinned, message)
        }
    }
}

/// As status shows a plan that does not run.
pub fn offer(proposal: &Revision) -> OfferStatus {
    let plan = &proposal.content.plan;
    OfferStatus {
        hash: plan.hash.clone(),
        revision: proposal.name.clone(),
        cause: proposal.content.cause,
        values: plan.changed.as_ref().map(|change| change.values.clone()).unwrap_or_default(),
        why: plan.why.clone(),
    }
}

/// The plan that is better than the one that runs, where that one is still possible: another way to run the model that comes
/// before it, or room for longer sequences. Some more cache of the same kind is not worth a rollout.
pub fn better<'a>(running: &PlanStatus, feasible: &'a [Plan]) -> Option<&'a Plan> {
    let best = feasible.first()?;
    let place = feasible.iter().position(|plan| alike(running, plan))?;
    let longer = i64::from(best.context_tokens) > running.context_tokens;
    (place > 0 || longer).then_some(best)
}

/// The same way to run the model, with whatever amounts.
pub fn alike(status: &PlanStatus, plan: &Plan) -> bool {
    let PlanStatus { quantization, dtype, cache, tensor_parallel, accelerator, .. } = status;
    *quantization == plan.quantization.name()
        && dtype == explain::dtype(plan.dtype)
        && cache.strategy == plan.cache.strategy.name()
        && cache.dtype == explain::kv_dtype(plan.cache.dtype)
        && i64::from(*tensor_parallel) == i64::from(plan.tensor_parallel)
        && *accelerator == plan.accelerator
}

/// Whether no node of `class` is there any more. One that is cordoned, tainted or labelled in a way that cannot be planned
/// with is still there; and a CPU is in every node.
pub fn class_is_gone(nodes: &[Arc<Node>], class: &str) -> bool {
    let has = |node: &Arc<Node>| match cards::of_node(node) {
        _ if class == plan::CPU_CLASS => true,
        Gpus::None => false,
        Gpus::Card(card) => card.class() == class,
        Gpus::Unusable { class: held, .. } => held == class,
    };
    !nodes.iter().any(has)
}

#[cfg(test)]
mod tests;
