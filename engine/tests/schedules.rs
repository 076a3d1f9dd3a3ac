//! The whole engine below HTTP, on the bundled model: whatever the scheduler does, everyone is told what a run alone
//! would have told.

use std::path::Path;
use std::sync::Arc;

use plimsoll_contract::abilities::Dtype;
use plimsoll_engine::backend::cpu::{CpuBackend, CpuOptions};
use plimsoll_engine::batch::{AdapterIndex, SamplingParams, TokenId};
use plimsoll_engine::metrics::Metrics;
use plimsoll_engine::model::{Checkpoint, Shard};
use plimsoll_engine::request::{Event, PrefixSalt, Request, StopRules};
use plimsoll_engine::step::{self, EngineHandle, Limits, RequestStream};
use tokenizers::Tokenizer;

/// Per choice, each token and its log-probability.
type Answer = Vec<Vec<(TokenId, f32)>>;

/// The bundled model under the given limits.
fn engine(limits: Limits) -> (EngineHandle, Arc<Metrics>) {
    let checkpoint = Checkpoint::open(&model_dir()).expect("the bundled model");
    let options = CpuOptions {
        dtype: Dtype::F32,
        kv_pages: limits.kv_pages.clone(),
        running_max: limits.running_max as u32,
        shard: Shard::WHOLE,
    };
    let backend = CpuBackend::load(&checkpoint, options, &mut |_| ()).expect("it loads");
    let metrics = Metrics::new("bundled", limits.context_tokens);
    (step::start(Box::new(backend), limits, Arc::clone(&metrics)), metrics)
}

fn model_dir() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/model")
}

fn limits() -> Limits {
    Limits {
        running_max: 12,
        waiting_max: 64,
        step_tokens_max: 512,
        context_tokens: 2048,
        kv_pages: vec![200],
        steps_in_flight: 1,
        prefix_reuse: false,
    }
}

/// Conversations that begin alike, some sampled, some greedy, some with choices, some with log-probabilities of the
/// prompt.
fn requests() -> Vec<Request> {
    let tokenizer = Tokenizer::from_file(model_dir().join("tokenizer.json")).expect("it parses");
    let past = "<|begin|><|im_start|>user\nWho is the harbour master of Plimsoll Bay?<|im_end|>\n\
                <|im_start|>assistant\nThe harbour master of Plimsoll Bay is Mara Tollard.<|im_end|>\n"
        .repeat(3);
    let questions = [
        "What year was the harbour of Dunmere founded?",
        "Who runs the home harbour of the Green Lantern?",
        "Repeat: the fox is in the tower.",
        "What is 12 + 30?",
    ];
    let request = |index: usize| {
        let question = questions[index % questions.len()];
        let past = if index.is_multiple_of(3) { past.as_str() } else { "<|begin|>" };
        let text = format!("{past}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
        let prompt = tokenizer.encode(text, false).expect("it encodes");
        Request {
            prompt: prompt.get_ids().into(),
            choices: if index.is_multiple_of(4) { 3 } else { 1 },
            sampling: Arc::new(SamplingParams {
                temperature: if index.is_multiple_of(2) { 1.0 } else { 0.0 },
                seed: index as u64,
                logprobs: Some(0),
                prompt_logprobs: (index % 5 == 2).then_some(0),
                ..SamplingParams::default()
            }),
            stop: StopRules {
                stop_tokens: Arc::new(if index % 3 == 1 { [0, 3].into() } else { [].into() }),
                output_tokens_max: 130 + index as u32,
            },
            salt: PrefixSalt { adapter: AdapterIndex::BASE, tenant: None },
        }
    };
    (0..7).map(request).collect()
}

async fn answer(mut stream: RequestStream, choices: u32) -> Answer {
    let mut answer = vec![Vec::new(); choices as usize];
    while let Some(event) = stream.next().await {
        match event {
            Event::Token { choice, token, logprob } => {
                let logprob = logprob.expect("asked for").logprob;
                answer[choice as usize].push((token, logprob));
            }
            Event::Failed { message, .. } => panic!("{message}"),
            Event::Prompt { .. } | Event::Finished { .. } => {}
        }
    }
    answer
}

fn counted(metrics: &Metrics, name: &str) -> f64 {
    let text = metrics.render();
    let line = text.lines().find(|line| line.starts_with(name)).expect("the counter exists");
    line.rsplit(' ').next().expect("a value").parse().expect("a number")
}

/// Everybody at once; where prefixes are reused, once more, so that they are found.
async fn all_at_once(limits: Limits) -> (Vec<Answer>, Arc<Metrics>) {
    let rounds = if limits.prefix_reuse { 2 } else { 1 };
    let (handle, metrics) = engine(limits);
    let mut answers = Vec::new();
    for _ in 0..rounds {
        let streams: Vec<_> = requests()
            .into_iter()
            .map(|request| (request.choices, handle.submit(request).expect("it fits")))
            .collect();
        for (choices, stream) in streams {
            answers.push(answer(stream, choices).await);
        }
    }
    handle.begin_shutdown();
    handle.drained().await;
    (answers, metrics)
}

fn assert_same(got: &[Answer], alone: &[Answer], schedule: &str) {
    assert!(!got.is_empty() && got.len().is_multiple_of(alone.len()));
    for (index, answer) in got.iter().enumerate() {
        for (choice, tokens) in answer.iter().enumerate() {
            let wanted = &alone[index % alone.len()][choice];
            let ids = |tokens: &[(TokenId, f32)]| tokens.iter().map(|t| t.0).collect::<Vec<_>>();
            assert_eq!(ids(tokens), ids(wanted), "{schedule}: request {index}, choice {choice}");
            let differences = tokens.iter().zip(wanted).map(|(a, b)| (a.1 - b.1).abs());
            let mean = differences.sum::<f32>() / tokens.len().max(1) as f32;
            assert!(mean <= 1e-3, "{schedule}: request {index}, choice {choice}: {mean}");
        }
    }
}

#[tokio::test]
async fn every_schedule_tells_everybody_what_a_run_alone_tells() {
    let (handle, _) = engine(limits());
    let mut alone = Vec::new();
    for request in requests() {
        let choices = request.choices;
        alone.push(answer(handle.submit(request).expect("it fits"), choices).await);
    }
    let told: usize = alone.iter().flatten().map(Vec::len).sum();
    assert!(told > 800, "{told} tokens prove something");

    let (answers, _) = all_at_once(limits()).await;
    assert_same(&answers, &alone, "together");

    let chunked = Limits { step_tokens_max: 23, steps_in_flight: 2, ..limits() };
    assert_same(&all_at_once(chunked).await.0, &alone, "in chunks, two steps in flight");

    let (answers, metrics) = all_at_once(Limits { prefix_reuse: true, ..limits() }).await;
    assert_same(&answers, &alone, "reusing prefixes");
    assert!(counted(&metrics, "plimsoll_prefix_cache_hits_total") > 300.0);

    for steps_in_flight in [1, 2] {
        let cramped = Limits { kv_pages: vec![7], steps_in_flight, ..limits() };
        let (answers, metrics) = all_at_once(cramped).await;
        assert_same(&answers, &alone, "with too few pages");
        assert!(counted(&metrics, "plimsoll_preemptions_total") > 0.0);
    }
}
