//! Checkpoints that are damaged, strange or cut in shards: a named error or the right numbers, never a panic.

#![allow(clippy::unwrap_used)]

mod support;

use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant};

use plimsoll_contract::exit::ExitReason;
use plimsoll_engine::chat_template::ChatTemplate;
use plimsoll_engine::model::{Checkpoint, LoadError, Shard, Split, TensorSpec};
use plimsoll_engine::tokenizer::Tokenizer;
use plimsoll_kernels::reference::linear::linear;
use serde_json::json;
use support::*;

const CASE: &str = "qwen2-bias";
const FILE: &str = "model.safetensors";

fn copy(case: &str, name: &str) -> Scratch {
    let dir = Scratch::new(name);
    copy_checkpoint(&golden_dir(case), &dir.0);
    dir
}

fn error(dir: &Path) -> LoadError {
    Checkpoint::open(dir).expect_err("the checkpoint is damaged")
}

/// Rewrites the header of a file, leaving its data as they are.
fn edit_header(file: &Path, edit: impl Fn(&mut serde_json::Value)) {
    let bytes = std::fs::read(file).unwrap();
    let size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + size]).unwrap();
    edit(&mut header);
    let header = header.to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(&bytes[8 + size..]);
    std::fs::write(file, out).unwrap();
}

fn edit_config(dir: &Path, edit: impl Fn(&mut serde_json::Value)) {
    let file = dir.join("config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    edit(&mut config);
    std::fs::write(file, config.to_string()).unwrap();
}

#[test]
fn a_truncated_file_is_named_with_its_length() {
    let dir = copy(CASE, "truncated");
    let bytes = std::fs::read(dir.0.join(FILE)).unwrap();
    std::fs::write(dir.0.join(FILE), &bytes[..bytes.len() - 1]).unwrap();
    let error = error(&dir.0);
    assert_eq!(error.exit_reason(), ExitReason::CorruptWeights);
    let (text, have) = (error.to_string(), format!("{} bytes", bytes.len() - 1));
    assert!(text.contains(FILE) && text.contains(&have), "{text}");
}

/// What is done to a header, by name, and what the error says.
type Lie = (&'static str, fn(&mut serde_json::Value), &'static str);
const QUERY: &str = "model.layers.1.self_attn.q_proj.weight";

#[test]
fn headers_that_lie_are_refused_by_name() {
    let cases: [Lie; 5] = [
        ("missing", |h| drop(h.as_object_mut().unwrap().shift_remove(QUERY)), "whole"),
        ("shape", |h| h[QUERY]["shape"] = json!([128, 32]), "expected shape [64, 64]"),
        ("huge", |h| h[QUERY]["shape"] = json!([u64::MAX, 2]), "whole"),
        ("overlap", |h| h[QUERY]["data_offsets"] = json!([0, 8192]), "whole"),
        (
            "beyond",
            |h| h[QUERY]["data_offsets"] = json!([1u64 << 60, (1u64 << 60) + 8192]),
            "whole",
        ),
    ];
    for (name, edit, message) in cases {
        let dir = copy(CASE, &format!("lying-{name}"));
        edit_header(&dir.0.join(FILE), edit);
        let error = error(&dir.0);
        assert_eq!(error.exit_reason(), ExitReason::CorruptWeights, "{name}");
        assert!(error.to_string().contains(message), "{name}: {error}");
    }
}

#[test]
fn a_header_longer_than_its_file_asks_for_no_memory() {
    let dir = copy(CASE, "long");
    let mut bytes = (u64::MAX / 2).to_le_bytes().to_vec();
    bytes.extend(b"{}");
    std::fs::write(dir.0.join(FILE), bytes).unwrap();
    assert_eq!(error(&dir.0).exit_reason(), ExitReason::CorruptWeights);
    std::fs::write(dir.0.join(FILE), b"").unwrap();
    assert_eq!(error(&dir.0).exit_reason(), ExitReason::CorruptWeights);
}

#[test]
fn tensors_and_config_must_agree_in_both_directions() {
    let dir = copy(CASE, "contradicting");
    edit_config(&dir.0, |config| config["num_hidden_layers"] = json!(4));
    let text = error(&dir.0).to_string();
    assert!(text.contains("model.layers.3.") && text.contains("no such tensor"), "{text}");
    edit_config(&dir.0, |config| config["num_hidden_layers"] = json!(2));
    let text = error(&dir.0).to_string();
    assert!(text.contains("model.layers.2.") && text.contains("only tensors that"), "{text}");
}

#[test]
fn a_stored_type_that_is_not_run_is_unsupported_not_corrupt() {
    let dir = copy(CASE, "types");
    let norm = "model.norm.weight";
    edit_header(&dir.0.join(FILE), |header| header[norm]["dtype"] = json!("I16"));
    let error = error(&dir.0);
    assert_eq!(error.exit_reason(), ExitReason::UnsupportedModel);
    assert!(error.to_string().contains(norm) && error.to_string().contains("I16"), "{error}");
}

#[test]
fn what_is_not_there_is_not_found() {
    let dir = Scratch::new("empty");
    assert_eq!(error(&dir.0.join("nowhere")).exit_reason(), ExitReason::ModelNotFound);
    assert_eq!(error(&dir.0).exit_reason(), ExitReason::ModelNotFound);
    let config = golden_dir(CASE).join("config.json");
    std::fs::copy(config, dir.0.join("config.json")).unwrap();
    let error = error(&dir.0);
    assert_eq!(error.exit_reason(), ExitReason::ModelNotFound);
    assert!(error.to_string().contains(FILE), "{error}");
}

#[test]
fn a_pipe_or_a_device_in_the_place_of_a_file_is_refused_and_never_waited_for() {
    let index = "model.safetensors.index.json";
    let files = ["config.json", "generation_config.json", FILE, index];
    for (file, device) in files.iter().flat_map(|file| [(file, false), (file, true)]) {
        let dir = copy(CASE, &format!("no-file-{file}-{device}"));
        if *file == index {
            std::fs::remove_file(dir.0.join(FILE)).unwrap();
        }
        put_in_the_place_of(&dir.0.join(file), device);
        let path = dir.0.clone();
        let error = within_seconds(move || error(&path));
        assert_eq!(error.exit_reason(), ExitReason::CorruptWeights, "{file}: {error}");
        let text = error.to_string();
        assert!(text.contains(file) && text.contains("not a regular file"), "{text}");
    }
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        let dir = copy(CASE, &format!("no-text-{file}"));
        put_in_the_place_of(&dir.0.join(file), false);
        let path = dir.0.clone();
        let text = within_seconds(move || match file {
            "tokenizer.json" => Tokenizer::open(&path).err().unwrap().to_string(),
            _ => ChatTemplate::open(&path).unwrap_err().to_string(),
        });
        assert!(text.contains(file) && text.contains("not a regular file"), "{text}");
    }
    let dir = copy(CASE, "no-revision");
    put_in_the_place_of(&dir.0.join(".plimsoll-revision"), false);
    put_in_the_place_of(&dir.0.join("tokenizer_config.json"), true);
    let path = dir.0.clone();
    let revision =
        within_seconds(move || Checkpoint::open(&path).unwrap().facts().revision.clone());
    assert_eq!(revision, None, "what only informs is left out");
}

fn put_in_the_place_of(file: &Path, device: bool) {
    let _ = std::fs::remove_file(file);
    if device {
        return std::os::unix::fs::symlink("/dev/zero", file).unwrap();
    }
    assert!(std::process::Command::new("mkfifo").arg(file).status().unwrap().success());
}

fn within_seconds<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, waiting) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    waiting.recv_timeout(Duration::from_secs(20)).expect("answered, not waited")
}

#[test]
fn an_index_names_files_beside_it_that_hold_what_it_says() {
    let index = "model.safetensors.index.json";
    let weight = "model.norm.weight";
    for (file, message) in [
        ("../elsewhere.safetensors", "beside it"),
        ("missing.safetensors", "missing.safetensors"),
        ("model-00001-of-00003.safetensors", "a file without it"),
    ] {
        let dir = copy("llama3-rope", "index");
        let path = dir.0.join(index);
        let mut json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json["weight_map"][weight] = json!(file);
        std::fs::write(&path, json.to_string()).unwrap();
        let error = error(&dir.0);
        assert_eq!(error.exit_reason(), ExitReason::CorruptWeights, "{file}");
        assert!(error.to_string().contains(message), "{error}");
    }
}

#[test]
fn facts_say_what_the_checkpoint_is() {
    let facts = open(&golden_dir("llama3-rope")).facts().clone();
    assert_eq!((facts.layers, facts.hidden, facts.heads, facts.kv_heads), (3, 64, 4, 2));
    assert_eq!(facts.parameters.embedding, 512 * 64);
    assert_eq!((facts.parameters.head, facts.tied_head), (0, true));
    assert_eq!(facts.parameters.mlp, 3 * 3 * 64 * 128);
    assert_eq!(facts.parameters.total() * 2, facts.disk_bytes["BF16"], "tied, so nothing twice");
    assert_eq!(open(&golden_dir("llama3-rope")).eos_token_ids, [2, 3, 4]);
    let window = open(&golden_dir("qwen2-window")).facts().sliding_window.unwrap();
    assert_eq!((window.tokens, window.layers), (70, 2));
}

/// Random damage to headers, configs and lengths, for `PLIMSOLL_FUZZ_SECONDS`. A failure names its seed, with which
/// `PLIMSOLL_FUZZ_SEED` begins again.
#[test]
fn fuzz_damaged_checkpoints_are_refused_without_a_panic() {
    let until = Instant::now() + Duration::from_secs(environment("PLIMSOLL_FUZZ_SECONDS", 2));
    let dir = copy("llama3-rope", "fuzz");
    let files = ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"];
    let originals = files.map(|file| std::fs::read(dir.0.join(file)).unwrap());
    let first = environment("PLIMSOLL_FUZZ_SEED", 1);
    let (mut seed, mut refused) = (first, 0u64);
    while Instant::now() < until {
        let mut dice = Dice(seed);
        let which = dice.below(files.len());
        std::fs::write(dir.0.join(files[which]), damaged(&originals[which], &mut dice)).unwrap();
        let outcome = catch_unwind(|| match Checkpoint::open(&dir.0) {
            Err(error) => error.to_string().len(),
            Ok(checkpoint) => {
                // What passes the checks can be read whole.
                for spec in checkpoint.plan.tensors() {
                    checkpoint.weights.tensor(&spec, WHOLE).unwrap().to_vec();
                }
                0
            }
        });
        refused += u64::from(outcome.as_ref().is_ok_and(|len| *len > 0));
        assert!(outcome.is_ok(), "seed {seed} on {} panicked", files[which]);
        assert!(outcome.is_ok_and(|len| len < 2000), "seed {seed}: an endless message");
        std::fs::write(dir.0.join(files[which]), &originals[which]).unwrap();
        seed += 1;
    }
    println!("{} damaged checkpoints, {refused} refused", seed - first);
    assert!(refused > (seed - first) / 4, "the damage is felt");
}

fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn damaged(original: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = original.to_vec();
    // Most of a weight file is data, whose values mean nothing to a parser: aim at the head.
    let reach = bytes.len().min(1500);
    for _ in 0..1 + dice.below(4) {
        let at = dice.below(reach);
        match dice.below(5) {
            0 => bytes[at] = dice.below(256) as u8,
            1 => bytes[at] ^= 1 << dice.below(8),
            2 => bytes.truncate(dice.below(bytes.len().max(1))),
            3 => {
                let digits = b"0123456789-[]{}\",:e.";
                bytes[at] = digits[dice.below(digits.len())];
            }
            _ => {
                let number = b"99999999999999999999"[..1 + dice.below(20)].iter().copied();
                let at = at.min(bytes.len());
                bytes.splice(at..at, number);
            }
        }
        if bytes.len() < reach {
            break;
        }
    }
    bytes
}

/// Shards of a tensor: rows follow one another, partial results of columns add up.
#[test]
fn the_parts_of_all_ranks_make_the_whole() {
    for case in CASES {
        let checkpoint = open(&golden_dir(case));
        for of in [2, 4] {
            // KV heads that two ranks share do not simply follow one another.
            let shared = |name: &str| {
                checkpoint.config.kv_heads < of
                    && (name.contains("k_proj") || name.contains("v_proj"))
            };
            let specs = checkpoint.plan.tensors();
            specs
                .iter()
                .filter(|spec| spec.shape.len() == 2 && !shared(&spec.name))
                .for_each(|spec| check_parts(&checkpoint, spec, of));
        }
    }
}

fn check_parts(checkpoint: &Checkpoint, spec: &TensorSpec, of: usize) {
    let inner = spec.shape[1];
    let x: Vec<f32> = (0..inner).map(|i| (i as f32 * 0.7).sin()).collect();
    let whole = checkpoint.weights.tensor(spec, WHOLE).unwrap().to_vec();
    let mut want = vec![0.0; spec.shape[0]];
    linear(&x, inner, &whole, None, &mut want);
    let mut got = match spec.split {
        Split::Columns { .. } => vec![0.0; spec.shape[0]],
        _ => Vec::new(),
    };
    let mut first = 0;
    for rank in 0..of {
        let view = checkpoint.weights.tensor(spec, Shard { rank, of }).unwrap();
        let part = view.to_vec();
        let mut out = vec![0.0; view.rows()];
        linear(&x[first..first + view.columns()], view.columns(), &part, None, &mut out);
        match spec.split {
            Split::Columns { .. } => {
                first += view.columns();
                got.iter_mut().zip(out).for_each(|(sum, part)| *sum += part);
            }
            _ => got.extend(out),
        }
    }
    assert_eq!(got.len(), want.len(), "{}", spec.name);
    for (got, want) in got.iter().zip(&want) {
        assert!((got - want).abs() < 1e-4, "{} of {of}: {got} against {want}", spec.name);
    }
}

#[test]
fn a_rank_holds_whole_heads_with_their_share_of_queries_and_biases() {
    let checkpoint = open(&golden_dir(CASE));
    let layer = checkpoint.plan.layer(0);
    let size = |spec: &TensorSpec, rank, of| {
        let view = checkpoint.weights.tensor(spec, Shard { rank, of }).unwrap();
        (view.rows(), view.columns())
    };
    // 4 heads and 2 KV heads of 16 over 2 ranks.
    assert_eq!(size(&layer.query.weight, 1, 2), (32, 64));
    assert_eq!(size(&layer.key.weight, 1, 2), (16, 64));
    assert_eq!(size(layer.key.bias.as_ref().unwrap(), 1, 2), (1, 16));
    assert_eq!(size(&layer.output.weight, 1, 2), (64, 32));
    assert_eq!(size(&layer.attention_norm, 1, 2), (1, 64), "norms are everywhere");
    // Fewer KV heads than ranks: two ranks hold the same one.
    let key = |rank| {
        checkpoint.weights.tensor(&layer.key.weight, Shard { rank, of: 4 }).unwrap().to_vec()
    };
    assert_eq!(key(0), key(1));
    assert_ne!(key(1), key(2));
    assert_eq!(size(&layer.query.weight, 3, 4), (16, 64));
    let uneven = checkpoint.weights.tensor(&layer.query.weight, Shard { rank: 0, of: 3 });
    assert!(uneven.unwrap_err().to_string().contains("4 units"));
}
