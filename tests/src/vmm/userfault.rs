//! Memory that is armed with userfaultfd(2), as VMMs do for postcopy migration and background snapshots: a
//! monitor thread learns of pages that are missing, written to, or removed, and has them come.
#![allow(unsafe_code, reason = "userfaultfd is used through its ioctls")]

use super::PAGE_BYTES;
use super::error::{Result, VmmError};
use super::eventfd::EventFd;
use super::ram::GuestRam;
use parking_lot::Mutex;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

/// What the monitor was told, in page frame numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Pages that somebody touched while they were missing.
    pub missing: Vec<u64>,
    /// Pages that somebody wrote to while they were protected.
    pub written: Vec<u64>,
    /// Pages that somebody removed.
    pub removed: Vec<u64>,
}

/// What of an armed region is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arming {
    /// Missing pages, and removals: what postcopy needs.
    Missing,
    /// Writes: what a background snapshot needs.
    Writes,
}

/// An armed range of a guest's memory; disarmed when it is dropped.
#[derive(Debug)]
pub struct Userfault {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<EventFd>,
    monitor: Option<JoinHandle<()>>,
    _fd: Arc<OwnedFd>,
}

const UFFD_API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
const PAGEFAULT_WP: u64 = 1 << 1;
/// `_IOWR(0xaa, number, size)`.
const fn request(number: u64, size: u64) -> libc::c_ulong {
    3 << 30 | size << 16 | UFFD_API << 8 | number
}
const UFFDIO_API: libc::c_ulong = request(0x3f, 24);
const UFFDIO_REGISTER: libc::c_ulong = request(0x00, 32);
const UFFDIO_COPY: libc::c_ulong = request(0x03, 40);
const UFFDIO_WRITEPROTECT: libc::c_ulong = request(0x06, 24);

/// Makes an ioctl whose argument is an array of le64 fields.
fn ioctl<const N: usize>(
    fd: &OwnedFd,
    request: libc::c_ulong,
    mut fields: [u64; N],
    what: &'static str,
) -> Result<()> {
    // SAFETY: each of the requests used here takes a structure of 64-bit fields only, and the array has as
    // many of them.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, fields.as_mut_ptr()) };
    if result == 0 {
        Ok(())
    } else {
        Err(VmmError::last_os(what))
    }
}

impl Userfault {
    /// Arms `pages` pages from `first` on. A missing page comes with what `source` writes into it.
    ///
    /// # Errors
    /// The host does not allow it (it wants CAP_SYS_PTRACE or vm.unprivileged_userfaultfd), or cannot do it
    /// with this kind of memory.
    pub fn arm(
        ram: &GuestRam,
        first: u64,
        pages: u64,
        arming: Arming,
        source: impl Fn(u64, &mut [u8]) + Send + 'static,
    ) -> Result<Self> {
        let bytes = pages * PAGE_BYTES;
        let base = ram.host_address(first * PAGE_BYTES, bytes);
        let base = base.ok_or(VmmError::Absent("memory to arm"))? as u64;
        // SAFETY: userfaultfd takes one integer.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
        let fd = fd.ok_or_else(|| VmmError::last_os("cannot have a userfaultfd"))?;
        // SAFETY: the kernel just returned this descriptor to us, and nobody else owns it.
        let fd = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
        let (features, mode) = match arming {
            Arming::Missing => (FEATURE_EVENT_REMOVE, MODE_MISSING),
            Arming::Writes => (FEATURE_PAGEFAULT_FLAG_WP, MODE_WP),
        };
        ioctl(
            &fd,
            UFFDIO_API,
            [UFFD_API, features, 0],
            "cannot agree on userfaultfd features",
        )?;
        ioctl(
            &fd,
            UFFDIO_REGISTER,
            [base, bytes, mode, 0],
            "cannot arm memory",
        )?;
        if arming == Arming::Writes {
            ioctl(
                &fd,
                UFFDIO_WRITEPROTECT,
                [base, bytes, 1],
                "cannot protect memory",
            )?;
        }
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(EventFd::new()?);
        let monitor = Monitor {
            fd: Arc::clone(&fd),
            stop: Arc::clone(&stop),
            seen: Arc::clone(&seen),
            base,
            first,
        };
        let thread = std::thread::Builder::new()
            .name("userfaults".to_owned())
            .spawn(move || {
                if let Err(error) = monitor.run(&source) {
                    eprintln!("the monitor of userfaults gives up: {error}");
                }
            })
            .map_err(|source| VmmError::Os {
                what: "cannot start a monitor",
                source,
            })?;
        Ok(Self {
            seen,
            stop,
            monitor: Some(thread),
            _fd: fd,
        })
    }

    /// What was told since the last call, each page once and in order.
    #[must_use]
    pub fn take_seen(&self) -> Seen {
        let mut seen = std::mem::take(&mut *self.seen.lock());
        for pages in [&mut seen.missing, &mut seen.written, &mut seen.removed] {
            pages.sort_unstable();
            pages.dedup();
        }
        seen
    }
}

impl Drop for Userfault {
    fn drop(&mut self) {
        self.stop.signal();
        if let Some(thread) = self.monitor.take() {
            // It told of its own failure.
            let _ = thread.join();
        }
    }
}

/// The monitor thread's half.
struct Monitor {
    fd: Arc<OwnedFd>,
    stop: Arc<EventFd>,
    seen: Arc<Mutex<Seen>>,
    base: u64,
    first: u64,
}

impl Monitor {
    fn pfn(&self, address: u64) -> u64 {
        self.first + (address - self.base) / PAGE_BYTES
    }

    fn run(&self, source: &dyn Fn(u64, &mut [u8])) -> Result<()> {
        loop {
            let mut polled = [self.fd.as_raw_fd(), self.stop.raw()].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            // SAFETY: two entries, which live across the call.
            unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) };
            if polled[1].revents != 0 {
                return Ok(());
            }
            // `struct uffd_msg`: the event in the first byte, then what it is about.
            let mut message = [0u64; 4];
            // SAFETY: reads up to 32 bytes into an array of as many.
            let bytes = unsafe { libc::read(self.fd.as_raw_fd(), message.as_mut_ptr().cast(), 32) };
            if bytes != 32 {
                continue;
            }
            let [event, one, two, _] = message;
            match event.to_ne_bytes()[0] {
                EVENT_PAGEFAULT => self.page_fault(one, two & !(PAGE_BYTES - 1), source)?,
                EVENT_REMOVE => {
                    let pages = self.pfn(one)..self.pfn(two);
                    self.seen.lock().removed.extend(pages);
                }
                _ => {}
            }
        }
    }

    fn page_fault(&self, flags: u64, page: u64, source: &dyn Fn(u64, &mut [u8])) -> Result<()> {
        let pfn = self.pfn(page);
        if flags & PAGEFAULT_WP != 0 {
            self.seen.lock().written.push(pfn);
            let fields = [page, PAGE_BYTES, 0];
            return ioctl(
                &self.fd,
                UFFDIO_WRITEPROTECT,
                fields,
                "cannot unprotect a page",
            );
        }
        self.seen.lock().missing.push(pfn);
        let mut contents = [0; 4096];
        source(pfn, &mut contents);
        let from = contents.as_ptr() as u64;
        let fields = [page, from, PAGE_BYTES, 0, 0];
        match ioctl(&self.fd, UFFDIO_COPY, fields, "cannot have a page come") {
            // Another thread's fault had it come meanwhile.
            Err(VmmError::Os { source, .. }) if source.raw_os_error() == Some(libc::EEXIST) => {
                Ok(())
            }
            other => other,
        }
    }
}
