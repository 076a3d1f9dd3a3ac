//! A step's input from pinned host memory into the device's fixed buffers, in one launch.

use crate::cuda::Family;
use crate::device::{Device, DeviceError, Grid, Kernel, Pointer};

/// Sixteen bytes.
pub type Piece = [u32; 4];

/// Segments of one launch.
pub const SEGMENTS: usize = 8;

/// A run of pieces: `count` of them from piece `first` on.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub to: Pointer<Piece>,
    pub first: i32,
    pub count: i32,
}

impl Segment {
    pub const NONE: Self = Self { to: Pointer::NULL, first: 0, count: 0 };
}

/// Mirrors `StageArguments` of `cuda/stage.cu`, where each field is documented.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StageArguments {
    pub from: Pointer<Piece>,
    pub segments: [Segment; SEGMENTS],
    pub deltas_first: i32,
    pub deltas: i32,
    pub tables: Pointer<i32>,
    pub table_stride: i32,
}

#[derive(Clone, Copy, Debug)]
pub struct Stage {
    stage: Kernel,
}

impl Stage {
    /// # Errors
    /// What the driver says.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self { stage: device.kernel(Family::Stage, "stage", 0)? })
    }

    /// Queues the copies. `from` stays as it is until the launch is done.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    pub fn run(&self, device: &Device, arguments: &StageArguments) -> Result<(), DeviceError> {
        let longest = arguments.segments.iter().map(|segment| segment.count);
        let longest = longest.chain([arguments.deltas]).max().unwrap_or(0).max(1);
        let grid = Grid {
            blocks: [(longest as u32).div_ceil(256), 1, 1],
            threads: 256,
            shared_bytes: 0,
            cluster: [1, 1, 1],
            early: true,
        };
        // SAFETY: the struct mirrors the kernel's; the caller's segments lie within their buffers.
        unsafe { device.launch(self.stage, grid, arguments) }
    }
}

#[cfg(test)]
crate::mirrors::mirrors! {
    "stage.cu":
    Segment { to, first, count }
    StageArguments { from, segments, deltas_first, deltas, tables, table_stride }
}
