//! One HTTP request as it runs: several prompts, several choices each. Enters: admitted requests. Leaves: pieces of
//! text, in the order in which they come, and the usage. Dropping it cancels what still runs.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::batch::TokenLogprob;
use crate::http::openai::Usage;
use crate::request::{Event, FinishReason, Request};
use crate::step::RequestStream;
use crate::stream::{Delta, TextStream};
use crate::tokenizer::Tokenizer;

/// What happened to one choice. Choices are numbered over all prompts.
#[derive(Debug, PartialEq)]
pub enum Piece {
    /// Only where the prompt's log-probabilities were asked for.
    Prompt {
        choice: usize,
        logprobs: Vec<TokenLogprob>,
    },
    Text {
        choice: usize,
        delta: Delta,
    },
    /// The choice's last words.
    End {
        choice: usize,
        delta: Delta,
        reason: FinishReason,
    },
    /// Terminal for the whole request, and our fault.
    Failed {
        message: String,
    },
}

pub struct Generation {
    /// One per prompt.
    streams: Vec<RequestStream>,
    /// Prompt-major.
    choices: Vec<Choice>,
    choices_per_prompt: usize,
    tokenizer: Arc<Tokenizer>,
    /// The client asked for the prompt alone: the one token that ran is not shown.
    prompt_only: bool,
    usage: Usage,
    /// The stream to ask first, so that none waits behind a busy one.
    first: usize,
    failed: bool,
}

struct Choice {
    text: TextStream,
    ended: bool,
}

impl Generation {
    /// `requests` with their streams, all with the same number of choices.
    pub fn new(
        started: Vec<(Request, RequestStream)>,
        stop_strings: &Arc<[String]>,
        tokenizer: Arc<Tokenizer>,
        prompt_only: bool,
    ) -> Generation {
        let choices_per_prompt = started.first().map_or(0, |(request, _)| request.choices as usize);
        let choices = (0..choices_per_prompt * started.len())
            .map(|_| Choice { text: TextStream::new(stop_strings.clone()), ended: false })
            .collect();
        let prompt_tokens = started.iter().map(|(request, _)| request.prompt.len() as u64).sum();
        Generation {
            streams: started.into_iter().map(|(_, stream)| stream).collect(),
            choices,
            choices_per_prompt,
            tokenizer,
            prompt_only,
            usage: Usage { prompt_tokens, total_tokens: prompt_tokens, ..Usage::default() },
            first: 0,
            failed: false,
        }
    }

    pub fn choices(&self) -> usize {
        self.choices.len()
    }

    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// The next piece; None when every choice has ended.
    pub async fn next(&mut self) -> Option<Piece> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    pub fn poll_next(&mut self, cx: &mut Context) -> Poll<Option<Piece>> {
        loop {
            if self.failed || self.choices.iter().all(|choice| choice.ended) {
                return Poll::Ready(None);
            }
            let Poll::Ready((prompt, event)) = self.poll_event(cx) else { return Poll::Pending };
            if let Some(piece) = self.take(prompt, event) {
                return Poll::Ready(Some(piece));
            }
        }
    }

    /// An event of any prompt that has choices left.
    fn poll_event(&mut self, cx: &mut Context) -> Poll<(usize, Option<Event>)> {
        let prompts = self.streams.len();
        for prompt in (0..prompts).map(|i| (self.first + i) % prompts) {
            let mut choices = self.choices[self.of(prompt)].iter();
            if choices.all(|choice| choice.ended) {
                continue;
            }
            // A stream's `next` keeps nothing between polls, so a new future each time loses no event.
            let next = pin!(self.streams[prompt].next());
            if let Poll::Ready(event) = next.poll(cx) {
                self.first = (prompt + 1) % prompts;
                return Poll::Ready((prompt, event));
            }
        }
        Poll::Pending
    }

    /// Choices of a prompt.
    fn of(&self, prompt: usize) -> std::ops::Range<usize> {
        prompt * self.choices_per_prompt..(prompt + 1) * self.choices_per_prompt
    }

    /// Applies an event; None where it shows nothing.
    fn take(&mut self, prompt: usize, event: Option<Event>) -> Option<Piece> {
        let first_choice = self.of(prompt).start;
        match event {
            Some(Event::Prompt { choice, cached_tokens, logprobs }) => {
                if choice == 0 {
                    let details = &mut self.usage.prompt_tokens_details;
                    details.cached_tokens += u64::from(cached_tokens);
                }
                let choice = first_choice + choice as usize;
                (!logprobs.is_empty()).then_some(Piece::Prompt { choice, logprobs })
            }
            Some(Event::Token { .. }) if self.prompt_only => None,
            Some(Event::Token { choice: within, token, logprob }) => {
                self.count_token();
                let choice = first_choice + within as usize;
                let bytes = self.tokenizer.visible_bytes(token);
                let state = &mut self.choices[choice];
                if state.ended {
                    return None;
                }
                let delta = state.text.push(bytes, logprob);
                if delta.stopped {
                    state.ended = true;
                    self.streams[prompt].finish_choice(within);
                    return Some(Piece::End { choice, delta, reason: FinishReason::Stop });
                }
                let shows = !delta.text.is_empty() || !delta.logprobs.is_empty();
                shows.then_some(Piece::Text { choice, delta })
            }
            Some(Event::Finished { choice, reason }) => {
                self.finish(first_choice + choice as usize, reason)
            }
            Some(Event::Failed { message, .. }) => self.fail(message),
            None => self.fail("the engine stopped before the request was finished".to_owned()),
        }
    }

    fn finish(&mut self, choice: usize, reason: FinishReason) -> Option<Piece> {
        let state = &mut self.choices[choice];
        if std::mem::replace(&mut state.ended, true) {
            return None;
        }
        if self.prompt_only {
            let reason = FinishReason::Length;
            return Some(Piece::End { choice, delta: Delta::default(), reason });
        }
        let delta = state.text.end();
        if reason == FinishReason::Stop {
            // The stop token was sampled too.
            self.count_token();
        }
        let reason = if delta.stopped { FinishReason::Stop } else { reason };
        Some(Piece::End { choice, delta, reason })
    }

    fn fail(&mut self, message: String) -> Option<Piece> {
        self.failed = true;
        Some(Piece::Failed { message })
    }

    fn count_token(&mut self) {
        self.usage.completion_tokens += 1;
        self.usage.total_tokens += 1;
    }
}
