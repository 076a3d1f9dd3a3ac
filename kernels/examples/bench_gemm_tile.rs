//! Times Hopper's product for many tokens on the shapes of Llama 1B and 8B, each with the epilogue that it has in
//! the engine, for every cut that makes sense, beside the floor: the larger of bytes at the read bandwidth and
//! operations at the matrix peak.
//!
//! `bench_gemm_tile [FILE]`: FILE has lines `product tokens microseconds` of another library, to print beside ours.
//! `bench_gemm_tile hot`, `bench_gemm_tile hot-decode`: long runs, in which the card's power decides.

#![allow(clippy::unwrap_used, reason = "a bench that fails may say so roughly")]

use std::collections::HashMap;

use half::bf16;
use plimsoll_kernels::device::{Buffer, Device, Pointer};
use plimsoll_kernels::ops::gemm::{Epilogue, GemmArguments};
use plimsoll_kernels::ops::gemm_tile::{Card, GemmTile, Plan, Shape, Tile, plan};
use plimsoll_kernels::reference::random::bits;

const READ_BYTES_PER_SECOND: f64 = 4.42e12;
const FLOP_PER_SECOND: f64 = 750e12;
const POOL_BYTES: usize = 768 << 20;

struct Product {
    name: &'static str,
    stored: usize,
    columns: usize,
    epilogue: Epilogue,
}

const PRODUCTS: [Product; 8] = [
    Product { name: "1b.qkv", stored: 3072, columns: 2048, epilogue: Epilogue::Store },
    Product { name: "1b.o", stored: 2048, columns: 2048, epilogue: Epilogue::Residual },
    Product { name: "1b.gate_up", stored: 16384, columns: 2048, epilogue: Epilogue::GateUp },
    Product { name: "1b.down", stored: 2048, columns: 8192, epilogue: Epilogue::Residual },
    Product { name: "8b.qkv", stored: 6144, columns: 4096, epilogue: Epilogue::Store },
    Product { name: "8b.o", stored: 4096, columns: 4096, epilogue: Epilogue::Residual },
    Product { name: "8b.gate_up", stored: 28672, columns: 4096, epilogue: Epilogue::GateUp },
    Product { name: "8b.down", stored: 4096, columns: 14336, epilogue: Epilogue::Residual },
];

const TOKENS: [usize; 10] = [128, 192, 256, 320, 384, 512, 640, 768, 1024, 2048];

struct Memory {
    weights: Buffer,
    input: Buffer,
    squares: Buffer,
    out: Buffer,
    normed: Buffer,
    squares_out: Buffer,
    gain: Buffer,
    workspace: Buffer,
    counters: Buffer,
}

fn main() {
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => return eprintln!("left out: {error}"),
    };
    let gemm = GemmTile::load(&device).unwrap();
    println!("{}, {:?}", device.name().unwrap(), Card::of(&device));
    let others = std::env::args().nth(1).map(|file| read_others(&file)).unwrap_or_default();
    let memory = Memory::new(&device);
    match std::env::args().nth(1).as_deref() {
        Some("hot") => return hot(&device, &gemm, &memory),
        Some("hot-decode") => return hot_decode(&device, &gemm, &memory),
        _ => {}
    }
    println!(
        "product tokens floor_us | best us TFLOP/s share cut | planned us | library us | next cuts"
    );
    println!("cuts are tile x splits, b band");
    for product in &PRODUCTS {
        for tokens in TOKENS {
            let other = others.get(&(product.name.to_owned(), tokens)).copied();
            line(&device, &gemm, &memory, product, tokens, other);
        }
    }
}

fn line(
    device: &Device,
    gemm: &GemmTile,
    memory: &Memory,
    product: &Product,
    tokens: usize,
    other: Option<f64>,
) {
    let (planned, cuts) = candidates(device, product, tokens);
    let time =
        |cut: Plan, seconds: f64| seconds_of(device, gemm, memory, product, tokens, cut, seconds);
    let mut timed: Vec<(f64, Plan)> = cuts.iter().map(|&cut| (time(cut, 2e-3), cut)).collect();
    timed.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (best, planned_time) = (time(timed[0].1, 8e-3), time(planned, 8e-3));
    let flop = 2.0 * (product.stored * product.columns * tokens) as f64;
    let out = product.stored / if product.epilogue == Epilogue::GateUp { 2 } else { 1 };
    let bytes = 2.0 * (product.stored * product.columns + tokens * (product.columns + out)) as f64;
    let floor = (bytes / READ_BYTES_PER_SECOND).max(flop / FLOP_PER_SECOND);
    let next: Vec<String> = timed
        .iter()
        .skip(1)
        .take(4)
        .map(|(s, cut)| format!("{:.1} {}", s * 1e6, short(*cut)))
        .collect();
    println!(
        "{} {tokens} {:.1} | {:.1} {:.0} {:.0}% {} | {:.1} {} | {} | {:.1} {}",
        product.name,
        floor * 1e6,
        best * 1e6,
        flop / best / 1e12,
        100.0 * floor / best,
        short(timed[0].1),
        planned_time * 1e6,
        short(planned),
        other.map_or("-".into(), |us| format!("{us:.1}")),
        timed[0].0 * 1e6,
        next.join(", ")
    );
}

/// Prefill after 60 ms of the same product.
fn hot(device: &Device, gemm: &GemmTile, memory: &Memory) {
    for (product, tokens) in [(6, 8192), (5, 8192), (4, 8192), (6, 2048)] {
        let product = &PRODUCTS[product];
        for round in 0..2 {
            let mut shown = Vec::new();
            for band in [2, 4, 8, 16] {
                let cut = Plan { tile: Tile::Rows128Tokens256, splits: 1, deal: false, band };
                seconds_of(device, gemm, memory, product, tokens, cut, 30e-3);
                let seconds = seconds_of(device, gemm, memory, product, tokens, cut, 40e-3);
                shown.push(format!("band {band} {:.1}", seconds * 1e6));
            }
            println!("hot {round} {} {tokens}: {}", product.name, shown.join(", "));
        }
    }
}

/// Every cut of the 8B's products at the largest batches, each after a second in which the card grew as hot as it gets.
fn hot_decode(device: &Device, gemm: &GemmTile, memory: &Memory) {
    for product in &PRODUCTS[4..] {
        for tokens in [128, 256] {
            let (planned, cuts) = candidates(device, product, tokens);
            let time = |cut: Plan, seconds: f64| {
                1e6 * seconds_of(device, gemm, memory, product, tokens, cut, seconds)
            };
            let cold: Vec<f64> = cuts.iter().map(|&cut| time(cut, 2e-3)).collect();
            time(planned, 1.0);
            let mut timed: Vec<(f64, f64, Plan)> =
                cuts.iter().zip(cold).map(|(&cut, cold)| (time(cut, 0.2), cold, cut)).collect();
            timed.sort_by(|a, b| a.0.total_cmp(&b.0));
            let shown: Vec<String> = timed
                .iter()
                .filter(|(_, _, cut)| *cut == planned)
                .chain(timed.iter().take(6))
                .map(|(hot, cold, cut)| format!("{hot:.1} ({cold:.1}) {}", short(*cut)))
                .collect();
            println!(
                "{} {tokens} hot (cold) us, planned first: {}",
                product.name,
                shown.join(", ")
            );
        }
    }
}

fn short(plan: Plan) -> String {
    let (rows, tokens) = (plan.tile.tiles() * 64, plan.tile.tokens());
    let deal = if plan.deal { "d" } else { "" };
    format!("{rows}x{tokens}x{}{deal}b{}", plan.splits, plan.band)
}

/// The planned cut, and all that make sense, the planned one among them.
fn candidates(device: &Device, product: &Product, tokens: usize) -> (Plan, Vec<Plan>) {
    let shape = Shape {
        tiles: (product.stored / 64) as u32,
        panels: (product.columns / 64) as u32,
        rows: tokens as u32,
    };
    let planned = plan(shape, product.epilogue, Card::of(device));
    let mut cuts = cuts(shape, product.epilogue, device.processors());
    if !cuts.contains(&planned) {
        cuts.push(planned);
    }
    (planned, cuts)
}

fn cuts(shape: Shape, epilogue: Epilogue, processors: u32) -> Vec<Plan> {
    let mut cuts = Vec::new();
    for tile in Tile::ALL {
        let token_tiles = shape.rows.div_ceil(tile.tokens());
        if (token_tiles * tile.tokens() - shape.rows) * 3 > shape.rows
            || (shape.rows > 1024 && tile.tokens() < 128)
        {
            continue;
        }
        for splits in [1, 2, 3, 4, 5, 6, 8] {
            for band in if shape.rows > 2048 { vec![8, 4, 16] } else { vec![8] } {
                let cut = Plan { tile, splits, deal: false, band };
                let blocks = shape.tiles.div_ceil(tile.tiles()) * token_tiles * splits;
                if cut.fits(shape, epilogue, processors) && (blocks >= 32 || splits == 1) {
                    cuts.push(cut);
                }
            }
        }
        let cut = Plan { tile, splits: 1, deal: true, band: 8 };
        if cut.fits(shape, epilogue, processors) {
            cuts.push(cut);
        }
    }
    cuts
}

/// Seconds of one launch, within about `seconds` of them, the weights rotating through more memory than the L2 has.
fn seconds_of(
    device: &Device,
    gemm: &GemmTile,
    memory: &Memory,
    product: &Product,
    tokens: usize,
    cut: Plan,
    seconds: f64,
) -> f64 {
    let elements = product.stored * product.columns;
    let copies = (POOL_BYTES / 2 / elements).min(16);
    let launch = |turn: usize| {
        let arguments = memory.arguments(product, tokens, turn % copies * elements);
        gemm.launch_as(device, product.epilogue, &arguments, cut)
    };
    let launches = copies.max(4);
    let graph = device.record(|| (0..launches).try_for_each(launch)).unwrap();
    let once = device.seconds_each(0, 1, |_| device.replay(&graph)).unwrap();
    let repeats = (seconds / once).ceil().clamp(1.0, 5000.0) as usize;
    device.seconds_each(0, repeats, |_| device.replay(&graph)).unwrap() / launches as f64
}

impl Memory {
    fn new(device: &Device) -> Self {
        let allocate = |bytes: usize| device.allocate(bytes, "the bench").unwrap();
        let memory = Self {
            weights: allocate(POOL_BYTES),
            input: allocate(8192 * 14336 * 2),
            squares: allocate(64 * 8192 * 4),
            out: allocate(8192 * 14336 * 2),
            normed: allocate(8192 * 4096 * 2),
            squares_out: allocate(64 * 8192 * 4),
            gain: allocate(4096 * 2),
            workspace: allocate(256 * 128 * 1024),
            counters: device.zeroed(4096, "the bench").unwrap(),
        };
        // Near normal, standard deviation 0.5: never zeros, on which the card runs faster.
        let sample = |i: u64| {
            let four = bits(7, i);
            let sum: f32 =
                (0..4).map(|part| (four >> (16 * part) & 0xffff) as f32 / 65536.0 - 0.5).sum();
            bf16::from_f32(sum * 0.87)
        };
        let values: Vec<bf16> = (0..1 << 20).map(sample).collect();
        for (buffer, shift) in
            [(&memory.weights, 0), (&memory.input, 4099), (&memory.gain, 0), (&memory.out, 77)]
        {
            let mut rotated = values.clone();
            rotated.rotate_left(shift);
            let chunk = rotated.len().min(buffer.bytes() / 2);
            device.upload(buffer.pointer(), &rotated[..chunk]).unwrap();
            let (mut filled, all) = (chunk, buffer.bytes() / 2);
            while filled < all {
                let len = filled.min(all - filled);
                // Odd lengths keep the copies from repeating in step with rows.
                let len = if len > 4096 { len - 1024 } else { len };
                device
                    .copy::<bf16>(buffer.pointer::<bf16>().add(filled), buffer.pointer(), len)
                    .unwrap();
                filled += len;
            }
        }
        let squares: Vec<f32> = (0..64 * 8192).map(|i| 40.0 + (i % 97) as f32).collect();
        device.upload(memory.squares.pointer(), &squares).unwrap();
        memory
    }

    fn arguments(&self, product: &Product, tokens: usize, offset: usize) -> GemmArguments {
        let normed = product.epilogue != Epilogue::Residual;
        let features = product.stored / if product.epilogue == Epilogue::GateUp { 2 } else { 1 };
        GemmArguments {
            weights: self.weights.pointer::<bf16>().add(offset),
            input: self.input.pointer(),
            rows: tokens as i32,
            rows_max: tokens.next_multiple_of(256) as i32,
            tiles: (product.stored / 64) as i32,
            panels: (product.columns / 64) as i32,
            features: features as i32,
            splits: 1,
            squares: if normed { self.squares.pointer() } else { Pointer::NULL },
            square_tiles: (product.columns / 64) as i32,
            width: product.columns as f32,
            eps: 1e-5,
            bias: Pointer::NULL,
            out: self.out.pointer(),
            out_stride: features as i32,
            logits: Pointer::NULL,
            gain: self.gain.pointer(),
            normed: self.normed.pointer(),
            squares_out: self.squares_out.pointer(),
            best: Pointer::NULL,
            partials: self.workspace.pointer(),
            counters: self.counters.pointer(),
        }
    }
}

fn read_others(file: &str) -> HashMap<(String, usize), f64> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let name = words.next()?.to_owned();
        Some(((name, words.next()?.parse().ok()?), words.next()?.parse().ok()?))
    };
    text.lines().filter_map(parse).collect()
}
