//! The response objects of OpenAI's API, field for field: what a strict client's models expect and nothing else.

use serde::Serialize;

use crate::batch::{TokenId, TokenLogprob};
use crate::request::FinishReason;
use crate::stream::PlacedLogprob;
use crate::tokenizer::Tokenizer;

/// Stands for −∞, which JSON cannot write.
const LOGPROB_MIN: f32 = -9999.0;

/// What identifies the numerics: equal seeds give equal tokens while this does not change.
pub const SYSTEM_FINGERPRINT: &str = concat!("plimsoll-", env!("CARGO_PKG_VERSION"));

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    pub prompt_tokens_details: PromptTokensDetails,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PromptTokensDetails {
    /// Tokens of the prompt whose keys and values were found in the cache.
    pub cached_tokens: u64,
}

pub fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

#[derive(Debug, Serialize)]
pub struct ChatCompletion {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    pub system_fingerprint: &'static str,
}

#[derive(Debug, Serialize)]
pub struct ChatChoice {
    pub index: usize,
    pub message: ChatMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: &'static str,
}

#[derive(Debug, Serialize)]
pub struct ChatMessage {
    pub role: &'static str,
    pub content: String,
    pub refusal: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct ChatCompletionChunk<'a> {
    pub id: &'a str,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: Vec<ChunkChoice>,
    pub system_fingerprint: &'static str,
    /// Absent unless usage was asked for; then null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize)]
pub struct ChunkChoice {
    pub index: usize,
    pub delta: ChunkDelta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize)]
pub struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

#[derive(Debug, Default, Serialize)]
pub struct ChatLogprobs {
    pub content: Vec<ChatTokenLogprob>,
    pub refusal: Option<Vec<ChatTokenLogprob>>,
}

#[derive(Debug, Serialize)]
pub struct ChatTokenLogprob {
    #[serde(flatten)]
    pub token: TokenText,
    pub top_logprobs: Vec<TokenText>,
}

#[derive(Debug, Serialize)]
pub struct TokenText {
    pub token: String,
    pub bytes: Vec<u8>,
    pub logprob: f32,
}

#[derive(Debug, Serialize)]
pub struct Completion<'a> {
    pub id: &'a str,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: Vec<CompletionChoice>,
    pub system_fingerprint: &'static str,
    /// As in [`ChatCompletionChunk`]; always there in an answer that is not streamed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: Option<&'static str>,
}

/// Parallel lists, one entry per token.
#[derive(Debug, Default, Serialize)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    /// Null for the first token of an echoed prompt: nothing comes before it.
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Vec<Option<serde_json::Map<String, serde_json::Value>>>,
    /// Characters of the choice's `text` before the token.
    pub text_offset: Vec<usize>,
}

#[derive(Debug, Serialize)]
pub struct ModelList {
    pub object: &'static str,
    pub data: Vec<Model>,
}

#[derive(Debug, Serialize)]
pub struct Model {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
}

/// A token as a client can print it; bytes that are no text on their own are written `bytes:\xe2\x82`.
pub fn token_text(tokenizer: &Tokenizer, id: TokenId) -> String {
    let bytes = tokenizer.bytes(id);
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let hex = bytes.iter().map(|b| format!("\\x{b:02x}"));
            std::iter::once("bytes:".to_owned()).chain(hex).collect()
        }
    }
}

/// Log-probabilities as chat completions give them.
pub fn chat_logprobs(tokenizer: &Tokenizer, placed: &[PlacedLogprob]) -> ChatLogprobs {
    let text = |id: TokenId, logprob: f32| TokenText {
        token: token_text(tokenizer, id),
        bytes: tokenizer.bytes(id).to_vec(),
        logprob: logprob.max(LOGPROB_MIN),
    };
    let entry = |placed: &PlacedLogprob| ChatTokenLogprob {
        token: text(placed.logprob.token, placed.logprob.logprob),
        top_logprobs: placed.logprob.top.iter().map(|&(id, p)| text(id, p)).collect(),
    };
    ChatLogprobs { content: placed.iter().map(entry).collect(), refusal: None }
}

impl CompletionLogprobs {
    pub fn push(&mut self, tokenizer: &Tokenizer, report: &TokenLogprob, offset_chars: usize) {
        let TokenLogprob { token, logprob, rank: _, top } = report;
        self.tokens.push(token_text(tokenizer, *token));
        self.token_logprobs.push(Some(logprob.max(LOGPROB_MIN)));
        // The chosen token is always among the alternatives, as clients of this API expect.
        let all = top.iter().copied().chain([(*token, *logprob)]);
        let mut map = serde_json::Map::new();
        for (id, logprob) in all {
            let entry = map.entry(token_text(tokenizer, id));
            entry.or_insert_with(|| logprob.max(LOGPROB_MIN).into());
        }
        self.top_logprobs.push(Some(map));
        self.text_offset.push(offset_chars);
    }

    /// The first token of an echoed prompt.
    pub fn push_first(&mut self, tokenizer: &Tokenizer, id: TokenId) {
        self.tokens.push(token_text(tokenizer, id));
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
        self.text_offset.push(0);
    }
}
