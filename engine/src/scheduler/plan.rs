//! Planning: decode rows, then prefill chunks, then admissions, under the rules in the parent.

use plimsoll_contract::abilities::PAGE_TOKENS;

use super::sequence::{Sequence, Turn};
use super::{InFlight, Scheduler, SpanInFlight, SpanPlan, StepPlan};
use crate::batch::{PageCopy, SequenceId, StepNumber};
use crate::kv_cache::pages_of;

/// A plan in the making.
struct Draft {
    copies: Vec<PageCopy>,
    spans: Vec<SpanPlan>,
    /// The same spans as they are remembered until their step is committed.
    in_flight: Vec<SpanInFlight>,
    /// Rows that may still be added.
    rows_left: u32,
    /// Running sequences from this index on get no rows: one of them is to be preempted as soon as no step contains it.
    withheld_from: usize,
    /// Somebody lacks pages, so nobody is admitted.
    short_of_pages: bool,
}

/// Where a sequence starts once admitted.
enum Start {
    /// Behind this many published pages.
    Published { pages: usize },
    /// On the pages of a sibling whose prompt is computed.
    Sibling { index: usize, pages: usize },
}

impl Scheduler {
    /// The next step, or none if nothing can be added to what is in flight.
    pub fn plan(&mut self) -> Option<StepPlan> {
        assert!(self.in_flight.len() < self.limits.steps_in_flight, "the pipeline is full");
        let mut draft = Draft {
            copies: Vec::new(),
            spans: Vec::with_capacity(self.running.len() + 1),
            in_flight: Vec::with_capacity(self.running.len() + 1),
            rows_left: self.limits.step_tokens_max,
            withheld_from: usize::MAX,
            short_of_pages: false,
        };
        self.plan_decodes(&mut draft);
        draft.rows_left = self.prompt_rows(&draft);
        self.plan_prefills(&mut draft);
        self.admit(&mut draft);
        if draft.spans.is_empty() {
            assert!(
                !self.in_flight.is_empty() || self.is_idle(),
                "the first in turn always proceeds"
            );
            return None;
        }
        let number = StepNumber(self.next_step);
        self.next_step += 1;
        let Draft { copies, spans, in_flight, .. } = draft;
        self.in_flight.push_back(InFlight { number, copies: copies.clone(), spans: in_flight });
        Some(StepPlan { number, copies, spans })
    }

    fn plan_decodes(&mut self, draft: &mut Draft) {
        let mut index = 0;
        while index < self.running.len().min(draft.withheld_from) && draft.rows_left > 0 {
            if self.running[index].rows_left() == 1 && self.make_room(index, draft) {
                self.add_span(index, 1, draft);
            }
            index += 1;
        }
    }

    /// Pages for one more row of a running sequence, taken from the last in turn if need be.
    fn make_room(&mut self, index: usize, draft: &mut Draft) -> bool {
        loop {
            let sequence = &mut self.running[index];
            let (first, end) = (sequence.computed, sequence.computed + 1);
            if self.kv.prepare(&mut sequence.table, first, end, &mut draft.copies) {
                return true;
            }
            draft.short_of_pages = true;
            let last = self.running.len() - 1;
            if !self.leaving.is_empty() || index == last || draft.withheld_from == last {
                return false;
            }
            if self.running[last].in_flight > 0 {
                draft.withheld_from = last;
                return false;
            }
            self.preempt_last();
        }
    }

    fn preempt_last(&mut self) {
        let mut sequence = self.running.pop().expect("a later one than the caller's exists");
        assert_eq!(sequence.in_flight, 0, "a step in flight would still write its pages");
        sequence.begins = true;
        self.kv.release(std::mem::take(&mut sequence.table));
        self.slots_free.push(sequence.slot);
        self.waiting.insert(sequence.turn, sequence);
        self.totals.preemptions += 1;
    }

    /// Rows that prompts get: what the step has left, or a little less where that is cheaper for each of its rows.
    fn prompt_rows(&self, draft: &Draft) -> u32 {
        let is_prompt = |sequence: &&Sequence| sequence.rows_left() > 1;
        let running = &self.running[..self.running.len().min(draft.withheld_from)];
        let begun: u32 = running.iter().filter(is_prompt).map(Sequence::rows_left).sum();
        let places = match draft.short_of_pages {
            true => 0,
            false => self.limits.running_max - self.running.len() - self.leaving.len(),
        };
        let mut wanted = begun;
        for next in self.waiting.values().take(places) {
            if wanted >= draft.rows_left {
                break;
            }
            wanted += next.length();
        }
        let wanted = wanted.min(draft.rows_left);
        if wanted == 0 {
            return 0;
        }
        self.costs.prompt_rows(draft.spans.len() as u32, begun.min(wanted), wanted)
    }

    /// Prompts under way; their pages were taken at admission.
    fn plan_prefills(&mut self, draft: &mut Draft) {
        for index in 0..self.running.len().min(draft.withheld_from) {
            let rows = self.running[index].rows_left().min(draft.rows_left);
            if self.running[index].rows_left() > 1 && rows > 0 {
                self.add_span(index, rows, draft);
            }
        }
    }

    fn admit(&mut self, draft: &mut Draft) {
        while draft.rows_left > 0
            && !draft.short_of_pages
            && self.running.len() + self.leaving.len() < self.limits.running_max
        {
            let Some(&turn) = self.waiting.keys().next() else { return };
            let Some(start) = self.starting_point(turn) else { return };
            let index = self.begin(turn, start, draft);
            let rows = self.running[index].rows_left().min(draft.rows_left);
            self.add_span(index, rows, draft);
        }
    }

    /// Where the head of the queue would start, or none while it must wait for a sibling or for pages.
    fn starting_point(&mut self, turn: Turn) -> Option<Start> {
        let sequence = &self.waiting[&turn];
        let pages = pages_of(sequence.length());
        let margin = self.running.len();
        let mut siblings =
            self.running.iter().enumerate().filter(|s| s.1.request == sequence.request);
        if let Some((index, sibling)) = siblings.next() {
            // Only the first running sibling can still be in its prompt: the others waited for it.
            if sibling.committed < sibling.prompt {
                return None;
            }
            let shared = pages_of(sequence.prompt);
            // One page more than the difference, since the last shared one is written, thus copied.
            let fits = pages - shared + 1 + margin <= self.kv.pages_available();
            return fits.then_some(Start::Sibling { index, pages: shared });
        }
        self.published_start(turn)
    }

    fn published_start(&mut self, turn: Turn) -> Option<Start> {
        let sequence = &self.waiting[&turn];
        let pages = pages_of(sequence.length());
        let margin = self.running.len();
        let logprobs = self.requests[&sequence.request].prompt_logprobs;
        let hashes = if logprobs { &[] } else { &sequence.hashes[..] };
        if let Some((blocked, found)) = self.blocked
            && blocked == turn
            && pages - found + margin > self.kv.pages_available()
            && self.kv.lookup(&hashes[found..hashes.len().min(found + 1)]) == 0
        {
            // It finds no more than it did, and that was too little: a long prompt is not looked up in every step.
            return None;
        }
        let found = self.kv.lookup(hashes);
        let whole = found * PAGE_TOKENS as usize == sequence.length() as usize;
        let available = self.kv.pages_available_besides(&hashes[..found]);
        if pages - found + usize::from(whole) + margin <= available {
            return Some(Start::Published { pages: found });
        }
        // Copying the last page of a wholly cached prompt can be one page too much; computing it is not.
        let computing = found - usize::from(whole);
        let available = self.kv.pages_available_besides(&hashes[..computing]);
        if pages - computing + margin <= available {
            return Some(Start::Published { pages: computing });
        }
        self.blocked = Some((turn, found));
        None
    }

    fn begin(&mut self, turn: Turn, start: Start, draft: &mut Draft) -> usize {
        let mut sequence = self.waiting.remove(&turn).expect("the head of the queue");
        let request = self.requests.get_mut(&sequence.request).expect("it has an open choice");
        if !request.begun {
            request.begun = true;
            self.waiting_requests -= 1;
        }
        sequence.prompt_logprobs = request.prompt_logprobs;
        let length = sequence.length();
        match start {
            Start::Published { pages } => {
                sequence.table = self.kv.hold(&sequence.hashes[..pages]);
                sequence.computed = (pages as u32 * PAGE_TOKENS).min(length - 1);
                sequence.published = pages;
                if sequence.cached_tokens.is_none() {
                    self.totals.prefix_hits += u64::from(sequence.computed);
                    if self.limits.prefix_reuse && !sequence.prompt_logprobs {
                        self.totals.prefix_queries += u64::from(sequence.prompt);
                    }
                }
            }
            Start::Sibling { index, pages } => {
                sequence.table = self.kv.share(&self.running[index].table, pages);
                sequence.computed = sequence.prompt.min(length - 1);
                sequence.published = (sequence.prompt / PAGE_TOKENS) as usize;
            }
        }
        sequence.cached_tokens.get_or_insert(sequence.computed);
        sequence.committed = sequence.computed;
        sequence.slot = self.slots_free.pop().expect("as many slots as may run");
        let first = sequence.computed;
        let ready = self.kv.prepare(&mut sequence.table, first, length, &mut draft.copies);
        assert!(ready, "starting_point() counted the pages");
        sequence.admitted_before = SequenceId(self.next_sequence);
        let index = self.running.partition_point(|running| running.turn < turn);
        self.running.insert(index, sequence);
        index
    }

    fn add_span(&mut self, index: usize, rows: u32, draft: &mut Draft) {
        let sequence = &mut self.running[index];
        let position = sequence.computed;
        sequence.computed += rows;
        let sample = sequence.computed == sequence.length();
        sequence.sampled += u32::from(sample);
        sequence.in_flight += 1;
        draft.rows_left -= rows;
        let (turn, end) = (sequence.turn, sequence.computed);
        draft.in_flight.push(SpanInFlight { turn, position, end, sample });
        draft.spans.push(SpanPlan {
            sequence: sequence.id,
            request: sequence.request,
            choice: sequence.choice,
            slot: sequence.slot,
            begins: std::mem::take(&mut sequence.begins),
            position,
            rows,
            sample,
            prompt_logprobs: sequence.prompt_logprobs && position < sequence.prompt,
            tables: sequence.table.snapshot(),
        });
    }
}
