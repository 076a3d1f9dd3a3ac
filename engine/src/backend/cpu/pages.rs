//! The KV pool of one layer group: every layer's pages in one buffer, `[page][K|V][kv_head][64 × head_dim]`. Values lie
//! `[64][head_dim]` as everywhere; keys lie turned, `[head_dim][64]`, because a vector instruction then meets sixteen
//! positions at once. Enters: keys and values of rows. Leaves: blocks that attention reads in place.

use half::f16;
use plimsoll_contract::abilities::Dtype;
use plimsoll_kernels::reference::attention::{Half, PAGE_TOKENS, PageShape};

use super::buffer::Buffer;
use super::simd::Cell;
use crate::batch::PageId;
use crate::model::LoadError;

/// One layer's pages.
#[derive(Debug)]
pub enum LayerPages {
    F32(Buffer<f32>),
    F16(Buffer<f16>),
}

impl LayerPages {
    pub fn zeroed(shape: PageShape, pages: u32, dtype: Dtype) -> Result<LayerPages, LoadError> {
        let len = shape.elements().saturating_mul(pages as usize);
        Ok(match dtype {
            Dtype::F32 => LayerPages::F32(Buffer::zeroed(len, "KV pages")?),
            Dtype::F16 => LayerPages::F16(Buffer::zeroed(len, "KV pages")?),
            Dtype::Bf16 => unreachable!("ABILITIES names no bf16 for the CPU"),
        })
    }

    /// Copy-on-write: the whole page of this layer.
    pub fn copy(&mut self, shape: PageShape, from: PageId, to: PageId) {
        let size = shape.elements();
        let at = |page: PageId| page.0 as usize * size;
        match self {
            LayerPages::F32(pages) => {
                pages.as_mut_slice().copy_within(at(from)..at(from) + size, at(to));
            }
            LayerPages::F16(pages) => {
                pages.as_mut_slice().copy_within(at(from)..at(from) + size, at(to));
            }
        }
    }

    /// Stores one position. `keys` (after RoPE) and `values` `[kv_heads, head_dim]`.
    pub fn write(&mut self, shape: PageShape, at: Cursor, keys: &[f32], values: &[f32]) {
        match self {
            LayerPages::F32(pages) => write(pages.as_mut_slice(), shape, at, keys, values),
            LayerPages::F16(pages) => write(pages.as_mut_slice(), shape, at, keys, values),
        }
    }
}

/// Where a position lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    pub page: PageId,
    /// Below 64.
    pub slot: usize,
}

impl Cursor {
    pub fn new(table: &[PageId], position: usize) -> Cursor {
        Cursor { page: table[position / PAGE_TOKENS], slot: position % PAGE_TOKENS }
    }
}

fn write<C: Cell>(pages: &mut [C], shape: PageShape, at: Cursor, keys: &[f32], values: &[f32]) {
    let dim = shape.head_dim;
    for (head, (key, value)) in keys.chunks_exact(dim).zip(values.chunks_exact(dim)).enumerate() {
        let block = shape.block(at.page.0, Half::Keys, head);
        let turned = pages[block + at.slot..block + dim * PAGE_TOKENS].iter_mut();
        for (cell, &x) in turned.step_by(PAGE_TOKENS).zip(key) {
            *cell = C::from_f32(x);
        }
        let start = shape.block(at.page.0, Half::Values, head) + at.slot * dim;
        for (cell, &x) in pages[start..start + dim].iter_mut().zip(value) {
            *cell = C::from_f32(x);
        }
    }
}
