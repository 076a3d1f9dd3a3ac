//! The engine from its socket to its step loop, over a scripted backend (a crowd meets the real one): what a client
//! sees, what a drain promises, and what a crowd of rude clients leaves behind.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

mod answers;
mod bench;
mod bodies;
mod crowd;
mod dice;
mod drain;
#[path = "../process/mod.rs"]
mod process;
mod templates;
mod world;
