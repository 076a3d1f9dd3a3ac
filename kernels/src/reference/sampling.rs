//! From a row of logits to a token: penalties and biases, the cut, and the draw.
//!
//! In order: penalties, bias, temperature, then the survivors of min-p, of top-k and of top-p, then
//! one draw among them. Equal logits rank by token id, the lowest first, so every cut is exact. The
//! draw compares integers: shares of probability are rounded once to fixed point, their sums are
//! exact in any order, and any device with the same logits draws the same token.

use super::softmax::log_sum_exp;

/// How often a token has occurred in a request; one entry per distinct token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub token: u32,
    /// Times generated; 0 for a token that only the prompt contains.
    pub generated: u32,
}

/// What makes a token less likely for having occurred.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalties {
    /// Divides positive logits and multiplies negative ones of every seen token (Keskar et al. 2019,
    /// CTRL); 1 is off.
    pub repetition: f32,
    /// Subtracted once from every generated token (OpenAI); 0 is off.
    pub presence: f32,
    /// Subtracted per occurrence from every generated token (OpenAI); 0 is off.
    pub frequency: f32,
}

impl Penalties {
    pub const OFF: Self = Self { repetition: 1.0, presence: 0.0, frequency: 0.0 };
}

/// Applies the penalties to one row. `logits` `[vocabulary]`.
pub fn penalize(logits: &mut [f32], seen: &[Seen], penalties: &Penalties) {
    for &Seen { token, generated } in seen {
        let logit = &mut logits[token as usize];
        if *logit > 0.0 {
            *logit /= penalties.repetition;
        } else {
            *logit *= penalties.repetition;
        }
        if generated > 0 {
            *logit -= penalties.presence + penalties.frequency * generated as f32;
        }
    }
}

/// Adds the request's `logit_bias`. `logits` `[vocabulary]`.
pub fn add_bias(logits: &mut [f32], bias: &[(u32, f32)]) {
    for &(token, bias) in bias {
        logits[token as usize] += bias;
    }
}

/// How a token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps this many tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens until their probabilities (after top-k) reach this sum; 1 is off.
    pub top_p: f32,
    /// Keeps tokens at least this likely, as a fraction of the most likely one; 0 is off.
    pub min_p: f32,
}

impl Sampling {
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
}

/// The last token that survives a cut: everything that ranks before it survives too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    pub logit: f32,
    pub token: u32,
}

impl Cut {
    const NOTHING: Self = Self { logit: f32::NEG_INFINITY, token: u32::MAX };

    /// Whether a token ranks at or before the cut. A logit of −∞ or NaN never survives.
    #[must_use]
    pub fn keeps(self, token: u32, logit: f32) -> bool {
        let before = logit > self.logit || (logit == self.logit && token <= self.token);
        before && logit > f32::NEG_INFINITY
    }
}

/// The most likely token; the lowest id among equals; none if every logit is −∞ or NaN.
#[must_use]
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best = None;
    let mut max = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > max {
            (best, max) = (Some(token as u32), logit);
        }
    }
    best
}

/// Draws one token with the random bits of its seed and position ([`super::random::bits`]).
///
/// `logits` `[vocabulary]` after penalties and bias. None if every logit is −∞ or NaN.
#[must_use]
pub fn sample(logits: &[f32], sampling: &Sampling, random: u64) -> Option<u32> {
    let best = argmax(logits)?;
    if sampling.temperature == 0.0 || logits[best as usize] == f32::INFINITY {
        return Some(best);
    }
    let cut = cut(logits, sampling)?;
    Some(draw(logits, sampling.temperature, cut, random))
}

/// Where min-p, top-k and top-p end the ranking together. None if nothing can be drawn at all.
#[must_use]
pub fn cut(logits: &[f32], sampling: &Sampling) -> Option<Cut> {
    let max = logits[argmax(logits)? as usize];
    let mut cut = cut_min_p(max, sampling);
    if sampling.top_k > 0 && sampling.top_k < logits.len() {
        let last = top(logits, sampling.top_k).last().copied();
        let last = last.map(|token| Cut { logit: logits[token as usize], token });
        cut = tighter(cut, last.unwrap_or(Cut::NOTHING));
    }
    if sampling.top_p < 1.0 {
        cut = cut_top_p(logits, max, cut, sampling);
    }
    Some(cut)
}

/// `p ≥ min_p · p_max` in logits: `logit ≥ max + temperature · ln(min_p)`.
fn cut_min_p(max: f32, sampling: &Sampling) -> Cut {
    if sampling.min_p <= 0.0 {
        return Cut::NOTHING;
    }
    Cut { logit: max + sampling.temperature * sampling.min_p.ln(), token: u32::MAX }
}

fn tighter(a: Cut, b: Cut) -> Cut {
    if a.keeps(b.token, b.logit) { b } else { a }
}

/// The shortest run of the ranking, within `cut`, whose shares reach `top_p` of the survivors.
fn cut_top_p(logits: &[f32], max: f32, cut: Cut, sampling: &Sampling) -> Cut {
    let scale = scale_of(sampling.temperature);
    let share = |logit| share(logit, max, scale);
    let total: u64 = survivors(logits, cut).map(|(_, logit)| share(logit)).sum();
    let wanted = (f64::from(sampling.top_p) * total as f64) as u64;
    // A few tokens usually suffice, and ranking a whole vocabulary costs more than all the rest:
    // rank a short head of it, and a longer one only if that was not enough.
    let mut ranked = 64;
    loop {
        let mut sum = 0;
        for token in top(logits, ranked) {
            let logit = logits[token as usize];
            if !cut.keeps(token, logit) {
                return cut;
            }
            sum += share(logit);
            if sum >= wanted {
                return Cut { logit, token };
            }
        }
        if ranked >= logits.len() {
            return cut;
        }
        ranked *= 8;
    }
}

/// The survivor into whose share of the line the random bits fall; survivors lie in order of id.
fn draw(logits: &[f32], temperature: f32, cut: Cut, random: u64) -> u32 {
    let max = survivors(logits, cut).map(|(_, logit)| logit).fold(f32::NEG_INFINITY, f32::max);
    let scale = scale_of(temperature);
    let shares = || survivors(logits, cut).map(|(t, logit)| (t, share(logit, max, scale)));
    let total: u64 = shares().map(|(_, share)| share).sum();
    let point = ((u128::from(random) * u128::from(total)) >> 64) as u64;
    let mut sum = 0;
    shares()
        .find(|(_, share)| {
            sum += share;
            sum > point
        })
        .map(|(token, _)| token)
        .expect("the point lies below the sum of all shares")
}

fn survivors(logits: &[f32], cut: Cut) -> impl Iterator<Item = (u32, f32)> {
    let ranked = logits.iter().enumerate().map(|(token, &logit)| (token as u32, logit));
    ranked.filter(move |&(token, logit)| cut.keeps(token, logit))
}

/// Probability relative to the most likely token, with 40 bits after the point: 2^18 tokens of the
/// largest share still add up within 64 bits, and what is two trillion times less likely gets none.
///
/// `scale` is [`scale_of`] the temperature. Every step is one rounding of IEEE arithmetic, none of them
/// fused, so that `cuda/sampling.cuh` does the same to the last bit: 2^y = 2^n · 2^f with n the nearest
/// integer, and 2^f by a polynomial that is off by at most 3·10⁻⁷.
fn share(logit: f32, max: f32, scale: f32) -> u64 {
    use std::f32::consts::LN_2;
    // 1.5 · 2^23: what is added to it is rounded to an integer, which stays in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    // The same in f64.
    const WIDE_SHIFT: f64 = 6_755_399_441_055_744.0;
    let y = ((logit - max) * scale).max(-64.0);
    let n = (y + SHIFT) - SHIFT;
    let f = y - n;
    let polynomial = [0.001_338_130_2, 0.009_666_368, 0.055_503_81, 0.240_223_5, LN_2, 1.0];
    let power = polynomial.into_iter().fold(0.0f32, |sum, coefficient| sum * f + coefficient);
    // n + 40 lies within −24 and 40.
    let two_to_n = f32::from_bits(((n as i32 + 40 + 127) as u32) << 23);
    let share = f64::from(power * two_to_n) + WIDE_SHIFT;
    share.to_bits() - WIDE_SHIFT.to_bits()
}

/// What turns a difference of logits into octaves of probability.
#[must_use]
pub fn scale_of(temperature: f32) -> f32 {
    (std::f32::consts::LOG2_E / temperature).min(f32::MAX)
}

/// The `n` most likely tokens in order of rank. `logits` `[vocabulary]`; NaN ranks last.
#[must_use]
pub fn top(logits: &[f32], n: usize) -> Vec<u32> {
    let value = |token: u32| {
        let logit = logits[token as usize];
        // Both zeros are one number.
        if logit.is_nan() { f32::NEG_INFINITY } else { logit + 0.0 }
    };
    let rank = |a: &u32, b: &u32| value(*b).total_cmp(&value(*a)).then(a.cmp(b));
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    if n < tokens.len() {
        tokens.select_nth_unstable_by(n, rank);
        tokens.truncate(n);
    }
    tokens.sort_unstable_by(rank);
    tokens
}

/// Log-probabilities of a few tokens of a row, at temperature 1 as the API reports them.
#[must_use]
pub fn logprobs(logits: &[f32], tokens: &[u32]) -> Vec<f32> {
    let shift = log_sum_exp(logits);
    tokens.iter().map(|&token| (f64::from(logits[token as usize]) - shift) as f32).collect()
}

#[cfg(test)]
mod tests;
