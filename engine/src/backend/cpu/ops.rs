//! The ops between the products, each over rows of a step: norm, rotation, gate. Enters and leaves: slices.

use plimsoll_kernels::reference::rope::rotate;
use rayon::prelude::*;

use super::simd::{Kernel, LANES, Vector, exp, run};

/// Elements below which a second thread costs more than it brings.
const PARALLEL_FROM: usize = 32 * 1024;

/// `out = x / rms(x) · weight`, row by row. `x` and `out` `[rows, width]`, `weight` `[width]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "the output is as large as the input");
    let width = weight.len();
    by_rows(out, width, |first, out| {
        let x = &x[first * width..first * width + out.len()];
        // SAFETY: the kernel promises nothing beyond its slices.
        unsafe { run(RmsNorm { x, weight, eps, out }) };
    });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let width = self.weight.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let scale = inverse_rms(x, self.eps);
            for ((out, &x), &weight) in out.iter_mut().zip(x).zip(self.weight) {
                *out = x * scale * weight;
            }
        }
    }
}

#[inline(always)]
fn inverse_rms(row: &[f32], eps: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (whole, rest) = row.as_chunks::<LANES>();
    for chunk in whole {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    let squares = sums.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
    1.0 / (squares / row.len() as f32 + eps).sqrt()
}

/// Each head of `heads` normalised by itself, in place. `heads` `[.., head_dim]`, `weight` `[head_dim]`.
pub fn head_norm(heads: &mut [f32], weight: &[f32], eps: f32) {
    for head in heads.chunks_exact_mut(weight.len()) {
        let scale = inverse_rms(head, eps);
        for (x, &weight) in head.iter_mut().zip(weight) {
            *x *= scale * weight;
        }
    }
}

/// What happens to queries and keys between projection and attention.
pub struct Prepare<'a> {
    /// Columns of queries, and of keys after them.
    pub queries: usize,
    pub keys: usize,
    pub head_dim: usize,
    pub query_norm: Option<&'a [f32]>,
    pub key_norm: Option<&'a [f32]>,
    pub eps: f32,
    /// `[rows, head_dim / 2]` each.
    pub cos: &'a [f32],
    pub sin: &'a [f32],
}

/// Norm (where the model has it) and rotation of queries and keys, in place. `qkv` `[rows, width]`.
pub fn prepare(qkv: &mut [f32], width: usize, by: &Prepare) {
    let pairs = by.head_dim / 2;
    by_rows(qkv, width, |first, rows| {
        for (row, qkv) in rows.chunks_exact_mut(width).enumerate() {
            let (queries, rest) = qkv.split_at_mut(by.queries);
            let keys = &mut rest[..by.keys];
            if let Some(weight) = by.query_norm {
                head_norm(queries, weight, by.eps);
            }
            if let Some(weight) = by.key_norm {
                head_norm(keys, weight, by.eps);
            }
            let at = (first + row) * pairs..(first + row + 1) * pairs;
            let (cos, sin) = (&by.cos[at.clone()], &by.sin[at]);
            rotate(queries, by.head_dim, cos, sin);
            rotate(keys, by.head_dim, cos, sin);
        }
    });
}

/// `out = silu(gate) · up`. `gate_up` `[rows, 2 · width]` with the gate first, `out` `[rows, width]`.
pub fn silu_mul(gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len(), "gate and up for every output");
    by_rows(out, width, |first, out| {
        let gate_up = &gate_up[2 * first * width..2 * first * width + 2 * out.len()];
        // SAFETY: the kernel promises nothing beyond its slices.
        unsafe { run(SiluMul { gate_up, width, out }) };
    });
}

struct SiluMul<'a> {
    gate_up: &'a [f32],
    width: usize,
    out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let rows = self.gate_up.chunks_exact(2 * self.width);
        for (row, out) in rows.zip(self.out.chunks_exact_mut(self.width)) {
            let (gate, up) = row.split_at(self.width);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        }
    }
}

/// Every row of `out` becomes the bias, or zero: what a product is added to. `out` `[rows, width]`.
pub fn fill(out: &mut [f32], bias: Option<&[f32]>) {
    match bias {
        None => out.fill(0.0),
        Some(bias) => out.chunks_exact_mut(bias.len()).for_each(|row| row.copy_from_slice(bias)),
    }
}

/// Adds a bias to every row. `x` `[rows, width]`.
pub fn add_bias(x: &mut [f32], bias: &[f32]) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (x, bias) in row.iter_mut().zip(bias) {
            *x += bias;
        }
    }
}

/// Hands runs of whole rows (the first row's number with them) to all threads, or to this one where there is little.
fn by_rows(x: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = x.len() / width;
    let threads = rayon::current_num_threads();
    if threads == 1 || x.len() < PARALLEL_FROM {
        return work(0, x);
    }
    let run = rows.div_ceil(2 * threads);
    x.par_chunks_mut(run * width).enumerate().for_each(|(i, chunk)| work(i * run, chunk));
}

#[cfg(test)]
mod tests {
    use plimsoll_kernels::reference::random::uniform;
    use plimsoll_kernels::reference::{activation, norm};

    use super::*;

    fn noise(seed: u64, len: usize) -> Vec<f32> {
        (0..len as u64).map(|i| (uniform(seed, i) * 6.0 - 3.0) as f32).collect()
    }

    fn close(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() <= 2e-6 * want.abs().max(1.0), "{got} against {want}");
        }
    }

    #[test]
    fn norms_and_gate_agree_with_the_reference_for_few_rows_and_many() {
        for rows in [1, 3, 700] {
            let (x, weight) = (noise(1, rows * 70), noise(2, 70));
            let (mut got, mut want) = (vec![0.0; rows * 70], vec![0.0; rows * 70]);
            rms_norm(&x, &weight, 1e-5, &mut got);
            norm::rms_norm(&x, &weight, 1e-5, &mut want);
            close(&got, &want);

            let mut heads = x.clone();
            head_norm(&mut heads, &weight[..35], 1e-5);
            let mut want = x.clone();
            norm::qk_norm(&mut want, &weight[..35], 1e-5);
            close(&heads, &want);

            let gate_up = noise(3, rows * 140);
            silu_mul(&gate_up, 70, &mut got);
            for row in 0..rows {
                let (gate, up) = gate_up[row * 140..(row + 1) * 140].split_at(70);
                let mut want = vec![0.0; 70];
                activation::silu_mul(gate, up, &mut want);
                close(&got[row * 70..(row + 1) * 70], &want);
            }
        }
    }
}
