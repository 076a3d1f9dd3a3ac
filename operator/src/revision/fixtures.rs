//! A plan and a revision for tests, as small as they may be; what a test is about lies over them.

use plimsoll_crds::PlanStatus;
use serde_json::{Value, json};

use super::{Content, Revision};
use crate::fields::overlay;

fn least_plan() -> Value {
    json!({
        "hash": "p", "quantization": "None", "dtype": "F32", "tensorParallel": 1, "accelerator": "cpu",
        "cache": {"strategy": "Dynamic", "dtype": "F32", "tokens": 64}, "contextTokens": 64, "concurrency": 1,
        "memoryBytes": {"weights": 1, "kv": 1, "workspace": 1, "process": 1, "total": 4, "capacity": 9},
        "why": "it fits",
    })
}

pub fn plan(over: &Value) -> PlanStatus {
    let mut whole = least_plan();
    overlay(&mut whole, over);
    serde_json::from_value(whole).unwrap()
}

pub fn content(over: &Value) -> Content {
    let mut whole = json!({
        "templateVersion": 1, "specDigest": "d", "modelKey": "k", "sharedDownload": false,
        "model": {"family": "llama", "parameters": 1, "contextTokens": 2048}, "plan": least_plan(), "podTemplate": {},
    });
    overlay(&mut whole, over);
    serde_json::from_value(whole).unwrap()
}

/// Of the object `assistant`.
pub fn revision(hash: &str, over: &Value) -> Revision {
    let name = format!("assistant-{hash}");
    Revision { name, hash: hash.to_owned(), number: 1, content: content(over) }
}
