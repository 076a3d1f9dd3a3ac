//! The words that conditions speak. Each reason has a meaning and a remedy; docs/status.md is generated from here, so
//! that no word is ever shown that a person cannot look up.

use plimsoll_contract::exit::ExitReason;

/// Types of condition on an `LLMDeployment`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ConditionType {
    Ready,
    Planned,
    ModelReady,
    Scheduled,
    EngineLoaded,
    Available,
    ScalingActive,
    Reconciling,
    Stalled,
}

impl ConditionType {
    pub const ALL: &[ConditionType] = &[
        ConditionType::Ready,
        ConditionType::Planned,
        ConditionType::ModelReady,
        ConditionType::Scheduled,
        ConditionType::EngineLoaded,
        ConditionType::Available,
        ConditionType::ScalingActive,
        ConditionType::Reconciling,
        ConditionType::Stalled,
    ];

    pub fn name(self) -> &'static str {
        match self {
            ConditionType::Ready => "Ready",
            ConditionType::Planned => "Planned",
            ConditionType::ModelReady => "ModelReady",
            ConditionType::Scheduled => "Scheduled",
            ConditionType::EngineLoaded => "EngineLoaded",
            ConditionType::Available => "Available",
            ConditionType::ScalingActive => "ScalingActive",
            ConditionType::Reconciling => "Reconciling",
            ConditionType::Stalled => "Stalled",
        }
    }

    /// What it says while true.
    pub fn meaning(self) -> &'static str {
        match self {
            ConditionType::Ready => {
                "Pods of the current revision answer `/ready`, as many as asked for. The sum of the others."
            }
            ConditionType::Planned => "A plan was chosen; `status.plan` holds it.",
            ConditionType::ModelReady => {
                "The source was read, and its files lie where pods find them."
            }
            ConditionType::Scheduled => "Every pod of the current revision has a node.",
            ConditionType::EngineLoaded => {
                "The engines of the current revision have loaded the model."
            }
            ConditionType::Available => "At least one pod answers, of whatever revision.",
            ConditionType::ScalingActive => {
                "The scaling loop knows enough to choose the number of replicas. Present only where `spec.scaling` is set."
            }
            ConditionType::Reconciling => "Work is under way. Present only while it is.",
            ConditionType::Stalled => {
                "Nothing more will happen until a person acts. Present only while that is so."
            }
        }
    }
}

/// Why a condition has its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    Serving,
    Pending,
    Accepted,
    Inspecting,
    Downloading,
    ModelFound,
    PlanChosen,
    PlanNotPinned,
    PinnedPlanGone,
    CreatingPods,
    PodsScheduled,
    EngineLoading,
    EngineReady,
    RollingOut,
    RolloutStopped,
    RolledBack,
    ScaledToZero,
    ScalingOnMetrics,
    PrometheusNotSet,
    PrometheusUnreachable,
    MetricsMissing,
    MetricsPartial,
    Suspended,
    InvalidSpec,
    SourceNotAllowed,
    ClaimNotFound,
    ChildRejected,
    NoNodes,
    Unschedulable,
    SecretNotFound,
    VolumeNotMounted,
    ImagePullFailed,
    EngineCrashLooping,
    DoesNotFit,
    SloUnattainable,
    OutOfDeviceMemory,
    OutOfMemoryAgain,
    ModelNotFound,
    ModelUnauthorized,
    UnsupportedModel,
    CorruptWeights,
    DeviceLost,
    ApiKeysUnusable,
    Internal,
}

impl Reason {
    pub const ALL: &[Reason] = &[
        Reason::Serving,
        Reason::Pending,
        Reason::Accepted,
        Reason::Inspecting,
        Reason::Downloading,
        Reason::ModelFound,
        Reason::PlanChosen,
        Reason::PlanNotPinned,
        Reason::PinnedPlanGone,
        Reason::CreatingPods,
        Reason::PodsScheduled,
        Reason::EngineLoading,
        Reason::EngineReady,
        Reason::RollingOut,
        Reason::RolloutStopped,
        Reason::RolledBack,
        Reason::ScaledToZero,
        Reason::ScalingOnMetrics,
        Reason::PrometheusNotSet,
        Reason::PrometheusUnreachable,
        Reason::MetricsMissing,
        Reason::MetricsPartial,
        Reason::Suspended,
        Reason::InvalidSpec,
        Reason::SourceNotAllowed,
        Reason::ClaimNotFound,
        Reason::ChildRejected,
        Reason::NoNodes,
        Reason::Unschedulable,
        Reason::SecretNotFound,
        Reason::VolumeNotMounted,
        Reason::ImagePullFailed,
        Reason::EngineCrashLooping,
        Reason::DoesNotFit,
        Reason::SloUnattainable,
        Reason::OutOfDeviceMemory,
        Reason::OutOfMemoryAgain,
        Reason::ModelNotFound,
        Reason::ModelUnauthorized,
        Reason::UnsupportedModel,
        Reason::CorruptWeights,
        Reason::DeviceLost,
        Reason::ApiKeysUnusable,
        Reason::Internal,
    ];

    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// What happened.
    pub fn meaning(self) -> &'static str {
        self.row().1
    }

    /// What to do.
    pub fn remedy(self) -> &'static str {
        self.row().2
    }

    /// True where waiting cannot help: such a reason also stands in `Stalled`.
    pub fn needs_a_person(self) -> bool {
        match self {
            Reason::InvalidSpec
            | Reason::SourceNotAllowed
            | Reason::ChildRejected
            | Reason::RolloutStopped
            | Reason::RolledBack
            | Reason::PlanNotPinned
            | Reason::PinnedPlanGone
            | Reason::DoesNotFit
            | Reason::OutOfMemoryAgain
            | Reason::SloUnattainable
            | Reason::ModelNotFound
            | Reason::ModelUnauthorized
            | Reason::UnsupportedModel
            | Reason::CorruptWeights
            | Reason::ApiKeysUnusable => true,
            Reason::Serving
            | Reason::Pending
            | Reason::Accepted
            | Reason::Inspecting
            | Reason::Downloading
            | Reason::ModelFound
            | Reason::PlanChosen
            | Reason::CreatingPods
            | Reason::PodsScheduled
            | Reason::EngineLoading
            | Reason::EngineReady
            | Reason::RollingOut
            | Reason::ScaledToZero
            | Reason::ScalingOnMetrics
            | Reason::PrometheusNotSet
            | Reason::PrometheusUnreachable
            | Reason::MetricsMissing
            | Reason::MetricsPartial
            | Reason::Suspended
            | Reason::ClaimNotFound
            | Reason::NoNodes
            | Reason::Unschedulable
            | Reason::SecretNotFound
            | Reason::VolumeNotMounted
            | Reason::ImagePullFailed
            | Reason::EngineCrashLooping
            | Reason::OutOfDeviceMemory
            | Reason::DeviceLost
            | Reason::Internal => false,
        }
    }

    /// Name, meaning, remedy.
    fn row(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Reason::Serving => (
                "Serving",
                "Every replica of the current revision answers.",
                "Nothing to do. `status.url` is the address.",
            ),
            Reason::Pending => (
                "Pending",
                "No operator has looked at the object yet; the API server says so from the moment it is created.",
                "If it lasts, no operator runs or none watches this namespace: `kubectl get pods -A -l app.kubernetes.io/name=plimsoll-operator`.",
            ),
            Reason::Accepted => (
                "Accepted",
                "The object was seen, and nothing came of its spec yet; where the API server took no write, the message says so.",
                "Wait; the next pass says more. If it lasts, mend what the message names: a webhook, a quota.",
            ),
            Reason::Inspecting => (
                "Inspecting",
                "A Job reads the model's configuration and the sizes of its tensors.",
                "Wait. If it lasts, `kubectl describe job` of the Job that the message names says what holds it.",
            ),
            Reason::Downloading => (
                "Downloading",
                "A Job downloads the model into its volume.",
                "Wait. If it lasts, check that the cluster reaches the hub and that the claim is bound.",
            ),
            Reason::ModelFound => (
                "ModelFound",
                "The model's facts are known; `status.model` shows them.",
                "Nothing to do.",
            ),
            Reason::PlanChosen => (
                "PlanChosen",
                "A plan fits; `status.plan` shows it, why it was taken, and what was not.",
                "Nothing to do.",
            ),
            Reason::PlanNotPinned => (
                "PlanNotPinned",
                "`spec.plan.apply` is Manual, and nobody has pinned a plan for this spec yet. What ran before goes on.",
                "Look at `status.offered` (`status.plan` where nothing runs yet), and set `spec.plan.pinnedHash` to the hash that the message names.",
            ),
            Reason::PinnedPlanGone => (
                "PinnedPlanGone",
                "`spec.plan.pinnedHash` names none of the plans that are possible for this spec on these nodes. What ran before goes on.",
                "Set `spec.plan.pinnedHash` to the hash that the message names, or remove it where `spec.plan.apply` is Auto.",
            ),
            Reason::CreatingPods => (
                "CreatingPods",
                "Pods of the current revision are missing or have not been looked at by the scheduler.",
                "Wait. If it lasts, `kubectl describe deployment NAME` says what refuses them, for instance a quota.",
            ),
            Reason::PodsScheduled => {
                ("PodsScheduled", "Every pod of the current revision has a node.", "Nothing to do.")
            }
            Reason::EngineLoading => (
                "EngineLoading",
                "Engines are reading weights; the pod's log shows how far.",
                "Wait. Large models take minutes from slow volumes.",
            ),
            Reason::EngineReady => (
                "EngineReady",
                "The engines have loaded the model and answer `/ready`.",
                "Nothing to do.",
            ),
            Reason::RollingOut => (
                "RollingOut",
                "Pods of an older revision are being replaced; they serve until the new ones are ready, or, where `status.plan.why` says that there is no room for one more pod, until their place is needed.",
                "Wait. `status.rollout` says how pods are replaced and why.",
            ),
            Reason::RolloutStopped => (
                "RolloutStopped",
                "Pods of the new revision did not become ready for longer than a start takes; older pods go on serving.",
                "Correct what the message names, or set the spec back to the old value: that takes the old revision again, at once.",
            ),
            Reason::RolledBack => (
                "RolledBack",
                "The revision for this spec failed after it had taken the place of an older pod, so that the last revision that served was put back; `status.rollout` says how long nothing answered.",
                "Correct the spec, or set it back. To try the same once more: `kubectl annotate deployment NAME plimsoll.dev/rollout-`.",
            ),
            Reason::ScaledToZero => (
                "ScaledToZero",
                "`spec.replicas` is 0, so no pod runs.",
                "`kubectl scale llmd NAME --replicas=1`",
            ),
            Reason::ScalingOnMetrics => (
                "ScalingOnMetrics",
                "Every ready pod reports, and `status.scaling` follows.",
                "Nothing to do.",
            ),
            Reason::PrometheusNotSet => (
                "PrometheusNotSet",
                "`spec.scaling` is set and this operator was not told where Prometheus is; the number of replicas stays as it is.",
                "Set the chart value `prometheus.address` (flag `--prometheus-address`), or remove `spec.scaling` and scale by `kubectl scale` or another autoscaler.",
            ),
            Reason::PrometheusUnreachable => (
                "PrometheusUnreachable",
                "Prometheus does not answer, or not as Prometheus does; the message says what came instead. The number of replicas stays as it is.",
                "Check the chart values under `prometheus`: address, certificate authority, token; and that no NetworkPolicy stands between.",
            ),
            Reason::MetricsMissing => (
                "MetricsMissing",
                "Prometheus answers and has nothing recent of any ready pod; the number of replicas stays as it is.",
                "Let Prometheus scrape the pods (port 8000, path /metrics) at least once a minute, with the labels `namespace` and `pod`; docs/scaling.md shows how.",
            ),
            Reason::MetricsPartial => (
                "MetricsPartial",
                "Fewer pods report than are ready: replicas may be added and none is taken away.",
                "Find out in Prometheus (`up == 0`) why a pod is not scraped.",
            ),
            Reason::Suspended => (
                "Suspended",
                "`spec.suspend` is true, so no pod runs.",
                "Set `spec.suspend` to false.",
            ),
            Reason::InvalidSpec => (
                "InvalidSpec",
                "A field has a value that cannot work; the message names each one. What ran before runs on.",
                "Change the fields that the message names.",
            ),
            Reason::SourceNotAllowed => (
                "SourceNotAllowed",
                "The source is `file://`, and this operator does not mount folders of nodes into pods.",
                "Use `hf://` or `pvc://`, or ask whoever runs the operator for `--allow-host-path` (chart value `allowHostPath`).",
            ),
            Reason::ClaimNotFound => (
                "ClaimNotFound",
                "The PersistentVolumeClaim that `spec.model.source` names is not in this namespace.",
                "Create the claim, or correct the name; the operator notices by itself.",
            ),
            Reason::ChildRejected => (
                "ChildRejected",
                "The API server refused an object made from this one, most often because of `spec.podTemplate`.",
                "Correct what the message names.",
            ),
            Reason::NoNodes => (
                "NoNodes",
                "The cluster has no node that pods may run on.",
                "Add a node, or uncordon one.",
            ),
            Reason::Unschedulable => (
                "Unschedulable",
                "No node has room for a pod at the moment; the message holds the scheduler's words.",
                "Free capacity, add a node, or lower `spec.replicas` or `spec.resources`.",
            ),
            Reason::SecretNotFound => (
                "SecretNotFound",
                "A container names a Secret, or a key of one, that is not in this namespace.",
                "Create the Secret with the key that the message names; the pod starts by itself.",
            ),
            Reason::VolumeNotMounted => (
                "VolumeNotMounted",
                "A pod has a node, and its volumes have not come for more than a minute; the message names what they need.",
                "Create the Secret or the key that is missing (`spec.auth`, `spec.model.credentials`). A ReadWriteOnce claim that another node holds: use ReadWriteMany, or free it. `kubectl describe pod` says which; the pod starts by itself.",
            ),
            Reason::ImagePullFailed => (
                "ImagePullFailed",
                "A node cannot get the engine's image.",
                "Check the image name and pull secrets (chart values `engine.image`, `imagePullSecrets`).",
            ),
            Reason::EngineCrashLooping => (
                "EngineCrashLooping",
                "The engine ended several times without saying why.",
                "`kubectl logs --previous` of the pod; please report it.",
            ),
            Reason::DoesNotFit => (
                "DoesNotFit",
                "No plan fits into the memory, the GPUs and the quota there are; the message holds the sum.",
                "Raise `spec.resources.memory` or `spec.accelerators.maxGPUs`, use larger nodes or GPUs, or lower `spec.contextTokens`, `spec.cache.tokens`, `spec.workload` or `spec.quality`.",
            ),
            Reason::SloUnattainable => (
                "SloUnattainable",
                "Every plan that fits would break `spec.slo` by prediction; the message holds the figures.",
                "Raise `spec.slo`, lower `spec.workload.concurrency`, allow faster formats (`spec.quantization`, `spec.quality`), or add faster cards.",
            ),
            Reason::OutOfDeviceMemory => (
                "OutOfDeviceMemory",
                "The machine refused memory that the plan had counted on.",
                "Where a pod was killed for its limit, set or raise `spec.resources.memory`, which is that limit. Else find what uses the machine's memory beside the engine, or lower `spec.cache.tokens`.",
            ),
            Reason::OutOfMemoryAgain => (
                "OutOfMemoryAgain",
                "An engine ran out of memory, was planned anew once with what it had needed, and ran out again or could not be planned; the message holds both figures.",
                "Raise `spec.resources.memory`, use larger nodes or GPUs, or lower `spec.contextTokens`, `spec.cache.tokens` or `spec.workload`; find what else uses the machine's memory. Every change of the spec is planned anew.",
            ),
            Reason::ModelNotFound => (
                "ModelNotFound",
                "The source names nothing that can be read.",
                "Correct `spec.model.source`: organisation, name, revision, or the path in the claim.",
            ),
            Reason::ModelUnauthorized => (
                "ModelUnauthorized",
                "The source wants credentials that it was not given, or refuses those it got.",
                "Put a token with access into a Secret and name it in `spec.model.credentials.secretRef`; accept the model's terms on its hub.",
            ),
            Reason::UnsupportedModel => (
                "UnsupportedModel",
                "The checkpoint is of a kind that the engine does not run; the message names it.",
                "Choose a model of a supported family (Llama, Mistral, Qwen2, Qwen3), without quantization on disk.",
            ),
            Reason::CorruptWeights => (
                "CorruptWeights",
                "A file is truncated, malformed or contradicts the configuration; the message names file and tensor.",
                "Download or copy the model again.",
            ),
            Reason::DeviceLost => (
                "DeviceLost",
                "The device stopped answering; the pod restarts by itself.",
                "If it repeats, drain the node and check its hardware.",
            ),
            Reason::ApiKeysUnusable => (
                "ApiKeysUnusable",
                "The file of API keys is missing, empty or cannot be read; the message names it.",
                "Write one key per line into the Secret that `spec.auth.apiKeysSecretRef` names; outside a cluster, into the file of `--api-key-file`. The engine looks again when it restarts.",
            ),
            Reason::Internal => (
                "Internal",
                "A defect of ours; the pod restarts by itself.",
                "Please report it with the message and the pod's log.",
            ),
        }
    }
}

impl From<ExitReason> for Reason {
    fn from(reason: ExitReason) -> Reason {
        match reason {
            ExitReason::DoesNotFit => Reason::DoesNotFit,
            ExitReason::OutOfDeviceMemory => Reason::OutOfDeviceMemory,
            ExitReason::ModelNotFound => Reason::ModelNotFound,
            ExitReason::ModelUnauthorized => Reason::ModelUnauthorized,
            ExitReason::UnsupportedModel => Reason::UnsupportedModel,
            ExitReason::CorruptWeights => Reason::CorruptWeights,
            ExitReason::DeviceLost => Reason::DeviceLost,
            ExitReason::ApiKeysUnusable => Reason::ApiKeysUnusable,
            ExitReason::Internal => Reason::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_is_one_camel_case_word_with_a_remedy() {
        let names: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert_eq!(format!("{reason:?}"), reason.name());
            assert!(reason.meaning().ends_with('.'), "{reason:?}");
            assert!(!reason.remedy().is_empty(), "{reason:?}");
        }
    }

    #[test]
    fn the_page_leaves_no_reason_out() {
        let source = include_str!("reasons.rs");
        let rows = source.lines().filter(|line| {
            let line = line.trim();
            line.starts_with("Reason::") && (line.ends_with("=> (") || line.ends_with("=> {"))
        });
        assert_eq!(rows.count(), Reason::ALL.len(), "every row of `row` stands in `ALL`");
        assert!(Reason::ALL.iter().enumerate().all(|(index, reason)| *reason as usize == index));
        let kinds = ConditionType::ALL.iter().enumerate();
        assert!(kinds.into_iter().all(|(index, kind)| *kind as usize == index));
    }

    #[test]
    fn an_exit_reason_stalls_exactly_where_a_person_must_act() {
        for exit in ExitReason::ALL {
            let reason = Reason::from(exit);
            assert_eq!(reason.needs_a_person(), exit.needs_a_person(), "{exit:?}");
            assert_eq!(reason.name(), format!("{exit:?}"));
        }
    }
}
