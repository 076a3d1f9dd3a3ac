//! The simulated API server as a service for kube's client: paths and bodies to the store and back, watches as streams,
//! and everything a network and a busy server do to both.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::Response;
use futures::stream;
use kube::Client;
use serde_json::{Value, json};

use super::faults::Fault;
use super::store::{Change, Key, Refusal};
use super::world::World;

/// A client of the world's API server. Needs a runtime.
pub fn client(world: &Arc<World>) -> Client {
    Client::new(Router::new().fallback(answer).with_state(world.clone()), "team")
}

/// One request, read.
struct Asked {
    method: Method,
    key: Key,
    /// Of the whole resource: `namespace` or `name` may be empty.
    collection: bool,
    status: bool,
    query: Vec<(String, String)>,
    content_type: String,
    body: Value,
}

impl Asked {
    async fn read(request: Request) -> Asked {
        let (parts, body) = request.into_parts();
        let body = to_bytes(body, usize::MAX).await.expect("bodies are in memory");
        let path: Vec<&str> = parts.uri.path().split('/').filter(|part| !part.is_empty()).collect();
        let mut rest = if path[0] == "api" { &path[2..] } else { &path[3..] };
        let mut namespace = "";
        if rest[0] == "namespaces" && rest.len() > 2 {
            (namespace, rest) = (rest[1], &rest[2..]);
        }
        let content_type = parts.headers.get(header::CONTENT_TYPE);
        let content_type = content_type.and_then(|held| held.to_str().ok()).unwrap_or_default();
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let named = body["metadata"]["name"].as_str().unwrap_or_default();
        Asked {
            key: Key::new(rest[0], namespace, rest.get(1).unwrap_or(&named)),
            collection: rest.len() == 1,
            status: rest.get(2) == Some(&"status"),
            query: query(parts.uri.query().unwrap_or_default()),
            content_type: content_type.to_owned(),
            method: parts.method,
            body,
        }
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(held, _)| held == name).map(|(_, value)| value.as_str())
    }

    fn dry_run(&self) -> bool {
        self.parameter("dryRun").is_some()
    }

    fn writes(&self) -> bool {
        self.method != Method::GET && !self.dry_run()
    }
}

async fn answer(State(world): State<Arc<World>>, request: Request) -> Response {
    let asked = Asked::read(request).await;
    let fault = world.fault(asked.writes());
    tokio::time::sleep(fault.delay()).await;
    if let Some(refusal) = fault.before() {
        return respond(Err(refusal));
    }
    if asked.writes() {
        tokio::time::sleep(world.take_delay(&asked.key.resource)).await;
    }
    if asked.writes() && world.refuses(&asked.key.resource) {
        return respond(Err(Refusal::new(500, "InternalError", "a webhook is down")));
    }
    if asked.parameter("watch").is_some() {
        return watch(world, &asked);
    }
    if asked.writes() && !world.may_write() {
        // The operator ends here; nobody hears the answer.
        std::future::pending::<()>().await;
    }
    let done = act(&world, &asked);
    if asked.writes() {
        world.wrote(&asked.key, &asked.method, &asked.body, done.is_ok());
        if world.ends_here() {
            std::future::pending::<()>().await;
        }
    }
    match fault.after() {
        Some(refusal) => respond(Err(refusal)),
        None => respond(done),
    }
}

fn act(world: &World, asked: &Asked) -> Result<Value, Refusal> {
    let mut store = world.store();
    let Asked { key, body, status, .. } = asked;
    match asked.method {
        Method::GET if asked.collection => {
            let selected = Selected::by(asked);
            let held = store.all(&key.resource).into_iter();
            let items: Vec<Value> = held
                .filter(|(key, object)| selected.has(key, object))
                .map(|(_, object)| object)
                .collect();
            Ok(json!({"kind": "List", "apiVersion": "v1", "items": items,
                "metadata": {"resourceVersion": store.version().to_string()}}))
        }
        Method::GET => store.get(key).cloned(),
        Method::POST => store.create(key, body.clone(), asked.dry_run()),
        Method::DELETE => store.delete(key, body),
        Method::PATCH if asked.content_type.contains("apply-patch") => {
            store.apply(key, body, *status, asked.dry_run())
        }
        Method::PATCH => store.patch(key, body, *status),
        _ => Err(Refusal::new(405, "MethodNotAllowed", "the simulation has no such call")),
    }
}

fn respond(done: Result<Value, Refusal>) -> Response {
    let (code, body) = match done {
        Ok(body) => (200, body),
        Err(refusal) => (refusal.code, refusal.body()),
    };
    Response::builder()
        .status(StatusCode::from_u16(code).expect("a code"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_string()))
        .expect("a whole answer")
}

/// Which objects a list or a watch is about.
struct Selected {
    resource: String,
    namespace: String,
    label: Option<(String, String)>,
    /// Those that do not carry the label with this value, in the place of those that do.
    others: bool,
    /// Pods that are bound to a node and not over.
    bound: bool,
}

impl Selected {
    fn by(asked: &Asked) -> Selected {
        let selector = asked.parameter("labelSelector").unwrap_or_default();
        let others = selector.contains("!=");
        let label = selector.split_once(if others { "!=" } else { "=" });
        Selected {
            resource: asked.key.resource.clone(),
            namespace: asked.key.namespace.clone(),
            label: label.map(|(name, value)| (name.to_owned(), value.to_owned())),
            others,
            bound: asked.parameter("fieldSelector").is_some(),
        }
    }

    fn has(&self, key: &Key, object: &Value) -> bool {
        let over = matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        key.resource == self.resource
            && (self.namespace.is_empty() || self.namespace == key.namespace)
            && self.label.as_ref().is_none_or(|(name, value)| {
                (object["metadata"]["labels"][name] == value.as_str()) != self.others
            })
            && (!self.bound || (!object["spec"]["nodeName"].is_null() && !over))
    }

    /// The change as a watch of these objects tells it.
    fn told(&self, change: &Change) -> Option<Value> {
        let had = change.before.as_ref().is_some_and(|object| self.has(&change.key, object));
        let has = change.after.as_ref().is_some_and(|object| self.has(&change.key, object));
        let kind = match (had, has) {
            (false, false) => return None,
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
        };
        let mut object =
            change.after.clone().or(change.before.clone()).expect("one of them is there");
        object["metadata"]["resourceVersion"] = change.version.to_string().into();
        Some(json!({"type": kind, "object": object}))
    }
}

fn watch(world: Arc<World>, asked: &Asked) -> Response {
    let selected = Selected::by(asked);
    let from: u64 =
        asked.parameter("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
    let changes = world.changes();
    let lines = stream::unfold(
        (world, selected, from, changes),
        |(world, selected, mut from, mut changes)| async move {
            loop {
                changes.borrow_and_update();
                let next = {
                    let store = world.store();
                    let start = store.log.partition_point(|change| change.version <= from);
                    let told = |change: &Change| Some((change.version, selected.told(change)?));
                    store.log[start..].iter().find_map(told)
                };
                if let Some((version, told)) = next {
                    from = version;
                    match world.watch_fault(&selected.resource) {
                        Fault::Drop => return None,
                        Fault::Gone => {
                            let gone =
                                Refusal::new(410, "Expired", "too old resource version").body();
                            let line = line(&json!({"type": "ERROR", "object": gone}));
                            return Some((line, (world, selected, u64::MAX, changes)));
                        }
                        fault => tokio::time::sleep(fault.delay()).await,
                    }
                    return Some((line(&told), (world, selected, from, changes)));
                }
                if changes.changed().await.is_err() {
                    return None;
                }
            }
        },
    );
    Response::builder()
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from_stream(lines))
        .expect("a whole answer")
}

fn line(event: &Value) -> Result<Bytes, std::io::Error> {
    Ok(Bytes::from(format!("{event}\n")))
}

/// Nothing that the operator asks is encoded but `=`, `/`, `,` and `!`.
fn query(text: &str) -> Vec<(String, String)> {
    let plain = |text: &str| {
        let text = text.replace('+', " ");
        [("%2F", "/"), ("%3D", "="), ("%2C", ","), ("%21", "!")]
            .into_iter()
            .fold(text, |text, (code, sign)| text.replace(code, sign))
    };
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (plain(name), plain(value))).collect()
}

/// Bounds the waiting of every fault.
pub const DELAY_MAX: Duration = Duration::from_secs(10);
