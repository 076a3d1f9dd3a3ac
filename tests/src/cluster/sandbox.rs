//! Namespaces of one node: processes, mounts and network apart from the machine's.
//!
//! In: a name. Out: a place to run programs in, with an address of its own and no way out. Never
//! cleaned up piece by piece: the first process of the namespaces is on our leash, and when it goes
//! the kernel ends every process and drops every mount, interface and firewall rule with it.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::cgroup::Cgroup;
use super::process::{Daemon, Lifetime, last_lines, wait_until};

/// The node's address, from the range that documents may use (RFC 5737); pods get another.
pub(crate) const NODE_ADDRESS: &str = "192.0.2.1";
/// Pods' addresses.
pub(crate) const POD_NETWORK: &str = "198.51.100.0/24";

/// Folders that Kubernetes and CNI hold by fixed names; each node gets its own in their place.
const PRIVATE_FOLDERS: [&str; 4] =
    ["/var/lib/kubelet", "/var/lib/cni", "/var/log/pods", "/var/log/containers"];

/// Runs as the first process inside. `$1` is the node's folder, the rest are private folders.
///
/// The process number is read before /proc is replaced: it is the machine's number for us. /sys
/// stays as it is, because a fresh one would hide the control groups from kubelet. There is no
/// `dummy` link in small kernels, so one end of a veth pair carries the address.
const FIRST_PROCESS: &str = r#"
set -e
read -r pid _ </proc/self/stat
folder=$1; shift
mount -t proc proc /proc
for path; do
    mkdir -p "$path" "$folder/private$path"
    mount --bind "$folder/private$path" "$path"
done
mount --make-rshared /
ip link set lo up
ip link add uplink type veth peer name outside
ip address add ADDRESS/24 dev uplink
ip link set uplink up
ip link set outside up
ip route add default dev uplink
echo 1 >/proc/sys/net/ipv4/ip_forward
echo "$pid" >"$folder/first.pid.new"
mv "$folder/first.pid.new" "$folder/first.pid"
exec sleep infinity
"#;

/// The namespaces of one node and its folder.
pub(crate) struct Sandbox {
    folder: PathBuf,
    first: Daemon,
    first_pid: u32,
    pub cgroup: Cgroup,
}

/// Nodes keep everything here; a disk, because overlay mounts and image unpacking want one.
pub(crate) fn folder_of(name: &str) -> PathBuf {
    Path::new("/var/tmp/plimsoll").join(name)
}

impl Sandbox {
    /// Removes what an earlier node of that name left, then makes the namespaces.
    pub fn create(name: &str, life: Lifetime) -> Result<Sandbox> {
        destroy(name)?;
        let folder = folder_of(name);
        std::fs::create_dir_all(folder.join("log"))?;
        let log = folder.join("log/sandbox.log");
        let mut command = Command::new("unshare");
        command.args(["--fork", "--kill-child", "--pid", "--mount", "--net"]);
        command.args(["--propagation", "private", "bash", "-c"]);
        command.arg(FIRST_PROCESS.replace("ADDRESS", NODE_ADDRESS)).arg("sandbox").arg(&folder);
        command.args(PRIVATE_FOLDERS);
        let mut first = Daemon::start("the sandbox", command, &log, life)?;
        let first_pid = wait_until("the namespaces are made", Duration::from_secs(10), || {
            first.check()?;
            Ok(read_first_pid(&folder))
        })?;
        let cgroup = Cgroup::create(name)?;
        Ok(Sandbox { folder, first, first_pid, cgroup })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A program that belongs to the node: it sees the node's processes and mounts.
    pub fn daemon(&self, words: &[String]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.first_pid));
        command.args(["--mount", "--net", "--pid", "--"]).args(words);
        command
    }

    /// What stands before a command that only needs the node's network.
    pub fn network_prefix(&self) -> Vec<String> {
        vec!["nsenter".into(), format!("--net={}", self.network().display()), "--".into()]
    }

    /// A program of the machine with the node's network.
    pub fn client(&self, words: &[String]) -> Command {
        super::tools::command(&[self.network_prefix(), words.to_vec()].concat())
    }

    /// Runs `work` on a thread of its own inside the node's network: sockets it opens are there.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let network = File::open(self.network())?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                // SAFETY: the descriptor is open, and only this new thread changes its network.
                if unsafe { libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                    bail!("setns: {}", std::io::Error::last_os_error());
                }
                work()
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn network(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.first_pid))
    }

    /// An error with the sandbox's log when it is gone.
    pub fn check(&mut self) -> Result<()> {
        self.first.check()
    }
}

/// Ends the node of that name and removes what it kept, except its logs. Harmless when none runs.
pub(crate) fn destroy(name: &str) -> Result<()> {
    let folder = folder_of(name);
    if let Some(pid) = read_first_pid(&folder).filter(|pid| is_first_process(*pid, &folder)) {
        // SAFETY: a plain system call; the process was just seen to be ours.
        unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
        let gone = || Ok((!Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
        wait_until("the sandbox is gone", Duration::from_secs(20), gone)?;
    }
    Cgroup::remove(name)?;
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.file_name().is_some_and(|file| file == "log") {
            continue;
        }
        let removed = if path.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        removed.with_context(|| format!("failed to remove {}", path.display()))?;
    }
    Ok(())
}

/// Removes the logs of the node's last life.
pub(crate) fn forget_logs(name: &str) {
    std::fs::remove_dir_all(folder_of(name).join("log")).ok();
}

/// The first process of the running node of that name, if there is one.
pub(crate) fn running(name: &str) -> Option<u32> {
    let folder = folder_of(name);
    read_first_pid(&folder).filter(|pid| is_first_process(*pid, &folder))
}

fn read_first_pid(folder: &Path) -> Option<u32> {
    std::fs::read_to_string(folder.join("first.pid")).ok()?.trim().parse().ok()
}

/// Numbers are used again: it is ours only if our folder lies in its mounts.
fn is_first_process(pid: u32, folder: &Path) -> bool {
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    mounts.contains(&format!("{}/private", folder.display()))
}

impl Sandbox {
    /// The end of one of the node's logs.
    pub fn last_lines(&self, part: &str) -> String {
        last_lines(&self.folder.join(format!("log/{part}.log")))
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.first.stop();
    }
}
