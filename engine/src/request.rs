//! What HTTP hands to the step loop, and what comes back. A request is tokens and rules, never text.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::batch::{AdapterIndex, SamplingParams, TokenId, TokenLogprob};

/// Keeps prefixes of different owners apart: adapter, tenant (`cache_salt`), later images.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PrefixSalt {
    pub adapter: AdapterIndex,
    pub tenant: Option<String>,
}

/// When a sequence ends by itself. Stop strings are found later, in the text stream, which then cancels.
#[derive(Clone, Debug)]
pub struct StopRules {
    /// Ends the sequence; the token itself brings no event.
    pub stop_tokens: Arc<BTreeSet<TokenId>>,
    /// Output tokens at most; at least 1.
    pub output_tokens_max: u32,
}

/// A valid request: parsed at the door, it cannot be wrong.
#[derive(Clone, Debug)]
pub struct Request {
    /// At least one token.
    pub prompt: Arc<[TokenId]>,
    /// Choices; the seeds of the second and later ones are derived from the first's.
    pub choices: u32,
    pub sampling: Arc<SamplingParams>,
    pub stop: StopRules,
    pub salt: PrefixSalt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, or a stop string found by the stream.
    Stop,
    /// `output_tokens_max` or the context limit.
    Length,
}

/// What a request's stream brings, per choice.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// First event of each choice: how much of the prompt was found in the cache (for a later choice: on a sibling's
    /// pages), and the prompt's log-probabilities where they were asked for (one per prompt token after the first).
    Prompt {
        choice: u32,
        cached_tokens: u32,
        logprobs: Vec<TokenLogprob>,
    },
    Token {
        choice: u32,
        token: TokenId,
        logprob: Option<TokenLogprob>,
    },
    /// Terminal for the choice.
    Finished {
        choice: u32,
        reason: FinishReason,
    },
    /// Terminal for the choice: nothing more will come, and it is our fault.
    Failed {
        choice: u32,
        message: String,
    },
}

impl Event {
    /// What it holds in memory.
    pub fn bytes(&self) -> usize {
        let reports: &[TokenLogprob] = match self {
            Event::Prompt { logprobs, .. } => logprobs,
            Event::Token { logprob, .. } => logprob.as_slice(),
            Event::Finished { .. } | Event::Failed { .. } => &[],
        };
        size_of::<Event>() + reports.iter().map(TokenLogprob::bytes).sum::<usize>()
    }
}

/// Why a request is not taken. Both are final answers given before any work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Answered with 400.
    #[error(
        "the prompt has {prompt_tokens} tokens and asks for up to {output_tokens_max} more, but {limit_name} is {limit} tokens; \
         shorten the prompt or lower max_tokens"
    )]
    NeverFits { prompt_tokens: u64, output_tokens_max: u64, limit_name: &'static str, limit: u64 },
    /// Answered with 429 and Retry-After.
    #[error(
        "{waiting} requests are waiting already, which is the limit; retry in {retry_after_seconds} s"
    )]
    QueueFull { waiting: usize, retry_after_seconds: u64 },
    /// Answered with 503: the engine is shutting down.
    #[error("the engine is shutting down; retry elsewhere")]
    ShuttingDown,
}
