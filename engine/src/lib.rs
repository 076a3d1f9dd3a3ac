//! Plimsoll's inference engine. Modules in the order a request meets them.

pub mod backend;
pub mod batch;
pub mod request;
