//! The split virtqueue (virtio 1.x, section 2.7), device side.
//!
//! The guest may change the rings at any moment: each index and descriptor is fetched once and
//! checked before it is used (S5, S6).

use super::chain::{Chain, Segment};
use super::indirect::{DESC_BYTES, Table};
use super::{RingError, RingFeatures};
use crate::device::QueuePosition;
use crate::error::{Error, Result};
use crate::memory::{Gpa, GuestMemory, HostArea, full_barrier};
use std::sync::Arc;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;
/// Both rings begin with le16 flags and le16 index.
const RING_FLAGS: usize = 0;
const RING_INDEX: usize = 2;
const RING_ENTRIES: usize = 4;
const USED_ENTRY_BYTES: usize = 8;

/// A split ring that is being served.
#[derive(Debug)]
pub(crate) struct SplitRing {
    desc: HostArea,
    avail: HostArea,
    used: HostArea,
    size: u16,
    places: [Gpa; 3],
    position: QueuePosition,
    features: RingFeatures,
    /// Entries written to the used ring that its index does not show yet.
    unpublished: u16,
    /// Where among them the last entry was written, if later buffers may share it (IN_ORDER).
    batch: Option<u16>,
    /// The used index the guest was last asked about, to know whether it wants to be told (2.7.7).
    /// `None` until the first time: then it is told in any case.
    notified_at: Option<u16>,
}

/// A descriptor as it was fetched.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(bytes: [u8; DESC_BYTES]) -> Self {
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            f0,
            f1,
            n0,
            n1,
        ] = bytes;
        Self {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Puts its buffer at the end of the chain; true if that was the last one.
    fn append_to(&self, chain: &mut Chain) -> bool {
        let segment = Segment::Guest {
            gpa: Gpa(self.addr),
            len: self.len,
        };
        chain.push(segment, self.has(DESC_F_WRITE));
        let ends = !self.has(DESC_F_NEXT);
        if ends {
            chain.finish();
        }
        ends
    }
}

/// Follows the rest of a chain through a table, for at most `room` descriptors.
fn walk_indirect(table: &Table<'_>, room: u16, chain: &mut Chain) -> Result<(), RingError> {
    let mut index = 0;
    for _ in 0..room {
        if u32::from(index) >= table.entries() {
            return Err(RingError::DescriptorBeyondTable(index));
        }
        let descriptor = Descriptor::parse(table.read(index.into())?);
        if descriptor.has(DESC_F_INDIRECT) {
            return Err(RingError::NestedIndirect);
        }
        if descriptor.append_to(chain) {
            return Ok(());
        }
        index = descriptor.next;
    }
    Err(RingError::ChainTooLong)
}

impl SplitRing {
    /// Checks where the queue lies and takes it over.
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        size: u16,
        places: [Gpa; 3],
        position: QueuePosition,
        features: RingFeatures,
    ) -> Result<Self> {
        if !size.is_power_of_two() || size > super::MAX_SIZE {
            return Err(Error::Invalid {
                what: "queue size",
                value: u64::from(size),
                expected: "a power of two from 1 to 32768",
            });
        }
        // The event fields behind the rings only exist with EVENT_IDX.
        let event = if features.event_idx { 2 } else { 0 };
        let entries = usize::from(size);
        let avail_bytes = RING_ENTRIES + 2 * entries + event;
        let used_bytes = RING_ENTRIES + USED_ENTRY_BYTES * entries + event;
        let desc_bytes = DESC_BYTES * entries;
        let [desc, avail, used] = places;
        Ok(Self {
            desc: HostArea::new(memory, "descriptor table", desc, desc_bytes, 16)?,
            avail: HostArea::new(memory, "available ring", avail, avail_bytes, 2)?,
            used: HostArea::writable(memory, "used ring", used, used_bytes, 4)?,
            size,
            places,
            position,
            features,
            unpublished: 0,
            batch: None,
            notified_at: None,
        })
    }

    /// The same ring over another memory table.
    pub(crate) fn moved(&self, memory: &Arc<GuestMemory>) -> Result<Self> {
        let mut ring = Self::new(memory, self.size, self.places, self.position, self.features)?;
        ring.notified_at = self.notified_at;
        Ok(ring)
    }

    /// Where serving would go on.
    pub(crate) fn position(&self) -> QueuePosition {
        self.position
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// Whether the guest's index shows a chain.
    pub(crate) fn has_next(&self) -> bool {
        self.avail.load_u16_acquire(RING_INDEX) != self.position.next_avail
    }

    /// Takes the next chain; `Ok(false)` if the guest has none.
    pub(crate) fn pop(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<bool, RingError> {
        let available = self.avail.load_u16_acquire(RING_INDEX);
        let waiting = available.wrapping_sub(self.position.next_avail);
        if waiting == 0 {
            return Ok(false);
        }
        if waiting > self.size {
            return Err(RingError::AvailableIndexJumped(waiting));
        }
        let head = self
            .avail
            .load_u16(RING_ENTRIES + 2 * self.slot(self.position.next_avail));
        self.walk(memory, head, chain)?;
        chain.token = super::token(u64::from(head), chain, self.features);
        self.position.next_avail = self.position.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// Takes back the last [`Self::pop`], of a chain that was not completed.
    pub(crate) fn unpop(&mut self, token: u64) {
        self.position = self.position_before(token);
    }

    /// Where serving would go on if the last chain had not been popped.
    pub(crate) fn position_before(&self, _token: u64) -> QueuePosition {
        QueuePosition {
            next_avail: self.position.next_avail.wrapping_sub(1),
            ..self.position
        }
    }

    /// Follows the chain from `head` on. It has at most as many descriptors as the queue (2.7.5.3.1),
    /// which bounds the work and ends every loop.
    fn walk(&self, memory: &GuestMemory, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.clear();
        let mut index = head;
        for room in (1..=self.size).rev() {
            let descriptor = self.direct(index)?;
            if descriptor.has(DESC_F_INDIRECT) {
                if descriptor.has(DESC_F_NEXT) {
                    return Err(RingError::IndirectWithNext);
                }
                // Its WRITE flag is ignored (2.7.5.3.2).
                let start = Gpa(descriptor.addr);
                let table = Table::new(self.features, memory, start, descriptor.len)?;
                return walk_indirect(&table, room, chain);
            }
            if descriptor.append_to(chain) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(RingError::ChainTooLong)
    }

    fn direct(&self, index: u16) -> Result<Descriptor, RingError> {
        if index >= self.size {
            return Err(RingError::DescriptorBeyondTable(index));
        }
        // The table was checked to lie in one region, and to be aligned.
        let bytes = self.desc.slice().read_16(DESC_BYTES * usize::from(index));
        bytes
            .map(Descriptor::parse)
            .ok_or(RingError::DescriptorBeyondTable(index))
    }

    /// Completes a chain; the guest sees it after [`Self::publish`].
    pub(crate) fn complete(&mut self, token: u64, written: u32) {
        let place = self.batch.take().unwrap_or(self.unpublished);
        let slot = self.slot(self.position.next_used.wrapping_add(place));
        let offset = RING_ENTRIES + USED_ENTRY_BYTES * slot;
        let head = u32::try_from(token & u64::from(u16::MAX)).unwrap_or(u32::MAX);
        self.used.store_u32(offset, head);
        self.used.store_u32(offset + 4, written);
        self.unpublished = self.unpublished.wrapping_add(1);
        if token & super::SHARES_ENTRY != 0 {
            self.batch = Some(place);
        }
    }

    /// Shows all completed chains to the guest at once. Returns whether it wants to be told.
    pub(crate) fn publish(&mut self) -> bool {
        if self.unpublished == 0 {
            return false;
        }
        self.position.next_used = self.position.next_used.wrapping_add(self.unpublished);
        self.unpublished = 0;
        self.batch = None;
        self.used
            .store_u16_release(RING_INDEX, self.position.next_used);
        // The guest writes its wish, then looks at the index; we write the index, then look at the
        // wish. The barrier keeps both from missing each other.
        full_barrier();
        if !self.features.event_idx {
            return self.avail.load_u16(RING_FLAGS) & AVAIL_F_NO_INTERRUPT == 0;
        }
        let event = self
            .avail
            .load_u16(RING_ENTRIES + 2 * usize::from(self.size));
        let new = self.position.next_used;
        let old = self.notified_at.replace(new);
        old.is_none_or(|old| super::passed(event, old, new))
    }

    /// Where the available index is named at which the guest is to kick.
    fn avail_event(&self) -> usize {
        RING_ENTRIES + USED_ENTRY_BYTES * usize::from(self.size)
    }

    /// Asks the guest not to kick while the ring is being served.
    pub(crate) fn suppress_kicks(&mut self) {
        if self.features.event_idx {
            // An index that the guest has passed already (2.7.10).
            let behind = self.position.next_avail.wrapping_sub(1);
            self.used.store_u16_release(self.avail_event(), behind);
        } else {
            self.used.store_u16_release(RING_FLAGS, USED_F_NO_NOTIFY);
        }
    }

    /// Asks the guest to kick again; returns true if chains came in meanwhile, which it may not
    /// kick for.
    pub(crate) fn want_kicks(&mut self) -> bool {
        if self.features.event_idx {
            self.used
                .store_u16_release(self.avail_event(), self.position.next_avail);
        } else {
            self.used.store_u16_release(RING_FLAGS, 0);
        }
        full_barrier();
        self.has_next()
    }
}

#[cfg(test)]
#[path = "split_tests.rs"]
mod tests;
