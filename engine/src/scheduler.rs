//! Who computes what in the next step. Lengths, page hashes and what finished steps brought enter; plans and notices
//! leave. Token values, clocks, clients and devices never do, and the same calls always give the same plans.
//!
//! The rules, in one place:
//! - **Order.** Every choice has a [`Turn`], fixed when its request arrives: a first choice comes in order of arrival,
//!   the second behind the first of the next request, the third behind the first of the one after that, and so on. So
//!   a request of many choices holds nobody back who asks for one, and newcomers hold none of its choices back for
//!   ever. Who waits is admitted strictly by turn; nobody overtakes, even who would fit, and who runs already is not
//!   stopped for an earlier turn that arrives later. Within a step decode rows come first, then prompts under way,
//!   each by turn, then who is admitted, under `step_tokens_max`. Hence of two choices the one whose turn is earlier
//!   and whose request is no younger has its first token first. A step with many decode rows may take fewer rows of new
//!   prompts than it could, where the device takes these cheaper ([`StepCosts`]); the rest goes with the next step.
//! - **Pages.** Admission takes all pages of the prompt at once and leaves one page for each running sequence.
//!   Decoding takes pages one by one. When there is none, the running sequence whose turn is last gives up all of its
//!   pages and goes back to its place in the queue, to be computed again; the last itself waits. So the first always
//!   proceeds, and everyone becomes the first.
//! - **Reuse.** A prompt starts behind the longest published prefix; one that is cached wholly recomputes its last
//!   token. The later choices of a request wait for a sibling's prompt and share its pages. Pages are published when
//!   the step that filled them is committed. Who wants log-probabilities of the prompt computes all of it.
//! - **Steps in flight.** A plan counts tokens that are still being sampled as placeholders. What ends while a step in
//!   flight contains it keeps its pages and its slot until that step is committed.
//! - **Ends.** Every choice gets exactly one [`Notice::Ended`].

mod commit;
mod costs;
mod limits;
mod plan;
mod request_map;
mod sequence;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

pub use costs::StepCosts;
pub use limits::{Ask, Limits};
use plimsoll_contract::abilities::PAGE_TOKENS;
pub use request_map::RequestMap;
use sequence::{Sequence, Turn};

use crate::batch::{PageCopy, PageId, SequenceId, Slot, StepNumber};
use crate::kv_cache::{KvCache, PageHash};

/// A request, numbered by whoever accepts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What the scheduler knows of a request.
#[derive(Clone, Debug)]
pub struct NewRequest {
    pub id: RequestId,
    pub ask: Ask,
    /// Hashes of the prompt's full pages; empty where prefixes are not reused.
    pub page_hashes: Vec<PageHash>,
    pub prompt_logprobs: bool,
}

/// A step, in lengths.
#[derive(Debug)]
pub struct StepPlan {
    pub number: StepNumber,
    pub copies: Vec<PageCopy>,
    pub spans: Vec<SpanPlan>,
}

/// See [`Span`](crate::batch::Span).
#[derive(Debug)]
pub struct SpanPlan {
    pub sequence: SequenceId,
    pub request: RequestId,
    pub choice: u32,
    pub slot: Slot,
    /// The slot starts anew with this span.
    pub begins: bool,
    pub position: u32,
    pub rows: u32,
    pub sample: bool,
    pub prompt_logprobs: bool,
    pub tables: Vec<Arc<[PageId]>>,
}

/// What a span's sampled token means; the default where none was sampled, or its choice has ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// It ends the sequence.
    pub stop: bool,
    /// It is the last token of a page, which has this hash.
    pub page_hash: Option<PageHash>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// A stop token or a stop string.
    Stop,
    /// `output_tokens_max`.
    Length,
    /// Nobody listens any more.
    Aborted,
    /// A step failed.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The whole prompt is computed; this much of it had been found.
    Prompt { request: RequestId, choice: u32, cached_tokens: u32 },
    /// The token sampled by this span of the committed step counts.
    Token { request: RequestId, choice: u32, span: usize },
    /// The last one for this choice.
    Ended { request: RequestId, choice: u32, end: End },
}

/// Sums since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache, and found there.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
}

struct RequestState {
    /// Requests that arrived before it.
    number: u64,
    choices: u32,
    /// Choices that have not ended.
    open: u32,
    /// A choice has been admitted.
    begun: bool,
    /// Log-probabilities of the prompt are wanted and not yet there.
    prompt_logprobs: bool,
}

struct InFlight {
    number: StepNumber,
    copies: Vec<PageCopy>,
    spans: Vec<SpanInFlight>,
}

#[derive(Clone, Copy)]
struct SpanInFlight {
    turn: Turn,
    position: u32,
    end: u32,
    sample: bool,
}

pub struct Scheduler {
    limits: Limits,
    costs: StepCosts,
    kv: KvCache,
    requests: RequestMap<RequestState>,
    /// Not running: preempted ones and those that never ran.
    waiting: BTreeMap<Turn, Sequence>,
    /// By turn; they hold a slot and pages.
    running: Vec<Sequence>,
    /// Ended, but still part of a step in flight; they keep slot and pages until it is committed.
    leaving: Vec<Sequence>,
    slots_free: Vec<Slot>,
    in_flight: VecDeque<InFlight>,
    /// The head of the queue, if it lacked pages, and how many of its pages were published then.
    blocked: Option<(Turn, usize)>,
    waiting_requests: usize,
    next_request: u64,
    next_sequence: u64,
    next_step: u64,
    totals: Totals,
}

impl Scheduler {
    pub fn new(limits: Limits, costs: StepCosts) -> Scheduler {
        limits.check();
        Scheduler {
            kv: KvCache::new(&limits.kv_pages),
            requests: RequestMap::default(),
            waiting: BTreeMap::new(),
            running: Vec::with_capacity(limits.running_max),
            leaving: Vec::new(),
            slots_free: (0..limits.running_max as u32).rev().map(Slot).collect(),
            in_flight: VecDeque::with_capacity(limits.steps_in_flight),
            blocked: None,
            waiting_requests: 0,
            next_request: 0,
            next_sequence: 0,
            next_step: 1,
            totals: Totals::default(),
            limits,
            costs,
        }
    }

    /// Queues a request that [`Limits::refusal`] has let in.
    pub fn add(&mut self, new: NewRequest) {
        let refusal = self.limits.refusal(new.ask, self.waiting_requests, 0);
        assert!(refusal.is_none(), "the door lets in only what fits: {refusal:?}");
        let choices = new.ask.choices;
        let number = self.next_request;
        self.next_request += 1;
        let state = RequestState {
            number,
            choices,
            open: choices,
            begun: false,
            prompt_logprobs: new.prompt_logprobs,
        };
        for choice in 0..choices {
            let id = SequenceId(self.next_sequence);
            self.next_sequence += 1;
            let turn = Turn::of(number, choice);
            self.waiting.insert(turn, Sequence::new(id, turn, choice, &new));
        }
        self.waiting_requests += 1;
        let known = self.requests.insert(new.id, state);
        assert!(known.is_none(), "request numbers are used once");
    }

    /// Ends whatever is left of a request: its client is gone.
    pub fn cancel(&mut self, request: RequestId, notices: &mut Vec<Notice>) {
        for turn in self.turns_of(request) {
            self.end(turn, End::Aborted, notices);
        }
    }

    /// Ends one choice, in whose text a stop string was found. Nothing happens if it has ended already.
    pub fn finish(&mut self, request: RequestId, choice: u32, notices: &mut Vec<Notice>) {
        if let Some(turn) = self.turns_of(request).nth(choice as usize) {
            self.end(turn, End::Stop, notices);
        }
    }

    /// Ends everything and forgets the steps in flight: the device is lost.
    pub fn fail_all(&mut self, notices: &mut Vec<Notice>) {
        while let Some(step) = self.in_flight.pop_front() {
            self.leave_step(&step);
        }
        let turns: Vec<Turn> =
            self.running.iter().map(|s| s.turn).chain(self.waiting.keys().copied()).collect();
        for turn in turns {
            self.end(turn, End::Failed, notices);
        }
    }

    /// Sequences that hold a slot and go on.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for their turn.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Requests of which no choice has begun; bounded by `waiting_max`.
    pub fn waiting_requests(&self) -> usize {
        self.waiting_requests
    }

    pub fn steps_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Nothing runs, waits or is in flight.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.in_flight.is_empty()
    }

    pub fn pages_available(&self) -> usize {
        self.kv.pages_available()
    }

    pub fn pages_total(&self) -> usize {
        self.kv.pages_total()
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Whether all books balance; for tests, and when idle.
    pub fn check_integrity(&self) -> Result<(), String> {
        let sequences = || self.running.iter().chain(&self.leaving).chain(self.waiting.values());
        let copies = self.in_flight.iter().flat_map(|step| &step.copies);
        self.kv.check_integrity(sequences().map(|s| &s.table), copies)?;
        if self.slots_free.len() + self.running.len() + self.leaving.len()
            != self.limits.running_max
        {
            return Err("slots are lost or doubled".into());
        }
        if !self.running.is_sorted_by_key(|s| s.turn) {
            return Err("running sequences are not in the order of their turns".into());
        }
        for running in &self.running {
            let passed_by = |s: &&Sequence| s.turn < running.turn && s.id < running.admitted_before;
            if let Some(waiting) = self.waiting.values().find(passed_by) {
                return Err(format!("{:?} overtook {:?}", running.turn, waiting.turn));
            }
        }
        for span in self.in_flight.iter().flat_map(|step| &step.spans) {
            let owner = sequences().find(|s| s.turn == span.turn).ok_or("a span has no owner")?;
            let pages = span.position / PAGE_TOKENS..=(span.end - 1) / PAGE_TOKENS;
            if !pages.clone().all(|page| self.kv.writable(&owner.table, page as usize)) {
                return Err(format!("a step in flight writes pages {pages:?} that are shared"));
            }
        }
        let open: u32 = self.requests.values().map(|request| request.open).sum();
        if open as usize != self.running.len() + self.waiting.len() {
            return Err("open choices are not the sequences that wait and run".into());
        }
        Ok(())
    }

    fn turns_of(&self, request: RequestId) -> impl Iterator<Item = Turn> + use<> {
        let (number, choices) =
            self.requests.get(&request).map_or((0, 0), |state| (state.number, state.choices));
        (0..choices).map(move |choice| Turn::of(number, choice))
    }

    fn running_index(&self, turn: Turn) -> Option<usize> {
        self.running.binary_search_by_key(&turn, |sequence| sequence.turn).ok()
    }

    /// The same, looking at `near` first: a step lists sequences much as they run.
    fn running_index_near(&self, near: usize, turn: Turn) -> Option<usize> {
        let is_there = self.running.get(near).is_some_and(|sequence| sequence.turn == turn);
        if is_there { Some(near) } else { self.running_index(turn) }
    }
}

#[cfg(test)]
mod tests;
