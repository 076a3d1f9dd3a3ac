//! Does the step loop still move? Enters: how long ago it came round, and the longest step so far. Leaves: whether it is
//! late, so that requests are better off elsewhere, and whether it hangs, so that only a restart helps. Pure.

use std::time::Duration;

/// When a step has taken too long. A step is legitimately long: prompts of a large model on a small machine take minutes,
/// and nobody knows how long before the first one is done.
#[derive(Clone, Copy, Debug)]
pub struct PulseLimits {
    /// Never late before, nor hanging.
    pub late_after: Duration,
    pub hung_after: Duration,
    /// Nor before this many times the longest step seen, up to `hung_at_last`.
    pub late_steps: u32,
    pub hung_steps: u32,
    pub hung_at_last: Duration,
}

impl Default for PulseLimits {
    fn default() -> PulseLimits {
        PulseLimits {
            late_after: Duration::from_secs(2 * 60),
            hung_after: Duration::from_secs(15 * 60),
            late_steps: 3,
            hung_steps: 10,
            hung_at_last: Duration::from_secs(60 * 60),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pulse {
    /// How long ago the loop last came round; zero while it rests.
    pub age: Duration,
    /// The longest time it took to come round.
    pub longest: Duration,
}

impl Pulse {
    pub fn is_late(self, limits: PulseLimits) -> bool {
        let bound = limits.late_after.max(self.longest * limits.late_steps);
        self.age > bound.min(limits.hung_at_last)
    }

    pub fn is_hung(self, limits: PulseLimits) -> bool {
        let bound = limits.hung_after.max(self.longest * limits.hung_steps);
        self.age > bound.min(limits.hung_at_last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_may_take_as_long_as_steps_took_before_but_not_for_ever() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        // Age and longest step in minutes; late, hung.
        let cases = [
            (0, 0, false, false),
            (2, 0, false, false),
            (3, 0, true, false),
            (15, 0, true, false),
            (16, 0, true, true),
            (9, 3, false, false),
            (10, 3, true, false),
            (30, 3, true, false),
            (31, 3, true, true),
            (60, 50, false, false),
            (61, 50, true, true),
        ];
        for (age, longest, late, hung) in cases {
            let pulse = Pulse { age: minutes(age), longest: minutes(longest) };
            let limits = PulseLimits::default();
            assert_eq!((pulse.is_late(limits), pulse.is_hung(limits)), (late, hung), "{pulse:?}");
        }
    }
}
