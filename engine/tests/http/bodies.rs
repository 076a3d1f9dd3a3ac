//! Bodies that are slow, large, broken or meant to harm: each ends in an answer or a closed connection, never in a panic.

use std::time::{Duration, Instant};

use plimsoll_engine::http::{BODY_BYTES_MAX, Chance, chat, completions, tokens};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::dice::{Dice, fuzz_seed, fuzz_time};
use crate::world::{Client, Options, assert_all_free, completion, get, post, served, world};

fn raw_request(body: &Value) -> Vec<u8> {
    let body = body.to_string();
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_may_be_cut_at_every_byte_and_the_answer_is_the_same() {
    let world = world(Options::default()).await;
    let body = completion(
        json!("grüße"),
        json!({"seed": 1, "max_tokens": 3, "stream": true, "stop": "zzz"}),
    );
    let request = raw_request(&body);
    let mut texts = std::collections::BTreeSet::new();
    for cut in (1..request.len()).chain([0]) {
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(&request[..cut]).await.unwrap();
        tokio::task::yield_now().await;
        stream.write_all(&request[cut..]).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("data: [DONE]"));
        texts.insert(
            answer
                .lines()
                .filter_map(|line| line.strip_prefix("data: {"))
                .map(|rest| serde_json::from_str::<Value>(&format!("{{{rest}")).unwrap())
                .map(|event| event["choices"][0]["text"].as_str().unwrap_or_default().to_owned())
                .collect::<String>(),
        );
    }
    assert_eq!(texts.len(), 1, "{texts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_above_the_limit_is_refused_with_413() {
    let world = world(Options::default()).await;
    let body = completion(json!("x".repeat(BODY_BYTES_MAX)), json!({}));
    let mut client = Client::connect(world.address).await.unwrap();
    let answer = client.post("/v1/completions", &body).await;
    assert_eq!(answer.status, 413);
    assert_eq!(answer.json()["error"]["code"], "body_too_large");
    let below = completion(json!("x".repeat(BODY_BYTES_MAX / 2)), json!({}));
    let began = Instant::now();
    let answer = post(&world, "/v1/completions", &below).await;
    assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
    let answer = post(&world, "/tokenize", &json!({"prompt": "x".repeat(65_537)})).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["param"]), (400, &json!("prompt")));
    let counted = post(&world, "/tokenize", &json!({"prompt": "x".repeat(65_536)})).await;
    assert!(counted.json()["count"].as_u64().unwrap() > 2048, "more than the context is counted");
    assert!(began.elapsed() < Duration::from_secs(4), "refused without tokenizing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_trickles_is_refused_with_408() {
    let options = Options { body_time_max: Duration::from_millis(300), ..Options::default() };
    let world = world(options).await;
    let mut slow = TcpStream::connect(world.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n";
    slow.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 12];
    let trickle = async {
        loop {
            slow.write_all(b" ").await.unwrap();
            tokio::time::sleep(Duration::from_millis(40)).await;
            if slow.try_read(&mut answer).is_ok() {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), trickle).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 408");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_never_ends_is_cut_but_an_idle_connection_is_not() {
    let mut options = Options::default();
    options.connections.head_time_max = Duration::from_millis(300);
    options.connections.idle_time_max = Duration::from_secs(60);
    let world = world(options).await;
    let mut pooled = Client::connect(world.address).await.unwrap();
    assert_eq!(pooled.get("/health").await.status, 200);
    let mut slow = TcpStream::connect(world.address).await.unwrap();
    let began = Instant::now();
    slow.write_all(b"GET /health HTTP/1.1\r\nhost: ").await.unwrap();
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest).await;
    assert!(began.elapsed() >= Duration::from_millis(250), "cut too early");
    assert!(began.elapsed() < Duration::from_secs(5), "not cut");
    assert_eq!(
        pooled.get("/health").await.status,
        200,
        "the idle connection outlived the head's time"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_in_the_end() {
    let mut options = Options::default();
    options.connections.idle_time_max = Duration::from_millis(200);
    let world = world(options).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let mut rest = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert!(rest.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn above_the_connection_limit_probes_are_answered_and_requests_sent_away() {
    let mut options = Options::default();
    options.connections.connections_max = 2;
    let world = world(options).await;
    let mut first = Client::connect(world.address).await.unwrap();
    let mut second = Client::connect(world.address).await.unwrap();
    assert_eq!(first.get("/health").await.status, 200);
    assert_eq!(second.get("/health").await.status, 200);
    assert_eq!(get(&world, "/health").await.status, 200);
    let refused = post(&world, "/v1/completions", &completion(json!("x"), json!({}))).await;
    assert_eq!(refused.status, 503);
    assert_eq!(refused.header("connection"), Some("close"));
    assert_eq!(refused.json()["error"]["code"], "too_many_connections");
    assert_eq!(first.post("/v1/completions", &completion(json!("x"), json!({}))).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_sockets_on_every_seat_and_spare_one_keep_neither_probes_nor_requests_out() {
    let mut options = Options::default();
    options.connections.connections_max = 8;
    options.connections.idle_time_min = Duration::from_millis(200);
    let world = world(options).await;
    // Twice as many as there are seats and spare ones.
    let mut idle = Vec::new();
    for _ in 0..2 * (8 + 64) {
        idle.push(TcpStream::connect(world.address).await.unwrap());
    }
    assert_eq!(get(&world, "/health").await.status, 200, "while all have come just now");
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..20 {
        assert_eq!(get(&world, "/health").await.status, 200);
        let answer = post(&world, "/v1/completions", &completion(json!("x"), json!({}))).await;
        assert_eq!(answer.status, 200, "the longest idle gave way");
    }
    // Who asks nothing on a spare seat leaves it soon, whether or not it is wanted.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let open = idle.iter().filter(|socket| socket.try_read(&mut [0]).is_err()).count();
    assert!(open <= 8, "{open} are still open");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_with_a_request_never_gives_way() {
    let mut options = Options { step_time: Duration::from_millis(30), ..Options::default() };
    options.connections.connections_max = 2;
    options.connections.idle_time_min = Duration::ZERO;
    let world = world(options).await;
    let address = world.address;
    let busy = [1, 2].map(|seed| {
        tokio::spawn(async move {
            let body =
                completion(json!("x"), json!({"max_tokens": 20, "ignore_eos": true, "seed": seed}));
            Client::connect(address).await.unwrap().post("/v1/completions", &body).await.status
        })
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    for _ in 0..5 {
        assert_eq!(get(&world, "/health").await.status, 200);
        let refused = post(&world, "/v1/completions", &completion(json!("x"), json!({}))).await;
        assert_eq!(refused.status, 503);
    }
    for busy in busy {
        assert_eq!(busy.await.unwrap(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fuzz_bodies_are_prepared_or_refused_by_a_named_error() {
    let served = served(&Options::default());
    let mut dice = Dice(fuzz_seed());
    let chance = Chance { seed: 5, now_unix_seconds: 1_700_000_000 };
    let (mut taken, mut refused) = (0u64, 0u64);
    let end = Instant::now() + fuzz_time();
    while Instant::now() < end {
        let body = dice.body();
        let outcomes = [
            chat::prepare(&body, &served, &chance).map(drop),
            completions::prepare(&body, &served, &chance).map(drop),
            tokens::tokens_of(&body, &served, 0).map(drop),
            tokens::text_of(&body, &served).map(drop),
        ];
        for outcome in outcomes {
            match outcome {
                Ok(()) => taken += 1,
                Err(error) => {
                    refused += 1;
                    assert!(error.status.is_client_error() && !error.message.is_empty());
                }
            }
        }
    }
    println!("{taken} bodies taken, {refused} refused");
    assert!(taken > 100 && refused > 100, "the bodies are too wrong or too right to test anything");
}

#[tokio::test(flavor = "multi_thread")]
async fn fuzz_bodies_that_are_run_leave_nothing_behind() {
    let world = world(Options { pages: 64, ..Options::default() }).await;
    let mut dice = Dice(99);
    let mut client = Client::connect(world.address).await.unwrap();
    let mut answered = std::collections::BTreeMap::<u16, usize>::new();
    for _ in 0..300 {
        let path = *dice.of(&["/v1/completions", "/v1/chat/completions"]);
        let request = client.request("POST", path, dice.body().into());
        let answer = client.send(request).await.unwrap();
        *answered.entry(answer.status.as_u16()).or_default() += 1;
    }
    assert!(answered.keys().all(|status| [200, 400, 404].contains(status)), "{answered:?}");
    assert!(answered[&200] > 20, "{answered:?}");
    assert_all_free(&world).await;
}
