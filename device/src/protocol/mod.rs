//! What buffers mean: one folder a protocol, behind one contract ([`contract::Protocol`]).
//!
//! This file is the list of them. A new protocol is a folder and its lines here; the core stays as it is.

pub(crate) mod contract;
pub(crate) mod virtio_balloon;

use contract::Protocol;
pub use virtio_balloon::HintState;

/// Which protocol a device speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    /// The traditional memory balloon of the virtio standard, device ID 5.
    #[default]
    VirtioBalloon = 0,
}

impl DeviceKind {
    /// The kind with that number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::VirtioBalloon),
            _ => None,
        }
    }

    /// Every feature bit that this version can offer.
    #[must_use]
    pub const fn supported_features(self) -> u64 {
        match self {
            Self::VirtioBalloon => virtio_balloon::Features::all().bits(),
        }
    }

    /// What is offered if the configuration leaves the choice.
    #[must_use]
    pub const fn default_features(self) -> u64 {
        match self {
            Self::VirtioBalloon => virtio_balloon::Features::DEFAULT.bits(),
        }
    }

    /// How many queues it has.
    #[must_use]
    pub const fn queues(self) -> u16 {
        match self {
            Self::VirtioBalloon => virtio_balloon::QUEUES,
        }
    }

    /// How long its configuration space is in bytes, if `features` are offered.
    #[must_use]
    pub const fn config_bytes(self, features: u64) -> usize {
        match self {
            Self::VirtioBalloon => virtio_balloon::config_bytes(features),
        }
    }

    /// The protocol of a new device that offers `features`.
    pub(crate) fn protocol(self, features: u64) -> Box<dyn Protocol> {
        match self {
            Self::VirtioBalloon => Box::new(virtio_balloon::VirtioBalloon::new(features)),
        }
    }
}
