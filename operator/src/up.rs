//! `plimsoll up FILE`: the manifest of a cluster with no cluster. Spec, facts, plan and flags are the operator's; the
//! engine is a child process. What a person reads goes to standard error, an answer to standard output.

use std::ffi::OsString;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use plimsoll_contract::facts::ModelFacts;
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::ask::{self, Interface};
use crate::cli::UpArgs;
use crate::engine::{self, Engine};
use crate::plan::{self, Plan};
use crate::spec::Spec;
use crate::{local, show};

/// What the engine logs, as its own `logs` reads it.
const ENGINE_LOG: &str = "PLIMSOLL_LOG";
const READY_POLL: Duration = Duration::from_millis(25);
/// Beyond the engine's own drain timeout, before it is killed.
const DRAIN_MARGIN: Duration = Duration::from_secs(10);

pub fn up(args: &UpArgs) -> anyhow::Result<ExitCode> {
    let outcome = prepare(args).and_then(|prepared| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(serve(args, &prepared))
    });
    outcome.or_else(|error| {
        eprintln!("plimsoll: {error:#}");
        Ok(engine::exit_code(&error))
    })
}

/// All that is decided before anything runs.
struct Prepared {
    engine: Engine,
    spec: Spec,
    facts: ModelFacts,
    plan: Plan,
    directory: std::path::PathBuf,
    address: SocketAddr,
    key: Option<String>,
}

fn prepare(args: &UpArgs) -> anyhow::Result<Prepared> {
    let spec = local::spec(&args.file)?;
    refuse_what_needs_a_cluster(&spec, args)?;
    let key = args.api_key_file.as_deref().map(first_key).transpose()?;
    let address = free_address(args.listen)?;
    let engine = Engine::find(args.local.engine.as_deref())?;
    let directory = local::model_directory(&spec, &engine, &args.local)?;
    let facts = engine.inspect(&directory)?;
    let outcome = local::plan_here(&spec, &facts, local::machine(&engine)?);
    let paint = show::Paint::of(&std::io::stderr());
    eprintln!("{}", show::table(&spec, &facts, &outcome, paint, show::Listed::Best));
    let Some(plan) = outcome.chosen else { bail!("no plan fits this machine") };
    for note in notes(&spec) {
        eprintln!("  note       {note}");
    }
    Ok(Prepared { engine, spec, facts, plan, directory, address, key })
}

fn refuse_what_needs_a_cluster(spec: &Spec, args: &UpArgs) -> anyhow::Result<()> {
    if spec.suspend {
        bail!("spec.suspend is true, so nothing is to run: set it to false");
    }
    if spec.api_keys.is_some() && args.api_key_file.is_none() {
        bail!("spec.auth names a Secret, which only a cluster has: give --api-key-file FILE");
    }
    Ok(())
}

/// What a cluster would do with the manifest and one process does not.
fn notes(spec: &Spec) -> Vec<String> {
    let mut notes = Vec::new();
    if spec.replicas != 1 {
        notes.push(format!("spec.replicas is {}; here one process serves", spec.replicas));
    }
    if spec.pod_template.is_some() {
        notes.push("spec.podTemplate is for pods; here it changes nothing".to_owned());
    }
    notes
}

fn first_key(file: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("--api-key-file: cannot read {}", file.display()))?;
    let key = text.lines().map(str::trim).find(|line| !line.is_empty());
    key.map(str::to_owned).with_context(|| format!("--api-key-file: {} is empty", file.display()))
}

/// The address as given, or with a free port where it is 0; a taken one is told before a model is loaded for nothing.
fn free_address(wanted: SocketAddr) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(wanted).with_context(|| {
        format!("cannot listen on {wanted}: choose another with --listen ADDR:PORT (0 takes a free port)")
    })?;
    Ok(listener.local_addr()?)
}

async fn serve(args: &UpArgs, prepared: &Prepared) -> anyhow::Result<ExitCode> {
    let mut stop = Stop::new()?;
    let started = Instant::now();
    let mut child = start(args, prepared)?;
    tokio::select! {
        ended = child.wait() => return Err(prepared.engine.why_ended(ended?).into()),
        () = stop.wait() => return drain(&mut child, prepared, &mut stop).await,
        () = ready(reachable(prepared.address)) => {}
    }
    announce(prepared, started.elapsed());
    if let Some(question) = &args.ask {
        tokio::select! {
            ended = child.wait() => return Err(prepared.engine.why_ended(ended?).into()),
            () = stop.wait() => return drain(&mut child, prepared, &mut stop).await,
            answered = answer(prepared, question) => {
                if args.once || answered.is_err() {
                    let code = drain(&mut child, prepared, &mut stop).await?;
                    return answered.map(|()| code);
                }
            }
        }
    }
    tokio::select! {
        ended = child.wait() => Err(prepared.engine.why_ended(ended?).into()),
        () = stop.wait() => drain(&mut child, prepared, &mut stop).await,
    }
}

fn start(args: &UpArgs, prepared: &Prepared) -> anyhow::Result<Child> {
    let Prepared { engine, spec, plan, directory, address, .. } = prepared;
    let mut flags: Vec<OsString> =
        plan::flags(plan, spec).into_iter().map(OsString::from).collect();
    // No endpoints have to catch up here, so a drain begins at once.
    flags.extend([format!("--listen={address}").into(), "--drain-grace=0s".into()]);
    // The engine's lines stand among ours, for the same eyes.
    flags.push("--log-format=text".into());
    if let Some(file) = &args.api_key_file {
        flags.extend(["--api-key-file".into(), file.into()]);
    }
    let mut command = Command::from(engine.serve(directory, flags));
    if std::env::var_os(ENGINE_LOG).is_none() {
        // We tell of start, readiness and drain ourselves.
        command.env(ENGINE_LOG, "warn");
    }
    command.kill_on_drop(true).spawn().context("cannot start the engine")
}

/// An unspecified address is reached through loopback.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

/// Bounded by whoever waits: the engine ends by itself when it cannot load.
async fn ready(address: SocketAddr) {
    while !ask::is_ready(address).await {
        tokio::time::sleep(READY_POLL).await;
    }
}

fn interface(facts: &ModelFacts) -> Interface {
    if facts.chat_template { Interface::Chat } else { Interface::Completion }
}

fn announce(prepared: &Prepared, took: Duration) {
    let Prepared { spec, facts, address, key, .. } = prepared;
    let address = reachable(*address);
    let interface = interface(facts);
    let body = interface.body(&spec.served_name, "Hello");
    let key = if key.is_some() { " -H 'Authorization: Bearer KEY'" } else { "" };
    eprintln!(
        "\n  ready      http://{address}/v1 after {:.1} s; Ctrl-C drains and ends\n  try        curl -N http://{address}{}{key} \\\n               -H 'Content-Type: application/json' -d '{body}'\n",
        took.as_secs_f64(),
        interface.path(),
    );
}

async fn answer(prepared: &Prepared, question: &str) -> anyhow::Result<()> {
    let Prepared { spec, facts, address, key, .. } = prepared;
    let interface = interface(facts);
    let mut body = interface.body(&spec.served_name, question);
    // The likeliest answer, so that the same question is answered alike.
    body["temperature"] = 0.into();
    let mut out = std::io::stdout();
    eprintln!("  > {question}");
    ask::ask(reachable(*address), key.as_deref(), interface, &body, |piece| {
        out.write_all(piece.as_bytes())?;
        out.flush()
    })
    .await?;
    writeln!(out)?;
    Ok(())
}

/// Lets running requests finish; a second signal, or the time, ends them.
async fn drain(
    child: &mut Child,
    prepared: &Prepared,
    stop: &mut Stop,
) -> anyhow::Result<ExitCode> {
    eprintln!("  draining   running requests finish; once more ends at once");
    let started = Instant::now();
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // SAFETY: a signal to our own child, which has not been waited for, so that its id is still its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
    let bound = Duration::from_secs(prepared.spec.drain_seconds.into()) + DRAIN_MARGIN;
    let ended = tokio::select! {
        ended = child.wait() => ended?,
        () = stop.wait() => return kill(child, "a second signal").await,
        () = tokio::time::sleep(bound) => return kill(child, "the drain took too long").await,
    };
    if !ended.success() {
        return Err(prepared.engine.why_ended(ended).into());
    }
    eprintln!("  drained    in {:.1} s", started.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

async fn kill(child: &mut Child, why: &str) -> anyhow::Result<ExitCode> {
    child.kill().await?;
    eprintln!("  ended      {why}; requests were cut off");
    Ok(ExitCode::FAILURE)
}

/// Ctrl-C, or a polite end from outside.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn new() -> std::io::Result<Stop> {
        Ok(Stop {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
