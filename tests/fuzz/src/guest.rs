//! The guest's memory: small, of every kind that a table can describe, with a canary in every byte.
//!
//! Each byte of the canary has its highest bit set, so no four bytes of it are the number of a page that
//! exists and no eight an address: whatever names a page was written by the script. Between the
//! regions lie pages that cannot be touched, so an access outside is a fault.
#![allow(
    unsafe_code,
    reason = "maps and reads the memory that the device works on"
)]

use aerostat_device::memory::{Gpa, PfnRange};
use aerostat_device::{GuestMemory, Region};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect};
use std::os::fd::OwnedFd;
use std::ptr::null_mut;
use std::sync::Arc;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Pages of a frame in the region that has frames.
pub const FRAME_PAGES: u64 = 4;

/// What a region is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory.
    Private,
    /// A memfd, mapped shared and handed over.
    File,
    /// A memfd of 16 KiB frames.
    Frames,
    /// Private anonymous memory of 16 KiB frames.
    PrivateFrames,
    /// Mapped without the right to write, as ROM may be.
    Rom,
    /// Pinned: may be ballooned, must not be discarded.
    Pinned,
}

impl Kind {
    /// Whether its pages are discarded in frames.
    #[must_use]
    pub fn has_frames(self) -> bool {
        matches!(self, Self::Frames | Self::PrivateFrames)
    }
}

/// A region: its kind, first page frame number and number of pages.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// What it is made of.
    pub kind: Kind,
    /// Its first page.
    pub first: u64,
    /// How many pages it has.
    pub pages: u64,
}

const fn spec(kind: Kind, first: u64, pages: u64) -> Spec {
    Spec { kind, first, pages }
}

/// The regions in ascending order. The first two touch, in the guest and on the host.
pub const REGIONS: [Spec; 7] = [
    spec(Kind::Private, 0x10, 32),
    spec(Kind::File, 0x30, 12),
    spec(Kind::Frames, 0x80, 12),
    spec(Kind::Rom, 0x90, 2),
    spec(Kind::Pinned, 0x92, 2),
    spec(Kind::PrivateFrames, 0xa0, 8),
    // Ends at 4 GiB.
    spec(Kind::Private, 0xf_fffe, 2),
];

/// All pages that exist.
pub const PAGES: usize = 70;

/// A page of the guest as the harness sees it.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// Its page frame number.
    pub pfn: u64,
    /// The index of its region.
    pub region: usize,
    /// Where it is mapped.
    hva: usize,
}

/// The mapped memory of one guest, and what the script left in it.
#[derive(Debug)]
pub struct Guest {
    pages: Vec<Page>,
    regions: Vec<Region>,
    pristine: Vec<u8>,
    /// The memory as it was when it was last looked at, page by page.
    shadow: Vec<u8>,
    /// The pages whose shadow may be something else than the canary.
    written: [bool; PAGES],
}

/// The canary of the byte at `offset` of the page with index `page`.
fn canary(page: usize, offset: usize) -> u8 {
    let mixed = (page * 31 + offset / 64 * 7 + offset) % 127;
    0x80 | u8::try_from(mixed).unwrap_or(0)
}

impl Guest {
    /// Maps the memory.
    #[must_use]
    pub fn new() -> Self {
        let mut guest = Self {
            pages: Vec::new(),
            regions: Vec::new(),
            pristine: Vec::with_capacity(PAGES * PAGE),
            shadow: Vec::new(),
            written: [false; PAGES],
        };
        for page in 0..PAGES {
            guest
                .pristine
                .extend((0..PAGE).map(|offset| canary(page, offset)));
        }
        guest.shadow = guest.pristine.clone();
        let mut at = reserve();
        for (index, spec) in REGIONS.iter().enumerate() {
            let region = map(spec, at);
            for number in 0..spec.pages {
                let hva = at + usize::try_from(number).unwrap_or(0) * PAGE;
                guest.pages.push(Page {
                    pfn: spec.first + number,
                    region: index,
                    hva,
                });
            }
            at += usize::try_from(region.len_bytes).unwrap_or(0);
            // Only the first two regions touch; a gap of 16 KiB keeps frames aligned.
            if index > 0 {
                at = (at + PAGE).next_multiple_of(4 * PAGE);
            }
            guest.regions.push(region);
        }
        assert_eq!(guest.pages.len(), PAGES, "the pages of all regions");
        for index in 0..PAGES {
            if guest.kind(index) == Kind::Rom {
                // SAFETY: the page is this guest's own; its region is made writable for a moment.
                unsafe { protect(guest.pages[index].hva, true) };
            }
            guest.restore(index);
            if guest.kind(index) == Kind::Rom {
                // SAFETY: as above.
                unsafe { protect(guest.pages[index].hva, false) };
            }
        }
        guest
    }

    /// The canary everywhere again.
    pub fn refill(&mut self) {
        for index in 0..PAGES {
            if self.page(index) != self.pristine[index * PAGE..][..PAGE] {
                self.restore(index);
            }
        }
        self.shadow.copy_from_slice(&self.pristine);
        self.written = [false; PAGES];
    }

    fn restore(&self, index: usize) {
        let from = &self.pristine[index * PAGE..][..PAGE];
        // SAFETY: a page of the guest's own mapping, which no reference covers.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.pages[index].hva as *mut u8, PAGE)
        };
    }

    /// All pages.
    #[must_use]
    pub fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// The kind of the page with that index.
    #[must_use]
    pub fn kind(&self, index: usize) -> Kind {
        REGIONS[self.pages[index].region].kind
    }

    /// The kind of the page that holds `gpa`, if there is one.
    #[must_use]
    pub fn kind_at(&self, gpa: u64) -> Option<Kind> {
        self.index_of(gpa).map(|index| self.kind(index))
    }

    /// The index of the page that holds `gpa`.
    #[must_use]
    pub fn index_of(&self, gpa: u64) -> Option<usize> {
        self.pages
            .iter()
            .position(|page| page.pfn == gpa / PAGE as u64)
    }

    /// The contents of a page now.
    #[must_use]
    pub fn page(&self, index: usize) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        // SAFETY: a page of the guest's own mapping; devices are served by this thread, so nobody
        // writes meanwhile, and no reference covers it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.pages[index].hva as *const u8,
                bytes.as_mut_ptr(),
                PAGE,
            );
        }
        bytes
    }

    /// Whether a page holds what it held when it was last looked at.
    #[must_use]
    pub fn is_as_seen(&self, index: usize) -> bool {
        // SAFETY: a page of the guest's own mapping; devices are served by this thread, so nobody
        // writes while the reference lives, which is until the end of this function.
        let now = unsafe { std::slice::from_raw_parts(self.pages[index].hva as *const u8, PAGE) };
        now == self.seen(index)
    }

    /// What a page held when it was last looked at.
    #[must_use]
    pub fn seen(&self, index: usize) -> &[u8] {
        &self.shadow[index * PAGE..][..PAGE]
    }

    /// Stretches of what was seen that hold all which may be something else than the canary, with
    /// `around` bytes of what lies before and behind.
    pub fn seen_other_than_canary(&self, around: usize) -> impl Iterator<Item = &[u8]> {
        let mut pages = 0..PAGES;
        std::iter::from_fn(move || {
            let first = pages.find(|page| self.written[*page])?;
            let end = pages.find(|page| !self.written[*page]).unwrap_or(PAGES);
            let until = (end * PAGE + around).min(self.shadow.len());
            self.shadow
                .get((first * PAGE).saturating_sub(around)..until)
        })
    }

    /// Notes what a page holds now.
    pub fn see(&mut self, index: usize, bytes: &[u8; PAGE]) {
        self.shadow[index * PAGE..][..PAGE].copy_from_slice(bytes);
        self.written[index] = true;
    }

    /// The driver writes; what is outside memory, or in ROM, is left out.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        let mut done = 0;
        while let (Some(rest), Some(at)) = (bytes.get(done..), gpa.checked_add(done as u64)) {
            let offset = usize::try_from(at % PAGE as u64).unwrap_or(0);
            let count = rest.len().min(PAGE - offset);
            if count == 0 {
                return;
            }
            done += count;
            let index = self.index_of(at);
            let Some(index) = index.filter(|index| self.kind(*index) != Kind::Rom) else {
                continue;
            };
            let to = (self.pages[index].hva + offset) as *mut u8;
            // SAFETY: `count` bytes inside a writable page of the guest's own mapping, which no
            // reference covers.
            unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), to, count) };
            self.shadow[index * PAGE + offset..][..count].copy_from_slice(&rest[..count]);
            self.written[index] = true;
        }
    }

    /// The driver reads a number of 16 bits; 0 outside memory.
    #[must_use]
    pub fn read_u16(&self, gpa: u64) -> u16 {
        let byte = |at: u64| {
            let index = self.index_of(at)?;
            self.page(index)
                .get(usize::try_from(at).ok()? % PAGE)
                .copied()
        };
        u16::from_le_bytes([byte(gpa).unwrap_or(0), byte(gpa + 1).unwrap_or(0)])
    }

    /// The host address of a guest address, and how many bytes are mapped from there on.
    #[must_use]
    pub fn host(&self, gpa: u64) -> Option<(usize, usize)> {
        let index = self.index_of(gpa)?;
        let page = &self.pages[index];
        let offset = usize::try_from(gpa).ok()? % PAGE;
        let mut end = page.hva + PAGE;
        for next in &self.pages[index + 1..] {
            if next.hva != end {
                break;
            }
            end += PAGE;
        }
        Some((page.hva + offset, end - page.hva - offset))
    }

    /// A table of the regions whose bits are set; at least the first. With `pin`, all are pinned.
    #[must_use]
    pub fn table(&self, regions: u8, pin: bool) -> Arc<GuestMemory> {
        self.table_of(regions, pin, 0)
    }

    /// A table of the regions whose bits are set, of which the guest did not boot with those that are set in
    /// `extra`.
    #[must_use]
    pub fn table_with(&self, regions: u8, extra: u8) -> Arc<GuestMemory> {
        self.table_of(regions, false, extra)
    }

    fn table_of(&self, regions: u8, pin: bool, extra: u8) -> Arc<GuestMemory> {
        let chosen = self.regions.iter().enumerate();
        let chosen = chosen.filter(|(index, _)| *index == 0 || regions & (1 << index) != 0);
        let chosen = chosen.map(|(index, region)| Region {
            pinned: pin || region.pinned,
            extra: extra & (1 << index) != 0,
            ..region.clone()
        });
        // SAFETY: the mappings stay for the life of the process, nothing else is mapped there, and
        // the harness keeps addresses only.
        unsafe { GuestMemory::new(chosen.collect()) }.expect("a table that is right")
    }

    /// Whether all of a range is guest memory.
    #[must_use]
    pub fn exists(&self, range: PfnRange) -> bool {
        let page = PAGE as u64;
        (range.start.0..range.end.0).all(|pfn| self.index_of(pfn.saturating_mul(page)).is_some())
    }

    /// Whether a range may be in the balloon: it lies in one region, and not in ROM.
    #[must_use]
    pub fn may_hold(&self, range: PfnRange) -> bool {
        REGIONS.iter().any(|spec| {
            let end = spec.first + spec.pages;
            spec.kind != Kind::Rom && range.start.0 >= spec.first && range.end.0 <= end
        })
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

/// Address space that nothing else uses, aligned to frames.
fn reserve() -> usize {
    const BYTES: usize = 4 << 20;
    // SAFETY: the kernel chooses the place, so no mapping of this process is touched.
    let place = unsafe { mmap_anonymous(null_mut(), BYTES, ProtFlags::empty(), MapFlags::PRIVATE) };
    (place.expect("address space") as usize + PAGE).next_multiple_of(4 * PAGE)
}

/// Maps a region at `at`, inside what [`reserve`] returned.
fn map(spec: &Spec, at: usize) -> Region {
    let bytes = usize::try_from(spec.pages).unwrap_or(0) * PAGE;
    let both = ProtFlags::READ | ProtFlags::WRITE;
    let shared = matches!(spec.kind, Kind::File | Kind::Frames);
    let fd = shared.then(|| memfd(spec.pages * PAGE as u64));
    let place = at as *mut std::ffi::c_void;
    // SAFETY: replaces a part of the reserved space, which nobody has a pointer into yet.
    let mapped = unsafe {
        match &fd {
            Some(fd) => mmap(
                place,
                bytes,
                both,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                0,
            ),
            None => mmap_anonymous(place, bytes, both, MapFlags::PRIVATE | MapFlags::FIXED),
        }
    };
    assert_eq!(mapped.expect("guest memory"), place, "a fixed place");
    if spec.kind == Kind::Rom {
        for page in 0..bytes / PAGE {
            // SAFETY: a page that was just mapped.
            unsafe { protect(at + page * PAGE, false) };
        }
    }
    Region {
        gpa: Gpa(spec.first * PAGE as u64),
        len_bytes: spec.pages * PAGE as u64,
        hva: at,
        fd: fd.map(Arc::new),
        fd_offset_bytes: 0,
        page_size_bytes: match spec.kind {
            kind if kind.has_frames() => FRAME_PAGES * PAGE as u64,
            _ => PAGE as u64,
        },
        frame_bytes: 0,
        shared,
        readonly: spec.kind == Kind::Rom,
        extra: false,
        guest_node: aerostat_device::GuestNode(0),
        pinned: spec.kind == Kind::Pinned,
        node: None,
    }
}

fn memfd(bytes: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&fd, bytes).expect("room in a memfd");
    fd
}

/// Makes a page writable, or read-only.
///
/// # Safety
/// The page is the guest's own.
unsafe fn protect(hva: usize, writable: bool) {
    let mut flags = MprotectFlags::READ;
    flags.set(MprotectFlags::WRITE, writable);
    // SAFETY: the caller's promise; no reference covers the page.
    unsafe { mprotect(hva as *mut std::ffi::c_void, PAGE, flags) }.expect("mprotect");
}
