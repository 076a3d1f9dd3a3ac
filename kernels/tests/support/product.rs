//! One fused product over random numbers, judged against `reference::product`; whose kernel it is, the caller says.

use half::bf16;
use plimsoll_kernels::device::{Buffer, Device, Pointer};
use plimsoll_kernels::layout::{
    Order, PANEL, TILE_ROWS, in_activations, pack_activations, pack_weights,
};
use plimsoll_kernels::ops::gemm::{Epilogue, GemmArguments};
use plimsoll_kernels::reference::product::{Norm, Product};

use super::{back, noise, poisoned, relative_error, there, widened};

const EPS: f32 = 1e-5;
const SQUARE_TILES: usize = 5;

/// A product's shape and what it does.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub epilogue: Epilogue,
    pub rows: usize,
    /// Outputs per token.
    pub features: usize,
    /// A multiple of 64.
    pub inner: usize,
    pub normed: bool,
    pub biased: bool,
    pub seed: u64,
}

/// What a product left, as bits: whatever it wrote, then whatever it should not have touched is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// `[rows][features]` of the output, in bf16 or f32.
    pub out: Vec<u32>,
    /// Residual: normed and the sums of squares. Logits: the best.
    pub more: Vec<u32>,
}

/// A case on the device.
pub struct Bench<'a> {
    device: &'a Device,
    pub case: Case,
    pub arguments: GemmArguments,
    rows_max: usize,
    stride: usize,
    weights: Vec<bf16>,
    input: Vec<bf16>,
    residual: Vec<bf16>,
    gain: Vec<bf16>,
    bias: Vec<bf16>,
    squares: Vec<f32>,
    out: Buffer,
    more: Buffer,
    squares_out: Buffer,
    _inputs: Vec<Buffer>,
}

impl<'a> Bench<'a> {
    /// `partials_bytes` and `counters` of workspace, the counters zero.
    pub fn new(device: &'a Device, case: Case, partials_bytes: usize, counters: usize) -> Self {
        let Case { epilogue, rows, features, inner, seed, .. } = case;
        let rows_max = rows.next_multiple_of(256);
        let stride = (features + 6).next_multiple_of(8);
        let gated = epilogue == Epilogue::GateUp;
        let outer = if gated { 2 * features } else { features };
        let order = if gated { Order::GateUp { features } } else { Order::Pairs };
        let weights = noise(seed, outer * inner, (3.0 / inner as f64).sqrt());
        let input = noise(seed + 1, rows * inner, 2.0);
        let bias = noise(seed + 2, outer, 1.0);
        let gain = noise(seed + 3, features, 1.0);
        let mut residual = noise(seed + 4, rows_max * stride, 2.0);
        // What lies beside the real features is not the kernel's to write.
        for (row, values) in residual.chunks_exact_mut(stride).enumerate() {
            values[if row < rows { features } else { 0 }..].fill(bf16::NAN);
        }
        let squares = widened(&noise(seed + 5, SQUARE_TILES * rows_max, 1.0));
        let squares: Vec<f32> = squares.iter().map(|x| 10.0 + 9.0 * x).collect();

        let packed = pack_weights(&weights, outer, inner, order);
        let tiles = packed.len() / inner / TILE_ROWS;
        // Rows beyond the tokens hold anything at all.
        let mut activations = vec![bf16::NAN; rows_max * inner];
        let held = pack_activations(&input, rows, inner, rows_max);
        for row in 0..rows {
            for column in 0..inner {
                let at = in_activations(row, column, rows_max);
                activations[at] = held[at];
            }
        }
        let panels_out = features.div_ceil(PANEL) * PANEL;
        let out = match epilogue {
            Epilogue::Store => poisoned(device, rows_max * stride * 2),
            Epilogue::Residual => there(device, &residual),
            Epilogue::GateUp => poisoned(device, rows_max * panels_out * 2),
            Epilogue::Logits => poisoned(device, rows_max * stride * 4),
        };
        let more = match epilogue {
            Epilogue::Logits => poisoned(device, rows_max * tiles * 8),
            _ => poisoned(device, rows_max * panels_out * 2),
        };
        let squares_out = poisoned(device, tiles * rows_max * 4);
        let inputs = vec![
            there(device, &packed),
            there(device, &activations),
            there(device, &squares),
            there(device, &bias),
            there(device, &gain),
            poisoned(device, partials_bytes),
            device.zeroed(counters * 4, "a test").unwrap(),
        ];
        let arguments = GemmArguments {
            weights: inputs[0].pointer(),
            input: inputs[1].pointer(),
            rows: rows as i32,
            rows_max: rows_max as i32,
            tiles: tiles as i32,
            panels: (inner / PANEL) as i32,
            features: features as i32,
            splits: 0,
            squares: if case.normed { inputs[2].pointer() } else { Pointer::NULL },
            square_tiles: SQUARE_TILES as i32,
            width: 48.0,
            eps: EPS,
            bias: if case.biased { inputs[3].pointer() } else { Pointer::NULL },
            out: out.pointer(),
            out_stride: stride as i32,
            logits: if epilogue == Epilogue::Logits { out.pointer() } else { Pointer::NULL },
            gain: inputs[4].pointer(),
            normed: more.pointer(),
            squares_out: squares_out.pointer(),
            best: more.pointer(),
            partials: inputs[5].pointer(),
            counters: inputs[6].pointer(),
        };
        Self {
            device,
            case,
            arguments,
            rows_max,
            stride,
            weights,
            input,
            residual,
            gain,
            bias,
            squares,
            out,
            more,
            squares_out,
            _inputs: inputs,
        }
    }

    /// Poisons what the product writes, runs it, and reads what it left. Panics where anything else was written.
    pub fn run(&self, launch: &mut dyn FnMut(&GemmArguments)) -> Left {
        let Case { epilogue, rows, features, .. } = self.case;
        self.device.fill(&self.out, 0xff).unwrap();
        self.device.fill(&self.more, 0xff).unwrap();
        self.device.fill(&self.squares_out, 0xff).unwrap();
        if epilogue == Epilogue::Residual {
            self.device.upload(self.out.pointer(), &self.residual).unwrap();
        }
        launch(&self.arguments);
        self.device.synchronize().unwrap();
        let tiles = self.arguments.tiles as usize;
        let halves = |buffer: &Buffer| -> Vec<u32> {
            let values: Vec<bf16> = back(self.device, buffer, buffer.bytes() / 2);
            values.iter().map(|value| u32::from(value.to_bits())).collect()
        };
        let words = |buffer: &Buffer| -> Vec<u32> { back(self.device, buffer, buffer.bytes() / 4) };
        let row_major = |row: usize, column: usize| row * self.stride + column;
        let panels = |row: usize, column: usize| in_activations(row, column, self.rows_max);
        let left = match epilogue {
            Epilogue::Store => {
                let out = taken(halves(&self.out), rows, features, features, row_major, 0xffff);
                Left { out, more: Vec::new() }
            }
            Epilogue::Residual => {
                let nan = u32::from(bf16::NAN.to_bits());
                let out = taken(halves(&self.out), rows, features, features, row_major, nan);
                let wide = tiles * TILE_ROWS;
                let mut more = taken(halves(&self.more), rows, features, wide, panels, 0xffff);
                let by_tile = |row: usize, tile: usize| tile * self.rows_max + row;
                let squares = words(&self.squares_out);
                more.extend(taken(squares, rows, tiles, tiles, by_tile, u32::MAX));
                Left { out, more }
            }
            Epilogue::GateUp => {
                let wide = tiles * TILE_ROWS / 2;
                let out = taken(halves(&self.out), rows, features, wide, panels, 0xffff);
                Left { out, more: Vec::new() }
            }
            Epilogue::Logits => {
                let out = taken(words(&self.out), rows, features, features, row_major, u32::MAX);
                let pairs = |row: usize, word: usize| row * 2 * tiles + word;
                let more = taken(words(&self.more), rows, 2 * tiles, 2 * tiles, pairs, u32::MAX);
                Left { out, more }
            }
        };
        let counters: Vec<i32> = back(self.device, &self._inputs[6], self._inputs[6].bytes() / 4);
        assert!(counters.iter().all(|&count| count == 0), "counters return to zero");
        left
    }

    /// Panics where what is left is not what the reference says.
    pub fn judge(&self, left: &Left) {
        let Case { epilogue, rows, features, inner, normed, biased, .. } = self.case;
        let case = &self.case;
        let squares: Vec<f32> = self
            .squares
            .chunks_exact(self.rows_max)
            .flat_map(|tile| &tile[..rows])
            .copied()
            .collect();
        let (input, weight, bias) =
            (widened(&self.input), widened(&self.weights), widened(&self.bias));
        let product = Product {
            input: &input,
            inner,
            weight: &weight,
            bias: biased.then_some(&bias),
            norm: normed.then_some(Norm { squares: &squares, width: 48.0, eps: EPS }),
        };
        let halves = |bits: &[u32]| -> Vec<f32> {
            bits.iter().map(|&bits| bf16::from_bits(bits as u16).to_f32()).collect()
        };
        let near = |got: &[f32], want: &[f32], most: f64| {
            let error = relative_error(got, want);
            assert!(error < most, "{case:?} is off by {error}");
        };
        match epilogue {
            Epilogue::Store => near(&halves(&left.out), &product.store(), 3e-3),
            Epilogue::GateUp => near(&halves(&left.out), &product.gate_up(), 3e-3),
            Epilogue::Residual => {
                let rows_of = self.residual.chunks_exact(self.stride).take(rows);
                let old: Vec<bf16> = rows_of.flat_map(|row| &row[..features]).copied().collect();
                let want = product.residual(&widened(&old), &widened(&self.gain));
                let (normed, squares) = left.more.split_at(rows * features);
                let tiles = squares.len() / rows;
                let squares: Vec<f32> = (0..tiles * rows)
                    .map(|at| f32::from_bits(squares[at % rows * tiles + at / rows]))
                    .collect();
                near(&halves(&left.out), &want.residual, 3e-3);
                near(&halves(normed), &want.normed, 4e-3);
                near(&squares, &want.squares, 1e-3);
            }
            Epilogue::Logits => {
                let got: Vec<f32> = left.out.iter().copied().map(f32::from_bits).collect();
                near(&got, &product.logits().logits, 1e-4);
                // The best is the best of what was written, bit by bit.
                for (row, best) in got
                    .chunks_exact(features)
                    .zip(left.more.chunks_exact(2 * features.div_ceil(TILE_ROWS)))
                {
                    for (tile, (row, best)) in
                        row.chunks(TILE_ROWS).zip(best.chunks_exact(2)).enumerate()
                    {
                        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        let first = row.iter().position(|&x| x == largest).unwrap();
                        assert_eq!(best[0], largest.to_bits(), "{case:?}");
                        assert_eq!(best[1] as usize, tile * TILE_ROWS + first, "{case:?}");
                    }
                }
            }
        }
    }
}

/// `[rows][columns]` of `values`; padding up to `columns_padded` is zero, and all else is `poison` still.
fn taken(
    mut values: Vec<u32>,
    rows: usize,
    columns: usize,
    columns_padded: usize,
    at: impl Fn(usize, usize) -> usize,
    poison: u32,
) -> Vec<u32> {
    let mut taken = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        for column in 0..columns_padded {
            let value = std::mem::replace(&mut values[at(row, column)], poison);
            if column < columns {
                taken.push(value);
            } else {
                assert_eq!(value & 0x7fff_ffff, 0, "padding is zero at ({row}, {column})");
            }
        }
    }
    let other = values.iter().position(|&value| value != poison);
    assert_eq!(other, None, "nothing else is written");
    taken
}
