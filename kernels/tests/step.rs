//! Weights into tiles, tokens into the residual stream, pages and rows from one place to another: each against its plain
//! definition, to the bit.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod support;

use half::{bf16, f16};
use plimsoll_kernels::device::Device;
use plimsoll_kernels::layout::{Order, in_activations, in_weights, pack_activations, pack_weights};
use plimsoll_kernels::ops::attention::Row;
use plimsoll_kernels::ops::step::{EmbedArguments, GatherArguments, Pages, StepKernels};
use plimsoll_kernels::ops::weights::{Heads, Pack, PackVector, Random, SourceType, Weights};
use plimsoll_kernels::reference::random::uniform;

const HEADLESS: Heads = Heads::NONE;

/// Bits of bf16, in which NaN and both zeros differ.
fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|value| value.to_bits()).collect()
}

struct Case {
    rows: usize,
    columns: usize,
    order: Order,
    row_heads: Heads,
    column_heads: Heads,
}

/// Packs in two launches and compares with the slow definition of the same matrix, padded by hand.
fn pack_and_check(device: &Device, case: &Case, kind: SourceType) {
    let Case { rows, columns, order, row_heads, column_heads } = *case;
    let values = support::noise(rows as u64, rows * columns, 3.0);
    let stored_rows = row_heads.place(rows - 1) + 1;
    let stored_columns = column_heads.place(columns - 1) + 1;
    let mut padded = vec![bf16::ZERO; stored_rows * stored_columns];
    for row in 0..rows {
        for column in 0..columns {
            let at = row_heads.place(row) * stored_columns + column_heads.place(column);
            padded[at] = values[row * columns + column];
        }
    }
    let expected = pack_weights(&padded, stored_rows, stored_columns, order);
    let source = match kind {
        SourceType::Bf16 => support::there(device, &values),
        // Sixteen bits travel as bf16's.
        SourceType::F16 => {
            let halves =
                values.iter().map(|value| bf16::from_bits(f16::from_f32(value.to_f32()).to_bits()));
            support::there(device, &halves.collect::<Vec<_>>())
        }
        SourceType::F32 => support::there(device, &support::widened(&values)),
    };
    let to = device.zeroed(expected.len() * 2, "a test").unwrap();
    let kernels = Weights::load(device).unwrap();
    let element_bytes = if kind == SourceType::F32 { 4 } else { 2 };
    let cut = rows / 3;
    for (first_row, count) in [(0, cut), (cut, rows - cut)] {
        if count == 0 {
            continue;
        }
        let pack = Pack {
            source: source.pointer::<u8>().add(first_row * columns * element_bytes),
            kind,
            rows: count,
            columns,
            first_row,
            row_offset: 0,
            order,
            to: to.pointer(),
            panels: stored_columns.div_ceil(64),
            row_heads,
            column_heads,
        };
        // SAFETY: source and target are as large as the shapes say.
        unsafe { kernels.pack(device, &pack) }.unwrap();
    }
    let got: Vec<bf16> = support::back(device, &to, expected.len());
    // A bf16 survives f16 unless it is small or long; these are compared by value.
    let same = match kind {
        SourceType::F16 => got
            .iter()
            .zip(&expected)
            .all(|(g, w)| (g.to_f32() - w.to_f32()).abs() <= 1e-4 * w.to_f32().abs() + 1e-6),
        _ => bits(&got) == bits(&expected),
    };
    assert!(same, "{rows}x{columns} {order:?} {row_heads:?} {column_heads:?} {kind:?}");
}

#[test]
fn weights_of_every_type_and_order_become_the_tiles_of_the_slow_definition() {
    let Some(device) = support::device() else { return };
    let case = |rows, columns, order, row_heads, column_heads| Case {
        rows,
        columns,
        order,
        row_heads,
        column_heads,
    };
    let cases = [
        case(64, 64, Order::Pairs, HEADLESS, HEADLESS),
        case(200, 192, Order::Pairs, HEADLESS, HEADLESS),
        case(131, 70, Order::Pairs, HEADLESS, HEADLESS),
        case(7, 1000, Order::Pairs, HEADLESS, HEADLESS),
        case(256, 128, Order::GateUp { features: 128 }, HEADLESS, HEADLESS),
        case(4 * 48, 128, Order::Pairs, Heads::new(48, 64), HEADLESS),
        case(96, 3 * 80, Order::Pairs, HEADLESS, Heads::new(80, 128)),
        case(2 * 96, 2 * 64, Order::Pairs, Heads::new(96, 128), Heads::new(64, 64)),
    ];
    for case in &cases {
        for kind in [SourceType::Bf16, SourceType::F16, SourceType::F32] {
            pack_and_check(&device, case, kind);
        }
    }
}

#[test]
fn query_key_and_value_land_one_after_the_other() {
    let Some(device) = support::device() else { return };
    let kernels = Weights::load(&device).unwrap();
    let (columns, parts) = (128usize, [256usize, 64, 64]);
    let values = support::noise(3, 384 * columns, 1.0);
    let source = support::there(&device, &values);
    let to = device.zeroed(384 * columns * 2, "a test").unwrap();
    let mut row_offset = 0;
    for rows in parts {
        let pack = Pack {
            source: source.pointer::<bf16>().add(row_offset * columns).cast(),
            kind: SourceType::Bf16,
            rows,
            columns,
            first_row: 0,
            row_offset,
            order: Order::Pairs,
            to: to.pointer(),
            panels: columns / 64,
            row_heads: HEADLESS,
            column_heads: HEADLESS,
        };
        // SAFETY: source and target are as large as the shapes say.
        unsafe { kernels.pack(&device, &pack) }.unwrap();
        row_offset += rows;
    }
    let got: Vec<bf16> = support::back(&device, &to, values.len());
    assert!(bits(&got) == bits(&pack_weights(&values, 384, columns, Order::Pairs)));
}

#[test]
fn vectors_of_narrow_heads_are_padded_like_their_rows() {
    let Some(device) = support::device() else { return };
    let kernels = Weights::load(&device).unwrap();
    for (elements, heads) in
        [(100, HEADLESS), (5 * 48, Heads::new(48, 64)), (80, Heads::new(80, 128))]
    {
        let values = support::noise(9, elements, 2.0);
        let source = support::there(&device, &support::widened(&values));
        let stored = (heads.place(elements - 1) + 1).next_multiple_of(64);
        let to = device.zeroed(stored * 2, "a test").unwrap();
        let pack = PackVector {
            source: source.pointer(),
            kind: SourceType::F32,
            elements,
            to: to.pointer(),
            heads,
        };
        // SAFETY: source and target are as large as the shapes say.
        unsafe { kernels.pack_vector(&device, &pack) }.unwrap();
        let mut expected = vec![bf16::ZERO; stored];
        (0..elements).for_each(|i| expected[heads.place(i)] = values[i]);
        let got: Vec<bf16> = support::back(&device, &to, stored);
        assert!(bits(&got) == bits(&expected), "{elements} {heads:?}");
    }
}

#[test]
fn made_up_weights_are_normal_and_the_same_for_the_same_seed() {
    let Some(device) = support::device() else { return };
    let kernels = Weights::load(&device).unwrap();
    let (rows, columns) = (150usize, 200usize);
    let make = |seed| {
        let to = support::poisoned(&device, 192 * 256 * 2);
        let random =
            Random { to: to.pointer(), rows, columns, panels: 4, mean: 0.5, deviation: 0.02, seed };
        // SAFETY: the target is as large as the shape says.
        unsafe { kernels.random(&device, &random) }.unwrap();
        support::back::<bf16>(&device, &to, 192 * 256)
    };
    let first = make(7);
    assert!(bits(&first) == bits(&make(7)) && bits(&first) != bits(&make(8)));
    let (mut sum, mut squares) = (0.0, 0.0);
    for row in 0..192 {
        for column in 0..256 {
            let value = first[in_weights(row, column, 256)].to_f64();
            if row >= rows || column >= columns {
                assert_eq!(value, 0.0, "padding at {row}, {column}");
            } else {
                sum += value - 0.5;
                squares += (value - 0.5).powi(2);
            }
        }
    }
    let count = (rows * columns) as f64;
    // Five standard deviations of the mean of 30,000; of the variance 4 %. bf16 near 0.5 rounds to 0.002.
    assert!((sum / count).abs() < 5.0 * 0.02 / count.sqrt(), "mean {}", sum / count);
    assert!((squares / count / 4e-4 - 1.0).abs() < 0.05, "variance {}", squares / count);
}

/// A row's squares per panel, and the row times the gain, in activations.
fn check_rows(
    got: (&[bf16], &[bf16], &[f32]),
    want: &[Vec<bf16>],
    gain: &[bf16],
    stride: usize,
    rows_max: usize,
) {
    let (residual, normed, squares) = got;
    let hidden = gain.len();
    for (at, row) in want.iter().enumerate() {
        for column in 0..hidden {
            assert_eq!(
                residual[at * stride + column].to_bits(),
                row[column].to_bits(),
                "{at}, {column}"
            );
            let product = bf16::from_f32(row[column].to_f32() * gain[column].to_f32());
            let normed = normed[in_activations(at, column, rows_max)];
            assert_eq!(normed.to_f32(), product.to_f32(), "{at}, {column}");
        }
        for column in hidden..hidden.next_multiple_of(64) {
            assert_eq!(normed[in_activations(at, column, rows_max)].to_bits(), 0, "padding");
        }
        for (panel, values) in row.chunks(64).enumerate() {
            let sum: f64 = values.iter().map(|value| value.to_f64().powi(2)).sum();
            let error = (f64::from(squares[panel * rows_max + at]) - sum).abs();
            assert!(error <= 1e-6 * sum, "squares of {at}, panel {panel}");
        }
    }
}

#[test]
fn rows_become_their_embeddings_whatever_names_them() {
    let Some(device) = support::device() else { return };
    let kernels = StepKernels::load(&device).unwrap();
    for (vocabulary, hidden, count, rows_max) in
        [(300usize, 128usize, 5usize, 256usize), (1000, 576, 300, 512), (77, 72, 33, 256)]
    {
        let panels = hidden.div_ceil(64);
        let stride = panels * 64;
        let table = support::noise(1, vocabulary * hidden, 1.0);
        let packed =
            support::there(&device, &pack_weights(&table, vocabulary, hidden, Order::Pairs));
        let own: Vec<f32> = support::widened(&support::noise(2, 4 * hidden, 5.0))
            .iter()
            .map(|x| x * 1.001)
            .collect();
        let gain = support::noise(3, hidden, 2.0);
        let last: Vec<i32> = (0..40).map(|slot| slot * 7 % vocabulary as i32).collect();
        let mut want = Vec::new();
        let rows: Vec<Row> = (0..count)
            .map(|i| {
                let random = (uniform(4, i as u64) * vocabulary as f64) as i32;
                let token = [random, random, -1, -2 - (i % 4) as i32][i % 4];
                let row = Row {
                    token,
                    slot: (i * 3 % 40) as i32,
                    position: if i % 7 == 6 { -1 } else { i as i32 },
                    sample: 0,
                };
                want.push(match row {
                    Row { position: -1, .. } => vec![bf16::ZERO; hidden],
                    Row { token: ..-1, .. } => own[(-2 - token) as usize * hidden..][..hidden]
                        .iter()
                        .map(|&x| bf16::from_f32(x))
                        .collect(),
                    _ => {
                        let token = if token == -1 { last[row.slot as usize] } else { token };
                        table[token as usize * hidden..][..hidden].to_vec()
                    }
                });
                row
            })
            .collect();
        let (rows, last, own, gain_there) = (
            support::there(&device, &rows),
            support::there(&device, &last),
            support::there(&device, &own),
            support::there(&device, &gain),
        );
        let residual = support::poisoned(&device, count * stride * 2);
        let normed = support::poisoned(&device, rows_max * stride * 2);
        let squares = support::poisoned(&device, panels * rows_max * 4);
        let arguments = EmbedArguments {
            rows: rows.pointer(),
            count: count as i32,
            rows_max: rows_max as i32,
            embedding: packed.pointer(),
            panels: panels as i32,
            hidden: hidden as i32,
            embeddings: own.pointer(),
            last_tokens: last.pointer(),
            gain: gain_there.pointer(),
            residual: residual.pointer(),
            residual_stride: stride as i32,
            normed: normed.pointer(),
            squares: squares.pointer(),
        };
        // SAFETY: everything is as large as the shapes say.
        unsafe { kernels.embed(&device, &arguments) }.unwrap();
        let residual: Vec<bf16> = support::back(&device, &residual, count * stride);
        let normed: Vec<bf16> = support::back(&device, &normed, rows_max * stride);
        let squares: Vec<f32> = support::back(&device, &squares, panels * rows_max);
        check_rows((&residual, &normed, &squares), &want, &gain, stride, rows_max);
    }
}

#[test]
fn gathered_rows_are_those_that_were_named() {
    let Some(device) = support::device() else { return };
    let kernels = StepKernels::load(&device).unwrap();
    let (columns, rows_max, rows_max_out) = (192usize, 512usize, 256usize);
    let values = support::noise(5, 400 * columns, 1.0);
    let normed = support::there(&device, &pack_activations(&values, 400, columns, rows_max));
    let squares: Vec<f32> = (0..columns / 64 * rows_max).map(|i| i as f32).collect();
    let squares_there = support::there(&device, &squares);
    let wanted = [399i32, 0, 17, 17, 256];
    let wanted_there = support::there(&device, &wanted);
    let normed_out = support::poisoned(&device, rows_max_out * columns * 2);
    let squares_out = support::poisoned(&device, columns / 64 * rows_max_out * 4);
    let arguments = GatherArguments {
        rows: wanted_there.pointer(),
        count: wanted.len() as i32,
        panels: (columns / 64) as i32,
        normed: normed.pointer(),
        squares: squares_there.pointer(),
        rows_max: rows_max as i32,
        normed_out: normed_out.pointer(),
        squares_out: squares_out.pointer(),
        rows_max_out: rows_max_out as i32,
    };
    // SAFETY: everything is as large as the shapes say.
    unsafe { kernels.gather(&device, &arguments) }.unwrap();
    let got: Vec<bf16> = support::back(&device, &normed_out, rows_max_out * columns);
    let got_squares: Vec<f32> = support::back(&device, &squares_out, columns / 64 * rows_max_out);
    for (to, &from) in wanted.iter().enumerate() {
        for column in 0..columns {
            let value = got[in_activations(to, column, rows_max_out)];
            assert_eq!(value.to_bits(), values[from as usize * columns + column].to_bits());
        }
        for panel in 0..columns / 64 {
            assert_eq!(
                got_squares[panel * rows_max_out + to],
                squares[panel * rows_max + from as usize]
            );
        }
    }
}

#[test]
fn copied_pages_are_whole_in_every_layer_and_others_stay() {
    let Some(device) = support::device() else { return };
    let kernels = StepKernels::load(&device).unwrap();
    let (layers, count, elements) = (3usize, 200usize, 2 * 2 * 64 * 8usize);
    let values = support::noise(6, layers * count * elements, 1.0);
    let pages = support::there(&device, &values);
    // More than one launch holds.
    let pairs: Vec<[i32; 2]> = (0..90).map(|i| [i, 199 - i]).collect();
    let pool = Pages { pages: pages.pointer(), layers, count, elements };
    // SAFETY: the pool is as large as it says.
    unsafe { kernels.copy_pages(&device, &pool, &pairs) }.unwrap();
    let mut expected = values.clone();
    for layer in 0..layers {
        for &[from, to] in &pairs {
            let place = |page: i32| (layer * count + page as usize) * elements;
            expected[place(to)..][..elements].copy_from_slice(&values[place(from)..][..elements]);
        }
    }
    let got: Vec<bf16> = support::back(&device, &pages, values.len());
    assert!(bits(&got) == bits(&expected));
}

#[test]
fn small_shapes_for_the_memory_checker() {
    let Some(device) = support::device() else { return };
    let case = Case {
        rows: 3 * 48,
        columns: 72,
        order: Order::Pairs,
        row_heads: Heads::new(48, 64),
        column_heads: HEADLESS,
    };
    pack_and_check(&device, &case, SourceType::Bf16);
    pack_and_check(&device, &case, SourceType::F32);
}
