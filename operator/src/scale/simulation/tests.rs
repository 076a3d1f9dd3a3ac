//! The loop over thousands of seeds: how far it overshoots, whether it oscillates, what gaps in the metrics do to it, and how
//! it fares beside others on the same traffic. `PLIMSOLL_SCALING_SEEDS` runs more of each shape.

use super::super::rivals::{Hpa, Keda, Measure};
use super::*;

const SHAPES: [Shape; 5] = [Shape::Steady, Shape::Step, Shape::Ramp, Shape::Waves, Shape::Bursts];
const SEEDS_DEFAULT: u64 = 400;
const THREADS: u64 = 2;
/// After this a steady load has found its number of replicas.
const SETTLED: i64 = 1800;

fn seeds() -> u64 {
    let given = std::env::var("PLIMSOLL_SCALING_SEEDS").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(SEEDS_DEFAULT)
}

/// Runs `check` for every shape and seed.
fn everywhere(seeds: u64, check: impl Fn(Shape, u64) + Sync) {
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let check = &check;
            scope.spawn(move || {
                for seed in (thread..seeds).step_by(THREADS as usize) {
                    SHAPES.into_iter().for_each(|shape| check(shape, seed));
                }
            });
        }
    });
}

/// Scaled on queues alone, so that what is needed can be worked out by hand.
fn without_slo(shape: Shape, seed: u64) -> Scenario {
    let mut scenario = Scenario::random(shape, seed);
    (scenario.aims.ttft_seconds, scenario.aims.tpot_seconds) = (None, None);
    scenario.replicas_max = 40;
    scenario
}

#[test]
fn overshoot_is_bounded_and_a_steady_load_is_not_oscillated_about() {
    everywhere(seeds(), |shape, seed| {
        let scenario = without_slo(shape, seed);
        let outcome = run(&scenario, &mut Ours::new());
        let need = (scenario.traffic.high / 0.65).ceil();
        let most = 2.0 * need + 1.0;
        assert!(f64::from(outcome.peak) <= most, "{shape:?} {seed}: {} of {most}", outcome.peak);
        if shape == Shape::Steady {
            // What one replica carries is forgotten once within the rest, so that one step down may be tried and taken back.
            let turns = outcome.turns(SETTLED);
            assert!(turns <= 2, "{shape:?} {seed}: {:?}", outcome.moves);
        }
    });
}

#[test]
fn a_step_is_answered_within_minutes_and_given_back_after_the_window() {
    let scenario = without_slo(Shape::Step, 3);
    let outcome = run(&scenario, &mut Ours::new());
    let step = outcome.points.iter().position(|point| point.load > 1.0).unwrap();
    let enough =
        |point: &Point| f64::from(point.ready) >= point.load && point.ready == point.desired;
    let answered = outcome.points.iter().skip(step).find(|point| enough(point)).unwrap();
    let patience = 4.0 * scenario.engine.start_seconds + 60.0;
    let took = (answered.at - outcome.points[step].at) as f64;
    assert!(took <= patience, "{took} of {patience} s");
    let last = outcome.points.last().unwrap();
    assert!(last.desired == 1 && last.in_flight < 8.0, "{last:?}");
}

#[test]
fn a_run_repeats_exactly() {
    let scenario = Scenario::random(Shape::Waves, 7);
    let [one, other] = [(), ()].map(|()| run(&scenario, &mut Ours::new()).moves);
    assert_eq!(one, other);
    assert!(one.len() > 3, "{one:?}");
}

/// The loop under gaps: pods that Prometheus lost, all of them, an operator that starts anew.
struct Gaps {
    ours: Ours,
    chance: Chance,
    /// No replica may go before this.
    blind_until: i64,
}

impl Scaler for Gaps {
    fn look(&mut self, view: &View<'_>) -> u32 {
        let lost = self.chance.between(0.0, 1.0);
        let kept = match lost {
            _ if lost < 0.02 => 0,
            _ if lost < 0.06 => view.told.len().saturating_sub(1),
            _ => view.told.len(),
        };
        if self.chance.between(0.0, 1.0) < 0.01 {
            self.ours.restart();
            self.blind_until = view.now + view.scenario.aims.stabilization_seconds;
        }
        let incomplete = kept < view.told.len();
        let wanted = self.ours.look(&View { told: &view.told[..kept], ..*view });
        if incomplete || view.now < self.blind_until {
            assert!(wanted >= view.desired, "{}: {} to {wanted}", view.now, view.desired);
        }
        wanted
    }
}

#[test]
fn gaps_and_restarts_never_take_a_replica_away() {
    let falls = std::sync::atomic::AtomicU32::new(0);
    everywhere(seeds() / 4, |shape, seed| {
        let scenario = without_slo(shape, seed);
        let mut gaps = Gaps { ours: Ours::new(), chance: Chance(seed), blind_until: 0 };
        let outcome = run(&scenario, &mut gaps);
        let fell = outcome.moves.iter().filter(|(_, from, to)| to < from).count();
        falls.fetch_add(fell as u32, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(falls.into_inner() > 0, "between gaps replicas do go");
}

#[test]
fn fewer_minutes_are_late_than_under_the_usual_autoscalers() {
    let late = std::sync::Mutex::new([0u32; 4]);
    everywhere(seeds() / 10, |shape, seed| {
        let scenario = Scenario::random(shape, seed);
        let of = |outcome: Outcome| outcome.late_minutes;
        let more = [
            of(run(&scenario, &mut Ours::new())),
            of(run(&scenario, &mut Hpa::new(Measure::Waiting))),
            of(run(&scenario, &mut Hpa::new(Measure::InFlight))),
            of(run(&scenario, &mut Keda::new())),
        ];
        let mut late = late.lock().expect("no holder panics");
        for (sum, more) in late.iter_mut().zip(more) {
            *sum += more;
        }
    });
    let [ours, others @ ..] = late.into_inner().expect("no holder panics");
    assert!(others.iter().all(|theirs| ours * 4 < theirs * 3), "{ours} beside {others:?}");
}
