//! POST /v1/chat/completions. Enters: a body. Leaves: the assistant's message, at once or as chunks.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::admission::{admit, bound_answer};
use crate::chat_template::{ChatTemplate, ChatTemplateError, Rendering};
use crate::http::errors::ApiError;
use crate::http::fields::{self, Fields};
use crate::http::generation::{Generation, Piece};
use crate::http::openai::{
    ChatChoice, ChatCompletion, ChatCompletionChunk, ChatLogprobs, ChatMessage, ChunkChoice,
    ChunkDelta, SYSTEM_FINGERPRINT, Usage, chat_logprobs, finish_reason,
};
use crate::http::params::{self, Shared, StreamOptions, TOP_LOGPROBS_MAX};
use crate::http::sse::{Chunks, Events};
use crate::http::{Chance, Identity, Prepared, Served};
use crate::stream::PlacedLogprob;
use crate::tokenizer::Tokenizer;

const MESSAGES_MAX: usize = 4096;
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// A valid body.
#[derive(Debug)]
pub struct ChatCall {
    pub shared: Shared,
    pub messages: Messages,
}

/// A conversation and how the template is to write it; /tokenize takes the same.
#[derive(Debug)]
pub struct Messages {
    /// Each with `role` and `content`, the content one string.
    pub list: Vec<Value>,
    pub add_generation_prompt: bool,
    pub variables: Map<String, Value>,
}

/// Parses, renders, tokenizes and admits. Takes milliseconds for long bodies: not for the runtime's threads.
pub fn prepare(body: &[u8], served: &Served, chance: &Chance) -> Result<Prepared, ApiError> {
    let vocabulary = served.limits.vocabulary;
    let ChatCall { shared, messages } = parse(Fields::from_body(body)?, vocabulary, chance.seed)?;
    served.check_model(&shared.model)?;
    let template = template(served)?;
    let text = render(template, &messages, chance.now_unix_seconds)?;
    let prompt = served.encode(&text, false, "messages")?;
    let requests = vec![admit(&shared.wish, prompt, &served.limits)?];
    let reported = bound_answer(&requests)?;
    Ok(Prepared {
        reported,
        with_logprobs: shared.wish.sampling.logprobs.is_some(),
        requests,
        stop_strings: shared.stop_strings,
        prompt_only: false,
        stream: shared.stream,
        user: shared.user,
        echo: Vec::new(),
    })
}

pub fn parse(mut body: Fields, vocabulary: u32, seed: u64) -> Result<ChatCall, ApiError> {
    let mut shared = params::shared(&mut body, vocabulary, seed)?;
    shared.wish.output_tokens_max = max_tokens(&mut body)?;
    shared.wish.sampling.logprobs = logprobs(&mut body)?;
    refuse_unsupported(&mut body)?;
    let messages = messages(&mut body)?;
    body.finish()?;
    Ok(ChatCall { shared, messages })
}

/// `max_tokens` is the older spelling of `max_completion_tokens`.
fn max_tokens(body: &mut Fields) -> Result<Option<u32>, ApiError> {
    let range = 1..=i64::from(u32::MAX);
    let old = body.integer("max_tokens", range.clone())?;
    let new = body.integer("max_completion_tokens", range)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(ApiError::parameter(
            "max_tokens",
            "`max_tokens` and `max_completion_tokens` differ; send one of them",
        )),
        _ => Ok(new.or(old).map(|n| u32::try_from(n).expect("checked against u32::MAX"))),
    }
}

fn logprobs(body: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = body.boolean("logprobs")?.unwrap_or(false);
    let top = body.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    if top.is_some_and(|top| top > 0) && !wanted {
        return Err(ApiError::parameter(
            "top_logprobs",
            "`top_logprobs` is only allowed with `logprobs: true`",
        ));
    }
    let top = u32::try_from(top.unwrap_or(0)).expect("checked against TOP_LOGPROBS_MAX");
    Ok(wanted.then_some(top))
}

fn refuse_unsupported(body: &mut Fields) -> Result<(), ApiError> {
    let in_a_message = "describe the tools in a system message and read the calls from the text";
    body.refuse("tools", &[], in_a_message)?;
    body.refuse("tool_choice", &[json!("none")], in_a_message)?;
    body.refuse("parallel_tool_calls", &[], in_a_message)?;
    body.refuse("functions", &[], in_a_message)?;
    body.refuse("function_call", &[json!("none")], in_a_message)?;
    let as_text = "ask for the format in a message, and leave it out or send {\"type\": \"text\"}";
    body.refuse("response_format", &[json!({"type": "text"})], as_text)?;
    body.refuse("modalities", &[json!(["text"])], "only text is generated; leave it out")?;
    body.refuse("audio", &[], "only text is generated; leave it out")?;
    body.refuse("prediction", &[], "leave it out")?;
    body.refuse("reasoning_effort", &[], "leave it out")?;
    body.refuse("verbosity", &[], "leave it out")?;
    body.refuse("web_search_options", &[], "put what was found into a message")
}

/// Takes `messages` and what says how to write them.
pub fn messages(body: &mut Fields) -> Result<Messages, ApiError> {
    let items = body.array("messages")?.ok_or_else(|| fields::missing("messages"))?;
    if items.is_empty() || items.len() > MESSAGES_MAX {
        return Err(ApiError::parameter(
            "messages",
            format!("`messages` must hold 1 to {MESSAGES_MAX} messages, not {}", items.len()),
        )
        .code("invalid_value"));
    }
    let read = |(i, item)| message(Fields::from_value(item, &format!("messages[{i}]"))?);
    let list = items.into_iter().enumerate().map(read).collect::<Result<_, _>>()?;
    let variables = match body.value("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(fields::wrong_type("chat_template_kwargs", "an object", &other)),
    };
    let add_generation_prompt = body.boolean("add_generation_prompt")?.unwrap_or(true);
    body.refuse("continue_final_message", &[json!(false)], "leave it out")?;
    body.refuse("chat_template", &[], "the checkpoint's template is used; leave it out")?;
    Ok(Messages { list, add_generation_prompt, variables })
}

/// A message as templates expect it.
fn message(mut fields: Fields) -> Result<Value, ApiError> {
    let path = fields.path_of("role");
    let role = fields.string("role")?.ok_or_else(|| fields::missing(&path))?;
    if !ROLES.contains(&role.as_str()) {
        let expected = format!("`{path}` must be one of {}, not `{role}`", ROLES.join(", "));
        return Err(ApiError::parameter(path, expected).code("invalid_value"));
    }
    let mut message = Map::new();
    let content = content(&mut fields)?;
    let tool_calls = tool_calls(&mut fields)?;
    if content.is_none() && tool_calls.is_none() {
        return Err(fields::missing(&fields.path_of("content")));
    }
    message.insert("role".into(), role.into());
    message.insert("content".into(), content.unwrap_or_default().into());
    if let Some(calls) = tool_calls {
        message.insert("tool_calls".into(), calls);
    }
    for name in ["name", "tool_call_id", "reasoning_content"] {
        if let Some(text) = fields.string(name)? {
            message.insert(name.into(), text.into());
        }
    }
    // An answer sent back as it came carries these empty fields.
    fields.refuse("refusal", &[json!("")], "send it as content")?;
    fields.refuse("annotations", &[json!([])], "leave it out")?;
    fields.refuse("audio", &[], "only text is read")?;
    fields.refuse("function_call", &[], "send `tool_calls`")?;
    fields.finish()?;
    Ok(message.into())
}

/// A string, or parts of type text, joined by line breaks.
fn content(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let path = fields.path_of("content");
    match fields.value("content") {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Array(parts)) => {
            let part = |(i, part)| text_part(Fields::from_value(part, &format!("{path}[{i}]"))?);
            let texts: Vec<String> =
                parts.into_iter().enumerate().map(part).collect::<Result<_, _>>()?;
            Ok(Some(texts.join("\n")))
        }
        Some(other) => Err(fields::wrong_type(&path, "a string or an array of parts", &other)),
    }
}

fn text_part(mut part: Fields) -> Result<String, ApiError> {
    let path = part.path_of("type");
    let kind = part.string("type")?.ok_or_else(|| fields::missing(&path))?;
    if kind != "text" {
        return Err(ApiError::parameter(
            path,
            format!("content of type `{kind}` is not supported by this model; send text"),
        )
        .code("unsupported_content"));
    }
    let text_path = part.path_of("text");
    let text = part.string("text")?.ok_or_else(|| fields::missing(&text_path))?;
    part.finish()?;
    Ok(text)
}

/// Earlier tool calls go to the template; it expects the arguments as an object, the wire has them as a string.
fn tool_calls(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    let Some(mut calls) = fields.array("tool_calls")? else { return Ok(None) };
    for call in &mut calls {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
        if let Some(parsed @ Value::Object(_)) = parsed {
            *arguments = parsed;
        }
    }
    Ok((!calls.is_empty()).then_some(Value::Array(calls)))
}

pub fn template(served: &Served) -> Result<&ChatTemplate, ApiError> {
    served.template.as_ref().ok_or_else(|| {
        ApiError::parameter(
            "messages",
            format!(
                "`{}` has no chat template, so messages cannot be written as a prompt; use /v1/completions",
                served.name
            ),
        )
        .code("no_chat_template")
    })
}

pub fn render(
    template: &ChatTemplate,
    messages: &Messages,
    now_unix_seconds: i64,
) -> Result<String, ApiError> {
    let Messages { list, add_generation_prompt, variables } = messages;
    let rendering = Rendering {
        messages: list,
        add_generation_prompt: *add_generation_prompt,
        variables,
        now_unix_seconds,
    };
    template.render(&rendering).map_err(|error| {
        let code = match error {
            ChatTemplateError::Exceeded(_) => "chat_template_limit",
            _ => "chat_template_error",
        };
        ApiError::parameter("messages", error.to_string()).code(code)
    })
}

/// The whole answer.
pub async fn collect(
    mut generation: Generation,
    identity: Identity,
    tokenizer: &Tokenizer,
    with_logprobs: bool,
) -> Result<ChatCompletion, ApiError> {
    let mut texts = vec![String::new(); generation.choices()];
    let mut reports: Vec<Vec<PlacedLogprob>> = vec![Vec::new(); generation.choices()];
    let mut reasons = vec![""; generation.choices()];
    while let Some(piece) = generation.next().await {
        let (choice, delta) = match piece {
            Piece::Prompt { .. } => continue,
            Piece::Text { choice, delta } => (choice, delta),
            Piece::End { choice, delta, reason } => {
                reasons[choice] = finish_reason(reason);
                (choice, delta)
            }
            Piece::Failed { message } => return Err(ApiError::internal(message)),
        };
        texts[choice].push_str(&delta.text);
        reports[choice].extend(delta.logprobs);
    }
    let parts = texts.into_iter().zip(reports).zip(reasons).enumerate();
    let choices = parts.map(|(index, ((content, placed), finish_reason))| ChatChoice {
        index,
        message: ChatMessage { role: "assistant", content, refusal: None },
        logprobs: with_logprobs.then(|| chat_logprobs(tokenizer, &placed)),
        finish_reason,
    });
    Ok(ChatCompletion {
        id: identity.id,
        object: "chat.completion",
        created: identity.created,
        model: identity.model,
        choices: choices.collect(),
        usage: generation.usage(),
        system_fingerprint: SYSTEM_FINGERPRINT,
    })
}

/// The answer as it grows.
pub struct ChatChunks {
    pub identity: Identity,
    pub tokenizer: Arc<Tokenizer>,
    pub with_logprobs: bool,
    pub options: StreamOptions,
}

impl ChatChunks {
    fn send(&self, choices: Vec<ChunkChoice>, usage: Option<Usage>, out: &mut Events) {
        out.push(&ChatCompletionChunk {
            id: &self.identity.id,
            object: "chat.completion.chunk",
            created: self.identity.created,
            model: &self.identity.model,
            choices,
            system_fingerprint: SYSTEM_FINGERPRINT,
            usage: self.options.include_usage.then_some(usage),
        });
    }

    fn send_delta(
        &self,
        choice: usize,
        delta: ChunkDelta,
        placed: &[PlacedLogprob],
        out: &mut Events,
    ) {
        let logprobs: Option<ChatLogprobs> =
            self.with_logprobs.then(|| chat_logprobs(&self.tokenizer, placed));
        let chunk = ChunkChoice { index: choice, delta, logprobs, finish_reason: None };
        self.send(vec![chunk], None, out);
    }
}

impl Chunks for ChatChunks {
    fn open(&mut self, choices: usize, out: &mut Events) {
        for choice in 0..choices {
            let delta = ChunkDelta { role: Some("assistant"), content: Some(String::new()) };
            self.send_delta(choice, delta, &[], out);
        }
    }

    fn piece(&mut self, piece: Piece, out: &mut Events) {
        match piece {
            Piece::Prompt { .. } => {}
            Piece::Text { choice, delta } => {
                let content = ChunkDelta { role: None, content: Some(delta.text) };
                self.send_delta(choice, content, &delta.logprobs, out);
            }
            Piece::End { choice, delta, reason } => {
                if !delta.text.is_empty() || !delta.logprobs.is_empty() {
                    let content = ChunkDelta { role: None, content: Some(delta.text) };
                    self.send_delta(choice, content, &delta.logprobs, out);
                }
                let last = ChunkChoice {
                    index: choice,
                    delta: ChunkDelta::default(),
                    logprobs: None,
                    finish_reason: Some(finish_reason(reason)),
                };
                self.send(vec![last], None, out);
            }
            Piece::Failed { message } => out.fail(message),
        }
    }

    fn close(&mut self, usage: Usage, out: &mut Events) {
        if self.options.include_usage {
            self.send(Vec::new(), Some(usage), out);
        }
    }
}
