//! Which of the plans that fit is best? First how much of the demanded load it carries, then the engine's own order of
//! preference, most exact first. Pure.

use std::cmp::Reverse;

use super::candidates::Candidate;
use super::memory::Fitted;

/// Position of the best; None where nothing fits.
pub fn best(feasible: &[(Candidate, Fitted)]) -> Option<usize> {
    let key = |(candidate, fitted): &(Candidate, Fitted)| {
        (fitted.served_tokens(), Reverse(candidate.preference))
    };
    (0..feasible.len()).max_by_key(|index| key(&feasible[*index]))
}
