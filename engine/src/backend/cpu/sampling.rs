//! From a row of logits to what a step reports: the drawn token, its log-probability and rank. The mathematics is the
//! kernels' reference; here is what a slot remembers between steps. A draw depends on logits, seed and position alone.

use std::collections::HashMap;
use std::sync::Arc;

use plimsoll_kernels::reference::random;
use plimsoll_kernels::reference::sampling::{
    Penalties, Sampling, Seen, add_bias, argmax, penalize, sample, top,
};
use plimsoll_kernels::reference::softmax::log_sum_exp;

use crate::batch::{SampledToken, SamplingParams, SlotStart, TokenId, TokenLogprob};

/// What a slot holds between the steps of one sequence.
#[derive(Debug)]
pub struct SlotState {
    pub tokens: Arc<[TokenId]>,
    pub prompt_tokens: usize,
    pub sampling: Arc<SamplingParams>,
    /// What [`RowInput::Sampled`](crate::batch::RowInput) stands for.
    pub last: Option<TokenId>,
    /// Kept only where penalties ask for it.
    seen: Option<SeenTokens>,
}

/// Distinct tokens of prompt and output with their counts.
#[derive(Debug, Default)]
struct SeenTokens {
    entries: Vec<Seen>,
    index: HashMap<TokenId, usize>,
}

impl SeenTokens {
    fn add(&mut self, token: TokenId, generated: u32) {
        let next = self.entries.len();
        let at = *self.index.entry(token).or_insert(next);
        if at == next {
            self.entries.push(Seen { token, generated });
        } else {
            self.entries[at].generated += generated;
        }
    }
}

impl SlotState {
    pub fn new(start: SlotStart) -> SlotState {
        let SlotStart { tokens, prompt_tokens, sampling } = start;
        let seen = (penalties(&sampling) != Penalties::OFF).then(|| {
            let mut seen = SeenTokens::default();
            for (i, &token) in tokens.iter().enumerate() {
                seen.add(token, u32::from(i >= prompt_tokens));
            }
            seen
        });
        SlotState { tokens, prompt_tokens, sampling, last: None, seen }
    }

    /// The prompt token at `position`, if the prompt is that long.
    pub fn prompt_token(&self, position: usize) -> Option<TokenId> {
        self.tokens[..self.prompt_tokens].get(position).copied()
    }

    /// Draws the token for `position` and remembers it. `logits` is overwritten by penalties and bias. None if there is
    /// no number among the logits.
    pub fn draw(&mut self, logits: &mut [f32], position: usize) -> Option<SampledToken> {
        let params = &self.sampling;
        // The model's own distribution is reported, so it is read before anything changes the logits.
        let model = match params.logprobs {
            Some(alternatives) => Some(Model::of(logits, alternatives)?),
            None => None,
        };
        let raw = model.as_ref().map(|_| logits.to_vec());
        if let Some(seen) = &self.seen {
            penalize(logits, &seen.entries, &penalties(params));
        }
        add_bias(logits, &params.logit_bias);
        let token = if params.temperature == 0.0 {
            argmax(logits)
        } else {
            sample(logits, &cut(params), random::bits(params.seed, position as u64))
        }?;
        self.last = Some(token);
        if let Some(seen) = &mut self.seen {
            seen.add(token, 1);
        }
        let logprob = model.zip(raw).map(|(model, raw)| model.report(&raw, token));
        Some(SampledToken { token, logprob })
    }
}

/// The log-probability of a prompt token under the logits of the row before it. None as above.
pub fn prompt_logprob(logits: &[f32], token: TokenId, alternatives: u32) -> Option<TokenLogprob> {
    Some(Model::of(logits, alternatives)?.report(logits, token))
}

/// One row's own distribution.
struct Model {
    log_sum: f64,
    top: Vec<TokenId>,
}

impl Model {
    /// None unless the largest logit is a finite number.
    fn of(logits: &[f32], alternatives: u32) -> Option<Model> {
        argmax(logits).filter(|&best| logits[best as usize].is_finite())?;
        let count = (alternatives as usize).min(logits.len());
        Some(Model {
            log_sum: log_sum_exp(logits),
            top: if count == 0 { Vec::new() } else { top(logits, count) },
        })
    }

    fn report(self, logits: &[f32], token: TokenId) -> TokenLogprob {
        let logprob = |token: TokenId| (f64::from(logits[token as usize]) - self.log_sum) as f32;
        TokenLogprob {
            token,
            logprob: logprob(token),
            rank: rank(logits, token),
            top: self.top.iter().map(|&token| (token, logprob(token))).collect(),
        }
    }
}

/// 1 for the most likely token; equal logits rank by id.
fn rank(logits: &[f32], token: TokenId) -> u32 {
    let own = logits[token as usize];
    let before =
        |&(id, &logit): &(usize, &f32)| logit > own || (logit == own && id < token as usize);
    1 + logits.iter().enumerate().filter(before).count() as u32
}

fn penalties(params: &SamplingParams) -> Penalties {
    Penalties {
        repetition: params.repetition_penalty,
        presence: params.presence_penalty,
        frequency: params.frequency_penalty,
    }
}

fn cut(params: &SamplingParams) -> Sampling {
    Sampling {
        temperature: params.temperature,
        top_k: params.top_k as usize,
        top_p: params.top_p,
        min_p: params.min_p,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(sampling: SamplingParams, tokens: &[TokenId], prompt_tokens: usize) -> SlotState {
        SlotState::new(SlotStart {
            tokens: tokens.into(),
            prompt_tokens,
            sampling: Arc::new(sampling),
        })
    }

    #[test]
    fn the_reported_distribution_is_the_models_own_whatever_bias_chose() {
        let params = SamplingParams {
            temperature: 0.0,
            logit_bias: vec![(2, 100.0)],
            logprobs: Some(2),
            ..SamplingParams::default()
        };
        let third = (1.0f32 / 3.0).ln();
        let sampled = slot(params, &[0], 1)
            .draw(&mut [third, third, third, f32::NEG_INFINITY], 1)
            .expect("finite logits");
        let logprob = sampled.logprob.expect("it was asked for");
        assert_eq!((sampled.token, logprob.rank), (2, 3));
        assert!((logprob.logprob - third).abs() < 1e-6);
        assert_eq!(logprob.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn a_slot_restarted_after_preemption_counts_what_was_generated_before() {
        let params = SamplingParams {
            temperature: 0.0,
            frequency_penalty: 1.0,
            ..SamplingParams::default()
        };
        let logits = [1.0, 0.5];
        let mut fresh = slot(params.clone(), &[0], 1);
        assert_eq!(fresh.draw(&mut logits.clone(), 1).map(|s| s.token), Some(0));
        assert_eq!(fresh.draw(&mut logits.clone(), 2).map(|s| s.token), Some(1));
        let mut again = slot(params, &[0, 0], 1);
        assert_eq!(again.draw(&mut logits.clone(), 2).map(|s| s.token), Some(1));
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_and_nothing_else() {
        let params = SamplingParams { seed: 7, ..SamplingParams::default() };
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 * 0.3).collect();
        let draw = |slot: &mut SlotState, position| {
            slot.draw(&mut logits.clone(), position).map(|s| s.token)
        };
        let mut long = slot(params.clone(), &[1, 2], 2);
        let tokens: Vec<_> = (2..40).map(|position| draw(&mut long, position)).collect();
        assert_eq!(draw(&mut slot(params, &[9], 1), 20), tokens[18]);
        assert!(tokens.iter().any(|token| *token != tokens[0]), "positions differ");
    }

    #[test]
    fn logits_without_a_number_draw_nothing() {
        assert!(slot(SamplingParams::default(), &[0], 1).draw(&mut [f32::NAN; 3], 1).is_none());
    }
}
