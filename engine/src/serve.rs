//! One serving process from start to drain. The listener opens first, so that probes are answered while the model
//! loads; then requests are served until a signal or a loss; then the drain. Nothing here knows a request's content.

mod load;

use std::convert::Infallible;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use plimsoll_contract::exit::{ExitReason, ExitReport};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::cli::ServeArgs;
use crate::exit::internal;
use crate::http::auth::ApiKeys;
use crate::http::connections::{self, ConnectionLimits};
use crate::http::{self, App, Served};
use crate::step::EngineLoss;

/// How often a log says how far loading is.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Runs until the process should end: Ok after a drain.
pub fn run(args: &ServeArgs) -> Result<(), ExitReport> {
    let started = Instant::now();
    allow_many_connections();
    http::body::map_large_blocks();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| internal(format!("failed to start the runtime: {e}")))?;
    let result = runtime.block_on(process(args, started));
    // What still runs after the drain is cut here.
    runtime.shutdown_background();
    result
}

async fn process(args: &ServeArgs, started: Instant) -> Result<(), ExitReport> {
    let mut signals = Signals::new()?;
    let keys = args.api_key_file.as_deref().map(ApiKeys::open).transpose();
    let keys = keys.map_err(|e| e.report())?;
    let app = Arc::new(App::new(served_name(args), keys));
    let listener = TcpListener::bind(args.listen)
        .await
        .map_err(|e| internal(format!("failed to listen on {}: {e}", args.listen)))?;
    let address = listener.local_addr().map_err(|e| internal(e.to_string()))?;
    tracing::info!(%address, model = %args.model.display(), "listening; loading the model");
    let server = Server::start(listener, app.clone(), ConnectionLimits::default());

    let loading = {
        let (args, app) = (args.clone(), app.clone());
        tokio::task::spawn_blocking(move || load::load(&args, &app, started, &mut show_progress))
    };
    let telling = tell_progress(
        PROGRESS_EVERY,
        || app.progress(),
        |progress| {
            if !std::io::stderr().is_terminal() {
                tracing::info!(progress, "loading");
            }
        },
    );
    let served = tokio::select! {
        never = telling => match never {},
        loaded = loading => loaded.map_err(|e| internal(format!("loading panicked: {e}")))??,
        name = signals.next() => {
            tracing::info!(signal = name, "stopped while loading");
            return Ok(());
        }
    };
    let engine = served.engine.clone();
    app.serve(served);
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(%address, model = app.name, seconds, "ready");

    let name = tokio::select! {
        name = signals.next() => name,
        loss = engine.lost() => return Err(loss_report(loss)),
    };
    tracing::info!(signal = name, grace = ?args.drain_grace, "draining; a second signal ends at once");
    tokio::select! {
        () = server.drain(args.drain_grace, args.drain_timeout) => Ok(()),
        name = signals.next() => {
            tracing::warn!(signal = name, "ended by a second signal");
            Ok(())
        }
        loss = engine.lost() => Err(loss_report(loss)),
    }
}

/// The HTTP side of a process; also what tests start, in place of a process.
pub struct Server {
    app: Arc<App>,
    closing: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    pub fn start(listener: TcpListener, app: Arc<App>, limits: ConnectionLimits) -> Server {
        let (closing, closed) = watch::channel(false);
        let router = http::router(app.clone());
        let task = tokio::spawn(connections::serve(listener, router, limits, closed));
        Server { app, closing, task }
    }

    /// For `grace`, /ready says no while all that still arrives is served, each answer with `Connection: close`. Then
    /// no more is accepted, and requests that have arrived have until `timeout` to finish.
    pub async fn drain(self, grace: Duration, timeout: Duration) {
        self.app.drain();
        tokio::time::sleep(grace).await;
        self.app.close();
        self.closing.send_replace(true);
        let served: Option<Arc<Served>> = self.app.served();
        let finished = async {
            // Ends with the last answer. Until then the engine refuses nothing: whatever a connection still brings came
            // before its client could know.
            let _ = self.task.await;
            if let Some(served) = &served {
                served.engine.begin_shutdown();
                served.engine.drained().await;
            }
        };
        if tokio::time::timeout(timeout, finished).await.is_err() {
            let running = served.map_or(0, |served| served.engine.state().running);
            tracing::warn!(running, "the drain's time is over; what still runs is cut");
        } else {
            tracing::info!("drained");
        }
    }
}

fn loss_report(loss: EngineLoss) -> ExitReport {
    match loss {
        EngineLoss::Device(message) => ExitReport::new(ExitReason::DeviceLost, message),
        EngineLoss::Panicked => internal("the step loop panicked; its message stands in the log"),
    }
}

/// The directory's name unless another was given.
fn served_name(args: &ServeArgs) -> String {
    let directory = |dir: &Path| dir.file_name().map(|name| name.to_string_lossy().into_owned());
    args.served_name
        .clone()
        .or_else(|| directory(&args.model))
        .or_else(|| args.model.canonicalize().ok().as_deref().and_then(directory))
        .unwrap_or_else(|| "model".to_owned())
}

/// Loading in words, again and again, also while one step of it takes long.
async fn tell_progress(
    every: Duration,
    progress: impl Fn() -> String,
    mut tell: impl FnMut(&str),
) -> Infallible {
    loop {
        tokio::time::sleep(every).await;
        tell(&progress());
    }
}

/// One line that is written over, on a terminal; elsewhere the log and /ready tell.
fn show_progress(progress: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[2K{progress}\r");
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Signals, ExitReport> {
        let listen = |kind| signal(kind).map_err(|e| internal(format!("no signals: {e}")));
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Shells often allow 1,024 open files; each connection is one.
pub fn allow_many_connections() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls only read or write `limit`, which outlives them.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    if !raised {
        tracing::warn!("failed to raise the limit of open files");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_log_says_how_far_loading_is_even_while_nothing_moves() {
        let app = App::new("m".into(), None);
        app.set_progress("weights: 3 of 80 layers".into());
        let mut lines = Vec::new();
        let telling = tell_progress(
            Duration::from_millis(10),
            || app.progress(),
            |progress| {
                lines.push(progress.to_owned());
                app.set_progress(
                    if lines.len() < 2 { progress } else { "weights: 4 of 80 layers" }.to_owned(),
                );
            },
        );
        tokio::select! {
            never = telling => match never {},
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
        }
        assert!(lines.len() > 2, "{lines:?}");
        assert_eq!(lines[..2], ["weights: 3 of 80 layers"; 2]);
        assert_eq!(lines[2], "weights: 4 of 80 layers");
    }
}
