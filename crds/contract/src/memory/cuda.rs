//! What the CUDA backend keeps on a card beside KV pages, to the byte: it takes exactly this before it serves (the engine's
//! tests hold both sums together), on a Hopper card with [`PROCESSORS`] and with the longest context. A shorter context
//! needs less; other cards differ by what their products leave for each other, some ten MiB either way.

use super::{StepLimits, matrices_bytes};
use crate::abilities::{Ability, PAGE_TOKENS};
use crate::facts::ModelFacts;

/// Columns and rows of stored matrices come in panels of this many.
const PANEL: u64 = 64;
/// Rows of activations come in as many as the widest tile has.
const ROWS: u64 = 256;
/// Tensors begin at multiples of this many bytes.
const TENSOR_ALIGNMENT: u64 = 1024;
/// Of bf16, in which weights and activations are kept.
const ELEMENT: u64 = 2;

/// Multiprocessors of the cards that the kernels are tuned for.
const PROCESSORS: u64 = 132;
/// Sums that a processor leaves for the others.
const PRODUCT_BYTES: u64 = 256 * 128 * 4;

/// A step's input travels in pieces of so many bytes.
const PIECE: u64 = 16;
/// Pieces of how a slot samples.
const PARAMETER_PIECES: u64 = 3;
/// Biases that a request may have, and bytes of each.
const BIASES_BYTES: u64 = 1024 * 8;

/// The width at which the kernels keep a head of at most 256, which is the widest there is.
pub fn head_width(head_dim: u32) -> u64 {
    match head_dim {
        0..=64 => 64,
        65..=128 => 128,
        _ => 256,
    }
}

/// A model's widths as stored.
struct Widths {
    hidden: u64,
    intermediate: u64,
    vocabulary: u64,
    heads: u64,
    kv_heads: u64,
    head: u64,
}

impl Widths {
    fn of(facts: &ModelFacts) -> Widths {
        Widths {
            hidden: u64::from(facts.hidden).next_multiple_of(PANEL),
            intermediate: u64::from(facts.intermediate).next_multiple_of(PANEL),
            vocabulary: u64::from(facts.vocabulary).next_multiple_of(PANEL),
            heads: u64::from(facts.heads),
            kv_heads: u64::from(facts.kv_heads),
            head: head_width(facts.head_dim),
        }
    }

    /// Of queries, keys and values of one row.
    fn qkv(&self) -> u64 {
        (self.heads + 2 * self.kv_heads) * self.head
    }

    fn attended(&self) -> u64 {
        self.heads * self.head
    }
}

/// Every tensor, where it begins included.
pub fn weights_bytes(facts: &ModelFacts, ability: Ability) -> u64 {
    let w = Widths::of(facts);
    // Of whole tiles, so that the next tensor begins where they end.
    let parameters = w.hidden * (w.qkv() + w.attended() + 3 * w.intermediate);
    let matrices = matrices_bytes(parameters, ability);
    let vector = |elements: u64| (elements * ELEMENT).next_multiple_of(TENSOR_ALIGNMENT);
    let vectors: u64 = layer_vectors(facts, &w).into_iter().map(vector).sum();
    let vocabulary = w.vocabulary * w.hidden * ELEMENT;
    let ends = if facts.tied_head { vocabulary } else { 2 * vocabulary };
    u64::from(facts.layers) * (matrices + vectors) + ends + vector(w.hidden)
}

/// Elements of a layer's norms and biases; 0 of those that it lacks. Which it has follows from the numbers of parameters.
fn layer_vectors(facts: &ModelFacts, w: &Widths) -> [u64; 8] {
    let layers = u64::from(facts.layers).max(1);
    let [hidden, intermediate, head] =
        [facts.hidden, facts.intermediate, facts.head_dim].map(u64::from);
    let qkv = (w.heads + 2 * w.kv_heads) * head;
    let weights = hidden * (qkv + w.heads * head);
    let attention = (facts.parameters.attention / layers).saturating_sub(weights);
    let mlp = (facts.parameters.mlp / layers).saturating_sub(3 * hidden * intermediate);
    let norms = (facts.parameters.norm.saturating_sub(hidden) / layers).saturating_sub(2 * hidden);
    let there = |is_there: bool, elements: u64| if is_there { elements } else { 0 };
    let qkv_bias = attention == qkv || attention == qkv + hidden;
    let output_bias = attention == hidden || attention == qkv + hidden;
    [
        w.hidden,
        w.hidden,
        there(qkv_bias, w.qkv()),
        there(output_bias, w.hidden),
        there(norms > 0, w.head),
        there(norms > 0, w.head),
        there(mlp > 0, 2 * intermediate),
        there(mlp > 0, w.hidden),
    ]
}

/// All that a step is computed in.
pub fn workspace_bytes(facts: &ModelFacts, limits: StepLimits) -> u64 {
    let w = Widths::of(facts);
    let running = u64::from(limits.running_max);
    let head_rows = running.next_multiple_of(ROWS);
    let rows = u64::from(limits.step_tokens_max.max(limits.running_max)).next_multiple_of(ROWS);
    let rope = u64::from(facts.context_tokens) * w.head * 4;
    rows * row_bytes(&w)
        + head_rows * head_row_bytes(&w)
        + rope
        + kernels_bytes(&w, head_rows)
        + slots_bytes(facts, running)
        + input_bytes(facts, &w, rows, head_rows, running)
}

/// Of a row: the residual stream, normed, with sums of squares for each panel; queries, keys and values; attended; gated.
fn row_bytes(w: &Widths) -> u64 {
    ELEMENT * (2 * w.hidden + w.qkv() + w.attended() + w.intermediate) + w.hidden / PANEL * 4
}

/// Of a row whose logits are wanted: logits in f32, raw and processed; the largest of each tile with its token; the normed
/// hidden state they come from.
fn head_row_bytes(w: &Widths) -> u64 {
    8 * w.vocabulary + 8 * (w.vocabulary / PANEL) + ELEMENT * w.hidden + w.hidden / PANEL * 4
}

/// Query heads of a KV head that a decode block takes, at most: the rows of one tensor-core operand. More that share one
/// go to further blocks.
pub const RUN_HEADS: u64 = 16;

/// What kernels leave for each other: sums of products; of attention, whose wide heads are split in two at least.
fn kernels_bytes(w: &Widths, decode_rows: u64) -> u64 {
    let splits = if w.head >= 128 { 2 } else { 1 };
    let sharing = w.heads / w.kv_heads.max(1);
    let blocks = decode_rows * w.kv_heads * sharing.div_ceil(RUN_HEADS);
    let of_block = (splits * sharing.min(RUN_HEADS) * (w.head + 2)).next_multiple_of(4);
    PROCESSORS * (PRODUCT_BYTES + 4) + blocks * (of_block + 1) * 4
}

/// Each slot's last token, counts of seen tokens and biases; the tokens of a sequence on their way into counts.
fn slots_bytes(facts: &ModelFacts, running: u64) -> u64 {
    let seen = u64::from(facts.vocabulary).next_multiple_of(8) * 2;
    running * (4 + seen + BIASES_BYTES) + u64::from(facts.context_tokens) * 4
}

/// A step's rows, query blocks, wanted rows, samples, prompts and parameters; every slot's block table.
fn input_bytes(facts: &ModelFacts, w: &Widths, rows: u64, head_rows: u64, running: u64) -> u64 {
    let block = match w.head {
        64 => 192,
        128 => 128,
        _ => 64,
    };
    let blocks = rows / block + running;
    let samples = head_rows / 2;
    let pieces = rows + blocks + rows / 4 + samples + rows + running * PARAMETER_PIECES + 1;
    let table = u64::from(facts.context_tokens.div_ceil(PAGE_TOKENS)).next_multiple_of(4);
    pieces * PIECE + running * table * 4
}
