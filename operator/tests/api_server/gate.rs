//! A gate between one operator and the API server. It shuts for good at one write, before it is made or after it, and then
//! nothing passes any more: the operator learns as little of that write as one whose node was lost at that moment.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::response::Response;
use kube::Client;
use serde_json::json;
use tokio::sync::watch;

use crate::world::World;

/// Objects are smaller.
const BODY_BYTES_MAX: usize = 4 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The API server never hears of the write.
    Before,
    /// It stands, and the operator does not know.
    After,
}

pub struct Gate {
    /// With it an operator reaches the API server through the gate.
    pub kubeconfig: PathBuf,
    shut: watch::Receiver<bool>,
}

struct Keeper {
    client: Client,
    /// How many writes have come, those to the Lease not counted.
    writes: AtomicU32,
    shut_at: u32,
    moment: Moment,
    shut: watch::Sender<bool>,
}

impl Gate {
    /// One that shuts at the write of this number, counted from 1.
    pub async fn open(world: &World, shut_at: u32, moment: Moment) -> Gate {
        let (shut, is_shut) = watch::channel(false);
        let client = world.client_of_operators().await;
        let keeper = Keeper { client, writes: AtomicU32::new(0), shut_at, moment, shut };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(pass).with_state(Arc::new(keeper));
        tokio::spawn(async { axum::serve(listener, router).await });
        Gate { kubeconfig: kubeconfig(address), shut: is_shut }
    }

    /// Comes when the gate has shut.
    pub async fn has_shut(&self) {
        self.shut.clone().wait_for(|shut| *shut).await.expect("the gate stands while it is asked");
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        std::fs::remove_file(&self.kubeconfig).ok();
    }
}

fn kubeconfig(address: SocketAddr) -> PathBuf {
    let body = json!({"apiVersion": "v1", "kind": "Config", "current-context": "gate",
        "clusters": [{"name": "gate", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [{"name": "gate", "context": {"cluster": "gate", "user": "nobody"}}]});
    let path = std::env::temp_dir().join(format!("plimsoll-gate-{}", address.port()));
    std::fs::write(&path, body.to_string()).unwrap();
    path
}

async fn pass(State(keeper): State<Arc<Keeper>>, request: Request) -> Response {
    let read = request.method() == Method::GET;
    let counts = !read && !request.uri().path().contains("/leases");
    let is_last = counts && keeper.writes.fetch_add(1, Ordering::SeqCst) + 1 == keeper.shut_at;
    if is_last && keeper.moment == Moment::Before {
        keeper.shut.send_replace(true);
    }
    keeper.stay_while_shut().await;
    let response = keeper.forward(request).await;
    if is_last {
        keeper.shut.send_replace(true);
    }
    keeper.stay_while_shut().await;
    response
}

impl Keeper {
    /// A gate that has shut never opens again: who waits there is gone before it could.
    async fn stay_while_shut(&self) {
        if *self.shut.borrow() {
            std::future::pending().await
        }
    }

    async fn forward(&self, request: Request) -> Response {
        let (parts, body) = request.into_parts();
        let body = to_bytes(body, BODY_BYTES_MAX).await.unwrap();
        let mut passed = axum::http::Request::new(kube::client::Body::from(body));
        *passed.method_mut() = parts.method;
        *passed.uri_mut() = parts.uri;
        *passed.headers_mut() = end_to_end(parts.headers);
        let (parts, body) = self.client.send(passed).await.unwrap().into_parts();
        let mut response = Response::new(Body::new(body));
        *response.status_mut() = parts.status;
        *response.headers_mut() = end_to_end(parts.headers);
        response
    }
}

/// Without what concerns one connection only.
fn end_to_end(mut headers: HeaderMap) -> HeaderMap {
    for name in
        [header::HOST, header::CONNECTION, header::TRANSFER_ENCODING, header::CONTENT_LENGTH]
    {
        headers.remove(name);
    }
    headers
}
