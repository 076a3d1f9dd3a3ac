//! Memory arithmetic shared by the planner and the engine, so that the plan in status and the refusal at load are the
//! same sum. Pure; all sizes in bytes.

mod cuda;

use serde::{Deserialize, Serialize};

pub use self::cuda::{RUN_HEADS as CUDA_RUN_HEADS, head_width as cuda_head_width};
use crate::abilities::{Ability, Backend, PAGE_TOKENS};
use crate::facts::{ModelFacts, ParametersByRole};

/// What the bodies of all requests may hold before they are tokens, beside the first 8 KiB of each: the engine refuses
/// those beyond. Part of [`process_bytes`].
pub const BODIES_BYTES_MAX: u64 = 32 << 20;

/// What all answers that leave as a whole may hold until they are read, beside the first 4 KiB of each. Part of
/// [`process_bytes`].
pub const ANSWERS_BYTES_MAX: u64 = 16 << 20;

/// What the tokens of all streams may hold that wait for their readers, beside the first of each. Part of [`process_bytes`].
pub const EVENTS_BYTES_MAX: u64 = 16 << 20;

/// What a process on a CPU takes beside a tokenizer of more than [`TOKENIZER_BYTES_INCLUDED`]: code and runtime, 16 MiB;
/// sockets with heads that arrive, 24 KiB for each of 4,160, or 98 MiB; bodies, 32 MiB; what 8 MiB of them become while they
/// are parsed and tokenized, 32 MiB; answers, 16 MiB; one of the largest with log-probabilities, 40 MiB; events, 16 MiB.
/// (docs/perf.md, Start-up and memory, holds what was measured.)
const PROCESS_BYTES: u64 = 256 << 20;
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

/// Weights as the backend keeps them: the layers' matrices as they are quantized, every other parameter in the compute type;
/// on a device in bf16, padded to whole tiles. A tied head shares the embedding.
pub fn weights_bytes(facts: &ModelFacts, ability: Ability) -> u64 {
    let ParametersByRole { embedding, attention, mlp, norm, head } = facts.parameters;
    match ability.backend {
        Backend::Cpu => {
            let others = (embedding + norm + head) * ability.weights.bytes();
            matrices_bytes(attention + mlp, ability) + others
        }
        Backend::Cuda => cuda::weights_bytes(facts, ability),
    }
}

/// Of parameters in matrices of layers.
fn matrices_bytes(parameters: u64, ability: Ability) -> u64 {
    match ability.quantization.weight_millibits() {
        None => parameters * ability.weights.bytes(),
        Some(millibits) => (parameters * millibits).div_ceil(8000),
    }
}

/// Facts of what one of `ranks` devices holds when they share one copy of the weights: heads, the layers' width and the
/// vocabulary are divided, which only a divisor of all of them can; hidden states are whole everywhere.
pub fn shard(facts: &ModelFacts, ranks: u32) -> ModelFacts {
    let of_rank = |whole: u32| whole.div_ceil(ranks);
    let ParametersByRole { embedding, attention, mlp, norm, head } = facts.parameters;
    let share = |whole: u64| whole.div_ceil(u64::from(ranks));
    ModelFacts {
        intermediate: of_rank(facts.intermediate),
        heads: of_rank(facts.heads),
        kv_heads: of_rank(facts.kv_heads),
        vocabulary: of_rank(facts.vocabulary),
        parameters: ParametersByRole {
            embedding: share(embedding),
            attention: share(attention),
            mlp: share(mlp),
            norm,
            head: share(head),
        },
        ..facts.clone()
    }
}

/// K and V of one token over all layers.
pub fn kv_bytes_per_token(facts: &ModelFacts, ability: Ability) -> u64 {
    let head = match ability.backend {
        Backend::Cpu => u64::from(facts.head_dim),
        Backend::Cuda => cuda_head_width(facts.head_dim),
    };
    2 * u64::from(facts.layers) * u64::from(facts.kv_heads) * ability.kv.head_bytes(head)
}

/// What a backend computes one step in.
pub fn workspace_bytes(facts: &ModelFacts, ability: Ability, limits: StepLimits) -> u64 {
    match ability.backend {
        Backend::Cpu => cpu_workspace_bytes(facts, limits),
        Backend::Cuda => cuda::workspace_bytes(facts, limits),
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
