//! What is compared: the library in three ways, and a rival that makes a system call a page.
#![allow(unsafe_code, reason = "system calls on guest memory")]

use super::trace::ARRAY;
use aerostat_device::discard::Discarder;
use aerostat_device::discard::plan::Piece;
use aerostat_device::discard::probe::Capabilities;
use aerostat_device::memory::Pfn;
use aerostat_device::pages::ranges::coalesce_pages;
use aerostat_device::{Gpa, GuestMemory, Region};
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::vring::Piece as Buffer;
use aerostat_tests::vmm::{Guest, PAGE_BYTES, Result, VmmError};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

/// A way to free the pages of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// madvise or fallocate for each page, in this thread: QEMU, kvmtool, Dragonball, alioth.
    PerPage,
    /// The library's sorting, planning and primitives for an array at a time, in this thread.
    Planner,
    /// The whole device behind the C ABI, one array outstanding, as Linux does: the guest sleeps
    /// until each is acknowledged.
    OneOutstanding,
    /// The whole device with all arrays in the ring, so that no time is spent waiting for a guest.
    RingFull,
}

impl Method {
    pub(crate) const ALL: [Self; 4] = [
        Self::PerPage,
        Self::Planner,
        Self::OneOutstanding,
        Self::RingFull,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PerPage => "per page (rival)",
            Self::Planner => "planner, 1 thread",
            Self::OneOutstanding => "device, 1 array out",
            Self::RingFull => "device, ring full",
        }
    }
}

/// The memory under test as the planner and the rival see it: the region that holds all pages.
pub(crate) struct Direct {
    memory: Arc<GuestMemory>,
    discarder: Discarder,
    first: u64,
    hva: usize,
    fd: i32,
    fd_offset: u64,
}

impl Direct {
    pub(crate) fn new(guest: &Guest, gpa: u64) -> Result<Self> {
        let table = guest.ram().table();
        let mut regions = table.iter();
        let entry = regions.find(|region| region.gpa == gpa);
        let entry = entry.ok_or(VmmError::Absent("region under test"))?;
        let shared = entry.flags & aerostat::AEROSTAT_REGION_SHARED != 0;
        // SAFETY: the descriptor is the mapping's own, open as long as the guest's memory is.
        let file = (entry.fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(entry.fd) });
        let fd = file.map(|fd| fd.try_clone_to_owned()).transpose();
        let fd = fd.map_err(|source| VmmError::Os {
            what: "cannot duplicate a descriptor",
            source,
        })?;
        let region = Region {
            gpa: Gpa(entry.gpa),
            len_bytes: entry.len_bytes,
            hva: entry.hva as usize,
            fd: fd.map(Arc::new),
            fd_offset_bytes: entry.fd_offset_bytes,
            page_size_bytes: PAGE_BYTES,
            frame_bytes: 0,
            shared,
            readonly: false,
            extra: false,
            pinned: false,
            node: None,
        };
        let refused = |_| VmmError::Absent("memory table");
        // SAFETY: the guest's memory is mapped there, outlives this value (`main` drops the guest
        // last), and no reference into it exists.
        let memory = unsafe { GuestMemory::new(vec![region]) }.map_err(refused)?;
        let capabilities = Capabilities::probe().map_err(refused)?;
        Ok(Self {
            memory,
            discarder: Discarder::inline(Arc::new(capabilities)),
            first: gpa / PAGE_BYTES,
            hva: entry.hva as usize,
            fd: entry.fd,
            fd_offset: entry.fd_offset_bytes,
        })
    }

    /// One system call a page; returns how many.
    pub(crate) fn per_page(&self, arrays: &[Vec<u64>]) -> u64 {
        let (mut calls, mut failed) = (0, 0);
        for pfn in arrays.iter().flatten() {
            let offset = (pfn - self.first) * PAGE_BYTES;
            let result = if self.fd >= 0 {
                let start = i64::try_from(self.fd_offset + offset).unwrap_or(i64::MAX);
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: takes no pointer.
                unsafe { libc::fallocate64(self.fd, mode, start, 4096) }
            } else {
                let address = self.hva + usize::try_from(offset).unwrap_or(0);
                // SAFETY: the page lies inside the guest's mapping, whose contents are ours.
                unsafe { libc::madvise(address as *mut libc::c_void, 4096, libc::MADV_DONTNEED) }
            };
            calls += 1;
            failed += u64::from(result != 0);
        }
        assert_eq!(failed, 0, "the rival's calls failed");
        calls
    }

    /// The library's planner and primitives, an array at a time; returns the number of calls.
    pub(crate) fn planner(&self, arrays: &[Vec<u64>]) -> u64 {
        let (mut pages, mut ranges, mut calls) = (Vec::new(), Vec::new(), 0);
        for array in arrays {
            pages.clear();
            ranges.clear();
            pages.extend(array.iter().map(|pfn| Pfn(*pfn)));
            coalesce_pages(&mut pages, &mut ranges);
            let pieces: Vec<Piece> = ranges
                .iter()
                .map(|range| Piece {
                    region: 0,
                    range: *range,
                })
                .collect();
            let outcome = self.discarder.discard(&self.memory, &pieces);
            assert!(outcome.failed.is_empty(), "the library's calls failed");
            calls += outcome.calls;
        }
        calls
    }
}

/// The arrays as they lie in the guest's memory from `gpa` on, ready to be offered.
pub(crate) fn write_arrays(guest: &Guest, gpa: u64, arrays: &[Vec<u64>]) -> Vec<Buffer> {
    let place = (0..).map(|index| gpa + index * 4 * ARRAY as u64);
    let write = |(array, gpa): (&Vec<u64>, u64)| {
        let low = |pfn: &u64| u32::try_from(*pfn).unwrap_or(u32::MAX).to_le_bytes();
        let bytes: Vec<u8> = array.iter().flat_map(low).collect();
        guest.ram().write(gpa, &bytes);
        Buffer {
            gpa,
            len: u32::try_from(bytes.len()).unwrap_or(0),
            writable: false,
        }
    };
    arrays.iter().zip(place).map(write).collect()
}

/// Offers one array after the other, each when the one before has come back.
pub(crate) fn one_outstanding(guest: &Guest, buffers: &[Buffer]) -> Result<()> {
    let mut driver = guest.driver();
    for buffer in buffers {
        driver.exchange(Role::Inflate, &[*buffer])?;
    }
    Ok(())
}

/// Offers all arrays, then waits.
pub(crate) fn ring_full(guest: &Guest, buffers: &[Buffer]) -> Result<()> {
    let mut driver = guest.driver();
    let queue = driver.queue(Role::Inflate)?;
    for buffer in buffers {
        queue.add(guest.ram(), &[*buffer])?;
    }
    queue.kick(guest.ram());
    for _ in buffers {
        queue.wait_used(guest.ram(), Duration::from_secs(60))?;
    }
    Ok(())
}
