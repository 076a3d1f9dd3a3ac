//! In: flags. Out: the controller running until a signal or the loss of its Lease. Here the parts are put together and
//! served over HTTP; what a reconcile does stands in `reconcile`.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use futures::StreamExt;
use futures::channel::mpsc;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::jiff::Timestamp;
use kube::api::ObjectMeta;
use kube::runtime::controller::{self, Action};
use kube::runtime::events::Reporter;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::utils::CancelableJoinHandle;
use kube::{Api, Client, Config, Resource, ResourceExt};
use plimsoll_crds::{Clients, LLMDeployment};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::Instant;
use tracing_subscriber::EnvFilter;

use crate::apply::{ApplyError, Sharing, Taken};
use crate::cli::{CHART, CHART_VALUES};
use crate::desired::{Settings, names};
use crate::events::Teller;
use crate::leader::{self, Leader};
use crate::measure;
use crate::memory;
use crate::metrics::{Metrics, Scraped};
use crate::neighbours::Readings;
use crate::observe::{self, Caches, Triggers};
use crate::plan::Prices;
use crate::pods;
use crate::reconcile::{Considered, Context, reconcile};
use crate::scale::Advices;
use crate::scale::decide::Tempo;
use crate::scale::prometheus::{Prometheus, PrometheusArgs};
use crate::scale::watch::{self as scaling, Scaler};

/// The operator waits more than it computes; two threads keep it small.
const WORKER_THREADS: usize = 2;
/// Objects looked at side by side that have nothing yet.
const FIRST_LOOKS_MAX: usize = 16;
/// Objects that stand wait for so long before the first word is said of them, where others wait for their children: pods
/// begin earlier so.
const CHILDREN_FIRST_MAX: Duration = Duration::from_secs(30);
const CHILDREN_FIRST_STEP: Duration = Duration::from_millis(250);
/// Objects of which the first word is said side by side: whose pods answer waits for none of them.
const FIRST_WORDS_MAX: usize = 4;
/// Objects looked at side by side that stand; so whoever declares a thousand lets nobody wait for a status.
const NEXT_LOOKS_MAX: usize = 8;
/// News of an object that stands, and whose spec is not new, are heard out for so long before it is looked at: children come
/// as five words.
const HEAR_OUT: Duration = Duration::from_millis(150);
/// A pod that has just come is often ready at once; it is heard out for no longer than this.
const HEAR_POD_OUT_MAX: Duration = Duration::from_millis(600);
/// A reconcile that failed is tried again after this, doubled with every failure up to the bound.
const BACKOFF_MIN: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Failing objects of which the number of failures is remembered.
const FAILURES_MAX: usize = 100_000;
/// Objects with something measured that wait to be looked at.
const NEWS_MAX: usize = 1024;
/// What reconciles in flight get to finish after a signal.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// Flags of `plimsoll run`.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// Watch this namespace only (value watchNamespace) [default: the whole cluster]
    #[arg(long, help_heading = CHART_VALUES, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Where to serve /metrics, /livez and /readyz
    #[arg(long, help_heading = CHART, value_name = "ADDR:PORT", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Image of engine pods and inspect Jobs (value engine.image)
    #[arg(long, help_heading = CHART_VALUES, value_name = "IMAGE", default_value = "plimsoll/engine:dev")]
    pub engine_image: String,
    /// Let file:// sources mount a folder of the node, which lets authors of manifests read nodes (value allowHostPath)
    /// [default: off]
    #[arg(long, help_heading = CHART_VALUES)]
    pub allow_host_path: bool,
    /// Where hf:// models are downloaded from (value hubEndpoint) [default: the public hub]
    #[arg(long, help_heading = CHART_VALUES, value_name = "URL")]
    pub hub_endpoint: Option<String>,
    /// Seconds between two looks at what the engines of an object measure; 0: none (value operator.measureSeconds)
    #[arg(long, help_heading = CHART_VALUES, value_name = "SECONDS", default_value_t = 600)]
    pub measure_seconds: u64,
    /// What an hour of one GPU costs, as nvidia-h200=3.5 in US dollars; once for each class (value prices) [default: a dated list,
    /// docs/planner.md]
    #[arg(long = "price", help_heading = CHART_VALUES, value_name = "CLASS=DOLLARS")]
    pub prices: Vec<String>,
    /// Who may reach engines whose spec.network does not say (value workloads.clients)
    #[arg(long, help_heading = CHART_VALUES, value_name = "CLIENTS", value_enum, default_value_t = ClientsArg::Cluster)]
    pub clients: ClientsArg,
    /// A label, KEY=VALUE, by which a Prometheus finds PodMonitors and PrometheusRules; may be repeated (value
    /// workloads.monitorLabels) [default: none]
    #[arg(long = "monitor-label", help_heading = CHART_VALUES, value_name = "KEY=VALUE", value_parser = label)]
    pub monitor_labels: Vec<(String, String)>,
    /// Where the Lease lies that elects one operator [default: the namespace of the pod or the kubeconfig]
    #[arg(long, help_heading = CHART, value_name = "NAMESPACE", env = "POD_NAMESPACE")]
    pub lease_namespace: Option<String>,
    /// The Lease that elects one operator; the operators of one installation share it, and no others
    #[arg(long, help_heading = CHART, value_name = "NAME", default_value = "plimsoll-operator")]
    pub lease_name: String,
    /// Who holds the Lease [default: host name and process number]
    #[arg(long, help_heading = CHART, value_name = "NAME", env = "POD_NAME")]
    pub identity: Option<String>,
    #[command(flatten)]
    pub prometheus: PrometheusArgs,
    /// How to log; auto is text on a terminal and JSON elsewhere (value operator.logFormat)
    #[arg(long, help_heading = CHART_VALUES, value_enum, default_value_t = LogFormat::Auto)]
    pub log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Auto,
    Text,
    Json,
}

/// Whom a NetworkPolicy lets in, as a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ClientsArg {
    /// Pods of the object's namespace, and of namespaces labelled plimsoll.dev/clients=true
    Namespace,
    /// Every pod of the cluster
    Cluster,
    /// From outside too
    Anyone,
}

impl From<ClientsArg> for Clients {
    fn from(clients: ClientsArg) -> Clients {
        match clients {
            ClientsArg::Namespace => Clients::Namespace,
            ClientsArg::Cluster => Clients::Cluster,
            ClientsArg::Anyone => Clients::Anyone,
        }
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a label is KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// `plimsoll run`.
pub fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    log_as(args.log_format);
    memory::keep_small();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    runtime.block_on(operate(args)).map(|()| ExitCode::SUCCESS)
}

/// `RUST_LOG` narrows or widens what is logged.
fn log_as(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let json = match format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !std::io::stderr().is_terminal(),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if json {
        log.json().init();
    } else {
        log.init();
    }
}

async fn operate(options: RunArgs) -> anyhow::Result<()> {
    let prices =
        Prices::listed(&options.prices).map_err(|error| anyhow::anyhow!("--price: {error}"))?;
    let mut config = Config::infer().await.context("no cluster to talk to")?;
    let agent = concat!("plimsoll/", env!("CARGO_PKG_VERSION"));
    config
        .headers
        .push((axum::http::header::USER_AGENT, axum::http::HeaderValue::from_static(agent)));
    let home = options.lease_namespace.clone().unwrap_or(config.default_namespace.clone());
    let client = Client::try_from(config).context("no client for the cluster")?;
    let prometheus = Prometheus::of(&options.prometheus)?;
    let identity = options.identity.clone().unwrap_or_else(process_identity);
    let served = Arc::new(Served { metrics: Arc::new(Metrics::new()), caches: OnceLock::new() });
    serve(options.listen, served.clone()).await?;
    let stop = stop_signal()?;

    let leases = Api::namespaced(client.clone(), &home);
    let mut stopped = stop.clone();
    let mut leader = tokio::select! {
        leader = leader::acquire(leases, &options.lease_name, &identity) => leader,
        _ = stopped.wait_for(|stop| *stop) => return Ok(()),
    };
    let (caches, mut triggers) = observe::start(&client, options.namespace.as_deref());
    served.caches.set(caches.clone()).ok().expect("set once");
    let reporter =
        Reporter { controller: "plimsoll.dev/operator".to_owned(), instance: Some(identity) };
    let advices = Arc::new(Advices::default());
    let (scaled, news) = mpsc::channel(scaling::TRIGGERS_MAX);
    triggers.push(news.map(Ok).boxed());
    let scaler = Scaler {
        prometheus,
        tempo: Tempo { interval_seconds: options.prometheus.scaling_interval.into() },
        client: client.clone(),
        caches: caches.clone(),
        metrics: served.metrics.clone(),
        advices: advices.clone(),
        triggers: scaled,
        watched: HashMap::new(),
        quotas: HashMap::new(),
    };
    let context = Arc::new(Context {
        teller: Teller::new(client.clone(), reporter),
        client,
        namespace: options.namespace,
        caches,
        advices,
        metrics: served.metrics.clone(),
        sharing: Sharing::default(),
        taken: Taken::default(),
        clock: Arc::new(Timestamp::now),
        considered: Considered::default(),
        readings: Readings::default(),
        measurements: Arc::default(),
        prices,
        settings: Settings {
            engine_image: options.engine_image,
            allow_host_path: options.allow_host_path,
            hub_endpoint: options.hub_endpoint,
            home,
            clients: options.clients.into(),
            monitor_labels: options.monitor_labels.into_iter().collect(),
        },
    });
    let every = Duration::from_secs(options.measure_seconds);
    lead(&mut leader, context, scaler, triggers, every, stop).await?;
    leader.release().await;
    Ok(())
}

/// Reconciles while the Lease is ours. A signal lets reconciles in flight finish; losing the Lease does not.
async fn lead(
    leader: &mut Leader,
    context: Arc<Context>,
    scaler: Scaler,
    mut triggers: Triggers,
    measure_every: Duration,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut stopped = stop.clone();
    let overdue = async move {
        // An error means that the sender is gone, which only the end of the process brings about.
        let _ = stopped.wait_for(|stop| *stop).await;
        tokio::time::sleep(STOP_GRACE).await;
    };
    let (news, measured) = mpsc::channel(NEWS_MAX);
    triggers.push(measured.map(Ok).boxed());
    let (caches, measurements) = (context.caches.clone(), context.measurements.clone());
    let giving_back = memory::give_back(context.clone());
    let measuring = async move {
        if measure_every.is_zero() {
            std::future::pending::<()>().await;
        }
        measure::run(caches, measurements, measure_every, news).await;
    };
    tokio::select! {
        () = scaling::run(scaler) => unreachable!("the scaling loop has no end"),
        () = measuring => Ok(()),
        () = giving_back => unreachable!("it has no end"),
        () = control(context, triggers, stop) => Ok(()),
        lost = leader.hold() => anyhow::bail!("no longer leading: {lost}"),
        () = overdue => Ok(()),
    }
}

/// Reconciles what the triggers name, side by side, until `stop`.
pub async fn control(context: Arc<Context>, triggers: Triggers, mut stop: watch::Receiver<bool>) {
    let store = context.caches.objects.clone();
    let failures = Arc::new(Failures::default());
    let counted = failures.clone();
    let lanes = Arc::new(Lanes::default());
    let stopping = stop.clone();
    let work = move |object: Arc<LLMDeployment>, context: Arc<Context>| {
        let failures = counted.clone();
        let lanes = lanes.clone();
        let mut stopping = stopping.clone();
        let work = async move {
            let _turn = tokio::select! {
                turn = lanes.turn(&object, &context.caches) => turn,
                _ = stopping.wait_for(|stop| *stop) => return Ok(Action::await_change()),
            };
            // As it is now, after the wait.
            let Some(object) = context.caches.objects.get(&ObjectRef::from_obj(object.as_ref()))
            else {
                return Ok(Action::await_change());
            };
            // Boxed, so that those who wait are small.
            let done = Box::pin(reconcile(object.clone(), context)).await;
            if done.is_ok() {
                failures.forget(object.meta());
            }
            done
        };
        CancelableJoinHandle::spawn(work, &tokio::runtime::Handle::current())
    };
    let policy = move |object: Arc<LLMDeployment>, error: &ApplyError, _: Arc<Context>| {
        let error = anyhow::Error::msg(chain(error));
        tracing::warn!(%error, object = %name(object.meta()), "a reconcile failed");
        Action::requeue(failures.next(object.meta()))
    };
    let until_stop = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let queue = triggers.take_until(Box::pin(until_stop));
    // Each object is looked at by one at a time, and the lanes bound how many are.
    let config = controller::Config::default().concurrency(0);
    controller::applier(work, policy, context, store, Box::pin(queue), config)
        .for_each(|done| async {
            match done {
                Ok(_)
                | Err(
                    // The policy has told of it.
                    controller::Error::ReconcilerFailed(..)
                    // Deleted while it was queued.
                    | controller::Error::ObjectNotFound(_),
                ) => {}
                Err(error) => tracing::warn!(%error, "a watch failed and is opened again"),
            }
        })
        .await;
}

/// Where objects wait for their turn.
struct Lanes {
    /// Of those that have nothing yet, first come first served.
    first: Semaphore,
    /// Of those whose children stand and of which nothing is told yet, until they have pods.
    words: Semaphore,
    /// Of all others, first come first served.
    next: Semaphore,
}

impl Default for Lanes {
    fn default() -> Lanes {
        Lanes {
            first: Semaphore::new(FIRST_LOOKS_MAX),
            words: Semaphore::new(FIRST_WORDS_MAX),
            next: Semaphore::new(NEXT_LOOKS_MAX),
        }
    }
}

impl Lanes {
    async fn turn(&self, object: &LLMDeployment, caches: &Caches) -> SemaphorePermit<'_> {
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        if !caches.holds::<Deployment>(&namespace, &name) {
            return self.first.acquire().await.expect("lanes are never closed");
        }
        let begun = Instant::now();
        let pods = || caches.pods_with(&namespace, names::NAME, &name);
        let told = object.status.as_ref().and_then(|status| status.observed_generation);
        if told.is_none() {
            let others_first =
                || self.first.available_permits() == 0 && begun.elapsed() < CHILDREN_FIRST_MAX;
            while pods().is_empty() && others_first() {
                tokio::time::sleep(CHILDREN_FIRST_STEP).await;
            }
            let mut turn = pin!(self.words.acquire());
            while pods().is_empty() {
                tokio::select! {
                    turn = &mut turn => return turn.expect("lanes are never closed"),
                    () = tokio::time::sleep(CHILDREN_FIRST_STEP) => {}
                }
            }
        } else if told == object.metadata.generation {
            tokio::time::sleep(HEAR_OUT).await;
            let coming = || pods().iter().any(|pod| pods::is_coming(pod));
            while begun.elapsed() < HEAR_POD_OUT_MAX && coming() {
                tokio::time::sleep(HEAR_OUT).await;
            }
        }
        self.next.acquire().await.expect("lanes are never closed")
    }
}

/// Failures in a row by uid, for the back-off: another object of the same name begins anew.
#[derive(Default)]
struct Failures(Mutex<HashMap<String, u32>>);

impl Failures {
    fn next(&self, meta: &ObjectMeta) -> Duration {
        let mut counts = self.0.lock().expect("no holder panics");
        // Nobody tells of objects that are gone.
        if counts.len() >= FAILURES_MAX {
            counts.clear();
        }
        let count = counts.entry(meta.uid.clone().unwrap_or_default()).or_insert(0);
        *count = (*count + 1).min(16);
        backoff(*count)
    }

    fn forget(&self, meta: &ObjectMeta) {
        let uid = meta.uid.as_deref().unwrap_or_default();
        self.0.lock().expect("no holder panics").remove(uid);
    }
}

fn backoff(failures: u32) -> Duration {
    let doubled = BACKOFF_MIN.saturating_mul(1 << failures.saturating_sub(1).min(10));
    doubled.min(BACKOFF_MAX)
}

fn name(meta: &ObjectMeta) -> String {
    let part = |part: &Option<String>| part.clone().unwrap_or_default();
    format!("{}/{}", part(&meta.namespace), part(&meta.name))
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

/// True from the first SIGTERM or SIGINT on.
fn stop_signal() -> anyhow::Result<watch::Receiver<bool>> {
    let (stop, stopped) = watch::channel(false);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        stop.send_replace(true);
        // Receivers wait for the value, not for the end of the channel.
        stop.closed().await;
    });
    Ok(stopped)
}

fn process_identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{}", host.trim(), std::process::id())
}

/// What the HTTP endpoints read.
struct Served {
    metrics: Arc<Metrics>,
    /// Set once this process leads.
    caches: OnceLock<Arc<Caches>>,
}

async fn serve(address: SocketAddr, served: Arc<Served>) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(served);
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    tracing::info!(address = %listener.local_addr()?, "metrics and probes");
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

/// An operator that waits for the Lease is ready: it does what it is there for. One that leads is ready once it sees.
async fn readyz(State(served): State<Arc<Served>>) -> (StatusCode, &'static str) {
    let Some(caches) = served.caches.get() else {
        return (StatusCode::OK, "waiting for the Lease");
    };
    if caches.is_ready() {
        (StatusCode::OK, "leading")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the caches are filling")
    }
}

async fn metrics(State(served): State<Arc<Served>>) -> String {
    let caches = served.caches.get();
    let objects = caches.map(|caches| caches.objects.state()).unwrap_or_default();
    let mut restarts = Vec::new();
    if let Some(caches) = caches {
        caches.each_pod(|namespace, name, brief| {
            let Some(object) = &brief.object else { return };
            let names = [namespace, object, name].map(str::to_owned);
            restarts.push((names, brief.restarts));
        });
    }
    let leading = caches.is_some();
    served.metrics.text(&Scraped { leading, objects: &objects, restarts: &restarts })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_back_off_doubles_up_to_its_bound() {
        assert_eq!(backoff(1), BACKOFF_MIN);
        assert_eq!(backoff(2), BACKOFF_MIN * 2);
        assert_eq!(backoff(16), BACKOFF_MAX);
    }
}
