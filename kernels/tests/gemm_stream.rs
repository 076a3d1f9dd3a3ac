//! Hopper's streaming product against the plain one: every epilogue, width, cut of K and number of teams, with tails.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod support;

use half::bf16;
use plimsoll_kernels::device::{Device, Pointer};
use plimsoll_kernels::layout::{Order, ROWS_UNIT, in_activations, pack_activations, pack_weights};
use plimsoll_kernels::ops::gemm::{Epilogue, GemmArguments};
use plimsoll_kernels::ops::gemm_stream::{Ahead, GemmStream, Shape, plan};
use plimsoll_kernels::reference::linear::linear;
use plimsoll_kernels::reference::random::uniform;
use support::{back, device, noise, poisoned, relative_error, there, widened};

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

struct Case {
    epilogue: Epilogue,
    features: usize,
    columns: usize,
    rows: usize,
    bias: bool,
    norm: bool,
    seed: u64,
}

/// All that a case wrote, as bits.
struct Outcome {
    bits: Vec<u32>,
}

impl Case {
    fn tiles(&self) -> usize {
        match self.epilogue {
            // Whole panels of outputs: padded features are written as zeros.
            Epilogue::GateUp => self.features.div_ceil(64) * 2,
            _ => self.features.div_ceil(64),
        }
    }

    fn run(&self, device: &Device, stream: &GemmStream, shape: &Shape) -> Outcome {
        let Case { epilogue, features, columns, rows, seed, .. } = *self;
        let (tiles, panels) = (self.tiles(), columns.div_ceil(64));
        let gate_up = epilogue == Epilogue::GateUp;
        let outputs = if gate_up { 2 * features } else { features };
        let padded = panels * 64;
        let mut input = noise(seed, rows * padded, 1.0);
        for row in input.chunks_mut(padded) {
            row[columns..].fill(bf16::ZERO);
        }
        let weights = noise(seed + 1, outputs * columns, 0.1);
        let bias = noise(seed + 2, outputs, 1.0);
        let gain = noise(seed + 3, features, 1.0);
        let residual = noise(seed + 4, rows * features, 1.0);
        let square_tiles = 13;
        let squares: Vec<f32> = (0..square_tiles as usize * ROWS_MAX)
            .map(|i| uniform(seed + 5, i as u64) as f32 * 3.0 + 0.1)
            .collect();
        let width = 700.0;

        let order = if gate_up { Order::GateUp { features } } else { Order::Pairs };
        let mut packed = pack_weights(&weights, outputs, columns, order);
        packed.resize(tiles * 64 * padded, bf16::ZERO);
        let weights_there = there(device, &packed);
        // What lies behind the last row is not read, or does no harm.
        let mut input_packed = pack_activations(&input, rows, padded, ROWS_MAX);
        for panel in input_packed.chunks_mut(ROWS_MAX * 64) {
            panel[rows * 64..].fill(bf16::NAN);
        }
        let input_there = there(device, &input_packed);
        let (bias_there, gain_there) = (there(device, &bias), there(device, &gain));
        let squares_there = there(device, &squares);
        let out_panels = features.div_ceil(64);
        let out_there = match epilogue {
            Epilogue::Residual => there(device, &residual),
            Epilogue::GateUp => poisoned(device, out_panels * ROWS_MAX * 64 * 2),
            _ => poisoned(device, ROWS_MAX * features * 2),
        };
        let logits_there = poisoned(device, rows * features * 4);
        let normed_there = poisoned(device, out_panels * ROWS_MAX * 64 * 2);
        let squares_out_there = poisoned(device, tiles * ROWS_MAX * 4);
        let best_there = poisoned(device, ROWS_MAX * tiles * 8);
        let gemm = GemmArguments {
            weights: weights_there.pointer(),
            input: input_there.pointer(),
            rows: rows as i32,
            rows_max: ROWS_MAX as i32,
            tiles: tiles as i32,
            panels: panels as i32,
            features: features as i32,
            splits: 1,
            squares: if self.norm { squares_there.pointer() } else { Pointer::NULL },
            square_tiles,
            width,
            eps: EPS,
            bias: if self.bias { bias_there.pointer() } else { Pointer::NULL },
            out: out_there.pointer(),
            out_stride: features as i32,
            logits: logits_there.pointer(),
            gain: gain_there.pointer(),
            normed: normed_there.pointer(),
            squares_out: squares_out_there.pointer(),
            best: best_there.pointer(),
            partials: Pointer::NULL,
            counters: Pointer::NULL,
        };
        // Its own weights will do for what is brought into the L2.
        let ahead = Ahead {
            weights: weights_there.pointer(),
            chunks: tiles as u32,
            stride: (padded * 64 * 2) as u64,
            bytes: (padded * 64 * 2) as u32,
        };
        // SAFETY: the buffers have the shapes that the arguments name, and live until they are read back.
        unsafe { stream.launch_as(device, epilogue, &gemm, shape, ahead) }.unwrap();

        let scale = |row: usize| {
            let sum: f32 =
                (0..square_tiles as usize).map(|tile| squares[tile * ROWS_MAX + row]).sum();
            if self.norm { 1.0 / (sum / width + EPS).sqrt() } else { 1.0 }
        };
        let (input, bias) = (widened(&input), widened(&bias));
        let mut sums = vec![0.0; rows * outputs];
        let input: Vec<f32> =
            input.chunks(padded).flat_map(|row| row[..columns].to_vec()).collect();
        linear(&input, columns, &widened(&weights), None, &mut sums);
        for (row, sums) in sums.chunks_mut(outputs).enumerate() {
            for (sum, bias) in sums.iter_mut().zip(&bias) {
                let bias = if self.bias { *bias } else { 0.0 };
                *sum = *sum * if epilogue == Epilogue::Residual { 1.0 } else { scale(row) } + bias;
            }
        }
        let mut bits: Vec<u32> = Vec::new();
        let label = format!("{epilogue:?} {features}x{columns} rows {rows} {shape:?}");
        let check = |got: &[f32], want: &[f32], bound: f64, what: &str| {
            let error = relative_error(got, want);
            assert!(error < bound, "{what} of {label}: off by {error}");
        };
        match epilogue {
            Epilogue::Store => {
                let out = widened(&back::<bf16>(device, &out_there, ROWS_MAX * features));
                check(&out[..rows * features], &sums, 4e-3, "out");
                assert!(out[rows * features..].iter().all(|x| x.is_nan()), "{label}: other rows");
                bits.extend(out.iter().map(|x| x.to_bits()));
            }
            Epilogue::GateUp => {
                let want: Vec<f32> = sums
                    .chunks(outputs)
                    .flat_map(|row| {
                        let (gate, up) = row.split_at(features);
                        let silu = |x: f32| x / (1.0 + (-x).exp());
                        gate.iter().zip(up).map(|(g, u)| silu(*g) * u).collect::<Vec<_>>()
                    })
                    .collect();
                let out = back::<bf16>(device, &out_there, out_panels * ROWS_MAX * 64);
                let at = |row, feature| out[in_activations(row, feature, ROWS_MAX)].to_f32();
                let got: Vec<f32> =
                    (0..rows).flat_map(|r| (0..features).map(move |f| at(r, f))).collect();
                check(&got, &want, 4e-3, "out");
                let padding =
                    (features..out_panels * 64).all(|f| (0..rows).all(|r| at(r, f) == 0.0));
                assert!(padding, "{label}: padding is zero");
                assert!((rows..ROWS_MAX).all(|r| at(r, 0).is_nan()), "{label}: other rows");
                bits.extend(got.iter().map(|x| x.to_bits()));
            }
            Epilogue::Residual => {
                let old = widened(&residual);
                let want: Vec<f32> = sums.iter().zip(&old).map(|(s, o)| s + o).collect();
                let out = widened(&back::<bf16>(device, &out_there, rows * features));
                check(&out, &want, 4e-3, "residual");
                let normed = back::<bf16>(device, &normed_there, out_panels * ROWS_MAX * 64);
                let squares = back::<f32>(device, &squares_out_there, tiles * ROWS_MAX);
                // The rest follows from what was stored, exactly or nearly so.
                for row in 0..rows {
                    for feature in 0..out_panels * 64 {
                        let want = if feature < features {
                            bf16::from_f32(out[row * features + feature] * gain[feature].to_f32())
                        } else {
                            bf16::ZERO
                        };
                        let got = normed[in_activations(row, feature, ROWS_MAX)];
                        assert_eq!(got.to_f32(), want.to_f32(), "{label}: {row}, {feature}");
                    }
                    for tile in 0..tiles {
                        let end = features.min(tile * 64 + 64);
                        let values = &out[row * features + tile * 64..row * features + end];
                        let want: f32 = values.iter().map(|x| x * x).sum();
                        let got = squares[tile * ROWS_MAX + row];
                        assert!((got - want).abs() <= 1e-5 * want, "{label}: {got} for {want}");
                    }
                }
                assert!(squares[rows..ROWS_MAX].iter().all(|x| x.is_nan()), "{label}: other rows");
                bits.extend(out.iter().map(|x| x.to_bits()));
                let of_rows = |tile: &[f32]| tile[..rows].iter().map(|x| x.to_bits()).collect();
                bits.extend(
                    squares.chunks(ROWS_MAX).flat_map(|tile| -> Vec<u32> { of_rows(tile) }),
                );
            }
            Epilogue::Logits => {
                let logits = back::<f32>(device, &logits_there, rows * features);
                check(&logits, &sums, 1e-4, "logits");
                let best = back::<u32>(device, &best_there, ROWS_MAX * tiles * 2);
                for row in 0..rows {
                    for tile in 0..tiles {
                        let begin = row * features + tile * 64;
                        let end = row * features + features.min(tile * 64 + 64);
                        let mut want = (f32::NEG_INFINITY, 0);
                        for (i, &logit) in logits[begin..end].iter().enumerate() {
                            if logit > want.0 {
                                want = (logit, tile * 64 + i);
                            }
                        }
                        let at = (row * tiles + tile) * 2;
                        let got = (f32::from_bits(best[at]), best[at + 1] as usize);
                        assert_eq!(got, want, "{label}: best of row {row} in tile {tile}");
                    }
                }
                bits.extend(logits.iter().map(|x| x.to_bits()));
            }
        }
        Outcome { bits }
    }
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
            for (features, columns) in [(64, 64), (208, 320), (136, 1000)] {
                seed += 10;
                let bias = seed % 20 == 0;
                let case =
                    Case { epilogue, features, columns, rows, bias, norm: rows % 2 == 1, seed };
                let panels = columns.div_ceil(64) as u32;
                let shape = plan(case.tiles() as u32, panels, rows as u32, device.processors());
                case.run(&device, &stream, &shape);
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
                    features: 328,
                    columns: 64 * 11,
                    rows,
                    bias: seed % 20 == 0,
                    norm: true,
                    seed,
                };
                let shape = shape(tokens, teams, splits, stage_panels, stages);
                case.run(&device, &stream, &shape);
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
                features: 64 * 11 + 8,
                columns: 64 * 5,
                rows: 19,
                bias: true,
                norm: true,
                seed: 77,
            };
            let shape = Shape { clusters, ..shape(32, teams, 1, 2, 3) };
            case.run(&device, &stream, &shape);
        }
    }
}

#[test]
fn the_same_call_gives_the_same_bits_and_neighbours_change_none_of_a_token_s() {
    let Some((device, stream)) = hopper() else { return };
    for epilogue in Epilogue::ALL {
        let case = Case {
            epilogue,
            features: 256,
            columns: 1024,
            rows: 50,
            bias: true,
            norm: true,
            seed: 5,
        };
        for splits in [1, 4] {
            let shape = shape(64, 1, splits, 4, 2);
            let first = case.run(&device, &stream, &shape).bits;
            for _ in 0..4 {
                assert!(first == case.run(&device, &stream, &shape).bits, "{epilogue:?}");
            }
        }
    }
    // Noise is drawn row by row, so the first rows of a larger batch are the smaller batch.
    let logits = |rows, tokens, teams| {
        let case = Case {
            epilogue: Epilogue::Logits,
            features: 192,
            columns: 1024,
            rows,
            bias: false,
            norm: true,
            seed: 9,
        };
        case.run(&device, &stream, &shape(tokens, teams, 4, 2, 2)).bits
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

#[test]
fn small_shapes_for_the_memory_checker() {
    let Some((device, stream)) = hopper() else { return };
    for epilogue in Epilogue::ALL {
        for (tokens, rows, teams, splits) in [(8, 3, 1, 1), (16, 9, 1, 4), (64, 40, 2, 2)] {
            let case = Case {
                epilogue,
                features: 136,
                columns: 300,
                rows,
                bias: true,
                norm: true,
                seed: 3,
            };
            case.run(&device, &stream, &shape(tokens, teams, splits, 1, 2));
        }
    }
}
