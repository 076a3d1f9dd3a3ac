//! Many clients, half of them rude.

use std::time::Duration;

use plimsoll_engine::serve::allow_many_connections;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::world::{Options, assert_all_free, completion, get, world};

const CLIENTS: usize = 2000;

/// What became of a client.
#[derive(Debug, PartialEq)]
enum End {
    Finished,
    Refused,
    Left,
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_connections_half_of_them_cut_leave_no_page_in_use() {
    allow_many_connections();
    let options = Options {
        pages: 512,
        waiting_max: CLIENTS,
        step_time: Duration::from_micros(200),
        ..Options::default()
    };
    let world = world(options).await;
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..CLIENTS {
        let stream = TcpStream::connect(world.address).await.unwrap();
        clients.spawn(run(stream, client));
    }
    let (mut finished, mut refused, mut left) = (0, 0, 0);
    while let Some(end) = clients.join_next().await {
        match end.unwrap() {
            End::Finished => finished += 1,
            End::Refused => refused += 1,
            End::Left => left += 1,
        }
    }
    assert_eq!((finished, refused, left), (CLIENTS / 2, 0, CLIENTS / 2));
    assert_all_free(&world).await;
}

/// Even clients read their answer to the end. Odd ones leave: in the middle of the request, at once after it, or after
/// some bytes of the answer, as their number says.
async fn run(mut stream: TcpStream, client: usize) -> End {
    let streams = !client.is_multiple_of(3);
    let wish = json!({"max_tokens": 1 + client % 40, "n": 1 + client % 3, "stream": streams, "seed": client});
    let body = completion(json!(format!("client {}", client % 50).repeat(1 + client % 9)), wish)
        .to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let request = request.as_bytes();
    if client.is_multiple_of(2) {
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(!streams || answer.contains("data: [DONE]") || !answer.starts_with("HTTP/1.1 200"));
        return if answer.starts_with("HTTP/1.1 200") { End::Finished } else { End::Refused };
    }
    match client / 2 % 4 {
        0 => drop(stream.write_all(&request[..request.len() * (client % 10) / 10]).await),
        1 => drop(stream.write_all(request).await),
        2 => {
            let _ = stream.write_all(request).await;
            tokio::time::sleep(Duration::from_millis((client % 400) as u64)).await;
        }
        _ => {
            let _ = stream.write_all(request).await;
            let mut some = vec![0; 100 + client % 900];
            let _ = stream.read_exact(&mut some).await;
        }
    }
    End::Left
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_loses_its_request_after_a_while() {
    // Some twelve megabytes would be written over four seconds.
    let mut options =
        Options { pages: 1200, step_time: Duration::from_millis(2), ..Options::default() };
    options.connections.write_time_max = Duration::from_millis(300);
    let world = world(options).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(world.address).await.unwrap();
    let wish = json!({"max_tokens": 2000, "n": 32, "stream": true, "ignore_eos": true});
    let body = completion(json!("long"), wish).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    stream.read_exact(&mut [0; 1000]).await.unwrap();
    assert!(world.app.served().unwrap().engine.state().running > 0);
    assert_all_free(&world).await;
    let metrics = String::from_utf8(get(&world, "/metrics").await.body.to_vec()).unwrap();
    let aborted = |line: &&str| {
        line.starts_with("plimsoll_requests_finished_total{")
            && line.contains(r#"finished_reason="abort""#)
    };
    let aborted = metrics.lines().find(aborted).unwrap();
    assert!(aborted.ends_with(" 32"), "every choice was cut: {aborted}");
}
