//! How matrices lie in device memory: panels of 64 columns whose 16-byte pieces are swizzled, as
//! `cuda/common.cuh` defines them. Pure index arithmetic, on which packing, tests and kernels agree.

use half::bf16;

/// Columns of a panel.
pub const PANEL: usize = 64;

/// Rows of a tile of weights.
pub const TILE_ROWS: usize = 64;

/// Rows of activations are a multiple of this, so that the widest tile of any kernel stays inside.
pub const ROWS_UNIT: usize = 256;

/// Element (row, column) of a panel, `column < 64`.
#[must_use]
pub fn in_panel(row: usize, column: usize) -> usize {
    row * PANEL + (((column / 8) ^ (row % 8)) * 8 + column % 8)
}

/// Element (row, column) of activations `[columns / 64][rows_max][64]`.
#[must_use]
pub fn in_activations(row: usize, column: usize, rows_max: usize) -> usize {
    column / PANEL * rows_max * PANEL + in_panel(row, column % PANEL)
}

/// Element (row, column) of weights `[rows / 64][columns / 64][64][64]`; `row` counts stored rows
/// ([`Order::stored`]).
#[must_use]
pub fn in_weights(row: usize, column: usize, columns: usize) -> usize {
    let (tile, panel) = (row / TILE_ROWS, column / PANEL);
    (tile * columns.div_ceil(PANEL) + panel) * TILE_ROWS * PANEL
        + in_panel(row % TILE_ROWS, column % PANEL)
}

/// In which order a product's rows of weights are stored. A thread of a matrix product holds the rows
/// `r` and `r + 8` of each sixteen, so these two are what an epilogue can combine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `r` and `r + 8` are neighbouring features: they leave as one word.
    Pairs,
    /// `r` is a gate's feature and `r + 8` the same feature of up. Feature `f` of gate counts as logical
    /// row `f`, of up as `features + f`.
    GateUp { features: usize },
}

impl Order {
    /// Where a logical row is stored.
    #[must_use]
    pub fn stored(self, row: usize) -> usize {
        match self {
            Order::Pairs => row / 16 * 16 + row % 2 * 8 + row % 16 / 2,
            Order::GateUp { features } => {
                let (half, feature) = (row / features, row % features);
                feature / 8 * 16 + half * 8 + feature % 8
            }
        }
    }
}

/// Weights `[rows, columns]`, row-major, as the device keeps them; rows and columns are padded to 64 with
/// zeros. The slow definition that the packing kernel is tested against.
#[must_use]
pub fn pack_weights(weights: &[bf16], rows: usize, columns: usize, order: Order) -> Vec<bf16> {
    let (rows_padded, columns_padded) =
        (rows.next_multiple_of(TILE_ROWS), columns.next_multiple_of(PANEL));
    let mut packed = vec![bf16::ZERO; rows_padded * columns_padded];
    for row in 0..rows {
        for column in 0..columns {
            packed[in_weights(order.stored(row), column, columns_padded)] =
                weights[row * columns + column];
        }
    }
    packed
}

/// Activations `[rows, columns]`, row-major, as the device keeps them. `columns` is a multiple of 64.
#[must_use]
pub fn pack_activations(
    values: &[bf16],
    rows: usize,
    columns: usize,
    rows_max: usize,
) -> Vec<bf16> {
    let mut packed = vec![bf16::ZERO; rows_max * columns];
    for row in 0..rows {
        for column in 0..columns {
            packed[in_activations(row, column, rows_max)] = values[row * columns + column];
        }
    }
    packed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_row_change_places_within_it_and_rows_of_eight_differ() {
        assert_eq!(in_panel(0, 8), 8);
        assert_eq!(in_panel(1, 8), 64, "piece 1 of row 1 comes first");
        assert_eq!(in_panel(9, 63), 9 * 64 + 6 * 8 + 7);
        let places: std::collections::BTreeSet<usize> =
            (0..64).flat_map(|row| (0..64).map(move |column| in_panel(row, column))).collect();
        assert_eq!(places.len(), 64 * 64);
        assert_eq!(places.last(), Some(&(64 * 64 - 1)));
    }

    #[test]
    fn every_order_is_a_permutation_that_brings_partners_eight_apart() {
        for order in [Order::Pairs, Order::GateUp { features: 64 }] {
            let mut stored: Vec<usize> = (0..128).map(|row| order.stored(row)).collect();
            let (first, partner) = match order {
                Order::Pairs => (stored[6], stored[7]),
                Order::GateUp { .. } => (stored[6], stored[64 + 6]),
            };
            assert_eq!(first + 8, partner);
            stored.sort_unstable();
            assert!(stored.iter().copied().eq(0..128));
        }
    }

    #[test]
    fn padding_is_zero_and_every_weight_is_somewhere() {
        let weights: Vec<bf16> = (0..3 * 70).map(|i| bf16::from_f32(i as f32 + 1.0)).collect();
        let packed = pack_weights(&weights, 3, 70, Order::Pairs);
        assert_eq!(packed.len(), 64 * 128);
        assert_eq!(packed.iter().filter(|&&w| w != bf16::ZERO).count(), weights.len());
    }
}
