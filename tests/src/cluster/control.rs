//! etcd and kube-apiserver, the part that every cluster of ours has.
//!
//! In: a folder, an address and a way to start programs there. Out: a served API, its kubeconfigs
//! and its audit log. Never listens beyond the address it is given.

use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::kubectl::Kubectl;
use super::pki::Authority;
use super::process::{Daemon, Lifetime, wait_until};
use super::sandbox::NODE_ADDRESS;
use super::tools::Tools;

/// Longest wait for the API server; seen: 3 s on two idle cores.
const API_SERVER_START_MAX: Duration = Duration::from_secs(60);

/// The network that Services' virtual addresses come from.
pub(crate) const SERVICE_NETWORK: &str = "10.96.0.0/16";
/// Where pods ask for the API server: the first address of that network.
pub(crate) const API_SERVICE: &str = "10.96.0.1";

const AUDIT_POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
";

/// Where a control plane runs.
pub(crate) struct Ground<'a> {
    /// Folder of its certificates, data and logs.
    pub folder: &'a Path,
    /// The address it listens on.
    pub address: IpAddr,
    pub etcd_port: u16,
    pub etcd_peer_port: u16,
    pub api_port: u16,
    /// Starts a program where the address exists and lets it run on.
    pub daemon: &'a dyn Fn(&[String]) -> Command,
    /// Runs a program that reaches the address and ends soon.
    pub client: &'a dyn Fn(&[String]) -> Command,
    /// Whether the endpoints of the `kubernetes` Service are kept; loopback cannot be an endpoint.
    pub endpoints: bool,
    pub life: Lifetime,
}

impl<'a> Ground<'a> {
    /// A network of its own, in which the node's address and the usual ports are free.
    pub fn of_node(
        folder: &'a Path,
        daemon: &'a dyn Fn(&[String]) -> Command,
        client: &'a dyn Fn(&[String]) -> Command,
        life: Lifetime,
    ) -> Result<Ground<'a>> {
        Ok(Ground {
            folder,
            address: NODE_ADDRESS.parse()?,
            etcd_port: 2379,
            etcd_peer_port: 2380,
            api_port: 6443,
            daemon,
            client,
            endpoints: true,
            life,
        })
    }
}

/// One request that the API server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEvent {
    pub user: String,
    /// The pod whose token was shown, where it was one's.
    pub pod: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub verb: String,
    pub resource: String,
    pub subresource: String,
    pub namespace: String,
    pub name: String,
    /// The HTTP status of the answer.
    pub code: u64,
    /// When it was received, as RFC 3339 with microseconds.
    pub at: String,
}

impl AuditEvent {
    /// Whether the request meant to change something.
    pub fn is_write(&self) -> bool {
        !matches!(self.verb.as_str(), "get" | "list" | "watch")
    }
}

/// A running etcd and API server.
pub(crate) struct ControlPlane {
    pub authority: Authority,
    pub server: String,
    /// Kubeconfig of a member of `system:masters`.
    pub admin: PathBuf,
    audit_log: PathBuf,
    etcd: Daemon,
    api_server: Daemon,
}

impl ControlPlane {
    /// Starts both and returns when the API answers that it is ready.
    pub fn start(ground: &Ground<'_>, tools: &Tools) -> Result<ControlPlane> {
        std::fs::create_dir_all(ground.folder.join("log"))?;
        let authority = Authority::create(&ground.folder.join("pki"))?;
        let server = format!("https://{}:{}", ground.address, ground.api_port);
        let admin = authority.kubeconfig(&server, "admin", Some("system:masters"))?;
        let etcd = start_part("etcd", tools, etcd_flags(ground), ground)?;
        let flags = api_server_flags(ground, &authority)?;
        let api_server = start_part("kube-apiserver", tools, flags, ground)?;
        let audit_log = ground.folder.join("log/audit.json");
        let mut plane = ControlPlane { authority, server, admin, audit_log, etcd, api_server };
        wait_until("the API server is ready", API_SERVER_START_MAX, || {
            plane.etcd.check()?;
            plane.api_server.check()?;
            let probe = format!("{}/readyz", plane.server);
            let words = ["curl", "-sk", "--max-time", "2", &probe].map(String::from);
            let answer = (ground.client)(&words).stderr(Stdio::null()).output()?;
            Ok((answer.stdout == b"ok").then_some(()))
        })?;
        Ok(plane)
    }

    /// A kubeconfig for another user; rights are up to RBAC, except for group `system:masters`.
    pub fn kubeconfig_for(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        self.authority.kubeconfig(&self.server, user, group)
    }

    /// Every request answered so far, in order.
    pub fn audit(&self) -> Result<Vec<AuditEvent>> {
        let log = std::fs::File::open(&self.audit_log).context("failed to open the audit log")?;
        BufReader::new(log).lines().map(|line| audit_event(&line?)).collect()
    }

    /// Requests of one user that were answered since the log was `from` bytes long, and how long it is now. Only their lines
    /// are parsed: a long run leaves a hundred megabytes of others'.
    pub fn requests_since(&self, user: &str, from: u64) -> Result<(Vec<AuditEvent>, u64)> {
        let mut log =
            std::fs::File::open(&self.audit_log).context("failed to open the audit log")?;
        log.seek(SeekFrom::Start(from))?;
        let mut text = String::new();
        log.read_to_string(&mut text)?;
        // The last line may be half written.
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        let named = format!("\"username\":\"{user}\"");
        let lines = whole.lines().filter(|line| line.contains(&named));
        let events = lines.map(audit_event).collect::<Result<_>>()?;
        Ok((events, from + whole.len() as u64))
    }

    /// Process numbers of the API server and of etcd.
    pub fn processes(&self) -> [u32; 2] {
        [self.api_server.id(), self.etcd.id()]
    }

    /// Ends both.
    pub fn stop(&mut self) {
        self.api_server.stop();
        self.etcd.stop();
    }
}

/// Starts one part of the `kube` program with its log in the cluster's folder.
pub(crate) fn start_part(
    part: &str,
    tools: &Tools,
    flags: Vec<String>,
    ground: &Ground<'_>,
) -> Result<Daemon> {
    let mut words = tools.kube(part);
    words.extend(flags);
    let log = ground.folder.join(format!("log/{part}.log"));
    Daemon::start(part, (ground.daemon)(&words), &log, ground.life)
}

/// kubectl with the admin's rights, run where the API server can be reached.
pub(crate) fn kubectl(tools: &Tools, kubeconfig: &Path, prefix: Vec<String>) -> Kubectl {
    Kubectl::new(tools.kube("kubectl"), kubeconfig.into(), prefix)
}

fn etcd_flags(ground: &Ground<'_>) -> Vec<String> {
    let client = format!("http://{}:{}", ground.address, ground.etcd_port);
    let peer = format!("http://{}:{}", ground.address, ground.etcd_peer_port);
    vec![
        format!("--data-dir={}", ground.folder.join("etcd").display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // The data dies with the cluster.
        "--unsafe-no-fsync".into(),
        "--log-level=warn".into(),
    ]
}

fn api_server_flags(ground: &Ground<'_>, authority: &Authority) -> Result<Vec<String>> {
    let first_service: IpAddr = API_SERVICE.parse()?;
    let names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];
    let serving = authority.server("apiserver", &[ground.address, first_service], &names)?;
    let kubelet = authority.client("apiserver-kubelet-client", Some("system:masters"))?;
    let policy = ground.folder.join("audit-policy.yaml");
    std::fs::write(&policy, AUDIT_POLICY)?;
    let file = |name: &str| authority.file(name).display().to_string();
    let mut flags = vec![
        format!("--etcd-servers=http://{}:{}", ground.address, ground.etcd_port),
        format!("--bind-address={}", ground.address),
        format!("--advertise-address={}", ground.address),
        format!("--secure-port={}", ground.api_port),
        format!("--tls-cert-file={}", serving.certificate.display()),
        format!("--tls-private-key-file={}", serving.key.display()),
        format!("--client-ca-file={}", file("ca.crt")),
        format!("--service-account-key-file={}", file("sa.pub")),
        format!("--service-account-signing-key-file={}", file("sa.key")),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        format!("--service-cluster-ip-range={SERVICE_NETWORK}"),
        "--authorization-mode=Node,RBAC".into(),
        // What a node runs in the kernel's name, such as a CNI plugin, is privileged.
        "--allow-privileged=true".into(),
        format!("--kubelet-client-certificate={}", kubelet.certificate.display()),
        format!("--kubelet-client-key={}", kubelet.key.display()),
        "--kubelet-preferred-address-types=InternalIP".into(),
        format!("--audit-policy-file={}", policy.display()),
        format!("--audit-log-path={}", ground.folder.join("log/audit.json").display()),
        // Megabytes after which it would begin anew, and counts with it.
        "--audit-log-maxsize=10000".into(),
        format!("--cert-dir={}", ground.folder.join("pki").display()),
    ];
    if !ground.endpoints {
        flags.push("--endpoint-reconciler-type=none".into());
    }
    Ok(flags)
}

/// The controller-manager at its defaults, alone.
pub(crate) fn controller_manager_flags(plane: &ControlPlane) -> Result<Vec<String>> {
    let config = plane.kubeconfig_for("system:kube-controller-manager", None)?;
    let file = |name: &str| plane.authority.file(name).display().to_string();
    Ok(vec![
        format!("--kubeconfig={}", config.display()),
        format!("--service-account-private-key-file={}", file("sa.key")),
        format!("--root-ca-file={}", file("ca.crt")),
        "--use-service-account-credentials=true".into(),
        "--leader-elect=false".into(),
    ])
}

pub(crate) fn scheduler_flags(plane: &ControlPlane) -> Result<Vec<String>> {
    let config = plane.kubeconfig_for("system:kube-scheduler", None)?;
    Ok(vec![format!("--kubeconfig={}", config.display()), "--leader-elect=false".into()])
}

fn audit_event(line: &str) -> Result<AuditEvent> {
    let event: Value = serde_json::from_str(line).context("an audit line is JSON")?;
    let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    if text("/kind") != "Event" {
        bail!("an audit line is not an Event: {line}");
    }
    Ok(AuditEvent {
        user: text("/user/username").into(),
        pod: text("/user/extra/authentication.kubernetes.io~1pod-name/0").into(),
        verb: text("/verb").into(),
        resource: text("/objectRef/resource").into(),
        subresource: text("/objectRef/subresource").into(),
        namespace: text("/objectRef/namespace").into(),
        name: text("/objectRef/name").into(),
        code: event.pointer("/responseStatus/code").and_then(Value::as_u64).unwrap_or_default(),
        at: text("/requestReceivedTimestamp").into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_audit_line_tells_user_verb_and_object() {
        let line = r#"{"kind":"Event","verb":"patch","user":{"username":"op",
            "extra":{"authentication.kubernetes.io/pod-name":["op-1"]}},
            "objectRef":{"resource":"deployments","subresource":"status","namespace":"a","name":"b"},
            "responseStatus":{"code":200}}"#;
        let event = audit_event(line).unwrap();
        assert_eq!((event.user.as_str(), event.verb.as_str(), event.code), ("op", "patch", 200));
        assert_eq!(event.pod, "op-1");
        assert_eq!(
            (event.resource.as_str(), event.subresource.as_str()),
            ("deployments", "status")
        );
        assert_eq!((event.namespace.as_str(), event.name.as_str()), ("a", "b"));
        assert!(event.is_write());
    }

    #[test]
    fn reading_is_no_write() {
        let line = r#"{"kind":"Event","verb":"watch","user":{"username":"op"}}"#;
        assert!(!audit_event(line).unwrap().is_write());
    }
}
