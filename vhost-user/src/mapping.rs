//! The guest's memory in this process: one shared mapping for each region of the memory table.
//!
//! Specification: vhost-user, "Memory regions description". A region comes with a file and an
//! offset into it; ring addresses are addresses of the front-end's process and are translated
//! through the same table.
#![allow(
    unsafe_code,
    reason = "mappings of guest memory are made and vouched for here"
)]

use crate::message::MemRegion;
use crate::sigbus::Watched;
use aerostat_device::memory::{BALLOON_PAGE_BYTES, Gpa, NodeId};
use aerostat_device::{GuestMemory, Region};
use rustix::fs::{FileType, fstat, fstatfs};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// `f_type` of hugetlbfs (`HUGETLBFS_MAGIC` in linux/magic.h).
const HUGETLBFS_MAGIC: i128 = 0x9584_58f6;

/// `f_type` of file systems whose pages come from another process or machine: 9P, Ceph, CIFS, FUSE, NFS,
/// SMB2. A page of theirs may never come, and the worker that touches it serves other guests, too.
const REMOTE_MAGICS: [i128; 6] = [
    0x0102_1997,
    0x00c3_6400,
    0xff53_4d42,
    0x6573_5546,
    0x6969,
    0xfe53_4d42,
];

/// The most memory that a table may have: as many pages as the balloon's 32-bit page numbers name, 16 TiB. A
/// file may be sparse, so that a large one costs its owner nothing; but its bitmaps, of which a device has two
/// with a bit for each page, cost this process address space (1 GiB of it at most), and memory where they are
/// written.
const MAX_MEMORY_BYTES: u64 = BALLOON_PAGE_BYTES << 32;

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MapError {
    #[error("region at {0:#x} is empty, or its end overflows")]
    Range(u64),
    #[error("region at {gpa:#x}: the descriptor is not a regular file (memfd, tmpfs, hugetlbfs)")]
    NotAFile { gpa: u64 },
    #[error("region at {gpa:#x}: its file system is remote or in user space; use memfd or tmpfs")]
    Remote { gpa: u64 },
    #[error("region at {gpa:#x} ends at {end:#x} of its file, which has {size:#x} bytes")]
    BeyondFile { gpa: u64, end: u64, size: u64 },
    #[error("region at {gpa:#x} and its offset {offset:#x} in the file are aligned differently")]
    Alignment { gpa: u64, offset: u64 },
    #[error("its regions have {0:#x} bytes together; at most {MAX_MEMORY_BYTES:#x} can be served")]
    TooLarge(u64),
    #[error("region at {gpa:#x} cannot be mapped")]
    Map {
        gpa: u64,
        #[source]
        source: Errno,
    },
    #[error("the memory table cannot be used")]
    Table(#[from] aerostat_device::Error),
}

/// A range of this process's address space that goes when this goes.
#[derive(Debug)]
struct Mapping {
    address: usize,
    len: usize,
    /// `None` once it is unmapped.
    watched: Option<Watched>,
}

impl Mapping {
    /// Maps `[offset, offset + len)` of `file`, both multiples of its page size.
    fn new(file: &OwnedFd, offset: u64, len: usize) -> Result<Self, Errno> {
        // SAFETY: the kernel chooses the place, so no mapping of this process is touched.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                // NORESERVE: the guest's huge pages are the front-end's to reserve, not ours.
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                offset,
            )
        }?;
        let address = address as usize;
        // SAFETY: the mapping was just made, and stays until `drop` ends the watch. The guest's
        // memory may be anything at any time, so zeros are as good as what was there.
        let watched = unsafe { Watched::new(address, len) };
        let mapping = Self {
            address,
            len,
            watched,
        };
        // Dropped, and so unmapped, if it cannot be watched.
        match mapping.watched {
            Some(_) => Ok(mapping),
            None => Err(Errno::NFILE),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First, so that nothing is put in the place of what comes there next.
        self.watched = None;
        // SAFETY: the range is this mapping's own; that nothing refers to it any more is what
        // `MemoryTable` sees to, the only place that hands out addresses in it.
        let result = unsafe { munmap(self.address as *mut c_void, self.len) };
        if let Err(error) = result {
            log::error!("munmap of guest memory failed: {error}");
        }
    }
}

/// One region of a front-end's memory table, mapped.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    region: MemRegion,
    /// What the device may use of it: whole pages.
    usable: Option<Region>,
    mapping: Arc<Mapping>,
}

impl Slot {
    /// Checks and maps a region, whose memory is on host node `node` if that is known.
    pub(crate) fn map(
        region: MemRegion,
        file: OwnedFd,
        node: Option<NodeId>,
    ) -> Result<Self, MapError> {
        let gpa = region.gpa;
        let end = check_range(region)?;
        let stat = fstat(&file).map_err(|source| MapError::Map { gpa, source })?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(MapError::NotAFile { gpa });
        }
        let system = fstatfs(&file).map_err(|source| MapError::Map { gpa, source })?;
        if REMOTE_MAGICS.contains(&(i128::from(system.f_type) & 0xffff_ffff)) {
            return Err(MapError::Remote { gpa });
        }
        // Behind the end of its file a mapping is there but touching it kills the process.
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if end > size {
            return Err(MapError::BeyondFile { gpa, end, size });
        }
        let page = page_bytes(&file).map_err(|source| MapError::Map { gpa, source })?;
        let start = region.offset_bytes & !(page - 1);
        let slack = region.offset_bytes - start;
        let len = (slack + region.len_bytes)
            .checked_next_multiple_of(page)
            .and_then(|len| usize::try_from(len).ok())
            .ok_or(MapError::Range(gpa))?;
        let mapping =
            Mapping::new(&file, start, len).map_err(|source| MapError::Map { gpa, source })?;
        let hva = mapping.address as u64 + slack;
        Ok(Self {
            region,
            usable: usable_part(region, hva, page)?.map(|part| Region {
                fd: Some(Arc::new(file)),
                node,
                ..part
            }),
            mapping: Arc::new(mapping),
        })
    }

    /// How long it is, as the front-end says.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.region.len_bytes
    }

    /// Whether it is the region that a front-end names in order to remove it.
    pub(crate) fn is(&self, region: &MemRegion) -> bool {
        // "The region to be removed is identified by its guest address, user address and size".
        (
            self.region.gpa,
            self.region.user_addr,
            self.region.len_bytes,
        ) == (region.gpa, region.user_addr, region.len_bytes)
    }

    /// What the device cannot do with the region, if its operator should hear of that.
    pub(crate) fn flaw(&self) -> Option<String> {
        let flaw = match &self.usable {
            None => "is smaller than a page: not used",
            Some(part) if part.pinned => {
                "does not start on a huge page: its memory cannot be given back"
            }
            Some(_) => return None,
        };
        Some(format!("region at {:#x} {flaw}", self.region.gpa))
    }

    /// Whether the front-end took the memory away under our hands.
    pub(crate) fn is_lost(&self) -> bool {
        let watched = self.mapping.watched.as_ref();
        watched.is_some_and(Watched::is_lost)
    }

    /// The guest address of a front-end's address inside the region.
    fn translate(&self, user_addr: u64) -> Option<Gpa> {
        let offset = user_addr.checked_sub(self.region.user_addr)?;
        (offset < self.region.len_bytes).then(|| Gpa(self.region.gpa + offset))
    }
}

/// The guest address of `user_addr`, an address in the front-end's process.
pub(crate) fn translate(slots: &[Slot], user_addr: u64) -> Option<Gpa> {
    slots.iter().find_map(|slot| slot.translate(user_addr))
}

/// Refuses a table whose regions, of these lengths, are more than a device has bitmaps for.
pub(crate) fn check_total(lens_bytes: impl Iterator<Item = u64>) -> Result<(), MapError> {
    let total = lens_bytes.fold(0, u64::saturating_add);
    if total > MAX_MEMORY_BYTES {
        return Err(MapError::TooLarge(total));
    }
    Ok(())
}

/// Checks that no end overflows; returns where the region ends in its file.
fn check_range(region: MemRegion) -> Result<u64, MapError> {
    let ends = [region.gpa, region.user_addr, region.offset_bytes].map(|start| {
        start
            .checked_add(region.len_bytes)
            .filter(|end| *end <= i64::MAX.unsigned_abs())
    });
    match ends {
        [Some(_), Some(_), Some(end)] if region.len_bytes > 0 => Ok(end),
        _ => Err(MapError::Range(region.gpa)),
    }
}

/// The size of the pages that `file` is made of.
fn page_bytes(file: &OwnedFd) -> Result<u64, Errno> {
    let host_page = rustix::param::page_size() as u64;
    let stat = fstatfs(file)?;
    if i128::from(stat.f_type) & 0xffff_ffff != HUGETLBFS_MAGIC {
        return Ok(host_page);
    }
    Ok(u64::try_from(stat.f_bsize)
        .ok()
        .filter(|size| size.is_power_of_two() && *size >= host_page)
        .unwrap_or(host_page))
}

/// The whole pages of a region. A region whose huge pages cannot be told from its guest addresses
/// is served but never discarded: a part of a huge page would be zeroed and not freed.
fn usable_part(region: MemRegion, hva: u64, page: u64) -> Result<Option<Region>, MapError> {
    let host_page = rustix::param::page_size() as u64;
    let fits = |page: u64| region.gpa % page == region.offset_bytes % page;
    let (page, pinned) = match (fits(page), fits(host_page)) {
        (true, _) => (page, false),
        (false, true) => (host_page, true),
        (false, false) => {
            return Err(MapError::Alignment {
                gpa: region.gpa,
                offset: region.offset_bytes,
            });
        }
    };
    let start = region.gpa.next_multiple_of(page);
    let end = (region.gpa + region.len_bytes) & !(page - 1);
    if start >= end {
        return Ok(None);
    }
    let skipped = start - region.gpa;
    Ok(Some(Region {
        gpa: Gpa(start),
        len_bytes: end - start,
        hva: usize::try_from(hva + skipped).map_err(|_| MapError::Range(region.gpa))?,
        fd: None,
        fd_offset_bytes: region.offset_bytes + skipped,
        page_size_bytes: page,
        frame_bytes: 0,
        shared: true,
        readonly: false,
        extra: false,
        guest_node: aerostat_device::GuestNode(0),
        pinned,
        node: None,
    }))
}

/// A device's memory table together with the mappings that it needs.
#[derive(Debug)]
pub(crate) struct MemoryTable {
    memory: Arc<GuestMemory>,
    mappings: Vec<Arc<Mapping>>,
}

impl MemoryTable {
    /// Makes a table of the usable parts of `slots`.
    pub(crate) fn new(slots: &[Slot]) -> Result<Self, MapError> {
        let regions = slots
            .iter()
            .filter_map(|slot| slot.usable.clone())
            .collect();
        // SAFETY: each region lies inside its slot's mapping (`usable_part` only cuts at its ends),
        // which is shared and writable. The table keeps the mappings, and its `drop` lets go of
        // them only if nobody else has the `GuestMemory`. Nothing else in this process refers to
        // them: only addresses are kept, and those leave this module only in the regions.
        let memory = unsafe { GuestMemory::new(regions) }?;
        Ok(Self {
            memory,
            mappings: slots.iter().map(|slot| Arc::clone(&slot.mapping)).collect(),
        })
    }

    /// The table as the device takes it.
    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Whether a device still refers to it.
    pub(crate) fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.memory) > 1
    }
}

impl Drop for MemoryTable {
    fn drop(&mut self) {
        if self.is_in_use() {
            // Leaking address space is harmless, unmapping what a device may touch is not.
            log::error!("a memory table outlives its session; its mappings stay");
            for mapping in self.mappings.drain(..) {
                std::mem::forget(mapping);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    /// The program does this once, before it maps anything.
    fn install_watch() {
        static INSTALLED: std::sync::Once = std::sync::Once::new();
        INSTALLED.call_once(|| crate::sigbus::install(64).unwrap());
    }

    fn memfd(len: u64) -> OwnedFd {
        install_watch();
        let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len).unwrap();
        file
    }

    fn region(gpa: u64, len_bytes: u64, offset_bytes: u64) -> MemRegion {
        MemRegion {
            gpa,
            len_bytes,
            user_addr: gpa + (1 << 40),
            offset_bytes,
        }
    }

    #[test]
    fn a_table_translates_and_holds_what_was_mapped() {
        let slot = Slot::map(region(0x10_0000, 0x4000, 0x2000), memfd(0x6000), None).unwrap();
        let table = MemoryTable::new(std::slice::from_ref(&slot)).unwrap();
        assert_eq!(table.memory().total_bytes(), 0x4000);
        let slots = [slot];
        assert_eq!(
            translate(&slots, (1 << 40) + 0x10_3fff),
            Some(Gpa(0x10_3fff))
        );
        assert_eq!(translate(&slots, (1 << 40) + 0x10_4000), None);
        assert_eq!(translate(&slots, 0), None);
        let user = Arc::clone(table.memory());
        assert!(table.is_in_use());
        drop(user);
        assert!(!table.is_in_use());
    }

    #[test]
    fn odd_ends_are_cut_to_whole_pages() {
        let slot = Slot::map(region(0x10_0800, 0x3000, 0x800), memfd(0x4000), None).unwrap();
        let usable = slot.usable.unwrap();
        assert_eq!((usable.gpa, usable.len_bytes), (Gpa(0x10_1000), 0x2000));
        assert_eq!(usable.fd_offset_bytes, 0x1000);
        assert_eq!(usable.hva % 0x1000, 0);
        let tiny = Slot::map(region(0x800, 0x700, 0x800), memfd(0x4000), None).unwrap();
        assert!(tiny.usable.is_none() && tiny.flaw().is_some());
    }

    #[test]
    fn a_table_has_at_most_as_many_pages_as_page_numbers_name() {
        let total = |lens: &[u64]| check_total(lens.iter().copied());
        assert!(total(&[1 << 43, 1 << 43]).is_ok());
        assert!(matches!(
            total(&[1 << 43, 1 << 43, 1]),
            Err(MapError::TooLarge(0x1000_0000_0001))
        ));
        assert!(total(&[u64::MAX, u64::MAX]).is_err());
    }

    #[test]
    fn regions_that_lie_are_refused() {
        let refused = |region: MemRegion| Slot::map(region, memfd(0x4000), None).unwrap_err();
        assert!(matches!(
            refused(region(0, 0x5000, 0)),
            MapError::BeyondFile { .. }
        ));
        assert!(matches!(
            refused(region(0, 0x1000, 0x4000)),
            MapError::BeyondFile { .. }
        ));
        assert!(matches!(refused(region(0, 0, 0)), MapError::Range(_)));
        assert!(matches!(
            refused(region(1 << 62, 1 << 63, 0)),
            MapError::Range(_)
        ));
        assert!(matches!(
            refused(region(0x123, 0x2000, 0)),
            MapError::Alignment { .. }
        ));
        let device = std::fs::File::open("/dev/zero").unwrap();
        assert!(matches!(
            Slot::map(region(0, 0x1000, 0), device.into(), None),
            Err(MapError::NotAFile { .. })
        ));
        let read_only = tempfile::NamedTempFile::new().unwrap();
        read_only.as_file().set_len(0x4000).unwrap();
        let file = std::fs::File::open(read_only.path()).unwrap();
        assert!(matches!(
            Slot::map(region(0, 0x1000, 0), file.into(), None),
            Err(MapError::Map { .. })
        ));
    }
}
