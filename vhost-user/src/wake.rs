//! Eventfds as wake-up calls between threads, and waiting for several descriptors at once.

use rustix::event::{EventfdFlags, PollFd, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// A level that one side raises and the other waits for.
#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// A second handle to the same level.
    pub(crate) fn handle(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Makes it readable until [`Self::take`].
    pub(crate) fn raise(&self) {
        signal(self.0.as_fd());
    }

    /// Takes the level back; says whether it was raised.
    pub(crate) fn take(&self) -> bool {
        let mut count = [0; 8];
        rustix::io::read(&self.0, &mut count).is_ok()
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Adds one to an eventfd (or sends the same eight bytes over what a front-end uses in its place).
pub(crate) fn signal(fd: BorrowedFd<'_>) {
    // It cannot be done better if it fails: either the level is up already, or nobody listens.
    let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
}

/// Waits until one of `fds` is ready or `timeout` is over. Interrupted calls count as ready.
pub(crate) fn wait(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether poll found anything about `fd`: data, room, or its end.
pub(crate) fn is_ready(fd: &PollFd<'_>) -> bool {
    !fd.revents().is_empty()
}
