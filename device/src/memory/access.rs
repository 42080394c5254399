//! Every access to guest memory: bounds are checked, and each read or write is atomic or volatile, as
//! the guest may change every byte at any moment (invariant I3).

use super::{Gpa, GuestMemory};
use crate::error::{Error, Result};
use crate::sync::step;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// A piece of host memory that the guest, or the VMM, may change at any time.
#[derive(Clone, Copy, Debug)]
pub struct HostSlice<'a> {
    ptr: *mut u8,
    len: usize,
    lifetime: PhantomData<&'a GuestMemory>,
}

impl HostSlice<'_> {
    /// Wraps raw memory.
    ///
    /// # Safety
    /// `[ptr, ptr + len)` has to stay mapped for the lifetime `'a`, and writable if [`Self::write`]
    /// is going to be called; no Rust reference may cover any of it.
    #[must_use]
    pub unsafe fn new(ptr: *mut u8, len: usize) -> Self {
        Self {
            ptr,
            len,
            lifetime: PhantomData,
        }
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> usize {
        self.ptr as usize
    }

    /// Copies from `offset` on into `buffer`; returns how many bytes there were to copy.
    ///
    /// Each byte is fetched exactly once, so what is validated afterwards is what was read.
    pub fn read(&self, offset: usize, buffer: &mut [u8]) -> usize {
        let count = buffer.len().min(self.len.saturating_sub(offset));
        let (mut done, address) = (0, (self.ptr as usize).wrapping_add(offset));
        while done < count && (address + done) % 8 != 0 {
            buffer[done] = self.byte(offset + done).load(Ordering::Relaxed);
            done += 1;
        }
        while done + 8 <= count {
            // SAFETY: offset + done + 8 <= len, the address was just aligned to 8, and the memory is
            // mapped as `new` requires; an atomic load is defined even while others write.
            let word = unsafe { AtomicU64::from_ptr(self.ptr.add(offset + done).cast()) };
            buffer[done..done + 8].copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
            done += 8;
        }
        while done < count {
            buffer[done] = self.byte(offset + done).load(Ordering::Relaxed);
            done += 1;
        }
        count
    }

    /// The 16 bytes at `offset` by two loads, each byte fetched once; `None` if they are not all there, or not
    /// aligned to 8 as descriptors are wherever a driver does as it should.
    #[inline]
    pub(crate) fn read_16(&self, offset: usize) -> Option<[u8; 16]> {
        let fits = self.len.checked_sub(16).is_some_and(|last| offset <= last);
        if !fits || !(self.ptr as usize).wrapping_add(offset).is_multiple_of(8) {
            return None;
        }
        let word = |at: usize| {
            // SAFETY: offset + 16 <= len, so `at`, which is offset or offset + 8, has 8 bytes behind it; the
            // address is aligned to 8; the memory is mapped as `new` requires; an atomic load is defined even
            // while others write.
            let word = unsafe { AtomicU64::from_ptr(self.ptr.add(at).cast()) };
            word.load(Ordering::Relaxed).to_ne_bytes()
        };
        let mut bytes = [0; 16];
        let (low, high) = bytes.split_at_mut(8);
        low.copy_from_slice(&word(offset));
        high.copy_from_slice(&word(offset + 8));
        Some(bytes)
    }

    /// Copies `bytes` to `offset`; returns how many fitted.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.len.saturating_sub(offset));
        for (index, byte) in bytes.iter().take(count).enumerate() {
            self.byte(offset + index).store(*byte, Ordering::Relaxed);
        }
        count
    }

    /// The byte at `offset`, which callers have checked to be below `len`.
    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < self.len, "offset checked by the caller");
        // SAFETY: offset < len, and the memory is mapped as `new` requires; an AtomicU8 has no
        // alignment to keep.
        unsafe { AtomicU8::from_ptr(self.ptr.add(offset)) }
    }
}

/// A piece of memory that the VMM hands over with an element.
#[derive(Clone, Copy, Debug)]
pub struct IoVec {
    address: usize,
    len: usize,
}

impl IoVec {
    /// Describes `len` bytes at `address`.
    ///
    /// # Safety
    /// The memory stays mapped, and writable if it is passed as such, until the element's completion
    /// has been collected or [`crate::Device::reset`] has returned.
    #[must_use]
    pub unsafe fn new(address: usize, len: usize) -> Self {
        Self { address, len }
    }

    /// The host address.
    #[must_use]
    pub fn address(&self) -> usize {
        self.address
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory itself, for use while the element is being served.
    pub(crate) fn slice(&self) -> HostSlice<'_> {
        // SAFETY: `new`'s caller keeps it mapped until the element is completed, and only elements
        // that are being served are read.
        unsafe { HostSlice::new(self.address as *mut u8, self.len) }
    }
}

/// Guest memory that a queue keeps for as long as it runs: one contiguous area, with its table.
#[derive(Debug)]
pub(crate) struct HostArea {
    ptr: *mut u8,
    len: usize,
    /// Keeps the mapping's promise alive; see [`GuestMemory::new`].
    _memory: Arc<GuestMemory>,
}

// SAFETY: the area is plain memory that outlives the struct (it holds the table), and every access
// is atomic; which thread makes it does not matter.
unsafe impl Send for HostArea {}

impl HostArea {
    /// The area `[gpa, gpa + len)`, which has to lie in one region and be aligned.
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        what: &'static str,
        gpa: Gpa,
        len: usize,
        align: u64,
    ) -> Result<Self> {
        if !gpa.0.is_multiple_of(align) {
            return Err(Error::Unaligned {
                what,
                value: gpa.0,
                align,
            });
        }
        let outside = Error::OutOfRange {
            what,
            address: gpa.0,
            len: len as u64,
        };
        let Some(slice) = memory
            .slice_prefix(gpa, len as u64)
            .filter(|slice| slice.len() == len)
        else {
            return Err(outside);
        };
        Ok(Self {
            ptr: slice.ptr,
            len,
            _memory: Arc::clone(memory),
        })
    }

    /// As [`Self::new`], for an area that the device writes to: ROM may be mapped without the right to,
    /// and a guest that puts its ring there must not end the process.
    pub(crate) fn writable(
        memory: &Arc<GuestMemory>,
        what: &'static str,
        gpa: Gpa,
        len: usize,
        align: u64,
    ) -> Result<Self> {
        match memory.find(gpa) {
            Some((_, region)) if region.readonly => Err(Error::ReadOnly {
                what,
                address: gpa.0,
            }),
            _ => Self::new(memory, what, gpa, len, align),
        }
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        step();
        let size = size_of::<T>();
        assert!(
            offset.is_multiple_of(size) && offset + size <= self.len,
            "offset derived from ring size"
        );
        self.ptr.wrapping_add(offset).cast()
    }

    /// Loads the little-endian value at `offset`, then orders all later reads behind it.
    pub(crate) fn load_u16_acquire(&self, offset: usize) -> u16 {
        // SAFETY: `at` checked bounds and the offset's alignment; areas start aligned to at least 2
        // (`new`) and stay mapped.
        let value = unsafe { AtomicU16::from_ptr(self.at(offset)) };
        u16::from_le(value.load(Ordering::Acquire))
    }

    /// Loads the little-endian value at `offset`.
    pub(crate) fn load_u16(&self, offset: usize) -> u16 {
        // SAFETY: as in `load_u16_acquire`.
        let value = unsafe { AtomicU16::from_ptr(self.at(offset)) };
        u16::from_le(value.load(Ordering::Relaxed))
    }

    /// Stores the little-endian value at `offset`.
    pub(crate) fn store_u16(&self, offset: usize, value: u16) {
        // SAFETY: as in `load_u16_acquire`.
        let place = unsafe { AtomicU16::from_ptr(self.at(offset)) };
        place.store(value.to_le(), Ordering::Relaxed);
    }

    /// Stores the little-endian value at `offset` after all earlier writes.
    pub(crate) fn store_u16_release(&self, offset: usize, value: u16) {
        // SAFETY: as in `load_u16_acquire`.
        let place = unsafe { AtomicU16::from_ptr(self.at(offset)) };
        place.store(value.to_le(), Ordering::Release);
    }

    /// Stores the little-endian value at `offset`. The area has to be aligned to 4.
    pub(crate) fn store_u32(&self, offset: usize, value: u32) {
        // SAFETY: as in `load_u16_acquire`, for used rings, which `new` aligned to 4.
        let place = unsafe { AtomicU32::from_ptr(self.at(offset)) };
        place.store(value.to_le(), Ordering::Relaxed);
    }

    /// The whole area, for copies.
    pub(crate) fn slice(&self) -> HostSlice<'_> {
        // SAFETY: the area stays mapped while `self` holds the table.
        unsafe { HostSlice::new(self.ptr, self.len) }
    }
}

/// Orders all earlier accesses to guest memory before all later ones, stores before loads too.
pub(crate) fn full_barrier() {
    fence(Ordering::SeqCst);
}
