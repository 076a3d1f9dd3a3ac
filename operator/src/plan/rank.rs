//! Which of the plans that fit is best? First one on a GPU, then how much of the demanded load it carries, then the card
//! with the least memory, so that larger ones are left to larger models, then the engine's own order of preference, most
//! exact first. Pure.

use std::cmp::Reverse;

use super::candidates::Candidate;
use super::memory::Fitted;

/// The best first.
pub fn rank(feasible: &mut [(Candidate, Fitted)]) {
    feasible.sort_by_key(|(candidate, fitted)| {
        let card = candidate.machine.card.as_ref().map(|card| card.memory_bytes);
        let preference = Reverse(candidate.preference);
        Reverse((card.is_some(), fitted.served_tokens(), Reverse(card), preference))
    });
}
