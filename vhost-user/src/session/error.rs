//! Why sessions end, and why requests are refused.

use crate::channel::ChannelError;
use crate::mapping::MapError;
use crate::message::Malformed;
use crate::ring::RingError;
use std::io;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("request {code} failed and the front-end asked for no acknowledgement")]
    Unanswerable {
        code: u32,
        #[source]
        source: Refusal,
    },
    #[error("the device cannot be made")]
    Device(#[from] aerostat_device::Error),
    #[error("the front-end took guest memory away; its file was made shorter, or is out of space")]
    MemoryLost,
    #[error("waiting failed")]
    Wait(#[from] io::Error),
}

/// Why a request was refused. The session goes on if the front-end can be told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the request is not known")]
    Unknown,
    #[error("malformed message")]
    Malformed(#[from] Malformed),
    #[error("ring {0}: there is no such ring")]
    NoRing(u32),
    #[error("ring {index}")]
    Ring {
        index: u32,
        #[source]
        source: RingError,
    },
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("value {0:#x} makes no sense here")]
    Value(u64),
    #[error("memory table")]
    Memory(#[from] MapError),
    #[error("there is no such memory region")]
    NoRegion,
    #[error("more than {0} memory regions")]
    TooManyRegions(usize),
    #[error("back-end channel")]
    BackendChannel(#[source] io::Error),
    #[error(transparent)]
    Device(#[from] aerostat_device::Error),
}
