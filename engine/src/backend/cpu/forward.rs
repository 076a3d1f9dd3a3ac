//! All rows of a step through all layers. Enters: a checked step. Leaves: the hidden states of every row, in which the
//! head is applied only to the rows that need logits. Activations live in buffers that are kept from step to step.

use plimsoll_kernels::reference::attention::PageShape;

use super::attention::{Rows, attend};
use super::load::{Loaded, LoadedLayer};
use super::ops::{self, Prepare};
use super::pages::{Cursor, LayerPages};
use crate::model::{Layer, Plan};

/// Activations, `[rows, ..]` each; they grow to the largest step seen.
#[derive(Debug, Default)]
pub struct Workspace {
    /// The residual stream, `[rows, hidden]`.
    pub x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    logits: Vec<f32>,
}

/// `pages[layer]`.
pub fn layers(
    plan: &Plan,
    loaded: &Loaded,
    pages: &mut [LayerPages],
    spans: &[Rows],
    space: &mut Workspace,
) {
    rotations(plan, spans, space);
    for ((layer, loaded), pages) in plan.layers.iter().zip(&loaded.layers).zip(pages) {
        attention_block(plan, layer, loaded, pages, spans, space);
        mlp_block(plan, layer, loaded, space);
    }
}

/// Cosines and sines of every row, shared by all layers.
fn rotations(plan: &Plan, spans: &[Rows], space: &mut Workspace) {
    let pairs = plan.rope.inverse.len();
    let rows: usize = spans.iter().map(|span| span.count).sum();
    space.cos.resize(rows * pairs, 0.0);
    space.sin.resize(rows * pairs, 0.0);
    let mut tables = space.cos.chunks_exact_mut(pairs).zip(space.sin.chunks_exact_mut(pairs));
    for span in spans {
        for (row, (cos, sin)) in tables.by_ref().take(span.count).enumerate() {
            plan.rope.cos_sin(span.position + row, cos, sin);
        }
    }
}

fn attention_block(
    plan: &Plan,
    layer: &Layer,
    loaded: &LoadedLayer,
    pages: &mut LayerPages,
    spans: &[Rows],
    space: &mut Workspace,
) {
    let rows = space.x.len() / plan.hidden;
    let attention = &layer.attention;
    let queries = attention.heads * attention.head_dim;
    let keys = attention.kv_heads * attention.head_dim;
    let width = queries + 2 * keys;
    space.normed.resize(rows * plan.hidden, 0.0);
    ops::rms_norm(&space.x, &loaded.attention_norm, layer.norm_eps, &mut space.normed);
    space.qkv.resize(rows * width, 0.0);
    ops::fill(&mut space.qkv, loaded.qkv_bias.as_deref());
    loaded.qkv.multiply_add(&space.normed, &mut space.qkv);
    let prepare = Prepare {
        queries,
        keys,
        head_dim: attention.head_dim,
        query_norm: loaded.query_norm.as_deref(),
        key_norm: loaded.key_norm.as_deref(),
        eps: layer.norm_eps,
        cos: &space.cos,
        sin: &space.sin,
    };
    ops::prepare(&mut space.qkv, width, &prepare);
    let shape = PageShape { kv_heads: attention.kv_heads, head_dim: attention.head_dim };
    for span in spans {
        for row in 0..span.count {
            let qkv = &space.qkv[(span.first + row) * width..(span.first + row + 1) * width];
            let (key, value) = qkv[queries..].split_at(keys);
            pages.write(shape, Cursor::new(span.table, span.position + row), key, value);
        }
    }
    space.attended.resize(rows * queries, 0.0);
    attend(attention, pages, spans, &space.qkv, width, &mut space.attended);
    loaded.output.multiply_add(&space.attended, &mut space.x);
    if let Some(bias) = &loaded.output_bias {
        ops::add_bias(&mut space.x, bias);
    }
}

fn mlp_block(plan: &Plan, layer: &Layer, loaded: &LoadedLayer, space: &mut Workspace) {
    let rows = space.x.len() / plan.hidden;
    let width = layer.mlp.intermediate;
    ops::rms_norm(&space.x, &loaded.mlp_norm, layer.norm_eps, &mut space.normed);
    space.gate_up.resize(rows * 2 * width, 0.0);
    ops::fill(&mut space.gate_up, loaded.gate_up_bias.as_deref());
    loaded.gate_up.multiply_add(&space.normed, &mut space.gate_up);
    space.gated.resize(rows * width, 0.0);
    ops::silu_mul(&space.gate_up, width, &mut space.gated);
    loaded.down.multiply_add(&space.gated, &mut space.x);
    if let Some(bias) = &loaded.down_bias {
        ops::add_bias(&mut space.x, bias);
    }
}

/// Logits of chosen rows of the residual stream. `[rows, vocabulary]`
pub fn logits<'a>(
    plan: &Plan,
    loaded: &Loaded,
    rows: impl ExactSizeIterator<Item = usize>,
    space: &'a mut Workspace,
) -> &'a mut [f32] {
    let (hidden, count) = (plan.hidden, rows.len());
    space.gated.resize(count * hidden, 0.0);
    for (row, chosen) in rows.zip(space.gated.chunks_exact_mut(hidden)) {
        chosen.copy_from_slice(&space.x[row * hidden..(row + 1) * hidden]);
    }
    space.normed.resize(count * hidden, 0.0);
    ops::rms_norm(&space.gated, &loaded.final_norm, plan.norm_eps, &mut space.normed);
    space.logits.clear();
    space.logits.resize(count * plan.vocabulary, 0.0);
    let head = loaded.head.as_ref().unwrap_or(&loaded.embedding);
    head.multiply_add(&space.normed, &mut space.logits);
    &mut space.logits
}
