//! The control group that all of a node's pods live in.
//!
//! In: the node's name. Out: a group that exists in every hierarchy kubelet looks at, whether the
//! machine mounts version 1 or 2. Never a group outside `plimsoll-NAME`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const ROOT: &str = "/sys/fs/cgroup";
/// Controllers kubelet insists on where each has its own hierarchy.
const CONTROLLERS: [&str; 10] = [
    "cpu", "cpuacct", "cpuset", "memory", "pids", "devices", "freezer", "blkio", "systemd",
    "unified",
];

/// A group with no limits of its own.
pub(crate) struct Cgroup {
    name: String,
}

impl Cgroup {
    /// Makes the group.
    pub fn create(node: &str) -> Result<Cgroup> {
        let name = group_name(node);
        for hierarchy in hierarchies() {
            let folder = hierarchy.join(&name);
            fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
            // A version 1 cpuset takes no process before it has processors and memory nodes.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if folder.join(file).exists() && !is_version_2(&hierarchy) {
                    fs::copy(hierarchy.join(file), folder.join(file))?;
                }
            }
        }
        Ok(Cgroup { name })
    }

    /// The path kubelet is told.
    pub fn path(&self) -> String {
        format!("/{}", self.name)
    }

    /// Removes the group of a node whose processes are gone.
    pub fn remove(node: &str) -> Result<()> {
        for hierarchy in hierarchies() {
            let folder = hierarchy.join(group_name(node));
            if folder.exists() {
                remove_tree(&folder).with_context(|| format!("{}", folder.display()))?;
            }
        }
        Ok(())
    }
}

fn group_name(node: &str) -> String {
    format!("plimsoll-{node}")
}

fn is_version_2(hierarchy: &Path) -> bool {
    hierarchy.join("cgroup.controllers").exists()
}

fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    if is_version_2(root) {
        return vec![root.into()];
    }
    CONTROLLERS.iter().map(|name| root.join(name)).filter(|path| path.exists()).collect()
}

/// Groups are folders whose files cannot be removed: leaves first, folders only. The kernel may
/// take a moment to let go of a group whose last process was just killed.
fn remove_tree(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    let mut attempts = 0;
    loop {
        match fs::remove_dir(folder) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempts < 50 => {
                attempts += 1;
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            done => return done,
        }
    }
}
