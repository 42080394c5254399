//! A guest's memory: regions in its address space, and every access the test makes to it.
//!
//! Driver, device and test see the same bytes at the same time, so accesses are relaxed atomics
//! through raw pointers; an address that the guest has not got is an error of the test.
#![allow(unsafe_code, reason = "reads and writes guest memory")]

use super::PAGE_BYTES;
use super::error::{Result, VmmError};
use super::mapping::{Backing, Mapping};
use aerostat::{
    AEROSTAT_REGION_EXTRA, AEROSTAT_REGION_PINNED, AEROSTAT_REGION_READONLY,
    AEROSTAT_REGION_SHARED, AEROSTAT_REGION_TRANSPARENT_HUGE, aerostat_memory_region,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

/// One region to be made.
#[derive(Clone, Copy, Debug)]
pub struct RegionSpec {
    /// Where the guest sees it.
    pub gpa: u64,
    /// How long it is.
    pub len_bytes: u64,
    /// What is behind it.
    pub backing: Backing,
    /// What the library is told of its page size; 0 lets it find out.
    pub page_size_bytes: u64,
    /// Told to the library: never to be ballooned.
    pub readonly: bool,
    /// Told to the library: not to be discarded.
    pub pinned: bool,
    /// Told to the library: its pages begin in the balloon.
    pub extra: bool,
    /// Told to the library: the host node, or -1.
    pub node: i32,
    /// Told to the library: the guest's node.
    pub guest_node: u32,
    /// The host node that the memory is really bound to, if it is.
    pub bound: Option<u32>,
    /// Told to the library: keep transparent huge pages whole.
    pub transparent_huge: bool,
}

impl RegionSpec {
    /// An ordinary region.
    #[must_use]
    pub fn new(gpa: u64, len_bytes: u64, backing: Backing) -> Self {
        Self {
            gpa,
            len_bytes,
            backing,
            page_size_bytes: 0,
            readonly: false,
            pinned: false,
            extra: false,
            node: -1,
            guest_node: 0,
            bound: None,
            transparent_huge: false,
        }
    }
}

/// A region and its mapping.
#[derive(Clone, Debug)]
struct Region {
    spec: RegionSpec,
    mapping: Arc<Mapping>,
}

/// The memory of one guest. A guest whose memory changes gets a new value that shares the mappings
/// of the regions that stay.
#[derive(Clone, Debug)]
pub struct GuestRam {
    name: &'static str,
    regions: Vec<Region>,
}

impl GuestRam {
    /// Maps all regions; memfds are called `name`.
    ///
    /// # Errors
    /// The host has not got the memory.
    pub fn new(name: &'static str, specs: &[RegionSpec]) -> Result<Self> {
        let mut ram = Self {
            name,
            regions: Vec::new(),
        };
        for spec in specs {
            ram = ram.with(*spec)?;
        }
        Ok(ram)
    }

    /// The same memory and one region more.
    ///
    /// # Errors
    /// The host has not got the memory.
    pub fn with(&self, spec: RegionSpec) -> Result<Self> {
        let mut regions = self.regions.clone();
        let mapping = Arc::new(Mapping::new(self.name, spec.backing, spec.len_bytes)?);
        if let Some(node) = spec.bound {
            mapping.bind(node)?;
        }
        regions.push(Region { spec, mapping });
        regions.sort_by_key(|region| region.spec.gpa);
        let name = self.name;
        Ok(Self { name, regions })
    }

    /// The same memory without the region at `gpa`.
    #[must_use]
    pub fn without(&self, gpa: u64) -> Self {
        let mut regions = self.regions.clone();
        regions.retain(|region| region.spec.gpa != gpa);
        let name = self.name;
        Self { name, regions }
    }

    /// What was asked for, in ascending order of guest address.
    pub fn specs(&self) -> impl Iterator<Item = &RegionSpec> {
        self.regions.iter().map(|region| &region.spec)
    }

    /// The regions as the library is told of them.
    #[must_use]
    pub fn table(&self) -> Vec<aerostat_memory_region> {
        let entry = |region: &Region| {
            let flag = |set: bool, bit: u32| if set { bit } else { 0 };
            let (spec, mapping) = (&region.spec, &region.mapping);
            aerostat_memory_region {
                size: u32::try_from(size_of::<aerostat_memory_region>()).unwrap_or(0),
                flags: flag(mapping.is_shared(), AEROSTAT_REGION_SHARED)
                    | flag(spec.readonly, AEROSTAT_REGION_READONLY)
                    | flag(spec.pinned, AEROSTAT_REGION_PINNED)
                    | flag(spec.transparent_huge, AEROSTAT_REGION_TRANSPARENT_HUGE)
                    | flag(spec.extra, AEROSTAT_REGION_EXTRA),
                gpa: spec.gpa,
                len_bytes: spec.len_bytes,
                hva: mapping.base().cast(),
                fd: mapping.fd(),
                node: spec.node,
                fd_offset_bytes: match spec.backing {
                    Backing::Memfd { offset_bytes } => offset_bytes,
                    _ => 0,
                },
                page_size_bytes: spec.page_size_bytes,
                guest_node: spec.guest_node,
                reserved: 0,
            }
        };
        self.regions.iter().map(entry).collect()
    }

    /// The sum of all regions.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.specs().map(|spec| spec.len_bytes).sum()
    }

    /// The guest's node that a page is on.
    #[must_use]
    pub fn node_of(&self, pfn: u64) -> Option<u32> {
        let gpa = pfn * PAGE_BYTES;
        let mut specs = self.specs();
        let spec = specs.find(|spec| (spec.gpa..spec.gpa + spec.len_bytes).contains(&gpa))?;
        Some(spec.guest_node)
    }

    /// Every page frame number of the guest, in ascending order.
    pub fn pfns(&self) -> impl Iterator<Item = u64> + '_ {
        self.specs()
            .flat_map(|spec| spec.gpa / PAGE_BYTES..(spec.gpa + spec.len_bytes) / PAGE_BYTES)
    }

    /// How much host memory is allocated behind all of it; see [`Mapping::allocated_bytes`].
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn allocated_bytes(&self) -> Result<u64> {
        let regions = self.regions.iter();
        regions.map(|region| region.mapping.allocated_bytes()).sum()
    }

    /// How much of that is behind the region at `gpa`.
    ///
    /// # Errors
    /// There is no such region, or the kernel does not tell.
    pub fn allocated_bytes_at(&self, gpa: u64) -> Result<u64> {
        let mut regions = self.regions.iter();
        let region = regions.find(|region| region.spec.gpa == gpa);
        let region = region.ok_or(VmmError::Absent("region there"))?;
        region.mapping.allocated_bytes()
    }

    /// The host address of `len` bytes at `gpa`, if they lie in one region.
    #[must_use]
    pub fn host_address(&self, gpa: u64, len: u64) -> Option<*mut u8> {
        let region = self.regions.iter().find(|region| {
            let spec = &region.spec;
            gpa.checked_sub(spec.gpa)
                .and_then(|offset| offset.checked_add(len))
                .is_some_and(|end| end <= spec.len_bytes)
        })?;
        let offset = usize::try_from(gpa - region.spec.gpa).ok()?;
        // The offset was checked against the mapping's length.
        Some(region.mapping.base().wrapping_add(offset))
    }

    /// The host address, where a test asks for memory that the guest has.
    ///
    /// # Panics
    /// If the guest has not got it.
    #[track_caller]
    fn at(&self, gpa: u64, len: usize) -> *mut u8 {
        let address = self.host_address(gpa, len as u64);
        address.unwrap_or_else(|| outside(gpa, len))
    }

    /// Reads bytes.
    #[track_caller]
    pub fn read(&self, gpa: u64, into: &mut [u8]) {
        let base = self.at(gpa, into.len());
        for (index, byte) in into.iter_mut().enumerate() {
            // SAFETY: `at` checked that all bytes lie in a mapping that `self` keeps alive; an
            // AtomicU8 has no alignment, and atomics may be shared with whoever else writes.
            *byte = unsafe { AtomicU8::from_ptr(base.add(index)) }.load(Ordering::Relaxed);
        }
    }

    /// Writes bytes.
    #[track_caller]
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        let base = self.at(gpa, bytes.len());
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: as for reading.
            unsafe { AtomicU8::from_ptr(base.add(index)) }.store(*byte, Ordering::Relaxed);
        }
    }

    /// Loads a 16-bit field of a ring, acquiring what was written before it.
    #[track_caller]
    pub fn load_u16(&self, gpa: u64) -> u16 {
        assert!(gpa.is_multiple_of(2), "a ring's field is aligned");
        // SAFETY: inside a live mapping (`at`), and aligned since mappings are.
        let field = unsafe { AtomicU16::from_ptr(self.at(gpa, 2).cast()) };
        u16::from_le(field.load(Ordering::Acquire))
    }

    /// Stores a 16-bit field of a ring, releasing what was written before.
    #[track_caller]
    pub fn store_u16(&self, gpa: u64, value: u16) {
        assert!(gpa.is_multiple_of(2), "a ring's field is aligned");
        // SAFETY: as for loading.
        let field = unsafe { AtomicU16::from_ptr(self.at(gpa, 2).cast()) };
        field.store(value.to_le(), Ordering::Release);
    }

    /// Loads 32 bits, little-endian.
    #[track_caller]
    pub fn load_u32(&self, gpa: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(gpa, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes all words of a page; `word` says which.
    #[track_caller]
    pub fn fill_page(&self, pfn: u64, word: impl Fn(u64) -> u64) {
        for (slot, index) in self.words(pfn).zip(0..) {
            slot.store(word(index), Ordering::Relaxed);
        }
    }

    /// Whether every word of a page is what `word` says.
    #[track_caller]
    pub fn page_is(&self, pfn: u64, word: impl Fn(u64) -> u64) -> bool {
        self.words(pfn)
            .zip(0..)
            .all(|(slot, index)| slot.load(Ordering::Relaxed) == word(index))
    }

    /// Writes one word of a page, so that the host has to allocate it.
    #[track_caller]
    pub fn touch(&self, pfn: u64) {
        if let Some(word) = self.words(pfn).next() {
            word.store(pfn | 1, Ordering::Relaxed);
        }
    }

    /// A sum that tells pages of different contents apart.
    #[track_caller]
    pub fn page_sum(&self, pfn: u64) -> u64 {
        self.words(pfn).fold(pfn, |sum, word| {
            (sum ^ word.load(Ordering::Relaxed))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
        })
    }

    #[track_caller]
    fn words(&self, pfn: u64) -> impl Iterator<Item = &AtomicU64> {
        let base = self.at(pfn * PAGE_BYTES, 4096).cast::<u64>();
        (0..512).map(move |index| {
            // SAFETY: the page lies inside a mapping that `self` keeps alive, and words of a page
            // are aligned.
            unsafe { AtomicU64::from_ptr(base.add(index)) }
        })
    }

    /// Sums of all pages, for comparing later.
    #[must_use]
    pub fn snapshot(&self) -> Vec<(u64, u64)> {
        self.pfns().map(|pfn| (pfn, self.page_sum(pfn))).collect()
    }

    /// The pages whose contents are not those of `snapshot` any more.
    #[must_use]
    pub fn changed_since(&self, snapshot: &[(u64, u64)]) -> Vec<u64> {
        let changed = snapshot
            .iter()
            .filter(|(pfn, sum)| self.page_sum(*pfn) != *sum);
        changed.map(|(pfn, _)| *pfn).collect()
    }
}

/// An address that a test has got wrong.
#[track_caller]
#[expect(clippy::panic, reason = "the test itself is wrong")]
fn outside(gpa: u64, len: usize) -> *mut u8 {
    panic!("the guest has no {len} bytes at {gpa:#x}")
}
