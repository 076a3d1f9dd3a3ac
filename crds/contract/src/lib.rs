//! What operator and engine agree on, and nothing else: model facts, flags, exit reasons, metric names, memory arithmetic,
//! and the table of what the engine can run. Only serde; no client, no device, no clock.

pub mod abilities;
pub mod exit;
pub mod facts;
pub mod flags;
pub mod memory;
pub mod metrics;
