//! The buffers a step computes in, and the sum of their bytes: one list gives both, so that what was planned is what is
//! taken.

use plimsoll_kernels::device::{Buffer, Device, DeviceError, Pointer};
use plimsoll_kernels::ops::gemm::Best;

use super::shape::{Shape, StepShape};

/// One buffer per kind of activation; every layer uses them anew.
#[derive(Debug)]
pub struct Space {
    /// The residual stream. `[rows_max, hidden]` bf16
    pub residual: Buffer,
    /// Times the next norm's gain. Activations `[hidden / 64][rows_max][64]`
    pub normed: Buffer,
    /// Sums of squares per 64 features. `[hidden / 64][rows_max]` f32
    pub squares: Buffer,
    /// `[rows_max, qkv_width]` bf16
    pub qkv: Buffer,
    /// Activations `[attended / 64][rows_max][64]`
    pub attended: Buffer,
    /// Activations `[intermediate / 64][rows_max][64]`
    pub gated: Buffer,
    /// `normed` of the rows whose logits are wanted. `[hidden / 64][head_rows][64]`
    pub head_normed: Buffer,
    pub head_squares: Buffer,
    /// `[head_rows, vocabulary_stored]` f32
    pub logits: Buffer,
    /// The same after penalties and bias, of rows that ask for any.
    pub adjusted: Buffer,
    /// `[head_rows, vocabulary tiles]`
    pub best: Buffer,
    /// A step's embedding rows, `[rows, hidden]` f32; there only once somebody has sent any, and never less.
    embeddings: Option<Buffer>,
}

struct Sizes {
    residual: usize,
    normed: usize,
    squares: usize,
    qkv: usize,
    attended: usize,
    gated: usize,
    head_normed: usize,
    head_squares: usize,
    logits: usize,
    adjusted: usize,
    best: usize,
}

fn sizes(shape: &Shape, step: &StepShape) -> Sizes {
    let (rows, head_rows) = (step.rows_max(), step.head_rows());
    let vocabulary = shape.vocabulary_matrix();
    let hidden = shape.hidden_stored();
    Sizes {
        residual: rows * hidden * 2,
        normed: rows * hidden * 2,
        squares: rows * (hidden / 64) * 4,
        qkv: rows * shape.qkv_width() * 2,
        attended: rows * shape.attended_width() * 2,
        gated: rows * shape.intermediate_stored() * 2,
        head_normed: head_rows * hidden * 2,
        head_squares: head_rows * (hidden / 64) * 4,
        logits: head_rows * vocabulary.rows * 4,
        adjusted: head_rows * vocabulary.rows * 4,
        best: head_rows * vocabulary.tiles() * size_of::<Best>(),
    }
}

/// Bytes of all of them.
pub fn bytes(shape: &Shape, step: &StepShape) -> usize {
    let Sizes {
        residual,
        normed,
        squares,
        qkv,
        attended,
        gated,
        head_normed,
        head_squares,
        logits,
        adjusted,
        best,
    } = sizes(shape, step);
    residual
        + normed
        + squares
        + qkv
        + attended
        + gated
        + head_normed
        + head_squares
        + logits
        + adjusted
        + best
}

impl Space {
    pub fn allocate(
        device: &Device,
        shape: &Shape,
        step: &StepShape,
    ) -> Result<Space, DeviceError> {
        let sizes = sizes(shape, step);
        // Zeros: rows and columns of padding are read by products, where only a NaN would do harm.
        let take = |bytes| device.zeroed(bytes, "activations");
        Ok(Space {
            residual: take(sizes.residual)?,
            normed: take(sizes.normed)?,
            squares: take(sizes.squares)?,
            qkv: take(sizes.qkv)?,
            attended: take(sizes.attended)?,
            gated: take(sizes.gated)?,
            head_normed: take(sizes.head_normed)?,
            head_squares: take(sizes.head_squares)?,
            logits: take(sizes.logits)?,
            adjusted: take(sizes.adjusted)?,
            best: take(sizes.best)?,
            embeddings: None,
        })
    }

    /// Copies embedding rows to the device and waits for it.
    pub fn put_embeddings(&mut self, device: &Device, values: &[f32]) -> Result<(), DeviceError> {
        let bytes = size_of_val(values);
        if self.embeddings.as_ref().is_none_or(|held| held.bytes() < bytes) {
            device.synchronize()?;
            self.embeddings = Some(device.allocate(bytes, "embedding rows")?);
        }
        let held = self.embeddings.as_ref().expect("allocated just now");
        device.upload(held.pointer(), values)
    }

    /// Null where no step has sent any.
    pub fn embeddings_pointer(&self) -> Pointer<f32> {
        self.embeddings.as_ref().map_or(Pointer::NULL, Buffer::pointer)
    }
}
