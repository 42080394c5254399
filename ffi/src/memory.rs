//! The guest's memory, as the VMM has it mapped.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::{Outcome, Refusal, call_unit, check_flags, check_reserved};
use crate::fd;
use crate::handle::{self, Handle, Slot};
use crate::versioned::{self, Versioned};
use ::aerostat_device::discard::probe::transparent_frame_bytes;
use ::aerostat_device::memory::{Gpa, GuestNode, MAX_REGIONS, NodeId};
use ::aerostat_device::{GuestMemory, Region};
use std::ffi::{c_int, c_void};
use std::sync::Arc;

/// The region is mapped with MAP_SHARED: discarding has to reach the file behind it.
///
/// Without it the mapping is private, and discarding drops this process's copies of the pages: the guest
/// then finds what is in the file behind them, be it told in fd or not, and zeros only where there is
/// nothing. A private mapping of a file with contents (a snapshot, a template of a guest) has to have
/// AEROSTAT_REGION_PINNED, since drivers count on zeros in pages that they reported.
pub const AEROSTAT_REGION_SHARED: u32 = 1u32 << 0;

/// The region can never be ballooned: ROM, firmware. Its pages are counted as out of range.
pub const AEROSTAT_REGION_READONLY: u32 = 1u32 << 1;

/// The region's pages are pinned, by device assignment for instance: discarding them would free
/// nothing or break the device; or they are private copies of a file's (see AEROSTAT_REGION_SHARED).
/// They can be ballooned, and are counted as skipped_pinned_bytes.
pub const AEROSTAT_REGION_PINNED: u32 = 1u32 << 2;

/// Transparent huge pages of the host may be behind the region (MADV_HUGEPAGE, or a host where they
/// are always used), and are to be kept whole: pages are discarded once all of such a huge page is in
/// the balloon, and counted as held_bytes until then. If the driver may use pages before it takes them
/// back (no AEROSTAT_FEATURE_MUST_TELL_HOST), that has to be in one go: what comes in parts is kept, and
/// counted as skipped_partial_bytes. The same holds for hugetlbfs, and for hosts with larger pages.
///
/// Without it, single pages of a huge page are discarded at once. The host then splits the mapping, so
/// that the guest runs slower, and frees the memory only when the rest of the huge page is gone too, or
/// when it runs short: discarded_bytes runs ahead of what is free. That gives back more in the end from
/// a guest whose free memory is in small pieces. Use the flag where the guest's speed matters more.
///
/// For private anonymous memory; elsewhere, and where the host uses no transparent huge pages, it has
/// no effect: shared memory is split and freed at once.
pub const AEROSTAT_REGION_TRANSPARENT_HUGE: u32 = 1u32 << 3;

/// The guest did not boot with this region: its pages begin in the balloon, and the guest gets them
/// from there as far as aerostat_device_set_extra_grant() lets it (requirements J6, R2). For devices
/// that offer AEROSTAT_MEMBALLOON_FEATURE_EXTRA_MEM. A reset of the device discards what the guest had
/// of it.
pub const AEROSTAT_REGION_EXTRA: u32 = 1u32 << 4;

const REGION_FLAGS: u32 = AEROSTAT_REGION_SHARED
    | AEROSTAT_REGION_READONLY
    | AEROSTAT_REGION_PINNED
    | AEROSTAT_REGION_TRANSPARENT_HUGE
    | AEROSTAT_REGION_EXTRA;

/// An immutable table of a guest's memory regions. A guest whose memory changes gets a new table.
#[derive(Debug)]
pub struct aerostat_memory {
    pub(crate) memory: Arc<GuestMemory>,
}

impl Handle for aerostat_memory {
    const NAME: &'static str = "memory";
}

/// One contiguous piece of guest memory and what backs it; see `AEROSTAT_MEMORY_REGION_INIT`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct aerostat_memory_region {
    /// sizeof(struct aerostat_memory_region); in an array it is also the distance of its elements.
    pub size: u32,
    /// AEROSTAT_REGION_* bits.
    pub flags: u32,
    /// Where the guest sees the region: a guest physical address, a multiple of the page size.
    pub gpa: u64,
    /// How long it is, in bytes: a multiple of the page size, not 0.
    pub len_bytes: u64,
    /// Where this process has it mapped, page aligned. Its contents are going to be discarded.
    pub hva: *mut c_void,
    /// The file behind the mapping (memfd, tmpfs, hugetlbfs, guest_memfd), open for writing unless
    /// the region is read-only; -1 for anonymous memory. Duplicated, so it may be closed after the
    /// call.
    pub fd: i32,
    /// The host NUMA node that the memory is bound to; -1 if it is not bound or not known.
    pub node: i32,
    /// Where in the file the region starts, in bytes: a multiple of the page size.
    pub fd_offset_bytes: u64,
    /// The size of the host's pages behind the region, in bytes. 0 stands for the page size of
    /// hugetlbfs if fd is on it, else for the host's base page size; anonymous MAP_HUGETLB memory
    /// has to tell. Transparent huge pages do not count: see AEROSTAT_REGION_TRANSPARENT_HUGE.
    pub page_size_bytes: u64,
    /// The node of the guest that the region is on, as the guest's platform numbers it (the proximity
    /// domain of ACPI, the numa-node-id of a device tree); 0 for a guest without nodes. For
    /// aerostat_device_set_node_targets() and aerostat_device_query_node().
    pub guest_node: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers and a raw pointer only, the size first.
unsafe impl Versioned for aerostat_memory_region {
    const NAME: &'static str = "aerostat_memory_region";
    const FIRST_BYTES: usize = 56;
}

const _: () = assert!(size_of::<aerostat_memory_region>() == 64, "a 64-bit layout");

/// Makes a table of n_regions memory regions, in any order.
///
/// Returns: 0, or
/// -EINVAL (no region or more than 4096, an unknown flag, an empty region, a page size that is no
/// power of two, elements of different size, a node below -1),
/// -EFAULT (a pointer or an hva is NULL),
/// -EMSGSIZE, -E2BIG (a region's size),
/// -EADDRNOTAVAIL (an address, length or offset is not a multiple of the page size),
/// -ERANGE (a region ends behind the address space, or behind the end of its file),
/// -EEXIST (two regions overlap in guest address space),
/// -EBADF (an fd is not open, not a file that can be mapped, or not open for writing).
/// On failure *out is NULL.
///
/// Lifetime: regions is read during the call only, and descriptors are duplicated. The *mappings*
/// have to stay, with nothing else mapped there, until every device that was given the table has
/// been given another one or is destroyed; destroying the handle does not change that.
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_memory_new(
    regions: *const aerostat_memory_region,
    n_regions: usize,
    out: *mut *mut aerostat_memory,
) -> c_int {
    call_unit(|| {
        // SAFETY: NULL, or writable during this call (the header's rule for pointers).
        let slot = unsafe { Slot::new(out) }?;
        if n_regions == 0 || n_regions > MAX_REGIONS {
            return Err(Refusal::invalid("n_regions", n_regions as u64, "1 to 4096"));
        }
        // SAFETY: NULL, or `n_regions` elements as long as they say (the same rule).
        let regions = unsafe { versioned::read_array(regions, n_regions) }?;
        let regions = regions
            .iter()
            .map(region)
            .collect::<Outcome<Vec<Region>>>()?;
        // SAFETY: the function's contract keeps the mappings until no device uses the table; C code
        // holds no Rust references into them.
        let memory = unsafe { GuestMemory::new(regions) }?;
        slot.fill(aerostat_memory { memory });
        Ok(())
    })
}

/// Gives up a table and sets *memory to NULL. NULL, and a pointer to NULL, are ignored.
///
/// Devices that were given the table go on using it: the mappings have to stay.
///
/// Threads: any; no other thread may be using this handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_memory_destroy(memory: *mut *mut aerostat_memory) {
    // SAFETY: NULL or writable, and the handle's last use (the header's rules for handles).
    unsafe { handle::destroy(memory) }
}

/// Checks what only this side of the boundary can see; the rest is the table's.
fn region(from: &aerostat_memory_region) -> Outcome<Region> {
    check_flags("aerostat_memory_region.flags", from.flags, REGION_FLAGS)?;
    check_reserved("aerostat_memory_region.reserved", from.reserved.into())?;
    if from.hva.is_null() {
        return Err(Refusal::Null("aerostat_memory_region.hva"));
    }
    let readonly = from.flags & AEROSTAT_REGION_READONLY != 0;
    let file = match from.fd {
        fd::NONE => None,
        number => Some(fd::region_file(number, !readonly)?),
    };
    let page_size_bytes = match from.page_size_bytes {
        0 => file
            .as_ref()
            .and_then(|file| file.huge_page_bytes)
            .unwrap_or_else(fd::host_page_bytes),
        told => told,
    };
    if let Some(file) = &file {
        let end = from.fd_offset_bytes.checked_add(from.len_bytes);
        if end.is_none_or(|end| end > file.len_bytes) {
            return Err(Refusal::BehindFile {
                offset: from.fd_offset_bytes,
                len: from.len_bytes,
                file: file.len_bytes,
            });
        }
    }
    let transparent = from.flags & AEROSTAT_REGION_TRANSPARENT_HUGE != 0
        && from.flags & AEROSTAT_REGION_SHARED == 0
        && file.is_none();
    Ok(Region {
        gpa: Gpa(from.gpa),
        len_bytes: from.len_bytes,
        hva: from.hva as usize,
        // Of a read-only region nothing is ever discarded, so its file is not needed any more.
        fd: file.filter(|_| !readonly).map(|file| Arc::new(file.fd)),
        fd_offset_bytes: from.fd_offset_bytes,
        page_size_bytes,
        frame_bytes: if transparent {
            transparent_frame_bytes().unwrap_or(0)
        } else {
            0
        },
        shared: from.flags & AEROSTAT_REGION_SHARED != 0,
        readonly,
        pinned: from.flags & AEROSTAT_REGION_PINNED != 0,
        extra: from.flags & AEROSTAT_REGION_EXTRA != 0,
        node: node(from.node)?,
        guest_node: GuestNode(from.guest_node),
    })
}

/// A node's number, or `None` for -1.
pub(crate) fn node(number: i32) -> Outcome<Option<NodeId>> {
    match u32::try_from(number) {
        Ok(number) => Ok(Some(NodeId(number))),
        Err(_) if number == -1 => Ok(None),
        Err(_) => Err(Refusal::NegativeNode(number)),
    }
}
