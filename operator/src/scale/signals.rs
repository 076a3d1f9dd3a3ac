//! In: what Prometheus holds of each pod. Out: the sums and percentiles that a decision needs. Pure. A pod whose samples are
//! old or missing does not report; whether that matters is for `decide` to say.

use super::decide::{QUEUE_COUNTED, Signals, Tempo};

/// Percentile that is held against the slo.
const PERCENTILE: f64 = 0.9;
/// Fewer requests than this make no percentile.
const REQUESTS_MIN: f64 = 5.0;

/// One sample of a gauge; seconds by Prometheus' clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    pub at: f64,
    pub value: f64,
}

/// A histogram: upper bounds in seconds with the requests at or below each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Buckets(Vec<(f64, f64)>);

/// What Prometheus holds of one pod: fresh samples, oldest first, and increases over the window.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    pub waiting: Vec<Sample>,
    pub running: Vec<Sample>,
    pub cache_usage: Vec<Sample>,
    pub finished: f64,
    pub refused: f64,
    pub ttft: Buckets,
    pub tpot: Buckets,
}

/// What Kubernetes says of the object's pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pods {
    pub ready: u32,
    pub unschedulable: bool,
    pub rolling_out: bool,
    pub settled_seconds: i64,
}

/// Sums what the ready pods told; `told` holds those of them that Prometheus knows. Pods that had more than
/// `queue_per_replica` waiting at any of their samples have no part in percentiles: what waited there has been told.
pub fn gather(told: &[&Told], pods: Pods, queue_per_replica: u32, tempo: Tempo) -> Signals {
    let window = tempo.window() as f64;
    let reporting: Vec<&Told> = told
        .iter()
        .copied()
        .filter(|told| !told.waiting.is_empty() && !told.running.is_empty())
        .collect();
    let mut signals = Signals {
        ready: pods.ready,
        reporting: u32::try_from(reporting.len()).unwrap_or(u32::MAX),
        unschedulable: pods.unschedulable,
        rolling_out: pods.rolling_out,
        settled_seconds: pods.settled_seconds,
        ..Signals::default()
    };
    let full: Vec<f64> = reporting.iter().filter_map(|told| full_finishes(told, window)).collect();
    if !full.is_empty() {
        signals.full_finishes = Some(full.iter().sum::<f64>() / full.len() as f64);
    }
    let (mut ttft, mut tpot) = (Buckets::default(), Buckets::default());
    for told in &reporting {
        let queue = f64::from(queue_per_replica);
        signals.waiting += last(&told.waiting);
        signals.waiting_counted += last(&told.waiting).min(QUEUE_COUNTED * queue);
        signals.running += last(&told.running);
        signals.cache_usage += last(&told.cache_usage) / reporting.len() as f64;
        signals.growth_per_second += growth(&told.waiting, window) + growth(&told.running, window);
        signals.finished_per_second += told.finished / window;
        signals.refused_per_second += told.refused / window;
        let calm = |sample: &Sample| sample.value <= queue;
        if told.waiting.iter().all(calm) {
            ttft.add(&told.ttft);
            tpot.add(&told.tpot);
        }
    }
    signals.ttft_seconds = ttft.quantile(PERCENTILE);
    signals.tpot_seconds = tpot.quantile(PERCENTILE);
    signals
}

fn last(samples: &[Sample]) -> f64 {
    samples.last().map_or(0.0, |sample| sample.value)
}

/// The samples of the last `window` seconds before the newest.
fn within(samples: &[Sample], window: f64) -> &[Sample] {
    let newest = samples.last().map_or(0.0, |sample| sample.at);
    let from = samples.iter().position(|sample| newest - sample.at <= window);
    &samples[from.unwrap_or(0)..]
}

/// What a pod finishes per second, where requests have been waiting in it through the window and for as long as a request
/// takes: before that its rows were not full, or were filled too recently for requests to end.
fn full_finishes(told: &Told, window: f64) -> Option<f64> {
    let newest = told.waiting.last()?.at;
    let full = told.waiting.iter().rev().take_while(|sample| sample.value >= 1.0);
    let full_seconds = full.last().map_or(0.0, |sample| newest - sample.at);
    let each = told.finished / window;
    let request_seconds = last(&told.running) / each;
    (each > 0.0 && full_seconds >= window.max(request_seconds)).then_some(each)
}

fn growth(samples: &[Sample], window: f64) -> f64 {
    match within(samples, window) {
        [first, .., last] if last.at > first.at => {
            (last.value - first.value) / (last.at - first.at)
        }
        _ => 0.0,
    }
}

impl Buckets {
    /// Counts the requests at or below `bound` seconds; the same bound again, as two scrape jobs bring it, is no more of them.
    pub fn set(&mut self, bound: f64, requests: f64) {
        match self.place(bound) {
            Ok(held) => self.0[held].1 = self.0[held].1.max(requests),
            Err(free) => self.0.insert(free, (bound, requests)),
        }
    }

    fn add(&mut self, other: &Buckets) {
        for (bound, requests) in &other.0 {
            match self.place(*bound) {
                Ok(held) => self.0[held].1 += requests,
                Err(free) => self.0.insert(free, (*bound, *requests)),
            }
        }
    }

    fn place(&self, bound: f64) -> Result<usize, usize> {
        self.0.binary_search_by(|(held, _)| held.total_cmp(&bound))
    }

    /// As PromQL's `histogram_quantile`: linear within a bucket, the highest bound where it lies beyond.
    fn quantile(&self, share: f64) -> Option<f64> {
        let total = self.0.last().map(|(_, count)| *count)?;
        if total < REQUESTS_MIN {
            return None;
        }
        let rank = share * total;
        let index = self.0.iter().position(|(_, count)| *count >= rank)?;
        let (lower, below) = if index == 0 { (0.0, 0.0) } else { self.0[index - 1] };
        let (upper, count) = self.0[index];
        if upper.is_infinite() {
            return Some(lower);
        }
        let part = if count > below { (rank - below) / (count - below) } else { 1.0 };
        Some(lower + (upper - lower) * part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPO: Tempo = Tempo { interval_seconds: 15 };

    fn samples(values: &[f64]) -> Vec<Sample> {
        let timed = values.iter().enumerate();
        timed.map(|(index, value)| Sample { at: 15.0 * index as f64, value: *value }).collect()
    }

    fn told(waiting: &[f64], running: &[f64]) -> Told {
        Told { waiting: samples(waiting), running: samples(running), ..Told::default() }
    }

    #[test]
    fn sums_are_over_pods_with_fresh_samples_and_growth_is_per_second() {
        let busy = Told { finished: 60.0, ..told(&[0.0, 3.0, 6.0, 9.0, 12.0], &[4.0; 5]) };
        let idle = told(&[0.0], &[1.0]);
        let silent = Told::default();
        let pods = Pods { ready: 3, ..Pods::default() };
        let signals = gather(&[&busy, &idle, &silent], pods, 8, TEMPO);
        assert_eq!((signals.ready, signals.reporting), (3, 2));
        assert_eq!((signals.waiting, signals.running), (12.0, 5.0));
        assert_eq!(signals.growth_per_second, 12.0 / 60.0);
        assert_eq!(signals.finished_per_second, 1.0);
        assert_eq!(signals.full_finishes, None, "nothing waited at the first sample of the window");
    }

    #[test]
    fn what_a_pod_can_is_told_by_one_in_which_requests_wait_for_longer_than_they_take() {
        let with = |finished: f64, waiting: &[f64]| Told {
            finished,
            ..told(waiting, &vec![4.0; waiting.len()])
        };
        let finishes = |told: &Told| gather(&[told], Pods::default(), 8, TEMPO).full_finishes;
        // 12 in 60 s: one takes 20 s.
        assert_eq!(finishes(&with(12.0, &[0.0, 5.0, 2.0, 1.0, 7.0, 3.0])), Some(0.2));
        assert_eq!(
            finishes(&with(12.0, &[5.0, 5.0, 2.0, 0.0, 7.0, 3.0])),
            None,
            "it was empty once"
        );
        assert_eq!(finishes(&with(12.0, &[5.0])), None, "one sample is no time");
        // 3 in 60 s: one takes 80 s, and it has been full for 75 s.
        assert_eq!(finishes(&with(3.0, &[0.0, 5.0, 2.0, 1.0, 7.0, 3.0, 1.0])), None);
        assert_eq!(finishes(&with(3.0, &[1.0, 5.0, 2.0, 1.0, 7.0, 3.0, 1.0])), Some(0.05));
        assert_eq!(finishes(&with(0.0, &[1.0; 6])), None);
    }

    #[test]
    fn a_percentile_is_that_of_all_pods_together() {
        let mut one = Buckets::default();
        let mut other = Buckets::default();
        // 10 requests within 1 s here, 10 between 1 s and 2 s there: the 18th of 20 lies at 1.8 s.
        for (bound, first, second) in
            [(1.0, 10.0, 0.0), (2.0, 10.0, 10.0), (f64::INFINITY, 10.0, 10.0)]
        {
            one.set(bound, first);
            other.set(bound, second);
        }
        let with = |ttft: Buckets| Told { ttft, ..told(&[0.0], &[0.0]) };
        let signals = gather(&[&with(one), &with(other.clone())], Pods::default(), 8, TEMPO);
        assert!((signals.ttft_seconds.unwrap() - 1.8).abs() < 1e-9);
        assert_eq!(signals.tpot_seconds, None);
        // Beyond the last bound nothing is known but that bound.
        let mut slow = Buckets::default();
        slow.set(2.0, 0.0);
        slow.set(f64::INFINITY, 10.0);
        assert_eq!(slow.quantile(0.9), Some(2.0));
        let mut few = Buckets::default();
        few.set(f64::INFINITY, 4.0);
        assert_eq!(few.quantile(0.9), None);
    }

    #[test]
    fn what_piled_up_in_one_pod_counts_to_a_bound_and_makes_no_percentile() {
        let mut slow = Buckets::default();
        slow.set(80.0, 100.0);
        let piled = Told { ttft: slow.clone(), ..told(&[9.0, 0.0, 300.0], &[4.0]) };
        let calm = Told { ttft: slow, ..told(&[8.0, 0.0], &[4.0]) };
        let of = |told: &Told| gather(&[told], Pods::default(), 8, TEMPO);
        assert_eq!((of(&piled).waiting, of(&piled).waiting_counted), (300.0, 16.0));
        assert_eq!(of(&piled).ttft_seconds, None);
        assert_eq!(of(&calm).ttft_seconds, Some(72.0));
    }

    #[test]
    fn aibrix_2780_two_scrape_jobs_of_one_pod_count_its_requests_once() {
        let mut twice = Buckets::default();
        twice.set(1.0, 7.0);
        twice.set(1.0, 7.0);
        assert_eq!(twice.0, [(1.0, 7.0)]);
    }
}
