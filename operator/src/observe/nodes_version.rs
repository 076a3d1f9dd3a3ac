//! In: nodes as the watch brings them. Out: a number that changes whenever something did that a plan may depend on. That a
//! kubelet is alive, which its node says every few seconds, is no such thing. Pure.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use k8s_openapi::api::core::v1::Node;

#[derive(Default)]
pub struct NodesVersion {
    version: AtomicU64,
    digests: Mutex<HashMap<String, u64>>,
}

impl NodesVersion {
    pub fn get(&self) -> u64 {
        self.version.load(Ordering::Relaxed)
    }

    /// Notes a node as it is, or that it is gone; true where that changed something.
    pub fn note(&self, name: &str, node: Option<&Node>) -> bool {
        let mut digests = self.digests.lock().expect("no holder panics");
        let now = node.map(digest);
        let before = match now {
            Some(digest) => digests.insert(name.to_owned(), digest),
            None => digests.remove(name),
        };
        self.count(before != now)
    }

    /// Forgets nodes that are not `there`; true where there was one.
    pub fn retain(&self, there: impl Fn(&str) -> bool) -> bool {
        let mut digests = self.digests.lock().expect("no holder panics");
        let before = digests.len();
        digests.retain(|name, _| there(name));
        self.count(digests.len() != before)
    }

    fn count(&self, changed: bool) -> bool {
        if changed {
            self.version.fetch_add(1, Ordering::Relaxed);
        }
        changed
    }
}

/// Labels, taints, and what pods may ask for.
fn digest(node: &Node) -> u64 {
    let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
    let planned_with = (&node.metadata.labels, &node.spec, allocatable);
    let text = serde_json::to_string(&planned_with).expect("objects of the API are JSON");
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(over: Value) -> Node {
        let mut node = json!({"metadata": {"name": "n", "labels": {"a": "b"}},
            "status": {"allocatable": {"cpu": "8"}, "conditions": [{"type": "Ready", "status": "True"}]}});
        crate::fields::overlay(&mut node, &over);
        serde_json::from_value(node).unwrap()
    }

    #[test]
    fn a_heartbeat_changes_nothing_and_a_label_a_taint_or_an_amount_does() {
        let seen = NodesVersion::default();
        assert!(seen.note("n", Some(&node(json!({})))));
        let first = seen.get();
        let beat = json!({"metadata": {"resourceVersion": "9"}, "status": {"conditions": []}});
        assert!(!seen.note("n", Some(&node(beat))));
        assert_eq!(seen.get(), first);
        for change in [
            json!({"metadata": {"labels": {"nvidia.com/gpu.memory": "143771"}}}),
            json!({"spec": {"unschedulable": true}}),
            json!({"status": {"allocatable": {"cpu": "4"}}}),
        ] {
            assert!(seen.note("n", Some(&node(change))));
        }
        assert!(seen.note("n", None) && !seen.note("n", None), "gone once");
        assert!(seen.note("m", Some(&node(json!({})))));
        assert!(!seen.retain(|_| true) && seen.retain(|name| name != "m"));
        assert_eq!(seen.get(), first + 6);
    }
}
