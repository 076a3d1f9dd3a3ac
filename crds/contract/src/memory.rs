//! Memory arithmetic shared by the planner and the engine, so that the plan in status and the refusal at load are the
//! same sum. Pure; all sizes in bytes.

use serde::{Deserialize, Serialize};

use crate::abilities::{Ability, PAGE_TOKENS};
use crate::facts::ModelFacts;

/// Bytes a process needs beside weights, KV and workspace: code, runtime, tokenizer, HTTP buffers.
pub const PROCESS_BYTES: u64 = 96 << 20;

/// What a step may hold at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StepLimits {
    /// Rows of one step: decode rows plus prefill rows.
    pub step_tokens_max: u32,
    /// Sequences that run at once.
    pub running_max: u32,
}

/// One plan's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryPlan {
    pub weights: u64,
    pub workspace: u64,
    pub process: u64,
    pub kv: u64,
    pub kv_tokens: u64,
}

impl MemoryPlan {
    pub fn total(&self) -> u64 {
        self.weights + self.workspace + self.process + self.kv
    }
}

/// Weights as the backend keeps them: every parameter in the compute type. A tied head shares the embedding.
pub fn weights_bytes(facts: &ModelFacts, ability: Ability) -> u64 {
    facts.parameters.total() * ability.weights.bytes()
}

/// K and V of one token over all layers.
pub fn kv_bytes_per_token(facts: &ModelFacts, ability: Ability) -> u64 {
    2 * u64::from(facts.layers)
        * u64::from(facts.kv_heads)
        * u64::from(facts.head_dim)
        * ability.kv.bytes()
}

/// Activations of one step at its largest: the widest live set of a layer (hidden in and out, q/k/v, gate and up), in
/// f32, for `step_tokens_max` rows, plus f32 logits for `running_max` rows twice (raw and processed).
pub fn workspace_bytes(facts: &ModelFacts, limits: StepLimits) -> u64 {
    let row = 3 * u64::from(facts.hidden)
        + 2 * u64::from(facts.heads) * u64::from(facts.head_dim)
        + 2 * u64::from(facts.kv_heads) * u64::from(facts.head_dim)
        + 3 * u64::from(facts.intermediate);
    let logits = 2 * u64::from(limits.running_max) * u64::from(facts.vocabulary);
    4 * (u64::from(limits.step_tokens_max) * row + logits)
}

/// KV bytes for at least `tokens` tokens, in whole pages.
pub fn kv_bytes(facts: &ModelFacts, ability: Ability, tokens: u64) -> u64 {
    tokens.div_ceil(u64::from(PAGE_TOKENS))
        * u64::from(PAGE_TOKENS)
        * kv_bytes_per_token(facts, ability)
}

/// The whole sum for a KV budget of `kv_tokens`.
pub fn plan(
    facts: &ModelFacts,
    ability: Ability,
    limits: StepLimits,
    kv_tokens: u64,
) -> MemoryPlan {
    let kv_tokens = kv_tokens.div_ceil(u64::from(PAGE_TOKENS)) * u64::from(PAGE_TOKENS);
    MemoryPlan {
        weights: weights_bytes(facts, ability),
        workspace: workspace_bytes(facts, limits),
        process: PROCESS_BYTES,
        kv: kv_bytes(facts, ability, kv_tokens),
        kv_tokens,
    }
}
