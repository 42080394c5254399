//! Guest memory as the VMM describes it, and every access to it.
//!
//! A [`GuestMemory`] is an immutable table of regions; a changed table is a new one that is handed
//! to the device, which drains before it lets the old one go. All reads and writes of guest memory
//! in this crate go through [`HostSlice`] and `HostArea`, which check bounds and use atomic or
//! volatile accesses: the guest may change every byte at any moment (invariant I3).
#![allow(unsafe_code, reason = "this is the module that touches guest memory")]

mod access;

pub(crate) use access::{HostArea, full_barrier};
pub use access::{HostSlice, IoVec};

use crate::error::{Error, Result};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// The unit of a PFN in the virtio balloon, whatever the page size of guest or host (S12).
pub const BALLOON_PAGE_BYTES: u64 = 4096;
/// log2 of [`BALLOON_PAGE_BYTES`].
pub const BALLOON_PAGE_SHIFT: u32 = 12;

/// A guest physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

/// A guest page frame number in units of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The frame that holds `gpa`.
    #[must_use]
    pub fn containing(gpa: Gpa) -> Self {
        Self(gpa.0 >> BALLOON_PAGE_SHIFT)
    }
}

/// A host NUMA node, as the operating system numbers it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

/// A NUMA node of the guest, as its platform numbers it (the proximity domain of ACPI, the
/// `numa-node-id` of a device tree).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestNode(pub u32);

/// A run of guest pages: `start` and the `end` behind its last page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PfnRange {
    /// The first page.
    pub start: Pfn,
    /// The page behind the last one.
    pub end: Pfn,
}

impl PfnRange {
    /// The range of `pages` pages from `start` on.
    #[must_use]
    pub fn new(start: Pfn, pages: u64) -> Self {
        Self {
            start,
            end: Pfn(start.0 + pages),
        }
    }

    /// How many 4 KiB pages it holds.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.end.0 - self.start.0
    }

    /// What it has in common with `other`; empty if that is nothing.
    #[must_use]
    pub fn intersection(&self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self {
            start,
            end: self.end.min(other.end).max(start),
        }
    }

    /// How many bytes it holds.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages() << BALLOON_PAGE_SHIFT
    }
}

/// One contiguous piece of guest memory and what backs it on the host.
#[derive(Clone, Debug)]
pub struct Region {
    /// Where the guest sees it; a multiple of `page_size_bytes`.
    pub gpa: Gpa,
    /// Its length; a multiple of `page_size_bytes`.
    pub len_bytes: u64,
    /// Where this process has it mapped, as an address; a multiple of `page_size_bytes`.
    pub hva: usize,
    /// The file behind the mapping; `None` for anonymous memory.
    pub fd: Option<Arc<OwnedFd>>,
    /// Where in the file the region starts; a multiple of `page_size_bytes`.
    pub fd_offset_bytes: u64,
    /// The size of the host's pages behind it: 4096, or that of the huge pages of a hugetlb region.
    pub page_size_bytes: u64,
    /// The unit in which its memory is freed: the size of transparent huge pages where the host may have
    /// put them behind the region and discards are to respect them, a multiple of host addresses. Smaller
    /// values, 0 among them, stand for `page_size_bytes`.
    pub frame_bytes: u64,
    /// Mapped shared (`MAP_SHARED`), so that discarding has to reach the file.
    pub shared: bool,
    /// Cannot be ballooned: firmware, ROM.
    pub readonly: bool,
    /// Cannot be discarded for the time being: device assignment has pinned its pages.
    pub pinned: bool,
    /// The guest did not boot with it: its pages begin in the balloon (J6).
    pub extra: bool,
    /// The host node that backs it, where the VMM knows.
    pub node: Option<NodeId>,
    /// The node of the guest that it is on; a guest that has no nodes has all its memory on node 0.
    pub guest_node: GuestNode,
}

impl Region {
    /// The region's pages. Regions are page aligned, so nothing is cut off.
    #[must_use]
    pub fn pfns(&self) -> PfnRange {
        PfnRange::new(
            Pfn::containing(self.gpa),
            self.len_bytes >> BALLOON_PAGE_SHIFT,
        )
    }

    /// The address behind the region's last byte.
    fn end(&self) -> u64 {
        self.gpa.0 + self.len_bytes
    }

    /// Pages of 4 KiB in one frame.
    #[must_use]
    pub fn pages_per_frame(&self) -> u64 {
        self.frame_bytes.max(self.page_size_bytes) >> BALLOON_PAGE_SHIFT
    }

    fn check(&self) -> Result<()> {
        let align = self.page_size_bytes;
        if !align.is_power_of_two() || !(BALLOON_PAGE_BYTES..=1 << 34).contains(&align) {
            return Err(Error::Invalid {
                what: "page_size_bytes",
                value: align,
                expected: "a power of two from 4096 to 16 GiB",
            });
        }
        if self.frame_bytes > 1 << 34 || self.frame_bytes > 0 && !self.frame_bytes.is_power_of_two()
        {
            return Err(Error::Invalid {
                what: "frame_bytes",
                value: self.frame_bytes,
                expected: "0, or a power of two up to 16 GiB",
            });
        }
        if self.len_bytes == 0 {
            return Err(Error::Invalid {
                what: "len_bytes",
                value: 0,
                expected: "at least a page",
            });
        }
        for (what, value) in [
            ("gpa", self.gpa.0),
            ("len_bytes", self.len_bytes),
            ("hva", self.hva as u64),
            ("fd_offset_bytes", self.fd_offset_bytes),
        ] {
            if value % align != 0 {
                return Err(Error::Unaligned { what, value, align });
            }
        }
        if self.hva == 0 {
            return Err(Error::Invalid {
                what: "hva",
                value: 0,
                expected: "a mapped address",
            });
        }
        let ends = [self.gpa.0, self.hva as u64, self.fd_offset_bytes].map(|start| {
            start
                .checked_add(self.len_bytes)
                .filter(|end| *end <= i64::MAX as u64)
        });
        if ends.contains(&None) {
            return Err(Error::OutOfRange {
                what: "region",
                address: self.gpa.0,
                len: self.len_bytes,
            });
        }
        Ok(())
    }
}

/// The table of a guest's memory regions, sorted by guest address.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
    /// The file behind each region: descriptors differ where files do not.
    files: Vec<Option<FileId>>,
}

/// A file's identity on this host: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Identifies the file behind `fd` and checks that holes can be punched into it.
    fn of(fd: &OwnedFd) -> Result<Self> {
        let raw = fd.as_raw_fd();
        // SAFETY: fcntl(F_GETFL) takes no pointer.
        let flags = unsafe { libc::fcntl(raw, libc::F_GETFL) };
        if flags < 0 || flags & libc::O_ACCMODE == libc::O_RDONLY {
            return Err(Error::BadFd {
                what: "region",
                fd: raw,
                expected: "open for writing",
            });
        }
        let mut stat = std::mem::MaybeUninit::<libc::stat64>::zeroed();
        // SAFETY: the buffer is large enough for a stat64, which the call fills.
        if unsafe { libc::fstat64(raw, stat.as_mut_ptr()) } != 0 {
            return Err(Error::last_os("cannot look at a region's file"));
        }
        // SAFETY: zeroed memory is a valid stat64, and the call filled it.
        let stat = unsafe { stat.assume_init() };
        Ok(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        })
    }
}

/// The size of this host's base pages: nothing smaller can be freed.
fn host_page_bytes() -> u64 {
    // SAFETY: sysconf takes an integer and has no side effects.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(BALLOON_PAGE_BYTES)
}

/// The most regions a table may have. Far above what VMMs use, far below what would hurt.
pub const MAX_REGIONS: usize = 4096;

impl GuestMemory {
    /// Checks the regions and makes a table of them.
    ///
    /// # Errors
    /// Refuses misaligned, empty, overflowing and overlapping regions.
    ///
    /// # Safety
    /// Each region has to be mapped at `hva` for `len_bytes`, readable and (unless `readonly`)
    /// writable, until the last reference to the table is gone, and nothing else in this process may
    /// be mapped there: its contents may be discarded. Rust references into it must not exist.
    pub unsafe fn new(mut regions: Vec<Region>) -> Result<Arc<Self>> {
        if regions.is_empty() || regions.len() > MAX_REGIONS {
            return Err(Error::Invalid {
                what: "number of regions",
                value: regions.len() as u64,
                expected: "1 to 4096",
            });
        }
        let host_page = host_page_bytes();
        for region in &mut regions {
            if region.page_size_bytes.is_power_of_two() {
                region.page_size_bytes = region.page_size_bytes.max(host_page);
            }
            region.check()?;
        }
        regions.sort_by_key(|region| region.gpa);
        for (lower, upper) in regions.iter().zip(regions.iter().skip(1)) {
            if lower.end() > upper.gpa.0 {
                return Err(Error::Overlap {
                    first: lower.gpa.0,
                    second: upper.gpa.0,
                });
            }
        }
        // Nothing is ever discarded in read-only regions: their files may be read-only, too.
        let file = |region: &Region| {
            let fd = region.fd.as_ref().filter(|_| !region.readonly);
            fd.map(|fd| FileId::of(fd)).transpose()
        };
        let files = regions.iter().map(file).collect::<Result<_>>()?;
        Ok(Arc::new(Self { regions, files }))
    }

    /// The regions in ascending order of guest address.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The file behind the region at `index`, if it has one.
    #[must_use]
    pub fn file_id(&self, index: usize) -> Option<FileId> {
        self.files.get(index).copied().flatten()
    }

    /// The sum of all regions' lengths.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len_bytes).sum()
    }

    /// The region that holds `gpa`, and its position in [`Self::regions`].
    #[must_use]
    pub fn find(&self, gpa: Gpa) -> Option<(usize, &Region)> {
        let index = self
            .regions
            .partition_point(|region| region.gpa <= gpa)
            .checked_sub(1)?;
        let region = self.regions.get(index)?;
        (gpa.0 < region.end()).then_some((index, region))
    }

    /// The piece of `[gpa, gpa + len)` that lies in the region of `gpa`; shorter than `len` where
    /// the region ends. `None` if `gpa` is in no region.
    #[must_use]
    pub fn slice_prefix(&self, gpa: Gpa, len: u64) -> Option<HostSlice<'_>> {
        let (_, region) = self.find(gpa)?;
        let offset = gpa.0 - region.gpa.0;
        let len = len.min(region.len_bytes - offset);
        let len = usize::try_from(len).ok()?;
        // A region's offsets fit in usize: its end was checked against the address space.
        let address = region.hva + usize::try_from(offset).ok()?;
        // SAFETY: [address, address + len) lies inside a region, which `new`'s caller keeps mapped
        // as long as the table lives; the returned slice borrows the table.
        Some(unsafe { HostSlice::new(address as *mut u8, len) })
    }

    /// The guest address of a host address inside a region, and how many bytes follow it there.
    #[must_use]
    pub fn guest_address_of(&self, hva: usize) -> Option<(Gpa, u64)> {
        // Tables are short and this serves only VMMs that hand over host addresses.
        self.regions.iter().find_map(|region| {
            let offset = (hva as u64).checked_sub(region.hva as u64)?;
            (offset < region.len_bytes)
                .then(|| (Gpa(region.gpa.0 + offset), region.len_bytes - offset))
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A table over ordinary heap memory, for tests that only read and write.
    pub(crate) fn heap_memory(layout: &[(u64, u64)]) -> Arc<GuestMemory> {
        heap_memory_with(layout, |_| ())
    }

    /// The same, with regions that are changed before the table is made.
    pub(crate) fn heap_memory_with(
        layout: &[(u64, u64)],
        change: impl Fn(&mut Region),
    ) -> Arc<GuestMemory> {
        let regions = layout
            .iter()
            .map(|&(gpa, len_bytes)| {
                // Guest memory outlives every test that uses it: the tables are tiny.
                let pages = vec![0u8; len_bytes as usize + 4096].leak();
                let hva = (pages.as_mut_ptr() as usize).next_multiple_of(4096);
                let mut region = Region {
                    gpa: Gpa(gpa),
                    len_bytes,
                    hva,
                    ..anonymous_region()
                };
                change(&mut region);
                region
            })
            .collect();
        // SAFETY: the memory is leaked and nothing refers to it any more.
        unsafe { GuestMemory::new(regions) }.unwrap()
    }

    /// A region whose addresses are still to be filled in.
    pub(crate) fn anonymous_region() -> Region {
        Region {
            gpa: Gpa(0),
            len_bytes: 4096,
            hva: 4096,
            fd: None,
            fd_offset_bytes: 0,
            page_size_bytes: 4096,
            frame_bytes: 0,
            shared: false,
            readonly: false,
            extra: false,
            guest_node: GuestNode(0),
            pinned: false,
            node: None,
        }
    }

    fn refused(regions: Vec<Region>) -> i32 {
        // SAFETY: the table is refused, or never read.
        unsafe { GuestMemory::new(regions) }.unwrap_err().errno()
    }

    #[test]
    fn bad_tables_are_refused_with_distinct_errors() {
        let good = anonymous_region();
        let page = |gpa| Region {
            gpa: Gpa(gpa),
            ..good.clone()
        };
        assert_eq!(refused(vec![]), libc::EINVAL);
        assert_eq!(refused(vec![page(0), page(0)]), libc::EEXIST);
        assert_eq!(refused(vec![page(1)]), libc::EADDRNOTAVAIL);
        assert_eq!(refused(vec![page(u64::MAX - 4095)]), libc::ERANGE);
        assert_eq!(
            refused(vec![Region {
                len_bytes: 0,
                ..page(0)
            }]),
            libc::EINVAL
        );
        assert_eq!(
            refused(vec![Region {
                page_size_bytes: 100,
                ..page(0)
            }]),
            libc::EINVAL
        );
        assert_eq!(
            refused(vec![Region {
                page_size_bytes: 2 << 20,
                ..page(0)
            }]),
            libc::EADDRNOTAVAIL
        );
    }

    #[test]
    fn what_the_device_writes_to_cannot_lie_in_rom() {
        let rom = Region {
            readonly: true,
            ..heap_memory(&[(0, 0x1000)]).regions()[0].clone()
        };
        // SAFETY: the memory behind the region is leaked.
        let memory = unsafe { GuestMemory::new(vec![rom]) }.unwrap();
        assert!(HostArea::new(&memory, "table", Gpa(0), 64, 16).is_ok());
        let refused = HostArea::writable(&memory, "used ring", Gpa(0), 64, 4).unwrap_err();
        assert_eq!(refused.errno(), libc::EROFS);
    }

    #[test]
    fn find_knows_holes_and_edges() {
        let memory = heap_memory(&[(0x10000, 0x2000), (0x20000, 0x1000)]);
        assert!(memory.find(Gpa(0xffff)).is_none());
        assert_eq!(memory.find(Gpa(0x10000)).unwrap().0, 0);
        assert_eq!(memory.find(Gpa(0x11fff)).unwrap().0, 0);
        assert!(memory.find(Gpa(0x12000)).is_none());
        assert_eq!(memory.find(Gpa(0x20fff)).unwrap().0, 1);
        assert!(memory.find(Gpa(u64::MAX)).is_none());
        assert_eq!(memory.slice_prefix(Gpa(0x11ff0), 64).unwrap().len(), 16);
    }

    #[test]
    fn slices_copy_at_any_alignment_and_never_beyond_their_end() {
        let memory = heap_memory(&[(0, 0x1000)]);
        let pattern: Vec<u8> = (0..=255).collect();
        for start in 0..16 {
            let slice = memory.slice_prefix(Gpa(start), 64).unwrap();
            assert_eq!(slice.write(3, &pattern), 61);
            let mut back = [0; 80];
            assert_eq!(slice.read(3, &mut back), 61);
            assert_eq!(back[..61], pattern[..61]);
            assert_eq!(slice.read(64, &mut back), 0);
            assert_eq!(slice.read(usize::MAX, &mut back), 0);
        }
    }
}
