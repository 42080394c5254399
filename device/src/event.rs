//! Eventfds: how kicks arrive and how the library signals (eventfd(2)).
#![allow(unsafe_code, reason = "an eventfd is written through its descriptor")]

use crate::error::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// An eventfd that this library signals.
#[derive(Debug)]
pub(crate) struct EventFd(OwnedFd);

impl EventFd {
    /// Takes over `fd`, which has to be an eventfd or a pipe (User-Mode Linux takes interrupts from
    /// pipes), and makes it non-blocking: what nobody reads must not stop a worker.
    pub(crate) fn new(what: &'static str, fd: OwnedFd) -> Result<Self> {
        if !is_eventfd(&fd) && !is_pipe(&fd) {
            let expected = "an eventfd or the writing end of a pipe";
            return Err(Error::BadFd {
                what,
                fd: fd.as_raw_fd(),
                expected,
            });
        }
        set_nonblocking(&fd)?;
        Ok(Self(fd))
    }

    /// An eventfd of our own.
    pub(crate) fn create() -> Result<Self> {
        use std::os::fd::FromRawFd;
        // SAFETY: eventfd takes two integers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(Error::last_os("cannot create an eventfd"));
        }
        // SAFETY: the kernel just returned this descriptor to us, and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Adds one to the counter. A full counter or pipe (EAGAIN) has been signalled already.
    pub(crate) fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes from a live array to an open descriptor.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.0)
    }
}

/// Refuses what is not an eventfd.
pub(crate) fn check_eventfd(what: &'static str, fd: &OwnedFd) -> Result<()> {
    let expected = "an eventfd";
    is_eventfd(fd).then_some(()).ok_or(Error::BadFd {
        what,
        fd: fd.as_raw_fd(),
        expected,
    })
}

fn is_eventfd(fd: &OwnedFd) -> bool {
    std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))
        .is_ok_and(|info| info.lines().any(|line| line.starts_with("eventfd-count:")))
}

fn is_pipe(fd: &OwnedFd) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|metadata| metadata.file_type().is_fifo())
}

fn set_nonblocking(fd: &OwnedFd) -> Result<()> {
    let raw = fd.as_raw_fd();
    // SAFETY: fcntl(F_GETFL) and fcntl(F_SETFL) take no pointers.
    let done = unsafe {
        let flags = libc::fcntl(raw, libc::F_GETFL);
        flags >= 0 && libc::fcntl(raw, libc::F_SETFL, flags | libc::O_NONBLOCK) >= 0
    };
    if done {
        Ok(())
    } else {
        Err(Error::last_os("cannot make an eventfd non-blocking"))
    }
}
