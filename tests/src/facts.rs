//! What `inspect` says of a model, for tests that run no engine.

use serde_json::{Value, json};

/// Facts of a small model, as `inspect` prints them.
pub fn small_model() -> Value {
    json!({
        "family": "llama", "architecture": "LlamaForCausalLM",
        "parameters": {"embedding": 1_048_576, "attention": 900_000, "mlp": 3_500_000, "norm": 3_328, "head": 0},
        "diskBytes": {"BF16": 10_903_808}, "layers": 6, "hidden": 256, "intermediate": 768, "heads": 4,
        "kvHeads": 2, "headDim": 64, "vocabulary": 4096, "contextTokens": 2048, "tiedHead": true,
        "chatTemplate": true,
    })
}
