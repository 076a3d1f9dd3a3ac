//! Kernels on a real card against the plain reference, over random shapes with poisoned outputs.
//!
//! Without a driver there is nothing to run; each test then says so in one line. What a host without
//! a card can check of the kernels stands in `images.rs`.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use half::bf16;
use plimsoll_kernels::launch::{Device, DeviceError, RMS_NORM_WIDTH_MAX};
use plimsoll_kernels::reference::norm::rms_norm;
use plimsoll_kernels::reference::random::{bits, uniform};

fn device() -> Option<Device> {
    match Device::open(0) {
        Ok(device) => Some(device),
        Err(none @ DeviceError::NoDriver) => {
            eprintln!("left out: {none}");
            None
        }
        Err(other) => panic!("{other:?}"),
    }
}

fn noise(seed: u64, len: usize, spread: f64) -> Vec<bf16> {
    (0..len as u64).map(|i| bf16::from_f64((uniform(seed, i) - 0.5) * 2.0 * spread)).collect()
}

fn widened(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// Runs one shape into an output of NaN and compares every element.
fn compare(device: &Device, seed: u64, rows: usize, width: usize, spread: f64) {
    let (x, weight) = (noise(seed, rows * width, spread), noise(seed + 1, width, 2.0));
    let eps = 1e-5;
    let stream = device.stream();
    let poison = vec![bf16::NAN; rows * width];
    let mut out = stream.clone_htod(&poison).unwrap();
    let x_there = stream.clone_htod(&x).unwrap();
    let weight_there = stream.clone_htod(&weight).unwrap();
    device.rms_norm(&x_there, &weight_there, eps, &mut out).unwrap();
    let got = widened(&stream.clone_dtoh(&out).unwrap());

    let mut want = vec![f32::NAN; rows * width];
    rms_norm(&widened(&x), &widened(&weight), eps, &mut want);
    let mut rounded_otherwise = 0;
    for (i, (&got, &want)) in got.iter().zip(&want).enumerate() {
        // Half a unit of bf16's last place is up to 2^-8 of the value; the rest is f32's share.
        let allowed = want.abs() * (1.0 / 256.0 + 1e-5) + f32::MIN_POSITIVE;
        let (row, column) = (i / width, i % width);
        assert!(
            (got - want).abs() <= allowed,
            "[{row}, {column}] of [{rows}, {width}]: {got} against {want}"
        );
        rounded_otherwise += usize::from(got != bf16::from_f32(want).to_f32());
    }
    // Only a value that lies almost between two of bf16 may round to the other one.
    assert!(rounded_otherwise <= 1 + got.len() / 200, "{rounded_otherwise} of {}", got.len());
}

#[test]
fn rms_norm_agrees_with_the_reference_over_random_shapes_and_tails() {
    let Some(device) = device() else { return };
    println!("on {}", device.name().unwrap());
    for (rows, width) in [(1, 1), (1, 8), (3, 7), (5, 33), (2, 256), (7, 4096), (1, 4104)] {
        compare(&device, 1, rows, width, 1.0);
    }
    compare(&device, 2, 3, RMS_NORM_WIDTH_MAX, 1.0);
    compare(&device, 3, 3, RMS_NORM_WIDTH_MAX - 1, 1.0);
    for seed in 0..60 {
        let rows = 1 + bits(seed, 0) as usize % 70;
        let width = 1 + bits(seed, 1) as usize % 9000;
        // Half the shapes take the vector path.
        let width = if seed % 2 == 0 { width.next_multiple_of(8) } else { width };
        compare(&device, seed, rows, width, [1e-4, 1.0, 300.0][seed as usize % 3]);
    }
}

#[test]
fn a_small_shape_of_each_path_for_the_memory_checker() {
    let Some(device) = device() else { return };
    compare(&device, 1, 3, 72, 1.0);
    compare(&device, 2, 3, 71, 1.0);
}

#[test]
fn rms_norm_leaves_rows_of_zeros_at_zero() {
    let Some(device) = device() else { return };
    let stream = device.stream();
    let weight = stream.clone_htod(&vec![bf16::ONE; 64]).unwrap();
    let x = stream.clone_htod(&vec![bf16::ZERO; 128]).unwrap();
    let mut out = stream.clone_htod(&vec![bf16::NAN; 128]).unwrap();
    device.rms_norm(&x, &weight, 1e-5, &mut out).unwrap();
    assert!(stream.clone_dtoh(&out).unwrap().iter().all(|&value| value == bf16::ZERO));
}
