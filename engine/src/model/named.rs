//! Published shapes by name, for models that are made of random numbers: what a config.json of theirs says, and nothing
//! of their weights. Pure.

use serde_json::{Value, json};

use super::config::Config;

/// Names that `--random-weights` takes.
pub const NAMES: [&str; 4] = ["llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "plimsoll-test"];

/// The configuration of a published shape.
pub fn named(name: &str) -> Option<Config> {
    let json = match name {
        "llama-3.2-1b" => llama3(2048, 8192, 16, 32, 8, 64, true),
        "llama-3.2-3b" => llama3(3072, 8192, 28, 24, 8, 128, true),
        "llama-3.1-8b" => llama3(4096, 14336, 32, 32, 8, 128, false),
        // Small enough for any card and for a CPU.
        "plimsoll-test" => llama3(256, 768, 2, 4, 2, 64, true),
        _ => return None,
    };
    Some(Config::parse(&json).expect("the shapes above are valid"))
}

fn llama3(
    hidden: u32,
    intermediate: u32,
    layers: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    tied: bool,
) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": 128_256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0, "tie_word_embeddings": tied, "bos_token_id": 128_000,
        "eos_token_id": 128_001, "attention_bias": false, "mlp_bias": false, "torch_dtype": "bfloat16",
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Plan, facts_of};

    #[test]
    fn every_name_is_a_model_with_the_published_number_of_parameters() {
        let parameters = |name| {
            let config = named(name).unwrap();
            facts_of(&config, &Plan::new(&config)).parameters.total()
        };
        assert_eq!(parameters("llama-3.2-1b"), 1_235_814_400);
        assert_eq!(parameters("llama-3.2-3b"), 3_212_749_824);
        assert_eq!(parameters("llama-3.1-8b"), 8_030_261_248);
        assert!(NAMES.iter().all(|name| named(name).is_some()));
        assert!(named("gpt-5").is_none());
    }
}
