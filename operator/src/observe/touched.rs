//! In: what a watch brought, after its cache took it in. Out: the objects that are no longer what they were. A list that
//! follows a lost watch is one such event: it says nothing of what is gone since, and its items reach the cache only
//! once it is whole. Pure.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;

use kube::runtime::reflector::{Lookup, Store};
use kube::runtime::watcher::Event;

pub struct Touched<K: Lookup<DynamicType: Eq + Hash> + 'static> {
    cache: Store<K>,
    /// What the cache held when the list now coming in began.
    before: Vec<Arc<K>>,
}

impl<K> Touched<K>
where
    K: Lookup<DynamicType: Eq + Hash + Clone + Debug> + Clone + 'static,
{
    pub fn of(cache: Store<K>) -> Touched<K> {
        Touched { cache, before: Vec::new() }
    }

    /// After a list everything that it held or left out.
    pub fn by(&mut self, event: Event<K>) -> Vec<Arc<K>> {
        match event {
            Event::Init => {
                self.before = self.cache.state();
                Vec::new()
            }
            Event::InitApply(_) => Vec::new(),
            Event::InitDone => {
                let mut touched = std::mem::take(&mut self.before);
                touched.extend(self.cache.state());
                touched
            }
            Event::Apply(object) | Event::Delete(object) => vec![Arc::new(object)],
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;
    use kube::ResourceExt;
    use kube::api::ObjectMeta;
    use kube::runtime::reflector::store;

    use super::*;

    fn service(name: &str) -> Service {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        Service { metadata, ..Service::default() }
    }

    #[test]
    fn a_list_after_a_lost_watch_tells_of_what_is_gone_and_waits_until_it_is_whole() {
        let (cache, mut writer) = store();
        let mut touched = Touched::of(cache);
        let mut see = |event: Event<Service>| {
            writer.apply_watcher_event(&event);
            let mut names: Vec<_> =
                touched.by(event).iter().map(|object| object.name_any()).collect();
            names.sort();
            names.join(" ")
        };
        assert_eq!(see(Event::Init), "");
        assert_eq!(see(Event::InitApply(service("a"))), "", "the cache does not hold it yet");
        assert_eq!(see(Event::InitApply(service("b"))), "");
        assert_eq!(see(Event::InitDone), "a b");
        assert_eq!(see(Event::Apply(service("c"))), "c");
        assert_eq!(see(Event::Delete(service("c"))), "c");

        assert_eq!(see(Event::Init), "");
        assert_eq!(see(Event::InitApply(service("b"))), "");
        assert_eq!(see(Event::Init), "", "the list broke off and begins again");
        assert_eq!(see(Event::InitApply(service("b"))), "");
        assert_eq!(see(Event::InitDone), "a b b", "a is gone");
        assert_eq!(see(Event::Init) + &see(Event::InitDone), "b");
    }
}
