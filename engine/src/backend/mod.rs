//! The one seam between the step loop and whatever computes: a whole step goes in, sampled tokens come out. Single ops
//! are private to a backend. Three implementations stand behind it: CPU, CUDA and, in tests, a scripted one.

mod check;
pub mod cpu;
pub mod cuda;
pub mod place;
#[doc(hidden)]
pub mod scripted;

use plimsoll_contract::abilities::{Dtype, PAGE_TOKENS};

use crate::batch::{Step, StepNumber, StepOutput};
use crate::scheduler::StepCosts;

/// Layers that share block tables. One group now; windowed layers can get their own, with pages freed early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerGroup {
    pub layers: Vec<usize>,
}

/// How KV pages look: `[page][K|V][kv_head][64][head_dim]` for each layer of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    pub groups: Vec<LayerGroup>,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub dtype: Dtype,
}

impl KvLayout {
    /// Bytes of one page of a group over all its layers.
    pub fn page_bytes(&self, group: usize) -> u64 {
        let per_layer = 2 * self.kv_heads as u64 * u64::from(PAGE_TOKENS) * self.head_dim as u64;
        per_layer * self.dtype.bytes() * self.groups[group].layers.len() as u64
    }
}

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    pub layers_done: usize,
    pub layers: usize,
}

/// A submitted step; `collect` takes them in order of submission.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "an uncollected step leaks its results"]
pub struct Ticket(pub StepNumber);

#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The device is gone; the process ends with `DeviceLost`.
    #[error("the device stopped answering: {0}")]
    DeviceLost(String),
    /// An operation failed on valid input: a defect of ours. The step's requests fail, the engine goes on.
    #[error("step {} failed: {reason}", number.0)]
    StepFailed { number: StepNumber, reason: String },
}

/// Executes steps. Called by the one thread that owns the device.
pub trait Backend: Send {
    fn layout(&self) -> &KvLayout;
    /// What steps cost by their rows, where that is known and not the same for each.
    fn step_costs(&self) -> StepCosts {
        StepCosts::default()
    }
    /// Starts a step. A later step may be submitted before an earlier one is collected; rows with
    /// [`RowInput::Sampled`](crate::batch::RowInput) read what the slot's previous step sampled.
    fn submit(&mut self, step: Step) -> Result<Ticket, BackendError>;
    /// Waits for a step's results.
    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, BackendError>;
}
