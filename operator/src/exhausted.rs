//! In: the pods of a revision, as they ended. Out: that an engine ran out of memory, with its figures, and what the next plan
//! has to hold beside the sum. Pure. Never here: whether there is a next plan; once is enough.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{ContainerStateTerminated, Pod};
use plimsoll_contract::exit::{ExitReason, ExitReport, MemoryReport};
use serde::{Deserialize, Serialize};

use crate::amount;
use crate::desired::{names, pod};
use crate::facts::containers;
use crate::plan::{self, Overrun, explain};
use crate::pods;
use crate::revision::Revision;

/// What one end for want of memory taught. A revision keeps it, so that it outlives the pod that told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Learned {
    /// Class of the machine that it happened on.
    pub class: String,
    /// The sum of the plan that was too small.
    pub planned_bytes: u64,
    /// What the engine needed at least.
    pub needed_bytes: u64,
    /// What the next plan holds beside the sum.
    pub unplanned_bytes: u64,
}

impl Learned {
    pub fn overrun(&self) -> Overrun {
        Overrun { class: self.class.clone(), bytes: self.unplanned_bytes }
    }

    /// Both figures in a sentence.
    pub fn figures(&self) -> String {
        format!(
            "an engine needed at least {} where {} were planned",
            explain::bytes(self.needed_bytes),
            explain::bytes(self.planned_bytes)
        )
    }

    /// What `plan.why` adds.
    pub fn sentence(&self) -> String {
        format!(
            "{} more than the sum, since {}",
            explain::bytes(self.unplanned_bytes),
            self.figures()
        )
    }
}

/// What the engines of `standing` have taught by running out of memory, if one did: by its own report, or by being killed at
/// its limit. Beside a GPU a limit bounds the host's memory, which no plan changes.
pub fn look(pods: &[Arc<Pod>], standing: &Revision) -> Option<Learned> {
    let ends = pods::of_revision(pods, &standing.hash).flat_map(|pod| ends(pod));
    ends.filter_map(|ended| learn(ended, standing)).max_by_key(|learned| learned.unplanned_bytes)
}

/// How the engine of a pod ended, now and the time before.
fn ends(pod: &Pod) -> Vec<&ContainerStateTerminated> {
    let engines = containers(pod).into_iter().filter(|container| container.name == names::ENGINE);
    let states =
        engines.flat_map(|container| [container.state.as_ref(), container.last_state.as_ref()]);
    states.filter_map(|state| state?.terminated.as_ref()).collect()
}

fn learn(ended: &ContainerStateTerminated, standing: &Revision) -> Option<Learned> {
    let plan = &standing.content.plan;
    let bytes = |amount: i64| u64::try_from(amount).unwrap_or(0);
    let planned_bytes = bytes(plan.memory_bytes.total);
    let capacity = bytes(plan.memory_bytes.capacity);
    let (needed_bytes, beyond) = match report(ended) {
        Some(report) => match (report.reason, report.memory) {
            (
                ExitReason::OutOfDeviceMemory | ExitReason::DoesNotFit,
                Some(MemoryReport { needed_bytes, available_bytes }),
            ) => {
                let missing = capacity.saturating_sub(available_bytes);
                (needed_bytes, needed_bytes.saturating_sub(planned_bytes).max(missing))
            }
            (ExitReason::OutOfDeviceMemory, None) => (planned_bytes, 0),
            _ => return None,
        },
        None if ended.reason.as_deref() == Some("OOMKilled")
            && plan.accelerator == plan::CPU_CLASS =>
        {
            // Killed at the limit: it would have taken more, and nobody knows how much.
            let limit = limit_bytes(standing)?.max(planned_bytes);
            (limit, limit - planned_bytes + plan::headroom(limit))
        }
        None => return None,
    };
    let held = standing.content.learned.as_ref().filter(|held| held.class == plan.accelerator);
    let before = held.map_or(0, |held| held.unplanned_bytes);
    // A report whose figures explain nothing still means that the plan was too large.
    let beyond = if beyond == 0 { plan::headroom(planned_bytes) } else { beyond };
    Some(Learned {
        class: plan.accelerator.clone(),
        planned_bytes,
        needed_bytes,
        unplanned_bytes: before + beyond,
    })
}

fn report(ended: &ContainerStateTerminated) -> Option<ExitReport> {
    serde_json::from_str(ended.message.as_deref()?).ok()
}

/// The limit of memory under which the engines of a revision run.
fn limit_bytes(standing: &Revision) -> Option<u64> {
    let engine = pod::engine_of(&standing.content.pod_template)?;
    amount::units(engine["resources"]["limits"]["memory"].as_str()?)
}

#[cfg(test)]
mod tests;
