//! Attention over pages: one token of each sequence (decode), or runs of tokens (prefill).
//!
//! A step's rows lie in two runs: those that are their sequence's one token go to [`Attention::decode`], those of
//! longer runs to [`Attention::rope_kv`] and then [`Attention::prefill`]. Each takes the raw output of the product
//! before it and does norm, RoPE and the write into pages itself.

use half::bf16;

use crate::cuda::Family;
use crate::device::{Device, DeviceError, Grid, Kernel, Plain, Pointer};
use crate::reference::attention::PAGE_TOKENS;

/// Mirrors `Row` of `cuda/attention.cuh`: one token of a step.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Its id; -1: the one its slot sampled last; -2 - e: row e of the step's embeddings.
    pub token: i32,
    pub slot: i32,
    /// In its sequence; negative: the row is padding.
    pub position: i32,
    pub sample: i32,
}

/// Mirrors `Span` of `cuda/attention.cuh`: consecutive rows of one sequence.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub first: i32,
    pub rows: i32,
    pub slot: i32,
    pub position: i32,
}

// SAFETY: four integers each, without padding, as in the kernels.
unsafe impl Plain for Row {}
// SAFETY: as above.
unsafe impl Plain for Span {}

/// Mirrors `AttentionArguments` of `cuda/attention.cuh`, where each field is documented.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttentionArguments {
    pub qkv: Pointer<bf16>,
    pub qkv_stride: i32,
    pub rows_max: i32,
    pub rows: Pointer<Row>,
    pub first_row: i32,
    pub row_count: i32,
    /// What [`Attention::cut`] made of the step's spans.
    pub spans: Pointer<Span>,
    pub span_count: i32,
    pub pages: Pointer<bf16>,
    pub page_stride: i64,
    pub tables: Pointer<i32>,
    pub table_stride: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_width: i32,
    pub window: i32,
    pub scale: f32,
    pub rope: Pointer<[f32; 2]>,
    pub query_norm: Pointer<bf16>,
    pub key_norm: Pointer<bf16>,
    pub eps: f32,
    pub out: Pointer<bf16>,
    /// Set by [`Attention::decode`] from its [`DecodePlan`], as are the stages.
    pub splits: i32,
    pub stages: i32,
    pub settled: i32,
    pub partials: Pointer<f32>,
    pub counters: Pointer<i32>,
}

#[cfg(test)]
crate::mirrors::mirrors! {
    "attention.cuh":
    Row { token, slot, position, sample }
    Span { first, rows, slot, position }
    AttentionArguments {
        qkv, qkv_stride, rows_max, rows, first_row, row_count, spans, span_count, pages, page_stride,
        tables, table_stride, heads, kv_heads, head_width, window, scale, rope, query_norm, key_norm,
        eps, out, splits, stages, settled, partials, counters,
    }
}

/// How a decode launch is laid out. It follows from the number of rows alone, so that one graph serves all lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodePlan {
    /// Blocks that may share one sequence's keys; those without a page leave at once.
    pub splits: u32,
    /// Pages that a block keeps in flight; from four on it takes two at once, in another order of sums.
    pub stages: u32,
    /// Splits of one cluster, which merge through its shared memory.
    pub cluster: u32,
    /// Blocks that stay and take one KV head of one sequence after the other (`cuda/attention_many.cu`, only on Hopper),
    /// long sequences in two halves where `splits` is 2; otherwise each has blocks to itself.
    pub stay: Option<u32>,
}

/// Query heads that a decode block takes, at most.
const RUN_HEADS: usize = plimsoll_contract::memory::CUDA_RUN_HEADS as usize;

/// Splits of a cluster, at most: what every Hopper card grants.
const CLUSTER_MAX: u32 = 8;

/// How decode cuts the query heads that share a KV head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Runs {
    count: usize,
    /// Of the longest.
    heads: usize,
}

impl Runs {
    fn of(heads: usize, kv_heads: usize) -> Self {
        let sharing = heads / kv_heads;
        Self { count: sharing.div_ceil(RUN_HEADS), heads: sharing.min(RUN_HEADS) }
    }
}

/// Blocks that share one sequence's keys where `rows` sequences are decoded: enough to fill a card of `processors`, no
/// more than that needs.
#[must_use]
fn splits(processors: u32, head_dim: usize, blocks: usize) -> u32 {
    let wanted = (processors as usize / blocks.max(1)).max(1);
    // A power of two, so that clusters are whole. Wide heads keep two at least, which evens out the end.
    let splits_min = if head_dim >= 128 { 2 } else { 1 };
    ((wanted + 1).next_power_of_two() as u32 / 2).clamp(splits_min, CLUSTER_MAX)
}

/// Floats of `partials` and integers of `counters` that decode launches of up to `rows_max` rows need on a card of
/// `processors`.
#[must_use]
pub fn decode_workspace(
    processors: u32,
    rows_max: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
) -> (usize, usize) {
    let runs = Runs::of(heads, kv_heads);
    let each = (1..=rows_max).map(|rows| {
        let splits = splits(processors, head_dim, rows * kv_heads * runs.count);
        let plan = DecodePlan { splits, stages: 1, cluster: 1, stay: None };
        plan.workspace(rows, heads, kv_heads, head_dim)
    });
    each.fold((0, 0), |(p, c), (partials, counters)| (p.max(partials), c.max(counters)))
}

impl DecodePlan {
    /// Floats of `partials` and integers of `counters` (zero before the first launch) that a launch needs.
    #[must_use]
    pub fn workspace(
        self,
        rows: usize,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> (usize, usize) {
        let runs = Runs::of(heads, kv_heads);
        let blocks = rows * kv_heads * runs.count;
        let of_block = self.splits as usize * runs.heads * (head_dim + 2);
        (blocks * of_block.next_multiple_of(4), blocks)
    }
}

/// The kernels for one stored width of heads.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    head_dim: usize,
    on_hopper: bool,
    decode_shared_max: u32,
    processors: u32,
    decode: Kernel,
    /// Only on Hopper.
    many: Option<Kernel>,
    rope_kv: Kernel,
    prefill: Kernel,
    prefill_shape: PrefillShape,
}

/// What a prefill kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillShape {
    pub name: &'static str,
    pub head_dim: usize,
    /// Rows that a block takes at once.
    pub rows: usize,
    /// Pages that it takes at once, and how many such tiles its ring holds.
    pub pages: usize,
    pub stages: usize,
}

impl PrefillShape {
    /// The shape for heads stored with `head_dim` elements: 64, 128 or 256.
    #[must_use]
    pub fn of(on_hopper: bool, head_dim: usize) -> Self {
        let hopper: &[PrefillShape] = if on_hopper { &Attention::HOPPER } else { &[] };
        let mut shapes = hopper.iter().chain(&Attention::EVERYWHERE);
        let shape = shapes.find(|shape| shape.head_dim == head_dim);
        *shape.expect("heads are stored with 64, 128 or 256 elements")
    }

    /// The most spans that [`Attention::cut`] makes of `spans` spans with `rows` rows in all.
    #[must_use]
    pub fn cut_max(self, rows: usize, spans: usize) -> usize {
        rows / self.rows + spans
    }

    fn shared_bytes(self, hopper: bool) -> u32 {
        let ring = self.stages * 2 * self.pages * PAGE_TOKENS * self.head_dim * 2;
        let queries = self.rows * self.head_dim * 2;
        let bytes = match (hopper, self.stages) {
            (true, stages) => queries + ring + stages * 4 * 8,
            // Behind a single stage lie the queries, which otherwise pass through the second.
            (false, 1) => queries + ring,
            (false, _) => ring,
        };
        bytes as u32
    }
}

/// The most shared memory that a decode block asks for: what every card from sm_80 grants, and what Hopper does.
const DECODE_SHARED_MAX: u32 = 99 * 1024;
const DECODE_SHARED_MAX_HOPPER: u32 = 227 * 1024;

/// Shared memory of a processor of Hopper.
const PROCESSOR_SHARED_BYTES: u32 = 228 * 1024;

/// Pages in flight of a block that stays.
const STAYING_STAGES_MAX: u32 = 6;

/// Shared memory of a decode block, as `cuda/attention_decode.cu` and `cuda/attention_many.cu` lay it out.
fn decode_shared_bytes(plan: DecodePlan, heads: usize, head_dim: usize) -> u32 {
    let stages = plan.stages as usize;
    let (pages, sums) = (stages * 4 * PAGE_TOKENS * head_dim, 4 * heads * (head_dim + 8) * 4);
    // Blocks that stay fetch pages while sums meet.
    let ring = if plan.stay.is_some() { pages + sums } else { pages.max(sums) };
    let states = 2 * 4 * RUN_HEADS * 4;
    let vectors = (RUN_HEADS + 2) * head_dim * 2;
    let barriers = if plan.stay.is_some() {
        4 * 16 + 16 + 2 * 4 * 8 + 16 * stages
    } else {
        16 + 16 + 32 * stages
    };
    let cluster =
        if plan.cluster > 1 { plan.cluster as usize * heads * (head_dim + 2) * 4 } else { 0 };
    (ring + states + vectors + barriers + cluster) as u32
}

impl Attention {
    /// Finds the kernels for heads stored with `head_dim` elements, 64, 128 or 256.
    ///
    /// # Errors
    /// [`Device::kernel`].
    pub fn load(device: &Device, head_dim: usize) -> Result<Self, DeviceError> {
        Self::load_shape(device, PrefillShape::of(device.is_hopper(), head_dim))
    }

    pub const HOPPER: [PrefillShape; 2] =
        [hopper("attention_hopper_64", 64, 3, 2, 4), hopper("attention_hopper_128", 128, 2, 2, 3)];

    pub const EVERYWHERE: [PrefillShape; 3] = [
        everywhere("attention_prefill_64", 64, 128, 2),
        everywhere("attention_prefill_128", 128, 128, 2),
        everywhere("attention_prefill_256", 256, 64, 1),
    ];

    /// As [`Attention::load`], with a given prefill kernel.
    ///
    /// # Errors
    /// [`Device::kernel`].
    pub fn load_shape(device: &Device, shape: PrefillShape) -> Result<Self, DeviceError> {
        let head_dim = shape.head_dim;
        let (decode, many, rope_kv) = match head_dim {
            64 => ("attention_decode_64", "attention_many_64", "rope_kv_64"),
            128 => ("attention_decode_128", "attention_many_128", "rope_kv_128"),
            _ => ("attention_decode_256", "attention_many_256", "rope_kv_256"),
        };
        let hopper = Self::HOPPER.contains(&shape);
        let decode_shared_max =
            if device.is_hopper() { DECODE_SHARED_MAX_HOPPER } else { DECODE_SHARED_MAX };
        let family = if hopper { Family::AttentionHopper } else { Family::AttentionPrefill };
        let many = device
            .is_hopper()
            .then(|| device.kernel(Family::AttentionMany, many, decode_shared_max))
            .transpose()?;
        Ok(Self {
            head_dim,
            many,
            on_hopper: device.is_hopper(),
            decode_shared_max,
            processors: device.processors(),
            decode: device.kernel(Family::AttentionDecode, decode, decode_shared_max)?,
            rope_kv: device.kernel(Family::AttentionPrefill, rope_kv, 0)?,
            prefill: device.kernel(family, shape.name, shape.shared_bytes(hopper))?,
            prefill_shape: shape,
        })
    }

    /// The plan for a launch of `rows` rows: enough blocks to fill the card, no more splits than that needs.
    #[must_use]
    pub fn plan(&self, rows: usize, heads: usize, kv_heads: usize) -> DecodePlan {
        let runs = Runs::of(heads, kv_heads);
        let pairs = (rows * kv_heads * runs.count).max(1);
        if self.many.is_some() {
            let plan = self.staying(heads, kv_heads);
            let at_once = plan.stay.expect("its blocks stay") as usize;
            // Nearly one for each; with fewer, splits that run side by side were faster.
            if 4 * pairs >= 3 * at_once && self.holds(plan, heads, kv_heads) {
                return plan;
            }
        }
        let splits = splits(self.processors, self.head_dim, pairs);
        let cluster = if self.on_hopper { splits } else { 1 };
        // Some 96 KB in flight; more where a block has a processor to itself.
        let alone = pairs * splits as usize <= self.processors as usize;
        let stages = match (self.head_dim, alone) {
            (128, true) => 4,
            (64, _) => 6,
            _ => 3,
        };
        let mut plan = DecodePlan { splits, stages, cluster, stay: None };
        // Two pages in flight are worth more than splits that merge within one cluster, and those more than a third page.
        while !self.holds(plan, heads, kv_heads) {
            if plan.stages > 2 || plan.cluster == 1 {
                plan.stages -= 1;
            } else {
                plan.cluster /= 2;
            }
        }
        plan
    }

    /// The plan of blocks that stay, as many as the card holds at once.
    #[must_use]
    pub fn staying(&self, heads: usize, kv_heads: usize) -> DecodePlan {
        // As `__launch_bounds__` of the kernels.
        let each = match self.head_dim {
            64 => 3,
            128 => 2,
            _ => 1,
        };
        let longest = Runs::of(heads, kv_heads).heads;
        let stay = Some(each * self.processors);
        // As many as blocks of their own would have, whose workspace this is.
        let splits = splits(self.processors, self.head_dim, usize::MAX);
        let plan = |stages| DecodePlan { splits, stages, cluster: 1, stay };
        // The system takes 1 KB of each block.
        let room = PROCESSOR_SHARED_BYTES / each - 1024;
        let fits =
            |&stages: &u32| decode_shared_bytes(plan(stages), longest, self.head_dim) <= room;
        plan((1..=STAYING_STAGES_MAX).rev().find(fits).unwrap_or(1))
    }

    /// Whether a decode block of a plan fits into a processor of this card.
    #[must_use]
    pub fn holds(&self, plan: DecodePlan, heads: usize, kv_heads: usize) -> bool {
        let longest = Runs::of(heads, kv_heads).heads;
        (plan.stay.is_none() || self.many.is_some())
            && decode_shared_bytes(plan, longest, self.head_dim) <= self.decode_shared_max
    }

    /// Attention of rows `first_row..first_row + row_count`, each the one new token of its sequence: norm, RoPE, the
    /// write of its key and value, and `out`. Rows with a negative position are left out, and so is what `out` holds
    /// there.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// The pointers of `arguments` lead to memory of the shapes that `cuda/attention.cuh` states, with
    /// [`DecodePlan::workspace`] behind `partials` and `counters`; every row's slot and position have a table and
    /// pages, and no two rows share a slot. `settled` is 1 only where `rows`, `tables` and pages are complete
    /// before the kernel can start: in every layer but the first of a chain that holds an attention per layer.
    pub unsafe fn decode(
        &self,
        device: &Device,
        arguments: &AttentionArguments,
        plan: DecodePlan,
    ) -> Result<(), DeviceError> {
        self.check(arguments);
        assert!(plan.splits >= 1 && plan.splits.is_multiple_of(plan.cluster), "clusters are whole");
        assert!(self.on_hopper || plan.cluster == 1, "clusters came with Hopper");
        let (heads, kv_heads) = (arguments.heads as usize, arguments.kv_heads as usize);
        assert!(self.holds(plan, heads, kv_heads), "a block holds the plan's ring");
        let runs = Runs::of(heads, kv_heads);
        let arguments = AttentionArguments {
            splits: plan.splits as i32,
            stages: plan.stages as i32,
            ..*arguments
        };
        let (kernel, blocks) = match (plan.stay, self.many) {
            (Some(stay), Some(many)) => {
                let items = (kv_heads * runs.count) as u32 * arguments.row_count as u32;
                assert!(
                    plan.splits <= 2 && items >= 2,
                    "whole rows or halves, and counters for two"
                );
                (many, [stay.min(items), 1, 1])
            }
            _ => {
                let units = (kv_heads * runs.count) as u32;
                (self.decode, [units, arguments.row_count as u32, plan.splits])
            }
        };
        let grid = Grid {
            blocks,
            threads: if self.on_hopper { 160 } else { 128 },
            shared_bytes: decode_shared_bytes(plan, runs.heads, self.head_dim),
            cluster: [1, 1, plan.cluster],
            early: true,
        };
        if arguments.row_count == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise; the layout is mirrored.
        unsafe { device.launch(kernel, grid, &arguments) }
    }

    /// Spans cut into what one block of [`Attention::prefill`] takes, heaviest first. Cuts do not change a row's bits.
    #[must_use]
    pub fn cut(&self, spans: &[Span]) -> Vec<Span> {
        let mut cut: Vec<Span> = Vec::new();
        for span in spans {
            for at in (0..span.rows).step_by(self.prefill_shape.rows) {
                cut.push(Span {
                    first: span.first + at,
                    rows: (span.rows - at).min(self.prefill_shape.rows as i32),
                    slot: span.slot,
                    position: span.position + at,
                });
            }
        }
        // Stable, so that equal ones stay in order; what counts is the number of pages.
        cut.sort_by_key(|span| {
            std::cmp::Reverse((span.position + span.rows - 1) / PAGE_TOKENS as i32)
        });
        cut
    }

    /// Norm and RoPE of rows `first_row..first_row + row_count`, in place in `qkv`, and the write of their keys and
    /// values. Consecutive rows with consecutive positions of a slot are a run; behind its last row the values of the
    /// page become zeros.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// The pointers of `arguments` lead to memory of the shapes that `cuda/attention.cuh` states; nobody else writes
    /// the pages of these rows.
    pub unsafe fn rope_kv(
        &self,
        device: &Device,
        arguments: &AttentionArguments,
    ) -> Result<(), DeviceError> {
        self.check(arguments);
        let grid = Grid {
            blocks: [arguments.row_count as u32, 1, 1],
            threads: 128,
            shared_bytes: 0,
            cluster: [1, 1, 1],
            early: true,
        };
        if arguments.row_count == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise; the layout is mirrored.
        unsafe { device.launch(self.rope_kv, grid, arguments) }
    }

    /// Attention of `spans`, after [`Attention::rope_kv`] of all their rows.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// As [`Attention::rope_kv`]; `spans` come from [`Attention::cut`].
    pub unsafe fn prefill(
        &self,
        device: &Device,
        arguments: &AttentionArguments,
    ) -> Result<(), DeviceError> {
        self.check(arguments);
        let (heads, spans) = (arguments.heads as u32, arguments.span_count as u32);
        let (blocks, threads) = if Self::HOPPER.contains(&self.prefill_shape) {
            ([(heads * spans).min(self.processors), 1, 1], 128 + 2 * self.prefill_shape.rows as u32)
        } else {
            ([heads, spans, 1], 2 * self.prefill_shape.rows as u32)
        };
        let shared_bytes =
            self.prefill_shape.shared_bytes(Self::HOPPER.contains(&self.prefill_shape));
        let grid = Grid { blocks, threads, shared_bytes, cluster: [1, 1, 1], early: true };
        if spans == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise; the layout is mirrored.
        unsafe { device.launch(self.prefill, grid, arguments) }
    }

    fn check(&self, a: &AttentionArguments) {
        assert_eq!(a.heads % a.kv_heads, 0, "query heads divide evenly over KV heads");
        assert!(a.head_width as usize <= self.head_dim, "a head fits into its stored width");
        assert_eq!(a.qkv_stride % 8, 0, "rows of qkv begin on 16 bytes");
        assert!(a.scale > 0.0, "the scale is positive");
    }
}

const fn hopper(
    name: &'static str,
    head_dim: usize,
    groups: usize,
    pages: usize,
    stages: usize,
) -> PrefillShape {
    PrefillShape { name, head_dim, rows: 64 * groups, pages, stages }
}

const fn everywhere(
    name: &'static str,
    head_dim: usize,
    rows: usize,
    stages: usize,
) -> PrefillShape {
    PrefillShape { name, head_dim, rows, pages: 1, stages }
}
