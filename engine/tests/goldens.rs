//! Log-probabilities against those of transformers, teacher-forced: for every family, however a scheduler cuts, batches,
//! shares or repeats the work.

#![allow(clippy::unwrap_used)]

mod support;

use plimsoll_contract::abilities::Dtype;
use plimsoll_engine::batch::*;
use support::*;

const PAGE: usize = 64;

fn golden(case: &str) -> Golden {
    Golden::read(&golden_dir(case).join("golden.json"))
}

fn driver(case: &str) -> Driver {
    Driver::new(backend(&open(&golden_dir(case)), Dtype::F32, 40))
}

/// Runs `how` on every case. It must stay within the gate of transformers, and equal a plain run to the bit: a row's
/// sums are taken in one order, whoever else is in the step.
fn every_case(how: impl Fn(&mut Driver, &Sequence) -> Vec<f64>) {
    for case in CASES {
        let golden = golden(case);
        let sequence = Sequence::new(0, &golden.tokens, 3);
        let got = how(&mut driver(case), &sequence);
        let difference = mean_difference(&got, &golden.logprobs);
        assert!(difference <= GATE, "{case}: mean |Δlogprob| {difference:.2e}");
        assert_eq!(got, plain(&mut driver(case), &sequence), "{case}: not as in a plain run");
    }
}

#[test]
fn every_family_agrees_with_transformers() {
    for case in CASES {
        let golden = golden(case);
        let mut driver = driver(case);
        let sequence = Sequence::new(0, &golden.tokens, 3);
        let output = &driver.step(Vec::new(), vec![sequence.span(0..golden.tokens.len(), true)])[0];
        let difference = mean_difference(&logprobs(output), &golden.logprobs);
        println!("{case}: mean |Δlogprob| {difference:.1e}");
        assert!(difference <= GATE, "{case}: mean |Δlogprob| {difference:.2e}");
        for (position, best) in &golden.top {
            let Some(got) = output.prompt_logprobs.get(*position) else { continue };
            for ((_, got), (_, want)) in got.top.iter().zip(best) {
                assert!((f64::from(*got) - want).abs() < 10.0 * GATE, "{case} at {position}");
            }
            assert_eq!(got.top[0].0, best[0].0, "{case} at {position}: the most likely token");
        }
    }
}

#[test]
fn half_precision_stays_close_to_transformers() {
    for case in CASES {
        let golden = golden(case);
        let mut driver = Driver::new(backend(&open(&golden_dir(case)), Dtype::F16, 40));
        let got = plain(&mut driver, &Sequence::new(0, &golden.tokens, 3));
        let difference = mean_difference(&got, &golden.logprobs);
        println!("{case}: mean |Δlogprob| {difference:.1e}");
        // Rounding of 11-bit weights and keys, amplified by random weights; a mistake costs 0.02 and more.
        assert!(difference <= 10.0 * GATE, "{case}: mean |Δlogprob| {difference:.2e}");
    }
}

#[test]
fn prompts_in_chunks_of_any_size_agree() {
    for seed in 1..4 {
        every_case(|driver, sequence| in_chunks(driver, sequence, seed));
    }
}

#[test]
fn one_token_at_a_time_agrees() {
    every_case(one_at_a_time);
}

#[test]
fn company_in_the_batch_changes_nothing() {
    every_case(in_company);
}

#[test]
fn a_prefix_found_in_the_cache_agrees_with_one_computed() {
    every_case(|driver, sequence| {
        let whole = plain(driver, sequence);
        // The second page is shared, the third copied before it is written: it was full only in part.
        let mut reader = Sequence::new(1, &sequence.tokens, 20);
        let mut table = reader.table.to_vec();
        table[..2].copy_from_slice(&sequence.table[..2]);
        let copy = PageCopy { group: 0, from: sequence.table[2], to: table[2] };
        reader.table = table.into();
        let start = 2 * PAGE + 17;
        let spans = vec![reader.span(start..sequence.tokens.len(), true)];
        let mut got = whole[..start].to_vec();
        got.extend(logprobs(&driver.step(vec![copy], spans)[0]));
        // The writer's own pages are as before.
        assert_eq!(got, whole);
        let tail = sequence.tokens.len() - 1;
        let again = logprobs(&driver.step(vec![], vec![sequence.span(start..tail, false)])[0]);
        assert_eq!(again, whole[start..tail]);
        got
    });
}

#[test]
fn a_sequence_computed_again_after_preemption_agrees() {
    every_case(preempted);
}

fn generated_on_the_cpu(
    company: u32,
    sampling: &SamplingParams,
    depth: usize,
) -> Vec<SampledToken> {
    let mut backend = backend(&open(&golden_dir("llama3-rope")), Dtype::F32, 40);
    generated(&mut backend, company, sampling, depth)
}

#[test]
fn sampled_tokens_are_the_same_alone_in_company_and_with_two_steps_in_flight() {
    for sampling in samplings() {
        let alone = generated_on_the_cpu(0, &sampling, 1);
        assert_eq!(alone.len(), 60);
        assert_eq!(generated_on_the_cpu(5, &sampling, 1), alone, "{sampling:?}");
        assert_eq!(generated_on_the_cpu(2, &sampling, 2), alone, "{sampling:?}");
        assert!(alone.iter().any(|token| token.token != alone[0].token), "{sampling:?}");
    }
}

#[test]
fn an_embedding_row_stands_for_the_token_it_was_taken_from() {
    let case = "qwen2-bias";
    let golden = golden(case);
    let checkpoint = open(&golden_dir(case));
    let table = checkpoint.weights.tensor(&checkpoint.plan.embedding(), WHOLE).unwrap();
    let mut driver = driver(case);
    let sequence = Sequence::new(0, &golden.tokens, 3);
    let mut span = sequence.span(0..golden.tokens.len(), true);
    for (row, input) in span.inputs.iter_mut().enumerate().skip(1).step_by(3) {
        let mut embedding = vec![0.0; checkpoint.plan.hidden];
        table.read_row(golden.tokens[row] as usize, &mut embedding);
        *input = RowInput::Embedding(embedding.into());
    }
    let got = logprobs(&driver.step(vec![], vec![span])[0]);
    assert!(mean_difference(&got, &golden.logprobs) <= GATE);
}

#[test]
fn a_step_that_makes_no_sense_fails_with_the_reason_and_the_backend_goes_on() {
    let golden = golden("qwen2-bias");
    let mut driver = driver("qwen2-bias");
    let good = Sequence::new(0, &golden.tokens, 3);
    let changed = |change: &dyn Fn(&mut Span)| {
        let mut span = good.span(0..100, true);
        change(&mut span);
        span
    };
    let cases: [(&str, Span); 9] = [
        ("is not loaded", changed(&|s| s.adapter = AdapterIndex(1))),
        ("a span without rows", changed(&|s| s.inputs.clear())),
        ("2 block tables", changed(&|s| s.tables = vec![good.table.clone(); 2])),
        ("too short", changed(&|s| s.position = 200)),
        ("outside the pool", changed(&|s| s.tables = vec![[PageId(40); 4].as_slice().into()])),
        ("outside the vocabulary", changed(&|s| s.inputs[3] = RowInput::Token(384))),
        ("an embedding of 3", changed(&|s| s.inputs[3] = RowInput::Embedding([0.0; 3].into()))),
        ("sampled nothing", changed(&|s| s.inputs[0] = RowInput::Sampled)),
        ("never started", changed(&|s| s.start = None)),
    ];
    for (number, (message, span)) in cases.into_iter().enumerate() {
        let step = Step { number: StepNumber(number as u64), copies: vec![], spans: vec![span] };
        let error = driver.backend.submit(step).unwrap_err().to_string();
        assert!(error.contains(message), "{error}, not {message}");
    }
    let twice = vec![good.span(0..3, true), good.span(3..5, false)];
    let step = Step { number: StepNumber(98), copies: vec![], spans: twice };
    assert!(driver.backend.submit(step).unwrap_err().to_string().contains("taken twice"));
    let copies = vec![PageCopy { group: 0, from: PageId(1), to: PageId(40) }];
    let step = Step { number: StepNumber(99), copies, spans: vec![] };
    assert!(driver.backend.submit(step).unwrap_err().to_string().contains("outside the pool"));
    assert!(mean_difference(&plain(&mut driver, &good), &golden.logprobs) <= GATE);
}

#[test]
fn the_bundled_model_agrees_with_transformers_on_text() {
    let mut driver = Driver::new(backend(&open(&tests_dir().join("model")), Dtype::F32, 40));
    let mut cases = 0;
    for entry in std::fs::read_dir(golden_dir("bundled")).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("chat.json") {
            continue;
        }
        let golden = Golden::read(&path);
        let got = plain(&mut driver, &Sequence::new(0, &golden.tokens, 1));
        let difference = mean_difference(&got, &golden.logprobs);
        println!("{}: mean |Δlogprob| {difference:.1e}", path.display());
        assert!(difference <= GATE, "{}: {difference:.2e}", path.display());
        cases += 1;
    }
    assert!(cases >= 3, "{cases} prompts");
}

#[test]
fn what_transformers_answers_greedily_is_the_most_likely_here_too() {
    let mut driver = Driver::new(backend(&open(&tests_dir().join("model")), Dtype::F32, 40));
    let text = std::fs::read_to_string(golden_dir("bundled").join("chat.json")).unwrap();
    let chats: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tokens = |value: &serde_json::Value| -> Vec<TokenId> {
        value.as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as TokenId).collect()
    };
    for chat in chats.as_array().unwrap() {
        let (prompt, answer) = (tokens(&chat["tokens"]), tokens(&chat["greedy_tokens"]));
        let sequence = Sequence::new(0, &[prompt.clone(), answer.clone()].concat(), 1);
        let span = sequence.span(0..sequence.tokens.len(), true);
        let output = &driver.step(vec![], vec![span])[0];
        for chosen in &output.prompt_logprobs[prompt.len() - 1..] {
            // Regret, not equality: a tie may fall either way.
            let regret = chosen.top[0].1 - chosen.logprob;
            assert!(f64::from(regret) <= GATE, "{regret} nats in {}", chat["greedy_text"]);
        }
        assert!(!answer.is_empty());
    }
}
