//! The backend on an NVIDIA GPU: weights, pages and sampled tokens stay on the device; a step goes there as a few hundred
//! bytes and comes back as token ids in host memory that the device writes itself. Steps of decode rows alone are recorded
//! once per number of rows and replayed. Enters: steps. Leaves: tokens and log-probabilities. Never here: requests, text,
//! scheduling.

mod answers;
pub mod clock;
mod forward;
mod input;
mod kernels;
mod model;
pub mod parts;
mod planned;
mod record;
mod shape;
mod slots;
mod space;

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::sync::Arc;

use plimsoll_contract::abilities::Dtype;
use plimsoll_contract::memory::StepLimits;
use plimsoll_kernels::device::{Buffer, Device, DeviceError, Mark};
use plimsoll_kernels::ops::attention::{Row, Span as DeviceSpan};
use plimsoll_kernels::ops::sampling::{PromptRow, SampleRow};

use self::answers::Answers;
use self::clock::{StepClock, StepTime};
use self::forward::{Forward, HeadInput, PRODUCTS_AHEAD, Rows};
use self::input::{Draft, Input, RING};
use self::kernels::{Card, Kernels};
use self::model::DeviceModel;
use self::record::{Recorded, Ways};
use self::shape::{Shape, StepShape};
use self::slots::Slots;
use self::space::Space;
use super::check::{Bounds, check};
use super::{Backend, BackendError, KvLayout, LayerGroup, LoadProgress, Ticket};
use crate::batch::{RowInput, Span, SpanOutput, Step, StepNumber, StepOutput};
use crate::model::{Checkpoint, LoadError, Plan};
use crate::scheduler::StepCosts;

/// Where weights come from.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    Checkpoint(&'a Checkpoint),
    /// Made on the device: normal with deviation 0.02, norms 1.
    Random {
        plan: &'a Plan,
        seed: u64,
    },
}

impl Source<'_> {
    fn plan(&self) -> &Plan {
        match self {
            Source::Checkpoint(checkpoint) => &checkpoint.plan,
            Source::Random { plan, .. } => plan,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    pub kv_pages: u32,
    pub step: StepLimits,
    pub context_tokens: u32,
    /// Decode steps are recorded and replayed; else every step is queued kernel by kernel.
    pub recorded: bool,
    /// The kernels that run on every card, also on Hopper.
    pub portable: bool,
    /// Sums are split in one way whatever the batch.
    pub batch_invariant: bool,
}

impl Default for CudaOptions {
    fn default() -> CudaOptions {
        CudaOptions {
            kv_pages: 0,
            step: StepLimits { step_tokens_max: 2048, running_max: 256 },
            context_tokens: 0,
            recorded: true,
            portable: false,
            batch_invariant: false,
        }
    }
}

pub struct CudaBackend {
    device: Arc<Device>,
    kernels: Kernels,
    shape: Shape,
    step: StepShape,
    model: DeviceModel,
    space: Space,
    input: Input,
    slots: Slots,
    pages: Buffer,
    bounds: Bounds,
    layout: KvLayout,
    answers: Answers,
    /// None where every step is queued kernel by kernel.
    recorded: Option<Recorded>,
    /// Every row goes the way of prefill, whose bits depend on nothing but the row and its past.
    batch_invariant: bool,
    draft: Draft,
    in_flight: VecDeque<InFlight>,
    /// None where nobody asked how long steps take: then none is marked.
    clock: Option<Arc<StepClock>>,
    /// Beginning and end of the step that was collected last, and the end of the one before it.
    times: Option<(Mark, Mark)>,
    last_end: Option<Mark>,
    /// The number of the last step, as the device knows it; entries of the rings follow from it.
    epoch: u32,
    planned_bytes: u64,
}

/// A step on its way, and where its results will lie.
struct InFlight {
    number: StepNumber,
    epoch: u32,
    /// None where nobody asked for times.
    begin: Option<Mark>,
    end: Mark,
    spans: Vec<Results>,
}

/// Where the results of one span lie among the step's.
#[derive(Clone, Copy, Debug, Default)]
struct Results {
    /// The span's first among the step's rows.
    first_row: usize,
    prompt_first: usize,
    prompt_count: usize,
    sampled: Option<Sampled>,
}

#[derive(Clone, Copy, Debug)]
struct Sampled {
    at: usize,
    /// Whether its log-probability was asked for.
    reports: bool,
}

/// A step as it was gathered: what to queue, and where its results will lie.
struct Gathered {
    rows: Rows,
    ways: Ways,
    /// Every span is one row and samples: a recorded step.
    every_one_samples: bool,
    samples: usize,
    results: Vec<Results>,
}

/// A row that writes nothing.
const PADDING: Row = Row { token: 0, slot: 0, position: -1, sample: 0 };

pub(crate) fn device_error(error: DeviceError) -> LoadError {
    match error {
        DeviceError::OutOfMemory { purpose, bytes, left } => LoadError::OutOfDeviceMemory {
            purpose,
            bytes: bytes as u64,
            left: Some(left as u64),
            source: std::io::Error::other("the card's memory is full"),
        },
        other => LoadError::Device(other),
    }
}

impl CudaBackend {
    /// Makes or reads the weights, takes all memory that any step will need, and records the decode steps.
    pub fn load(
        device: Arc<Device>,
        source: Source,
        options: CudaOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<CudaBackend, LoadError> {
        device.bind()?;
        let plan = source.plan();
        let shape = Shape::new(plan)?;
        let step = StepShape {
            step_tokens_max: options.step.step_tokens_max as usize,
            running_max: options.step.running_max as usize,
            context_tokens: options.context_tokens as usize,
        };
        let pages_bytes = options.kv_pages as usize * shape.page_bytes();
        let card = Card::of(&device, options.portable);
        let kernels = Kernels::load(&device, &shape, &step, &options).map_err(device_error)?;
        let cuts_max = card.cuts_max(&shape, &step);
        let planned_bytes = model::bytes(plan, &shape)
            + planned::workspace_bytes(card, &shape, &step)
            + pages_bytes;
        let model = model::load(&device, plan, &shape, source, step.context_tokens, progress)?;
        let allocate = || -> Result<_, DeviceError> {
            Ok((
                Space::allocate(&device, &shape, &step)?,
                Input::allocate(&device, &step, cuts_max)?,
                Slots::allocate(&device, &shape, &step)?,
                device.zeroed(pages_bytes, "KV pages")?,
                Answers::allocate(&device, &step)?,
            ))
        };
        let (space, input, slots, pages, answers) = allocate().map_err(device_error)?;
        let layout = KvLayout {
            groups: vec![LayerGroup { layers: (0..shape.layers).collect() }],
            kv_heads: shape.kv_heads,
            head_dim: shape.head_stored,
            dtype: Dtype::Bf16,
        };
        let bounds = Bounds {
            slots: step.running_max,
            pages: options.kv_pages,
            vocabulary: shape.vocabulary,
            hidden: shape.hidden,
        };
        let mut backend = CudaBackend {
            device,
            kernels,
            shape,
            step,
            model,
            space,
            input,
            slots,
            answers,
            pages,
            bounds,
            layout,
            recorded: (options.recorded && !options.batch_invariant).then(Recorded::default),
            batch_invariant: options.batch_invariant,
            draft: Draft::default(),
            in_flight: VecDeque::new(),
            clock: None,
            times: None,
            last_end: None,
            epoch: 0,
            planned_bytes: planned_bytes as u64,
        };
        backend.record_all().map_err(device_error)?;
        backend.device.synchronize().map_err(device_error)?;
        Ok(backend)
    }

    /// How long steps take from now on, by the device's clock.
    pub fn clock(&mut self) -> Arc<StepClock> {
        Arc::clone(self.clock.get_or_insert_default())
    }

    /// Device memory that was computed before it was taken.
    pub fn planned_bytes(&self) -> u64 {
        self.planned_bytes
    }

    /// What everybody serves most: greedy and sampled steps of every number of rows. Others are recorded when they come.
    fn record_all(&mut self) -> Result<(), DeviceError> {
        let Some(mut recorded) = self.recorded.take() else { return Ok(()) };
        for rows in record::buckets(self.step.running_max) {
            for ways in [Ways::Greedy, Ways::Logits] {
                recorded.record(&self.device, rows, ways, || self.queue_singles(rows, ways))?;
            }
        }
        self.recorded = Some(recorded);
        Ok(())
    }

    fn forward(&self) -> Forward<'_> {
        Forward {
            device: &self.device,
            kernels: &self.kernels,
            shape: &self.shape,
            step: &self.step,
            model: &self.model,
            space: &self.space,
            input: &self.input,
            slots: &self.slots,
            answers: &self.answers,
            pages: self.pages.pointer(),
            pages_count: self.bounds.pages as usize,
            ahead: PRODUCTS_AHEAD,
        }
    }

    /// A step in which every row is alone in its sequence's step and samples: what is recorded.
    fn queue_singles(&self, rows: usize, ways: Ways) -> Result<(), DeviceError> {
        let forward = self.forward();
        forward.layers(Rows { singles: rows, prefill: 0, cuts: 0 })?;
        forward.head(HeadInput::Rows(rows), ways)?;
        forward.sample(rows, ways)
    }

    /// Rows, tables and wanted logits of a step, and where its results will lie.
    fn gather(&mut self, step: &mut Step) -> Result<Gathered, DeviceError> {
        let mut draft = std::mem::take(&mut self.draft);
        draft.clear();
        self.epoch += 1;
        draft.epoch = self.epoch;
        for span in &mut step.spans {
            if let Some(start) = span.start.take() {
                let slot = span.slot.0 as usize;
                self.slots.start(&self.device, &self.kernels.sampling, slot, start)?;
            }
        }
        draft.parameters.extend_from_slice(self.slots.unsent_parameters());
        // Singles first, then the longer spans; samples in the order of rows, prompts after all samples.
        let is_single =
            |&index: &usize| step.spans[index].inputs.len() == 1 && !self.batch_invariant;
        let (mut singles, longer): (Vec<usize>, Vec<usize>) =
            (0..step.spans.len()).partition(is_single);
        // The longest begin first, so that none is left when the others are done.
        singles.sort_by_key(|&index| Reverse(step.spans[index].position));
        let is_plain = |span: &Span| {
            let own = matches!(span.inputs[0], RowInput::Embedding(_));
            span.sample && !span.prompt_logprobs && !own
        };
        let every_one_samples = longer.is_empty() && step.spans.iter().all(is_plain);
        let padded = match every_one_samples {
            true => record::bucket(singles.len()).min(self.step.rows_max()),
            false => singles.len(),
        };
        let mut results = vec![Results::default(); step.spans.len()];
        let mut ways = Ways::Greedy;
        let mut place = |draft: &mut Draft, index: usize| {
            let (span, result) = (&step.spans[index], &mut results[index]);
            result.first_row = draft.rows.len();
            push_rows(draft, span);
            if span.sample {
                ways = ways.max(self.slots.ways(span.slot.0 as usize));
                result.sampled = Some(self.push_sample(draft, span));
            }
        };
        singles.iter().for_each(|&index| place(&mut draft, index));
        draft.rows.resize(padded, PADDING);
        let mut cuts = Vec::with_capacity(longer.len());
        for index in longer {
            let span = &step.spans[index];
            cuts.push(DeviceSpan {
                first: draft.rows.len() as i32,
                rows: span.inputs.len() as i32,
                slot: span.slot.0.cast_signed(),
                position: span.position.cast_signed(),
            });
            place(&mut draft, index);
        }
        draft.spans = self.kernels.cut(&cuts);
        self.gather_prompts(&step.spans, &mut draft, &mut results);
        if !draft.embeddings.is_empty() {
            self.space.put_embeddings(&self.device, &draft.embeddings)?;
        }
        for span in &step.spans {
            let (slot, end) = (span.slot.0 as usize, span.position as usize + span.inputs.len());
            self.input.update_table(&mut draft, slot, &span.tables[0], end);
            if span.sample {
                self.slots.note_sampled(slot);
            }
        }
        if every_one_samples {
            // Padding rows draw nothing.
            draft.samples.resize(padded, SampleRow::PADDING);
        }
        let rows =
            Rows { singles: padded, prefill: draft.rows.len() - padded, cuts: draft.spans.len() };
        let samples = results.iter().filter(|result| result.sampled.is_some()).count();
        self.draft = draft;
        Ok(Gathered { rows, ways, every_one_samples, samples, results })
    }

    /// For each row whose next position is still prompt: which logits, which token.
    fn gather_prompts(&self, spans: &[Span], draft: &mut Draft, results: &mut [Results]) {
        let samples = draft.samples.len();
        let wanted = spans.iter().zip(results).filter(|(span, _)| span.prompt_logprobs);
        for (span, result) in wanted {
            let slot = span.slot.0 as usize;
            let first = draft.prompts.len();
            for row in 0..span.inputs.len() {
                let position = span.position as usize + row + 1;
                let Some(token) = self.slots.prompt_token(slot, position) else { break };
                draft.wanted_rows.push((result.first_row + row) as i32);
                draft.prompts.push(PromptRow {
                    // Logits are computed for as many rows at once as there is room for.
                    row: (draft.prompts.len() % self.step.head_rows()) as i32,
                    token: token.cast_signed(),
                    alternatives: self.slots.prompt_alternatives(slot).cast_signed(),
                    unused: 0,
                });
            }
            result.prompt_first = samples + first;
            result.prompt_count = draft.prompts.len() - first;
        }
    }

    fn queue(&mut self, step: &Step, gathered: &Gathered) -> Result<(), DeviceError> {
        let entry = self.epoch as usize % RING;
        self.input.send(&self.device, entry, &self.draft)?;
        if !step.copies.is_empty() {
            let pairs: Vec<[i32; 2]> = step
                .copies
                .iter()
                .map(|c| [c.from.0.cast_signed(), c.to.0.cast_signed()])
                .collect();
            self.forward().copy_pages(&pairs)?;
        }
        let Gathered { rows, ways, every_one_samples, samples, .. } = gathered;
        if *every_one_samples && rows.singles <= self.step.head_rows() {
            if let Some(mut recorded) = self.recorded.take() {
                let (rows, ways) = (rows.singles, *ways);
                let queue = || self.queue_singles(rows, ways);
                let replayed = recorded.replay(&self.device, rows, ways, queue);
                self.recorded = Some(recorded);
                replayed?;
            } else {
                self.queue_singles(rows.singles, *ways)?;
            }
            return Ok(());
        }
        let forward = self.forward();
        forward.layers(*rows)?;
        if *samples > 0 {
            forward.head(HeadInput::Gathered { first: 0, rows: *samples }, *ways)?;
            forward.sample(*samples, *ways)?;
        }
        let prompts = self.draft.prompts.len();
        for first in (0..prompts).step_by(self.step.head_rows()) {
            let rows = self.step.head_rows().min(prompts - first);
            forward.head(HeadInput::Gathered { first: samples + first, rows }, Ways::Reported)?;
            forward.report(samples + first, first, rows)?;
        }
        Ok(())
    }

    /// The span's last row is sampled: its place among the samples.
    fn push_sample(&self, draft: &mut Draft, span: &Span) -> Sampled {
        let at = draft.samples.len();
        let end = span.position as usize + span.inputs.len();
        draft.wanted_rows.push(draft.rows.len() as i32 - 1);
        draft.samples.push(SampleRow { slot: span.slot.0.cast_signed(), position: end as i32 });
        Sampled { at, reports: self.slots.reports(span.slot.0 as usize) }
    }

    /// Waits for the step's last results: rows are written in any order, so each is waited for.
    fn wait(&self, flight: &InFlight) -> Result<(), DeviceError> {
        let mut any = false;
        for span in &flight.spans {
            let prompts = span.prompt_first..span.prompt_first + span.prompt_count;
            for at in prompts.chain(span.sampled.map(|sampled| sampled.at)) {
                self.answers.wait(flight.epoch, at, &flight.end)?;
                any = true;
            }
        }
        // A step without results must be over before its place in the rings is used again.
        if any { Ok(()) } else { flight.end.wait() }
    }

    /// The results come before the step's end, so the step before it is the one whose times are known now.
    fn note_time(&mut self, flight: InFlight) {
        let (Some(clock), Some(begin)) = (&self.clock, flight.begin) else { return };
        let before = self.times.replace((begin, flight.end));
        let Some((begin, end)) = before else { return };
        let busy = begin.seconds_until(&end);
        let idle = self.last_end.as_ref().map(|last| last.seconds_until(&begin));
        if let (Ok(busy), Some(Ok(idle))) = (busy, idle) {
            clock.note(StepTime { idle, busy });
        }
        self.last_end = Some(end);
    }

    fn read(&self, flight: &InFlight) -> Result<Vec<SpanOutput>, String> {
        let prompt = |at| self.answers.logprob(flight.epoch, at);
        let sampled = |s: Sampled| self.answers.sampled(flight.epoch, s.at, s.reports);
        let spans = flight.spans.iter().map(|span| {
            let prompts = span.prompt_first..span.prompt_first + span.prompt_count;
            Ok(SpanOutput {
                sampled: span.sampled.map(sampled).transpose()?,
                prompt_logprobs: prompts.map(prompt).collect::<Result<_, _>>()?,
            })
        });
        spans.collect()
    }
}

/// A span's rows, and the embeddings that some of them bring.
fn push_rows(draft: &mut Draft, span: &Span) {
    for (position, input) in (span.position..).zip(&span.inputs) {
        let token = match input {
            RowInput::Token(token) => token.cast_signed(),
            RowInput::Sampled => -1,
            RowInput::Embedding(row) => {
                let number = draft.embeddings.len() / row.len();
                draft.embeddings.extend_from_slice(row);
                -2 - number as i32
            }
        };
        let (slot, position) = (span.slot.0.cast_signed(), position.cast_signed());
        draft.rows.push(Row { token, slot, position, sample: 0 });
    }
}

impl Backend for CudaBackend {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn step_costs(&self) -> StepCosts {
        self.kernels.step_costs(&self.shape, &self.step)
    }

    fn submit(&mut self, mut step: Step) -> Result<Ticket, BackendError> {
        let number = step.number;
        check(self.bounds, &step, |slot| self.slots.usage(slot))
            .map_err(|reason| BackendError::StepFailed { number, reason })?;
        assert!(self.in_flight.len() < RING, "the loop keeps at most two steps in flight");
        let lost = |error: DeviceError| BackendError::DeviceLost(error.to_string());
        self.device.bind().map_err(lost)?;
        let gathered = self.gather(&mut step).map_err(lost)?;
        let begin = self.clock.is_some().then(|| self.device.mark());
        let begin = begin.transpose().map_err(lost)?;
        self.queue(&step, &gathered).map_err(lost)?;
        let end = self.device.mark().map_err(lost)?;
        let (epoch, spans) = (self.epoch, gathered.results);
        self.in_flight.push_back(InFlight { number, epoch, begin, end, spans });
        Ok(Ticket(number))
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, BackendError> {
        let number = ticket.0;
        let failed = |reason| BackendError::StepFailed { number, reason };
        let flight = self.in_flight.pop_front().filter(|flight| flight.number == number);
        let flight = flight.ok_or_else(|| failed("collected out of order".into()))?;
        self.wait(&flight).map_err(|error| BackendError::DeviceLost(error.to_string()))?;
        let spans = self.read(&flight);
        self.note_time(flight);
        Ok(StepOutput { number, spans: spans.map_err(failed)? })
    }
}
