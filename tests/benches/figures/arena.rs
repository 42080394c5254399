//! The memory under test: one region of a guest, as the library and as its rivals see it.
#![allow(unsafe_code, reason = "maps guest memory and asks the kernel about it")]

use super::trace::Trace;
use aerostat_device::{Gpa, GuestMemory, Region};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::{GuestRam, RegionSpec};
use aerostat_tests::vmm::{MIB, PAGE_BYTES, Result, VmmError};
use std::fs;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// Where the memory under test begins in the guest; below it are rings and buffers.
pub(crate) const UNDER_TEST: u64 = 1 << 32;
/// What the guest has for rings and buffers, from address 0 on.
pub(crate) const KERNEL_BYTES: u64 = 32 * MIB;

/// What is behind the memory under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Anonymous,
    Memfd,
    AnonymousHuge,
    MemfdHuge,
    Hugetlb,
}

impl Kind {
    pub(crate) const ALL: [Self; 5] = [
        Self::Anonymous,
        Self::Memfd,
        Self::AnonymousHuge,
        Self::MemfdHuge,
        Self::Hugetlb,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::Memfd => "memfd",
            Self::AnonymousHuge => "anonymous, THP",
            Self::MemfdHuge => "memfd, THP",
            Self::Hugetlb => "hugetlb 2M",
        }
    }

    /// Whether frames of 2 MiB are behind it.
    pub(crate) fn is_huge(self) -> bool {
        !matches!(self, Self::Anonymous | Self::Memfd)
    }

    fn backing(self) -> Backing {
        match self {
            Self::Anonymous => Backing::Anonymous,
            Self::AnonymousHuge => Backing::AnonymousHuge,
            Self::Memfd | Self::MemfdHuge => Backing::Memfd { offset_bytes: 0 },
            Self::Hugetlb => Backing::Hugetlb,
        }
    }

    /// Why this machine cannot show it, if it cannot.
    pub(crate) fn missing(self, bytes: u64) -> Option<String> {
        let switch = |name: &str| {
            let path = format!("/sys/kernel/mm/transparent_hugepage/{name}");
            fs::read_to_string(path).unwrap_or_default()
        };
        let off = |name: &str, wanted: &[&str]| {
            let setting = switch(name);
            let on = wanted
                .iter()
                .any(|word| setting.contains(&format!("[{word}]")));
            (!on).then(|| format!("transparent_hugepage/{name} is {}", setting.trim()))
        };
        match self {
            Self::Anonymous | Self::Memfd => None,
            Self::AnonymousHuge => off("enabled", &["always", "madvise"]),
            Self::MemfdHuge => off(
                "shmem_enabled",
                &["always", "within_size", "advise", "force"],
            ),
            Self::Hugetlb => {
                let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
                let free = fs::read_to_string(path).unwrap_or_default();
                let free: u64 = free.trim().parse().unwrap_or(0);
                let needed = bytes / (2 * MIB);
                (free < needed).then(|| format!("{needed} free huge pages needed, {free} there"))
            }
        }
    }
}

/// The memory under test, mapped, with a table that the library takes.
#[derive(Debug)]
pub(crate) struct Arena {
    pub(crate) kind: Kind,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) pages: u64,
    hva: usize,
    fd: RawFd,
}

impl Arena {
    pub(crate) fn new(kind: Kind, pages: u64) -> Result<Self> {
        let bytes = pages * PAGE_BYTES;
        let low = RegionSpec::new(0, KERNEL_BYTES, Backing::Anonymous);
        let high = RegionSpec::new(UNDER_TEST, bytes, kind.backing());
        let ram = Arc::new(GuestRam::new("bench", &[low, high])?);
        let base = ram.host_address(UNDER_TEST, bytes);
        let hva = base.ok_or(VmmError::Absent("region under test"))? as usize;
        let memory = memory_of(&ram, kind)?;
        let fd = ram
            .table()
            .iter()
            .find(|region| region.gpa == UNDER_TEST)
            .map_or(-1, |r| r.fd);
        let arena = Self {
            kind,
            ram,
            memory,
            pages,
            hva,
            fd,
        };
        match kind {
            Kind::AnonymousHuge | Kind::MemfdHuge => arena.advise(0, pages, libc::MADV_HUGEPAGE)?,
            Kind::Hugetlb => {}
            // A host that hands out huge pages unasked must not do it here.
            Kind::Anonymous | Kind::Memfd => arena.advise(0, pages, libc::MADV_NOHUGEPAGE)?,
        }
        arena.populate(0, pages)?;
        Ok(arena)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    /// The first page's number.
    pub(crate) fn first_pfn() -> u64 {
        UNDER_TEST / PAGE_BYTES
    }

    /// The host address of page `index` of the memory under test.
    pub(crate) fn address(&self, index: u64) -> *mut libc::c_void {
        let offset = usize::try_from(index * PAGE_BYTES).unwrap_or(0);
        (self.hva + offset) as *mut libc::c_void
    }

    /// The file behind it, if there is one.
    pub(crate) fn fd(&self) -> Option<RawFd> {
        (self.fd >= 0).then_some(self.fd)
    }

    fn advise(&self, index: u64, pages: u64, advice: libc::c_int) -> Result<()> {
        assert!(index + pages <= self.pages, "inside the memory under test");
        let len = usize::try_from(pages * PAGE_BYTES).unwrap_or(0);
        // SAFETY: the range lies inside a mapping that `self` keeps, whose contents nobody needs.
        if unsafe { libc::madvise(self.address(index), len, advice) } == 0 {
            Ok(())
        } else {
            Err(VmmError::Os {
                what: "advice on the memory under test",
                source: std::io::Error::last_os_error(),
            })
        }
    }

    fn populate(&self, index: u64, pages: u64) -> Result<()> {
        self.advise(index, pages, libc::MADV_POPULATE_WRITE)
    }

    /// Has the host allocate whatever `trace` frees. Huge frames are made anew, as a part of one
    /// would come back in small pages.
    pub(crate) fn fill(&self, trace: &Trace) -> Result<()> {
        if !self.kind.is_huge() {
            return trace
                .runs()
                .iter()
                .try_for_each(|&(start, pages)| self.populate(start, pages));
        }
        let (start, pages) = trace.span();
        match self.fd() {
            None => self.advise(start, pages, libc::MADV_DONTNEED)?,
            Some(_) => self.advise(start, pages, libc::MADV_REMOVE)?,
        }
        self.populate(start, pages)
    }

    /// Fails unless exactly the pages of `trace` are not there any more.
    pub(crate) fn check_freed(&self, trace: &Trace, by: &str) {
        if self.kind == Kind::Hugetlb {
            return;
        }
        let pages = usize::try_from(self.pages).unwrap_or(0);
        let mut there = vec![0u8; pages];
        let len = pages * 4096;
        // SAFETY: the range is mapped, and the vector has a byte for each of its pages.
        let result = unsafe { libc::mincore(self.address(0), len, there.as_mut_ptr()) };
        assert_eq!(result, 0, "mincore failed");
        let mut wanted = vec![1u8; pages];
        for (start, count) in trace.runs() {
            let start = usize::try_from(*start).unwrap_or(0);
            let count = usize::try_from(*count).unwrap_or(0);
            wanted[start..start + count].fill(0);
        }
        let wrong = there
            .iter()
            .zip(&wanted)
            .filter(|(is, wanted)| *is & 1 != **wanted)
            .count();
        assert_eq!(
            wrong, 0,
            "{by} freed something else than {} asked for",
            trace.name
        );
    }
}

/// The table of a guest's memory as the library takes it.
fn memory_of(ram: &Arc<GuestRam>, kind: Kind) -> Result<Arc<GuestMemory>> {
    let region = |entry: &aerostat::aerostat_memory_region| -> Result<Region> {
        // SAFETY: the descriptor is the mapping's own, open as long as the memory is.
        let file = (entry.fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(entry.fd) });
        let fd: Option<OwnedFd> =
            file.map(|fd| fd.try_clone_to_owned())
                .transpose()
                .map_err(|source| VmmError::Os {
                    what: "cannot duplicate a descriptor",
                    source,
                })?;
        let huge = kind == Kind::Hugetlb && entry.gpa == UNDER_TEST;
        Ok(Region {
            gpa: Gpa(entry.gpa),
            len_bytes: entry.len_bytes,
            hva: entry.hva as usize,
            fd: fd.map(Arc::new),
            fd_offset_bytes: entry.fd_offset_bytes,
            page_size_bytes: if huge { 2 * MIB } else { PAGE_BYTES },
            frame_bytes: 0,
            shared: entry.flags & aerostat::AEROSTAT_REGION_SHARED != 0,
            readonly: false,
            extra: false,
            guest_node: aerostat_device::GuestNode(0),
            pinned: false,
            node: None,
        })
    };
    let regions = ram.table().iter().map(region).collect::<Result<Vec<_>>>()?;
    // SAFETY: the mappings are there, nobody has references into them, and `Arena` keeps them: its
    // field `ram` outlives every device, which holds a table only as long as the arena is borrowed.
    unsafe { GuestMemory::new(regions) }.map_err(|_| VmmError::Absent("memory table"))
}
