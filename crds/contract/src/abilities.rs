//! What the engine can run, as one table. A new engine ability becomes a candidate of the planner by one line here.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    Cpu,
    Cuda,
}

/// Type in which a backend computes and keeps weights or KV pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub fn bytes(self) -> u64 {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    /// As flags and status write it.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        }
    }
}

/// How weights are kept and multiplied, as `spec.quantization` names it: bits of weights and of activations. The head, the
/// embedding and the norms stay unquantized everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Quantization {
    None,
    W8A16Int8,
    W8A16Fp8,
    W8A8Fp8,
    W8A8Int8,
    W4A16,
    Nf4,
    W4A8,
}

impl Quantization {
    /// By expected quality, the best first: docs/planner.md has the sources.
    pub const ALL: [Quantization; 8] = [
        Quantization::None,
        Quantization::W8A16Int8,
        Quantization::W8A16Fp8,
        Quantization::W8A8Fp8,
        Quantization::W8A8Int8,
        Quantization::W4A16,
        Quantization::Nf4,
        Quantization::W4A8,
    ];

    /// As spec and status write it.
    pub fn name(self) -> &'static str {
        match self {
            Quantization::None => "None",
            Quantization::W8A16Int8 => "W8A16-INT8",
            Quantization::W8A16Fp8 => "W8A16-FP8",
            Quantization::W8A8Fp8 => "W8A8-FP8",
            Quantization::W8A8Int8 => "W8A8-INT8",
            Quantization::W4A16 => "W4A16",
            Quantization::Nf4 => "NF4",
            Quantization::W4A8 => "W4A8",
        }
    }

    /// Bits of a quantized weight without its scales; None where weights keep their type.
    pub fn weight_bits(self) -> Option<u64> {
        match self {
            Quantization::None => None,
            Quantization::W8A16Int8
            | Quantization::W8A16Fp8
            | Quantization::W8A8Fp8
            | Quantization::W8A8Int8 => Some(8),
            Quantization::W4A16 | Quantization::Nf4 | Quantization::W4A8 => Some(4),
        }
    }

    /// Thousandths of a bit that a weight takes with its scales: one of 16 bits per row of some 1,024 for 8 bits; one of 16
    /// bits and a zero point of 4 per group of 128 for 4 bits; blocks of 64 whose scales are quantized again for NF4.
    pub fn weight_millibits(self) -> Option<u64> {
        match self {
            Quantization::None => None,
            Quantization::W4A16 | Quantization::W4A8 => Some(4156),
            Quantization::Nf4 => Some(4127),
            _ => Some(8016),
        }
    }

    /// What a checkpoint holds whose config names this method. None for methods that say too little or are not known.
    pub fn on_disk(method: &str) -> Option<Quantization> {
        match method {
            "awq" | "gptq" => Some(Quantization::W4A16),
            "fp8" => Some(Quantization::W8A8Fp8),
            "bitsandbytes" => Some(Quantization::Nf4),
            _ => None,
        }
    }
}

/// Type of keys and values in KV pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    F32,
    F16,
    Bf16,
    Int8,
    Fp8,
    Int4,
}

impl KvDtype {
    /// As flags write it.
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F32 => "f32",
            KvDtype::F16 => "f16",
            KvDtype::Bf16 => "bf16",
            KvDtype::Int8 => "int8",
            KvDtype::Fp8 => "fp8",
            KvDtype::Int4 => "int4",
        }
    }

    pub fn bits(self) -> u64 {
        match self {
            KvDtype::F32 => 32,
            KvDtype::F16 | KvDtype::Bf16 => 16,
            KvDtype::Int8 | KvDtype::Fp8 => 8,
            KvDtype::Int4 => 4,
        }
    }

    /// Bytes of one head's key or value of one token; integers carry a scale and a zero point of 16 bits each.
    pub fn head_bytes(self, head_dim: u64) -> u64 {
        let scales = match self {
            KvDtype::Int8 | KvDtype::Int4 => 4,
            _ => 0,
        };
        (head_dim * self.bits()).div_ceil(8) + scales
    }
}

impl From<Dtype> for KvDtype {
    fn from(dtype: Dtype) -> KvDtype {
        match dtype {
            Dtype::F32 => KvDtype::F32,
            Dtype::F16 => KvDtype::F16,
            Dtype::Bf16 => KvDtype::Bf16,
        }
    }
}

/// How the KV cache grows and shrinks, as `spec.cache.strategy` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CacheStrategy {
    /// Pages are taken as sequences grow.
    Dynamic,
    /// Every running sequence holds its longest length from the start.
    Static,
    /// Layers with a window free the pages that left it.
    SlidingWindow,
    /// What a card does not hold lies in the host's memory, and is read from there in every step.
    Offloaded,
}

impl CacheStrategy {
    pub const ALL: [CacheStrategy; 4] = [
        CacheStrategy::Dynamic,
        CacheStrategy::SlidingWindow,
        CacheStrategy::Static,
        CacheStrategy::Offloaded,
    ];

    /// As spec and status write it.
    pub fn name(self) -> &'static str {
        match self {
            CacheStrategy::Dynamic => "Dynamic",
            CacheStrategy::Static => "Static",
            CacheStrategy::SlidingWindow => "SlidingWindow",
            CacheStrategy::Offloaded => "Offloaded",
        }
    }
}

/// One combination of what an engine may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ability {
    pub backend: Backend,
    pub quantization: Quantization,
    /// Type that activations are computed in; weights too, where they are not quantized.
    pub weights: Dtype,
    pub kv: KvDtype,
    pub strategy: CacheStrategy,
    /// The most devices that share one copy of the weights.
    pub tensor_parallel_max: u32,
}

impl Ability {
    /// Nothing quantized, pages on demand, one device.
    pub const fn plain(backend: Backend, dtype: Dtype) -> Ability {
        let kv = match dtype {
            Dtype::F32 => KvDtype::F32,
            Dtype::F16 => KvDtype::F16,
            Dtype::Bf16 => KvDtype::Bf16,
        };
        Ability {
            backend,
            quantization: Quantization::None,
            weights: dtype,
            kv,
            strategy: CacheStrategy::Dynamic,
            tensor_parallel_max: 1,
        }
    }

    /// Whether the engine runs this on `devices` devices.
    pub fn runs_on(&self, devices: u32) -> bool {
        ABILITIES.iter().any(|able| {
            let same = Ability { tensor_parallel_max: able.tensor_parallel_max, ..*self };
            same == *able && devices <= able.tensor_parallel_max
        })
    }
}

/// Every combination the engine runs, the most exact first. A new line is a new candidate of the planner.
pub const ABILITIES: &[Ability] = &[
    Ability::plain(Backend::Cpu, Dtype::F32),
    Ability::plain(Backend::Cpu, Dtype::F16),
    Ability::plain(Backend::Cuda, Dtype::Bf16),
];

/// Tokens in one KV page.
pub const PAGE_TOKENS: u32 = 64;

/// The oldest cards that the CUDA kernels are made for: compute capability 8.0.
pub const CUDA_COMPUTE_MAJOR_MIN: u64 = 8;
/// The oldest driver that loads the CUDA kernels, by the CUDA it brings.
pub const CUDA_MAJOR_MIN: u64 = 13;
/// The widest head that the CUDA kernels take.
pub const CUDA_HEAD_DIM_MAX: u32 = 128;
