//! The device: finding the driver, loading the images, launching kernels with their shapes checked.
//!
//! The driver's library is opened when it is first asked for and never linked, so the same binary
//! starts on hosts without one. Nothing here panics for what a host lacks.

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg, sys,
};
use cudarc::nvrtc::Ptx;
use half::bf16;

use crate::cuda::{Family, NoImage, image};

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// `libcuda` was not found: no NVIDIA driver, or a container without access to it.
    #[error("no CUDA driver: libcuda was not found on this host")]
    NoDriver,
    #[error("the CUDA driver shows {count} devices and number {ordinal} was asked for")]
    NoDevice { ordinal: usize, count: i32 },
    #[error(transparent)]
    NoImage(#[from] NoImage),
    #[error("the CUDA driver failed to {doing}")]
    Driver { doing: &'static str, source: DriverError },
}

/// An opened device with the kernels loaded.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    rms_norm: CudaFunction,
}

/// The widest row that [`Device::rms_norm`] takes: 1,024 threads that hold 32 elements each.
pub const RMS_NORM_WIDTH_MAX: usize = 32 * 1024;

impl Device {
    /// Opens a device and loads every kernel of this binary.
    ///
    /// # Errors
    /// [`DeviceError`] names what is missing, or what the driver refused to do.
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        // SAFETY: it opens the driver's library, whose initialisers are sound to run, and no more.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::NoDriver);
        }
        let image = image(Family::RmsNorm)?;
        let count = CudaContext::device_count().map_err(failed("count the devices"))?;
        if ordinal >= count.max(0) as usize {
            return Err(DeviceError::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).map_err(failed("open the device"))?;
        let stream = context.new_stream().map_err(failed("make a stream"))?;
        let module = context.load_module(Ptx::from_binary(image.to_vec()));
        let module = module.map_err(failed("load the kernels"))?;
        let rms_norm = module.load_function("rms_norm").map_err(failed("find rms_norm"))?;
        Ok(Self { context, stream, rms_norm })
    }

    /// The card's name as its driver gives it.
    ///
    /// # Errors
    /// Only when the driver itself fails.
    pub fn name(&self) -> Result<String, DeviceError> {
        self.context.name().map_err(failed("name the device"))
    }

    /// The stream on which every launch is queued.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Queues [`crate::reference::norm::rms_norm`] in bf16.
    ///
    /// `x` and `out` `[rows, weight.len()]`, `weight` `[width]`, at most [`RMS_NORM_WIDTH_MAX`] wide.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    pub fn rms_norm(
        &self,
        x: &CudaSlice<bf16>,
        weight: &CudaSlice<bf16>,
        eps: f32,
        out: &mut CudaSlice<bf16>,
    ) -> Result<(), DeviceError> {
        let (width, elements) = (weight.len(), x.len());
        assert!(width > 0 && elements.is_multiple_of(width), "the input holds whole rows");
        assert!(width <= RMS_NORM_WIDTH_MAX, "a row fits the registers of one block");
        assert_eq!(elements, out.len(), "the output is as large as the input");
        let rows = u32::try_from(elements / width).expect("a device's memory holds fewer rows");
        if rows == 0 {
            return Ok(());
        }
        let config = LaunchConfig {
            grid_dim: (rows, 1, 1),
            block_dim: (rms_norm_threads(width), 1, 1),
            shared_mem_bytes: 0,
        };
        let width = width as i32;
        let mut launch = self.stream.launch_builder(&self.rms_norm);
        launch.arg(x).arg(weight).arg(&mut *out).arg(&width).arg(&eps);
        // SAFETY: the five arguments are those of the kernel in order and type; the slices hold
        // `rows · width` and `width` elements and stay borrowed until the launch is queued, and
        // cudarc frees device memory in stream order, so none goes before the kernel is done.
        unsafe { launch.launch(config) }.map(drop).map_err(failed("launch rms_norm"))
    }
}

/// Each thread holds up to 32 elements; whole warps, and no more than a row can fill.
fn rms_norm_threads(width: usize) -> u32 {
    (width.div_ceil(32) as u32).next_multiple_of(32)
}

fn failed(doing: &'static str) -> impl FnOnce(DriverError) -> DeviceError {
    move |source| DeviceError::Driver { doing, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_holds_its_row_in_whole_warps_up_to_the_widest() {
        for width in 1..=RMS_NORM_WIDTH_MAX {
            let threads = rms_norm_threads(width);
            assert!(threads.is_multiple_of(32) && (32..=1024).contains(&threads), "{width}");
            assert!(width <= 32 * threads as usize, "{width} elements for {threads} threads");
        }
        assert_eq!(rms_norm_threads(4096), 128);
    }
}
