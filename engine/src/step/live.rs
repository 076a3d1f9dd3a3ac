//! The values behind the scheduler's lengths: what a live request's choices have said so far, and when.

use std::sync::Arc;
use std::time::Instant;

use plimsoll_contract::abilities::PAGE_TOKENS;

use super::events::EventSender;
use super::handle::Shared;
use crate::batch::{
    AdapterIndex, RowInput, SamplingParams, SlotStart, SpanOutput, StepOutput, TokenId,
    TokenLogprob,
};
use crate::kv_cache::PageHash;
use crate::metrics::{Finished, Metrics, TokenTally};
use crate::request::{Event, FinishReason, Request};
use crate::scheduler::{End, Notice, Outcome};

pub struct Live {
    request: Request,
    arrived: Instant,
    events: EventSender,
    choices: Vec<Choice>,
    /// Choices that have not ended.
    open: usize,
    prompt_logprobs: Vec<TokenLogprob>,
    prompt_counted: bool,
}

struct Choice {
    sampling: Arc<SamplingParams>,
    output: Vec<TokenId>,
    /// Of the last full page so far; none where prefixes are not reused.
    page_hash: Option<PageHash>,
    open: bool,
    first_planned: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Live {
    pub fn new(
        request: Request,
        last_page: Option<&PageHash>,
        prefix_reuse: bool,
        arrived: Instant,
        events: EventSender,
    ) -> Live {
        let root = || PageHash::root(&request.salt);
        let page_hash = prefix_reuse.then(|| last_page.copied().unwrap_or_else(root));
        let choice = |index| Choice {
            sampling: choice_sampling(&request.sampling, index),
            output: Vec::new(),
            page_hash,
            open: true,
            first_planned: None,
            first_token: None,
            last_token: None,
        };
        Live {
            choices: (0..request.choices).map(choice).collect(),
            open: request.choices as usize,
            prompt_logprobs: Vec::new(),
            prompt_counted: false,
            request,
            arrived,
            events,
        }
    }

    pub fn has_ended(&self) -> bool {
        self.open == 0
    }

    pub fn adapter(&self) -> AdapterIndex {
        self.request.salt.adapter
    }

    pub fn note_planned(&mut self, choice: u32, now: Instant, shared: &Shared) {
        let choice = &mut self.choices[choice as usize];
        if choice.first_planned.is_none() {
            choice.first_planned = Some(now);
            shared.note_queue_time(now - self.arrived);
        }
    }

    pub fn slot_start(&self, choice: u32) -> SlotStart {
        let choice = &self.choices[choice as usize];
        let prompt = &self.request.prompt;
        let tokens = if choice.output.is_empty() {
            Arc::clone(prompt)
        } else {
            prompt.iter().chain(&choice.output).copied().collect()
        };
        let sampling = Arc::clone(&choice.sampling);
        SlotStart { tokens, prompt_tokens: prompt.len(), sampling }
    }

    /// The rows at `position ..`; the one after all known tokens is still being sampled.
    pub fn inputs(&self, choice: u32, position: u32, rows: u32) -> Vec<RowInput> {
        let output = &self.choices[choice as usize].output;
        let prompt = &self.request.prompt;
        let input = |position: u32| {
            let position = position as usize;
            let token = prompt.get(position).or_else(|| output.get(position - prompt.len()));
            token.map_or(RowInput::Sampled, |&token| RowInput::Token(token))
        };
        (position..position + rows).map(input).collect()
    }

    /// Takes a span's results, unless its choice has ended, and says what they mean for the scheduler.
    pub fn take(&mut self, choice: u32, begins: bool, result: &SpanOutput) -> Outcome {
        let choice = &mut self.choices[choice as usize];
        if !choice.open {
            return Outcome::default();
        }
        if begins && !result.prompt_logprobs.is_empty() {
            self.prompt_logprobs.clear();
        }
        self.prompt_logprobs.extend_from_slice(&result.prompt_logprobs);
        let Some(sampled) = &result.sampled else { return Outcome::default() };
        choice.output.push(sampled.token);
        let page_hash = choice.completed_page(&self.request.prompt);
        Outcome { stop: self.request.stop.stop_tokens.contains(&sampled.token), page_hash }
    }

    /// Tells the stream. False: nobody is there any more, or nobody who keeps up.
    pub fn tell(
        &mut self,
        notice: Notice,
        output: Option<&mut StepOutput>,
        now: Instant,
        tally: &TokenTally,
        metrics: &Metrics,
    ) -> bool {
        let event = match notice {
            Notice::Prompt { choice, cached_tokens, .. } => {
                if !self.prompt_counted {
                    self.prompt_counted = true;
                    metrics.prompt_computed(self.request.prompt.len() as u32, cached_tokens);
                }
                let logprobs = self.prompt_logprobs.clone();
                Event::Prompt { choice, cached_tokens, logprobs }
            }
            Notice::Token { choice, span, .. } => {
                self.note_token(choice, now, tally, metrics);
                let output = output.expect("tokens come with a step's output");
                let sampled = output.spans[span].sampled.take().expect("this span sampled");
                if self.request.stop.stop_tokens.contains(&sampled.token) {
                    return true;
                }
                Event::Token { choice, token: sampled.token, logprob: sampled.logprob }
            }
            Notice::Ended { choice, end, .. } => {
                self.close(choice, end, now, metrics);
                match end {
                    End::Stop => Event::Finished { choice, reason: FinishReason::Stop },
                    End::Length => Event::Finished { choice, reason: FinishReason::Length },
                    End::Aborted => return true,
                    End::Failed => {
                        let message = "the engine failed to compute this request".into();
                        Event::Failed { choice, message }
                    }
                }
            }
        };
        self.events.send(event)
    }

    fn note_token(&mut self, choice: u32, now: Instant, tally: &TokenTally, metrics: &Metrics) {
        let choice = &mut self.choices[choice as usize];
        match choice.last_token.replace(now) {
            Some(last) => tally.next_token(now - last),
            None => {
                choice.first_token = Some(now);
                metrics.first_token(now - self.arrived);
            }
        }
    }

    fn close(&mut self, choice: u32, end: End, now: Instant, metrics: &Metrics) {
        let choice = &mut self.choices[choice as usize];
        choice.open = false;
        self.open -= 1;
        let Choice { first_planned, first_token, last_token, .. } = *choice;
        let between = |from: Option<Instant>, to: Option<Instant>| Some(to? - from?);
        metrics.finished(Finished {
            end,
            prompt_tokens: self.request.prompt.len() as u32,
            generated_tokens: choice.output.len() as u32,
            total: now - self.arrived,
            queued: between(Some(self.arrived), first_planned),
            prefill: between(first_planned, first_token),
            decode: between(first_token, last_token),
        });
        if self.open == 0 {
            let longest = self.choices.iter().map(|choice| choice.output.len()).max();
            metrics.request_ended(longest.expect("at least one choice") as u32);
        }
    }
}

impl Choice {
    /// The hash of the page that the last token of the output completes, if it does.
    fn completed_page(&mut self, prompt: &[TokenId]) -> Option<PageHash> {
        let parent = self.page_hash?;
        let length = prompt.len() + self.output.len();
        if !length.is_multiple_of(PAGE_TOKENS as usize) {
            return None;
        }
        let first = length - PAGE_TOKENS as usize;
        let tokens = prompt.iter().chain(&self.output).skip(first).copied();
        let hash = parent.child(&tokens.collect::<Vec<_>>());
        self.page_hash = Some(hash);
        Some(hash)
    }
}

/// The first choice has the request's seed; the others have seeds derived from it.
fn choice_sampling(sampling: &Arc<SamplingParams>, choice: u32) -> Arc<SamplingParams> {
    if choice == 0 {
        return Arc::clone(sampling);
    }
    let seed = choice_seed(sampling.seed, choice);
    Arc::new(SamplingParams { seed, ..(**sampling).clone() })
}

/// SplitMix64's output function over an arithmetic sequence.
pub fn choice_seed(seed: u64, choice: u32) -> u64 {
    let mut z = seed.wrapping_add(u64::from(choice).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
