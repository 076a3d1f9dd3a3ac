//! The loop with its thread, over the scripted backend.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::backend::scripted::{Script, ScriptedBackend, oracle};
use crate::batch::{AdapterIndex, SamplingParams, TokenId};
use crate::request::{Event, FinishReason, PrefixSalt, Refusal, Request, StopRules};

const VOCABULARY: u32 = 50_000;

fn limits() -> Limits {
    Limits {
        running_max: 4,
        waiting_max: 8,
        step_tokens_max: 128,
        context_tokens: 1024,
        kv_pages: vec![32],
        steps_in_flight: 1,
        prefix_reuse: true,
    }
}

fn engine(limits: Limits, script: Script) -> EngineHandle {
    measured_engine(limits, script).0
}

fn measured_engine(limits: Limits, script: Script) -> (EngineHandle, Arc<Metrics>) {
    let backend = ScriptedBackend::new(&limits.kv_pages, script);
    let metrics = Metrics::new("scripted", limits.context_tokens);
    (start(Box::new(backend), limits, Arc::clone(&metrics)), metrics)
}

fn slow() -> Script {
    Script { step_time: Duration::from_millis(1), ..Script::default() }
}

/// The value of a series, under our name and under the alias.
fn measured(metrics: &Metrics, name: &str, alias: &str, label: &str) -> [f64; 2] {
    let text = metrics.render();
    [format!("plimsoll_{name}{{"), format!("vllm:{alias}{{")].map(|start| {
        let series = text.lines().find(|line| line.starts_with(&start) && line.contains(label));
        let value = series.and_then(|line| line.rsplit(' ').next()).expect("the series exists");
        value.parse().expect("a number")
    })
}

fn request(prompt: impl IntoIterator<Item = TokenId>, output_tokens_max: u32) -> Request {
    Request {
        prompt: prompt.into_iter().collect(),
        choices: 1,
        sampling: Arc::new(SamplingParams { seed: 7, ..SamplingParams::default() }),
        stop: StopRules { stop_tokens: Arc::default(), output_tokens_max },
        salt: PrefixSalt { adapter: AdapterIndex::BASE, tenant: None },
    }
}

async fn events(mut stream: RequestStream) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    events
}

fn tokens(events: &[Event], wanted: u32) -> Vec<TokenId> {
    let token = |event: &Event| match event {
        Event::Token { choice, token, .. } if *choice == wanted => Some(*token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

/// Waits for what the loop does on its own.
async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_request_streams_its_prompt_tokens_and_end() {
    for steps_in_flight in [1, 2] {
        let handle = engine(Limits { steps_in_flight, ..limits() }, Script::default());
        let events = events(handle.submit(request(0..100, 5)).expect("fits")).await;
        let prompt = Event::Prompt { choice: 0, cached_tokens: 0, logprobs: Vec::new() };
        assert_eq!(events[0], prompt);
        let prompt: Vec<TokenId> = (0..100).collect();
        assert_eq!(tokens(&events, 0), oracle(&prompt, 7, VOCABULARY, 5));
        let end = Event::Finished { choice: 0, reason: FinishReason::Length };
        assert_eq!(events.last(), Some(&end));
        assert_eq!(events.len(), 7);
    }
}

#[tokio::test]
async fn a_stop_token_ends_the_choice_without_being_told() {
    let prompt: Vec<TokenId> = (0..10).collect();
    let expected = oracle(&prompt, 7, VOCABULARY, 4);
    let mut request = request(prompt, 50);
    request.stop.stop_tokens = Arc::new([expected[3]].into());
    let events = events(engine(limits(), Script::default()).submit(request).expect("fits")).await;
    assert_eq!(tokens(&events, 0), expected[..3]);
    let end = Event::Finished { choice: 0, reason: FinishReason::Stop };
    assert_eq!(events.last(), Some(&end));
}

#[tokio::test]
async fn a_dropped_stream_frees_its_pages() {
    for steps_in_flight in [1, 2] {
        let script = Script { step_time: Duration::from_millis(2), ..Script::default() };
        let handle = engine(Limits { steps_in_flight, ..limits() }, script);
        let mut stream = handle.submit(request(0..200, 800)).expect("fits");
        assert!(stream.next().await.is_some());
        assert_eq!(handle.state().running, 1);
        drop(stream);
        eventually("pages come back", || {
            let state = handle.state();
            state.running == 0 && state.kv_pages_free == 32
        })
        .await;
    }
}

#[tokio::test]
async fn a_reader_that_stops_reading_loses_its_request_and_is_told_so() {
    let unread = events::CHOICE_EVENTS_MAX as usize;
    let limits = Limits { context_tokens: 8192, kv_pages: vec![128], ..limits() };
    let (handle, metrics) = measured_engine(limits, Script::default());
    let mut stream = handle.submit(request(0..10, 8000)).expect("fits");
    let aborted = r#"finished_reason="abort""#;
    eventually("the request is given up long before its end", || {
        measured(&metrics, "requests_finished_total", "request_success_total", aborted) == [1.0; 2]
    })
    .await;
    eventually("its pages come back", || handle.state().kv_pages_free == 128).await;
    let mut heard = Vec::new();
    while let Some(event) = stream.next().await {
        heard.push(event);
    }
    let prompt: Vec<TokenId> = (0..10).collect();
    assert_eq!(tokens(&heard, 0), oracle(&prompt, 7, VOCABULARY, unread - 1), "without a gap");
    let Some(Event::Failed { choice: 0, message }) = heard.last() else { panic!("no last word") };
    assert!(message.contains("read too slowly"), "{message}");
    assert_eq!(heard.len(), unread + 1);
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_says_when_to_retry() {
    let script = Script { step_time: Duration::from_millis(20), ..Script::default() };
    let limits = Limits { running_max: 1, waiting_max: 2, ..limits() };
    let handle = engine(limits, script);
    let first = handle.submit(request(0..10, 500)).expect("runs");
    eventually("the first one runs", || handle.state().running == 1).await;
    let second = handle.submit(request(0..10, 5)).expect("waits");
    let third = handle.submit(request(0..10, 5)).expect("waits");
    let refusal = handle.submit(request(0..10, 5)).map(|_| ()).expect_err("no place is left");
    assert_eq!(refusal, Refusal::QueueFull { waiting: 2, retry_after_seconds: 1 });
    drop(second);
    eventually("a waiting one that leaves gives its place back", || {
        handle.submit(request(0..10, 5)).is_ok()
    })
    .await;
    drop((first, third));
}

#[tokio::test]
async fn a_failing_step_fails_its_requests_and_no_others() {
    for steps_in_flight in [1, 2] {
        let failing_steps = [StepNumber(3)].into();
        let script = Script { failing_steps, ..Script::default() };
        let handle = engine(Limits { steps_in_flight, ..limits() }, script);
        let failed = events(handle.submit(request(0..10, 50)).expect("fits")).await;
        assert!(matches!(failed.last(), Some(Event::Failed { choice: 0, .. })));
        let fine = events(handle.submit(request(0..10, 50)).expect("fits")).await;
        assert_eq!(tokens(&fine, 0).len(), 50);
    }
}

#[tokio::test]
async fn a_lost_device_fails_everything_and_is_reported() {
    let script = Script { lost_at: Some(StepNumber(3)), ..Script::default() };
    let handle = engine(limits(), script);
    let failed = events(handle.submit(request(0..10, 50)).expect("fits")).await;
    assert!(matches!(failed.last(), Some(Event::Failed { choice: 0, .. })));
    assert!(matches!(handle.lost().await, EngineLoss::Device(_)));
    let refusal = handle.submit(request(0..10, 5)).map(|_| ());
    assert_eq!(refusal, Err(Refusal::ShuttingDown));
}

#[tokio::test]
async fn draining_lets_the_running_finish_and_refuses_the_new() {
    let script = Script { step_time: Duration::from_millis(1), ..Script::default() };
    let handle = engine(limits(), script);
    let stream = handle.submit(request(0..10, 50)).expect("fits");
    handle.begin_shutdown();
    let refusal = handle.submit(request(0..10, 5)).map(|_| ());
    assert_eq!(refusal, Err(Refusal::ShuttingDown));
    let (_, events) = tokio::join!(handle.drained(), events(stream));
    assert_eq!(tokens(&events, 0).len(), 50);
}

#[tokio::test]
async fn choices_differ_and_a_found_stop_string_ends_one_of_them_quietly() {
    let handle = engine(limits(), slow());
    let prompt: Vec<TokenId> = (0..100).collect();
    let mut stream =
        handle.submit(Request { choices: 3, ..request(prompt.clone(), 40) }).expect("fits");
    let mut told = Vec::new();
    while let Some(event) = stream.next().await {
        let second_choice_spoke = matches!(event, Event::Token { choice: 1, .. });
        told.push(event);
        if second_choice_spoke {
            stream.finish_choice(1);
        }
    }
    assert_eq!(tokens(&told, 0), oracle(&prompt, 7, VOCABULARY, 40));
    assert_eq!(tokens(&told, 1), oracle(&prompt, live::choice_seed(7, 1), VOCABULARY, 1));
    assert_eq!(tokens(&told, 2), oracle(&prompt, live::choice_seed(7, 2), VOCABULARY, 40));
    let ended = told.iter().filter(|event| matches!(event, Event::Finished { .. }));
    assert_eq!(ended.count(), 2, "the second choice brings nothing after it was ended");
}

#[tokio::test]
async fn every_choice_brings_the_prompts_logprobs_where_they_were_asked_for() {
    let mut request = Request { choices: 2, ..request(0..150, 3) };
    let sampling =
        SamplingParams { prompt_logprobs: Some(0), logprobs: Some(0), ..Default::default() };
    request.sampling = Arc::new(sampling);
    let told = events(engine(limits(), Script::default()).submit(request).expect("fits")).await;
    for wanted in [0, 1] {
        let logprobs = told.iter().find_map(|event| match event {
            Event::Prompt { choice, logprobs, .. } if *choice == wanted => Some(logprobs),
            _ => None,
        });
        let told: Vec<TokenId> =
            logprobs.expect("told").iter().map(|logprob| logprob.token).collect();
        assert_eq!(told, (1..150).collect::<Vec<_>>());
    }
    let with = told.iter().filter(|e| matches!(e, Event::Token { logprob: Some(_), .. })).count();
    assert_eq!(with, 6);
}

#[tokio::test]
async fn a_conversations_next_round_finds_its_past_in_the_cache() {
    let handle = engine(limits(), Script::default());
    let mut past: Vec<TokenId> = (0..100).collect();
    let first = events(handle.submit(request(past.clone(), 60)).expect("fits")).await;
    past.extend(tokens(&first, 0));
    let second = events(handle.submit(request(past.clone(), 1)).expect("fits")).await;
    assert!(matches!(second[0], Event::Prompt { cached_tokens: 128, .. }), "{:?}", second[0]);
    let mut strangers = request(past, 1);
    strangers.salt.tenant = Some("another".into());
    let strangers = events(handle.submit(strangers).expect("fits")).await;
    assert!(matches!(strangers[0], Event::Prompt { cached_tokens: 0, .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_of_many_clients_leaving_leaves_nothing_behind() {
    let limits = Limits { running_max: 16, waiting_max: 600, steps_in_flight: 2, ..limits() };
    let (handle, metrics) = measured_engine(limits, Script::default());
    let clients = (0..600).map(|index: u32| {
        let handle = handle.clone();
        tokio::spawn(async move {
            let mut stream = handle.submit(request(0..index % 150 + 1, 30)).expect("places enough");
            let patience = if index.is_multiple_of(2) { index as usize % 40 } else { usize::MAX };
            let mut heard = 0;
            while heard < patience && stream.next().await.is_some() {
                heard += 1;
            }
            usize::from(heard < 32)
        })
    });
    let clients: Vec<_> = clients.collect();
    let mut left = 0;
    for client in clients {
        left += client.await.expect("no client panics");
    }
    assert!(left > 200, "{left} left early");
    handle.begin_shutdown();
    handle.drained().await;
    eventually("everything is free", || {
        let state = handle.state();
        state.running == 0 && state.waiting == 0 && state.kv_pages_free == state.kv_pages_total
    })
    .await;
    assert_eq!(measured(&metrics, "requests_running", "num_requests_running", ""), [0.0; 2]);
    assert_eq!(measured(&metrics, "requests_waiting", "num_requests_waiting", ""), [0.0; 2]);
    assert_eq!(measured(&metrics, "kv_cache_usage_ratio", "kv_cache_usage_perc", ""), [0.0; 2]);
    let ended =
        |reason| measured(&metrics, "requests_finished_total", "request_success_total", reason);
    let [aborted, alias] = ended("abort");
    assert_eq!(aborted, alias);
    assert!(aborted > 0.0 && aborted <= left as f64);
    assert_eq!(aborted + ended("length")[0], 600.0, "everyone ended once");
}

#[tokio::test]
async fn metrics_tell_what_happened_under_both_names() {
    let (handle, metrics) = measured_engine(limits(), Script::default());
    events(handle.submit(Request { choices: 2, ..request(0..130, 10) }).expect("fits")).await;
    events(handle.submit(request(0..130, 10)).expect("fits")).await;
    handle.submit(request(0..2000, 10)).map(|_| ()).expect_err("too long");
    handle.begin_shutdown();
    handle.drained().await;
    for (name, alias, label, value) in [
        ("prompt_tokens_total", "prompt_tokens_total", "", 260.0),
        ("prompt_tokens_cached_total", "prompt_tokens_cached_total", "", 128.0),
        ("generation_tokens_total", "generation_tokens_total", "", 30.0),
        ("requests_finished_total", "request_success_total", r#"finished_reason="length""#, 3.0),
        ("requests_finished_total", "request_success_total", r#"finished_reason="abort""#, 0.0),
        ("admission_rejections_total", "admission_rejections_total", "never_fits", 1.0),
        ("time_to_first_token_seconds_count", "time_to_first_token_seconds_count", "", 3.0),
        ("inter_token_latency_seconds_count", "inter_token_latency_seconds_count", "", 27.0),
        ("e2e_request_latency_seconds_count", "e2e_request_latency_seconds_count", "", 3.0),
        ("request_queue_time_seconds_count", "request_queue_time_seconds_count", "", 3.0),
        ("request_params_n_sum", "request_params_n_sum", "", 3.0),
        (
            "request_max_num_generation_tokens_sum",
            "request_max_num_generation_tokens_sum",
            "",
            20.0,
        ),
        ("request_generation_tokens_sum", "request_generation_tokens_sum", "", 30.0),
    ] {
        assert_eq!(measured(&metrics, name, alias, label), [value; 2], "{name}");
    }
    eventually("the loop reports what it counted", || {
        measured(&metrics, "prefix_cache_queries_total", "prefix_cache_queries_total", "")
            == [260.0; 2]
    })
    .await;
    let hits = measured(&metrics, "prefix_cache_hits_total", "prefix_cache_hits_total", "");
    assert_eq!(hits, [128.0; 2], "siblings are not counted");
}

#[tokio::test]
async fn a_panic_of_the_loop_is_reported_and_ends_every_stream() {
    struct Broken(ScriptedBackend);
    impl Backend for Broken {
        fn layout(&self) -> &crate::backend::KvLayout {
            self.0.layout()
        }
        fn submit(&mut self, _step: Step) -> Result<Ticket, BackendError> {
            panic!("planted");
        }
        fn collect(&mut self, _ticket: Ticket) -> Result<StepOutput, BackendError> {
            unreachable!("nothing was submitted");
        }
    }
    let backend = Broken(ScriptedBackend::new(&[32], Script::default()));
    let handle = start(Box::new(backend), limits(), Metrics::new("broken", 1024));
    let told =
        events(handle.submit(Request { choices: 2, ..request(0..9, 9) }).expect("fits")).await;
    let failed = |choice| Event::Failed { choice, message: "the engine has stopped".into() };
    assert_eq!(told, [failed(0), failed(1)]);
    assert_eq!(handle.lost().await, EngineLoss::Panicked);
    handle.drained().await;
}

#[tokio::test]
async fn the_pulse_ages_only_while_a_step_takes_its_time_which_is_remembered() {
    let script = Script { step_time: Duration::from_millis(150), ..Script::default() };
    let handle = engine(limits(), script);
    assert_eq!(handle.pulse(), Pulse { age: Duration::ZERO, longest: Duration::ZERO });
    let stream = handle.submit(request(0..9, 1)).expect("fits");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let age = handle.pulse().age;
    assert!(age > Duration::from_millis(30), "{age:?}");
    events(stream).await;
    eventually("it rests again", || handle.pulse().age == Duration::ZERO).await;
    let longest = handle.pulse().longest;
    assert!(longest >= Duration::from_millis(150), "{longest:?}");
    tokio::time::sleep(Duration::from_millis(50)).await;
    events(handle.submit(request(0..9, 1)).expect("fits")).await;
    assert!(handle.pulse().longest < longest + Duration::from_secs(5), "rest is no step");
}
