//! The law, as tables; tests named after an issue show that its complaint does not hold here.

use super::*;

const TEMPO: Tempo = Tempo { interval_seconds: 15 };
const START: i64 = 1_000_000;

/// Looks one after the other at what stays the same, as the loop does.
struct Desk {
    signals: Signals,
    aims: Aims,
    bounds: Bounds,
    kept: Kept,
    seen: Seen,
    now: i64,
    /// Whether pods come and go as decided, at once.
    follows: bool,
}

/// `replicas` pods that have been there for long, each with as much to do.
fn desk(replicas: u32, waiting_each: f64, running_each: f64, finished_each: f64) -> Desk {
    let count = f64::from(replicas);
    let signals = Signals {
        ready: replicas,
        reporting: replicas,
        settled_seconds: 100_000,
        waiting: waiting_each * count,
        waiting_counted: waiting_each.min(16.0) * count,
        running: running_each * count,
        finished_per_second: finished_each * count,
        ..Signals::default()
    };
    let aims = Aims {
        queue_per_replica: 8,
        concurrency: 16,
        ttft_seconds: Some(2.0),
        tpot_seconds: Some(0.1),
        stabilization_seconds: 300,
    };
    let bounds = Bounds { min: 1, max: 10, max_because: "spec.scaling.max is 10".to_owned() };
    let kept =
        Kept { desired: replicas, decided_at: START - 100_000, capacity: None, too_few: None };
    Desk { signals, aims, bounds, kept, seen: Seen::default(), now: START, follows: false }
}

fn carries(requests_per_second: f64) -> Option<Capacity> {
    Some(Capacity { requests_per_second, seen_at: START })
}

impl Desk {
    fn look(&mut self) -> Verdict {
        let look = Look {
            signals: &self.signals,
            aims: &self.aims,
            bounds: &self.bounds,
            kept: &self.kept,
            tempo: TEMPO,
            now: self.now,
        };
        let verdict = decide(&look, &mut self.seen);
        self.now += TEMPO.interval_seconds;
        if let Verdict::Move { to, capacity, .. } = &verdict {
            self.kept =
                Kept { desired: *to, decided_at: self.now, capacity: *capacity, ..self.kept };
            if self.follows {
                self.signals.ready = *to;
                self.signals.reporting = *to;
            }
        }
        verdict
    }

    /// The first decision within `seconds`, and after how many.
    fn moves_within(&mut self, seconds: i64) -> Option<(u32, String, i64)> {
        let began = self.now;
        while self.now - began <= seconds {
            let at = self.now - began;
            if let Verdict::Move { to, why, .. } = self.look() {
                return Some((to, why, at));
            }
        }
        None
    }
}

#[test]
fn a_queue_above_its_aim_adds_replicas_at_once_and_says_its_figures() {
    let mut desk = desk(2, 12.0, 16.0, 1.0);
    let (to, why, after) = desk.moves_within(0).unwrap();
    // 2 × (16 + 12) in flight, of which 24 are held by a replica that runs 16 and lets 8 wait.
    assert_eq!((to, after), (3, 0));
    assert!(why.contains("12.0 requests wait per replica, above 8"), "{why}");
    assert!(why.contains("2.00 requests/s arrive and 56 are in flight"), "{why}");
}

#[test]
fn with_a_known_capacity_a_rise_is_as_large_as_the_arrivals_and_at_most_double() {
    // 2 requests/s are finished and 3/s pile up; one replica carries 1/s.
    let mut known = desk(2, 12.0, 16.0, 1.0);
    known.signals.growth_per_second = 3.0;
    known.signals.full_finishes = Some(1.0);
    let (to, why, _) = known.moves_within(0).unwrap();
    assert_eq!(to, 4, "5 / 0.65 is 8, and the double of 2 is 4");
    assert!(why.contains("one replica carries 1.00/s"), "{why}");
    let mut three = desk(5, 12.0, 16.0, 1.0);
    three.signals.growth_per_second = 0.2;
    three.signals.full_finishes = Some(1.0);
    assert_eq!(three.moves_within(0).unwrap().0, 8, "5.2 / 0.65");
}

#[test]
fn what_is_starting_is_waited_for_unless_the_arrivals_need_more() {
    let mut desk = desk(1, 12.0, 16.0, 0.0);
    assert_eq!(desk.moves_within(0).unwrap().0, 2);
    assert_eq!(desk.moves_within(500), None, "the second has not come yet");
    desk.signals.full_finishes = Some(1.0);
    desk.signals.growth_per_second = 2.0;
    assert_eq!(desk.moves_within(0).unwrap().0, 4, "2/s arrive, and one carries 1/s");
}

#[test]
fn a_queue_that_shrinks_is_left_to_shrink() {
    let mut desk = desk(3, 12.0, 16.0, 1.0);
    desk.signals.growth_per_second = -0.5;
    assert_eq!(desk.moves_within(600), None);
    desk.signals.growth_per_second = 0.0;
    assert_eq!(desk.moves_within(0).unwrap().0, 4);
}

#[test]
fn a_full_queue_that_refuses_does_not_count_as_shrinking() {
    let mut desk = desk(2, 12.0, 16.0, 1.0);
    desk.signals.growth_per_second = -0.5;
    desk.signals.refused_per_second = 0.2;
    assert_eq!(desk.moves_within(0).unwrap().0, 4);
}

#[test]
fn a_rise_for_lateness_is_not_taken_back_at_the_same_load() {
    let mut desk = desk(4, 0.0, 2.0, 1.0);
    desk.signals.ttft_seconds = Some(2.4);
    assert_eq!(desk.moves_within(0).unwrap().0, 5);
    // In time now, and idle but for the arrivals that four were late under.
    (desk.signals.ready, desk.signals.reporting) = (5, 5);
    desk.signals.ttft_seconds = Some(0.5);
    assert_eq!(desk.moves_within(3000), None);
    desk.signals.finished_per_second = 2.9;
    assert_eq!(desk.moves_within(330).unwrap().0, 4, "2.9/s are within 75 % of 4 × 1/s");
}

#[test]
fn what_one_carries_moves_a_quarter_of_the_way_towards_what_full_ones_finish() {
    let mut desk = desk(2, 1.0, 16.0, 1.0);
    desk.kept.capacity = carries(2.0);
    desk.signals.full_finishes = Some(1.0);
    desk.look();
    assert_eq!(desk.seen.capacity.unwrap().requests_per_second, 1.75);
    desk.signals.full_finishes = None;
    desk.look();
    assert_eq!(desk.seen.capacity.unwrap().requests_per_second, 1.75, "1/s each is no news");
    desk.signals.finished_per_second = 4.0;
    desk.look();
    assert_eq!(desk.seen.capacity.unwrap().requests_per_second, 1.8125, "2/s each can be done");
}

#[test]
fn kubeai_405_late_answers_add_replicas_and_name_the_percentile_and_the_slo() {
    let mut ttft = desk(4, 0.0, 8.0, 1.0);
    ttft.signals.ttft_seconds = Some(2.4);
    let (to, why, _) = ttft.moves_within(0).unwrap();
    assert_eq!(to, 5, "4 × 1.2, and 4 / 0.8 by what one carries in time");
    assert!(why.contains("TTFT 2400 ms > slo 2000 ms (p90)"), "{why}");
    let mut tpot = desk(4, 0.0, 8.0, 1.0);
    tpot.signals.tpot_seconds = Some(0.5);
    let (to, why, _) = tpot.moves_within(0).unwrap();
    assert_eq!(to, 6, "a ratio of 5 counts as 1.5");
    assert!(why.contains("TPOT 500 ms > slo 100 ms (p90)"), "{why}");
    let mut fresh = desk(4, 0.0, 8.0, 1.0);
    fresh.signals.tpot_seconds = Some(0.5);
    fresh.signals.settled_seconds = 30;
    assert_eq!(fresh.moves_within(0), None, "half of the window is from before the last pod");
}

#[test]
fn a_full_cache_adds_a_replica() {
    let mut desk = desk(3, 2.0, 8.0, 1.0);
    desk.signals.cache_usage = 0.95;
    let (to, why, _) = desk.moves_within(0).unwrap();
    assert_eq!(to, 4);
    assert!(why.contains("the KV cache is 95 % full"), "{why}");
}

#[test]
fn fewer_come_only_after_the_whole_window_wanted_fewer() {
    let mut desk = desk(4, 0.0, 1.0, 0.1);
    desk.kept.capacity = carries(1.0);
    let (to, why, after) = desk.moves_within(1000).unwrap();
    assert_eq!((to, after), (1, 300));
    assert!(why.starts_with("for 300 s 1 would have done"), "{why}");
    // One busier look in the middle counts through the window.
    let mut once = self::desk(4, 0.0, 1.0, 0.1);
    once.kept.capacity = carries(1.0);
    assert_eq!(once.moves_within(150), None);
    once.signals.running = 30.0;
    once.look();
    once.signals.running = 4.0;
    let (to, _, _) = once.moves_within(1000).unwrap();
    assert_eq!(to, 3, "30 rows are three replicas at 70 % of 16");
}

#[test]
fn without_knowing_what_one_carries_replicas_go_one_at_a_time() {
    let mut desk = desk(4, 0.0, 0.0, 0.0);
    desk.follows = true;
    let mut at = Vec::new();
    while let Some((to, _, _)) = desk.moves_within(1000) {
        at.push((desk.now - START, to));
    }
    assert_eq!(at, [(315, 3), (630, 2), (945, 1)]);
}

#[test]
fn fewer_must_be_in_time_too_unless_each_would_have_one_request() {
    let mut desk = desk(2, 0.0, 2.0, 0.1);
    desk.signals.tpot_seconds = Some(0.05);
    assert_eq!(desk.moves_within(2000), None, "twice as dense is 100 ms > 90 % of 100 ms");
    desk.signals.tpot_seconds = Some(0.04);
    assert_eq!(desk.moves_within(1000).unwrap().0, 1);
    let mut cached = self::desk(2, 0.0, 2.0, 0.1);
    cached.signals.cache_usage = 0.4;
    assert_eq!(cached.moves_within(2000), None, "one cache would be 80 % full");
    let mut alone = self::desk(2, 0.0, 0.5, 0.1);
    alone.signals.tpot_seconds = Some(0.09);
    assert_eq!(alone.moves_within(1000).unwrap().0, 1, "one request is as fast on one replica");
}

/// Everything that is not known must leave the number alone; with `mend` undone the same desk scales down.
#[test]
fn llm_d_router_2822_no_data_a_partial_scrape_a_rollout_and_a_restart_never_scale_down() {
    let idle = || {
        let mut desk = desk(4, 0.0, 0.0, 0.0);
        desk.kept.capacity = carries(1.0);
        desk
    };
    assert_eq!(idle().moves_within(1000).unwrap().0, 1, "complete, it does");
    let mut silent = idle();
    silent.signals = Signals { ready: 4, ..Signals::default() };
    assert_eq!(silent.moves_within(10_000), None);
    let mut gone = idle();
    gone.signals = Signals::default();
    assert_eq!(gone.moves_within(10_000), None);
    let mut partial = idle();
    partial.signals.reporting = 3;
    assert_eq!(partial.moves_within(10_000), None);
    let mut rolling = idle();
    rolling.signals.rolling_out = true;
    assert_eq!(rolling.moves_within(10_000), None);
    let mut restarted = idle();
    for _ in 0..40 {
        assert_eq!(restarted.moves_within(285), None);
        restarted.seen = Seen::default();
    }
}

#[test]
fn a_gap_in_what_was_seen_starts_the_window_anew_and_so_does_a_clock_that_jumps() {
    for jump in [61, 3600, -30] {
        let mut desk = desk(4, 0.0, 0.0, 0.0);
        assert_eq!(desk.moves_within(285), None);
        desk.now += jump;
        assert_eq!(desk.moves_within(285), None, "{jump}");
        assert_eq!(desk.moves_within(0).unwrap().0, 3);
    }
}

#[test]
fn a_partial_scrape_may_still_scale_up() {
    let mut desk = desk(4, 12.0, 16.0, 1.0);
    desk.signals.ready = 5;
    desk.kept.desired = 5;
    assert_eq!(desk.moves_within(0).unwrap().0, 6);
}

#[test]
fn bounds_hold_at_once_whatever_the_metrics_say_and_the_upper_one_wins() {
    let mut above = desk(7, 50.0, 16.0, 1.0);
    above.bounds = Bounds { min: 1, max: 4, max_because: "maxGPUs is 4".to_owned() };
    assert_eq!(above.moves_within(0).unwrap(), (4, "maxGPUs is 4".to_owned(), 0));
    let mut below = desk(1, 0.0, 0.0, 0.0);
    below.signals = Signals::default();
    below.bounds.min = 3;
    assert_eq!(below.moves_within(0).unwrap().0, 3);
    let mut at_the_end = desk(10, 50.0, 16.0, 1.0);
    let limit = Verdict::Stay { limit: Some("spec.scaling.max is 10".to_owned()) };
    assert_eq!(at_the_end.look(), limit);
}

#[test]
fn dynamo_12428_no_minimum_lifts_the_number_above_the_gpu_budget() {
    let mut desk = desk(2, 50.0, 16.0, 1.0);
    desk.bounds = Bounds { min: 6, max: 2, max_because: "maxGPUs is 2".to_owned() };
    assert_eq!(desk.moves_within(1000), None);
}

#[test]
fn kubeai_193_the_minimum_stays_however_idle_it_is() {
    let mut desk = desk(3, 0.0, 0.0, 0.0);
    desk.bounds.min = 3;
    assert_eq!(desk.moves_within(10_000), None);
}

#[test]
fn kubeai_265_a_restarted_operator_goes_on_from_status() {
    let mut desk = desk(4, 1.0, 8.0, 1.0);
    desk.kept.capacity = carries(1.2);
    assert_eq!(desk.moves_within(600), None);
    desk.seen = Seen::default();
    desk.signals.growth_per_second = 2.0;
    desk.signals.waiting_counted = 40.0;
    let (to, why, _) = desk.moves_within(0).unwrap();
    assert_eq!(to, 7, "6/s / (0.8 × 1.2/s), known from before the restart");
    assert!(why.contains("one replica carries 1.20/s"), "{why}");
}

#[test]
fn llm_d_380_without_load_nothing_is_ever_added() {
    for tpot in [None, Some(10.0)] {
        let mut idle = desk(1, 0.0, 0.0, 0.0);
        (idle.signals.ttft_seconds, idle.signals.tpot_seconds) = (tpot, tpot);
        assert_eq!(idle.moves_within(10_000), None);
        // One request at a time is as fast as it gets, however late.
        let mut single = desk(3, 0.0, 1.0, 0.1);
        single.bounds.min = 3;
        (single.signals.ttft_seconds, single.signals.tpot_seconds) = (tpot, tpot);
        assert_eq!(single.moves_within(10_000), None);
    }
}

#[test]
fn llmkube_482_a_queue_that_cannot_reach_its_aim_is_told_by_its_refusals() {
    let mut desk = desk(2, 100.0, 16.0, 1.0);
    desk.aims.queue_per_replica = 10_000;
    assert_eq!(desk.moves_within(1000), None);
    desk.signals.refused_per_second = 0.5;
    let (to, why, _) = desk.moves_within(0).unwrap();
    assert_eq!(to, 4);
    assert!(why.contains("full queues refuse 0.50 requests/s"), "{why}");
}

#[test]
fn aibrix_1032_one_bad_pod_blocks_neither_direction() {
    // Of 3 one never becomes ready.
    let bad = |waiting: f64, running: f64| {
        let mut desk = desk(2, waiting, running, 1.0);
        desk.kept.desired = 3;
        desk
    };
    assert_eq!(bad(12.0, 16.0).moves_within(0).unwrap().0, 4);
    assert_eq!(bad(0.0, 0.0).moves_within(1000).unwrap().0, 2);
    // One whose queue is stuck is no reason for ever more.
    let mut stuck = desk(4, 0.0, 1.0, 1.0);
    (stuck.signals.waiting, stuck.signals.waiting_counted) = (500.0, 16.0);
    stuck.bounds.min = 4;
    assert_eq!(stuck.moves_within(10_000), None);
}

#[test]
fn where_no_node_has_room_no_more_are_asked_for() {
    let mut desk = desk(2, 12.0, 16.0, 1.0);
    desk.kept.desired = 3;
    desk.signals.unschedulable = true;
    let Verdict::Stay { limit: Some(limit) } = desk.look() else { panic!("it moved") };
    assert!(limit.contains("no node has room"), "{limit}");
}

#[test]
fn what_one_replica_carries_is_forgotten_after_an_hour() {
    let mut desk = desk(4, 0.0, 4.0, 1.0);
    desk.kept.capacity = carries(1.3);
    assert_eq!(desk.moves_within(3500), None, "4/s are more than 75 % of three times 1.3/s");
    assert_eq!(desk.moves_within(600).unwrap().0, 3);
}

#[test]
fn the_memory_of_a_look_stays_small() {
    let mut desk = desk(9, 0.0, 0.0, 0.0);
    desk.aims.stabilization_seconds = 1_000_000;
    for step in 0..10_000 {
        desk.signals.running = f64::from(step % 90);
        desk.look();
    }
    assert!(desk.seen.wanted.len() <= 10, "{}", desk.seen.wanted.len());
}

#[test]
fn what_was_too_few_is_not_tried_again_within_the_hour_but_fewer_still_may_be() {
    let change = |at: i64, from: u32, to: u32| Change { at, from, to };
    let taken_back = [change(START, 2, 3), change(START - 900, 3, 2), change(START - 5000, 1, 3)];
    let too_few = TooFew::among(&taken_back);
    assert_eq!(too_few, Some(TooFew { replicas: 2, seen_at: START }));
    assert_eq!(TooFew::among(&taken_back[1..]), None, "a fall after a rise takes nothing back");

    let mut near = desk(3, 0.0, 4.0, 0.4);
    assert_eq!(near.moves_within(600).unwrap().0, 2);
    let mut near = desk(3, 0.0, 4.0, 0.4);
    near.kept.too_few = too_few;
    assert_eq!(near.moves_within(3500), None);
    assert_eq!(near.moves_within(600).unwrap().0, 2, "an hour later");

    let mut idle = desk(3, 0.0, 2.0, 0.1);
    idle.kept.too_few = too_few;
    idle.kept.capacity = carries(1.0);
    assert_eq!(idle.moves_within(600).unwrap().0, 1);
}
