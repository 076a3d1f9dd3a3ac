//! Attention that reads keys and values in their pages. Work is cut into blocks of queries that share a KV head; each
//! block walks the pages it sees with a running maximum and sum (Milakov and Gimelshein 2018), so that no row of scores
//! is ever held whole. One path serves decode and prefill.

use plimsoll_kernels::reference::attention::{Half, PAGE_TOKENS, PageShape};
use rayon::prelude::*;

use super::pages::LayerPages;
use super::simd::{Cell, Kernel, LANES, Product, Vector, exp, run};
use crate::batch::PageId;
use crate::model::{Attention, Sight};

/// Query vectors in a block: enough to use a key many times, few enough for the first-level cache.
const QUERIES_MAX: usize = 32;
/// Products of query and key below which a second thread costs more than it brings.
const PARALLEL_FROM: usize = 64 * 1024;

/// One span's rows.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// First row within the step, and how many.
    pub first: usize,
    pub count: usize,
    /// Position of the first row.
    pub position: usize,
    pub table: &'a [PageId],
}

/// Up to [`QUERIES_MAX`] query vectors: `rows` × `heads` that share `kv_head`.
#[derive(Clone, Copy, Debug)]
struct Block<'a> {
    first_row: usize,
    rows: usize,
    position: usize,
    /// Positions that were written by now.
    written: usize,
    table: &'a [PageId],
    kv_head: usize,
    first_head: usize,
    heads: usize,
}

/// `out = softmax(scale · q·kᵀ) · v` for all rows of a step, whose keys and values are in the pages already.
///
/// `qkv` `[rows, width]` with the queries first, `out` `[rows, heads · head_dim]`.
pub fn attend(
    attention: &Attention,
    pages: &LayerPages,
    spans: &[Rows],
    qkv: &[f32],
    width: usize,
    out: &mut [f32],
) {
    match pages {
        LayerPages::F32(cells) => attend_cells(attention, cells.as_slice(), spans, qkv, width, out),
        LayerPages::F16(cells) => attend_cells(attention, cells.as_slice(), spans, qkv, width, out),
    }
}

fn attend_cells<C: Cell>(
    attention: &Attention,
    cells: &[C],
    spans: &[Rows],
    qkv: &[f32],
    width: usize,
    out: &mut [f32],
) {
    let blocks = blocks(attention, spans);
    let target = Target(out.as_mut_ptr());
    let all = |blocks: &[Block]| {
        let mut scratch = Scratch::new(attention.head_dim);
        for &block in blocks {
            let job = Job { attention, cells, qkv, width, block, out: &target };
            // SAFETY: blocks lie within the step's rows and heads, their tables name pages of the pool, and no two of
            // them share an output.
            unsafe { run(Run { job, scratch: &mut scratch }) }
        }
    };
    let seen = |block: &Block| block.rows * block.heads * block.written;
    let work = blocks.iter().map(seen).sum::<usize>() * attention.head_dim;
    if work < PARALLEL_FROM {
        return all(&blocks);
    }
    let run_len = blocks.len().div_ceil(8 * rayon::current_num_threads());
    blocks.par_chunks(run_len).for_each(all);
}

fn blocks<'a>(attention: &Attention, spans: &[Rows<'a>]) -> Vec<Block<'a>> {
    let group = attention.heads / attention.kv_heads;
    let heads = group.min(QUERIES_MAX);
    let rows = (QUERIES_MAX / heads).max(1);
    let mut blocks = Vec::new();
    for span in spans {
        for row in (0..span.count).step_by(rows) {
            for kv_head in 0..attention.kv_heads {
                for head in (0..group).step_by(heads) {
                    blocks.push(Block {
                        first_row: span.first + row,
                        rows: rows.min(span.count - row),
                        position: span.position + row,
                        written: span.position + span.count,
                        table: span.table,
                        kv_head,
                        first_head: kv_head * group + head,
                        heads: heads.min(group - head),
                    });
                }
            }
        }
    }
    blocks
}

/// The output, shared by blocks that each write rows and heads of their own.
struct Target(*mut f32);
// SAFETY: blocks write disjoint ranges; the slice behind the pointer is borrowed uniquely until all are done.
unsafe impl Sync for Target {}

struct Job<'a, C> {
    attention: &'a Attention,
    cells: &'a [C],
    qkv: &'a [f32],
    width: usize,
    block: Block<'a>,
    out: &'a Target,
}

/// What one thread needs for a block after another.
struct Scratch {
    /// Scaled queries, `[QUERIES_MAX, head_dim]`.
    queries: Vec<f32>,
    /// Shares times values so far, `[QUERIES_MAX, head_dim]`.
    sums: Vec<f32>,
    /// Of one page, `[QUERIES_MAX, 64]`.
    scores: Vec<f32>,
    running: Running,
}

/// Running softmax of one block.
struct Running {
    max: [f32; QUERIES_MAX],
    sum: [f32; QUERIES_MAX],
}

impl Scratch {
    fn new(dim: usize) -> Scratch {
        Scratch {
            queries: vec![0.0; QUERIES_MAX * dim],
            sums: vec![0.0; QUERIES_MAX * dim],
            scores: vec![0.0; QUERIES_MAX * PAGE_TOKENS],
            running: Running { max: [0.0; QUERIES_MAX], sum: [0.0; QUERIES_MAX] },
        }
    }
}

struct Run<'a, C> {
    job: Job<'a, C>,
    scratch: &'a mut Scratch,
}

impl<C: Cell> Kernel for Run<'_, C> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Scratch { queries, sums, scores, running } = self.scratch;
        let job = self.job;
        let Job { attention, block, .. } = job;
        let dim = attention.head_dim;
        let shape = PageShape { kv_heads: attention.kv_heads, head_dim: dim };
        let count = block.rows * block.heads;
        *running = Running { max: [f32::NEG_INFINITY; QUERIES_MAX], sum: [0.0; QUERIES_MAX] };
        sums[..count * dim].fill(0.0);
        job.gather(queries);
        let last = block.position + block.rows - 1;
        let start = attention.sight.visible(block.position).start;
        let end = attention.sight.visible(last).end.min(block.written);
        for page in start / PAGE_TOKENS..end.div_ceil(PAGE_TOKENS) {
            let base = page * PAGE_TOKENS;
            let low = start.saturating_sub(base);
            let high = (end - base).min(PAGE_TOKENS);
            let columns = low / LANES * LANES..high.next_multiple_of(LANES);
            let keys = shape.block(block.table[page].0, Half::Keys, block.kv_head);
            let values = shape.block(block.table[page].0, Half::Values, block.kv_head);
            for row in scores.chunks_exact_mut(PAGE_TOKENS).take(count) {
                row.fill(0.0);
            }
            // SAFETY: keys are `[dim, 64]` from `keys` on, values `[64, dim]` from `values` on; columns end at 64.
            unsafe {
                Product {
                    x: queries.as_ptr(),
                    x_stride: dim,
                    rows: count,
                    w: job.cells[keys + columns.start..].as_ptr(),
                    w_stride: PAGE_TOKENS,
                    inner: dim,
                    width: columns.len(),
                    out: scores.as_mut_ptr().add(columns.start),
                    out_stride: PAGE_TOKENS,
                }
                .run::<V>();
            }
            job.soften(base, &columns, scores, running, sums);
            // SAFETY: as above; only positions that were written are read.
            unsafe {
                Product {
                    x: scores.as_ptr().add(low),
                    x_stride: PAGE_TOKENS,
                    rows: count,
                    w: job.cells[values + low * dim..].as_ptr(),
                    w_stride: dim,
                    inner: high - low,
                    width: dim,
                    out: sums.as_mut_ptr(),
                    out_stride: dim,
                }
                .run::<V>();
            }
        }
        // SAFETY: rows and heads of this block are its own.
        unsafe { job.store(running, sums) }
    }
}

impl<C: Cell> Job<'_, C> {
    /// The block's queries, scaled. `queries` `[rows · heads, head_dim]`.
    #[inline(always)]
    fn gather(&self, queries: &mut [f32]) {
        let dim = self.attention.head_dim;
        let size = self.block.heads * dim;
        for (row, queries) in queries.chunks_exact_mut(size).take(self.block.rows).enumerate() {
            let at = (self.block.first_row + row) * self.width + self.block.first_head * dim;
            for (query, &x) in queries.iter_mut().zip(&self.qkv[at..at + size]) {
                *query = x * self.attention.scale;
            }
        }
    }

    /// Scores become shares relative to the running maximum; what was summed so far is scaled to a new maximum.
    #[inline(always)]
    fn soften(
        &self,
        base: usize,
        columns: &std::ops::Range<usize>,
        scores: &mut [f32],
        running: &mut Running,
        sums: &mut [f32],
    ) {
        let Block { rows, heads, position, written, .. } = self.block;
        let dim = self.attention.head_dim;
        for query in 0..rows * heads {
            let seen = visible(self.attention.sight, position + query / heads, written);
            let row = &mut scores[query * PAGE_TOKENS..(query + 1) * PAGE_TOKENS];
            let first = seen.start.saturating_sub(base).min(PAGE_TOKENS);
            let last = seen.end.saturating_sub(base).min(PAGE_TOKENS).max(first);
            row[..first].fill(f32::NEG_INFINITY);
            row[last..].fill(f32::NEG_INFINITY);
            let row = &mut row[columns.clone()];
            let max = maximum(row).max(running.max[query]);
            if max == f32::NEG_INFINITY {
                row.fill(0.0);
                continue;
            }
            let shrink = exp(running.max[query] - max);
            running.max[query] = max;
            running.sum[query] = running.sum[query] * shrink + shares(row, max);
            if shrink != 1.0 {
                for sum in &mut sums[query * dim..(query + 1) * dim] {
                    *sum *= shrink;
                }
            }
        }
    }

    /// # Safety
    /// No other block writes these rows and heads.
    #[inline(always)]
    unsafe fn store(&self, running: &Running, sums: &[f32]) {
        let Block { first_row, rows, first_head, heads, .. } = self.block;
        let dim = self.attention.head_dim;
        for query in 0..rows * heads {
            let (row, head) = (first_row + query / heads, first_head + query % heads);
            let at = (row * self.attention.heads + head) * dim;
            // SAFETY: the output is `[rows, heads, dim]`, and this vector belongs to this block alone.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.0.add(at), dim) };
            let scale = 1.0 / running.sum[query];
            for (out, sum) in out.iter_mut().zip(&sums[query * dim..(query + 1) * dim]) {
                *out = sum * scale;
            }
        }
    }
}

#[inline(always)]
fn visible(sight: Sight, position: usize, written: usize) -> std::ops::Range<usize> {
    let seen = sight.visible(position);
    seen.start..seen.end.min(written)
}

/// The largest of a row of whole vectors.
#[inline(always)]
fn maximum(row: &[f32]) -> f32 {
    let mut max = [f32::NEG_INFINITY; LANES];
    for chunk in row.as_chunks::<LANES>().0 {
        for (max, &x) in max.iter_mut().zip(chunk) {
            *max = if x > *max { x } else { *max };
        }
    }
    max.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// `row = e^(row − max)`, and its sum.
#[inline(always)]
fn shares(row: &mut [f32], max: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    for chunk in row.as_chunks_mut::<LANES>().0 {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *x = exp(*x - max);
            *sum += *x;
        }
    }
    sums.iter().sum()
}
