//! The matrix products as the device fuses them: the norm before, the bias, and what happens to the sums.
//!
//! The device multiplies by a norm's gain where the residual stream is written and divides by the root of the mean
//! square where the product ends, so the input of a normed product is `residual · gain` and comes with the sums of
//! squares of each 64 features of `residual`. Where the device stores bf16 and goes on with what it stored, so does
//! this.

use half::bf16;

use super::activation::silu;
use super::linear::dot;
use crate::layout::TILE_ROWS;

/// A product before its epilogue: `(input · weightᵀ) · scale + bias`.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// `[rows, inner]`, times the norm's gain where there is a norm.
    pub input: &'a [f32],
    pub inner: usize,
    /// `[outer, inner]` in the checkpoint's order; of a gated product gate's rows before those of up.
    pub weight: &'a [f32],
    /// `[outer]`.
    pub bias: Option<&'a [f32]>,
    pub norm: Option<Norm<'a>>,
}

/// The root-mean-square norm whose division is left to the product.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// Sums of squares before the norm, `[tiles, rows]`.
    pub squares: &'a [f32],
    /// Elements of a row.
    pub width: f32,
    pub eps: f32,
}

/// What a product leaves that adds to the residual stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Residual {
    /// `[rows, outer]`, in bf16.
    pub residual: Vec<f32>,
    /// `residual · gain`, `[rows, outer]`, in bf16.
    pub normed: Vec<f32>,
    /// Sums of squares of each 64 features, `[outer / 64, rows]`.
    pub squares: Vec<f32>,
}

/// What a product with the head leaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    /// `[rows, outer]`.
    pub logits: Vec<f32>,
    /// The largest of each 64 features and its feature, the lowest among equals; `[rows, outer / 64]`.
    pub best: Vec<(f32, u32)>,
}

impl Norm<'_> {
    /// What the sums of each row are multiplied by.
    #[must_use]
    pub fn scales(&self, rows: usize) -> Vec<f64> {
        assert_eq!(self.squares.len() % rows, 0, "every tile has a sum for each row");
        let mean = |row: usize| {
            let tiles = self.squares.iter().skip(row).step_by(rows);
            tiles.map(|&sum| f64::from(sum)).sum::<f64>() / f64::from(self.width)
        };
        (0..rows).map(|row| (mean(row) + f64::from(self.eps)).sqrt().recip()).collect()
    }
}

impl Product<'_> {
    fn rows(&self) -> usize {
        assert_eq!(self.input.len() % self.inner, 0, "the input holds whole rows");
        self.input.len() / self.inner
    }

    fn outer(&self) -> usize {
        assert_eq!(self.weight.len() % self.inner, 0, "the weight holds whole rows");
        self.weight.len() / self.inner
    }

    /// `[rows, outer]`.
    #[must_use]
    pub fn sums(&self) -> Vec<f64> {
        let (rows, outer) = (self.rows(), self.outer());
        assert!(self.bias.is_none_or(|bias| bias.len() == outer), "one bias per output");
        let scales = self.norm.map_or_else(|| vec![1.0; rows], |norm| norm.scales(rows));
        let mut sums = Vec::with_capacity(rows * outer);
        for (x, scale) in self.input.chunks_exact(self.inner).zip(scales) {
            for (column, row) in self.weight.chunks_exact(self.inner).enumerate() {
                let bias = self.bias.map_or(0.0, |bias| f64::from(bias[column]));
                sums.push(dot(x, row) * scale + bias);
            }
        }
        sums
    }

    /// `[rows, outer]`, not yet rounded to bf16.
    #[must_use]
    pub fn store(&self) -> Vec<f32> {
        self.sums().into_iter().map(|sum| sum as f32).collect()
    }

    /// `silu(gate) · up`, `[rows, outer / 2]`, not yet rounded to bf16.
    #[must_use]
    pub fn gate_up(&self) -> Vec<f32> {
        let features = self.outer() / 2;
        let rows = self.sums();
        let gated = rows.chunks_exact(2 * features).flat_map(|row| {
            let (gate, up) = row.split_at(features);
            gate.iter().zip(up).map(|(&gate, &up)| silu(gate as f32) * up as f32)
        });
        gated.collect()
    }

    /// Added to `residual` `[rows, outer]`; `gain` `[outer]` is the next norm's.
    #[must_use]
    pub fn residual(&self, residual: &[f32], gain: &[f32]) -> Residual {
        let (rows, outer) = (self.rows(), self.outer());
        assert!(self.norm.is_none(), "what adds to the residual stream is not normed");
        assert_eq!(gain.len(), outer, "one gain per feature");
        let round = |x: f64| bf16::from_f64(x).to_f32();
        let sums = self.sums();
        let residual: Vec<f32> =
            residual.iter().zip(&sums).map(|(&old, &sum)| round(f64::from(old) + sum)).collect();
        let gains = gain.iter().cycle();
        let normed = residual.iter().zip(gains).map(|(&x, &gain)| round(f64::from(x * gain)));
        let tiles = outer.div_ceil(TILE_ROWS);
        let mut squares = vec![0.0; tiles * rows];
        for (row, values) in residual.chunks_exact(outer).enumerate() {
            for (tile, values) in values.chunks(TILE_ROWS).enumerate() {
                squares[tile * rows + row] = dot(values, values) as f32;
            }
        }
        Residual { normed: normed.collect(), squares, residual }
    }

    #[must_use]
    pub fn logits(&self) -> Logits {
        let logits = self.store();
        let rows = logits.chunks_exact(self.outer());
        let best = rows.flat_map(|row| row.chunks(TILE_ROWS).enumerate().map(best_of_tile));
        Logits { best: best.collect(), logits }
    }
}

fn best_of_tile((tile, logits): (usize, &[f32])) -> (f32, u32) {
    let first = (tile * TILE_ROWS) as u32;
    let mut best = (f32::NEG_INFINITY, first);
    for (&logit, feature) in logits.iter().zip(first..) {
        if logit > best.0 {
            best = (logit, feature);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    // Two rows of two, three outputs: sums are [[1, 2, 3], [3, 4, 7]] before scale and bias.
    const PLAIN: Product = Product {
        input: &[1.0, 2.0, 3.0, 4.0],
        inner: 2,
        weight: &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0],
        bias: None,
        norm: None,
    };

    #[test]
    fn the_norm_divides_each_row_by_its_own_root_and_the_bias_comes_after() {
        // Row 0: (3 + 5) / 2 = 4; row 1: (10 + 22) / 2 = 16.
        let norm = Norm { squares: &[3.0, 10.0, 5.0, 22.0], width: 2.0, eps: 0.0 };
        let product = Product { norm: Some(norm), bias: Some(&[1.0, 0.0, -1.0]), ..PLAIN };
        assert_eq!(product.store(), [1.5, 1.0, 0.5, 1.75, 1.0, 0.75]);
    }

    #[test]
    fn the_residual_is_rounded_once_and_the_norm_sees_what_was_stored() {
        // 256 + 1 is between two bf16 numbers and goes to the even one.
        let left = PLAIN.residual(&[256.0, 0.0, 0.0, 0.0, 0.0, 0.0], &[1.0, 2.0, 3.0]);
        assert_eq!(left.residual, [256.0, 2.0, 3.0, 3.0, 4.0, 7.0]);
        assert_eq!(left.normed, [256.0, 4.0, 9.0, 3.0, 8.0, 21.0]);
        assert_eq!(left.squares, [65_536.0 + 4.0 + 9.0, 9.0 + 16.0 + 49.0]);
    }

    #[test]
    fn gate_and_up_are_halves_of_the_outputs() {
        let product = Product { weight: &[40.0, 0.0, 0.0, 1.0], ..PLAIN };
        assert_eq!(product.gate_up(), [80.0, 480.0]);
    }

    #[test]
    fn the_best_of_a_tile_is_the_first_of_the_largest() {
        let mut weight = vec![0.0; 66];
        (weight[3], weight[5], weight[65]) = (2.0, 2.0, -1.0);
        let product = Product { input: &[1.0], inner: 1, weight: &weight, ..PLAIN };
        assert_eq!(product.logits().best, [(2.0, 3), (0.0, 64)]);
    }
}
