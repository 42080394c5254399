//! Indirect descriptor tables, which both layouts have (virtio 1.x, sections 2.7.5.3 and 2.8.7).

use super::{RingError, RingFeatures};
use crate::memory::{Gpa, GuestMemory};

/// A descriptor takes this many bytes in both layouts.
pub(super) const DESC_BYTES: usize = 16;
const ENTRY: u32 = 16;

/// A table that a descriptor points to. It may lie anywhere in guest memory, across regions too.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    start: Gpa,
    entries: u32,
}

impl Table {
    /// The table of `len` bytes at `start`.
    pub(super) fn new(features: RingFeatures, start: Gpa, len: u32) -> Result<Self, RingError> {
        if !features.indirect {
            return Err(RingError::IndirectNotNegotiated);
        }
        if len == 0 || !len.is_multiple_of(ENTRY) {
            return Err(RingError::IndirectLength(len));
        }
        Ok(Self {
            start,
            entries: len / ENTRY,
        })
    }

    /// How many descriptors it has.
    pub(super) fn entries(&self) -> u32 {
        self.entries
    }
}

/// Fetches one entry, each byte once.
pub(super) fn read(
    memory: &GuestMemory,
    table: &Table,
    index: u32,
) -> Result<[u8; DESC_BYTES], RingError> {
    let mut bytes = [0; DESC_BYTES];
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let offset = u64::from(ENTRY) * u64::from(index) + done as u64;
        let count = table
            .start
            .0
            .checked_add(offset)
            .and_then(|start| memory.slice_prefix(Gpa(start), rest.len() as u64))
            .map_or(0, |slice| slice.read(0, rest));
        if count == 0 {
            return Err(RingError::IndirectOutsideMemory);
        }
        done += count;
    }
    Ok(bytes)
}
