//! A real guest: an unmodified Linux kernel with its own balloon driver, in User-Mode Linux.
//!
//! The guest's memory is a file on a tmpfs that is mounted for this guest alone, so the blocks in
//! use on that tmpfs are what the guest costs its host, measured outside both guest and back-end.
//!
//! - [`prerequisites`]: what must be installed, and how to say that it is not;
//! - [`initramfs`]: the guest's file system, built here and kept under `target/`;
//! - [`launch`]: processes and mounts that end together with the guest;
//! - [`console`]: commands and answers over the guest's serial line;
//! - [`shell`]: the same, for tests;
//! - [`uml`]: the running guest;
//! - [`memory`], [`driver`]: what tests do inside it.

pub mod console;
pub mod driver;
pub mod initramfs;
pub mod launch;
pub mod memory;
pub mod prerequisites;
pub mod shell;
pub mod uml;

use std::{io, path::PathBuf, time::Duration};

pub use launch::UmlConfig;
pub use memory::{GuestMemory, WorkingSet};
pub use prerequisites::Prerequisites;
pub use shell::Shell;
pub use uml::{HostMemoryGauge, UmlGuest};

/// What can go wrong with a guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Something the guest needs is not there.
    #[error("a guest cannot be started: {missing}; {remedy}")]
    Prerequisite {
        /// What is missing.
        missing: String,
        /// What helps.
        remedy: &'static str,
    },
    /// A file or process operation of the harness failed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The guest did not come up.
    #[error("the guest did not boot within {} s; its console ends with:\n{console}", waited.as_secs())]
    Boot {
        /// How long the harness waited.
        waited: Duration,
        /// The end of the console log.
        console: String,
    },
    /// The guest's processes ended.
    #[error("the guest ended; its console ends with:\n{console}")]
    Ended {
        /// The end of the console log.
        console: String,
    },
    /// A command did not finish in time.
    #[error("no end of `{command}` in the guest within {} ms; its console ends with:\n{console}",
            waited.as_millis())]
    Timeout {
        /// The command.
        command: String,
        /// How long the harness waited.
        waited: Duration,
        /// The end of the console log.
        console: String,
    },
    /// A command failed in the guest.
    #[error("`{command}` ended with status {status} in the guest: {output}")]
    Command {
        /// The command.
        command: String,
        /// Its exit status.
        status: i32,
        /// What it wrote.
        output: String,
    },
    /// A condition did not come true in time.
    #[error("{what} did not come true within {} ms; last seen: {last}", waited.as_millis())]
    Condition {
        /// What was awaited.
        what: String,
        /// How long the harness waited.
        waited: Duration,
        /// What was seen last.
        last: String,
    },
    /// The guest's answer cannot be understood.
    #[error("unexpected answer of the guest to `{command}`: {output}")]
    Answer {
        /// The command.
        command: String,
        /// What came back.
        output: String,
    },
    /// The back-end's control socket failed.
    #[error("control of the back-end failed")]
    Control(#[from] aerostat_reclaim::vm::VmError),
}

impl GuestError {
    /// Makes an adapter for `map_err` that adds the action and the file to an I/O error.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
