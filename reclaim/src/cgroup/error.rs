//! What can go wrong with a cgroup, with the path and with what to do about it.

use std::{
    io,
    path::{Path, PathBuf},
};

/// An error about a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The directory is not on a cgroup v2 mount.
    #[error("{path} is not on a cgroup v2 file system; {advice}")]
    NotV2 {
        /// The directory.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
    },
    /// The cgroup was removed, or never existed.
    #[error("{path}: there is no such cgroup (any more); it is left out until it comes back")]
    Gone {
        /// The cgroup.
        path: PathBuf,
    },
    /// The memory controller is not enabled for the cgroup.
    #[error(
        "{path}: the memory controller is not enabled here; write \"+memory\" to \
         cgroup.subtree_control of each cgroup above it (systemd: Delegate=memory, MemoryAccounting=yes)"
    )]
    NoMemoryController {
        /// The cgroup.
        path: PathBuf,
    },
    /// The cgroup is not below the one that was delegated.
    #[error(
        "{path} is not below the delegated cgroup {root}: its limits belong to someone else; move the \
         VM into a sub-cgroup of {root}, or set host.cgroup-root to a cgroup above it"
    )]
    NotDelegated {
        /// The cgroup.
        path: PathBuf,
        /// What was delegated.
        root: PathBuf,
    },
    /// A file was read or written without success.
    #[error("{path}: {action} failed: {source}; {advice}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// A file holds what this version cannot read.
    #[error("{path}: cannot make sense of {text:?}; please report it with the kernel's version")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Its text, shortened.
        text: String,
    },
}

impl CgroupError {
    /// Whether the cgroup is not there (any more).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }

    pub(super) fn io(path: PathBuf, action: &'static str, source: io::Error) -> Self {
        let advice = advice(action, &source);
        Self::Io {
            path,
            action,
            source,
            advice,
        }
    }

    pub(super) fn malformed(path: &Path, text: &str) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            text: text.chars().take(120).collect(),
        }
    }
}

fn advice(action: &str, source: &io::Error) -> &'static str {
    use rustix::io::Errno;
    let errno = source.raw_os_error().map(Errno::from_raw_os_error);
    match (action, errno) {
        ("trigger", Some(Errno::INVAL)) => {
            "without CAP_SYS_RESOURCE the window must be a multiple of 2 s; it is 500 ms to 10 s for all"
        }
        ("trigger", Some(Errno::NOENT | Errno::OPNOTSUPP)) => {
            "this kernel has no pressure stall information; boot with psi=1"
        }
        (_, Some(Errno::ACCESS | Errno::PERM)) => {
            "run as the user the cgroup was delegated to (systemd: Delegate=yes), or as root"
        }
        (_, Some(Errno::ROFS)) => {
            "the mount is read-only; in a container mount the host's /sys/fs/cgroup writable"
        }
        (_, Some(Errno::BUSY)) => {
            "processes in the cgroup itself block this; move them into a sub-cgroup of their own"
        }
        (_, Some(Errno::MFILE | Errno::NFILE)) => "raise the limit of open files (LimitNOFILE=)",
        (_, Some(Errno::NOSPC | Errno::NOMEM)) => {
            "the host is short of kernel memory; it is tried again"
        }
        _ => "it is tried again at the next step",
    }
}
