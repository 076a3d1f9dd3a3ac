//! The promise of a drain: whoever plays by HTTP's rules loses nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::{Client, Options, completion, get, world};

fn slow_steps() -> Options {
    Options { step_time: Duration::from_millis(2), pages: 512, ..Options::default() }
}

/// A client's pool over two replicas: it keeps a connection per replica, prefers whichever has its turn, drops a
/// connection that said `close`, and goes to the other replica when one takes no connections.
async fn pooled_client(
    replicas: [SocketAddr; 2],
    stop: Arc<AtomicBool>,
    answered: Arc<[AtomicUsize; 2]>,
    number: usize,
) {
    let mut pool: [Option<Client>; 2] = [None, None];
    let mut turn = number;
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        let mut replica = turn % 2;
        if pool[replica].is_none() {
            pool[replica] = Client::connect(replicas[replica]).await.ok();
        }
        if pool[replica].is_none() {
            replica = 1 - replica;
            if pool[replica].is_none() {
                pool[replica] =
                    Some(Client::connect(replicas[replica]).await.expect("one replica lives"));
            }
        }
        let client = pool[replica].as_mut().expect("connected just now");
        let wish = json!({"max_tokens": 5 + turn % 20, "stream": turn.is_multiple_of(3), "ignore_eos": true});
        let body = completion(json!("draining"), wish);
        let answer = client.try_post("/v1/completions", &body).await.expect("no request is lost");
        assert_eq!(answer.status, 200, "{:?}", answer.body);
        answered[replica].fetch_add(1, Ordering::Relaxed);
        if answer.header("connection") == Some("close") {
            pool[replica] = None;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pooled_clients_of_two_replicas_lose_no_request_when_one_drains() {
    let (first, second) = (world(slow_steps()).await, world(slow_steps()).await);
    let replicas = [first.address, second.address];
    let stop = Arc::new(AtomicBool::new(false));
    let answered = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let clients: Vec<_> = (0..16)
        .map(|number| tokio::spawn(pooled_client(replicas, stop.clone(), answered.clone(), number)))
        .collect();
    tokio::time::sleep(Duration::from_millis(600)).await;
    let before = answered[0].load(Ordering::Relaxed);
    assert!(before > 0);
    first.server.drain(Duration::from_millis(800), Duration::from_secs(20)).await;
    assert!(answered[0].load(Ordering::Relaxed) > before, "the grace serves what still arrives");
    assert!(TcpStream::connect(replicas[0]).await.is_err(), "the listener is closed");
    let other = answered[1].load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(600)).await;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert!(answered[1].load(Ordering::Relaxed) > other, "the other replica goes on");
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
    let drain =
        tokio::spawn(world.server.drain(Duration::from_millis(500), Duration::from_secs(20)));
    while !app.draining() {
        tokio::task::yield_now().await;
    }
    let ready = Client::connect(address).await.unwrap().get("/ready").await;
    assert_eq!((ready.status.as_u16(), ready.json()), (503, json!({"status": "draining"})));
    let late =
        pooled.post("/v1/completions", &completion(json!("x"), json!({"max_tokens": 3}))).await;
    assert_eq!((late.status.as_u16(), late.header("connection")), (200, Some("close")));
    drain.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_stream_finishes_after_the_grace() {
    let world = world(slow_steps()).await;
    let address = world.address;
    let body =
        completion(json!("x"), json!({"max_tokens": 400, "ignore_eos": true, "stream": true}));
    let stream = tokio::spawn(async move {
        Client::connect(address).await.unwrap().post("/v1/completions", &body).await
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let began = Instant::now();
    world.server.drain(Duration::from_millis(50), Duration::from_secs(20)).await;
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
