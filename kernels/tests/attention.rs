//! Attention on the device against its plain version: raw products in, results and pages out, over pages
//! that hold NaN wherever nothing was written.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod support;

use half::bf16;
use plimsoll_kernels::device::{Device, Pointer};
use plimsoll_kernels::layout::{in_activations, in_panel};
use plimsoll_kernels::ops::attention::{
    Attention, AttentionArguments, DecodePlan, PrefillShape, Row, Span,
};
use plimsoll_kernels::reference::attention::{
    self as slow, Half, PAGE_TOKENS, PageShape, attend, write_kv,
};
use plimsoll_kernels::reference::norm::qk_norm;
use plimsoll_kernels::reference::random::bits;
use plimsoll_kernels::reference::rope::rotate;
use support::{back, device, noise, poisoned, relative_error, there, widened};

const POSITIONS: usize = 2048;
const EPS: f32 = 1e-5;

/// A model's attention.
#[derive(Clone, Copy, Debug)]
struct Model {
    head_dim: usize,
    head_width: usize,
    heads: usize,
    kv_heads: usize,
    window: usize,
    norm: bool,
}

const PLAIN: Model =
    Model { head_dim: 128, head_width: 128, heads: 8, kv_heads: 2, window: 0, norm: false };

/// New tokens of a sequence of which `cached` are in pages already.
#[derive(Clone, Copy, Debug)]
struct New {
    cached: usize,
    rows: usize,
}

/// What a step's kernels work on, and what they should make of it.
#[derive(Clone)]
struct World {
    model: Model,
    seed: u64,
    sequences: Vec<New>,
    tables: Vec<Vec<u32>>,
    table_stride: usize,
    rows: Vec<Row>,
    spans: Vec<Span>,
    rows_max: usize,
    qkv: Vec<bf16>,
    stride: usize,
    pages: Vec<bf16>, // as the device keeps them
    rope: Vec<f32>,
    query_norm: Vec<bf16>,
    key_norm: Vec<bf16>,
    want_out: Vec<f32>,   // [rows, heads * head_dim]
    want_pages: Vec<f32>, // row-major; NaN where nothing is written
}

impl Model {
    fn shape(self) -> PageShape {
        PageShape { kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    /// Where the real elements of a head lie: RoPE's pairs stay half the stored width apart.
    fn real(self) -> Vec<usize> {
        let half = self.head_width / 2;
        (0..half).chain(self.head_dim / 2..self.head_dim / 2 + half).collect()
    }

    /// Norm and RoPE of one stored head, by the reference's functions on its real elements.
    fn turned(self, head: &[f32], gain: &[f32], turn: &[f32]) -> Vec<f32> {
        let real = self.real();
        let mut compact: Vec<f32> = real.iter().map(|&i| head[i]).collect();
        if self.norm {
            let gain: Vec<f32> = real.iter().map(|&i| gain[i]).collect();
            qk_norm(&mut compact, &gain, EPS);
        }
        let pairs = self.head_width / 2;
        let cos: Vec<f32> = (0..pairs).map(|i| turn[2 * i]).collect();
        let sin: Vec<f32> = (0..pairs).map(|i| turn[2 * i + 1]).collect();
        rotate(&mut compact, self.head_width, &cos, &sin);
        let mut out = vec![0.0; self.head_dim];
        for (i, value) in real.into_iter().zip(compact) {
            out[i] = bf16::from_f32(value).to_f32();
        }
        out
    }
}

/// Element `d` of a token within a head's block, as the device keeps it.
fn in_block(token: usize, d: usize) -> usize {
    d / 64 * PAGE_TOKENS * 64 + in_panel(token, d % 64)
}

impl World {
    fn new(model: Model, sequences: &[New], seed: u64) -> Self {
        let (shape, dim) = (model.shape(), model.head_dim);
        let per_sequence: Vec<usize> =
            sequences.iter().map(|s| (s.cached + s.rows).div_ceil(PAGE_TOKENS)).collect();
        let table_stride = per_sequence.iter().max().unwrap() + 3;
        let page_count = per_sequence.iter().sum::<usize>() + 2;
        // Pages in an order that follows nothing.
        let mut free: Vec<u32> = (0..page_count as u32).collect();
        free.sort_by_key(|&page| bits(seed, u64::from(page)));
        let tables: Vec<Vec<u32>> =
            per_sequence.iter().map(|&n| (0..n).map(|_| free.pop().unwrap()).collect()).collect();

        let total: usize = sequences.iter().map(|s| s.rows).sum();
        let rows_max = (total + 3).next_multiple_of(256);
        let vectors = model.heads + 2 * model.kv_heads;
        let stride = vectors * dim + 64;
        let mut qkv = noise(seed + 1, total * stride, 1.5);
        let real = model.real();
        for (i, value) in qkv.iter_mut().enumerate() {
            if i % stride < vectors * dim && !real.contains(&(i % stride % dim)) {
                *value = bf16::ZERO;
            }
        }
        let rope: Vec<f32> = (0..POSITIONS * dim / 2)
            .flat_map(|i| {
                let angle = (bits(seed + 2, i as u64) % 6283) as f32 / 1000.0;
                [angle.cos(), angle.sin()]
            })
            .collect();
        let gain = |seed| -> Vec<bf16> {
            noise(seed, dim, 0.5).iter().map(|g| bf16::from_f32(g.to_f32() + 1.0)).collect()
        };
        let (query_norm, key_norm) = (gain(seed + 3), gain(seed + 4));
        let (query_gain, key_gain) = (widened(&query_norm), widened(&key_norm));

        let mut world = Self {
            model,
            seed,
            sequences: sequences.to_vec(),
            table_stride,
            rows: Vec::new(),
            spans: Vec::new(),
            rows_max,
            stride,
            pages: vec![bf16::NAN; page_count * shape.elements()],
            want_out: Vec::new(),
            want_pages: vec![f32::NAN; page_count * shape.elements()],
            tables,
            qkv,
            rope,
            query_norm,
            key_norm,
        };
        let attention = slow::Attention {
            pages: shape,
            heads: model.heads,
            scale: world.scale(),
            window: (model.window > 0).then_some(model.window),
        };
        for (slot, new) in sequences.iter().enumerate() {
            world.fill_cache(slot, new.cached);
            let first = world.rows.len();
            world.spans.push(Span {
                first: first as i32,
                rows: new.rows as i32,
                slot: slot as i32,
                position: new.cached as i32,
            });
            let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
            for i in 0..new.rows {
                let position = new.cached + i;
                world.rows.push(Row {
                    token: 0,
                    slot: slot as i32,
                    position: position as i32,
                    sample: 0,
                });
                let row = widened(&world.qkv[(first + i) * stride..][..vectors * dim]);
                let turn = &world.rope[position * dim..][..dim];
                for (v, head) in row.chunks_exact(dim).enumerate() {
                    if v < model.heads {
                        queries.extend(model.turned(head, &query_gain, turn));
                    } else if v < model.heads + model.kv_heads {
                        keys.extend(model.turned(head, &key_gain, turn));
                    } else {
                        values.extend(head);
                    }
                }
            }
            let table = &world.tables[slot];
            write_kv(&mut world.want_pages, shape, table, new.cached, &keys, &values);
            let mut out = vec![f32::NAN; queries.len()];
            attend(&attention, &queries, new.cached, &world.want_pages, table, &mut out);
            world.want_out.extend(out);
        }
        world
    }

    fn scale(&self) -> f32 {
        // Sharper than 1 / sqrt(width), so that maxima move and weights differ.
        2.0 / (self.model.head_width as f32).sqrt()
    }

    /// Keys and values of the positions that are there before the step, in both layouts.
    fn fill_cache(&mut self, slot: usize, cached: usize) {
        let (shape, dim) = (self.model.shape(), self.model.head_dim);
        let real = self.model.real();
        for position in 0..cached {
            for half in [Half::Keys, Half::Values] {
                for kv_head in 0..shape.kv_heads {
                    let which =
                        (position * 2 + usize::from(half == Half::Keys)) * shape.kv_heads + kv_head;
                    let values =
                        noise(self.seed ^ (slot as u64) << 32 ^ (which as u64) << 8, dim, 1.5);
                    let page = self.tables[slot][position / PAGE_TOKENS];
                    let block = shape.block(page, half, kv_head);
                    for (d, &value) in values.iter().enumerate() {
                        let value = if real.contains(&d) { value } else { bf16::ZERO };
                        self.pages[block + in_block(position % PAGE_TOKENS, d)] = value;
                        self.want_pages[block + position % PAGE_TOKENS * dim + d] = value.to_f32();
                    }
                }
            }
        }
    }
}

/// Results of a run: `out` as stored, and the pages.
struct Got {
    out: Vec<bf16>,
    pages: Vec<bf16>,
}

enum How {
    Decode(DecodePlan),
    Prefill,
}

/// Runs a world's rows, all or those of some sequences.
fn run(device: &Device, attention: &Attention, world: &World, how: &How) -> Got {
    let model = world.model;
    let rows =
        there(device, &[&world.rows[..], &[Row { position: -1, ..Row::default() }; 2]].concat());
    let mut tables = vec![-1i32; world.tables.len() * world.table_stride];
    for (slot, table) in world.tables.iter().enumerate() {
        for (i, &page) in table.iter().enumerate() {
            // A page that lies wholly outside of every window may belong to somebody else by now.
            let first = world.sequences[slot].cached.saturating_sub(model.window.saturating_sub(1));
            let gone = model.window > 0 && i < first / PAGE_TOKENS;
            tables[slot * world.table_stride + i] = if gone { i32::MAX / 2 } else { page as i32 };
        }
    }
    let tables = there(device, &tables);
    let qkv = there(device, &world.qkv);
    let pages = there(device, &world.pages);
    let rope = there(device, &world.rope);
    let (query_norm, key_norm) = (there(device, &world.query_norm), there(device, &world.key_norm));
    let columns = model.heads * model.head_dim;
    let out = poisoned(device, world.rows_max * columns * 2);
    let cut = attention.cut(&world.spans);
    let spans = there(device, &cut);
    let padded = world.rows.len() + 2;
    let (floats, counters) = match how {
        How::Decode(plan) => plan.workspace(padded, model.heads, model.kv_heads, model.head_dim),
        How::Prefill => (1, 1),
    };
    let partials = poisoned(device, floats * 4);
    let counters = device.zeroed(counters * 4, "a test").unwrap();
    let arguments = AttentionArguments {
        qkv: qkv.pointer(),
        qkv_stride: world.stride as i32,
        rows_max: world.rows_max as i32,
        rows: rows.pointer(),
        first_row: 0,
        row_count: if matches!(how, How::Prefill) { world.rows.len() } else { padded } as i32,
        spans: spans.pointer(),
        span_count: cut.len() as i32,
        pages: pages.pointer(),
        page_stride: model.shape().elements() as i64,
        tables: tables.pointer(),
        table_stride: world.table_stride as i32,
        heads: model.heads as i32,
        kv_heads: model.kv_heads as i32,
        head_width: model.head_width as i32,
        window: model.window as i32,
        scale: world.scale(),
        rope: rope.pointer(),
        query_norm: if model.norm { query_norm.pointer() } else { Pointer::NULL },
        key_norm: if model.norm { key_norm.pointer() } else { Pointer::NULL },
        eps: EPS,
        out: out.pointer(),
        splits: 1,
        stages: 1,
        settled: 1,
        partials: partials.pointer(),
        counters: counters.pointer(),
    };
    // SAFETY: all memory was made above with the shapes of `world`, and stays until the download.
    unsafe {
        match how {
            How::Decode(plan) => attention.decode(device, &arguments, *plan).unwrap(),
            How::Prefill => {
                attention.rope_kv(device, &arguments).unwrap();
                attention.prefill(device, &arguments).unwrap();
            }
        }
    }
    let got = Got {
        out: back(device, &out, world.rows_max * columns),
        pages: back(device, &pages, world.pages.len()),
    };
    let counters: Vec<i32> = back(device, &counters, counters.bytes() / 4);
    assert!(counters.iter().all(|&c| c == 0), "counters return to zero");
    got
}

/// A row's results, in order.
fn row_of(world: &World, got: &Got, row: usize) -> Vec<bf16> {
    let columns = world.model.heads * world.model.head_dim;
    (0..columns).map(|c| got.out[in_activations(row, c, world.rows_max)]).collect()
}

fn check(world: &World, got: &Got, what: &str) {
    let model = world.model;
    let columns = model.heads * model.head_dim;
    let mut worst = 0.0f64;
    for row in 0..world.rows.len() {
        let mine = widened(&row_of(world, got, row));
        let error = relative_error(&mine, &world.want_out[row * columns..][..columns]);
        assert!(
            error < 1.2e-2,
            "{what}: row {row} at {} is off by {error}; {model:?} {:?}",
            world.rows[row].position,
            world.sequences
        );
        worst = worst.max(error);
    }
    for row in world.rows.len()..world.rows_max {
        let mine = row_of(world, got, row);
        assert!(
            mine.iter().all(|x| x.is_nan() || *x == bf16::ZERO),
            "{what}: row {row} was touched"
        );
    }
    let shape = model.shape();
    for page in 0..world.pages.len() / shape.elements() {
        for half in [Half::Keys, Half::Values] {
            for kv_head in 0..shape.kv_heads {
                let block = shape.block(page as u32, half, kv_head);
                for token in 0..PAGE_TOKENS {
                    for d in 0..model.head_dim {
                        let after = got.pages[block + in_block(token, d)].to_f32();
                        let want = world.want_pages[block + token * model.head_dim + d];
                        let fits = if want.is_nan() {
                            after.is_nan() || (half == Half::Values && after == 0.0)
                        } else {
                            (after - want).abs() <= 0.01 * want.abs() + 1e-6
                        };
                        assert!(
                            fits,
                            "{what}: page {page} {half:?} head {kv_head} token {token} d {d}: {after} for {want}"
                        );
                    }
                }
            }
        }
    }
    eprintln!("{what}: {model:?}, {} rows, worst row off by {worst:.1e}", world.rows.len());
}

fn same(a: &[bf16], b: &[bf16]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// The plans that a card can run: alone, through memory, through a cluster, and both mixed.
fn plans(device: &Device, attention: &Attention, model: Model) -> Vec<DecodePlan> {
    let plan = |splits, stages, cluster| DecodePlan { splits, stages, cluster, stay: None };
    let mut plans = vec![plan(1, 3, 1), plan(5, 2, 1), plan(32, 2, 1), plan(3, 1, 1)];
    if device.is_hopper() && !is_portable() {
        plans.extend([plan(2, 5, 2), plan(8, 4, 8), plan(16, 1, 8), plan(1, 5, 1), plan(4, 2, 4)]);
    }
    if device.is_hopper() {
        // Few blocks, so that each has to claim several items; and more than there are items.
        let staying = attention.staying(model.heads, model.kv_heads);
        plans.extend([Some(1), Some(3), staying.stay].map(|stay| DecodePlan { stay, ..staying }));
        plans.push(DecodePlan { stay: Some(2), stages: 1, splits: 3 - staying.splits, ..staying });
    }
    plans.retain(|&plan| attention.holds(plan, model.heads, model.kv_heads));
    plans
}

fn decoding(lengths: &[usize]) -> Vec<New> {
    lengths.iter().map(|&cached| New { cached, rows: 1 }).collect()
}

fn models() -> Vec<Model> {
    let mut models = Vec::new();
    for (i, head_dim) in [64, 128, 256].into_iter().enumerate() {
        // The last three have more than sixteen heads to a KV head.
        for (heads, kv_heads) in
            [(4, 4), (4, 2), (8, 2), (16, 2), (16, 1), (6, 2), (17, 1), (48, 2), (33, 1)]
        {
            models.push(Model {
                head_dim,
                head_width: head_dim,
                heads,
                kv_heads,
                window: 0,
                norm: (heads / kv_heads + i).is_multiple_of(2),
            });
        }
    }
    for (head_dim, head_width) in
        [(64, 16), (64, 32), (128, 96), (128, 80), (256, 192), (256, 160), (256, 130)]
    {
        models.push(Model { head_dim, head_width, heads: 8, kv_heads: 2, window: 0, norm: true });
    }
    for window in [1, 17, 64, 100, 257] {
        models.push(Model { window, ..PLAIN });
        models.push(Model { window, head_dim: 64, head_width: 64, ..PLAIN });
        models.push(Model {
            window,
            head_dim: 256,
            head_width: 256,
            heads: 20,
            kv_heads: 1,
            ..PLAIN
        });
    }
    models
}

#[test]
fn decode_gives_what_the_plain_version_gives() {
    let Some(device) = device() else { return };
    for (i, model) in models().into_iter().enumerate() {
        let attention = load(&device, model.head_dim);
        let world = World::new(
            model,
            &decoding(&[0, 200, 63, 64, 127, 1, 15, 16, 1700, 329]),
            10 * i as u64,
        );
        let mut tried = plans(&device, &attention, model);
        // The own plan, and every third of the others.
        tried.rotate_left(i % 3);
        let own = attention.plan(world.rows.len(), model.heads, model.kv_heads);
        for plan in tried.into_iter().step_by(3).chain([own]) {
            let got = run(&device, &attention, &world, &How::Decode(plan));
            check(&world, &got, &format!("decode {plan:?}"));
        }
    }
}

#[test]
fn every_plan_decodes_and_repeats_itself_bit_by_bit_alone_and_in_company() {
    let Some(device) = device() else { return };
    for (head_dim, heads) in [(64, 8), (128, 8), (256, 8), (64, 40), (256, 40)] {
        let model = Model { head_dim, head_width: head_dim, heads, norm: true, ..PLAIN };
        let attention = load(&device, head_dim);
        let lengths = [640, 3, 1100, 190, 447];
        let world = World::new(model, &decoding(&lengths), 77);
        for plan in plans(&device, &attention, model) {
            let got = run(&device, &attention, &world, &How::Decode(plan));
            check(&world, &got, &format!("decode {plan:?}"));
            for _ in 0..3 {
                let again = run(&device, &attention, &world, &How::Decode(plan));
                assert!(same(&got.out, &again.out) && same(&got.pages, &again.pages), "{plan:?}");
            }
            // The first sequence alone.
            let mut alone = world.clone();
            for row in &mut alone.rows[1..] {
                row.position = -1;
            }
            let got_alone = run(&device, &attention, &alone, &How::Decode(plan));
            assert!(same(&row_of(&world, &got, 0), &row_of(&alone, &got_alone, 0)), "{plan:?}");
        }
    }
}

#[test]
fn prefill_gives_what_the_plain_version_gives() {
    let Some(device) = device() else { return };
    for (i, model) in models().into_iter().enumerate() {
        for shape in shapes(&device, model.head_dim) {
            let attention = Attention::load_shape(&device, shape).unwrap();
            let new = |cached, rows| New { cached, rows };
            let sequences = match i % 3 {
                0 => vec![new(0, 1), new(0, 200), new(64, 3), new(130, 77)],
                1 => vec![new(0, 64), new(333, 65), new(0, 129)],
                _ => vec![new(0, 300), new(100, 100)],
            };
            let world = World::new(model, &sequences, 1000 + 10 * i as u64);
            let got = run(&device, &attention, &world, &How::Prefill);
            check(&world, &got, shape.name);
            let again = run(&device, &attention, &world, &How::Prefill);
            assert!(same(&got.out, &again.out) && same(&got.pages, &again.pages), "{}", shape.name);
        }
    }
}

/// `PLIMSOLL_PORTABLE=1` with `CUDA_FORCE_PTX_JIT=1` tests on any card what older ones run.
fn is_portable() -> bool {
    std::env::var("PLIMSOLL_PORTABLE").is_ok_and(|value| value == "1")
}

fn load(device: &Device, head_dim: usize) -> Attention {
    if is_portable() {
        Attention::load_shape(device, shapes(device, head_dim)[0]).unwrap()
    } else {
        Attention::load(device, head_dim).unwrap()
    }
}

fn shapes(device: &Device, head_dim: usize) -> Vec<PrefillShape> {
    let mut shapes = Attention::EVERYWHERE.to_vec();
    if device.is_hopper() && !is_portable() {
        shapes.extend(Attention::HOPPER);
    }
    shapes.retain(|shape| shape.head_dim == head_dim);
    shapes
}

#[test]
fn a_prompt_in_chunks_gives_the_bits_of_the_whole_and_decode_comes_close() {
    let Some(device) = device() else { return };
    for head_dim in [64, 128, 256] {
        for window in [0, 90] {
            let model = Model { head_dim, head_width: head_dim, window, norm: true, ..PLAIN };
            for shape in shapes(&device, head_dim) {
                let attention = Attention::load_shape(&device, shape).unwrap();
                let total = 450;
                let whole = World::new(model, &[New { cached: 0, rows: total }], 5);
                let got = run(&device, &attention, &whole, &How::Prefill);
                check(&whole, &got, shape.name);
                let mut pages = whole.pages.clone();
                for (first, rows) in [(0, 7), (7, 121), (128, 200), (328, 121), (449, 1)] {
                    let mut chunk = whole.clone();
                    chunk.qkv = whole.qkv[first * whole.stride..][..rows * whole.stride].to_vec();
                    chunk.rows = whole.rows[first..first + rows].to_vec();
                    chunk.spans =
                        vec![Span { first: 0, rows: rows as i32, slot: 0, position: first as i32 }];
                    chunk.pages = pages;
                    let part = run(&device, &attention, &chunk, &How::Prefill);
                    for row in 0..rows {
                        let (mine, theirs) =
                            (row_of(&chunk, &part, row), row_of(&whole, &got, first + row));
                        assert!(same(&mine, &theirs), "{} row {}", shape.name, first + row);
                    }
                    if rows == 1 {
                        let plan = attention.plan(1, model.heads, model.kv_heads);
                        let decoded = run(&device, &attention, &chunk, &How::Decode(plan));
                        let (mine, theirs) =
                            (row_of(&chunk, &decoded, 0), row_of(&whole, &got, first));
                        let error = relative_error(&widened(&mine), &widened(&theirs));
                        assert!(error < 1e-2, "decode is off prefill by {error}");
                    }
                    pages = part.pages;
                }
            }
        }
    }
}

#[test]
fn small_shapes_for_the_memory_checker() {
    let Some(device) = device() else { return };
    for (head_dim, heads) in [(64, 8), (128, 8), (256, 8), (64, 36)] {
        let head_width = head_dim - 16;
        let model = Model { head_dim, head_width, heads, window: 70, norm: true, ..PLAIN };
        let world = World::new(model, &decoding(&[0, 200, 63]), 3);
        for shape in shapes(&device, head_dim) {
            let attention = Attention::load_shape(&device, shape).unwrap();
            for plan in plans(&device, &attention, model) {
                let got = run(&device, &attention, &world, &How::Decode(plan));
                check(&world, &got, "decode");
            }
            let sequences = [New { cached: 100, rows: 70 }, New { cached: 0, rows: 5 }];
            let prompts = World::new(model, &sequences, 4);
            let got = run(&device, &attention, &prompts, &How::Prefill);
            check(&prompts, &got, shape.name);
        }
    }
}
