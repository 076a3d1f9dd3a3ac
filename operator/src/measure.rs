//! In: engines that are ready. Out: what they measured, as `status.measured` is to show it, and word to the controller when
//! that is worth a write. One engine of an object is asked every few minutes, directly: no Prometheus has to be there, and
//! nothing is asked of the API server. Never here: a decision, a write.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::SinkExt;
use futures::channel::mpsc;
use futures::stream::{self, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use plimsoll_crds::{LLMDeployment, MeasuredStatus};
use tokio::time::Instant;

use crate::desired::names;
use crate::measured::{self, Totals};
use crate::observe::Caches;
use crate::{ask, pods, revision};

/// Engines asked side by side.
const LOOKS_MAX: usize = 8;
/// An engine that does not answer is asked again at the next turn.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// How often is looked whose turn it is, at most.
const TICK: Duration = Duration::from_secs(15);

/// What is to be shown, by the uid of the object.
#[derive(Default)]
pub struct Measurements(Mutex<HashMap<String, Shown>>);

#[derive(Clone)]
struct Shown {
    /// Name of the revision whose engines were asked.
    revision: String,
    measured: MeasuredStatus,
}

impl Measurements {
    /// What to show beside the plan of `revision`.
    pub fn of(&self, uid: &str, revision: &str) -> Option<MeasuredStatus> {
        let shown = self.0.lock().expect("no holder panics");
        shown.get(uid).filter(|shown| shown.revision == revision).map(|shown| shown.measured)
    }

    fn show(&self, uid: &str, shown: Shown) {
        self.0.lock().expect("no holder panics").insert(uid.to_owned(), shown);
    }

    fn retain(&self, there: impl Fn(&str) -> bool) {
        self.0.lock().expect("no holder panics").retain(|uid, _| there(uid));
    }
}

/// What is remembered of one object between looks.
struct Turn {
    next: Instant,
    /// How many looks there were: replicas take turns.
    looks: usize,
    /// By the name of the pod.
    before: HashMap<String, Totals>,
}

/// Asks for ever. `news` takes the objects whose status has something to show.
pub async fn run(
    caches: Arc<Caches>,
    measurements: Arc<Measurements>,
    every: Duration,
    mut news: mpsc::Sender<ObjectRef<LLMDeployment>>,
) {
    let mut turns: HashMap<String, Turn> = HashMap::new();
    loop {
        tokio::time::sleep(TICK.min(every)).await;
        let objects = caches.objects.state();
        let uids: HashSet<String> = objects.iter().filter_map(|object| object.uid()).collect();
        turns.retain(|uid, _| uids.contains(uid));
        measurements.retain(|uid| uids.contains(uid));
        let due = objects.iter().filter_map(|object| due(object, &caches, &mut turns, every));
        let due: Vec<Due> = due.collect();
        let mut answers = stream::iter(due)
            .map(|due| async { (metrics(due.address).await, due) })
            .buffer_unordered(LOOKS_MAX);
        while let Some((answer, due)) = answers.next().await {
            let Some(answer) = answer else { continue };
            let Some(turn) = turns.get_mut(&due.uid) else { continue };
            let now = measured::totals(&answer);
            let before = turn.before.insert(due.pod, now);
            let seen = measured::measure(&now, before.as_ref(), due.held.as_ref());
            let Some(measured) = measured::news(due.held.as_ref(), &seen) else { continue };
            measurements.show(&due.uid, Shown { revision: due.revision, measured });
            // The other end is gone only when the process ends.
            let _ = news.send(due.object).await;
        }
    }
}

/// An engine whose turn it is.
struct Due {
    object: ObjectRef<LLMDeployment>,
    uid: String,
    revision: String,
    pod: String,
    address: SocketAddr,
    held: Option<MeasuredStatus>,
}

fn due(
    object: &Arc<LLMDeployment>,
    caches: &Caches,
    turns: &mut HashMap<String, Turn>,
    every: Duration,
) -> Option<Due> {
    let uid = object.uid()?;
    if turns.get(&uid).is_some_and(|turn| turn.next > Instant::now()) {
        return None;
    }
    let status = object.status.as_ref()?;
    let revision = status.revision.clone()?;
    let (namespace, name) = (object.namespace()?, object.name_any());
    let hash = revision::hash_of(&revision, &name)?;
    let all = caches.pods_with(&namespace, names::NAME, &name);
    let mut ready: Vec<&Arc<Pod>> =
        pods::of_revision(&all, hash).filter(|pod| pods::is_ready(pod)).collect();
    ready.sort_by_key(|pod| pod.name_any());
    if ready.is_empty() {
        return None;
    }
    let first = first_look(&uid, status.measured.is_some(), every);
    let turn = turns.entry(uid.clone()).or_insert_with(|| Turn {
        next: Instant::now() + first,
        looks: 0,
        before: HashMap::new(),
    });
    if turn.next > Instant::now() {
        return None;
    }
    turn.before.retain(|held, _| ready.iter().any(|pod| pod.name_any() == *held));
    let pod = ready[turn.looks % ready.len()];
    turn.looks += 1;
    turn.next = Instant::now() + every;
    let ip: IpAddr = pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()?;
    Some(Due {
        object: ObjectRef::from_obj(object.as_ref()),
        pod: pod.name_any(),
        address: SocketAddr::new(ip, names::PORT_ENGINE),
        held: status.measured,
        uid,
        revision,
    })
}

/// What was never measured is so at once; the rest is spread over the time between two looks, so that an operator that starts
/// does not ask a thousand engines at once.
fn first_look(uid: &str, measured: bool, every: Duration) -> Duration {
    if !measured {
        return Duration::ZERO;
    }
    let mut hasher = DefaultHasher::new();
    uid.hash(&mut hasher);
    let share = f64::from(u32::try_from(hasher.finish() >> 32).unwrap_or(u32::MAX));
    every.mul_f64(share / f64::from(u32::MAX))
}

async fn metrics(address: SocketAddr) -> Option<String> {
    match tokio::time::timeout(ANSWER_TIMEOUT, ask::metrics(address)).await {
        Ok(Ok(text)) => Some(text),
        Ok(Err(error)) => {
            tracing::debug!(%address, %error, "an engine's metrics were not to be had");
            None
        }
        Err(_) => {
            tracing::debug!(%address, "an engine did not tell its metrics in time");
            None
        }
    }
}
