//! One choice of one request, in lengths.

use super::{NewRequest, RequestId};
use crate::batch::{SequenceId, Slot};
use crate::kv_cache::{BlockTable, PageHash};

/// Whose turn it is: earlier ones are smaller. A request's second choice has the round of the next request's first and
/// comes behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Turn {
    round: u64,
    choice: u32,
}

impl Turn {
    /// `request` counts those that arrived before.
    pub fn of(request: u64, choice: u32) -> Turn {
        Turn { round: request + u64::from(choice), choice }
    }
}

pub struct Sequence {
    /// Counts choices in order of arrival.
    pub id: SequenceId,
    pub turn: Turn,
    pub request: RequestId,
    pub choice: u32,
    pub prompt: u32,
    pub output_max: u32,
    /// Positions whose KV is computed once every step in flight is done.
    pub computed: u32,
    /// The same, of committed steps alone.
    pub committed: u32,
    /// Output tokens once every step in flight is done.
    pub sampled: u32,
    /// The same, of committed steps alone.
    pub generated: u32,
    /// Of the full pages of prompt and committed output; empty where prefixes are not reused.
    pub hashes: Vec<PageHash>,
    /// Leading pages that need no publishing any more.
    pub published: usize,
    pub table: BlockTable,
    /// Meaningful while running or leaving.
    pub slot: Slot,
    /// The next span tells the backend what the slot holds.
    pub begins: bool,
    /// Steps in flight that contain it.
    pub in_flight: u32,
    /// Choices from this one on arrived after its last admission.
    pub admitted_before: SequenceId,
    /// How much of the prompt was found; set by the first admission.
    pub cached_tokens: Option<u32>,
    /// The notice about the prompt was given.
    pub prompt_noticed: bool,
    /// This run reports the log-probabilities of the prompt.
    pub prompt_logprobs: bool,
}

impl Sequence {
    pub fn new(id: SequenceId, turn: Turn, choice: u32, new: &NewRequest) -> Sequence {
        Sequence {
            id,
            turn,
            request: new.id,
            choice,
            prompt: new.ask.prompt_tokens,
            output_max: new.ask.output_tokens_max,
            computed: 0,
            committed: 0,
            sampled: 0,
            generated: 0,
            hashes: new.page_hashes.clone(),
            published: 0,
            table: BlockTable::default(),
            slot: Slot(0),
            begins: true,
            in_flight: 0,
            admitted_before: id,
            cached_tokens: None,
            prompt_noticed: false,
            prompt_logprobs: false,
        }
    }

    /// Tokens that exist once every step in flight is done.
    pub fn length(&self) -> u32 {
        self.prompt + self.sampled
    }

    /// Rows that can be computed now: 1 while decoding, none once the last token is being sampled.
    pub fn rows_left(&self) -> u32 {
        if self.sampled == self.output_max { 0 } else { self.length() - self.computed }
    }
}
