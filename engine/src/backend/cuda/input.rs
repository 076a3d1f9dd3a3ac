//! What a step tells the device: its rows, spans, block-table changes and wanted logits, gathered on the host and sent in
//! one launch. The host's side is a ring, so that a step can be written while an earlier one is still being read.

use std::sync::Arc;

use plimsoll_contract::abilities::PAGE_TOKENS;
use plimsoll_kernels::device::{Buffer, Device, DeviceError, Pinned, Plain};
use plimsoll_kernels::ops::attention::{Row, Span};
use plimsoll_kernels::ops::sampling::{PromptRow, SampleRow, SlotParameters};
use plimsoll_kernels::ops::stage::{Piece, SEGMENTS, Segment, Stage, StageArguments};

use super::shape::StepShape;
use crate::batch::PageId;

/// Steps in flight, and the one that is being written.
pub const RING: usize = 3;

/// Block-table changes of one launch; what is more is sent in further ones.
const DELTAS_MAX: usize = 16 * 1024;

/// The device's side: fixed buffers that every step finds at the same place.
#[derive(Debug)]
pub struct Input {
    /// `[rows_max]`
    pub rows: Buffer,
    /// Spans of several rows, cut into query blocks. `[cuts_max]`
    pub spans: Buffer,
    /// Rows whose logits are wanted, those that are sampled first. `[rows_max]` i32
    pub wanted_rows: Buffer,
    /// `[rows_max of logits]`
    pub samples: Buffer,
    /// `[rows_max]`
    pub prompts: Buffer,
    /// `[running_max]`
    pub parameters: Buffer,
    /// The step's number, one word.
    pub epoch: Buffer,
    /// `[running_max, table_width]` i32
    pub tables: Buffer,
    ring: Vec<Pinned<Piece>>,
    places: Places,
    stage: Stage,
    table_width: usize,
    /// The block table of each slot as the device has it; equal arcs are equal tables.
    held: Vec<Held>,
}

#[derive(Clone, Debug, Default)]
struct Held {
    table: Option<Arc<[PageId]>>,
    pages: Vec<PageId>,
}

/// Where each segment begins in a ring entry, in pieces.
#[derive(Clone, Copy, Debug)]
struct Places {
    rows: usize,
    spans: usize,
    wanted_rows: usize,
    samples: usize,
    prompts: usize,
    parameters: usize,
    epoch: usize,
    deltas: usize,
    all: usize,
}

const PARAMETER_PIECES: usize = size_of::<SlotParameters>() / size_of::<Piece>();

fn places(step: &StepShape, cuts_max: usize) -> Places {
    let rows = 0;
    let spans = rows + step.rows_max();
    let wanted_rows = spans + cuts_max;
    let samples = wanted_rows + step.rows_max().div_ceil(4);
    let prompts = samples + step.head_rows().div_ceil(2);
    let parameters = prompts + step.rows_max();
    let epoch = parameters + step.running_max * PARAMETER_PIECES;
    let deltas = epoch + 1;
    let all = deltas + DELTAS_MAX;
    Places { rows, spans, wanted_rows, samples, prompts, parameters, epoch, deltas, all }
}

/// Bytes of the device's side.
pub fn bytes(step: &StepShape, cuts_max: usize) -> usize {
    let Places { deltas, .. } = places(step, cuts_max);
    deltas * size_of::<Piece>() + step.running_max * step.table_width() * 4
}

/// One step, as it is gathered.
#[derive(Debug, Default)]
pub struct Draft {
    pub rows: Vec<Row>,
    pub spans: Vec<Span>,
    pub wanted_rows: Vec<i32>,
    pub samples: Vec<SampleRow>,
    pub prompts: Vec<PromptRow>,
    /// Every slot's, where any has changed.
    pub parameters: Vec<SlotParameters>,
    pub epoch: u32,
    /// Rows that bring their own, one after the other; they do not travel with the rest.
    pub embeddings: Vec<f32>,
    deltas: Vec<Piece>,
}

impl Draft {
    pub fn clear(&mut self) {
        let Draft {
            rows,
            spans,
            wanted_rows,
            samples,
            prompts,
            parameters,
            epoch,
            embeddings,
            deltas,
        } = self;
        rows.clear();
        spans.clear();
        wanted_rows.clear();
        samples.clear();
        prompts.clear();
        parameters.clear();
        embeddings.clear();
        deltas.clear();
        *epoch = 0;
    }
}

impl Input {
    pub fn allocate(
        device: &Device,
        step: &StepShape,
        cuts_max: usize,
    ) -> Result<Input, DeviceError> {
        let places = places(step, cuts_max);
        let take = |pieces: usize| device.zeroed(pieces * size_of::<Piece>(), "a step's input");
        Ok(Input {
            rows: take(places.spans - places.rows)?,
            spans: take(places.wanted_rows - places.spans)?,
            wanted_rows: take(places.samples - places.wanted_rows)?,
            samples: take(places.prompts - places.samples)?,
            prompts: take(places.parameters - places.prompts)?,
            parameters: take(places.epoch - places.parameters)?,
            epoch: take(1)?,
            tables: device.zeroed(step.running_max * step.table_width() * 4, "block tables")?,
            ring: (0..RING).map(|_| device.pinned(places.all)).collect::<Result<_, _>>()?,
            places,
            stage: Stage::load(device)?,
            table_width: step.table_width(),
            held: vec![Held::default(); step.running_max],
        })
    }

    /// Notes what the device does not know yet of a slot's block table, for the positions before `end`.
    pub fn update_table(
        &mut self,
        draft: &mut Draft,
        slot: usize,
        table: &Arc<[PageId]>,
        end: usize,
    ) {
        let held = &mut self.held[slot];
        if held.table.as_ref().is_some_and(|known| Arc::ptr_eq(known, table)) {
            return;
        }
        let used = end.div_ceil(PAGE_TOKENS as usize).min(table.len());
        for (index, page) in table[..used].iter().enumerate() {
            if held.pages.get(index) != Some(page) {
                draft.deltas.push([slot as u32, index as u32, page.0, 0]);
            }
        }
        held.pages.clear();
        held.pages.extend_from_slice(&table[..used]);
        held.table = (used == table.len()).then(|| Arc::clone(table));
    }

    /// Queues the step's input. `entry` of the ring must not be in use by a step in flight.
    pub fn send(
        &mut self,
        device: &Device,
        entry: usize,
        draft: &Draft,
    ) -> Result<(), DeviceError> {
        let more = draft.deltas.len().saturating_sub(DELTAS_MAX);
        for part in draft.deltas[..more].chunks(DELTAS_MAX) {
            self.send_part(device, entry, &Draft::default(), part)?;
            // The entry is written again.
            device.synchronize()?;
        }
        self.send_part(device, entry, draft, &draft.deltas[more..])
    }

    fn send_part(
        &mut self,
        device: &Device,
        entry: usize,
        draft: &Draft,
        deltas: &[Piece],
    ) -> Result<(), DeviceError> {
        let places = self.places;
        let pinned = &mut self.ring[entry];
        let from = pinned.pointer();
        let host = pinned.as_mut_slice();
        let mut segments = [Segment::NONE; SEGMENTS];
        let epoch = [draft.epoch];
        let parts: [(&Buffer, usize, &[u8]); SEGMENTS] = [
            (&self.rows, places.rows, bytes_of(&draft.rows)),
            (&self.spans, places.spans, bytes_of(&draft.spans)),
            (&self.wanted_rows, places.wanted_rows, bytes_of(&draft.wanted_rows)),
            (&self.samples, places.samples, bytes_of(&draft.samples)),
            (&self.prompts, places.prompts, bytes_of(&draft.prompts)),
            (&self.parameters, places.parameters, bytes_of(&draft.parameters)),
            (&self.epoch, places.epoch, bytes_of(&epoch)),
            (&self.epoch, places.epoch, &[]),
        ];
        for (segment, (to, first, bytes)) in segments.iter_mut().zip(parts) {
            let pieces = bytes.len().div_ceil(size_of::<Piece>());
            assert!(pieces * size_of::<Piece>() <= to.bytes(), "a step stays within its limits");
            // SAFETY: the ring entry has room for every segment's most, and `Piece` is plain.
            let room = unsafe {
                std::slice::from_raw_parts_mut(
                    host[first..first + pieces].as_mut_ptr().cast::<u8>(),
                    pieces * size_of::<Piece>(),
                )
            };
            room[..bytes.len()].copy_from_slice(bytes);
            *segment = Segment { to: to.pointer(), first: first as i32, count: pieces as i32 };
        }
        host[places.deltas..places.deltas + deltas.len()].copy_from_slice(deltas);
        let arguments = StageArguments {
            from,
            segments,
            deltas_first: places.deltas as i32,
            deltas: deltas.len() as i32,
            tables: self.tables.pointer(),
            table_stride: self.table_width as i32,
        };
        self.stage.run(device, &arguments)
    }
}

/// Plain values as they lie in memory.
fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: `Plain` promises that every byte is initialised; the length is that of the slice.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
