//! Times attention kernels: decode as graphs of chained layers, prefill launch after launch, on random data that
//! no cache holds. Arguments: any of `decode`, `sweep`, `prefill`; none means decode and prefill.
#![allow(clippy::unwrap_used, reason = "a bench ends at the first failure")]

use half::bf16;
use plimsoll_kernels::device::{Buffer, Device, Pointer};
use plimsoll_kernels::ops::attention::{
    Attention, AttentionArguments, DecodePlan, PrefillShape, Row, Span,
};

const MATRIX_TFLOP_PER_S: f64 = 750.0;
const PAGE: usize = 64;

/// Quick noise of about unit size; the device copies a piece of it over and over.
fn noise(len: usize) -> Vec<bf16> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bf16::from_f32((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
        })
        .collect()
}

fn filled(device: &Device, piece: &Buffer, elements: usize) -> Buffer {
    let buffer = device.allocate(elements * 2, "a bench").unwrap();
    let step = piece.bytes() / 2;
    for at in (0..elements).step_by(step) {
        let to: Pointer<bf16> = buffer.pointer::<bf16>().add(at);
        device.copy(to, piece.pointer::<bf16>(), step.min(elements - at)).unwrap();
    }
    buffer
}

struct Case {
    name: &'static str,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    contexts: Vec<usize>,
    layers: usize,
}

/// Everything of `layers` layers, each with its own pages and products.
struct Bench {
    arguments: AttentionArguments,
    layer_pages: usize,
    layer_qkv: usize,
    layers: usize,
    qkv_layers: usize,
    _held: Vec<Buffer>,
}

impl Bench {
    fn new(
        device: &Device,
        piece: &Buffer,
        (heads, kv_heads, head_dim): (usize, usize, usize),
        sequences: &[(usize, usize)], // cached, new rows
        layers: usize,
        cut: impl Fn(&[Span]) -> Vec<Span>,
    ) -> Self {
        let mut rows = Vec::new();
        let mut spans = Vec::new();
        let stride = sequences.iter().map(|(c, n)| (c + n).div_ceil(PAGE)).max().unwrap();
        let mut pages = 0i32;
        let mut tables = vec![0i32; sequences.len() * stride];
        for (slot, &(cached, new)) in sequences.iter().enumerate() {
            spans.push(Span {
                first: rows.len() as i32,
                rows: new as i32,
                slot: slot as i32,
                position: cached as i32,
            });
            for i in 0..new {
                let position = (cached + i) as i32;
                rows.push(Row { slot: slot as i32, position, ..Row::default() });
            }
            for page in 0..(cached + new).div_ceil(PAGE) {
                tables[slot * stride + page] = pages;
                pages += 1;
            }
        }
        let page_elements = 2 * kv_heads * PAGE * head_dim;
        let positions = stride * PAGE;
        let rope: Vec<f32> = (0..positions * head_dim / 2)
            .flat_map(|i| [(i as f32 * 0.37).cos(), (i as f32 * 0.37).sin()])
            .collect();
        let upload = |bytes: usize| device.allocate(bytes, "a bench").unwrap();
        let (rows_max, columns) =
            (rows.len().next_multiple_of(256), (heads + 2 * kv_heads) * head_dim);
        let layer_pages = pages as usize * page_elements;
        let layer_qkv = rows.len() * columns;
        // A decode step's products are in the L2 when attention begins.
        let qkv_layers = if rows.len() == sequences.len() { 1 } else { layers };
        let cut = cut(&spans);
        let held = vec![
            filled(device, piece, qkv_layers * layer_qkv),
            filled(device, piece, layers * layer_pages),
            upload(rows.len() * 16 + 16),
            upload(cut.len() * 16),
            upload(tables.len() * 4),
            upload(rope.len() * 4),
            upload(rows_max * heads * head_dim * 2),
            upload(sequences.len() * 32 * heads * (head_dim + 2) * 4),
            device.zeroed(rows.len() * kv_heads * 4, "a bench").unwrap(),
        ];
        let padding = Row { position: -1, ..Row::default() };
        device.upload(held[2].pointer(), &[&rows[..], &[padding]].concat()).unwrap();
        device.upload(held[3].pointer(), &cut).unwrap();
        device.upload(held[4].pointer(), &tables).unwrap();
        device.upload(held[5].pointer::<f32>(), &rope).unwrap();
        let arguments = AttentionArguments {
            qkv: held[0].pointer(),
            qkv_stride: columns as i32,
            rows_max: rows_max as i32,
            rows: held[2].pointer(),
            first_row: 0,
            row_count: rows.len() as i32,
            spans: held[3].pointer(),
            span_count: cut.len() as i32,
            pages: held[1].pointer(),
            page_stride: page_elements as i64,
            tables: held[4].pointer(),
            table_stride: stride as i32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            head_width: head_dim as i32,
            window: 0,
            scale: 1.0 / (head_dim as f32).sqrt(),
            rope: held[5].pointer(),
            query_norm: Pointer::NULL,
            key_norm: Pointer::NULL,
            eps: 1e-5,
            out: held[6].pointer(),
            splits: 1,
            stages: 1,
            settled: 1,
            partials: held[7].pointer(),
            counters: held[8].pointer(),
        };
        Self { arguments, layer_pages, layer_qkv, layers, qkv_layers, _held: held }
    }

    fn layer(&self, i: usize) -> AttentionArguments {
        let i = i % self.layers;
        AttentionArguments {
            qkv: self.arguments.qkv.add(i % self.qkv_layers * self.layer_qkv),
            pages: self.arguments.pages.add(i * self.layer_pages),
            ..self.arguments
        }
    }
}

/// Seconds of one launch within a graph of all layers, each behind the one before, or behind a small kernel.
fn decode_seconds(
    device: &Device,
    bench: &Bench,
    attention: &Attention,
    plan: Option<DecodePlan>,
    settled: i32,
    behind_small: bool,
) -> f64 {
    let launches = bench.layers.max(16);
    let padding = bench.arguments.row_count;
    let graph = device
        .record(|| {
            for layer in 0..launches {
                let arguments = AttentionArguments { settled, ..bench.layer(layer) };
                let before = AttentionArguments { first_row: padding, row_count: 1, ..arguments };
                if behind_small {
                    // SAFETY: `Bench` made all memory for these shapes and holds it.
                    unsafe { attention.rope_kv(device, &before)? };
                }
                if let Some(plan) = plan {
                    // SAFETY: as above.
                    unsafe { attention.decode(device, &arguments, plan)? };
                }
            }
            Ok(())
        })
        .unwrap();
    let repeats = (1000 / launches).clamp(3, 40);
    device.seconds_each(2, repeats, |_| device.replay(&graph)).unwrap() / launches as f64
}

fn spread(count: usize, low: usize, high: usize) -> Vec<usize> {
    (0..count).map(|i| low + (i * 7919 + 13) % (high - low + 1)).collect()
}

fn decode(device: &Device, piece: &Buffer, sweep: bool, read: f64) {
    let case = |name, heads, kv_heads, head_dim, contexts, layers| Case {
        name,
        heads,
        kv_heads,
        head_dim,
        contexts,
        layers,
    };
    let cases = [
        case("8B b1 200", 32, 8, 128, vec![200], 32),
        case("8B b1 1000", 32, 8, 128, vec![1000], 32),
        case("8B b1 8192", 32, 8, 128, vec![8191], 16),
        case("1B b1 200", 32, 8, 64, vec![200], 32),
        case("1B b1 8192", 32, 8, 64, vec![8191], 16),
        case("8B b8 600", 32, 8, 128, spread(8, 200, 1000), 16),
        case("8B b16 600", 32, 8, 128, spread(16, 200, 1000), 8),
        case("1B b8 600", 32, 8, 64, spread(8, 200, 1000), 24),
        case("8B b32 600", 32, 8, 128, spread(32, 200, 1000), 4),
        case("8B b64 600", 32, 8, 128, spread(64, 200, 1000), 3),
        case("8B b256 600", 32, 8, 128, spread(256, 200, 1000), 2),
        case("8B b32 190", 32, 8, 128, spread(32, 128, 256), 16),
        case("8B b64 190", 32, 8, 128, spread(64, 128, 256), 8),
        case("8B b128 190", 32, 8, 128, spread(128, 128, 256), 4),
        case("8B b256 190", 32, 8, 128, spread(256, 128, 256), 4),
        case("1B b64 190", 32, 8, 64, spread(64, 128, 256), 16),
        case("1B b256 190", 32, 8, 64, spread(256, 128, 256), 8),
        case("1B b256 mixed", 32, 8, 64, [vec![4000; 3], spread(253, 50, 900)].concat(), 4),
        case("8B b64 mixed", 32, 8, 128, [vec![8000], spread(63, 100, 900)].concat(), 3),
        case("8B b256 mixed", 32, 8, 128, [vec![8000; 3], spread(253, 100, 900)].concat(), 2),
        case("1B b32 600", 32, 8, 64, spread(32, 200, 1000), 8),
        case("1B b128 600", 32, 8, 64, spread(128, 200, 1000), 3),
        case("1B b256 600", 32, 8, 64, spread(256, 200, 1000), 2),
    ];
    for case in cases {
        let attention = Attention::load(device, case.head_dim).unwrap();
        let sequences: Vec<(usize, usize)> = case.contexts.iter().map(|&c| (c, 1)).collect();
        let shape = (case.heads, case.kv_heads, case.head_dim);
        let bench = Bench::new(device, piece, shape, &sequences, case.layers, <[Span]>::to_vec);
        let tokens: usize = case.contexts.iter().map(|c| c + 1).sum();
        let bytes = (tokens * case.kv_heads * case.head_dim * 4) as f64;
        let chosen = attention.plan(case.contexts.len(), case.heads, case.kv_heads);
        let mut plans = vec![(chosen, 1), (chosen, 0)];
        if sweep {
            let splits: &[u32] = match case.contexts.len() {
                1 => &[4, 8, 16, 32],
                2..=16 => &[1, 2, 4, 8],
                17..=64 => &[1, 2, 4],
                _ => &[1, 2],
            };
            if device.is_hopper() {
                let staying = attention.staying(case.heads, case.kv_heads);
                let most = staying.stages;
                plans.extend((1..=most).map(|stages| (DecodePlan { stages, ..staying }, 1)));
            }
            for &splits in splits {
                for cluster in [1, 2, 4, 8] {
                    for stages in [2, 3, 4, 5, 6, 8] {
                        let fits = (256..=640).contains(&(stages * case.head_dim as u32));
                        if fits
                            && cluster <= splits
                            && (splits == 1 || cluster == 1 || cluster == splits.min(8))
                        {
                            let plan = DecodePlan { splits, stages, cluster, stay: None };
                            plans.push((plan, 1));
                        }
                    }
                }
            }
        }
        let small = decode_seconds(device, &bench, &attention, None, 1, true);
        let mut best: Vec<(f64, String)> = Vec::new();
        for (i, (plan, settled)) in plans.into_iter().enumerate() {
            let seconds = decode_seconds(device, &bench, &attention, Some(plan), settled, false);
            let behind =
                decode_seconds(device, &bench, &attention, Some(plan), settled, true) - small;
            let rate = bytes / seconds / 1e12;
            let DecodePlan { splits, stages, cluster, stay } = plan;
            let stays = if stay.is_some() { " stays" } else { "" };
            let line = format!(
                "{:10} {splits:2}/{cluster} x{stages}{stays} {}: {:7.2} us {rate:5.2} TB/s {:3.0} %, behind a small one ({:.2}) {:7.2} us",
                case.name,
                if settled == 1 { "settled" } else { "waiting" },
                seconds * 1e6,
                100.0 * rate / read,
                small * 1e6,
                behind * 1e6,
            );
            if i < 2 {
                println!("{line}");
            } else {
                best.push((seconds, line));
            }
        }
        best.sort_by(|a, b| a.0.total_cmp(&b.0));
        best.iter().take(4).for_each(|(_, line)| println!("  {line}"));
    }
}

fn prefill(device: &Device, piece: &Buffer) {
    for (name, heads, kv_heads, head_dim) in
        [("8B", 32, 8, 128), ("1B", 32, 8, 64), ("wide", 16, 8, 256)]
    {
        let prompts: Vec<(String, Vec<(usize, usize)>)> = vec![
            ("512".into(), vec![(0, 512)]),
            ("2048".into(), vec![(0, 2048)]),
            ("8192".into(), vec![(0, 8192)]),
            ("13 x 630".into(), vec![(0, 630); 13]),
            ("6144+2048".into(), vec![(6144, 2048)]),
        ];
        for (what, sequences) in prompts {
            let mut shapes: Vec<PrefillShape> = Attention::EVERYWHERE.to_vec();
            shapes.extend(Attention::HOPPER.iter().filter(|_| device.is_hopper()));
            for shape in shapes.into_iter().filter(|shape| shape.head_dim == head_dim) {
                let attention = Attention::load_shape(device, shape).unwrap();
                let layers = 2;
                let bench = Bench::new(
                    device,
                    piece,
                    (heads, kv_heads, head_dim),
                    &sequences,
                    layers,
                    |spans| attention.cut(spans),
                );
                let pairs: usize = sequences.iter().map(|&(c, n)| n * c + n * (n + 1) / 2).sum();
                let flop = (4 * pairs * heads * head_dim) as f64;
                let repeats = (4e12 / flop).clamp(4.0, 100.0) as usize;
                // SAFETY: `Bench` made all memory for these shapes and holds it.
                let seconds = device
                    .seconds_each(2, repeats, |i| unsafe {
                        attention.prefill(device, &bench.layer(i))
                    })
                    .unwrap();
                // SAFETY: as above.
                let rope = device
                    .seconds_each(2, 10, |i| unsafe { attention.rope_kv(device, &bench.layer(i)) })
                    .unwrap();
                let rows: usize = sequences.iter().map(|s| s.1).sum();
                let moved = (rows * head_dim * 2 * (2 * heads + 4 * kv_heads)) as f64;
                println!(
                    "{name} {what:10} {:24} {:9.1} us {:5.0} TFLOP/s {:3.0} %   rope_kv {:6.1} us {:4.2} TB/s",
                    shape.name,
                    seconds * 1e6,
                    flop / seconds / 1e12,
                    100.0 * flop / seconds / 1e12 / MATRIX_TFLOP_PER_S,
                    rope * 1e6,
                    moved / rope / 1e12
                );
            }
        }
    }
}

fn main() {
    let device = Device::open(0).unwrap();
    let asked: Vec<String> = std::env::args().skip(1).collect();
    let wants = |what: &str| asked.iter().any(|a| a == what);
    let name = device.name().unwrap();
    // Measured ceilings of reading.
    let read = if name.contains("H200") { 4.42 } else { 3.05 };
    println!("{name}, {read} TB/s");
    let host = noise(16 << 20);
    let piece = device.allocate(host.len() * 2, "a bench").unwrap();
    device.upload(piece.pointer(), &host).unwrap();
    if asked.is_empty() || wants("decode") || wants("sweep") {
        decode(&device, &piece, wants("sweep"), read);
    }
    if asked.is_empty() || wants("prefill") {
        prefill(&device, &piece);
    }
}
