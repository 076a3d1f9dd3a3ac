//! Cuts and draws against values worked by hand, and against a slow version of the same definition.

use super::*;
use crate::reference::random::{bits, uniform};

const OPEN: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

/// Logits whose probabilities are 0.5, 0.25, 0.125 and 0.125, in a mixed order of ids.
fn halves() -> [f32; 4] {
    [0.125f32.ln(), 0.5f32.ln(), 0.125f32.ln(), 0.25f32.ln()]
}

fn kept(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
    let cut = cut(logits, sampling).unwrap();
    survivors(logits, cut).map(|(token, _)| token).collect()
}

#[test]
fn repetition_shrinks_positive_logits_and_deepens_negative_ones_also_of_the_prompt() {
    let mut logits = [2.0, -2.0, 2.0];
    let seen = [Seen { token: 0, generated: 0 }, Seen { token: 1, generated: 3 }];
    penalize(&mut logits, &seen, &Penalties { repetition: 2.0, ..Penalties::OFF });
    assert_eq!(logits, [1.0, -4.0, 2.0]);
}

#[test]
fn presence_counts_once_and_frequency_each_time_and_neither_for_the_prompt() {
    let mut logits = [1.0, 1.0, 1.0];
    let seen = [Seen { token: 0, generated: 0 }, Seen { token: 2, generated: 3 }];
    let penalties = Penalties { presence: 0.5, frequency: 0.25, ..Penalties::OFF };
    penalize(&mut logits, &seen, &penalties);
    assert_eq!(logits, [1.0, 1.0, -0.25]);
}

#[test]
fn penalties_that_are_off_change_nothing() {
    let mut logits = [1.5, -0.5];
    let seen = [Seen { token: 0, generated: 9 }, Seen { token: 1, generated: 9 }];
    penalize(&mut logits, &seen, &Penalties::OFF);
    assert_eq!(logits, [1.5, -0.5]);
}

#[test]
fn a_bias_moves_its_own_token_only() {
    let mut logits = [0.0, 0.0, 0.0];
    add_bias(&mut logits, &[(1, -100.0), (2, 4.0)]);
    assert_eq!(logits, [0.0, -100.0, 4.0]);
}

#[test]
fn ties_go_to_the_lowest_id_and_what_is_not_a_number_never_wins() {
    assert_eq!(argmax(&[1.0, 3.0, 3.0]), Some(1));
    assert_eq!(argmax(&[f32::NAN, -5.0, f32::NAN]), Some(1));
    assert_eq!(argmax(&[f32::NEG_INFINITY, f32::NAN]), None);
    assert_eq!(sample(&[f32::NEG_INFINITY; 2], &OPEN, 0), None);
}

#[test]
fn top_k_keeps_exactly_k_also_among_equals() {
    assert_eq!(kept(&halves(), &Sampling { top_k: 3, ..OPEN }), [0, 1, 3]);
    assert_eq!(kept(&[7.0; 5], &Sampling { top_k: 2, ..OPEN }), [0, 1]);
    assert_eq!(kept(&halves(), &Sampling { top_k: 9, ..OPEN }), [0, 1, 2, 3]);
}

#[test]
fn top_p_stops_at_the_token_that_reaches_the_sum_and_keeps_at_least_one() {
    assert_eq!(kept(&halves(), &Sampling { top_p: 0.5, ..OPEN }), [1]);
    assert_eq!(kept(&halves(), &Sampling { top_p: 0.51, ..OPEN }), [1, 3]);
    assert_eq!(kept(&halves(), &Sampling { top_p: 0.76, ..OPEN }), [0, 1, 3]);
    assert_eq!(kept(&halves(), &Sampling { top_p: 1e-9, ..OPEN }), [1]);
}

#[test]
fn top_p_is_a_share_of_what_top_k_left() {
    // Of 0.5 and 0.25, two thirds and one third are left.
    assert_eq!(kept(&halves(), &Sampling { top_k: 2, top_p: 0.66, ..OPEN }), [1]);
    assert_eq!(kept(&halves(), &Sampling { top_k: 2, top_p: 0.67, ..OPEN }), [1, 3]);
}

#[test]
fn min_p_is_a_fraction_of_the_most_likely_at_the_given_temperature() {
    assert_eq!(kept(&halves(), &Sampling { min_p: 0.49, ..OPEN }), [1, 3]);
    assert_eq!(kept(&halves(), &Sampling { min_p: 0.51, ..OPEN }), [1]);
    // At temperature 2 the ratios are their square roots: 0.707 and 0.5.
    let warm = Sampling { temperature: 2.0, ..OPEN };
    assert_eq!(kept(&halves(), &Sampling { min_p: 0.51, ..warm }), [1, 3]);
    assert_eq!(kept(&halves(), &Sampling { min_p: 0.49, ..warm }), [0, 1, 2, 3]);
}

#[test]
fn the_draw_walks_the_line_in_order_of_ids() {
    // Shares by id: 1/8, 1/2, 1/8, 1/4.
    let at = |share: f64| sample(&halves(), &OPEN, (share * 2f64.powi(64)) as u64).unwrap();
    assert_eq!([at(0.0), at(0.12), at(0.13), at(0.62)], [0, 0, 1, 1]);
    assert_eq!([at(0.63), at(0.74), at(0.76), at(0.999)], [2, 2, 3, 3]);
    assert_eq!(sample(&halves(), &OPEN, u64::MAX), Some(3));
}

#[test]
fn temperature_zero_ignores_chance_and_so_does_an_infinite_logit() {
    for random in [0, 1 << 63, u64::MAX] {
        assert_eq!(sample(&halves(), &Sampling::GREEDY, random), Some(1));
        assert_eq!(sample(&[0.0, f32::INFINITY], &OPEN, random), Some(1));
    }
}

#[test]
fn a_hundred_thousand_draws_follow_the_probabilities() {
    let mut counts = [0u32; 4];
    for position in 0..100_000 {
        counts[sample(&halves(), &OPEN, bits(3, position)).unwrap() as usize] += 1;
    }
    for (count, expected) in counts.into_iter().zip([12_500, 50_000, 12_500, 25_000]) {
        // Five standard deviations of the widest are 790.
        assert!(count.abs_diff(expected) < 790, "{counts:?}");
    }
}

#[test]
fn shares_are_exponentials_in_forty_bits_and_the_largest_is_exact() {
    assert_eq!(share(3.0, 3.0, scale_of(0.7)), 1 << 40);
    assert_eq!(share(f32::NEG_INFINITY, 3.0, scale_of(0.7)), 0);
    assert_eq!(share(-30.0, 3.0, scale_of(1.0)), 0);
    assert_eq!(
        (share(0.0, 0.0, scale_of(1e-45)), share(-1e-6, 0.0, scale_of(1e-45))),
        (1 << 40, 0)
    );
    for i in 0..10_000 {
        let logit = (uniform(5, i) * -25.0) as f32;
        let exact = (f64::from(logit) / 0.9).exp() * 2f64.powi(40);
        let got = share(logit, 0.0, scale_of(0.9)) as f64;
        // The argument itself carries an error of a few 2^-24.
        let error = (got - exact).abs();
        assert!(error <= 1.0 + exact * 6e-6, "e^({logit} / 0.9): {got} against {exact}");
    }
}

#[test]
fn both_zeros_are_equal_and_rank_by_id() {
    assert_eq!(top(&[-0.0, 0.0, 1.0], 3), [2, 0, 1]);
    assert_eq!(kept(&[-0.0, 0.0], &Sampling { top_k: 1, ..OPEN }), [0]);
}

/// The definition, word by word: sort everything, then walk.
fn kept_slowly(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
    let mut ranked: Vec<u32> = (0..logits.len() as u32).collect();
    ranked.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    let max = logits[ranked[0] as usize];
    let scale = scale_of(sampling.temperature);
    let share = |token: &u32| share(logits[*token as usize], max, scale);
    let floor = max + sampling.temperature * sampling.min_p.ln();
    ranked.retain(|&token| logits[token as usize] >= floor);
    if sampling.top_k > 0 {
        ranked.truncate(sampling.top_k);
    }
    if sampling.top_p == 1.0 {
        ranked.sort_unstable();
        return ranked;
    }
    let total: u64 = ranked.iter().map(share).sum();
    let wanted = (f64::from(sampling.top_p) * total as f64) as u64;
    let mut sum = 0;
    let reached = ranked.iter().position(|token| {
        sum += share(token);
        sum >= wanted
    });
    ranked.truncate(reached.map_or(ranked.len(), |last| last + 1));
    ranked.sort_unstable();
    ranked
}

#[test]
fn every_cut_agrees_with_sorting_the_whole_vocabulary() {
    for seed in 0..500 {
        let mut at = 0;
        let mut next = || {
            at += 1;
            uniform(seed, at)
        };
        let vocabulary = 1 + (next() * 1500.0) as usize;
        // Coarse steps make ties frequent; a wide spread makes some shares vanish.
        let logits: Vec<f32> =
            (0..vocabulary).map(|_| (next() * 40.0) as i32 as f32 / 2.0).collect();
        let sampling = Sampling {
            temperature: 0.2 + next() as f32 * 8.0,
            top_k: if next() < 0.5 { 0 } else { 1 + (next() * 200.0) as usize },
            top_p: if next() < 0.3 { 1.0 } else { 0.01 + 0.99 * next() as f32 },
            min_p: if next() < 0.5 { 0.0 } else { next() as f32 },
        };
        let expected = kept_slowly(&logits, &sampling);
        assert_eq!(kept(&logits, &sampling), expected, "seed {seed}: {sampling:?}");
        let drawn = sample(&logits, &sampling, bits(seed, 0)).unwrap();
        assert!(expected.contains(&drawn), "seed {seed} drew {drawn}");
    }
}

#[test]
fn the_ranking_puts_equals_in_order_of_ids_and_nan_last() {
    assert_eq!(top(&[1.0, f32::NAN, 2.0, 1.0], 4), [2, 0, 3, 1]);
    assert_eq!(top(&[1.0, f32::NAN, 2.0, 1.0], 2), [2, 0]);
}

#[test]
fn logprobs_are_those_of_the_whole_row() {
    let logs = logprobs(&halves(), &[1, 0]);
    assert!((logs[0] - 0.5f32.ln()).abs() < 1e-6 && (logs[1] - 0.125f32.ln()).abs() < 1e-6);
}
