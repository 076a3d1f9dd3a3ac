//! In: watches on our kind, its children, their pods and the nodes. Out: caches of trimmed objects, the stream of
//! objects to reconcile, and [`Seen`]: everything one reconcile may know of the cluster. Never here: a write, a
//! decision, a read beside the watches.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{BoxStream, SelectAll, StreamExt, TryStreamExt};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{
    ControllerRevision, Deployment, DeploymentCondition, DeploymentStatus,
};
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
use tokio::sync::watch;
use tokio::time::Instant;

use crate::desired::monitoring::{self, PodMonitor, PrometheusRule};
use crate::desired::names;

mod cache;
mod index;
mod nodes_version;
mod optional;
mod packed;
mod shares;
mod touched;

use cache::{Cache, Filling, indexed_by_label};
pub use cache::{Cached, PodBrief};
use nodes_version::NodesVersion;
pub use optional::Optional;
use shares::Shares;
use touched::Touched;

/// How long a reconcile waits until its own write shows in the cache, before it goes on without.
const CATCH_UP_MAX: Duration = Duration::from_secs(2);
const CATCH_UP_STEP: Duration = Duration::from_millis(5);

/// That nodes are alive is heard this often.
const ALIVE_EVERY: Duration = Duration::from_secs(10);
/// Objects of one page of a list, which comes in whole before it is packed.
const PAGE_OBJECTS: u32 = 100;

/// One cache per kind, filled by one watch each.
pub struct Caches {
    pub objects: Store<LLMDeployment>,
    /// True once every cache but `objects` has seen its first list.
    filled: watch::Receiver<bool>,
    deployments: Cache<Deployment>,
    services: Cache<Service>,
    service_accounts: Cache<ServiceAccount>,
    budgets: Cache<PodDisruptionBudget>,
    policies: Cache<NetworkPolicy>,
    revisions: Cache<ControllerRevision>,
    jobs: Cache<Job>,
    claims: Cache<PersistentVolumeClaim>,
    facts: Cache<ConfigMap>,
    pods: Cache<Pod>,
    nodes: Store<Node>,
    nodes_version: NodesVersion,
    /// Kinds of the Prometheus operator, which may be there, come or go.
    pub pod_monitors: Optional<PodMonitor>,
    pub prometheus_rules: Optional<PrometheusRule>,
}

/// Objects to look at, as the watches bring them.
pub type Triggers = SelectAll<BoxStream<'static, Result<ObjectRef<LLMDeployment>, watcher::Error>>>;

/// Opens one watch per kind, in `namespace` or everywhere. The caches fill while the triggers are polled.
pub fn start(client: &Client, namespace: Option<&str>) -> (Arc<Caches>, Triggers) {
    let (objects, objects_writer) = store();
    let (nodes, nodes_writer) = store();
    let (deployments, deployments_filling) = Cache::empty();
    let (services, services_filling) = Cache::empty();
    let (service_accounts, service_accounts_filling) = Cache::empty();
    let (budgets, budgets_filling) = Cache::empty();
    let (policies, policies_filling) = Cache::empty();
    let (revisions, revisions_filling) = Cache::empty();
    let (jobs, jobs_filling) = Cache::empty();
    let (claims, claims_filling) = Cache::empty();
    let (facts, facts_filling) = Cache::empty();
    let (pods, pods_filling) = Cache::empty();
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
        jobs,
        claims,
        facts,
        pods,
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
    let jobs = caches.jobs.clone();
    let by_label = move |pod: &Pod| objects_of_pod(pod, &jobs);
    let mut triggers = SelectAll::new();
    triggers.push(follow_objects(scope.api(), objects_writer));
    triggers.push(scope.children(deployments_filling, trim_deployment));
    triggers.push(scope.children(services_filling, trim_meta));
    triggers.push(scope.children(service_accounts_filling, trim_meta));
    triggers.push(scope.children(budgets_filling, trim_meta));
    triggers.push(scope.children(revisions_filling, trim_meta));
    triggers.push(scope.shared(policies_filling));
    triggers.push(scope.shared(jobs_filling));
    triggers.push(scope.shared(claims_filling));
    triggers.push(scope.shared(facts_filling));
    triggers.push(follow(scope.api(), pods_filling, trim_pod, by_label));
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
        filling: Filling<K>,
        trim: fn(&mut K),
    ) -> BoxStream<'static, Result<ObjectRef<LLMDeployment>, watcher::Error>> {
        follow(self.api(), filling, trim, |child: &K| owners(child))
    }

    /// What the objects of one model source have in common.
    fn shared<K: Cached>(
        &self,
        filling: Filling<K>,
    ) -> BoxStream<'static, Result<ObjectRef<LLMDeployment>, watcher::Error>> {
        let mut shares = Shares::of(filling.cache.store.clone());
        follow(self.api(), filling, trim_meta, move |shared: &K| shares.concerned(shared))
    }
}

fn all() -> watcher::Config {
    watcher::Config::default().page_size(PAGE_OBJECTS)
}

fn ours() -> watcher::Config {
    all().labels(&format!("{}={}", names::MANAGED_BY, names::MANAGER))
}

fn follow<K: Cached>(
    api: Api<K>,
    mut filling: Filling<K>,
    trim: fn(&mut K),
    mut concerned: impl FnMut(&K) -> Vec<ObjectRef<LLMDeployment>> + Send + 'static,
) -> BoxStream<'static, Result<ObjectRef<LLMDeployment>, watcher::Error>> {
    let mut touched = Touched::of(filling.cache.store.clone());
    watcher(api, ours())
        .default_backoff()
        .modify(trim)
        .map_ok(move |mut event| {
            let mut objects = Vec::new();
            if filling.take(&mut event) {
                touched.by(&event, |object| objects.extend(concerned(object)));
            }
            futures::stream::iter(objects).map(Ok)
        })
        .try_flatten()
        .boxed()
}

/// The controller tells of objects that are gone by itself. Those of a list are read once all of it is in the cache.
fn follow_objects(
    api: Api<LLMDeployment>,
    writer: reflector::store::Writer<LLMDeployment>,
) -> BoxStream<'static, Result<ObjectRef<LLMDeployment>, watcher::Error>> {
    let objects = writer.as_reader();
    watcher(api, all())
        .default_backoff()
        .modify(trim_meta)
        .reflect(writer)
        .map_ok(move |event| {
            let touched = match event {
                watcher::Event::Apply(object) | watcher::Event::Delete(object) => {
                    vec![ObjectRef::from_obj(&object)]
                }
                watcher::Event::InitDone => everyone(&objects),
                watcher::Event::Init | watcher::Event::InitApply(_) => Vec::new(),
            };
            futures::stream::iter(touched).map(Ok)
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
fn objects_of_pod(pod: &Pod, jobs: &Cache<Job>) -> Vec<ObjectRef<LLMDeployment>> {
    let namespace = pod.namespace().unwrap_or_default();
    if let Some(name) = pod.labels().get(names::NAME) {
        return vec![ObjectRef::new(name).within(&namespace)];
    }
    let Some(key) = pod.labels().get(names::MODEL) else { return Vec::new() };
    let job = jobs.get(&namespace, &names::inspect_job(key));
    job.map(|job| owners(job.as_ref())).unwrap_or_default()
}

/// A node that comes, goes or changes concerns everyone; that it is alive only those for whom no plan was found. While the
/// caches fill, everyone is looked at anyway.
fn follow_nodes(
    api: Api<Node>,
    writer: reflector::store::Writer<Node>,
    caches: Arc<Caches>,
) -> BoxStream<'static, Result<ObjectRef<LLMDeployment>, watcher::Error>> {
    let mut looked = None;
    watcher(api, all())
        .default_backoff()
        .modify(trim_node)
        .reflect(writer)
        .map_ok(move |event| {
            let objects = objects_of_nodes(&event, &caches, &mut looked);
            futures::stream::iter(objects).map(Ok)
        })
        .try_flatten()
        .boxed()
}

fn objects_of_nodes(
    event: &watcher::Event<Node>,
    caches: &Caches,
    looked: &mut Option<Instant>,
) -> Vec<ObjectRef<LLMDeployment>> {
    let Caches { nodes, nodes_version, objects, .. } = caches;
    let changed = match event {
        // The cache holds a list once it is whole.
        watcher::Event::Init | watcher::Event::InitApply(_) => return Vec::new(),
        watcher::Event::Apply(node) => nodes_version.note(&node.name_any(), Some(node)),
        watcher::Event::Delete(node) => nodes_version.note(&node.name_any(), None),
        watcher::Event::InitDone => {
            let changed = nodes
                .state()
                .iter()
                .map(|node| nodes_version.note(&node.name_any(), Some(node)))
                .fold(false, |any, changed| any | changed);
            nodes_version.retain(|name| nodes.get(&ObjectRef::new(name)).is_some()) | changed
        }
    };
    if changed && caches.is_ready() {
        return everyone(objects);
    }
    // A thousand nodes are alive every few seconds.
    if !changed && looked.is_some_and(|looked: Instant| looked.elapsed() < ALIVE_EVERY) {
        return Vec::new();
    }
    *looked = Some(Instant::now());
    objects_without_a_plan(objects)
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

/// Of what its controller says only what keeps pods from coming: pods are counted by themselves.
fn trim_deployment(deployment: &mut Deployment) {
    trim_meta(deployment);
    if let Some(annotations) = &mut deployment.metadata.annotations {
        annotations.retain(|name, _| !name.starts_with("deployment.kubernetes.io/"));
    }
    let Some(status) = deployment.status.take() else { return };
    let conditions = status.conditions.into_iter().flatten();
    let in_the_way = conditions.filter(|held| {
        held.type_.as_deref() == Some("ReplicaFailure")
            || held.reason.as_deref() == Some("ProgressDeadlineExceeded")
    });
    let plain = |condition: DeploymentCondition| DeploymentCondition {
        last_update_time: None,
        last_transition_time: None,
        ..condition
    };
    let in_the_way: Vec<_> = in_the_way.map(plain).collect();
    if !in_the_way.is_empty() {
        deployment.status = Some(DeploymentStatus {
            observed_generation: status.observed_generation,
            conditions: Some(in_the_way),
            ..Default::default()
        });
    }
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

    /// Of every pod that carries our label its namespace, its name and what is known in brief.
    pub fn each_pod(&self, mut see: impl FnMut(&str, &str, &PodBrief)) {
        for pod in self.pods.store.state() {
            let (namespace, name) = pod.names();
            see(namespace, name, &pod.brief);
        }
    }

    pub fn is_ready(&self) -> bool {
        *self.filled.borrow()
    }

    /// A store wakes one waiter only, so exactly one task may wait here, and none for `objects`, whose waiter is the
    /// controller.
    async fn wait_for_first_lists(&self) -> Result<(), reflector::store::WriterDropped> {
        self.deployments.store.wait_until_ready().await?;
        self.services.store.wait_until_ready().await?;
        self.service_accounts.store.wait_until_ready().await?;
        self.budgets.store.wait_until_ready().await?;
        self.policies.store.wait_until_ready().await?;
        self.revisions.store.wait_until_ready().await?;
        self.jobs.store.wait_until_ready().await?;
        self.claims.store.wait_until_ready().await?;
        self.facts.store.wait_until_ready().await?;
        self.pods.store.wait_until_ready().await?;
        self.nodes.wait_until_ready().await
    }

    pub fn get<K: Cached>(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        K::cache(self).get(namespace, name)
    }

    pub fn holds<K: Cached>(&self, namespace: &str, name: &str) -> bool {
        K::cache(self).packed(namespace, name).is_some()
    }

    /// Pods of an object, or of a model's Job, which carry `label: value`.
    pub fn pods_with(&self, namespace: &str, label: &str, value: &str) -> Vec<Arc<Pod>> {
        let found = self.pods.indexed(namespace, value).into_iter();
        found.filter(|held| indexed_by_label(held.as_ref(), label) == Some(value)).collect()
    }

    /// What the object of this uid shares with others.
    pub fn shared_by<K: Cached>(&self, namespace: &str, uid: &str) -> Vec<Arc<K>> {
        K::cache(self).indexed(namespace, uid)
    }

    /// Another number whenever the nodes changed in a way that may matter to a plan.
    pub fn nodes_version(&self) -> u64 {
        self.nodes_version.get()
    }

    pub fn observe(&self, namespace: &str, name: &str) -> Seen {
        let mut revisions = self.revisions.indexed(namespace, name);
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
    /// on the past.
    pub async fn catch_up<K: Cached>(&self, namespace: &str, name: &str, version: &str) {
        let cache = K::cache(self);
        let shows =
            || cache.packed(namespace, name).is_some_and(|held| at_least(held.version(), version));
        catch_up(shows, &K::kind(&()), name).await;
    }

    /// The same for an object of our own kind.
    pub async fn catch_up_object(&self, namespace: &str, name: &str, version: &str) {
        let object = ObjectRef::new(name).within(namespace);
        let shows = || {
            let held = self.objects.get(&object).and_then(|held| held.resource_version());
            held.is_some_and(|held| at_least(&held, version))
        };
        catch_up(shows, names::KIND, name).await;
    }

    /// The same for a write of somebody else, after which ours was refused.
    pub async fn catch_up_changed<K: Cached>(&self, held: &K) {
        let (namespace, name) = (held.namespace().unwrap_or_default(), held.name_any());
        let before = held.resource_version().unwrap_or_default();
        let cache = K::cache(self);
        let changed = || cache.packed(&namespace, &name).is_none_or(|now| now.version() != before);
        catch_up(changed, &K::kind(&()), &name).await;
    }

    /// The same for a deletion.
    pub async fn catch_up_gone<K: Cached>(&self, namespace: &str, name: &str, uid: Option<&str>) {
        let leaves = |held: Arc<K>| {
            held.meta().uid.as_deref() != uid || held.meta().deletion_timestamp.is_some()
        };
        let gone = || self.get::<K>(namespace, name).is_none_or(leaves);
        catch_up(gone, &K::kind(&()), name).await;
    }
}

/// Waits until the cache shows what we know. Bounded: a watch that is down must not hold us.
async fn catch_up(shows: impl Fn() -> bool, kind: &str, name: &str) {
    let deadline = Instant::now() + CATCH_UP_MAX;
    while !shows() {
        if Instant::now() >= deadline {
            tracing::debug!(kind, name, "the watch lags behind what we know");
            return;
        }
        tokio::time::sleep(CATCH_UP_STEP).await;
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::rollout;

    fn trimmed(status: Value) -> Deployment {
        let mut deployment = serde_json::from_value(json!({
            "metadata": {"name": "a", "generation": 3, "annotations": {"deployment.kubernetes.io/revision": "7"}},
            "status": status,
        }))
        .unwrap();
        trim_deployment(&mut deployment);
        deployment
    }

    #[test]
    fn of_a_deployment_that_goes_well_nothing_is_kept_that_changes_by_itself() {
        let begun = trimmed(json!({"observedGeneration": 2}));
        let condition = json!({"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable",
            "lastUpdateTime": "2026-01-01T00:00:00Z"});
        let done =
            trimmed(json!({"observedGeneration": 3, "replicas": 1, "conditions": [condition]}));
        assert_eq!(begun, done);
        assert!(!rollout::overdue(Some(&done)));
    }

    #[test]
    fn what_keeps_pods_from_coming_is_kept() {
        let late = |generation: i64| {
            let condition = json!({"type": "Progressing", "status": "False",
                "reason": "ProgressDeadlineExceeded"});
            trimmed(json!({"observedGeneration": generation, "conditions": [condition]}))
        };
        assert!(rollout::overdue(Some(&late(3))));
        assert!(!rollout::overdue(Some(&late(2))), "that was about an older spec");
        let condition =
            json!({"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"});
        let refused = trimmed(json!({"conditions": [condition]}));
        let conditions = refused.status.unwrap().conditions.unwrap();
        assert_eq!(conditions[0].message.as_deref(), Some("exceeded quota"));
    }
}
