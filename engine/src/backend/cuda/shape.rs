//! How a model's plan lies on the device: stored widths, tiles, and the bytes of every buffer, computed before anything
//! is allocated. Pure. What is allocated is exactly what stands here.

use plimsoll_contract::abilities::{Dtype, PAGE_TOKENS};
use plimsoll_contract::memory::cuda_head_width;
use plimsoll_kernels::layout::{PANEL, ROWS_UNIT, TILE_ROWS};

use crate::model::{LoadError, Plan};

/// A model as the device stores it. All layers are alike but for their windows.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// The width that the attention kernels know; a narrower head is padded with zeros.
    pub head_stored: usize,
    pub intermediate: usize,
    pub vocabulary: usize,
    /// Each layer's window; 0 is none.
    pub windows: Vec<usize>,
}

/// A product's weights: `rows` outputs of `columns` inputs, both as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixShape {
    pub rows: usize,
    pub columns: usize,
}

impl MatrixShape {
    pub fn tiles(self) -> usize {
        self.rows / TILE_ROWS
    }

    pub fn panels(self) -> usize {
        self.columns / PANEL
    }

    pub fn bytes(self) -> usize {
        self.rows * self.columns * 2
    }
}

fn stored(width: usize) -> usize {
    width.next_multiple_of(PANEL)
}

impl Shape {
    pub fn new(plan: &Plan) -> Result<Shape, LoadError> {
        let attention = &plan.layers[0].attention;
        let alike = plan.layers.iter().all(|layer| {
            let (a, b) = (&layer.attention, attention);
            (a.heads, a.kv_heads, a.head_dim, a.qkv_bias, a.output_bias, a.qk_norm)
                == (b.heads, b.kv_heads, b.head_dim, b.qkv_bias, b.output_bias, b.qk_norm)
                && layer.mlp == plan.layers[0].mlp
        });
        assert!(alike, "the families that are described have layers of one shape");
        if !plan.hidden.is_multiple_of(8) || !plan.layers[0].mlp.intermediate.is_multiple_of(8) {
            return Err(LoadError::UnsupportedModel {
                file: "config.json".into(),
                field: "hidden_size and intermediate_size".into(),
                found: format!("{} and {}", plan.hidden, plan.layers[0].mlp.intermediate),
                expected: "the CUDA kernels take multiples of 8".into(),
                remedy: "serve it with --device cpu".into(),
            });
        }
        Ok(Shape {
            layers: plan.layers.len(),
            hidden: plan.hidden,
            heads: attention.heads,
            kv_heads: attention.kv_heads,
            head_dim: attention.head_dim,
            head_stored: cuda_head_width(attention.head_dim as u32) as usize,
            intermediate: plan.layers[0].mlp.intermediate,
            vocabulary: plan.vocabulary,
            windows: plan.layers.iter().map(|l| l.attention.sight.window.unwrap_or(0)).collect(),
        })
    }

    pub fn hidden_stored(&self) -> usize {
        stored(self.hidden)
    }

    /// Of queries, keys and values of one row.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_stored
    }

    pub fn attended_width(&self) -> usize {
        self.heads * self.head_stored
    }

    pub fn intermediate_stored(&self) -> usize {
        stored(self.intermediate)
    }

    pub fn qkv(&self) -> MatrixShape {
        MatrixShape { rows: self.qkv_width(), columns: self.hidden_stored() }
    }

    pub fn output(&self) -> MatrixShape {
        MatrixShape { rows: self.hidden_stored(), columns: self.attended_width() }
    }

    pub fn gate_up(&self) -> MatrixShape {
        MatrixShape { rows: 2 * self.intermediate_stored(), columns: self.hidden_stored() }
    }

    pub fn down(&self) -> MatrixShape {
        MatrixShape { rows: self.hidden_stored(), columns: self.intermediate_stored() }
    }

    /// Of the embedding and the head.
    pub fn vocabulary_matrix(&self) -> MatrixShape {
        MatrixShape { rows: stored(self.vocabulary), columns: self.hidden_stored() }
    }

    /// Elements of one page of one layer, keys and values.
    pub fn page_elements(&self) -> usize {
        2 * self.kv_heads * PAGE_TOKENS as usize * self.head_stored
    }

    /// Bytes of one page over all layers.
    pub fn page_bytes(&self) -> usize {
        self.layers * self.page_elements() * Dtype::Bf16.bytes() as usize
    }
}

/// What a step may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    pub step_tokens_max: usize,
    pub running_max: usize,
    pub context_tokens: usize,
}

impl StepShape {
    /// Rows of activations.
    pub fn rows_max(&self) -> usize {
        self.step_tokens_max.max(self.running_max).next_multiple_of(ROWS_UNIT)
    }

    /// Rows of logits that are computed at once.
    pub fn head_rows(&self) -> usize {
        self.running_max.next_multiple_of(ROWS_UNIT)
    }

    /// Entries of a sequence's block table.
    pub fn table_width(&self) -> usize {
        self.context_tokens.div_ceil(PAGE_TOKENS as usize).next_multiple_of(4)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::Config;

    fn shape(fields: &[(&str, usize)]) -> Result<Shape, LoadError> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": 64, "intermediate_size": 136, "num_hidden_layers": 2,
            "num_attention_heads": 40, "num_key_value_heads": 1, "vocab_size": 384,
            "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        });
        for (name, value) in fields {
            config[*name] = json!(value);
        }
        Shape::new(&Plan::new(&Config::parse(&config).unwrap()))
    }

    #[test]
    fn heads_are_padded_to_a_kernels_width_and_any_number_of_them_shares_a_kv_head() {
        for (head_dim, stored) in [(16, 64), (64, 64), (96, 128), (192, 256), (256, 256)] {
            let shape = shape(&[("head_dim", head_dim)]).unwrap();
            assert_eq!((shape.head_dim, shape.head_stored), (head_dim, stored));
            assert_eq!(shape.qkv(), MatrixShape { rows: 42 * stored, columns: 64 });
            assert_eq!(shape.output(), MatrixShape { rows: 64, columns: 40 * stored });
            assert_eq!(shape.page_elements(), 2 * 64 * stored);
        }
    }

    #[test]
    fn a_width_that_no_copy_of_sixteen_bytes_fits_is_refused_with_the_remedy() {
        let refused = shape(&[("head_dim", 64), ("intermediate_size", 140)]).unwrap_err();
        let said = refused.to_string();
        assert!(said.contains("64 and 140") && said.contains("--device cpu"), "{said}");
    }
}
