//! Long-running programs that end with their owner.
//!
//! In: a command and a log file. Out: a [`Daemon`] that can be watched and stopped. Never leaves a
//! program behind: the kernel ends it when this process ends, however that happens, unless it was
//! started [`Lifetime::Detached`].

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How many lines of its log an ended program is quoted with.
const QUOTED_LINES: usize = 12;

/// When the kernel ends what we start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// With this process.
    Owner,
    /// Not before someone stops it: `make cluster-down`.
    Detached,
}

/// A running program and its log.
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` with both outputs appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path, life: Lifetime) -> Result<Daemon> {
        let out = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = match life {
            Lifetime::Owner => spawn_leashed(command),
            // A session of its own: a terminal's Ctrl-C does not reach it.
            Lifetime::Detached => command.process_group(0).spawn(),
        };
        let child = child.with_context(|| format!("failed to start {name}"))?;
        Ok(Daemon { name: name.into(), child, log: log.into() })
    }

    /// The kernel's number for it.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// An error that quotes the log when the program has ended.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended with {status}:\n{}", self.name, last_lines(&self.log));
        }
        Ok(())
    }

    /// Asks it to end, as Kubernetes does, and waits until it has; one that does not is an error.
    pub fn terminate(&mut self, within: Duration) -> Result<()> {
        // SAFETY: a signal to a child that was not waited for, so that the number is still its own.
        unsafe { libc::kill(self.id() as libc::pid_t, libc::SIGTERM) };
        let child = &mut self.child;
        wait_until(&format!("{} ends", self.name), within, || Ok(child.try_wait()?.map(drop)))
    }

    /// Ends it at once and waits until it is gone.
    pub fn stop(&mut self) {
        // Both fail only when it is gone already, which is what we want.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The end of a log, for an error message.
pub fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(QUOTED_LINES)..].join("\n")
}

/// Calls `probe` until it brings something; its last error, or silence, stands in the timeout's text.
pub fn wait_until<T>(
    what: &str,
    timeout: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let began = Instant::now();
    loop {
        let last = match probe() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if began.elapsed() > timeout {
            let waited = format!("waited {} s until {what}", timeout.as_secs());
            return match last {
                Some(error) => Err(error.context(waited)),
                None => bail!(waited),
            };
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

type Spawned = std::io::Result<Child>;
type Request = (Command, mpsc::Sender<Spawned>);

/// Starts a child that the kernel kills when this process ends. The kernel watches the thread that
/// forked, and test threads come and go, so one thread that never ends does all the forking.
fn spawn_leashed(mut command: Command) -> Spawned {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Request>>> = OnceLock::new();
    // SAFETY: prctl is async-signal-safe and touches only the forked child.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        });
    }
    let spawner = SPAWNER.get_or_init(|| {
        let (requests, inbox) = mpsc::channel::<Request>();
        std::thread::spawn(move || {
            for (mut command, answer) in inbox {
                answer.send(command.spawn()).ok();
            }
        });
        Mutex::new(requests)
    });
    let (answer, spawned) = mpsc::channel();
    let requests = spawner.lock().expect("no one panics while sending");
    requests.send((command, answer)).expect("the spawner never ends");
    spawned.recv().expect("the spawner answers every request")
}
