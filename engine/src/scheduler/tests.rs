//! One test per rule of the scheduler. Whole lives are simulated in `step/simulation.rs`.

use super::*;
use crate::batch::{AdapterIndex, TokenId};
use crate::kv_cache::page_hashes;
use crate::request::{PrefixSalt, Refusal};

fn limits() -> Limits {
    Limits {
        running_max: 4,
        waiting_max: 8,
        step_tokens_max: 100,
        context_tokens: 10_000,
        kv_pages: vec![16],
        steps_in_flight: 1,
        prefix_reuse: true,
    }
}

fn ask(prompt_tokens: u32, output_tokens_max: u32) -> Ask {
    Ask { prompt_tokens, output_tokens_max, choices: 1 }
}

/// A scheduler and all it has said.
struct Bench {
    scheduler: Scheduler,
    notices: Vec<Notice>,
    requests: u64,
}

impl Bench {
    fn new(limits: Limits) -> Bench {
        Bench::with(limits, StepCosts::default())
    }

    fn with(limits: Limits, costs: StepCosts) -> Bench {
        Bench { scheduler: Scheduler::new(limits, costs), notices: Vec::new(), requests: 0 }
    }

    fn add(&mut self, ask: Ask) -> RequestId {
        self.add_with(ask, Vec::new(), false)
    }

    /// A request whose prompt is `0, 1, 2 …`, so that two of them share their pages.
    fn add_hashed(&mut self, ask: Ask) -> RequestId {
        let tokens: Vec<TokenId> = (0..ask.prompt_tokens).collect();
        let salt = PrefixSalt { adapter: AdapterIndex::BASE, tenant: None };
        self.add_with(ask, page_hashes(&tokens, &salt), false)
    }

    fn add_with(
        &mut self,
        ask: Ask,
        page_hashes: Vec<PageHash>,
        prompt_logprobs: bool,
    ) -> RequestId {
        let id = RequestId(self.requests);
        self.requests += 1;
        self.scheduler.add(NewRequest { id, ask, page_hashes, prompt_logprobs });
        id
    }

    fn plan(&mut self) -> StepPlan {
        let plan = self.scheduler.plan().expect("there is something to do");
        self.scheduler.check_integrity().expect("books balance");
        plan
    }

    fn commit(&mut self, plan: &StepPlan) {
        self.commit_with(plan, |_| Outcome::default());
    }

    fn commit_with(&mut self, plan: &StepPlan, outcome: impl Fn(&SpanPlan) -> Outcome) {
        let outcomes: Vec<Outcome> = plan.spans.iter().map(outcome).collect();
        self.scheduler.commit(plan.number, &outcomes, &mut self.notices);
        self.scheduler.check_integrity().expect("books balance");
    }

    fn step(&mut self) -> StepPlan {
        let plan = self.plan();
        self.commit(&plan);
        plan
    }

    fn run_dry(&mut self) {
        while !self.scheduler.is_idle() {
            self.step();
        }
    }

    fn cancel(&mut self, request: RequestId) {
        self.scheduler.cancel(request, &mut self.notices);
        self.scheduler.check_integrity().expect("books balance");
    }

    fn ends(&self) -> Vec<(u64, u32, End)> {
        let ends = self.notices.iter().filter_map(|notice| match *notice {
            Notice::Ended { request, choice, end } => Some((request.0, choice, end)),
            _ => None,
        });
        ends.collect()
    }

    fn cached(&self) -> Vec<u32> {
        let cached = self.notices.iter().filter_map(|notice| match *notice {
            Notice::Prompt { cached_tokens, .. } => Some(cached_tokens),
            _ => None,
        });
        cached.collect()
    }
}

/// Request and rows of each span.
fn rows(plan: &StepPlan) -> Vec<(u64, u32)> {
    plan.spans.iter().map(|span| (span.request.0, span.rows)).collect()
}

#[test]
fn what_can_never_fit_is_refused_and_told_which_limit() {
    let limits = Limits { context_tokens: 1000, kv_pages: vec![20, 10], ..limits() };
    // Asked for, and the limit it is told, if it is refused.
    let cases = [
        (ask(999, 2), Some(("the context length", 1000))),
        (ask(u32::MAX, u32::MAX), Some(("the context length", 1000))),
        // 641 places need an eleventh page; the last token needs no place.
        (ask(600, 42), Some(("the KV cache", 640))),
        (ask(600, 41), None),
        (Ask { choices: 100, ..ask(600, 41) }, None),
    ];
    for (ask, expected) in cases {
        let refused = limits.refusal(ask, 0, 1).map(|refusal| match refusal {
            Refusal::NeverFits { limit_name, limit, .. } => (limit_name, limit),
            other => panic!("{other:?}"),
        });
        assert_eq!(refused, expected, "{ask:?}");
    }
}

#[test]
fn what_just_fits_runs_to_its_end_alone() {
    let mut bench = Bench::new(Limits { kv_pages: vec![2], ..limits() });
    bench.add(ask(100, 29));
    bench.add(ask(128, 1));
    bench.run_dry();
    assert_eq!(bench.ends(), [(0, 0, End::Length), (1, 0, End::Length)]);
}

#[test]
fn a_full_queue_counts_requests_that_have_not_begun() {
    let mut bench = Bench::new(Limits { running_max: 1, waiting_max: 2, ..limits() });
    bench.add(Ask { choices: 3, ..ask(10, 5) });
    bench.add(ask(10, 5));
    let refusal = bench.scheduler.limits.refusal(ask(1, 1), bench.scheduler.waiting_requests(), 9);
    assert_eq!(refusal, Some(Refusal::QueueFull { waiting: 2, retry_after_seconds: 9 }));
    bench.step();
    assert_eq!(bench.scheduler.waiting_requests(), 1, "the first has begun");
    assert_eq!(bench.scheduler.waiting(), 3, "two of its choices have not");
}

#[test]
fn decode_rows_come_first_and_prompts_share_what_is_left() {
    let mut bench = Bench::new(limits());
    bench.add(ask(10, 50));
    bench.step();
    bench.add(ask(150, 5));
    bench.add(ask(30, 5));
    assert_eq!(rows(&bench.step()), [(0, 1), (1, 99)]);
    assert_eq!(rows(&bench.step()), [(0, 1), (1, 51), (2, 30)]);
    assert_eq!(rows(&bench.step()), [(0, 1), (1, 1), (2, 1)]);
}

#[test]
fn a_step_of_many_decode_rows_ends_with_a_full_tile_of_the_device() {
    // Tiles of four rows.
    let costs = StepCosts::of(2, 100, |rows| rows.div_ceil(4) as f32);
    let mut bench = Bench::with(limits(), costs);
    bench.add(ask(3, 9));
    bench.add(ask(3, 9));
    assert_eq!(rows(&bench.step()), [(0, 3), (1, 3)], "nothing decodes yet");
    bench.add(ask(13, 9));
    assert_eq!(rows(&bench.step()), [(0, 1), (1, 1), (2, 10)]);
    bench.add(ask(9, 9));
    assert_eq!(
        rows(&bench.step()),
        [(0, 1), (1, 1), (2, 3), (3, 7)],
        "what was put off goes whole, and others fill its tile"
    );
}

#[test]
fn more_decode_rows_than_a_step_takes_leave_the_youngest_out() {
    let mut bench = Bench::new(Limits { step_tokens_max: 2, ..limits() });
    for _ in 0..3 {
        bench.add(ask(1, 4));
    }
    assert_eq!(rows(&bench.step()), [(0, 1), (1, 1)]);
    bench.step();
    bench.step();
    assert_eq!(rows(&bench.step()), [(0, 1), (1, 1)]);
    assert_eq!(rows(&bench.step()), [(2, 1)]);
}

#[test]
fn nobody_overtakes_even_who_would_fit() {
    let mut bench = Bench::new(Limits { kv_pages: vec![4], ..limits() });
    bench.add(ask(150, 3));
    bench.add(ask(100, 3));
    bench.add(ask(1, 1));
    let plan = bench.step();
    assert_eq!(rows(&plan), [(0, 100)]);
    assert_eq!(rows(&bench.step()), [(0, 50)], "the second lacks pages, so the third waits too");
    bench.run_dry();
    let ended: Vec<u64> = bench.ends().iter().map(|end| end.0).collect();
    assert_eq!(ended[0], 0);
    let positions = bench.notices.iter().filter_map(|notice| match notice {
        Notice::Prompt { request, .. } => Some(request.0),
        _ => None,
    });
    assert!(positions.collect::<Vec<_>>().is_sorted());
}

/// Request and choice of each that is admitted, in this order.
fn admitted(plan: &StepPlan) -> Vec<(u64, u32)> {
    let begins = plan.spans.iter().filter(|span| span.begins);
    begins.map(|span| (span.request.0, span.choice)).collect()
}

#[test]
fn choices_take_turns_with_the_first_choices_of_those_behind_them() {
    let mut bench = Bench::new(Limits { running_max: 1, ..limits() });
    bench.add(Ask { choices: 4, ..ask(5, 1) });
    bench.add(Ask { choices: 2, ..ask(5, 1) });
    bench.add(ask(5, 1));
    let mut order = Vec::new();
    for step in 0..8 {
        if step == 4 {
            bench.add(ask(5, 1));
        }
        order.extend(admitted(&bench.step()));
    }
    let by_hand = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (3, 0), (0, 3)];
    // Rounds: 0 | 1 1 | 2 2 2 | 3 3, with the fourth request in time for the third round.
    assert_eq!(order, by_hand);
}

#[test]
fn a_request_of_many_choices_holds_the_next_ones_back_by_one_choice_each() {
    let mut bench = Bench::new(Limits { running_max: 2, ..limits() });
    bench.add(Ask { choices: 128, ..ask(5, 3) });
    bench.step();
    bench.step();
    assert_eq!(bench.scheduler.running(), 2, "it takes what nobody else wants");
    for _ in 0..3 {
        bench.add(ask(5, 3));
    }
    let mut steps = 0;
    while bench.scheduler.waiting_requests() > 0 {
        bench.step();
        steps += 1;
    }
    assert!(steps < 12, "{steps} steps, and 128 choices take 192");
    bench.run_dry();
    assert_eq!(bench.ends().len(), 131);
}

#[test]
fn an_earlier_turn_that_arrives_later_waits_for_who_runs_and_is_preempted_after_them() {
    let mut bench = Bench::new(Limits { kv_pages: vec![5], ..limits() });
    bench.add(Ask { choices: 2, ..ask(30, 90) });
    bench.step();
    bench.step();
    assert_eq!(bench.scheduler.running(), 2);
    bench.add(ask(30, 90));
    assert_eq!(admitted(&bench.step()), [(1, 0)], "a page each, and one for each that runs");
    while bench.scheduler.totals().preemptions == 0 {
        bench.step();
    }
    let running = bench.scheduler.running.iter().map(|s| (s.request.0, s.choice));
    assert_eq!(running.collect::<Vec<_>>(), [(0, 0), (1, 0)], "the second choice made room");
    bench.run_dry();
    assert_eq!(bench.ends().len(), 3);
}

#[test]
fn an_admission_leaves_a_page_for_each_that_runs() {
    let mut bench = Bench::new(Limits { kv_pages: vec![3], ..limits() });
    bench.add(ask(64, 60));
    bench.add(ask(65, 2));
    assert_eq!(rows(&bench.step()), [(0, 64)], "two pages are free, but one is the first's next");
    bench.add(ask(1, 1));
    assert_eq!(rows(&bench.step()), [(0, 1)]);
}

#[test]
fn the_youngest_gives_its_pages_up_and_is_computed_again_in_its_place() {
    let mut bench = Bench::new(Limits { kv_pages: vec![4], ..limits() });
    bench.add(ask(60, 100));
    bench.add(ask(60, 100));
    for _ in 0..5 {
        bench.step();
    }
    // Both have just taken a second page.
    bench.add(ask(1, 1));
    while bench.scheduler.totals().preemptions == 0 {
        bench.step();
    }
    let plan = bench.step();
    assert_eq!(plan.spans.len(), 1);
    assert_eq!(plan.spans[0].request, RequestId(0), "the oldest goes on");
    assert_eq!(bench.scheduler.waiting(), 2);
    bench.run_dry();
    let lengths = [(0, 0, End::Length), (1, 0, End::Length), (2, 0, End::Length)];
    let mut ends = bench.ends();
    ends.sort_by_key(|end| end.0);
    assert_eq!(ends, lengths);
    let tokens = |request| {
        let is = |n: &&Notice| matches!(n, Notice::Token { request: r, .. } if r.0 == request);
        bench.notices.iter().filter(is).count()
    };
    assert_eq!((tokens(0), tokens(1), tokens(2)), (100, 100, 1), "no token is told twice");
    assert_eq!(bench.cached().len(), 3, "nor any prompt");
}

#[test]
fn the_youngest_without_a_page_keeps_what_it_has_and_waits() {
    let mut bench = Bench::new(Limits { kv_pages: vec![4], step_tokens_max: 200, ..limits() });
    // Four pages once the first has grown to two; the second needs its third page long before the first ends.
    bench.add(ask(60, 60));
    bench.add(ask(100, 40));
    while rows(&bench.step()).len() == 2 {}
    assert_eq!(rows(&bench.step()), [(0, 1)]);
    assert_eq!(bench.scheduler.running(), 2, "it keeps its pages");
    bench.run_dry();
    assert_eq!(bench.scheduler.totals().preemptions, 0);
    assert_eq!(bench.ends(), [(0, 0, End::Length), (1, 0, End::Length)]);
}

#[test]
fn with_a_step_in_flight_the_victim_is_withheld_first_and_preempted_then() {
    let mut bench = Bench::new(Limits { kv_pages: vec![4], steps_in_flight: 2, ..limits() });
    bench.add(ask(62, 100));
    bench.add(ask(60, 100));
    let mut in_flight = VecDeque::from([bench.plan()]);
    while bench.scheduler.totals().preemptions == 0 {
        in_flight.extend(bench.scheduler.plan());
        let oldest = in_flight.pop_front().expect("one of the two always proceeds");
        assert!(oldest.number.0 < 200, "pages run out at some time");
        if bench.scheduler.totals().preemptions == 0 {
            bench.commit(&oldest);
            continue;
        }
        assert_eq!(rows(&oldest), [(0, 1)], "the victim is in no step that is still in flight");
    }
    assert_eq!((bench.scheduler.running(), bench.scheduler.waiting()), (1, 1));
}

#[test]
fn a_prompt_cached_wholly_computes_its_last_token_on_a_copy() {
    let mut bench = Bench::new(limits());
    bench.add_hashed(ask(128, 1));
    bench.run_dry();
    bench.add_hashed(ask(128, 1));
    let plan = bench.step();
    assert_eq!(rows(&plan), [(1, 1)]);
    assert_eq!(plan.spans[0].position, 127);
    assert_eq!(plan.copies.len(), 1);
    assert_eq!(plan.spans[0].tables[0][1], plan.copies[0].to);
    assert_eq!(bench.cached(), [0, 127]);
    let totals = bench.scheduler.totals();
    assert_eq!((totals.prefix_queries, totals.prefix_hits), (256, 127));
}

#[test]
fn without_a_page_for_the_copy_the_last_page_is_computed() {
    let mut bench = Bench::new(Limits { kv_pages: vec![2], ..limits() });
    bench.add_hashed(ask(128, 1));
    bench.run_dry();
    bench.add_hashed(ask(128, 1));
    let plan = bench.step();
    assert_eq!(rows(&plan), [(1, 64)]);
    assert_eq!(plan.copies, []);
}

#[test]
fn a_longer_prompt_starts_behind_the_pages_it_shares() {
    let mut bench = Bench::new(limits());
    bench.add_hashed(ask(100, 1));
    bench.run_dry();
    bench.add_hashed(ask(150, 1));
    let plan = bench.step();
    assert_eq!((plan.spans[0].position, plan.spans[0].rows), (64, 86));
    assert_eq!(plan.copies, [], "a partial page is never published");
}

#[test]
fn pages_are_published_only_when_their_step_is_committed() {
    let mut bench = Bench::new(Limits { steps_in_flight: 2, ..limits() });
    bench.add_hashed(ask(64, 9));
    let first = bench.plan();
    bench.add_hashed(ask(64, 9));
    let second = bench.plan();
    assert_eq!(rows(&second), [(0, 1), (1, 64)], "nothing is found yet");
    bench.commit(&first);
    bench.add_hashed(ask(64, 9));
    assert_eq!(rows(&bench.plan()), [(0, 1), (1, 1), (2, 1)], "now it is");
}

#[test]
fn later_choices_share_the_prompt_of_the_first() {
    let mut bench = Bench::new(Limits { prefix_reuse: false, ..limits() });
    bench.add(Ask { choices: 3, ..ask(150, 8) });
    bench.add(ask(5, 8));
    assert_eq!(rows(&bench.step()), [(0, 100)]);
    assert_eq!(rows(&bench.step()), [(0, 50), (1, 5)], "they wait for it");
    let plan = bench.step();
    assert_eq!(rows(&plan), [(0, 1), (1, 1), (0, 1), (0, 1)]);
    let [first, second, third] = [0, 2, 3].map(|i| plan.spans[i].tables[0].clone());
    assert_eq!(first[..2], second[..2]);
    assert_eq!(first[..2], third[..2]);
    let copies: Vec<_> = plan.copies.iter().map(|copy| (copy.from, copy.to)).collect();
    assert_eq!(copies, [(first[2], second[2]), (first[2], third[2])]);
    assert_eq!(plan.spans.iter().map(|span| span.position).collect::<Vec<_>>(), [150, 5, 149, 149]);
    assert_eq!(bench.cached(), [0, 0, 149, 149]);
}

#[test]
fn whoever_wants_logprobs_of_the_prompt_computes_it_and_siblings_do_not() {
    let mut bench = Bench::new(limits());
    bench.add_hashed(ask(64, 1));
    bench.run_dry();
    let tokens: Vec<TokenId> = (0..64).collect();
    let salt = PrefixSalt { adapter: AdapterIndex::BASE, tenant: None };
    let hashes = page_hashes(&tokens, &salt);
    bench.add_with(Ask { choices: 2, ..ask(64, 2) }, hashes, true);
    let plan = bench.step();
    assert_eq!(rows(&plan), [(1, 64)]);
    assert!(plan.spans[0].prompt_logprobs);
    let plan = bench.step();
    assert_eq!(rows(&plan), [(1, 1), (1, 1)]);
    assert!(plan.spans.iter().all(|span| !span.prompt_logprobs));
}

#[test]
fn the_last_token_is_never_computed_nor_planned_twice() {
    let mut bench = Bench::new(Limits { steps_in_flight: 2, ..limits() });
    bench.add(ask(10, 2));
    let first = bench.plan();
    let second = bench.plan();
    assert_eq!((second.spans[0].position, second.spans[0].sample), (10, true));
    bench.commit(&first);
    assert!(bench.scheduler.plan().is_none(), "both tokens are on their way");
    bench.commit(&second);
    assert_eq!(bench.ends(), [(0, 0, End::Length)]);
    assert!(bench.scheduler.is_idle());
}

#[test]
fn what_ends_in_flight_keeps_pages_and_slot_until_its_last_step_is_committed() {
    let mut bench =
        Bench::new(Limits { steps_in_flight: 2, running_max: 1, kv_pages: vec![2], ..limits() });
    bench.add(ask(10, 50));
    bench.add(ask(10, 50));
    let first = bench.plan();
    let second = bench.plan();
    bench.commit_with(&first, |_| Outcome { stop: true, page_hash: None });
    assert_eq!(bench.ends(), [(0, 0, End::Stop)]);
    assert_eq!((bench.scheduler.running(), bench.scheduler.pages_available()), (0, 1));
    assert!(bench.scheduler.plan().is_none(), "its slot is still in use");
    bench.commit(&second);
    assert_eq!(bench.scheduler.pages_available(), 2);
    let told = bench.notices.iter().filter(|notice| matches!(notice, Notice::Token { .. }));
    assert_eq!(told.count(), 1, "the late row is dropped");
    assert_eq!(rows(&bench.plan()), [(1, 10)]);
}

#[test]
fn every_choice_ends_once_however_often_it_is_ended() {
    let mut bench = Bench::new(limits());
    let request = bench.add(Ask { choices: 3, ..ask(10, 20) });
    bench.step();
    bench.step();
    bench.scheduler.finish(request, 1, &mut bench.notices);
    bench.scheduler.finish(request, 1, &mut bench.notices);
    let plan = bench.plan();
    bench.cancel(request);
    bench.cancel(request);
    bench.commit(&plan);
    bench.scheduler.finish(request, 0, &mut bench.notices);
    assert_eq!(bench.ends(), [(0, 1, End::Stop), (0, 0, End::Aborted), (0, 2, End::Aborted)]);
    assert_eq!(bench.scheduler.pages_available(), 16);
}

#[test]
fn a_waiting_request_that_leaves_gives_its_place_back() {
    let mut bench = Bench::new(Limits { running_max: 1, ..limits() });
    bench.add(ask(10, 20));
    let second = bench.add(Ask { choices: 2, ..ask(10, 20) });
    bench.step();
    assert_eq!(bench.scheduler.waiting_requests(), 1);
    bench.cancel(second);
    assert_eq!((bench.scheduler.waiting_requests(), bench.scheduler.waiting()), (0, 0));
}

#[test]
fn a_failed_step_fails_whom_it_held_even_while_the_next_is_in_flight() {
    let mut bench = Bench::new(Limits { steps_in_flight: 2, step_tokens_max: 10, ..limits() });
    bench.add(ask(10, 20));
    let first = bench.plan();
    bench.add(ask(5, 3));
    let second = bench.plan();
    assert_eq!(rows(&second), [(0, 1), (1, 5)]);
    bench.scheduler.fail(first.number, &mut bench.notices);
    bench.scheduler.check_integrity().expect("books balance");
    assert_eq!(bench.ends(), [(0, 0, End::Failed)]);
    bench.commit(&second);
    bench.run_dry();
    assert_eq!(bench.ends()[1..], [(1, 0, End::Length)]);
    assert_eq!(bench.scheduler.pages_available(), 16);
}

#[test]
fn a_lost_device_ends_everything_at_once() {
    let mut bench = Bench::new(Limits { steps_in_flight: 2, running_max: 1, ..limits() });
    bench.add(ask(10, 20));
    bench.add(Ask { choices: 2, ..ask(10, 20) });
    bench.plan();
    bench.plan();
    bench.scheduler.fail_all(&mut bench.notices);
    bench.scheduler.check_integrity().expect("books balance");
    assert_eq!(bench.ends(), [(0, 0, End::Failed), (1, 0, End::Failed), (1, 1, End::Failed)]);
    assert!(bench.scheduler.is_idle());
    assert_eq!(bench.scheduler.pages_available(), 16);
}
