//! Sampling: from the head's logits to tokens that stay on the device and results that the host reads.
//!
//! A bucket's launches have fixed arguments, so that a graph can hold them: rows beyond the step's are
//! padding, and the step's number is read on the device.

use crate::cuda::Family;
use crate::device::{Device, DeviceError, Grid, Kernel, Plain, Pointer};
use crate::layout::TILE_ROWS;
use crate::ops::gemm::Best;
use crate::reference::sampling::scale_of;

/// Entries of a slot's list of biases.
pub const BIASES_MAX: usize = 1024;

/// Most likely tokens that a result can hold.
pub const TOP_MAX: usize = 20;

/// Tokens of a vocabulary.
pub const VOCABULARY_MAX: usize = 262_144;

const THREADS: u32 = 512;
/// Of `Shared` in `cuda/sampling_row.cuh`, which checks it, without its bins.
const SHARED_BYTES: u32 = 59 * 1024;
/// Blocks of a cluster.
const RANKS_MAX: u32 = 8;

/// More rows than any card runs at once.
const MANY_ROWS: usize = 1024;

/// Mirrors `SlotParameters` of `cuda/sampling.cuh`: how a slot samples.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotParameters {
    /// [`SlotParameters::scale_of`] the temperature; 0: the most likely token.
    pub scale: f32,
    /// [`SlotParameters::floor_of`] temperature and min-p.
    pub floor: f32,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub top_k: u32,
    pub repetition: f32,
    pub presence: f32,
    pub frequency: f32,
    /// Whether any penalty is on, and so the slot's seen tokens are kept ([`Sampling::start`]).
    pub penalised: i32,
    /// Entries of the slot's list ([`Bias`]).
    pub biases: i32,
    /// Most likely tokens to report, at most [`TOP_MAX`]; -1: no log-probabilities at all.
    pub alternatives: i32,
    pub seed: u64,
}

impl SlotParameters {
    pub const GREEDY: Self = Self {
        scale: 0.0,
        floor: f32::NEG_INFINITY,
        top_p: 1.0,
        top_k: 0,
        repetition: 1.0,
        presence: 0.0,
        frequency: 0.0,
        penalised: 0,
        biases: 0,
        alternatives: -1,
        seed: 0,
    };

    #[must_use]
    pub fn scale_of(temperature: f32) -> f32 {
        if temperature == 0.0 { 0.0 } else { scale_of(temperature) }
    }

    /// What the largest logit is added to for the least one that survives min-p.
    #[must_use]
    pub fn floor_of(temperature: f32, min_p: f32) -> f32 {
        if min_p <= 0.0 { f32::NEG_INFINITY } else { temperature * min_p.ln() }
    }
}

/// An entry of a slot's list of biases, which is sorted by token; equals stay in the order in which they
/// are added.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bias {
    pub token: u32,
    pub bias: f32,
}

/// A row of logits from which a token is drawn.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleRow {
    pub slot: i32,
    /// Of the token that is drawn; negative: the row is padding.
    pub position: i32,
}

impl SampleRow {
    pub const PADDING: Self = Self { slot: 0, position: -1 };
}

/// A row of logits under which a prompt's next token is reported.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptRow {
    /// Of the logits; negative: padding.
    pub row: i32,
    pub token: i32,
    pub alternatives: i32,
    pub unused: i32,
}

impl PromptRow {
    pub const PADDING: Self = Self { row: -1, token: 0, alternatives: 0, unused: 0 };
}

/// A likely token.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Top {
    pub token: u32,
    pub logprob: f32,
}

/// What a row brought. The device writes token, failed and epoch last, in one piece: once the epoch is the
/// step's, all holds.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleResult {
    /// Set, as `rank`, `tops` and `top`, where log-probabilities were asked for.
    pub logprob: f32,
    /// 1: the most likely.
    pub rank: u32,
    pub tops: u32,
    pub unused: u32,
    pub token: u32,
    /// 1: there was no finite number among the logits, and no other field holds.
    pub failed: u32,
    pub unused_too: u32,
    pub epoch: u32,
    pub top: [Top; TOP_MAX],
}

// SAFETY: numbers of four and eight bytes, without padding, as in the kernels.
unsafe impl Plain for SlotParameters {}
// SAFETY: as above.
unsafe impl Plain for Bias {}
// SAFETY: as above.
unsafe impl Plain for SampleRow {}
// SAFETY: as above.
unsafe impl Plain for PromptRow {}
// SAFETY: as above.
unsafe impl Plain for SampleResult {}

/// Mirrors `SampleArguments` of `cuda/sampling.cuh`, where each field is documented.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SampleArguments {
    pub logits: Pointer<f32>,
    pub scratch: Pointer<f32>,
    pub best: Pointer<Best>,
    pub stride: i32,
    pub tiles: i32,
    pub vocabulary: i32,
    pub seen_stride: i32,
    pub rows: Pointer<SampleRow>,
    pub prompts: Pointer<PromptRow>,
    pub parameters: Pointer<SlotParameters>,
    pub seen: Pointer<u16>,
    pub biases: Pointer<Bias>,
    pub last_tokens: Pointer<i32>,
    pub results: Pointer<SampleResult>,
    pub epoch: Pointer<u32>,
    pub ring: i32,
    pub results_max: i32,
}

/// Mirrors `SeenArguments` of `cuda/sampling.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SeenArguments {
    pub seen: Pointer<u16>,
    pub tokens: Pointer<i32>,
    pub seen_stride: i64,
    pub slot: i32,
    pub count: i32,
    pub prompt_tokens: i32,
    pub vocabulary: i32,
}

/// Elements from one slot's counts to the next's.
#[must_use]
pub fn seen_stride(vocabulary: usize) -> usize {
    vocabulary.next_multiple_of(8)
}

/// The kernels, looked up once.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    sample: Kernel,
    greedy: Kernel,
    prompt: Kernel,
    seen: Kernel,
    /// Rows that run at once with so many blocks each, from 1 on; 0 where the card has no clusters.
    rows_at_once: [u32; RANKS_MAX as usize],
}

impl Sampling {
    /// # Errors
    /// What the driver says of the image.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let sample = device.kernel(Family::Sampling, "sample", SHARED_BYTES_MAX)?;
        let mut rows_at_once = [0; RANKS_MAX as usize];
        if device.is_hopper() {
            for (rows, ranks) in rows_at_once.iter_mut().zip(1..) {
                let grid = Self::grid(MANY_ROWS, ranks, SHARED_BYTES_MAX);
                *rows = device.clusters_at_once(sample, grid)?;
            }
        }
        Ok(Self {
            sample,
            greedy: device.kernel(Family::Sampling, "sample_greedy", 0)?,
            prompt: device.kernel(Family::Sampling, "prompt_logprobs", SHARED_BYTES_MAX)?,
            seen: device.kernel(Family::Sampling, "seen_start", 0)?,
            rows_at_once,
        })
    }

    /// A token for each of the first `rows` rows. Their slots may ask for anything.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    pub fn sample(
        &self,
        device: &Device,
        arguments: &SampleArguments,
        rows: usize,
    ) -> Result<(), DeviceError> {
        let ranks = self.ranks(rows, arguments);
        self.sample_with(device, arguments, rows, ranks)
    }

    /// As [`Sampling::sample`], with so many blocks to a row; the result does not depend on it.
    ///
    /// # Errors
    /// As there.
    pub fn sample_with(
        &self,
        device: &Device,
        arguments: &SampleArguments,
        rows: usize,
        ranks: u32,
    ) -> Result<(), DeviceError> {
        check(rows, arguments);
        check_logits(arguments);
        let possible = (1..=RANKS_MAX).contains(&ranks);
        let possible = possible && (ranks == 1 || self.rows_at_once[ranks as usize - 1] > 0);
        assert!(possible, "{ranks} blocks to a row");
        let grid = Self::grid(rows, ranks, shared_bytes(arguments.tiles as u32, ranks));
        // SAFETY: the arguments mirror the kernel's; the caller's pointers lead to the shapes that
        // `cuda/sampling.cuh` documents.
        unsafe { device.launch(self.sample, grid, arguments) }
    }

    /// The most likely token for each of the first `rows` rows, whose slots ask for no more; logits are
    /// not read.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    pub fn greedy(
        &self,
        device: &Device,
        arguments: &SampleArguments,
        rows: usize,
    ) -> Result<(), DeviceError> {
        check(rows, arguments);
        let blocks = [rows as u32, 1, 1];
        let grid = Grid { blocks, threads: 256, shared_bytes: 0, cluster: [1, 1, 1], early: true };
        // SAFETY: as in `sample_with`.
        unsafe { device.launch(self.greedy, grid, arguments) }
    }

    /// Reports the first `rows` entries of `prompts`; results lie in their order.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    pub fn prompt_logprobs(
        &self,
        device: &Device,
        arguments: &SampleArguments,
        rows: usize,
    ) -> Result<(), DeviceError> {
        check(rows, arguments);
        check_logits(arguments);
        let ranks = self.ranks(rows, arguments);
        let grid = Self::grid(rows, ranks, shared_bytes(arguments.tiles as u32, ranks));
        // SAFETY: as in `sample_with`.
        unsafe { device.launch(self.prompt, grid, arguments) }
    }

    /// Sets what a slot has seen; `tokens` are `count` ids, of which the first are the prompt.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    pub fn start(&self, device: &Device, arguments: &SeenArguments) -> Result<(), DeviceError> {
        assert!(arguments.prompt_tokens <= arguments.count, "the prompt lies within the tokens");
        let blocks = [arguments.seen_stride.max(1).unsigned_abs().div_ceil(4096) as u32, 1, 1];
        let threads = THREADS;
        let grid = Grid { blocks, threads, shared_bytes: 0, cluster: [1, 1, 1], early: true };
        // SAFETY: the arguments mirror the kernel's, and the caller's pointers lead to `count` tokens and
        // `seen_stride` counts a slot.
        unsafe { device.launch(self.seen, grid, arguments) }
    }

    fn grid(rows: usize, ranks: u32, shared_bytes: u32) -> Grid {
        Grid {
            blocks: [ranks, rows as u32, 1],
            threads: THREADS,
            shared_bytes,
            cluster: [ranks, 1, 1],
            early: true,
        }
    }

    /// As many blocks to a row as run at once.
    fn ranks(&self, rows: usize, arguments: &SampleArguments) -> u32 {
        let fits = |ranks: u32| rows as u32 <= self.rows_at_once[ranks as usize - 1];
        let busy = |ranks: u32| ranks * 32 <= arguments.tiles as u32;
        (2..=RANKS_MAX).rev().find(|&n| fits(n) && busy(n)).unwrap_or(1)
    }
}

/// With the most columns of bins; less than every card from sm_80 grants.
const SHARED_BYTES_MAX: u32 = SHARED_BYTES + bins_bytes(80);

const fn bins_bytes(columns: u32) -> u32 {
    2 * 64 * columns * 4
}

/// With bins in as many columns as `columns_of` in `cuda/sampling_row.cuh` says.
fn shared_bytes(tiles: u32, ranks: u32) -> u32 {
    let tiles_each = tiles.div_ceil(ranks * THREADS / 32);
    let of_thread = tiles_each.div_ceil(2) * 4;
    let columns = match of_thread {
        ..256 => 32,
        256..512 => 64,
        _ => 80,
    };
    SHARED_BYTES + bins_bytes(columns)
}

fn check(rows: usize, arguments: &SampleArguments) {
    let vocabulary = arguments.vocabulary as usize;
    assert!(rows > 0 && rows <= arguments.results_max as usize, "{rows} rows have results");
    assert!(vocabulary > 0 && vocabulary <= VOCABULARY_MAX, "a vocabulary of {vocabulary}");
    let tiles = vocabulary.div_ceil(TILE_ROWS);
    assert_eq!(arguments.tiles as usize, tiles, "tiles of {vocabulary} tokens");
    assert!(arguments.ring > 0, "results need a place");
}

fn check_logits(arguments: &SampleArguments) {
    let stride = arguments.stride as usize;
    let enough = stride.is_multiple_of(4) && stride >= arguments.vocabulary as usize;
    assert!(enough, "a stride of {stride} for {} tokens", arguments.vocabulary);
    assert_eq!(arguments.seen_stride % 4, 0, "counts are read four at a time");
}

#[cfg(test)]
crate::mirrors::mirrors! {
    "sampling.cuh":
    SlotParameters {
        scale, floor, top_p, top_k, repetition, presence, frequency, penalised, biases,
        alternatives, seed,
    }
    Bias { token, bias }
    SampleRow { slot, position }
    PromptRow { row, token, alternatives, unused }
    Top { token, logprob }
    SampleResult { logprob, rank, tops, unused, token, failed, unused_too, epoch, top }
    SampleArguments {
        logits, scratch, best, stride, tiles, vocabulary, seen_stride, rows, prompts, parameters,
        seen, biases, last_tokens, results, epoch, ring, results_max,
    }
    SeenArguments { seen, tokens, seen_stride, slot, count, prompt_tokens, vocabulary }
}
