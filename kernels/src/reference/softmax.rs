//! Softmax and its logarithm over one row, shifted by the maximum so that nothing overflows.

/// `x[i] = e^(x[i] - max) / Σ e^(x[j] - max)`, in place. `−∞` becomes zero; at least one entry must
/// be finite.
pub fn softmax(x: &mut [f32]) {
    let max = maximum(x);
    assert!(max.is_finite(), "a row of softmax has a finite maximum");
    let sum = sum_of_exponentials(x, max);
    for x in x {
        *x = ((f64::from(*x) - f64::from(max)).exp() / sum) as f32;
    }
}

/// The logarithm of the sum of exponentials: subtract it from a logit and you have its
/// log-probability, without touching the rest of the row.
#[must_use]
pub fn log_sum_exp(x: &[f32]) -> f64 {
    let max = maximum(x);
    assert!(max.is_finite(), "a row of logits has a finite maximum");
    f64::from(max) + sum_of_exponentials(x, max).ln()
}

/// `out[i] = x[i] - log Σ e^x[j]`. Both `[entries]`; at least one entry must be finite.
pub fn log_softmax(x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "the output is as long as the input");
    let shift = log_sum_exp(x);
    for (out, &x) in out.iter_mut().zip(x) {
        *out = (f64::from(x) - shift) as f32;
    }
}

fn maximum(x: &[f32]) -> f32 {
    x.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

fn sum_of_exponentials(x: &[f32], max: f32) -> f64 {
    x.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_of_small_integers_come_back_as_their_shares() {
        let mut x = [1.0f32.ln(), 2.0f32.ln(), 5.0f32.ln()];
        softmax(&mut x);
        for (got, want) in x.iter().zip([0.125, 0.25, 0.625]) {
            assert!((got - want).abs() < 1e-6, "{got} against {want}");
        }
    }

    #[test]
    fn large_logits_do_not_overflow_and_masked_ones_get_nothing() {
        let mut x = [1e30, 1e30, f32::NEG_INFINITY];
        softmax(&mut x);
        assert_eq!(x, [0.5, 0.5, 0.0]);
    }

    #[test]
    fn log_softmax_is_the_logarithm_of_softmax_whatever_is_added_to_the_row() {
        let row = [0.3, -1.2, 4.0, 2.5];
        let mut shares = row;
        softmax(&mut shares);
        let mut logs = [f32::NAN; 4];
        log_softmax(&row.map(|x| x + 64.0), &mut logs);
        for (log, share) in logs.iter().zip(shares) {
            assert!((log.exp() - share).abs() < 1e-5, "{log} against ln {share}");
        }
    }
}
