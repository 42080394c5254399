//! The balloon device: guest memory goes in at one end, freed host memory comes out at the other.
//!
//! The modules stand in the order in which a page passes them: [`memory`] (where the guest's pages
//! are), `ring` (how the guest hands them over), `protocol` (what it meant), [`pages`] (which of
//! them, as ranges), `balloon` (who owns them) and [`discard`] (how the host gets them). The
//! [`runtime`] brings the threads, [`device`] the life cycle, [`metrics`] the books.
//!
//! There is no control group and no policy in this crate; that is `aerostat-reclaim`.

pub mod device;
pub mod error;
pub mod memory;
pub mod metrics;
pub mod runtime;

pub use device::{
    Completion, Device, DeviceConfig, DeviceState, Element, IoVec, QueueConfig, QueuePosition,
    RingConfig,
};
pub use error::{Error, Result};
pub use memory::{GuestMemory, Region};
pub use metrics::{Counters, Flow, GuestStats};
pub use runtime::{Runtime, RuntimeConfig};
