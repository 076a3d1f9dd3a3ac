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
    let backend = ScriptedBackend::new(&limits.kv_pages, script);
    let metrics = Metrics::new("scripted", limits.context_tokens);
    start(Box::new(backend), limits, metrics)
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
