//! In: what a watch brought, after its cache took it in. Out: the objects that are no longer what they were. A list that
//! follows a lost watch is one such event: it says nothing of what is gone since, and its items reach the cache only
//! once it is whole. Pure.

use std::sync::Arc;

use kube::runtime::reflector::Store;
use kube::runtime::watcher::Event;

use super::Cached;
use super::packed::Packed;

pub struct Touched<K: Cached> {
    cache: Store<Packed<K>>,
    /// What the cache held when the list now coming in began.
    before: Vec<Arc<Packed<K>>>,
}

impl<K: Cached> Touched<K> {
    pub fn of(cache: Store<Packed<K>>) -> Touched<K> {
        Touched { cache, before: Vec::new() }
    }

    /// Shows what an event touched; after a list everything that it held or left out, one after the other.
    pub fn by(&mut self, event: &Event<K>, mut see: impl FnMut(&K)) {
        match event {
            Event::Init => self.before = self.cache.state(),
            Event::InitApply(_) => {}
            Event::InitDone => {
                let before = std::mem::take(&mut self.before);
                before.into_iter().chain(self.cache.state()).for_each(|held| see(&held.unpack()));
            }
            Event::Apply(object) | Event::Delete(object) => see(object),
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;
    use kube::ResourceExt;
    use kube::api::ObjectMeta;
    use kube::runtime::reflector::store;

    use super::super::packed;
    use super::*;

    fn service(name: &str) -> Service {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        Service { metadata, ..Service::default() }
    }

    #[test]
    fn a_list_after_a_lost_watch_tells_of_what_is_gone_and_waits_until_it_is_whole() {
        let (cache, mut writer) = store();
        let mut touched = Touched::of(cache);
        let mut see = |mut event: Event<Service>| {
            writer.apply_watcher_event(&packed::event(&mut event));
            let mut names = Vec::new();
            touched.by(&event, |object| names.push(object.name_any()));
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
