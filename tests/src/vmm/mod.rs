//! The TestVmm: guests of this process whose balloon devices are served by `libaerostat.so`.
//!
//! It stands where a VMM stands: it maps guest memory, makes eventfds, negotiates, starts queues,
//! and calls the library only through the C ABI of the built shared object. Inside the guest runs
//! a driver that behaves as Linux's virtio_balloon does, over rings in guest memory.
//!
//! From the host inwards:
//! - [`library`]: the shared object and its symbols, checked against the Rust declarations;
//! - [`device`]: handles of it, with errors as values;
//! - [`mapping`], [`ram`]: guest memory, and how much of it the host has allocated;
//! - [`eventfd`]: kicks and interrupts;
//! - [`guest`]: a machine put together from these, step by step or booted at once;
//! - [`migration`]: a guest moves to another device;
//! - [`elements`]: the VMM's half of a virtqueue, for devices that are handed elements;
//! - [`vring`]: the driver's half of a ring, split or packed;
//! - [`settings`]: what the suites run with beyond what a test says;
//! - [`allocator`]: which pages the guest has in use;
//! - [`driver`]: the balloon driver, as Linux has it;
//! - [`hinting`]: its part that answers rounds of free page hints;
//! - [`follower`]: the driver's work queue, following the target on a thread of its own;
//! - [`faults`]: system calls of the library that fail;
//! - [`userfault`]: memory whose faults the VMM handles;
//! - [`working_set`]: pages whose contents are known and verified;
//! - [`memballoon`]: a machine with the other virtio balloon, device ID 13, and its driver;
//! - [`vmware`]: a machine whose guest speaks VMware's commands, as Linux's vmw_balloon does;
//! - [`hostile`]: a driver that writes anything anywhere;
//! - [`books`]: the device's counters, and whether they balance (I4);
//! - [`usage`]: what this process has of the host, to find what is not given back.

pub mod allocator;
pub mod books;
pub mod device;
pub mod driver;
pub mod elements;
mod error;
pub mod eventfd;
pub mod faults;
pub mod follower;
pub mod guest;
pub mod hinting;
pub mod hostile;
pub mod library;
pub mod mapping;
pub mod memballoon;
pub mod migration;
pub mod ram;
pub mod settings;
pub mod usage;
pub mod userfault;
pub mod vmware;
pub mod vring;
pub mod working_set;

pub use error::{Result, VmmError};
pub use guest::{Guest, GuestConfig, Numbering, Vmm};

/// The unit of a page frame number (S12).
pub const PAGE_BYTES: u64 = 4096;
/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;
