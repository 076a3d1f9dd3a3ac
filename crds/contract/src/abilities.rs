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

/// One runnable combination, best expected quality first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ability {
    pub backend: Backend,
    pub weights: Dtype,
    pub kv: Dtype,
}

/// Every combination the engine runs, in default order of preference.
pub const ABILITIES: &[Ability] = &[
    Ability { backend: Backend::Cpu, weights: Dtype::F32, kv: Dtype::F32 },
    Ability { backend: Backend::Cpu, weights: Dtype::F16, kv: Dtype::F16 },
    Ability { backend: Backend::Cuda, weights: Dtype::Bf16, kv: Dtype::Bf16 },
];

/// Tokens in one KV page.
pub const PAGE_TOKENS: u32 = 64;

/// The oldest cards that the CUDA kernels are made for: compute capability 8.0.
pub const CUDA_COMPUTE_MAJOR_MIN: u64 = 8;
/// The oldest driver that loads the CUDA kernels, by the CUDA it brings.
pub const CUDA_MAJOR_MIN: u64 = 13;
