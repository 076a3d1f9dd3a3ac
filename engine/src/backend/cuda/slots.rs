//! What the host remembers of each slot: its sequence's tokens, how it samples, and whether it has sampled. The device
//! holds the same as numbers; this file turns one into the other. Pure but for the two buffers it owns.

use std::sync::Arc;

use plimsoll_kernels::device::{Buffer, Device, DeviceError};
use plimsoll_kernels::ops::sampling::{
    BIASES_MAX, Bias, Sampling, SeenArguments, SlotParameters, seen_stride,
};

use super::record::Ways;
use super::shape::{Shape, StepShape};
use crate::backend::check::SlotUse;
use crate::batch::{SamplingParams, SlotStart, TokenId};

#[derive(Debug)]
struct Slot {
    tokens: Arc<[TokenId]>,
    prompt_tokens: usize,
    sampling: Arc<SamplingParams>,
    sampled: bool,
}

#[derive(Debug)]
pub struct Slots {
    states: Vec<Option<Slot>>,
    parameters: Vec<SlotParameters>,
    /// Whether the device has `parameters` as they are.
    sent: bool,
    /// Each slot's last token. `[running_max]` i32
    pub last_tokens: Buffer,
    /// How often each token was seen. `[running_max, vocabulary_stored]` u16
    pub seen: Buffer,
    /// `[running_max, BIASES_MAX]`
    pub biases: Buffer,
    /// A sequence's tokens, on their way into `seen`. `[context_tokens]` i32
    history: Buffer,
    vocabulary: usize,
}

/// Bytes of the device's side.
pub fn bytes(shape: &Shape, step: &StepShape) -> usize {
    let slots = step.running_max;
    slots * (4 + seen_stride(shape.vocabulary) * 2 + BIASES_MAX * size_of::<Bias>())
        + step.context_tokens * 4
}

impl Slots {
    pub fn allocate(
        device: &Device,
        shape: &Shape,
        step: &StepShape,
    ) -> Result<Slots, DeviceError> {
        let slots = step.running_max;
        let stored = seen_stride(shape.vocabulary);
        Ok(Slots {
            states: (0..slots).map(|_| None).collect(),
            parameters: vec![SlotParameters::GREEDY; slots],
            sent: false,
            last_tokens: device.zeroed(slots * 4, "last tokens")?,
            seen: device.zeroed(slots * stored * 2, "counts of seen tokens")?,
            biases: device.zeroed(slots * BIASES_MAX * size_of::<Bias>(), "logit biases")?,
            history: device.zeroed(step.context_tokens * 4, "a sequence's tokens")?,
            vocabulary: shape.vocabulary,
        })
    }

    pub fn usage(&self, slot: usize) -> SlotUse {
        let state = self.states[slot].as_ref();
        SlotUse { started: state.is_some(), sampled: state.is_some_and(|state| state.sampled) }
    }

    /// A sequence begins, or begins again. Penalties and biases are rare and wait for the device; the rest travels with
    /// the step.
    pub fn start(
        &mut self,
        device: &Device,
        kernels: &Sampling,
        slot: usize,
        start: SlotStart,
    ) -> Result<(), DeviceError> {
        let SlotStart { tokens, prompt_tokens, sampling } = start;
        let parameters = parameters(&sampling);
        if parameters.penalised != 0 {
            let history: Vec<i32> = tokens.iter().map(|token| token.cast_signed()).collect();
            device.upload(self.history.pointer(), &history)?;
            let arguments = SeenArguments {
                seen: self.seen.pointer(),
                tokens: self.history.pointer(),
                seen_stride: seen_stride(self.vocabulary) as i64,
                slot: slot as i32,
                count: tokens.len() as i32,
                prompt_tokens: prompt_tokens as i32,
                vocabulary: self.vocabulary as i32,
            };
            kernels.start(device, &arguments)?;
            // The history is written again by the next.
            device.synchronize()?;
        }
        if !sampling.logit_bias.is_empty() {
            let mut biases: Vec<Bias> =
                sampling.logit_bias.iter().map(|&(token, bias)| Bias { token, bias }).collect();
            biases.sort_by_key(|bias| bias.token);
            let to = self.biases.pointer::<Bias>().add(slot * BIASES_MAX);
            device.upload(to, &biases)?;
        }
        self.parameters[slot] = parameters;
        self.sent = false;
        self.states[slot] = Some(Slot { tokens, prompt_tokens, sampling, sampled: false });
        Ok(())
    }

    /// Every slot's parameters, if the device does not have them yet.
    pub fn unsent_parameters(&mut self) -> &[SlotParameters] {
        if std::mem::replace(&mut self.sent, true) { &[] } else { &self.parameters }
    }

    pub fn note_sampled(&mut self, slot: usize) {
        self.state_mut(slot).sampled = true;
    }

    /// The prompt token at `position`, if the prompt is that long.
    pub fn prompt_token(&self, slot: usize, position: usize) -> Option<TokenId> {
        let state = self.state(slot);
        state.tokens[..state.prompt_tokens].get(position).copied()
    }

    pub fn prompt_alternatives(&self, slot: usize) -> u32 {
        self.state(slot).sampling.prompt_logprobs.unwrap_or(0)
    }

    pub fn reports(&self, slot: usize) -> bool {
        self.state(slot).sampling.logprobs.is_some()
    }

    /// What the head must leave for this slot.
    pub fn ways(&self, slot: usize) -> Ways {
        let SlotParameters { scale, penalised, biases, alternatives, .. } = self.parameters[slot];
        if alternatives >= 0 {
            Ways::Reported
        } else if scale != 0.0 || penalised != 0 || biases > 0 {
            Ways::Logits
        } else {
            Ways::Greedy
        }
    }

    fn state(&self, slot: usize) -> &Slot {
        self.states[slot].as_ref().expect("the step was checked")
    }

    fn state_mut(&mut self, slot: usize) -> &mut Slot {
        self.states[slot].as_mut().expect("the step was checked")
    }
}

/// A request's way of sampling, as the device reads it.
fn parameters(sampling: &SamplingParams) -> SlotParameters {
    let SamplingParams {
        temperature,
        top_p,
        top_k,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        ref logit_bias,
        seed,
        logprobs,
        prompt_logprobs: _,
    } = *sampling;
    assert!(logit_bias.len() <= BIASES_MAX, "admission bounds a request's biases");
    let penalised =
        repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0;
    SlotParameters {
        scale: SlotParameters::scale_of(temperature),
        floor: SlotParameters::floor_of(temperature, min_p),
        top_p,
        top_k,
        repetition: repetition_penalty,
        presence: presence_penalty,
        frequency: frequency_penalty,
        penalised: i32::from(penalised),
        biases: logit_bias.len() as i32,
        alternatives: logprobs.map_or(-1, |count| count as i32),
        seed,
    }
}
