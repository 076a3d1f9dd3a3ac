//! What cards can do at most, by their data sheets. A product label enters, its row leaves. Pure; sources stand in
//! docs/planner.md. The label decides and never the memory alone: an H100 exists as three cards of different speed.

/// One card, by its maker's sheet. Speeds of matrix units are dense, without sparsity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// As GPU feature discovery writes it.
    pub product: &'static str,
    /// As the driver counts it, in MiB.
    pub memory_mebibytes: u64,
    /// GB/s of reading its memory.
    pub read_gbps: f64,
    pub bf16_tflops: f64,
    /// None where the card has no such units.
    pub fp8_tflops: Option<f64>,
    pub int8_tops: Option<f64>,
    /// GB/s to the other cards of a node in one direction: NVLink where `nvlink`, PCIe else.
    pub link_gbps: f64,
    pub nvlink: bool,
    /// GB/s from the host's memory.
    pub host_gbps: f64,
    /// Major and minor compute capability.
    pub capability: (u32, u32),
}

const PCIE4: f64 = 32.0;
const PCIE5: f64 = 64.0;

/// Product, MiB, GB/s, TFLOP/s in BF16 and FP8, TOP/s in INT8 (0: none), NVLink GB/s a direction (0: none), PCIe GB/s a
/// direction, capability.
type Row = (&'static str, u64, f64, f64, f64, f64, f64, f64, (u32, u32));

#[rustfmt::skip]
const ROWS: &[Row] = &[
    ("NVIDIA-A10",                 23_028,   600.0,  125.0,    0.0,  250.0,   0.0, PCIE4, (8, 6)),
    ("NVIDIA-A10G",                23_028,   600.0,   70.0,    0.0,  140.0,   0.0, PCIE4, (8, 6)),
    ("NVIDIA-A40",                 46_068,   696.0,  149.7,    0.0,  299.3,  56.0, PCIE4, (8, 6)),
    ("NVIDIA-RTX-A6000",           49_140,   768.0,  154.8,    0.0,  309.7,  56.0, PCIE4, (8, 6)),
    ("NVIDIA-L4",                  23_034,   300.0,  121.0,  242.0,  242.0,   0.0, PCIE4, (8, 9)),
    ("NVIDIA-L40",                 46_068,   864.0,  181.0,  362.0,  362.0,   0.0, PCIE4, (8, 9)),
    ("NVIDIA-L40S",                46_068,   864.0,  362.0,  733.0,  733.0,   0.0, PCIE4, (8, 9)),
    ("NVIDIA-RTX-6000-Ada-Generation", 49_140, 960.0, 364.0, 728.0,  728.0,   0.0, PCIE4, (8, 9)),
    ("NVIDIA-GeForce-RTX-4090",    24_564, 1_008.0,  165.2,  330.3,  660.6,   0.0, PCIE4, (8, 9)),
    ("NVIDIA-GeForce-RTX-5090",    32_607, 1_792.0,  209.5,  419.0,  838.0,   0.0, PCIE5, (12, 0)),
    ("NVIDIA-A100-SXM4-40GB",      40_960, 1_555.0,  312.0,    0.0,  624.0, 300.0, PCIE4, (8, 0)),
    ("NVIDIA-A100-PCIE-40GB",      40_960, 1_555.0,  312.0,    0.0,  624.0, 300.0, PCIE4, (8, 0)),
    ("NVIDIA-A100-SXM4-80GB",      81_920, 2_039.0,  312.0,    0.0,  624.0, 300.0, PCIE4, (8, 0)),
    ("NVIDIA-A100-80GB-PCIe",      81_920, 1_935.0,  312.0,    0.0,  624.0, 300.0, PCIE4, (8, 0)),
    ("NVIDIA-H100-80GB-HBM3",      81_559, 3_350.0,  989.0, 1979.0, 1979.0, 450.0, PCIE5, (9, 0)),
    ("NVIDIA-H100-PCIe",           81_559, 2_000.0,  756.0, 1513.0, 1513.0, 300.0, PCIE5, (9, 0)),
    ("NVIDIA-H100-NVL",            95_830, 3_900.0,  835.0, 1671.0, 1671.0, 300.0, PCIE5, (9, 0)),
    ("NVIDIA-H200",               143_771, 4_800.0,  989.0, 1979.0, 1979.0, 450.0, PCIE5, (9, 0)),
    ("NVIDIA-H200-NVL",           143_771, 4_800.0,  835.0, 1671.0, 1671.0, 450.0, PCIE5, (9, 0)),
    ("NVIDIA-B200",               183_359, 8_000.0, 2250.0, 4500.0, 4500.0, 900.0, PCIE5, (10, 0)),
];

/// Every card that is known.
pub fn all() -> impl Iterator<Item = Figures> {
    ROWS.iter().map(|&(product, mebibytes, read, bf16, fp8, int8, nvlink, pcie, capability)| {
        let some = |speed: f64| (speed > 0.0).then_some(speed);
        Figures {
            product,
            memory_mebibytes: mebibytes,
            read_gbps: read,
            bf16_tflops: bf16,
            fp8_tflops: some(fp8),
            int8_tops: some(int8),
            link_gbps: if nvlink > 0.0 { nvlink } else { pcie },
            nvlink: nvlink > 0.0,
            host_gbps: pcie,
            capability,
        }
    })
}

/// Slices of a whole card: seven of its processors, eight of its memory.
const PROCESSOR_SLICES: f64 = 7.0;

/// Of a product label, or of a slice of a card such as `NVIDIA-H200-MIG-1g.18gb`, which has its part of both speeds and no
/// way to its neighbours. None for cards that are not in the table.
pub fn of_product(product: &str) -> Option<Figures> {
    let known = |label: &str| all().find(|figures| figures.product.eq_ignore_ascii_case(label));
    let Some((whole, profile)) = product.split_once("-MIG-") else { return known(product) };
    let figures = known(whole)?;
    let (processors, gigabytes) = profile.split_once("g.")?;
    let processors: f64 = processors.parse().ok()?;
    let gigabytes: f64 = gigabytes.split("gb").next()?.parse().ok()?;
    let part = processors / PROCESSOR_SLICES;
    // A slice of memory comes in eighths of the card, and its name is rounded.
    let whole_gigabytes = figures.memory_mebibytes as f64 * 1.048_576e-3;
    let memory = ((gigabytes / whole_gigabytes * 8.0).round() / 8.0).clamp(0.125, 1.0);
    Some(Figures {
        memory_mebibytes: (figures.memory_mebibytes as f64 * memory) as u64,
        read_gbps: figures.read_gbps * memory,
        bf16_tflops: figures.bf16_tflops * part,
        fp8_tflops: figures.fp8_tflops.map(|speed| speed * part),
        int8_tops: figures.int8_tops.map(|speed| speed * part),
        link_gbps: figures.host_gbps,
        nvlink: false,
        ..figures
    })
}

#[cfg(test)]
mod tests {
    use super::super::cards;
    use super::*;

    /// An H100 that is taken for an A100 plans the wrong number of cards (ome#622).
    #[test]
    fn ome_622_an_h100_is_never_taken_for_another_card_and_its_forms_differ() {
        let read = |product: &str| of_product(product).map(|figures| figures.read_gbps);
        assert_eq!(read("NVIDIA-H100-80GB-HBM3"), Some(3350.0));
        assert_eq!(read("NVIDIA-H100-PCIe"), Some(2000.0));
        assert_eq!(read("NVIDIA-H100-NVL"), Some(3900.0));
        assert_eq!(read("NVIDIA-A100-SXM4-80GB"), Some(2039.0));
        assert_eq!(read("NVIDIA-A100-80GB-PCIe"), Some(1935.0));
        assert_eq!(read("NVIDIA-H100"), None, "a name that says too little says nothing");
        assert_eq!(read("NVIDIA-A1000"), None);
    }

    #[test]
    fn classes_are_those_that_labels_give() {
        for (product, class) in [
            ("NVIDIA-H100-80GB-HBM3", "nvidia-h100-80gb"),
            ("NVIDIA-A100-80GB-PCIe", "nvidia-a100-80gb"),
            ("NVIDIA-L40S", "nvidia-l40s"),
            ("NVIDIA-A10", "nvidia-a10"),
            ("NVIDIA-H200-NVL", "nvidia-h200"),
        ] {
            assert!(all().any(|figures| figures.product == product), "{product}");
            assert_eq!(cards::class(product), class);
        }
    }

    #[test]
    fn the_docs_list_every_card_with_its_bandwidth() {
        let docs = include_str!("../../../docs/planner.md");
        for card in all() {
            let class = cards::class(card.product);
            let read = super::super::explain::count(card.read_gbps as u64);
            let row = format!("| {} | {class} | {read} |", card.product);
            assert!(docs.contains(&row), "{row}");
        }
    }

    #[test]
    fn every_row_is_plausible() {
        for row in all() {
            let Figures { read_gbps, bf16_tflops, fp8_tflops, int8_tops, .. } = row;
            assert!((300.0..=8000.0).contains(&read_gbps), "{row:?}");
            assert!((70.0..=2250.0).contains(&bf16_tflops), "{row:?}");
            // Half the width is twice the speed, or four times where sums may be narrow too.
            for speed in [fp8_tflops, int8_tops].into_iter().flatten() {
                assert!((1.99..=4.01).contains(&(speed / bf16_tflops)), "{row:?}");
            }
            assert_eq!(fp8_tflops.is_some(), row.capability >= (8, 9), "{row:?}");
        }
    }

    #[test]
    fn a_slice_has_its_part_of_the_card() {
        let slice = of_product("NVIDIA-H200-MIG-1g.18gb").unwrap();
        assert_eq!(slice.read_gbps, 600.0);
        assert!((slice.bf16_tflops - 989.0 / 7.0).abs() < 0.1);
        let half = of_product("NVIDIA-A100-SXM4-80GB-MIG-3g.40gb").unwrap();
        assert_eq!(half.read_gbps, 2039.0 / 2.0);
        assert_eq!(of_product("NVIDIA-H200-MIG-odd"), None);
    }
}
