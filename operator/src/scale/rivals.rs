//! What others would choose on the same signals, for comparison: the HorizontalPodAutoscaler's algorithm with its defaults,
//! and KEDA's use of it. Written from the documented algorithm. Only the simulation runs it.

use std::collections::VecDeque;

use super::signals::Told;
use super::simulation::{INTERVAL, Scaler, View};

const TOLERANCE: f64 = 0.1;
const DOWN_STABILIZATION: i64 = 300;
/// KEDA asks its source this often, in seconds.
const KEDA_POLLING: i64 = 30;

/// What is averaged over pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Requests that wait; the target is the queue per replica.
    Waiting,
    /// Requests that wait or run; the target is 80 % of what one pod runs at once.
    InFlight,
}

impl Measure {
    fn of(self, told: &Told) -> f64 {
        let last = |samples: &[super::signals::Sample]| samples.last().map_or(0.0, |it| it.value);
        match self {
            Measure::Waiting => last(&told.waiting),
            Measure::InFlight => last(&told.waiting) + last(&told.running),
        }
    }

    fn target(self, view: &View<'_>) -> f64 {
        match self {
            Measure::Waiting => f64::from(view.scenario.aims.queue_per_replica),
            Measure::InFlight => 0.8 * f64::from(view.scenario.aims.concurrency),
        }
    }
}

/// A Pods metric with an average value, default behaviour: 10 % tolerance, at most double or 4 more every 15 s, down to
/// the highest recommendation of 5 minutes.
pub struct Hpa {
    measure: Measure,
    advice: VecDeque<(i64, u32)>,
}

impl Hpa {
    pub fn new(measure: Measure) -> Hpa {
        Hpa { measure, advice: VecDeque::new() }
    }

    fn recommend(&self, view: &View<'_>) -> u32 {
        let target = self.measure.target(view);
        let known = view.told.iter().filter(|told| !told.waiting.is_empty());
        let values: Vec<f64> = known.map(|told| self.measure.of(told)).collect();
        if values.is_empty() {
            return view.desired;
        }
        let ready = values.len() as f64;
        let sum: f64 = values.iter().sum();
        let ratio = sum / ready / target;
        if (ratio - 1.0).abs() <= TOLERANCE {
            return view.desired;
        }
        let starting = f64::from(view.desired) - ready;
        if starting <= 0.0 || ratio < 1.0 {
            return (ratio * ready).ceil() as u32;
        }
        // Pods that do not report yet count as idle before a rise.
        let calmer = sum / (ready + starting) / target;
        if calmer <= 1.0 + TOLERANCE {
            return view.desired;
        }
        (calmer * (ready + starting)).ceil() as u32
    }
}

impl Scaler for Hpa {
    fn look(&mut self, view: &View<'_>) -> u32 {
        let advice = self.recommend(view);
        behave(&mut self.advice, advice, view)
    }
}

/// An External metric with an average value, as a ScaledObject makes it: the sum over all pods, asked for every 30 s. The
/// cool-down concerns scaling to zero alone, which nobody does here.
pub struct Keda {
    sum: f64,
    asked_at: i64,
    advice: VecDeque<(i64, u32)>,
}

impl Keda {
    pub fn new() -> Keda {
        Keda { sum: 0.0, asked_at: -KEDA_POLLING, advice: VecDeque::new() }
    }
}

impl Scaler for Keda {
    fn look(&mut self, view: &View<'_>) -> u32 {
        if view.now - self.asked_at >= KEDA_POLLING {
            self.asked_at = view.now;
            self.sum = view.told.iter().map(|told| Measure::Waiting.of(told)).sum();
        }
        let target = Measure::Waiting.target(view);
        let ratio = self.sum / (target * f64::from(view.desired));
        let advice = if (ratio - 1.0).abs() <= TOLERANCE {
            view.desired
        } else {
            (self.sum / target).ceil() as u32
        };
        behave(&mut self.advice, advice, view)
    }
}

/// Default behaviour of both directions.
fn behave(advice: &mut VecDeque<(i64, u32)>, wanted: u32, view: &View<'_>) -> u32 {
    let wanted = wanted.clamp(1, view.scenario.replicas_max);
    advice.push_back((view.now, wanted));
    while advice.front().is_some_and(|(at, _)| view.now - at > DOWN_STABILIZATION) {
        advice.pop_front();
    }
    let whole = view.now >= DOWN_STABILIZATION - INTERVAL;
    let highest = advice.iter().map(|(_, wanted)| *wanted).max().unwrap_or(wanted);
    if wanted > view.desired {
        wanted.min((view.desired * 2).max(view.desired + 4))
    } else if whole {
        highest.min(view.desired)
    } else {
        view.desired
    }
}
