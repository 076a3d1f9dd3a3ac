//! A whole Kubernetes node of our own.
//!
//! In: a name and images. Out: control plane, scheduler, kubelet, kube-proxy, containerd and DNS,
//! Ready, in namespaces of their own. Never touches the machine's own containerd, network or
//! iptables. Needs root.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::containers::{self, Containers};
use super::control::{self, AuditEvent, ControlPlane, Ground, start_part};
use super::image::Image;
use super::kubectl::Kubectl;
use super::pki::Identity;
use super::process::{Daemon, Lifetime, wait_until};
use super::sandbox::{self, NODE_ADDRESS, POD_NETWORK, Sandbox};
use super::tools::Tools;

/// The one node's name.
pub const NODE_NAME: &str = "node0";
/// Where pods ask for names: a Service whose endpoint is CoreDNS on the node.
const DNS_SERVICE: &str = "10.96.0.10";
/// Longest wait for the first rules of kube-proxy; seen: less than a second after the node is Ready.
const PROXY_READY_MAX: Duration = Duration::from_secs(30);
/// Longest wait for the node; seen: 8 s on two idle cores.
const NODE_READY_MAX: Duration = Duration::from_secs(90);

/// A running node; it ends with the value, or with the process if its lifetime is the owner's.
pub struct Node {
    name: String,
    tools: Tools,
    kubectl: Kubectl,
    parts: Vec<Daemon>,
    plane: ControlPlane,
    containers: Containers,
    ready_after: Duration,
    sandbox: Sandbox,
}

impl Node {
    /// Brings everything up and returns when the node is Ready and pods can be made.
    pub fn start(name: &str, life: Lifetime, images: &[Image]) -> Result<Node> {
        let began = Instant::now();
        let tools = Tools::find()?;
        sandbox::destroy(name)?;
        sandbox::forget_logs(name);
        let sandbox = Sandbox::create(name, life)?;
        let containers = Containers::start(&sandbox, &tools, life)?;
        let daemon = |words: &[String]| sandbox.daemon(words);
        let client = |words: &[String]| sandbox.client(words);
        let ground = Ground::of_node(sandbox.folder(), &daemon, &client, life)?;
        // Unpacking images and starting the API server keep one core each busy.
        let (plane, imported) = std::thread::scope(|scope| {
            let importing = scope.spawn(|| containers.import_all(&sandbox, &tools, images));
            let plane = ControlPlane::start(&ground, &tools);
            (plane, importing.join().expect("importing does not panic"))
        });
        let (plane, ()) = (plane?, imported?);
        let parts = start_parts(&ground, &tools, &plane, &sandbox)?;
        let kubectl = control::kubectl(&tools, &plane.admin, sandbox.network_prefix());
        let name = name.to_string();
        let ready_after = Duration::ZERO;
        let mut node =
            Node { name, tools, kubectl, parts, plane, containers, ready_after, sandbox };
        node.write_wrappers()?;
        node.kubectl.apply(&dns_service())?;
        node.wait_until_ready()?;
        node.ready_after = began.elapsed();
        Ok(node)
    }

    /// How long it took to come up, images and all.
    pub fn ready_after(&self) -> Duration {
        self.ready_after
    }

    /// The kubeconfig of an administrator; its server is reachable from inside only.
    pub fn kubeconfig(&self) -> &Path {
        &self.plane.admin
    }

    /// Writes a kubeconfig for another user; rights are up to RBAC.
    pub fn kubeconfig_for(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        self.plane.kubeconfig_for(user, group)
    }

    /// A certificate of the cluster's authority for a server on the node's address.
    pub(crate) fn serving_certificate(&self, name: &str) -> Result<Identity> {
        self.plane.authority.server(name, &[NODE_ADDRESS.parse()?], &[])
    }

    /// kubectl as the administrator.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// helm as the administrator.
    pub fn helm(&self, args: &[&str]) -> Result<String> {
        let mut words = self.tools.addon("helm");
        words.extend(args.iter().map(|arg| arg.to_string()));
        let mut command = self.sandbox.client(&words);
        let home = self.sandbox.folder().join("helm");
        command.env("KUBECONFIG", self.kubeconfig()).env("HELM_CACHE_HOME", &home);
        command.env("HELM_CONFIG_HOME", &home).env("HELM_DATA_HOME", &home);
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("helm {}: {said}{}", args.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(said)
    }

    /// A program of this machine that uses the node's network.
    pub fn command(&self, words: &[&str]) -> Command {
        let words: Vec<String> = words.iter().map(|word| word.to_string()).collect();
        self.sandbox.client(&words)
    }

    /// A program that stays, with its log `NAME.log` beside the others.
    pub fn daemon(&self, name: &str, words: &[String]) -> Result<Daemon> {
        let log = self.sandbox.folder().join(format!("log/{name}.log"));
        Daemon::start(name, self.sandbox.daemon(words), &log, Lifetime::Owner)
    }

    /// Has NetworkPolicies enforced from now on, for as long as the node lives. Packets between pods on one bridge pass
    /// the firewall only where the kernel is told so.
    pub fn enforce_policies(&self) -> Result<()> {
        // kube-proxy's first rules must stand: both write the same tables, and what meets there may be lost for good.
        let api_server = SocketAddr::new(control::API_SERVICE.parse()?, 443);
        wait_until("kube-proxy's rules stand", PROXY_READY_MAX, || {
            let open = || Ok(TcpStream::connect_timeout(&api_server, Duration::from_secs(1)).ok());
            self.inside(open)
        })?;
        let judges = self.tools.judges.display().to_string();
        let kubeconfig = self.kubeconfig().display().to_string();
        let script = r#"echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables && exec "$@""#;
        let words = ["sh", "-c", script, "sh", &judges, "policies", &kubeconfig, NODE_NAME];
        let words = words.into_iter().chain([control::SERVICE_NETWORK]).map(String::from);
        // It ends with the sandbox.
        self.daemon("policies", &words.collect::<Vec<_>>()).map(drop)
    }

    /// Runs `work` inside the node's network: sockets it opens are there.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.sandbox.inside(work)
    }

    /// Makes an image known to the node.
    pub fn import(&self, image: &Image) -> Result<()> {
        self.containers.import(&self.sandbox, image)
    }

    /// A folder on the node for a volume, writable by everyone, gone with the node.
    pub fn volume(&self, name: &str) -> Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt;
        let folder = self.sandbox.folder().join("volumes").join(name);
        std::fs::create_dir_all(&folder)?;
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o777))?;
        Ok(folder)
    }

    /// The programs and the folder for parts that come on demand, such as Prometheus.
    pub(crate) fn tools(&self) -> &Tools {
        &self.tools
    }

    /// Every file of the node lies here.
    pub fn folder(&self) -> &Path {
        self.sandbox.folder()
    }

    /// Every request that the API server answered so far, in order.
    pub fn audit(&self) -> Result<Vec<AuditEvent>> {
        self.plane.audit()
    }

    /// An error that names the first part that has ended, with the end of its log.
    pub fn check(&mut self) -> Result<()> {
        self.sandbox.check()?;
        self.parts.iter_mut().try_for_each(Daemon::check)
    }

    /// Leaves a detached node running; an owned one would end with this process all the same.
    pub fn leave(self) {
        std::mem::forget(self);
    }

    /// Ends the node of that name, whoever started it, and removes its files except the logs.
    pub fn destroy(name: &str) -> Result<()> {
        sandbox::destroy(name)
    }

    /// The folder of the running node of that name.
    pub fn running(name: &str) -> Option<PathBuf> {
        sandbox::running(name).map(|_| sandbox::folder_of(name))
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        wait_until("the node is Ready", NODE_READY_MAX, || {
            self.check()?;
            let node = self.kubectl.get(&["node", NODE_NAME])?;
            let account = self.kubectl.run(&["get", "serviceaccount", "default"]);
            Ok((is_ready(&node) && account.is_ok()).then_some(()))
        })
        .with_context(|| self.sandbox.last_lines("kubelet"))
    }

    /// `bin/kubectl`, `bin/helm` and `bin/inside`, so that a shell needs nothing but a PATH.
    fn write_wrappers(&self) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let folder = self.folder().join("bin");
        std::fs::create_dir_all(&folder)?;
        let prefix = self.sandbox.network_prefix().join(" ");
        let config = format!("KUBECONFIG={}", self.kubeconfig().display());
        for (name, words) in [
            ("kubectl", self.tools.kube("kubectl").join(" ")),
            ("helm", self.tools.addon("helm").join(" ")),
            ("inside", String::new()),
        ] {
            let path = folder.join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{config} exec {prefix} {words} \"$@\"\n"))?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The sandbox ends every process inside it; what cannot be removed now, the next start does.
        sandbox::destroy(&self.name).ok();
    }
}

fn start_parts(
    ground: &Ground<'_>,
    tools: &Tools,
    plane: &ControlPlane,
    sandbox: &Sandbox,
) -> Result<Vec<Daemon>> {
    let part = |name: &str, flags| start_part(name, tools, flags, ground);
    let dns = containers::write_corefile(sandbox, &plane.admin)?;
    let mut words = tools.addon("coredns");
    words.push(format!("-conf={}", dns.display()));
    let log = sandbox.folder().join("log/coredns.log");
    Ok(vec![
        part("kube-controller-manager", controller_manager_flags(plane)?)?,
        part("kube-scheduler", control::scheduler_flags(plane)?)?,
        part("kubelet", kubelet_flags(plane, sandbox)?)?,
        part("kube-proxy", proxy_flags(plane)?)?,
        Daemon::start("coredns", sandbox.daemon(&words), &log, ground.life)?,
    ])
}

fn controller_manager_flags(plane: &ControlPlane) -> Result<Vec<String>> {
    let mut flags = control::controller_manager_flags(plane)?;
    // The default of 20 requests a second would pace what the operator is measured by.
    flags.extend(["--kube-api-qps=200".into(), "--kube-api-burst=400".into()]);
    Ok(flags)
}

fn kubelet_flags(plane: &ControlPlane, sandbox: &Sandbox) -> Result<Vec<String>> {
    let user = format!("system:node:{NODE_NAME}");
    let kubeconfig = plane.kubeconfig_for(&user, Some("system:nodes"))?;
    let config = sandbox.folder().join("kubelet.yaml");
    let socket = containers::socket(sandbox);
    let settings = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": format!("unix://{}", socket.display()),
        "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true},
            "x509": {"clientCAFile": plane.authority.file("ca.crt")}},
        "authorization": {"mode": "Webhook"},
        "clusterDNS": [DNS_SERVICE], "clusterDomain": "cluster.local",
        "cgroupDriver": "cgroupfs", "cgroupRoot": sandbox.cgroup.path(), "failCgroupV1": false,
        // A build machine may swap, and its disk may be full: not our question.
        "failSwapOn": false, "evictionHard": {}, "localStorageCapacityIsolation": false,
        "imageMinimumGCAge": "24h",
        "nodeStatusUpdateFrequency": "2s", "syncFrequency": "1s",
        "volumePluginDir": sandbox.folder().join("volume-plugins"),
    });
    std::fs::write(&config, serde_yaml_ng::to_string(&settings)?)?;
    Ok(vec![
        format!("--config={}", config.display()),
        format!("--kubeconfig={}", kubeconfig.display()),
        format!("--node-ip={NODE_ADDRESS}"),
        format!("--hostname-override={NODE_NAME}"),
    ])
}

fn proxy_flags(plane: &ControlPlane) -> Result<Vec<String>> {
    let config = plane.kubeconfig_for("system:kube-proxy", None)?;
    Ok(vec![
        format!("--kubeconfig={}", config.display()),
        format!("--hostname-override={NODE_NAME}"),
        "--proxy-mode=iptables".into(),
        format!("--cluster-cidr={POD_NETWORK}"),
        // Pods share a bridge, where answers would bypass the address translation.
        "--masquerade-all".into(),
        // These settings belong to the machine and cannot be written from a namespace.
        "--conntrack-max-per-core=0".into(),
        "--conntrack-tcp-timeout-established=0".into(),
        "--conntrack-tcp-timeout-close-wait=0".into(),
    ])
}

/// The Service that pods ask, with the node itself as its endpoint.
fn dns_service() -> String {
    let meta = json!({"name": "kube-dns", "namespace": "kube-system"});
    let ports = json!([{"name": "dns", "port": 53, "protocol": "UDP"},
                       {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]);
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": meta,
        "spec": {"clusterIP": DNS_SERVICE, "ports": ports}});
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "kube-dns", "namespace": "kube-system",
                     "labels": {"kubernetes.io/service-name": "kube-dns"}},
        "addressType": "IPv4", "ports": ports, "endpoints": [{"addresses": [NODE_ADDRESS]}]});
    format!("{service}\n---\n{slice}\n")
}

fn is_ready(node: &Value) -> bool {
    let conditions = node.pointer("/status/conditions").and_then(Value::as_array);
    let ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    conditions.is_some_and(|conditions| conditions.iter().any(ready))
}
