//! A config becomes a plan of layers: the one description of a model that every backend executes, and the list of
//! tensors it needs. Pure. Never here: reading files, arithmetic on activations.

use plimsoll_kernels::reference::rope::{Frequencies, frequencies};

use super::config::Config;

#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub hidden: usize,
    pub vocabulary: usize,
    pub layers: Vec<Layer>,
    /// One rotation serves all layers.
    pub rope: Frequencies,
    /// Of the final norm.
    pub norm_eps: f32,
    /// The head is the embedding.
    pub tied_head: bool,
}

/// Pre-norm block: `x += attention(norm(x))`, then `x += mlp(norm(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    pub norm_eps: f32,
    pub attention: Attention,
    pub mlp: Mlp,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    pub heads: usize,
    /// Each run of `heads / kv_heads` query heads shares one KV head.
    pub kv_heads: usize,
    pub head_dim: usize,
    pub qkv_bias: bool,
    pub output_bias: bool,
    /// Root-mean-square norm of each query and key head before RoPE.
    pub qk_norm: bool,
    /// Multiplies query·key.
    pub scale: f32,
    pub sight: Sight,
}

/// The positions a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// Positions up to and with its own; absent: all of them.
    pub window: Option<usize>,
    /// Positions after its own: none in a causal decoder.
    pub ahead: usize,
}

impl Sight {
    pub fn visible(self, position: usize) -> std::ops::Range<usize> {
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        first..position + 1 + self.ahead
    }
}

/// `down(silu(gate(x)) · up(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlp {
    pub intermediate: usize,
    pub bias: bool,
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    Embedding,
    Attention,
    Mlp,
    Norm,
    Head,
}

impl Role {
    pub const ALL: [Role; 5] =
        [Role::Embedding, Role::Attention, Role::Mlp, Role::Norm, Role::Head];
}

/// How a tensor is cut when several ranks share a model: by rows, its outputs (`[out, in]`), or by columns, its inputs,
/// so that the ranks' partial results add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    Whole,
    /// In whole units of this many rows: a head is never cut.
    Rows {
        unit: usize,
    },
    Columns {
        unit: usize,
    },
}

/// One tensor that a checkpoint must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    /// `[elements]` or `[out, in]`.
    pub shape: Vec<usize>,
    pub role: Role,
    pub split: Split,
}

impl TensorSpec {
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

impl Plan {
    pub fn new(config: &Config) -> Plan {
        let layer = |window: &Option<usize>| Layer {
            norm_eps: config.norm_eps,
            attention: Attention {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                qkv_bias: config.qkv_bias,
                output_bias: config.output_bias,
                qk_norm: config.qk_norm,
                scale: 1.0 / (config.head_dim as f32).sqrt(),
                sight: Sight { window: *window, ahead: 0 },
            },
            mlp: Mlp { intermediate: config.intermediate, bias: config.mlp_bias },
        };
        Plan {
            hidden: config.hidden,
            vocabulary: config.vocabulary,
            layers: config.windows.iter().map(layer).collect(),
            rope: frequencies(config.rope.theta, config.head_dim, &config.rope.scaling),
            norm_eps: config.norm_eps,
            tied_head: config.tied_head,
        }
    }

    /// `[vocabulary, hidden]`.
    pub fn embedding(&self) -> TensorSpec {
        self.vocabulary_tensor("model.embed_tokens.weight", Role::Embedding)
    }

    /// `[vocabulary, hidden]`; absent where it is the embedding.
    pub fn head(&self) -> Option<TensorSpec> {
        (!self.tied_head).then(|| self.vocabulary_tensor("lm_head.weight", Role::Head))
    }

    pub fn final_norm(&self) -> TensorSpec {
        norm("model.norm.weight".into(), self.hidden)
    }

    /// Every tensor of the model.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let layers = (0..self.layers.len()).flat_map(|index| self.layer(index).into_all());
        let ends = [Some(self.embedding()), self.head(), Some(self.final_norm())];
        layers.chain(ends.into_iter().flatten()).collect()
    }

    /// The tensors of one layer.
    pub fn layer(&self, index: usize) -> LayerTensors {
        let Layer { attention, mlp, .. } = &self.layers[index];
        let (hidden, dim) = (self.hidden, attention.head_dim);
        let named = |suffix: &str| format!("model.layers.{index}.{suffix}");
        let split = Split::Rows { unit: dim };
        let project = |part: &str, heads: usize| Linear {
            weight: TensorSpec {
                name: named(&format!("self_attn.{part}_proj.weight")),
                shape: vec![heads * dim, hidden],
                role: Role::Attention,
                split,
            },
            bias: attention.qkv_bias.then(|| TensorSpec {
                name: named(&format!("self_attn.{part}_proj.bias")),
                shape: vec![heads * dim],
                role: Role::Attention,
                split,
            }),
        };
        let head_norm = |part: &str| {
            attention.qk_norm.then(|| norm(named(&format!("self_attn.{part}_norm.weight")), dim))
        };
        LayerTensors {
            attention_norm: norm(named("input_layernorm.weight"), hidden),
            query: project("q", attention.heads),
            key: project("k", attention.kv_heads),
            value: project("v", attention.kv_heads),
            query_norm: head_norm("q"),
            key_norm: head_norm("k"),
            output: Linear {
                weight: TensorSpec {
                    name: named("self_attn.o_proj.weight"),
                    shape: vec![hidden, attention.heads * dim],
                    role: Role::Attention,
                    split: Split::Columns { unit: dim },
                },
                bias: attention.output_bias.then(|| TensorSpec {
                    name: named("self_attn.o_proj.bias"),
                    shape: vec![hidden],
                    role: Role::Attention,
                    split: Split::Whole,
                }),
            },
            mlp_norm: norm(named("post_attention_layernorm.weight"), hidden),
            gate: self.mlp_in(&named("mlp.gate_proj"), mlp),
            up: self.mlp_in(&named("mlp.up_proj"), mlp),
            down: Linear {
                weight: TensorSpec {
                    name: named("mlp.down_proj.weight"),
                    shape: vec![hidden, mlp.intermediate],
                    role: Role::Mlp,
                    split: Split::Columns { unit: 1 },
                },
                bias: mlp.bias.then(|| TensorSpec {
                    name: named("mlp.down_proj.bias"),
                    shape: vec![hidden],
                    role: Role::Mlp,
                    split: Split::Whole,
                }),
            },
        }
    }

    fn mlp_in(&self, name: &str, mlp: &Mlp) -> Linear {
        let split = Split::Rows { unit: 1 };
        Linear {
            weight: TensorSpec {
                name: format!("{name}.weight"),
                shape: vec![mlp.intermediate, self.hidden],
                role: Role::Mlp,
                split,
            },
            bias: mlp.bias.then(|| TensorSpec {
                name: format!("{name}.bias"),
                shape: vec![mlp.intermediate],
                role: Role::Mlp,
                split,
            }),
        }
    }

    fn vocabulary_tensor(&self, name: &str, role: Role) -> TensorSpec {
        TensorSpec {
            name: name.into(),
            shape: vec![self.vocabulary, self.hidden],
            role,
            split: Split::Rows { unit: 1 },
        }
    }
}

fn norm(name: String, width: usize) -> TensorSpec {
    TensorSpec { name, shape: vec![width], role: Role::Norm, split: Split::Whole }
}

/// A product with `weight` `[out, in]`, and perhaps a `bias` `[out]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linear {
    pub weight: TensorSpec,
    pub bias: Option<TensorSpec>,
}

/// One layer's tensors, in the order they are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerTensors {
    pub attention_norm: TensorSpec,
    pub query: Linear,
    pub key: Linear,
    pub value: Linear,
    pub query_norm: Option<TensorSpec>,
    pub key_norm: Option<TensorSpec>,
    pub output: Linear,
    pub mlp_norm: TensorSpec,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

impl LayerTensors {
    fn into_all(self) -> impl Iterator<Item = TensorSpec> {
        let LayerTensors {
            attention_norm,
            query,
            key,
            value,
            query_norm,
            key_norm,
            output,
            mlp_norm,
            gate,
            up,
            down,
        } = self;
        let norms = [Some(attention_norm), query_norm, key_norm, Some(mlp_norm)];
        let linears = [query, key, value, output, gate, up, down];
        let linears = linears.into_iter().flat_map(|linear| [Some(linear.weight), linear.bias]);
        norms.into_iter().chain(linears).flatten()
    }
}
