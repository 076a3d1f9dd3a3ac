//! The portable product on the device against its reference.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod support;

use plimsoll_kernels::device::Device;
use plimsoll_kernels::ops::gemm::{Epilogue, GemmArguments};
use plimsoll_kernels::ops::gemm_portable::{GemmPortable, Plan, SHAPES};
use support::product::{Bench, Case, Left};

/// Runs a case by a plan and judges it; what it left twice is the same.
fn judged(
    device: &Device,
    gemm: &GemmPortable,
    case: Case,
    plan: impl Fn(u32, u32) -> Plan,
) -> Left {
    let outer = if case.epilogue == Epilogue::GateUp { 2 * case.features } else { case.features };
    let tiles = outer.div_ceil(64) as u32;
    let plan = plan(tiles, (case.inner / 64) as u32);
    let bench = Bench::new(device, case, plan.partials_bytes(), plan.counters());
    assert_eq!(bench.arguments.tiles as u32, tiles);
    let mut launch = |arguments: &GemmArguments| {
        // SAFETY: the bench made its memory of these shapes, and waits for the product.
        unsafe { gemm.launch_as(device, case.epilogue, arguments, plan) }.unwrap();
    };
    let left = bench.run(&mut launch);
    bench.judge(&left);
    for _ in 0..3 {
        assert!(bench.run(&mut launch) == left, "{case:?} by {plan:?} gives the same bits again");
    }
    left
}

#[test]
fn every_epilogue_agrees_with_its_reference_at_every_number_of_tokens() {
    let Some(device) = support::device() else { return };
    let gemm = GemmPortable::load(&device).unwrap();
    let mut seed = 1;
    for epilogue in Epilogue::ALL {
        for rows in [1, 3, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129, 300] {
            for (features, inner) in [(64, 64), (200, 320), (450, 128)] {
                seed += 10;
                let normed = epilogue != Epilogue::Residual && rows % 2 == 0;
                let biased = (rows + features / 50) % 3 != 0;
                let case = Case { epilogue, rows, features, inner, normed, biased, seed };
                judged(&device, &gemm, case, |tiles, panels| gemm.plan(rows as u32, tiles, panels));
            }
        }
    }
}

#[test]
fn every_shape_adds_its_splits_up() {
    let Some(device) = support::device() else { return };
    let gemm = GemmPortable::load(&device).unwrap();
    for epilogue in Epilogue::ALL {
        for shape in 0..SHAPES.len() {
            for (splits, rows) in [(2, 5), (3, 40), (7, 150)] {
                let (features, inner) = (330, 64 * 9);
                let (normed, biased) = (epilogue != Epilogue::Residual, splits == 3);
                let seed = 7000 + 10 * u64::from(splits);
                let case = Case { epilogue, rows, features, inner, normed, biased, seed };
                judged(&device, &gemm, case, |tiles, _| {
                    Plan::fixed(shape, rows as u32, tiles, splits)
                });
            }
        }
    }
}

#[test]
fn with_fixed_splits_a_token_has_the_same_bits_alone_and_in_a_crowd() {
    let Some(device) = support::device() else { return };
    let gemm = GemmPortable::load(&device).unwrap();
    for splits in [1, 3] {
        let left = |rows: usize| {
            let case = Case {
                epilogue: Epilogue::Logits,
                rows,
                features: 200,
                inner: 512,
                normed: false,
                biased: true,
                seed: 99,
            };
            judged(&device, &gemm, case, |tiles, panels| Plan {
                splits,
                ..Plan::fixed(
                    gemm.plan(rows as u32, tiles, panels).shape,
                    rows as u32,
                    tiles,
                    splits,
                )
            })
        };
        let alone = left(1);
        for rows in [2, 12, 20, 50, 140] {
            assert!(left(rows).out[..200] == alone.out[..], "{rows} tokens in {splits} splits");
        }
    }
}

#[test]
fn small_shapes_for_the_memory_checker() {
    let Some(device) = support::device() else { return };
    let gemm = GemmPortable::load(&device).unwrap();
    for (shape, rows) in [5, 11, 30, 50, 200].into_iter().enumerate() {
        for epilogue in Epilogue::ALL {
            let (features, inner, normed) = (100, 256, epilogue != Epilogue::Residual);
            let case = Case { epilogue, rows, features, inner, normed, biased: true, seed: 5 };
            for splits in [1, 3] {
                judged(&device, &gemm, case, |tiles, _| {
                    Plan::fixed(shape, rows as u32, tiles, splits)
                });
            }
        }
    }
}
