//! Many clients, half of them rude.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use plimsoll_contract::abilities::Dtype;
use plimsoll_engine::admission::ModelLimits;
use plimsoll_engine::backend::cpu::{CpuBackend, CpuOptions};
use plimsoll_engine::http::Served;
use plimsoll_engine::metrics::Metrics;
use plimsoll_engine::model::{Checkpoint, Shard};
use plimsoll_engine::serve::allow_many_connections;
use plimsoll_engine::step::{self, Limits};
use plimsoll_engine::tokenizer::Tokenizer;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Barrier;

use crate::dice::{Dice, fuzz_seed};
use crate::world::{MODEL, Options, assert_all_free, completion, get, loading_world, world};

const CLIENTS: usize = 2000;
const PAGES: u32 = 512;

/// What became of a client.
#[derive(Debug, PartialEq)]
enum End {
    Finished,
    Left,
}

/// Where a client that leaves does so.
#[derive(Debug)]
enum Cut {
    Request { byte: usize },
    AfterRequest { pause: Duration },
    Answer { byte: usize },
}

/// The trained model on the backend that serves it.
pub fn bundled() -> Served {
    let named = std::env::var_os("PLIMSOLL_TESTS").map(PathBuf::from);
    let tests = named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests"));
    let checkpoint = Checkpoint::open(&tests.join("model")).unwrap();
    let kv_pages = vec![PAGES];
    let options = CpuOptions {
        dtype: Dtype::F32,
        kv_pages: kv_pages.clone(),
        running_max: 32,
        shard: Shard::WHOLE,
    };
    let backend = CpuBackend::load(&checkpoint, options, &mut |_| ()).unwrap();
    let metrics = Metrics::new(MODEL, 2048);
    let limits = Limits {
        running_max: 32,
        waiting_max: CLIENTS,
        step_tokens_max: 512,
        context_tokens: 2048,
        kv_pages,
        steps_in_flight: 1,
        prefix_reuse: true,
    };
    Served {
        name: MODEL.into(),
        tokenizer: Arc::new(Tokenizer::open(&checkpoint.dir).unwrap()),
        template: None,
        limits: ModelLimits {
            context_tokens: 2048,
            kv_tokens: u64::from(PAGES) * 64,
            vocabulary: checkpoint.facts().vocabulary,
            eos: Arc::new(checkpoint.eos_token_ids.iter().copied().collect()),
        },
        engine: step::start(Box::new(backend), limits, metrics.clone()),
        metrics,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_connections_open_together_half_of_them_cut_leave_no_page_in_use() {
    allow_many_connections();
    let world = loading_world(&Options::default()).await;
    world.app.serve(bundled());
    let together = Arc::new(Barrier::new(CLIENTS));
    let seed = fuzz_seed();
    println!("seed {seed}");
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..CLIENTS {
        let stream = TcpStream::connect(world.address).await.unwrap();
        let dice = Dice(seed.wrapping_add(client as u64));
        clients.spawn(run(stream, client, dice, together.clone()));
    }
    let (mut finished, mut left) = (0, 0);
    while let Some(end) = clients.join_next().await {
        match end.unwrap() {
            End::Finished => finished += 1,
            End::Left => left += 1,
        }
    }
    assert_eq!((finished, left), (CLIENTS / 2, CLIENTS / 2));
    assert_all_free(&world).await;
}

/// Even clients read their answer to the end. Odd ones leave where the dice say.
async fn run(mut stream: TcpStream, client: usize, mut dice: Dice, together: Arc<Barrier>) -> End {
    // An answer shows that the server holds this connection; nobody goes on until it holds all of them.
    stream.write_all(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"}") {
        assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "closed before all were there");
    }
    together.wait().await;

    let streams = dice.below(3) > 0;
    let wish = json!({
        "max_tokens": 1 + dice.below(12), "n": 1 + dice.below(2), "stream": streams, "seed": client, "ignore_eos": true,
    });
    let prompt = "Where is the book? ".repeat(1 + dice.below(30));
    let body = completion(json!(format!("{} {prompt}", dice.below(50))), wish).to_string();
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
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(!streams || answer.contains("data: [DONE]"), "{answer}");
        return End::Finished;
    }
    let cut = match dice.below(3) {
        0 => Cut::Request { byte: dice.below(request.len()) },
        1 => Cut::AfterRequest { pause: Duration::from_millis(dice.below(2000) as u64) },
        _ => Cut::Answer { byte: 1 + dice.below(1200) },
    };
    match cut {
        Cut::Request { byte } => drop(stream.write_all(&request[..byte]).await),
        Cut::AfterRequest { pause } => {
            stream.write_all(request).await.unwrap();
            tokio::time::sleep(pause).await;
        }
        Cut::Answer { byte } => {
            stream.write_all(request).await.unwrap();
            // Shorter answers end before.
            let _ = stream.read_exact(&mut vec![0; byte]).await;
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
