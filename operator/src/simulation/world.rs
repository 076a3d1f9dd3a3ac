//! A small cluster: its objects, what the operator wrote, when it is to end, what goes wrong. It outlives operators.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::http::Method;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::controllers;
use super::faults::{Chance, Fault};
use super::store::{Key, Store};

pub const NAMESPACE: &str = "team";

/// One write that reached the API server.
#[derive(Clone, Debug)]
pub struct Write {
    pub key: Key,
    pub method: Method,
    pub done: bool,
    /// What an event says, empty for other objects.
    pub note: String,
}

/// When an operator ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before its write reaches the API server.
    Before,
    /// After it was done, and before the answer.
    After,
}

pub struct World {
    store: Mutex<Store>,
    /// The version of the newest change.
    changes: watch::Sender<u64>,
    writes: Mutex<Vec<Write>>,
    ends_at: Mutex<Option<(usize, Moment)>>,
    ended: watch::Sender<bool>,
    chance: Mutex<Option<Chance>>,
    /// The resource whose watch does not tell of its next change.
    missed: Mutex<Option<String>>,
    /// The resource of which the API server takes no write.
    refused: Mutex<Option<String>>,
    /// The resource whose next write takes this long, once.
    slow: Mutex<Option<(String, Duration)>>,
    /// Seconds that the operator's clock is ahead.
    pub skew: Mutex<i64>,
}

/// The store, locked; watches hear of what changed when it is let go.
pub struct Held<'a> {
    store: MutexGuard<'a, Store>,
    changes: &'a watch::Sender<u64>,
}

impl Deref for Held<'_> {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.store
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Store {
        &mut self.store
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let version = self.store.version();
        self.changes.send_if_modified(|held| std::mem::replace(held, version) != version);
    }
}

impl World {
    /// With one node of 8 CPUs and 16 GiB.
    pub fn new() -> Arc<World> {
        let world = World {
            store: Mutex::default(),
            changes: watch::Sender::new(0),
            writes: Mutex::default(),
            ends_at: Mutex::default(),
            ended: watch::Sender::new(false),
            chance: Mutex::default(),
            missed: Mutex::default(),
            refused: Mutex::default(),
            slow: Mutex::default(),
            skew: Mutex::default(),
        };
        let room = json!({"cpu": "8", "memory": "16Gi", "pods": "110"});
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-0"},
            "status": {"capacity": room, "allocatable": room}});
        let key = Key::new("nodes", "", "node-0");
        world.store().create(&key, node, false).expect("the first object");
        Arc::new(world)
    }

    pub fn store(&self) -> Held<'_> {
        Held { store: self.store.lock().expect("no holder panics"), changes: &self.changes }
    }

    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub fn tick(&self) {
        controllers::tick(&mut self.store());
    }

    /// The operator's clock.
    pub fn clock(&self) -> Timestamp {
        self.store().now() + SignedDuration::from_secs(*self.skew.lock().expect("no holder panics"))
    }

    /// From now on everything goes wrong that may, by this seed; or nothing any more.
    pub fn set_faults(&self, seed: Option<u64>) {
        *self.chance.lock().expect("no holder panics") = seed.map(Chance);
    }

    pub fn fault(&self, writes: bool) -> Fault {
        let mut chance = self.chance.lock().expect("no holder panics");
        chance.as_mut().map_or(Fault::None, |chance| Fault::of_request(chance, writes))
    }

    /// From now on every write of `resource` fails, or none any more.
    pub fn refuse(&self, resource: Option<&str>) {
        *self.refused.lock().expect("no holder panics") = resource.map(str::to_owned);
    }

    pub fn refuses(&self, resource: &str) -> bool {
        self.refused.lock().expect("no holder panics").as_deref() == Some(resource)
    }

    /// The next write of `resource`, and that one alone, reaches the API server after `delay`.
    pub fn delay(&self, resource: &str, delay: Duration) {
        *self.slow.lock().expect("no holder panics") = Some((resource.to_owned(), delay));
    }

    /// How long this write of `resource` takes; the next takes no time.
    pub fn take_delay(&self, resource: &str) -> Duration {
        let mut slow = self.slow.lock().expect("no holder panics");
        slow.take_if(|(slow, _)| slow == resource).map_or(Duration::ZERO, |(_, delay)| delay)
    }

    /// The watch of `resource` forgets where it was when the next change comes.
    pub fn miss(&self, resource: &str) {
        *self.missed.lock().expect("no holder panics") = Some(resource.to_owned());
    }

    pub fn watch_fault(&self, resource: &str) -> Fault {
        let mut missed = self.missed.lock().expect("no holder panics");
        if missed.take_if(|missed| missed == resource).is_some() {
            return Fault::Gone;
        }
        let mut chance = self.chance.lock().expect("no holder panics");
        chance.as_mut().map_or(Fault::None, Fault::of_watch)
    }

    /// The operator ends at the write of this number, the first being 1.
    pub fn end_at(&self, write: usize, moment: Moment) {
        *self.ends_at.lock().expect("no holder panics") = Some((write, moment));
    }

    /// Takes back what `end_at` asked for.
    pub fn end_never(&self) {
        *self.ends_at.lock().expect("no holder panics") = None;
    }

    pub fn may_write(&self) -> bool {
        !self.end_if((self.written() + 1, Moment::Before))
    }

    pub fn ends_here(&self) -> bool {
        self.end_if((self.written(), Moment::After))
    }

    fn end_if(&self, here: (usize, Moment)) -> bool {
        let mut ends_at = self.ends_at.lock().expect("no holder panics");
        let ends = *ends_at == Some(here);
        if ends {
            *ends_at = None;
            self.ended.send_replace(true);
        }
        ends
    }

    /// Returns once the operator has to end.
    pub async fn ended(&self) {
        let mut ended = self.ended.subscribe();
        ended.wait_for(|ended| *ended).await.expect("the world holds the sender");
        self.ended.send_replace(false);
    }

    pub fn wrote(&self, key: &Key, method: &Method, body: &Value, done: bool) {
        let note = body["note"].as_str().unwrap_or_default().to_owned();
        let spec_written = key.resource == "llmdeployments" && body.get("spec").is_some();
        assert!(!spec_written, "the operator writes no spec: {body}");
        let write = Write { key: key.clone(), method: method.clone(), done, note };
        self.writes.lock().expect("no holder panics").push(write);
    }

    pub fn writes(&self) -> Vec<Write> {
        self.writes.lock().expect("no holder panics").clone()
    }

    /// How many writes reached the API server.
    pub fn written(&self) -> usize {
        self.writes.lock().expect("no holder panics").len()
    }

    /// What events said, in the order in which they came.
    pub fn told(&self) -> Vec<String> {
        let writes = self.writes();
        writes
            .into_iter()
            .filter(|write| write.key.resource == "events")
            .map(|write| write.note)
            .collect()
    }

    /// A person applies an LLMDeployment whose model lies in the claim `models`.
    pub fn declare(&self, name: &str, spec: Value) {
        let mut whole = json!({"model": {"source": "pvc://models/tiny"}});
        for (field, value) in spec.as_object().expect("fields of a spec") {
            whole[field] = value.clone();
        }
        let body = json!({"apiVersion": "plimsoll.dev/v1alpha1", "kind": "LLMDeployment", "spec": whole,
            "metadata": {"name": name}});
        self.create("llmdeployments", name, body);
    }

    pub fn create(&self, resource: &str, name: &str, body: Value) {
        self.store()
            .create(&Key::new(resource, NAMESPACE, name), body, false)
            .expect("the name is free");
    }

    /// A person's merge patch. What is not there is not patched.
    pub fn merge(&self, resource: &str, name: &str, patch: Value) {
        self.store().patch(&Key::new(resource, NAMESPACE, name), &patch, false).ok();
    }

    /// A person's `kubectl delete`; what is not there stays so.
    pub fn delete(&self, resource: &str, name: &str) {
        self.store().delete(&Key::new(resource, NAMESPACE, name), &Value::Null).ok();
    }

    pub fn get(&self, resource: &str, name: &str) -> Option<Value> {
        self.store().get(&Key::new(resource, NAMESPACE, name)).ok().cloned()
    }

    /// Status, reason and message of a condition.
    pub fn condition(&self, name: &str, kind: &str) -> Option<(String, String, String)> {
        let object = self.get("llmdeployments", name)?;
        let conditions = object["status"]["conditions"].as_array()?.clone();
        let held = conditions.into_iter().find(|held| held["type"] == kind)?;
        let text = |field: &str| held[field].as_str().unwrap_or_default().to_owned();
        Some((text("status"), text("reason"), text("message")))
    }

    /// Pods that answer and are not leaving, by revision.
    pub fn serving(&self, name: &str) -> Vec<String> {
        let pods = self.store().all("pods");
        let of = |pod: &Value| {
            let labels = &pod["metadata"]["labels"];
            let serves = labels["plimsoll.dev/name"] == name
                && controllers::is_ready(pod)
                && pod["metadata"]["deletionTimestamp"].is_null();
            serves.then(|| labels["plimsoll.dev/revision"].as_str().unwrap_or_default().to_owned())
        };
        pods.iter().filter_map(|(_, pod)| of(pod)).collect()
    }

    /// Every object as it is, but for its version.
    pub fn everything(&self) -> Value {
        let store = self.store();
        let named = |(key, object): (&Key, &Value)| {
            let mut object = object.clone();
            object["metadata"]["resourceVersion"].take();
            (format!("{}/{}/{}", key.resource, key.namespace, key.name), object)
        };
        store.objects.iter().map(named).collect()
    }

    /// Everything that stands, without what differs from run to run: versions, uids, times, names of pods.
    pub fn standing(&self) -> Value {
        let store = self.store();
        let mut all = serde_json::Map::new();
        for (key, object) in &store.objects {
            match key.resource.as_str() {
                "events" | "nodes" => {}
                "pods" => {
                    let labels = &object["metadata"]["labels"];
                    let said =
                        json!([labels, controllers::is_ready(object), object["status"]["phase"]]);
                    let pods = all.entry(said.to_string()).or_insert(0.into());
                    *pods = (pods.as_i64().unwrap_or(0) + 1).into();
                }
                _ => {
                    let mut object = object.clone();
                    scrub(&mut object);
                    if key.resource != "llmdeployments" {
                        object.as_object_mut().expect("an object").shift_remove("status");
                    }
                    all.insert(format!("{}/{}", key.resource, key.name), object);
                }
            }
        }
        all.into()
    }
}

/// Takes out what differs from run to run.
fn scrub(value: &mut Value) {
    const PASSING: &[&str] = &[
        "resourceVersion",
        "uid",
        "generation",
        "observedGeneration",
        "creationTimestamp",
        "lastTransitionTime",
        "outageSeconds",
        "plimsoll.dev/applied",
        "plimsoll.dev/made-for",
    ];
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !PASSING.contains(&name.as_str()));
            fields.values_mut().for_each(scrub);
        }
        Value::Array(items) => items.iter_mut().for_each(scrub),
        _ => {}
    }
}
