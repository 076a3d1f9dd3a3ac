//! In: what the watch of one kind brings. Out: its cache: packed objects by name, and an index over those that are asked for by what
//! stands in them. Which kinds there are, what each is asked for, and what is known of each in brief, stands here.

use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::runtime::reflector::{self, ObjectRef, Store, store};
use kube::runtime::watcher;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Caches;
use super::index::Index;
use super::packed::{self, Packed};
use crate::desired::monitoring::{PodMonitor, PrometheusRule};
use crate::desired::names;
use crate::plan::{self, Asked};

/// What is there of one kind, and the names of those that are asked for by what stands in them.
pub struct Cache<K: Cached> {
    pub(super) store: Store<Packed<K>>,
    index: Index,
}

impl<K: Cached> Clone for Cache<K> {
    fn clone(&self) -> Cache<K> {
        Cache { store: self.store.clone(), index: self.index.clone() }
    }
}

/// What fills a cache.
pub struct Filling<K: Cached> {
    pub(super) cache: Cache<K>,
    writer: reflector::store::Writer<Packed<K>>,
}

impl<K: Cached> Cache<K> {
    pub(super) fn empty() -> (Cache<K>, Filling<K>) {
        let (store, writer) = store();
        let cache = Cache { store, index: Index::default() };
        (cache.clone(), Filling { cache, writer })
    }

    pub(super) fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        Some(self.packed(namespace, name)?.unpack())
    }

    pub(super) fn packed(&self, namespace: &str, name: &str) -> Option<Arc<Packed<K>>> {
        self.store.get(&ObjectRef::new(name).within(namespace))
    }

    /// All in `namespace` of which the index knows `value`. By name: of two like objects every pass must tell of the same.
    pub(super) fn indexed(&self, namespace: &str, value: &str) -> Vec<Arc<K>> {
        let names = self.index.names(namespace, value).into_iter();
        names.filter_map(|name| self.get(namespace, &name)).collect()
    }
}

impl<K: Cached> Filling<K> {
    /// True where that is news: something changed that we keep.
    pub(super) fn take(&mut self, event: &mut watcher::Event<K>) -> bool {
        self.cache.index.note(event);
        let packed = packed::event(event);
        let watcher::Event::Apply(now) = &packed else {
            self.writer.apply_watcher_event(&packed);
            return true;
        };
        let (namespace, name) = now.names();
        let before = self.cache.packed(namespace, name);
        let is_news = before.as_ref().is_none_or(|before| !before.is_like(now));
        self.writer.apply_watcher_event(&packed);
        if let (true, Some(before), watcher::Event::Apply(now)) = (is_news, before, event) {
            self.cache.index.forget(before.unpack().as_ref(), now);
        }
        is_news
    }
}

/// A namespaced kind that has a cache here.
pub trait Cached:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + DeserializeOwned
    + Serialize
    + Debug
    + Send
    + Sync
    + 'static
{
    /// What is asked of all objects of the kind in one walk.
    type Brief: Clone + Send + Sync + 'static;

    fn brief(&self) -> Self::Brief;

    fn cache(caches: &Caches) -> &Cache<Self>;

    /// By what it is asked for, beside its name.
    fn indexed_by(&self) -> Vec<&str>;
}

/// The label that names an object of ours, or the model that several share.
pub(super) fn indexed_by_label<'a, K: Resource>(object: &'a K, label: &str) -> Option<&'a str> {
    object.labels().get(label).map(String::as_str)
}

/// What several share is asked for by each of them.
fn indexed_by_owners<K: Resource>(shared: &K) -> Vec<&str> {
    if indexed_by_label(shared, names::MODEL).is_none() {
        return Vec::new();
    }
    shared.owner_references().iter().map(|owner| owner.uid.as_str()).collect()
}

macro_rules! cached {
    ($($kind:ty => $($field:ident).+, $indexed_by:expr;)*) => {
        $(impl Cached for $kind {
            type Brief = ();

            fn brief(&self) {}

            fn cache(caches: &Caches) -> &Cache<Self> {
                &caches.$($field).+
            }

            fn indexed_by(&self) -> Vec<&str> {
                let indexed_by: fn(&Self) -> Vec<&str> = $indexed_by;
                indexed_by(self)
            }
        })*
    };
}
cached! {
    Deployment => deployments, |_| Vec::new();
    Service => services, |_| Vec::new();
    ServiceAccount => service_accounts, |_| Vec::new();
    PodDisruptionBudget => budgets, |_| Vec::new();
    PodMonitor => pod_monitors.cache, |_| Vec::new();
    PrometheusRule => prometheus_rules.cache, |_| Vec::new();
    ControllerRevision => revisions, |it| indexed_by_label(it, names::NAME).into_iter().collect();
    NetworkPolicy => policies, indexed_by_owners;
    Job => jobs, indexed_by_owners;
    PersistentVolumeClaim => claims, indexed_by_owners;
    ConfigMap => facts, indexed_by_owners;
}

/// Of a pod what is summed and counted over all of them.
#[derive(Clone)]
pub struct PodBrief {
    /// Name of the object whose engine it is.
    pub object: Option<Box<str>>,
    /// The node it is bound to, and what it asks of it until it has ended.
    pub asked: Option<(Box<str>, Asked)>,
    pub restarts: i64,
}

impl Cached for Pod {
    type Brief = PodBrief;

    fn brief(&self) -> PodBrief {
        let phase = self.status.as_ref().and_then(|status| status.phase.as_deref());
        let is_over = matches!(phase, Some("Succeeded" | "Failed"));
        let statuses =
            self.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
        PodBrief {
            object: indexed_by_label(self, names::NAME).map(Into::into),
            asked: plan::asked(self).filter(|_| !is_over).map(|(node, it)| (node.into(), it)),
            restarts: statuses.map(|held| i64::from(held.restart_count)).sum(),
        }
    }

    fn cache(caches: &Caches) -> &Cache<Pod> {
        &caches.pods
    }

    fn indexed_by(&self) -> Vec<&str> {
        let labels = [names::NAME, names::MODEL].into_iter();
        labels.filter_map(|label| indexed_by_label(self, label)).collect()
    }
}
