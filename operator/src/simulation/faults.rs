//! In: chance. Out: what goes wrong with a request, a watch, the clock. Without a seed nothing does.

use std::time::Duration;

use super::server::DELAY_MAX;
use super::store::Refusal;

/// SplitMix64.
#[derive(Clone)]
pub struct Chance(pub u64);

impl Chance {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Debug)]
pub enum Fault {
    None,
    Slow(Duration),
    /// Refused before anything happened.
    Refused(Refusal),
    /// Done, and the answer says that it failed.
    Lost(Refusal),
    /// The watch ends without a word.
    Drop,
    /// The watch has forgotten where it was.
    Gone,
}

impl Fault {
    /// Of a request that reads or writes.
    pub fn of_request(chance: &mut Chance, writes: bool) -> Fault {
        match chance.below(40) {
            0..4 => Fault::Slow(Duration::from_millis(chance.below(2_000))),
            4 => Fault::Slow(DELAY_MAX),
            5 => Fault::Refused(Refusal::new(500, "InternalError", "the simulation says so")),
            6 => Fault::Refused(Refusal::new(503, "ServiceUnavailable", "etcd has no leader")),
            7 => Fault::Refused(Refusal::new(429, "TooManyRequests", "come back later")),
            8 | 9 if writes => {
                Fault::Refused(Refusal::new(409, "Conflict", "the object was changed"))
            }
            10 | 11 if writes => {
                Fault::Lost(Refusal::new(504, "Timeout", "the answer came too late"))
            }
            _ => Fault::None,
        }
    }

    /// Of one event of a watch.
    pub fn of_watch(chance: &mut Chance) -> Fault {
        match chance.below(40) {
            0..6 => Fault::Slow(Duration::from_millis(chance.below(4_000))),
            6 | 7 => Fault::Drop,
            8 => Fault::Gone,
            _ => Fault::None,
        }
    }

    pub fn delay(&self) -> Duration {
        match self {
            Fault::Slow(delay) => *delay,
            _ => Duration::ZERO,
        }
    }

    pub fn before(&self) -> Option<Refusal> {
        match self {
            Fault::Refused(refusal) => Some(refusal.clone()),
            _ => None,
        }
    }

    pub fn after(&self) -> Option<Refusal> {
        match self {
            Fault::Lost(refusal) => Some(refusal.clone()),
            _ => None,
        }
    }
}
