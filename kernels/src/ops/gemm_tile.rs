//! Hopper's matrix product for more than 64 tokens: which tile, how many blocks share a tile's K,
//! and the launch of `cuda/gemm_tile.cu`.
//!
//! Enters: shapes and pointers. Leaves: a queued kernel. The choice is a pure function of the shape and
//! of how many processors the card has.

use crate::cuda::Family;
use crate::device::{Device, DeviceError, Grid, Kernel};
use crate::ops::gemm::{Epilogue, GemmArguments};

/// What a block works on: stored rows of weights by tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tile {
    Rows128Tokens256,
    Rows128Tokens192,
    Rows128Tokens160,
    Rows256Tokens128,
    Rows128Tokens128,
    Rows128Tokens96,
    Rows128Tokens64,
}

impl Tile {
    pub const ALL: [Self; 7] = [
        Self::Rows128Tokens256,
        Self::Rows128Tokens192,
        Self::Rows128Tokens160,
        Self::Rows256Tokens128,
        Self::Rows128Tokens128,
        Self::Rows128Tokens96,
        Self::Rows128Tokens64,
    ];

    /// Tiles of 64 stored rows.
    #[must_use]
    pub fn tiles(self) -> u32 {
        match self {
            Self::Rows256Tokens128 => 4,
            _ => 2,
        }
    }

    #[must_use]
    pub fn tokens(self) -> u32 {
        match self {
            Self::Rows128Tokens256 => 256,
            Self::Rows128Tokens192 => 192,
            Self::Rows128Tokens160 => 160,
            Self::Rows256Tokens128 | Self::Rows128Tokens128 => 128,
            Self::Rows128Tokens96 => 96,
            Self::Rows128Tokens64 => 64,
        }
    }

    fn is_largest(self) -> bool {
        matches!(self, Self::Rows128Tokens256 | Self::Rows256Tokens128)
    }

    /// The kernel's shared memory: stages of both operands, two stagings of outputs, two buffers of
    /// scales, barriers.
    fn shared_bytes(self) -> u32 {
        let stage = self.tiles() * 8192 + self.tokens() * 128;
        let stages = 196_608 / stage;
        stages * stage + 2 * 16_384 + 2 * self.tokens() * 4 + 16 * stages + 32
    }

    fn kernel(self, epilogue: Epilogue) -> &'static str {
        macro_rules! of {
            ($tile:literal) => {
                match epilogue {
                    Epilogue::Store => concat!("gemm_tile_store_", $tile),
                    Epilogue::Residual => concat!("gemm_tile_residual_", $tile),
                    Epilogue::GateUp => concat!("gemm_tile_gate_up_", $tile),
                    Epilogue::Logits => concat!("gemm_tile_logits_", $tile),
                }
            };
        }
        match self {
            Self::Rows128Tokens256 => of!("128x256"),
            Self::Rows128Tokens192 => of!("128x192"),
            Self::Rows128Tokens160 => of!("128x160"),
            Self::Rows256Tokens128 => of!("256x128"),
            Self::Rows128Tokens128 => of!("128x128"),
            Self::Rows128Tokens96 => of!("128x96"),
            Self::Rows128Tokens64 => of!("128x64"),
        }
    }
}

/// How a product is cut into blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    pub tile: Tile,
    /// Blocks that share a tile's K.
    pub splits: u32,
    /// Deal out the panels of the units of a last, incomplete round evenly.
    pub deal: bool,
    /// Token tiles that are walked side by side.
    pub band: u32,
}

impl Plan {
    fn token_tiles(self, rows: u32) -> u32 {
        rows.div_ceil(self.tile.tokens())
    }

    fn row_blocks(self, tiles: u32) -> u32 {
        tiles.div_ceil(self.tile.tiles())
    }

    fn units(self, shape: Shape) -> u32 {
        self.token_tiles(shape.rows) * self.row_blocks(shape.tiles)
    }

    /// Whether the kernel can do it: blocks that share a K wait for each other, so all must run at once.
    #[must_use]
    pub fn fits(self, shape: Shape, epilogue: Epilogue, processors: u32) -> bool {
        if !self.deal && self.splits == 1 {
            return true;
        }
        if epilogue == Epilogue::Logits {
            return false;
        }
        if self.deal {
            // A share is a few panels at least, so that few blocks meet in a unit; and since blocks are then at
            // different places of K, all tokens must stay in the L2.
            let rest = self.units(shape) % processors;
            return self.splits == 1
                && rest * shape.panels >= 2 * processors
                && u64::from(shape.rows) * u64::from(shape.panels) * 128 <= DEALT_TOKEN_BYTES;
        }
        self.units(shape) * self.splits <= processors && self.splits <= shape.panels.min(SPLITS_MAX)
    }
}

/// Token tiles walked side by side: 2 to 16 were equally fast.
const BAND: u32 = 8;

/// Tokens up to which every tile is worth a look.
const TOKENS_IN_L2: u32 = 2048;

/// What a product that leaves a third of the card idle costs its neighbours in a step, beside its own time.
const IDLE: f64 = 1.1;

/// Bytes of tokens that stay in the L2 beside a stream of weights.
const DEALT_TOKEN_BYTES: u64 = 20 << 20;

/// Blocks that may share a tile's K.
pub const SPLITS_MAX: u32 = 16;

/// What a choice depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Of 64 stored rows.
    pub tiles: u32,
    /// Of 64 columns.
    pub panels: u32,
    /// Tokens.
    pub rows: u32,
}

/// What a plan depends on beside the product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Card {
    pub processors: u32,
    /// Of its memory, as far as many blocks that read together reach it.
    pub bytes_per_microsecond: f64,
}

/// Part of the data sheet that tiles reach; and what an H200 gives them, for a card of which the driver does not say.
const MEMORY_REACHED: f64 = 0.875;
const H200_BYTES_PER_MICROSECOND: f64 = 4.2e6;

impl Card {
    #[must_use]
    pub fn of(device: &Device) -> Card {
        let reached = device.memory_speed().map(|speed| speed * MEMORY_REACHED);
        Card {
            processors: device.processors(),
            bytes_per_microsecond: reached.unwrap_or(H200_BYTES_PER_MICROSECOND),
        }
    }
}

/// The plan with the least estimated time; among equals the first.
#[must_use]
pub fn plan(shape: Shape, epilogue: Epilogue, card: Card) -> Plan {
    let Card { processors, .. } = card;
    let tiles = Tile::ALL.into_iter();
    let plans = tiles.flat_map(|tile| {
        let split =
            (1..=SPLITS_MAX).map(move |splits| Plan { tile, splits, deal: false, band: BAND });
        split.chain([Plan { tile, splits: 1, deal: true, band: BAND }])
    });
    let plans = plans.filter(|plan| plan.fits(shape, epilogue, processors));
    // Many tokens do not stay in the L2, and then only the largest tiles are fast.
    let plans = plans.filter(|plan| shape.rows <= TOKENS_IN_L2 || plan.tile.is_largest());
    // Where not even one round is full, to split K evenly was always faster than to deal.
    let plans = plans.filter(|plan| !plan.deal || plan.units(shape) > processors);
    let costs = plans.map(|plan| (estimate(plan, shape, card), plan));
    let best = costs.min_by(|a, b| a.0.total_cmp(&b.0));
    best.expect("a plan without splits always fits").1
}

/// Microseconds, by a model that was fitted to the benchmark on an H100 (the planned cut takes 0.6 % longer than the fastest on
/// average, 7 % at most), with the card's own memory.
fn estimate(plan: Plan, shape: Shape, card: Card) -> f64 {
    let Card { processors, bytes_per_microsecond } = card;
    let units = plan.units(shape);
    let (rows, tokens) = (f64::from(plan.tile.tiles() * 64), f64::from(plan.tile.tokens()));
    // A panel of a tile while `busy` blocks work: the matrix unit, what a processor takes from the L2, and the
    // weights' share of memory.
    let panel = |busy: u32| {
        let tensor = rows * tokens * 128.0 / 5.9e6;
        let taken = (rows + tokens) * 128.0 / 92.5e3;
        // Those that read the same weights are not quite side by side.
        let readers = f64::from(plan.token_tiles(shape.rows)).min(8.0).powf(0.75);
        let memory = rows * 128.0 * f64::from(busy) / readers / bytes_per_microsecond;
        tensor.max(taken).max(memory)
    };
    let panels = f64::from(shape.panels.div_ceil(plan.splits));
    let leave = 0.15 + rows * tokens / 6.1e3 / f64::from(plan.splits);
    let rounds = f64::from(units * plan.splits / processors);
    let rest = units * plan.splits % processors;
    let whole = rounds * (panels * panel(processors) + leave);
    let last = match plan {
        _ if rest == 0 => 0.0,
        Plan { deal: true, .. } => {
            // One or two parts of a unit leave a block, and it takes in those of its own unit.
            let share = f64::from(rest) / f64::from(processors);
            share * panels * panel(processors)
                + leave
                + 6.7
                + rows * tokens / 9.2e3 * (0.5 / share).max(1.0)
        }
        _ => panels * panel(rest) + leave,
    };
    // Stored, and added up by as many blocks as there are splits, one part after the other.
    let exchanged = f64::from(units * (plan.splits - 1)) * rows * tokens * 4.0;
    let exchange = if plan.splits > 1 {
        2.3 + 0.37 * f64::from(plan.splits) + exchanged / 3.25e6
    } else {
        0.0
    };
    let busy = units * plan.splits;
    let idle = if !plan.deal && 3 * busy < 2 * processors { IDLE } else { 1.0 };
    idle * (1.0 + whole + last + exchange)
}

/// Mirrors `GemmTileArguments` of `cuda/gemm_tile.cu`, where each field is documented.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct GemmTileArguments {
    gemm: GemmArguments,
    token_tiles: i32,
    row_blocks: i32,
    band: i32,
    whole: i32,
    weights_once: i32,
    tokens_stay: i32,
}

/// The kernels.
#[derive(Clone, Debug)]
pub struct GemmTile {
    kernels: Vec<(Epilogue, Tile, Kernel)>,
    card: Card,
}

impl GemmTile {
    /// Looks up all kernels.
    ///
    /// # Errors
    /// The card is not a Hopper, or the driver refuses.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let mut kernels = Vec::new();
        for epilogue in Epilogue::ALL {
            for tile in Tile::ALL {
                let name = tile.kernel(epilogue);
                let kernel = device.kernel(Family::GemmTile, name, tile.shared_bytes())?;
                kernels.push((epilogue, tile, kernel));
            }
        }
        Ok(Self { kernels, card: Card::of(device) })
    }

    /// Bytes that `partials` leads to on a card of `processors`, and integers that `counters` leads to, for products of
    /// any shape; the counters are zero at first.
    #[must_use]
    pub fn workspace(processors: u32) -> (usize, usize) {
        // A processor's registers full of sums.
        (processors as usize * 256 * 128 * 4, processors as usize)
    }

    /// What a product takes as [`plan`] cuts it, by the model that chooses.
    #[must_use]
    pub fn microseconds(&self, shape: Shape, epilogue: Epilogue) -> f64 {
        estimate(plan(shape, epilogue, self.card), shape, self.card)
    }

    /// Queues the product as [`plan`] cuts it. Any number of tokens; `arguments.splits` is not read.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    pub fn launch(
        &self,
        device: &Device,
        epilogue: Epilogue,
        arguments: &GemmArguments,
    ) -> Result<(), DeviceError> {
        let plan = plan(shape_of(arguments), epilogue, self.card);
        self.launch_as(device, epilogue, arguments, plan)
    }

    /// Queues the product, cut as the caller says.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    pub fn launch_as(
        &self,
        device: &Device,
        epilogue: Epilogue,
        arguments: &GemmArguments,
        plan: Plan,
    ) -> Result<(), DeviceError> {
        check(epilogue, arguments);
        let shape = shape_of(arguments);
        assert!(
            plan.fits(shape, epilogue, self.card.processors),
            "blocks that wait for each other run at once"
        );
        assert!(
            (plan.splits == 1 && !plan.deal) || arguments.partials.address() != 0,
            "a split needs a workspace"
        );
        let units = plan.units(shape);
        let blocks = match plan {
            Plan { deal: true, .. } => self.card.processors,
            Plan { splits: 1, .. } => units.min(self.card.processors),
            Plan { splits, .. } => units * splits,
        };
        let whole = match plan {
            Plan { deal: true, .. } => units - units % self.card.processors,
            Plan { splits: 1, .. } => units,
            _ => 0,
        };
        let token_tiles = plan.token_tiles(shape.rows);
        let gemm_tile = GemmTileArguments {
            gemm: GemmArguments { splits: plan.splits as i32, ..*arguments },
            token_tiles: token_tiles as i32,
            row_blocks: plan.row_blocks(shape.tiles) as i32,
            band: plan.band as i32,
            whole: whole as i32,
            weights_once: i32::from(token_tiles == 1),
            tokens_stay: i32::from(token_tiles > 2),
        };
        let kernel = self.kernels.iter().find(|(e, t, _)| (*e, *t) == (epilogue, plan.tile));
        let kernel = kernel.expect("every epilogue and tile was loaded").2;
        let grid = Grid {
            blocks: [blocks, 1, 1],
            threads: 384,
            shared_bytes: plan.tile.shared_bytes(),
            cluster: [1, 1, 1],
            early: true,
        };
        // SAFETY: the struct mirrors the kernel's; the caller's pointers lead to the shapes that
        // `GemmArguments` documents.
        unsafe { device.launch(kernel, grid, &gemm_tile) }
    }
}

fn shape_of(arguments: &GemmArguments) -> Shape {
    let of = |count: i32| u32::try_from(count).expect("counts are not negative");
    Shape { tiles: of(arguments.tiles), panels: of(arguments.panels), rows: of(arguments.rows) }
}

fn check(epilogue: Epilogue, a: &GemmArguments) {
    assert!(a.rows > 0 && a.tiles > 0 && a.panels > 0, "there is something to multiply");
    assert!(a.rows <= a.rows_max && a.rows_max % 256 == 0, "tiles of tokens stay inside");
    match epilogue {
        Epilogue::Store | Epilogue::Residual => {
            assert!(a.features % 8 == 0 && a.out_stride % 8 == 0, "rows leave in pieces of eight");
            assert!(a.features <= 64 * a.tiles, "every feature has a row of weights");
        }
        Epilogue::GateUp => assert!(a.features <= 32 * a.tiles, "gate and up have a row each"),
        Epilogue::Logits => {
            assert!(a.features <= 64 * a.tiles, "every feature has a row of weights")
        }
    }
}

#[cfg(test)]
crate::mirrors::mirrors! {
    "gemm_tile.cu":
    GemmTileArguments {
        gemm as "g", token_tiles, row_blocks, band, whole, weights_once, tokens_stay,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Card = Card { processors: 132, bytes_per_microsecond: H200_BYTES_PER_MICROSECOND };
    const H100: Card = Card { bytes_per_microsecond: 2.93e6, ..H200 };

    #[test]
    fn shared_memory_fits_a_block_of_hopper() {
        for tile in Tile::ALL {
            assert!(tile.shared_bytes() <= 227 * 1024, "{tile:?} {}", tile.shared_bytes());
        }
    }

    #[test]
    fn every_plan_is_one_that_the_kernel_takes() {
        for tiles in [1, 2, 3, 32, 48, 96, 448, 2004] {
            for panels in [1, 2, 32, 64, 224] {
                for rows in [1, 65, 128, 129, 192, 193, 256, 257, 2048, 8192] {
                    for epilogue in Epilogue::ALL {
                        let plan = plan(Shape { tiles, panels, rows }, epilogue, H200);
                        assert!(plan.splits <= panels);
                        assert!(plan.splits == 1 || epilogue != Epilogue::Logits);
                    }
                }
            }
        }
    }

    #[test]
    fn few_blocks_split_k_and_many_do_not() {
        let o = plan(Shape { tiles: 64, panels: 64, rows: 256 }, Epilogue::Residual, H200);
        assert!(o.splits > 1, "{o:?}");
        let prefill = plan(Shape { tiles: 448, panels: 64, rows: 8192 }, Epilogue::GateUp, H200);
        assert!(prefill.splits == 1 && prefill.tile.tokens() >= 192, "{prefill:?}");
    }

    #[test]
    fn plans_know_the_cards_memory() {
        let qkv = Shape { tiles: 96, panels: 64, rows: 128 };
        let down = Shape { tiles: 64, panels: 224, rows: 256 };
        let of = |shape, card| {
            let plan = plan(shape, Epilogue::Store, card);
            (plan.tile, plan.splits)
        };
        assert_eq!(of(qkv, H200), (Tile::Rows128Tokens128, 2));
        assert_eq!(of(qkv, H100), (Tile::Rows128Tokens64, 1));
        assert_eq!(of(down, H200), (Tile::Rows128Tokens128, 2));
        assert_eq!(of(down, H100), (Tile::Rows128Tokens256, 4));
    }

    #[test]
    fn what_fills_the_card_once_is_not_split_and_many_tokens_take_the_largest_tiles() {
        let of =
            |tiles, panels, rows| plan(Shape { tiles, panels, rows }, Epilogue::Residual, H100);
        for (rows, tile) in [
            (384, Tile::Rows128Tokens96),
            (512, Tile::Rows128Tokens128),
            (640, Tile::Rows128Tokens160),
            (768, Tile::Rows128Tokens192),
            (1024, Tile::Rows128Tokens256),
        ] {
            let plan = of(64, 64, rows);
            assert_eq!((plan.tile, plan.splits, plan.deal), (tile, 1, false), "{rows}");
        }
        assert!(of(448, 64, 8192).tile.is_largest());
    }
}
