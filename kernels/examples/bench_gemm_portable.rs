//! Times the portable product on the shapes of Llama 3.1 8B and 3.2 1B, with weights that the L2 does not hold.
//!
//! A line per shape and number of tokens: the plan, microseconds, what of the card's read bandwidth and of its
//! bf16 peak that is. With `sweep` as argument also other splits, to see whether the plan is right; numbers as
//! arguments are the numbers of tokens.

#![allow(clippy::unwrap_used, reason = "a measurement that fails is no measurement")]

use half::bf16;
use plimsoll_kernels::device::{Buffer, Device, Pointer};
use plimsoll_kernels::ops::gemm::{Best, Epilogue, GemmArguments};
use plimsoll_kernels::ops::gemm_portable::{GemmPortable, Plan, SHAPES};
use plimsoll_kernels::reference::random::bits;

/// Operations per second of Hopper's wgmma; mma.sync reaches some 60 % of these.
const PEAK: f64 = 750e12;

const POOL_BYTES: usize = 1_200 << 20;
const ROWS_MAX: usize = 8192;
const LAUNCHES: usize = 24;

// (name, outputs, inner, epilogue)
const PRODUCTS: [(&str, usize, usize, Epilogue); 10] = [
    ("8B qkv", 6144, 4096, Epilogue::Store),
    ("8B o", 4096, 4096, Epilogue::Residual),
    ("8B gate_up", 28672, 4096, Epilogue::GateUp),
    ("8B down", 4096, 14336, Epilogue::Residual),
    ("8B head", 128_256, 4096, Epilogue::Logits),
    ("1B qkv", 3072, 2048, Epilogue::Store),
    ("1B o", 2048, 2048, Epilogue::Residual),
    ("1B gate_up", 16384, 2048, Epilogue::GateUp),
    ("1B down", 2048, 8192, Epilogue::Residual),
    ("1B head", 128_256, 2048, Epilogue::Logits),
];

struct Memory {
    pool: Buffer,
    input: Buffer,
    out: Buffer,
    normed: Buffer,
    small: Buffer,
    squares: Buffer,
    best: Buffer,
    partials: Buffer,
    counters: Buffer,
}

/// Random numbers of magnitude 2⁻⁷ to 1.
fn numbers(len: usize) -> Vec<bf16> {
    let mut values = Vec::with_capacity(len);
    for at in 0..len as u64 / 4 {
        let random = bits(3, at);
        for part in 0..4 {
            let random = (random >> (16 * part)) as u16;
            let exponent = 120 + (random >> 7 & 7).min(6);
            values.push(bf16::from_bits(random & 0x807f | exponent << 7));
        }
    }
    values
}

fn fill(device: &Device, buffer: &Buffer, values: &[bf16]) {
    let mut at = 0;
    while at < buffer.bytes() / 2 {
        let len = values.len().min(buffer.bytes() / 2 - at);
        device.upload(buffer.pointer::<bf16>().add(at), &values[..len]).unwrap();
        at += len;
    }
}

fn seconds(
    device: &Device,
    gemm: &GemmPortable,
    memory: &Memory,
    (_, outer, inner, epilogue): (&str, usize, usize, Epilogue),
    rows: usize,
    plan: Plan,
) -> Option<f64> {
    if plan.partials_bytes() > memory.partials.bytes() {
        return None;
    }
    let weight_bytes = outer * inner * 2;
    let copies = POOL_BYTES / weight_bytes;
    let features = if epilogue == Epilogue::GateUp { outer / 2 } else { outer };
    let normed = epilogue != Epilogue::Residual;
    let graph = device.record(|| {
        for launch in 0..LAUNCHES {
            let arguments = GemmArguments {
                weights: memory.pool.pointer::<bf16>().add(launch % copies * weight_bytes / 2),
                input: memory.input.pointer(),
                rows: rows as i32,
                rows_max: ROWS_MAX as i32,
                tiles: (outer / 64) as i32,
                panels: (inner / 64) as i32,
                features: features as i32,
                splits: 0,
                squares: if normed { memory.squares.pointer() } else { Pointer::NULL },
                square_tiles: (inner / 64) as i32,
                width: inner as f32,
                eps: 1e-5,
                bias: Pointer::NULL,
                out: memory.out.pointer(),
                out_stride: features as i32,
                logits: Pointer::NULL,
                gain: memory.small.pointer(),
                normed: memory.normed.pointer(),
                squares_out: memory.squares.pointer(),
                best: memory.best.pointer::<Best>(),
                partials: memory.partials.pointer(),
                counters: memory.counters.pointer(),
            };
            // SAFETY: every buffer is as large as the largest product here needs it.
            unsafe { gemm.launch_as(device, epilogue, &arguments, plan)? };
        }
        Ok(())
    });
    let graph = graph.unwrap();
    let heavy = rows > 1000;
    let repeats = if heavy { 1 } else { 4 };
    let all = device.seconds_each(1, repeats, |_| device.replay(&graph)).unwrap();
    Some(all / LAUNCHES as f64)
}

/// Bytes per second that a card reads: an H200's is known, of others it is what a copy moves and 4 % (as there).
fn read_ceiling(device: &Device, memory: &Memory) -> f64 {
    if device.name().unwrap().contains("H200") {
        return 4.42e12;
    }
    let half = POOL_BYTES / 2;
    let pool = &memory.pool;
    let copy = |_| device.copy(pool.pointer::<u8>().add(half), pool.pointer::<u8>(), half);
    1.04 * POOL_BYTES as f64 / device.seconds_each(1, 5, copy).unwrap()
}

fn main() {
    let device = Device::open(0).unwrap();
    let gemm = GemmPortable::load(&device).unwrap();
    let noise = numbers(16 << 20);
    let allocate = |bytes: usize| device.allocate(bytes, "a measurement").unwrap();
    let memory = Memory {
        pool: allocate(POOL_BYTES),
        input: allocate(ROWS_MAX * 14336 * 2),
        out: allocate(ROWS_MAX * 14336 * 2),
        normed: allocate(ROWS_MAX * 4096 * 2),
        small: allocate(1 << 20),
        squares: allocate(ROWS_MAX * 224 * 4),
        best: allocate(256 * 2004 * 8),
        partials: allocate(256 << 20),
        counters: device.zeroed(1 << 20, "a measurement").unwrap(),
    };
    fill(&device, &memory.pool, &noise);
    for buffer in [&memory.input, &memory.out, &memory.small] {
        fill(&device, buffer, &noise);
    }
    let ones: Vec<f32> = (0..memory.squares.bytes() / 4).map(|at| 1.0 + (at % 7) as f32).collect();
    device.upload(memory.squares.pointer(), &ones).unwrap();

    let read = read_ceiling(&device, &memory);
    println!("{}, read ceiling {:.2} TB/s", device.name().unwrap(), read / 1e12);
    let sweep = std::env::args().any(|argument| argument == "sweep");
    let mut all_rows: Vec<usize> =
        std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    if all_rows.is_empty() {
        all_rows = vec![1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192];
    }
    for rows in all_rows {
        for product in PRODUCTS {
            let (name, outer, inner, epilogue) = product;
            if epilogue == Epilogue::Logits && rows > 256 {
                continue;
            }
            let (tiles, panels) = ((outer / 64) as u32, (inner / 64) as u32);
            let plan = gemm.plan(rows as u32, tiles, panels);
            let time = seconds(&device, &gemm, &memory, product, rows, plan).unwrap();
            let bandwidth = (outer * inner * 2) as f64 / time;
            let rate = (2 * rows * outer * inner) as f64 / time;
            print!(
                "{name:10} {rows:4}: {:3} x {:2} {:8.1} us {:5.2} TB/s {:3.0} % {:5.0} TFLOP/s {:3.0} %",
                SHAPES[plan.shape].tokens,
                plan.splits,
                time * 1e6,
                bandwidth / 1e12,
                bandwidth / read * 100.0,
                rate / 1e12,
                rate / PEAK * 100.0
            );
            if sweep && epilogue != Epilogue::Logits {
                let shapes = match rows {
                    ..64 => plan.shape..=plan.shape,
                    _ => 3..=4,
                };
                for shape in shapes {
                    print!(" |{}:", SHAPES[shape].tokens);
                    for splits in [1, 2, 3, 4, 5, 6, 8, 12, 16] {
                        let plan = Plan::fixed(shape, rows as u32, tiles, splits);
                        if splits > 1 && (plan.blocks * splits > 2000 || splits > panels) {
                            continue;
                        }
                        if let Some(time) = seconds(&device, &gemm, &memory, product, rows, plan) {
                            print!(" {splits}={:.1}", time * 1e6);
                        }
                    }
                }
            }
            println!();
        }
    }
}
