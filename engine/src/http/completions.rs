//! POST /v1/completions. Enters: a body with one or many prompts, as text or tokens. Leaves: their continuations, at
//! once or as chunks, with the prompt in front where it is to be echoed.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::admission::{admit, bound_answer};
use crate::batch::{TokenId, TokenLogprob};
use crate::http::errors::ApiError;
use crate::http::fields::{self, Fields};
use crate::http::generation::{Generation, Piece};
use crate::http::openai::{
    Completion, CompletionChoice, CompletionLogprobs, SYSTEM_FINGERPRINT, Usage, finish_reason,
};
use crate::http::params::{self, CHOICES_MAX, Shared, StreamOptions, TOP_LOGPROBS_MAX, token_ids};
use crate::http::sse::{Chunks, Events};
use crate::http::{Chance, Identity, Prepared, Served};
use crate::request::{FinishReason, Request};
use crate::stream::Delta;
use crate::tokenizer::Tokenizer;

/// What OpenAI generates when `max_tokens` is absent.
const MAX_TOKENS_DEFAULT: i64 = 16;

/// A valid body.
#[derive(Debug)]
pub struct CompletionCall {
    pub shared: Shared,
    pub prompts: Vec<Prompt>,
    pub echo: bool,
    pub add_special_tokens: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<TokenId>),
}

/// A prompt to be given back in front of its continuation.
#[derive(Clone, Debug)]
pub struct Echo {
    pub text: Arc<str>,
    pub tokens: Arc<[TokenId]>,
}

/// What the choices of all requests repeat of their prompts. `echoes` holds one for each, or none.
pub fn echoed_bytes(echoes: &[Echo], requests: &[Request]) -> u64 {
    let of_one =
        |(echo, request): (&Echo, &Request)| echo.text.len() as u64 * u64::from(request.choices);
    echoes.iter().zip(requests).map(of_one).sum()
}

/// Parses, tokenizes and admits. Takes milliseconds for long bodies: not for the runtime's threads.
pub fn prepare(body: &[u8], served: &Served, chance: &Chance) -> Result<Prepared, ApiError> {
    let vocabulary = served.limits.vocabulary;
    let call = parse(Fields::from_body(body)?, vocabulary, chance.seed)?;
    let CompletionCall { shared, prompts, echo, add_special_tokens } = call;
    served.check_model(&shared.model)?;
    let mut requests = Vec::with_capacity(prompts.len());
    let mut echoes = Vec::new();
    for prompt in prompts {
        let tokens = match &prompt {
            Prompt::Text(text) => served.encode(text, add_special_tokens, "prompt")?,
            Prompt::Tokens(tokens) if tokens.is_empty() => return Err(empty_prompt()),
            Prompt::Tokens(tokens) => tokens.clone(),
        };
        let request = admit(&shared.wish, tokens, &served.limits)?;
        if echo {
            let text = match prompt {
                Prompt::Text(text) => text,
                Prompt::Tokens(tokens) => served.tokenizer.text(&tokens, true),
            };
            echoes.push(Echo { text: text.into(), tokens: request.prompt.clone() });
        }
        requests.push(request);
    }
    let reported = bound_answer(&requests)?;
    Ok(Prepared {
        reported,
        with_logprobs: shared.wish.sampling.logprobs.is_some(),
        requests,
        prompt_only: shared.wish.output_tokens_max == Some(0),
        stop_strings: shared.stop_strings,
        stream: shared.stream,
        user: shared.user,
        echo: echoes,
    })
}

pub fn parse(mut body: Fields, vocabulary: u32, seed: u64) -> Result<CompletionCall, ApiError> {
    let mut shared = params::shared(&mut body, vocabulary, seed)?;
    let echo = body.boolean("echo")?.unwrap_or(false);
    shared.wish.output_tokens_max = Some(max_tokens(&mut body, echo)?);
    let logprobs = body
        .integer("logprobs", 0..=TOP_LOGPROBS_MAX)?
        .map(|n| u32::try_from(n).expect("checked against TOP_LOGPROBS_MAX"));
    shared.wish.sampling.logprobs = logprobs;
    shared.wish.sampling.prompt_logprobs = logprobs.filter(|_| echo);
    let add_special_tokens = body.boolean("add_special_tokens")?.unwrap_or(true);
    body.refuse("suffix", &[json!("")], "put the text after the gap into the prompt")?;
    body.refuse("response_format", &[json!({"type": "text"})], "ask for the format in the prompt")?;
    let prompt = body.value("prompt").ok_or_else(|| fields::missing("prompt"))?;
    let prompts = prompts(prompt, vocabulary)?;
    let choices = prompts.len() as u64 * u64::from(shared.wish.choices);
    if choices > u64::from(CHOICES_MAX) {
        return Err(ApiError::parameter(
            "prompt",
            format!("prompts times `n` must be at most {CHOICES_MAX}, not {choices}"),
        )
        .code("invalid_value"));
    }
    body.finish()?;
    Ok(CompletionCall { shared, prompts, echo, add_special_tokens })
}

fn max_tokens(body: &mut Fields, echo: bool) -> Result<u32, ApiError> {
    let asked = body.integer("max_tokens", 0..=i64::from(u32::MAX))?.unwrap_or(MAX_TOKENS_DEFAULT);
    if asked == 0 && !echo {
        return Err(ApiError::parameter(
            "max_tokens",
            "`max_tokens: 0` is only allowed with `echo: true`",
        )
        .code("invalid_value"));
    }
    Ok(u32::try_from(asked).expect("checked against u32::MAX"))
}

/// A string, an array of strings, an array of token ids, or an array of those.
fn prompts(value: Value, vocabulary: u32) -> Result<Vec<Prompt>, ApiError> {
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(items) => items,
        other => return Err(fields::wrong_type("prompt", "a string or an array", &other)),
    };
    match items.first() {
        None => Err(empty_prompt()),
        Some(Value::Number(_)) => {
            Ok(vec![Prompt::Tokens(token_ids(&items, "prompt", vocabulary)?)])
        }
        Some(_) => {
            let read = |(i, item)| one_of_many(i, item, vocabulary);
            items.into_iter().enumerate().map(read).collect()
        }
    }
}

fn one_of_many(index: usize, item: Value, vocabulary: u32) -> Result<Prompt, ApiError> {
    let path = format!("prompt[{index}]");
    match item {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) => token_ids(&ids, &path, vocabulary).map(Prompt::Tokens),
        other => Err(fields::wrong_type(&path, "a string or an array of token ids", &other)),
    }
}

fn empty_prompt() -> ApiError {
    ApiError::parameter("prompt", "`prompt` is empty: the model needs at least one token")
        .code("invalid_value")
}

/// A choice's text and its tokens so far, echo included.
struct Lines {
    echo: Option<Echo>,
    /// The echo has gone out.
    opened: bool,
    /// Characters in front of the generated text.
    echo_chars: usize,
}

/// Turns pieces into choices; streamed or not, they are the same.
struct Writer {
    tokenizer: Arc<Tokenizer>,
    with_logprobs: bool,
    choices: Vec<Lines>,
}

impl Writer {
    fn new(
        tokenizer: Arc<Tokenizer>,
        with_logprobs: bool,
        echo: &[Echo],
        choices: usize,
    ) -> Writer {
        let per_prompt = choices / echo.len().max(1);
        let lines = (0..choices).map(|choice| {
            let echo = echo.get(choice / per_prompt.max(1)).cloned();
            let echo_chars = echo.as_ref().map_or(0, |echo| echo.text.chars().count());
            Lines { echo, opened: false, echo_chars }
        });
        Writer { tokenizer, with_logprobs, choices: lines.collect() }
    }

    /// None for a piece that shows nothing.
    fn write(&mut self, piece: Piece) -> Option<CompletionChoice> {
        let (choice, prompt, delta, reason) = match piece {
            Piece::Prompt { choice, logprobs } => (choice, Some(logprobs), Delta::default(), None),
            Piece::Text { choice, delta } => (choice, None, delta, None),
            Piece::End { choice, delta, reason } => (choice, None, delta, Some(reason)),
            Piece::Failed { .. } => return None,
        };
        Some(self.choice(choice, prompt, delta, reason))
    }

    fn choice(
        &mut self,
        index: usize,
        prompt: Option<Vec<TokenLogprob>>,
        delta: Delta,
        reason: Option<FinishReason>,
    ) -> CompletionChoice {
        let lines = &mut self.choices[index];
        let mut text = String::new();
        let mut logprobs = CompletionLogprobs::default();
        if let Some(echo) = lines.echo.as_ref().filter(|_| !lines.opened) {
            text.push_str(&echo.text);
            if let Some(reports) = &prompt {
                echo_logprobs(&mut logprobs, &self.tokenizer, echo, reports);
            } else if self.with_logprobs {
                // A prompt of one token has no log-probabilities.
                echo_logprobs(&mut logprobs, &self.tokenizer, echo, &[]);
            }
            lines.opened = true;
        }
        text.push_str(&delta.text);
        for placed in &delta.logprobs {
            let offset = lines.echo_chars + placed.offset_chars;
            logprobs.push(&self.tokenizer, &placed.logprob, offset);
        }
        CompletionChoice {
            index,
            text,
            logprobs: self.with_logprobs.then_some(logprobs),
            finish_reason: reason.map(finish_reason),
        }
    }
}

/// Offsets are those of the tokens' bytes in the echoed text. Special tokens that were put in front of a text are no part
/// of it: they stand at its start with no width.
fn echo_logprobs(
    out: &mut CompletionLogprobs,
    tokenizer: &Tokenizer,
    echo: &Echo,
    reports: &[TokenLogprob],
) {
    let echo_chars = echo.text.chars().count();
    let (Some(&first), rest) = (echo.tokens.first(), reports) else { return };
    let starts = |byte: &&u8| (**byte & 0xc0) != 0x80;
    let width = |id: TokenId| {
        let bytes = tokenizer.bytes(id);
        let hidden = tokenizer.is_special(id) && !echo.text.as_bytes().starts_with(bytes);
        if hidden { 0 } else { bytes.iter().filter(starts).count() }
    };
    out.push_first(tokenizer, first);
    let mut offset = width(first);
    for report in rest {
        out.push(tokenizer, report, offset.min(echo_chars));
        offset += width(report.token);
    }
}

/// The whole answer as JSON.
pub async fn collect(
    mut generation: Generation,
    identity: Identity,
    tokenizer: Arc<Tokenizer>,
    with_logprobs: bool,
    echo: &[Echo],
) -> Result<Vec<u8>, ApiError> {
    let mut writer = Writer::new(tokenizer, with_logprobs, echo, generation.choices());
    let empty = |index| CompletionChoice {
        index,
        text: String::new(),
        logprobs: with_logprobs.then(CompletionLogprobs::default),
        finish_reason: None,
    };
    let mut choices: Vec<CompletionChoice> = (0..generation.choices()).map(empty).collect();
    while let Some(piece) = generation.next().await {
        if let Piece::Failed { message } = piece {
            return Err(ApiError::internal(message));
        }
        if let Some(part) = writer.write(piece) {
            choices[part.index].append(part);
        }
    }
    let completion = Completion {
        id: &identity.id,
        object: "text_completion",
        created: identity.created,
        model: &identity.model,
        choices,
        system_fingerprint: SYSTEM_FINGERPRINT,
        usage: Some(Some(generation.usage())),
    };
    Ok(serde_json::to_vec(&completion).expect("our own types serialize"))
}

impl CompletionChoice {
    fn append(&mut self, part: CompletionChoice) {
        let CompletionChoice { index: _, text, logprobs, finish_reason } = part;
        self.text.push_str(&text);
        if let (Some(all), Some(more)) = (&mut self.logprobs, logprobs) {
            all.tokens.extend(more.tokens);
            all.token_logprobs.extend(more.token_logprobs);
            all.top_logprobs.extend(more.top_logprobs);
            all.text_offset.extend(more.text_offset);
        }
        self.finish_reason = self.finish_reason.or(finish_reason);
    }
}

/// The answer as it grows.
pub struct CompletionChunks {
    writer: Writer,
    identity: Identity,
    options: StreamOptions,
}

impl CompletionChunks {
    pub fn new(
        identity: Identity,
        tokenizer: Arc<Tokenizer>,
        with_logprobs: bool,
        echo: &[Echo],
        choices: usize,
        options: StreamOptions,
    ) -> CompletionChunks {
        let writer = Writer::new(tokenizer, with_logprobs, echo, choices);
        CompletionChunks { writer, identity, options }
    }

    fn send(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>, out: &mut Events) {
        out.push(&Completion {
            id: &self.identity.id,
            object: "text_completion",
            created: self.identity.created,
            model: &self.identity.model,
            choices,
            system_fingerprint: SYSTEM_FINGERPRINT,
            usage: self.options.include_usage.then_some(usage),
        });
    }
}

impl Chunks for CompletionChunks {
    /// A completion's stream opens with its first text.
    fn open(&mut self, _choices: usize, _out: &mut Events) {}

    fn piece(&mut self, piece: Piece, out: &mut Events) {
        if let Some(choice) = self.writer.write(piece) {
            self.send(vec![choice], None, out);
        }
    }

    fn close(&mut self, usage: Usage, out: &mut Events) {
        if self.options.include_usage {
            self.send(Vec::new(), Some(usage), out);
        }
    }
}
