//! Test support: a VMM and its guests in this process, real guests, and the programs that show the
//! library at work on them.

pub mod artifacts;
pub mod backend;
pub mod cpio;
pub mod demo;
pub mod experiment;
pub mod guest;
pub mod host_vm;
pub mod qemu;
pub mod reclaimer;
pub mod vmm;
pub mod wait;
