//! The matrix product for every card from sm_80 on and any number of tokens (`cuda/gemm_portable.cu`).
//!
//! Enters: [`GemmArguments`] and an [`Epilogue`]. Leaves: one queued kernel. How a product is cut into blocks, and
//! whether its K is split, is a pure function of the card and the shape: [`Plan::new`].

use crate::cuda::Family;
use crate::device::{Device, DeviceError, Grid, Kernel};
use crate::layout::{ROWS_UNIT, TILE_ROWS};
use crate::ops::gemm::{Epilogue, GemmArguments};

const THREADS: u32 = 128;

/// Blocks that may share one tile's K.
const SPLITS_MAX: u32 = 32;

/// Mirrors a `Shape` of the kernel: what one block computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Of a block.
    pub tokens: u32,
    /// Of a block, 64 rows of weights each.
    pub tiles: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Blocks of a processor for which there are registers.
    pub together_max: u32,
    /// Nanoseconds that a panel of K takes where a block has a processor for itself, measured on an H100.
    alone: u32,
    /// The same for each of several blocks that wait for each other and no longer for the memory.
    among_others: u32,
}

const fn shape(tokens: u32, tiles: u32, stages: u32, together_max: u32) -> Shape {
    let stage_bytes = (tiles * TILE_ROWS as u32 + tokens) * 128;
    // A ring of stages, a scale for each token, four integers.
    let shared_bytes = stages * stage_bytes + tokens * 4 + 16;
    let (alone, among_others) = match tokens {
        ..=32 => (500, 70),
        33..=64 => (400, 400),
        _ => (680, 680),
    };
    Shape { tokens, tiles, shared_bytes, together_max, alone, among_others }
}

/// `Stream8`, `Stream16`, `Stream32`, `Stream64` and `Square`.
pub const SHAPES: [Shape; 5] = [
    shape(8, 1, 5, 8),
    shape(16, 1, 4, 5),
    shape(32, 1, 4, 7),
    shape(64, 2, 4, 3),
    shape(128, 2, 3, 2),
];

const STREAM_64: usize = 3;
const SQUARE: usize = 4;

const NAMES: [[&str; SHAPES.len()]; Epilogue::ALL.len()] = [
    [
        "gemm_portable_store_8",
        "gemm_portable_store_16",
        "gemm_portable_store_32",
        "gemm_portable_store_64",
        "gemm_portable_store_128",
    ],
    [
        "gemm_portable_residual_8",
        "gemm_portable_residual_16",
        "gemm_portable_residual_32",
        "gemm_portable_residual_64",
        "gemm_portable_residual_128",
    ],
    [
        "gemm_portable_gate_up_8",
        "gemm_portable_gate_up_16",
        "gemm_portable_gate_up_32",
        "gemm_portable_gate_up_64",
        "gemm_portable_gate_up_128",
    ],
    [
        "gemm_portable_logits_8",
        "gemm_portable_logits_16",
        "gemm_portable_logits_32",
        "gemm_portable_logits_64",
        "gemm_portable_logits_128",
    ],
];

/// What of a card decides how a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    pub processors: u32,
    /// Shared memory of one.
    pub shared_bytes: u32,
}

impl Card {
    #[must_use]
    pub fn new(capability: (i32, i32), processors: u32) -> Self {
        let kibibytes = match capability {
            (8, 0 | 7) => 164,
            (9..=11, _) => 228,
            _ => 100,
        };
        Self { processors, shared_bytes: kibibytes * 1024 }
    }

    /// Blocks of a shape that one processor runs at once.
    fn together(self, shape: Shape) -> u32 {
        // The system takes 1,024 bytes for each block.
        (self.shared_bytes / (shape.shared_bytes + 1024)).clamp(1, shape.together_max)
    }
}

/// How one product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Of [`SHAPES`].
    pub shape: usize,
    /// Without the splits: runs of tiles times runs of tokens.
    pub blocks: u32,
    /// Blocks that share the K of each.
    pub splits: u32,
}

impl Plan {
    /// The plan for `rows` tokens and `tiles` tiles of weights with `panels` panels of K each.
    #[must_use]
    pub fn new(card: Card, rows: u32, tiles: u32, panels: u32) -> Self {
        // More tokens than one block takes are runs of 64 or of 128.
        let fits = SHAPES[..STREAM_64].iter().position(|shape| shape.tokens >= rows);
        let shapes = match fits {
            Some(fits) => fits..=fits,
            None if rows <= SHAPES[STREAM_64].tokens => STREAM_64..=STREAM_64,
            None => STREAM_64..=SQUARE,
        };
        let splits = 1..=panels.min(SPLITS_MAX);
        let plans = shapes.flat_map(|shape| {
            splits.clone().map(move |splits| Self::fixed(shape, rows, tiles, splits))
        });
        let plan = plans.min_by_key(|plan| plan.nanoseconds(card, tiles, panels));
        plan.expect("a product has panels")
    }

    /// The plan with a given shape and number of splits.
    #[must_use]
    pub fn fixed(shape: usize, rows: u32, tiles: u32, splits: u32) -> Self {
        let Shape { tokens, tiles: block_tiles, .. } = SHAPES[shape];
        Self { shape, blocks: rows.div_ceil(tokens) * tiles.div_ceil(block_tiles), splits }
    }

    /// An estimate that is good for comparing plans. Its constants are an H100's; that of memory is given to each
    /// processor, so that smaller cards are taken as parts of it.
    fn nanoseconds(self, card: Card, tiles: u32, panels: u32) -> u64 {
        let shape = SHAPES[self.shape];
        let each = u64::from((self.blocks * self.splits).div_ceil(card.processors));
        let together = each.min(u64::from(card.together(shape)));
        let rounds = each.div_ceil(together);
        // Weights are read once, at 23.5 bytes a nanosecond and processor.
        let memory = u64::from(tiles * panels) * 8192 * 10 / (235 * u64::from(card.processors));
        let steps = (rounds * u64::from(shape.alone)).max(each * u64::from(shape.among_others));
        let fullest = u64::from(panels.div_ceil(self.splits)) * steps;
        // Every round begins with an empty ring and ends with an epilogue.
        let rounds = 4000 * rounds;
        let sums = self.sums_bytes();
        let gather = if self.splits == 1 {
            0
        } else {
            // Written by every block of a processor, and read by the last one for all.
            500 + each * sums / 50 + u64::from(self.splits) * sums / 30
        };
        memory.max(fullest) + rounds + gather
    }

    /// Of one block, in f32.
    fn sums_bytes(self) -> u64 {
        let shape = SHAPES[self.shape];
        u64::from(shape.tiles * shape.tokens) * TILE_ROWS as u64 * 4
    }

    /// What `GemmArguments::partials` must have room for.
    #[must_use]
    pub fn partials_bytes(self) -> usize {
        if self.splits == 1 {
            return 0;
        }
        (u64::from(self.blocks * self.splits) * self.sums_bytes()) as usize
    }

    /// How many of `GemmArguments::counters` it uses.
    #[must_use]
    pub fn counters(self) -> usize {
        if self.splits == 1 { 0 } else { self.blocks as usize }
    }
}

/// Every instantiation, looked up once.
pub struct GemmPortable {
    // [epilogue][shape]
    kernels: [[Kernel; SHAPES.len()]; Epilogue::ALL.len()],
    card: Card,
}

impl GemmPortable {
    /// Looks all its kernels up.
    ///
    /// # Errors
    /// Only when the image or the driver lacks them.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let mut kernels = Vec::new();
        for names in NAMES {
            let mut row = Vec::new();
            for (name, shape) in names.into_iter().zip(SHAPES) {
                row.push(device.kernel(Family::GemmPortable, name, shape.shared_bytes)?);
            }
            kernels.push(row.try_into().expect("a kernel for each shape"));
        }
        let card = Card::new(device.capability(), device.processors());
        Ok(Self { kernels: kernels.try_into().expect("a row for each epilogue"), card })
    }

    /// How a product will be cut here.
    #[must_use]
    pub fn plan(&self, rows: u32, tiles: u32, panels: u32) -> Plan {
        Plan::new(self.card, rows, tiles, panels)
    }

    /// Bytes of partial sums and number of counters that a product needs on a card for any number of tokens up to
    /// `rows_max`. Products that run one after another share both; the counters are zero before the first.
    #[must_use]
    pub fn workspace(card: Card, rows_max: u32, tiles: u32, panels: u32) -> (usize, usize) {
        // Beyond 32 tokens a plan depends on how many runs of 64 there are.
        let runs = (1..=rows_max.div_ceil(64)).map(|runs| 64 * runs);
        let plans: Vec<Plan> = [8, 16, 32]
            .into_iter()
            .chain(runs)
            .map(|rows| Plan::new(card, rows, tiles, panels))
            .collect();
        let partials = plans.iter().map(|plan| plan.partials_bytes()).max();
        let counters = plans.iter().map(|plan| plan.counters()).max();
        (partials.unwrap_or(0), counters.unwrap_or(0))
    }

    /// Queues the product. `arguments.splits` 0 leaves the splits to [`Plan::new`]; a fixed number gives a token the
    /// same bits whatever other tokens are in the step.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// The pointers of `arguments` lead to memory of the shapes that `cuda/gemm.cuh` documents (partials and counters
    /// as [`Plan::partials_bytes`] and [`Plan::counters`] say), which stays until the stream has passed the product.
    pub unsafe fn launch(
        &self,
        device: &Device,
        epilogue: Epilogue,
        arguments: &GemmArguments,
    ) -> Result<(), DeviceError> {
        let [rows, tiles, panels] =
            [arguments.rows, arguments.tiles, arguments.panels].map(i32::cast_unsigned);
        let planned = self.plan(rows, tiles, panels);
        let plan = match arguments.splits.cast_unsigned() {
            0 => planned,
            splits => Plan::fixed(planned.shape, rows, tiles, splits),
        };
        // SAFETY: as the caller promised.
        unsafe { self.launch_as(device, epilogue, arguments, plan) }
    }

    /// As [`GemmPortable::launch`], by another plan.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn launch_as(
        &self,
        device: &Device,
        epilogue: Epilogue,
        arguments: &GemmArguments,
        plan: Plan,
    ) -> Result<(), DeviceError> {
        check(epilogue, arguments, plan);
        let grid = Grid {
            blocks: [plan.blocks, plan.splits, 1],
            threads: THREADS,
            shared_bytes: SHAPES[plan.shape].shared_bytes,
            cluster: [1, 1, 1],
            // Small products hide their beginning behind the predecessor's end. Of wide ones each processor runs two
            // blocks, and early ones would take their places unevenly.
            early: SHAPES[plan.shape].tokens <= 32,
        };
        let arguments = GemmArguments { splits: plan.splits.cast_signed(), ..*arguments };
        let kernel = self.kernels[epilogue as usize][plan.shape];
        // SAFETY: the struct mirrors the kernel's parameter, and the caller promised what its pointers lead to.
        unsafe { device.launch(kernel, grid, &arguments) }
    }
}

fn check(epilogue: Epilogue, arguments: &GemmArguments, plan: Plan) {
    let g = arguments;
    assert!(0 < g.rows && g.rows <= g.rows_max, "the tokens are within the buffers");
    assert_eq!(g.rows_max as usize % ROWS_UNIT, 0, "whole tiles of tokens can be read");
    assert!(g.tiles > 0 && g.panels > 0, "the weights are not empty");
    assert!(0 < plan.splits && plan.splits <= g.panels.cast_unsigned(), "every split has panels");
    let there = match epilogue {
        Epilogue::Store | Epilogue::GateUp => g.out.address(),
        Epilogue::Residual => {
            [g.out.address(), g.gain.address(), g.normed.address(), g.squares_out.address()]
                .into_iter()
                .min()
                .expect("four addresses")
        }
        Epilogue::Logits => g.best.address(),
    };
    assert_ne!(there, 0, "an epilogue has where to write");
    let workspace = g.partials.address().min(g.counters.address());
    assert!(plan.splits == 1 || workspace != 0, "splits meet in a workspace");
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Card = Card { processors: 132, shared_bytes: 228 << 10 };
    const L4: Card = Card { processors: 58, shared_bytes: 100 << 10 };

    #[test]
    fn up_to_64_tokens_are_one_run_of_the_smallest_shape_that_holds_them() {
        for (rows, tokens) in [(1, 8), (8, 8), (9, 16), (17, 32), (32, 32), (33, 64), (64, 64)] {
            let plan = Plan::new(H200, rows, 10, 64);
            assert_eq!(SHAPES[plan.shape].tokens, tokens, "{rows}");
            assert_eq!(plan.blocks, 10 / SHAPES[plan.shape].tiles, "{rows}");
        }
        assert_eq!(SHAPES[Plan::new(H200, 8192, 96, 64).shape].tokens, 128);
    }

    // Llama 3.1 8B: o has 64 tiles of 64 panels, down of 224; gate and up have 448 tiles, the head 2,004.
    #[test]
    fn few_tiles_are_split_until_the_card_is_busy_and_many_are_not() {
        for rows in [1, 16, 64] {
            assert!(Plan::new(H200, rows, 64, 224).splits > 1, "{rows}");
        }
        for card in [H200, L4] {
            for rows in [1, 16, 64] {
                assert_eq!(Plan::new(card, rows, 2004, 64).splits, 1, "{card:?} {rows}");
            }
            for rows in [512, 2048, 8192] {
                assert_eq!(Plan::new(card, rows, 448, 64).splits, 1, "{card:?} {rows}");
            }
        }
    }

    #[test]
    fn no_processor_has_much_more_to_do_than_the_mean() {
        for (tiles, panels) in [(96, 64), (64, 64), (448, 64), (64, 224), (256, 32), (32, 128)] {
            for rows in [512, 1024, 2048, 8192] {
                let plan = Plan::new(H200, rows, tiles, panels);
                let shape = SHAPES[plan.shape];
                let each = (plan.blocks * plan.splits).div_ceil(132);
                let done = each * 132 * panels.div_ceil(plan.splits) * shape.tiles * shape.tokens;
                let needed = rows * tiles * panels;
                assert!(done < needed * 3 / 2, "{rows} {tiles} {panels}: {plan:?}");
            }
        }
    }

    #[test]
    fn every_split_has_panels() {
        for panels in [1, 2, 3, 5, 64, 224] {
            for rows in [1, 16, 64, 100, 1000] {
                for tiles in [1, 2, 3, 64] {
                    let plan = Plan::new(H200, rows, tiles, panels);
                    assert!((1..=panels).contains(&plan.splits), "{plan:?}");
                }
            }
        }
    }

    #[test]
    fn workspace_is_of_whole_blocks_and_none_where_nothing_is_split() {
        let plan = Plan { shape: 0, blocks: 64, splits: 4 };
        assert_eq!(plan.partials_bytes(), 64 * 4 * 64 * 8 * 4);
        assert_eq!(plan.counters(), 64);
        let whole = Plan { splits: 1, ..plan };
        assert_eq!((whole.partials_bytes(), whole.counters()), (0, 0));
    }

    #[test]
    fn the_kernel_has_the_same_shapes() {
        let mut claims = crate::mirrors::Claims::new("gemm_portable.cu");
        let names = ["Stream8", "Stream16", "Stream32", "Stream64", "Square"];
        for (name, shape) in names.into_iter().zip(SHAPES) {
            claims.equal(&format!("{name}::kTokens"), shape.tokens as usize);
            claims.equal(&format!("{name}::kTiles"), shape.tiles as usize);
            claims.equal(&format!("{name}::kSharedBytes"), shape.shared_bytes as usize);
        }
        claims.hold();
    }

    #[test]
    fn a_block_of_every_shape_fits_every_card() {
        for shape in SHAPES {
            assert!(shape.shared_bytes <= 99 << 10, "{shape:?}");
        }
        assert_eq!(Card::new((8, 9), 58), L4);
        assert_eq!(Card::new((9, 0), 132), H200);
        assert_eq!(Card::new((8, 0), 108).shared_bytes, 164 << 10);
        assert_eq!(H200.together(SHAPES[4]), 2);
        assert_eq!(L4.together(SHAPES[0]), 2);
    }
}
