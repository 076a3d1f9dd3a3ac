//! In: two plans as status writes them. Out: every value that differs, old → new, as status and events show it. Pure.
//! Sentences, what was rejected, and what the plan had to fit into are no values of a plan.

use std::collections::BTreeMap;

use plimsoll_crds::{CHANGES_MAX, PlanStatus};
use serde_json::Value;

use crate::plan::explain;

/// Of a plan's fields those that say how it came about.
const NO_VALUES: [&str; 5] = ["hash", "why", "rejected", "changed", "memoryBytes.capacity"];
const BYTES: &str = "memoryBytes.";

/// `cache.tokens: 65,536 → 32,768`, in the order of names; at most [`CHANGES_MAX`]. A value that the older plan does not
/// have was not written in its time, and is no change.
pub fn values(before: &PlanStatus, after: &PlanStatus) -> Vec<String> {
    let (before, after) = (flat(before), flat(after));
    let differs = |(name, old): (&String, &String)| {
        let new = after.get(name).map_or("none", String::as_str);
        (old != new).then(|| format!("{name}: {old} → {new}"))
    };
    before.iter().filter_map(differs).take(CHANGES_MAX).collect()
}

fn flat(plan: &PlanStatus) -> BTreeMap<String, String> {
    let mut leaves = BTreeMap::new();
    walk("", &serde_json::to_value(plan).expect("a plan is plain data"), &mut leaves);
    leaves
}

fn walk(name: &str, value: &Value, leaves: &mut BTreeMap<String, String>) {
    if NO_VALUES.contains(&name) {
        return;
    }
    let text = match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                let dot = if name.is_empty() { "" } else { "." };
                walk(&format!("{name}{dot}{field}"), value, leaves);
            }
            return;
        }
        Value::Number(number) => match number.as_u64() {
            Some(bytes) if name.starts_with(BYTES) => explain::bytes(bytes),
            Some(count) => explain::count(count),
            None => number.to_string(),
        },
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    leaves.insert(name.to_owned(), text);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::revision::fixtures;

    fn plan(over: Value) -> PlanStatus {
        let mut base = json!({
            "hash": "1", "cache": {"tokens": 65536}, "contextTokens": 2048, "concurrency": 32,
            "memoryBytes": {"weights": 1 << 30, "kv": 1 << 29, "total": 1 << 31},
        });
        crate::fields::overlay(&mut base, &over);
        fixtures::plan(&base)
    }

    #[test]
    fn every_value_that_differs_is_told_as_people_write_it() {
        let before = plan(json!({}));
        let after = plan(json!({
            "hash": "2", "why": "another", "accelerator": "nvidia-l4", "cache": {"tokens": 32768},
            "memoryBytes": {"kv": 1 << 28, "capacity": 4}, "stepTokens": 512,
        }));
        assert_eq!(
            values(&before, &after),
            [
                "accelerator: cpu → nvidia-l4",
                "cache.tokens: 65,536 → 32,768",
                "memoryBytes.kv: 512 MiB → 256 MiB",
            ]
        );
        assert!(values(&before, &before).is_empty());
        assert_eq!(values(&after, &before)[3], "stepTokens: 512 → none");
    }
}
