//! The step loop: the one thread that owns the device. Requests enter through [`EngineHandle::submit`], events leave
//! through each request's [`RequestStream`]. The thread plans, submits, collects and commits steps; it sleeps when there
//! is nothing to do. Text, sockets and files never come here, and no lock is held while a step runs.

mod events;
mod handle;
mod live;
mod pulse;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

pub use events::RequestStream;
use handle::{Command, Shared, Submission};
pub use handle::{EngineHandle, EngineLoss, EngineState};
use live::Live;
pub use pulse::{Pulse, PulseLimits};

use crate::backend::{Backend, BackendError, Ticket};
use crate::batch::{Span, Step, StepNumber, StepOutput};
use crate::metrics::{Load, Metrics, TokenTally};
pub use crate::scheduler::Limits;
use crate::scheduler::{
    Ask, NewRequest, Notice, Outcome, RequestId, RequestMap, Scheduler, SpanPlan, StepPlan, Totals,
};

/// Starts the thread. It ends when every handle and stream is gone, or with the device.
pub fn start(backend: Box<dyn Backend>, limits: Limits, metrics: Arc<Metrics>) -> EngineHandle {
    let (step_loop, handle) = StepLoop::new(backend, limits, metrics);
    step_loop.shared.metrics.kv_cache_is(step_loop.scheduler.pages_total());
    let thread = std::thread::Builder::new().name("step-loop".into());
    thread.spawn(move || step_loop.run()).expect("the process may start a thread");
    handle
}

/// A span as it was submitted.
struct SpanInFlight {
    request: RequestId,
    choice: u32,
    /// Its log-probabilities begin the prompt's anew.
    begins: bool,
}

struct StepInFlight {
    ticket: Ticket,
    spans: Vec<SpanInFlight>,
    rows: u32,
}

struct StepLoop {
    backend: Box<dyn Backend>,
    scheduler: Scheduler,
    requests: RequestMap<Live>,
    in_flight: VecDeque<StepInFlight>,
    commands: Receiver<Command>,
    /// Empty between uses; kept for its memory, as is `outcomes`.
    notices: Vec<Notice>,
    outcomes: Vec<Outcome>,
    tally: TokenTally,
    /// As last told to the metrics.
    totals: Totals,
    /// Waiting requests among those that this loop has taken from its channel.
    waiting_counted: usize,
    shared: Arc<Shared>,
}

impl StepLoop {
    fn new(
        backend: Box<dyn Backend>,
        limits: Limits,
        metrics: Arc<Metrics>,
    ) -> (StepLoop, EngineHandle) {
        let groups = backend.layout().groups.len();
        assert_eq!(groups, limits.kv_pages.len(), "a number of pages for each layer group");
        let (sender, commands) = std::sync::mpsc::channel();
        let scheduler = Scheduler::new(limits.clone(), backend.step_costs());
        let shared = Arc::new(Shared::new(limits, metrics, scheduler.pages_total()));
        let step_loop = StepLoop {
            backend,
            scheduler,
            requests: RequestMap::default(),
            in_flight: VecDeque::new(),
            commands,
            notices: Vec::new(),
            outcomes: Vec::new(),
            tally: shared.metrics.token_tally(),
            totals: Totals::default(),
            waiting_counted: 0,
            shared: Arc::clone(&shared),
        };
        (step_loop, EngineHandle::new(shared, sender))
    }

    fn run(mut self) {
        // Whoever waits for the engine learns of a panic too.
        let _end = handle::EndGuard(Arc::clone(&self.shared));
        while self.take_commands() {
            self.shared.beat();
            if let Err(lost) = self.advance() {
                self.lose(&lost);
                break;
            }
            self.report();
        }
    }

    /// Obeys what has come in, after waiting for it if there is nothing else to do. False: nobody can command any more.
    fn take_commands(&mut self) -> bool {
        if self.scheduler.is_idle() {
            let books = self.scheduler.check_integrity();
            assert!(books.is_ok(), "pages or slots were lost: {books:?}");
            self.shared.rest();
            match self.commands.recv() {
                Ok(command) => self.obey(command),
                Err(_) => return false,
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return true,
                // Streams can command too, so nobody listens to what may be left.
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.accept(*submission),
            Command::Cancel(request) => self.scheduler.cancel(request, &mut self.notices),
            Command::Finish(request, choice) => {
                self.scheduler.finish(request, choice, &mut self.notices);
            }
        }
        self.deliver(None);
        self.count_waiting();
    }

    fn accept(&mut self, submission: Submission) {
        let Submission { id, request, page_hashes, arrived, events } = submission;
        self.scheduler.add(NewRequest {
            id,
            ask: Ask::of(&request),
            page_hashes: page_hashes.clone(),
            prompt_logprobs: request.sampling.prompt_logprobs.is_some(),
        });
        self.waiting_counted += 1;
        let reuse = self.shared.limits.prefix_reuse;
        self.requests.insert(id, Live::new(request, page_hashes.last(), reuse, arrived, events));
    }

    /// Fills the pipeline, then takes the oldest step out of it.
    fn advance(&mut self) -> Result<(), BackendError> {
        while self.scheduler.steps_in_flight() < self.shared.limits.steps_in_flight {
            let Some(plan) = self.scheduler.plan() else { break };
            self.count_waiting();
            self.submit(plan)?;
        }
        let Some(step) = self.in_flight.pop_front() else { return Ok(()) };
        let number = step.ticket.0;
        match self.backend.collect(step.ticket) {
            Ok(output) => self.commit(output, &step.spans, step.rows),
            Err(error) => self.fail(number, error)?,
        }
        Ok(())
    }

    fn submit(&mut self, plan: StepPlan) -> Result<(), BackendError> {
        let now = Instant::now();
        let (number, rows) = (plan.number, plan.spans.iter().map(|span| span.rows).sum());
        let mut in_flight = Vec::with_capacity(plan.spans.len());
        let mut spans = Vec::with_capacity(plan.spans.len());
        for span in plan.spans {
            let SpanPlan { request, choice, begins, .. } = span;
            in_flight.push(SpanInFlight { request, choice, begins });
            let live = self.requests.get_mut(&request).expect("planned requests are live");
            live.note_planned(choice, now, &self.shared);
            spans.push(fill(live, span));
        }
        match self.backend.submit(Step { number, copies: plan.copies, spans }) {
            Ok(ticket) => {
                self.in_flight.push_back(StepInFlight { ticket, spans: in_flight, rows });
                Ok(())
            }
            Err(error) => self.fail(number, error),
        }
    }

    fn commit(&mut self, output: StepOutput, spans: &[SpanInFlight], rows: u32) {
        self.shared.metrics.stepped(rows);
        self.outcomes.clear();
        for (span, result) in spans.iter().zip(&output.spans) {
            let live = self.requests.get_mut(&span.request);
            let outcome = live.map(|live| live.take(span.choice, span.begins, result));
            self.outcomes.push(outcome.unwrap_or_default());
        }
        self.scheduler.commit(output.number, &self.outcomes, &mut self.notices);
        self.deliver(Some(output));
    }

    /// The step's requests fail and the engine goes on, unless the device is gone.
    fn fail(&mut self, number: StepNumber, error: BackendError) -> Result<(), BackendError> {
        let BackendError::StepFailed { reason, .. } = &error else { return Err(error) };
        tracing::error!(step = number.0, reason, "a step failed; its requests fail with it");
        self.scheduler.fail(number, &mut self.notices);
        self.deliver(None);
        Ok(())
    }

    fn lose(&mut self, error: &BackendError) {
        tracing::error!(%error, "the device is lost; every request fails");
        self.scheduler.fail_all(&mut self.notices);
        self.deliver(None);
        self.report();
        self.shared.lose(EngineLoss::Device(error.to_string()));
    }

    /// Turns the scheduler's notices into events. `output` is the step just committed.
    fn deliver(&mut self, mut output: Option<StepOutput>) {
        let now = Instant::now();
        let mut gone = Vec::new();
        let mut ended = Vec::new();
        for notice in self.notices.drain(..) {
            let request = match notice {
                Notice::Prompt { request, .. }
                | Notice::Token { request, .. }
                | Notice::Ended { request, .. } => request,
            };
            let live = self.requests.get_mut(&request).expect("it lives until its last notice");
            if !live.tell(notice, output.as_mut(), now, &self.tally, &self.shared.metrics) {
                gone.push(request);
            }
            if live.has_ended() {
                ended.push(request);
            }
        }
        self.tally.flush();
        for request in ended {
            self.requests.remove(&request);
            self.shared.leave();
        }
        for request in gone {
            self.scheduler.cancel(request, &mut self.notices);
        }
        if !self.notices.is_empty() {
            self.deliver(None);
        }
    }

    /// Gives the places of requests that have begun or ended back to the door.
    fn count_waiting(&mut self) {
        let now = self.scheduler.waiting_requests();
        self.shared.release_waiting(self.waiting_counted - now);
        self.waiting_counted = now;
    }

    fn report(&mut self) {
        let scheduler = &self.scheduler;
        let (available, total) = (scheduler.pages_available(), scheduler.pages_total());
        let state = EngineState {
            running: scheduler.running(),
            waiting: scheduler.waiting(),
            kv_pages_free: available,
            kv_pages_total: total,
        };
        self.shared.set_state(state);
        let kv_usage = (total - available) as f64 / total as f64;
        let load = Load { running: state.running, waiting: state.waiting, kv_usage };
        self.shared.metrics.loaded(load);
        let totals = scheduler.totals();
        self.shared.metrics.counted(self.totals, totals);
        self.totals = totals;
    }
}

/// A planned span with its token values.
fn fill(live: &Live, plan: SpanPlan) -> Span {
    Span {
        sequence: plan.sequence,
        slot: plan.slot,
        start: plan.begins.then(|| live.slot_start(plan.choice)),
        position: plan.position,
        inputs: live.inputs(plan.choice, plan.position, plan.rows),
        tables: plan.tables,
        adapter: live.adapter(),
        sample: plan.sample,
        prompt_logprobs: plan.prompt_logprobs,
    }
}

#[cfg(test)]
mod cost;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
