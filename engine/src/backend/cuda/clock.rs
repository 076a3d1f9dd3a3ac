//! How long the device works on a step and how long it waits for the next, by its own clock. Kept for the last steps, so
//! that a bench can say what a step costs beside its kernels.

use std::collections::VecDeque;
use std::sync::Mutex;

/// Steps that are remembered.
const STEPS_MAX: usize = 4096;

/// Seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTime {
    /// Between the end of the step before and the beginning of this one.
    pub idle: f64,
    pub busy: f64,
}

#[derive(Debug, Default)]
pub struct StepClock {
    steps: Mutex<VecDeque<StepTime>>,
}

impl StepClock {
    pub fn note(&self, time: StepTime) {
        let mut steps = self.steps.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if steps.len() == STEPS_MAX {
            steps.pop_front();
        }
        steps.push_back(time);
    }

    /// What was noted since the last call.
    pub fn take(&self) -> Vec<StepTime> {
        let mut steps = self.steps.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        steps.drain(..).collect()
    }
}
