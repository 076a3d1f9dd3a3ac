//! In: watches on objects, their children and pods. Out: when each event first arrived. Never here: what that means.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::subjects::{Kind, Subject};

/// What was seen of one object.
#[derive(Clone, Default)]
pub struct Seen {
    pub object: Option<Instant>,
    /// By kind.
    pub children: BTreeMap<&'static str, Instant>,
    pub pod_ready: Option<Instant>,
    pub ready: Option<Instant>,
}

/// Watches that stamp what they see, until dropped.
pub struct Watching {
    seen: Arc<Mutex<HashMap<String, Seen>>>,
    children: usize,
    tasks: Vec<JoinHandle<()>>,
}

impl Watching {
    /// Opens one watch for the objects, one for each kind of child, and one for pods. Each asks for whole objects, as the
    /// operator does, because the API server then writes every event once for both.
    pub fn start(client: &Client, subject: &Subject) -> Watching {
        let seen = Arc::new(Mutex::new(HashMap::new()));
        let mut tasks = vec![objects(client, subject, seen.clone())];
        for kind in subject.children {
            tasks.push(children(client, subject, *kind, seen.clone()));
        }
        tasks.push(pods(client, subject, seen.clone()));
        Watching { seen, children: subject.children.len(), tasks }
    }

    /// All objects whose names begin so.
    pub fn of(&self, prefix: &str) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap();
        let named =
            |name: &str| name.split('/').nth(1).is_some_and(|name| name.starts_with(prefix));
        seen.iter()
            .filter(|(name, seen)| named(name) && seen.object.is_some())
            .map(|(_, seen)| seen.clone())
            .collect()
    }

    /// How many of them have all their children, a ready pod, and are Ready.
    pub fn counts(&self, prefix: &str) -> (usize, usize, usize) {
        let all = self.of(prefix);
        let count = |holds: &dyn Fn(&Seen) -> bool| all.iter().filter(|seen| holds(seen)).count();
        (
            count(&|seen| seen.children.len() == self.children),
            count(&|seen| seen.pod_ready.is_some()),
            count(&|seen| seen.ready.is_some()),
        )
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

type Stamps = Arc<Mutex<HashMap<String, Seen>>>;

fn stamp(seen: &Stamps, namespace: Option<String>, name: &str, note: impl FnOnce(&mut Seen)) {
    let key = format!("{}/{name}", namespace.unwrap_or_default());
    note(seen.lock().unwrap().entry(key).or_default());
}

fn objects(client: &Client, subject: &Subject, seen: Stamps) -> JoinHandle<()> {
    let resource = subject.object.resource();
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let is_ready = subject.is_ready;
    tokio::spawn(async move {
        let mut events = watcher(api, watcher::Config::default()).applied_objects().boxed();
        while let Some(event) = events.next().await {
            let (Ok(object), now) = (event, Instant::now()) else { continue };
            let ready = is_ready(&object.data["status"]);
            stamp(&seen, object.namespace(), &object.name_any(), |seen| {
                seen.object.get_or_insert(now);
                if ready {
                    seen.ready.get_or_insert(now);
                }
            });
        }
    })
}

fn children(client: &Client, subject: &Subject, kind: Kind, seen: Stamps) -> JoinHandle<()> {
    let resource = kind.resource();
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let label = subject.label;
    tokio::spawn(async move {
        let mut events = watcher(api, watcher::Config::default()).applied_objects().boxed();
        while let Some(event) = events.next().await {
            let (Ok(child), now) = (event, Instant::now()) else { continue };
            // What has no label has the name of its object.
            let name = child.labels().get(label).cloned().unwrap_or_else(|| child.name_any());
            stamp(&seen, child.namespace(), &name, |seen| {
                seen.children.entry(kind.kind).or_insert(now);
            });
        }
    })
}

fn pods(client: &Client, subject: &Subject, seen: Stamps) -> JoinHandle<()> {
    let api: Api<Pod> = Api::all(client.clone());
    let label = subject.label;
    tokio::spawn(async move {
        let config = watcher::Config::default().labels(label);
        let mut events = watcher(api, config).applied_objects().boxed();
        while let Some(event) = events.next().await {
            let (Ok(pod), now) = (event, Instant::now()) else { continue };
            let name = pod.labels()[label].clone();
            if is_ready(&pod) {
                stamp(&seen, pod.namespace(), &name, |seen| {
                    seen.pod_ready.get_or_insert(now);
                });
            }
        }
    })
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|held| held.type_ == "Ready" && held.status == "True")
}

/// Whether a condition of this kind is true in a status.
pub fn condition(status: &Value, kind: &str) -> bool {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().any(|held| held["type"] == kind && held["status"] == "True")
}

impl Kind {
    pub fn resource(&self) -> ApiResource {
        ApiResource {
            group: self.group.to_owned(),
            version: self.version.to_owned(),
            api_version: self.api_version(),
            kind: self.kind.to_owned(),
            plural: self.plural.to_owned(),
        }
    }

    pub fn api_version(&self) -> String {
        match self.group {
            "" => self.version.to_owned(),
            group => format!("{group}/{}", self.version),
        }
    }
}

/// Seconds at four places of what was measured, sorted.
pub struct Spread(Vec<Duration>);

impl Spread {
    pub fn of(times: impl IntoIterator<Item = Duration>) -> Spread {
        let mut times: Vec<Duration> = times.into_iter().collect();
        times.sort();
        Spread(times)
    }

    pub fn at(&self, share: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        let place = (last as f64 * share).round() as usize;
        self.0.get(place).map_or(f64::NAN, Duration::as_secs_f64)
    }

    pub fn max(&self) -> f64 {
        self.at(1.0)
    }

    pub fn json(&self) -> Value {
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        serde_json::json!({"p50": round(self.at(0.5)), "p90": round(self.at(0.9)),
            "p99": round(self.at(0.99)), "max": round(self.max()), "of": self.0.len()})
    }
}
