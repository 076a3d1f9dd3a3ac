//! How near each kernel comes to what a copy reaches on this card: time, bytes moved, share.
//!
//! `cargo run --release -p plimsoll-kernels --example bandwidth`, on a host with a card.

use std::error::Error;

use cudarc::driver::{CudaEvent, sys::CUevent_flags};
use half::bf16;
use plimsoll_kernels::launch::Device;
use plimsoll_kernels::reference::random::uniform;

const REPEATS: usize = 50;

fn main() -> Result<(), Box<dyn Error>> {
    let device = Device::open(0)?;
    println!("{}", device.name()?);
    let copy = copy_rate(&device, 1 << 30)?;
    println!("device copy of 1 GiB: {:.2} TB/s read and written", copy / 1e12);
    println!(
        "{:>24} {:>10} {:>10} {:>9} {:>8}",
        "rms_norm [rows, width]", "bytes", "time", "rate", "of copy"
    );
    for (rows, width) in [(1, 4096), (256, 4096), (8192, 2048), (65_536, 4096), (65_536, 8192)] {
        rms_norm_rate(&device, rows, width, copy)?;
    }
    Ok(())
}

/// Bytes per second, read and written together, of a plain copy on the device.
fn copy_rate(device: &Device, bytes: usize) -> Result<f64, Box<dyn Error>> {
    let stream = device.stream();
    let from = stream.alloc_zeros::<u8>(bytes)?;
    let mut to = stream.alloc_zeros::<u8>(bytes)?;
    let seconds = seconds_each(device, || Ok(stream.memcpy_dtod(&from, &mut to)?))?;
    Ok(2.0 * bytes as f64 / seconds)
}

fn rms_norm_rate(
    device: &Device,
    rows: usize,
    width: usize,
    copy: f64,
) -> Result<(), Box<dyn Error>> {
    let stream = device.stream();
    // Noise: zeros would cost the memory less than it costs in earnest.
    let row: Vec<bf16> = (0..width as u64).map(|i| bf16::from_f64(uniform(1, i) - 0.5)).collect();
    let x = stream.clone_htod(&row.repeat(rows))?;
    let weight = stream.clone_htod(&row)?;
    let mut out = stream.alloc_zeros::<bf16>(rows * width)?;
    let seconds = seconds_each(device, || Ok(device.rms_norm(&x, &weight, 1e-5, &mut out)?))?;
    let bytes = (2 * rows + 1) as f64 * 2.0 * width as f64;
    println!(
        "{:>24} {:>7.1} MB {:>7.1} us {:>4.2} TB/s {:>6.1} %",
        format!("[{rows}, {width}]"),
        bytes / 1e6,
        seconds * 1e6,
        bytes / seconds / 1e12,
        100.0 * bytes / seconds / copy
    );
    Ok(())
}

/// Mean time of one call by the device's own clock, after a few that warm it up.
fn seconds_each(
    device: &Device,
    mut queue: impl FnMut() -> Result<(), Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    let event = || -> Result<CudaEvent, Box<dyn Error>> {
        Ok(device.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?)
    };
    for _ in 0..5 {
        queue()?;
    }
    let begin = event()?;
    for _ in 0..REPEATS {
        queue()?;
    }
    let end = event()?;
    Ok(f64::from(begin.elapsed_ms(&end)?) / 1e3 / REPEATS as f64)
}
