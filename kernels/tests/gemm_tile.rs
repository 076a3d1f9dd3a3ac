//! Hopper's matrix product for many tokens against its definition, in every cut and with every epilogue.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod support;

use std::sync::{Mutex, MutexGuard, PoisonError};

use half::bf16;
use plimsoll_kernels::device::{Buffer, Device, Pointer};
use plimsoll_kernels::layout::{Order, in_activations, pack_activations, pack_weights};
use plimsoll_kernels::ops::gemm::{Epilogue, GemmArguments};
use plimsoll_kernels::ops::gemm_tile::{GemmTile, Plan, Shape, Tile};
use support::{back, device, noise, poisoned, relative_error, there, widened};

const EPS: f32 = 1e-5;
const SQUARE_TILES: usize = 3;

/// One product, its operands on the device and what must come out.
struct Case {
    epilogue: Epilogue,
    features: usize,
    panels: usize,
    rows: usize,
    rows_max: usize,
    tiles: usize,
    weights: Buffer,
    input: Buffer,
    squares: Option<Buffer>,
    bias: Option<Buffer>,
    gain: Buffer,
    residual: Vec<bf16>,
    want: Want,
}

/// Row-major `[rows, features]`.
#[derive(Default)]
struct Want {
    out: Vec<f32>,
    normed: Vec<f32>,
}

/// What a launch left, as bits.
#[derive(PartialEq)]
struct Got {
    out: Vec<u32>,
    normed: Vec<u32>,
    squares: Vec<u32>,
    best: Vec<u32>,
}

/// Blocks of a split wait for each other, so two such products may not run side by side, as two tests would.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A Hopper, for one test at a time.
fn hopper() -> Option<(MutexGuard<'static, ()>, Device)> {
    let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let device = device()?;
    if !device.is_hopper() {
        eprintln!("left out: this card is no Hopper");
        return None;
    }
    Some((alone, device))
}

impl Case {
    fn new(
        device: &Device,
        epilogue: Epilogue,
        (features, columns, rows): (usize, usize, usize),
        (norm, with_bias): (bool, bool),
    ) -> Self {
        let seed = (features * 31 + columns * 7 + rows) as u64;
        let gated = epilogue == Epilogue::GateUp;
        let stored = if gated { 2 * features } else { features };
        let order = if gated { Order::GateUp { features } } else { Order::Pairs };
        let (panels, tiles) = (columns.div_ceil(64), stored.div_ceil(64));
        let rows_max = rows.next_multiple_of(256);
        let weights = noise(seed, stored * columns, 0.2);
        let mut padded = vec![bf16::ZERO; rows_max * panels * 64];
        let values = noise(seed + 1, rows * columns, 1.0);
        for row in 0..rows {
            padded[row * panels * 64..][..columns]
                .copy_from_slice(&values[row * columns..][..columns]);
        }
        // What lies beyond the tokens is garbage, and must not matter.
        padded[rows * panels * 64..].fill(bf16::NAN);
        let input = pack_activations(&padded, rows_max, panels * 64, rows_max);
        let squares: Vec<f32> = noise(seed + 2, SQUARE_TILES * rows_max, 1.0)
            .iter()
            .enumerate()
            .map(|(i, s)| if i % rows_max < rows { 20.0 + 10.0 * s.to_f32() } else { f32::NAN })
            .collect();
        let bias = noise(seed + 3, stored, 1.0);
        let gain = noise(seed + 4, features, 1.0);
        let residual = noise(seed + 5, rows * features, 1.0);

        let scale = |row: usize| {
            if !norm {
                return 1.0;
            }
            let sum: f32 = (0..SQUARE_TILES).map(|tile| squares[tile * rows_max + row]).sum();
            1.0 / (sum / columns as f32 + EPS).sqrt()
        };
        let (wide_weights, wide_values) = (widened(&weights), widened(&values));
        let mut product = vec![0.0; rows * stored];
        for row in 0..rows {
            let x = &wide_values[row * columns..][..columns];
            for feature in 0..stored {
                let w = &wide_weights[feature * columns..][..columns];
                let sum: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                let bias = if with_bias { bias[feature].to_f32() } else { 0.0 };
                let scale = if epilogue == Epilogue::Residual { 1.0 } else { scale(row) };
                product[row * stored + feature] = sum * scale + bias;
            }
        }
        let mut want = Want::default();
        for row in 0..rows {
            for feature in 0..features {
                let value = product[row * stored + feature];
                match epilogue {
                    Epilogue::Store | Epilogue::Logits => want.out.push(value),
                    Epilogue::GateUp => {
                        let up = product[row * stored + features + feature];
                        want.out.push(value / (1.0 + (-value).exp()) * up);
                    }
                    Epilogue::Residual => {
                        let sum = residual[row * features + feature].to_f32() + value;
                        want.out.push(sum);
                        want.normed.push(sum * gain[feature].to_f32());
                    }
                }
            }
        }
        Self {
            epilogue,
            features,
            panels,
            rows,
            rows_max,
            tiles,
            weights: there(device, &pack_weights(&weights, stored, columns, order)),
            input: there(device, &input),
            squares: norm.then(|| there(device, &squares)),
            bias: with_bias.then(|| there(device, &bias)),
            gain: there(device, &gain),
            residual,
            want,
        }
    }

    /// Runs it into poisoned memory.
    fn run(&self, device: &Device, gemm: &GemmTile, plan: Plan) -> Got {
        let (rows_max, features, tiles) = (self.rows_max, self.features, self.tiles);
        let panels_out = features.div_ceil(64);
        let words = rows_max * panels_out * 64;
        let out = poisoned(device, 4 * words);
        if self.epilogue == Epilogue::Residual {
            device.upload(out.pointer(), &self.residual).unwrap();
        }
        let normed = poisoned(device, 2 * words);
        let squares_out = poisoned(device, 4 * tiles * rows_max);
        let best = poisoned(device, 8 * tiles * rows_max);
        let pointer =
            |buffer: &Option<Buffer>| buffer.as_ref().map_or(Pointer::NULL, Buffer::pointer);
        let logits = self.epilogue == Epilogue::Logits;
        let (partial_bytes, count) = GemmTile::workspace(device.processors());
        let workspace = poisoned(device, partial_bytes);
        let counters = device.zeroed(4 * count, "a test").unwrap();
        let arguments = GemmArguments {
            weights: self.weights.pointer(),
            input: self.input.pointer(),
            rows: self.rows as i32,
            rows_max: rows_max as i32,
            tiles: tiles as i32,
            panels: self.panels as i32,
            features: features as i32,
            splits: 0,
            squares: self.squares.as_ref().map_or(Pointer::NULL, Buffer::pointer),
            square_tiles: SQUARE_TILES as i32,
            width: 0.0,
            eps: EPS,
            bias: pointer(&self.bias),
            out: if logits { Pointer::NULL } else { out.pointer() },
            out_stride: features as i32,
            logits: if logits { out.pointer() } else { Pointer::NULL },
            gain: self.gain.pointer(),
            normed: normed.pointer(),
            squares_out: squares_out.pointer(),
            best: best.pointer(),
            partials: workspace.pointer(),
            counters: counters.pointer(),
        };
        let arguments = GemmArguments { width: self.columns() as f32, ..arguments };
        gemm.launch_as(device, self.epilogue, &arguments, plan).unwrap();
        let counts: Vec<i32> = back(device, &counters, count);
        assert!(
            counts.iter().all(|&count| count == 0),
            "{plan:?} leaves its counters as they were"
        );
        Got {
            out: back(device, &out, words),
            normed: back(device, &normed, words / 2),
            squares: back(device, &squares_out, tiles * rows_max),
            best: back(device, &best, 2 * tiles * rows_max),
        }
    }

    fn columns(&self) -> usize {
        self.panels * 64
    }

    fn judge(&self, got: &Got, plan: Plan) {
        let (rows, features, rows_max) = (self.rows, self.features, self.rows_max);
        let what = format!("{:?} {features}x{}x{rows} {plan:?}", self.epilogue, self.columns());
        let halves = |words: &[u32]| -> Vec<u16> {
            words.iter().flat_map(|w| [*w as u16, (*w >> 16) as u16]).collect()
        };
        let wide = |half: u16| bf16::from_bits(half).to_f32();
        let near = |got: &[f32], want: &[f32], most: f64, name: &str| {
            let error = relative_error(got, want);
            assert!(error <= most, "{what}: {name} is off by {error}");
        };
        let activations = |words: &[u32], want: &[f32], name: &str| {
            let panels = halves(words);
            let mut found = Vec::new();
            for row in 0..rows_max {
                for feature in 0..features {
                    let bits = panels[in_activations(row, feature, rows_max)];
                    if row < rows {
                        found.push(wide(bits));
                    } else {
                        assert_eq!(bits, 0xffff, "{what}: {name} of row {row} was written");
                    }
                }
            }
            near(&found, want, 4e-3, name);
        };
        match self.epilogue {
            Epilogue::Store | Epilogue::Residual => {
                let out = halves(&got.out);
                assert!(
                    out[rows * features..].iter().all(|&bits| bits == 0xffff),
                    "{what}: too much"
                );
                let found: Vec<f32> =
                    out[..rows * features].iter().map(|&bits| wide(bits)).collect();
                near(&found, &self.want.out, 4e-3, "out");
                if self.epilogue == Epilogue::Residual {
                    activations(&got.normed, &self.want.normed, "normed");
                    for tile in 0..self.tiles {
                        for row in 0..rows {
                            let end = features.min(tile * 64 + 64);
                            let of = &found[row * features..][tile * 64..end];
                            let want: f32 = of.iter().map(|x| x * x).sum();
                            let squares = f32::from_bits(got.squares[tile * rows_max + row]);
                            assert!(
                                (squares - want).abs() <= 1e-4 * want,
                                "{what}: squares {squares} {want}"
                            );
                        }
                        let beyond = &got.squares[tile * rows_max + rows..(tile + 1) * rows_max];
                        assert!(
                            beyond.iter().all(|&bits| bits == u32::MAX),
                            "{what}: squares beyond"
                        );
                    }
                }
            }
            Epilogue::GateUp => activations(&got.out, &self.want.out, "out"),
            Epilogue::Logits => {
                assert!(got.out[rows * features..].iter().all(|&bits| bits == u32::MAX), "{what}");
                let found: Vec<f32> =
                    got.out[..rows * features].iter().map(|&b| f32::from_bits(b)).collect();
                near(&found, &self.want.out, 1e-4, "logits");
                for row in 0..rows {
                    for tile in 0..self.tiles {
                        let of = &found[row * features..][tile * 64..features.min(tile * 64 + 64)];
                        let (mut at, mut most) = (0, f32::NEG_INFINITY);
                        for (i, &logit) in of.iter().enumerate() {
                            if logit > most {
                                (at, most) = (tile * 64 + i, logit);
                            }
                        }
                        let best = &got.best[2 * (row * self.tiles + tile)..][..2];
                        assert_eq!(
                            (f32::from_bits(best[0]), best[1] as usize),
                            (most, at),
                            "{what}: best"
                        );
                    }
                }
            }
        }
    }
}

/// Every cut of a case that the kernel can do.
fn plans(device: &Device, case: &Case) -> Vec<Plan> {
    let shape =
        Shape { tiles: case.tiles as u32, panels: case.panels as u32, rows: case.rows as u32 };
    let mut plans = Vec::new();
    for tile in Tile::ALL {
        for (splits, band) in [(1, 1), (1, 8), (2, 8), (3, 1), (4, 2), (5, 8), (8, 8)] {
            for deal in [false, true] {
                let plan = Plan { tile, splits, deal, band };
                if plan.fits(shape, case.epilogue, device.processors()) {
                    plans.push(plan);
                }
            }
        }
    }
    plans
}

/// Every cut gives what the definition gives, and the same bits again; without a split every tile gives the same bits.
fn check(device: &Device, epilogue: Epilogue, shape: (usize, usize, usize), extras: (bool, bool)) {
    let gemm = GemmTile::load(device).unwrap();
    let case = Case::new(device, epilogue, shape, extras);
    let mut whole: Option<Got> = None;
    for plan in plans(device, &case) {
        let got = case.run(device, &gemm, plan);
        case.judge(&got, plan);
        assert!(
            got == case.run(device, &gemm, plan),
            "{epilogue:?} {plan:?}: other bits when repeated"
        );
        if plan.splits == 1 && !plan.deal {
            assert!(
                *whole.get_or_insert_with(|| case.run(device, &gemm, plan)) == got,
                "{plan:?}: other bits"
            );
        }
    }
}

#[test]
fn rows_are_stored() {
    let Some((_alone, device)) = hopper() else { return };
    check(&device, Epilogue::Store, (200, 576, 65), (true, true));
    check(&device, Epilogue::Store, (640, 512, 300), (false, false));
}

#[test]
fn sums_join_the_residual_stream() {
    let Some((_alone, device)) = hopper() else { return };
    check(&device, Epilogue::Residual, (328, 576, 129), (false, true));
    check(&device, Epilogue::Residual, (512, 640, 513), (false, false));
}

#[test]
fn gates_open() {
    let Some((_alone, device)) = hopper() else { return };
    check(&device, Epilogue::GateUp, (96, 576, 193), (true, true));
    check(&device, Epilogue::GateUp, (320, 512, 257), (true, false));
}

#[test]
fn logits_and_their_best_are_found() {
    let Some((_alone, device)) = hopper() else { return };
    check(&device, Epilogue::Logits, (500, 320, 130), (true, false));
    check(&device, Epilogue::Logits, (962, 256, 256), (true, true));
}

#[test]
fn many_units_of_a_block_follow_each_other() {
    let Some((_alone, device)) = hopper() else { return };
    let gemm = GemmTile::load(&device).unwrap();
    // More units than the card has room for, so that blocks go round.
    for epilogue in [Epilogue::Store, Epilogue::Residual, Epilogue::GateUp] {
        let case =
            Case::new(&device, epilogue, (640, 64, 8200), (epilogue != Epilogue::Residual, false));
        for plan in plans(&device, &case) {
            let got = case.run(&device, &gemm, plan);
            case.judge(&got, plan);
            assert!(got == case.run(&device, &gemm, plan), "{plan:?}: other bits when repeated");
        }
    }
}

#[test]
fn panels_are_dealt_out_evenly() {
    let Some((_alone, device)) = hopper() else { return };
    let gemm = GemmTile::load(&device).unwrap();
    for (epilogue, shape) in [
        (Epilogue::Store, (1280, 320, 1500)),
        (Epilogue::GateUp, (640, 320, 1500)),
        (Epilogue::Residual, (1272, 320, 5100)),
    ] {
        let case = Case::new(&device, epilogue, shape, (epilogue != Epilogue::Residual, true));
        let mut dealt = 0;
        for plan in plans(&device, &case).into_iter().filter(|plan| plan.deal) {
            let got = case.run(&device, &gemm, plan);
            case.judge(&got, plan);
            assert!(got == case.run(&device, &gemm, plan), "{plan:?}: other bits when repeated");
            dealt += 1;
        }
        assert!(dealt > 0, "{epilogue:?}: a tile deals");
    }
}

#[test]
fn small_shapes_for_the_memory_checker() {
    let Some((_alone, device)) = hopper() else { return };
    let gemm = GemmTile::load(&device).unwrap();
    for epilogue in Epilogue::ALL {
        let case =
            Case::new(&device, epilogue, (72, 128, 70), (epilogue != Epilogue::Residual, true));
        for plan in plans(&device, &case).into_iter().filter(|plan| plan.splits <= 2) {
            case.judge(&case.run(&device, &gemm, plan), plan);
        }
    }
}
