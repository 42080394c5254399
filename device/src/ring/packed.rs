//! The packed virtqueue (virtio 1.x, section 2.8), device side.
//!
//! One ring of descriptors that the driver marks as available and the device as used, each with a wrap
//! counter that tells this lap's marks from the last one's. As in the split layout, each descriptor is
//! fetched once and checked before it is used (S5, S6).

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
const DESC_F_AVAIL: u16 = 1 << 7;
const DESC_F_USED: u16 = 1 << 15;
/// Offsets in a descriptor.
const DESC_LEN: usize = 8;
const DESC_ID: usize = 12;
const DESC_FLAGS: usize = 14;
/// An event suppression area: le16 offset and wrap counter, le16 flags (2.8.14).
const EVENT_BYTES: usize = 4;
const EVENT_OFFSET: usize = 0;
const EVENT_FLAGS: usize = 2;
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;
/// The wrap counter in an offset, and in a position.
const WRAP: u16 = 1 << 15;

/// A place in the ring: the slot, and the lap's wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    slot: u16,
    wrap: bool,
}

impl Place {
    /// From `slot | wrap << 15`.
    fn unpack(packed: u16) -> Self {
        Self {
            slot: packed & !WRAP,
            wrap: packed & WRAP != 0,
        }
    }

    fn pack(self) -> u16 {
        self.slot | if self.wrap { WRAP } else { 0 }
    }

    /// The place `by` slots on; `by` is at most `size`.
    fn forward(self, by: u16, size: u16) -> Self {
        // Sizes are at most 32768, so the sum of a slot and a count fits.
        let slot = u32::from(self.slot) + u32::from(by);
        match slot
            .checked_sub(u32::from(size))
            .and_then(|slot| u16::try_from(slot).ok())
        {
            Some(slot) => Self {
                slot,
                wrap: !self.wrap,
            },
            None => Self {
                slot: self.slot + by,
                ..self
            },
        }
    }

    /// The place `by` slots back.
    fn back(self, by: u16, size: u16) -> Self {
        match self.slot.checked_sub(by) {
            Some(slot) => Self { slot, ..self },
            None => Self {
                slot: self.slot.wrapping_add(size).wrapping_sub(by),
                wrap: !self.wrap,
            },
        }
    }
}

/// A packed ring that is being served.
#[derive(Debug)]
pub(crate) struct PackedRing {
    desc: HostArea,
    /// Written by the driver: when it wants to be told.
    driver: HostArea,
    /// Written by the device: when it wants to be kicked.
    device: HostArea,
    size: u16,
    features: RingFeatures,
    next_avail: Place,
    next_used: Place,
    /// Where the first completion lies that is not published, its flags, and the place behind the last.
    unpublished: Option<(Place, u16, Place)>,
    /// Where the last of them was written, if later buffers may share it (IN_ORDER).
    batch: Option<Place>,
    /// The used slot at the last notification; `None` after a wrap, and at first: then it is told.
    notified_at: Option<u16>,
    places: [Gpa; 3],
}

impl PackedRing {
    /// Checks where the queue lies and takes it over.
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        size: u16,
        places: [Gpa; 3],
        position: QueuePosition,
        features: RingFeatures,
    ) -> Result<Self> {
        if size == 0 || size > super::MAX_SIZE {
            return Err(Error::Invalid {
                what: "queue size",
                value: u64::from(size),
                expected: "from 1 to 32768",
            });
        }
        let place = |what, packed: u16| {
            let place = Place::unpack(packed);
            let value = u64::from(packed);
            let expected = "a slot of the ring, with the wrap counter in bit 15";
            (place.slot < size).then_some(place).ok_or(Error::Invalid {
                what,
                value,
                expected,
            })
        };
        let [desc, driver, device] = places;
        Ok(Self {
            desc: HostArea::writable(
                memory,
                "descriptor ring",
                desc,
                DESC_BYTES * usize::from(size),
                16,
            )?,
            driver: HostArea::new(memory, "driver event area", driver, EVENT_BYTES, 4)?,
            device: HostArea::writable(memory, "device event area", device, EVENT_BYTES, 4)?,
            size,
            features,
            next_avail: place("next_avail", position.next_avail)?,
            next_used: place("next_used", position.next_used)?,
            unpublished: None,
            batch: None,
            notified_at: None,
            places,
        })
    }

    /// The same ring over another memory table.
    pub(crate) fn moved(&self, memory: &Arc<GuestMemory>) -> Result<Self> {
        let mut ring = Self::new(
            memory,
            self.size,
            self.places,
            self.position(),
            self.features,
        )?;
        ring.notified_at = self.notified_at;
        Ok(ring)
    }

    /// Where serving would go on.
    pub(crate) fn position(&self) -> QueuePosition {
        QueuePosition {
            next_avail: self.next_avail.pack(),
            next_used: self.next_used.pack(),
        }
    }

    fn offset(slot: u16) -> usize {
        DESC_BYTES * usize::from(slot)
    }

    /// The flags at `place` if the driver has made that descriptor available in this lap.
    fn available(&self, place: Place) -> Option<u16> {
        let flags = self
            .desc
            .load_u16_acquire(Self::offset(place.slot) + DESC_FLAGS);
        let (avail, used) = (flags & DESC_F_AVAIL != 0, flags & DESC_F_USED != 0);
        (avail == place.wrap && used != place.wrap).then_some(flags)
    }

    /// Whether the driver has made a chain available.
    pub(crate) fn has_next(&self) -> bool {
        self.available(self.next_avail).is_some()
    }

    /// Takes the next chain; `Ok(false)` if the guest has none.
    pub(crate) fn pop(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<bool, RingError> {
        let Some(first_flags) = self.available(self.next_avail) else {
            return Ok(false);
        };
        chain.clear();
        let mut place = self.next_avail;
        let mut flags = first_flags;
        for count in 1..=self.size {
            let mut bytes = [0; DESC_BYTES];
            self.desc.slice().read(Self::offset(place.slot), &mut bytes);
            let (addr, len, id) = parse(bytes);
            if flags & DESC_F_INDIRECT == 0 {
                let segment = Segment::Guest { gpa: addr, len };
                chain.push(segment, flags & DESC_F_WRITE != 0);
            } else {
                // A table stands alone in its chain in this layout (2.8.7).
                if count > 1 || flags & DESC_F_NEXT != 0 {
                    return Err(RingError::IndirectWithNext);
                }
                let table = Table::new(self.features, memory, addr, len)?;
                self.walk_indirect(&table, chain)?;
            }
            place = place.forward(1, self.size);
            if flags & DESC_F_NEXT == 0 {
                chain.finish();
                let name = u64::from(id) | u64::from(count) << 16;
                chain.token = super::token(name, chain, self.features);
                self.next_avail = place;
                return Ok(true);
            }
            // The driver makes the first descriptor available last, so the rest is there.
            flags = self.desc.load_u16(Self::offset(place.slot) + DESC_FLAGS);
        }
        Err(RingError::ChainTooLong)
    }

    /// All entries of a table, in order; of their flags only WRITE counts (2.8.7).
    fn walk_indirect(&self, table: &Table<'_>, chain: &mut Chain) -> Result<(), RingError> {
        if table.entries() > u32::from(self.size) {
            return Err(RingError::ChainTooLong);
        }
        for index in 0..table.entries() {
            let bytes = table.read(index)?;
            let (addr, len, _) = parse(bytes);
            let [.., f0, f1] = bytes;
            let flags = u16::from_le_bytes([f0, f1]);
            if flags & DESC_F_INDIRECT != 0 {
                return Err(RingError::NestedIndirect);
            }
            chain.push(Segment::Guest { gpa: addr, len }, flags & DESC_F_WRITE != 0);
        }
        Ok(())
    }

    /// Takes back the last [`Self::pop`], of a chain that was not completed.
    pub(crate) fn unpop(&mut self, token: u64) {
        self.next_avail = self.next_avail.back(descriptors(token), self.size);
    }

    /// Where serving would go on if the last chain had not been popped.
    pub(crate) fn position_before(&self, token: u64) -> QueuePosition {
        let place = self.next_avail.back(descriptors(token), self.size);
        QueuePosition {
            next_avail: place.pack(),
            ..self.position()
        }
    }

    /// Completes a chain; the guest sees it after [`Self::publish`].
    pub(crate) fn complete(&mut self, token: u64, written: u32) {
        let behind = self
            .unpublished
            .map_or(self.next_used, |(_, _, behind)| behind);
        let place = self.batch.take().unwrap_or(behind);
        let at = Self::offset(place.slot);
        self.desc.store_u32(at + DESC_LEN, written);
        self.desc.store_u16(at + DESC_ID, buffer_id(token));
        let mut flags = if place.wrap {
            DESC_F_AVAIL | DESC_F_USED
        } else {
            0
        };
        if written > 0 {
            flags |= DESC_F_WRITE;
        }
        let behind = behind.forward(descriptors(token), self.size);
        self.unpublished = match self.unpublished {
            // The driver looks at the used descriptors in order: the first one's flags, written
            // last, show the whole batch at once.
            Some((first, first_flags, _)) if first != place => {
                self.desc.store_u16_release(at + DESC_FLAGS, flags);
                Some((first, first_flags, behind))
            }
            _ => Some((place, flags, behind)),
        };
        if token & super::SHARES_ENTRY != 0 {
            self.batch = Some(place);
        }
    }

    /// Shows all completed chains to the guest at once. Returns whether it wants to be told.
    pub(crate) fn publish(&mut self) -> bool {
        let Some((first, flags, behind)) = self.unpublished.take() else {
            return false;
        };
        self.batch = None;
        self.desc
            .store_u16_release(Self::offset(first.slot) + DESC_FLAGS, flags);
        if behind.wrap != self.next_used.wrap {
            self.notified_at = None;
        }
        self.next_used = behind;
        full_barrier();
        let flags = self.driver.load_u16(EVENT_FLAGS);
        let old = self.notified_at.replace(behind.slot);
        match flags {
            EVENT_DISABLE => false,
            EVENT_DESC if self.features.event_idx => {
                let event = Place::unpack(self.driver.load_u16(EVENT_OFFSET));
                let lap = if event.wrap == behind.wrap {
                    0
                } else {
                    self.size
                };
                let event = event.slot.wrapping_sub(lap);
                old.is_none_or(|old| super::passed(event, old, behind.slot))
            }
            _ => true,
        }
    }

    /// Asks the guest not to kick while the ring is being served.
    pub(crate) fn suppress_kicks(&mut self) {
        self.device.store_u16_release(EVENT_FLAGS, EVENT_DISABLE);
    }

    /// Asks the guest to kick again; returns true if chains came in meanwhile, which it may not
    /// kick for.
    pub(crate) fn want_kicks(&mut self) -> bool {
        if self.features.event_idx {
            self.device.store_u16(EVENT_OFFSET, self.next_avail.pack());
            self.device.store_u16_release(EVENT_FLAGS, EVENT_DESC);
        } else {
            self.device.store_u16_release(EVENT_FLAGS, EVENT_ENABLE);
        }
        full_barrier();
        self.has_next()
    }
}

/// Address, length and buffer id; the flags are fetched apart.
fn parse(bytes: [u8; DESC_BYTES]) -> (Gpa, u32, u16) {
    let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, i0, i1, ..] = bytes;
    (
        Gpa(u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7])),
        u32::from_le_bytes([l0, l1, l2, l3]),
        u16::from_le_bytes([i0, i1]),
    )
}

/// A token is the buffer id with the number of descriptors above it, and the mark of [`super::token`].
fn buffer_id(token: u64) -> u16 {
    u16::try_from(token & 0xffff).unwrap_or(0)
}

fn descriptors(token: u64) -> u16 {
    u16::try_from(token >> 16 & 0xffff).unwrap_or(0)
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
