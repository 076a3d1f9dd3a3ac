//! The door of the engine. Enter: typed parameters of a request, its prompt as tokens, and what the model can take.
//! Leaves: a [`Request`] that cannot be wrong, or a refusal. Pure: no HTTP, no clock; chance comes in as a seed.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::batch::{AdapterIndex, SamplingParams, TokenId};
use crate::request::{PrefixSalt, Refusal, Request, StopRules};

/// What requests are measured against.
#[derive(Clone, Debug)]
pub struct ModelLimits {
    /// Positions the model may use.
    pub context_tokens: u32,
    /// Tokens that the whole KV cache holds.
    pub kv_tokens: u64,
    pub vocabulary: u32,
    /// Tokens that end a turn, as the checkpoint says.
    pub eos: Arc<BTreeSet<TokenId>>,
}

impl ModelLimits {
    /// The longest sequence, prompt and output, and the limit's name.
    pub fn sequence_tokens_max(&self) -> (u64, &'static str) {
        let context = u64::from(self.context_tokens);
        if self.kv_tokens < context {
            (self.kv_tokens, "the KV cache")
        } else {
            (context, "the model's context")
        }
    }
}

/// How a prompt is to be continued, each value already within its range.
#[derive(Clone, Debug)]
pub struct Wish {
    pub choices: u32,
    pub sampling: SamplingParams,
    /// Absent: as many as fit. 0 asks for the prompt alone.
    pub output_tokens_max: Option<u32>,
    pub ignore_eos: bool,
    pub stop_token_ids: Vec<TokenId>,
    /// Keeps the cached prefixes of one tenant from others.
    pub cache_salt: Option<String>,
}

/// Joins a wish and a prompt.
pub fn admit(wish: &Wish, prompt: Vec<TokenId>, model: &ModelLimits) -> Result<Request, Refusal> {
    assert!(!prompt.is_empty(), "empty prompts are refused at the door");
    let prompt_tokens = prompt.len() as u64;
    let (limit, limit_name) = model.sequence_tokens_max();
    let room = limit.saturating_sub(prompt_tokens);
    let asked = match wish.output_tokens_max {
        Some(asked) => u64::from(asked.max(1)),
        None => room.max(1),
    };
    if asked > room {
        return Err(Refusal::NeverFits {
            prompt_tokens,
            output_tokens_max: asked,
            limit_name,
            limit,
        });
    }
    let mut stop_tokens = if wish.ignore_eos { BTreeSet::new() } else { (*model.eos).clone() };
    stop_tokens.extend(&wish.stop_token_ids);
    Ok(Request {
        prompt: prompt.into(),
        choices: wish.choices,
        sampling: Arc::new(wish.sampling.clone()),
        stop: StopRules {
            stop_tokens: Arc::new(stop_tokens),
            output_tokens_max: u32::try_from(asked).expect("below the context's length"),
        },
        salt: PrefixSalt { adapter: AdapterIndex::BASE, tenant: wish.cache_salt.clone() },
    })
}

/// Log-probabilities that one answer may carry: about 20 MB of JSON, and as much again while it is put together.
pub const REPORTED_LOGPROBS_MAX: u64 = 256 * 1024;

/// An answer that would hold more than a process of the planned size can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the answer could carry {asked} log-probabilities (choices times tokens times 1 + alternatives), and \
     {REPORTED_LOGPROBS_MAX} is the limit; lower n, max_tokens or the number of alternatives"
)]
pub struct AnswerTooLarge {
    asked: u64,
}

/// Bounds what the requests of one HTTP request report together, and tells it: every choice its output, and its prompt where that is
/// wanted, each token with its alternatives.
pub fn bound_answer(requests: &[Request]) -> Result<u64, AnswerTooLarge> {
    let reported = |request: &Request| {
        let each = |tokens: u64, alternatives: Option<u32>| {
            alternatives.map_or(0, |more| tokens.saturating_mul(1 + u64::from(more)))
        };
        let output = each(request.stop.output_tokens_max.into(), request.sampling.logprobs);
        let prompt = each(request.prompt.len() as u64, request.sampling.prompt_logprobs);
        u64::from(request.choices).saturating_mul(output.saturating_add(prompt))
    };
    let asked = requests.iter().map(reported).fold(0, u64::saturating_add);
    if asked > REPORTED_LOGPROBS_MAX { Err(AnswerTooLarge { asked }) } else { Ok(asked) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(context_tokens: u32, kv_tokens: u64) -> ModelLimits {
        ModelLimits { context_tokens, kv_tokens, vocabulary: 100, eos: Arc::new([2].into()) }
    }

    fn wish(output_tokens_max: Option<u32>) -> Wish {
        Wish {
            choices: 1,
            sampling: SamplingParams::default(),
            output_tokens_max,
            ignore_eos: false,
            stop_token_ids: vec![7],
            cache_salt: None,
        }
    }

    #[test]
    fn without_max_tokens_the_output_may_fill_what_is_left() {
        let request = admit(&wish(None), vec![1; 10], &model(64, 640)).unwrap();
        assert_eq!(request.stop.output_tokens_max, 54);
        let request = admit(&wish(None), vec![1; 10], &model(64, 32)).unwrap();
        assert_eq!(request.stop.output_tokens_max, 22);
    }

    #[test]
    fn what_can_never_fit_is_refused_with_the_limit_that_binds() {
        let refusal = admit(&wish(Some(55)), vec![1; 10], &model(64, 640)).unwrap_err();
        assert!(refusal.to_string().contains("the model's context is 64"), "{refusal}");
        let refusal = admit(&wish(Some(23)), vec![1; 10], &model(64, 32)).unwrap_err();
        assert!(refusal.to_string().contains("the KV cache is 32"), "{refusal}");
        assert!(admit(&wish(Some(54)), vec![1; 10], &model(64, 640)).is_ok());
        assert!(admit(&wish(None), vec![1; 64], &model(64, 640)).is_err());
        assert!(admit(&wish(None), vec![1; 65], &model(64, 640)).is_err());
    }

    #[test]
    fn ignoring_eos_leaves_the_clients_own_stop_tokens() {
        let request = admit(&wish(Some(1)), vec![1], &model(64, 64)).unwrap();
        assert_eq!(*request.stop.stop_tokens, [2, 7].into());
        let ignoring = Wish { ignore_eos: true, ..wish(Some(1)) };
        let request = admit(&ignoring, vec![1], &model(64, 64)).unwrap();
        assert_eq!(*request.stop.stop_tokens, [7].into());
    }

    #[test]
    fn a_wish_for_no_output_still_runs_one_token() {
        let request = admit(&wish(Some(0)), vec![1; 3], &model(64, 64)).unwrap();
        assert_eq!(request.stop.output_tokens_max, 1);
    }

    #[test]
    fn an_answer_of_millions_of_logprobs_is_refused_before_any_work() {
        let limits = model(4096, 1 << 20);
        let asking = |choices, logprobs| {
            let sampling =
                SamplingParams { logprobs, prompt_logprobs: logprobs, ..Default::default() };
            let wish = Wish { choices, sampling, ..wish(Some(1)) };
            admit(&wish, vec![1; 2040], &limits).unwrap()
        };
        assert!(bound_answer(&[asking(1, Some(20))]).is_ok());
        assert!(bound_answer(&[asking(128, None)]).is_ok());
        let refusal = bound_answer(&[asking(128, Some(20))]).unwrap_err();
        assert_eq!(refusal.asked, 128 * 2041 * 21);
        let many: Vec<Request> = (0..8).map(|_| asking(1, Some(20))).collect();
        assert!(bound_answer(&many).is_err(), "several prompts count together");
    }
}
