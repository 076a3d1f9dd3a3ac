//! What probes, Prometheus and people ask. None of it needs an API key, none of it waits for the engine.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::http::state::App;
use crate::step::Pulse;

/// Whether the process is worth keeping: it answers, and its step loop does not hang. Kubernetes restarts it otherwise.
pub async fn health(State(app): State<Arc<App>>) -> Response {
    let pulse = app.served().map(|served| served.engine.pulse());
    match pulse.filter(|pulse| pulse.is_hung(app.pulse_limits)) {
        Some(pulse) => refuse(json!({"status": "hung", "reason": standstill(pulse)})),
        None => Json(json!({"status": "ok"})).into_response(),
    }
}

/// Whether new requests should be sent here.
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    if app.draining() {
        return refuse(json!({"status": "draining"}));
    }
    let Some(served) = app.served() else {
        return refuse(json!({"status": "loading", "progress": app.progress()}));
    };
    let pulse = served.engine.pulse();
    if pulse.is_late(app.pulse_limits) {
        return refuse(json!({"status": "stuck", "reason": standstill(pulse)}));
    }
    Json(json!({"status": "ready"})).into_response()
}

fn refuse(body: Value) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

fn standstill(pulse: Pulse) -> String {
    format!("the step loop has not moved for {} s", pulse.age.as_secs())
}

/// Empty until the model is known.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.served().map(|served| served.metrics.render()).unwrap_or_default();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
