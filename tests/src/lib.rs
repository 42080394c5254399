//! Test support: real guests, a VMM and guests in this process, and the programs that show the
//! library at work on them.

pub mod artifacts;
pub mod backend;
pub mod demo;
pub mod guest;
pub mod vmm;
