//! What the spec says of plans: which is best, what they have to keep, what they may use. Fields in, types out. Pure.

use plimsoll_contract::abilities::{CacheStrategy, KvDtype, Quantization};
use plimsoll_crds as crds;
use plimsoll_crds::{CacheDtype, LLMDeploymentSpec, QuantizationChoice, StrategyChoice};

use super::Door;

const MILLISECONDS_MAX: i64 = 3_600_000;
const BITS_MIN: i64 = 4;
const BITS_MAX: i64 = 32;
/// What the planner may choose by itself where nobody says how far it may go.
const BITS_DEFAULT: u32 = 8;
const TENSOR_PARALLEL_MAX: i64 = 16;
const CLASSES_MAX: usize = 16;
const CLASS_CHARACTERS_MAX: usize = 64;
const GPUS_MAX: i64 = 16_000;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preferences {
    pub objective: Option<crds::Objective>,
    pub slo: Slo,
    /// None: the planner's to choose.
    pub quantization: Option<Quantization>,
    pub quality: Quality,
    pub cache_dtype: Option<KvDtype>,
    pub cache_strategy: Option<CacheStrategy>,
    pub tensor_parallel: Option<u32>,
    /// Empty: any.
    pub classes: Vec<String>,
    /// Of all replicas together.
    pub gpus_max: Option<u32>,
}

/// Bounds in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slo {
    pub ttft: Option<u64>,
    pub tpot: Option<u64>,
}

impl Slo {
    /// Of a spec that may be wrong elsewhere; a bound that cannot be is none.
    pub fn of(spec: &LLMDeploymentSpec) -> Slo {
        Door::default().slo(spec.slo.as_ref())
    }

    pub fn is_stated(&self) -> bool {
        self.ttft.is_some() || self.tpot.is_some()
    }

    /// Time to first token and time per output token.
    pub fn seconds(self) -> [Option<f64>; 2] {
        [self.ttft, self.tpot].map(|bound| bound.map(|microseconds| microseconds as f64 / 1e6))
    }
}

/// The least bits of what the planner chooses by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quality {
    pub weight_bits: u32,
    pub kv_bits: u32,
}

impl Default for Quality {
    fn default() -> Quality {
        Quality { weight_bits: BITS_DEFAULT, kv_bits: BITS_DEFAULT }
    }
}

impl Door {
    pub(super) fn preferences(&mut self, spec: &LLMDeploymentSpec) -> Preferences {
        let cache = spec.cache.clone().unwrap_or_default();
        let crds::Accelerators { classes, max_gpus } =
            spec.accelerators.clone().unwrap_or_default();
        let good = |class: &String| (1..=CLASS_CHARACTERS_MAX).contains(&class.len());
        self.check(
            classes.len() <= CLASSES_MAX && classes.iter().all(good),
            "spec.accelerators.classes",
            "holds at most 16 names of 1 to 64 characters, for instance nvidia-h200",
        );
        let (gpus, ranks) = (max_gpus.map(i64::from), spec.tensor_parallel.map(i64::from));
        Preferences {
            objective: spec.objective,
            slo: self.slo(spec.slo.as_ref()),
            quantization: spec.quantization.and_then(quantization),
            quality: self.quality(spec.quality.as_ref()),
            cache_dtype: cache.dtype.and_then(cache_dtype),
            cache_strategy: cache.strategy.and_then(strategy),
            tensor_parallel: self.between(ranks, 1, TENSOR_PARALLEL_MAX, "spec.tensorParallel"),
            classes,
            gpus_max: self.between(gpus, 0, GPUS_MAX, "spec.accelerators.maxGPUs"),
        }
    }

    fn slo(&mut self, given: Option<&crds::Slo>) -> Slo {
        let Some(crds::Slo { ttft_milliseconds, tpot_milliseconds }) = given else {
            return Slo::default();
        };
        let mut microseconds = |given: Option<i64>, field: &str| {
            self.between(given, 1, MILLISECONDS_MAX, field).map(|bound| u64::from(bound) * 1000)
        };
        Slo {
            ttft: microseconds(*ttft_milliseconds, "spec.slo.ttftMilliseconds"),
            tpot: microseconds(*tpot_milliseconds, "spec.slo.tpotMilliseconds"),
        }
    }

    fn quality(&mut self, given: Option<&crds::Quality>) -> Quality {
        let crds::Quality { min_weight_bits, min_kv_bits } = given.cloned().unwrap_or_default();
        let mut bits = |given: Option<i32>, field: &str| {
            self.between(given.map(i64::from), BITS_MIN, BITS_MAX, field).unwrap_or(BITS_DEFAULT)
        };
        Quality {
            weight_bits: bits(min_weight_bits, "spec.quality.minWeightBits"),
            kv_bits: bits(min_kv_bits, "spec.quality.minKvBits"),
        }
    }
}

fn quantization(choice: QuantizationChoice) -> Option<Quantization> {
    match choice {
        QuantizationChoice::Auto => None,
        QuantizationChoice::None => Some(Quantization::None),
        QuantizationChoice::W4A16 => Some(Quantization::W4A16),
        QuantizationChoice::NF4 => Some(Quantization::Nf4),
        QuantizationChoice::W8A16Int8 => Some(Quantization::W8A16Int8),
        QuantizationChoice::W8A16Fp8 => Some(Quantization::W8A16Fp8),
        QuantizationChoice::W8A8Int8 => Some(Quantization::W8A8Int8),
        QuantizationChoice::W8A8Fp8 => Some(Quantization::W8A8Fp8),
        QuantizationChoice::W4A8 => Some(Quantization::W4A8),
    }
}

fn cache_dtype(choice: CacheDtype) -> Option<KvDtype> {
    match choice {
        CacheDtype::Auto => None,
        CacheDtype::F32 => Some(KvDtype::F32),
        CacheDtype::F16 => Some(KvDtype::F16),
        CacheDtype::BF16 => Some(KvDtype::Bf16),
        CacheDtype::INT8 => Some(KvDtype::Int8),
        CacheDtype::FP8 => Some(KvDtype::Fp8),
        CacheDtype::INT4 => Some(KvDtype::Int4),
    }
}

fn strategy(choice: StrategyChoice) -> Option<CacheStrategy> {
    match choice {
        StrategyChoice::Auto => None,
        StrategyChoice::Dynamic => Some(CacheStrategy::Dynamic),
        StrategyChoice::Static => Some(CacheStrategy::Static),
        StrategyChoice::SlidingWindow => Some(CacheStrategy::SlidingWindow),
        StrategyChoice::Offloaded => Some(CacheStrategy::Offloaded),
    }
}
