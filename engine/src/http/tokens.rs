//! POST /tokenize and /detokenize, in the shapes of vLLM.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use serde_json::{Value, json};

use crate::http::chat;
use crate::http::errors::ApiError;
use crate::http::fields::{self, Fields};
use crate::http::openai::token_text;
use crate::http::params::token_ids;
use crate::http::state::{App, Chance, Served};
use crate::http::{body, on_blocking_thread, served};

pub async fn tokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let served = served(&app)?;
    let body = body::read(&app, request).await?;
    let now = Chance::now().now_unix_seconds;
    on_blocking_thread(&app, &served, move |served| tokens_of(&body, served, now)).await.map(Json)
}

pub async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let served = served(&app)?;
    let body = body::read(&app, request).await?;
    on_blocking_thread(&app, &served, move |served| text_of(&body, served)).await.map(Json)
}

/// A prompt or messages → token ids, as a completion would see them.
pub fn tokens_of(body: &[u8], served: &Served, now_unix_seconds: i64) -> Result<Value, ApiError> {
    let mut body = Fields::from_body(body)?;
    optional_model(&mut body, served)?;
    let with_strings = body.boolean("return_token_strs")?.unwrap_or(false);
    let special = body.boolean("add_special_tokens")?;
    let (text, special, param) = match body.string("prompt")? {
        Some(prompt) => (prompt, special.unwrap_or(true), "prompt"),
        None => {
            let messages = chat::messages(&mut body)?;
            let text = chat::render(chat::template(served)?, &messages, now_unix_seconds)?;
            // The template writes the special tokens itself.
            (text, special.unwrap_or(false), "messages")
        }
    };
    body.finish()?;
    let tokens = served.tokens(&text, special, param)?;
    let strings: Option<Vec<String>> =
        with_strings.then(|| tokens.iter().map(|&id| token_text(&served.tokenizer, id)).collect());
    Ok(json!({
        "count": tokens.len(),
        "max_model_len": served.limits.context_tokens,
        "tokens": tokens,
        "token_strs": strings,
    }))
}

/// Token ids → text, special tokens included.
pub fn text_of(body: &[u8], served: &Served) -> Result<Value, ApiError> {
    let mut body = Fields::from_body(body)?;
    optional_model(&mut body, served)?;
    let items = body.array("tokens")?.ok_or_else(|| fields::missing("tokens"))?;
    body.finish()?;
    let tokens = token_ids(&items, "tokens", served.limits.vocabulary)?;
    Ok(json!({"prompt": served.tokenizer.text(&tokens, true)}))
}

fn optional_model(body: &mut Fields, served: &Served) -> Result<(), ApiError> {
    match body.string("model")? {
        Some(model) => served.check_model(&model),
        None => Ok(()),
    }
}
