//! In: objects we want, and the caches. Out: the cluster made so, by server-side apply under one field manager, and only
//! where a field of ours differs. Never here: what to want. An object that belongs to someone else is left alone.

use std::collections::HashSet;
use std::marker::PhantomData;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy};
use kube::{Api, Client, ResourceExt};
use plimsoll_crds::{LLMDeployment, LLMDeploymentStatus};
use serde_json::Value;
use thiserror::Error;
use tokio::sync::{Mutex, MutexGuard};

use crate::desired::{Identity, names};
use crate::fields::{difference, digest, impose};
use crate::metrics::Metrics;
use crate::observe::{Cached, Caches};

/// One object we want, with its kind in the type, so that it meets only caches and clients of that kind.
pub struct Want<K> {
    /// Whole, as it is sent: kind, name, namespace, labels, owners and the fields we own.
    pub body: Value,
    kind: PhantomData<fn() -> K>,
}

impl<K: Cached> Want<K> {
    pub fn new(body: Value) -> Self {
        Want { body, kind: PhantomData }
    }

    pub fn name(&self) -> &str {
        self.body["metadata"]["name"].as_str().expect("every object we render has a name")
    }

    pub fn namespace(&self) -> &str {
        self.body["metadata"]["namespace"].as_str().expect("every object we render has a namespace")
    }

    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.body["metadata"]["annotations"][name].as_str()
    }

    /// Whether `live` has the spec that this would give it.
    pub fn is_like(&self, live: &K) -> bool {
        let held = serde_json::to_value(live).expect("objects of the API are JSON");
        difference(&self.body["spec"], &held["spec"]).is_none()
    }
}

#[derive(Debug, Error)]
pub enum ApplyError {
    /// The name is taken by an object that is not ours; we never take it over.
    #[error(
        "{kind} {name} exists and belongs to {owner}; rename or delete it, or rename this LLMDeployment"
    )]
    Foreign { kind: String, name: String, owner: String },
    /// The child of a deleted object of the same name is still being collected.
    #[error("{kind} {name} of a deleted LLMDeployment is still being removed")]
    Leaving { kind: String, name: String },
    /// The API server does not accept what we rendered, for instance because of the pod template overlay.
    #[error("the API server refuses {kind} {name}: {message}")]
    Refused { kind: String, name: String, message: String },
    #[error("failed to read what other pods ask of the nodes")]
    Neighbours { source: kube::Error },
    #[error("failed to write {kind} {name}")]
    Api { kind: String, name: String, source: kube::Error },
}

/// What applying an object took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// Nothing: the cluster held it already.
    Unchanged,
    /// A write, because we want something else than before.
    Changed,
    /// A write, because another hand had changed what we had sent: the path of the first field that differed.
    Repaired(String),
    /// A write, because it was not there.
    Created,
}

/// No stored object has this version: etcd counts from 1, and the first object stored is its second change. Applied under a
/// name that is free it stands in the way of nothing, under one that is taken it is a conflict: so nobody asks before.
const NOBODYS_VERSION: &str = "1";

/// What became of a name that was to be free.
enum Name<K> {
    WasFree,
    /// By whom; none where nobody is found and the server has another idea of versions.
    Taken(Option<K>),
}

/// Names that others had when we wanted them.
#[derive(Default)]
pub struct Taken(std::sync::Mutex<HashSet<String>>);

/// Nobody tells of names that nobody wants any more.
const TAKEN_MAX: usize = 10_000;

impl Taken {
    fn holds(&self, name: &str) -> bool {
        self.0.lock().expect("no holder panics").contains(name)
    }

    fn note(&self, name: String, is_taken: bool) {
        let mut names = self.0.lock().expect("no holder panics");
        if names.len() >= TAKEN_MAX {
            names.clear();
        }
        match is_taken {
            true => names.insert(name),
            false => names.remove(&name),
        };
    }
}

/// Writes for one object of ours.
pub struct Writer<'a> {
    pub client: &'a Client,
    pub caches: &'a Caches,
    pub metrics: &'a Metrics,
    pub sharing: &'a Sharing,
    pub taken: &'a Taken,
}

/// Who changes the owners of what several objects share: one at a time, until the cache shows it. One process leads, so
/// nobody else does meanwhile. Whoever has the turn writes for all who wait for the same object.
#[derive(Default)]
pub struct Sharing {
    turn: Mutex<()>,
    /// Shares that somebody is about to take: kind, namespace and name of what is shared, and the owner to be.
    wanted: std::sync::Mutex<Vec<(String, OwnerReference)>>,
}

/// A share that is wanted until this is dropped.
pub struct Wish<'a> {
    sharing: &'a Sharing,
    of: String,
    uid: String,
}

impl Sharing {
    pub async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Says that `owner` is to have a share in an object.
    pub fn want<K: Cached>(&self, namespace: &str, name: &str, owner: OwnerReference) -> Wish<'_> {
        let of = format!("{} {namespace}/{name}", K::kind(&()));
        let uid = owner.uid.clone();
        self.wishes().push((of.clone(), owner));
        Wish { sharing: self, of, uid }
    }

    fn wishes(&self) -> std::sync::MutexGuard<'_, Vec<(String, OwnerReference)>> {
        self.wanted.lock().expect("no holder panics")
    }
}

impl Wish<'_> {
    /// Everyone who wants a share in the same object, the one of this wish among them.
    pub fn with_others(&self) -> Vec<OwnerReference> {
        let wishes = self.sharing.wishes();
        let same = wishes.iter().filter(|(of, _)| *of == self.of);
        same.map(|(_, owner)| owner.clone()).collect()
    }
}

impl Drop for Wish<'_> {
    fn drop(&mut self) {
        self.sharing.wishes().retain(|(of, owner)| *of != self.of || owner.uid != self.uid);
    }
}

/// Whose an object is.
#[derive(Clone, Copy)]
pub enum Owner<'a> {
    /// One LLMDeployment controls it.
    Controller { uid: &'a str },
    /// The LLMDeployments of one model source share it.
    Model { key: &'a str },
}

impl Writer<'_> {
    /// Makes the cluster hold `want`.
    pub async fn apply<K: Cached>(
        &self,
        want: &Want<K>,
        owner: Owner<'_>,
    ) -> Result<Applied, ApplyError> {
        let (namespace, name) = (want.namespace(), want.name());
        let mut body = want.body.clone();
        // A field we stop sending shows in no comparison with the live object; it shows here.
        body["metadata"]["annotations"][names::APPLIED] = digest(&want.body, 16).into();
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let live = match self.caches.get::<K>(namespace, name) {
            Some(live) => Some(live),
            // The cache sees only what carries our label: the name may be taken all the same.
            None => match self.apply_where_free(&api, want, &body).await? {
                Name::WasFree => return Ok(Applied::Created),
                Name::Taken(live) => live.map(Into::into),
            },
        };
        let mut applied = Applied::Created;
        if let Some(live) = &live {
            check_owner(live.as_ref(), owner)?;
            let held = serde_json::to_value(live.as_ref()).expect("objects of the API are JSON");
            let Some(field) = difference(&body, &held) else { return Ok(Applied::Unchanged) };
            let sent = &body["metadata"]["annotations"][names::APPLIED];
            let told = live.annotations().get(names::APPLIED).map(String::as_str);
            applied = match told.is_none() || told == sent.as_str() {
                true => Applied::Repaired(field),
                false => Applied::Changed,
            };
        }
        let params = PatchParams::apply(names::MANAGER).force();
        let answer = match (api.patch(name, &params, &Patch::Apply(&body)).await, live) {
            // Another hand put something beside ours that cannot stand there, such as a port of the same name. Applying
            // cannot take it out; imposing can.
            (Err(kube::Error::Api(status)), Some(live)) if status.code == 422 => {
                let mut whole = serde_json::to_value(live.as_ref()).expect("the API speaks JSON");
                impose(&body, &mut whole);
                api.patch(name, &by_us_patch(), &Patch::Merge(&whole)).await
            }
            (answer, _) => answer,
        };
        let written = answer.map_err(|source| failed(want, source))?;
        self.wrote(&written, "applied").await;
        Ok(applied)
    }

    /// Applies `body` where nobody has its name; else who has it. Of a name that was taken is asked from then on.
    async fn apply_where_free<K: Cached>(
        &self,
        api: &Api<K>,
        want: &Want<K>,
        body: &Value,
    ) -> Result<Name<K>, ApplyError> {
        let name = format!("{} {}/{}", K::kind(&()), want.namespace(), want.name());
        let mut conditional = body.clone();
        conditional["metadata"]["resourceVersion"] = NOBODYS_VERSION.into();
        let params = PatchParams::apply(names::MANAGER).force();
        // Twice, for who had the name may leave between two requests, and a quota under contention is a conflict too.
        for _ in 0..2 {
            if !self.taken.holds(&name) {
                match api.patch(want.name(), &params, &Patch::Apply(&conditional)).await {
                    Ok(written) => {
                        self.wrote(&written, "applied").await;
                        return Ok(Name::WasFree);
                    }
                    Err(kube::Error::Api(status)) if status.code == 409 => {}
                    Err(source) => return Err(failed(want, source)),
                }
            }
            let live = api.get_opt(want.name()).await.map_err(|source| failed(want, source))?;
            self.taken.note(name.clone(), live.is_some());
            if live.is_some() {
                return Ok(Name::Taken(live));
            }
        }
        Ok(Name::Taken(None))
    }

    /// Creates `want` where it is absent, and never changes it after; true when that took a write. Revisions and what
    /// several objects share are written so: whoever comes second joins.
    pub async fn create<K: Cached>(
        &self,
        want: &Want<K>,
        owner: Owner<'_>,
    ) -> Result<bool, ApplyError> {
        let (namespace, name) = (want.namespace(), want.name());
        if let Some(live) = self.caches.get::<K>(namespace, name) {
            check_owner(live.as_ref(), owner)?;
            return Ok(false);
        }
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let body =
            serde_json::from_value(want.body.clone()).expect("what we render is of its kind");
        match api.create(&by_us(), &body).await {
            Ok(written) => {
                self.wrote(&written, "created").await;
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                let live = api.get(name).await.map_err(|source| failed(want, source))?;
                check_owner(&live, owner).map(|()| false)
            }
            Err(source) => Err(failed(want, source)),
        }
    }

    /// Makes the owners of a cached, shared object be `owners`; the turn is ours. Conditional on what the cache holds; false
    /// where that is gone or another by now, once the cache shows it.
    pub async fn set_owners<K: Cached>(
        &self,
        live: &K,
        owners: &[OwnerReference],
    ) -> Result<bool, ApplyError> {
        let (namespace, name) = (live.namespace().unwrap_or_default(), live.name_any());
        let api: Api<K> = Api::namespaced(self.client.clone(), &namespace);
        let patch = serde_json::json!({"metadata": {
            "resourceVersion": live.resource_version(), "ownerReferences": owners,
        }});
        let kind = K::kind(&()).into_owned();
        match api.patch(&name, &by_us_patch(), &Patch::Merge(&patch)).await {
            Ok(written) => {
                self.wrote(&written, "shared").await;
                Ok(true)
            }
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
                self.caches.catch_up_changed(live).await;
                Ok(false)
            }
            Err(source) => Err(ApplyError::Api { kind, name, source }),
        }
    }

    /// What the API server would make of `want`; nothing is stored.
    pub async fn rehearse<K: Cached>(&self, want: &Want<K>) -> Result<Value, ApplyError> {
        let api: Api<K> = Api::namespaced(self.client.clone(), want.namespace());
        let params = PatchParams { dry_run: true, ..PatchParams::apply(names::MANAGER).force() };
        let answer = api.patch(want.name(), &params, &Patch::Apply(&want.body)).await;
        let answered = answer.map_err(|source| failed(want, source))?;
        Ok(serde_json::to_value(answered).expect("objects of the API are JSON"))
    }

    /// A single replica has no budget; one that stands from before goes.
    pub async fn prune_budget(&self, identity: &Identity) -> Result<(), ApplyError> {
        let Identity { namespace, name, uid } = identity;
        match self.caches.get::<PodDisruptionBudget>(namespace, name) {
            Some(live) if check_owner(live.as_ref(), Owner::Controller { uid }).is_ok() => {
                self.delete(live.as_ref()).await
            }
            _ => Ok(()),
        }
    }

    /// Writes the whole status. The uid makes sure that it is this object and no later one of its name.
    pub async fn write_status(
        &self,
        identity: &Identity,
        status: &LLMDeploymentStatus,
    ) -> Result<(), ApplyError> {
        let Identity { namespace, name, uid } = identity;
        let api: Api<LLMDeployment> = Api::namespaced(self.client.clone(), namespace);
        let body = serde_json::json!({
            "apiVersion": names::API_VERSION,
            "kind": names::KIND,
            "metadata": {"name": name, "namespace": namespace, "uid": uid},
            "status": status,
        });
        let params = PatchParams::apply(names::MANAGER).force();
        match api.patch_status(name, &params, &Patch::Apply(&body)).await {
            Ok(written) => {
                let version = written.resource_version().unwrap_or_default();
                self.metrics.wrote("Status");
                self.caches.catch_up_object(namespace, name, &version).await;
                Ok(())
            }
            Err(source) => {
                Err(ApplyError::Api { kind: names::KIND.to_owned(), name: name.clone(), source })
            }
        }
    }

    /// Takes our protection from a pod that answers; no rollout comes of an annotation on a pod.
    pub async fn release(&self, pod: &Pod) -> Result<(), ApplyError> {
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        let patch = serde_json::json!({"metadata": {
            "uid": pod.uid(), "annotations": {names::DO_NOT_DISRUPT: null},
        }});
        match api.patch(&name, &by_us_patch(), &Patch::Merge(&patch)).await {
            Ok(written) => {
                self.wrote(&written, "released").await;
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(source) => Err(ApplyError::Api { kind: "Pod".to_owned(), name, source }),
        }
    }

    /// Counts a write, and waits until the cache shows it.
    async fn wrote<K: Cached>(&self, written: &K, how: &str) {
        let (namespace, name) = (written.namespace().unwrap_or_default(), written.name_any());
        self.metrics.wrote(&K::kind(&()));
        tracing::info!(kind = %K::kind(&()), namespace, name, "{how}");
        let version = written.resource_version().unwrap_or_default();
        self.caches.catch_up::<K>(&namespace, &name, &version).await;
    }

    /// Removes a cached object of ours; its own children go in the background.
    pub async fn delete<K: Cached>(&self, live: &K) -> Result<(), ApplyError> {
        let namespace = live.namespace().unwrap_or_default();
        let name = live.name_any();
        if live.meta().deletion_timestamp.is_some() {
            return Ok(());
        }
        let api: Api<K> = Api::namespaced(self.client.clone(), &namespace);
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            preconditions: Some(Preconditions {
                uid: live.uid(),
                resource_version: live.resource_version(),
            }),
            ..DeleteParams::default()
        };
        match api.delete(&name, &params).await {
            Ok(_) => {
                self.metrics.wrote(&K::kind(&()));
                tracing::info!(kind = %K::kind(&()), namespace, name, "deleted");
                self.caches.catch_up_gone::<K>(&namespace, &name, live.uid().as_deref()).await;
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(source) => Err(ApplyError::Api { kind: K::kind(&()).into_owned(), name, source }),
        }
    }
}

fn by_us() -> PostParams {
    PostParams { field_manager: Some(names::MANAGER.to_owned()), dry_run: false }
}

fn by_us_patch() -> PatchParams {
    PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() }
}

/// Refuses to touch what is not ours.
fn check_owner<K: Cached>(live: &K, owner: Owner<'_>) -> Result<(), ApplyError> {
    let kind = K::kind(&()).into_owned();
    let name = live.name_any();
    let controller = live.owner_references().iter().find(|owner| owner.controller == Some(true));
    match owner {
        Owner::Model { key } if live.labels().get(names::MODEL).is_some_and(|held| held == key) => {
            Ok(())
        }
        Owner::Controller { uid } if controller.is_some_and(|owner| owner.uid == uid) => Ok(()),
        Owner::Controller { .. } if controller.is_some_and(of_our_kind) => {
            Err(ApplyError::Leaving { kind, name })
        }
        _ => {
            let owner = controller.map_or_else(
                || "nobody we know".to_owned(),
                |owner| format!("{} {}", owner.kind, owner.name),
            );
            Err(ApplyError::Foreign { kind, name, owner })
        }
    }
}

fn of_our_kind(owner: &OwnerReference) -> bool {
    owner.kind == names::KIND && owner.api_version == names::API_VERSION
}

/// A 4xx that repeating cannot cure is a refusal of what we rendered; everything else is tried again.
fn failed<K: Cached>(want: &Want<K>, source: kube::Error) -> ApplyError {
    let kind = K::kind(&()).into_owned();
    let name = want.name().to_owned();
    match source {
        kube::Error::Api(status) if matches!(status.code, 400 | 403 | 422) => {
            ApplyError::Refused { kind, name, message: status.message.clone() }
        }
        source => ApplyError::Api { kind, name, source },
    }
}
