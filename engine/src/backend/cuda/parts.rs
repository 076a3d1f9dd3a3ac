//! A step taken apart: each kernel timed by itself, launched as the engine launches it, on its own weights and pages,
//! layer after layer in one recorded graph. Enters: the shape of a step. Leaves: seconds of a launch. Only a bench asks.

use std::sync::Arc;

use plimsoll_contract::abilities::PAGE_TOKENS;
use plimsoll_kernels::device::DeviceError;
use plimsoll_kernels::layout::PANEL;
use plimsoll_kernels::ops::weights::{Random, Weights};

use super::CudaBackend;
use super::forward::{Forward, HeadInput, PRODUCTS, PRODUCTS_AHEAD, Rows};
use super::record::{Ways, bucket};
use crate::backend::{Backend, BackendError};
use crate::batch::{
    AdapterIndex, PageId, RowInput, SamplingParams, SequenceId, Slot, SlotStart, Span, Step,
    StepNumber, TokenId,
};

/// A step to be taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// One new row for each of so many sequences, which have `context` tokens in the cache.
    Decode { rows: usize, context: usize },
    /// One whole prompt.
    Prompt { tokens: usize },
}

impl StepKind {
    /// Of each sequence, the new rows included.
    fn sequence_tokens(self) -> usize {
        match self {
            StepKind::Decode { context, .. } => context + 1,
            StepKind::Prompt { tokens } => tokens,
        }
    }

    fn sequences(self) -> usize {
        match self {
            StepKind::Decode { rows, .. } => rows,
            StepKind::Prompt { .. } => 1,
        }
    }

    /// Pages that it needs.
    pub fn pages(self) -> usize {
        self.sequences() * self.sequence_tokens().div_ceil(PAGE_TOKENS as usize)
    }
}

/// A kernel in its place in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it, as one graph.
    Step,
    Embed,
    Qkv,
    /// RoPE and the writing of pages, where attention does not do it itself.
    RopeKv,
    Attention,
    Output,
    GateUp,
    Down,
    /// With the largest logit of each tile alone, as greedy rows need it.
    Head,
    /// With all logits.
    HeadLogits,
    Greedy,
    /// As temperature, top-k and top-p ask for.
    Sample,
}

impl Part {
    pub fn name(self) -> &'static str {
        match self {
            Part::Step => "whole step",
            Part::Embed => "embedding",
            Part::Qkv => "qkv",
            Part::RopeKv => "RoPE, pages",
            Part::Attention => "attention",
            Part::Output => "output",
            Part::GateUp => "gate and up",
            Part::Down => "down",
            Part::Head => "head, greedy",
            Part::HeadLogits => "head, logits",
            Part::Greedy => "sampling, greedy",
            Part::Sample => "sampling",
        }
    }

    /// Whether every layer has it.
    pub fn is_of_a_layer(self) -> bool {
        use Part::{Attention, Down, GateUp, Output, Qkv, RopeKv};
        matches!(self, Qkv | RopeKv | Attention | Output | GateUp | Down)
    }

    /// The parts of a step, what must leave good numbers for the others first.
    pub fn of(step: StepKind) -> &'static [Part] {
        use Part::{
            Attention, Down, Embed, GateUp, Greedy, Head, HeadLogits, Output, Qkv, RopeKv, Sample,
            Step,
        };
        match step {
            StepKind::Decode { .. } => &[
                Step, HeadLogits, Sample, Head, Greedy, Embed, Qkv, Attention, Output, GateUp, Down,
            ],
            StepKind::Prompt { .. } => &[Step, Embed, Qkv, RopeKv, Attention, Output, GateUp, Down],
        }
    }
}

/// Launches in a graph of a part that a step has but once.
const LAUNCHES: usize = 16;
/// How long a part is measured, and how often anew: the median counts.
const SECONDS: f64 = 0.01;
const ROUNDS: usize = 5;
const REPEATS_MAX: f64 = 400.0;

/// As the seed method samples.
const SAMPLING: (f32, f32, u32) = (0.7, 0.9, 50);

impl CudaBackend {
    /// Random numbers in all pages: zeros would be easier on the card.
    pub fn fill_pages(&self) -> Result<(), DeviceError> {
        let weights = Weights::load(&self.device)?;
        let noise = Random {
            to: self.pages.pointer(),
            rows: self.pages.bytes() / 2 / PANEL,
            columns: PANEL,
            panels: 1,
            mean: 0.0,
            deviation: 1.0,
            seed: 2,
        };
        // SAFETY: pages are whole panels of 64 rows, and these are all of them.
        unsafe { weights.random(&self.device, &noise) }?;
        self.device.synchronize()
    }

    /// Seconds of one launch of each part.
    pub fn time_parts(&mut self, step: StepKind) -> Result<Vec<(Part, f64)>, BackendError> {
        let rows = self.prepare(step)?;
        let timed = Part::of(step).iter().map(|&part| Ok((part, self.time_part(part, rows)?)));
        let timed: Result<Vec<(Part, f64)>, DeviceError> = timed.collect();
        let timed = timed.map_err(|error| BackendError::DeviceLost(error.to_string()))?;
        // What left numbers that are not finite would fail here.
        self.prepare(step)?;
        Ok(timed)
    }

    /// Takes the step as the loop would, after which the device has its rows, tables and parameters.
    fn prepare(&mut self, step: StepKind) -> Result<Rows, BackendError> {
        let number = StepNumber(u64::from(self.epoch) + 1);
        let spans = (0..step.sequences()).map(|slot| span(step, slot)).collect();
        let ticket = self.submit(Step { number, copies: Vec::new(), spans })?;
        self.collect(ticket)?;
        Ok(match step {
            StepKind::Decode { rows, .. } => {
                let singles = bucket(rows).min(self.step.rows_max());
                Rows { singles, prefill: 0, cuts: 0 }
            }
            StepKind::Prompt { tokens } => {
                Rows { singles: 0, prefill: tokens, cuts: self.draft.spans.len() }
            }
        })
    }

    fn time_part(&self, part: Part, rows: Rows) -> Result<f64, DeviceError> {
        // Alone, a product is followed by its like in the next layer.
        let ahead = if part == Part::Step { PRODUCTS_AHEAD } else { PRODUCTS };
        let forward = Forward { ahead, ..self.forward() };
        let launches = match part {
            Part::Step => 1,
            part if part.is_of_a_layer() => self.shape.layers,
            _ => LAUNCHES,
        };
        let queue = || (0..launches).try_for_each(|index| forward.part(part, index, rows));
        let graph = self.device.record(queue)?;
        let replay = |_| self.device.replay(&graph);
        let once = self.device.seconds_each(1, 1, replay)?;
        let repeats = (SECONDS / once).clamp(1.0, REPEATS_MAX) as usize;
        let rounds = (0..ROUNDS).map(|_| self.device.seconds_each(0, repeats, replay));
        let mut seconds: Vec<f64> = rounds.collect::<Result<_, _>>()?;
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[ROUNDS / 2] / launches as f64)
    }
}

impl Forward<'_> {
    /// One kernel of a layer, or one of those that a step has once.
    fn part(&self, part: Part, index: usize, rows: Rows) -> Result<(), DeviceError> {
        let (all, head) = (rows.all(), HeadInput::Rows(rows.singles));
        match part {
            Part::Step => self.whole(rows),
            Part::Embed => self.embed(all),
            Part::Qkv => self.qkv(index, all),
            Part::RopeKv => self.kernels.rope_kv(self.device, rows, &self.attention(index)),
            Part::Attention if rows.prefill > 0 => {
                self.kernels.attend_longer(self.device, rows, &self.attention(index))
            }
            Part::Attention => {
                self.kernels.attend_singles(self.device, rows, &self.attention(index))
            }
            Part::Output => self.output(index, all),
            Part::GateUp => self.gate_up(index, all),
            Part::Down => self.down(index, all),
            Part::Head => self.head(head, Ways::Greedy),
            Part::HeadLogits => self.head(head, Ways::Logits),
            Part::Greedy => self.sample(rows.singles, Ways::Greedy),
            Part::Sample => self.sample(rows.singles, Ways::Logits),
        }
    }

    /// A decode step as it is recorded for greedy rows, or a prompt's layers.
    fn whole(&self, rows: Rows) -> Result<(), DeviceError> {
        self.layers(rows)?;
        if rows.singles == 0 {
            return Ok(());
        }
        self.head(HeadInput::Rows(rows.singles), Ways::Greedy)?;
        self.sample(rows.singles, Ways::Greedy)
    }
}

/// What the step has of the sequence in a slot: pages of its own, one behind the other.
fn span(step: StepKind, slot: usize) -> Span {
    let tokens = step.sequence_tokens();
    let (position, inputs) = match step {
        StepKind::Decode { context, .. } => (context, vec![RowInput::Token(token(slot, context))]),
        StepKind::Prompt { tokens } => {
            (0, (0..tokens).map(|at| RowInput::Token(token(slot, at))).collect())
        }
    };
    let pages = tokens.div_ceil(PAGE_TOKENS as usize);
    let table = (slot * pages..(slot + 1) * pages).map(|page| PageId(page as u32)).collect();
    let (temperature, top_p, top_k) = SAMPLING;
    let seed = slot as u64;
    let sampling = SamplingParams { temperature, top_p, top_k, seed, ..SamplingParams::default() };
    let prompt: Arc<[TokenId]> = vec![0; tokens].into();
    Span {
        sequence: SequenceId(slot as u64 + 1),
        slot: Slot(slot as u32),
        start: Some(SlotStart {
            prompt_tokens: prompt.len(),
            tokens: prompt,
            sampling: Arc::new(sampling),
        }),
        position: position as u32,
        inputs,
        tables: vec![table],
        adapter: AdapterIndex::BASE,
        sample: true,
        prompt_logprobs: false,
    }
}

/// Some token: a different one for each slot and position.
fn token(slot: usize, position: usize) -> TokenId {
    ((slot * 7919 + position * 104_729 + 17) % 100_000) as TokenId
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::check::{Bounds, SlotUse, check};

    #[test]
    fn every_step_that_is_taken_apart_is_one_that_a_backend_takes() {
        let steps = [
            StepKind::Decode { rows: 1, context: 128 },
            StepKind::Decode { rows: 256, context: 1024 },
            StepKind::Decode { rows: 3, context: 63 },
            StepKind::Prompt { tokens: 513 },
        ];
        for kind in steps {
            let bounds = Bounds {
                slots: kind.sequences(),
                pages: kind.pages() as u32,
                vocabulary: 128_256,
                hidden: 64,
            };
            let spans = (0..kind.sequences()).map(|slot| span(kind, slot)).collect();
            let step = Step { number: StepNumber(1), copies: Vec::new(), spans };
            assert_eq!(check(bounds, &step, |_| SlotUse::default()), Ok(()), "{kind:?}");
            let few = Bounds { pages: bounds.pages - 1, ..bounds };
            assert!(
                check(few, &step, |_| SlotUse::default()).is_err(),
                "{kind:?}: a page too many"
            );
        }
    }
}
