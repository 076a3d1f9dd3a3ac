//! A model's weights on the device: one allocation, laid out before it is taken, filled from a checkpoint or with random
//! numbers. Files are read in parallel into pinned memory, half of which is filled while the other half travels.

use std::sync::Arc;

use plimsoll_kernels::device::{Buffer, Device, DeviceError, Mark, Pinned, Pointer};
use plimsoll_kernels::half::bf16;
use plimsoll_kernels::layout::Order;
use plimsoll_kernels::ops::weights::{Heads, Pack, PackVector, Random, SourceType, Weights};
use rayon::prelude::*;

use super::shape::{MatrixShape, Shape};
use super::{Source, device_error};
use crate::backend::LoadProgress;
use crate::model::{Checkpoint, LoadError, Plan, Shard, Stored, TensorSpec};

/// Every tensor of the model, as addresses into `memory`.
#[derive(Debug)]
pub struct DeviceModel {
    /// Stored tiles; the head too, where it is tied.
    pub embedding: Pointer<bf16>,
    pub head: Pointer<bf16>,
    pub layers: Vec<DeviceLayer>,
    pub final_norm: Pointer<bf16>,
    /// Cosine and sine of every position and pair. `[context_tokens, head_stored / 2]`
    pub rope: Buffer,
    pub norm_eps: f32,
    /// Multiplies query·key.
    pub attention_scale: f32,
    /// Holds all of the above but `rope`.
    _memory: Buffer,
}

/// Null where the model has no such tensor.
#[derive(Clone, Copy, Debug)]
pub struct DeviceLayer {
    pub attention_norm: Pointer<bf16>,
    pub qkv: Pointer<bf16>,
    pub qkv_bias: Pointer<bf16>,
    pub query_norm: Pointer<bf16>,
    pub key_norm: Pointer<bf16>,
    pub output: Pointer<bf16>,
    pub output_bias: Pointer<bf16>,
    pub mlp_norm: Pointer<bf16>,
    /// Gate and up, interleaved.
    pub gate_up: Pointer<bf16>,
    pub gate_up_bias: Pointer<bf16>,
    pub down: Pointer<bf16>,
    pub down_bias: Pointer<bf16>,
}

/// Gives out places in memory that is not there yet, then in memory that is.
struct Arena {
    base: Pointer<u8>,
    bytes: usize,
}

/// Where panels begin.
const ALIGNMENT: usize = 1024;

impl Arena {
    fn take(&mut self, bytes: usize) -> Pointer<bf16> {
        let at = self.base.add(self.bytes).cast();
        self.bytes = (self.bytes + bytes).next_multiple_of(ALIGNMENT);
        at
    }

    fn matrix(&mut self, shape: MatrixShape) -> Pointer<bf16> {
        self.take(shape.bytes())
    }

    fn vector(&mut self, elements: usize, is_there: bool) -> Pointer<bf16> {
        if is_there { self.take(elements * 2) } else { Pointer::NULL }
    }
}

/// The addresses of everything, in an arena that begins at `base`, and its bytes.
fn lay_out(plan: &Plan, shape: &Shape, base: Pointer<u8>) -> (Places, usize) {
    let mut arena = Arena { base, bytes: 0 };
    let attention = &plan.layers[0].attention;
    let mlp = &plan.layers[0].mlp;
    let hidden = shape.hidden_stored();
    let layers = (0..shape.layers).map(|_| DeviceLayer {
        attention_norm: arena.vector(hidden, true),
        qkv: arena.matrix(shape.qkv()),
        qkv_bias: arena.vector(shape.qkv_width(), attention.qkv_bias),
        query_norm: arena.vector(shape.head_stored, attention.qk_norm),
        key_norm: arena.vector(shape.head_stored, attention.qk_norm),
        output: arena.matrix(shape.output()),
        output_bias: arena.vector(hidden, attention.output_bias),
        mlp_norm: arena.vector(hidden, true),
        gate_up: arena.matrix(shape.gate_up()),
        gate_up_bias: arena.vector(2 * shape.intermediate, mlp.bias),
        down: arena.matrix(shape.down()),
        down_bias: arena.vector(hidden, mlp.bias),
    });
    let layers = layers.collect();
    let embedding = arena.matrix(shape.vocabulary_matrix());
    let head = if plan.tied_head { embedding } else { arena.matrix(shape.vocabulary_matrix()) };
    let final_norm = arena.vector(hidden, true);
    (Places { layers, embedding, head, final_norm }, arena.bytes)
}

struct Places {
    layers: Vec<DeviceLayer>,
    embedding: Pointer<bf16>,
    head: Pointer<bf16>,
    final_norm: Pointer<bf16>,
}

/// Bytes of all weights on the device.
pub fn bytes(plan: &Plan, shape: &Shape) -> usize {
    lay_out(plan, shape, Pointer::NULL).1
}

pub fn load(
    device: &Arc<Device>,
    plan: &Plan,
    shape: &Shape,
    source: Source,
    context_tokens: usize,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<DeviceModel, LoadError> {
    let memory = device.allocate(bytes(plan, shape), "weights").map_err(device_error)?;
    let (places, _) = lay_out(plan, shape, memory.pointer());
    // Padding is read by products and must be zero.
    device.fill(&memory, 0).map_err(device_error)?;
    let weights = Weights::load(device).map_err(device_error)?;
    match source {
        Source::Checkpoint(checkpoint) => {
            let mut loader = Loader::new(device, &weights, checkpoint, shape)?;
            loader.everything(plan, &places, progress)?;
        }
        Source::Random { plan: _, seed } => {
            random(device, &weights, shape, &places, plan, seed).map_err(device_error)?;
        }
    }
    let rope = rope_table(device, plan, shape, context_tokens).map_err(device_error)?;
    device.synchronize().map_err(device_error)?;
    let Places { layers, embedding, head, final_norm } = places;
    Ok(DeviceModel {
        embedding,
        head,
        layers,
        final_norm,
        rope,
        norm_eps: plan.norm_eps,
        attention_scale: plan.layers[0].attention.scale,
        _memory: memory,
    })
}

/// `[positions][head_stored / 2]` cosines and sines; pairs of padding turn nothing.
fn rope_table(
    device: &Device,
    plan: &Plan,
    shape: &Shape,
    positions: usize,
) -> Result<Buffer, DeviceError> {
    let (pairs, stored) = (plan.rope.inverse.len(), shape.head_stored / 2);
    let mut table = vec![0.0f32; positions * stored * 2];
    table.par_chunks_exact_mut(stored * 2).enumerate().for_each(|(position, row)| {
        let (mut cos, mut sin) = (vec![0.0; pairs], vec![0.0; pairs]);
        plan.rope.cos_sin(position, &mut cos, &mut sin);
        for (pair, turn) in row.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            *turn = [cos.get(pair).copied().unwrap_or(1.0), sin.get(pair).copied().unwrap_or(0.0)];
        }
    });
    let buffer = device.allocate(size_of_val(table.as_slice()), "cosines and sines")?;
    device.upload(buffer.pointer(), &table)?;
    Ok(buffer)
}

/// Bytes of the table of [`rope_table`].
pub fn rope_bytes(shape: &Shape, positions: usize) -> usize {
    positions * shape.head_stored * 4
}

/// Bytes of each half of the pinned memory, and of each staging buffer on the device.
const CHUNK_BYTES: usize = 64 << 20;

/// Streams tensors from files to stored tiles.
struct Loader<'a> {
    device: &'a Device,
    weights: &'a Weights,
    checkpoint: &'a Checkpoint,
    shape: &'a Shape,
    halves: [Half; 2],
    /// The half that is filled next.
    next: usize,
}

struct Half {
    pinned: Pinned<u8>,
    staging: Buffer,
    /// When the device has read what was last put there.
    free: Option<Mark>,
}

/// How the rows of a matrix, or the elements of a vector, become stored ones.
#[derive(Clone, Copy)]
struct Placement {
    order: Order,
    /// Of the first logical row.
    row_offset: usize,
    /// Rows are heads, padded.
    row_heads: Heads,
    /// Columns are heads, padded.
    column_heads: Heads,
}

impl Placement {
    const PLAIN: Placement = Placement {
        order: Order::Pairs,
        row_offset: 0,
        row_heads: Heads::NONE,
        column_heads: Heads::NONE,
    };
}

impl<'a> Loader<'a> {
    fn new(
        device: &'a Device,
        weights: &'a Weights,
        checkpoint: &'a Checkpoint,
        shape: &'a Shape,
    ) -> Result<Loader<'a>, LoadError> {
        let half = || -> Result<Half, DeviceError> {
            Ok(Half {
                pinned: device.pinned(CHUNK_BYTES)?,
                staging: device.allocate(CHUNK_BYTES, "weights on their way")?,
                free: None,
            })
        };
        let halves = [half().map_err(device_error)?, half().map_err(device_error)?];
        Ok(Loader { device, weights, checkpoint, shape, halves, next: 0 })
    }

    fn everything(
        &mut self,
        plan: &Plan,
        places: &Places,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(), LoadError> {
        let vocabulary = self.shape.vocabulary_matrix();
        self.matrix(&plan.embedding(), vocabulary, places.embedding, Placement::PLAIN)?;
        if let Some(head) = plan.head() {
            self.matrix(&head, vocabulary, places.head, Placement::PLAIN)?;
        }
        for (index, layer) in places.layers.iter().enumerate() {
            self.layer(plan, index, layer)?;
            progress(LoadProgress { layers_done: index + 1, layers: places.layers.len() });
        }
        self.vector(&plan.final_norm(), places.final_norm, Heads::NONE)
    }

    fn layer(&mut self, plan: &Plan, index: usize, to: &DeviceLayer) -> Result<(), LoadError> {
        let t = plan.layer(index);
        let shape = self.shape;
        let heads = Heads::new(shape.head_dim, shape.head_stored);
        self.vector(&t.attention_norm, to.attention_norm, Heads::NONE)?;
        let mut row = 0;
        for (linear, count) in
            [(&t.query, shape.heads), (&t.key, shape.kv_heads), (&t.value, shape.kv_heads)]
        {
            let placement = Placement { row_offset: row, row_heads: heads, ..Placement::PLAIN };
            self.matrix(&linear.weight, shape.qkv(), to.qkv, placement)?;
            if let Some(bias) = &linear.bias {
                self.vector(bias, to.qkv_bias.add(row), heads)?;
            }
            row += count * shape.head_stored;
        }
        if let Some(norm) = &t.query_norm {
            self.vector(norm, to.query_norm, heads)?;
        }
        if let Some(norm) = &t.key_norm {
            self.vector(norm, to.key_norm, heads)?;
        }
        let placement = Placement { column_heads: heads, ..Placement::PLAIN };
        self.matrix(&t.output.weight, shape.output(), to.output, placement)?;
        if let Some(bias) = &t.output.bias {
            self.vector(bias, to.output_bias, Heads::NONE)?;
        }
        self.vector(&t.mlp_norm, to.mlp_norm, Heads::NONE)?;
        let order = Order::GateUp { features: shape.intermediate };
        for (half, linear) in [&t.gate, &t.up].into_iter().enumerate() {
            let row_offset = half * shape.intermediate;
            let placement = Placement { order, row_offset, ..Placement::PLAIN };
            self.matrix(&linear.weight, shape.gate_up(), to.gate_up, placement)?;
            if let Some(bias) = &linear.bias {
                self.vector(bias, to.gate_up_bias.add(row_offset), Heads::NONE)?;
            }
        }
        self.matrix(&t.down.weight, shape.down(), to.down, Placement::PLAIN)?;
        if let Some(bias) = &t.down.bias {
            self.vector(bias, to.down_bias, Heads::NONE)?;
        }
        Ok(())
    }

    /// Chunks of whole rows: read in parallel, sent, and put into tiles.
    fn matrix(
        &mut self,
        spec: &TensorSpec,
        stored: MatrixShape,
        to: Pointer<bf16>,
        placement: Placement,
    ) -> Result<(), LoadError> {
        let view = self.checkpoint.weights.tensor(spec, Shard::WHOLE)?;
        let (bytes, kind) = view.stored().expect("whole tensors have whole rows");
        let columns = view.columns();
        let row_bytes = columns * kind.bytes();
        let rows_at_once = (CHUNK_BYTES / row_bytes).max(1);
        for first in (0..view.rows()).step_by(rows_at_once) {
            let rows = rows_at_once.min(view.rows() - first);
            let chunk = &bytes[first * row_bytes..(first + rows) * row_bytes];
            let source = self.send(chunk)?;
            let pack = Pack {
                source: source.pointer,
                kind: source_type(kind),
                rows,
                columns,
                first_row: first,
                row_offset: placement.row_offset,
                order: placement.order,
                to,
                panels: stored.panels(),
                row_heads: placement.row_heads,
                column_heads: placement.column_heads,
            };
            // SAFETY: the chunk is whole, its staging buffer is marked as busy, and `to` is a stored matrix.
            unsafe { self.weights.pack(self.device, &pack) }.map_err(device_error)?;
            self.sent(source.half)?;
        }
        self.checkpoint.weights.forget(spec);
        Ok(())
    }

    fn vector(
        &mut self,
        spec: &TensorSpec,
        to: Pointer<bf16>,
        heads: Heads,
    ) -> Result<(), LoadError> {
        let view = self.checkpoint.weights.tensor(spec, Shard::WHOLE)?;
        let (bytes, kind) = view.stored().expect("whole tensors have whole rows");
        let source = self.send(bytes)?;
        let pack = PackVector {
            source: source.pointer,
            kind: source_type(kind),
            elements: view.columns(),
            to,
            heads,
        };
        // SAFETY: as above; the arena has room for the vector as stored.
        unsafe { self.weights.pack_vector(self.device, &pack) }.map_err(device_error)?;
        self.sent(source.half)
    }

    /// Bytes in the half that is free next, on their way to its staging buffer.
    fn send(&mut self, bytes: &[u8]) -> Result<Sent, LoadError> {
        assert!(bytes.len() <= CHUNK_BYTES, "one row of a matrix fits into a chunk");
        let half = self.next;
        self.next = 1 - half;
        let Half { pinned, staging, free } = &mut self.halves[half];
        if let Some(mark) = free.take() {
            mark.wait().map_err(device_error)?;
        }
        let to = &mut pinned.as_mut_slice()[..bytes.len()];
        const PART: usize = 1 << 20;
        if bytes.len() <= PART {
            to.copy_from_slice(bytes);
        } else {
            let parts = to.par_chunks_mut(PART).zip(bytes.par_chunks(PART));
            parts.for_each(|(to, from)| to.copy_from_slice(from));
        }
        let pointer = staging.pointer();
        self.device.upload_pinned(pointer, pinned, bytes.len()).map_err(device_error)?;
        Ok(Sent { pointer, half })
    }

    fn sent(&mut self, half: usize) -> Result<(), LoadError> {
        self.halves[half].free = Some(self.device.mark().map_err(device_error)?);
        Ok(())
    }
}

struct Sent {
    pointer: Pointer<u8>,
    half: usize,
}

fn source_type(kind: Stored) -> SourceType {
    match kind {
        Stored::Bf16 => SourceType::Bf16,
        Stored::F16 => SourceType::F16,
        Stored::F32 => SourceType::F32,
    }
}

/// The spread of random weights; norms are 1. As peers' dummy weights, so that figures compare.
const RANDOM_DEVIATION: f32 = 0.02;

fn random(
    device: &Device,
    weights: &Weights,
    shape: &Shape,
    places: &Places,
    plan: &Plan,
    seed: u64,
) -> Result<(), DeviceError> {
    let mut tensor = 0;
    let mut matrix = |to, stored: MatrixShape, rows, columns| {
        tensor += 1;
        let random = Random {
            to,
            rows,
            columns,
            panels: stored.panels(),
            mean: 0.0,
            deviation: RANDOM_DEVIATION,
            seed: seed.wrapping_add(tensor),
        };
        // SAFETY: the arena has room for the stored matrix.
        unsafe { weights.random(device, &random) }
    };
    let vocabulary = shape.vocabulary_matrix();
    matrix(places.embedding, vocabulary, shape.vocabulary, shape.hidden)?;
    if !plan.tied_head {
        matrix(places.head, vocabulary, shape.vocabulary, shape.hidden)?;
    }
    for layer in &places.layers {
        matrix(layer.qkv, shape.qkv(), shape.qkv().rows, shape.hidden)?;
        matrix(layer.output, shape.output(), shape.hidden, shape.output().columns)?;
        matrix(layer.gate_up, shape.gate_up(), shape.gate_up().rows, shape.hidden)?;
        matrix(layer.down, shape.down(), shape.hidden, shape.intermediate)?;
    }
    let ones = vec![bf16::ONE; shape.hidden];
    let norms = places.layers.iter().flat_map(|layer| [layer.attention_norm, layer.mlp_norm]);
    for norm in norms.chain([places.final_norm]) {
        device.upload(norm, &ones)?;
    }
    assert!(!plan.layers[0].attention.qk_norm, "random models are Llama's shapes");
    Ok(())
}
