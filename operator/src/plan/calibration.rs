//! How near the engine comes to what a card can do, by kernel family, as fitted to its bench. One row per measured card; a
//! new one joins by data (`python3 tests/gpu/fit.py h200` prints its row). Pure; formulae and sources: docs/planner.md.

use super::figures::Figures;

/// One measured card.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Calibration {
    /// Product label of the card.
    pub product: &'static str,
    /// Folder of the figures that it was fitted to.
    pub source: &'static str,
    /// Bytes per second of reading memory, measured beside the bench.
    pub read: f64,
    /// FLOP per second of dense bf16 products, measured beside the bench.
    pub bf16: f64,
    /// The weight stream: part of `read` at which it reads weights; a little more than the whole where the sum that measures
    /// the card is slower.
    pub stream_share: f64,
    /// The same: bytes that each row of a step costs per layer and hidden value, beside the weights themselves.
    pub row_bytes: f64,
    /// Bytes that a logit costs, where logits are wanted: written, read for the choice.
    pub logit_bytes: f64,
    /// The same family: seconds per layer in which nothing is read.
    pub stream_gap: f64,
    /// The tile family: part of `bf16` that it reaches.
    pub tile_share: f64,
    /// The same: seconds per layer beside the products.
    pub tile_gap: f64,
    /// Decode attention: part of `read` that it reaches.
    pub attention_read_share: f64,
    /// Prefill attention: part of `bf16` that it reaches, with heads of up to 64 and of up to 128 values.
    pub attention_flop_shares: [f64; 2],
}

/// The first is what cards that were not measured are taken to be like.
pub const CALIBRATIONS: &[Calibration] = &[Calibration {
    product: "NVIDIA-H100-80GB-HBM3",
    source: "docs/perf/h100",
    read: 2.9559e12,
    bf16: 7.7742e14,
    stream_share: 1.082,
    row_bytes: 271.1,
    logit_bytes: 6.6,
    stream_gap: 9.00e-6,
    tile_share: 0.783,
    tile_gap: 33.0e-6,
    attention_read_share: 1.0,
    attention_flop_shares: [0.57, 0.72],
}];

/// What a card does, and whether that was measured on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speeds {
    pub calibration: &'static Calibration,
    /// Bytes per second.
    pub read: f64,
    /// FLOP per second by type.
    pub bf16: f64,
    pub fp8: Option<f64>,
    pub int8: Option<f64>,
    /// Bytes per second to the other cards, and from the host's memory.
    pub link: f64,
    pub host: f64,
    pub measured: bool,
}

/// Part of PCIe's or NVLink's nominal speed that copies reach.
const LINK_SHARE: f64 = 0.8;

pub fn speeds(figures: &Figures) -> Speeds {
    let own = CALIBRATIONS.iter().find(|known| known.product == figures.product);
    let calibration = own.unwrap_or(&CALIBRATIONS[0]);
    let sheet =
        super::figures::of_product(calibration.product).expect("measured cards are in the table");
    // Of a card that was not measured we expect the part of its sheet that the measured one reaches of its own.
    let read_part = calibration.read / (sheet.read_gbps * 1e9);
    let flop_part = calibration.bf16 / (sheet.bf16_tflops * 1e12);
    Speeds {
        calibration,
        read: figures.read_gbps * 1e9 * read_part,
        bf16: figures.bf16_tflops * 1e12 * flop_part,
        fp8: figures.fp8_tflops.map(|speed| speed * 1e12 * flop_part),
        int8: figures.int8_tops.map(|speed| speed * 1e12 * flop_part),
        link: figures.link_gbps * 1e9 * LINK_SHARE,
        host: figures.host_gbps * 1e9 * LINK_SHARE,
        measured: own.is_some(),
    }
}
