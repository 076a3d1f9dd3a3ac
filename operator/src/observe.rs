//! In: watches on our kind, its children, their pods and the nodes. Out: caches of trimmed objects, the stream of
//! objects to reconcile, and [`Seen`]: everything one reconcile may know of the cluster. Never here: a write, a
//! decision, a read beside the watches.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{BoxStream, SelectAll, StreamExt, TryStreamExt};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, Node, PersistentVolumeClaim, Pod, PodSpec, Service, ServiceAccount,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::watcher::{self, watcher};
use kube::runtime::{WatchStreamExt, reflector};
use kube::{Api, Client, Resource, ResourceExt};
use plimsoll_crds::LLMDeployment;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::desired::monitoring::{self, PodMonitor, PrometheusRule};
use crate::desired::names;
use crate::revision;

mod index;
mod nodes_version;
mod optional;
mod shares;
mod touched;

use index::Index;
use nodes_version::NodesVersion;
pub use optional::Optional;
use shares::Shares;
use touched::Touched;

/// How long a reconcile waits until its own write shows in the cache, before it goes on without.
const CATCH_UP_MAX: Duration = Duration::from_secs(2);
const CATCH_UP_STEP: Duration = Duration::from_millis(5);

/// One cache per kind, filled by one watch each.
pub struct Caches {
    pub objects: Store<LLMDeployment>,
    /// True once every cache but `objects` has seen its first list.
    filled: watch::Receiver<bool>,
    deployments: Store<Deployment>,
    services: Store<Service>,
    service_accounts: Store<ServiceAccount>,
    budgets: Store<PodDisruptionBudget>,
    policies: Store<NetworkPolicy>,
    revisions: Store<ControllerRevision>,
    revisions_of: Index,
    jobs: Store<Job>,
    claims: Store<PersistentVolumeClaim>,
    facts: Store<ConfigMap>,
    pods: Store<Pod>,
    pods_of: Index,
    nodes: Store<Node>,
    nodes_version: NodesVersion,
    /// Kinds of the Prometheus operator, which may be there, come or go.
    pub pod_monitors: Optional<PodMonitor>,
    pub prometheus_rules: Optional<PrometheusRule>,
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
    fn cache(caches: &Caches) -> &Store<Self>;
}

macro_rules! cached {
    ($($kind:ty => $field:ident),* $(,)?) => {
        $(impl Cached for $kind {
            fn cache(caches: &Caches) -> &Store<Self> {
                &caches.$field
            }
        })*
    };
}
cached! {
    LLMDeployment => objects,
    Deployment => deployments,
    Service => services,
    ServiceAccount => service_accounts,
    PodDisruptionBudget => budgets,
    NetworkPolicy => policies,
    ControllerRevision => revisions,
    Job => jobs,
    PersistentVolumeClaim => claims,
    ConfigMap => facts,
    Pod => pods,
}

impl Cached for PodMonitor {
    fn cache(caches: &Caches) -> &Store<Self> {
        &caches.pod_monitors.store
    }
}

impl Cached for PrometheusRule {
    fn cache(caches: &Caches) -> &Store<Self> {
        &caches.prometheus_rules.store
    }
}

/// Objects to look at, as the watches bring them.
pub type Triggers = SelectAll<BoxStream<'static, Result<ObjectRef<LLMDeployment>, watcher::Error>>>;

/// Opens one watch per kind, in `namespace` or everywhere. The caches fill while the triggers are polled.
pub fn start(client: &Client, namespace: Option<&str>) -> (Arc<Caches>, Triggers) {
    let (objects, objects_writer) = store();
    let (deployments, deployments_writer) = store();
    let (services, services_writer) = store();
    let (service_accounts, service_accounts_writer) = store();
    let (budgets, budgets_writer) = store();
    let (policies, policies_writer) = store();
    let (revisions, revisions_writer) = store();
    let (jobs, jobs_writer) = store();
    let (claims, claims_writer) = store();
    let (facts, facts_writer) = store();
    let (pods, pods_writer) = store();
    let (nodes, nodes_writer) = store();
    let (revisions_of, pods_of) = (Index::default(), Index::default());
    let scope = Scope { client, namespace };
    let everyone = {
        let objects = objects.clone();
        move || everyone(&objects)
    };
    let (pod_monitors, monitored) =
        optional::follow(client, scope.api(), monitoring::POD_MONITORS, everyone.clone());
    let (prometheus_rules, ruled) =
        optional::follow(client, scope.api(), monitoring::PROMETHEUS_RULES, everyone);
    let (fill, filled) = watch::channel(false);
    let caches = Arc::new(Caches {
        objects,
        filled,
        deployments,
        services,
        service_accounts,
        budgets,
        policies,
        revisions,
        revisions_of: revisions_of.clone(),
        jobs,
        claims,
        facts,
        pods,
        pods_of: pods_of.clone(),
        nodes,
        nodes_version: NodesVersion::default(),
        pod_monitors,
        prometheus_rules,
    });
    let filling = caches.clone();
    tokio::spawn(async move {
        // An error means that the watches are gone, and the process with them.
        if filling.wait_for_first_lists().await.is_ok() {
            fill.send_replace(true);
        }
        fill.closed().await;
    });
    let mut triggers = SelectAll::new();
    let own = |object: &LLMDeployment| vec![ObjectRef::from_obj(object)];
    let everything = watcher::Config::default();
    triggers.push(follow(scope.api(), everything.clone(), objects_writer, None, trim_meta, own));
    triggers.push(scope.children(deployments_writer, trim_meta));
    triggers.push(scope.children(services_writer, trim_meta));
    triggers.push(scope.children(service_accounts_writer, trim_meta));
    triggers.push(scope.children(budgets_writer, trim_meta));
    triggers.push(scope.shared(policies_writer));
    triggers.push(follow(
        scope.api(),
        ours(),
        revisions_writer,
        Some(revisions_of),
        trim_revision,
        |revision: &ControllerRevision| owners(revision),
    ));
    triggers.push(scope.shared(jobs_writer));
    triggers.push(scope.shared(claims_writer));
    triggers.push(scope.shared(facts_writer));
    let jobs = caches.jobs.clone();
    let by_label = move |pod: &Pod| objects_of_pod(pod, &jobs);
    triggers.push(follow(scope.api(), ours(), pods_writer, Some(pods_of), trim_pod, by_label));
    triggers.push(follow_nodes(Api::all(client.clone()), nodes_writer, caches.clone()));
    triggers.push(monitored);
    triggers.push(ruled);
    (caches, triggers)
}

/// All of our objects, as of the moment of the call.
fn everyone(objects: &Store<LLMDeployment>) -> Vec<ObjectRef<LLMDeployment>> {
    objects.state().iter().map(|object| ObjectRef::from_obj(object.as_ref())).collect()
}

struct Scope<'a> {
    client: &'a Client,
    namespace: Option<&'a str>,
}

impl Scope<'_> {
    fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self) -> Api<K> {
        match self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    fn children<K: Cached>(
        &self,
        writer: reflector::store::Writer<K>,
        trim: fn(&mut K),
    ) -> BoxStream<'static, Result<ObjectRef<LLMDeployment>, watcher::Error>> {
        follow(self.api(), ours(), writer, None, trim, |child: &K| owners(child))
    }

    /// What the objects of one model source have in common.
    fn shared<K: Cached>(
        &self,
        writer: reflector::store::Writer<K>,
    ) -> BoxStream<'static, Result<ObjectRef<LLMDeployment>, watcher::Error>> {
        let mut shares = Shares::of(writer.as_reader());
        let concerned = move |shared: &K| shares.concerned(shared);
        follow(self.api(), ours(), writer, None, trim_meta, concerned)
    }
}

fn ours() -> watcher::Config {
    watcher::Config::default().labels(&format!("{}={}", names::MANAGED_BY, names::MANAGER))
}

fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
    writer: reflector::store::Writer<K>,
    index: Option<Index>,
    trim: fn(&mut K),
    mut concerned: impl FnMut(&K) -> Vec<ObjectRef<LLMDeployment>> + Send + 'static,
) -> BoxStream<'static, Result<ObjectRef<LLMDeployment>, watcher::Error>>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let mut touched = Touched::of(writer.as_reader());
    watcher(api, config)
        .default_backoff()
        .modify(trim)
        .inspect_ok(move |event| {
            if let Some(index) = &index {
                index.note(event);
            }
        })
        .reflect(writer)
        .map_ok(move |event| {
            let objects = touched.by(event).into_iter();
            let concerned: Vec<_> = objects.flat_map(|object| concerned(&object)).collect();
            futures::stream::iter(concerned).map(Ok)
        })
        .try_flatten()
        .boxed()
}

/// Our objects among the owners of `child`.
fn owners<K: Resource>(child: &K) -> Vec<ObjectRef<LLMDeployment>> {
    let namespace = child.meta().namespace.clone().unwrap_or_default();
    child
        .owner_references()
        .iter()
        .filter(|owner| {
            owner.kind == LLMDeployment::kind(&())
                && owner.api_version == LLMDeployment::api_version(&())
        })
        .map(|owner| ObjectRef::new(&owner.name).within(&namespace))
        .collect()
}

/// An engine pod names its object; a pod of an inspect Job is followed to the Job's owners.
fn objects_of_pod(pod: &Pod, jobs: &Store<Job>) -> Vec<ObjectRef<LLMDeployment>> {
    let namespace = pod.namespace().unwrap_or_default();
    if let Some(name) = pod.labels().get(names::NAME) {
        return vec![ObjectRef::new(name).within(&namespace)];
    }
    let Some(key) = pod.labels().get(names::MODEL) else { return Vec::new() };
    let job = jobs.get(&ObjectRef::new(&names::inspect_job(key)).within(&namespace));
    job.map(|job| owners(job.as_ref())).unwrap_or_default()
}

/// A node that comes, goes or changes concerns everyone; that it is alive only those for whom no plan was found. While the
/// caches fill, everyone is looked at anyway.
fn follow_nodes(
    api: Api<Node>,
    writer: reflector::store::Writer<Node>,
    caches: Arc<Caches>,
) -> BoxStream<'static, Result<ObjectRef<LLMDeployment>, watcher::Error>> {
    watcher(api, watcher::Config::default())
        .default_backoff()
        .modify(trim_node)
        .reflect(writer)
        .map_ok(move |event| futures::stream::iter(objects_of_nodes(&event, &caches)).map(Ok))
        .try_flatten()
        .boxed()
}

fn objects_of_nodes(
    event: &watcher::Event<Node>,
    caches: &Caches,
) -> Vec<ObjectRef<LLMDeployment>> {
    let Caches { nodes, nodes_version, objects, .. } = caches;
    let changed = match event {
        watcher::Event::Init => return Vec::new(),
        watcher::Event::Apply(node) | watcher::Event::InitApply(node) => {
            nodes_version.note(&node.name_any(), Some(node))
        }
        watcher::Event::Delete(node) => nodes_version.note(&node.name_any(), None),
        watcher::Event::InitDone => {
            nodes_version.retain(|name| nodes.get(&ObjectRef::new(name)).is_some())
        }
    };
    if !changed || !caches.is_ready() {
        return objects_without_a_plan(objects);
    }
    everyone(objects)
}

fn objects_without_a_plan(objects: &Store<LLMDeployment>) -> Vec<ObjectRef<LLMDeployment>> {
    let planned = |object: &LLMDeployment| {
        let conditions = object.status.iter().flat_map(|status| &status.conditions);
        conditions.into_iter().any(|held| held.type_ == "Planned" && held.status == "True")
    };
    let waiting = objects.state_filter(|object| !planned(object));
    waiting.iter().map(|object| ObjectRef::from_obj(object.as_ref())).collect()
}

fn trim_meta<K: Resource>(object: &mut K) {
    object.meta_mut().managed_fields = None;
}

fn trim_revision(stored: &mut ControllerRevision) {
    trim_meta(stored);
    revision::pack(stored);
}

/// Of a pod only what tells whether it runs, where, with how much of the node, and why not.
fn trim_pod(pod: &mut Pod) {
    trim_meta(pod);
    if let Some(annotations) = &mut pod.metadata.annotations {
        annotations.retain(|name, _| name == names::DO_NOT_DISRUPT);
    }
    pod.metadata.owner_references = None;
    if let Some(spec) = pod.spec.take() {
        let mut volumes = spec.volumes.unwrap_or_default();
        volumes.retain(|volume| {
            volume.secret.is_some()
                || volume.persistent_volume_claim.is_some()
                || volume.config_map.is_some()
        });
        let volumes = (!volumes.is_empty()).then_some(volumes);
        pod.spec = Some(PodSpec {
            node_name: spec.node_name,
            volumes,
            containers: spec.containers.into_iter().map(needs).collect(),
            init_containers: spec.init_containers.map(|all| all.into_iter().map(needs).collect()),
            resources: spec.resources,
            overhead: spec.overhead,
            ..Default::default()
        });
    }
    if let Some(status) = &mut pod.status {
        status.pod_ips = None;
        status.host_ips = None;
        for container in status.container_statuses.iter_mut().flatten() {
            container.volume_mounts = None;
            container.resources = None;
            container.allocated_resources = None;
        }
    }
}

/// Of a container what its pod asks of a node.
fn needs(container: Container) -> Container {
    let Container { name, resources, restart_policy, .. } = container;
    Container { name, resources, restart_policy, ..Default::default() }
}

/// Of a node only what a pod may ask of it.
fn trim_node(node: &mut Node) {
    trim_meta(node);
    node.metadata.annotations = None;
    if let Some(status) = &mut node.status {
        status.images = None;
        status.conditions = None;
        status.addresses = None;
        status.node_info = None;
    }
}

/// What one reconcile may know of the cluster, as of one moment.
pub struct Seen {
    pub deployment: Option<Arc<Deployment>>,
    /// Newest first.
    pub revisions: Vec<Arc<ControllerRevision>>,
    /// Engine pods of the object, of any revision.
    pub pods: Vec<Arc<Pod>>,
    pub nodes: Vec<Arc<Node>>,
}

/// What the cluster holds for one model source.
pub struct SeenModel {
    pub claim: Option<Arc<PersistentVolumeClaim>>,
    pub facts: Option<Arc<ConfigMap>>,
    pub job: Option<Arc<Job>>,
    /// Around the pods of the Job.
    pub policy: Option<Arc<NetworkPolicy>>,
    pub job_pods: Vec<Arc<Pod>>,
}

impl Caches {
    /// Waits until every cache has seen its first list. The controller itself waits for `objects`.
    pub async fn ready(&self) {
        let mut filled = self.filled.clone();
        // An error means that the watches are gone, and the process with them.
        let _ = filled.wait_for(|filled| *filled).await;
    }

    /// Every pod that carries our label.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.state()
    }

    pub fn is_ready(&self) -> bool {
        *self.filled.borrow()
    }

    /// A store wakes one waiter only, so exactly one task may wait here, and none for `objects`, whose waiter is the
    /// controller.
    async fn wait_for_first_lists(&self) -> Result<(), reflector::store::WriterDropped> {
        self.deployments.wait_until_ready().await?;
        self.services.wait_until_ready().await?;
        self.service_accounts.wait_until_ready().await?;
        self.budgets.wait_until_ready().await?;
        self.policies.wait_until_ready().await?;
        self.revisions.wait_until_ready().await?;
        self.jobs.wait_until_ready().await?;
        self.claims.wait_until_ready().await?;
        self.facts.wait_until_ready().await?;
        self.pods.wait_until_ready().await?;
        self.nodes.wait_until_ready().await
    }

    pub fn get<K: Cached>(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        K::cache(self).get(&ObjectRef::new(name).within(namespace))
    }

    /// Pods of an object, or of a model's Job, which carry `label: value`.
    pub fn pods_with(&self, namespace: &str, label: &str, value: &str) -> Vec<Arc<Pod>> {
        self.labelled(&self.pods_of, namespace, label, value)
    }

    /// All that `index` knows in `namespace` and that carry `label: value`. By name: of two like objects every pass must
    /// tell of the same.
    fn labelled<K: Cached>(
        &self,
        index: &Index,
        namespace: &str,
        label: &str,
        value: &str,
    ) -> Vec<Arc<K>> {
        let names = index.names(namespace, value).into_iter();
        let found = names.filter_map(|name| self.get::<K>(namespace, &name));
        found.filter(|held| held.labels().get(label).is_some_and(|held| held == value)).collect()
    }

    /// Engine pods by namespace and name of their object.
    pub fn engine_pods(&self) -> HashMap<(String, String), Vec<Arc<Pod>>> {
        let mut by_object: HashMap<_, Vec<Arc<Pod>>> = HashMap::new();
        for pod in self.pods.state() {
            let Some(name) = pod.labels().get(names::NAME).cloned() else { continue };
            by_object.entry((pod.namespace().unwrap_or_default(), name)).or_default().push(pod);
        }
        by_object
    }

    /// Another number whenever the nodes changed in a way that may matter to a plan.
    pub fn nodes_version(&self) -> u64 {
        self.nodes_version.get()
    }

    pub fn observe(&self, namespace: &str, name: &str) -> Seen {
        let mut revisions: Vec<Arc<ControllerRevision>> =
            self.labelled(&self.revisions_of, namespace, names::NAME, name);
        revisions.sort_by_key(|revision| std::cmp::Reverse(revision.revision));
        Seen {
            deployment: self.get(namespace, name),
            revisions,
            pods: self.pods_with(namespace, names::NAME, name),
            nodes: by_name(self.nodes.state()),
        }
    }

    pub fn observe_model(&self, namespace: &str, key: &str) -> SeenModel {
        SeenModel {
            claim: self.get(namespace, &names::model(key)),
            facts: self.get(namespace, &names::model(key)),
            job: self.get(namespace, &names::inspect_job(key)),
            policy: self.get(namespace, &names::inspect_job(key)),
            job_pods: self.pods_with(namespace, names::MODEL, key),
        }
    }

    /// Waits until the cache shows a write that was answered with `version`, so that the next reconcile does not act
    /// on the past. Bounded: a watch that is down must not hold us.
    pub async fn catch_up<K: Cached>(&self, namespace: &str, name: &str, version: &str) {
        let deadline = tokio::time::Instant::now() + CATCH_UP_MAX;
        while tokio::time::Instant::now() < deadline {
            let shown = self.get::<K>(namespace, name).and_then(|held| held.resource_version());
            if shown.is_some_and(|shown| at_least(&shown, version)) {
                return;
            }
            tokio::time::sleep(CATCH_UP_STEP).await;
        }
        tracing::debug!(kind = %K::kind(&()), namespace, name, "the watch lags behind our write");
    }

    /// The same for a write of somebody else, after which ours was refused.
    pub async fn catch_up_changed<K: Cached>(&self, held: &K) {
        let deadline = tokio::time::Instant::now() + CATCH_UP_MAX;
        let (namespace, name) = (held.namespace().unwrap_or_default(), held.name_any());
        let stands = |now: Arc<K>| now.resource_version() == held.resource_version();
        while self.get::<K>(&namespace, &name).is_some_and(stands)
            && tokio::time::Instant::now() < deadline
        {
            tokio::time::sleep(CATCH_UP_STEP).await;
        }
    }

    /// The same for a deletion.
    pub async fn catch_up_gone<K: Cached>(&self, namespace: &str, name: &str, uid: Option<&str>) {
        let deadline = tokio::time::Instant::now() + CATCH_UP_MAX;
        let stands = |held: Arc<K>| {
            held.meta().uid.as_deref() == uid && held.meta().deletion_timestamp.is_none()
        };
        while self.get::<K>(namespace, name).is_some_and(stands)
            && tokio::time::Instant::now() < deadline
        {
            tokio::time::sleep(CATCH_UP_STEP).await;
        }
    }
}

/// A cache has no order, and of two like objects every pass must tell of the same.
fn by_name<K: Resource>(mut objects: Vec<Arc<K>>) -> Vec<Arc<K>> {
    objects.sort_by(|a, b| a.meta().name.cmp(&b.meta().name));
    objects
}

/// Resource versions are decimal numbers that grow; the API conventions say so since 1.35, and every server did.
fn at_least(shown: &str, wanted: &str) -> bool {
    match (shown.parse::<u128>(), wanted.parse::<u128>()) {
        (Ok(shown), Ok(wanted)) => shown >= wanted,
        _ => shown == wanted,
    }
}
