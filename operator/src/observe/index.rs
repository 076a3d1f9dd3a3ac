//! In: what a watch brings, before its cache takes it in. Out: the names of those objects in which one of the values stands by
//! which their kind is asked for, so that nobody walks through the pods of a thousand others to find the two of one. A name
//! may be here whose object is not in the cache yet, or not any more, or without the value by now: the cache decides. Pure.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use kube::ResourceExt;
use kube::runtime::watcher::Event;

use super::Cached;

/// Shared by the watch that fills it and those who ask.
#[derive(Clone, Default)]
pub struct Index(Arc<Mutex<Names>>);

#[derive(Default)]
struct Names {
    held: HashMap<Key, BTreeSet<String>>,
    /// Of the list now coming in, which replaces what was held.
    coming: HashMap<Key, BTreeSet<String>>,
}

impl Names {
    fn remove(&mut self, keys: impl Iterator<Item = Key>, name: &str) {
        for key in keys {
            let Some(held) = self.held.get_mut(&key) else { continue };
            held.remove(name);
            if held.is_empty() {
                self.held.remove(&key);
            }
        }
    }
}

/// Namespace and value; names, digests of models and uids do not meet.
type Key = (String, String);

impl Index {
    pub fn note<K: Cached>(&self, event: &Event<K>) {
        let mut names = self.0.lock().expect("no holder panics");
        match event {
            Event::Init => names.coming.clear(),
            Event::InitApply(object) => insert(&mut names.coming, object),
            Event::InitDone => names.held = std::mem::take(&mut names.coming),
            Event::Apply(object) => insert(&mut names.held, object),
            Event::Delete(object) => names.remove(keys(object), &object.name_any()),
        }
    }

    /// Called once the cache holds `now` in the place of `before`: what stood in the one and does not in the other.
    pub fn forget<K: Cached>(&self, before: &K, now: &K) {
        let stays: Vec<Key> = keys(now).collect();
        let gone = keys(before).filter(|key| !stays.contains(key));
        self.0.lock().expect("no holder panics").remove(gone, &before.name_any());
    }

    /// In order.
    pub fn names(&self, namespace: &str, value: &str) -> Vec<String> {
        let names = self.0.lock().expect("no holder panics");
        let key = (namespace.to_owned(), value.to_owned());
        names.held.get(&key).into_iter().flatten().cloned().collect()
    }
}

fn insert<K: Cached>(names: &mut HashMap<Key, BTreeSet<String>>, object: &K) {
    for key in keys(object) {
        names.entry(key).or_default().insert(object.name_any());
    }
}

fn keys<K: Cached>(object: &K) -> impl Iterator<Item = Key> {
    let namespace = object.namespace().unwrap_or_default();
    let values = object.indexed_by().into_iter();
    values.map(move |value| (namespace.clone(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    use super::*;
    use crate::desired::names;

    #[test]
    fn names_come_and_go_with_events_and_a_list_replaces_them_once_it_is_whole() {
        let index = Index::default();
        let pod = |name: &str, object: &str| -> Pod {
            let labels = json!({names::NAME: object});
            let body = json!({"metadata": {"name": name, "namespace": "n", "labels": labels}});
            serde_json::from_value(body).unwrap()
        };
        let of_a = || index.names("n", "a").join(" ");
        index.note(&Event::Apply(pod("a-2", "a")));
        index.note(&Event::Apply(pod("a-1", "a")));
        index.note(&Event::Apply(pod("b-1", "b")));
        assert_eq!(of_a(), "a-1 a-2");
        assert!(index.names("other", "a").is_empty());
        index.note(&Event::Delete(pod("a-1", "a")));
        assert_eq!(of_a(), "a-2");

        index.note(&Event::Apply(pod("a-2", "c")));
        index.forget(&pod("a-2", "a"), &pod("a-2", "c"));
        assert!(of_a().is_empty(), "its label changed");
        assert_eq!(index.names("n", "c"), ["a-2"]);
        index.note(&Event::Apply(pod("a-2", "a")));

        index.note(&Event::<Pod>::Init);
        index.note(&Event::InitApply(pod("a-3", "a")));
        assert_eq!(of_a(), "a-2", "what was there stands until the list is whole");
        index.note(&Event::<Pod>::InitDone);
        assert_eq!(of_a(), "a-3");
        assert!(index.names("n", "b").is_empty());
    }
}
