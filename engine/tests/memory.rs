//! What a served process really holds in memory, beside what the plan says and what bodies may take.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

mod process;

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use plimsoll_contract::abilities::Dtype::F32;
use plimsoll_contract::abilities::{Ability, Backend};
use plimsoll_contract::exit::{ExitReason, ExitReport};
use plimsoll_contract::memory::{self, BODIES_BYTES_MAX, StepLimits};
use plimsoll_engine::model::Checkpoint;
use plimsoll_engine::serve::allow_many_connections;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream as TokioStream};
use tokio::task::JoinSet;

use crate::process::{Group, Process, bundled};

const MIB: u64 = 1 << 20;

/// The first line of an answer.
fn status(socket: &mut TcpStream) -> String {
    let mut line = String::new();
    let _ = BufReader::new(socket).read_line(&mut line);
    line
}

#[test]
fn a_hundred_unfinished_bodies_take_their_budget_and_give_it_back() {
    const BODY: usize = 8 << 20;
    let process = Process::serve(&bundled(), &["--kv-tokens=640"], None);
    let before = process.memory("VmRSS");
    let address = &process.address;
    let mut sockets: Vec<TcpStream> = std::thread::scope(|scope| {
        let senders: Vec<_> = (0..100)
            .map(|_| {
                scope.spawn(move || {
                    let mut socket = TcpStream::connect(address).unwrap();
                    socket.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
                    let head = format!(
                        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {BODY}\r\n\r\n"
                    );
                    socket.write_all(head.as_bytes()).unwrap();
                    // Those that are refused are cut in the middle.
                    let _ = socket.write_all(&vec![b' '; BODY - 1]);
                    socket
                })
            })
            .collect();
        senders.into_iter().map(|sender| sender.join().unwrap()).collect()
    });
    let during = process.memory("VmHWM");
    let mut small = TcpStream::connect(address).unwrap();
    let body = r#"{"model": "model", "prompt": "x", "max_tokens": 1}"#;
    write!(
        small,
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    assert!(
        status(&mut small).starts_with("HTTP/1.1 200"),
        "a small body needs none of the budget"
    );
    // The budget, the sockets' buffers of 64 KiB, and slack of the allocator.
    assert!(during < before + 32 * MIB + 100 * MIB / 16 + 24 * MIB, "{before} → {during}");
    sockets.clear();
    let deadline = Instant::now() + Duration::from_secs(10);
    while process.memory("VmRSS") > before + 20 * MIB {
        assert!(Instant::now() < deadline, "{before} → {}", process.memory("VmRSS"));
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_body_of_many_short_values_is_parsed_within_its_share_or_refused() {
    let process = Process::serve(&bundled(), &["--kv-tokens=640"], None);
    let before = process.memory("VmRSS");
    for (values, expected) in [(300_000, "HTTP/1.1 400"), (4_000_000, "HTTP/1.1 413")] {
        let body = format!(r#"{{"model": "model", "prompt": [{}1]}}"#, "1,".repeat(values));
        let mut socket = TcpStream::connect(&process.address).unwrap();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all((head + &body).as_bytes()).unwrap();
        let told = status(&mut socket);
        assert!(told.starts_with(expected), "{told}");
    }
    let most = process.memory("VmHWM");
    assert!(most < before + BODIES_BYTES_MAX + 16 * MIB, "{before} → {most}");
}

/// A checkpoint of one tiny layer whose tokenizer is as large as those of large models.
fn with_tokenizer(tokens: usize, merges: usize, pairs: bool, context_tokens: u32) -> PathBuf {
    let name = format!("plimsoll-tokenizer-{}-{tokens}-{merges}-{pairs}", std::process::id());
    let dir = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let tokenizer = tokenizer(tokens, merges, pairs);
    std::fs::write(dir.join("tokenizer.json"), serde_json::to_vec_pretty(&tokenizer).unwrap())
        .unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "vocab_size": tokens, "max_position_embeddings": context_tokens, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "hidden_act": "silu",
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let tensors = [
        ("model.embed_tokens.weight".to_owned(), vec![tokens, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        (layer("input_layernorm"), vec![HIDDEN]),
        (layer("post_attention_layernorm"), vec![HIDDEN]),
        (layer("self_attn.q_proj"), vec![64, HIDDEN]),
        (layer("self_attn.k_proj"), vec![32, HIDDEN]),
        (layer("self_attn.v_proj"), vec![32, HIDDEN]),
        (layer("self_attn.o_proj"), vec![HIDDEN, 64]),
        (layer("mlp.gate_proj"), vec![128, HIDDEN]),
        (layer("mlp.up_proj"), vec![128, HIDDEN]),
        (layer("mlp.down_proj"), vec![HIDDEN, 128]),
    ];
    let zeros = vec![0u8; 2 * tokens * HIDDEN];
    let views = tensors.map(|(name, shape)| {
        let bytes = 2 * shape.iter().product::<usize>();
        (name, TensorView::new(Dtype::BF16, shape, &zeros[..bytes]).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    dir
}

const HIDDEN: usize = 64;

/// Every byte, then every word of four letters in order of length; each word can be made by a merge at each of its cuts.
fn tokenizer(tokens: usize, merges: usize, pairs: bool) -> Value {
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut moved = 0x100..;
    let bytes = (0..256).map(|b| if printable(b) { b } else { moved.next().unwrap() });
    let bytes = bytes.map(|code| char::from_u32(code).unwrap().to_string());
    let words = (2u32..).flat_map(|length| {
        (0..4usize.pow(length)).map(move |number| {
            (0..length).map(|at| char::from(b"abcd"[number >> (2 * at) & 3])).collect::<String>()
        })
    });
    let vocabulary: Vec<String> = bytes.chain(words).take(tokens).collect();
    let cuts = (1..).flat_map(|cut| {
        let long = vocabulary[256..].iter().filter(move |word| word.len() > cut);
        long.map(move |word| word.split_at(cut))
    });
    let merge =
        |(left, right)| if pairs { json!([left, right]) } else { json!(format!("{left} {right}")) };
    let merges: Vec<Value> = cuts.take(merges).map(merge).collect();
    let vocabulary: serde_json::Map<String, Value> =
        vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    })
}

/// What the kernel charges a group for is measured as the process's largest resident set without mapped files, which it
/// may drop at any time.
#[test]
fn a_large_tokenizer_is_read_within_the_process_share_of_the_plan() {
    let limits = StepLimits { step_tokens_max: 64, running_max: 1 };
    let ability = Ability::plain(Backend::Cpu, F32);
    for (merges, pairs) in [(142_000, false), (280_147, false), (280_147, true)] {
        let dir = with_tokenizer(128_256, merges, pairs, 512);
        let facts = Checkpoint::open(&dir).unwrap().facts().clone();
        let plan = memory::plan(&facts, ability, limits, 64);
        let available = format!("--memory-bytes={}", plan.total());
        let flags = ["--kv-tokens=64", "--running-max=1", "--step-tokens-max=64", &available];
        // With less than it says it needs, the kernel would end it.
        let group = Group::new(plan.total());
        let process = Process::serve(&dir, &flags, group.as_ref());
        let files = process.memory("RssFile");
        let peak = process.memory("VmHWM") - files;
        println!(
            "{merges} merges, {} bytes of tokenizer.json: {peak} at most, {} when ready, of {} + {} planned",
            facts.tokenizer_bytes,
            process.memory("RssAnon"),
            plan.weights,
            plan.process
        );
        assert!(peak <= plan.weights + plan.process, "{peak} of {plan:?}");
        // The bodies' budget was not in use.
        assert!(process.memory("RssAnon") + BODIES_BYTES_MAX <= plan.weights + plan.process);
        drop(process);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

/// A request over a connection of its own, and all of the answer.
fn post(address: &str, path: &str, body: &str) -> String {
    let mut socket = TcpStream::connect(address).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all((head + body).as_bytes()).unwrap();
    std::io::read_to_string(socket).unwrap()
}

/// Words of which none is like another.
fn distinct_words(from: usize, bytes: usize) -> String {
    let letters =
        |number: usize| (0..10).map(move |at| char::from(b"abcd"[number >> (2 * at) & 3]));
    let word = |number| letters(number).cycle().take(200).chain([' ']);
    (from..from + bytes / 201).flat_map(word).collect()
}

/// Words, one word, and what falls into a token for each byte: to the last byte that is looked at.
#[test]
fn texts_as_long_as_a_context_of_128k_takes_are_tokenized_within_the_process_share_of_the_plan() {
    const CONTEXT: u32 = 128 << 10;
    let dir = with_tokenizer(2048, 1024, false, CONTEXT);
    let limits = StepLimits { step_tokens_max: 64, running_max: 1 };
    let facts = Checkpoint::open(&dir).unwrap().facts().clone();
    let plan = memory::plan(&facts, Ability::plain(Backend::Cpu, F32), limits, CONTEXT.into());
    let flags = ["--kv-tokens=131072", "--running-max=1", "--step-tokens-max=64"];
    let process = Process::serve(&dir, &flags, None);
    let address = &process.address;
    let before = process.memory("VmHWM");
    std::thread::scope(|scope| {
        for client in 0..8 {
            scope.spawn(move || {
                let words = ["a cabbage, bad. ", "1a", "'' ", "dab\n", "汉字，", "abcd"];
                let all = (0..words.len()).map(|i| words[(i + client) % words.len()]);
                let bytes = 16 * CONTEXT as usize;
                let repeated = all.map(|word| word.repeat(bytes / word.len()));
                for prompt in repeated.chain([distinct_words(client * 20_000, bytes)]) {
                    let answer = post(address, "/tokenize", &json!({"prompt": prompt}).to_string());
                    let status = answer.lines().next().unwrap();
                    let known = answer.contains("context_length_exceeded");
                    assert!(status.contains("200") || known, "{}: {answer}", &prompt[..20]);
                }
            });
        }
    });
    let peak = process.memory("VmHWM") - process.memory("RssFile");
    println!("{before} before, {peak} at most, {} + {} planned", plan.weights, plan.process);
    assert!(peak <= plan.weights + plan.process, "{peak} of {plan:?}");
    std::fs::remove_dir_all(&dir).unwrap();
}

/// What a greedy client sends, and how many of its kind there are.
struct Greed {
    clients: usize,
    request: Vec<u8>,
}

fn whole(path: &str, body: &str) -> Vec<u8> {
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    (head + body).into_bytes()
}

/// The largest heads, bodies, parsed bodies, errors, answers and streams that the engine takes or gives.
fn greed() -> Vec<Greed> {
    const BODY: usize = 8 << 20;
    let completion = |wish: Value| {
        let mut body = json!({"model": "model", "ignore_eos": true});
        body.as_object_mut().unwrap().extend(wish.as_object().unwrap().clone());
        whole("/v1/completions", &body.to_string())
    };
    let long = "a".repeat(BODY - 100);
    let unfinished = |mut request: Vec<u8>| {
        request.pop();
        request
    };
    let head = format!("GET /health HTTP/1.1\r\nhost: x\r\nx: {}", "a".repeat((16 << 10) - 100));
    let lines = "\n".repeat(BODY / 2 - 100);
    let tokens = vec![40; 2000];
    let strings = json!({"prompt": "1a".repeat(32 << 10), "return_token_strs": true});
    let chat = json!({"model": "model", "messages": [{"role": "user", "content": lines}]});
    let echo = json!({"prompt": tokens, "n": 128, "echo": true, "max_tokens": 0});
    let reports = json!({"prompt": tokens, "n": 6, "echo": true, "max_tokens": 1, "logprobs": 20});
    let stream =
        json!({"prompt": "a", "n": 32, "max_tokens": 2000, "stream": true, "logprobs": 20});
    let kind = |clients, request| Greed { clients, request };
    vec![
        // Heads and bodies without an end.
        kind(3300, head.into_bytes()),
        kind(100, unfinished(completion(json!({"prompt": long})))),
        // Bodies of one text, of short values, and with a name that is not known.
        kind(16, completion(json!({"prompt": lines}))),
        kind(16, whole("/v1/chat/completions", &chat.to_string())),
        kind(16, completion(json!({"prompt": vec![1; 300_000]}))),
        kind(16, whole("/v1/completions", &json!({"model": long}).to_string())),
        // Tokens with their strings, prompts given back, log-probabilities, streams.
        kind(300, whole("/tokenize", &strings.to_string())),
        kind(200, completion(echo)),
        kind(16, completion(reports)),
        kind(32, completion(stream)),
    ]
}

/// Sends what it can within its time and reads nothing. What is refused is cut in the middle.
async fn unread(address: SocketAddr, request: Arc<Vec<u8>>) -> TokioStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    let _ = tokio::time::timeout(Duration::from_secs(10), stream.write_all(&request)).await;
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_of_the_greediest_clients_ends_no_engine_and_stays_within_the_plan() {
    allow_many_connections();
    let limits = StepLimits { step_tokens_max: 512, running_max: 32 };
    let facts = Checkpoint::open(&bundled()).unwrap().facts().clone();
    let plan = memory::plan(&facts, Ability::plain(Backend::Cpu, F32), limits, 4096);
    let Some(group) = Group::new(plan.total()) else { return };
    let available = format!("--memory-bytes={}", plan.total());
    let process = Process::serve(&bundled(), &["--kv-tokens=4096", &available], Some(&group));
    let address = process.address.parse().unwrap();
    let anonymous = || process.memory("VmHWM") - process.memory("RssFile");
    println!("{} at rest, {} planned: {plan:?}", anonymous(), plan.total());
    let mut crowd = JoinSet::new();
    for Greed { clients, request } in greed() {
        let request = Arc::new(request);
        for _ in 0..clients {
            crowd.spawn(unread(address, request.clone()));
        }
    }
    let sockets = crowd.join_all().await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    println!("{} at most with {} clients", anonymous(), sockets.len());
    assert!(anonymous() <= plan.total(), "{} of {plan:?}", anonymous());
    drop(sockets);
    let small = json!({"model": "model", "prompt": "x", "max_tokens": 1}).to_string();
    let answer = post(&process.address, "/v1/completions", &small);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// How `serve` ended with at most `kib` of address space, and what it left as its termination message.
fn ended(kib: &str, flags: &[&str]) -> (i32, ExitReport) {
    let message = std::env::temp_dir().join(format!("plimsoll-ended-{}-{kib}", std::process::id()));
    let output = Command::new("sh")
        .args(["-c", r#"ulimit -v "$0" && exec "$@""#, kib, env!("CARGO_BIN_EXE_plimsoll-engine")])
        .args(["serve", "--device=cpu", "--listen=127.0.0.1:0", "--termination-message-file"])
        .arg(&message)
        .arg("--model")
        .arg(bundled())
        .args(flags)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    let report = std::fs::read(&message).unwrap_or_else(|error| panic!("{error}: {told}"));
    std::fs::remove_file(&message).unwrap();
    (output.status.code().unwrap(), serde_json::from_slice(&report).unwrap())
}

#[test]
fn an_engine_without_enough_memory_reports_what_it_needed_and_what_there_was() {
    let (code, report) = ended("unlimited", &["--memory-bytes=1048576", "--kv-tokens=64"]);
    assert_eq!((code, report.reason), (10, ExitReason::DoesNotFit));
    let memory = report.memory.unwrap();
    assert_eq!(memory.available_bytes, MIB);
    assert!(memory.needed_bytes > 40 * MIB, "the model alone takes as much: {memory:?}");

    // The plan counted on 64 GiB, and the system gives 4: 12 GiB of KV do not come.
    let flags = ["--memory-bytes=68719476736", "--kv-tokens=2000000"];
    let (code, report) = ended("4194304", &flags);
    assert_eq!((code, report.reason), (11, ExitReason::OutOfDeviceMemory), "{report:?}");
    let memory = report.memory.unwrap();
    assert_eq!(memory.available_bytes, 64 << 30);
    assert!(memory.needed_bytes > 512 * MIB && memory.needed_bytes < 8 << 30, "{memory:?}");
    assert!(report.message.contains("it held"), "{}", report.message);
}

#[test]
fn the_metrics_show_the_peak_that_the_kernel_counted() {
    let process = Process::serve(&bundled(), &["--kv-tokens=640"], None);
    let mut socket = TcpStream::connect(&process.address).unwrap();
    write!(socket, "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let text = std::io::read_to_string(socket).unwrap();
    let line = text.lines().find(|line| line.starts_with("plimsoll_peak_memory_bytes{"));
    let told: u64 = line.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    let counted = process.memory("VmHWM") - process.memory("RssFile");
    assert!(told.abs_diff(counted) < counted / 10, "{told} {counted}");
}
