//! All matrix products of one decode step as one graph, weights distinct per layer, nothing in between: how near a chain
//! of streaming products comes to one read of the weights.
//!
//! `bench_gemm_stream MODEL ROWS MODE`: MODEL 1b or 8b, ROWS a list, MODE `planned`, `variants` or `search`.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failure ends it, the table is its output"
)]

use half::bf16;
use plimsoll_kernels::device::{Buffer, Device, Graph, Pointer};
use plimsoll_kernels::layout::ROWS_UNIT;
use plimsoll_kernels::ops::gemm::{Epilogue, GemmArguments};
use plimsoll_kernels::ops::gemm_stream::{AHEAD_BYTES, Ahead, GemmStream, Shape, plan};

/// What the card reads at best, measured.
const READ: f64 = 4.42e12;
const ROWS_MAX: usize = ROWS_UNIT;

#[derive(Clone, Copy)]
struct Product {
    name: &'static str,
    epilogue: Epilogue,
    tiles: u32,
    panels: u32,
}

impl Product {
    fn bytes(&self) -> u64 {
        u64::from(self.tiles) * u64::from(self.panels) * 8192
    }
}

struct Model {
    hidden: u32,
    ffn: u32,
    layers: usize,
    /// qkv, o, gate and up, down, head.
    products: [Product; 5],
}

fn model(name: &str) -> Model {
    let (hidden, qkv, ffn, layers) = match name {
        "1b" => (2048, 3072, 8192, 16),
        "8b" => (4096, 6144, 14336, 32),
        other => panic!("{other} is neither 1b nor 8b"),
    };
    let product = |name, epilogue, rows: u32, columns: u32| Product {
        name,
        epilogue,
        tiles: rows / 64,
        panels: columns / 64,
    };
    let products = [
        product("qkv", Epilogue::Store, qkv, hidden),
        product("o", Epilogue::Residual, hidden, hidden),
        product("gate_up", Epilogue::GateUp, 2 * ffn, hidden),
        product("down", Epilogue::Residual, hidden, ffn),
        product("head", Epilogue::Logits, 128_256, hidden),
    ];
    Model { hidden, ffn, layers, products }
}

struct Bench {
    device: Device,
    stream: GemmStream,
    model: Model,
    weights: Buffer,
    /// attention's output, residual, normed, gate · up, squares, gain, bests and qkv.
    attention: Buffer,
    residual: Buffer,
    normed: Buffer,
    between: Buffer,
    squares: Buffer,
    gain: Buffer,
    best: Buffer,
    qkv: Buffer,
}

fn random(len: usize, spread: f32) -> Vec<bf16> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..len).map(|_| bf16::from_f32(next() * 2.0 * spread)).collect()
}

impl Bench {
    fn new(name: &str) -> Self {
        let device = Device::open(0).unwrap();
        let stream = GemmStream::load(&device).unwrap();
        let model = model(name);
        let bytes: u64 = model.products[..4].iter().map(Product::bytes).sum::<u64>()
            * model.layers as u64
            + model.products[4].bytes();
        let weights = device.allocate(bytes as usize, "weights").unwrap();
        let first = random(16 << 20, 0.03);
        let total = bytes as usize / 2;
        device.upload(weights.pointer(), &first[..first.len().min(total)]).unwrap();
        let mut filled = first.len().min(total);
        while filled < total {
            let len = filled.min(total - filled);
            device
                .copy::<bf16>(weights.pointer::<bf16>().add(filled), weights.pointer(), len)
                .unwrap();
            filled += len;
        }
        let activations = |columns: u32, spread| {
            let values = random(columns as usize * ROWS_MAX, spread);
            let buffer = device.allocate(values.len() * 2, "activations").unwrap();
            device.upload(buffer.pointer(), &values).unwrap();
            buffer
        };
        let hidden = model.hidden;
        let squares = device.allocate(hidden as usize / 64 * ROWS_MAX * 4, "squares").unwrap();
        device.upload(squares.pointer(), &vec![20.0f32; hidden as usize / 64 * ROWS_MAX]).unwrap();
        Self {
            attention: activations(hidden, 1.0),
            residual: activations(hidden, 1.0),
            normed: activations(hidden, 1.0),
            between: activations(model.ffn, 1.0),
            gain: activations(hidden / 64, 1.0),
            best: device.zeroed(2004 * ROWS_MAX * 8, "bests").unwrap(),
            qkv: activations(6144, 1.0),
            squares,
            device,
            stream,
            model,
            weights,
        }
    }

    /// Where a product's weights begin: all of a layer together, the head last.
    fn weights_of(&self, layer: usize, kind: usize) -> Pointer<bf16> {
        let of_layer: u64 = self.model.products[..4].iter().map(Product::bytes).sum();
        let before: u64 = self.model.products[..kind].iter().map(Product::bytes).sum();
        let at = if kind == 4 {
            of_layer * self.model.layers as u64
        } else {
            of_layer * layer as u64 + before
        };
        self.weights.pointer::<bf16>().add(at as usize / 2)
    }

    fn queue(&self, layer: usize, kind: usize, rows: u32, shape: &Shape, ahead: Ahead) {
        let product = self.model.products[kind];
        let normed = matches!(kind, 0 | 2 | 4);
        let gemm = GemmArguments {
            weights: self.weights_of(layer, kind),
            input: match kind {
                1 => self.attention.pointer(),
                3 => self.between.pointer(),
                _ => self.normed.pointer(),
            },
            rows: rows as i32,
            rows_max: ROWS_MAX as i32,
            tiles: product.tiles as i32,
            panels: product.panels as i32,
            features: (if kind == 2 { product.tiles * 32 } else { product.tiles * 64 }) as i32,
            splits: 1,
            squares: if normed { self.squares.pointer() } else { Pointer::NULL },
            square_tiles: (self.model.hidden / 64) as i32,
            width: self.model.hidden as f32,
            eps: 1e-5,
            bias: Pointer::NULL,
            out: match kind {
                0 => self.qkv.pointer(),
                2 => self.between.pointer(),
                _ => self.residual.pointer(),
            },
            out_stride: if kind == 0 { product.tiles * 64 } else { self.model.hidden } as i32,
            logits: Pointer::NULL,
            gain: self.gain.pointer(),
            normed: self.normed.pointer(),
            squares_out: self.squares.pointer(),
            best: self.best.pointer(),
            partials: Pointer::NULL,
            counters: Pointer::NULL,
        };
        // SAFETY: the buffers above have the shapes of the model and live as long as the graph.
        unsafe { self.stream.launch_as(&self.device, product.epilogue, &gemm, shape, ahead) }
            .unwrap();
    }

    /// The products of one step in order.
    fn order(&self) -> Vec<(usize, usize)> {
        let layers = (0..self.model.layers).flat_map(|layer| (0..4).map(move |kind| (layer, kind)));
        layers.chain([(0, 4)]).collect()
    }

    fn ahead(&self, layer: usize, kind: usize, shape: &Shape, bytes: u64) -> Ahead {
        let Product { tiles, panels, .. } = self.model.products[kind];
        Ahead::of(self.weights_of(layer, kind), tiles, panels, shape, bytes)
    }

    fn step(&self, rows: u32, choices: &[Choice; 5]) -> Graph {
        let order = self.order();
        let queue = || {
            for (i, &(layer, kind)) in order.iter().enumerate() {
                let bring = &choices[kind].bring;
                let ahead =
                    order.get(i + bring.distance).map_or(Ahead::NOTHING, |&(layer, kind)| {
                        self.ahead(layer, kind, &choices[kind].shape, bring.bytes)
                    });
                self.queue(layer, kind, rows, &choices[kind].shape, ahead);
            }
            Ok(())
        };
        self.device.record(queue).unwrap()
    }

    /// Only one kind of product, all layers: seconds of each.
    fn one_kind(&self, kind: usize, rows: u32, choice: &Choice) -> f64 {
        let layers: Vec<usize> =
            if kind == 4 { vec![0; 4] } else { (0..self.model.layers).collect() };
        let queue = || {
            for (i, &layer) in layers.iter().enumerate() {
                let next = layers.get(i + 1);
                let ahead = next.map_or(Ahead::NOTHING, |&next| {
                    self.ahead(next, kind, &choice.shape, choice.bring.bytes)
                });
                self.queue(layer, kind, rows, &choice.shape, ahead);
            }
            Ok(())
        };
        let graph = self.device.record(queue).unwrap();
        self.time(&graph, 8) / layers.len() as f64
    }

    /// The best of three runs of replays.
    fn time(&self, graph: &Graph, repeats: usize) -> f64 {
        let run = |_| self.device.seconds_each(1, repeats, |_| self.device.replay(graph)).unwrap();
        (0..3).map(run).fold(f64::INFINITY, f64::min)
    }

    fn bytes(&self) -> f64 {
        self.order().iter().map(|&(_, kind)| self.model.products[kind].bytes()).sum::<u64>() as f64
    }
}

/// What a product brings into the L2 when its own weights are asked for: `bytes` of the product `distance` further on.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bring {
    bytes: u64,
    distance: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Choice {
    shape: Shape,
    bring: Bring,
}

const NOTHING: Bring = Bring { bytes: 0, distance: 1 };

impl Choice {
    fn fits(&self, product: &Product) -> bool {
        self.shape.fits(product.tiles, product.panels)
    }

    fn text(&self) -> String {
        let (s, b) = (&self.shape, &self.bring);
        let clusters = if s.clusters == u32::MAX { "all".into() } else { s.clusters.to_string() };
        let mut text = format!(
            "ring {}x{} teams {} splits {} clusters {clusters}",
            s.stages, s.stage_panels, s.teams, s.splits
        );
        if b.bytes > 0 {
            text += &format!(" brings {:.1} MB by {}", b.bytes as f64 / 1e6, b.distance);
        }
        text
    }
}

/// One shape for all products: `fill` blocks for each processor are not exceeded by splitting.
fn uniform(
    model: &Model,
    rows: u32,
    processors: u32,
    ring: (u32, u32),
    teams: u32,
    fill: u32,
    turns: bool,
) -> [Choice; 5] {
    model.products.map(|product| {
        let mut splits = 1;
        while splits < 8
            && product.tiles.div_ceil(teams) * splits * 2 <= fill * processors
            && product.panels / (splits * 2) >= 4
        {
            splits *= 2;
        }
        let clusters = if turns && splits == 1 { fill * processors } else { u32::MAX };
        let tokens = rows.next_power_of_two().clamp(8, 64);
        let shape = Shape { tokens, teams, splits, clusters, stage_panels: ring.1, stages: ring.0 };
        Choice { shape, bring: NOTHING }
    })
}

/// What may be tried in the place of a choice.
fn neighbours(choice: &Choice, product: &Product, rows: u32, processors: u32) -> Vec<Choice> {
    let mut all = Vec::new();
    let with = |change: &dyn Fn(&mut Choice)| {
        let mut other = *choice;
        change(&mut other);
        other
    };
    for (stages, stage_panels) in [
        (2, 2),
        (4, 2),
        (6, 2),
        (8, 2),
        (2, 4),
        (3, 4),
        (4, 4),
        (5, 4),
        (6, 4),
        (2, 8),
        (3, 8),
        (8, 1),
        (12, 1),
    ] {
        all.push(with(&|c| (c.shape.stages, c.shape.stage_panels) = (stages, stage_panels)));
    }
    for splits in [1, 2, 4, 8] {
        all.push(with(&|c| {
            c.shape.splits = splits;
            c.shape.clusters = u32::MAX;
        }));
    }
    for clusters in [processors, 2 * processors, product.tiles / 2] {
        all.push(with(&|c| (c.shape.splits, c.shape.clusters) = (1, clusters)));
    }
    if rows > 8 {
        for teams in [1, 2, 3, 4] {
            for (stages, stage_panels) in
                [(2, 2), (3, 2), (4, 2), (4, 1), (5, 1), (6, 1), (7, 1), (9, 1)]
            {
                for splits in [choice.shape.splits, (choice.shape.splits * 2).min(8)] {
                    all.push(with(&|c| {
                        c.shape.teams = teams;
                        (c.shape.stages, c.shape.stage_panels) = (stages, stage_panels);
                        c.shape.splits = splits;
                        if splits > 1 {
                            c.shape.clusters = u32::MAX;
                        }
                    }));
                }
            }
        }
    }
    all.push(with(&|c| c.bring = NOTHING));
    for bytes in [1 << 20, 2 << 20, 3 << 20, 4 << 20, 8 << 20] {
        for distance in [1, 2, 3] {
            all.push(with(&|c| c.bring = Bring { bytes, distance }));
        }
    }
    all.retain(|other| other != choice && other.fits(product));
    all
}

/// Descends from the best uniform choice, one product at a time, until time is up or nothing helps.
fn search(bench: &Bench, rows: u32, seconds_max: f64) -> ([Choice; 5], f64) {
    let begin = std::time::Instant::now();
    let processors = bench.device.processors();
    let repeats = if bench.model.layers == 16 { 4 } else { 2 };
    let measure = |choices: &[Choice; 5]| bench.time(&bench.step(rows, choices), repeats);
    let mut best: Option<([Choice; 5], f64)> = None;
    let mut line = String::new();
    let mut consider = |name: String, choices: [Choice; 5]| {
        if choices.iter().zip(&bench.model.products).any(|(choice, product)| !choice.fits(product))
        {
            return;
        }
        let seconds = measure(&choices);
        line += &format!(" {name}:{:.4}", seconds * 1e3);
        if best.as_ref().is_none_or(|(_, least)| seconds < *least) {
            best = Some((choices, seconds));
        }
    };
    let teams: &[u32] = if rows <= 8 { &[1] } else { &[1, 2, 3, 4] };
    for &teams in teams {
        for ring in [
            (2, 4),
            (3, 4),
            (4, 4),
            (5, 4),
            (6, 4),
            (3, 8),
            (4, 2),
            (6, 1),
            (9, 1),
            (7, 1),
            (5, 1),
            (3, 2),
        ] {
            for (fill, turns) in [(1, false), (1, true), (2, false)] {
                if (ring.1 < 2 || ring == (3, 2)) != (teams > 1 && ring != (4, 2))
                    || (fill == 2 && teams > 1)
                {
                    continue;
                }
                let choices = uniform(&bench.model, rows, processors, ring, teams, fill, turns);
                let turns = if turns { "t" } else { "" };
                consider(format!("{}x{}x{teams}/{fill}{turns}", ring.0, ring.1), choices);
            }
        }
    }
    if bench.model.layers == 16 && rows <= 32 {
        for (i, teams) in [[1, 1, 1, 1, 1], [2, 1, 1, 1, 1]].into_iter().enumerate() {
            let mut choices = uniform(&bench.model, rows, processors, (2, 4), 1, 1, false);
            let bring = |bytes, distance| Bring { bytes, distance };
            (choices[0].shape.stages, choices[0].bring) = (3, bring(4 << 20, 2));
            choices[1].bring = bring(2 << 20, 2);
            choices[2].bring = bring(2 << 20, 2);
            choices[3].bring = bring(2 << 20, 1);
            if rows <= 8 {
                (choices[2].shape.stages, choices[2].shape.stage_panels) = (12, 1);
            }
            if rows <= 8 && teams[0] > 1 {
                continue;
            }
            choices[0].shape.teams = teams[0];
            if teams[0] > 1 {
                (choices[0].shape.stages, choices[0].shape.stage_panels) = (4, 2);
                choices[0].shape.splits = 4;
            }
            consider(format!("known {i}"), choices);
        }
    }
    println!("  rows {rows} uniform:{line}");
    let (mut choices, mut least) = best.unwrap();
    let mut tried = 0;
    'all: for _ in 0..4 {
        let before = least;
        for kind in [1, 3, 2, 0, 4] {
            for other in neighbours(&choices[kind], &bench.model.products[kind], rows, processors) {
                if begin.elapsed().as_secs_f64() > seconds_max {
                    break 'all;
                }
                tried += 1;
                let mut changed = choices;
                changed[kind] = other;
                let seconds = measure(&changed);
                if seconds < least * 0.9985 {
                    let again = measure(&changed);
                    if again < least * 0.9985 {
                        (choices, least) = (changed, again.max(seconds));
                    }
                }
            }
        }
        if least > before * 0.998 {
            break;
        }
    }
    println!("  rows {rows}: {tried} tried in {:.1} s", begin.elapsed().as_secs_f64());
    (choices, least)
}

fn report(bench: &Bench, rows: u32, choices: &[Choice; 5]) {
    let seconds = bench.time(&bench.step(rows, choices), 10);
    let floor = bench.bytes() / READ;
    println!(
        "{} layers, rows {rows:2}: {:.4} ms  {:.3} TB/s  {:.1} % of 4.42",
        bench.model.layers,
        seconds * 1e3,
        bench.bytes() / seconds / 1e12,
        floor / seconds * 100.0
    );
    for (kind, (product, choice)) in bench.model.products.iter().zip(choices).enumerate() {
        let alone = bench.one_kind(kind, rows, choice);
        let bytes = product.bytes() as f64;
        println!(
            "    {:8} {:6.1} MB alone {:8.2} us {:.3} TB/s  {}",
            product.name,
            bytes / 1e6,
            alone * 1e6,
            bytes / alone / 1e12,
            choice.text()
        );
    }
}

/// What the engine would launch.
fn planned(bench: &Bench, rows: u32, bytes: u64) -> [Choice; 5] {
    let processors = bench.device.processors();
    let kinds: [usize; 5] = std::array::from_fn(|kind| kind);
    kinds.map(|kind| {
        let product = bench.model.products[kind];
        let shape = plan(product.tiles, product.panels, rows, processors);
        Choice { shape, bring: Bring { bytes, distance: if kind == 3 { 1 } else { 2 } } }
    })
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, rows, mode] = &arguments[..] else { panic!("MODEL ROWS MODE") };
    let bench = Bench::new(name);
    let seconds_max: f64 = std::env::var("SECONDS_MAX").map_or(10.0, |s| s.parse().unwrap());
    println!(
        "{name}: {} on {} processors, {:.3} GB, floor {:.4} ms at 4.42 TB/s",
        bench.device.name().unwrap(),
        bench.device.processors(),
        bench.bytes() / 1e9,
        bench.bytes() / READ * 1e3
    );
    for rows in rows.split(',').map(|rows| rows.parse().unwrap()) {
        match mode.as_str() {
            "planned" => report(&bench, rows, &planned(&bench, rows, AHEAD_BYTES)),
            "variants" => variants(&bench, rows),
            _ => report(&bench, rows, &search(&bench, rows, seconds_max).0),
        }
    }
}

/// The planned choices, one of them changed: milliseconds of a step.
fn variants(bench: &Bench, rows: u32) {
    let processors = bench.device.processors();
    let base = planned(bench, rows, AHEAD_BYTES);
    let repeats = if bench.model.layers == 16 { 5 } else { 2 };
    let measure = |choices: &[Choice; 5]| bench.time(&bench.step(rows, choices), repeats) * 1e3;
    println!("  rows {rows} planned {:.4}, again {:.4}", measure(&base), measure(&base));
    let mut line = String::new();
    for megabytes in [0, 1, 2, 4, 6] {
        line += &format!("  {megabytes}: {:.4}", measure(&planned(bench, rows, megabytes << 20)));
    }
    println!("    MB ahead{line}");
    for (kind, product) in bench.model.products.iter().enumerate() {
        let mut line = String::new();
        let mut tell = |name: String, change: &dyn Fn(&mut Choice)| {
            let mut choices = base;
            change(&mut choices[kind]);
            if choices[kind].fits(product) && choices[kind] != base[kind] {
                line += &format!("  {name}: {:.4}", measure(&choices));
            }
        };
        for (stages, stage_panels) in [
            (2, 2),
            (4, 2),
            (6, 2),
            (8, 1),
            (12, 1),
            (2, 3),
            (2, 4),
            (3, 4),
            (4, 4),
            (5, 4),
            (6, 4),
            (3, 8),
        ] {
            tell(format!("{stages}x{stage_panels}"), &|c| {
                (c.shape.stages, c.shape.stage_panels) = (stages, stage_panels);
            });
        }
        for splits in [1, 2, 4, 8] {
            tell(format!("splits {splits}"), &|c| {
                (c.shape.splits, c.shape.clusters) = (splits, u32::MAX);
            });
        }
        for clusters in [processors, 2 * processors, u32::MAX] {
            tell(format!("clusters {clusters}"), &|c| c.shape.clusters = clusters);
        }
        for distance in [1, 2, 3] {
            for megabytes in [1, 3, 5] {
                tell(format!("{megabytes} MB by {distance}"), &|c| {
                    c.bring = Bring { bytes: megabytes << 20, distance };
                });
            }
        }
        tell("nothing".into(), &|c| c.bring = NOTHING);
        println!("    {:8}{line}", product.name);
    }
}
