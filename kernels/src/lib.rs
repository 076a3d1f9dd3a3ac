//! Every op the models need, twice: in CUDA for the device, and in plain Rust as the truth that the
//! CUDA is measured against.
//!
//! Enters: slices. Leaves: slices. What never happens here: a request, a scheduler, a file format.

pub mod cuda;
pub mod launch;
pub mod reference;
