//! `bench serve` against the server with the trained model, and against one that plays what a script says: what is
//! measured is what was played, and no failure is lost.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use plimsoll_contract::exit::ExitReport;
use plimsoll_engine::bench::{Arrivals, ServeOptions, ServeReport, run_serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::crowd::bundled;
use crate::world::{MODEL, Options, World, assert_all_free, loading_world};

fn options(address: SocketAddr) -> ServeOptions {
    ServeOptions {
        url: format!("http://{address}"),
        api_key_file: None,
        model: Some(MODEL.into()),
        workload: "seed".into(),
        requests: None,
        arrivals: Arrivals::Closed { concurrency: 8 },
        seed: 1,
        vocabulary: 4096,
        warm_up: 0,
        silence_max: Duration::from_secs(60),
    }
}

/// A bench has a runtime of its own.
async fn run(options: ServeOptions) -> Result<ServeReport, ExitReport> {
    tokio::task::spawn_blocking(move || run_serve(&options)).await.unwrap()
}

async fn trained(options: &Options) -> World {
    let world = loading_world(options).await;
    world.app.serve(bundled());
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trained_model_answers_every_request_of_a_closed_loop_to_the_last_token() {
    let world = trained(&Options::default()).await;
    let asked = ServeOptions { model: None, warm_up: 3, ..options(world.address) };
    let report = run(asked).await.unwrap();
    assert_eq!((report.requests, report.completed, report.failed), (49, 49, 0), "{report:?}");
    assert_eq!(report.model, MODEL, "as the server lists it");
    // The method's 49 prompts and ten tokens for each.
    assert_eq!((report.prompt_tokens, report.output_tokens), (391, 490));
    // A token may end within a character, and then the next brings both.
    assert!((49..=490).contains(&report.events), "{} events", report.events);
    let [first, token, whole] =
        [report.ttft_ms, report.tpot_ms, report.end_to_end_ms].map(|spread| spread.unwrap());
    assert!(0.0 < first.mean && first.p50 <= first.p99 && token.mean > 0.0, "{report:?}");
    assert!((first.mean + 9.0 * token.mean - whole.mean).abs() < 1e-4, "{report:?}");
    assert!((report.output_tok_s - 490.0 / report.duration_s).abs() < 1e-6);
    assert_eq!(report.late_ms, None);
    assert_all_free(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_loop_sends_each_request_at_its_time_and_counts_what_does_not_fit() {
    let world = trained(&Options::default()).await;
    let open = ServeOptions {
        requests: Some(20),
        arrivals: Arrivals::Open { rate: 40.0 },
        ..options(world.address)
    };
    let report = run(open).await.unwrap();
    assert_eq!((report.completed, report.failed), (20, 0), "{report:?}");
    assert!(report.late_ms.is_some());
    assert!(report.duration_s > 0.2, "19 gaps of 25 ms on average: {}", report.duration_s);
    // 8,192 tokens are four times what the model was trained for.
    let long = ServeOptions { workload: "prefill_8192".into(), ..options(world.address) };
    let report = run(long).await.unwrap();
    assert_eq!((report.completed, report.failed), (0, 1));
    let refused = &report.failures["status 400"];
    assert!(refused.first.contains("8192"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_process_fails_where_no_request_succeeds_and_writes_its_report_all_the_same() {
    let dir = std::env::temp_dir().join(format!("plimsoll-bench-serve-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (keys, json) = (dir.join("keys"), dir.join("report.json"));
    std::fs::write(&keys, "the key\nanother\n").unwrap();
    let world = trained(&Options { keys: Some(keys.clone()), ..Options::default() }).await;
    let bench = |key: Option<PathBuf>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll-engine"));
        command.args(["bench", "serve", "--workload=seed", "--requests=3", "--vocabulary=4096"]);
        command.arg(format!("--served-name={MODEL}")).arg("--json").arg(&json);
        command.arg(format!("--url=http://{}", world.address));
        command.args(key.map(|file| format!("--api-key-file={}", file.display())));
        let output = tokio::task::spawn_blocking(move || command.output().unwrap());
        let json = json.clone();
        async move {
            let output = output.await.unwrap();
            let report = std::fs::read_to_string(json).unwrap();
            (output, serde_json::from_str::<serde_json::Value>(&report).unwrap())
        }
    };
    let (output, report) = bench(None).await;
    assert!(!output.status.success(), "{output:?}");
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("none of 3 requests succeeded: status 401"), "{words}");
    assert_eq!((&report["failed"], &report["ttft_ms"]), (&3.into(), &serde_json::Value::Null));
    let (output, report) = bench(Some(keys)).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!((&report["completed"], &report["output_tokens"]), (&3.into(), &30.into()));
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("3 completed, 0 failed") && table.contains("(TTFT)"), "{table}");
    std::fs::remove_dir_all(dir).unwrap();
}

/// What a played server does with a request.
#[derive(Clone, Debug)]
enum Play {
    /// Ten events with text after these pauses (the last one again and again), the finish, the usage and the end.
    Answer(Vec<u64>),
    /// The same, after which the connection is closed.
    AnswerAndClose,
    /// Events, and then no more of the connection.
    Cut {
        events: usize,
    },
    /// Events, and a clean end without `[DONE]`.
    Stop {
        events: usize,
    },
    /// Fewer tokens than were asked for.
    Short,
    Error,
    Full {
        retry_after_seconds: u64,
    },
    Nothing,
}

struct Played {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

/// Plays one after the other, whichever connection a request comes on.
async fn played(plays: Vec<Play>) -> Played {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let (counted, next) = (connections.clone(), Arc::new(AtomicUsize::new(0)));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            let (plays, next) = (plays.clone(), next.clone());
            tokio::spawn(async move { connection(stream, plays, next).await });
        }
    });
    Played { address, connections }
}

async fn connection(mut stream: TcpStream, plays: Vec<Play>, next: Arc<AtomicUsize>) {
    stream.set_nodelay(true).unwrap();
    while take_request(&mut stream).await {
        let play = plays[next.fetch_add(1, Ordering::Relaxed) % plays.len()].clone();
        if !answer(&mut stream, play).await {
            return;
        }
    }
}

/// Reads a head and its body; no when the client has closed.
async fn take_request(stream: &mut TcpStream) -> bool {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return false,
        }
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    stream.read_exact(&mut body).await.is_ok()
}

/// Whether the connection stays open.
async fn answer(stream: &mut TcpStream, play: Play) -> bool {
    let text = r#"{"choices":[{"index":0,"text":"a","finish_reason":null}]}"#;
    let finish = r#"{"choices":[{"index":0,"text":"","finish_reason":"length"}]}"#;
    let usage = |tokens| {
        format!(r#"{{"choices":[],"usage":{{"prompt_tokens":8,"completion_tokens":{tokens}}}}}"#)
    };
    let (pauses, events) = match &play {
        Play::Full { retry_after_seconds } => {
            let body = r#"{"error":{"message":"the queue is full"}}"#;
            let head = format!(
                "HTTP/1.1 429 Too Many Requests\r\nretry-after: {retry_after_seconds}\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            return true;
        }
        Play::Nothing => {
            tokio::time::sleep(Duration::from_secs(30)).await;
            return false;
        }
        Play::Answer(pauses) => (pauses.clone(), 10),
        Play::AnswerAndClose => (vec![0], 10),
        Play::Cut { events } | Play::Stop { events } => (vec![1], *events),
        Play::Short => (vec![0], 4),
        Play::Error => (vec![0], 1),
    };
    let closes = matches!(play, Play::AnswerAndClose);
    let close = if closes { "connection: close\r\n" } else { "" };
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{close}transfer-encoding: chunked\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    for event in 0..events {
        let pause = pauses.get(event).or(pauses.last()).unwrap();
        tokio::time::sleep(Duration::from_millis(*pause)).await;
        chunk(stream, text).await;
    }
    match play {
        Play::Cut { .. } => return false,
        Play::Stop { .. } => {}
        Play::Error => chunk(stream, r#"{"error":{"message":"step 7 failed"}}"#).await,
        _ => {
            chunk(stream, finish).await;
            chunk(stream, &usage(events)).await;
            chunk(stream, "[DONE]").await;
        }
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    !closes
}

async fn chunk(stream: &mut TcpStream, data: &str) {
    let event = format!("data: {data}\n\n");
    let chunk = format!("{:x}\r\n{event}\r\n", event.len());
    // A client that has seen enough may be gone.
    let _ = stream.write_all(chunk.as_bytes()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_first_token_and_a_stall_show_where_they_belong() {
    // One long wait for the first token; then a token every 20 ms, but for one that takes 200.
    let server = played(vec![Play::Answer(vec![300, 20, 20, 20, 20, 200, 20])]).await;
    let one = ServeOptions {
        requests: Some(1),
        arrivals: Arrivals::Closed { concurrency: 1 },
        ..options(server.address)
    };
    let report = run(one).await.unwrap();
    assert_eq!((report.completed, report.output_tokens, report.events), (1, 10, 10));
    let [first, token, gap, whole] =
        [report.ttft_ms, report.tpot_ms, report.itl_ms, report.end_to_end_ms].map(Option::unwrap);
    // A pause is never shorter than played, and a busy machine may stretch it.
    assert!(first.p50 >= 299.0 && first.p50 < 2000.0, "{first:?}");
    assert!(gap.p50 >= 19.0 && gap.p50 < 150.0, "the stall does not touch the median: {gap:?}");
    assert!(gap.p99 >= 180.0, "the stall rules the tail: {gap:?}");
    // Whatever the machine did: nine gaps from the first token to the last.
    assert!((whole.mean - first.mean - 9.0 * token.mean).abs() < 1e-4, "{report:?}");
    assert!(token.mean >= gap.mean - 1e-6, "the finish counts for the last token: {report:?}");
    assert_eq!((first.p50, first.p99), (first.mean, first.mean), "one request");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_fail_is_counted_and_those_that_succeed_are_measured_alone() {
    let ways = vec![
        Play::Answer(vec![0]),
        Play::Cut { events: 3 },
        Play::Cut { events: 0 },
        Play::Stop { events: 2 },
        Play::Short,
        Play::Error,
        Play::Answer(vec![0]),
        Play::Nothing,
    ];
    let server = played(ways).await;
    let each = ServeOptions {
        requests: Some(8),
        arrivals: Arrivals::Closed { concurrency: 1 },
        silence_max: Duration::from_millis(1500),
        ..options(server.address)
    };
    let report = run(each).await.unwrap();
    let counts: Vec<(&str, usize)> =
        report.failures.iter().map(|(kind, failures)| (kind.as_str(), failures.requests)).collect();
    let expected = [("cut stream", 3), ("error event", 1), ("other length", 1), ("silence", 1)];
    assert_eq!(counts, expected, "{report:?}");
    assert_eq!((report.completed, report.failed, report.output_tokens), (2, 6, 20));
    assert!(report.failures["cut stream"].first.contains("3 events"), "{report:?}");
    assert!(report.failures["error event"].first.contains("step 7 failed"), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_is_counted_and_left_alone_for_as_long_as_it_asks() {
    let server = played(vec![Play::Full { retry_after_seconds: 1 }, Play::Answer(vec![0])]).await;
    let two = ServeOptions {
        requests: Some(2),
        arrivals: Arrivals::Closed { concurrency: 1 },
        ..options(server.address)
    };
    let report = run(two.clone()).await.unwrap();
    assert_eq!((report.completed, report.failures["status 429"].requests), (1, 1));
    assert_eq!(report.failures["status 429"].first, "status 429: the queue is full");
    assert!(report.duration_s >= 1.0, "{}", report.duration_s);
    assert_eq!(server.connections.load(Ordering::Relaxed), 1, "a refusal costs no connection");
    // Who comes at times of its own does not wait.
    let server = played(vec![Play::Full { retry_after_seconds: 9 }]).await;
    let open = ServeOptions { arrivals: Arrivals::Open { rate: 100.0 }, ..two };
    let open = ServeOptions { url: format!("http://{}", server.address), ..open };
    let report = run(open).await.unwrap();
    assert_eq!((report.completed, report.failed), (0, 2));
    assert!(report.duration_s < 5.0, "{}", report.duration_s);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_serves_one_request_after_the_other_and_its_end_between_them_costs_none() {
    let closed = |address, concurrency| ServeOptions {
        requests: Some(12),
        arrivals: Arrivals::Closed { concurrency },
        ..options(address)
    };
    let server = played(vec![Play::Answer(vec![5])]).await;
    let report = run(closed(server.address, 3)).await.unwrap();
    assert_eq!((report.completed, report.failed), (12, 0));
    let connections = server.connections.load(Ordering::Relaxed);
    assert_eq!(connections, 3, "as many as requests in flight");
    let server = played(vec![Play::AnswerAndClose]).await;
    let report = run(closed(server.address, 2)).await.unwrap();
    assert_eq!((report.completed, report.failed), (12, 0), "{report:?}");
    assert_eq!(server.connections.load(Ordering::Relaxed), 12);
}
