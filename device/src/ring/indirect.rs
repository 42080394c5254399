//! Indirect descriptor tables, which both layouts have (virtio 1.x, sections 2.7.5.3 and 2.8.7).

use super::{RingError, RingFeatures};
use crate::memory::{Gpa, GuestMemory, HostSlice};

/// A descriptor takes this many bytes in both layouts.
pub(super) const DESC_BYTES: usize = 16;
const ENTRY: u32 = 16;

/// A table that a descriptor points to. It may lie anywhere in guest memory, across regions too.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<'a> {
    memory: &'a GuestMemory,
    start: Gpa,
    entries: u32,
    /// As much of it as lies in the region of its start: mostly all, so that it is looked up only once.
    near: Option<HostSlice<'a>>,
}

impl<'a> Table<'a> {
    /// The table of `len` bytes at `start`.
    pub(super) fn new(
        features: RingFeatures,
        memory: &'a GuestMemory,
        start: Gpa,
        len: u32,
    ) -> Result<Self, RingError> {
        if !features.indirect {
            return Err(RingError::IndirectNotNegotiated);
        }
        if len == 0 || !len.is_multiple_of(ENTRY) {
            return Err(RingError::IndirectLength(len));
        }
        Ok(Self {
            memory,
            start,
            entries: len / ENTRY,
            near: memory.slice_prefix(start, u64::from(len)),
        })
    }

    /// How many descriptors it has.
    pub(super) fn entries(&self) -> u32 {
        self.entries
    }

    /// Fetches one entry, each byte once.
    #[inline]
    pub(super) fn read(&self, index: u32) -> Result<[u8; DESC_BYTES], RingError> {
        let offset = u64::from(ENTRY) * u64::from(index);
        let near = usize::try_from(offset).unwrap_or(usize::MAX);
        match self.near.and_then(|slice| slice.read_16(near)) {
            Some(bytes) => Ok(bytes),
            None => self.read_across(offset, near),
        }
    }

    /// The same for an entry that no single aligned read gets: between regions, or where no driver
    /// would put it.
    #[cold]
    fn read_across(&self, offset: u64, near: usize) -> Result<[u8; DESC_BYTES], RingError> {
        let mut bytes = [0; DESC_BYTES];
        let mut done = self.near.map_or(0, |slice| slice.read(near, &mut bytes));
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let start = self.start.0.checked_add(offset + done as u64);
            let count = start
                .and_then(|start| {
                    let slice = self.memory.slice_prefix(Gpa(start), rest.len() as u64)?;
                    Some(slice.read(0, rest))
                })
                .unwrap_or(0);
            if count == 0 {
                return Err(RingError::IndirectOutsideMemory);
            }
            done += count;
        }
        Ok(bytes)
    }
}
