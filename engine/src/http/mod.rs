//! Everything between a socket and the step loop. Enters: HTTP. Leaves: requests to the engine, and answers in OpenAI's
//! shapes. Nothing here computes a token.

pub mod admin;
pub mod answers;
pub mod auth;
pub mod body;
pub mod chat;
pub mod completions;
pub mod connections;
pub mod errors;
pub mod fields;
pub mod generation;
pub mod openai;
pub mod params;
pub mod reported;
pub mod sse;
pub mod state;
pub mod tokens;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};

pub use crate::http::body::BODY_BYTES_MAX;
use crate::http::body::Body;
use crate::http::completions::Echo;
use crate::http::errors::ApiError;
use crate::http::generation::Generation;
use crate::http::params::StreamOptions;
pub use crate::http::state::{App, Chance, Served};
use crate::request::Request as EngineRequest;

/// Time for a body to become tokens, waiting for a core included.
const PREPARING_SECONDS_MAX: u64 = 60;
/// What a client is told to wait while the model loads.
const LOADING_RETRY_SECONDS: u64 = 2;

/// What every object of one answer repeats.
#[derive(Clone, Debug)]
pub struct Identity {
    pub id: String,
    pub created: u64,
    pub model: String,
}

/// A body made ready for the engine.
pub struct Prepared {
    /// One per prompt.
    pub requests: Vec<EngineRequest>,
    pub stop_strings: Arc<[String]>,
    pub with_logprobs: bool,
    /// Log-probabilities that the answer may carry.
    pub reported: u64,
    pub prompt_only: bool,
    pub stream: Option<StreamOptions>,
    pub user: Option<String>,
    /// One per prompt, or none.
    pub echo: Vec<Echo>,
}

pub fn router(app: Arc<App>) -> Router {
    let api = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route_layer(middleware::from_fn_with_state(app.clone(), auth::require_key))
        // Probes and metrics are answered whatever waits for its reader.
        .route_layer(middleware::from_fn_with_state(app.clone(), answers::count));
    Router::new()
        .merge(api)
        .route("/health", get(admin::health))
        .route("/ready", get(admin::ready))
        .route("/metrics", get(admin::metrics))
        .route("/version", get(admin::version))
        .fallback(async |request: Request| {
            ApiError::not_found(request.method().as_str(), request.uri().path())
        })
        .method_not_allowed_fallback(async |request: Request| {
            ApiError::method_not_allowed(request.method().as_str(), request.uri().path())
        })
        .layer(middleware::from_fn_with_state(app.clone(), close_while_draining))
        .with_state(app)
}

/// Pooled clients move elsewhere once their next answer tells them to.
async fn close_while_draining(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    let mut response = next.run(request).await;
    if app.draining() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

async fn models(State(app): State<Arc<App>>) -> Json<openai::ModelList> {
    Json(openai::ModelList { object: "list", data: vec![app.model()] })
}

async fn model(
    State(app): State<Arc<App>>,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Result<Json<openai::Model>, ApiError> {
    if name != app.name {
        return Err(ApiError::model_not_found(&name, &app.name));
    }
    Ok(Json(app.model()))
}

async fn chat_completions(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (served, prepared) = ready_to_run(&app, request, chat::prepare).await?;
    let identity = app.identity("chatcmpl");
    let Prepared { stream, with_logprobs, reported, .. } = prepared;
    let tokenizer = served.tokenizer.clone();
    let Some(options) = stream else {
        let share = app.reports.take(reported)?;
        app.answers.has_room(&prepared.requests)?;
        let generation = start(&served, prepared, &identity)?;
        let answer = chat::collect(generation, identity, &tokenizer, with_logprobs).await?;
        let json = serde_json::to_vec(&answer).expect("our own types serialize");
        return Ok(answers::json(json, share, counted(reported, 0)));
    };
    let generation = start(&served, prepared, &identity)?;
    let chunks = chat::ChatChunks { identity, tokenizer, with_logprobs, options };
    Ok(sse::respond(generation, chunks))
}

async fn text_completions(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (served, mut prepared) = ready_to_run(&app, request, completions::prepare).await?;
    let identity = app.identity("cmpl");
    let echo = std::mem::take(&mut prepared.echo);
    let Prepared { stream, with_logprobs, reported, .. } = prepared;
    let tokenizer = served.tokenizer.clone();
    let Some(options) = stream else {
        let echoed = completions::echoed_bytes(&echo, &prepared.requests);
        let share = (app.reports.take(reported)?, app.answers.take(echoed)?);
        app.answers.has_room(&prepared.requests)?;
        let generation = start(&served, prepared, &identity)?;
        let answer =
            completions::collect(generation, identity, tokenizer, with_logprobs, &echo).await?;
        return Ok(answers::json(answer, share, counted(reported, echoed)));
    };
    let generation = start(&served, prepared, &identity)?;
    let choices = generation.choices();
    let chunks = completions::CompletionChunks::new(
        identity,
        tokenizer,
        with_logprobs,
        &echo,
        choices,
        options,
    );
    Ok(sse::respond(generation, chunks))
}

/// Bytes of an answer that were counted before it was made: what it echoes, and all of one with log-probabilities, which
/// have a budget of their own.
fn counted(reported: u64, echoed: u64) -> u64 {
    if reported > 0 { u64::MAX } else { echoed }
}

/// How a body of one kind is made ready.
type Prepare = fn(&[u8], &Served, &Chance) -> Result<Prepared, ApiError>;

/// Everything before the engine. A full queue refuses before the body is read or a prompt tokenized.
async fn ready_to_run(
    app: &Arc<App>,
    request: Request,
    prepare: Prepare,
) -> Result<(Arc<Served>, Prepared), ApiError> {
    let served = served(app)?;
    served.engine.has_room()?;
    let body = body::read(app, request).await?;
    let chance = Chance::now();
    let prepare = move |body: &[u8], served: &Served| prepare(body, served, &chance);
    let prepared = on_blocking_thread(app, &served, body, prepare).await?;
    Ok((served, prepared))
}

/// The model, or why there is none yet.
pub fn served(app: &App) -> Result<Arc<Served>, ApiError> {
    app.served().ok_or_else(|| {
        ApiError::unavailable(
            format!("`{}` is still loading: {}", app.name, app.progress()),
            LOADING_RETRY_SECONDS,
        )
        .code("loading")
    })
}

/// Parsing, templates and tokenizing take a core and some times the body's size for a while: off the runtime, and of few
/// at once.
pub async fn on_blocking_thread<T: Send + 'static>(
    app: &App,
    served: &Arc<Served>,
    body: Body,
    work: impl FnOnce(&[u8], &Served) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let served = served.clone();
    let prepared = async {
        let permit = app.preparing(body.len()).await;
        // Once begun it runs to its end, and keeps its permit until then.
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(&body, &served)
        })
        .await
    };
    match tokio::time::timeout(Duration::from_secs(PREPARING_SECONDS_MAX), prepared).await {
        Err(_) => Err(ApiError::unavailable(
            format!(
                "the prompt was not ready within {PREPARING_SECONDS_MAX} s; shorten it or retry"
            ),
            1,
        )),
        Ok(Err(_)) => Err(ApiError::internal("preparing the prompt failed; this is a defect")),
        Ok(Ok(result)) => result,
    }
}

/// Hands all prompts to the engine. If one is refused, those already taken are cancelled.
fn start(served: &Served, prepared: Prepared, identity: &Identity) -> Result<Generation, ApiError> {
    let Prepared { requests, stop_strings, prompt_only, user, .. } = prepared;
    let mut started = Vec::with_capacity(requests.len());
    for request in requests {
        let stream = served.engine.submit(request.clone())?;
        started.push((request, stream));
    }
    tracing::debug!(id = identity.id, user, prompts = started.len(), "request taken");
    Ok(Generation::new(started, &stop_strings, served.tokenizer.clone(), prompt_only))
}

/// An error without a handler around it, as bytes on the wire.
pub fn error_response(error: ApiError) -> Response {
    error.into_response()
}
