//! Control groups, version 2: files in, types out; limits; pressure triggers.
//!
//! Everything goes through [`Cgroup`], a directory handle that was checked to be on cgroup v2, so
//! that no other file system is ever written by mistake; tests on made-up trees use the constructor
//! without that check. An attribute that this kernel or this cgroup does not have is `None`. Errors
//! carry the path and say what to do.
//!
//! What is created or limited is below a cgroup that was delegated to us ([`Delegated`]): its own
//! limits belong to whoever gave it.
//!
//! Source: the kernel's `Documentation/admin-guide/cgroup-v2.rst`, `Documentation/accounting/psi.rst`.

mod attributes;
#[cfg(feature = "daemon")]
mod delegated;
mod directory;
mod error;
mod parse;
mod pressure;

pub use attributes::{MemoryEvents, MemoryStat, NodeStat, Reclaimed, SwapEvents};
#[cfg(feature = "daemon")]
pub use delegated::Delegated;
pub use directory::Cgroup;
pub use error::CgroupError;
pub use parse::{parse_limit, parse_pressure};
pub use pressure::{HOST_PRESSURE, PressureTrigger};

#[cfg(test)]
mod tests;
