//! Which device computes, and why: a GPU that can be used unless the CPU was asked for. Enters: the flag. Leaves: an
//! opened device or the CPU, with the sentence that says why. Never here: memory, weights.

use std::sync::Arc;

use plimsoll_contract::abilities::{Ability, Backend, Dtype};
use plimsoll_contract::exit::{ExitReason, ExitReport};
use plimsoll_kernels::device::{Device, DeviceError};

/// What the command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceArg {
    /// The first GPU that can be used, or else the CPU.
    Auto,
    Cpu,
    /// The first GPU; without one the process ends with the reason.
    Cuda,
}

#[derive(Clone)]
pub enum Place {
    Cpu,
    Cuda(Arc<Device>),
}

impl Place {
    pub fn choose(wanted: DeviceArg) -> Result<Place, ExitReport> {
        if wanted == DeviceArg::Cpu {
            return Ok(Place::Cpu);
        }
        match (Device::open(0), wanted) {
            (Ok(device), _) => Ok(Place::Cuda(Arc::new(device))),
            (Err(error), DeviceArg::Cuda) => {
                Err(ExitReport::new(ExitReason::DeviceLost, format!("--device cuda: {error}")))
            }
            (Err(none @ DeviceError::NoDriver), _) => {
                tracing::debug!(%none, "computing on the CPU");
                Ok(Place::Cpu)
            }
            (Err(error), _) => {
                // There is a driver, so somebody will wonder why the card is idle.
                tracing::warn!(%error, "computing on the CPU");
                Ok(Place::Cpu)
            }
        }
    }

    pub fn backend(&self) -> Backend {
        match self {
            Place::Cpu => Backend::Cpu,
            Place::Cuda(_) => Backend::Cuda,
        }
    }

    /// As people call it.
    pub fn name(&self) -> String {
        match self {
            Place::Cpu => "CPU".into(),
            Place::Cuda(device) => device.name().unwrap_or_else(|_| "GPU".into()),
        }
    }

    /// What this place runs in the type that was asked for, or in its best one.
    pub fn ability(&self, dtype: Option<Dtype>) -> Result<Ability, ExitReport> {
        let backend = self.backend();
        let dtype = dtype.unwrap_or(match backend {
            Backend::Cpu => Dtype::F32,
            Backend::Cuda => Dtype::Bf16,
        });
        let ability = Ability::plain(backend, dtype);
        if plimsoll_contract::abilities::ABILITIES.contains(&ability) {
            return Ok(ability);
        }
        let (name, remedy) = match backend {
            Backend::Cpu => ("CPU", "choose f32 or f16"),
            Backend::Cuda => ("GPU", "choose bf16, or --device cpu"),
        };
        Err(ExitReport::new(
            ExitReason::UnsupportedModel,
            format!("--dtype {} does not run on the {name}; {remedy}", dtype.name()),
        ))
    }
}
