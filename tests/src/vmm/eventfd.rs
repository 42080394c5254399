//! Eventfds, as a VMM uses them for kicks, interrupts and completions (eventfd(2)).
#![allow(unsafe_code, reason = "an eventfd is used through its descriptor")]

use super::error::{Result, VmmError};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// A non-blocking eventfd.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new one, not signalled.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new() -> Result<Self> {
        // SAFETY: eventfd takes two integers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(VmmError::last_os("cannot make an eventfd"));
        }
        // SAFETY: the kernel just returned this descriptor to us, and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Its number, for the library.
    #[must_use]
    pub fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Adds one to the counter.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes from a live array to an open descriptor. A full counter is
        // signalled already.
        unsafe { libc::write(self.raw(), one.as_ptr().cast(), one.len()) };
    }

    /// Fills the counter up: nothing more can be added until it is taken.
    pub fn fill(&self) {
        self.take();
        let most = (u64::MAX - 1).to_ne_bytes();
        // SAFETY: writes 8 bytes from a live array to an open descriptor.
        unsafe { libc::write(self.raw(), most.as_ptr().cast(), most.len()) };
    }

    /// Takes the counter: how often it was signalled since it was last taken.
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        // SAFETY: reads 8 bytes into a live array.
        let bytes = unsafe { libc::read(self.raw(), count.as_mut_ptr().cast(), count.len()) };
        if bytes == 8 {
            u64::from_ne_bytes(count)
        } else {
            0
        }
    }

    /// Waits until it is signalled, and takes the counter; false if that did not come in time.
    pub fn wait(&self, timeout: Duration) -> bool {
        wait_any(&[self], timeout).is_some() && self.take() > 0
    }
}

/// Waits until one of `events` is signalled; returns its position. The counter stays.
pub fn wait_any(events: &[&EventFd], timeout: Duration) -> Option<usize> {
    let deadline = Instant::now() + timeout;
    let mut polled: Vec<libc::pollfd> = events
        .iter()
        .map(|event| libc::pollfd {
            fd: event.raw(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        let count = libc::nfds_t::try_from(polled.len()).unwrap_or(0);
        // SAFETY: the array has `count` entries and lives across the call.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), count, millis) };
        if ready > 0 {
            return polled.iter().position(|entry| entry.revents != 0);
        }
        // A poll that was interrupted goes on; rounding down must not end it early.
        if left.is_zero() {
            return None;
        }
    }
}
