//! The backend that needs no device: layers and sampling on this machine's cores. A step is done when `submit`
//! returns; `collect` hands out the result. Enters: steps. Leaves: sampled tokens and log-probabilities. Never here:
//! requests, text, scheduling.

mod attention;
mod buffer;
mod forward;
mod load;
mod matrix;
mod ops;
mod pages;
mod sampling;
mod simd;

use std::collections::VecDeque;

use plimsoll_contract::abilities::Dtype;
use plimsoll_kernels::reference::attention::PageShape;
use rayon::prelude::*;

use self::attention::Rows;
use self::forward::Workspace;
use self::load::Loaded;
use self::pages::LayerPages;
use self::sampling::{SlotState, prompt_logprob};
use super::check::{Bounds, SlotUse, check};
use super::{Backend, BackendError, KvLayout, LayerGroup, LoadProgress, Ticket};
use crate::batch::{RowInput, Span, SpanOutput, Step, StepOutput, TokenId};
use crate::model::{Checkpoint, LoadError, Plan, Shard};

#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// Of weights and KV pages; activations are f32.
    pub dtype: Dtype,
    /// Pages of each layer group.
    pub kv_pages: Vec<u32>,
    /// Slots.
    pub running_max: u32,
    pub shard: Shard,
}

#[derive(Debug)]
pub struct CpuBackend {
    plan: Plan,
    loaded: Loaded,
    layout: KvLayout,
    page_shape: PageShape,
    /// One pool per layer; there is one layer group.
    pages: Vec<LayerPages>,
    pages_count: u32,
    slots: Vec<Option<SlotState>>,
    space: Workspace,
    done: VecDeque<StepOutput>,
    threads: rayon::ThreadPool,
}

impl CpuBackend {
    /// Reads and packs the weights and reserves the pages.
    pub fn load(
        checkpoint: &Checkpoint,
        options: CpuOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<CpuBackend, LoadError> {
        let CpuOptions { dtype, kv_pages, running_max, shard } = options;
        assert_eq!(kv_pages.len(), 1, "this backend has one layer group");
        assert_eq!(
            shard,
            Shard::WHOLE,
            "this backend holds whole models: nothing adds up partial sums"
        );
        let plan = checkpoint.plan.clone();
        let first = &plan.layers[0].attention;
        let page_shape = PageShape { kv_heads: first.kv_heads, head_dim: first.head_dim };
        let layout = KvLayout {
            groups: vec![LayerGroup { layers: (0..plan.layers.len()).collect() }],
            kv_heads: first.kv_heads,
            head_dim: first.head_dim,
            dtype,
        };
        let threads = rayon::ThreadPoolBuilder::new()
            .thread_name(|index| format!("compute-{index}"))
            .build()
            .map_err(|e| LoadError::OutOfDeviceMemory {
                purpose: "compute threads",
                bytes: 0,
                left: None,
                source: std::io::Error::other(e),
            })?;
        let loaded = load::load(checkpoint, dtype, shard, &threads, progress)?;
        let pages = plan.layers.iter().map(|_| LayerPages::zeroed(page_shape, kv_pages[0], dtype));
        Ok(CpuBackend {
            pages: pages.collect::<Result<_, _>>()?,
            pages_count: kv_pages[0],
            slots: (0..running_max).map(|_| None).collect(),
            plan,
            loaded,
            layout,
            page_shape,
            space: Workspace::default(),
            done: VecDeque::new(),
            threads,
        })
    }

    /// Threads that compute a step.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }
}

impl Backend for CpuBackend {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn submit(&mut self, step: Step) -> Result<Ticket, BackendError> {
        let number = step.number;
        let run = || -> Result<StepOutput, String> {
            check(self.bounds(), &step, |slot| self.slot_use(slot))?;
            Ok(StepOutput { number, spans: self.execute(step)? })
        };
        let output = run().map_err(|reason| BackendError::StepFailed { number, reason })?;
        self.done.push_back(output);
        Ok(Ticket(number))
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, BackendError> {
        match self.done.pop_front() {
            Some(output) if output.number == ticket.0 => Ok(output),
            other => Err(BackendError::StepFailed {
                number: ticket.0,
                reason: format!(
                    "collected out of order; next is {:?}",
                    other.map(|output| output.number)
                ),
            }),
        }
    }
}

/// A row whose logits are needed.
struct Wanted {
    span: usize,
    row: usize,
    what: What,
}

#[derive(Clone, Copy)]
enum What {
    /// Draw the token that follows.
    Sample { position: usize },
    /// Report how likely the prompt's next token is.
    Prompt { token: TokenId, alternatives: u32 },
}

/// What one wanted row brought, on its way back with the slot it borrowed.
enum Brought {
    Sampled(crate::batch::SampledToken, SlotState),
    Prompt(crate::batch::TokenLogprob),
}

impl CpuBackend {
    fn bounds(&self) -> Bounds {
        Bounds {
            slots: self.slots.len(),
            pages: self.pages_count,
            vocabulary: self.plan.vocabulary,
            hidden: self.plan.hidden,
        }
    }

    fn slot_use(&self, slot: usize) -> SlotUse {
        let state = self.slots[slot].as_ref();
        SlotUse { started: state.is_some(), sampled: state.is_some_and(|s| s.last.is_some()) }
    }

    fn execute(&mut self, step: Step) -> Result<Vec<SpanOutput>, String> {
        let Step { number: _, copies, mut spans } = step;
        for copy in copies {
            for pages in &mut self.pages {
                pages.copy(self.page_shape, copy.from, copy.to);
            }
        }
        for span in &mut spans {
            if let Some(start) = span.start.take() {
                self.slots[span.slot.0 as usize] = Some(SlotState::new(start));
            }
        }
        self.embed(&spans);
        let mut first = 0;
        let rows = spans.iter().map(|span| {
            let rows = Rows {
                first,
                count: span.inputs.len(),
                position: span.position as usize,
                table: &span.tables[0],
            };
            first += rows.count;
            rows
        });
        let rows: Vec<Rows> = rows.collect();
        let CpuBackend { plan, loaded, pages, space, threads, .. } = self;
        threads.install(|| forward::layers(plan, loaded, pages, &rows, space));
        let wanted = self.wanted(&spans, &rows);
        self.read_logits(&spans, &wanted)
    }

    /// Fills the residual stream.
    fn embed(&mut self, spans: &[Span]) {
        let hidden = self.plan.hidden;
        let inputs = spans.iter().flat_map(|span| span.inputs.iter().map(move |i| (span.slot, i)));
        self.space.x.resize(inputs.clone().count() * hidden, 0.0);
        for ((slot, input), x) in inputs.zip(self.space.x.chunks_exact_mut(hidden)) {
            match input {
                RowInput::Embedding(row) => x.copy_from_slice(row),
                RowInput::Token(token) => self.loaded.embedding.row(*token as usize, x),
                RowInput::Sampled => {
                    let state = self.slots[slot.0 as usize].as_ref();
                    let token = state.and_then(|state| state.last).expect("the step was checked");
                    self.loaded.embedding.row(token as usize, x);
                }
            }
        }
    }

    fn wanted(&self, spans: &[Span], rows: &[Rows]) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        for (index, (span, rows)) in spans.iter().zip(rows).enumerate() {
            let state = self.slots[span.slot.0 as usize].as_ref().expect("the step was checked");
            if span.prompt_logprobs {
                let alternatives = state.sampling.prompt_logprobs.unwrap_or(0);
                wanted.extend((0..rows.count).filter_map(|row| {
                    let token = state.prompt_token(rows.position + row + 1)?;
                    let what = What::Prompt { token, alternatives };
                    Some(Wanted { span: index, row: rows.first + row, what })
                }));
            }
            if span.sample {
                let what = What::Sample { position: rows.position + rows.count };
                wanted.push(Wanted { span: index, row: rows.first + rows.count - 1, what });
            }
        }
        wanted
    }

    /// Applies the head to the wanted rows, at most `running_max` at a time: that many rows of logits are planned for.
    fn read_logits(
        &mut self,
        spans: &[Span],
        wanted: &[Wanted],
    ) -> Result<Vec<SpanOutput>, String> {
        let mut outputs = vec![SpanOutput::default(); spans.len()];
        for chunk in wanted.chunks(self.slots.len()) {
            let slot = |wanted: &Wanted| spans[wanted.span].slot.0 as usize;
            let states: Vec<Option<SlotState>> = chunk
                .iter()
                .map(|wanted| match wanted.what {
                    What::Sample { .. } => self.slots[slot(wanted)].take(),
                    What::Prompt { .. } => None,
                })
                .collect();
            let CpuBackend { plan, loaded, space, threads, .. } = self;
            let brought: Vec<Option<Brought>> = threads.install(|| {
                let rows = chunk.iter().map(|wanted| wanted.row);
                let logits = forward::logits(plan, loaded, rows, space);
                let rows = logits.par_chunks_exact_mut(plan.vocabulary).zip(chunk).zip(states);
                rows.map(|((logits, wanted), state)| read_row(logits, wanted.what, state)).collect()
            });
            for (wanted, brought) in chunk.iter().zip(brought) {
                match brought.ok_or("the model's logits are not finite")? {
                    Brought::Prompt(logprob) => outputs[wanted.span].prompt_logprobs.push(logprob),
                    Brought::Sampled(token, state) => {
                        outputs[wanted.span].sampled = Some(token);
                        self.slots[slot(wanted)] = Some(state);
                    }
                }
            }
        }
        Ok(outputs)
    }
}

fn read_row(logits: &mut [f32], what: What, state: Option<SlotState>) -> Option<Brought> {
    match what {
        What::Prompt { token, alternatives } => {
            prompt_logprob(logits, token, alternatives).map(Brought::Prompt)
        }
        What::Sample { position } => {
            let mut state = state.expect("the step was checked: every slot appears once");
            let token = state.draw(logits, position)?;
            Some(Brought::Sampled(token, state))
        }
    }
}
