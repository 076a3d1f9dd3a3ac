//! The API server alone: for tests of an operator that need no pods.
//!
//! In: nothing. Out: etcd and kube-apiserver on loopback within seconds, without root. Never
//! schedules anything: Deployments and Jobs are accepted and stay as they are, and owner references
//! collect no garbage.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use super::control::{self, AuditEvent, ControlPlane, Ground};
use super::kubectl::Kubectl;
use super::process::Lifetime;
use super::tools::{self, Tools};

/// A running API server; it ends with the value, or with the process.
pub struct ApiServer {
    folder: PathBuf,
    plane: ControlPlane,
    kubectl: Kubectl,
}

impl ApiServer {
    /// Starts etcd and the API server on free ports of loopback.
    pub fn start() -> Result<ApiServer> {
        let tools = Tools::find()?;
        remove_leftovers();
        let folder = new_folder()?;
        let ports = free_ports()?;
        let ground = Ground {
            folder: &folder,
            address: Ipv4Addr::LOCALHOST.into(),
            etcd_port: ports[0],
            etcd_peer_port: ports[1],
            api_port: ports[2],
            daemon: &tools::command,
            client: &tools::command,
            endpoints: false,
            life: Lifetime::Owner,
        };
        let plane = ControlPlane::start(&ground, &tools)?;
        let kubectl = control::kubectl(&tools, &plane.admin, Vec::new());
        Ok(ApiServer { folder, plane, kubectl })
    }

    /// Kubeconfig of an administrator.
    pub fn kubeconfig(&self) -> &Path {
        &self.plane.admin
    }

    /// Writes a kubeconfig for `user`, optionally in `group`; `system:masters` may do everything.
    pub fn kubeconfig_for(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        self.plane.kubeconfig_for(user, group)
    }

    /// kubectl as the administrator.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// Every request that was answered so far, in order.
    pub fn audit(&self) -> Result<Vec<AuditEvent>> {
        self.plane.audit()
    }

    /// The requests of one user that meant to change something.
    pub fn writes_by(&self, user: &str) -> Result<Vec<AuditEvent>> {
        let mut events = self.audit()?;
        events.retain(|event| event.user == user && event.is_write());
        Ok(events)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.plane.stop();
        // What cannot be removed now is removed by the next start.
        std::fs::remove_dir_all(&self.folder).ok();
    }
}

const FOLDER_PREFIX: &str = "plimsoll-api-";

/// `plimsoll-api-PID-N` in the folder for temporary files.
fn new_folder() -> Result<PathBuf> {
    static STARTED: AtomicU32 = AtomicU32::new(0);
    let number = STARTED.fetch_add(1, Ordering::Relaxed);
    let name = format!("{FOLDER_PREFIX}{}-{number}", std::process::id());
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir(&folder).with_context(|| format!("{}", folder.display()))?;
    Ok(folder)
}

/// Removes folders of processes that are gone: a value in a static is never dropped.
fn remove_leftovers() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix(FOLDER_PREFIX) else { continue };
        let owner = rest.split('-').next().unwrap_or_default();
        if owner.parse::<u32>().is_ok() && !Path::new("/proc").join(owner).exists() {
            std::fs::remove_dir_all(entry.path()).ok();
        }
    }
}

/// Three ports that were free a moment ago, all held until all are known.
fn free_ports() -> Result<[u16; 3]> {
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?);
    }
    Ok([held[0].local_addr()?.port(), held[1].local_addr()?.port(), held[2].local_addr()?.port()])
}
