//! The objects of a simulated API server: versions, uids, generations, a log for watches, server-side apply for our one
//! manager. Never here: HTTP, or what controllers do.

use std::collections::BTreeMap;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};

use super::merge;

/// Names an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Plural, as it stands in paths: `deployments`.
    pub resource: String,
    pub namespace: String,
    pub name: String,
}

impl Key {
    pub fn new(resource: &str, namespace: &str, name: &str) -> Key {
        Key { resource: resource.into(), namespace: namespace.into(), name: name.into() }
    }
}

/// What the API server answers where it does not do as told.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub code: u16,
    pub reason: &'static str,
    pub message: String,
}

impl Refusal {
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { code, reason, message: message.into() }
    }

    pub fn body(&self) -> Value {
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": self.code,
            "reason": self.reason, "message": self.message, "metadata": {}})
    }
}

/// One change, as watches tell it.
#[derive(Debug, Clone)]
pub struct Change {
    pub version: u64,
    pub key: Key,
    pub before: Option<Value>,
    pub after: Option<Value>,
}

#[derive(Clone, Default)]
pub struct Store {
    pub objects: BTreeMap<Key, Value>,
    pub log: Vec<Change>,
    version: u64,
    uids: u64,
    /// What our manager applied last, by object and whether it was to its status.
    applied: BTreeMap<(Key, bool), Value>,
    /// Seconds since the world began.
    pub seconds: i64,
    /// The version at which the cluster's controllers had nothing to do.
    pub calm_at: Option<u64>,
}

/// When the world begins.
const BEGINNING: i64 = 1_767_225_600;

impl Store {
    pub fn version(&self) -> u64 {
        self.version
    }

    pub fn now(&self) -> Timestamp {
        Timestamp::from_second(BEGINNING).expect("a time") + SignedDuration::from_secs(self.seconds)
    }

    pub fn get(&self, key: &Key) -> Result<&Value, Refusal> {
        self.objects.get(key).ok_or_else(|| {
            Refusal::new(404, "NotFound", format!("{} \"{}\" not found", key.resource, key.name))
        })
    }

    /// All of one resource, with their keys.
    pub fn all(&self, resource: &str) -> Vec<(Key, Value)> {
        let of_kind = self.objects.iter().filter(|(key, _)| key.resource == resource);
        of_kind.map(|(key, object)| (key.clone(), object.clone())).collect()
    }

    pub fn create(&mut self, key: &Key, body: Value, dry_run: bool) -> Result<Value, Refusal> {
        if self.objects.contains_key(key) {
            let message = format!("{} \"{}\" already exists", key.resource, key.name);
            return Err(Refusal::new(409, "AlreadyExists", message));
        }
        let mut object = body;
        settle(key, &mut object);
        refuse(key, None, &object)?;
        self.uids += 1;
        let metadata = &mut object["metadata"];
        metadata["name"] = key.name.as_str().into();
        if !key.namespace.is_empty() {
            metadata["namespace"] = key.namespace.as_str().into();
        }
        metadata["uid"] = format!("uid-{}", self.uids).into();
        metadata["generation"] = 1.into();
        metadata["creationTimestamp"] = self.now().to_string().into();
        if !dry_run {
            self.put(key, object);
            return self.get(key).cloned();
        }
        Ok(object)
    }

    /// Server-side apply by our manager. `status`: only the status is applied, and the object must be there.
    pub fn apply(
        &mut self,
        key: &Key,
        body: &Value,
        status: bool,
        dry_run: bool,
    ) -> Result<Value, Refusal> {
        let place = (key.clone(), status);
        let Some(live) = self.objects.get(key).cloned() else {
            if status {
                self.get(key)?;
            }
            // A version named here holds nothing up, as with a real server.
            let mut body = body.clone();
            if let Some(metadata) = body["metadata"].as_object_mut() {
                metadata.shift_remove("resourceVersion");
            }
            let made = self.create(key, body.clone(), dry_run)?;
            if !dry_run {
                self.applied.insert(place, body);
            }
            return Ok(made);
        };
        let version = &body["metadata"]["resourceVersion"];
        if !version.is_null() && *version != live["metadata"]["resourceVersion"] {
            return Err(conflict(key));
        }
        let uid = &body["metadata"]["uid"];
        if !uid.is_null() && *uid != live["metadata"]["uid"] {
            let message = format!("the uid of {} \"{}\" is another", key.resource, key.name);
            return Err(Refusal::new(409, "Conflict", message));
        }
        let before = self.applied.get(&place).cloned().unwrap_or(Value::Null);
        let part = |object: &Value| match status {
            true => json!({"status": object["status"]}),
            false => object.clone(),
        };
        let mut next = live.clone();
        let merged = merge::apply(&part(&live), &part(&before), &part(body));
        if status {
            next["status"] = merged["status"].clone();
        } else {
            next = merged;
        }
        self.update(key, next, dry_run).inspect(|_| {
            if !dry_run {
                self.applied.insert(place, body.clone());
            }
        })
    }

    /// A JSON merge patch, conditional where it names a resource version.
    pub fn patch(&mut self, key: &Key, patch: &Value, status: bool) -> Result<Value, Refusal> {
        let live = self.get(key)?.clone();
        let condition = &patch["metadata"]["resourceVersion"];
        if !condition.is_null() && *condition != live["metadata"]["resourceVersion"] {
            return Err(conflict(key));
        }
        let mut next = live;
        match status {
            true => merge::patch(&mut next["status"], &patch["status"]),
            false => merge::patch(&mut next, patch),
        }
        self.update(key, next, false)
    }

    fn update(&mut self, key: &Key, mut next: Value, dry_run: bool) -> Result<Value, Refusal> {
        settle(key, &mut next);
        refuse(key, self.objects.get(key), &next)?;
        if dry_run {
            return Ok(next);
        }
        self.put(key, next);
        match self.objects.get(key) {
            Some(object) => Ok(object.clone()),
            // The last finalizer went.
            None => Ok(json!({})),
        }
    }

    /// Deletes as one call of the API does: pods and what has finalizers only begin to leave.
    pub fn delete(&mut self, key: &Key, options: &Value) -> Result<Value, Refusal> {
        let mut live = self.get(key)?.clone();
        for condition in ["uid", "resourceVersion"] {
            let wanted = &options["preconditions"][condition];
            if !wanted.is_null() && *wanted != live["metadata"][condition] {
                return Err(conflict(key));
            }
        }
        let finalized =
            live["metadata"]["finalizers"].as_array().is_some_and(|held| !held.is_empty());
        let graceful = key.resource == "pods" && options["gracePeriodSeconds"] != 0;
        if finalized || graceful {
            if live["metadata"]["deletionTimestamp"].is_null() {
                live["metadata"]["deletionTimestamp"] = self.now().to_string().into();
                self.put(key, live.clone());
            }
            return Ok(live);
        }
        self.remove(key);
        Ok(live)
    }

    /// Stores `object` where it differs from what is there.
    pub fn put(&mut self, key: &Key, mut object: Value) {
        let before = self.objects.get(key).cloned();
        if let Some(before) = &before {
            object["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"].clone();
            if *before == object {
                return;
            }
            if before["spec"] != object["spec"] {
                let generation = before["metadata"]["generation"].as_i64().unwrap_or(0);
                object["metadata"]["generation"] = (generation + 1).into();
            }
            let leaving = !object["metadata"]["deletionTimestamp"].is_null();
            let held =
                object["metadata"]["finalizers"].as_array().is_some_and(|held| !held.is_empty());
            if leaving && !held && key.resource != "pods" {
                self.remove(key);
                return;
            }
        }
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.objects.insert(key.clone(), object.clone());
        self.log.push(Change {
            version: self.version,
            key: key.clone(),
            before,
            after: Some(object),
        });
    }

    pub fn remove(&mut self, key: &Key) {
        let Some(mut before) = self.objects.remove(key) else { return };
        self.version += 1;
        before["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.applied.retain(|(held, _), _| held != key);
        let change =
            Change { version: self.version, key: key.clone(), before: Some(before), after: None };
        self.log.push(change);
    }
}

pub fn conflict(key: &Key) -> Refusal {
    let message = format!("{} \"{}\" was changed by another", key.resource, key.name);
    Refusal::new(409, "Conflict", message)
}

/// Defaults and canonical forms.
fn settle(key: &Key, object: &mut Value) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.shift_remove("managedFields");
    }
    match key.resource.as_str() {
        "pods" => merge::settle_pod(&mut object["spec"]),
        "deployments" | "jobs" => merge::settle_pod(&mut object["spec"]["template"]["spec"]),
        "services" if object["spec"]["clusterIP"].is_null() => {
            object["spec"]["clusterIP"] = "10.0.0.1".into();
        }
        "llmdeployments" if object["spec"]["replicas"].is_null() => {
            object["spec"]["replicas"] = 1.into();
        }
        _ => {}
    }
    if key.resource == "deployments" && object["spec"]["progressDeadlineSeconds"].is_null() {
        object["spec"]["progressDeadlineSeconds"] = 600.into();
    }
    if object["metadata"].is_null() {
        object["metadata"] = Value::Object(Map::new());
    }
}

/// The few rules of validation that matter here.
fn refuse(key: &Key, before: Option<&Value>, next: &Value) -> Result<(), Refusal> {
    let immutable = match key.resource.as_str() {
        "deployments" => "/spec/selector",
        "controllerrevisions" => "/data",
        _ => "",
    };
    let changed = |before: &Value| before.pointer(immutable) != next.pointer(immutable);
    if !immutable.is_empty() && before.is_some_and(changed) {
        let message = format!(
            "{} \"{}\" is invalid: {immutable}: field is immutable",
            key.resource, key.name
        );
        return Err(Refusal::new(422, "Invalid", message));
    }
    let ports = next.pointer("/spec/ports").and_then(Value::as_array);
    let names: Vec<&Value> = ports.into_iter().flatten().map(|port| &port["name"]).collect();
    if names.iter().enumerate().any(|(index, name)| names[..index].contains(name)) {
        return Err(Refusal::new(422, "Invalid", "spec.ports[1].name: Duplicate value"));
    }
    let containers = next.pointer("/spec/template/spec/containers").and_then(Value::as_array);
    for container in containers.into_iter().flatten() {
        let policy = container["imagePullPolicy"].as_str().unwrap_or_default();
        if !["Always", "IfNotPresent", "Never"].contains(&policy) {
            let message = format!(
                "spec.template.spec.containers[0].imagePullPolicy: Unsupported value: \"{policy}\""
            );
            return Err(Refusal::new(422, "Invalid", message));
        }
    }
    Ok(())
}
