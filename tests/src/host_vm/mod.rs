//! A host of our own: QEMU boots Debian's kernel with cgroup v2, PSI, swap, huge pages and as many NUMA
//! nodes as a test needs, whatever the machine below has.
//!
//! ```text
//! test program ──QEMU──▶ Debian's kernel + an initramfs: busybox, the same test program, what it needs
//!      ▲                        │
//!      └── first serial line ◀──┘  commands, their output as it comes, their exit status
//! ```
//!
//! A test file holds its tests in a module, ignored, since they want a host that is set up for them, and
//! one test that boots the host and runs that module in it:
//!
//! ```no_run
//! use aerostat_tests::host_vm::{HostVmConfig, run_tests};
//!
//! #[test]
//! fn huge_pages_in_a_host_vm() {
//!     run_tests(&HostVmConfig::new().hugepages_2m(64).carry_library(), &["inside::"]);
//! }
//!
//! mod inside {
//!     #[test]
//!     #[ignore = "needs huge pages of its own: runs in the host VM"]
//!     fn a_frame_is_freed() {}
//! }
//! ```
//!
//! On a host that has what they need, `cargo test --test NAME -- --ignored` runs them directly.
//!
//! - [`prerequisites`]: what must be installed;
//! - [`config`]: what the host is to be like; QEMU's command line;
//! - `accelerator`: KVM where a kernel boots with it, else emulation;
//! - `files`: programs and their shared libraries as an initramfs, at the paths they have outside;
//! - [`vm`]: the running host.

pub(crate) mod accelerator;
pub mod config;
mod files;
pub mod prerequisites;
pub mod vm;

pub use config::HostVmConfig;
pub use prerequisites::HostVmPrerequisites;
pub use vm::{HostVm, run_tests};
