//! A control plane for a fleet of objects on nodes that nobody runs.
//!
//! In: a name. Out: etcd, API server, controller-manager and scheduler in a network of their own, and fake nodes with GPUs
//! whose pods kwok, where it is asked for, turns Ready at once. Nothing runs in a pod: control planes are measured here,
//! and nothing else. Needs root.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::control::{self, AuditEvent, ControlPlane, Ground, start_part};
use super::kubectl::Kubectl;
use super::pki::Identity;
use super::process::{Daemon, Lifetime, wait_until};
use super::sandbox::{NODE_ADDRESS, Sandbox};
use super::tools::{self, Tools};

/// Longest wait until the controller-manager has made what a namespace needs.
const STARTED_MAX: Duration = Duration::from_secs(60);
/// What kwok's pods get theirs from by default.
const POD_ADDRESSES: &str = "10.0.0.0/24";
/// Pods of a kubelet with default settings.
const PODS_OF_A_NODE: u32 = 110;

/// A running control plane; it ends with the value.
pub struct Fleet {
    kubectl: Kubectl,
    parts: Vec<Daemon>,
    plane: ControlPlane,
    sandbox: Sandbox,
}

impl Fleet {
    /// Starts everything but kwok, in the place of an earlier fleet of that name.
    pub fn start(name: &str) -> Result<Fleet> {
        let tools = Tools::find()?;
        let sandbox = Sandbox::create(name, Lifetime::Owner)?;
        // Only the network is theirs, so that a process has the number that we know it by.
        let inside = |words: &[String]| sandbox.client(words);
        let ground = Ground::of_node(sandbox.folder(), &inside, &inside, Lifetime::Owner)?;
        // Where kwok's pods say they are, a connection is refused at once: no engine is there.
        let route = ["ip", "route", "add", "local", POD_ADDRESSES, "dev", "lo"].map(String::from);
        ensure!(sandbox.client(&route).status()?.success(), "no route to {POD_ADDRESSES}");
        let plane = ControlPlane::start(&ground, &tools)?;
        let manager = controller_manager_flags(&plane)?;
        let scheduler = control::scheduler_flags(&plane)?;
        let parts = vec![
            start_part("kube-controller-manager", &tools, manager, &ground)?,
            start_part("kube-scheduler", &tools, scheduler, &ground)?,
        ];
        let kubectl = control::kubectl(&tools, &plane.admin, sandbox.network_prefix());
        let mut fleet = Fleet { kubectl, parts, plane, sandbox };
        wait_until("the controllers are at work", STARTED_MAX, || {
            fleet.check()?;
            Ok(fleet.kubectl.run(&["get", "serviceaccount", "default"]).ok().map(drop))
        })?;
        Ok(fleet)
    }

    /// Fake nodes with 256 CPUs, 2 TiB and these GPUs each, Ready as they come.
    pub fn add_nodes(&self, count: usize, gpus: u32, labels: &Value) -> Result<()> {
        let nodes: Vec<Value> = (0..count).map(|index| node(index, gpus, labels)).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": nodes});
        self.kubectl.run_with_input(&["create", "-f", "-"], &list.to_string())?;
        Ok(())
    }

    /// From now on a pod turns Ready as soon as it has a node, by the stages that kwok calls fast.
    pub fn start_kwok(&mut self) -> Result<()> {
        let kwok = tools::kwok()?;
        let stages = Command::new(&kwok).arg("stages").output()?;
        let config = self.folder().join("kwok.yaml");
        std::fs::write(&config, stages.stdout)?;
        let kubeconfig = self.kubeconfig_for("kwok", Some("system:masters"))?;
        let words = [
            kwok.display().to_string(),
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--config={}", config.display()),
            "--manage-all-nodes=true".into(),
        ];
        let kwok = self.program("kwok", &words, &[])?;
        self.parts.push(kwok);
        Ok(())
    }

    /// A program in the fleet's network, with its log `NAME.log` beside the others. Its number is the program's own.
    pub fn program(&self, name: &str, words: &[String], env: &[(&str, &str)]) -> Result<Daemon> {
        let log = self.folder().join(format!("log/{name}.log"));
        let mut command = self.sandbox.client(words);
        command.envs(env.iter().copied());
        Daemon::start(name, command, &log, Lifetime::Owner)
    }

    /// Every file of the fleet lies here.
    pub fn folder(&self) -> &Path {
        self.sandbox.folder()
    }

    /// The address that everything listens on.
    pub fn address(&self) -> IpAddr {
        NODE_ADDRESS.parse().expect("the node has an address")
    }

    /// The kubeconfig of an administrator; its server is reachable from inside only.
    pub fn kubeconfig(&self) -> &Path {
        &self.plane.admin
    }

    /// Writes a kubeconfig for another user; rights are up to RBAC.
    pub fn kubeconfig_for(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        self.plane.kubeconfig_for(user, group)
    }

    /// The cluster's authority, and a certificate of it for a server on the fleet's address.
    pub fn serving_certificate(&self, name: &str) -> Result<(PathBuf, Identity)> {
        let identity = self.plane.authority.server(name, &[self.address()], &[])?;
        Ok((self.plane.authority.file("ca.crt"), identity))
    }

    /// kubectl as the administrator.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// Requests of one user that were answered since `from`, a place in the audit log, and the place of its end now.
    pub fn requests_since(&self, user: &str, from: u64) -> Result<(Vec<AuditEvent>, u64)> {
        self.plane.requests_since(user, from)
    }

    /// Process numbers of the API server and of etcd.
    pub fn plane_processes(&self) -> [u32; 2] {
        self.plane.processes()
    }

    /// Runs `work` inside the fleet's network: sockets it opens, and its threads open, are there.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.sandbox.inside(work)
    }

    /// An error that names the first part that has ended, with the end of its log.
    pub fn check(&mut self) -> Result<()> {
        self.sandbox.check()?;
        self.parts.iter_mut().try_for_each(Daemon::check)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.parts.iter_mut().for_each(Daemon::stop);
        self.plane.stop();
    }
}

/// All at its defaults, 20 requests a second for each controller among them, but that nodes which nobody runs stay Ready.
fn controller_manager_flags(plane: &ControlPlane) -> Result<Vec<String>> {
    let mut flags = control::controller_manager_flags(plane)?;
    flags.push("--node-monitor-grace-period=24h".into());
    Ok(flags)
}

fn node(index: usize, gpus: u32, labels: &Value) -> Value {
    let name = format!("fake-{index:02}");
    let mut labels = labels.clone();
    labels["kubernetes.io/hostname"] = name.as_str().into();
    labels["kubernetes.io/os"] = "linux".into();
    labels["kubernetes.io/arch"] = "amd64".into();
    let room = json!({"cpu": "256", "memory": "2Ti", "pods": PODS_OF_A_NODE.to_string(),
        "nvidia.com/gpu": gpus.to_string()});
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels},
        "status": {"capacity": room, "allocatable": room, "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]}})
}
