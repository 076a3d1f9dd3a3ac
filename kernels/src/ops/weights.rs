//! Weights as files have them into stored tiles, and tiles of random numbers.

use half::bf16;

use crate::cuda::Family;
use crate::device::{Device, DeviceError, Grid, Kernel, Pointer};
use crate::layout::{Order, PANEL, TILE_ROWS};

/// Types of files.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceType {
    Bf16,
    F16,
    F32,
}

/// Heads of `width` elements, each stored in `stored` of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    width: i32,
    stored: i32,
}

impl Heads {
    /// Rows or columns that are no heads.
    pub const NONE: Self = Self { width: 0, stored: 0 };

    #[must_use]
    pub fn new(width: usize, stored: usize) -> Self {
        assert!(width.is_multiple_of(2) && width <= stored, "a head has two halves and fits");
        Self { width: width as i32, stored: stored as i32 }
    }

    /// Where element `i` is stored: RoPE's pairs stay half a stored head apart.
    #[must_use]
    pub fn place(self, i: usize) -> usize {
        let (width, stored) = (self.width as usize, self.stored as usize);
        if width == 0 {
            return i;
        }
        let (head, j) = (i / width, i % width);
        head * stored + if j < width / 2 { j } else { stored / 2 + j - width / 2 }
    }
}

/// Rows of one tensor, on their way into tiles.
#[derive(Clone, Copy, Debug)]
pub struct Pack {
    /// `[rows, columns]`
    pub source: Pointer<u8>,
    pub kind: SourceType,
    pub rows: usize,
    pub columns: usize,
    /// The first of `rows` within its tensor.
    pub first_row: usize,
    /// Where the tensor's rows begin among those of the stored matrix, before `order`.
    pub row_offset: usize,
    pub order: Order,
    pub to: Pointer<bf16>,
    pub panels: usize,
    pub row_heads: Heads,
    pub column_heads: Heads,
}

#[derive(Clone, Copy, Debug)]
pub struct PackVector {
    pub source: Pointer<u8>,
    pub kind: SourceType,
    pub elements: usize,
    pub to: Pointer<bf16>,
    pub heads: Heads,
}

/// A stored matrix of normal numbers.
#[derive(Clone, Copy, Debug)]
pub struct Random {
    pub to: Pointer<bf16>,
    /// Stored rows and columns that are not padding.
    pub rows: usize,
    pub columns: usize,
    pub panels: usize,
    pub mean: f32,
    pub deviation: f32,
    pub seed: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PackArguments {
    source: Pointer<u8>,
    kind: SourceType,
    rows: i32,
    columns: i32,
    first_row: i32,
    row_offset: i32,
    features: i32,
    to: Pointer<bf16>,
    panels: i32,
    row_heads: Heads,
    column_heads: Heads,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PackVectorArguments {
    source: Pointer<u8>,
    kind: SourceType,
    elements: i32,
    to: Pointer<bf16>,
    heads: Heads,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RandomArguments {
    to: Pointer<bf16>,
    tiles: i32,
    panels: i32,
    rows: i32,
    columns: i32,
    mean: f32,
    deviation: f32,
    seed: u64,
}

#[derive(Clone, Copy, Debug)]
pub struct Weights {
    pack: Kernel,
    pack_vector: Kernel,
    random: Kernel,
}

impl Weights {
    /// # Errors
    /// [`Device::kernel`].
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let kernel = |name| device.kernel(Family::Weights, name, 0);
        Ok(Self {
            pack: kernel("pack_weights")?,
            pack_vector: kernel("pack_vector")?,
            random: kernel("random_weights")?,
        })
    }

    /// Queues the packing of some rows. Padding is not written: it is zero beforehand.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// `source` leads to `rows · columns` elements and stays until the stream has passed; `to` to the whole stored matrix.
    pub unsafe fn pack(&self, device: &Device, pack: &Pack) -> Result<(), DeviceError> {
        let arguments = PackArguments {
            source: pack.source,
            kind: pack.kind,
            rows: pack.rows as i32,
            columns: pack.columns as i32,
            first_row: pack.first_row as i32,
            row_offset: pack.row_offset as i32,
            features: match pack.order {
                Order::Pairs => 0,
                Order::GateUp { features } => features as i32,
            },
            to: pack.to,
            panels: pack.panels as i32,
            row_heads: pack.row_heads,
            column_heads: pack.column_heads,
        };
        let grid = threads(pack.rows * pack.columns.div_ceil(8));
        // SAFETY: the caller's promise; the layout is mirrored.
        unsafe { device.launch(self.pack, grid, &arguments) }
    }

    /// Queues the packing of a vector.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// `source` leads to `elements` elements and stays until the stream has passed; `to` to room for all of them as stored.
    pub unsafe fn pack_vector(
        &self,
        device: &Device,
        pack: &PackVector,
    ) -> Result<(), DeviceError> {
        let arguments = PackVectorArguments {
            source: pack.source,
            kind: pack.kind,
            elements: pack.elements as i32,
            to: pack.to,
            heads: pack.heads,
        };
        // SAFETY: the caller's promise; the layout is mirrored.
        unsafe { device.launch(self.pack_vector, threads(pack.elements), &arguments) }
    }

    /// Queues the making of a matrix, padding included.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// `to` leads to the whole stored matrix.
    pub unsafe fn random(&self, device: &Device, random: &Random) -> Result<(), DeviceError> {
        let tiles = random.rows.div_ceil(TILE_ROWS);
        let arguments = RandomArguments {
            to: random.to,
            tiles: tiles as i32,
            panels: random.panels as i32,
            rows: random.rows as i32,
            columns: random.columns as i32,
            mean: random.mean,
            deviation: random.deviation,
            seed: random.seed,
        };
        let grid = threads(tiles * random.panels * TILE_ROWS * PANEL / 8);
        // SAFETY: the caller's promise; the layout is mirrored.
        unsafe { device.launch(self.random, grid, &arguments) }
    }
}

fn threads(count: usize) -> Grid {
    Grid {
        blocks: [count.div_ceil(256).max(1) as u32, 1, 1],
        threads: 256,
        shared_bytes: 0,
        cluster: [1, 1, 1],
        early: false,
    }
}

#[cfg(test)]
crate::mirrors::mirrors! {
    "weights.cu":
    Heads { width, stored }
    PackArguments {
        source, kind as "type", rows, columns, first_row, row_offset, features, to, panels,
        row_heads, column_heads,
    }
    PackVectorArguments { source, kind as "type", elements, to, heads }
    RandomArguments { to, tiles, panels, rows, columns, mean, deviation, seed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_padded_head_keeps_its_halves_apart_by_half_a_stored_head() {
        let heads = Heads::new(16, 64);
        assert_eq!([0, 7, 8, 15, 16, 24].map(|i| heads.place(i)), [0, 7, 32, 39, 64, 96]);
        assert_eq!(Heads::new(64, 64).place(100), 100);
        assert_eq!(Heads::NONE.place(5), 5);
    }
}
