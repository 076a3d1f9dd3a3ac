//! The launches: one file per op, in which a struct that mirrors the kernel's parameter meets the shape
//! of its grid. Enters: pointers and shapes, checked here. Leaves: a queued kernel.

pub mod attention;
pub mod gemm;
pub mod gemm_portable;
pub mod gemm_stream;
pub mod gemm_tile;
pub mod sampling;
pub mod stage;
pub mod step;
pub mod weights;
