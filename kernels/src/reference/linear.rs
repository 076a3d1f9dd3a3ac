//! Matrix products as checkpoints store them: the weight is `[out, in]` and is read along its rows.

/// `out = x · weightᵀ + bias`.
///
/// `x` `[rows, inner]`, `weight` `[outer, inner]`, `bias` `[outer]`, `out` `[rows, outer]`.
pub fn linear(x: &[f32], inner: usize, weight: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
    assert_eq!(x.len() % inner, 0, "the input holds whole rows");
    assert_eq!(weight.len() % inner, 0, "the weight holds whole rows");
    let outer = weight.len() / inner;
    assert_eq!(out.len() / outer, x.len() / inner, "one output row per input row");
    assert!(bias.is_none_or(|bias| bias.len() == outer), "one bias per output");
    for (x, out) in x.chunks_exact(inner).zip(out.chunks_exact_mut(outer)) {
        for (column, (row, out)) in weight.chunks_exact(inner).zip(out.iter_mut()).enumerate() {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[column]));
            *out = (dot(x, row) + bias) as f32;
        }
    }
}

/// The logits of chosen rows: only the last token of a sequence (or those whose log-probabilities
/// were asked for) pays for the product with the whole vocabulary.
///
/// `x` `[tokens, hidden]` after the final norm, `rows` indices into it, `head` `[vocabulary,
/// hidden]` (the embedding table where they are tied), `out` `[rows, vocabulary]`.
pub fn logits(x: &[f32], hidden: usize, rows: &[usize], head: &[f32], out: &mut [f32]) {
    let vocabulary = head.len() / hidden;
    assert_eq!(out.len(), rows.len() * vocabulary, "one row of logits per chosen token");
    for (&row, out) in rows.iter().zip(out.chunks_exact_mut(vocabulary)) {
        linear(&x[row * hidden..(row + 1) * hidden], hidden, head, None, out);
    }
}

/// The inner product of two equally long slices, in `f64`.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_is_read_by_rows_and_the_bias_added() {
        // x = [[1, 2], [3, 4]], weight = [[1, 0], [0, 1], [1, 1]].
        let mut out = [f32::NAN; 6];
        let weight = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0];
        linear(&[1.0, 2.0, 3.0, 4.0], 2, &weight, Some(&[0.5, 0.0, -1.0]), &mut out);
        assert_eq!(out, [1.5, 2.0, 2.0, 3.5, 4.0, 6.0]);
    }

    #[test]
    fn sums_do_not_lose_small_terms_beside_large_ones() {
        let mut out = [0.0];
        linear(&[1e8, 1.0, -1e8], 3, &[1.0, 1.0, 1.0], None, &mut out);
        assert_eq!(out, [1.0]);
    }

    #[test]
    fn logits_come_only_from_the_chosen_rows() {
        let x = [1.0, 0.0, 0.0, 1.0, 2.0, 2.0];
        let mut out = [f32::NAN; 4];
        logits(&x, 2, &[2, 0], &[1.0, 2.0, 3.0, 4.0], &mut out);
        assert_eq!(out, [6.0, 14.0, 1.0, 3.0]);
    }
}
