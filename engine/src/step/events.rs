//! A request's events on their way from the loop to whoever listens. The loop never waits for a reader: what is not read
//! gathers here up to a bound of each choice and one of all requests, and a reader that lets one fill loses the request. A
//! listener that goes away cancels it.

use std::sync::mpsc::Sender as Commands;
use std::sync::{Arc, OnceLock};

use plimsoll_contract::memory::EVENTS_BYTES_MAX;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

use super::handle::Command;
use crate::request::Event;
use crate::scheduler::{Ask, RequestId};

/// Events of one choice that may wait for their reader: minutes of reading for a person, some 300 KiB of memory.
pub const CHOICE_EVENTS_MAX: u32 = 4096;

/// Events of a request that may wait whatever the others do: a reader that keeps up is not cut for those that do not.
const FREE_EVENTS_MIN: usize = 32;
/// The same for each choice: its prompt, and what two steps bring before the reader has run.
const FREE_EVENTS_OF_CHOICE: usize = 3;
/// An event of more bytes is never free.
const FREE_EVENT_BYTES: usize = 1 << 10;

const READ_TOO_SLOWLY: &str =
    "the answer was read too slowly: more of it was waiting than the engine keeps";

/// What the waiting events of all requests may hold, in bytes.
#[derive(Clone)]
pub(super) struct Backlog(Arc<Semaphore>);

impl Default for Backlog {
    fn default() -> Backlog {
        Backlog(Arc::new(Semaphore::new(EVENTS_BYTES_MAX as usize)))
    }
}

impl Backlog {
    fn take(&self, bytes: usize) -> Result<OwnedSemaphorePermit, TryAcquireError> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.0.clone().try_acquire_many_owned(bytes)
    }
}

/// An event and its share of the backlog.
struct Waiting {
    event: Event,
    _share: Option<OwnedSemaphorePermit>,
}

/// The loop's end and the listener's end of a request's events.
pub(super) fn events(
    id: RequestId,
    ask: Ask,
    commands: Commands<Command>,
    backlog: Backlog,
) -> (EventSender, RequestStream) {
    // Each token is an event, and so are a choice's prompt and its end.
    let of_a_choice = ask.output_tokens_max.saturating_add(2).min(CHOICE_EVENTS_MAX);
    let (sender, receiver) = channel(of_a_choice as usize * ask.choices as usize);
    let cut = Arc::new(OnceLock::new());
    let open = vec![true; ask.choices as usize];
    let stream = RequestStream { id, events: receiver, cut: Arc::clone(&cut), commands, open };
    let free_events = FREE_EVENTS_MIN.max(FREE_EVENTS_OF_CHOICE * ask.choices as usize);
    (EventSender { events: sender, free_events, backlog, cut }, stream)
}

pub struct EventSender {
    events: Sender<Waiting>,
    free_events: usize,
    backlog: Backlog,
    /// Why the listener gets no more, once that is so.
    cut: Arc<OnceLock<&'static str>>,
}

impl EventSender {
    /// Never waits. False: nobody is there any more, or the reader was too slow and gets nothing further.
    pub fn send(&self, event: Event) -> bool {
        // Once an event is lost none may follow, even if there is room again.
        if self.cut.get().is_some() {
            return false;
        }
        let Ok(share) = self.share(&event) else { return self.cut() };
        match self.events.try_send(Waiting { event, _share: share }) {
            Ok(()) => true,
            Err(TrySendError::Closed(_)) => false,
            Err(TrySendError::Full(_)) => self.cut(),
        }
    }

    /// What an event takes of the backlog.
    fn share(&self, event: &Event) -> Result<Option<OwnedSemaphorePermit>, TryAcquireError> {
        let (waiting, bytes) = (self.events.max_capacity() - self.events.capacity(), event.bytes());
        if waiting < self.free_events && bytes <= FREE_EVENT_BYTES {
            return Ok(None);
        }
        self.backlog.take(bytes).map(Some)
    }

    fn cut(&self) -> bool {
        self.cut.get_or_init(|| READ_TOO_SLOWLY);
        false
    }
}

/// A request's events. Dropped before all choices have ended, it cancels the request.
pub struct RequestStream {
    id: RequestId,
    events: Receiver<Waiting>,
    cut: Arc<OnceLock<&'static str>>,
    commands: Commands<Command>,
    /// By choice.
    open: Vec<bool>,
}

impl RequestStream {
    /// The next event; none after every choice has ended.
    pub async fn next(&mut self) -> Option<Event> {
        while self.is_open() {
            let Some(Waiting { event, .. }) = self.events.recv().await else {
                let choice = self.open.iter().position(|open| *open)?;
                self.open[choice] = false;
                let message = *self.cut.get().unwrap_or(&"the engine has stopped");
                return Some(Event::Failed { choice: choice as u32, message: message.into() });
            };
            let (choice, last) = match &event {
                Event::Prompt { choice, .. } | Event::Token { choice, .. } => (*choice, false),
                Event::Finished { choice, .. } | Event::Failed { choice, .. } => (*choice, true),
            };
            let open = &mut self.open[choice as usize];
            if *open {
                *open = !last;
                return Some(event);
            }
        }
        None
    }

    /// Ends a choice in whose text a stop string was found: it brings no further event.
    pub fn finish_choice(&mut self, choice: u32) {
        if std::mem::take(&mut self.open[choice as usize]) {
            // A loop that has ended has nothing left to finish.
            let _ = self.commands.send(Command::Finish(self.id, choice));
        }
    }

    fn is_open(&self) -> bool {
        self.open.contains(&true)
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if self.is_open() {
            // A loop that has ended has nothing left to cancel.
            let _ = self.commands.send(Command::Cancel(self.id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::TokenLogprob;

    #[tokio::test]
    async fn after_a_lost_event_none_follows_even_if_there_is_room_again() {
        let (commands, _obeyed) = std::sync::mpsc::channel();
        let ask = Ask { prompt_tokens: 1, output_tokens_max: 1, choices: 1 };
        let (sender, mut stream) = events(RequestId(0), ask, commands, Backlog::default());
        let token = |token| Event::Token { choice: 0, token, logprob: None };
        let sent = [1, 2, 3, 4].map(|id| sender.send(token(id)));
        assert_eq!(sent, [true, true, true, false], "one token, the prompt and the end have room");
        assert_eq!(stream.next().await, Some(token(1)));
        assert!(!sender.send(token(5)), "the fourth would be missing");
        drop(sender);
        assert_eq!(stream.next().await, Some(token(2)));
        assert_eq!(stream.next().await, Some(token(3)));
        let last = Event::Failed { choice: 0, message: READ_TOO_SLOWLY.into() };
        assert_eq!(stream.next().await, Some(last));
        assert_eq!(stream.next().await, None);
    }
    #[tokio::test]
    async fn readers_that_keep_up_are_not_cut_for_those_that_let_events_gather() {
        let (commands, _obeyed) = std::sync::mpsc::channel();
        let ask = Ask { prompt_tokens: 1, output_tokens_max: 4096, choices: 64 };
        let token = || {
            let top = vec![(7, -1.0); 20];
            let logprob = Some(TokenLogprob { token: 7, logprob: -1.0, rank: 1, top });
            Event::Token { choice: 0, token: 7, logprob }
        };
        let backlog = Backlog::default();
        let open = |number| events(RequestId(number), ask, commands.clone(), backlog.clone());
        let (hoarding, hoarder) = open(0);
        let mut sent = 0;
        while hoarding.send(token()) {
            sent += 1;
        }
        let most = EVENTS_BYTES_MAX as usize / token().bytes() + 64 * FREE_EVENTS_OF_CHOICE;
        assert_eq!(sent, most, "less than the {} of the channel", 64 * CHOICE_EVENTS_MAX);
        let (prompt, mut reader) = open(1);
        for _ in 0..1000 {
            assert!(prompt.send(token()), "it waits for nobody");
            assert_eq!(reader.next().await, Some(token()));
        }
        // All choices at once: a step brings their prompts, each of the next two a token.
        let (many, mut reader) = open(3);
        for choice in 0..64 {
            assert!(many.send(Event::Prompt { choice, cached_tokens: 0, logprobs: Vec::new() }));
        }
        for choice in (0..64).chain(0..64) {
            assert!(many.send(Event::Token { choice, token: 7, logprob: None }));
        }
        assert!(!many.send(token()), "a third step waits for its reader");
        for _ in 0..3 * 64 {
            assert!(!matches!(reader.next().await, Some(Event::Failed { .. })));
        }
        drop(hoarder);
        let (late, _unread) = open(2);
        assert!((0..1000).all(|_| late.send(token())), "what nobody reads is free again");
    }
}
