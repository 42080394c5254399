//! A virtual machine in QEMU, with a stock Debian kernel and a balloon device in QEMU itself.
//!
//! QEMU is the one that `scripts/build-qemu` makes: Debian's, with the devices of `ffi/examples/qemu`
//! linked to this library beside its own. So the same program, the same guest and the same driver run
//! with either device.
//!
//! - [`config`]: what the machine is like; QEMU's command line;
//! - [`balloon`]: what tests expect of its balloon;
//! - [`monitor`][]: QMP;
//! - [`machine`]: the running machine, its guest's shell, and what it costs the host.

pub mod balloon;
pub mod config;
mod initramfs;
pub mod machine;
pub mod monitor;

pub use config::{Backing, Balloon, MachineConfig};
pub use machine::{Machine, MachinePrerequisites};
pub use monitor::Monitor;
