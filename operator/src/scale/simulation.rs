//! In: an engine, a traffic and a seed. Out: what became of the requests under one scaler. Pure and exact to repeat: chance
//! comes from the seed, time is a number. Only tests and `examples/scaling.rs` run it.
//!
//! A replica computes prompts first (half of its time while others decode), then one token for each running row; a step
//! costs a fixed time and a time per row. Requests go to a random ready replica and stay there, as kube-proxy sends them.
//! Replicas take a while to start; those that leave finish what they have. Prometheus scrapes each pod every interval.

use std::collections::VecDeque;

use plimsoll_crds::DECISIONS_MAX;

use super::decide::{Aims, Bounds, Change, Kept, Look, Seen, Tempo, TooFew, Verdict, decide};
use super::signals::{Pods, Sample, Told, gather};

/// Length of a step of the simulation, in seconds.
const TICK: f64 = 0.25;
/// Share of the device that prompts get while rows decode.
const PREFILL_SHARE: f64 = 0.5;
/// A scrape interval, and the interval of every scaler.
pub const INTERVAL: i64 = 15;
pub const TEMPO: Tempo = Tempo { interval_seconds: INTERVAL };
/// Upper bounds of both histograms, in seconds.
const BOUNDS: &[f64] = &[
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    f64::INFINITY,
];

/// Random bits from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Chance(pub u64);

impl Chance {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// In [0, 1).
    fn share(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.share()
    }

    fn index(&mut self, length: usize) -> usize {
        (self.bits() % length as u64) as usize
    }

    /// How many of `mean` expected arrivals come.
    fn arrivals(&mut self, mean: f64) -> usize {
        let end = (-mean).exp();
        let mut product = self.share();
        let mut count = 0;
        while product > end {
            product *= self.share();
            count += 1;
        }
        count
    }

    /// Around `mean`, most between a quarter and thrice of it.
    fn length(&mut self, mean: f64) -> f64 {
        (mean * -(1.0 - self.share()).ln()).clamp(mean / 8.0, mean * 4.0)
    }
}

/// One replica's hardware and model.
#[derive(Clone, Copy, Debug)]
pub struct Engine {
    pub rows: u32,
    /// A decode step takes `step_seconds + row_seconds × rows`.
    pub step_seconds: f64,
    pub row_seconds: f64,
    pub prompt_tokens_per_second: f64,
    pub start_seconds: f64,
}

/// How the mean rate goes over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Steady,
    Step,
    Ramp,
    Waves,
    Bursts,
}

/// What arrives. Rates are shares of what one replica finishes.
#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    pub shape: Shape,
    pub low: f64,
    pub high: f64,
    pub seconds: u32,
    pub prompt_tokens: f64,
    pub output_tokens: f64,
}

impl Traffic {
    /// Mean arrivals at `at`, in multiples of what one replica finishes.
    pub fn load(&self, at: f64) -> f64 {
        let part = at / f64::from(self.seconds);
        let up = match self.shape {
            Shape::Steady => 1.0,
            Shape::Step => f64::from((0.15..0.6).contains(&part)),
            Shape::Ramp => (1.0 - (part * 2.0 - 1.0).abs()).clamp(0.0, 1.0),
            Shape::Waves => 0.5 - 0.5 * (at * std::f64::consts::TAU / 2400.0).cos(),
            Shape::Bursts => f64::from(at % 900.0 < 120.0),
        };
        self.low + (self.high - self.low) * up
    }
}

/// Everything about one run but the scaler.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub engine: Engine,
    pub traffic: Traffic,
    pub aims: Aims,
    pub replicas_max: u32,
    pub seed: u64,
}

impl Scenario {
    /// A scenario of this shape out of thousands.
    pub fn random(shape: Shape, seed: u64) -> Scenario {
        let mut chance = Chance(seed.wrapping_mul(0x2545_F491_4F6C_DD1D));
        let rows = [4.0, 8.0, 16.0, 32.0][chance.index(4)];
        let step_seconds = chance.between(0.01, 0.04);
        let engine = Engine {
            rows: rows as u32,
            step_seconds,
            row_seconds: step_seconds * chance.between(0.02, 0.2),
            prompt_tokens_per_second: chance.between(1500.0, 8000.0),
            start_seconds: chance.between(10.0, 150.0),
        };
        let high = chance.between(1.5, 6.0);
        let traffic = Traffic {
            shape,
            low: chance.between(0.1, 0.6),
            high,
            seconds: 2 * 3600,
            prompt_tokens: chance.between(100.0, 1500.0),
            output_tokens: chance.between(50.0, 400.0),
        };
        let full = engine.step_seconds + engine.row_seconds * rows;
        let aims = Aims {
            queue_per_replica: 8,
            concurrency: engine.rows,
            ttft_seconds: Some(chance.between(2.0, 6.0)),
            tpot_seconds: Some(full * chance.between(2.2, 3.0)),
            stabilization_seconds: 300,
        };
        Scenario { engine, traffic, aims, replicas_max: 16, seed }
    }

    /// Requests per second that one full replica finishes.
    pub fn one_replica(&self) -> f64 {
        let Engine { rows, step_seconds, row_seconds, prompt_tokens_per_second, .. } = self.engine;
        let rows = f64::from(rows);
        let prompt = self.traffic.prompt_tokens / prompt_tokens_per_second;
        let decode = self.traffic.output_tokens * (step_seconds + row_seconds * rows) / rows;
        1.0 / (prompt + decode)
    }
}

#[derive(Clone, Debug)]
struct Request {
    arrived: f64,
    prompt_left: f64,
    tokens: f64,
    tokens_left: f64,
    first_token: Option<f64>,
}

/// Counters of one pod as a scrape finds them.
#[derive(Clone, Debug, Default)]
struct Scraped {
    at: f64,
    waiting: f64,
    running: f64,
    finished: f64,
    ttft: Vec<f64>,
    tpot: Vec<f64>,
}

#[derive(Clone, Debug)]
struct Replica {
    ready_at: f64,
    waiting: VecDeque<Request>,
    running: Vec<Request>,
    counters: Scraped,
    scrapes: VecDeque<Scraped>,
}

impl Replica {
    fn new(ready_at: f64) -> Replica {
        let counters = Scraped {
            ttft: vec![0.0; BOUNDS.len()],
            tpot: vec![0.0; BOUNDS.len()],
            ..Scraped::default()
        };
        Replica {
            ready_at,
            waiting: VecDeque::new(),
            running: Vec::new(),
            counters,
            scrapes: VecDeque::new(),
        }
    }

    /// One tick of work; tells `first` of every first token.
    fn work(&mut self, engine: &Engine, now: f64, first: &mut impl FnMut(f64, f64)) {
        while self.running.len() < engine.rows as usize {
            let Some(request) = self.waiting.pop_front() else { break };
            self.running.push(request);
        }
        let decoding = self.running.iter().filter(|request| request.prompt_left <= 0.0).count();
        let share = if decoding > 0 { PREFILL_SHARE } else { 1.0 };
        let prompts = TICK * share * engine.prompt_tokens_per_second;
        let mut left = prompts;
        let counters = &mut self.counters;
        for request in self.running.iter_mut().filter(|request| request.prompt_left > 0.0) {
            let done = request.prompt_left.min(left);
            request.prompt_left -= done;
            left -= done;
            if request.prompt_left <= 0.0 {
                let at = now + TICK * (1.0 - left / prompts);
                request.first_token = Some(at);
                note(&mut counters.ttft, at - request.arrived);
                first(request.arrived, at);
            }
        }
        let time = TICK * (1.0 - share * (1.0 - left / prompts));
        let step = engine.step_seconds + engine.row_seconds * decoding as f64;
        self.running.retain_mut(|request| {
            let Some(first) = request.first_token else { return true };
            request.tokens_left -= time / step;
            let over = request.tokens_left <= 0.0;
            if over {
                counters.finished += 1.0;
                note(&mut counters.tpot, (now + TICK - first) / request.tokens);
            }
            !over
        });
    }

    fn scrape(&mut self, now: f64) {
        self.counters.at = now;
        self.counters.waiting = self.waiting.len() as f64;
        self.counters.running = self.running.len() as f64;
        self.scrapes.push_back(self.counters.clone());
        while self.scrapes.front().is_some_and(|old| now - old.at > TEMPO.memory() as f64) {
            self.scrapes.pop_front();
        }
    }

    /// As two queries to Prometheus would bring it.
    fn told(&self, rows: u32) -> Told {
        let series = |value: fn(&Scraped) -> f64| {
            self.scrapes.iter().map(|it| Sample { at: it.at, value: value(it) }).collect::<Vec<_>>()
        };
        let mut told = Told {
            waiting: series(|it| it.waiting),
            running: series(|it| it.running),
            ..Told::default()
        };
        told.cache_usage = told
            .running
            .iter()
            .map(|it| Sample { value: 0.8 * it.value / f64::from(rows), ..*it })
            .collect();
        let Some(newest) = self.scrapes.back() else { return told };
        let window = TEMPO.window() as f64;
        let oldest = self.scrapes.iter().find(|it| newest.at - it.at <= window).unwrap_or(newest);
        // `increase` stretches what it saw to the window.
        let spans = newest.at - oldest.at;
        let stretch = if spans > 0.0 { window / spans } else { 0.0 };
        told.finished = (newest.finished - oldest.finished) * stretch;
        for (index, bound) in BOUNDS.iter().enumerate() {
            told.ttft.set(*bound, (newest.ttft[index] - oldest.ttft[index]) * stretch);
            told.tpot.set(*bound, (newest.tpot[index] - oldest.tpot[index]) * stretch);
        }
        told
    }
}

fn note(histogram: &mut [f64], seconds: f64) {
    for (count, bound) in histogram.iter_mut().zip(BOUNDS) {
        *count += f64::from(seconds <= *bound);
    }
}

/// What a scaler may know at one look.
pub struct View<'a> {
    pub now: i64,
    pub desired: u32,
    /// Of pods that are ready, how many there are and what Prometheus holds of them.
    pub pods: Pods,
    pub told: &'a [Told],
    pub scenario: &'a Scenario,
}

/// Something that chooses the number of replicas, every [`INTERVAL`].
pub trait Scaler {
    fn look(&mut self, view: &View<'_>) -> u32;
}

/// The loop of this operator.
pub struct Ours {
    kept: Kept,
    /// The last ones, newest first, as status keeps them.
    changes: Vec<Change>,
    seen: Seen,
}

impl Ours {
    pub fn new() -> Ours {
        let kept = Kept { desired: 1, decided_at: 0, capacity: None, too_few: None };
        Ours { kept, changes: Vec::new(), seen: Seen::default() }
    }

    /// As a restart leaves it: only what stands in status.
    pub fn restart(&mut self) {
        self.seen = Seen::default();
    }
}

impl Scaler for Ours {
    fn look(&mut self, view: &View<'_>) -> u32 {
        let told: Vec<&Told> = view.told.iter().collect();
        let signals = gather(&told, view.pods, view.scenario.aims.queue_per_replica, TEMPO);
        let max = view.scenario.replicas_max;
        let bounds = Bounds { min: 1, max, max_because: format!("spec.scaling.max is {max}") };
        let look = Look {
            signals: &signals,
            aims: &view.scenario.aims,
            bounds: &bounds,
            kept: &self.kept,
            tempo: TEMPO,
            now: view.now,
        };
        if let Verdict::Move { to, capacity, .. } = decide(&look, &mut self.seen) {
            self.changes.insert(0, Change { at: view.now, from: self.kept.desired, to });
            self.changes.truncate(DECISIONS_MAX);
            let too_few = TooFew::among(&self.changes);
            self.kept = Kept { desired: to, decided_at: view.now, capacity, too_few };
        }
        self.kept.desired
    }
}

/// One look of a run.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    pub at: i64,
    /// Mean arrivals in multiples of what one replica finishes.
    pub load: f64,
    pub desired: u32,
    pub ready: u32,
    pub in_flight: f64,
}

/// What became of a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Minutes of arrivals whose 90th percentile of time to first token was above the slo.
    pub late_minutes: u32,
    /// Minutes with arrivals.
    pub minutes: u32,
    pub replica_hours: f64,
    pub changes: u32,
    /// Falls after a rise and rises after a fall, as (time, up).
    pub moves: Vec<(i64, u32, u32)>,
    pub peak: u32,
    pub points: Vec<Point>,
    /// 90th percentile of time to first token by minute of arrival, in seconds.
    pub ttft_by_minute: Vec<f64>,
}

impl Outcome {
    /// How often the direction changed after `from` seconds.
    pub fn turns(&self, from: i64) -> u32 {
        let ups: Vec<bool> =
            self.moves.iter().filter(|it| it.0 >= from).map(|it| it.2 > it.1).collect();
        ups.windows(2).filter(|pair| pair[0] != pair[1]).count() as u32
    }
}

/// Runs one scenario under one scaler.
pub fn run(scenario: &Scenario, scaler: &mut impl Scaler) -> Outcome {
    let mut chance = Chance(scenario.seed ^ 0xA076_1D64_78BD_642F);
    let one = scenario.one_replica();
    let mut fleet = vec![Replica::new(0.0)];
    let mut leaving: Vec<Replica> = Vec::new();
    let mut desired = 1;
    let mut first_tokens: Vec<(f64, f64)> = Vec::new();
    let mut arrivals: Vec<f64> = Vec::new();
    let mut outcome = Outcome { peak: 1, ..Outcome::default() };
    let ticks = (f64::from(scenario.traffic.seconds) / TICK) as u64;
    let per_interval = (INTERVAL as f64 / TICK) as u64;
    for tick in 0..ticks {
        let now = tick as f64 * TICK;
        let ready: Vec<usize> = (0..fleet.len()).filter(|it| fleet[*it].ready_at <= now).collect();
        for _ in 0..chance.arrivals(scenario.traffic.load(now) * one * TICK) {
            arrivals.push(now);
            let tokens = chance.length(scenario.traffic.output_tokens);
            let request = Request {
                arrived: now,
                prompt_left: chance.length(scenario.traffic.prompt_tokens),
                tokens,
                tokens_left: tokens,
                first_token: None,
            };
            fleet[ready[chance.index(ready.len())]].waiting.push_back(request);
        }
        let mut first = |arrived, at| first_tokens.push((arrived, at));
        for replica in fleet.iter_mut().chain(&mut leaving) {
            replica.work(&scenario.engine, now, &mut first);
        }
        leaving.retain(|replica| !replica.waiting.is_empty() || !replica.running.is_empty());
        outcome.replica_hours += (fleet.len() + leaving.len()) as f64 * TICK / 3600.0;
        if tick % per_interval == per_interval / 2 {
            fleet.iter_mut().filter(|it| it.ready_at <= now).for_each(|it| it.scrape(now));
        }
        if tick % per_interval == 0 {
            let wanted = scaler.look(&view(&fleet, desired, now, scenario, &mut Vec::new()));
            if wanted != desired {
                outcome.moves.push((now as i64, desired, wanted));
            }
            desired = wanted;
            outcome.peak = outcome.peak.max(desired);
            while fleet.len() < desired as usize {
                fleet.push(Replica::new(now + scenario.engine.start_seconds));
            }
            // As a ReplicaSet does: those that are not ready go first.
            while fleet.len() > desired as usize {
                let unready = fleet.iter().position(|it| it.ready_at > now);
                leaving.push(fleet.remove(unready.unwrap_or(fleet.len() - 1)));
            }
            outcome.points.push(Point {
                at: now as i64,
                load: scenario.traffic.load(now),
                desired,
                ready: ready.len() as u32,
                in_flight: fleet.iter().map(|it| it.waiting.len() + it.running.len()).sum::<usize>()
                    as f64,
            });
        }
    }
    outcome.changes = outcome.moves.len() as u32;
    judge(&mut outcome, scenario, &arrivals, first_tokens);
    outcome
}

fn view<'a>(
    fleet: &[Replica],
    desired: u32,
    now: f64,
    scenario: &'a Scenario,
    told: &'a mut Vec<Told>,
) -> View<'a> {
    let ready: Vec<&Replica> = fleet.iter().filter(|it| it.ready_at <= now).collect();
    told.extend(ready.iter().map(|it| it.told(scenario.engine.rows)));
    let newest = ready.iter().map(|it| it.ready_at).fold(0.0, f64::max);
    let pods = Pods {
        ready: ready.len() as u32,
        unschedulable: false,
        rolling_out: false,
        settled_seconds: (now - newest) as i64,
    };
    View { now: now as i64, desired, pods, told, scenario }
}

/// Requests without a first token at the end count as late as the end is.
fn judge(
    outcome: &mut Outcome,
    scenario: &Scenario,
    arrivals: &[f64],
    mut first_tokens: Vec<(f64, f64)>,
) {
    let minutes = scenario.traffic.seconds.div_ceil(60) as usize;
    let mut late: Vec<Vec<f64>> = vec![Vec::new(); minutes];
    let mut came = vec![0; minutes];
    for arrived in arrivals {
        came[(arrived / 60.0) as usize] += 1;
    }
    first_tokens.sort_by(|one, other| one.0.total_cmp(&other.0));
    for (arrived, at) in first_tokens {
        late[(arrived / 60.0) as usize].push(at - arrived);
    }
    let slo = scenario.aims.ttft_seconds.unwrap_or(f64::INFINITY);
    for (minute, waits) in late.iter_mut().enumerate() {
        let end = f64::from(scenario.traffic.seconds) - minute as f64 * 60.0;
        waits.resize(came[minute].max(waits.len()), end);
        if waits.is_empty() {
            outcome.ttft_by_minute.push(0.0);
            continue;
        }
        waits.sort_by(f64::total_cmp);
        let p90 = waits[(waits.len() - 1) * 9 / 10];
        outcome.ttft_by_minute.push(p90);
        outcome.minutes += 1;
        outcome.late_minutes += u32::from(p90 > slo);
    }
}

#[cfg(test)]
mod tests;
