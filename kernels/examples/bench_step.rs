//! Times what a step does around its layers, and the packing of weights, against a plain copy of the same bytes.
#![allow(clippy::unwrap_used, reason = "a bench ends where it fails")]

use half::bf16;
use plimsoll_kernels::device::{Buffer, Device, DeviceError, Pointer};
use plimsoll_kernels::layout::Order;
use plimsoll_kernels::ops::attention::Row;
use plimsoll_kernels::ops::step::{EmbedArguments, GatherArguments, Pages, StepKernels};
use plimsoll_kernels::ops::weights::{Heads, Pack, Random, SourceType, Weights};

/// Microseconds of one call, of several in a graph.
fn time(device: &Device, calls: usize, queue: impl Fn(usize) -> Result<(), DeviceError>) -> f64 {
    let graph = device.record(|| (0..calls).try_for_each(&queue)).unwrap();
    let mut times: Vec<f64> =
        (0..5).map(|_| device.seconds_each(1, 3, |_| device.replay(&graph)).unwrap()).collect();
    times.sort_by(f64::total_cmp);
    times[2] * 1e6 / calls as f64
}

fn line(name: &str, time: f64, bytes: f64, ceiling: f64) {
    let rate = bytes / time / 1e6;
    println!("{name:44} {time:9.2} us {rate:6.3} TB/s {:5.1} % of copy", 100.0 * rate / ceiling);
}

fn main() {
    let device = Device::open(0).unwrap();
    println!("{}", device.name().unwrap());
    let (rows, columns) = (32_768usize, 4096usize);
    let elements = rows * columns;
    // Random bits: as bf16, f16 and f32 alike.
    let weights = Weights::load(&device).unwrap();
    let make = |to: &Buffer, rows: usize| {
        let random = Random {
            to: to.pointer(),
            rows,
            columns,
            panels: columns / 64,
            mean: 0.0,
            deviation: 0.02,
            seed: 1,
        };
        // SAFETY: the buffer holds as much.
        unsafe { weights.random(&device, &random) }
    };
    let source = device.allocate(elements * 4, "a source").unwrap();
    let to = device.allocate(elements * 2, "a target").unwrap();
    make(&source, 2 * rows).unwrap();
    let copy = time(&device, 2, |_| device.copy(to.pointer::<bf16>(), source.pointer(), elements));
    let ceiling = elements as f64 * 4.0 / copy / 1e6;
    line("copy of 32,768 x 4,096 bf16", copy, elements as f64 * 4.0, ceiling);
    let made = time(&device, 2, |_| make(&to, rows));
    line("random weights of the same", made, elements as f64 * 2.0, ceiling);
    let cases = [
        ("pack bf16", SourceType::Bf16, 2, Order::Pairs, Heads::NONE),
        (
            "pack bf16, gate and up",
            SourceType::Bf16,
            2,
            Order::GateUp { features: rows / 2 },
            Heads::NONE,
        ),
        ("pack f16", SourceType::F16, 2, Order::Pairs, Heads::NONE),
        ("pack f32", SourceType::F32, 4, Order::Pairs, Heads::NONE),
    ];
    for (name, kind, bytes, order, heads) in cases {
        let pack = Pack {
            source: source.pointer(),
            kind,
            rows,
            columns,
            first_row: 0,
            row_offset: 0,
            order,
            to: to.pointer(),
            panels: columns / 64,
            row_heads: heads,
            column_heads: Heads::NONE,
        };
        // SAFETY: both buffers hold as much.
        let took = time(&device, 2, |_| unsafe { weights.pack(&device, &pack) });
        line(name, took, elements as f64 * (2.0 + f64::from(bytes)), ceiling);
    }
    steps(&device, &source, ceiling);
}

fn steps(device: &Device, table: &Buffer, ceiling: f64) {
    let kernels = StepKernels::load(device).unwrap();
    let (hidden, rows_max) = (4096usize, 8192usize);
    let panels = hidden / 64;
    let rows: Vec<Row> = (0..rows_max as i32)
        .map(|i| Row {
            token: i.wrapping_mul(7919).rem_euclid(32_768),
            slot: 0,
            position: i,
            sample: 0,
        })
        .collect();
    let there = |bytes: usize| device.zeroed(bytes, "a bench").unwrap();
    let (rows_there, gain) = (there(rows_max * 16), there(hidden * 2));
    device.upload(rows_there.pointer(), &rows).unwrap();
    let (residual, normed, normed_out) =
        (there(rows_max * hidden * 2), there(rows_max * hidden * 2), there(rows_max * hidden * 2));
    let (squares, squares_out, last) =
        (there(panels * rows_max * 4), there(panels * rows_max * 4), there(4));
    for count in [1usize, 32, 256, 8192] {
        let arguments = EmbedArguments {
            rows: rows_there.pointer(),
            count: count as i32,
            rows_max: rows_max as i32,
            embedding: table.pointer(),
            panels: panels as i32,
            hidden: hidden as i32,
            embeddings: Pointer::NULL,
            last_tokens: last.pointer(),
            gain: gain.pointer(),
            residual: residual.pointer(),
            residual_stride: hidden as i32,
            normed: normed.pointer(),
            squares: squares.pointer(),
        };
        // SAFETY: the buffers hold as much.
        let took = time(device, 20, |_| unsafe { kernels.embed(device, &arguments) });
        line(&format!("embed {count} rows of 4,096"), took, (count * hidden * 6) as f64, ceiling);
    }
    let wanted: Vec<i32> = (0..256).map(|i| i * 31).collect();
    let wanted_there = there(1024);
    device.upload(wanted_there.pointer(), &wanted).unwrap();
    let arguments = GatherArguments {
        rows: wanted_there.pointer(),
        count: 256,
        panels: panels as i32,
        normed: normed.pointer(),
        squares: squares.pointer(),
        rows_max: rows_max as i32,
        normed_out: normed_out.pointer(),
        squares_out: squares_out.pointer(),
        rows_max_out: 256,
    };
    // SAFETY: the buffers hold as much.
    let took = time(device, 20, |_| unsafe { kernels.gather(device, &arguments) });
    line("gather 256 rows of 4,096", took, (256 * hidden * 4) as f64, ceiling);
    let elements = 2 * 8 * 64 * 128;
    let pages = Pages { pages: table.pointer(), layers: 32, count: 32, elements };
    for count in [1, 8] {
        let pairs: Vec<[i32; 2]> = (0..count).map(|i| [i, i + 16]).collect();
        // SAFETY: the table is larger than these pages.
        let took = time(device, 5, |_| unsafe { kernels.copy_pages(device, &pages, &pairs) });
        let bytes = (2 * 2 * elements * 32) as f64 * f64::from(count);
        line(&format!("copy {count} pages of 32 layers"), took, bytes, ceiling);
    }
}
