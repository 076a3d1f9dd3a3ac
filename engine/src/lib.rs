//! Plimsoll's inference engine. Modules in the order a request meets them.

pub mod cli;
pub mod exit;
pub mod logs;
pub mod serve;

pub mod http;

pub mod chat_template;
pub mod tokenizer;

pub mod admission;
pub mod request;

pub mod kv_cache;
pub mod metrics;
pub mod scheduler;
pub mod step;

pub mod backend;
pub mod batch;

pub mod stream;

pub mod bench;
pub mod fetch;
pub mod inspect;
pub mod memory;
pub mod model;
