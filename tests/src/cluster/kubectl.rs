//! kubectl as a person types it, for tests.
//!
//! In: words and, for `apply`, a manifest as text. Out: what it printed, or an error with all it
//! said. Never retries: waiting is `kubectl wait` or [`super::wait_until`].

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// kubectl with one kubeconfig, run where that cluster can be reached.
#[derive(Clone, Debug)]
pub struct Kubectl {
    words: Vec<String>,
    kubeconfig: PathBuf,
}

impl Kubectl {
    /// `prefix` enters the cluster's network; empty where it is ours.
    pub(crate) fn new(program: Vec<String>, kubeconfig: PathBuf, prefix: Vec<String>) -> Kubectl {
        Kubectl { words: [prefix, program].concat(), kubeconfig }
    }

    /// The same cluster as someone else.
    pub fn with_kubeconfig(&self, kubeconfig: &Path) -> Kubectl {
        Kubectl { words: self.words.clone(), kubeconfig: kubeconfig.into() }
    }

    /// The command with these arguments, not yet started.
    pub fn command<S: AsRef<str>>(&self, args: &[S]) -> Command {
        let mut command = super::tools::command(&self.words);
        command.env("KUBECONFIG", &self.kubeconfig);
        command.args(args.iter().map(AsRef::as_ref));
        command
    }

    /// Runs it and returns what it printed; an error carries what it complained about.
    pub fn run<S: AsRef<str>>(&self, args: &[S]) -> Result<String> {
        text_of(args, self.command(args).stdin(Stdio::null()).output()?)
    }

    /// Runs it with text on its standard input, as in `apply -f -`.
    pub fn run_with_input<S: AsRef<str>>(&self, args: &[S], input: &str) -> Result<String> {
        let mut command = self.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let mut stdin = child.stdin.take().context("standard input is piped")?;
        stdin.write_all(input.as_bytes())?;
        drop(stdin);
        text_of(args, child.wait_with_output()?)
    }

    /// Applies a manifest given as text.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        self.run_with_input(&["apply", "-f", "-"], manifest)
    }

    /// An object, or a list, as JSON.
    pub fn get<S: AsRef<str>>(&self, args: &[S]) -> Result<Value> {
        let mut words = vec!["get", "-o", "json"];
        words.extend(args.iter().map(AsRef::as_ref));
        Ok(serde_json::from_str(&self.run(&words)?)?)
    }
}

fn text_of<S: AsRef<str>>(args: &[S], output: Output) -> Result<String> {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let words: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("kubectl {}: {}\n{said}{complaint}", words.join(" "), output.status);
    }
    Ok(said)
}
