//! Which of the plans that fit is best? First one on a GPU, then how much of the demanded load it carries, then whether its
//! cards are free now, then the objective; at last the least card memory, so that larger cards are left to larger models,
//! fewer cards, and the engine's own order of preference, most exact first. Pure.

use std::cmp::{Ordering, Reverse};

use plimsoll_crds::Objective;

use super::{Feasible, Rejected};

/// The best first.
pub fn rank(feasible: &mut [Feasible<'_>], objective: Option<Objective>) {
    feasible.sort_by(|a, b| order(a, b, objective).map_or(Ordering::Equal, |(order, _)| order));
}

/// What decides between two plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Criterion {
    Gpu,
    Load,
    Free,
    Objective(Objective),
    CardMemory,
    Quality,
}

/// Which of two comes first, and by what; None where nothing tells them apart.
pub fn order(
    a: &Feasible<'_>,
    b: &Feasible<'_>,
    objective: Option<Objective>,
) -> Option<(Ordering, Criterion)> {
    let by = |criterion: Criterion| {
        let order = compare(a, b, criterion);
        (order != Ordering::Equal).then_some((order, criterion))
    };
    by(Criterion::Gpu)
        .or_else(|| by(Criterion::Load))
        .or_else(|| by(Criterion::Free))
        .or_else(|| by(Criterion::Objective(objective?)))
        .or_else(|| by(Criterion::CardMemory))
        .or_else(|| by(Criterion::Quality))
}

fn compare(a: &Feasible<'_>, b: &Feasible<'_>, criterion: Criterion) -> Ordering {
    let key = |one: &Feasible<'_>| -> (u64, u64) {
        let Feasible { candidate, fitted, predicted } = one;
        let card = candidate.machine.card.as_ref();
        let degree = candidate.tensor_parallel;
        match criterion {
            Criterion::Gpu => (u64::from(card.is_none()), 0),
            Criterion::Load => (u64::MAX - fitted.served_tokens(), 0),
            Criterion::Free => (u64::from(!candidate.machine.has_free(degree)), 0),
            Criterion::Objective(objective) => match (objective, predicted) {
                // Nothing known comes last.
                (_, None) => (u64::MAX, u64::MAX),
                (Objective::Latency, Some(times)) => (times.tpot, times.ttft),
                (Objective::Throughput, Some(times)) => {
                    (u64::MAX - times.tokens_per_second / u64::from(degree), 0)
                }
                (Objective::Cost, Some(times)) => (times.microdollars.unwrap_or(u64::MAX), 0),
            },
            Criterion::CardMemory => {
                let one_card = card.map_or(0, |card| card.memory_bytes);
                (one_card.saturating_mul(degree.into()), degree.into())
            }
            Criterion::Quality => (candidate.preference as u64, 0),
        }
    };
    key(a).cmp(&key(b))
}

/// What can run first, and of that the nearest miss, by its part of the bound; what no size could mend comes last.
pub fn nearest(rejected: &mut [Rejected]) {
    rejected.sort_by_key(|rejected| {
        let miss = rejected.miss.map_or(u64::MAX, |miss| miss.permille());
        (Reverse(rejected.runnable), miss)
    });
}
