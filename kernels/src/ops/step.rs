//! What a step does beside products and attention: embedding, copies of pages, and the rows whose logits are wanted.

use half::bf16;

use super::attention::Row;
use super::stage::Piece;
use crate::cuda::Family;
use crate::device::{Device, DeviceError, Grid, Kernel, Pointer};

/// Mirrors `EmbedArguments` of `cuda/step.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EmbedArguments {
    pub rows: Pointer<Row>,
    pub count: i32,
    pub rows_max: i32,
    pub embedding: Pointer<bf16>,
    pub panels: i32,
    pub hidden: i32,
    pub embeddings: Pointer<f32>,
    pub last_tokens: Pointer<i32>,
    pub gain: Pointer<bf16>,
    pub residual: Pointer<bf16>,
    pub residual_stride: i32,
    pub normed: Pointer<bf16>,
    pub squares: Pointer<f32>,
}

/// Mirrors `GatherArguments` of `cuda/step.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GatherArguments {
    pub rows: Pointer<i32>,
    pub count: i32,
    pub panels: i32,
    pub normed: Pointer<bf16>,
    pub squares: Pointer<f32>,
    pub rows_max: i32,
    pub normed_out: Pointer<bf16>,
    pub squares_out: Pointer<f32>,
    pub rows_max_out: i32,
}

/// Pairs of one launch of [`StepKernels::copy_pages`].
const COPIES: usize = 64;

/// 16-byte pieces that a block of it copies.
const PIECES_OF_BLOCK: usize = 2048;

#[repr(C)]
#[derive(Clone, Copy)]
struct CopyArguments {
    pages: Pointer<Piece>,
    layer_stride: i64,
    page_pieces: i32,
    count: i32,
    pairs: [[i32; 2]; COPIES],
}

/// The pages of all layers.
#[derive(Clone, Copy, Debug)]
pub struct Pages {
    pub pages: Pointer<bf16>,
    pub layers: usize,
    pub count: usize,
    /// Elements of a page of one layer.
    pub elements: usize,
}

#[derive(Clone, Copy, Debug)]
pub struct StepKernels {
    embed: Kernel,
    gather: Kernel,
    copy_pages: Kernel,
}

impl StepKernels {
    /// # Errors
    /// [`Device::kernel`].
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let kernel = |name| device.kernel(Family::Step, name, 0);
        Ok(Self {
            embed: kernel("embed")?,
            gather: kernel("gather")?,
            copy_pages: kernel("copy_pages")?,
        })
    }

    /// Tokens become the residual stream, times the first norm's gain too.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// The pointers lead to memory of the shapes that `cuda/step.cu` states; tokens are within the vocabulary.
    pub unsafe fn embed(
        &self,
        device: &Device,
        arguments: &EmbedArguments,
    ) -> Result<(), DeviceError> {
        assert_eq!(arguments.hidden % 8, 0, "columns come in eights");
        // SAFETY: the caller's promise; the layout is mirrored.
        unsafe { device.launch(self.embed, rows(arguments.count), arguments) }
    }

    /// Rows whose logits are wanted, one after the other.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// As [`StepKernels::embed`].
    pub unsafe fn gather(
        &self,
        device: &Device,
        arguments: &GatherArguments,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise; the layout is mirrored.
        unsafe { device.launch(self.gather, rows(arguments.count), arguments) }
    }

    /// Copies pages of every layer: `pairs` of from and to, no page in two of them.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// `pages` leads to `layers · count · elements` elements, and every page is below `count`.
    pub unsafe fn copy_pages(
        &self,
        device: &Device,
        pages: &Pages,
        pairs: &[[i32; 2]],
    ) -> Result<(), DeviceError> {
        for chunk in pairs.chunks(COPIES) {
            let mut arguments = CopyArguments {
                pages: pages.pages.cast(),
                layer_stride: (pages.count * pages.elements / 8) as i64,
                page_pieces: (pages.elements / 8) as i32,
                count: chunk.len() as i32,
                pairs: [[0; 2]; COPIES],
            };
            arguments.pairs[..chunk.len()].copy_from_slice(chunk);
            let grid = Grid {
                blocks: [
                    chunk.len() as u32,
                    pages.layers as u32,
                    (pages.elements / 8).div_ceil(PIECES_OF_BLOCK) as u32,
                ],
                threads: 256,
                shared_bytes: 0,
                cluster: [1, 1, 1],
                early: true,
            };
            // SAFETY: the caller's promise; the layout is mirrored.
            unsafe { device.launch(self.copy_pages, grid, &arguments) }?;
        }
        Ok(())
    }
}

/// A block of 128 threads per row.
fn rows(count: i32) -> Grid {
    Grid {
        blocks: [count.cast_unsigned(), 1, 1],
        threads: 128,
        shared_bytes: 0,
        cluster: [1, 1, 1],
        early: true,
    }
}

#[cfg(test)]
crate::mirrors::mirrors! {
    "step.cu":
    EmbedArguments {
        rows, count, rows_max, embedding, panels, hidden, embeddings, last_tokens, gain, residual,
        residual_stride, normed, squares,
    }
    GatherArguments {
        rows, count, panels, normed, squares, rows_max, normed_out, squares_out, rows_max_out,
    }
    CopyArguments { pages, layer_stride, page_pieces, count, pairs }
}
