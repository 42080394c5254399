//! The C ABI of Aerostat.
//!
//! `include/aerostat.h` is generated from this crate: the comments of the public items here *are*
//! the manual that C programmers read, so they speak of C types and of errno values. One file
//! holds one noun of that manual; the plumbing below them is:
//!
//! - `boundary`: runs a call, stops panics, turns errors into `-errno` and a message;
//! - `handle`: opaque pointers that C owns;
//! - `versioned`: structures that start with their own size and may grow;
//! - `fd`: file descriptors that C lends;
//!
//! Rust names equal the C names, so one search finds both sides. Rust tests may use this crate as a
//! library for its types; the symbols they should take from the built shared object.
#![allow(
    non_camel_case_types,
    reason = "Rust names equal the C names of the header"
)]
#![allow(
    clippy::missing_safety_doc,
    reason = "the header's preamble states what every pointer has to be, each function the rest"
)]

mod boundary;
mod fd;
mod handle;
mod versioned;

// The nouns, in the order in which the header tells of them.
mod version;

mod last_error;

mod log_sink;

mod runtime;

mod memory;

mod device;

mod features;

mod config_space;

mod queue;

mod element;

mod target;

mod node;

mod write_behind;

mod deflate;

mod stats;

mod range;

mod hints;

mod counters;

mod history;

mod cgroup;

mod saving;

mod vmware;

pub use cgroup::*;
pub use config_space::*;
pub use counters::*;
pub use deflate::*;
pub use device::*;
pub use element::*;
pub use features::*;
pub use hints::*;
pub use history::*;
pub use last_error::aerostat_last_error;
pub use log_sink::*;
pub use memory::*;
pub use node::*;
pub use queue::*;
pub use range::*;
pub use runtime::*;
pub use saving::*;
pub use stats::*;
pub use target::*;
pub use version::*;
pub use vmware::*;
pub use write_behind::*;
