//! What buffers mean: one folder a protocol, behind one contract ([`contract::Protocol`]).
//!
//! This file is the list of them. A new protocol is a folder and its lines here; the core stays as it is.

pub(crate) mod contract;
pub(crate) mod memballoon;
pub(crate) mod virtio_balloon;
pub(crate) mod vmware;

use crate::error::Result;
use contract::Protocol;
pub use virtio_balloon::HintState;
pub use vmware::VmwareAnswer;

/// Which protocol a device speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    /// The traditional memory balloon of the virtio standard, device ID 5.
    #[default]
    VirtioBalloon = 0,
    /// The memory balloon with device ID 13 (docs/memballoon.md).
    Memballoon = 1,
    /// The balloon commands of VMware's backdoor (docs/vmware-balloon.md): no virtio device.
    Vmware = 2,
}

impl DeviceKind {
    /// The kind with that number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::VirtioBalloon),
            1 => Some(Self::Memballoon),
            2 => Some(Self::Vmware),
            _ => None,
        }
    }

    /// Every feature bit that this version can offer.
    #[must_use]
    pub const fn supported_features(self) -> u64 {
        match self {
            Self::VirtioBalloon => virtio_balloon::Features::all().bits(),
            Self::Memballoon => memballoon::SUPPORTED,
            Self::Vmware => vmware::CAPABILITIES,
        }
    }

    /// What is offered if the configuration leaves the choice.
    #[must_use]
    pub const fn default_features(self) -> u64 {
        match self {
            Self::VirtioBalloon => virtio_balloon::Features::DEFAULT.bits(),
            Self::Memballoon => memballoon::DEFAULT,
            Self::Vmware => vmware::CAPABILITIES,
        }
    }

    /// How many queues it has.
    #[must_use]
    pub const fn queues(self) -> u16 {
        match self {
            Self::VirtioBalloon => virtio_balloon::QUEUES,
            Self::Memballoon => memballoon::QUEUES,
            Self::Vmware => 0,
        }
    }

    /// How long its configuration space is in bytes, if `features` are offered.
    #[must_use]
    pub const fn config_bytes(self, features: u64) -> usize {
        match self {
            Self::VirtioBalloon => virtio_balloon::config_bytes(features),
            Self::Memballoon | Self::Vmware => 0,
        }
    }

    /// The protocol of a new device that offers `features`.
    ///
    /// # Errors
    /// Refuses features that make no sense together.
    pub(crate) fn protocol(self, features: u64) -> Result<Box<dyn Protocol>> {
        Ok(match self {
            Self::VirtioBalloon => Box::new(virtio_balloon::VirtioBalloon::new(features)),
            Self::Memballoon => Box::new(memballoon::Memballoon::new(features)?),
            Self::Vmware => Box::new(vmware::Vmware::new(features)),
        })
    }

    /// What operators call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::VirtioBalloon => "virtio-balloon",
            Self::Memballoon => "memballoon",
            Self::Vmware => "vmware",
        }
    }
}
