//! One step as the backend sees it. The scheduler decides lengths, this module's types carry them together with the
//! token values; nothing here knows HTTP, clocks or devices.

use std::sync::Arc;

pub type TokenId = u32;

/// One running sequence: one choice of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// Row of the backend's per-sequence state (last sampled token, penalty counts); below `running_max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// A page of the KV pool: 64 tokens of every layer of one layer group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// Steps are numbered from 1 in order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepNumber(pub u64);

/// Which adapter's weights a row uses. Only the base model exists now; prefix hashes are salted with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AdapterIndex(pub u32);

impl AdapterIndex {
    pub const BASE: AdapterIndex = AdapterIndex(0);
}

/// What enters the first layer for one position.
#[derive(Clone, Debug, PartialEq)]
pub enum RowInput {
    Token(TokenId),
    /// The token this slot sampled last. Its value may still be on the device: the placeholder of a step in flight.
    Sampled,
    /// A row of `hidden` floats in place of a token's embedding (an image patch, a soft prompt).
    Embedding(Arc<[f32]>),
}

/// How to turn logits into a token. The draw depends on (seed, position) and the logits alone.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// 1 keeps everything.
    pub top_p: f32,
    /// 0 keeps everything.
    pub top_k: u32,
    /// 0 keeps everything.
    pub min_p: f32,
    /// 1 changes nothing; over prompt and output.
    pub repetition_penalty: f32,
    /// Over output only.
    pub presence_penalty: f32,
    /// Over output only.
    pub frequency_penalty: f32,
    pub logit_bias: Vec<(TokenId, f32)>,
    pub seed: u64,
    /// Report the chosen token's log-probability and this many alternatives.
    pub logprobs: Option<u32>,
    /// The same for every prompt token after the first.
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// Comes with the first span on a slot, and again after a preemption: the backend forgets what the slot held.
#[derive(Clone, Debug)]
pub struct SlotStart {
    /// Prompt, then what was generated before a preemption.
    pub tokens: Arc<[TokenId]>,
    /// How many of `tokens` are prompt.
    pub prompt_tokens: usize,
    pub sampling: Arc<SamplingParams>,
}

/// Consecutive rows of one sequence.
#[derive(Clone, Debug)]
pub struct Span {
    pub sequence: SequenceId,
    pub slot: Slot,
    pub start: Option<SlotStart>,
    /// Position of the first row.
    pub position: u32,
    /// One entry per row; never empty.
    pub inputs: Vec<RowInput>,
    /// One block table per layer group; entry `i` holds positions `64·i ..`.
    pub tables: Vec<Arc<[PageId]>>,
    pub adapter: AdapterIndex,
    /// Sample a token from the last row's logits.
    pub sample: bool,
    /// For each row whose next position is still prompt, report the log-probability of the token there (it is in
    /// `SlotStart::tokens`, also where the next span computes it).
    pub prompt_logprobs: bool,
}

/// Copy-on-write: done before the step's rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    pub group: usize,
    pub from: PageId,
    pub to: PageId,
}

/// Decode spans first, then prefill chunks.
#[derive(Clone, Debug)]
pub struct Step {
    pub number: StepNumber,
    pub copies: Vec<PageCopy>,
    pub spans: Vec<Span>,
}

/// Natural logarithms of the model's own distribution: neither temperature, filters, penalties nor bias enter them.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub token: TokenId,
    pub logprob: f32,
    /// 1 is the most likely token.
    pub rank: u32,
    /// Most likely first.
    pub top: Vec<(TokenId, f32)>,
}

impl TokenLogprob {
    /// What it holds in memory, alternatives included.
    pub fn bytes(&self) -> usize {
        size_of::<TokenLogprob>() + self.top.capacity() * size_of::<(TokenId, f32)>()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    pub token: TokenId,
    pub logprob: Option<TokenLogprob>,
}

/// What a step brought for one span, in the order of `Step::spans`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SpanOutput {
    pub sampled: Option<SampledToken>,
    pub prompt_logprobs: Vec<TokenLogprob>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct StepOutput {
    pub number: StepNumber,
    pub spans: Vec<SpanOutput>,
}
