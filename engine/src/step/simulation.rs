//! Ten thousand small worlds, each from a seed: the step loop without its thread, over the scripted backend, with
//! clients who arrive, share prefixes, want several choices, stop, leave, and fail. After every step all books must
//! balance; at the end everyone has had exactly what a plain run would have given, in the documented order.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use super::*;
use crate::backend::KvLayout;
use crate::backend::scripted::{Script, ScriptedBackend, oracle};
use crate::batch::{AdapterIndex, RowInput, SamplingParams, SequenceId, TokenId};
use crate::kv_cache::pages_of;
use crate::request::{Event, FinishReason, PrefixSalt, Refusal, Request, StopRules};
use crate::scheduler::StepCosts;

const SEEDS: u64 = 10_000;

/// SplitMix64.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `low` to `high`, both included.
    fn between(&mut self, low: u32, high: u32) -> u32 {
        low + (self.next() % u64::from(high - low + 1)) as u32
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.between(1, n) == 1
    }
}

/// What the steps of a world showed.
#[derive(Clone, Copy, Default)]
struct Seen {
    steps: u64,
    copies: u64,
    placeholders: u64,
    resumed: u64,
    mixed_steps: u64,
    /// Prompts of which a step with room left rows to the next.
    put_off: u64,
    /// Choices that began before one of an older request, whose turn was later.
    interleaved: u64,
}

/// Half of the devices take rows in tiles, of which some cost more than others.
fn costs(chance: &mut Chance, rows_max: u32) -> StepCosts {
    if chance.one_in(2) {
        return StepCosts::default();
    }
    let (unit, tile, seed) = (chance.between(1, 3), chance.between(2, 40), chance.next());
    let more = |rows: u32| (Chance(seed ^ u64::from(rows)).next() % 100) as f32 / 10.0;
    StepCosts::of(unit, rows_max, |rows| (rows.div_ceil(tile) * tile) as f32 + more(rows))
}

/// Passes steps on to the scripted backend after checking what every step must keep.
struct Watched {
    inner: ScriptedBackend,
    limits: Limits,
    costs: StepCosts,
    /// With the number of choices that had arrived by then.
    started: BTreeMap<SequenceId, usize>,
    turns: Turns,
    seen: Arc<Mutex<Seen>>,
}

/// Round and choice of every choice that arrived, by its number: the documented order, told by whoever sent them.
type Turns = Arc<Mutex<Vec<(u64, u32)>>>;

impl Watched {
    fn watch(&mut self, step: &Step) {
        let mut seen = self.seen.lock().expect("one thread");
        seen.steps += 1;
        assert_eq!(step.number.0, seen.steps, "steps are numbered in order");
        let rows: usize = step.spans.iter().map(|span| span.inputs.len()).sum();
        assert!(rows as u32 <= self.limits.step_tokens_max, "{rows} rows");
        assert!(step.spans.len() <= self.limits.running_max);
        assert!(step.spans.iter().all(|span| (span.slot.0 as usize) < self.limits.running_max));
        let decodes = |span: &Span| span.start.is_none() && span.sample && span.inputs.len() == 1;
        let (decode, prefill): (Vec<_>, Vec<_>) = step.spans.iter().partition(|s| decodes(s));
        let turns = self.turns.lock().expect("one thread");
        let turn = |sequence: SequenceId| turns[sequence.0 as usize];
        assert!(step.spans.is_sorted_by_key(|span| !decodes(span)), "decode rows come first");
        assert!(decode.is_sorted_by_key(|span| turn(span.sequence)), "earlier rows come first");
        let admitted = |span: &&&Span| span.start.is_some();
        let by_turn = prefill.is_sorted_by_key(|s| (s.start.is_some(), turn(s.sequence)));
        assert!(by_turn, "prompts under way come first, then who is admitted, both by turn");
        for span in prefill.iter().filter(admitted) {
            if self.started.contains_key(&span.sequence) {
                seen.resumed += 1;
                continue;
            }
            for (&other, &arrived) in &self.started {
                let overtaken = turn(other) > turn(span.sequence);
                let came_later = span.sequence.0 as usize >= arrived;
                assert!(!overtaken || came_later, "{other:?} overtook {:?}", span.sequence);
            }
            let older = (0..span.sequence.0).map(SequenceId);
            let waits = |id: &SequenceId| !self.started.contains_key(id);
            seen.interleaved +=
                u64::from(older.filter(waits).any(|id| turn(id) > turn(span.sequence)));
            self.started.insert(span.sequence, turns.len());
        }
        seen.copies += step.copies.len() as u64;
        seen.mixed_steps += u64::from(!decode.is_empty() && !prefill.is_empty());
        if (rows as u32) < self.limits.step_tokens_max {
            let unfinished: Vec<_> = prefill.iter().filter(|span| !span.sample).collect();
            assert!(unfinished.iter().all(|span| span.start.is_some()), "put off twice");
            seen.put_off += unfinished.len() as u64;
        }
        let inputs = step.spans.iter().flat_map(|span| &span.inputs);
        seen.placeholders += inputs.filter(|input| **input == RowInput::Sampled).count() as u64;
    }
}

impl Backend for Watched {
    fn layout(&self) -> &KvLayout {
        self.inner.layout()
    }

    fn step_costs(&self) -> StepCosts {
        self.costs.clone()
    }

    fn submit(&mut self, step: Step) -> Result<Ticket, BackendError> {
        self.watch(&step);
        self.inner.submit(step)
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, BackendError> {
        match self.inner.collect(ticket) {
            Err(BackendError::StepFailed { reason, .. }) if !reason.contains("script says") => {
                panic!("a real backend would have computed this wrongly: {reason}")
            }
            result => result,
        }
    }
}

/// One request and whoever sent it.
struct Client {
    request: Request,
    stream: Option<RequestStream>,
    choices: Vec<Answer>,
    /// Leaves when the world has done this many steps.
    leaves_at: Option<u64>,
    /// Finds a stop string in this choice after so many tokens.
    finds_stop: Option<(u32, usize)>,
}

#[derive(Clone, Default)]
struct Answer {
    tokens: Vec<TokenId>,
    /// By step.
    first_token_at: Option<u64>,
    prompt_logprobs: Option<usize>,
    cached_tokens: u32,
    end: Option<Ended>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Stop,
    Length,
    FoundStop,
    Failed,
}

/// Sums over all worlds; every one of them must have happened often enough for the seeds to prove something.
#[derive(Debug, Default)]
struct Tally {
    requests: u64,
    full_queues: u64,
    never_fitting: u64,
    left: u64,
    stopped: u64,
    found_stop: u64,
    failed: u64,
    preemptions: u64,
    resumed: u64,
    copies: u64,
    placeholders: u64,
    mixed_steps: u64,
    put_off: u64,
    interleaved: u64,
    cached_prompts: u64,
    wholly_cached_prompts: u64,
}

struct World {
    chance: Chance,
    step_loop: StepLoop,
    handle: EngineHandle,
    commands: usize,
    clients: Vec<Client>,
    still_to_come: u32,
    /// Short prompts and long answers, so that pages run out while decoding.
    talkative: bool,
    vocabulary: u32,
    order: Turns,
    seen: Arc<Mutex<Seen>>,
    /// Steps that would suffice if everybody ran alone.
    patience: u64,
    turns: u64,
}

impl World {
    fn new(seed: u64, metrics: &Arc<Metrics>) -> World {
        let mut chance = Chance(seed);
        let most_pages = if chance.one_in(2) { 8 } else { 24 };
        let mut kv_pages = vec![chance.between(3, most_pages)];
        if chance.one_in(4) {
            kv_pages.push(chance.between(3, most_pages));
        }
        let limits = Limits {
            running_max: chance.between(1, 6) as usize,
            waiting_max: chance.between(1, 8) as usize,
            step_tokens_max: if chance.one_in(4) {
                chance.between(1, 12)
            } else {
                chance.between(16, 200)
            },
            context_tokens: chance.between(180, 400),
            kv_pages,
            steps_in_flight: chance.between(1, 2) as usize,
            prefix_reuse: !chance.one_in(3),
        };
        let mut script = Script { vocabulary: chance.between(20, 2000), ..Script::default() };
        if chance.one_in(10) {
            script.failing_steps.insert(StepNumber(u64::from(chance.between(1, 40))));
        }
        let seen = Arc::new(Mutex::new(Seen::default()));
        let order = Turns::default();
        let vocabulary = script.vocabulary;
        let backend = Watched {
            inner: ScriptedBackend::new(&limits.kv_pages, script),
            limits: limits.clone(),
            costs: costs(&mut chance, limits.step_tokens_max),
            started: BTreeMap::new(),
            turns: Arc::clone(&order),
            seen: Arc::clone(&seen),
        };
        let (step_loop, handle) = StepLoop::new(Box::new(backend), limits, Arc::clone(metrics));
        World {
            still_to_come: chance.between(1, 12),
            talkative: chance.one_in(3),
            chance,
            step_loop,
            handle,
            commands: 0,
            clients: Vec::new(),
            vocabulary,
            order,
            seen,
            patience: 16,
            turns: 0,
        }
    }

    fn run(mut self, tally: &mut Tally) {
        while self.still_to_come > 0 || !self.step_loop.scheduler.is_idle() || self.commands > 0 {
            while self.still_to_come > 0 && self.chance.one_in(5) {
                self.still_to_come -= 1;
                self.send_request(tally);
            }
            if self.step_loop.scheduler.is_idle() && self.commands == 0 {
                continue;
            }
            self.commands = 0;
            assert!(self.step_loop.take_commands());
            self.check();
            self.step_loop.advance().expect("no device is lost here");
            self.check();
            self.step_loop.report();
            self.turns += 1;
            assert!(self.turns <= self.patience, "somebody starves");
            self.serve_clients(tally);
        }
        self.check_the_end(tally);
    }

    fn check(&self) {
        self.step_loop.scheduler.check_integrity().expect("all books balance");
    }

    /// A prompt that begins like others do and whose length likes the borders of pages.
    fn prompt(&mut self) -> Vec<TokenId> {
        let story = self.chance.between(0, 2);
        let length = match self.chance.between(0, 3) {
            _ if self.talkative => self.chance.between(1, 64),
            0 => self.chance.between(1, 64),
            1 => 64 * self.chance.between(1, 3) + self.chance.between(0, 4) - 2,
            2 => 64 * self.chance.between(1, 2),
            _ => self.chance.between(1, 250),
        };
        let own = if self.chance.one_in(2) { 0 } else { self.chance.between(0, length) };
        let told = (0..length - own).map(|i| (story * 1000 + i * 7) % self.vocabulary);
        let mut prompt: Vec<TokenId> = told.collect();
        prompt.extend((0..own).map(|_| self.chance.between(0, self.vocabulary - 1)));
        if self.chance.one_in(6)
            && let Some(earlier) = self.clients.last()
        {
            prompt = earlier.request.prompt.to_vec();
        }
        // A later round of an earlier conversation.
        if self.chance.one_in(3)
            && let Some(earlier) = self.clients.iter().rev().find(|c| c.choices[0].end.is_some())
        {
            let said = earlier.request.prompt.iter().chain(&earlier.choices[0].tokens);
            prompt = said.copied().chain(prompt.into_iter().take(30)).collect();
        }
        prompt
    }

    fn send_request(&mut self, tally: &mut Tally) {
        let prompt = self.prompt();
        let output_tokens_max = match self.chance.between(0, 3) {
            _ if self.talkative => self.chance.between(100, 300),
            0 => self.chance.between(1, 3),
            1 => self.chance.between(60, 160),
            _ => self.chance.between(1, 30),
        };
        let choices = if self.chance.one_in(4) { self.chance.between(2, 4) } else { 1 };
        let stop_tokens = (0..self.chance.between(0, 2))
            .map(|_| self.chance.between(0, self.vocabulary - 1))
            .collect();
        let prompt_logprobs = self.chance.one_in(8).then_some(0);
        let seed = self.chance.next();
        let request = Request {
            prompt: prompt.into(),
            choices,
            sampling: Arc::new(SamplingParams { seed, prompt_logprobs, ..Default::default() }),
            stop: StopRules { stop_tokens: Arc::new(stop_tokens), output_tokens_max },
            salt: PrefixSalt {
                adapter: AdapterIndex::BASE,
                tenant: self.chance.one_in(5).then(|| "tenant".to_owned()),
            },
        };
        match self.handle.submit(request.clone()) {
            Ok(stream) => self.seat(request, stream),
            Err(Refusal::NeverFits { .. }) => tally.never_fitting += 1,
            Err(Refusal::QueueFull { .. }) => tally.full_queues += 1,
            Err(Refusal::ShuttingDown) => unreachable!("nobody shuts this world down"),
        }
    }

    fn seat(&mut self, request: Request, stream: RequestStream) {
        self.commands += 1;
        let number = self.clients.len() as u64;
        let turns = (0..request.choices).map(|choice| (number + u64::from(choice), choice));
        self.order.lock().expect("one thread").extend(turns);
        let tokens = request.prompt.len() as u32 + request.stop.output_tokens_max;
        let alone = u64::from(tokens) + 4 * pages_of(tokens) as u64 + 8;
        self.patience += alone * u64::from(request.choices);
        let steps = self.seen.lock().expect("one thread").steps;
        let chance = &mut self.chance;
        let choice = chance.between(0, request.choices - 1);
        self.clients.push(Client {
            choices: vec![Answer::default(); request.choices as usize],
            request,
            stream: Some(stream),
            leaves_at: chance.one_in(6).then(|| steps + u64::from(chance.between(0, 60))),
            finds_stop: chance.one_in(6).then(|| (choice, chance.between(1, 20) as usize)),
        });
    }

    fn serve_clients(&mut self, tally: &mut Tally) {
        let steps = self.seen.lock().expect("one thread").steps;
        for client in &mut self.clients {
            let Some(mut stream) = client.stream.take() else { continue };
            let mut next = poll(&mut stream);
            while let Poll::Ready(Some(event)) = next {
                if let Some(choice) = client.hear(event, steps) {
                    client.choices[choice as usize].end = Some(Ended::FoundStop);
                    stream.finish_choice(choice);
                    self.commands += 1;
                }
                next = poll(&mut stream);
            }
            if next.is_ready() {
                continue;
            }
            if client.leaves_at.is_some_and(|at| at <= steps) {
                tally.left += 1;
                self.commands += 1;
            } else {
                client.stream = Some(stream);
            }
        }
    }

    fn check_the_end(mut self, tally: &mut Tally) {
        self.serve_clients(tally);
        let scheduler = &self.step_loop.scheduler;
        assert_eq!(scheduler.pages_available(), scheduler.pages_total(), "pages are lost");
        assert!(self.step_loop.requests.is_empty() && self.step_loop.in_flight.is_empty());
        assert!(self.step_loop.shared.is_empty(), "the door still counts somebody");
        let state = self.handle.state();
        assert_eq!((state.running, state.waiting), (0, 0));
        for client in &self.clients {
            client.check(self.vocabulary, self.step_loop.shared.limits.prefix_reuse);
        }
        self.check_first_tokens();
        self.count(tally);
    }

    /// Of two choices the one whose turn is earlier and whose request is no younger begins to speak first.
    fn check_first_tokens(&self) {
        let turns = self.order.lock().expect("one thread");
        let choices = self.clients.iter().flat_map(|client| &client.choices);
        let spoke = turns.iter().zip(choices.map(|choice| choice.first_token_at));
        let spoke: Vec<_> = spoke.filter_map(|(turn, at)| Some((turn, at?))).collect();
        for (index, (older, spoke_at)) in spoke.iter().enumerate() {
            for (younger, at) in &spoke[index + 1..] {
                assert!(older > younger || spoke_at <= at, "{younger:?} spoke before {older:?}");
            }
        }
    }

    fn count(&self, tally: &mut Tally) {
        let seen = *self.seen.lock().expect("one thread");
        tally.requests += self.clients.len() as u64;
        tally.preemptions += self.step_loop.scheduler.totals().preemptions;
        tally.resumed += seen.resumed;
        tally.copies += seen.copies;
        tally.placeholders += seen.placeholders;
        tally.mixed_steps += seen.mixed_steps;
        tally.put_off += seen.put_off;
        tally.interleaved += seen.interleaved;
        for client in &self.clients {
            let first = &client.choices[0];
            tally.cached_prompts += u64::from(first.cached_tokens > 0);
            let whole = first.cached_tokens as usize == client.request.prompt.len() - 1;
            tally.wholly_cached_prompts += u64::from(whole && first.cached_tokens > 0);
            let ended = |end| client.choices.iter().filter(|c| c.end == Some(end)).count() as u64;
            tally.stopped += ended(Ended::Stop);
            tally.found_stop += ended(Ended::FoundStop);
            tally.failed += ended(Ended::Failed);
        }
    }
}

impl Client {
    /// Notes an event; the choice in which a stop string was found now, if so.
    fn hear(&mut self, event: Event, step: u64) -> Option<u32> {
        match event {
            Event::Prompt { choice, cached_tokens, logprobs } => {
                let answer = self.open(choice);
                assert!(answer.prompt_logprobs.is_none() && answer.tokens.is_empty());
                answer.prompt_logprobs = Some(logprobs.len());
                answer.cached_tokens = cached_tokens;
            }
            Event::Token { choice, token, .. } => {
                let answer = self.open(choice);
                assert!(answer.prompt_logprobs.is_some(), "the prompt comes first");
                answer.tokens.push(token);
                answer.first_token_at.get_or_insert(step);
                let tokens = answer.tokens.len();
                return (self.finds_stop == Some((choice, tokens))).then_some(choice);
            }
            Event::Finished { choice, reason: FinishReason::Stop } => {
                self.open(choice).end = Some(Ended::Stop);
            }
            Event::Finished { choice, reason: FinishReason::Length } => {
                self.open(choice).end = Some(Ended::Length);
            }
            Event::Failed { choice, .. } => self.open(choice).end = Some(Ended::Failed),
        }
        None
    }

    fn open(&mut self, choice: u32) -> &mut Answer {
        let answer = &mut self.choices[choice as usize];
        assert!(answer.end.is_none(), "nothing comes after the end");
        answer
    }

    /// Whether every choice heard what a run of its own would have told it, and all of it unless the client left.
    fn check(&self, vocabulary: u32, prefix_reuse: bool) {
        let Request { prompt, sampling, stop, .. } = &self.request;
        let left = self.stream.is_none() && self.choices.iter().any(|c| c.end.is_none());
        assert!(left || self.choices.iter().all(|choice| choice.end.is_some()));
        for (index, answer) in self.choices.iter().enumerate() {
            let seed = match index {
                0 => sampling.seed,
                _ => live::choice_seed(sampling.seed, index as u32),
            };
            let mut told = oracle(prompt, seed, vocabulary, stop.output_tokens_max as usize);
            let stop_at = told.iter().position(|token| stop.stop_tokens.contains(token));
            told.truncate(stop_at.unwrap_or(told.len()));
            match answer.end {
                Some(Ended::Stop) => {
                    assert!(stop_at.is_some());
                    assert_eq!(answer.tokens, told);
                }
                Some(Ended::Length) => {
                    assert!(stop_at.is_none());
                    assert_eq!(answer.tokens, told);
                }
                Some(Ended::FoundStop | Ended::Failed) | None => {
                    assert_eq!(answer.tokens, told[..answer.tokens.len()]);
                }
            }
            if let Some(logprobs) = answer.prompt_logprobs {
                let wanted = sampling.prompt_logprobs.map_or(0, |_| prompt.len() - 1);
                assert_eq!(logprobs, wanted, "every prompt token after the first");
                assert!((answer.cached_tokens as usize) < prompt.len());
                let alone = index == 0 && (!prefix_reuse || wanted > 0);
                assert!(!alone || answer.cached_tokens == 0, "nothing to find it in");
            }
        }
    }
}

fn poll(stream: &mut RequestStream) -> Poll<Option<Event>> {
    std::pin::pin!(stream.next()).poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn ten_thousand_worlds_keep_their_books_and_their_promises() {
    let metrics = Metrics::new("simulated", 400);
    let mut tally = Tally::default();
    for seed in 0..SEEDS {
        let world = std::panic::AssertUnwindSafe(World::new(seed, &metrics));
        let tally = std::panic::AssertUnwindSafe(&mut tally);
        let run = std::panic::catch_unwind(move || {
            let (world, tally) = (world, tally);
            world.0.run(tally.0);
        });
        if run.is_err() {
            panic!("the world of seed {seed} failed as told above");
        }
    }
    println!("{tally:?}");
    let Tally { requests, full_queues, never_fitting, left, stopped, found_stop, failed, .. } =
        tally;
    for often in [requests, full_queues, never_fitting, left, stopped, found_stop, failed] {
        assert!(often > SEEDS / 20, "{tally:?}");
    }
    let Tally {
        preemptions, resumed, copies, placeholders, mixed_steps, put_off, interleaved, ..
    } = tally;
    for often in [preemptions, resumed, copies, placeholders, mixed_steps, put_off, interleaved] {
        assert!(often > SEEDS / 20, "{tally:?}");
    }
    assert!(tally.cached_prompts > SEEDS / 20, "{tally:?}");
    assert!(tally.wholly_cached_prompts > SEEDS / 50, "{tally:?}");
}
