//! One namespace on the installed node, and what a story does in it.
//!
//! In: manifests. Out: an LLMDeployment's state, and connections to its Service. When the story
//! panics, everything that tells why is printed. Never shares a namespace with another story.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cluster::{Kubectl, Node, wait_until};
use crate::http::Connection;
use crate::install;

/// Longest wait for a model to be found, planned, loaded and Ready.
pub const READY_MAX: Duration = Duration::from_secs(120);

/// A namespace that enforces the restricted pod security level.
pub struct Stage<'node> {
    pub node: &'node Node,
    pub namespace: &'static str,
}

impl<'node> Stage<'node> {
    pub fn new(node: &'node Node, namespace: &'static str) -> Result<Stage<'node>> {
        install::restricted_namespace(node, namespace)?;
        Ok(Stage { node, namespace })
    }

    fn kubectl(&self) -> &Kubectl {
        self.node.kubectl()
    }

    /// kubectl in this namespace.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        self.kubectl().run(&[&["--namespace", self.namespace], args].concat())
    }

    /// `kubectl get -o json` in this namespace.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        self.kubectl().get(&[&["--namespace", self.namespace], args].concat())
    }

    /// Applies a manifest given as text.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        let words = ["--namespace", self.namespace, "apply", "-f", "-"];
        self.kubectl().run_with_input(&words, manifest)
    }

    /// A bound PersistentVolumeClaim called `name` with the files of `folder` under `path`, and where
    /// they lie on the machine.
    pub fn claim_with(&self, name: &str, path: &str, folder: &Path) -> Result<PathBuf> {
        let target = self.volume(name)?.join(path);
        std::fs::create_dir_all(&target)?;
        copy_files(folder, &target)?;
        self.apply(&format!(
            "{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: {name}}}, spec: \
             {{accessModes: [ReadWriteMany], storageClassName: '', volumeName: {}-{name}, \
             resources: {{requests: {{storage: 1Gi}}}}}}}}",
            self.namespace
        ))?;
        let words = ["wait", "--for=jsonpath={.status.phase}=Bound", "--timeout=30s"];
        self.run(&[&words[..], &[&format!("pvc/{name}")]].concat())?;
        Ok(target)
    }

    /// A PersistentVolume for a claim of this namespace: a folder of the node, 30 GiB on paper.
    pub fn volume(&self, name: &str) -> Result<PathBuf> {
        let folder = self.node.volume(&format!("{}-{name}", self.namespace))?;
        self.kubectl().apply(&format!(
            "{{apiVersion: v1, kind: PersistentVolume, metadata: {{name: {}-{name}}}, spec: \
             {{accessModes: [ReadWriteOnce, ReadWriteMany], capacity: {{storage: 30Gi}}, \
             storageClassName: '', persistentVolumeReclaimPolicy: Retain, \
             hostPath: {{path: '{}'}}}}}}",
            self.namespace,
            folder.display()
        ))?;
        Ok(folder)
    }

    /// `kubectl wait` until the object is Ready for its current generation.
    pub fn wait_ready(&self, name: &str) -> Result<()> {
        let timeout = format!("--timeout={}s", READY_MAX.as_secs());
        self.run(&["wait", "--for=condition=Ready", &timeout, &format!("llmd/{name}")])?;
        wait_until(&format!("{name} is Ready for its last change"), READY_MAX, || {
            let object = self.get(&["llmd", name])?;
            let seen = object["status"]["observedGeneration"] == object["metadata"]["generation"];
            let ready = condition(&object, "Ready").is_some_and(|held| held["status"] == "True");
            Ok((seen && ready).then_some(()))
        })
    }

    /// Waits for a true condition and returns it.
    pub fn wait_for(&self, name: &str, wanted: &str) -> Result<Value> {
        wait_until(&format!("{name} is {wanted}"), READY_MAX, || {
            let object = self.get(&["llmd", name])?;
            Ok(condition(&object, wanted).filter(|held| held["status"] == "True").cloned())
        })
    }

    /// Names of the engine pods that are not on their way out.
    pub fn pods(&self, name: &str) -> Result<Vec<String>> {
        let selector = format!("--selector=plimsoll.dev/name={name}");
        let pods = self.get(&["pods", &selector])?;
        let items = pods["items"].as_array().context("a list has items")?;
        let here = items.iter().filter(|pod| pod.pointer("/metadata/deletionTimestamp").is_none());
        Ok(here.filter_map(|pod| Some(pod["metadata"]["name"].as_str()?.to_string())).collect())
    }

    /// The virtual address of a Service, once it leads somewhere: kube-proxy learns of a pod a moment
    /// after its object is Ready.
    pub fn service(&self, name: &str) -> Result<SocketAddr> {
        let service = self.get(&["service", name])?;
        let address = service["spec"]["clusterIP"].as_str().context("a Service has an address")?;
        let port = service.pointer("/spec/ports/0/port").and_then(Value::as_u64);
        let address = format!("{address}:{}", port.context("a Service has a port")?).parse()?;
        wait_until(&format!("Service {name} answers"), Duration::from_secs(30), || {
            self.connect(address).map(|_| Some(address))
        })
    }

    /// A new connection through the Service.
    pub fn connect(&self, address: SocketAddr) -> Result<Connection> {
        self.node.inside(|| Connection::open(address))
    }

    /// What remains of what the operator made, by kind and name.
    pub fn remains(&self) -> Result<String> {
        let kinds = "llmd,deployments,replicasets,pods,services,serviceaccounts,jobs,configmaps,\
                     controllerrevisions,poddisruptionbudgets,networkpolicies,persistentvolumeclaims";
        let label = "--selector=app.kubernetes.io/managed-by=plimsoll";
        self.run(&["get", kinds, label, "--output=name", "--ignore-not-found"])
    }

    fn explain(&self) {
        let logs = ["logs", "--namespace", install::NAMESPACE, "deployment/plimsoll", "--tail=60"];
        let attempts = [
            self.run(&["describe", "llmd"]),
            self.run(&["get", "all,pvc", "--output=wide"]),
            self.run(&["describe", "pods,jobs"]),
            self.run(&["get", "events", "--sort-by=.lastTimestamp"]),
            self.run(&["logs", "--selector=plimsoll.dev/name", "--tail=30", "--prefix"]),
            self.kubectl().run(&logs),
        ];
        for told in attempts {
            eprintln!("{}", told.unwrap_or_else(|error| format!("{error:#}")));
        }
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.explain();
        }
        // Another story must not find this one's pods in its way; the node outlives both.
        let words = ["delete", "namespace", self.namespace, "--wait=false"];
        self.kubectl().run(&words).ok();
    }
}

/// A condition of an object by its type.
pub fn condition<'object>(object: &'object Value, wanted: &str) -> Option<&'object Value> {
    let conditions = object.pointer("/status/conditions")?.as_array()?;
    conditions.iter().find(|held| held["type"] == wanted)
}

/// Copies the files of a folder, not of its subfolders.
fn copy_files(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from).with_context(|| format!("{}", from.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    if std::fs::read_dir(to)?.next().is_none() {
        bail!("{} has no files", from.display());
    }
    Ok(())
}
