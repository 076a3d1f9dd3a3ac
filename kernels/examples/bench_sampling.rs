//! Times sampling as replays of a graph, per row count, way and blocks to a row. Logits stay in the L2 where they fit, as
//! behind a head that has just written them.
#![allow(clippy::unwrap_used, reason = "a bench ends where it fails")]

use plimsoll_kernels::device::{Buffer, Device, Pinned, Plain};
use plimsoll_kernels::ops::gemm::Best;
use plimsoll_kernels::ops::sampling::{
    BIASES_MAX, Bias, PromptRow, SampleArguments, SampleResult, SampleRow, Sampling, SeenArguments,
    SlotParameters,
};
use plimsoll_kernels::reference::random::uniform;

const VOCABULARY: usize = 128_256;
const TILES: usize = VOCABULARY.div_ceil(64);
const ROWS_MAX: usize = 256;
/// Distinct rows; the others repeat them.
const DISTINCT: usize = 8;

struct Space {
    logits: Buffer,
    scratch: Buffer,
    best: Buffer,
    rows: Buffer,
    parameters: Buffer,
    seen: Buffer,
    biases: Buffer,
    last_tokens: Buffer,
    prompts: Buffer,
    epoch: Buffer,
    results: Pinned<SampleResult>,
}

fn there<T: Plain>(device: &Device, values: &[T]) -> Buffer {
    let buffer = device.allocate(size_of_val(values), "a bench").unwrap();
    device.upload(buffer.pointer(), values).unwrap();
    buffer
}

/// Normal numbers; every `peak`th row's few largest stand out as a sure model's do.
fn logits(row: usize, deviation: f32, peaks: usize) -> Vec<f32> {
    let seed = row as u64;
    let at = |i: u64| uniform(seed, i) as f32;
    let normal = |i: u64| (at(4 * i) + at(4 * i + 1) + at(4 * i + 2) + at(4 * i + 3) - 2.0) * 1.73;
    let mut values: Vec<f32> = (0..VOCABULARY as u64).map(|i| normal(i) * deviation).collect();
    for peak in 0..peaks as u64 {
        let place = (uniform(seed + 1000, peak) * VOCABULARY as f64) as usize;
        values[place] = 13.0 * (deviation - 0.25) - 0.25 * peak as f32;
    }
    values
}

fn fill(device: &Device, space: &Space, deviation: f32, peaks: usize) {
    for row in 0..DISTINCT {
        let values = logits(row, deviation, peaks);
        device.upload(space.logits.pointer::<f32>().add(row * VOCABULARY), &values).unwrap();
        let best: Vec<f32> = values
            .chunks(64)
            .enumerate()
            .flat_map(|(tile, values)| {
                let mut best = 0;
                for (i, value) in values.iter().enumerate() {
                    if *value > values[best] {
                        best = i;
                    }
                }
                [values[best], f32::from_bits((tile * 64 + best) as u32)]
            })
            .collect();
        device.upload(space.best.pointer::<f32>().add(row * TILES * 2), &best).unwrap();
    }
    for row in DISTINCT..ROWS_MAX {
        let from = row % DISTINCT;
        let place = |row: usize| space.logits.pointer::<f32>().add(row * VOCABULARY);
        device.copy(place(row), place(from), VOCABULARY).unwrap();
        let place = |row: usize| space.best.pointer::<Best>().add(row * TILES);
        device.copy(place(row), place(from), TILES).unwrap();
    }
    device.synchronize().unwrap();
}

fn arguments(space: &Space) -> SampleArguments {
    SampleArguments {
        logits: space.logits.pointer(),
        scratch: space.scratch.pointer(),
        best: space.best.pointer(),
        stride: VOCABULARY as i32,
        tiles: TILES as i32,
        vocabulary: VOCABULARY as i32,
        seen_stride: VOCABULARY as i32,
        rows: space.rows.pointer(),
        prompts: space.prompts.pointer(),
        parameters: space.parameters.pointer(),
        seen: space.seen.pointer(),
        biases: space.biases.pointer(),
        last_tokens: space.last_tokens.pointer(),
        results: space.results.pointer(),
        epoch: space.epoch.pointer(),
        ring: 1,
        results_max: ROWS_MAX as i32,
    }
}

/// Microseconds of one launch, of twenty in a graph.
fn time(
    device: &Device,
    queue: impl Fn() -> Result<(), plimsoll_kernels::device::DeviceError>,
) -> f64 {
    const LAUNCHES: usize = 20;
    let graph = device.record(|| (0..LAUNCHES).try_for_each(|_| queue())).unwrap();
    let mut times: Vec<f64> =
        (0..5).map(|_| device.seconds_each(1, 4, |_| device.replay(&graph)).unwrap()).collect();
    times.sort_by(f64::total_cmp);
    times[2] * 1e6 / LAUNCHES as f64
}

fn main() {
    let device = Device::open(0).unwrap();
    println!("{}", device.name().unwrap());
    let kernels = Sampling::load(&device).unwrap();
    let infos: Vec<SampleRow> =
        (0..ROWS_MAX as i32).map(|slot| SampleRow { slot, position: 100 + slot }).collect();
    let prompts: Vec<PromptRow> = (0..ROWS_MAX as i32)
        .map(|row| PromptRow { row, token: 7 * row, alternatives: 5, unused: 0 })
        .collect();
    let space = Space {
        logits: device.allocate(ROWS_MAX * VOCABULARY * 4, "logits").unwrap(),
        scratch: device.allocate(ROWS_MAX * VOCABULARY * 4, "scratch").unwrap(),
        best: device.allocate(ROWS_MAX * TILES * 8, "best").unwrap(),
        rows: there(&device, &infos),
        parameters: there(&device, &[SlotParameters::GREEDY; ROWS_MAX]),
        seen: device.zeroed(ROWS_MAX * VOCABULARY * 2, "seen").unwrap(),
        biases: device.zeroed(ROWS_MAX * BIASES_MAX * size_of::<Bias>(), "biases").unwrap(),
        last_tokens: device.zeroed(ROWS_MAX * 4, "last tokens").unwrap(),
        prompts: there(&device, &prompts),
        epoch: there(&device, &[1u32]),
        results: device.pinned(ROWS_MAX).unwrap(),
    };
    let tokens: Vec<i32> = (0..2000).map(|i| i * 37 % VOCABULARY as i32).collect();
    let tokens = there(&device, &tokens);
    let start = |slot: usize| SeenArguments {
        seen: space.seen.pointer(),
        tokens: tokens.pointer(),
        seen_stride: VOCABULARY as i64,
        slot: slot as i32,
        count: 2000,
        prompt_tokens: 1000,
        vocabulary: VOCABULARY as i32,
    };
    (0..ROWS_MAX).for_each(|slot| kernels.start(&device, &start(slot)).unwrap());
    let one = SlotParameters { scale: SlotParameters::scale_of(1.0), ..SlotParameters::GREEDY };
    let ways = [
        ("temperature", 1.0, 0, one),
        ("min-p 0.05", 1.0, 20, SlotParameters { floor: 0.05f32.ln(), ..one }),
        ("top-k 50", 1.0, 0, SlotParameters { top_k: 50, ..one }),
        ("top-p 0.9 sure", 2.0, 40, SlotParameters { top_p: 0.9, ..one }),
        ("top-p 0.9 heavy tail", 1.5, 20, SlotParameters { top_p: 0.9, ..one }),
        ("top-k 50 top-p 0.9", 2.0, 40, SlotParameters { top_k: 50, top_p: 0.9, ..one }),
        ("top-p 0.9 flat", 1.0, 0, SlotParameters { top_p: 0.9, ..one }),
        ("top-k 3000", 1.0, 0, SlotParameters { top_k: 3000, ..one }),
        (
            "greedy penalised",
            1.0,
            0,
            SlotParameters { penalised: 1, presence: 0.5, scale: 0.0, ..one },
        ),
        ("temperature penalised", 1.0, 0, SlotParameters { penalised: 1, presence: 0.5, ..one }),
        ("greedy 5 logprobs", 1.0, 0, SlotParameters { alternatives: 5, scale: 0.0, ..one }),
    ];
    let counts = [1usize, 4, 8, 16, 24, 32, 64, 256];
    println!("us per launch; rows      {counts:?}");
    fill(&device, &space, 1.0, 0);
    let line = |name: &str, times: Vec<String>| println!("{name:24} {}", times.join(" "));
    let greedy = counts.iter().map(|&rows| {
        format!("{:7.2}", time(&device, || kernels.greedy(&device, &arguments(&space), rows)))
    });
    line("greedy alone", greedy.collect());
    let padding = there(&device, &[SampleRow::PADDING; ROWS_MAX]);
    let nothing = counts.iter().map(|&rows| {
        let arguments = SampleArguments { rows: padding.pointer(), ..arguments(&space) };
        format!("{:7.2}", time(&device, || kernels.sample(&device, &arguments, rows)))
    });
    line("padding", nothing.collect());
    let mut filled = (1.0, 0);
    for (name, deviation, peaks, parameters) in ways {
        if filled != (deviation, peaks) {
            fill(&device, &space, deviation, peaks);
            filled = (deviation, peaks);
        }
        device.upload(space.parameters.pointer(), &[parameters; ROWS_MAX]).unwrap();
        for ranks in [0, 5, 6] {
            let times = counts.iter().map(|&rows| {
                let time = time(&device, || match ranks {
                    0 => kernels.sample(&device, &arguments(&space), rows),
                    _ => kernels.sample_with(&device, &arguments(&space), rows, ranks),
                });
                format!("{time:7.2}")
            });
            let times = times.collect();
            line(&if ranks == 0 { name.into() } else { format!("   {ranks} blocks") }, times);
        }
    }
    let prompt = counts.iter().map(|&rows| {
        let time = time(&device, || kernels.prompt_logprobs(&device, &arguments(&space), rows));
        format!("{time:7.2}")
    });
    line("prompt log-probabilities", prompt.collect());
    let started = start(0);
    line(
        "seen_start of 2,000",
        vec![format!("{:7.2}", time(&device, || kernels.start(&device, &started)))],
    );
}
