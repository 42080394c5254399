//! The system calls that free memory. Interrupted and short calls are continued; what fails is
//! returned, range by range.
//!
//! References: madvise(2), process_madvise(2), fallocate(2).
#![allow(
    unsafe_code,
    reason = "discarding is done by system calls on the guest's memory"
)]

use super::plan::{Batch, HostRange, Primitive};
use super::probe::Capabilities;
use crate::memory::{BALLOON_PAGE_BYTES, GuestMemory};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The kernel takes at most this many ranges a vectored call (UIO_MAXIOV).
const MAX_VECTOR: usize = 1024;

/// How often a call that was interrupted or found something busy is made again.
const MAX_RETRIES: u32 = 16;

/// What the calls for one batch came to.
#[derive(Debug, Default)]
pub(super) struct Calls {
    /// The ranges whose memory could not be freed.
    pub(super) failed: Vec<HostRange>,
    /// How many there were.
    pub(super) calls: u64,
}

/// Frees all of `batch`.
pub(super) fn discard(memory: &GuestMemory, capabilities: &Capabilities, batch: &Batch) -> Calls {
    let mut outcome = Calls::default();
    match (batch.primitive, &capabilities.process_madvise) {
        (Primitive::ProcessMadvise, Some(process)) => {
            for ranges in batch.ranges.chunks(MAX_VECTOR) {
                vectored(process.as_raw_fd(), ranges, &mut outcome);
            }
        }
        (Primitive::ProcessMadvise | Primitive::Madvise, _) => {
            each(&batch.ranges, &mut outcome, |range| {
                madvise(range, libc::MADV_DONTNEED)
            });
        }
        (Primitive::MadviseRemove, _) => {
            each(&batch.ranges, &mut outcome, |range| {
                madvise(range, libc::MADV_REMOVE)
            });
        }
        (Primitive::PunchHole, process) => {
            if let Some(process) = process {
                unmap(process.as_raw_fd(), memory, &batch.ranges, &mut outcome);
            }
            each(&batch.ranges, &mut outcome, |range| {
                punch_hole(memory, range)
            });
        }
    }
    outcome
}

/// Makes one call a range.
fn each(
    ranges: &[HostRange],
    outcome: &mut Calls,
    mut call: impl FnMut(&HostRange) -> io::Result<()>,
) {
    for range in ranges {
        let mut tries = 0;
        loop {
            outcome.calls += 1;
            match call(range) {
                Ok(()) => break,
                Err(error) if is_transient(&error) && tries < MAX_RETRIES => tries += 1,
                Err(error) => {
                    failed(range, &error, outcome);
                    break;
                }
            }
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

fn failed(range: &HostRange, error: &io::Error, outcome: &mut Calls) {
    log::debug!(
        "discarding {:#x} bytes at {:#x} failed: {error}",
        range.len,
        range.start
    );
    outcome.failed.push(*range);
}

/// Makes vectored calls until all of `ranges`, at most [`MAX_VECTOR`], are done.
///
/// A short result says how many bytes were advised; the kernel stopped in the range after them.
/// That range is then tried alone to learn its error, and the rest goes on behind it.
fn vectored(process: i32, ranges: &[HostRange], outcome: &mut Calls) {
    let mut vector = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; MAX_VECTOR];
    let (mut done, mut tries) = (0, 0);
    while let Some(rest) = ranges.get(done..).filter(|rest| !rest.is_empty()) {
        for (slot, range) in vector.iter_mut().zip(rest) {
            *slot = iovec(range);
        }
        outcome.calls += 1;
        // SAFETY: the vector's first rest.len() entries are initialised. They lie inside regions
        // that the table's maker promised to be mapped and discardable, and `Plan` cut the ranges
        // to their regions.
        let advised = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                process,
                vector.as_ptr(),
                rest.len(),
                libc::MADV_DONTNEED,
                0u32,
            )
        };
        let Ok(mut bytes) = u64::try_from(advised) else {
            if is_transient(&io::Error::last_os_error()) && tries < MAX_RETRIES {
                tries += 1;
                continue;
            }
            alone(&rest[..1], outcome);
            done += 1;
            continue;
        };
        tries = 0;
        let whole = rest
            .iter()
            .take_while(|range| match bytes.checked_sub(range.len) {
                Some(left) => {
                    bytes = left;
                    true
                }
                None => false,
            });
        let whole = whole.count();
        if let Some(broken) = rest.get(whole..=whole) {
            alone(broken, outcome);
            done += 1;
        }
        done += whole;
    }
}

/// Takes ranges of files out of this process's page tables, many a call, before they are punched one a
/// call: what a punch does to a page that is mapped, walking the tables and having other processors forget
/// its address, is done once for all of them (docs/performance.md has what that saves). It is no more than
/// that: the pages stay in their file until they are punched, and what fails here is done then.
fn unmap(process: i32, memory: &GuestMemory, ranges: &[HostRange], outcome: &mut Calls) {
    if ranges.len() < 2 {
        return;
    }
    let mapped = |range: &HostRange| {
        let region = memory.regions().get(range.region)?;
        let offset = range.start.checked_sub(region.fd_offset_bytes)?;
        // Huge pages are few.
        (region.page_size_bytes == BALLOON_PAGE_BYTES).then_some(libc::iovec {
            iov_base: (region.hva + usize::try_from(offset).ok()?) as *mut libc::c_void,
            iov_len: length(range),
        })
    };
    for ranges in ranges.chunks(MAX_VECTOR) {
        let vector: Vec<libc::iovec> = ranges.iter().filter_map(mapped).collect();
        if vector.is_empty() {
            continue;
        }
        outcome.calls += 1;
        // SAFETY: the vector lives across the call. Its entries lie inside regions that the table's maker
        // promised to be mapped; `Plan` made the ranges of files of these regions. They are shared
        // mappings (`Primitive::of`), of which this advice changes no contents.
        unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                process,
                vector.as_ptr(),
                vector.len(),
                libc::MADV_DONTNEED,
                0u32,
            );
        }
    }
}

/// Advises ranges one by one, for their own errors.
fn alone(ranges: &[HostRange], outcome: &mut Calls) {
    each(ranges, outcome, |range| madvise(range, libc::MADV_DONTNEED));
}

/// The range as the kernel takes it; addresses and lengths come from mappings of this process.
fn iovec(range: &HostRange) -> libc::iovec {
    libc::iovec {
        iov_base: address(range),
        iov_len: length(range),
    }
}

fn address(range: &HostRange) -> *mut libc::c_void {
    usize::try_from(range.start).unwrap_or(0) as *mut libc::c_void
}

fn length(range: &HostRange) -> usize {
    usize::try_from(range.len).unwrap_or(0)
}

fn madvise(range: &HostRange, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the range lies inside a region that the table's maker promised to be mapped and
    // discardable; `Plan` cut it to that region.
    let result = unsafe { libc::madvise(address(range), length(range), advice) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn punch_hole(memory: &GuestMemory, range: &HostRange) -> io::Result<()> {
    let missing = || io::Error::from_raw_os_error(libc::EBADF);
    let region = memory.regions().get(range.region).ok_or_else(missing)?;
    let file = region.fd.as_ref().ok_or_else(missing)?;
    fallocate(
        std::os::fd::AsFd::as_fd(file.as_ref()),
        range.start,
        range.len,
    )
}

fn fallocate(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let overflow = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
    let offset = i64::try_from(offset).map_err(overflow)?;
    let len = i64::try_from(len).map_err(overflow)?;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is borrowed and open; the call takes no pointers.
    let result = unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset, len) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
