//! Hopper's streaming product against the plain one: every epilogue, width, cut of K and number of teams, with tails.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod support;

use half::bf16;
use plimsoll_kernels::device::{Device, Pointer};
use plimsoll_kernels::layout::{ROWS_UNIT, pack_activations};
use plimsoll_kernels::ops::gemm::{Epilogue, GemmArguments};
use plimsoll_kernels::ops::gemm_stream::{Ahead, GemmStream, Shape, plan};
use support::product::{Bench, Case, Left};
use support::{back, device, noise, poisoned, there};

/// Only Hopper runs these kernels.
fn hopper() -> Option<(Device, GemmStream)> {
    let device = device()?;
    if !device.is_hopper() {
        eprintln!("left out: not a Hopper card");
        return None;
    }
    let stream = GemmStream::load(&device).unwrap();
    Some((device, stream))
}

const ROWS_MAX: usize = ROWS_UNIT;
const EPS: f32 = 1e-5;

/// Runs a case in a shape that may follow from its tiles and panels, and judges what it left.
fn judged(
    device: &Device,
    stream: &GemmStream,
    case: Case,
    shape: impl Fn(u32, u32) -> Shape,
) -> Left {
    // The stream needs no workspace.
    let bench = Bench::new(device, case, 4, 1);
    let [tiles, panels] = [bench.arguments.tiles, bench.arguments.panels].map(i32::cast_unsigned);
    let shape = shape(tiles, panels);
    // Its own weights will do for what is brought into the L2.
    let tile_bytes = panels * 64 * 64 * 2;
    let ahead = Ahead {
        weights: bench.arguments.weights,
        chunks: tiles,
        stride: u64::from(tile_bytes),
        bytes: tile_bytes,
    };
    let left = bench.run(&mut |arguments| {
        // SAFETY: the bench made its memory of these shapes, and waits for the product.
        unsafe { stream.launch_as(device, case.epilogue, arguments, &shape, ahead) }.unwrap();
    });
    bench.judge(&left);
    left
}

fn shape(tokens: u32, teams: u32, splits: u32, stage_panels: u32, stages: u32) -> Shape {
    Shape { tokens, teams, splits, clusters: u32::MAX, stage_panels, stages }
}

#[test]
fn every_epilogue_and_width_agrees_with_the_plain_product_in_the_planned_shape() {
    let Some((device, stream)) = hopper() else { return };
    let mut seed = 100;
    for epilogue in Epilogue::ALL {
        for rows in [1, 3, 8, 9, 16, 17, 31, 33, 64] {
            for (features, inner) in [(64, 64), (208, 320), (136, 1024)] {
                seed += 10;
                let (biased, normed) =
                    (seed % 20 == 0, rows % 2 == 1 && epilogue != Epilogue::Residual);
                let case = Case { epilogue, rows, features, inner, normed, biased, seed };
                judged(&device, &stream, case, |tiles, panels| {
                    plan(tiles, panels, rows as u32, device.processors())
                });
            }
        }
    }
}

#[test]
fn any_cut_of_columns_tiles_and_stages_gives_the_same_product() {
    let Some((device, stream)) = hopper() else { return };
    let mut seed = 10_000;
    for epilogue in Epilogue::ALL {
        for (teams, splits, stage_panels, stages) in [
            (1, 1, 4, 3),
            (1, 2, 4, 2),
            (1, 4, 2, 3),
            (1, 8, 1, 1),
            (2, 1, 2, 2),
            (2, 2, 3, 2),
            (2, 4, 1, 3),
            (3, 8, 1, 2),
            (4, 1, 1, 4),
            (4, 2, 1, 2),
        ] {
            for (tokens, rows) in [(8, 5), (16, 16), (32, 25), (64, 57)] {
                if tokens == 64 && teams > 3 {
                    continue;
                }
                seed += 10;
                let case = Case {
                    epilogue,
                    rows,
                    features: 328,
                    inner: 64 * 11,
                    normed: epilogue != Epilogue::Residual,
                    biased: seed % 20 == 0,
                    seed,
                };
                let shape = shape(tokens, teams, splits, stage_panels, stages);
                judged(&device, &stream, case, |_, _| shape);
            }
        }
    }
}

#[test]
fn a_block_that_takes_tile_after_tile_leaves_none_out() {
    let Some((device, stream)) = hopper() else { return };
    for epilogue in Epilogue::ALL {
        for (teams, clusters) in [(1, 1), (1, 3), (2, 2), (4, 1)] {
            let case = Case {
                epilogue,
                rows: 19,
                features: 64 * 11 + 8,
                inner: 64 * 5,
                normed: epilogue != Epilogue::Residual,
                biased: true,
                seed: 77,
            };
            let shape = Shape { clusters, ..shape(32, teams, 1, 2, 3) };
            judged(&device, &stream, case, |_, _| shape);
        }
    }
}

#[test]
fn the_same_call_gives_the_same_bits_and_neighbours_change_none_of_a_token_s() {
    let Some((device, stream)) = hopper() else { return };
    for epilogue in Epilogue::ALL {
        let case = Case {
            epilogue,
            rows: 50,
            features: 256,
            inner: 1024,
            normed: epilogue != Epilogue::Residual,
            biased: true,
            seed: 5,
        };
        for splits in [1, 4] {
            let shape = shape(64, 1, splits, 4, 2);
            let first = judged(&device, &stream, case, |_, _| shape);
            for _ in 0..4 {
                assert!(first == judged(&device, &stream, case, |_, _| shape), "{epilogue:?}");
            }
        }
    }
    // Noise is drawn row by row, so the first rows of a larger batch are the smaller batch.
    let logits = |rows, tokens, teams| {
        let case = Case {
            epilogue: Epilogue::Logits,
            rows,
            features: 192,
            inner: 1024,
            normed: true,
            biased: false,
            seed: 9,
        };
        judged(&device, &stream, case, |_, _| shape(tokens, teams, 4, 2, 2)).out
    };
    let alone = logits(1, 8, 1);
    for (rows, tokens, teams) in [(2, 8, 2), (11, 16, 1), (30, 32, 2), (64, 64, 3)] {
        assert!(alone == logits(rows, tokens, teams)[..alone.len()], "alone and among {rows}");
    }
}

/// Three layers of gate · up and down over one residual stream, each product early, against one at a time.
#[test]
fn a_chain_of_early_products_gives_the_same_bits_as_one_product_at_a_time() {
    let Some((device, stream)) = hopper() else { return };
    let (hidden, ffn, layers) = (512, 1536, 3);
    for (rows, splits) in [(1, 8), (8, 4), (40, 2), (64, 4)] {
        let up: Vec<_> =
            (0..layers).map(|l| there(&device, &noise(l, 2 * ffn * hidden, 0.1))).collect();
        let down: Vec<_> =
            (0..layers).map(|l| there(&device, &noise(l + 50, ffn * hidden, 0.1))).collect();
        let gain = there(&device, &noise(7, hidden, 1.0));
        let residual = noise(8, rows * hidden, 1.0);
        let input = pack_activations(&noise(9, rows * hidden, 1.0), rows, hidden, ROWS_MAX);
        let squares = vec![21.0f32; hidden / 64 * ROWS_MAX];
        let (out, normed) = (there(&device, &residual), there(&device, &input));
        let between = poisoned(&device, ffn * ROWS_MAX * 2);
        let squares_there = there(&device, &squares);
        let (tiles_up, tiles_down) = (2 * ffn / 64, hidden / 64);
        let base = GemmArguments {
            weights: Pointer::NULL,
            input: normed.pointer(),
            rows: rows as i32,
            rows_max: ROWS_MAX as i32,
            tiles: tiles_up as i32,
            panels: hidden as i32 / 64,
            features: ffn as i32,
            splits: 1,
            squares: squares_there.pointer(),
            square_tiles: hidden as i32 / 64,
            width: hidden as f32,
            eps: EPS,
            bias: Pointer::NULL,
            out: between.pointer(),
            out_stride: hidden as i32,
            logits: Pointer::NULL,
            gain: gain.pointer(),
            normed: normed.pointer(),
            squares_out: squares_there.pointer(),
            best: Pointer::NULL,
            partials: Pointer::NULL,
            counters: Pointer::NULL,
        };
        let tokens = (rows as u32).next_power_of_two().clamp(8, 64);
        let chain = |wait: bool| {
            for (up, down) in up.iter().zip(&down) {
                let first = GemmArguments { weights: up.pointer(), ..base };
                let second = GemmArguments {
                    weights: down.pointer(),
                    input: between.pointer(),
                    tiles: tiles_down as i32,
                    panels: ffn as i32 / 64,
                    features: hidden as i32,
                    squares: Pointer::NULL,
                    out: out.pointer(),
                    ..base
                };
                let ahead = Ahead {
                    weights: down.pointer(),
                    chunks: tiles_down as u32,
                    stride: ffn as u64 * 128,
                    bytes: 16384,
                };
                let products = [
                    (Epilogue::GateUp, first, shape(tokens, 1, 2, 2, 2), ahead),
                    (Epilogue::Residual, second, shape(tokens, 1, splits, 2, 2), Ahead::NOTHING),
                ];
                for (epilogue, gemm, shape, ahead) in products {
                    // SAFETY: the buffers have the shapes that the arguments name, and outlive the chain.
                    unsafe { stream.launch_as(&device, epilogue, &gemm, &shape, ahead) }?;
                    if wait {
                        device.synchronize()?;
                    }
                }
            }
            Ok(())
        };
        let reset = || {
            device.upload(out.pointer(), &residual).unwrap();
            device.upload(normed.pointer(), &input).unwrap();
            device.upload(squares_there.pointer(), &squares).unwrap();
            device.fill(&between, 0xff).unwrap();
        };
        let result = || back::<bf16>(&device, &out, rows * hidden);
        chain(true).unwrap();
        let want = result();
        assert!(want.iter().all(|x| x.is_finite()), "rows {rows}");
        reset();
        let graph = device.record(|| chain(false)).unwrap();
        for _ in 0..20 {
            device.replay(&graph).unwrap();
            assert!(want == result(), "rows {rows}, {splits} splits");
            reset();
        }
    }
}

/// A product that a checker instruments in seconds.
fn small(epilogue: Epilogue, rows: usize, features: usize, inner: usize) -> Case {
    let normed = epilogue != Epilogue::Residual;
    Case { epilogue, rows, features, inner, normed, biased: true, seed: 3 }
}

#[test]
fn small_shapes_for_the_memory_checker() {
    let Some((device, stream)) = hopper() else { return };
    for epilogue in Epilogue::ALL {
        for (tokens, rows, teams, splits) in [(8, 3, 1, 1), (16, 9, 1, 4), (64, 40, 2, 2)] {
            let shape = shape(tokens, teams, splits, 1, 2);
            judged(&device, &stream, small(epilogue, rows, 136, 320), |_, _| shape);
        }
    }
}

/// One tile and two stages: tokens that threads copy.
#[test]
fn one_tile_of_eight_tokens_for_the_race_checker() {
    let Some((device, stream)) = hopper() else { return };
    judged(&device, &stream, small(Epilogue::Store, 3, 64, 128), |_, _| shape(8, 1, 1, 1, 2));
}

/// One tile and two stages: tokens that the copy engine brings.
#[test]
fn one_tile_of_sixty_four_tokens_for_the_race_checker() {
    let Some((device, stream)) = hopper() else { return };
    judged(&device, &stream, small(Epilogue::Store, 40, 64, 128), |_, _| shape(64, 1, 1, 1, 2));
}

/// A cluster of two, whose sums meet in shared memory.
#[test]
fn one_tile_of_two_splits_for_the_race_checker() {
    let Some((device, stream)) = hopper() else { return };
    judged(&device, &stream, small(Epilogue::Store, 9, 64, 128), |_, _| shape(16, 1, 2, 1, 1));
}
