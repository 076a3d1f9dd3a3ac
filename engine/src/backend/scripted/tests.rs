//! The backend must notice what a real one would get wrong in silence.

use std::sync::Arc;

use super::*;
use crate::batch::{AdapterIndex, PageCopy, SlotStart};

const PROMPT: [TokenId; 70] = [3; 70];

/// Plain steps of sequence `n` in slot `n`, on pages `2n` and `2n + 1`.
fn prefill(n: u32) -> Span {
    Span {
        sequence: SequenceId(u64::from(n)),
        slot: Slot(n),
        start: Some(SlotStart {
            tokens: Arc::new(PROMPT.map(|token| token + n)),
            prompt_tokens: PROMPT.len(),
            sampling: Arc::default(),
        }),
        position: 0,
        inputs: PROMPT.iter().map(|token| RowInput::Token(token + n)).collect(),
        tables: vec![[2 * n, 2 * n + 1].map(PageId).into()],
        adapter: AdapterIndex::BASE,
        sample: true,
        prompt_logprobs: false,
    }
}

fn decode(n: u32, position: u32) -> Span {
    let inputs = vec![RowInput::Sampled];
    Span { start: None, position, inputs, ..prefill(n) }
}

/// Runs steps; the reason of the first that fails.
fn run(steps: Vec<(Vec<PageCopy>, Vec<Span>)>) -> Result<Vec<SpanOutput>, String> {
    let mut backend = ScriptedBackend::new(&[8], Script::default());
    let mut outputs = Vec::new();
    for (number, (copies, spans)) in (1..).map(StepNumber).zip(steps) {
        let ticket = backend.submit(Step { number, copies, spans }).expect("not lost");
        match backend.collect(ticket) {
            Ok(output) => outputs.extend(output.spans),
            Err(BackendError::StepFailed { reason, .. }) => return Err(reason),
            Err(other) => panic!("{other}"),
        }
    }
    Ok(outputs)
}

#[test]
fn right_steps_bring_the_oracles_tokens() {
    let steps =
        vec![(vec![], vec![prefill(0), prefill(1)]), (vec![], vec![decode(0, 70), decode(1, 70)])];
    let outputs = run(steps).expect("nothing is wrong");
    let token = |index: usize| outputs[index].sampled.as_ref().expect("sampled").token;
    assert_eq!([token(0), token(2)].to_vec(), oracle(&PROMPT, 0, 50_000, 2));
    assert_eq!([token(1), token(3)].to_vec(), oracle(&[4; 70], 0, 50_000, 2));
}

#[test]
fn each_planted_fault_is_noticed() {
    type Plant = fn(&mut Span);
    let faults: [(&str, Plant); 7] = [
        ("pages swapped", |span| span.tables[0] = [1, 0].map(PageId).into()),
        ("another's page", |span| span.tables[0] = [2, 1].map(PageId).into()),
        ("a page too few", |span| span.tables[0] = [PageId(0)].into()),
        ("a position left out", |span| span.position += 1),
        ("a wrong token", |span| span.inputs[0] = RowInput::Token(49_999)),
        ("a foreign slot", |span| span.slot = Slot(1)),
        ("a slot never started", |span| span.slot = Slot(7)),
    ];
    for (fault, plant) in faults {
        let mut second = decode(0, 70);
        plant(&mut second);
        let steps = vec![(vec![], vec![prefill(0), prefill(1)]), (vec![], vec![second])];
        assert!(run(steps).is_err(), "{fault}");
    }
}

/// A second choice of sequence 0's request: it computes the prompt's last token again and samples with its own seed.
fn fork(last_page: u32) -> Span {
    let sampling = Arc::new(SamplingParams { seed: 1, ..SamplingParams::default() });
    let start = prefill(0).start.map(|start| SlotStart { sampling, ..start });
    Span {
        sequence: SequenceId(2),
        slot: Slot(2),
        start,
        position: 69,
        inputs: vec![RowInput::Token(3)],
        tables: vec![[0, last_page].map(PageId).into()],
        ..prefill(0)
    }
}

#[test]
fn a_fork_needs_its_copy() {
    let copy = PageCopy { group: 0, from: PageId(1), to: PageId(4) };
    let steps = |copies| vec![(vec![], vec![prefill(0)]), (copies, vec![fork(4)])];
    assert!(run(steps(vec![copy])).is_ok());
    assert!(run(steps(vec![])).is_err());
}

#[test]
fn two_sequences_that_write_one_page_are_noticed() {
    let later = |last_page| Span {
        start: None,
        position: 70,
        inputs: vec![RowInput::Sampled],
        ..fork(last_page)
    };
    let copy = PageCopy { group: 0, from: PageId(1), to: PageId(4) };
    let steps = |copies, page| {
        vec![
            (vec![], vec![prefill(0)]),
            (copies, vec![fork(page)]),
            (vec![], vec![decode(0, 70), later(page)]),
        ]
    };
    assert!(run(steps(vec![copy], 4)).is_ok());
    assert!(run(steps(vec![], 1)).is_err());
}
