//! In: what the pods of one object told, the aims and bounds of its spec, what was decided before. Out: whether another
//! number of replicas is wanted, and why, with the figures. Pure: time comes in as seconds. Never here: a metric's name, a
//! client. docs/scaling.md says the same for users.
//!
//! Up: at once, by as many as the arrivals need, and at most to the double. Down: only after every look within the
//! stabilisation window found that fewer would do. What is not known never takes a replica away.

use std::collections::VecDeque;

/// Share of what one replica can finish that a rise reckons with; the rest is for chance.
const LOAD_PLANNED: f64 = 0.8;
const LOAD_WHILE_BEHIND: f64 = 0.65;
/// Share of it that fewer replicas may have to carry. Below [`LOAD_PLANNED`], so that a rise is not taken back at once.
const LOAD_AFTER_FALL: f64 = 0.75;
/// Share of the rows of a step that fewer replicas may have to fill.
const ROWS_AFTER_FALL: f64 = 0.7;
/// Share of the KV cache above which requests soon wait for pages or are preempted, and below which it must stay after a fall.
const CACHE_FULL: f64 = 0.9;
const CACHE_AFTER_FALL: f64 = 0.7;
/// Share of the slo that the percentile may be expected to reach after a fall.
const LATENCY_AFTER_FALL: f64 = 0.9;
/// A percentile this many times the slo counts as no more: beyond, latency says that it is late, not by how many replicas.
const LATENCY_RATIO_MAX: f64 = 1.5;
/// See [`Signals::waiting_counted`].
pub const QUEUE_COUNTED: f64 = 2.0;
/// How far one look moves what is known of a replica towards what it finished.
const LEARN_SHARE: f64 = 0.25;
/// A rise at most doubles, but may always add this many.
const RISE_MIN: u32 = 2;
/// What one replica can do is forgotten after this, as traffic changes its kind; so is what were too few.
pub const CAPACITY_SECONDS_MAX: i64 = 3600;

/// How often the loop looks, and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tempo {
    pub interval_seconds: i64,
}

impl Tempo {
    /// Rates and percentiles cover this long.
    pub fn window(self) -> i64 {
        4 * self.interval_seconds
    }

    /// Samples of gauges are asked for this far back.
    pub fn memory(self) -> i64 {
        12 * self.interval_seconds
    }

    /// A pod whose newest sample is older than this does not report.
    pub fn fresh(self) -> i64 {
        6 * self.interval_seconds
    }

    /// Looks further apart than this are not one observation.
    fn gap_max(self) -> i64 {
        4 * self.interval_seconds
    }

    /// Pods that have not become ready for this long after a rise are not counted on any more.
    fn start_patience(self) -> i64 {
        10 * self.window()
    }
}

/// What the pods of one object told. Sums are over the pods that report.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Signals {
    /// Pods that answer, by Kubernetes.
    pub ready: u32,
    /// Those of them with fresh samples.
    pub reporting: u32,
    /// The scheduler has no node for a pod.
    pub unschedulable: bool,
    /// Pods of an older revision are being replaced.
    pub rolling_out: bool,
    /// Since the newest ready pod became ready.
    pub settled_seconds: i64,
    pub waiting: f64,
    /// The same, each pod's queue counted up to [`QUEUE_COUNTED`] times what may wait: what piled up in one pod stays there,
    /// however many others come.
    pub waiting_counted: f64,
    pub running: f64,
    /// What a pod finishes per second that has had requests waiting for so long that this is all it can.
    pub full_finishes: Option<f64>,
    /// Mean share of the KV cache in use, 0 to 1.
    pub cache_usage: f64,
    pub finished_per_second: f64,
    /// Change of `waiting + running` per second.
    pub growth_per_second: f64,
    /// Requests that a full queue turned away.
    pub refused_per_second: f64,
    /// 90th percentiles of pods whose queues stayed within bounds, so that a backlog which is being worked off is not counted
    /// twice; none where too few requests came for one.
    pub ttft_seconds: Option<f64>,
    pub tpot_seconds: Option<f64>,
}

impl Signals {
    fn in_flight(&self) -> f64 {
        self.waiting + self.running
    }

    fn pods(&self) -> f64 {
        f64::from(self.reporting.max(1))
    }

    /// What finishes, and what piles up.
    fn arriving_per_second(&self) -> f64 {
        (self.finished_per_second + self.growth_per_second).max(0.0)
    }

    /// No pod that answers is missing among those that report.
    fn complete(&self) -> bool {
        self.ready > 0 && self.reporting >= self.ready
    }
}

/// What the spec asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Aims {
    /// Requests that may wait, per replica.
    pub queue_per_replica: u32,
    /// Requests that one replica runs at once.
    pub concurrency: u32,
    pub ttft_seconds: Option<f64>,
    pub tpot_seconds: Option<f64>,
    /// Fewer replicas must have sufficed for this long.
    pub stabilization_seconds: i64,
}

/// Between how many replicas the loop may choose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub min: u32,
    /// Hard: it wins over `min`.
    pub max: u32,
    /// What sets it: "spec.scaling.max is 4".
    pub max_because: String,
}

/// What one replica was seen to carry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    pub requests_per_second: f64,
    /// Unix time.
    pub seen_at: i64,
}

/// A decision that was carried out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Unix time.
    pub at: i64,
    pub from: u32,
    pub to: u32,
}

/// Replicas that were fallen to, and did not do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TooFew {
    pub replicas: u32,
    /// Unix time of the rise that took the fall back.
    pub seen_at: i64,
}

impl TooFew {
    /// The last fall that was taken back, of decisions with the newest first.
    pub fn among(changes: &[Change]) -> Option<TooFew> {
        let taken_back = |pair: &&[Change]| {
            let (rise, fall) = (pair[0], pair[1]);
            rise.to > rise.from && fall.to < fall.from && fall.to == rise.from
        };
        let pair = changes.windows(2).find(taken_back)?;
        Some(TooFew { replicas: pair[0].from, seen_at: pair[0].at })
    }
}

/// What survives a restart; it stands in status.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kept {
    pub desired: u32,
    /// Unix time of the last decision.
    pub decided_at: i64,
    pub capacity: Option<Capacity>,
    pub too_few: Option<TooFew>,
}

/// What only this process has seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    since: i64,
    last: Option<i64>,
    /// Falling counts with the time of the look that wanted them: the first is the most wanted of the window.
    wanted: VecDeque<(i64, u32)>,
    capacity: Option<Capacity>,
}

/// What the loop makes of one look.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// As it is; where more would be wanted, what forbids it.
    Stay {
        limit: Option<String>,
    },
    Move {
        to: u32,
        why: String,
        capacity: Option<Capacity>,
    },
}

const STAY: Verdict = Verdict::Stay { limit: None };

/// Everything that one look knows.
#[derive(Clone, Copy)]
pub struct Look<'a> {
    pub signals: &'a Signals,
    pub aims: &'a Aims,
    pub bounds: &'a Bounds,
    pub kept: &'a Kept,
    pub tempo: Tempo,
    /// Unix time, in seconds.
    pub now: i64,
}

/// One look. `seen` is the object's own, kept between looks.
pub fn decide(look: &Look<'_>, seen: &mut Seen) -> Verdict {
    let Look { signals, aims, bounds, kept, .. } = *look;
    seen.take_over(kept, look.now);
    if let Some((to, why)) = beyond(bounds, kept) {
        seen.forget_wants();
        return Verdict::Move { to, why, capacity: seen.capacity };
    }
    if signals.reporting == 0 {
        return STAY;
    }
    seen.learn(look);
    let causes = pressures(signals, aims);
    let verdict = if causes.is_empty() {
        fall(look, seen)
    } else {
        seen.note(look, kept.desired);
        rise(look, &causes, seen)
    };
    if matches!(verdict, Verdict::Move { .. }) {
        seen.forget_wants();
    }
    verdict
}

/// Bounds hold whatever the metrics say.
fn beyond(bounds: &Bounds, kept: &Kept) -> Option<(u32, String)> {
    let floor = bounds.min.min(bounds.max);
    if kept.desired > bounds.max {
        return Some((bounds.max, bounds.max_because.clone()));
    }
    (kept.desired < floor).then(|| (floor, format!("spec.scaling.min is {}", bounds.min)))
}

/// Why more replicas are wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cause {
    Queue,
    Refused,
    Cache,
    /// Time to first token, as a multiple of the slo.
    Ttft(f64),
    Tpot(f64),
}

fn pressures(signals: &Signals, aims: &Aims) -> Vec<Cause> {
    let mut causes = Vec::new();
    if signals.waiting_counted / signals.pods() > f64::from(aims.queue_per_replica) {
        causes.push(Cause::Queue);
    }
    if signals.refused_per_second > 0.0 {
        causes.push(Cause::Refused);
    }
    if signals.cache_usage > CACHE_FULL {
        causes.push(Cause::Cache);
    }
    // One request at a time is as fast as it gets: more replicas would change nothing.
    if signals.in_flight() / signals.pods() > 1.0 {
        let late = |told: Option<f64>, slo: Option<f64>| Some(told? / slo?).filter(|it| *it > 1.0);
        causes.extend(late(signals.ttft_seconds, aims.ttft_seconds).map(Cause::Ttft));
        causes.extend(late(signals.tpot_seconds, aims.tpot_seconds).map(Cause::Tpot));
    }
    causes
}

fn rise(look: &Look<'_>, causes: &[Cause], seen: &mut Seen) -> Verdict {
    let Look { signals, aims, bounds, kept, tempo, now } = *look;
    let waits = signals.ready < kept.desired && now - kept.decided_at < tempo.start_patience();
    // What is measured right after pods came still speaks of the time before them.
    let settled = !waits && signals.settled_seconds >= tempo.window();
    let queue = causes.iter().any(|cause| matches!(cause, Cause::Queue | Cause::Refused));
    if settled && !queue {
        seen.learn_from_lateness(look);
    }
    let mut wanted = seen.capacity.map_or(0, |capacity| for_arrivals(signals, aims, capacity));
    if settled && !(queue && drains(signals)) {
        let steps = causes.iter().map(|cause| step(*cause, signals, aims, kept.desired));
        wanted = wanted.max(kept.desired + steps.max().unwrap_or(1));
    }
    wanted = wanted.min((kept.desired * 2).max(kept.desired + RISE_MIN));
    if wanted <= kept.desired {
        return STAY;
    }
    if signals.unschedulable {
        return Verdict::Stay { limit: Some("no node has room for the pods there are".to_owned()) };
    }
    if kept.desired >= bounds.max {
        return Verdict::Stay { limit: Some(bounds.max_because.clone()) };
    }
    let sentences: Vec<String> = causes
        .iter()
        .map(|cause| told(*cause, signals, aims))
        .chain(load(signals, seen.capacity))
        .collect();
    let mut why = sentences.join(", ");
    if wanted > bounds.max {
        why.push_str(&format!("; {} of {wanted}, because {}", bounds.max, bounds.max_because));
    }
    Verdict::Move { to: wanted.min(bounds.max), why, capacity: seen.capacity }
}

/// Replicas that carry what arrives. What waits already stays in its pod, which gets the sooner through it the less arrives
/// there.
fn for_arrivals(signals: &Signals, aims: &Aims, capacity: Capacity) -> u32 {
    let behind = signals.waiting > signals.pods() * f64::from(aims.queue_per_replica);
    let load = if behind { LOAD_WHILE_BEHIND } else { LOAD_PLANNED };
    count(signals.arriving_per_second() / (load * capacity.requests_per_second))
}

/// What waits becomes less by itself.
fn drains(signals: &Signals) -> bool {
    signals.refused_per_second <= 0.0 && signals.growth_per_second < 0.0
}

/// Replicas to add where nothing better is known.
fn step(cause: Cause, signals: &Signals, aims: &Aims, desired: u32) -> u32 {
    let add = match cause {
        Cause::Queue => {
            // As many as hold what counts, each as full as these are.
            let holds = signals.running / signals.pods() + f64::from(aims.queue_per_replica);
            let held = signals.running + signals.waiting_counted;
            count(held / holds.max(1.0)).saturating_sub(desired)
        }
        Cause::Refused => desired,
        Cause::Cache => 1,
        Cause::Ttft(ratio) | Cause::Tpot(ratio) => {
            count(f64::from(desired) * (ratio.min(LATENCY_RATIO_MAX) - 1.0))
        }
    };
    add.max(1)
}

fn fall(look: &Look<'_>, seen: &mut Seen) -> Verdict {
    let Look { signals, aims, bounds, kept, now, .. } = *look;
    if !signals.complete() || signals.rolling_out {
        return STAY;
    }
    let floor = bounds.min.min(bounds.max);
    let suffices = (floor..kept.desired).find(|fewer| enough(signals, aims, seen.capacity, *fewer));
    let suffices = suffices.map_or(kept.desired, |fewer| {
        // A load near what some number carries would be tried with that number again and again.
        let too_few = kept.too_few.filter(|it| now - it.seen_at < CAPACITY_SECONDS_MAX);
        fewer + u32::from(too_few.is_some_and(|it| it.replicas == fewer))
    });
    seen.note(look, suffices);
    let Some(wanted) = seen.most_wanted(now, aims.stabilization_seconds) else { return STAY };
    // Without knowing what one carries, one at a time.
    let to = if seen.capacity.is_some() { wanted } else { wanted.max(kept.desired - 1) };
    if to >= kept.desired {
        return STAY;
    }
    let mut why = format!("for {} s {to} would have done", aims.stabilization_seconds);
    for sentence in load(signals, seen.capacity) {
        why.push_str(&format!(", {sentence}"));
    }
    Verdict::Move { to, why, capacity: seen.capacity }
}

/// Whether `fewer` replicas would carry what there is with room to spare.
fn enough(signals: &Signals, aims: &Aims, capacity: Option<Capacity>, fewer: u32) -> bool {
    let fewer = f64::from(fewer.max(1));
    let denser = signals.pods() / fewer;
    let rows = signals.in_flight() / fewer;
    let rate_fits = capacity.is_none_or(|capacity| {
        let arriving = signals.arriving_per_second().max(signals.finished_per_second);
        arriving <= LOAD_AFTER_FALL * capacity.requests_per_second * fewer
    });
    let in_time = |told: Option<f64>, slo: Option<f64>| match (told, slo) {
        (Some(told), Some(slo)) => rows <= 1.0 || told * denser <= LATENCY_AFTER_FALL * slo,
        _ => true,
    };
    rate_fits
        && rows <= ROWS_AFTER_FALL * f64::from(aims.concurrency)
        && signals.cache_usage * denser <= CACHE_AFTER_FALL
        && in_time(signals.ttft_seconds, aims.ttft_seconds)
        && in_time(signals.tpot_seconds, aims.tpot_seconds)
}

fn count(replicas: f64) -> u32 {
    // A hair above a whole number is that number.
    (replicas - 1e-9).ceil().clamp(0.0, f64::from(u32::MAX / 4)) as u32
}

fn told(cause: Cause, signals: &Signals, aims: &Aims) -> String {
    let milliseconds = |seconds: Option<f64>| seconds.unwrap_or_default() * 1000.0;
    match cause {
        Cause::Queue => format!(
            "{:.1} requests wait per replica, above {}",
            signals.waiting / signals.pods(),
            aims.queue_per_replica
        ),
        Cause::Refused => {
            format!("full queues refuse {:.2} requests/s", signals.refused_per_second)
        }
        Cause::Cache => format!("the KV cache is {:.0} % full", signals.cache_usage * 100.0),
        Cause::Ttft(_) => format!(
            "TTFT {:.0} ms > slo {:.0} ms (p90)",
            milliseconds(signals.ttft_seconds),
            milliseconds(aims.ttft_seconds)
        ),
        Cause::Tpot(_) => format!(
            "TPOT {:.0} ms > slo {:.0} ms (p90)",
            milliseconds(signals.tpot_seconds),
            milliseconds(aims.tpot_seconds)
        ),
    }
}

fn load(signals: &Signals, capacity: Option<Capacity>) -> impl Iterator<Item = String> {
    let arriving = format!(
        "{:.2} requests/s arrive and {:.0} are in flight",
        signals.arriving_per_second(),
        signals.in_flight()
    );
    let one = capacity.map(|one| format!("one replica carries {:.2}/s", one.requests_per_second));
    [Some(arriving), one].into_iter().flatten()
}

impl Seen {
    /// A process that has just started knows of capacity what status says.
    fn take_over(&mut self, kept: &Kept, now: i64) {
        self.capacity = self
            .capacity
            .or(kept.capacity)
            .filter(|capacity| now - capacity.seen_at < CAPACITY_SECONDS_MAX);
    }

    /// What full replicas finish is what they can; what others finish, they can at least.
    fn learn(&mut self, look: &Look<'_>) {
        let Look { signals, tempo, now, .. } = *look;
        let known = self.capacity.map(|known| known.requests_per_second);
        let settled = signals.settled_seconds >= tempo.window();
        let each = signals.finished_per_second / signals.pods();
        let more = known.filter(|known| settled && each > *known).map(|_| each);
        if let Some(each) = signals.full_finishes.or(more) {
            let requests_per_second =
                known.map_or(each, |known| known + LEARN_SHARE * (each - known));
            self.capacity = Some(Capacity { requests_per_second, seen_at: now });
        }
    }

    /// Where answers come late without a queue, what arrives is more than one replica carries well.
    fn learn_from_lateness(&mut self, look: &Look<'_>) {
        let Look { signals, now, .. } = *look;
        let each = signals.arriving_per_second() / signals.pods();
        let lower = self.capacity.is_none_or(|known| each < known.requests_per_second);
        if each > 0.0 && lower {
            self.capacity = Some(Capacity { requests_per_second: each, seen_at: now });
        }
    }

    fn note(&mut self, look: &Look<'_>, wanted: u32) {
        let now = look.now;
        let gaps = 0..=look.tempo.gap_max();
        let goes_on = self.last.is_some_and(|last| gaps.contains(&(now - last)));
        if !goes_on {
            self.wanted.clear();
            self.since = now;
        }
        self.last = Some(now);
        while self.wanted.back().is_some_and(|(_, before)| *before <= wanted) {
            self.wanted.pop_back();
        }
        self.wanted.push_back((now, wanted));
    }

    /// The most that any look of the window wanted; none before there was a whole window of looks.
    fn most_wanted(&mut self, now: i64, window: i64) -> Option<u32> {
        while self.wanted.front().is_some_and(|(at, _)| now - at > window) {
            self.wanted.pop_front();
        }
        (now - self.since >= window).then(|| self.wanted.front().map(|(_, most)| *most)).flatten()
    }

    fn forget_wants(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests;
