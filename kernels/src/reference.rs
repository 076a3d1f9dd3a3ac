//! The plain version of every op: `f32` slices in, `f32` slices out, sums in `f64`.
//!
//! This is the meaning of each op, written to be read. Sums run in `f64`, so that the error of the
//! reference is one rounding and a fast version is judged by its own error alone. Tensors are
//! row-major; each function states its shapes as `[outer, …, inner]`. A shape that does not fit is
//! a bug of the caller and panics with a sentence. Never here: threads, devices, allocation beyond
//! a scratch row, chance or time.

pub mod activation;
pub mod attention;
pub mod embedding;
pub mod linear;
pub mod norm;
pub mod product;
pub mod random;
pub mod rope;
pub mod sampling;
pub mod softmax;
