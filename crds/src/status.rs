//! What Plimsoll says about an object. Computed from observations, written only through the status subresource.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema;
use crate::spec::RolloutStrategy;

/// What Plimsoll found, planned and runs. Losing it loses nothing: it mirrors the object's ControllerRevision and pods.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LLMDeploymentStatus {
    /// The generation of spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Ready sums up the others. Every reason and its remedy is listed in docs/status.md.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,

    /// Pods that there are, of any revision: while one takes the place of another, those of both.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub replicas: i32,

    /// Pods of the current revision that answer /ready.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub ready_replicas: i32,

    /// Label selector of the pods, as text; autoscalers read it through the scale subresource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub selector: Option<String>,

    /// Where clients in the cluster reach the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub url: Option<String>,

    /// Name of the ControllerRevision that children come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub revision: Option<String>,

    /// What the checkpoint is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelStatus>,

    /// What was chosen, why, and what was not. Where nothing runs yet because spec.plan.apply is Manual: what is proposed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanStatus>,

    /// Another plan than the one that runs, which runs once spec.plan.pinnedHash names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offered: Option<OfferStatus>,

    /// What the engines of this revision measured, to be held against status.plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<MeasuredStatus>,

    /// How many replicas the scaling loop wants, and why. Present where spec.scaling is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<ScalingStatus>,

    /// How pods of the revision that the spec asks for take the places of older ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutStatus>,
}

/// How pods of one revision take the places of older ones.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStatus {
    /// Name of the ControllerRevision that is rolled out.
    #[schemars(length(max = 253))]
    pub revision: String,

    /// Progressing; Complete once only its pods run and all answer; Stopped where its pods do not serve and older ones go
    /// on; RolledBack where it failed in place and the last good revision serves again.
    pub state: RolloutState,

    /// Surge or Recreate, as it was done.
    pub strategy: RolloutStrategy,

    /// One sentence: why so.
    #[schemars(length(max = 1024))]
    pub why: String,

    /// Seconds in which no pod answered while pods were replaced. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub outage_seconds: Option<i64>,
}

/// How far a rollout is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RolloutState {
    Progressing,
    Complete,
    Stopped,
    RolledBack,
}

/// What the checkpoint is.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelStatus {
    /// Model family: llama, mistral, qwen2 or qwen3.
    #[schemars(length(max = 64))]
    pub family: String,

    /// Number of parameters.
    #[schemars(range(min = 0))]
    pub parameters: i64,

    /// The commit that is served, where the source has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub revision: Option<String>,

    /// The longest sequence that the model was trained for, in tokens.
    #[schemars(range(min = 0))]
    pub context_tokens: i64,
}

/// What was chosen, why, and what was not.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanStatus {
    /// Identifies the plan's values; two plans with the same hash run alike.
    #[schemars(length(max = 64))]
    pub hash: String,

    /// Quantization of the weights.
    #[schemars(length(max = 32))]
    pub quantization: String,

    /// Type that weights are kept and computed in.
    #[schemars(length(max = 16))]
    pub dtype: String,

    /// The KV cache.
    pub cache: CacheStatus,

    /// Devices that share one copy of the weights.
    #[schemars(range(min = 1))]
    pub tensor_parallel: i32,

    /// Class of machine that the plan is for: cpu, or a GPU's name such as nvidia-h200.
    #[schemars(length(max = 64))]
    pub accelerator: String,

    /// Longest sequence that will be served, in tokens.
    #[schemars(range(min = 0))]
    pub context_tokens: i64,

    /// Requests that run at once in one pod; others wait.
    #[schemars(range(min = 1))]
    pub concurrency: i32,

    /// Rows of one step: tokens that are computed at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub step_tokens: Option<i32>,

    /// CPU that one pod requests, in thousandths.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub cpu_millis: Option<i32>,

    /// The sum that must fit, in bytes.
    pub memory_bytes: MemoryStatus,

    /// What the plan is expected to do at the stated workload. Absent where no figures are known, as for CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted: Option<PredictedStatus>,

    /// One sentence: why this plan.
    #[schemars(length(max = 1024))]
    pub why: String,

    /// The best plans that were not taken, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub rejected: Vec<RejectedStatus>,

    /// What it changed against the plan that ran before it. Absent for the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<PlanChange>,
}

/// What led to a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PlanCause {
    /// The spec is new.
    #[default]
    SpecChanged,
    /// No node of the class that was planned for is left.
    ClassGone,
    /// An engine ran out of memory under the plan before.
    OutOfMemory,
    /// Nodes came or changed.
    BetterPlan,
}

/// One plan against another.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanChange {
    /// Hash of the plan before.
    #[schemars(length(max = 64))]
    pub from: String,

    /// What led to it.
    pub cause: PlanCause,

    /// Every value that differs: `cache.tokens: 65,536 → 32,768`.
    #[schemars(length(max = 24), inner(length(max = 256)))]
    pub values: Vec<String>,
}

/// A plan that does not run, and what would change with it.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OfferStatus {
    /// To be written into spec.plan.pinnedHash.
    #[schemars(length(max = 64))]
    pub hash: String,

    /// Name of the ControllerRevision that holds it whole.
    #[schemars(length(max = 253))]
    pub revision: String,

    /// What led to it.
    pub cause: PlanCause,

    /// Every value that differs from the plan that runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 24), inner(length(max = 256)))]
    pub values: Vec<String>,

    /// One sentence: why this plan.
    #[schemars(length(max = 1024))]
    pub why: String,
}

/// What engines measured. Written when a value moved by more than a tenth, and every few minutes at most.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MeasuredStatus {
    /// The most memory that one engine held so far, in bytes: the card's where the accelerator is a GPU. To be held against
    /// plan.memoryBytes.total.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub peak_memory_bytes: Option<i64>,

    /// Mean time from a request's arrival to its first token, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttft_microseconds: Option<i64>,

    /// Mean time between two tokens of a request, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub tpot_microseconds: Option<i64>,
}

/// The KV cache of one pod.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CacheStatus {
    /// How the cache grows and shrinks.
    #[schemars(length(max = 32))]
    pub strategy: String,

    /// Type of keys and values.
    #[schemars(length(max = 16))]
    pub dtype: String,

    /// Tokens that fit.
    #[schemars(range(min = 0))]
    pub tokens: i64,
}

/// Memory of one pod, in bytes: the card's where the accelerator is a GPU.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryStatus {
    /// Weights, in the type they are kept in.
    #[schemars(range(min = 0))]
    pub weights: i64,

    /// KV cache.
    #[schemars(range(min = 0))]
    pub kv: i64,

    /// Activations of the largest step.
    #[schemars(range(min = 0))]
    pub workspace: i64,

    /// The process itself: code, tokenizer, HTTP buffers; on a GPU kernels and graphs.
    #[schemars(range(min = 0))]
    pub process: i64,

    /// All of them.
    #[schemars(range(min = 0))]
    pub total: i64,

    /// What one pod may use. On a GPU: the card less what driver and context hold. On a CPU: what other pods leave of the
    /// largest node, or spec.resources.memory.
    #[schemars(range(min = 0))]
    pub capacity: i64,
}

/// What one pod is expected to do at the stated workload; docs/planner.md has the formulae.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PredictedStatus {
    /// From the request to the first token of its answer.
    #[schemars(range(min = 0))]
    pub ttft_microseconds: i64,

    /// Between two tokens of an answer.
    #[schemars(range(min = 0))]
    pub tpot_microseconds: i64,

    /// Output tokens of all requests together.
    #[schemars(range(min = 0))]
    pub tokens_per_second: i64,

    /// Millionths of a US dollar for a million output tokens. Absent where the class has no price.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub microdollars_per_million_tokens: Option<i64>,

    /// What the speeds rest on: Measured on this card, or Estimated from its data sheet and another card's measurements.
    #[schemars(length(max = 16))]
    pub basis: String,
}

/// A plan that was not taken.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RejectedStatus {
    /// Its values, in short.
    #[schemars(length(max = 128))]
    pub candidate: String,

    /// Why not, with the arithmetic.
    #[schemars(length(max = 1024))]
    pub why: String,
}

/// How many replicas the scaling loop wants, and why. The loop goes on from here after a restart.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScalingStatus {
    /// Replicas that are wanted.
    #[schemars(range(min = 0))]
    pub desired: i32,

    /// Why, with the figures of the moment when it was decided.
    #[schemars(length(max = 1024))]
    pub why: String,

    /// What kept the loop from wanting more when last it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub limit: Option<String>,

    /// What one replica was seen to carry; without it replicas go one at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<ReplicaCapacity>,

    /// The last decisions, newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 5))]
    pub recent: Vec<ScalingDecision>,
}

/// What one replica was seen to carry.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaCapacity {
    /// Requests per hour.
    #[schemars(range(min = 0))]
    pub requests_per_hour: i64,

    /// When that was seen. It is forgotten after an hour.
    #[schemars(schema_with = "schema::moment")]
    pub at: Time,

    /// The revision of which it was seen; it says nothing of another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub revision: Option<String>,
}

/// One decision of the scaling loop.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScalingDecision {
    /// When.
    #[schemars(schema_with = "schema::moment")]
    pub at: Time,

    /// Replicas before.
    #[schemars(range(min = 0))]
    pub from: i32,

    /// Replicas after.
    #[schemars(range(min = 0))]
    pub to: i32,

    /// Why, with its figures.
    #[schemars(length(max = 1024))]
    pub why: String,
}
