//! Recorded decode steps: one graph per number of rows and way of sampling, made when it is first needed or before
//! serving begins. The numbers are few, so a step is padded to the next one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use plimsoll_kernels::device::{Device, DeviceError, Graph};

/// What the head must leave for sampling; a step does what its most demanding row needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ways {
    /// Every row is greedy without penalties: each tile's largest logit is enough.
    Greedy,
    /// Whole rows of logits.
    Logits,
    /// Whole rows of logits, and log-probabilities reported from them.
    Reported,
}

#[derive(Default)]
pub struct Recorded {
    graphs: HashMap<(usize, Ways), Graph>,
}

/// The padded number of rows: powers of two while a product costs the same anyway, then steps of what a tile holds.
pub fn bucket(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=64 => rows.next_multiple_of(8),
        65..=128 => rows.next_multiple_of(16),
        _ => rows.next_multiple_of(32),
    }
}

/// Every bucket of up to `rows_max` rows.
pub fn buckets(rows_max: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (1..=rows_max).map(bucket).collect();
    all.dedup();
    all
}

impl Recorded {
    /// Replays the graph for these rows, recording it first if there is none.
    pub fn replay(
        &mut self,
        device: &Device,
        rows: usize,
        ways: Ways,
        queue: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        device.replay(self.record(device, rows, ways, queue)?)
    }

    pub fn record(
        &mut self,
        device: &Device,
        rows: usize,
        ways: Ways,
        queue: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<&Graph, DeviceError> {
        Ok(match self.graphs.entry((rows, ways)) {
            Entry::Occupied(graph) => graph.into_mut(),
            Entry::Vacant(place) => place.insert(device.record(queue)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_its_rows_and_wastes_at_most_seven_below_sixty_four() {
        for rows in 1..=1000 {
            let padded = bucket(rows);
            assert!(padded >= rows && bucket(padded) == padded, "{rows}: {padded}");
            assert!(padded - rows < 32 && (rows > 64 || padded - rows < 8), "{rows}: {padded}");
        }
        assert_eq!(buckets(20), [1, 2, 4, 8, 16, 24]);
        assert_eq!(buckets(256).len(), 19);
    }
}
