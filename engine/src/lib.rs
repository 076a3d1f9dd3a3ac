//! Plimsoll's inference engine. Modules in the order a request meets them.

pub mod backend;
pub mod batch;
pub mod kv_cache;
pub mod metrics;
pub mod request;
pub mod scheduler;
pub mod step;
