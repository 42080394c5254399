//! Host side of Aerostat: how virtual machines are reached, observed and asked for memory.
//!
//! Nothing in this crate knows virtio. A virtual machine is something that can be told a balloon
//! target and that reports how far it has come; [`vm`] holds the ways to reach one, [`policy`] what
//! decides about it.

pub mod policy;
pub mod results;
pub mod simulate;
pub mod vm;
