//! The step loop as the rest of the process sees it: submit and watch; to listen and to cancel stand in `events`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use super::events::{Backlog, EventSender, RequestStream, events};
use super::pulse::Pulse;
use crate::kv_cache::{PageHash, page_hashes};
use crate::metrics::Metrics;
use crate::request::{Refusal, Request};
use crate::scheduler::{Ask, Limits, RequestId};

pub(super) enum Command {
    Submit(Box<Submission>),
    Cancel(RequestId),
    Finish(RequestId, u32),
}

pub(super) struct Submission {
    pub id: RequestId,
    pub request: Request,
    pub page_hashes: Vec<PageHash>,
    pub arrived: Instant,
    pub events: EventSender,
}

impl Ask {
    pub(super) fn of(request: &Request) -> Ask {
        Ask {
            prompt_tokens: u32::try_from(request.prompt.len()).unwrap_or(u32::MAX),
            output_tokens_max: request.stop.output_tokens_max,
            choices: request.choices,
        }
    }
}

/// A snapshot, at most one step old.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineState {
    pub running: usize,
    pub waiting: usize,
    /// Includes pages that are kept only for reuse.
    pub kv_pages_free: usize,
    pub kv_pages_total: usize,
}

/// Why the engine will not answer any more; the process ends with the matching exit reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineLoss {
    Device(String),
    /// A defect of ours.
    Panicked,
}

/// What the loop's thread and everybody else see.
pub(super) struct Shared {
    pub limits: Limits,
    pub metrics: Arc<Metrics>,
    started: Instant,
    requests: AtomicU64,
    /// Requests of which no choice has begun, those still in the channel included.
    waiting: AtomicUsize,
    /// Requests that have not ended.
    active: AtomicUsize,
    shutting_down: AtomicBool,
    backlog: Backlog,
    /// Notified whenever `active` falls to zero, and by the end of the loop.
    drained: Notify,
    resting: AtomicBool,
    /// When the loop last came round, in milliseconds after `started`.
    beat_ms: AtomicU64,
    /// The longest that coming round has taken.
    longest_ms: AtomicU64,
    /// How long the request that began last had waited, for the hint to those who are refused.
    queue_ms: AtomicU64,
    state: watch::Sender<EngineState>,
    loss: watch::Sender<Option<EngineLoss>>,
}

impl Shared {
    pub fn new(limits: Limits, metrics: Arc<Metrics>, kv_pages_total: usize) -> Shared {
        let state =
            EngineState { kv_pages_free: kv_pages_total, kv_pages_total, ..Default::default() };
        Shared {
            limits,
            metrics,
            started: Instant::now(),
            requests: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            shutting_down: AtomicBool::new(false),
            backlog: Backlog::default(),
            drained: Notify::new(),
            resting: AtomicBool::new(true),
            beat_ms: AtomicU64::new(0),
            longest_ms: AtomicU64::new(0),
            queue_ms: AtomicU64::new(0),
            state: watch::Sender::new(state),
            loss: watch::Sender::new(None),
        }
    }

    pub fn beat(&self) {
        self.come_round();
        self.resting.store(false, SeqCst);
    }

    pub fn rest(&self) {
        self.come_round();
        self.queue_ms.store(0, SeqCst);
        self.resting.store(true, SeqCst);
    }

    fn come_round(&self) {
        let now_ms = self.started.elapsed().as_millis() as u64;
        let took_ms = now_ms - self.beat_ms.swap(now_ms, SeqCst);
        if !self.resting.load(SeqCst) {
            self.longest_ms.fetch_max(took_ms, SeqCst);
        }
    }

    pub fn note_queue_time(&self, queued: Duration) {
        self.queue_ms.store(queued.as_millis() as u64, SeqCst);
    }

    pub fn set_state(&self, state: EngineState) {
        self.state.send_if_modified(|old| std::mem::replace(old, state) != state);
    }

    pub fn release_waiting(&self, requests: usize) {
        self.waiting.fetch_sub(requests, SeqCst);
    }

    /// A request has ended.
    pub fn leave(&self) {
        if self.active.fetch_sub(1, SeqCst) == 1 {
            self.drained.notify_waiters();
        }
    }

    pub fn lose(&self, loss: EngineLoss) {
        self.shutting_down.store(true, SeqCst);
        self.loss.send_replace(Some(loss));
        self.drained.notify_waiters();
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.waiting.load(SeqCst) == 0 && self.active.load(SeqCst) == 0
    }

    /// Takes a place in the queue, or says why there is none.
    fn enter(&self, ask: Ask) -> Result<(), Refusal> {
        // Counted first, so that drained() cannot miss whoever passes the check.
        self.active.fetch_add(1, SeqCst);
        let refused = if self.shutting_down.load(SeqCst) {
            Some(Refusal::ShuttingDown)
        } else {
            let mut refusal = None;
            let entered = self.waiting.fetch_update(SeqCst, SeqCst, |waiting| {
                refusal = self.limits.refusal(ask, waiting, self.retry_after_seconds());
                refusal.is_none().then_some(waiting + 1)
            });
            if entered.is_ok() { None } else { refusal }
        };
        match refused {
            None => Ok(()),
            Some(refusal) => {
                self.metrics.refused(&refusal);
                self.leave();
                Err(refusal)
            }
        }
    }

    /// As long as the last one waited, but not longer than a client will remember.
    fn retry_after_seconds(&self) -> u64 {
        self.queue_ms.load(SeqCst).div_ceil(1000).clamp(1, 60)
    }
}

/// Reports a panic of the loop, so that nobody waits for it.
pub(super) struct EndGuard(pub Arc<Shared>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lose(EngineLoss::Panicked);
        }
    }
}

#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    commands: Sender<Command>,
}

impl EngineHandle {
    pub(super) fn new(shared: Arc<Shared>, commands: Sender<Command>) -> EngineHandle {
        EngineHandle { shared, commands }
    }

    /// Queues a request, or refuses it at once. Never waits; hashing a long prompt takes about a microsecond per 64
    /// tokens.
    pub fn submit(&self, request: Request) -> Result<RequestStream, Refusal> {
        let arrived = Instant::now();
        let ask = Ask::of(&request);
        self.shared.enter(ask)?;
        self.shared.metrics.accepted(ask.choices, ask.output_tokens_max);
        let reuse = self.shared.limits.prefix_reuse;
        let page_hashes =
            if reuse { page_hashes(&request.prompt, &request.salt) } else { Vec::new() };
        let id = RequestId(self.shared.requests.fetch_add(1, SeqCst));
        let backlog = self.shared.backlog.clone();
        let (events, stream) = events(id, ask, self.commands.clone(), backlog);
        let submission = Submission { id, request, page_hashes, arrived, events };
        // A loop that has ended drops the submission, and with it the sender: the stream then reports a failure.
        let _ = self.commands.send(Command::Submit(Box::new(submission)));
        Ok(stream)
    }

    /// Whether the queue would take one more: asked before a prompt is tokenized, and only a hint, since `submit` decides.
    pub fn has_room(&self) -> Result<(), Refusal> {
        let waiting = self.shared.waiting.load(SeqCst);
        if waiting < self.shared.limits.waiting_max {
            return Ok(());
        }
        let retry_after_seconds = self.shared.retry_after_seconds();
        let refusal = Refusal::QueueFull { waiting, retry_after_seconds };
        self.shared.metrics.refused(&refusal);
        Err(refusal)
    }

    pub fn pulse(&self) -> Pulse {
        let Shared { started, resting, beat_ms, longest_ms, .. } = &*self.shared;
        let since_beat =
            || started.elapsed().saturating_sub(Duration::from_millis(beat_ms.load(SeqCst)));
        Pulse {
            age: if resting.load(SeqCst) { Duration::ZERO } else { since_beat() },
            longest: Duration::from_millis(longest_ms.load(SeqCst)),
        }
    }

    pub fn state(&self) -> EngineState {
        *self.shared.state.borrow()
    }

    /// From now on every request is refused.
    pub fn begin_shutdown(&self) {
        self.shared.shutting_down.store(true, SeqCst);
        self.shared.drained.notify_waiters();
    }

    /// Waits until shutdown has begun and no request is left, or the engine is lost.
    pub async fn drained(&self) {
        loop {
            let mut notified = std::pin::pin!(self.shared.drained.notified());
            notified.as_mut().enable();
            let stopped = self.shared.shutting_down.load(SeqCst);
            let empty = self.shared.active.load(SeqCst) == 0;
            if stopped && (empty || self.shared.loss.borrow().is_some()) {
                return;
            }
            notified.await;
        }
    }

    /// Waits until the engine is lost, which ends the process.
    pub async fn lost(&self) -> EngineLoss {
        let mut loss = self.shared.loss.subscribe();
        let lost = loss.wait_for(Option::is_some).await.expect("the handle holds the sender");
        lost.clone().expect("waited for it")
    }
}
