//! The balloon device: guest memory goes in at one end, freed host memory comes out at the other.
//!
//! The modules stand in the order in which a page passes them: [`memory`] (where the guest's pages
//! are), `ring` (how the guest hands them over), `protocol` (what it meant), [`pages`] (which of
//! them, as ranges), `balloon` (who owns them) and [`discard`] (how the host gets them). The
//! [`runtime`] brings the threads, [`device`] the life cycle, [`metrics`] the books.
//!
//! There is no control group and no policy in this crate; that is `aerostat-reclaim`.

#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::type_complexity,
        reason = "test values are small, and test tables spell their types out"
    )
)]

pub mod accounting;
mod balloon;
pub mod device;
pub mod discard;
pub mod error;
mod event;
pub mod history;
pub mod memory;
pub mod metrics;
pub mod pages;
mod protocol;
mod ring;
pub mod runtime;
mod saved_state;
mod saving;
mod service;
mod sync;
mod target;
pub mod trace;

pub use accounting::Accountant;
pub use device::{
    Device, DeviceConfig, DeviceState, NodeBalloon, QueueConfig, QueuePosition, RingConfig,
};
pub use discard::{DeflateOptions, WriteBehind};
pub use error::{Error, Result};
pub use event::{EventFd, Sharer};
pub use history::{History, HistoryEntry, HistoryEvent};
pub use memory::{Gpa, GuestMemory, GuestNode, IoVec, NodeId, Region};
pub use metrics::{Counters, Flow, GuestStats};
pub use protocol::{DeviceKind, HintState, VmwareAnswer};
#[cfg(feature = "bench")]
#[doc(hidden)]
pub use ring::bench::BenchRing;
pub use ring::source::{Completion, Element};
pub use runtime::{Runtime, RuntimeConfig};
pub use target::MAX_TARGET_NODES;
