//! What the device tests share. Without a driver there is nothing to run; each test then says so in one line.
#![allow(dead_code, clippy::unwrap_used, reason = "in a test a panic is the report")]

pub mod product;

use half::bf16;
use plimsoll_kernels::device::{Buffer, Device, DeviceError, Plain};
use plimsoll_kernels::reference::random::uniform;

pub fn device() -> Option<Device> {
    match Device::open(0) {
        Ok(device) => Some(device),
        Err(none @ DeviceError::NoDriver) => {
            eprintln!("left out: {none}");
            None
        }
        Err(other) => panic!("{other:?}"),
    }
}

/// Uniform in ±`spread`, the same for the same seed.
pub fn noise(seed: u64, len: usize, spread: f64) -> Vec<bf16> {
    (0..len as u64).map(|i| bf16::from_f64((uniform(seed, i) - 0.5) * 2.0 * spread)).collect()
}

pub fn widened(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// Device memory that holds `values`.
pub fn there<T: Plain>(device: &Device, values: &[T]) -> Buffer {
    let buffer = device.allocate(size_of_val(values), "a test").unwrap();
    device.upload(buffer.pointer(), values).unwrap();
    buffer
}

/// Device memory full of NaN (any float type): what a kernel leaves out shows.
pub fn poisoned(device: &Device, bytes: usize) -> Buffer {
    let buffer = device.allocate(bytes, "a test").unwrap();
    device.fill(&buffer, 0xff).unwrap();
    buffer
}

pub fn back<T: Plain + Default>(device: &Device, buffer: &Buffer, len: usize) -> Vec<T> {
    let mut values = vec![T::default(); len];
    device.download(buffer.pointer(), &mut values).unwrap();
    values
}

/// ‖got − want‖ / ‖want‖; NaN anywhere gives NaN.
pub fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let difference: f64 =
        got.iter().zip(want).map(|(g, w)| square(f64::from(*g) - f64::from(*w))).sum();
    let norm: f64 = want.iter().map(|w| square(f64::from(*w))).sum();
    (difference / norm.max(1e-30)).sqrt()
}
