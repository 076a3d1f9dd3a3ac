//! Matrix products with their epilogues: which kernel takes which shape, and its grid.

use half::bf16;

use crate::device::Pointer;

/// A token's largest logit within a tile of 64 features.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Best {
    pub logit: f32,
    pub token: u32,
}

/// Mirrors `GemmArguments` of `cuda/gemm.cuh`, where each field is documented.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GemmArguments {
    pub weights: Pointer<bf16>,
    pub input: Pointer<bf16>,
    pub rows: i32,
    pub rows_max: i32,
    pub tiles: i32,
    pub panels: i32,
    pub features: i32,
    pub splits: i32,
    pub squares: Pointer<f32>,
    pub square_tiles: i32,
    pub width: f32,
    pub eps: f32,
    pub bias: Pointer<bf16>,
    pub out: Pointer<bf16>,
    pub out_stride: i32,
    pub logits: Pointer<f32>,
    pub gain: Pointer<bf16>,
    pub normed: Pointer<bf16>,
    pub squares_out: Pointer<f32>,
    pub best: Pointer<Best>,
    pub partials: Pointer<f32>,
    pub counters: Pointer<i32>,
}

/// What happens to a product's sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Written row-major.
    Store,
    /// Added to the residual stream, which also leaves multiplied by the next norm's gain.
    Residual,
    /// `silu(gate) · up`.
    GateUp,
    /// Written in f32, with each tile's largest.
    Logits,
}

impl Epilogue {
    pub const ALL: [Self; 4] = [Self::Store, Self::Residual, Self::GateUp, Self::Logits];
}

#[cfg(test)]
crate::mirrors::mirrors! {
    "gemm.cuh":
    GemmArguments {
        weights, input, rows, rows_max, tiles, panels, features, splits, squares, square_tiles,
        width, eps, bias, out, out_stride, logits, gain, normed, squares_out, best, partials,
        counters,
    }
    Best as "float2" { logit as "x", token as "y" }
}
