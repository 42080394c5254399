//! Signals that cannot block, on eventfds whose open file somebody else has too.
//!
//! O_NONBLOCK belongs to the open file. Who shares it can clear the flag and fill the counter, and a write
//! then waits until somebody reads: whether it will cannot be found out beforehand. The kernel's own
//! signals never wait and leave a full counter full, as those of vhost and VFIO do. A process reaches them
//! through asynchronous I/O that tells an eventfd of its end (IOCB_FLAG_RESFD, io_submit(2)); here it is
//! the reading of an empty file, which is over before the call returns.

use crate::error::{Error, Result};
use libc::{c_long, c_ulong};
use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

/// Ends of reads that the kernel keeps until they are collected.
const EVENTS: u32 = 128;

/// How often what was kept is collected to make room for one more. Once is enough but for other threads.
const MAX_TRIES: u32 = 16;

/// As system calls take numbers.
const NONE: c_long = 0;
const ONE: c_long = 1;

const IOCB_CMD_PREAD: u16 = 0;
const IOCB_FLAG_RESFD: u32 = 1;

/// `struct iocb` of linux/aio_abi.h. The two parts of `key`, whose order depends on the machine, are zero.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key: [u32; 2],
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event: u32,
}

/// `struct io_event` of the same header.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct End {
    _data: u64,
    _request: u64,
    _results: [i64; 2],
}

/// The process's way to the kernel's signals.
#[derive(Debug)]
struct Signaller {
    context: c_ulong,
    empty: OwnedFd,
}

impl Signaller {
    fn new() -> Result<Self> {
        // SAFETY: the name is a constant string that ends with a zero.
        let empty = unsafe { libc::memfd_create(c"aerostat-empty".as_ptr(), libc::MFD_CLOEXEC) };
        if empty < 0 {
            return Err(Error::last_os("cannot create an empty file"));
        }
        // SAFETY: the kernel just returned this descriptor to us, and nobody else owns it.
        let empty = unsafe { OwnedFd::from_raw_fd(empty) };
        let mut context: c_ulong = 0;
        // SAFETY: io_setup writes a context to the live variable that it is given, which is zero before.
        if unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &raw mut context) } != 0 {
            return Err(Error::last_os("cannot set up asynchronous I/O"));
        }
        Ok(Self { context, empty })
    }

    fn try_signal(&self, event: BorrowedFd<'_>) -> bool {
        let mut nothing = [0u8; 1];
        // Descriptors that are open are not negative.
        let number = |raw: i32| u32::try_from(raw).unwrap_or(u32::MAX);
        let mut request = Request {
            opcode: IOCB_CMD_PREAD,
            fd: number(self.empty.as_raw_fd()),
            buffer: nothing.as_mut_ptr() as u64,
            bytes: nothing.len() as u64,
            flags: IOCB_FLAG_RESFD,
            event: number(event.as_raw_fd()),
            ..Request::default()
        };
        let mut requests = [&raw mut request];
        // SAFETY: one request, as the second argument says. It, the list and the buffer that it names are
        // live, and reading from the page cache ends before the call does.
        let taken: c_long = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.context,
                ONE,
                requests.as_mut_ptr(),
            )
        };
        taken == 1
    }

    /// Makes room for more.
    fn collect(&self) {
        let mut ends = [End::default(); EVENTS as usize];
        let at_once = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: room for as many as the third argument says; all of it lives across the call.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                NONE,
                c_long::from(EVENTS),
                ends.as_mut_ptr().cast::<c_void>(),
                &raw const at_once,
            )
        };
    }
}

/// Set up at the first use and kept as long as the process.
fn signaller() -> Option<&'static Signaller> {
    static SIGNALLER: OnceLock<Option<Signaller>> = OnceLock::new();
    let new = || {
        Signaller::new()
            .inspect_err(|error| {
                log::warn!(
                    "{error}: whoever shares an eventfd can stop the thread that signals it"
                );
            })
            .ok()
    };
    SIGNALLER.get_or_init(new).as_ref()
}

/// Sets up what [`signal`] needs.
pub(super) fn prepare() {
    signaller();
}

/// Adds one to the counter of an eventfd, whatever its flags are. A full counter has been signalled already.
/// False if it could not be done without the risk of waiting.
pub(super) fn signal(event: BorrowedFd<'_>) -> bool {
    let Some(signaller) = signaller() else {
        return false;
    };
    (0..MAX_TRIES).any(|_| {
        let done = signaller.try_signal(event);
        if !done {
            signaller.collect();
        }
        done
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn counter(flags: libc::c_int, start: u64) -> OwnedFd {
        // SAFETY: eventfd takes two integers, and what it returns is nobody else's.
        let event = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, flags)) };
        let bytes = start.to_ne_bytes();
        // SAFETY: writes 8 bytes from a live array.
        unsafe { libc::write(event.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
        event
    }

    fn read(event: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        // SAFETY: reads 8 bytes into a live array.
        unsafe { libc::read(event.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn each_signal_counts() {
        let event = counter(0, 0);
        // More than the kernel keeps ends for.
        let signals = 10 * u64::from(EVENTS);
        assert!((0..signals).all(|_| signal(event.as_fd())));
        assert_eq!(read(&event), signals);
    }

    #[test]
    fn a_full_counter_that_blocks_keeps_nobody() {
        for flags in [0, libc::EFD_SEMAPHORE] {
            let event = counter(flags, u64::MAX - 1);
            assert!((0..1000).all(|_| signal(event.as_fd())));
            assert!(read(&event) > 0);
        }
    }

    #[test]
    fn threads_signal_side_by_side() {
        let event = counter(0, 0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| assert!((0..1000).all(|_| signal(event.as_fd()))));
            }
        });
        assert_eq!(read(&event), 8000);
    }
}
