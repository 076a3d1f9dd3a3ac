//! Model facts: what `plimsoll-engine inspect` finds out about a checkpoint. As JSON they stay below 3 KiB, because
//! they travel in a pod's termination message, which holds 4,096 bytes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Upper bound of the JSON form of [`ModelFacts`], in bytes.
pub const FACTS_JSON_BYTES_MAX: usize = 3 * 1024;

/// A decoder family as the engine knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Family {
    /// The name users read in status and tables.
    pub fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }
}

/// Parameters by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ParametersByRole {
    pub embedding: u64,
    pub attention: u64,
    pub mlp: u64,
    pub norm: u64,
    /// Zero where the head is tied to the embedding.
    pub head: u64,
}

impl ParametersByRole {
    pub fn total(&self) -> u64 {
        let ParametersByRole { embedding, attention, mlp, norm, head } = *self;
        embedding + attention + mlp + norm + head
    }
}

/// Everything the planner needs to know of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelFacts {
    pub family: Family,
    /// The first entry of `architectures` in config.json.
    pub architecture: String,
    /// The commit, where the source has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    pub parameters: ParametersByRole,
    /// Bytes on disk by stored type (`BF16`, `F16`, `F32`, …).
    pub disk_bytes: BTreeMap<String, u64>,
    /// Quantization method named on disk; absent for plain weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<String>,
    pub layers: u32,
    pub hidden: u32,
    pub intermediate: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub vocabulary: u32,
    /// What the model was trained for (after RoPE scaling), in tokens.
    pub context_tokens: u32,
    pub tied_head: bool,
    /// Window in tokens and the number of layers that have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<SlidingWindow>,
    pub chat_template: bool,
    /// Length of tokenizer.json; zero where it is not known.
    #[serde(default)]
    pub tokenizer_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlidingWindow {
    pub tokens: u32,
    pub layers: u32,
}

/// What `plimsoll-engine inspect --device` knows of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceFacts {
    /// The GPU that `serve` would use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
    /// One sentence, where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why_none: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gpu {
    /// As its driver gives it.
    pub name: String,
    pub memory_bytes: u64,
    /// At the time of asking, with the asking process's own context counted as used.
    pub memory_free_bytes: u64,
    /// As `9.0`.
    pub compute_capability: String,
    pub multiprocessors: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
}
