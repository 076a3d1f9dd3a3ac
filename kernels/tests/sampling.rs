//! Tokens, log-probabilities and counts of the device against `reference::sampling`: the same logits give the same token,
//! whatever filters, penalties and biases, however many blocks share a row.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod support;

use std::collections::BTreeMap;

use half::bf16;
use plimsoll_kernels::device::{Device, Plain};
use plimsoll_kernels::ops::gemm::Best;
use plimsoll_kernels::ops::sampling::{
    BIASES_MAX, Bias, PromptRow, SampleArguments, SampleResult, SampleRow, Sampling, SeenArguments,
    SlotParameters,
};
use plimsoll_kernels::reference::random::{bits, uniform};
use plimsoll_kernels::reference::sampling::{self as reference, Penalties, Seen};
use plimsoll_kernels::reference::softmax::log_sum_exp;

const SLOTS: usize = 24;

/// One row as its slot wants it drawn.
#[derive(Clone, Debug)]
struct Wish {
    slot: usize,
    position: i32,
    sampling: reference::Sampling,
    penalties: Penalties,
    /// Prompt, then generated.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    bias: Vec<(u32, f32)>,
    alternatives: Option<u32>,
    seed: u64,
}

const OPEN: reference::Sampling =
    reference::Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

fn plain(slot: usize, sampling: reference::Sampling) -> Wish {
    Wish {
        slot,
        position: 17,
        sampling,
        penalties: Penalties::OFF,
        tokens: vec![],
        prompt_tokens: 0,
        bias: vec![],
        alternatives: None,
        seed: 99,
    }
}

/// A stream of random numbers.
struct Dice(u64, u64);

impl Dice {
    fn next(&mut self) -> f64 {
        self.1 += 1;
        uniform(self.0, self.1)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() * n as f64) as usize
    }

    fn normal(&mut self) -> f32 {
        // Three uniform numbers are normal enough, and have tails where it matters here.
        ((self.next() + self.next() + self.next() - 1.5) * 2.0) as f32
    }
}

/// Logits of several kinds: flat, peaked, full of equals, all equal, with holes, far apart, both zeros.
fn logits(dice: &mut Dice, vocabulary: usize, kind: usize) -> Vec<f32> {
    let mut row: Vec<f32> = match kind {
        0 => (0..vocabulary).map(|_| dice.normal()).collect(),
        1 => (0..vocabulary).map(|_| dice.normal() * 3.0).collect(),
        2 => (0..vocabulary).map(|_| (dice.next() * 40.0).floor() as f32 / 2.0).collect(),
        3 => vec![1.25; vocabulary],
        4 => (0..vocabulary).map(|_| dice.normal() * 20.0).collect(),
        5 => (0..vocabulary).map(|_| [0.0, -0.0, 0.5, -0.5][dice.below(4)]).collect(),
        _ => (0..vocabulary).map(|_| dice.normal() * 1e-6 - 3.0).collect(),
    };
    match kind {
        1 => {
            for _ in 0..10 {
                let at = dice.below(vocabulary);
                row[at] = 12.0 + dice.normal();
            }
        }
        4 => {
            for _ in 0..vocabulary / 10 {
                let at = dice.below(vocabulary);
                row[at] = [f32::NAN, f32::NEG_INFINITY][dice.below(2)];
            }
        }
        _ => {}
    }
    row
}

fn wish(dice: &mut Dice, slot: usize, vocabulary: usize) -> Wish {
    let sampling = reference::Sampling {
        temperature: [0.0, 1.0, 0.7, 0.2 + dice.next() as f32 * 1.8][dice.below(4)],
        top_k: match dice.below(6) {
            0 => 1 + dice.below(8),
            1 => 1 + dice.below(100),
            2 => 1 + dice.below(vocabulary),
            _ => 0,
        },
        top_p: match dice.below(5) {
            0 => 0.9,
            1 => 0.01 + 0.99 * dice.next() as f32,
            2 => 1e-7,
            _ => 1.0,
        },
        min_p: if dice.below(3) == 0 { dice.next() as f32 * 0.2 } else { 0.0 },
    };
    let mut wish = plain(slot, sampling);
    wish.seed = (dice.next() * 1e18) as u64;
    wish.position = dice.below(100_000) as i32;
    if dice.below(3) == 0 {
        wish.penalties = Penalties {
            repetition: 0.5 + dice.next() as f32,
            presence: dice.next() as f32 - 0.5,
            frequency: dice.next() as f32 - 0.5,
        };
        let count = 1 + dice.below(300);
        wish.tokens = (0..count).map(|_| dice.below(vocabulary) as u32).collect();
        wish.prompt_tokens = dice.below(count + 1);
    }
    if dice.below(4) == 0 {
        let most = if dice.below(2) == 0 { 8 } else { BIASES_MAX };
        let count = 1 + dice.below(most);
        wish.bias =
            (0..count).map(|_| (dice.below(vocabulary) as u32, dice.normal() * 4.0)).collect();
    }
    if dice.below(3) == 0 {
        wish.alternatives = Some(dice.below(21) as u32);
    }
    wish
}

#[derive(Debug)]
struct Want {
    token: Option<u32>,
    logprob: f32,
    rank: u32,
    top: Vec<(u32, f32)>,
}

fn seen(wish: &Wish) -> Vec<Seen> {
    let mut counts = BTreeMap::new();
    for (i, &token) in wish.tokens.iter().enumerate() {
        *counts.entry(token).or_insert(0) += u32::from(i >= wish.prompt_tokens);
    }
    counts.into_iter().map(|(token, generated)| Seen { token, generated }).collect()
}

/// As the CPU backend goes about it.
fn want(raw: &[f32], wish: &Wish) -> Want {
    let none = Want { token: None, logprob: 0.0, rank: 0, top: vec![] };
    if wish.alternatives.is_some()
        && reference::argmax(raw).is_none_or(|best| !raw[best as usize].is_finite())
    {
        return none;
    }
    let mut row = raw.to_vec();
    reference::penalize(&mut row, &seen(wish), &wish.penalties);
    reference::add_bias(&mut row, &wish.bias);
    let random = bits(wish.seed, wish.position as u64);
    let Some(token) = reference::sample(&row, &wish.sampling, random) else { return none };
    match wish.alternatives {
        Some(n) => want_report(raw, token, n),
        None => Want { token: Some(token), ..none },
    }
}

fn want_report(raw: &[f32], token: u32, alternatives: u32) -> Want {
    // What is not a number has no share.
    let numbers: Vec<f32> = raw.iter().copied().filter(|logit| !logit.is_nan()).collect();
    let shift = log_sum_exp(&numbers);
    let logprob = |token: u32| (f64::from(raw[token as usize]) - shift) as f32;
    let own = raw[token as usize];
    let before = |&(id, &x): &(usize, &f32)| x > own || (x == own && id < token as usize);
    let top = reference::top(raw, alternatives as usize);
    let numbers = top.into_iter().filter(|&token| raw[token as usize] > f32::NEG_INFINITY);
    Want {
        token: Some(token),
        logprob: logprob(token),
        rank: 1 + raw.iter().enumerate().filter(before).count() as u32,
        top: numbers.map(|token| (token, logprob(token))).collect(),
    }
}

fn assert_matches(got: &SampleResult, want: &Want, reports: bool, what: &str) {
    let Some(token) = want.token else {
        assert_eq!(got.failed, 1, "{what}: {got:?}");
        return;
    };
    assert_eq!((got.failed, got.token), (0, token), "{what}");
    if !reports {
        return;
    }
    assert_eq!(got.rank, want.rank, "{what}");
    let near = |a: f32, b: f32| (a - b).abs() <= 2e-6 * (1.0 + b.abs()) || a == b;
    assert!(near(got.logprob, want.logprob), "{what}: {} for {}", got.logprob, want.logprob);
    let top = &got.top[..got.tops as usize];
    let ids: Vec<u32> = top.iter().map(|top| top.token).collect();
    assert_eq!(ids, want.top.iter().map(|top| top.0).collect::<Vec<_>>(), "{what}");
    let all_near = top.iter().zip(&want.top).all(|(got, want)| near(got.logprob, want.1));
    assert!(all_near, "{what}: {top:?} for {:?}", want.top);
}

fn best(row: &[f32]) -> Vec<Best> {
    let best_of = |(tile, logits): (usize, &[f32])| {
        let at = reference::argmax(logits);
        let logit = at.map_or(f32::NEG_INFINITY, |at| logits[at as usize]);
        Best { logit, token: tile as u32 * 64 + at.unwrap_or(0) }
    };
    row.chunks(64).enumerate().map(best_of).collect()
}

/// `seen` counts travel as the bits of bf16, which are plain.
type Count = bf16;

struct Outcome {
    results: Vec<SampleResult>,
    last_tokens: Vec<i32>,
    counts: Vec<u16>,
    seen_stride: usize,
}

enum How {
    Sample,
    With(u32),
    Greedy,
    Prompt(Vec<PromptRow>),
}

fn flat<T: Plain>(rows: &[Vec<T>]) -> Vec<T> {
    rows.iter().flatten().copied().collect()
}

fn parameters(wish: &Wish) -> SlotParameters {
    let Wish { sampling, penalties, .. } = wish;
    SlotParameters {
        scale: SlotParameters::scale_of(sampling.temperature),
        floor: SlotParameters::floor_of(sampling.temperature, sampling.min_p),
        top_p: sampling.top_p,
        top_k: sampling.top_k as u32,
        repetition: penalties.repetition,
        presence: penalties.presence,
        frequency: penalties.frequency,
        penalised: i32::from(*penalties != Penalties::OFF),
        biases: wish.bias.len() as i32,
        alternatives: wish.alternatives.map_or(-1, |n| n as i32),
        seed: wish.seed,
    }
}

fn run(device: &Device, rows: &[Vec<f32>], wishes: &[Option<Wish>], how: &How) -> Outcome {
    let kernels = Sampling::load(device).unwrap();
    let vocabulary = rows[0].len();
    let stride = vocabulary.next_multiple_of(4) + 4 * (rows.len() % 3);
    let seen_stride = vocabulary.next_multiple_of(8);
    let padded: Vec<Vec<f32>> = rows
        .iter()
        .map(|row| {
            let mut row = row.clone();
            row.resize(stride, f32::NAN);
            row
        })
        .collect();
    let logits = support::there(device, &flat(&padded));
    let scratch = support::poisoned(device, rows.len() * stride * 4);
    let best_rows: Vec<f32> = rows
        .iter()
        .flat_map(|row| best(row))
        .flat_map(|best| [best.logit, f32::from_bits(best.token)])
        .collect();
    let best = support::there(device, &best_rows);
    let mut slots = vec![SlotParameters::GREEDY; SLOTS];
    let mut biases = vec![Bias { token: u32::MAX, bias: f32::NAN }; SLOTS * BIASES_MAX];
    let seen = support::poisoned(device, SLOTS * seen_stride * 2);
    let last_tokens = support::there(device, &[-7i32; SLOTS]);
    let mut infos = Vec::new();
    for wish in wishes {
        let Some(wish) = wish else {
            infos.push(SampleRow::PADDING);
            continue;
        };
        infos.push(SampleRow { slot: wish.slot as i32, position: wish.position });
        slots[wish.slot] = parameters(wish);
        let mut list: Vec<Bias> =
            wish.bias.iter().map(|&(token, bias)| Bias { token, bias }).collect();
        list.sort_by_key(|bias| bias.token);
        biases[wish.slot * BIASES_MAX..][..list.len()].copy_from_slice(&list);
        if slots[wish.slot].penalised != 0 {
            let tokens: Vec<i32> = wish.tokens.iter().map(|token| token.cast_signed()).collect();
            let tokens = support::there(device, &tokens);
            let arguments = SeenArguments {
                seen: seen.pointer(),
                tokens: tokens.pointer(),
                seen_stride: seen_stride as i64,
                slot: wish.slot as i32,
                count: wish.tokens.len() as i32,
                prompt_tokens: wish.prompt_tokens as i32,
                vocabulary: vocabulary as i32,
            };
            kernels.start(device, &arguments).unwrap();
            device.synchronize().unwrap();
        }
    }
    let (slots, biases) = (support::there(device, &slots), support::there(device, &biases));
    let (infos, epoch) = (support::there(device, &infos), support::there(device, &[5u32]));
    let results_max = wishes.len().max(1) + 1;
    let results = device.pinned::<SampleResult>(3 * results_max).unwrap();
    let prompts = match how {
        How::Prompt(prompts) => support::there(device, prompts),
        _ => support::there(device, &[PromptRow::PADDING]),
    };
    let arguments = SampleArguments {
        logits: logits.pointer(),
        scratch: scratch.pointer(),
        best: best.pointer(),
        stride: stride as i32,
        tiles: vocabulary.div_ceil(64) as i32,
        vocabulary: vocabulary as i32,
        seen_stride: seen_stride as i32,
        rows: infos.pointer(),
        prompts: prompts.pointer(),
        parameters: slots.pointer(),
        seen: seen.pointer(),
        biases: biases.pointer(),
        last_tokens: last_tokens.pointer(),
        results: results.pointer(),
        epoch: epoch.pointer(),
        ring: 3,
        results_max: results_max as i32,
    };
    let count = wishes.len();
    match how {
        How::Sample => kernels.sample(device, &arguments, count),
        How::With(ranks) => kernels.sample_with(device, &arguments, count, *ranks),
        How::Greedy => kernels.greedy(device, &arguments, count),
        How::Prompt(_) => kernels.prompt_logprobs(device, &arguments, count),
    }
    .unwrap();
    device.synchronize().unwrap();
    // The logits are what they were.
    let after: Vec<f32> = support::back(device, &logits, stride * rows.len());
    let unchanged =
        after.iter().zip(padded.iter().flatten()).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(unchanged, "logits are never modified");
    let counts: Vec<Count> = support::back(device, &seen, SLOTS * seen_stride);
    Outcome {
        results: (0..count).map(|row| results.read(5 % 3 * results_max + row)).collect(),
        last_tokens: support::back(device, &last_tokens, SLOTS),
        counts: counts.into_iter().map(bf16::to_bits).collect(),
        seen_stride,
    }
}

fn check(outcome: &Outcome, rows: &[Vec<f32>], wishes: &[Option<Wish>], what: &str) {
    let mut wanted_tokens = vec![-7; SLOTS];
    for (i, wish) in wishes.iter().enumerate() {
        let result = &outcome.results[i];
        let Some(wish) = wish else {
            assert_eq!(result.epoch, 0, "{what}: padding writes nothing");
            continue;
        };
        assert_eq!(result.epoch, 5, "{what}: row {i}");
        let want = want(&rows[i], wish);
        let what = format!("{what}, row {i} of {} tokens: {}", rows[i].len(), short(wish));
        assert_matches(result, &want, wish.alternatives.is_some(), &what);
        wanted_tokens[wish.slot] = want.token.map_or(0, |token| token as i32);
        if wish.penalties != Penalties::OFF {
            let counts = &outcome.counts[wish.slot * outcome.seen_stride..][..rows[i].len()];
            let mut wanted = vec![0u16; rows[i].len()];
            for (at, &token) in wish.tokens.iter().enumerate() {
                let count = &mut wanted[token as usize];
                *count = if at < wish.prompt_tokens { *count | 1 << 15 } else { *count + 1 };
            }
            if let Some(token) = want.token {
                wanted[token as usize] += 1;
            }
            assert!(counts == wanted, "{what}: counts of what was seen");
        }
    }
    assert_eq!(outcome.last_tokens, wanted_tokens, "{what}");
}

fn short(wish: &Wish) -> String {
    let Wish { sampling, penalties, bias, alternatives, position, seed, .. } = wish;
    let biases = bias.len();
    format!("{sampling:?} {penalties:?}, {biases} biases, {alternatives:?}, {seed} at {position}")
}

fn random_case(
    seed: u64,
    vocabulary: usize,
    count: usize,
    kinds: &[usize],
) -> (Vec<Vec<f32>>, Vec<Option<Wish>>) {
    let mut dice = Dice(seed, 0);
    let rows = (0..count)
        .map(|_| {
            let kind = kinds[dice.below(kinds.len())];
            logits(&mut dice, vocabulary, kind)
        })
        .collect();
    let wishes = (0..count)
        .map(|i| (dice.below(8) > 0).then(|| wish(&mut dice, (i * 7 + 3) % SLOTS, vocabulary)))
        .collect();
    (rows, wishes)
}

#[test]
fn the_same_logits_give_the_references_token_whatever_is_wished() {
    let Some(device) = support::device() else { return };
    for (seed, vocabulary) in
        [64, 65, 100, 127, 1000, 4097, 5003, 9999, 32_000, 50_257, 64, 300, 1999, 12_345]
            .into_iter()
            .enumerate()
    {
        let count = if vocabulary > 20_000 { 12 } else { 24 };
        let (rows, wishes) = random_case(seed as u64, vocabulary, count, &[0, 1, 2, 4, 5, 6]);
        let outcome = run(&device, &rows, &wishes, &How::Sample);
        check(&outcome, &rows, &wishes, &format!("seed {seed}"));
    }
}

#[test]
fn large_vocabularies_too() {
    let Some(device) = support::device() else { return };
    for (seed, vocabulary) in [128_256, 151_936, 262_144].into_iter().enumerate() {
        let (rows, wishes) = random_case(100 + seed as u64, vocabulary, 7, &[0, 1, 2, 4]);
        let outcome = run(&device, &rows, &wishes, &How::Sample);
        check(&outcome, &rows, &wishes, &format!("seed {seed}"));
    }
}

#[test]
fn rows_of_equals_are_cut_exactly() {
    let Some(device) = support::device() else { return };
    for vocabulary in [70, 3000, 40_001] {
        let rows: Vec<Vec<f32>> = (0..10)
            .map(|i| logits(&mut Dice(i, 0), vocabulary, if i % 2 == 0 { 3 } else { 5 }))
            .collect();
        let wishes: Vec<Option<Wish>> = (0..10)
            .map(|i| {
                let mut wish = plain(i, OPEN);
                wish.position = i as i32;
                match i / 2 {
                    0 => wish.sampling.top_k = vocabulary / 2,
                    1 => wish.sampling.top_p = 0.4,
                    2 => wish.sampling.min_p = 0.9,
                    3 => wish.alternatives = Some(20),
                    _ => (wish.sampling.top_k, wish.sampling.top_p) = (2000, 0.7),
                }
                Some(wish)
            })
            .collect();
        let outcome = run(&device, &rows, &wishes, &How::Sample);
        check(&outcome, &rows, &wishes, &format!("{vocabulary} equals"));
    }
}

#[test]
fn the_number_of_blocks_to_a_row_changes_no_bit() {
    let Some(device) = support::device() else { return };
    let (rows, wishes) = random_case(7, 20_011, 16, &[0, 1, 2, 4]);
    let bits = |outcome: &Outcome| -> Vec<String> {
        let of = |result: &SampleResult| {
            // What a result leaves open holds nothing.
            let top = &result.top[..result.tops as usize];
            format!(
                "{} {} {:08x} {} {top:?}",
                result.token,
                result.failed,
                result.logprob.to_bits(),
                result.rank
            )
        };
        outcome.results.iter().map(of).collect()
    };
    let one = run(&device, &rows, &wishes, &How::With(1));
    check(&one, &rows, &wishes, "one block");
    if !device.is_hopper() {
        return;
    }
    for ranks in [2, 3, 4, 5, 6, 7, 8, 8] {
        let more = run(&device, &rows, &wishes, &How::With(ranks));
        assert_eq!(bits(&one), bits(&more), "{ranks} blocks");
    }
}

#[test]
fn draws_follow_the_seed_and_the_position() {
    let Some(device) = support::device() else { return };
    let row = logits(&mut Dice(1, 0), 3000, 0);
    let rows = vec![row; 20];
    let wishes: Vec<Option<Wish>> = (0..20)
        .map(|i| Some(Wish { position: (i % 10) as i32, seed: i as u64 / 10, ..plain(i, OPEN) }))
        .collect();
    let outcome = run(&device, &rows, &wishes, &How::Sample);
    check(&outcome, &rows, &wishes, "seeds");
    let tokens: std::collections::BTreeSet<u32> = outcome.results.iter().map(|r| r.token).collect();
    assert!(tokens.len() > 10, "{tokens:?}");
}

#[test]
fn logits_without_a_number_say_so_and_infinity_wins() {
    let Some(device) = support::device() else { return };
    let mut rows = vec![vec![f32::NAN; 500]; 4];
    rows[1] = vec![f32::NEG_INFINITY; 500];
    rows[2][77] = f32::INFINITY;
    rows[3][78] = 1.0;
    let wishes: Vec<Option<Wish>> = (0..4).map(|i| Some(plain(i, OPEN))).collect();
    let outcome = run(&device, &rows, &wishes, &How::Sample);
    check(&outcome, &rows, &wishes, "few numbers");
    let outcome = run(&device, &rows, &wishes, &How::Greedy);
    let failed: Vec<u32> = outcome.results.iter().map(|result| result.failed).collect();
    assert_eq!(failed, [1, 1, 0, 0]);
    let reports: Vec<Option<Wish>> =
        (0..4).map(|i| Some(Wish { alternatives: Some(3), ..plain(i, OPEN) })).collect();
    let outcome = run(&device, &rows, &reports, &How::Sample);
    check(&outcome, &rows, &reports, "few numbers, reported");
}

#[test]
fn the_greedy_path_takes_the_lowest_of_the_largest() {
    let Some(device) = support::device() else { return };
    for vocabulary in [64, 129, 50_257, 128_256] {
        let rows: Vec<Vec<f32>> = (0..20)
            .map(|i| logits(&mut Dice(i, 0), vocabulary, [0, 2, 4, 5][i as usize % 4]))
            .collect();
        let wishes: Vec<Option<Wish>> =
            (0..20).map(|i| (i != 3).then(|| plain(i, reference::Sampling::GREEDY))).collect();
        let outcome = run(&device, &rows, &wishes, &How::Greedy);
        check(&outcome, &rows, &wishes, "greedy");
    }
}

#[test]
fn prompt_tokens_are_reported_under_the_raw_logits() {
    let Some(device) = support::device() else { return };
    for vocabulary in [64, 1000, 30_001] {
        let mut dice = Dice(vocabulary as u64, 0);
        let rows: Vec<Vec<f32>> =
            (0..6).map(|i| logits(&mut dice, vocabulary, [0, 1, 2, 3, 5, 6][i])).collect();
        let prompts: Vec<PromptRow> = (0..9)
            .map(|i| match i {
                4 => PromptRow::PADDING,
                _ => PromptRow {
                    row: dice.below(6) as i32,
                    token: dice.below(vocabulary) as i32,
                    alternatives: [0, 1, 5, 20][i % 4],
                    unused: 0,
                },
            })
            .collect();
        let wishes = vec![None; 9];
        let outcome = run(&device, &rows, &wishes, &How::Prompt(prompts.clone()));
        for (prompt, result) in prompts.iter().zip(&outcome.results) {
            if prompt.row < 0 {
                assert_eq!(result.epoch, 0);
                continue;
            }
            let want = want_report(
                &rows[prompt.row as usize],
                prompt.token as u32,
                prompt.alternatives as u32,
            );
            assert_matches(result, &want, true, &format!("{prompt:?} of {vocabulary}"));
        }
    }
}

#[test]
fn small_shapes_for_the_memory_checker() {
    let Some(device) = support::device() else { return };
    for (seed, vocabulary) in [67, 700].into_iter().enumerate() {
        let (rows, wishes) = random_case(40 + seed as u64, vocabulary, 12, &[0, 2, 3]);
        let outcome = run(&device, &rows, &wishes, &How::Sample);
        check(&outcome, &rows, &wishes, &format!("seed {seed}"));
        if device.is_hopper() {
            let outcome = run(&device, &rows, &wishes, &How::With(4));
            check(&outcome, &rows, &wishes, &format!("seed {seed}, four blocks"));
        }
        let greedy: Vec<Option<Wish>> =
            (0..12).map(|i| Some(plain(i, reference::Sampling::GREEDY))).collect();
        check(&run(&device, &rows, &greedy, &How::Greedy), &rows, &greedy, "greedy");
    }
}
