//! Why a model cannot be loaded. Every variant is one exit reason and says what was expected, what was found and what
//! to do about it.

use std::path::PathBuf;

use plimsoll_contract::exit::{ExitReason, ExitReport, MemoryReport};

use plimsoll_kernels::device::DeviceError;

use crate::memory::DoesNotFit;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("no model at {source_name}: {problem}; {remedy}")]
    ModelNotFound { source_name: String, problem: String, remedy: String },
    #[error("{source_name} refused access: {problem}; {remedy}")]
    ModelUnauthorized { source_name: String, problem: String, remedy: String },
    /// The world's fault, not the model's: a retry may help.
    #[error("failed to read or write {source_name}: {problem}; {remedy}")]
    Unreachable { source_name: String, problem: String, remedy: String },
    /// A valid checkpoint of a kind that the engine does not run.
    #[error("{file}: {field} is {found}, but {expected}; {remedy}")]
    UnsupportedModel {
        file: String,
        field: String,
        found: String,
        expected: String,
        remedy: String,
    },
    /// Truncated, malformed, or contradicting its own configuration.
    #[error("{}{}: expected {expected}, found {found}; download the checkpoint again", file.display(), tensor_part(tensor))]
    CorruptWeights { file: PathBuf, tensor: Option<String>, expected: String, found: String },
    #[error(transparent)]
    DoesNotFit(#[from] DoesNotFit),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("the system refused {bytes} bytes for {purpose}: {source}")]
    OutOfDeviceMemory {
        purpose: &'static str,
        bytes: u64,
        /// What the card had left at that moment; None on a CPU.
        left: Option<u64>,
        source: std::io::Error,
    },
}

fn tensor_part(tensor: &Option<String>) -> String {
    tensor.as_ref().map(|name| format!(", tensor {name}")).unwrap_or_default()
}

impl LoadError {
    pub fn exit_reason(&self) -> ExitReason {
        match self {
            LoadError::ModelNotFound { .. } => ExitReason::ModelNotFound,
            LoadError::ModelUnauthorized { .. } => ExitReason::ModelUnauthorized,
            // Among the documented reasons only this one means: restart and try again.
            LoadError::Unreachable { .. } => ExitReason::Internal,
            LoadError::UnsupportedModel { .. } => ExitReason::UnsupportedModel,
            LoadError::CorruptWeights { .. } => ExitReason::CorruptWeights,
            LoadError::DoesNotFit(_) => ExitReason::DoesNotFit,
            LoadError::OutOfDeviceMemory { .. } => ExitReason::OutOfDeviceMemory,
            LoadError::Device(_) => ExitReason::DeviceLost,
        }
    }

    /// What goes into the termination message.
    pub fn report(&self) -> ExitReport {
        let mut report = ExitReport::new(self.exit_reason(), self.to_string());
        if let LoadError::DoesNotFit(DoesNotFit { plan, available, .. }) = self {
            let needed_bytes = plan.total();
            report.memory = Some(MemoryReport { needed_bytes, available_bytes: *available });
        }
        report
    }
}
