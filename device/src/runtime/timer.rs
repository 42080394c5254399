//! A device's alarm clock (timerfd_create(2)): its expiry reaches the workers as a kick does.
#![allow(unsafe_code, reason = "a timerfd is set through its descriptor")]

use crate::error::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// A timer that a pool can listen on.
#[derive(Debug)]
pub(crate) struct Timer(OwnedFd);

impl Timer {
    /// A timer that is not armed.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: timerfd_create takes two integers.
        let fd = unsafe {
            libc::timerfd_create(
                libc::CLOCK_MONOTONIC,
                libc::TFD_CLOEXEC | libc::TFD_NONBLOCK,
            )
        };
        if fd < 0 {
            return Err(Error::last_os("cannot create a timer"));
        }
        // SAFETY: the kernel just returned this descriptor to us, and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Another descriptor of the same timer, to listen on.
    pub(crate) fn descriptor(&self) -> Result<OwnedFd> {
        self.0.try_clone().map_err(|source| Error::Os {
            what: "cannot duplicate a timer",
            source,
        })
    }

    /// Expires once at `deadline`, or never; an earlier setting is forgotten.
    pub(crate) fn arm(&self, deadline: Option<Instant>) {
        let left = deadline.map(|at| {
            // A zero would disarm it.
            at.saturating_duration_since(Instant::now())
                .max(Duration::from_nanos(1))
        });
        let left = left.unwrap_or_default();
        let zero = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let it_value = libc::timespec {
            tv_sec: libc::time_t::try_from(left.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(left.subsec_nanos().cast_signed()),
        };
        let setting = libc::itimerspec {
            it_interval: zero,
            it_value,
        };
        // SAFETY: the descriptor is a timerfd, and the setting lives across the call.
        unsafe {
            libc::timerfd_settime(
                self.0.as_raw_fd(),
                0,
                &raw const setting,
                std::ptr::null_mut(),
            )
        };
    }
}

/// The time of `CLOCK_MONOTONIC` in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is a live local variable that the call may write.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let part = |value| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}
