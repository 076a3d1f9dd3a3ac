//! Keys and values in pages, and causal attention that reads them there.
//!
//! A layer's pages are one slice, `[page][K|V][kv_head][64][head_dim]`: what one head of one page
//! needs lies together, so a kernel fetches it in one piece. A sequence's block table names its
//! pages in order; position `p` lies in page `table[p / 64]`, slot `p % 64`.

use super::linear::dot;
use super::softmax::softmax;

/// Tokens per page, everywhere in Plimsoll.
pub const PAGE_TOKENS: usize = plimsoll_contract::abilities::PAGE_TOKENS as usize;

/// The two halves of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    Keys,
    Values,
}

/// The shape of one layer's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageShape {
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl PageShape {
    /// Elements of one page of one layer, keys and values together.
    #[must_use]
    pub fn elements(self) -> usize {
        2 * self.kv_heads * PAGE_TOKENS * self.head_dim
    }

    /// Where the `[64, head_dim]` block of one head begins in a layer's slice.
    #[must_use]
    pub fn block(self, page: u32, half: Half, kv_head: usize) -> usize {
        let half = match half {
            Half::Keys => 0,
            Half::Values => self.kv_heads,
        };
        (page as usize * 2 * self.kv_heads + half + kv_head) * PAGE_TOKENS * self.head_dim
    }

    /// Where the vector of one position begins in a layer's slice. `[head_dim]`.
    #[must_use]
    pub fn vector(self, table: &[u32], position: usize, half: Half, kv_head: usize) -> usize {
        let block = self.block(table[position / PAGE_TOKENS], half, kv_head);
        block + position % PAGE_TOKENS * self.head_dim
    }
}

/// Stores the keys and values of consecutive positions, beginning at `start`.
///
/// `pages` one layer's slice, `keys` (after RoPE) and `values` `[tokens, kv_heads, head_dim]`.
pub fn write_kv(
    pages: &mut [f32],
    shape: PageShape,
    table: &[u32],
    start: usize,
    keys: &[f32],
    values: &[f32],
) {
    assert_eq!(keys.len(), values.len(), "every key has its value");
    assert_eq!(keys.len() % (shape.kv_heads * shape.head_dim), 0, "keys are whole tokens");
    for (half, vectors) in [(Half::Keys, keys), (Half::Values, values)] {
        for (i, vector) in vectors.chunks_exact(shape.head_dim).enumerate() {
            let (token, kv_head) = (i / shape.kv_heads, i % shape.kv_heads);
            let at = shape.vector(table, start + token, half, kv_head);
            pages[at..at + shape.head_dim].copy_from_slice(vector);
        }
    }
}

/// What attention of one layer needs to know beside its pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    pub pages: PageShape,
    /// Query heads; each run of `heads / kv_heads` of them shares one KV head.
    pub heads: usize,
    /// Multiplies query·key before the softmax; `1 / sqrt(head_dim)` in the families we run.
    pub scale: f32,
    /// A query sees this many positions, its own included; absent: all up to its own.
    pub window: Option<usize>,
}

impl Attention {
    /// The positions that a query sees: causal, and no further back than the window.
    #[must_use]
    pub fn visible(&self, position: usize) -> std::ops::Range<usize> {
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        first..position + 1
    }
}

/// `out = softmax(scale · q·kᵀ) · v` for queries at consecutive positions of one sequence, beginning
/// at `start`; their own keys and values are already in the pages.
///
/// `queries` (after RoPE) and `out` `[tokens, heads, head_dim]`, `pages` one layer's slice. The
/// formula is that of Vaswani et al. 2017, grouped as in Ainslie et al. 2023.
pub fn attend(
    attention: &Attention,
    queries: &[f32],
    start: usize,
    pages: &[f32],
    table: &[u32],
    out: &mut [f32],
) {
    let Attention { pages: shape, heads, .. } = *attention;
    assert_eq!(heads % shape.kv_heads, 0, "query heads divide evenly over KV heads");
    assert_eq!(queries.len() % (heads * shape.head_dim), 0, "queries are whole tokens");
    assert_eq!(queries.len(), out.len(), "one output vector per query vector");
    let rows = queries.chunks_exact(shape.head_dim).zip(out.chunks_exact_mut(shape.head_dim));
    for (i, (query, out)) in rows.enumerate() {
        let (position, head) = (start + i / heads, i % heads);
        let kv_head = head / (heads / shape.kv_heads);
        attend_one(attention, query, position, kv_head, pages, table, out);
    }
}

/// One query vector against every position it sees. `query` and `out` `[head_dim]`.
fn attend_one(
    attention: &Attention,
    query: &[f32],
    position: usize,
    kv_head: usize,
    pages: &[f32],
    table: &[u32],
    out: &mut [f32],
) {
    let shape = attention.pages;
    let vector = |seen, half| {
        let at = shape.vector(table, seen, half, kv_head);
        &pages[at..at + shape.head_dim]
    };
    let visible = attention.visible(position);
    let mut shares: Vec<f32> = visible
        .clone()
        .map(|seen| (f64::from(attention.scale) * dot(query, vector(seen, Half::Keys))) as f32)
        .collect();
    softmax(&mut shares);
    let mut sums = vec![0.0f64; shape.head_dim];
    for (seen, share) in visible.zip(shares) {
        for (sum, &value) in sums.iter_mut().zip(vector(seen, Half::Values)) {
            *sum += f64::from(share) * f64::from(value);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = sum as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::random::uniform;

    const SHAPE: PageShape = PageShape { kv_heads: 2, head_dim: 4 };

    fn noise(seed: u64, len: usize) -> Vec<f32> {
        (0..len as u64).map(|i| (uniform(seed, i) * 4.0 - 2.0) as f32).collect()
    }

    /// Pages of NaN, in which only what was written may be read.
    fn filled(table: &[u32], tokens: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (keys, values) = (noise(1, tokens * 8), noise(2, tokens * 8));
        let mut pages = vec![f32::NAN; SHAPE.elements() * 8];
        write_kv(&mut pages, SHAPE, table, 0, &keys, &values);
        (pages, keys, values)
    }

    fn attention(heads: usize, window: Option<usize>) -> Attention {
        Attention { pages: SHAPE, heads, scale: 0.5, window }
    }

    #[test]
    fn a_vector_lies_where_the_layout_says() {
        // Page 3, values, head 1, slot 2: ((3·2 + 1)·2 + 1)·64·4 + 2·4.
        assert_eq!(SHAPE.vector(&[0, 3], 66, Half::Values, 1), 15 * 256 + 8);
        assert_eq!(SHAPE.vector(&[0, 3], 63, Half::Keys, 0), 63 * 4);
        assert_eq!(SHAPE.elements(), 1024);
    }

    #[test]
    fn a_first_token_returns_its_own_value() {
        let (pages, _, values) = filled(&[5], 1);
        let mut out = [f32::NAN; 16];
        attend(&attention(4, None), &noise(3, 16), 0, &pages, &[5], &mut out);
        assert_eq!(out[..4], values[..4], "query head 0 reads KV head 0");
        assert_eq!(out[4..8], values[..4], "query head 1 shares it");
        assert_eq!(out[8..12], values[4..], "query head 2 reads KV head 1");
    }

    #[test]
    fn two_keys_share_the_value_as_the_softmax_of_their_scores() {
        // Scores 0.5·2·ln 3 and 0, so three quarters to one quarter.
        let mut pages = vec![f32::NAN; SHAPE.elements()];
        let mut keys = [0.0; 16];
        keys[0] = 2.0 * 3.0f32.ln();
        let values: Vec<f32> = (0..16).map(|i| if i < 8 { 1.0 } else { 5.0 }).collect();
        write_kv(&mut pages, SHAPE, &[0], 0, &keys, &values);
        let mut out = [f32::NAN; 8];
        attend(
            &attention(2, None),
            &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            1,
            &pages,
            &[0],
            &mut out,
        );
        assert!((out[0] - 2.0).abs() < 1e-6, "{}", out[0]);
        assert!((out[4] - 3.0).abs() < 1e-6, "equal scores average: {}", out[4]);
    }

    #[test]
    fn neither_the_order_of_pages_nor_the_cut_into_chunks_changes_anything() {
        let tokens = 150;
        let queries = noise(3, tokens * 16);
        let whole = {
            let (pages, ..) = filled(&[0, 1, 2], tokens);
            let mut out = vec![f32::NAN; tokens * 16];
            attend(&attention(4, None), &queries, 0, &pages, &[0, 1, 2], &mut out);
            out
        };
        let table = [6, 2, 4];
        let (pages, ..) = filled(&table, tokens);
        let mut out = vec![f32::NAN; tokens * 16];
        for (start, end) in [(0, 1), (1, 70), (70, 150)] {
            let rows = start * 16..end * 16;
            attend(
                &attention(4, None),
                &queries[rows.clone()],
                start,
                &pages,
                &table,
                &mut out[rows],
            );
        }
        assert_eq!(whole, out);
    }

    #[test]
    fn a_window_hides_what_lies_before_it_and_nothing_else() {
        let (mut pages, ..) = filled(&[0, 1, 2], 150);
        let queries = noise(3, 16);
        let run = |pages: &[f32], window| {
            let mut out = [f32::NAN; 16];
            attend(&attention(4, window), &queries, 149, pages, &[0, 1, 2], &mut out);
            out
        };
        assert_eq!(run(&pages, Some(150)), run(&pages, None));
        let windowed = run(&pages, Some(20));
        assert_ne!(windowed, run(&pages, None));
        // Positions 130..=149 are seen; everything before may be rubbish.
        for position in 0..130 {
            for half in [Half::Keys, Half::Values] {
                let at = SHAPE.vector(&[0, 1, 2], position, half, 0);
                pages[at..at + 4].fill(f32::NAN);
            }
        }
        assert_eq!(run(&pages, Some(20))[..8], windowed[..8]);
        assert!(run(&pages, Some(21))[0].is_nan(), "one position more is one too many");
    }

    #[test]
    fn later_positions_are_never_read() {
        let (pages, ..) = filled(&[0], 10);
        let mut out = [f32::NAN; 16];
        attend(&attention(4, None), &noise(3, 16), 9, &pages, &[0], &mut out);
        assert!(out.iter().all(|x| x.is_finite()), "slot 10 and later hold NaN");
    }
}
