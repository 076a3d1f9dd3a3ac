//! In: the name of a definition that others may install, today or never. Out: a cache of its objects while the definition
//! is there, and the objects of ours to look at when it comes. Where it is absent, two watches of one name stay open and
//! nothing else happens.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::stream::{BoxStream, StreamExt, unfold};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, reflector};
use kube::{Api, Client, Resource};
use plimsoll_crds::LLMDeployment;
use serde::de::DeserializeOwned;

use super::{ours, owners, trim_meta};

/// The cache of a kind that may not be there.
pub struct Optional<K: Resource<DynamicType = ()> + 'static> {
    pub store: Store<K>,
    served: Arc<AtomicBool>,
}

impl<K: Resource<DynamicType = ()> + 'static> Optional<K> {
    /// Whether the API server knows the kind, and the cache has seen its first list.
    pub fn is_served(&self) -> bool {
        self.served.load(Ordering::Acquire)
    }
}

type Definition = PartialObjectMeta<CustomResourceDefinition>;
type Trigger = Result<ObjectRef<LLMDeployment>, watcher::Error>;

/// Follows `definition`, and while it stands our objects of its kind. `everyone` is to be looked at when it comes.
pub fn follow<K>(
    client: &Client,
    api: Api<K>,
    definition: &str,
    everyone: impl Fn() -> Vec<ObjectRef<LLMDeployment>> + Send + 'static,
) -> (Optional<K>, BoxStream<'static, Trigger>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (store, writer) = store();
    let served = Arc::new(AtomicBool::new(false));
    let optional = Optional { store, served: served.clone() };
    let of_this_name = watcher::Config::default().fields(&format!("metadata.name={definition}"));
    let definitions: Api<Definition> = Api::all(client.clone());
    let following = Following {
        api,
        definitions: watcher(definitions, of_this_name).default_backoff().boxed(),
        listed: false,
        objects: None,
        writer,
        served,
        everyone,
        pending: VecDeque::new(),
    };
    (optional, unfold(following, |following| following.next()).boxed())
}

struct Following<K: Resource<DynamicType = ()> + Clone + 'static, F> {
    api: Api<K>,
    definitions: BoxStream<'static, Result<Event<Definition>, watcher::Error>>,
    /// Whether the list that is coming in holds the definition.
    listed: bool,
    /// While it stands.
    objects: Option<BoxStream<'static, Result<Event<K>, watcher::Error>>>,
    writer: reflector::store::Writer<K>,
    served: Arc<AtomicBool>,
    everyone: F,
    pending: VecDeque<Trigger>,
}

impl<K, F> Following<K, F>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    F: Fn() -> Vec<ObjectRef<LLMDeployment>>,
{
    /// The next object to look at; None once the watch of the definition has ended.
    async fn next(mut self) -> Option<(Trigger, Self)> {
        loop {
            if let Some(trigger) = self.pending.pop_front() {
                return Some((trigger, self));
            }
            let objects = async {
                match &mut self.objects {
                    Some(objects) => objects.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                defined = self.definitions.next() => match defined? {
                    Ok(event) => self.define(&event),
                    Err(error) => self.pending.push_back(Err(error)),
                },
                event = objects => self.see(event),
            }
        }
    }

    fn define(&mut self, event: &Event<Definition>) {
        match event {
            Event::Init => self.listed = false,
            Event::InitApply(_) => {
                self.listed = true;
                self.open();
            }
            Event::Apply(_) => self.open(),
            Event::InitDone if self.listed => {}
            Event::InitDone | Event::Delete(_) => self.close(),
        }
    }

    fn open(&mut self) {
        if self.objects.is_none() {
            let objects = watcher(self.api.clone(), ours()).default_backoff();
            self.objects = Some(objects.modify(trim_meta).boxed());
        }
    }

    /// An empty list: what the cache held is gone with the definition.
    fn close(&mut self) {
        self.objects = None;
        self.served.store(false, Ordering::Release);
        self.writer.apply_watcher_event(&Event::Init);
        self.writer.apply_watcher_event(&Event::InitDone);
    }

    fn see(&mut self, event: Option<Result<Event<K>, watcher::Error>>) {
        match event {
            Some(Ok(event)) => {
                self.writer.apply_watcher_event(&event);
                match event {
                    Event::Apply(child) | Event::Delete(child) => {
                        self.pending.extend(owners(&child).into_iter().map(Ok));
                    }
                    Event::InitDone => {
                        self.served.store(true, Ordering::Release);
                        self.pending.extend((self.everyone)().into_iter().map(Ok));
                    }
                    Event::Init | Event::InitApply(_) => {}
                }
            }
            Some(Err(error)) if is_unknown(&error) => {
                tracing::debug!(%error, "a kind is not served yet");
            }
            Some(Err(error)) => self.pending.push_back(Err(error)),
            None => self.objects = None,
        }
    }
}

/// A definition is seen before its kind is served; until then the watch is opened again and again.
fn is_unknown(error: &watcher::Error) -> bool {
    let watcher::Error::InitialListFailed(kube::Error::Api(status)) = error else { return false };
    status.code == 404
}
