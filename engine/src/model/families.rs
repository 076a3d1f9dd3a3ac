//! The decoder families the engine runs, one entry each: what the family's modelling code fixes, and which config
//! fields it reads for the rest. A new family of the same skeleton is one more entry here.

use plimsoll_contract::facts::Family;

/// Whether a tensor exists.
#[derive(Clone, Copy, Debug)]
pub enum Presence {
    Never,
    Always,
    /// As a boolean field of config.json says; absent means no.
    Field(&'static str),
}

/// Which layers see only a window.
#[derive(Clone, Copy, Debug)]
pub enum WindowRule {
    Never,
    /// `sliding_window` on every layer; null means none, absent means the family's default.
    EveryLayer {
        absent: usize,
    },
    /// `sliding_window` where `use_sliding_window` is true, on the layers that `layer_types` names, or else on those
    /// from `max_window_layers` on.
    ByLayer,
}

/// One family, keyed by what `architectures` in config.json says.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    pub architecture: &'static str,
    pub family: Family,
    pub qkv_bias: Presence,
    pub output_bias: Presence,
    pub mlp_bias: Presence,
    /// Queries and keys are normalised head by head before RoPE.
    pub qk_norm: bool,
    pub window: WindowRule,
    /// Where config.json leaves `head_dim` out; absent here: hidden / heads.
    pub head_dim: Option<usize>,
}

pub const FAMILIES: &[Description] = &[
    Description {
        architecture: "LlamaForCausalLM",
        family: Family::Llama,
        qkv_bias: Presence::Field("attention_bias"),
        output_bias: Presence::Field("attention_bias"),
        mlp_bias: Presence::Field("mlp_bias"),
        qk_norm: false,
        window: WindowRule::Never,
        head_dim: None,
    },
    Description {
        architecture: "MistralForCausalLM",
        family: Family::Mistral,
        qkv_bias: Presence::Never,
        output_bias: Presence::Never,
        mlp_bias: Presence::Never,
        qk_norm: false,
        window: WindowRule::EveryLayer { absent: 4096 },
        head_dim: None,
    },
    Description {
        architecture: "Qwen2ForCausalLM",
        family: Family::Qwen2,
        qkv_bias: Presence::Always,
        output_bias: Presence::Never,
        mlp_bias: Presence::Never,
        qk_norm: false,
        window: WindowRule::ByLayer,
        head_dim: None,
    },
    Description {
        architecture: "Qwen3ForCausalLM",
        family: Family::Qwen3,
        qkv_bias: Presence::Field("attention_bias"),
        output_bias: Presence::Field("attention_bias"),
        mlp_bias: Presence::Never,
        qk_norm: true,
        window: WindowRule::ByLayer,
        head_dim: Some(128),
    },
];
