//! In: an object that several of ours share, as its watch brings it again and again. Out: whom of its owners that concerns:
//! all where it changed or is gone, and where only its owners did, those who are none any more. Whoever takes a share
//! waits for it by itself; to tell all others would be a million words for a thousand objects of one model. Pure.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use kube::ResourceExt;
use kube::runtime::reflector::{ObjectRef, Store};
use plimsoll_crds::LLMDeployment;

use super::packed::Packed;
use super::{Cached, owners};

pub struct Shares<K: Cached> {
    cache: Store<Packed<K>>,
    held: HashMap<ObjectRef<Packed<K>>, Held>,
}

/// What is remembered of a shared object.
struct Held {
    digest: u64,
    owners: Vec<ObjectRef<LLMDeployment>>,
}

impl<K: Cached> Shares<K> {
    pub fn of(cache: Store<Packed<K>>) -> Shares<K> {
        Shares { cache, held: HashMap::new() }
    }

    /// Called with the object after the cache took it in.
    pub fn concerned(&mut self, shared: &K) -> Vec<ObjectRef<LLMDeployment>> {
        let names = (shared.namespace().unwrap_or_default(), shared.name_any());
        let name = ObjectRef::new(&names.1).within(&names.0);
        let now = owners(shared);
        if self.cache.get(&name).is_none() {
            self.held.remove(&name);
            return now;
        }
        let digest = digest(shared);
        let before = self.held.insert(name, Held { digest, owners: now.clone() });
        match before {
            Some(before) if before.digest == digest => {
                before.owners.into_iter().filter(|owner| !now.contains(owner)).collect()
            }
            _ => now,
        }
    }
}

/// Of everything but the owners, and the version that changes with them.
fn digest<K: Cached>(shared: &K) -> u64 {
    let mut shared = shared.clone();
    shared.meta_mut().owner_references = None;
    shared.meta_mut().resource_version = None;
    let text = serde_json::to_string(&shared).expect("objects of the API are JSON");
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::runtime::reflector::store;
    use kube::runtime::watcher::Event;
    use serde_json::json;

    use super::super::packed;
    use super::*;

    #[test]
    fn a_share_taken_concerns_nobody_else_and_facts_that_change_or_go_concern_all() {
        let (cache, mut writer) = store();
        let mut shares = Shares::of(cache);
        let facts = |version: &str, text: &str, owners: &[&str]| -> ConfigMap {
            let owner = |name: &&str| {
                json!({"apiVersion": "plimsoll.dev/v1alpha1", "kind": "LLMDeployment",
                    "name": name, "uid": name})
            };
            let owners: Vec<_> = owners.iter().map(owner).collect();
            let body = json!({"metadata": {"name": "model", "namespace": "n",
                "resourceVersion": version, "ownerReferences": owners}, "data": {"facts": text}});
            serde_json::from_value(body).unwrap()
        };
        let mut see = |mut event: Event<ConfigMap>| {
            writer.apply_watcher_event(&packed::event(&mut event));
            let (Event::Apply(shared) | Event::Delete(shared)) = event else {
                return String::new();
            };
            let concerned = shares.concerned(&shared);
            concerned.iter().map(|owner| owner.name.as_str()).collect::<Vec<_>>().join(" ")
        };
        see(Event::Init);
        see(Event::InitDone);
        assert_eq!(see(Event::Apply(facts("1", "a", &["x"]))), "x");
        assert_eq!(see(Event::Apply(facts("2", "a", &["x", "y"]))), "", "y asked for it itself");
        assert_eq!(see(Event::Apply(facts("3", "a", &["y"]))), "x", "another hand took it away");
        assert_eq!(see(Event::Apply(facts("4", "b", &["y", "z"]))), "y z");
        assert_eq!(see(Event::Delete(facts("5", "b", &["y", "z"]))), "y z");
        assert_eq!(see(Event::Apply(facts("6", "b", &["y"]))), "y", "made anew");
    }
}
