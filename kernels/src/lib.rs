//! Every op the models need, twice: in CUDA for the device, and in plain Rust as the truth that the
//! CUDA is measured against.
//!
//! Enters: slices, and pointers into device memory. Leaves: the same. What never happens here: a
//! request, a scheduler, a file format.

pub use half;

pub mod cuda;
pub mod device;
pub mod layout;
#[cfg(test)]
pub(crate) mod mirrors;
pub mod ops;
pub mod reference;
