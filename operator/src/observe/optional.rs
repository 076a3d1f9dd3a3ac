//! In: the name of a definition that others may install, today or never. Out: a cache of its objects while the definition
//! is there, and the objects of ours to look at when it comes. Where it is absent, two watches of one name stay open and
//! nothing else happens.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::stream::{BoxStream, StreamExt, unfold};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use plimsoll_crds::LLMDeployment;

use super::{Cache, Cached, Filling, ours, owners, trim_meta};

/// The cache of a kind that may not be there.
pub struct Optional<K: Cached> {
    pub(super) cache: Cache<K>,
    served: Arc<AtomicBool>,
}

impl<K: Cached> Optional<K> {
    /// Whether the API server knows the kind, and the cache has seen its first list.
    pub fn is_served(&self) -> bool {
        self.served.load(Ordering::Acquire)
    }
}

type Definition = PartialObjectMeta<CustomResourceDefinition>;
type Trigger = Result<ObjectRef<LLMDeployment>, watcher::Error>;

/// Follows `definition`, and while it stands our objects of its kind. `everyone` is to be looked at when it comes.
pub fn follow<K: Cached>(
    client: &Client,
    api: Api<K>,
    definition: &str,
    everyone: impl Fn() -> Vec<ObjectRef<LLMDeployment>> + Send + 'static,
) -> (Optional<K>, BoxStream<'static, Trigger>) {
    let (cache, filling) = Cache::empty();
    let served = Arc::new(AtomicBool::new(false));
    let optional = Optional { cache, served: served.clone() };
    let of_this_name = watcher::Config::default().fields(&format!("metadata.name={definition}"));
    let definitions: Api<Definition> = Api::all(client.clone());
    let following = Following {
        api,
        definitions: watcher(definitions, of_this_name).default_backoff().boxed(),
        listed: false,
        objects: None,
        filling,
        served,
        everyone,
        pending: VecDeque::new(),
    };
    (optional, unfold(following, |following| following.next()).boxed())
}

struct Following<K: Cached, F> {
    api: Api<K>,
    definitions: BoxStream<'static, Result<Event<Definition>, watcher::Error>>,
    /// Whether the list that is coming in holds the definition.
    listed: bool,
    /// While it stands.
    objects: Option<BoxStream<'static, Result<Event<K>, watcher::Error>>>,
    filling: Filling<K>,
    served: Arc<AtomicBool>,
    everyone: F,
    pending: VecDeque<Trigger>,
}

impl<K: Cached, F: Fn() -> Vec<ObjectRef<LLMDeployment>>> Following<K, F> {
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
        self.filling.take(&mut Event::Init);
        self.filling.take(&mut Event::InitDone);
    }

    fn see(&mut self, event: Option<Result<Event<K>, watcher::Error>>) {
        match event {
            Some(Ok(mut event)) => {
                let is_news = self.filling.take(&mut event);
                match event {
                    Event::Apply(child) | Event::Delete(child) if is_news => {
                        self.pending.extend(owners(&child).into_iter().map(Ok));
                    }
                    Event::InitDone => {
                        self.served.store(true, Ordering::Release);
                        self.pending.extend((self.everyone)().into_iter().map(Ok));
                    }
                    _ => {}
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
