//! A weight matrix, packed once at load for the products of every step. `[out, in]` as checkpoints store it becomes
//! panels of 32 outputs, `[panel][in][32]`: one step along the inner length is two vectors read in order, for one row
//! of input as for five hundred, and nothing is packed again at run time.

use half::f16;
use plimsoll_contract::abilities::Dtype;
use rayon::prelude::*;

use super::buffer::Buffer;
use super::simd::{Cell, Kernel, Product, Vector, run};
use crate::model::{LoadError, TensorView};

/// Outputs in a panel.
const PANEL: usize = 32;
/// Inner length over which a panel stays in the second-level cache.
const INNER_BLOCK: usize = 1024;
/// Multiplications below which a second thread costs more than it brings.
const PARALLEL_FROM: usize = 64 * 1024;

#[derive(Debug)]
enum Panels {
    F32(Buffer<f32>),
    F16(Buffer<f16>),
}

#[derive(Debug)]
pub struct Matrix {
    pub outer: usize,
    pub inner: usize,
    panels: Panels,
}

impl Matrix {
    /// Packs the rows of `parts` one below the other, so that one product serves several projections.
    pub fn pack(parts: &[TensorView], dtype: Dtype) -> Result<Matrix, LoadError> {
        let inner = parts[0].columns();
        assert!(parts.iter().all(|part| part.columns() == inner), "parts share their input");
        let outer = parts.iter().map(TensorView::rows).sum::<usize>();
        let panels = match dtype {
            Dtype::F32 => Panels::F32(packed(parts, outer, inner)?),
            Dtype::F16 => Panels::F16(packed(parts, outer, inner)?),
            Dtype::Bf16 => unreachable!("ABILITIES names no bf16 for the CPU"),
        };
        Ok(Matrix { outer, inner, panels })
    }

    /// `out += x · matrixᵀ`. `x` `[rows, inner]`, `out` `[rows, outer]`.
    pub fn multiply_add(&self, x: &[f32], out: &mut [f32]) {
        match &self.panels {
            Panels::F32(panels) => multiply_add(self, panels.as_slice(), x, out),
            Panels::F16(panels) => multiply_add(self, panels.as_slice(), x, out),
        }
    }

    /// One output's weights: a row of `[out, in]`, such as a token's embedding. `out` `[inner]`.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.outer, "the row exists");
        match &self.panels {
            Panels::F32(panels) => row(self, panels.as_slice(), index, out),
            Panels::F16(panels) => row(self, panels.as_slice(), index, out),
        }
    }
}

fn packed<C: Cell>(
    parts: &[TensorView],
    outer: usize,
    inner: usize,
) -> Result<Buffer<C>, LoadError> {
    let mut buffer = Buffer::zeroed(outer.div_ceil(PANEL) * PANEL * inner, "weights")?;
    buffer.prefer_huge_pages();
    let panels = buffer.as_mut_slice().par_chunks_exact_mut((PANEL * inner).max(1));
    panels.enumerate().for_each(|(index, panel)| {
        let mut row = vec![0.0; inner];
        for lane in 0..PANEL.min(outer - index * PANEL) {
            let mut wanted = index * PANEL + lane;
            for part in parts {
                if wanted < part.rows() {
                    part.read_row(wanted, &mut row);
                    break;
                }
                wanted -= part.rows();
            }
            for (cells, &x) in panel.chunks_exact_mut(PANEL).zip(&row) {
                cells[lane] = C::from_f32(x);
            }
        }
    });
    Ok(buffer)
}

fn row<C: Cell>(matrix: &Matrix, panels: &[C], index: usize, out: &mut [f32]) {
    let panel = &panels[index / PANEL * PANEL * matrix.inner..][..PANEL * matrix.inner];
    for (out, cells) in out.iter_mut().zip(panel.chunks_exact(PANEL)) {
        *out = cells[index % PANEL].to_f32();
    }
}

fn multiply_add<C: Cell>(matrix: &Matrix, panels: &[C], x: &[f32], out: &mut [f32]) {
    let Matrix { outer, inner, .. } = *matrix;
    let rows = x.len() / inner;
    assert_eq!(x.len(), rows * inner, "the input holds whole rows");
    assert_eq!(out.len(), rows * outer, "the output holds one row per row of input");
    let count = outer.div_ceil(PANEL);
    let target = Target(out.as_mut_ptr());
    let columns = |first: usize, last: usize| {
        let job = Columns { x, rows, inner, outer, panels, first, last, out: &target };
        // SAFETY: the sizes were checked above, and no two jobs share a panel.
        unsafe { run(job) }
    };
    let threads = rayon::current_num_threads();
    let work = rows * inner * outer;
    if threads == 1 || work < PARALLEL_FROM {
        return columns(0, count);
    }
    // Small products are cut once per thread; large ones finer, so that a thread that is held up does not hold the rest.
    let jobs = if work < 64 * PARALLEL_FROM { threads } else { 4 * threads }.min(count);
    (0..jobs).into_par_iter().with_max_len(1).for_each(|job| {
        columns(job * count / jobs, (job + 1) * count / jobs);
    });
}

/// The output, shared by jobs that each write columns of their own.
struct Target(*mut f32);
// SAFETY: jobs write disjoint columns; the slice behind the pointer is borrowed uniquely until all are done.
unsafe impl Sync for Target {}

/// Panels `first..last`, for all rows.
struct Columns<'a, C> {
    x: &'a [f32],
    rows: usize,
    inner: usize,
    outer: usize,
    panels: &'a [C],
    first: usize,
    last: usize,
    out: &'a Target,
}

impl<C: Cell> Kernel for Columns<'_, C> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Columns { x, rows, inner, outer, panels, first, last, out } = self;
        for panel in first..last {
            for from in (0..inner).step_by(INNER_BLOCK) {
                let weights = &panels[(panel * inner + from) * PANEL..];
                // SAFETY: panel < ⌈outer / 32⌉ and from < inner, so x, weights and out hold the product's shape.
                unsafe {
                    Product {
                        x: x.as_ptr().add(from),
                        x_stride: inner,
                        rows,
                        w: weights.as_ptr(),
                        w_stride: PANEL,
                        inner: INNER_BLOCK.min(inner - from),
                        width: PANEL.min(outer - panel * PANEL),
                        out: out.0.add(panel * PANEL),
                        out_stride: outer,
                    }
                    .run::<V>();
                }
            }
        }
    }
}
