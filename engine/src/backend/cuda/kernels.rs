//! Every kernel a step needs, loaded once, and who takes which product: on Hopper the stream for few tokens and the tile
//! for many, elsewhere (or when asked) the portable one.

use plimsoll_kernels::device::{Buffer, Device, DeviceError};
use plimsoll_kernels::layout::PANEL;
use plimsoll_kernels::ops::attention::{
    Attention, AttentionArguments, PrefillShape, Span, decode_workspace,
};
use plimsoll_kernels::ops::gemm::{Epilogue, GemmArguments};
use plimsoll_kernels::ops::gemm_portable::{self, GemmPortable};
use plimsoll_kernels::ops::gemm_stream::{self, GemmStream};
use plimsoll_kernels::ops::gemm_tile::{self, GemmTile};
use plimsoll_kernels::ops::sampling::Sampling;
use plimsoll_kernels::ops::step::StepKernels;

use super::CudaOptions;
use super::forward::Rows;
use super::shape::{MatrixShape, Shape, StepShape};
use crate::scheduler::StepCosts;

pub struct Kernels {
    products: Products,
    /// Sums are split in one way whatever the company: the stream in runs of its 64 rows, or the portable kernel with
    /// fixed splits.
    batch_invariant: bool,
    attention: Attention,
    pub sampling: Sampling,
    pub step: StepKernels,
    pub partials: Buffer,
    pub counters: Buffer,
    pub attention_partials: Buffer,
    pub attention_counters: Buffer,
}

enum Products {
    Hopper { stream: GemmStream, tile: GemmTile },
    Portable(GemmPortable),
}

/// What of a card decides how much its kernels need beside a step's buffers.
#[derive(Clone, Copy, Debug)]
pub struct Card {
    pub capability: (i32, i32),
    pub processors: u32,
    pub is_hopper: bool,
    /// Products go the way of every card.
    pub portable: bool,
}

impl Card {
    pub fn of(device: &Device, portable: bool) -> Card {
        Card {
            capability: device.capability(),
            processors: device.processors(),
            is_hopper: device.is_hopper(),
            portable: portable || !device.is_hopper(),
        }
    }

    /// Query blocks that the longer spans of a step can make.
    pub fn cuts_max(self, shape: &Shape, step: &StepShape) -> usize {
        let prefill = PrefillShape::of(self.is_hopper, shape.head_stored);
        prefill.cut_max(step.rows_max(), step.running_max)
    }
}

/// Bytes of what kernels of a step leave for each other.
#[derive(Clone, Copy, Debug)]
struct Workspace {
    partials: usize,
    counters: usize,
    attention_partials: usize,
    attention_counters: usize,
}

impl Workspace {
    fn of(card: Card, shape: &Shape, step: &StepShape) -> Workspace {
        let (partials, counters) = if card.portable {
            portable_workspace(card, shape, step)
        } else {
            GemmTile::workspace(card.processors)
        };
        // Decode takes one row of each sequence at most.
        let (heads, kv_heads, head) = (shape.heads, shape.kv_heads, shape.head_stored);
        let (attention_partials, attention_counters) =
            decode_workspace(card.processors, step.head_rows(), heads, kv_heads, head);
        Workspace {
            partials,
            counters: counters * size_of::<i32>(),
            attention_partials: attention_partials * size_of::<f32>(),
            attention_counters: attention_counters * size_of::<i32>(),
        }
    }
}

/// Bytes of all that [`Kernels::load`] takes.
pub fn workspace_bytes(card: Card, shape: &Shape, step: &StepShape) -> usize {
    let Workspace { partials, counters, attention_partials, attention_counters } =
        Workspace::of(card, shape, step);
    partials + counters + attention_partials + attention_counters
}

/// What a layer takes beside products and attention.
const BESIDE_PRODUCTS_MICROSECONDS: f64 = 12.0;

/// Tokens that the stream takes at once.
const STREAM_ROWS_MAX: usize = gemm_stream::ROWS_MAX;

impl Kernels {
    pub fn load(
        device: &Device,
        shape: &Shape,
        step: &StepShape,
        options: &CudaOptions,
    ) -> Result<Kernels, DeviceError> {
        let card = Card::of(device, options.portable);
        let products = if card.portable {
            Products::Portable(GemmPortable::load(device)?)
        } else {
            Products::Hopper { stream: GemmStream::load(device)?, tile: GemmTile::load(device)? }
        };
        let Workspace { partials, counters, attention_partials, attention_counters } =
            Workspace::of(card, shape, step);
        Ok(Kernels {
            products,
            batch_invariant: options.batch_invariant,
            attention: Attention::load(device, shape.head_stored)?,
            sampling: Sampling::load(device)?,
            step: StepKernels::load(device)?,
            partials: device.zeroed(partials, "partial sums of products")?,
            counters: device.zeroed(counters, "counters of products")?,
            attention_partials: device.zeroed(attention_partials, "partial attention")?,
            attention_counters: device.zeroed(attention_counters, "counters of attention")?,
        })
    }

    /// What steps of more rows than the stream takes cost, in microseconds: their products, by the model that cuts them, and
    /// the rest of a decode step. Of other kernels than Hopper's nothing is known.
    pub fn step_costs(&self, shape: &Shape, step: &StepShape) -> StepCosts {
        let Products::Hopper { tile, .. } = &self.products else { return StepCosts::default() };
        if self.batch_invariant {
            return StepCosts::default();
        }
        let product = |matrix: MatrixShape, epilogue, rows| {
            let (tiles, panels) = (matrix.tiles() as u32, matrix.panels() as u32);
            tile.microseconds(gemm_tile::Shape { tiles, panels, rows }, epilogue)
        };
        let head = product(shape.vocabulary_matrix(), Epilogue::Logits, step.running_max as u32);
        StepCosts::of(STREAM_ROWS_MAX as u32, step.rows_max() as u32, |rows| {
            let layer = product(shape.qkv(), Epilogue::Store, rows)
                + product(shape.output(), Epilogue::Residual, rows)
                + product(shape.gate_up(), Epilogue::GateUp, rows)
                + product(shape.down(), Epilogue::Residual, rows);
            (shape.layers as f64 * (layer + BESIDE_PRODUCTS_MICROSECONDS) + head) as f32
        })
    }

    /// The longer spans of a step as prefill takes them.
    pub fn cut(&self, spans: &[Span]) -> Vec<Span> {
        self.attention.cut(spans)
    }

    pub fn product(
        &self,
        device: &Device,
        epilogue: Epilogue,
        arguments: &GemmArguments,
        later: Option<&GemmArguments>,
    ) -> Result<(), DeviceError> {
        let rows = arguments.rows as usize;
        // SAFETY: the arguments come from `Forward`, whose buffers have the documented shapes and live as long as the
        // backend, which waits for the stream before it goes.
        unsafe {
            match &self.products {
                Products::Hopper { stream, .. } if rows <= STREAM_ROWS_MAX => {
                    stream.launch(device, epilogue, arguments, later)
                }
                Products::Hopper { stream, .. } if self.batch_invariant => {
                    (0..rows).step_by(STREAM_ROWS_MAX).try_for_each(|first| {
                        let run = run_of(epilogue, arguments, first, STREAM_ROWS_MAX);
                        stream.launch(device, epilogue, &run, None)
                    })
                }
                Products::Hopper { tile, .. } => tile.launch(device, epilogue, arguments),
                Products::Portable(portable) if self.batch_invariant => {
                    let fixed = GemmArguments { splits: 1, ..*arguments };
                    portable.launch(device, epilogue, &fixed)
                }
                Products::Portable(portable) => portable.launch(device, epilogue, arguments),
            }
        }
    }

    /// Attention of a step's rows: the longer spans, then those alone.
    pub fn attend(
        &self,
        device: &Device,
        rows: Rows,
        arguments: &AttentionArguments,
    ) -> Result<(), DeviceError> {
        if rows.prefill > 0 {
            self.rope_kv(device, rows, arguments)?;
            self.attend_longer(device, rows, arguments)?;
        }
        if rows.singles > 0 { self.attend_singles(device, rows, arguments) } else { Ok(()) }
    }

    /// RoPE of the longer spans, and their keys and values into pages.
    pub fn rope_kv(
        &self,
        device: &Device,
        rows: Rows,
        arguments: &AttentionArguments,
    ) -> Result<(), DeviceError> {
        // SAFETY: as in `product`; a slot occurs once in a step (it was checked), so nobody else writes its pages.
        unsafe { self.attention.rope_kv(device, &longer(rows, arguments)) }
    }

    pub fn attend_longer(
        &self,
        device: &Device,
        rows: Rows,
        arguments: &AttentionArguments,
    ) -> Result<(), DeviceError> {
        // SAFETY: as above.
        unsafe { self.attention.prefill(device, &longer(rows, arguments)) }
    }

    pub fn attend_singles(
        &self,
        device: &Device,
        rows: Rows,
        arguments: &AttentionArguments,
    ) -> Result<(), DeviceError> {
        let (heads, kv_heads) = (arguments.heads as usize, arguments.kv_heads as usize);
        let plan = self.attention.plan(rows.singles, heads, kv_heads);
        let decode = AttentionArguments { row_count: rows.singles as i32, ..*arguments };
        // SAFETY: as above.
        unsafe { self.attention.decode(device, &decode, plan) }
    }
}

fn longer(rows: Rows, arguments: &AttentionArguments) -> AttentionArguments {
    AttentionArguments {
        first_row: rows.singles as i32,
        row_count: rows.prefill as i32,
        span_count: rows.cuts as i32,
        ..*arguments
    }
}

/// Up to `rows` rows of a product from `first` on, which is a multiple of eight.
fn run_of(epilogue: Epilogue, whole: &GemmArguments, first: usize, rows: usize) -> GemmArguments {
    let moved = |out: usize| if whole.squares.is_null() { 0 } else { out };
    let run = GemmArguments {
        input: whole.input.add(first * PANEL),
        rows: (whole.rows - first as i32).min(rows as i32),
        squares: whole.squares.add(moved(first)),
        ..*whole
    };
    let stride = whole.out_stride as usize;
    match epilogue {
        Epilogue::Store => GemmArguments { out: whole.out.add(first * stride), ..run },
        Epilogue::Residual => GemmArguments {
            out: whole.out.add(first * stride),
            normed: whole.normed.add(first * PANEL),
            squares_out: whole.squares_out.add(first),
            ..run
        },
        Epilogue::GateUp => GemmArguments { out: whole.out.add(first * PANEL), ..run },
        Epilogue::Logits => {
            let kept = if whole.logits.is_null() { 0 } else { first * stride };
            let best = whole.best.add(first * whole.tiles as usize);
            GemmArguments { logits: whole.logits.add(kept), best, ..run }
        }
    }
}

/// The most that any product of a step asks for: bytes of partial sums, and counters.
fn portable_workspace(card: Card, shape: &Shape, step: &StepShape) -> (usize, usize) {
    let card = gemm_portable::Card::new(card.capability, card.processors);
    let matrices =
        [shape.qkv(), shape.output(), shape.gate_up(), shape.down(), shape.vocabulary_matrix()];
    let each = matrices.map(|matrix| {
        let (tiles, panels) = (matrix.tiles() as u32, matrix.panels() as u32);
        GemmPortable::workspace(card, step.rows_max() as u32, tiles, panels)
    });
    each.into_iter().fold((0, 0), |(p, c), (partials, counters)| (p.max(partials), c.max(counters)))
}
