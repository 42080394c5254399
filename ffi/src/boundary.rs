//! What every call from C has in common: it is answered by a number and a message, and no panic
//! leaves it.

use crate::last_error;
use std::any::Any;
use std::error::Error;
use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Why a call was refused, as seen from the boundary. What the device has to say is inside.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// A cgroup cannot be used; the errno says why.
    #[error("{message}")]
    Cgroup { errno: c_int, message: String },
    /// A pointer is NULL that must not be (`EFAULT`).
    #[error("{0} is NULL")]
    Null(&'static str),
    /// A structure is shorter than it was in the first release (`EMSGSIZE`).
    #[error("{name}.size is {size}, expected at least {least}; set it to sizeof(struct {name})")]
    TooShort {
        name: &'static str,
        size: u32,
        least: usize,
    },
    /// A structure carries more than this version understands (`E2BIG`).
    #[error("{name} has non-zero bytes behind byte {known}, which this version does not know")]
    TooLong { name: &'static str, known: usize },
    /// A structure claims to be longer than any will ever be (`E2BIG`).
    #[error("{name}.size is {size}; set it to sizeof(struct {name})")]
    Oversize { name: &'static str, size: u32 },
    /// A region ends behind its file (`ERANGE`).
    #[error(
        "a memory region ends behind its file: offset {offset:#x}, length {len:#x}, file {file:#x}"
    )]
    BehindFile { offset: u64, len: u64, file: u64 },
    /// A node's number is negative and not -1 (`EINVAL`).
    #[error("node is {0}, expected -1 or the number of a host node")]
    NegativeNode(i32),
    /// An earlier call on this handle panicked (`ENOTRECOVERABLE`).
    #[error("an earlier call on this device hit a bug in the library; destroy the device")]
    Poisoned,
    /// A buffer is too short for what is to go into it (`ENOBUFS`).
    #[error("the buffer has {len} bytes, {needed} are needed")]
    NoRoom { len: usize, needed: usize },
    /// A log callback called what would wait for itself (`EDEADLK`).
    #[error("{0} must not be called from a log callback")]
    InsideCallback(&'static str),
    /// The device library refused.
    #[error(transparent)]
    Device(#[from] ::aerostat_device::Error),
}

/// The result of a call, before it becomes a number.
pub(crate) type Outcome<T = ()> = Result<T, Refusal>;

impl Refusal {
    /// A value outside its domain (`EINVAL`).
    pub(crate) fn invalid(what: &'static str, value: u64, expected: &'static str) -> Self {
        Self::Device(::aerostat_device::Error::Invalid {
            what,
            value,
            expected,
        })
    }

    fn errno(&self) -> c_int {
        match self {
            Self::Cgroup { errno, .. } => *errno,
            Self::Null(_) => libc::EFAULT,
            Self::TooShort { .. } => libc::EMSGSIZE,
            Self::TooLong { .. } | Self::Oversize { .. } => libc::E2BIG,
            Self::BehindFile { .. } => libc::ERANGE,
            Self::NegativeNode(_) => libc::EINVAL,
            Self::NoRoom { .. } => libc::ENOBUFS,
            Self::Poisoned => libc::ENOTRECOVERABLE,
            Self::InsideCallback(_) => libc::EDEADLK,
            Self::Device(error) => error.errno(),
        }
    }

    /// The refusal and everything that led to it, as one line.
    fn message(&self) -> String {
        let mut message = self.to_string();
        let mut source = self.source();
        while let Some(error) = source {
            message.push_str(": ");
            message.push_str(&error.to_string());
            source = error.source();
        }
        message
    }
}

/// Refuses flags outside `known`.
pub(crate) fn check_flags(what: &'static str, flags: u32, known: u32) -> Outcome {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Refusal::Device(::aerostat_device::Error::UnknownFlags {
            what,
            unknown: unknown.into(),
        })),
    }
}

/// Refuses padding that is in use: a later version may give it a meaning.
pub(crate) fn check_reserved(what: &'static str, value: u64) -> Outcome {
    match value {
        0 => Ok(()),
        _ => Err(Refusal::invalid(what, value, "0")),
    }
}

/// Runs the body of a C function: returns its value (never negative), or `-errno` with a message.
pub(crate) fn call(body: impl FnOnce() -> Outcome<c_int>) -> c_int {
    // What a panic may leave half done is behind a handle, and that handle refuses all later calls
    // (`Refusal::Poisoned`), so no broken state is observed.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => value,
        Ok(Err(refusal)) => {
            last_error::set(refusal.message());
            -refusal.errno()
        }
        Err(payload) => {
            last_error::set(format!(
                "a bug in the library: {}",
                panic_text(payload.as_ref())
            ));
            // Dropping a panic's payload may panic as well; it is leaked once in a lifetime.
            std::mem::forget(payload);
            -libc::ENOTRECOVERABLE
        }
    }
}

/// As [`call`], for functions that have no value to return.
pub(crate) fn call_unit(body: impl FnOnce() -> Outcome) -> c_int {
    call(|| body().map(|()| 0))
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    if let Some(text) = payload.downcast_ref::<&str>() {
        text
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text
    } else {
        "a panic without a message"
    }
}

#[cfg(test)]
#[allow(unsafe_code, reason = "reads the message as C does")]
mod tests {
    use super::*;
    use crate::aerostat_last_error;
    use std::ffi::CStr;

    fn message() -> String {
        // SAFETY: the pointer is a C string that lives until this thread's next call.
        let message = unsafe { CStr::from_ptr(aerostat_last_error()) };
        message.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_stops_at_the_boundary() {
        assert_eq!(call(|| panic!("of {}", 7)), -libc::ENOTRECOVERABLE);
        assert_eq!(message(), "a bug in the library: of 7");
    }

    #[test]
    fn a_payload_that_panics_when_dropped_stops_at_the_boundary_too() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("second");
            }
        }
        let value = call(|| std::panic::panic_any(Bomb));
        assert_eq!(value, -libc::ENOTRECOVERABLE);
    }

    #[test]
    fn a_message_tells_the_cause_once() {
        let value = call_unit(|| {
            Err(Refusal::Device(::aerostat_device::Error::Os {
                what: "cannot start a thread",
                source: std::io::Error::from_raw_os_error(libc::EAGAIN),
            }))
        });
        assert_eq!(value, -libc::EAGAIN);
        let message = message();
        assert!(message.starts_with("cannot start a thread: "), "{message}");
        assert_eq!(message.matches("os error").count(), 1, "{message}");
    }

    #[test]
    fn success_leaves_the_message_alone() {
        last_error::set("old".into());
        assert_eq!(call(|| Ok(3)), 3);
        assert_eq!(message(), "old");
    }
}
