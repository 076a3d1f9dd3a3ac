//! In: an object as a watch brought it, trimmed. Out: the same as a cache keeps it: its names and version, the few words that
//! whoever walks over all objects of a kind asks for, and all else as JSON text, which takes a fifth of the memory of the
//! structs and tells whether anything changed that we keep. Whoever asks for an object gets it read anew. Pure.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use kube::runtime::reflector::Lookup;
use kube::runtime::watcher::Event;

use super::Cached;

pub struct Packed<K: Cached> {
    name: Box<str>,
    namespace: Box<str>,
    uid: Box<str>,
    version: Box<str>,
    pub brief: K::Brief,
    /// Without the version.
    text: Box<[u8]>,
    kind: PhantomData<fn() -> K>,
}

impl<K: Cached> Packed<K> {
    pub fn of(object: &mut K) -> Packed<K> {
        let version = object.meta_mut().resource_version.take();
        let text = serde_json::to_vec(object).expect("objects of the API are JSON").into();
        object.meta_mut().resource_version = version;
        let meta = object.meta();
        let part = |part: &Option<String>| part.as_deref().unwrap_or_default().into();
        Packed {
            name: part(&meta.name),
            namespace: part(&meta.namespace),
            uid: part(&meta.uid),
            version: part(&meta.resource_version),
            brief: object.brief(),
            text,
            kind: PhantomData,
        }
    }

    pub fn unpack(&self) -> Arc<K> {
        let mut object: K =
            serde_json::from_slice(&self.text).expect("it was one when it was packed");
        object.meta_mut().resource_version = Some(self.version.to_string());
        Arc::new(object)
    }

    /// Whether both are the same but for their versions.
    pub fn is_like(&self, other: &Packed<K>) -> bool {
        self.text == other.text
    }

    pub fn names(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }

    pub fn version(&self) -> &str {
        &self.version
    }
}

/// The same event of a packed object.
pub fn event<K: Cached>(event: &mut Event<K>) -> Event<Packed<K>> {
    match event {
        Event::Apply(object) => Event::Apply(Packed::of(object)),
        Event::Delete(object) => Event::Delete(Packed::of(object)),
        Event::Init => Event::Init,
        Event::InitApply(object) => Event::InitApply(Packed::of(object)),
        Event::InitDone => Event::InitDone,
    }
}

impl<K: Cached> Clone for Packed<K> {
    fn clone(&self) -> Packed<K> {
        Packed {
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            uid: self.uid.clone(),
            version: self.version.clone(),
            brief: self.brief.clone(),
            text: self.text.clone(),
            kind: PhantomData,
        }
    }
}

impl<K: Cached> fmt::Debug for Packed<K> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} {}/{} {}", K::kind(&()), self.namespace, self.name, self.version)
    }
}

impl<K: Cached> Lookup for Packed<K> {
    type DynamicType = ();

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn name(&self) -> Option<Cow<'_, str>> {
        Some(Cow::Borrowed(&self.name))
    }

    fn namespace(&self) -> Option<Cow<'_, str>> {
        Some(Cow::Borrowed(&self.namespace))
    }

    fn resource_version(&self) -> Option<Cow<'_, str>> {
        Some(Cow::Borrowed(&self.version))
    }

    fn uid(&self) -> Option<Cow<'_, str>> {
        Some(Cow::Borrowed(&self.uid))
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use kube::runtime::reflector::{ObjectRef, store};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_packed_object_is_found_by_its_names_and_read_as_it_was() {
        let body = json!({"metadata": {"name": "a", "namespace": "n", "uid": "u", "resourceVersion": "7",
                "labels": {"plimsoll.dev/name": "assistant"}},
            "spec": {"nodeName": "node-0", "containers": [{"name": "engine",
                "resources": {"requests": {"cpu": "2", "nvidia.com/gpu": "1"}}}]},
            "status": {"phase": "Running", "containerStatuses": [{"name": "engine", "image": "", "imageID": "",
                "ready": true, "restartCount": 3}]}});
        let pod: Pod = serde_json::from_value(body).unwrap();
        let (cache, mut writer) = store::<Packed<Pod>>();
        writer.apply_watcher_event(&event(&mut Event::Apply(pod.clone())));
        let held = cache.get(&ObjectRef::new("a").within("n")).unwrap();
        assert_eq!(*held.unpack(), pod);
        assert_eq!((held.names(), held.version()), (("n", "a"), "7"));
        let (node, asked) = held.brief.asked.as_ref().unwrap();
        assert_eq!((&**node, asked.cpu_millis, asked.gpus), ("node-0", 2000, 1));
        assert_eq!((held.brief.object.as_deref(), held.brief.restarts), (Some("assistant"), 3));
        let mut later = pod.clone();
        later.metadata.resource_version = Some("8".to_owned());
        assert!(held.is_like(&Packed::of(&mut later)), "only its version changed");
        later.metadata.generation = Some(2);
        assert!(!held.is_like(&Packed::of(&mut later)));
        writer.apply_watcher_event(&event(&mut Event::Delete(pod)));
        assert!(cache.state().is_empty());
    }
}
