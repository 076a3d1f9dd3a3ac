//! The bounds of the engine, and what they mean for a request at the door.

use plimsoll_contract::abilities::PAGE_TOKENS;

use crate::kv_cache::pages_of;
use crate::request::Refusal;

/// Every bound of scheduler and step loop, fixed at start.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Sequences that run at a time.
    pub running_max: usize,
    /// Requests of which no choice has begun.
    pub waiting_max: usize,
    /// Rows in one step.
    pub step_tokens_max: u32,
    /// Prompt and output of one sequence.
    pub context_tokens: u32,
    /// Pages per layer group.
    pub kv_pages: Vec<u32>,
    /// 1 or 2.
    pub steps_in_flight: usize,
    /// Whether prompts may reuse what others have computed.
    pub prefix_reuse: bool,
}

/// The size of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    pub prompt_tokens: u32,
    /// Per choice.
    pub output_tokens_max: u32,
    pub choices: u32,
}

impl Limits {
    pub(super) fn check(&self) {
        assert!(self.running_max > 0, "running_max is at least 1");
        assert!(self.waiting_max > 0, "waiting_max is at least 1");
        assert!(self.step_tokens_max > 0, "step_tokens_max is at least 1");
        assert!(matches!(self.steps_in_flight, 1 | 2), "one or two steps in flight");
        assert!(self.kv_pages.iter().all(|&pages| pages > 0), "every layer group has pages");
    }

    /// Why a request is not taken, if so. Choices can run one after the other, so one alone must fit.
    pub fn refusal(
        &self,
        ask: Ask,
        waiting_requests: usize,
        retry_after_seconds: u64,
    ) -> Option<Refusal> {
        assert!(ask.prompt_tokens > 0, "a prompt has at least one token");
        assert!(ask.output_tokens_max > 0 && ask.choices > 0, "a request wants something");
        let pages = self.kv_pages.iter().copied().min().expect("at least one layer group");
        let never_fits = |limit_name, limit| {
            Some(Refusal::NeverFits {
                prompt_tokens: u64::from(ask.prompt_tokens),
                output_tokens_max: u64::from(ask.output_tokens_max),
                limit_name,
                limit,
            })
        };
        let tokens = u64::from(ask.prompt_tokens) + u64::from(ask.output_tokens_max);
        if tokens > u64::from(self.context_tokens) {
            return never_fits("the context length", u64::from(self.context_tokens));
        }
        // The last token is never computed, so it needs no place.
        let places = u32::try_from(tokens - 1).expect("context_tokens is 32 bits wide");
        if pages_of(places) > pages as usize {
            return never_fits("the KV cache", u64::from(pages) * u64::from(PAGE_TOKENS));
        }
        if waiting_requests >= self.waiting_max {
            return Some(Refusal::QueueFull { waiting: waiting_requests, retry_after_seconds });
        }
        None
    }
}
