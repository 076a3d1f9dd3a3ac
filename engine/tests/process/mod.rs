//! The engine as a process of its own, in a group with a limit of memory where that is wanted. Each test binary uses a part
//! of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

/// `serve` as a process of its own; ended when dropped.
pub struct Process {
    child: Child,
    pub address: String,
}

impl Process {
    pub fn serve(model: &Path, flags: &[&str], group: Option<&Group>) -> Process {
        let engine = env!("CARGO_BIN_EXE_plimsoll-engine");
        let mut command = match group {
            None => Command::new(engine),
            Some(Group(dir)) => {
                let mut shell = Command::new("sh");
                shell
                    .args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#])
                    .arg(dir)
                    .arg(engine);
                shell
            }
        };
        let mut child = command
            .args(["serve", "--device=cpu", "--listen=127.0.0.1:0", "--log-format=json", "--model"])
            .arg(model)
            .args(flags)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut told = String::new();
        let address = lines.find_map(|line| {
            let line = line.unwrap();
            told += &line;
            let line: serde_json::Value = serde_json::from_str(&line).ok()?;
            (line["message"] == "ready").then(|| line["address"].as_str().unwrap().to_owned())
        });
        let address = address.unwrap_or_else(|| panic!("not ready: {told}"));
        // The pipe stays open, and what comes later is not read: it is little.
        std::mem::forget(lines);
        Process { child, address }
    }

    /// `VmRSS`, `VmHWM`, `RssAnon`.
    pub fn memory(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line =
            status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() * 1024
    }

    /// What Kubernetes sends first.
    pub fn terminate(&self) {
        let id = i32::try_from(self.child.id()).unwrap();
        // SAFETY: it sends a signal to a child of ours that was not waited for.
        assert_eq!(unsafe { libc::kill(id, libc::SIGTERM) }, 0);
    }

    /// Returns when it has ended.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

/// A group of processes with a limit of memory; gone when dropped.
pub struct Group(PathBuf);

impl Group {
    /// None, and one line, without the right to make one; a failure where nothing may be left out.
    pub fn new(bytes: u64) -> Option<Group> {
        let group = Group::try_new(bytes);
        if group.is_none() {
            let required = std::env::var_os("PLIMSOLL_REQUIRE_CLUSTER").is_some();
            assert!(
                !required,
                "PLIMSOLL_REQUIRE_CLUSTER is set, but control groups cannot be made"
            );
            println!("no right to make a control group: its limit is not tested");
        }
        group
    }

    fn try_new(bytes: u64) -> Option<Group> {
        let kinds =
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        kinds.iter().find_map(|(base, limit)| {
            let group =
                Group(Path::new(base).join(format!("plimsoll-{}-{bytes}", std::process::id())));
            std::fs::create_dir(&group.0).ok()?;
            // Where no such file appears by itself it is no group.
            let mut limit =
                std::fs::OpenOptions::new().write(true).open(group.0.join(limit)).ok()?;
            write!(limit, "{bytes}").ok()?;
            Some(group)
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

pub fn bundled() -> PathBuf {
    let named = std::env::var_os("PLIMSOLL_TESTS").map(PathBuf::from);
    named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests")).join("model")
}
