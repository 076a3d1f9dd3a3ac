//! The engine as a child process on this machine: find the program, ask it for facts, let it fetch, start it, and read
//! why it ended. Flags and exit codes are those that pods use; nothing is linked in.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use anyhow::{Context, bail};
use plimsoll_contract::exit::{ExitReport, TERMINATION_MESSAGE_BYTES_MAX};
use plimsoll_contract::facts::{DeviceFacts, ModelFacts};
use plimsoll_crds::Reason;

const PROGRAM: &str = "plimsoll-engine";

/// An engine that ended by itself, with what it said of it.
#[derive(Debug, thiserror::Error)]
#[error("{reason}: {message}\n  remedy: {remedy}")]
pub struct Ended {
    pub code: u8,
    reason: String,
    message: String,
    remedy: &'static str,
}

/// The program, and the file through which it says why it ended.
pub struct Engine {
    program: PathBuf,
    termination_file: PathBuf,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.forget_report();
    }
}

impl Engine {
    pub fn find(given: Option<&Path>) -> anyhow::Result<Engine> {
        let program = match given {
            Some(given) if given.is_file() => given.to_path_buf(),
            Some(given) => bail!("--engine: {} is no file", given.display()),
            None => search().with_context(|| {
                format!("{PROGRAM} is neither beside plimsoll nor in PATH: build it, or name it with --engine PROGRAM")
            })?,
        };
        let name = format!("plimsoll-termination-{}", std::process::id());
        Ok(Engine { program, termination_file: std::env::temp_dir().join(name) })
    }

    /// What `inspect` finds out about a folder, or about a config.json alone.
    pub fn inspect(&self, directory: &Path) -> anyhow::Result<ModelFacts> {
        let mut command = self.command();
        command.arg("inspect").arg(directory).arg("--json");
        // Its report says the same as its standard error, and is shown with the remedy.
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self.run(command)?;
        serde_json::from_slice(&output)
            .context("the engine's facts cannot be read: is it of another version?")
    }

    /// What `inspect --device` finds out about this machine's GPU.
    pub fn inspect_device(&self) -> anyhow::Result<DeviceFacts> {
        let mut command = self.command();
        command.args(["inspect", "--device", "--json"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self.run(command)?;
        serde_json::from_slice(&output).context("what it said cannot be read")
    }

    /// Downloads a hub's repository into a folder; safe to repeat.
    pub fn fetch(&self, source: &str, into: &Path, token: Option<&Path>) -> anyhow::Result<()> {
        let mut command = self.command();
        command.arg("fetch").arg(source).arg("--into").arg(into);
        // Its progress goes to standard error; ours is the only voice on standard output.
        command.stdout(Stdio::null());
        if let Some(token) = token {
            command.arg("--token-file").arg(token);
        }
        self.run(command).map(drop)
    }

    /// The serving process, not started yet. It gets a process group of its own, so that Ctrl-C reaches it through us
    /// alone, and it ends when we end, however we do.
    pub fn serve(&self, directory: &Path, flags: impl IntoIterator<Item = OsString>) -> Command {
        self.forget_report();
        let mut command = self.command();
        command.arg("serve").arg("--model").arg(directory).args(flags).arg(self.termination_flag());
        command.stdin(Stdio::null()).process_group(0);
        die_with_parent(&mut command);
        command
    }

    /// What the engine said when it ended; an exit code and a signal say less.
    pub fn why_ended(&self, status: ExitStatus) -> Ended {
        let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
        match self.report() {
            Some(ExitReport { reason, message, memory: _ }) => {
                let reason = Reason::from(reason);
                Ended { code, reason: reason.name().to_owned(), message, remedy: reason.remedy() }
            }
            None => Ended {
                code,
                reason: "the engine ended".to_owned(),
                message: format!("it did not say why ({status})"),
                remedy: "read what it printed; please report it",
            },
        }
    }

    fn report(&self) -> Option<ExitReport> {
        let said = std::fs::read(&self.termination_file).ok()?;
        serde_json::from_slice(said.get(..TERMINATION_MESSAGE_BYTES_MAX).unwrap_or(&said)).ok()
    }

    /// What one verb said must not be taken for another's; most often there is nothing.
    fn forget_report(&self) {
        let _ = std::fs::remove_file(&self.termination_file);
    }

    fn command(&self) -> Command {
        Command::new(&self.program)
    }

    fn termination_flag(&self) -> OsString {
        let mut flag = OsString::from("--termination-message-file=");
        flag.push(&self.termination_file);
        flag
    }

    /// Runs to the end; standard output, where it is piped.
    fn run(&self, mut command: Command) -> anyhow::Result<Vec<u8>> {
        self.forget_report();
        command.arg(self.termination_flag()).stdin(Stdio::null());
        let child =
            command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        let output = child.wait_with_output()?;
        if !output.status.success() && self.report().is_none() {
            // Empty where it was not piped, and has been seen already.
            eprint!("{}", String::from_utf8_lossy(&output.stderr));
        }
        if output.status.success() {
            Ok(output.stdout)
        } else {
            Err(self.why_ended(output.status).into())
        }
    }
}

/// The exit code of an error: the engine's own, where it ended with one.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<Ended>() {
        Some(ended) => ExitCode::from(ended.code.max(1)),
        None => ExitCode::FAILURE,
    }
}

/// Beside this program first, so that a build is used with its own engine.
fn search() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(Path::to_path_buf));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join(PROGRAM))
        .find(|candidate| candidate.is_file())
}

#[cfg(target_os = "linux")]
fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: between fork and exec only prctl and getppid run, both async-signal-safe, on no memory of ours.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            // The parent may have gone before the line above.
            if libc::getppid().cast_unsigned() == parent {
                Ok(())
            } else {
                Err(std::io::Error::other("the parent is gone"))
            }
        });
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_: &mut Command) {}
