//! What an operator can change while the daemon runs.

use serde::{Deserialize, Serialize};

use super::Engine;
use crate::policy::{self, Mode, VmId};

/// A change of one attribute of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "attribute", rename_all = "kebab-case")]
pub enum Command {
    /// The balloon's target by hand.
    TargetBytes {
        /// The VM.
        vm: VmId,
        /// What the balloon should hold; without it the operator wants nothing any more.
        bytes: Option<u64>,
        /// May go below the floor (J2). For mode manual.
        override_floor: bool,
    },
    /// Memory always left to the guest.
    FloorBytes {
        /// The VM.
        vm: VmId,
        /// How much.
        bytes: u64,
    },
    /// How far it follows the policy.
    Mode {
        /// The VM.
        vm: VmId,
        /// The mode.
        mode: Mode,
    },
    /// Its share against others.
    Weight {
        /// The VM.
        vm: VmId,
        /// 100 is ordinary.
        weight: u32,
    },
}

/// Why a command was refused.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// There is no such VM.
    #[error("there is no VM {vm}; `aerostatd status` lists them")]
    UnknownVm {
        /// The name that was given.
        vm: VmId,
    },
    /// It would go below the floor.
    #[error("{0}")]
    Floor(String),
    /// The value makes no sense.
    #[error("{0}")]
    Value(String),
}

impl Engine {
    /// Carries a command out, at the round that follows at once. Returns what was done, in a line.
    pub(super) fn command(&mut self, command: &Command) -> Result<String, CommandError> {
        match command {
            Command::TargetBytes {
                vm,
                bytes,
                override_floor,
            } => self.set_target(vm, *bytes, *override_floor),
            Command::FloorBytes { vm, bytes } => {
                self.settings(vm)?.floor_bytes = *bytes;
                Ok(format!("{vm}: {bytes} bytes are always left to it"))
            }
            Command::Mode { vm, mode } => {
                self.settings(vm)?.mode = *mode;
                Ok(format!("{vm}: mode set"))
            }
            Command::Weight { vm, weight } => {
                if !(1..=10_000).contains(weight) {
                    let text = "a weight is between 1 and 10000; 100 is ordinary";
                    return Err(CommandError::Value(text.to_owned()));
                }
                self.settings(vm)?.weight = *weight;
                Ok(format!("{vm}: weight {weight}"))
            }
        }
    }

    fn set_target(
        &mut self,
        vm: &VmId,
        bytes: Option<u64>,
        override_floor: bool,
    ) -> Result<String, CommandError> {
        let sample = self.vm(vm).cloned();
        let (Some(sample), Some(bytes)) = (sample, bytes) else {
            let settings = self.settings(vm)?;
            settings.manual_target_bytes = bytes;
            settings.floor_override = override_floor && bytes.is_some();
            return Ok(format!("{vm}: no target by hand"));
        };
        let checked =
            policy::check_manual_target(&sample, &self.config.policy, bytes, override_floor)
                .map_err(|error| CommandError::Floor(error.to_string()))?;
        let settings = self.settings(vm)?;
        settings.manual_target_bytes = Some(checked);
        settings.floor_override = override_floor;
        Ok(match settings.mode {
            Mode::Manual | Mode::FloorOnly => format!("{vm}: target {checked}"),
            Mode::Auto | Mode::Fluid => format!(
                "{vm}: target {checked}; in this mode the policy goes its own way under pressure \
                 (`aerostatd set {vm} mode manual` to hold it)"
            ),
        })
    }

    fn settings(&mut self, vm: &VmId) -> Result<&mut super::fleet::Settings, CommandError> {
        match self.members.get_mut(vm) {
            Some(member) => Ok(&mut member.settings),
            None => Err(CommandError::UnknownVm { vm: vm.clone() }),
        }
    }
}
