//! A namespace on a real API server with the operator at work in it. Controllers and kubelets are not there: the test
//! plays them where it has to, by writing the status of Jobs and pods.

use std::fmt::Debug;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, Resource, ResourceExt};
use plimsoll_crds::{LLMDeployment, LLMDeploymentStatus, generated};
use plimsoll_tests::cluster::{ApiServer, AuditEvent, Shared, shared_api_server};
pub use plimsoll_tests::facts::small_model as facts;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::sleep;

/// Everything the tests wait for comes about within this on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

pub trait Kind:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug
{
}
impl<K> Kind for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug
{
}

pub struct World {
    server: Shared<ApiServer>,
    pub client: Client,
    pub namespace: String,
    /// The API user of operators in this namespace; audit events are counted by it.
    pub user: String,
}

/// A running operator; it ends with the value.
pub struct Operator {
    child: Child,
    address: String,
    log: PathBuf,
}

impl World {
    /// None where this machine cannot run an API server, which has been said.
    pub async fn new(test: &str) -> Option<World> {
        let server = shared_api_server()?;
        let client = client(server.kubeconfig()).await;
        static WORLDS: AtomicU32 = AtomicU32::new(0);
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("{test}-{number}");
        let world = World { server, client, user: format!("operator-{namespace}"), namespace };
        world.prepare().await;
        Some(world)
    }

    async fn prepare(&self) {
        self.server.kubectl().apply(&generated::crd_yaml()).unwrap();
        let wait = ["wait", "--for=condition=Established", "crd/llmdeployments.plimsoll.dev"];
        self.server.kubectl().run(&wait).unwrap();
        let body = json!({"metadata": {"name": self.namespace}});
        let namespace: Namespace = serde_json::from_value(body).unwrap();
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        namespaces.create(&PostParams::default(), &namespace).await.unwrap();
        // Without a controller-manager nobody makes the account that pods get when they name none.
        self.create::<ServiceAccount>(json!({"metadata": {"name": "default"}})).await;
        self.set_nodes(1).await;
    }

    /// Exactly the nodes `node-0` to `node-(count-1)`, each with 8 CPUs and 16 GiB.
    pub async fn set_nodes(&self, count: usize) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let all = ListParams::default();
        nodes.delete_collection(&DeleteParams::default(), &all).await.unwrap();
        for index in 0..count {
            let body = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{index}")}});
            let node: Node = serde_json::from_value(body).unwrap();
            let name = nodes.create(&PostParams::default(), &node).await.unwrap().name_any();
            let capacity = json!({"cpu": "8", "memory": "16Gi", "pods": "110"});
            let patch = json!({"status": {"capacity": capacity, "allocatable": capacity,
                "conditions": [{"type": "Ready", "status": "True"}]}, "spec": {"taints": null}});
            nodes
                .patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch))
                .await
                .unwrap();
            nodes.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
        }
    }

    /// A tainted node with one GPU and these labels, beside the others. The next test removes it.
    pub async fn add_gpu_node(&self, name: &str, labels: Value) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let taint = json!({"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"});
        let body = json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": labels}, "spec": {"taints": [taint]}});
        nodes.create(&PostParams::default(), &serde_json::from_value(body).unwrap()).await.unwrap();
        let capacity = json!({"cpu": "16", "memory": "64Gi", "pods": "110", "nvidia.com/gpu": "1"});
        let patch = json!({"status": {"capacity": capacity, "allocatable": capacity,
            "conditions": [{"type": "Ready", "status": "True"}]}, "spec": {"taints": [taint]}});
        nodes.patch_status(name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
        nodes.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    }

    /// Lays labels over those of a node.
    pub async fn label_node(&self, name: &str, labels: Value) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
        nodes.patch(name, &PatchParams::default(), &patch).await.unwrap();
    }

    /// Starts an operator for this namespace; `more` flags come last.
    pub fn operator(&self, more: &[&str]) -> Operator {
        let kubeconfig = self.server.kubeconfig_for(&self.user, Some("system:masters")).unwrap();
        Operator::start(&kubeconfig, &self.namespace, more)
    }

    /// kubectl as an administrator, with `manifest` on its standard input; its failure ends the test.
    pub fn kubectl(&self, words: &[&str], manifest: &Value) -> String {
        self.server.kubectl().run_with_input(words, &manifest.to_string()).unwrap()
    }

    /// The same without one; its failure is an answer.
    pub fn try_kubectl(&self, words: &[&str]) -> anyhow::Result<String> {
        self.server.kubectl().run(words)
    }

    /// The same with another kubeconfig, and a Lease that no other operator asks for.
    pub fn operator_by(&self, kubeconfig: &Path, lease: &str) -> Operator {
        Operator::start(kubeconfig, &self.namespace, &["--lease-name", lease])
    }

    /// A client with an operator's rights and name.
    pub async fn client_of_operators(&self) -> Client {
        client(&self.server.kubeconfig_for(&self.user, Some("system:masters")).unwrap()).await
    }

    pub fn api<K: Kind>(&self) -> Api<K> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub async fn create<K: Kind + serde::Serialize>(&self, body: Value) -> K {
        let object: K = serde_json::from_value(body).unwrap();
        self.api().create(&PostParams::default(), &object).await.unwrap()
    }

    pub async fn get<K: Kind>(&self, name: &str) -> Option<K> {
        self.api().get_opt(name).await.unwrap()
    }

    pub async fn list<K: Kind>(&self, selector: &str) -> Vec<K> {
        self.api().list(&ListParams::default().labels(selector)).await.unwrap().items
    }

    pub async fn merge<K: Kind>(&self, name: &str, patch: Value) -> K {
        let params = PatchParams { field_manager: Some("a-person".into()), ..Default::default() };
        self.api().patch(name, &params, &Patch::Merge(&patch)).await.unwrap()
    }

    pub async fn merge_status<K: Kind>(&self, name: &str, status: Value) {
        let patch = json!({"status": status});
        let api: Api<K> = self.api();
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    }

    pub async fn delete<K: Kind>(&self, name: &str) {
        self.api::<K>().delete(name, &DeleteParams::background()).await.unwrap();
    }

    /// Applies an LLMDeployment whose model lies in the claim `models`.
    pub async fn declare(&self, name: &str, spec: Value) -> LLMDeployment {
        let mut whole = json!({"model": {"source": "pvc://models/tiny"}});
        for (field, value) in spec.as_object().unwrap() {
            whole[field] = value.clone();
        }
        self.create(json!({"apiVersion": "plimsoll.dev/v1alpha1", "kind": "LLMDeployment",
            "metadata": {"name": name}, "spec": whole}))
            .await
    }

    /// Waits until `check` brings something about the object's status.
    pub async fn status<T>(
        &self,
        name: &str,
        what: &str,
        check: impl Fn(&LLMDeploymentStatus) -> Option<T>,
    ) -> T {
        self.eventually::<LLMDeployment, T>(name, what, |object| check(object.status.as_ref()?))
            .await
    }

    /// Waits until the condition stands with this status and reason; returns its message.
    pub async fn condition(&self, name: &str, kind: &str, status: &str, reason: &str) -> String {
        self.status(name, &format!("{kind}={status} {reason}"), |held| {
            let condition = held.conditions.iter().find(|held| held.type_ == kind)?;
            (condition.status == status && condition.reason == reason)
                .then(|| condition.message.clone())
        })
        .await
    }

    /// Waits until the object is there and `check` brings something.
    pub async fn eventually<K: Kind, T>(
        &self,
        name: &str,
        what: &str,
        check: impl Fn(&K) -> Option<T>,
    ) -> T {
        let began = Instant::now();
        loop {
            let object = self.get::<K>(name).await;
            if let Some(found) = object.as_ref().and_then(&check) {
                return found;
            }
            assert!(began.elapsed() < PATIENCE, "{what} did not come about; now: {object:#?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits for an event with all of `parts` in its note: events follow the status that they tell of.
    pub async fn told(&self, reason: &str, parts: &[&str]) {
        let is_it = |event: &Event| {
            let note = event.note.as_deref().unwrap_or_default();
            event.reason.as_deref() == Some(reason) && parts.iter().all(|part| note.contains(part))
        };
        let began = Instant::now();
        while !self.list::<Event>("").await.iter().any(is_it) {
            assert!(began.elapsed() < PATIENCE, "no event {reason} told of {parts:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn eventually_gone<K: Kind>(&self, name: &str) {
        let began = Instant::now();
        while let Some(object) = self.get::<K>(name).await {
            assert!(began.elapsed() < PATIENCE, "still there: {object:#?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// The one inspect Job, once it is there.
    pub async fn inspect_job(&self) -> Job {
        let began = Instant::now();
        loop {
            let mut jobs = self.list::<Job>("plimsoll.dev/model").await;
            assert!(jobs.len() < 2, "one Job per source: {jobs:#?}");
            if let Some(job) = jobs.pop() {
                return job;
            }
            assert!(began.elapsed() < PATIENCE, "no inspect Job came about");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Plays kubelet and Job controller: the inspect Job's pod ends with `message`.
    pub async fn finish_inspect(&self, message: &Value, exit_code: i32) -> Job {
        let job = self.inspect_job().await;
        let template = serde_json::to_value(&job.spec.as_ref().unwrap().template).unwrap();
        let name = format!("{}-pod", job.name_any());
        let mut spec = template["spec"].clone();
        spec["nodeName"] = "node-0".into();
        self.create::<Pod>(
            json!({"metadata": {"name": name, "labels": template["metadata"]["labels"]},
            "spec": spec}),
        )
        .await;
        let ended =
            json!({"exitCode": exit_code, "message": message.to_string(), "reason": "Completed"});
        let phase = if exit_code == 0 { "Succeeded" } else { "Failed" };
        self.merge_status::<Pod>(
            &name,
            json!({"phase": phase, "containerStatuses": [{
            "name": "inspect", "image": "i", "imageID": "i", "ready": false, "restartCount": 0,
            "state": {"terminated": ended}}]}),
        )
        .await;
        // A failed Job is old enough to be tried again. One that is complete has only now ended: its pod's words may reach
        // the operator after it.
        let at = if exit_code == 0 {
            Timestamp::from_second(Timestamp::now().as_second()).unwrap().to_string()
        } else {
            "2026-01-01T00:00:00Z".to_owned()
        };
        let condition = |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": at, "lastProbeTime": at});
        let status = if exit_code == 0 {
            json!({"startTime": at, "completionTime": at, "succeeded": 1, "ready": 0, "uncountedTerminatedPods": {},
                "conditions": [condition("SuccessCriteriaMet"), condition("Complete")]})
        } else {
            json!({"startTime": at, "failed": 1, "ready": 0, "uncountedTerminatedPods": {},
                "conditions": [condition("FailureTarget"), condition("Failed")]})
        };
        self.merge_status::<Job>(&job.name_any(), status).await;
        job
    }

    /// Plays the Deployment's controllers: one pod of its template, ready or not. Returns the pod's name.
    pub async fn run_pod(&self, deployment: &str, ready: bool) -> String {
        let held: k8s_openapi::api::apps::v1::Deployment = self.get(deployment).await.unwrap();
        let template = serde_json::to_value(&held.spec.template).unwrap();
        static PODS: AtomicU32 = AtomicU32::new(0);
        let name = format!("{deployment}-pod-{}", PODS.fetch_add(1, Ordering::Relaxed));
        let mut spec = template["spec"].clone();
        spec["nodeName"] = "node-0".into();
        let mut metadata = template["metadata"].clone();
        metadata["name"] = name.as_str().into();
        self.create::<Pod>(json!({"metadata": metadata, "spec": spec})).await;
        let said = if ready { "True" } else { "False" };
        let status = json!({"phase": "Running", "conditions": [
            {"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": said}]});
        self.merge_status::<Pod>(&name, status).await;
        name
    }

    /// From nothing to Ready, with `replicas` pods.
    pub async fn bring_up(&self, name: &str, spec: Value) -> LLMDeployment {
        let declared = self.declare(name, spec).await;
        self.finish_inspect(&facts(), 0).await;
        self.condition(name, "Ready", "False", "CreatingPods").await;
        for _ in 0..declared.spec.replicas {
            self.run_pod(name, true).await;
        }
        self.condition(name, "Ready", "True", "Serving").await;
        declared
    }

    /// Requests of this namespace's operators, but for the Lease.
    pub fn requests(&self) -> Vec<AuditEvent> {
        let mut events = self.server.audit().unwrap();
        events.retain(|event| event.user == self.user && event.resource != "leases");
        events
    }

    pub fn writes(&self) -> Vec<AuditEvent> {
        let mut events = self.requests();
        events.retain(AuditEvent::is_write);
        events
    }

    /// Waits out a quiet time; the requests but for watches that came meanwhile.
    pub async fn requests_during(&self, quiet: Duration) -> Vec<AuditEvent> {
        // What the last change still brings: an event follows the status it tells of.
        sleep(Duration::from_secs(1)).await;
        let before = self.requests().len();
        sleep(quiet).await;
        let mut events = self.requests().split_off(before);
        events.retain(|event| event.verb != "watch");
        events
    }
}

impl Operator {
    fn start(kubeconfig: &Path, namespace: &str, more: &[&str]) -> Operator {
        static OPERATORS: AtomicU32 = AtomicU32::new(0);
        let number = OPERATORS.fetch_add(1, Ordering::Relaxed);
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let log = std::env::temp_dir()
            .join(format!("plimsoll-operator-{}-{number}.log", std::process::id()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
        command
            .args(["run", "--namespace", namespace, "--lease-namespace", namespace])
            .args(["--listen", &address, "--identity", &format!("operator-{number}")])
            .args(more)
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap());
        Operator { child: command.spawn().unwrap(), address, log }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What one of its HTTP endpoints answers, head and body.
    pub fn ask(&self, path: &str) -> String {
        let mut stream = std::net::TcpStream::connect(&self.address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: operator\r\nconnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// SIGTERM, then its end; true where it ended with status 0.
    pub fn stop(mut self) -> bool {
        Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        self.child.wait().unwrap().success()
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            eprintln!("--- operator log ---\n{}", self.log());
        }
        std::fs::remove_file(&self.log).ok();
    }
}

async fn client(kubeconfig: &Path) -> Client {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let options = KubeConfigOptions::default();
    Client::try_from(Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap()).unwrap()
}
