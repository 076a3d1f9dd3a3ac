//! Where the programs of a cluster lie.
//!
//! In: the sources under `tests/cluster` and the system. Out: paths that exist. Never builds or
//! installs anything: that is `tests/setup.sh`, and the error says so.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// Paths of every program a cluster starts.
#[derive(Clone, Debug)]
pub struct Tools {
    /// etcd, the control plane, kubelet, kube-proxy and kubectl in one file.
    pub kube: PathBuf,
    /// helm and CoreDNS in one file.
    pub addons: PathBuf,
    /// Holds a pod's namespaces open.
    pub pause: PathBuf,
    /// What GitOps tools make of objects.
    pub judges: PathBuf,
    /// Debian's containerd; its `ctr` lies beside it.
    pub containerd: PathBuf,
    /// Debian's Prometheus.
    pub prometheus: PathBuf,
    /// Shell and small programs for images.
    pub busybox: PathBuf,
    /// HTTP from pods and from the node's network.
    pub curl: PathBuf,
}

impl Tools {
    /// Finds them all or names the first that is missing and the script that brings it.
    pub fn find() -> Result<Tools> {
        let cache = cache_folder()?;
        let built = |name: &str| -> Result<PathBuf> {
            existing(cache.join(format!("{name}-{}", source_key(name)?)))
        };
        Ok(Tools {
            kube: built("kube")?,
            addons: built("addons")?,
            pause: built("pause")?,
            judges: built("judges")?,
            containerd: existing("/usr/bin/containerd".into())?,
            prometheus: existing("/usr/bin/prometheus".into())?,
            busybox: existing("/bin/busybox".into())?,
            curl: existing("/usr/bin/curl".into())?,
        })
    }

    /// One part of the `kube` program, such as `kubelet`.
    pub fn kube(&self, part: &str) -> Vec<String> {
        vec![self.kube.display().to_string(), part.into()]
    }

    /// One part of the `addons` program: `helm` or `coredns`.
    pub fn addon(&self, part: &str) -> Vec<String> {
        vec![self.addons.display().to_string(), part.into()]
    }
}

/// kwok, which long runs alone need: `tests/setup.sh --fleet` builds it.
pub(crate) fn kwok() -> Result<PathBuf> {
    let path = cache_folder()?.join(format!("kwok-{}", source_key("kwok")?));
    if !path.exists() {
        bail!("{} is missing; tests/setup.sh --fleet builds it", path.display());
    }
    Ok(path)
}

/// A command from a program with its first arguments.
pub(crate) fn command(words: &[String]) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}

fn existing(path: PathBuf) -> Result<PathBuf> {
    if !path.exists() {
        bail!("{} is missing; tests/setup.sh installs and builds it", path.display());
    }
    Ok(path)
}

fn cache_folder() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(base) if !base.is_empty() => PathBuf::from(base),
        _ => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("plimsoll/cluster"))
}

/// The first sixteen hex digits of the hash of a Go program's sources, as `tests/setup.sh` names it.
fn source_key(name: &str) -> Result<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster").join(name);
    let mut hash = Sha256::new();
    for file in ["go.mod", "go.sum", "main.go"] {
        let path = folder.join(file);
        if path.exists() {
            let bytes = std::fs::read(&path).with_context(|| format!("{}", path.display()))?;
            hash.update(bytes);
        }
    }
    Ok(hex(&hash.finalize())[..16].to_string())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
