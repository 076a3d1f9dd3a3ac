//! Root-mean-square normalisation, over the hidden size or over each head.

/// `out = x / sqrt(mean(x²) + eps) · weight`, row by row; Zhang and Sennrich 2019.
///
/// `x` and `out` `[rows, width]`, `weight` `[width]`; `eps` is `rms_norm_eps` of the checkpoint.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len() % weight.len(), 0, "the input holds whole rows");
    assert_eq!(x.len(), out.len(), "the output is as large as the input");
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let scale = inverse_rms(x, eps);
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = (f64::from(x) * scale * f64::from(weight)) as f32;
        }
    }
}

/// Queries or keys normalised head by head before RoPE, as Qwen3 does; one weight serves all heads.
///
/// `x` `[tokens, heads, head_dim]` in place, `weight` `[head_dim]`.
pub fn qk_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    assert_eq!(x.len() % weight.len(), 0, "the input holds whole heads");
    for head in x.chunks_exact_mut(weight.len()) {
        let scale = inverse_rms(head, eps);
        for (x, &weight) in head.iter_mut().zip(weight) {
            *x = (f64::from(*x) * scale * f64::from(weight)) as f32;
        }
    }
}

fn inverse_rms(row: &[f32], eps: f32) -> f64 {
    let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    (squares / row.len() as f64 + f64::from(eps)).sqrt().recip()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_divided_by_its_root_mean_square() {
        // mean(3², 4²) = 12.5, and sqrt(12.5) = 3.535534.
        let mut out = [f32::NAN; 4];
        rms_norm(&[3.0, 4.0, 30.0, 40.0], &[1.0, 2.0], 0.0, &mut out);
        for (got, want) in out.iter().zip([0.848_528_1, 2.262_741_7, 0.848_528_1, 2.262_741_7]) {
            assert!((got - want).abs() < 1e-6, "{got} against {want}");
        }
    }

    #[test]
    fn eps_keeps_a_row_of_zeros_at_zero() {
        let mut out = [f32::NAN; 2];
        rms_norm(&[0.0, 0.0], &[1.0, 1.0], 1e-5, &mut out);
        assert_eq!(out, [0.0, 0.0]);
    }

    #[test]
    fn eps_counts_inside_the_root() {
        let mut out = [f32::NAN; 1];
        rms_norm(&[1.0], &[1.0], 3.0, &mut out);
        assert_eq!(out, [0.5]);
    }

    #[test]
    fn each_head_is_normalised_by_itself() {
        let mut x = [3.0, 4.0, 300.0, 400.0];
        qk_norm(&mut x, &[1.0, 1.0], 0.0);
        assert_eq!(x[..2], x[2..]);
    }
}
