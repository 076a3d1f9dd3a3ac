//! What a person may write. Doc comments are what `kubectl explain` prints; rules name the field and the remedy. Every
//! field here is read by the operator or by `plimsoll up`; none is ever written by us.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::schema::{self, Amount};
use crate::status::LLMDeploymentStatus;

/// A language model to serve. Only `model.source` is required; what is absent is planned, and the plan with its
/// arithmetic stands in `status.plan`. Plimsoll never writes to this part of the object.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "plimsoll.dev",
    version = "v1alpha1",
    kind = "LLMDeployment",
    plural = "llmdeployments",
    singular = "llmdeployment",
    shortname = "llmd",
    category = "all",
    category = "plimsoll",
    namespaced,
    status = "LLMDeploymentStatus",
    derive = "PartialEq",
    doc = "A language model, served: Plimsoll reads the model, plans quantization, KV cache and parallelism for the machines at hand, runs it, and says why.",
    validation = Rule::new("self.metadata.name.size() <= 53 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("metadata.name becomes the name of a Service: use at most 53 lower-case letters, digits and '-', starting with a letter"),
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "READY", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status", description = "Whether pods of the current revision answer"),
    printcolumn(name = "REASON", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason", description = "Why it is, or is not, ready; docs/status.md holds the remedies"),
    printcolumn(name = "MODEL", type_ = "string", json_path = ".spec.model.source", description = "Where the model comes from"),
    printcolumn(name = "QUANT", type_ = "string", json_path = ".status.plan.quantization", description = "Quantization of the weights, as planned"),
    printcolumn(name = "KV", type_ = "string", json_path = ".status.plan.cache.dtype", description = "Type of the KV cache, as planned"),
    printcolumn(name = "TP", type_ = "integer", json_path = ".status.plan.tensorParallel", description = "Tensor-parallel degree, as planned"),
    printcolumn(name = "REPLICAS", type_ = "integer", json_path = ".status.replicas", description = "Pods that there are, of any revision"),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url", priority = 1, description = "Where clients in the cluster reach it"),
    printcolumn(name = "REVISION", type_ = "string", json_path = ".status.revision", priority = 1, description = "The ControllerRevision that children come from"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.storage) || self.model.source.startsWith('hf://')")
        .message("holds downloads of hf:// sources only: remove it, a pvc:// or file:// source brings its own storage")
        .field_path(".storage"),
    validation = Rule::new("!has(self.model.credentials) || self.model.source.startsWith('hf://')")
        .message("are sent to a model hub only: remove them, or use an hf:// source")
        .field_path(".model.credentials"),
    validation = Rule::new("!has(self.contextTokens) || !has(self.workload) || !has(self.workload.promptTokens) || !has(self.workload.outputTokens) || self.workload.promptTokens + self.workload.outputTokens <= self.contextTokens")
        .message("promptTokens + outputTokens exceed spec.contextTokens, so such a request could never run: raise contextTokens or lower the workload")
        .field_path(".workload"),
    validation = Rule::new("!has(self.contextTokens) || !has(self.cache) || !has(self.cache.tokens) || self.contextTokens <= self.cache.tokens")
        .message("is below spec.contextTokens, so a request of full length could never run: raise cache.tokens or lower contextTokens")
        .field_path(".cache.tokens")
)]
pub struct LLMDeploymentSpec {
    /// Which model to serve, and under which name.
    pub model: Model,

    /// API keys that clients must present. Absent: the endpoint is open to whoever reaches the Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<Auth>,

    /// The load the plan is made for. It sizes the KV cache; requests beyond it wait in the queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,

    /// What the best plan is best at, among those that keep spec.slo: Latency (the least time per token), Throughput (the
    /// most tokens per second of each GPU), Cost (the least money per token). Absent: the smallest card that carries the
    /// workload, in its most exact type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective: Option<Objective>,

    /// What the plan has to keep at the stated workload, by prediction: one that would break it is not taken. Where
    /// spec.scaling is, replicas are added while the 90th percentile is above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slo: Option<Slo>,

    /// How weights are quantized. Auto takes what serves the objective within spec.quality, and what a checkpoint is
    /// quantized in already. Absent: Auto.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<QuantizationChoice>,

    /// The least bits that the planner may choose by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<Quality>,

    /// GPUs that share one copy of the weights. Absent: chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub tensor_parallel: Option<i32>,

    /// Which accelerators may be used, and how many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerators: Option<Accelerators>,

    /// Longest sequence, prompt and answer together, in tokens. Absent: what the model was trained for, as far as
    /// memory allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 64, max = 16_777_216))]
    pub context_tokens: Option<i64>,

    /// The KV cache. Absent: chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,

    /// Pods that serve the model. `kubectl scale` and autoscalers write this field through the scale subresource. Not read
    /// where `scaling` is set.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,

    /// Let Plimsoll choose the number of replicas, from what Prometheus knows of the engines. It overrides `replicas`, and
    /// is written nowhere but in `status.scaling`; docs/scaling.md says how it decides. Absent: as many as `replicas` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<Scaling>,

    /// The volume that an hf:// model is downloaded into.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,

    /// What one pod may use. Absent: as much as the plan needs, on the largest node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,

    /// Who decides that a plan runs. Absent: Plimsoll, once for every spec; a better plan that comes up later is offered in
    /// `status.offered` and never runs by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanPolicy>,

    /// How pods are replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,

    /// Who may reach the engine, as far as its NetworkPolicy can say. Changing it rolls no pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,

    /// Stop serving and keep the object: no pods run while this is true.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspend: bool,

    /// Merged over the pod template that Plimsoll renders: labels, annotations, tolerations, node selectors, extra
    /// volumes. What reaches out of the pod is refused by name: host paths, namespaces and ports, root, added capabilities,
    /// other service accounts. Checked by a dry run against the API server before it is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::any_object")]
    pub pod_template: Option<Value>,
}

fn one() -> i32 {
    1
}

/// Which model to serve.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Model {
    /// Where the model lies: `hf://ORG/NAME`, with `@REVISION` for a branch, tag or commit; `pvc://CLAIM/PATH` for a
    /// folder in a PersistentVolumeClaim of this namespace; `file:///PATH` for a folder of the machine, in
    /// `plimsoll up`, or in a cluster whose operator allows it.
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(
        validation = Rule::new("self.startsWith('hf://') || self.startsWith('pvc://') || self.startsWith('file://')")
            .message("must start with hf:// (model hub), pvc:// (a PersistentVolumeClaim) or file:// (a folder): for instance hf://Qwen/Qwen3-0.6B"),
        validation = Rule::new("!self.startsWith('hf://') || self.matches('^hf://[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}(@[A-Za-z0-9][A-Za-z0-9._/-]{0,127})?$')")
            .message("an hf:// source is hf://ORG/NAME or hf://ORG/NAME@REVISION, for instance hf://Qwen/Qwen3-0.6B@main"),
        validation = Rule::new("!self.startsWith('pvc://') || self.matches('^pvc://[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(/[A-Za-z0-9._/-]*)?$')")
            .message("a pvc:// source is pvc://CLAIM or pvc://CLAIM/PATH, for instance pvc://models/llama-3.2-1b"),
        validation = Rule::new("!self.startsWith('file://') || self.matches('^file:///[^[:cntrl:]]+$')")
            .message("a file:// source has an absolute path here, for instance file:///models/llama; a path relative to the manifest works in `plimsoll up` only"),
        validation = Rule::new("!self.contains('..')")
            .message("must not contain '..': name the folder directly")
    )]
    pub source: String,

    /// The name that clients put into `model`. Absent: the object's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z0-9][A-Za-z0-9._:/-]*$')")
        .message("may hold letters, digits and . _ : / - and starts with a letter or digit"))]
    pub name: Option<String>,

    /// Credentials for the source, where it needs any. The operator never reads them: the download mounts them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<Credentials>,
}

/// Credentials for a model source.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Credentials {
    /// A Secret of this namespace that holds an access token of the hub. Key when absent: `token`.
    pub secret_ref: SecretKey,
}

/// Who may ask.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Auth {
    /// A Secret of this namespace with one API key per line. Key when absent: `keys`. Clients send
    /// `Authorization: Bearer KEY`.
    pub api_keys_secret_ref: SecretKey,
}

/// One entry of a Secret in the same namespace.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')")
        .message("the name of a Secret holds lower-case letters, digits, '-' and '.'"))]
    pub name: String,

    /// Entry within the Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[-._a-zA-Z0-9]+$')")
        .message("the key of a Secret holds letters, digits, '-', '_' and '.'"))]
    pub key: Option<String>,
}

/// The load that the plan is made for. All of it is optional.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// Tokens of a typical prompt. Absent: what 2,048 tokens, or the context if it is shorter, leave beside the
    /// answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub prompt_tokens: Option<i64>,

    /// Tokens of a typical answer. Absent: what 2,048 tokens, or the context if it is shorter, leave beside the
    /// prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub output_tokens: Option<i64>,

    /// Requests that run at once in one pod. Absent: 32. Where nothing is said, a GPU takes up to 256, as far as its cache
    /// carries them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub concurrency: Option<i32>,
}

/// Between how many replicas, and after which aims, the number is chosen.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.min) || self.min <= self.max")
    .message("is above spec.scaling.max: lower min or raise max")
    .field_path(".min"))]
pub struct Scaling {
    /// Fewest replicas. Absent: 1. None at all is not possible yet: it takes a gateway that holds requests while a replica
    /// starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000))]
    #[x_kube(validation = Rule::new("self >= 1")
        .message("must be 1 or more: scaling to zero needs the gateway that holds requests while a replica starts, which is not there yet; spec.suspend stops all pods"))]
    pub min: Option<i32>,

    /// Most replicas. `accelerators.maxGPUs` and the quotas of the namespace may allow fewer.
    #[schemars(range(min = 1, max = 1000))]
    pub max: i32,

    /// Requests that may wait per replica; more are a reason to add replicas. Absent: 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub queue_per_replica: Option<i32>,

    /// Seconds for which fewer replicas must have sufficed before any is taken away. Absent: 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 3600))]
    pub stabilization_window_seconds: Option<i32>,
}

/// The KV cache. Absent fields are chosen by the planner.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cache {
    /// Auto takes pages as sequences grow (Dynamic). Static holds each sequence's longest length from the start,
    /// SlidingWindow frees what left a layer's window, Offloaded keeps in the host's memory what a card does not hold. Only
    /// Dynamic runs today.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<StrategyChoice>,

    /// Type of keys and values. Auto takes the most exact one whose plan carries the workload, and BF16 on a GPU. F32 and
    /// F16 run on CPUs, BF16 on GPUs; the others do not run yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<CacheDtype>,

    /// Tokens that the cache of one pod holds. Absent: what the workload needs, as far as memory allows; on a GPU all that
    /// fits and could be of use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 64, max = 1_000_000_000))]
    pub tokens: Option<i64>,

    /// Keep the cache of finished requests, so that a conversation's next round does not compute its past again.
    /// Absent: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix_reuse: Option<bool>,
}

/// Type of keys and values in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CacheDtype {
    Auto,
    F32,
    F16,
    BF16,
    INT8,
    FP8,
    INT4,
}

/// How the cache grows and shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StrategyChoice {
    Auto,
    Dynamic,
    Static,
    SlidingWindow,
    Offloaded,
}

/// What the best plan is best at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Objective {
    Latency,
    Throughput,
    Cost,
}

/// Bounds of what a client waits for, at the stated workload.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Slo {
    /// From the request to the first token of its answer, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3_600_000))]
    pub ttft_milliseconds: Option<i64>,

    /// Between two tokens of an answer, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3_600_000))]
    pub tpot_milliseconds: Option<i64>,
}

/// How weights are quantized: bits of weights and of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum QuantizationChoice {
    Auto,
    None,
    W4A16,
    NF4,
    #[serde(rename = "W8A16-INT8")]
    W8A16Int8,
    #[serde(rename = "W8A16-FP8")]
    W8A16Fp8,
    #[serde(rename = "W8A8-INT8")]
    W8A8Int8,
    #[serde(rename = "W8A8-FP8")]
    W8A8Fp8,
    W4A8,
}

/// The least bits that the planner may choose by itself. What spec.quantization or spec.cache.dtype names is taken at its
/// word, and so is what a checkpoint is quantized in already.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Quality {
    /// Of a weight. Absent: 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 4, max = 32))]
    pub min_weight_bits: Option<i32>,

    /// Of a key or value in the cache. Absent: 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 4, max = 32))]
    pub min_kv_bits: Option<i32>,
}

/// Which accelerators may be used, and how many.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Accelerators {
    /// Classes that may be used, for instance nvidia-h200, nvidia-l4 or cpu. Absent or empty: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 64)))]
    pub classes: Vec<String>,

    /// GPUs that all replicas together may hold. Absent: any number.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "maxGPUs")]
    #[schemars(range(min = 0, max = 16_000))]
    pub max_gpus: Option<i32>,
}

/// The volume that an hf:// model is downloaded into: one claim per namespace, source and revision.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Storage {
    /// ReadWriteOnce (pods on one node share it) or ReadWriteMany (any node). Absent: ReadWriteOnce.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_mode: Option<AccessMode>,

    /// Size of the claim, for instance 50Gi. Absent: 20Gi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new(schema::AMOUNT_RULE)
        .message("must be a positive quantity, for instance 50Gi"))]
    pub size: Option<Amount>,

    /// StorageClass of the claim. Absent: the cluster's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,
}

/// Who may mount the claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AccessMode {
    ReadWriteOnce,
    ReadWriteMany,
}

/// What one pod may use.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// CPU that one pod requests, for instance 2 or 500m: what it can count on, and no limit. The engine computes on all CPUs
    /// that the node leaves idle, with one thread for each; a limit in `spec.podTemplate` bounds both. Absent: a quarter of
    /// the largest node, or 2 beside a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new(schema::AMOUNT_RULE)
        .message("must be a positive quantity, for instance 2 or 500m"))]
    pub cpu: Option<Amount>,

    /// Memory of one pod, for instance 4Gi: its limit, as far as the largest node has it left. The plan must fit into it,
    /// and is what the pod requests. Beside a GPU it bounds the host's memory, not the card's. Absent: the plan is bounded
    /// by the largest node alone, and the limit is the plan and a sixteenth, at least 64 MiB more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new(schema::AMOUNT_RULE)
        .message("must be a positive quantity, for instance 4Gi"))]
    pub memory: Option<Amount>,
}

/// Who decides that a plan runs. A change of this makes another revision only where it names another plan.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanPolicy {
    /// Auto: the best plan for a spec runs. Manual: it is shown in status, and runs once pinnedHash names it. Absent: Auto.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apply: Option<PlanApply>,

    /// The one plan that may run, by the hash that `status.offered.hash` or `status.plan.hash` shows. It speaks of the plan's
    /// values, never of the operator's version. Absent: any, or with Manual none but the one that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9a-f]+$')")
        .message("is the hash of a plan, as status.offered.hash or status.plan.hash shows it: digits and the letters a to f"))]
    pub pinned_hash: Option<String>,
}

/// Whether plans run by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PlanApply {
    Auto,
    Manual,
}

/// How pods are replaced.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// Seconds that running requests get to finish when a pod ends. Absent: 60.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub drain_seconds: Option<i32>,

    /// Surge: a new pod is ready before an old one leaves, and an update waits until there is room for one pod more.
    /// Recreate: an old pod leaves before a new one starts, one at a time. Auto: Surge where there is room, else Recreate;
    /// status.rollout says which and why. Absent: Auto.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<RolloutStrategy>,

    /// Pinned: another version of the operator changes no running pod; the next change of the spec takes what is new.
    /// Follow: pods are replaced when the operator brings another engine or another way to run it. Absent: Pinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator_upgrade: Option<OperatorUpgrade>,
}

/// How pods of a new revision take the places of older ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RolloutStrategy {
    #[default]
    Auto,
    Surge,
    Recreate,
}

/// What another version of the operator does to pods that run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OperatorUpgrade {
    #[default]
    Pinned,
    Follow,
}

/// Who may reach the engine.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// Namespace (pods of this namespace, and of those labelled `plimsoll.dev/clients: "true"`), Cluster (every pod of the
    /// cluster) or Anyone (from outside too). Absent: what the operator says, Cluster unless its chart says otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clients: Option<Clients>,
}

/// Whom a NetworkPolicy lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Clients {
    Namespace,
    Cluster,
    Anyone,
}
