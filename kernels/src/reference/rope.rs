//! Rotary position embedding (Su et al. 2021): inverse frequencies for each scaling kind, cos/sin
//! tables, and the rotation itself.
//!
//! Head dimensions pair as checkpoints of the Llama family store them: `i` with `i + dims/2`.

use std::f64::consts::TAU;

/// How a checkpoint stretches its positions (`rope_scaling` or `rope_parameters` in config.json).
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// No stretching.
    Default,
    /// Position interpolation, Chen et al. 2023: every frequency divided by `factor`.
    Linear { factor: f64 },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between; the
    /// formula stands in Meta's reference code for Llama 3.1 (`apply_scaling`).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        /// Positions the model was trained on before it was stretched.
        original_positions: usize,
    },
    /// YaRN, Peng et al. 2023, section 3: interpolation by parts of the spectrum plus a softmax
    /// temperature.
    Yarn {
        factor: f64,
        original_positions: usize,
        /// Rotations over the original length above which a dimension is left alone; the paper's 32.
        beta_fast: f64,
        /// Rotations below which a dimension is fully interpolated; the paper's 1.
        beta_slow: f64,
        /// Multiplies cos and sin; absent: the paper's `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
    },
}

/// What a head's rotation needs to know, apart from the position.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// Radians per position, `[dims / 2]`, fastest first.
    pub inverse: Vec<f32>,
    /// Multiplies cos and sin, so that query·key grows by its square; 1 except under YaRN.
    pub attention_factor: f32,
}

/// Inverse frequencies `theta^(-2i/dims)`, stretched as `scaling` says.
///
/// `dims` is the number of rotated dimensions of a head (all of them in the families we run).
#[must_use]
pub fn frequencies(theta: f64, dims: usize, scaling: &Scaling) -> Frequencies {
    assert!(dims > 0 && dims.is_multiple_of(2), "RoPE rotates pairs of dimensions");
    let plain = (0..dims / 2).map(|i| theta.powf(-2.0 * i as f64 / dims as f64));
    let inverse: Vec<f32> = match *scaling {
        Scaling::Default => plain.map(|f| f as f32).collect(),
        Scaling::Linear { factor } => plain.map(|f| (f / factor) as f32).collect(),
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
            let ramp = |f: f64| {
                let turns = original_positions as f64 * f / TAU;
                (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
            };
            plain.map(|f| blend(f, factor, ramp(f)) as f32).collect()
        }
        Scaling::Yarn { factor, original_positions, beta_fast, beta_slow, .. } => {
            let dimension = |turns| correction_dimension(turns, theta, dims, original_positions);
            let low = dimension(beta_fast).floor().max(0.0);
            let high = dimension(beta_slow).ceil().min(dims as f64 - 1.0);
            // Equal ends would divide by zero; the paper's code widens them by a thousandth.
            let width = if high == low { 0.001 } else { high - low };
            plain
                .enumerate()
                .map(|(i, f)| blend(f, factor, 1.0 - (i as f64 - low) / width) as f32)
                .collect()
        }
    };
    Frequencies { inverse, attention_factor: attention_factor(scaling) as f32 }
}

/// `share` of the plain frequency, the rest of the interpolated one; `share` is clamped to `[0, 1]`.
fn blend(frequency: f64, factor: f64, share: f64) -> f64 {
    let share = share.clamp(0.0, 1.0);
    share * frequency + (1.0 - share) * frequency / factor
}

/// The dimension whose wavelength turns `turns` times over the original length (YaRN, equation 15
/// solved for the dimension).
fn correction_dimension(turns: f64, theta: f64, dims: usize, original_positions: usize) -> f64 {
    let positions_per_radian = original_positions as f64 / (turns * TAU);
    dims as f64 * positions_per_radian.ln() / (2.0 * theta.ln())
}

fn attention_factor(scaling: &Scaling) -> f64 {
    match *scaling {
        Scaling::Yarn { attention_factor: Some(given), .. } => given,
        Scaling::Yarn { factor, .. } if factor > 1.0 => 0.1 * factor.ln() + 1.0,
        _ => 1.0,
    }
}

impl Frequencies {
    /// Cosines and sines of one position, the attention factor multiplied in. Each `[dims / 2]`.
    pub fn cos_sin(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        assert_eq!(cos.len(), self.inverse.len(), "one cosine per pair");
        assert_eq!(sin.len(), self.inverse.len(), "one sine per pair");
        let factor = f64::from(self.attention_factor);
        for ((&inverse, cos), sin) in self.inverse.iter().zip(cos).zip(sin) {
            let (s, c) = (position as f64 * f64::from(inverse)).sin_cos();
            (*cos, *sin) = ((c * factor) as f32, (s * factor) as f32);
        }
    }
}

/// Cosines and sines of positions `0..positions`, computed once when a model is loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    cos: Vec<f32>, // [positions, dims / 2]
    sin: Vec<f32>, // [positions, dims / 2]
    pairs: usize,
}

impl Table {
    #[must_use]
    pub fn new(frequencies: &Frequencies, positions: usize) -> Self {
        let pairs = frequencies.inverse.len();
        let (mut cos, mut sin) = (vec![0.0; positions * pairs], vec![0.0; positions * pairs]);
        let rows = cos.chunks_exact_mut(pairs).zip(sin.chunks_exact_mut(pairs));
        for (position, (cos, sin)) in rows.enumerate() {
            frequencies.cos_sin(position, cos, sin);
        }
        Self { cos, sin, pairs }
    }

    /// Cosines and sines of one position, each `[dims / 2]`.
    #[must_use]
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let row = position * self.pairs..(position + 1) * self.pairs;
        (&self.cos[row.clone()], &self.sin[row])
    }
}

/// Rotates each head of one token: `(a, b) → (a·cos − b·sin, b·cos + a·sin)` for the pairs
/// `a = head[i]`, `b = head[i + dims/2]`.
///
/// `heads` `[heads, head_dim]` in place; `cos` and `sin` `[dims / 2]`. Dimensions past `dims` stay.
pub fn rotate(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    assert_eq!(heads.len() % head_dim, 0, "the input holds whole heads");
    assert!(2 * cos.len() <= head_dim, "a head holds all rotated dimensions");
    for head in heads.chunks_exact_mut(head_dim) {
        let (first, rest) = head.split_at_mut(cos.len());
        for (((a, b), &cos), &sin) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f32, want: f64) {
        assert!((f64::from(got) - want).abs() <= 2e-7 * want.abs(), "{got} against {want}");
    }

    #[test]
    fn plain_frequencies_fall_geometrically_from_one() {
        let frequencies = frequencies(10_000.0, 8, &Scaling::Default);
        for (got, want) in frequencies.inverse.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            close(*got, want);
        }
        assert_eq!(frequencies.attention_factor, 1.0);
    }

    #[test]
    fn linear_scaling_slows_every_pair_alike() {
        let frequencies = frequencies(10_000.0, 4, &Scaling::Linear { factor: 4.0 });
        close(frequencies.inverse[0], 0.25);
        close(frequencies.inverse[1], 0.0025);
    }

    // Llama 3.1's own numbers, dims 128: pair 0 is fast and stays, pair 63 is slow and is divided
    // by 8. Pair 32 turns 8192 · 500000^-0.5 / 2π = 1.8438 times: a share of (1.8438 − 1)/3 stays.
    #[test]
    fn llama3_keeps_fast_pairs_divides_slow_ones_and_blends_between() {
        let scaling = Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 8192,
        };
        let scaled = frequencies(500_000.0, 128, &scaling);
        let plain = frequencies(500_000.0, 128, &Scaling::Default);
        assert_eq!(scaled.inverse[0], 1.0);
        close(scaled.inverse[63], f64::from(plain.inverse[63]) / 8.0);
        let middle = 500_000f64.powf(-0.5);
        let share = (8192.0 * middle / TAU - 1.0) / 3.0;
        close(scaled.inverse[32], middle * (share + (1.0 - share) / 8.0));
        assert!((share - 0.281_26).abs() < 1e-4, "{share}");
    }

    // Qwen2.5's YaRN with dims 128: the ramp runs from pair floor(23.59) = 23 to ceil(39.64) = 40.
    #[test]
    fn yarn_ramps_between_the_corrected_dimensions_and_warms_the_softmax() {
        let scaling = Scaling::Yarn {
            factor: 4.0,
            original_positions: 32_768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
        };
        let scaled = frequencies(1_000_000.0, 128, &scaling);
        let plain = frequencies(1_000_000.0, 128, &Scaling::Default);
        for i in 0..=23 {
            assert_eq!(scaled.inverse[i], plain.inverse[i], "pair {i} turns fast and stays");
        }
        for i in 40..64 {
            close(scaled.inverse[i], f64::from(plain.inverse[i]) / 4.0);
        }
        let (share, pair) = (1.0 - 7.0 / 17.0, f64::from(plain.inverse[30]));
        close(scaled.inverse[30], pair * (share + (1.0 - share) / 4.0));
        close(scaled.attention_factor, 1.138_629_436);
    }

    #[test]
    fn a_given_attention_factor_wins_over_the_formula() {
        let scaling = Scaling::Yarn {
            factor: 4.0,
            original_positions: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: Some(1.0),
        };
        assert_eq!(frequencies(10_000.0, 64, &scaling).attention_factor, 1.0);
    }

    #[test]
    fn a_quarter_turn_carries_the_first_half_into_the_second() {
        let mut heads = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut heads, 4, &[0.0, 1.0], &[1.0, 0.0]);
        assert_eq!(heads, [-3.0, 2.0, 1.0, 4.0]);
    }

    #[test]
    fn query_times_key_depends_on_their_distance_alone() {
        let table = Table::new(&frequencies(10_000.0, 8, &Scaling::Default), 200);
        let product = |query_at: usize, key_at: usize| -> f32 {
            let mut q = [0.3, -1.0, 0.8, 0.1, 2.0, 0.0, -0.4, 0.9];
            let mut k = [1.1, 0.2, -0.7, 0.5, 0.3, -1.5, 0.6, 0.2];
            for (heads, position) in [(&mut q, query_at), (&mut k, key_at)] {
                let (cos, sin) = table.at(position);
                rotate(heads, 8, cos, sin);
            }
            q.iter().zip(k).map(|(q, k)| q * k).sum()
        };
        assert!((product(17, 5) - product(190, 178)).abs() < 1e-5);
        assert!((product(17, 5) - product(17, 6)).abs() > 1e-2);
    }
}
