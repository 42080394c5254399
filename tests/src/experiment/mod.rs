//! The experiment of May 2013 (A10) on a small scale, with real guests: several User-Mode Linux guests
//! with stock balloon drivers, each in a cgroup of its own, on a host VM with cgroup v2, swap and PSI
//! that cannot hold them all. They do what a build does to memory, under one rule after the other.
//!
//! ```text
//! aerostat-experiment ─▶ host VM ─▶ aerostat-experiment inside ─▶ guests, aerostat-vhost-user, aerostatd
//!                                              │ one line of JSON for each run
//!  table, plots ◀── target/experiment/runs.jsonl ◀┘
//! ```
//!
//! The rules are run by `aerostatd` itself; only its `policy.name` differs. Without a rule it does not
//! run. Within one host VM the rules take turns in a shuffled order, and the host is brought back to
//! the same state before each: caches dropped, swap emptied, guests' memory untouched.
//!
//! - [`plan`]: sizes, rules, rounds;
//! - [`load`]: what a guest does;
//! - [`machine`]: the host VM from inside: cgroups, `/proc`, swap;
//! - [`inside`]: one round in the host VM;
//! - [`outside`]: boots host VMs, gathers results.

pub mod inside;
pub mod load;
pub mod machine;
pub mod outside;
pub mod plan;

use std::{io, path::PathBuf};

use aerostat_reclaim::{results::ResultsError, vm::VmError};

use crate::{backend::BackendError, guest::GuestError};

/// What can go wrong with the experiment.
#[derive(Debug, thiserror::Error)]
pub enum ExperimentError {
    /// A guest or the host VM.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The vhost-user back-end.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A device does not answer.
    #[error(transparent)]
    Control(#[from] VmError),
    /// The results cannot be written.
    #[error(transparent)]
    Results(#[from] ResultsError),
    /// A file or a program.
    #[error("{action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Something did not go as planned.
    #[error("{0}")]
    Unexpected(String),
}

pub(crate) fn failed(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> ExperimentError {
    let path = path.into();
    move |source| ExperimentError::Io {
        action,
        path,
        source,
    }
}
