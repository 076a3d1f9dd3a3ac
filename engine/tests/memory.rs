//! What a served process really holds in memory, beside what the plan says and what bodies may take.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use plimsoll_contract::abilities::Dtype::F32;
use plimsoll_contract::abilities::{Ability, Backend};
use plimsoll_contract::memory::{self, BODIES_BYTES_MAX, StepLimits};
use plimsoll_engine::model::Checkpoint;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// `serve` as a process of its own; ended when dropped.
struct Process {
    child: Child,
    address: String,
}

impl Process {
    fn serve(model: &Path, flags: &[&str], group: Option<&Group>) -> Process {
        let engine = env!("CARGO_BIN_EXE_plimsoll-engine");
        let mut command = match group {
            None => Command::new(engine),
            Some(Group(dir)) => {
                let mut shell = Command::new("sh");
                shell
                    .args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#])
                    .arg(dir)
                    .arg(engine);
                shell
            }
        };
        let mut child = command
            .args(["serve", "--device=cpu", "--listen=127.0.0.1:0", "--log-format=json", "--model"])
            .arg(model)
            .args(flags)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut told = String::new();
        let address = lines.find_map(|line| {
            let line = line.unwrap();
            told += &line;
            let line: serde_json::Value = serde_json::from_str(&line).ok()?;
            (line["message"] == "ready").then(|| line["address"].as_str().unwrap().to_owned())
        });
        let address = address.unwrap_or_else(|| panic!("not ready: {told}"));
        // The pipe stays open, and what comes later is not read: it is little.
        std::mem::forget(lines);
        Process { child, address }
    }

    /// `VmRSS`, `VmHWM`, `RssAnon`.
    fn memory(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line =
            status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A group of processes with a limit of memory; gone when dropped.
struct Group(PathBuf);

impl Group {
    /// None without the right to make one.
    fn new(bytes: u64) -> Option<Group> {
        let kinds =
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        kinds.iter().find_map(|(base, limit)| {
            let group =
                Group(Path::new(base).join(format!("plimsoll-{}-{bytes}", std::process::id())));
            std::fs::create_dir(&group.0).ok()?;
            // Where no such file appears by itself it is no group.
            let mut limit =
                std::fs::OpenOptions::new().write(true).open(group.0.join(limit)).ok()?;
            write!(limit, "{bytes}").ok()?;
            Some(group)
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn bundled() -> PathBuf {
    let named = std::env::var_os("PLIMSOLL_TESTS").map(PathBuf::from);
    named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests")).join("model")
}

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
fn with_tokenizer(tokens: usize, merges: usize, pairs: bool) -> PathBuf {
    let name = format!("plimsoll-tokenizer-{}-{tokens}-{merges}-{pairs}", std::process::id());
    let dir = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let tokenizer = tokenizer(tokens, merges, pairs);
    std::fs::write(dir.join("tokenizer.json"), serde_json::to_vec_pretty(&tokenizer).unwrap())
        .unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "vocab_size": tokens, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
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
        let dir = with_tokenizer(128_256, merges, pairs);
        let facts = Checkpoint::open(&dir).unwrap().facts().clone();
        let plan = memory::plan(&facts, ability, limits, 64);
        let available = format!("--memory-bytes={}", plan.total());
        let flags = ["--kv-tokens=64", "--running-max=1", "--step-tokens-max=64", &available];
        // With less than it says it needs, the kernel would end it.
        let group = Group::new(plan.total());
        if group.is_none() {
            println!("no right to make a control group: measured only");
        }
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
