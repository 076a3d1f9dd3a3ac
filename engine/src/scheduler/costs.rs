//! What a step costs by the number of its rows, and which number of them a step that decodes takes of prompts. Pure. A
//! device's products are cut into tiles: one row more than a tile holds can cost as much as another tile, so that a step
//! ends with a full one where it can, and the rest of a prompt goes with the next.

/// Costs of steps; by default every row costs the same, and none is left for later.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepCosts {
    /// Rows between two known costs. With fewer rows than this a device waits for its weights, and more come free.
    unit: u32,
    /// Of `unit`, 2 · `unit`, 3 · `unit` … rows, in any measure.
    costs: Vec<f32>,
}

impl StepCosts {
    /// From `unit` up to `rows_max` rows.
    pub fn of(unit: u32, rows_max: u32, cost: impl Fn(u32) -> f32) -> StepCosts {
        let counts = 1..=rows_max.div_ceil(unit);
        StepCosts { unit, costs: counts.map(|count| cost(count * unit)).collect() }
    }

    /// Rows of prompts for a step that has `decoding` rows already and could take `wanted` more, of which `begun` are of
    /// prompts that an earlier step began: they all go, so that nobody is put off twice.
    pub fn prompt_rows(&self, decoding: u32, begun: u32, wanted: u32) -> u32 {
        if decoding < self.unit || self.costs.is_empty() {
            return wanted;
        }
        let (least, all) = (decoding + begun.max(1), decoding + wanted);
        let full_tiles = (least.next_multiple_of(self.unit)..all).step_by(self.unit as usize);
        // Among equals the most rows.
        let candidates = full_tiles.chain([all]).rev();
        let best = candidates.min_by(|&a, &b| self.of_a_row(a).total_cmp(&self.of_a_row(b)));
        best.map_or(wanted, |rows| rows - decoding)
    }

    fn of_a_row(&self, rows: u32) -> f32 {
        let at = (rows.div_ceil(self.unit) as usize).min(self.costs.len()) - 1;
        self.costs[at] / rows as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tiles of 256 rows, each of which costs 10 where the weights alone cost 8.
    fn tiles() -> StepCosts {
        StepCosts::of(64, 2048, |rows| (10.0 * rows.div_ceil(256) as f32).max(8.0))
    }

    #[test]
    fn a_step_ends_with_a_full_tile_and_the_rest_of_a_prompt_waits() {
        assert_eq!(tiles().prompt_rows(250, 0, 300), 512 - 250);
        assert_eq!(tiles().prompt_rows(250, 0, 20), 6, "20 rows would cost a tile of their own");
        assert_eq!(tiles().prompt_rows(200, 0, 40), 40, "they fit");
        assert_eq!(tiles().prompt_rows(200, 0, 56), 56);
    }

    #[test]
    fn what_was_put_off_once_goes_whole() {
        assert_eq!(tiles().prompt_rows(250, 14, 14), 14);
        assert_eq!(tiles().prompt_rows(250, 14, 600), 768 - 250, "with others that fill its tile");
        assert_eq!(tiles().prompt_rows(250, 300, 310), 310);
    }

    #[test]
    fn few_decode_rows_and_devices_that_say_nothing_put_nothing_off() {
        assert_eq!(tiles().prompt_rows(0, 0, 300), 300);
        assert_eq!(tiles().prompt_rows(63, 0, 300), 300);
        assert_eq!(StepCosts::default().prompt_rows(250, 0, 300), 300);
    }

    #[test]
    fn any_costs_leave_what_was_begun_and_at_least_a_row_and_no_more_than_is_wanted() {
        for seed in 0..1000_u32 {
            let noise =
                |rows: u32| (rows.wrapping_mul(seed | 1).wrapping_mul(2_654_435_761) >> 24) as f32;
            let costs = StepCosts::of(64, 1024, |rows| rows as f32 + 2.0 * noise(rows));
            let (decoding, begun) = (seed % 256, seed * 7 % 200);
            let wanted = (begun + seed * 13 % 500).max(1);
            let rows = costs.prompt_rows(decoding, begun, wanted);
            assert!((begun.max(1)..=wanted).contains(&rows), "{decoding} {begun} {wanted}: {rows}");
        }
    }
}
