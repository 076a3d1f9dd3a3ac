//! Why an engine process ended: written as JSON into the pod's termination message, read by the operator into
//! conditions. Nobody reads logs to learn why.

use serde::{Deserialize, Serialize};

/// Kubernetes truncates a termination message at this many bytes.
pub const TERMINATION_MESSAGE_BYTES_MAX: usize = 4096;

/// The documented reasons. Each has a remedy in docs/status.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ExitReason {
    /// The plan needs more memory than there is; the message holds the arithmetic.
    DoesNotFit,
    /// The device refused an allocation that the plan had counted on.
    OutOfDeviceMemory,
    /// The source names nothing that can be read.
    ModelNotFound,
    /// The source wants credentials it was not given.
    ModelUnauthorized,
    /// The checkpoint is of a kind the engine does not run.
    UnsupportedModel,
    /// A file is truncated, malformed or contradicts the configuration.
    CorruptWeights,
    /// The device stopped answering.
    DeviceLost,
    /// The file of API keys is missing, unreadable or holds none.
    ApiKeysUnusable,
    /// A defect of ours.
    Internal,
}

impl ExitReason {
    /// Every reason, in order of [`code`](Self::code).
    pub const ALL: [ExitReason; 9] = [
        ExitReason::DoesNotFit,
        ExitReason::OutOfDeviceMemory,
        ExitReason::ModelNotFound,
        ExitReason::ModelUnauthorized,
        ExitReason::UnsupportedModel,
        ExitReason::CorruptWeights,
        ExitReason::DeviceLost,
        ExitReason::ApiKeysUnusable,
        ExitReason::Internal,
    ];

    /// Process exit code, distinct per reason so that a shell can tell too.
    pub fn code(self) -> u8 {
        match self {
            ExitReason::DoesNotFit => 10,
            ExitReason::OutOfDeviceMemory => 11,
            ExitReason::ModelNotFound => 12,
            ExitReason::ModelUnauthorized => 13,
            ExitReason::UnsupportedModel => 14,
            ExitReason::CorruptWeights => 15,
            ExitReason::DeviceLost => 16,
            ExitReason::ApiKeysUnusable => 17,
            ExitReason::Internal => 70,
        }
    }

    /// True where a restart cannot help and a person must act.
    pub fn needs_a_person(self) -> bool {
        match self {
            ExitReason::DoesNotFit
            | ExitReason::ModelNotFound
            | ExitReason::ModelUnauthorized
            | ExitReason::UnsupportedModel
            | ExitReason::CorruptWeights
            | ExitReason::ApiKeysUnusable => true,
            ExitReason::OutOfDeviceMemory | ExitReason::DeviceLost | ExitReason::Internal => false,
        }
    }
}

/// The termination message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    pub reason: ExitReason,
    /// One sentence with the figures and the remedy.
    pub message: String,
    /// The figures, where memory was the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryReport>,
}

/// Memory as it was when there was not enough of it, in bytes: the card's, or the process's on a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryReport {
    /// What the process held, and what it was refused on top: it needs at least so much.
    pub needed_bytes: u64,
    /// What there was for it.
    pub available_bytes: u64,
}

impl ExitReport {
    /// A report without figures.
    pub fn new(reason: ExitReason, message: impl Into<String>) -> ExitReport {
        ExitReport { reason, message: message.into(), memory: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_where_they_are_and_not_missed_where_an_older_engine_has_none() {
        let read = |text: &str| serde_json::from_str::<ExitReport>(text).unwrap();
        let old = read(r#"{"reason":"DoesNotFit","message":"m"}"#);
        assert_eq!(old, ExitReport::new(ExitReason::DoesNotFit, "m"));
        let told = r#"{"reason":"DoesNotFit","message":"m","memory":{"neededBytes":3,"availableBytes":2}}"#;
        let memory = MemoryReport { needed_bytes: 3, available_bytes: 2 };
        assert_eq!(read(told), ExitReport { memory: Some(memory), ..old });
        assert_eq!(serde_json::to_string(&read(told)).unwrap(), told);
    }
}
