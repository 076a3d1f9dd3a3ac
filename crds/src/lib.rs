//! `LLMDeployment`, the one object a person applies. Its Rust types enter, the CRD's YAML leaves ([`generated`]). What
//! the API server can check stands here as schema and CEL rules; nothing here reads a cluster or decides anything.

pub mod alerts;
pub mod dashboards;
pub mod generated;
mod pages;
pub mod reasons;
mod schema;
mod spec;
mod status;

pub use reasons::{ConditionType, Reason};
pub use schema::Amount;
pub use spec::{
    Accelerators, AccessMode, Auth, Cache, CacheDtype, Clients, Credentials, LLMDeployment,
    LLMDeploymentSpec, Model, Network, Objective, OperatorUpgrade, PlanApply, PlanPolicy, Quality,
    QuantizationChoice, Resources, Rollout, RolloutStrategy, Scaling, SecretKey, Slo, Storage,
    StrategyChoice, Workload,
};
pub use status::{
    CacheStatus, LLMDeploymentStatus, MeasuredStatus, MemoryStatus, ModelStatus, OfferStatus,
    PlanCause, PlanChange, PlanStatus, PredictedStatus, RejectedStatus, ReplicaCapacity,
    RolloutState, RolloutStatus, ScalingDecision, ScalingStatus,
};

/// Longest `metadata.name`: children append up to ten characters and must stay DNS labels of 63.
pub const NAME_CHARACTERS_MAX: usize = 53;
/// Most replicas one object may ask for.
pub const REPLICAS_MAX: u32 = 1000;
/// Rejected candidates kept in status.
pub const REJECTED_MAX: usize = 8;
/// Decisions of the scaling loop kept in status.
pub const DECISIONS_MAX: usize = 5;
/// Values that a plan's change lists.
pub const CHANGES_MAX: usize = 24;
/// Characters of any sentence in status; longer ones are cut by [`bounded`].
pub const SENTENCE_CHARACTERS_MAX: usize = 1024;

/// Cuts a sentence to what the schema of status takes, and shows that it was cut.
pub fn bounded(sentence: &str) -> String {
    if sentence.chars().count() <= SENTENCE_CHARACTERS_MAX {
        return sentence.to_owned();
    }
    let kept: String = sentence.chars().take(SENTENCE_CHARACTERS_MAX - 1).collect();
    kept + "…"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_sentence_is_cut_to_the_bound_of_the_schema() {
        let cut = bounded(&"ü".repeat(5000));
        assert_eq!(cut.chars().count(), SENTENCE_CHARACTERS_MAX);
        assert!(cut.ends_with('…'));
        assert_eq!(bounded("short"), "short");
    }
}
