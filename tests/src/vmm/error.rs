//! What can go wrong between a VMM, its guest and the library.

use std::io;
use std::path::PathBuf;

/// The result of a fallible step.
pub type Result<T, E = VmmError> = std::result::Result<T, E>;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The shared object has not been built, or is elsewhere.
    #[error(
        "no libaerostat.so in {looked_in:?}: run `cargo build -p aerostat-ffi`, or name its \
         directory in AEROSTAT_LIB_DIR"
    )]
    NoLibrary {
        /// The directories that were searched.
        looked_in: Vec<PathBuf>,
    },
    /// The shared object cannot be used.
    #[error("{} cannot be used: {reason}", path.display())]
    BadLibrary {
        /// The file.
        path: PathBuf,
        /// What the loader says.
        reason: String,
    },
    /// A call of the library was refused.
    #[error("{call}: {message} (errno {errno})")]
    Call {
        /// The C function.
        call: &'static str,
        /// The positive errno value.
        errno: i32,
        /// What aerostat_last_error() said.
        message: String,
    },
    /// The operating system refused something.
    #[error("{what}")]
    Os {
        /// What was attempted.
        what: &'static str,
        /// What it answered.
        #[source]
        source: io::Error,
    },
    /// Something did not happen in time.
    #[error("{what}: nothing within {millis} ms")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        millis: u64,
    },
    /// The guest has no memory left, or asks for what it has not got.
    #[error("the guest has no memory for {0}")]
    NoMemory(&'static str),
    /// The machine has no such part: a queue that was not set up, for instance.
    #[error("the guest has no {0}")]
    Absent(&'static str),
}

impl VmmError {
    /// Wraps the calling thread's last operating system error.
    pub(crate) fn last_os(what: &'static str) -> Self {
        Self::Os {
            what,
            source: io::Error::last_os_error(),
        }
    }

    /// The errno of a refused call; `None` for other errors.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Call { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}
