//! Hopper's matrix product for 1 to 64 tokens: how its grid is cut, and the launch.

use half::bf16;

use crate::cuda::Family;
use crate::device::{Device, DeviceError, Grid, Kernel, Pointer};
use crate::layout::{PANEL, TILE_ROWS};
use crate::ops::gemm::{Epilogue, GemmArguments};

/// The most tokens of one launch.
pub const ROWS_MAX: usize = 64;

/// Shared memory that a block may have.
const SHARED_BYTES_MAX: u32 = 227 * 1024;
const PANEL_BYTES: u32 = (TILE_ROWS * PANEL * 2) as u32;
/// Sums of one tile for eight tokens.
const GROUP_BYTES: u32 = (TILE_ROWS * 8 * 4) as u32;

/// How one product is spread over the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Tokens that the kernel computes: 8, 16, 32 or 64.
    pub tokens: u32,
    /// Tiles that a block works on at once: 1 to 4.
    pub teams: u32,
    /// Blocks of a cluster, which share a tile's K: 1, 2, 4 or 8.
    pub splits: u32,
    /// Clusters. Where there are fewer than runs of `teams` tiles, each takes several in turn; with `splits` above 1
    /// there are not.
    pub clusters: u32,
    /// Panels of each tile in a stage of the ring.
    pub stage_panels: u32,
    pub stages: u32,
}

impl Shape {
    /// Dynamic shared memory of a block, as the kernel lays it out.
    #[must_use]
    pub fn shared_bytes(&self) -> u32 {
        let stage = self.stage_panels * (self.teams * PANEL_BYTES + self.tokens * 128);
        let owned = if self.splits > 1 { (self.tokens / 8).div_ceil(self.splits) } else { 0 };
        let sums = self.teams * owned * self.splits * GROUP_BYTES;
        let room = self.teams * 8 * self.tokens * 4;
        self.stages * stage + sums + room + self.tokens * 4 + (2 * self.stages + 1) * 8
    }

    fn runs(&self, tiles: u32) -> u32 {
        tiles.div_ceil(self.teams)
    }

    /// Whether a product of `tiles` by `panels` can be cut like this.
    #[must_use]
    pub fn fits(&self, tiles: u32, panels: u32) -> bool {
        let teams_max = if self.tokens < 64 { 4 } else { 3 };
        (1..=teams_max).contains(&self.teams)
            && matches!(self.splits, 1 | 2 | 4 | 8)
            && self.splits <= panels
            && (self.splits == 1 || self.clusters >= self.runs(tiles))
            && self.shared_bytes() <= SHARED_BYTES_MAX
    }
}

/// Weights of a later product that this one brings into the L2 when its own have arrived: in each of `chunks` runs,
/// `stride` bytes apart, the first `bytes`.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    pub weights: Pointer<bf16>,
    pub chunks: u32,
    pub stride: u64,
    pub bytes: u32,
}

impl Ahead {
    pub const NOTHING: Self = Self { weights: Pointer::NULL, chunks: 0, stride: 0, bytes: 0 };

    /// Of what each block of a later product reads first, the part that its ring does not hold, `bytes` in all.
    #[must_use]
    pub fn of(weights: Pointer<bf16>, tiles: u32, panels: u32, shape: &Shape, bytes: u64) -> Self {
        let at_once = shape.clusters.saturating_mul(shape.teams);
        let chunks = tiles.min(at_once) * shape.splits;
        let stride = u64::from(panels / shape.splits * PANEL_BYTES);
        let ring = u64::from(shape.stages * shape.stage_panels * PANEL_BYTES);
        let each = (bytes / u64::from(chunks)).min(stride.saturating_sub(ring)) / 1024 * 1024;
        if each == 0 {
            return Self::NOTHING;
        }
        let weights = weights.add(ring as usize / size_of::<bf16>());
        Self { weights, chunks, stride, bytes: each as u32 }
    }
}

/// Mirrors `StreamArguments` of `cuda/gemm_stream.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct StreamArguments {
    gemm: GemmArguments,
    splits_log: i32,
    stages: i32,
    stage_panels: i32,
    ahead_chunks: i32,
    ahead: Pointer<bf16>,
    ahead_stride: i64,
    ahead_bytes: i32,
}

/// How much of a later product is brought into the L2: what device memory delivers while results travel from one
/// kernel to the next.
pub const AHEAD_BYTES: u64 = 3 << 20;

/// How a product of `tiles` by `panels` for `rows` tokens is spread over a card of `processors`. `splits` depends on
/// the weights alone, so that a token's sums are the same in any company of up to 64.
#[must_use]
pub fn plan(tiles: u32, panels: u32, rows: u32, processors: u32) -> Shape {
    let tokens = rows.next_power_of_two().clamp(8, 64);
    let mut splits = 1;
    while splits < 8 && tiles * splits * 2 <= processors && panels / (splits * 2) >= 4 {
        splits *= 2;
    }
    // (stages, panels of each)
    let (stages, stage_panels, clusters) = if tiles.min(panels) < 64 {
        // Little to read: two or three rings fit on a processor, so that the next kernels' are full when it is their
        // turn. Which of them is best was measured.
        match (tokens, panels / splits) {
            (8, _) if tiles > processors && tiles <= 2 * processors => (12, 1, tiles),
            (8, 9..=16) => (3, 4, tiles),
            (8..=32, _) => (2, 4, tiles),
            _ if splits <= 2 => (2, 3, tiles),
            _ => (2, 2, tiles),
        }
    } else {
        // Much to read: one large ring keeps more under way. The more tokens, the longer the epilogue, which blocks
        // that take several tiles in turn hide.
        match tokens {
            8 => (6, 4, tiles),
            16 => (5, 4, tiles),
            32 => (4, 4, tiles),
            _ => (3, 4, if splits == 1 { tiles.min(processors) } else { tiles }),
        }
    };
    Shape { tokens, teams: 1, splits, clusters, stage_panels, stages }
}

const NAMES: [[&str; 4]; 4] = [
    ["gemm_stream_store_8", "gemm_stream_store_16", "gemm_stream_store_32", "gemm_stream_store_64"],
    [
        "gemm_stream_residual_8",
        "gemm_stream_residual_16",
        "gemm_stream_residual_32",
        "gemm_stream_residual_64",
    ],
    [
        "gemm_stream_gate_up_8",
        "gemm_stream_gate_up_16",
        "gemm_stream_gate_up_32",
        "gemm_stream_gate_up_64",
    ],
    [
        "gemm_stream_logits_8",
        "gemm_stream_logits_16",
        "gemm_stream_logits_32",
        "gemm_stream_logits_64",
    ],
];

/// The kernels of all epilogues and widths.
pub struct GemmStream {
    kernels: [[Kernel; 4]; 4],
}

impl GemmStream {
    /// Only on Hopper.
    ///
    /// # Errors
    /// Another card, or a build without kernels.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let mut kernels = Vec::with_capacity(16);
        for name in NAMES.as_flattened() {
            kernels.push(device.kernel(Family::GemmStream, name, SHARED_BYTES_MAX)?);
        }
        let of = |epilogue: usize| std::array::from_fn(|width| kernels[epilogue * 4 + width]);
        Ok(Self { kernels: std::array::from_fn(of) })
    }

    /// Queues a product for 1 to 64 rows. `later`: a product whose weights this one brings toward the processors; best
    /// is the one after the next. Of it only the shape and the weights count.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// The pointers of `gemm` lead to what `cuda/gemm.cuh` documents for this epilogue, those of `later` to its weights;
    /// all of it stays until the stream has passed.
    pub unsafe fn launch(
        &self,
        device: &Device,
        epilogue: Epilogue,
        gemm: &GemmArguments,
        later: Option<&GemmArguments>,
    ) -> Result<(), DeviceError> {
        let plan = |gemm: &GemmArguments| {
            let [tiles, panels, rows] =
                [gemm.tiles, gemm.panels, gemm.rows].map(i32::cast_unsigned);
            (tiles, panels, plan(tiles, panels, rows, device.processors()))
        };
        let ahead = later.map_or(Ahead::NOTHING, |later| {
            let (tiles, panels, shape) = plan(later);
            Ahead::of(later.weights, tiles, panels, &shape, AHEAD_BYTES)
        });
        // SAFETY: as the caller promises.
        unsafe { self.launch_as(device, epilogue, gemm, &plan(gemm).2, ahead) }
    }

    /// As [`GemmStream::launch`], in a shape of the caller's choice.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// As there, and `ahead` lies within weights.
    pub unsafe fn launch_as(
        &self,
        device: &Device,
        epilogue: Epilogue,
        gemm: &GemmArguments,
        shape: &Shape,
        ahead: Ahead,
    ) -> Result<(), DeviceError> {
        let [tiles, panels] = [gemm.tiles, gemm.panels].map(i32::cast_unsigned);
        assert!((1..=shape.tokens as i32).contains(&gemm.rows), "rows fit the kernel");
        assert!(shape.fits(tiles, panels), "{tiles} by {panels} panels can be cut as {shape:?}");
        assert_eq!(ahead.bytes % 16, 0, "the L2 is asked for whole pieces of 16 bytes");
        let width = shape.tokens.trailing_zeros() as usize - 3;
        let kernel = self.kernels[epilogue as usize][width];
        let arguments = StreamArguments {
            gemm: *gemm,
            splits_log: shape.splits.trailing_zeros() as i32,
            stages: shape.stages as i32,
            stage_panels: shape.stage_panels as i32,
            ahead_chunks: ahead.chunks as i32,
            ahead: ahead.weights,
            ahead_stride: ahead.stride as i64,
            ahead_bytes: ahead.bytes as i32,
        };
        let grid = Grid {
            blocks: [shape.clusters.min(shape.runs(tiles)) * shape.splits, 1, 1],
            threads: 64 + 128 * shape.teams,
            shared_bytes: shape.shared_bytes(),
            cluster: [shape.splits, 1, 1],
            early: true,
        };
        // SAFETY: the struct mirrors the kernel's parameter; the memory is as the caller promises.
        unsafe { device.launch(kernel, grid, &arguments) }
    }
}

#[cfg(test)]
crate::mirrors::mirrors! {
    "gemm_stream.cu":
    StreamArguments {
        gemm, splits_log, stages, stage_panels, ahead_chunks, ahead, ahead_stride, ahead_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 3.2 1B and 3.1 8B: qkv, o, gate and up, down, head.
    const PRODUCTS: [(u32, u32); 10] = [
        (48, 32),
        (32, 32),
        (256, 32),
        (32, 128),
        (2004, 32),
        (96, 64),
        (64, 64),
        (448, 64),
        (64, 224),
        (2004, 64),
    ];

    #[test]
    fn every_plan_covers_all_tiles_and_fits_a_block() {
        let odd = (1..70).flat_map(|tiles| [1, 2, 3, 14, 76].map(|panels| (tiles, panels)));
        for (tiles, panels) in PRODUCTS.into_iter().chain(odd) {
            for rows in [1, 8, 9, 16, 17, 32, 33, 64] {
                let shape = plan(tiles, panels, rows, 132);
                assert!(shape.tokens >= rows && shape.clusters >= 1);
                assert!(shape.fits(tiles, panels), "{tiles} by {panels}: {shape:?}");
                assert_eq!(shape.splits, plan(tiles, panels, 1, 132).splits, "sums in any company");
            }
        }
    }

    #[test]
    fn what_is_brought_ahead_lies_within_the_weights() {
        for (tiles, panels) in PRODUCTS.into_iter().chain([(1, 1), (5, 3)]) {
            for rows in [1, 16, 32, 64] {
                let shape = plan(tiles, panels, rows, 132);
                let ahead = Ahead::of(Pointer::NULL, tiles, panels, &shape, AHEAD_BYTES);
                let end = ahead.weights.address()
                    + u64::from(ahead.chunks.max(1) - 1) * ahead.stride
                    + u64::from(ahead.bytes);
                assert!(end <= u64::from(tiles * panels * PANEL_BYTES), "{ahead:?}");
                assert!(u64::from(ahead.chunks) * u64::from(ahead.bytes) <= AHEAD_BYTES);
            }
        }
    }

    #[test]
    fn products_with_few_tiles_share_their_columns_until_the_card_is_full() {
        assert_eq!(plan(32, 32, 1, 132).splits, 4);
        assert_eq!(plan(256, 32, 1, 132).splits, 1);
        assert_eq!(plan(2, 3, 1, 132).splits, 1, "too few panels to share");
    }
}
