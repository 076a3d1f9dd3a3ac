//! What the engine's tests share: golden cases, a CPU backend from a directory, and runs of a sequence cut in every way
//! a scheduler may cut it. Each test binary uses a part of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use plimsoll_contract::abilities::{Dtype, PAGE_TOKENS};
use plimsoll_engine::backend::Backend;
use plimsoll_engine::backend::cpu::{CpuBackend, CpuOptions};
use plimsoll_engine::batch::{
    AdapterIndex, PageCopy, PageId, RowInput, SampledToken, SamplingParams, SequenceId, Slot,
    SlotStart, Span, SpanOutput, Step, StepNumber, TokenId,
};
use plimsoll_engine::model::{Checkpoint, Config, Plan, Role, Shard, TensorSpec};
use safetensors::tensor::TensorView;

pub const WHOLE: Shard = Shard::WHOLE;

/// Mean |Δlogprob| that a right model stays below in f32.
pub const GATE: f64 = 1e-3;

/// The random checkpoints, one or more of each family.
pub const CASES: [&str; 9] = [
    "llama2-mha",
    "llama3-rope",
    "llama-linear",
    "llama-yarn",
    "mistral-window",
    "qwen2-bias",
    "qwen2-window",
    "qwen3-qknorm",
    "qwen3-yarn",
];

/// Where goldens and the trained model lie; another machine than the one that compiled this says so.
pub fn tests_dir() -> PathBuf {
    let named = std::env::var_os("PLIMSOLL_TESTS").map(PathBuf::from);
    named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests"))
}

pub fn golden_dir(case: &str) -> PathBuf {
    tests_dir().join("goldens").join(case)
}

/// Teacher-forced truth.
pub struct Golden {
    pub tokens: Vec<TokenId>,
    /// `logprobs[i]` is that of `tokens[i + 1]`.
    pub logprobs: Vec<f64>,
    /// Position and the most likely tokens after it, best first.
    pub top: Vec<(usize, Vec<(TokenId, f64)>)>,
}

impl Golden {
    pub fn read(path: &Path) -> Golden {
        let text = std::fs::read_to_string(path).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let list = |value: &serde_json::Value| value.as_array().unwrap().clone();
        let token = |value: &serde_json::Value| value.as_u64().unwrap() as TokenId;
        Golden {
            tokens: list(&json["tokens"]).iter().map(token).collect(),
            logprobs: list(&json["logprobs"]).iter().map(|p| p.as_f64().unwrap()).collect(),
            top: list(&json["top"])
                .iter()
                .map(|entry| {
                    let best = list(&entry[1]);
                    let best = best.iter().map(|pair| (token(&pair[0]), pair[1].as_f64().unwrap()));
                    (entry[0].as_u64().unwrap() as usize, best.collect())
                })
                .collect(),
        }
    }
}

pub fn mean_difference(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "as many log-probabilities as the golden has");
    got.iter().zip(want).map(|(got, want)| (got - want).abs()).sum::<f64>() / got.len() as f64
}

pub fn backend(checkpoint: &Checkpoint, dtype: Dtype, pages: u32) -> CpuBackend {
    let options = CpuOptions { dtype, kv_pages: vec![pages], running_max: 8, shard: Shard::WHOLE };
    CpuBackend::load(checkpoint, options, &mut |_| ()).unwrap()
}

pub fn open(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

/// Drives a backend by hand.
pub struct Driver {
    pub backend: Box<dyn Backend>,
    steps: u64,
}

impl Driver {
    pub fn new(backend: impl Backend + 'static) -> Driver {
        Driver { backend: Box::new(backend), steps: 0 }
    }

    pub fn step(&mut self, copies: Vec<PageCopy>, spans: Vec<Span>) -> Vec<SpanOutput> {
        self.steps += 1;
        let step = Step { number: StepNumber(self.steps), copies, spans };
        let ticket = self.backend.submit(step).unwrap();
        self.backend.collect(ticket).unwrap().spans
    }
}

/// One sequence of known tokens; spans of it are cut freely.
#[derive(Clone)]
pub struct Sequence {
    pub id: u64,
    pub slot: u32,
    pub tokens: Arc<[TokenId]>,
    pub table: Arc<[PageId]>,
    pub sampling: Arc<SamplingParams>,
}

impl Sequence {
    /// Pages `first_page ..`, in falling order, so that a table read wrongly shows.
    pub fn new(slot: u32, tokens: &[TokenId], first_page: u32) -> Sequence {
        let pages = (tokens.len() as u32 + 1).div_ceil(PAGE_TOKENS);
        Sequence {
            id: u64::from(slot) + 1,
            slot,
            tokens: tokens.into(),
            table: (first_page..first_page + pages).rev().map(PageId).collect(),
            sampling: Arc::new(SamplingParams {
                prompt_logprobs: Some(5),
                ..SamplingParams::default()
            }),
        }
    }

    pub fn start(&self) -> SlotStart {
        SlotStart {
            tokens: self.tokens.clone(),
            prompt_tokens: self.tokens.len(),
            sampling: self.sampling.clone(),
        }
    }

    /// Rows `range` of the sequence, reporting the prompt's log-probabilities.
    pub fn span(&self, range: std::ops::Range<usize>, start: bool) -> Span {
        Span {
            sequence: SequenceId(self.id),
            slot: Slot(self.slot),
            start: start.then(|| self.start()),
            position: range.start as u32,
            inputs: self.tokens[range].iter().map(|&token| RowInput::Token(token)).collect(),
            tables: vec![self.table.clone()],
            adapter: AdapterIndex::BASE,
            sample: false,
            prompt_logprobs: true,
        }
    }
}

/// Log-probabilities of a whole sequence computed in one step.
pub fn plain(driver: &mut Driver, sequence: &Sequence) -> Vec<f64> {
    let span = sequence.span(0..sequence.tokens.len(), true);
    logprobs(&driver.step(Vec::new(), vec![span])[0])
}

pub fn logprobs(output: &SpanOutput) -> Vec<f64> {
    output.prompt_logprobs.iter().map(|p| f64::from(p.logprob)).collect()
}

/// Chunks of up to 90 tokens.
pub fn in_chunks(driver: &mut Driver, sequence: &Sequence, seed: u64) -> Vec<f64> {
    let mut dice = Dice(seed);
    let mut got = Vec::new();
    let mut at = 0;
    while at < sequence.tokens.len() {
        let end = (at + 1 + dice.below(90)).min(sequence.tokens.len());
        got.extend(logprobs(&driver.step(vec![], vec![sequence.span(at..end, at == 0)])[0]));
        at = end;
    }
    got
}

pub fn one_at_a_time(driver: &mut Driver, sequence: &Sequence) -> Vec<f64> {
    let one = |at| logprobs(&driver.step(vec![], vec![sequence.span(at..at + 1, at == 0)])[0]);
    (0..sequence.tokens.len()).flat_map(one).collect()
}

/// In two halves, each among two other sequences.
pub fn in_company(driver: &mut Driver, sequence: &Sequence) -> Vec<f64> {
    let reversed: Vec<TokenId> = sequence.tokens.iter().rev().copied().collect();
    let others = [Sequence::new(1, &reversed, 12), Sequence::new(2, &reversed[..70], 20)];
    let (half, end) = (sequence.tokens.len() / 2, sequence.tokens.len());
    let first = vec![
        others[1].span(0..33, true),
        sequence.span(0..half, true),
        others[0].span(0..60, true),
    ];
    let second = vec![
        others[0].span(60..61, false),
        others[1].span(33..70, false),
        sequence.span(half..end, false),
    ];
    let mut got = logprobs(&driver.step(vec![], first)[1]);
    got.extend(logprobs(&driver.step(vec![], second)[2]));
    got
}

/// Begun, robbed of its pages and its slot, and computed again.
pub fn preempted(driver: &mut Driver, sequence: &Sequence) -> Vec<f64> {
    driver.step(vec![], vec![sequence.span(0..100, true)]);
    let thief = Sequence { table: sequence.table.clone(), ..Sequence::new(0, &[5; 90], 3) };
    driver.step(vec![], vec![thief.span(0..90, true)]);
    let again = Sequence::new(4, &sequence.tokens, 22);
    let mut got = logprobs(&driver.step(vec![], vec![again.span(0..70, true)])[0]);
    let rest = again.span(70..again.tokens.len(), false);
    got.extend(logprobs(&driver.step(vec![], vec![rest])[0]));
    got
}

/// Prompt of 70 tokens, then 60 sampled ones, with `company` other sequences in every step.
pub fn generated(
    backend: &mut dyn Backend,
    company: u32,
    sampling: &SamplingParams,
    depth: usize,
) -> Vec<SampledToken> {
    let tokens: Vec<TokenId> = (0..70).map(|i| i * 37 % 512).collect();
    let sequences: Vec<Sequence> = (0..=company)
        .map(|slot| {
            let tokens = if slot == 0 { &tokens[..] } else { &tokens[slot as usize * 9..] };
            let mut sequence = Sequence::new(slot, tokens, 1 + 4 * slot);
            sequence.table = (1 + 4 * slot..5 + 4 * slot).map(PageId).collect();
            sequence.sampling = Arc::new(sampling.clone());
            sequence
        })
        .collect();
    let step = |number: u64| {
        let spans = sequences.iter().rev().map(|sequence| {
            let prompt = sequence.tokens.len();
            let mut span = sequence.span(0..prompt, number == 1);
            if number > 1 {
                span.position = (prompt as u64 + number - 2) as u32;
                span.inputs = vec![RowInput::Sampled];
            }
            (span.sample, span.prompt_logprobs) = (true, false);
            span
        });
        Step { number: StepNumber(number), copies: vec![], spans: spans.collect() }
    };
    let mut tickets = std::collections::VecDeque::new();
    let mut got = Vec::new();
    for number in 1..=60 {
        tickets.push_back(backend.submit(step(number)).unwrap());
        if tickets.len() == depth {
            let output = backend.collect(tickets.pop_front().unwrap()).unwrap();
            got.push(output.spans.last().unwrap().sampled.clone().unwrap());
        }
    }
    for ticket in tickets {
        let output = backend.collect(ticket).unwrap();
        got.push(output.spans.last().unwrap().sampled.clone().unwrap());
    }
    got
}

/// Every way of sampling that the API has.
pub fn samplings() -> [SamplingParams; 4] {
    let hot = SamplingParams { seed: 3, logprobs: Some(2), ..SamplingParams::default() };
    let cut = SamplingParams { top_p: 0.8, top_k: 40, min_p: 0.01, ..hot.clone() };
    let greedy = SamplingParams { temperature: 0.0, ..hot.clone() };
    let penalized = SamplingParams {
        repetition_penalty: 1.3,
        presence_penalty: 0.4,
        frequency_penalty: 0.2,
        logit_bias: vec![(7, 2.0), (9, -100.0)],
        ..hot.clone()
    };
    [hot, cut, greedy, penalized]
}

/// Numbers that look random and are the same every time.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// A directory that goes with the test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("plimsoll-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

pub fn copy_checkpoint(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

pub fn safetensors_files(dir: &Path) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|end| end == "safetensors")).collect()
}

/// Hands every tensor's bytes out for changing, then writes the file back.
pub fn edit_tensors(file: &Path, mut edit: impl FnMut(&str, &mut [u8])) {
    let mut bytes = std::fs::read(file).unwrap();
    let size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + size]).unwrap();
    for (name, info) in header.as_object().unwrap() {
        let Some(offsets) = info["data_offsets"].as_array() else { continue };
        let at = |i: usize| 8 + size + offsets[i].as_u64().unwrap() as usize;
        edit(name, &mut bytes[at(0)..at(1)]);
    }
    std::fs::write(file, bytes).unwrap();
}

/// Writes a checkpoint of random weights in f32 for a config.json. They are large enough for logits to differ.
pub fn random_checkpoint(dir: &Path, config: &serde_json::Value, seed: u64) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let plan = Plan::new(&Config::parse(config).unwrap());
    let mut dice = Dice(seed);
    let tensors: Vec<(TensorSpec, Vec<u8>)> = plan
        .tensors()
        .into_iter()
        .map(|spec| {
            let gain = match spec.role {
                Role::Norm => 0.3,
                Role::Embedding => 1.0,
                _ => 3.0 / (spec.shape[spec.shape.len() - 1] as f32).sqrt(),
            };
            let centre = if spec.role == Role::Norm { 1.0 } else { 0.0 };
            let value = |_| centre + gain * (dice.below(20_001) as f32 / 10_000.0 - 1.0);
            let values = (0..spec.elements()).map(value).collect::<Vec<f32>>();
            (spec, values.iter().flat_map(|x| x.to_le_bytes()).collect())
        })
        .collect();
    let views = tensors.iter().map(|(spec, bytes)| {
        let view = TensorView::new(safetensors::Dtype::F32, spec.shape.clone(), bytes).unwrap();
        (spec.name.clone(), view)
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}
