//! What can be wrong with a call, each with the one errno that the C side returns for it.
//!
//! Guest input never becomes an [`Error`]: it is acknowledged and counted (invariant I3). These
//! errors are for the VMM, whose arguments are checked and answered.

use std::io;

/// The result of a fallible call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused or failed. The text says what to change.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value is outside its domain (`EINVAL`).
    #[error("{what} is {value}, expected {expected}")]
    Invalid {
        /// The parameter.
        what: &'static str,
        /// What was passed.
        value: u64,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// Flag bits that this version does not know (`EINVAL`).
    #[error("{what} has unknown flags {unknown:#x}; pass only flags that the header names")]
    UnknownFlags {
        /// The parameter.
        what: &'static str,
        /// The bits that are not known.
        unknown: u64,
    },
    /// Features that were not offered, or that contradict each other (`ENOTSUP`).
    #[error("features {unsupported:#x} are not offered (offered: {offered:#x})")]
    Features {
        /// Selected but not offered.
        unsupported: u64,
        /// What the device offers.
        offered: u64,
    },
    /// The feature that the call needs is not negotiated or not compiled in (`ENOTSUP`).
    #[error("{0} is not available on this device")]
    NotSupported(&'static str),
    /// Two memory regions overlap in guest address space (`EEXIST`).
    #[error("memory regions at guest addresses {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Start of the lower region.
        first: u64,
        /// Start of the upper region.
        second: u64,
    },
    /// An address or length is not aligned as it has to be (`EADDRNOTAVAIL`).
    #[error("{what} {value:#x} is not a multiple of {align:#x}")]
    Unaligned {
        /// The parameter.
        what: &'static str,
        /// What was passed.
        value: u64,
        /// The alignment it needs.
        align: u64,
    },
    /// An address is not inside guest memory, or a sum of addresses overflows (`ERANGE`).
    #[error("{what} at {address:#x} (+{len:#x}) is not inside one guest memory region")]
    OutOfRange {
        /// The parameter.
        what: &'static str,
        /// The first address.
        address: u64,
        /// The length in bytes.
        len: u64,
    },
    /// What the device has to write to lies in a read-only region (`EROFS`).
    #[error("{what} at {address:#x} is in a read-only memory region")]
    ReadOnly {
        /// The parameter.
        what: &'static str,
        /// Its address.
        address: u64,
    },
    /// A file descriptor is closed or of the wrong kind (`EBADF`).
    #[error("{what}: file descriptor {fd} is not {expected}")]
    BadFd {
        /// The parameter.
        what: &'static str,
        /// The descriptor's number.
        fd: i32,
        /// What it should be.
        expected: &'static str,
    },
    /// The device or queue is started already (`EALREADY`).
    #[error("{0} is started already; stop or reset it first")]
    AlreadyStarted(&'static str),
    /// The call needs a device that is set up further (`ENOTCONN`).
    #[error("{0} first")]
    NotReady(&'static str),
    /// The device is paused (`EBUSY`).
    #[error("the device is paused; resume it first")]
    Paused,
    /// A counterpart call is missing: resume without inhibit, for instance (`EPROTO`).
    #[error("{0} without the call that it ends")]
    Unbalanced(&'static str),
    /// There is no such queue (`ENOENT`).
    #[error("queue {index} does not exist or is not started")]
    NoQueue {
        /// The queue's index.
        index: u32,
    },
    /// There is no such host node (`ENXIO`).
    #[error("host node {node} does not exist (this host has {count})")]
    NoNode {
        /// The node's number.
        node: u32,
        /// How many there are.
        count: u32,
    },
    /// The guest did not answer in time (`ETIMEDOUT`).
    #[error("the guest did not answer within {timeout_ms} ms")]
    TimedOut {
        /// How long the call waited.
        timeout_ms: u64,
    },
    /// The submission queue is full (`EAGAIN`).
    #[error("{0} elements are waiting already; collect completions first")]
    Full(usize),
    /// Bytes that are no saved state, or a damaged one (`EBADMSG`).
    #[error("not a saved state that can be used: {what} (byte {offset})")]
    SavedState {
        /// What is wrong with it.
        what: &'static str,
        /// Where that is.
        offset: usize,
    },
    /// A saved state in a version of the format that is not known (`EPROTONOSUPPORT`).
    #[error("the saved state has version {found}; this library reads versions up to {known}")]
    SavedVersion {
        /// The state's version.
        found: u32,
        /// The newest that this library reads and writes.
        known: u32,
    },
    /// The operating system refused something (its own errno).
    #[error("{what}")]
    Os {
        /// What was attempted.
        what: &'static str,
        /// What it answered.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// The positive errno that stands for this error at the C boundary.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Invalid { .. } | Self::UnknownFlags { .. } => libc::EINVAL,
            Self::Features { .. } | Self::NotSupported(_) => libc::ENOTSUP,
            Self::Overlap { .. } => libc::EEXIST,
            Self::Unaligned { .. } => libc::EADDRNOTAVAIL,
            Self::OutOfRange { .. } => libc::ERANGE,
            Self::ReadOnly { .. } => libc::EROFS,
            Self::BadFd { .. } => libc::EBADF,
            Self::AlreadyStarted(_) => libc::EALREADY,
            Self::NotReady(_) => libc::ENOTCONN,
            Self::Paused => libc::EBUSY,
            Self::Unbalanced(_) => libc::EPROTO,
            Self::NoQueue { .. } => libc::ENOENT,
            Self::NoNode { .. } => libc::ENXIO,
            Self::TimedOut { .. } => libc::ETIMEDOUT,
            Self::Full(_) => libc::EAGAIN,
            Self::SavedState { .. } => libc::EBADMSG,
            Self::SavedVersion { .. } => libc::EPROTONOSUPPORT,
            Self::Os { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    /// Wraps the calling thread's last operating system error.
    pub(crate) fn last_os(what: &'static str) -> Self {
        Self::Os {
            what,
            source: io::Error::last_os_error(),
        }
    }
}
