//! Token ids become rows of the residual stream.

/// Gathers one row per token.
///
/// `table` `[vocabulary, hidden]`, `tokens` `[tokens]`, `out` `[tokens, hidden]`. A token beyond the
/// vocabulary panics: admission refuses such prompts.
pub fn embed(table: &[f32], hidden: usize, tokens: &[u32], out: &mut [f32]) {
    assert_eq!(table.len() % hidden, 0, "the embedding table holds whole rows");
    assert_eq!(out.len(), tokens.len() * hidden, "one row per token");
    for (row, &token) in out.chunks_exact_mut(hidden).zip(tokens) {
        let start = token as usize * hidden;
        row.copy_from_slice(&table[start..start + hidden]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_brings_its_own_row_in_order() {
        let table = [0.0, 0.1, 1.0, 1.1, 2.0, 2.1];
        let mut out = [f32::NAN; 6];
        embed(&table, 2, &[2, 0, 2], &mut out);
        assert_eq!(out, [2.0, 2.1, 0.0, 0.1, 2.0, 2.1]);
    }

    #[test]
    #[should_panic(expected = "range end index 8 out of range")]
    fn a_token_beyond_the_vocabulary_is_a_bug() {
        embed(&[0.0; 6], 2, &[3], &mut [0.0; 2]);
    }
}
