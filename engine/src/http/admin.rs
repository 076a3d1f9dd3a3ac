//! What probes, Prometheus and people ask. None of it needs an API key, none of it waits for the engine.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::http::state::App;

/// An older heartbeat means that the step loop hangs.
const HEARTBEAT_AGE_MAX: Duration = Duration::from_secs(30);

/// The process answers; nothing more is meant.
pub async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// Whether new requests should be sent here.
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    let refuse = |body: Value| (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response();
    if app.draining() {
        return refuse(json!({"status": "draining"}));
    }
    let Some(served) = app.served() else {
        return refuse(json!({"status": "loading", "progress": app.progress()}));
    };
    let age = served.engine.heartbeat_age();
    if age > HEARTBEAT_AGE_MAX {
        let reason = format!("the step loop has not moved for {} s", age.as_secs());
        return refuse(json!({"status": "stuck", "reason": reason}));
    }
    Json(json!({"status": "ready"})).into_response()
}

/// Empty until the model is known.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.served().map(|served| served.metrics.render()).unwrap_or_default();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
