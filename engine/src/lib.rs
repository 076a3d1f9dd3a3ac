//! Plimsoll's inference engine. Modules in the order a request meets them.

pub mod backend;
pub mod batch;
pub mod inspect;
pub mod kv_cache;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod request;
pub mod scheduler;
pub mod step;
