//! What a client gets: shapes, equality of streamed and whole answers, and errors that name what is wrong.

use std::time::Duration;

use plimsoll_engine::step::PulseLimits;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::world::{
    Client, Options, VOCABULARY, World, assert_all_free, chat, completion, get, loading_world,
    post, served, world,
};

/// Joins a stream's chunks per choice: text, finish reason, log-probability entries.
fn joined(events: &[Value], text: impl Fn(&Value) -> Option<&str>) -> Vec<(String, String)> {
    let mut choices: Vec<(String, String)> = Vec::new();
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let index = choice["index"].as_u64().unwrap() as usize;
        choices.resize(choices.len().max(index + 1), Default::default());
        let (all, reason) = &mut choices[index];
        assert!(reason.is_empty(), "nothing follows a finish reason");
        all.push_str(text(choice).unwrap_or_default());
        reason.push_str(choice["finish_reason"].as_str().unwrap_or_default());
    }
    choices
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_chat_is_the_whole_answer_in_pieces() {
    let world = world(Options::default()).await;
    let wish = json!({"seed": 7, "n": 3, "max_tokens": 40, "logprobs": true, "top_logprobs": 2});
    let whole = post(&world, "/v1/chat/completions", &chat("hello", wish.clone())).await;
    assert_eq!(whole.status, 200, "{:?}", whole.body);
    let whole = whole.json();
    let mut streamed = chat("hello", wish);
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let answer = post(&world, "/v1/chat/completions", &streamed).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let mut events = answer.events();
    let last = events.pop().unwrap();
    assert_eq!(last["choices"], json!([]));
    for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(last["usage"][count], whole["usage"][count], "{count}");
    }
    assert!(events.iter().all(|event| event["usage"].is_null() && event["id"] == events[0]["id"]));
    let choices = joined(&events, |choice| choice["delta"]["content"].as_str());
    for (index, (text, reason)) in choices.iter().enumerate() {
        let expected = &whole["choices"][index];
        assert_eq!(*text, expected["message"]["content"].as_str().unwrap());
        assert_eq!(*reason, expected["finish_reason"].as_str().unwrap());
        let entries: Vec<&Value> = events
            .iter()
            .flat_map(|event| event["choices"].as_array().unwrap())
            .filter(|choice| choice["index"] == index)
            .filter_map(|choice| choice["logprobs"]["content"].as_array())
            .flatten()
            .collect();
        assert_eq!(json!(entries), expected["logprobs"]["content"]);
    }
    assert_eq!(choices.len(), 3);
    assert_all_free(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_completion_is_the_whole_answer_in_pieces() {
    let world = world(Options::default()).await;
    let prompts = json!(["one", "two and three"]);
    let wish = json!({"seed": 3, "n": 2, "max_tokens": 20, "echo": true, "logprobs": 1, "ignore_eos": true});
    let whole = post(&world, "/v1/completions", &completion(prompts.clone(), wish.clone())).await;
    assert_eq!(whole.status, 200, "{:?}", whole.body);
    let whole = whole.json();
    assert_eq!(whole["usage"]["prompt_tokens"], 3 + 13);
    assert_eq!(whole["usage"]["completion_tokens"], 4 * 20);
    let mut streamed = completion(prompts, wish);
    streamed["stream"] = json!(true);
    let events = post(&world, "/v1/completions", &streamed).await.events();
    assert!(events.iter().all(|event| event.get("usage").is_none()));
    let choices = joined(&events, |choice| choice["text"].as_str());
    assert_eq!(choices.len(), 4);
    for (index, (text, reason)) in choices.iter().enumerate() {
        let expected = &whole["choices"][index];
        assert_eq!(*text, expected["text"].as_str().unwrap());
        assert_eq!(*reason, expected["finish_reason"].as_str().unwrap());
        let prompt = if index < 2 { "one" } else { "two and three" };
        assert!(text.starts_with(prompt));
        let logprobs = &expected["logprobs"];
        let tokens = logprobs["tokens"].as_array().unwrap();
        assert_eq!(tokens.len(), prompt.len() + 20);
        for list in ["token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(logprobs[list].as_array().unwrap().len(), tokens.len());
        }
        assert!(logprobs["token_logprobs"][0].is_null());
        assert!(logprobs["token_logprobs"][1].is_f64());
        let offsets: Vec<u64> = logprobs["text_offset"]
            .as_array()
            .unwrap()
            .iter()
            .map(|o| o.as_u64().unwrap())
            .collect();
        assert_eq!(offsets[..=prompt.len()], (0..=prompt.len() as u64).collect::<Vec<_>>());
        assert!(offsets.is_sorted());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_echo_without_output_reports_the_prompt_alone() {
    let world = world(Options::default()).await;
    let wish = json!({"max_tokens": 0, "echo": true, "logprobs": 0});
    let answer = post(&world, "/v1/completions", &completion(json!([104, 105, 33]), wish)).await;
    let body = answer.json();
    let choice = &body["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("hi!"), &json!("length")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["h", "i", "!"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2]));
    assert_eq!(body["usage"]["completion_tokens"], 0);
    assert_eq!(body["usage"]["prompt_tokens"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_counts_the_token_that_ended_the_turn_though_it_is_not_shown() {
    let world = world(Options::default()).await;
    for streams in [false, true] {
        let wish = json!({"seed": 5, "max_tokens": 2000, "logprobs": 0, "stream": streams,
            "stream_options": streams.then(|| json!({"include_usage": true}))});
        let answer = post(&world, "/v1/completions", &completion(json!("prompt"), wish)).await;
        let bodies = if streams { answer.events() } else { vec![answer.json()] };
        let choices = bodies.iter().flat_map(|body| body["choices"].as_array().unwrap());
        let shown = choices.clone().filter_map(|choice| choice["logprobs"]["tokens"].as_array());
        let shown: usize = shown.map(Vec::len).sum();
        assert_eq!(choices.last().unwrap()["finish_reason"], "stop", "one token in 320 ends it");
        assert_eq!(bodies.last().unwrap()["usage"]["completion_tokens"], shown + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_seeds_give_equal_answers_and_stop_strings_end_them() {
    let world = world(Options::default()).await;
    let ask = |more: Value| {
        let mut wish = json!({"seed": 11, "max_tokens": 60, "ignore_eos": true});
        wish.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        completion(json!("prompt"), wish)
    };
    let text = async |body: Value| {
        let body = post(&world, "/v1/completions", &body).await.json();
        let choice = &body["choices"][0];
        (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].clone(), body)
    };
    let (first, reason, _) = text(ask(json!({}))).await;
    assert_eq!(reason, "length");
    assert_eq!(text(ask(json!({}))).await.0, first);
    assert_ne!(text(ask(json!({"seed": 12}))).await.0, first);
    // Every end of the text, from two characters on, as a stop string: it spans tokens, since each is a byte.
    let chars: Vec<char> = first.chars().collect();
    for at in (0..chars.len() - 3).step_by(5) {
        let stop: String = chars[at..at + 3].iter().collect();
        let expected = &first[..first.find(&stop).unwrap()];
        let (cut, reason, body) = text(ask(json!({"stop": stop}))).await;
        assert_eq!((cut.as_str(), reason), (expected, json!("stop")));
        assert!(body["usage"]["completion_tokens"].as_u64().unwrap() <= 60);
    }
    assert_all_free(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_round_reports_what_was_cached() {
    let world = world(Options::default()).await;
    let prompt = "word ".repeat(60);
    let wish = json!({"max_tokens": 4});
    let first = post(&world, "/v1/completions", &completion(json!(prompt), wish.clone())).await;
    assert_eq!(first.json()["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let longer = format!("{prompt}and more");
    let second = post(&world, "/v1/completions", &completion(json!(longer), wish.clone())).await;
    assert_eq!(second.json()["usage"]["prompt_tokens_details"]["cached_tokens"], 256);
    let mut other = completion(json!(longer), wish);
    other["cache_salt"] = json!("another tenant");
    let third = post(&world, "/v1/completions", &other).await;
    assert_eq!(third.json()["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_openais_shape_and_the_right_status() {
    let world = world(Options::default()).await;
    let messages = |list: Value| json!({"model": "scripted", "messages": list});
    let user = json!([{"role": "user", "content": "x"}]);
    let cases = [
        (
            "/v1/chat/completions",
            json!({"model": "other", "messages": user}),
            404,
            "model_not_found",
            "model",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user}),
            400,
            "missing_required_parameter",
            "model",
        ),
        ("/v1/chat/completions", messages(json!([])), 400, "invalid_value", "messages"),
        (
            "/v1/chat/completions",
            messages(json!([{"role": "user"}])),
            400,
            "missing_required_parameter",
            "messages[0].content",
        ),
        (
            "/v1/chat/completions",
            messages(json!([{"role": "boss", "content": "x"}])),
            400,
            "invalid_value",
            "messages[0].role",
        ),
        (
            "/v1/chat/completions",
            messages(json!([{"role": "user", "content": [{"type": "image_url"}]}])),
            400,
            "unsupported_content",
            "messages[0].content[0].type",
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({"tools": [{}]})),
            400,
            "unsupported_parameter",
            "tools",
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({"response_format": {"type": "json_object"}})),
            400,
            "unsupported_parameter",
            "response_format",
        ),
        ("/v1/chat/completions", chat("x", json!({"top_logprobs": 3})), 400, "", "top_logprobs"),
        (
            "/v1/chat/completions",
            chat("x", json!({"max_tokens": 3000})),
            400,
            "context_length_exceeded",
            "",
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({"max_tokens": 0})),
            400,
            "invalid_value",
            "max_tokens",
        ),
        ("/v1/completions", completion(json!(""), json!({})), 400, "invalid_value", "prompt"),
        ("/v1/completions", completion(json!([]), json!({})), 400, "invalid_value", "prompt"),
        (
            "/v1/completions",
            completion(json!([1, 320]), json!({})),
            400,
            "invalid_value",
            "prompt[1]",
        ),
        (
            "/v1/completions",
            completion(json!([[1], [2, "x"]]), json!({})),
            400,
            "invalid_type",
            "prompt[1][1]",
        ),
        (
            "/v1/completions",
            completion(json!("x"), json!({"max_tokens": 0})),
            400,
            "invalid_value",
            "max_tokens",
        ),
        (
            "/v1/completions",
            completion(json!("x"), json!({"messages": []})),
            400,
            "unknown_parameter",
            "messages",
        ),
        ("/v1/completions", json!([]), 400, "", ""),
        ("/v1/nothing", json!({}), 404, "unknown_url", ""),
        ("/v1/models", json!({}), 405, "method_not_allowed", ""),
    ];
    for (path, body, status, code, param) in cases {
        let answer = post(&world, path, &body).await;
        let error = answer.json()["error"].clone();
        assert_eq!(answer.status, status, "{body} {error}");
        assert_eq!(error["code"].as_str().unwrap_or_default(), code, "{body} {error}");
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{body} {error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 10));
    }
    assert_all_free(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_fails_is_a_500_or_the_last_event_of_a_stream() {
    let failing_steps = [3, 9].map(plimsoll_engine::batch::StepNumber).into();
    let world = world(Options { failing_steps, ..Options::default() }).await;
    let wish = json!({"max_tokens": 6, "ignore_eos": true});
    let whole = post(&world, "/v1/completions", &completion(json!("x"), wish)).await;
    assert_eq!(whole.status, 500);
    assert_eq!(whole.json()["error"]["type"], "server_error");
    let wish = json!({"max_tokens": 20, "ignore_eos": true, "stream": true});
    let streamed = post(&world, "/v1/completions", &completion(json!("x"), wish)).await;
    assert_eq!(streamed.status, 200);
    let text = String::from_utf8(streamed.body.to_vec()).unwrap();
    assert!(!text.contains("[DONE]"), "{text}");
    let last = text.trim_end().rsplit("data: ").next().unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["error"]["type"], "server_error");
    let wish = json!({"max_tokens": 6});
    assert_eq!(post(&world, "/v1/completions", &completion(json!("x"), wish)).await.status, 200);
    assert_all_free(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_without_a_template_refuses_messages_and_serves_prompts() {
    let world = world(Options { template: false, ..Options::default() }).await;
    let answer = post(&world, "/v1/chat/completions", &chat("x", json!({}))).await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.json()["error"]["code"], "no_chat_template");
    assert_eq!(
        post(&world, "/v1/completions", &completion(json!("x"), json!({}))).await.status,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_with_429_and_a_time() {
    let options = Options {
        waiting_max: 1,
        step_time: std::time::Duration::from_millis(5),
        ..Options::default()
    };
    let world = world(options).await;
    let wish = json!({"n": 32, "max_tokens": 100, "ignore_eos": true});
    let send = |wish: &Value| {
        let (address, body) = (world.address, completion(json!("x"), wish.clone()));
        tokio::spawn(async move {
            Client::connect(address).await.unwrap().post("/v1/completions", &body).await
        })
    };
    // The first runs in every slot, the second waits, the third is one too many.
    let mut busy = Vec::new();
    for _ in 0..2 {
        busy.push(send(&wish));
        tokio::time::sleep(std::time::Duration::from_millis(60)).await;
    }
    let probe = completion(json!("x"), json!({"max_tokens": 1}));
    let refused = post(&world, "/v1/completions", &probe).await;
    assert_eq!(refused.status, 429);
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    for task in busy {
        task.abort();
    }
    assert_all_free(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_refuse_no_probe_and_no_answer_that_was_begun() {
    let world = world(Options { step_time: Duration::from_millis(2), ..Options::default() }).await;
    let large = completion(json!("x"), json!({"max_tokens": 600, "n": 12, "ignore_eos": true}));
    let begun = {
        let (address, body) = (world.address, large.clone());
        tokio::spawn(async move {
            Client::connect(address).await.unwrap().post("/v1/completions", &body).await
        })
    };
    while world.app.served().unwrap().engine.state().running == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let unread = world.app.answers.take(u64::MAX).unwrap();
    for path in ["/health", "/ready", "/metrics", "/version"] {
        assert_eq!(get(&world, path).await.status, 200, "{path}");
    }
    assert!(get(&world, "/metrics").await.body.len() > 4 << 10, "more than what is free");
    let texts = chat("x", json!({"max_tokens": 1800}));
    for (path, body) in [("/v1/completions", &large), ("/v1/chat/completions", &texts)] {
        let refused = post(&world, path, body).await;
        assert_eq!(refused.json()["error"]["code"], "answers_full", "{path}");
    }
    assert_eq!(world.app.served().unwrap().engine.state().waiting, 0, "refused before it began");
    let small = completion(json!("x"), json!({"max_tokens": 3}));
    assert_eq!(post(&world, "/v1/completions", &small).await.status, 200);
    let answer = begun.await.unwrap();
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    assert!(answer.body.len() > 4 << 10);
    drop(unread);
    assert_all_free(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_a_whole_answer_a_little_now_and_then_holds_it_for_no_longer_than_its_time() {
    let mut options = Options { send_buffer_bytes: Some(8192), ..Options::default() };
    options.connections.write_time_max = Duration::from_secs(1);
    options.connections.answer_rate_min = 4 << 20;
    let world = world(options).await;
    let body = json!({"tokens": vec![1; 350_000]}).to_string();
    let head =
        format!("POST /detokenize HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(world.address).await.unwrap();
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    // Each token is `\u0001` in the answer: two MiB.
    let reads = async {
        let mut part = [0; 400];
        while stream.read(&mut part).await.is_ok_and(|bytes| bytes > 0) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let time_max = Duration::from_secs(20);
    tokio::time::timeout(time_max, reads).await.expect("2 MiB at 40 kB/s take 50 s");
    drop(world.app.answers.take(u64::MAX).expect("nothing is held any more"));
}

#[tokio::test(flavor = "multi_thread")]
async fn while_loading_probes_are_answered_and_requests_are_told_to_come_back() {
    let options = Options::default();
    let world = loading_world(&options).await;
    world.app.set_progress("weights 40 %".into());
    assert_eq!(get(&world, "/health").await.status, 200);
    assert_eq!(get(&world, "/metrics").await.status, 200);
    let ready = get(&world, "/ready").await;
    assert_eq!(ready.status, 503);
    assert_eq!(ready.json(), json!({"status": "loading", "progress": "weights 40 %"}));
    let refused = post(&world, "/v1/chat/completions", &chat("x", json!({}))).await;
    assert_eq!(refused.status, 503);
    assert!(refused.header("retry-after").is_some());
    world.app.serve(served(&options));
    assert_eq!(get(&world, "/ready").await.json(), json!({"status": "ready"}));
    assert_eq!(
        post(&world, "/v1/chat/completions", &chat("x", json!({"max_tokens": 1}))).await.status,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_hangs_makes_ready_say_no_and_then_health_unless_steps_are_that_long() {
    let pulse_limits = PulseLimits {
        late_after: Duration::from_millis(300),
        hung_after: Duration::from_millis(1000),
        late_steps: 3,
        hung_steps: 3,
        ..PulseLimits::default()
    };
    let step_time = Duration::from_millis(2000);
    let world = world(Options { pulse_limits, step_time, ..Options::default() }).await;
    let one_step = completion(json!("x"), json!({"max_tokens": 1}));
    let watched = async || {
        let mut said = Vec::new();
        let answer = post(&world, "/v1/completions", &one_step);
        let mut answer = std::pin::pin!(answer);
        loop {
            let pause = tokio::time::sleep(Duration::from_millis(20));
            tokio::select! {
                answer = &mut answer => { assert_eq!(answer.status, 200); return said; }
                () = pause => {}
            }
            let ready = get(&world, "/ready").await.json()["status"].clone();
            let health = get(&world, "/health").await.json()["status"].clone();
            if said.last() != Some(&(ready.clone(), health.clone())) {
                said.push((ready, health));
            }
        }
    };
    let said = watched().await;
    for both in [("ready", "ok"), ("stuck", "ok"), ("stuck", "hung")] {
        let both = (json!(both.0), json!(both.1));
        assert!(said.contains(&both), "{both:?} is not in {said:?}");
    }
    assert_eq!(
        watched().await,
        [(json!("ready"), json!("ok"))],
        "it has been seen to take that long"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_guard_the_api_but_not_the_probes() {
    let path = std::env::temp_dir().join(format!("plimsoll-http-keys-{}", std::process::id()));
    std::fs::write(&path, "sesame\n").unwrap();
    let world = world(Options { keys: Some(path.clone()), ..Options::default() }).await;
    for path in ["/health", "/ready", "/metrics", "/version"] {
        assert_eq!(get(&world, path).await.status, 200, "{path}");
    }
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"] {
        let refused = post(&world, path, &json!({})).await;
        assert_eq!(
            (refused.status.as_u16(), refused.header("www-authenticate")),
            (401, Some("Bearer"))
        );
        assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    }
    let mut client = Client::connect(world.address).await.unwrap();
    for (value, status) in [("Bearer sesame", 200), ("Bearer sesam", 401), ("sesame", 401)] {
        let mut request = client.request("GET", "/v1/models", axum::body::Body::empty());
        request.headers_mut().insert("authorization", value.parse().unwrap());
        assert_eq!(client.send(request).await.unwrap().status, status, "{value}");
    }
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn models_versions_and_tokens_are_told() {
    let world = world(Options::default()).await;
    let models = get(&world, "/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "scripted");
    assert_eq!(get(&world, "/v1/models/scripted").await.json(), models["data"][0]);
    assert_eq!(get(&world, "/v1/models/other").await.status, 404);
    assert!(get(&world, "/version").await.json()["version"].is_string());
    let tokens =
        post(&world, "/tokenize", &json!({"prompt": "hé", "return_token_strs": true})).await;
    assert_eq!(tokens.json()["tokens"], json!([0x68, 0xc3, 0xa9]));
    assert_eq!(tokens.json()["token_strs"], json!(["h", "bytes:\\xc3", "bytes:\\xa9"]));
    let text = post(&world, "/detokenize", &json!({"tokens": [0x68, 0xc3, 0xa9, 257]})).await;
    assert_eq!(text.json(), json!({"prompt": "hé<end>"}));
    let chat =
        post(&world, "/tokenize", &json!({"messages": [{"role": "user", "content": "x"}]})).await;
    assert_eq!(chat.json()["count"], 1 + "user: x\nassistant: ".len());
    let refused = post(&world, "/detokenize", &json!({"tokens": [VOCABULARY]})).await;
    assert_eq!(refused.json()["error"]["param"], "tokens[0]");
    check_nothing_is_held(&world).await;
}

async fn check_nothing_is_held(world: &World) {
    assert_all_free(world).await;
}
