//! What a finished step changes: lengths grow, full pages are published, sequences end, pages come back.

use plimsoll_contract::abilities::PAGE_TOKENS;

use super::sequence::{Sequence, Turn};
use super::{End, InFlight, Notice, Outcome, Scheduler, SpanInFlight, StepNumber};

impl Scheduler {
    /// Takes what the oldest step in flight brought, one outcome per span.
    pub fn commit(&mut self, number: StepNumber, outcomes: &[Outcome], notices: &mut Vec<Notice>) {
        let step = self.in_flight.pop_front().expect("only steps in flight are committed");
        assert_eq!(step.number, number, "steps are committed in order");
        assert_eq!(step.spans.len(), outcomes.len(), "one outcome per span");
        let mut near = 0;
        for (index, (span, outcome)) in step.spans.iter().zip(outcomes).enumerate() {
            // What ended while the step was in flight no longer runs, and its row is dropped.
            let Some(running) = self.running_index_near(near, span.turn) else { continue };
            near = running + 1;
            if let Some(end) = self.commit_span(index, span, running, outcome, notices) {
                self.end(span.turn, end, notices);
                near = running;
            }
        }
        self.leave_step(&step);
    }

    /// A step failed, so that nothing its sequences hold can be trusted.
    pub fn fail(&mut self, number: StepNumber, notices: &mut Vec<Notice>) {
        let index = self.in_flight.iter().position(|step| step.number == number);
        let index = index.expect("only steps in flight fail");
        let step = self.in_flight.remove(index).expect("found just now");
        for span in &step.spans {
            self.end(span.turn, End::Failed, notices);
        }
        self.leave_step(&step);
    }

    fn commit_span(
        &mut self,
        index: usize,
        span: &SpanInFlight,
        running: usize,
        outcome: &Outcome,
        notices: &mut Vec<Notice>,
    ) -> Option<End> {
        let sequence = &mut self.running[running];
        let (request, choice) = (sequence.request, sequence.choice);
        sequence.committed = span.end;
        sequence.hashes.extend(outcome.page_hash);
        let full_pages = (sequence.committed / PAGE_TOKENS) as usize;
        while sequence.published < full_pages.min(sequence.hashes.len()) {
            let page = sequence.published;
            self.kv.publish(&sequence.table, page, sequence.hashes[page]);
            sequence.published += 1;
        }
        if !sequence.prompt_noticed && sequence.committed >= sequence.prompt {
            sequence.prompt_noticed = true;
            let cached_tokens = sequence.cached_tokens.expect("set at admission");
            notices.push(Notice::Prompt { request, choice, cached_tokens });
            let request = self.requests.get_mut(&request).expect("it has an open choice");
            request.prompt_logprobs = false;
        }
        if !span.sample {
            return None;
        }
        sequence.generated += 1;
        notices.push(Notice::Token { request, choice, span: index });
        if outcome.stop {
            Some(End::Stop)
        } else {
            (sequence.generated == sequence.output_max).then_some(End::Length)
        }
    }

    /// Takes a sequence out of the books, unless it has left them before.
    pub(super) fn end(&mut self, turn: Turn, end: End, notices: &mut Vec<Notice>) {
        let (request, choice) = if let Some(index) = self.running_index(turn) {
            let sequence = self.running.remove(index);
            let names = (sequence.request, sequence.choice);
            if sequence.in_flight > 0 {
                self.leaving.push(sequence);
            } else {
                self.retire(sequence);
            }
            names
        } else if let Some(sequence) = self.waiting.remove(&turn) {
            (sequence.request, sequence.choice)
        } else {
            return;
        };
        notices.push(Notice::Ended { request, choice, end });
        let state = self.requests.get_mut(&request).expect("it had an open choice");
        state.open -= 1;
        if state.open == 0 {
            self.waiting_requests -= usize::from(!state.begun);
            self.requests.remove(&request);
        }
    }

    /// The step is over for its sequences: those that have ended give their pages and slots back.
    pub(super) fn leave_step(&mut self, step: &InFlight) {
        let mut near = 0;
        for span in &step.spans {
            if let Some(index) = self.running_index_near(near, span.turn) {
                self.running[index].in_flight -= 1;
                near = index + 1;
                continue;
            }
            let index = self.leaving.iter().position(|sequence| sequence.turn == span.turn);
            let index = index.expect("a sequence stays until its last step is over");
            self.leaving[index].in_flight -= 1;
            if self.leaving[index].in_flight == 0 {
                let sequence = self.leaving.swap_remove(index);
                self.retire(sequence);
            }
        }
        self.kv.finish_copies(&step.copies);
    }

    fn retire(&mut self, sequence: Sequence) {
        self.slots_free.push(sequence.slot);
        self.kv.release(sequence.table);
    }
}
