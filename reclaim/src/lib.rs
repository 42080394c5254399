//! Host side of Aerostat: how virtual machines are reached, observed and asked for memory.
//!
//! Nothing in this crate knows virtio. A virtual machine is something that can be told a balloon
//! target and that reports how far it has come; [`vm`] holds the ways to reach one, [`policy`] what
//! decides about it, [`cgroup`] what it occupies and may occupy, [`ledger`] the books of that. With
//! the feature `daemon`, `engine` joins them and `aerostatd` runs it.

pub mod cgroup;
#[cfg(feature = "daemon")]
pub mod config;
#[cfg(feature = "daemon")]
pub mod daemon;
#[cfg(feature = "daemon")]
pub mod engine;
#[cfg(feature = "daemon")]
pub mod host;
pub mod ledger;
pub mod policy;
#[cfg(feature = "daemon")]
pub mod results;
#[cfg(feature = "daemon")]
pub mod simulate;
pub mod vm;
