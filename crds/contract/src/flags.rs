//! The engine's flags that the operator sets, by verb: those `--help` lists under it, and it renders no others. What a
//! person alone sets is the engine's own business.

/// Flags of `serve` that spec and plan decide.
pub const SERVE: [&str; 13] = [
    "api-key-file",
    "context-tokens",
    "device",
    "drain-timeout",
    "dtype",
    "kv-tokens",
    "listen",
    "memory-bytes",
    "model",
    "no-prefix-reuse",
    "running-max",
    "served-name",
    "step-tokens-max",
];

/// Flags of `fetch`, as init containers and Jobs run it.
pub const FETCH: [&str; 3] = ["endpoint", "into", "token-file"];

/// Flags of `inspect`, as Jobs run it.
pub const INSPECT: [&str; 4] = ["endpoint", "json", "termination-message-file", "token-file"];

/// The environment variable in which a flag may come: `--endpoint`.
pub const ENDPOINT_VARIABLE: &str = "HF_ENDPOINT";
