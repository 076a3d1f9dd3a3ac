//! POST /tokenize and /detokenize, in the shapes of vLLM.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::batch::TokenId;
use crate::http::chat;
use crate::http::errors::ApiError;
use crate::http::fields::{self, Fields};
use crate::http::openai::token_text;
use crate::http::params::token_ids;
use crate::http::state::{App, Chance, Served};
use crate::http::{body, on_blocking_thread, served};

/// An answer of /tokenize.
#[derive(Serialize)]
pub struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<TokenId>,
    token_strs: Option<Vec<String>>,
}

/// An answer of /detokenize.
#[derive(Serialize)]
pub struct Text {
    prompt: String,
}

pub async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let now = Chance::now().now_unix_seconds;
    answer(&app, request, move |body, served| tokens_of(body, served, now)).await
}

pub async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    answer(&app, request, text_of).await
}

/// Written where it is made: a long answer takes milliseconds too.
async fn answer<T: Serialize>(
    app: &Arc<App>,
    request: Request,
    make: impl FnOnce(&[u8], &Served) -> Result<T, ApiError> + Send + 'static,
) -> Result<Response, ApiError> {
    let served = served(app)?;
    let body = body::read(app, request).await?;
    let json = on_blocking_thread(app, &served, body, |body, served| {
        let answer = make(body, served)?;
        Ok(serde_json::to_vec(&answer).expect("our own types serialize"))
    });
    Ok(([(header::CONTENT_TYPE, "application/json")], json.await?).into_response())
}

/// A prompt or messages → token ids, as a completion would see them.
pub fn tokens_of(
    body: &[u8],
    served: &Served,
    now_unix_seconds: i64,
) -> Result<Tokenized, ApiError> {
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
    let token_strs =
        with_strings.then(|| tokens.iter().map(|&id| token_text(&served.tokenizer, id)).collect());
    let max_model_len = served.limits.context_tokens;
    Ok(Tokenized { count: tokens.len(), max_model_len, tokens, token_strs })
}

/// Token ids → text, special tokens included.
pub fn text_of(body: &[u8], served: &Served) -> Result<Text, ApiError> {
    let mut body = Fields::from_body(body)?;
    optional_model(&mut body, served)?;
    let items = body.array("tokens")?.ok_or_else(|| fields::missing("tokens"))?;
    body.finish()?;
    let tokens = token_ids(&items, "tokens", served.limits.vocabulary)?;
    Ok(Text { prompt: served.tokenizer.text(&tokens, true) })
}

fn optional_model(body: &mut Fields, served: &Served) -> Result<(), ApiError> {
    match body.string("model")? {
        Some(model) => served.check_model(&model),
        None => Ok(()),
    }
}
