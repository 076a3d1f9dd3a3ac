//! Memory arithmetic shared by the planner and the engine, so that the plan in status and the refusal at load are the
//! same sum. Pure; all sizes in bytes.

use serde::{Deserialize, Serialize};

use crate::abilities::{Ability, Backend, PAGE_TOKENS};
use crate::facts::ModelFacts;

/// What the bodies of all requests may hold before they are tokens, beside the first 8 KiB of each: the engine refuses
/// those beyond. Part of [`process_bytes`].
pub const BODIES_BYTES_MAX: u64 = 32 << 20;

/// Code, runtime, sockets, requests that are being read, and a tokenizer of up to [`TOKENIZER_BYTES_INCLUDED`].
const PROCESS_BYTES: u64 = 96 << 20;
const TOKENIZER_BYTES_INCLUDED: u64 = 1 << 20;
/// What a byte of tokenizer.json takes while it is read: 9 where merges are strings, 14 where they are pairs
/// (docs/perf.md, Start-up and memory).
const TOKENIZER_FACTOR: u64 = 14;
/// Bytes of tokenizer.json for each token, for facts that do not know its length.
const TOKEN_BYTES: u64 = 64;

/// Bytes a process needs beside weights, KV and workspace: on a CPU code, runtime, tokenizer and HTTP buffers; on a
/// device loaded kernels and recorded graphs. (The device's context is gone before its free memory is read.)
pub fn process_bytes(facts: &ModelFacts, backend: Backend) -> u64 {
    match backend {
        Backend::Cpu => {
            let tokenizer = match facts.tokenizer_bytes {
                0 => u64::from(facts.vocabulary) * TOKEN_BYTES,
                bytes => bytes,
            };
            PROCESS_BYTES + TOKENIZER_FACTOR * tokenizer.saturating_sub(TOKENIZER_BYTES_INCLUDED)
        }
        Backend::Cuda => 256 << 20,
    }
}

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

/// Weights as the backend keeps them: every parameter in the compute type; on a device padded to whole tiles. A tied
/// head shares the embedding.
pub fn weights_bytes(facts: &ModelFacts, ability: Ability) -> u64 {
    match ability.backend {
        Backend::Cpu => facts.parameters.total() * ability.weights.bytes(),
        Backend::Cuda => cuda_parameters(facts) * ability.weights.bytes(),
    }
}

/// Columns and rows of stored matrices come in panels of this many.
const PANEL: u64 = 64;

/// The width at which the CUDA kernels keep a head of at most 256, which is the widest there is.
pub fn cuda_head_width(head_dim: u32) -> u64 {
    match head_dim {
        0..=64 => 64,
        65..=128 => 128,
        _ => 256,
    }
}

fn cuda_parameters(facts: &ModelFacts) -> u64 {
    let hidden = u64::from(facts.hidden).next_multiple_of(PANEL);
    let intermediate = u64::from(facts.intermediate).next_multiple_of(PANEL);
    let head = cuda_head_width(facts.head_dim);
    let heads = u64::from(2 * facts.heads + 2 * facts.kv_heads);
    let layer = hidden * (heads * head + 3 * intermediate);
    let vocabulary = u64::from(facts.vocabulary).next_multiple_of(PANEL) * hidden;
    let ends = if facts.tied_head { vocabulary } else { 2 * vocabulary };
    u64::from(facts.layers) * layer + ends + facts.parameters.norm
}

/// K and V of one token over all layers.
pub fn kv_bytes_per_token(facts: &ModelFacts, ability: Ability) -> u64 {
    let head = match ability.backend {
        Backend::Cpu => u64::from(facts.head_dim),
        Backend::Cuda => cuda_head_width(facts.head_dim),
    };
    2 * u64::from(facts.layers) * u64::from(facts.kv_heads) * head * ability.kv.bytes()
}

/// What a backend computes one step in.
pub fn workspace_bytes(facts: &ModelFacts, ability: Ability, limits: StepLimits) -> u64 {
    match ability.backend {
        Backend::Cpu => cpu_workspace_bytes(facts, limits),
        Backend::Cuda => cuda_workspace_bytes(facts, limits),
    }
}

/// Activations of one step at its largest: the widest live set of a layer (hidden in and out, q/k/v, gate and up), in
/// f32, for `step_tokens_max` rows, plus f32 logits for `running_max` rows twice (raw and processed).
fn cpu_workspace_bytes(facts: &ModelFacts, limits: StepLimits) -> u64 {
    let row = 3 * u64::from(facts.hidden)
        + 2 * u64::from(facts.heads) * u64::from(facts.head_dim)
        + 2 * u64::from(facts.kv_heads) * u64::from(facts.head_dim)
        + 3 * u64::from(facts.intermediate);
    let logits = 2 * u64::from(limits.running_max) * u64::from(facts.vocabulary);
    4 * (u64::from(limits.step_tokens_max) * row + logits)
}

/// Rows of activations come in as many as the widest tile has.
const CUDA_ROWS: u64 = 256;

/// bf16 activations of every kind once (residual, normed, q/k/v, attended, gated) and sums of squares; f32 logits (raw and
/// processed), the hidden states they come from and counts of seen tokens for `running_max` rows; cosines and sines of every position.
fn cuda_workspace_bytes(facts: &ModelFacts, limits: StepLimits) -> u64 {
    let hidden = u64::from(facts.hidden).next_multiple_of(PANEL);
    let head = cuda_head_width(facts.head_dim);
    let (heads, kv_heads) = (u64::from(facts.heads), u64::from(facts.kv_heads));
    let intermediate = u64::from(facts.intermediate).next_multiple_of(PANEL);
    let vocabulary = u64::from(facts.vocabulary).next_multiple_of(PANEL);
    let running = u64::from(limits.running_max).next_multiple_of(CUDA_ROWS);
    let rows =
        u64::from(limits.step_tokens_max.max(limits.running_max)).next_multiple_of(CUDA_ROWS);
    let row =
        2 * (2 * hidden + (2 * heads + 2 * kv_heads) * head + intermediate) + hidden / PANEL * 4;
    let head_row = vocabulary * 8 + vocabulary / PANEL * 8 + hidden * 2 + hidden / PANEL * 4;
    let seen = u64::from(limits.running_max) * vocabulary * 2;
    let rope = u64::from(facts.context_tokens) * head / 2 * 8;
    rows * row + running * head_row + seen + rope
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
        workspace: workspace_bytes(facts, ability, limits),
        process: process_bytes(facts, ability.backend),
        kv: kv_bytes(facts, ability, kv_tokens),
        kv_tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_kept_as_wide_as_the_next_kernel_is() {
        let kept = [(2, 64), (64, 64), (66, 128), (96, 128), (128, 128), (130, 256), (192, 256)];
        for (head_dim, width) in kept.into_iter().chain([(256, 256)]) {
            assert_eq!(cuda_head_width(head_dim), width, "{head_dim}");
        }
    }
}
