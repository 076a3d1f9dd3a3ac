//! The promise of a drain: whoever plays by HTTP's rules loses nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::process::{Process, bundled};
use crate::world::{Client, MODEL, Options, completion, get, world};

/// Longer than any test.
const AN_HOUR: Duration = Duration::from_secs(3600);

fn slow_steps() -> Options {
    Options { step_time: Duration::from_millis(2), pages: 512, ..Options::default() }
}

const CLIENTS: usize = 16;
/// Every client of the pool asks each replica many times a second.
const GRACE: Duration = Duration::from_secs(3);

/// How a client came to leave the replica that drained.
#[derive(Debug, PartialEq)]
enum Farewell {
    /// By an answer with `Connection: close`.
    Told,
    /// The connection ended while nothing was asked over it.
    Closed,
}

/// A client's pool over two replicas: a connection to each, in turn. One that said `close`, or that ended while it
/// rested, is left for the other replica for good. Returns how the first was left.
async fn pooled_client(
    replicas: [SocketAddr; 2],
    stop: Arc<AtomicBool>,
    answered: Arc<[AtomicUsize; 2]>,
    number: usize,
) -> Option<Farewell> {
    let mut first = Some(Client::connect(replicas[0]).await.unwrap());
    let mut second = Client::connect(replicas[1]).await.unwrap();
    let mut farewell = None;
    let mut turn = number;
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        if first.as_mut().is_some_and(Client::is_closed) {
            (first, farewell) = (None, Some(Farewell::Closed));
        }
        let (replica, client) = match &mut first {
            Some(first) if turn.is_multiple_of(2) => (0, first),
            _ => (1, &mut second),
        };
        let wish = json!({"max_tokens": 5 + turn % 20, "stream": turn.is_multiple_of(3), "ignore_eos": true});
        let body = completion(json!("draining"), wish);
        let answer = client.try_post("/v1/completions", &body).await.expect("no request is lost");
        assert_eq!(answer.status, 200, "{:?}", answer.body);
        answered[replica].fetch_add(1, Ordering::Relaxed);
        if answer.header("connection") == Some("close") {
            assert_eq!(replica, 0, "the other replica stays");
            (first, farewell) = (None, Some(Farewell::Told));
        }
    }
    farewell
}

/// Two processes, and the signal that Kubernetes sends.
#[tokio::test(flavor = "multi_thread")]
async fn pooled_clients_of_two_replicas_lose_no_request_when_one_is_terminated() {
    let grace = format!("--drain-grace={}s", GRACE.as_secs());
    let name = format!("--served-name={MODEL}");
    let serve = || Process::serve(&bundled(), &["--kv-tokens=20480", &grace, &name], None);
    let (mut first, second) = (serve(), serve());
    let replicas = [&first, &second].map(|process| process.address.parse().unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let answered = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| tokio::spawn(pooled_client(replicas, stop.clone(), answered.clone(), number)))
        .collect();
    let count = |replica: usize| answered[replica].load(Ordering::Relaxed);
    until(|| count(0) >= 2 * CLIENTS).await;
    first.terminate();
    let ended = tokio::task::spawn_blocking(move || first.wait()).await.unwrap();
    assert!(ended.success(), "{ended}");
    assert!(TcpStream::connect(replicas[0]).await.is_err(), "the listener is closed");
    let before = count(1);
    until(|| count(1) >= before + 2 * CLIENTS).await;
    stop.store(true, Ordering::Relaxed);
    let mut told = 0;
    for client in clients {
        let farewell = client.await.unwrap().expect("whoever was connected was told or closed");
        told += usize::from(farewell == Farewell::Told);
    }
    println!("{told} of {CLIENTS} clients were told to close, the others' connections rested");
    assert!(told > 0, "answers say close");
}

/// Returns once it is so; a test that waits in vain is ended.
async fn until(so: impl Fn() -> bool) {
    let waiting = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), waiting).await.expect("it comes about");
}

/// One thread, so that the server reads nothing between the requests' last byte and the end of the grace.
#[tokio::test]
async fn what_has_reached_a_socket_by_the_end_of_the_grace_is_answered() {
    let world = world(slow_steps()).await;
    let mut sockets = Vec::new();
    for number in 0..16 {
        let mut socket = TcpStream::connect(world.address).await.unwrap();
        // One half has been here before, the other has just connected.
        if number % 2 == 0 {
            socket.write_all(b"GET /ready HTTP/1.1\r\nhost: engine\r\n\r\n").await.unwrap();
            let mut answer = [0; 512];
            let read = socket.read(&mut answer).await.unwrap();
            assert!(answer[..read].starts_with(b"HTTP/1.1 200"));
        }
        sockets.push(socket);
    }
    let body = completion(json!("late"), json!({"max_tokens": 5, "ignore_eos": true})).to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json";
    let request = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    for socket in &mut sockets {
        socket.write_all(request.as_bytes()).await.unwrap();
    }
    world.server.drain(Duration::ZERO, Duration::from_secs(20)).await;
    for (number, mut socket) in sockets.into_iter().enumerate() {
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "socket {number}: {answer:?}");
        assert!(answer.contains("connection: close"), "socket {number}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_draining_ready_says_no_and_answers_close_their_connection() {
    let world = world(slow_steps()).await;
    let mut pooled = Client::connect(world.address).await.unwrap();
    assert_eq!(pooled.get("/ready").await.status, 200);
    let (app, address) = (world.app.clone(), world.address);
    // The grace lasts for as long as the test looks.
    let drain = tokio::spawn(world.server.drain(AN_HOUR, AN_HOUR));
    until(|| app.draining()).await;
    let ready = Client::connect(address).await.unwrap().get("/ready").await;
    assert_eq!((ready.status.as_u16(), ready.json()), (503, json!({"status": "draining"})));
    let late =
        pooled.post("/v1/completions", &completion(json!("x"), json!({"max_tokens": 3}))).await;
    assert_eq!((late.status.as_u16(), late.header("connection")), (200, Some("close")));
    drain.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_half_here_when_no_more_is_accepted_does_not_hold_the_drain() {
    let options = Options {
        body_time_max: AN_HOUR,
        late_body_time_max: Duration::from_millis(200),
        ..slow_steps()
    };
    let world = world(options).await;
    let mut slow = TcpStream::connect(world.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: engine\r\ncontent-length: 1000\r\n\r\n{";
    slow.write_all(head.as_bytes()).await.unwrap();
    let drain = world.server.drain(Duration::ZERO, AN_HOUR);
    tokio::time::timeout(Duration::from_secs(60), drain).await.expect("nothing holds it");
    let mut answer = String::new();
    slow.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer:?}");
    assert!(answer.contains("shutting_down") && answer.contains("retry-after: 1"), "{answer:?}");
    assert!(answer.contains("connection: close"), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_stream_finishes_after_the_grace() {
    let world = world(slow_steps()).await;
    let (app, address) = (world.app.clone(), world.address);
    let body =
        completion(json!("x"), json!({"max_tokens": 400, "ignore_eos": true, "stream": true}));
    let stream = tokio::spawn(async move {
        Client::connect(address).await.unwrap().post("/v1/completions", &body).await
    });
    until(|| app.served().unwrap().engine.state().running > 0).await;
    let began = Instant::now();
    world.server.drain(Duration::from_millis(50), AN_HOUR).await;
    assert!(began.elapsed() > Duration::from_millis(300), "the drain waited for the stream");
    let events = stream.await.unwrap().events();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_outlasts_the_timeout_does_not_hold_the_drain() {
    let world = world(slow_steps()).await;
    let address = world.address;
    let body =
        completion(json!("x"), json!({"max_tokens": 1900, "ignore_eos": true, "stream": true}));
    let stream = tokio::spawn(async move {
        Client::connect(address).await.unwrap().try_post("/v1/completions", &body).await.map(drop)
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(get(&world, "/health").await.status, 200);
    let began = Instant::now();
    world.server.drain(Duration::ZERO, Duration::from_millis(300)).await;
    assert!(began.elapsed() < Duration::from_secs(2));
    stream.abort();
}
