//! File descriptors that C lends for a call: checked, and duplicated where they are kept.
#![allow(unsafe_code, reason = "takes raw descriptors from C")]

use crate::boundary::Outcome;
use ::aerostat_device::Error;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// The number that stands for no descriptor.
pub(crate) const NONE: RawFd = -1;

/// What a region's descriptor has to be.
const REGION_FILE: &str = "an open file that memory can be mapped from (memfd, tmpfs, hugetlbfs)";

/// Duplicates two eventfds, each of which may be absent ([`NONE`]).
///
/// Both are looked at before either is duplicated: a duplicate gets the lowest number that is free,
/// which may be that of a descriptor which the caller closed by mistake.
pub(crate) fn eventfd_pair(
    first: (&'static str, RawFd),
    second: (&'static str, RawFd),
) -> Outcome<[Option<OwnedFd>; 2]> {
    for (what, fd) in [first, second] {
        if fd != NONE && !is_open(fd) {
            return Err(not_an_eventfd(what, fd).into());
        }
    }
    Ok([
        optional_eventfd(first.0, first.1)?,
        optional_eventfd(second.0, second.1)?,
    ])
}

/// Duplicates an eventfd. The duplicate is what is checked, so the caller cannot swap it meanwhile.
fn eventfd(what: &'static str, fd: RawFd) -> Outcome<OwnedFd> {
    let duplicate = duplicate(fd, || not_an_eventfd(what, fd))?;
    // Eventfds are told apart only by /proc. Where there is none (a jail), the caller is believed.
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", duplicate.as_raw_fd()));
    match info {
        Ok(info) if !info.lines().any(|line| line.starts_with("eventfd-count:")) => {
            Err(not_an_eventfd(what, fd).into())
        }
        _ => Ok(duplicate),
    }
}

/// As [`eventfd`], for a descriptor that may be absent ([`NONE`]).
pub(crate) fn optional_eventfd(what: &'static str, fd: RawFd) -> Outcome<Option<OwnedFd>> {
    match fd {
        NONE => Ok(None),
        fd => eventfd(what, fd).map(Some),
    }
}

/// Refuses the absence of a descriptor that is needed.
pub(crate) fn required(what: &'static str, fd: Option<OwnedFd>) -> Outcome<OwnedFd> {
    Ok(fd.ok_or_else(|| not_an_eventfd(what, NONE))?)
}

fn not_an_eventfd(what: &'static str, fd: RawFd) -> Error {
    Error::BadFd {
        what,
        fd,
        expected: "an open eventfd",
    }
}

/// The file behind a memory region.
#[derive(Debug)]
pub(crate) struct RegionFile {
    pub(crate) fd: OwnedFd,
    /// The size of the file's pages if it is on hugetlbfs.
    pub(crate) huge_page_bytes: Option<u64>,
    pub(crate) len_bytes: u64,
}

/// Duplicates the descriptor of a file that memory is mapped from; `writable` if it has to allow
/// punching holes.
pub(crate) fn region_file(fd: RawFd, writable: bool) -> Outcome<RegionFile> {
    let bad = |expected| Error::BadFd {
        what: "aerostat_memory_region.fd",
        fd,
        expected,
    };
    let duplicate = duplicate(fd, || bad(REGION_FILE))?;
    let status = stat(&duplicate)?;
    if status.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(bad(REGION_FILE).into());
    }
    // SAFETY: F_GETFL takes no pointer; the descriptor is open.
    let mode = unsafe { libc::fcntl(duplicate.as_raw_fd(), libc::F_GETFL) };
    if writable && (mode < 0 || mode & libc::O_ACCMODE == libc::O_RDONLY) {
        return Err(bad("open for writing, which discarding needs").into());
    }
    Ok(RegionFile {
        huge_page_bytes: huge_page_bytes(&duplicate)?,
        fd: duplicate,
        len_bytes: u64::try_from(status.st_size).unwrap_or(0),
    })
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD takes no pointer, and fails for a descriptor that is not open.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

/// A duplicate of `fd` that is closed on exec; `closed` is the error if `fd` is not open.
fn duplicate(fd: RawFd, closed: impl FnOnce() -> Error) -> Outcome<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes a number, and fails for a descriptor that is not open.
    let duplicate = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if duplicate < 0 {
        return Err(not_duplicated(io::Error::last_os_error(), closed).into());
    }
    // SAFETY: a descriptor that was just made belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(duplicate) })
}

/// Only one of the reasons is the caller's descriptor; the process may be out of descriptors, too.
fn not_duplicated(source: io::Error, closed: impl FnOnce() -> Error) -> Error {
    match source.raw_os_error() {
        Some(libc::EBADF) => closed(),
        _ => Error::Os {
            what: "a descriptor cannot be duplicated",
            source,
        },
    }
}

fn stat(fd: &OwnedFd) -> Outcome<libc::stat> {
    let mut status = MaybeUninit::zeroed();
    // SAFETY: fstat writes one `stat`, and there is room for one.
    if unsafe { libc::fstat(fd.as_raw_fd(), status.as_mut_ptr()) } != 0 {
        return Err(os("fstat of a region's file failed"));
    }
    // SAFETY: integers only, zeroed and then written by fstat.
    Ok(unsafe { status.assume_init() })
}

fn huge_page_bytes(fd: &OwnedFd) -> Outcome<Option<u64>> {
    let mut status = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: fstatfs writes one `statfs`, and there is room for one.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), status.as_mut_ptr()) } != 0 {
        return Err(os("fstatfs of a region's file failed"));
    }
    // SAFETY: integers only, zeroed and then written by fstatfs.
    let status = unsafe { status.assume_init() };
    Ok(
        (status.f_type == libc::HUGETLBFS_MAGIC)
            .then(|| u64::try_from(status.f_bsize).unwrap_or(0)),
    )
}

/// The size of the host's base pages.
pub(crate) fn host_page_bytes() -> u64 {
    // SAFETY: sysconf takes a number and touches no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(4096)
}

fn os(what: &'static str) -> crate::boundary::Refusal {
    Error::Os {
        what,
        source: io::Error::last_os_error(),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_eventfd_passes_for_one() {
        // SAFETY: eventfd takes numbers only, and the result is owned by nobody else.
        let event = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
        let file = fs::File::open("/proc/self/exe").unwrap();
        assert!(eventfd("fd", event.as_raw_fd()).is_ok());
        assert!(eventfd("fd", file.as_raw_fd()).is_err());
        assert!(eventfd("fd", 1 << 20).is_err());
        assert!(eventfd("fd", NONE).is_err());
        assert!(optional_eventfd("fd", NONE).unwrap().is_none());
        assert!(optional_eventfd("fd", -2).is_err());
    }

    #[test]
    fn a_process_that_is_out_of_descriptors_is_told_so() {
        let errno = |errno| {
            let source = io::Error::from_raw_os_error(errno);
            not_duplicated(source, || not_an_eventfd("fd", 7)).errno()
        };
        assert_eq!(errno(libc::EBADF), libc::EBADF);
        assert_eq!(errno(libc::EMFILE), libc::EMFILE);
    }

    #[test]
    fn a_closed_descriptor_is_refused_beside_a_good_one() {
        // SAFETY: as above.
        let event = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
        let (good, closed) = (("a", event.as_raw_fd()), ("b", 1 << 20));
        assert!(eventfd_pair(good, closed).is_err());
        assert!(eventfd_pair(closed, good).is_err());
        let [first, second] = eventfd_pair(good, ("b", NONE)).unwrap();
        assert!(first.is_some() && second.is_none());
    }

    #[test]
    fn a_duplicate_outlives_the_callers_descriptor() {
        // SAFETY: as above.
        let event = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
        let kept = eventfd("fd", event.as_raw_fd()).unwrap();
        drop(event);
        assert!(eventfd("fd", kept.as_raw_fd()).is_ok());
    }

    #[test]
    fn a_regions_file_has_to_be_writable_unless_it_is_never_discarded() {
        let file = fs::File::open("/proc/self/exe").unwrap();
        assert!(region_file(file.as_raw_fd(), true).is_err());
        assert!(region_file(file.as_raw_fd(), false).is_ok());
        let directory = fs::File::open("/").unwrap();
        assert!(region_file(directory.as_raw_fd(), false).is_err());
    }
}
