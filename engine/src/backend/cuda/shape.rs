//! How a model's plan lies on the device: stored widths, tiles, and the bytes of every buffer, computed before anything
//! is allocated. Pure. What is allocated is exactly what stands here.

use plimsoll_contract::abilities::{CUDA_HEAD_DIM_MAX, Dtype, PAGE_TOKENS};
use plimsoll_contract::memory::cuda_head_width;
use plimsoll_kernels::layout::{PANEL, ROWS_UNIT, TILE_ROWS};
use plimsoll_kernels::ops::attention::GROUP_MAX;

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
        let refuse = |field: &str, found: String, expected: String| LoadError::UnsupportedModel {
            file: "config.json".into(),
            field: field.into(),
            found,
            expected,
            remedy: "serve it with --device cpu".into(),
        };
        let head_dim = attention.head_dim as u32;
        if head_dim > CUDA_HEAD_DIM_MAX {
            let expected = format!("the CUDA kernels take heads of at most {CUDA_HEAD_DIM_MAX}");
            return Err(refuse("head_dim", head_dim.to_string(), expected));
        }
        let group = attention.heads / attention.kv_heads;
        if group > GROUP_MAX {
            let expected =
                format!("the CUDA kernels take at most {GROUP_MAX} query heads per KV head");
            return Err(refuse(
                "num_attention_heads / num_key_value_heads",
                group.to_string(),
                expected,
            ));
        }
        if !plan.hidden.is_multiple_of(8) || !plan.layers[0].mlp.intermediate.is_multiple_of(8) {
            let found = format!("{} and {}", plan.hidden, plan.layers[0].mlp.intermediate);
            let expected = "the CUDA kernels take multiples of 8".into();
            return Err(refuse("hidden_size and intermediate_size", found, expected));
        }
        Ok(Shape {
            layers: plan.layers.len(),
            hidden: plan.hidden,
            heads: attention.heads,
            kv_heads: attention.kv_heads,
            head_dim: attention.head_dim,
            head_stored: cuda_head_width(head_dim) as usize,
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
