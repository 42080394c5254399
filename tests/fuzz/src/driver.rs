//! The driver's side of the rings: where they lie, and how a chain is made available. It keeps to the
//! rules as far as the script lets it; what it writes may be spoilt before the device looks.

use crate::guest::{Guest, PAGE};
use crate::script::{Layout, Segment};
use aerostat_device::QueuePosition;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const PACKED_AVAIL: u16 = 1 << 7;
const PACKED_USED: u16 = 1 << 15;

/// The queue sizes that a script may choose from; some are refused.
const SIZES: [u16; 12] = [1, 2, 4, 8, 16, 32, 64, 3, 7, 33, 0, 32768];

/// What the driver knows of one of its rings.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    layout: Layout,
    queue: u64,
    /// Its number of descriptors.
    pub size: u16,
    /// The next descriptor to be used.
    next: u16,
    /// The available index, or for a packed ring the wrap counter.
    index: u16,
}

impl Driver {
    /// A new ring.
    #[must_use]
    pub fn new(layout: Layout, queue: u16, size: u8) -> Self {
        let size = SIZES[usize::from(size) % SIZES.len()];
        let index = u16::from(layout == Layout::Packed);
        Self {
            layout,
            queue: queue.into(),
            size,
            next: 0,
            index,
        }
    }

    /// Descriptors, driver's area, device's area: all in one page a queue.
    #[must_use]
    pub fn places(&self) -> [u64; 3] {
        let page = (0x10 + self.queue) * PAGE as u64;
        [page, page + 0x800, page + 0xc00]
    }

    /// Where the device begins.
    #[must_use]
    pub fn start(&self) -> QueuePosition {
        match self.layout {
            Layout::Packed => QueuePosition::PACKED_START,
            _ => QueuePosition::SPLIT_START,
        }
    }

    /// The same place with rings of another layout.
    pub fn change_layout(&mut self, layout: Layout) {
        self.layout = layout;
    }

    /// Writes the ring as it is when all that was made available before `at` is done with.
    pub fn lay_out(&self, guest: &mut Guest, at: QueuePosition) {
        let [desc, avail, used] = self.places();
        guest.write(desc, &[0; PAGE]);
        if self.layout == Layout::Split {
            guest.write(avail + 2, &at.next_avail.to_le_bytes());
            guest.write(used + 2, &at.next_used.to_le_bytes());
        }
    }

    /// Goes on where the device stopped.
    pub fn resume(&mut self, at: QueuePosition) {
        match self.layout {
            Layout::Packed => {
                self.next = at.next_avail & 0x7fff;
                self.index = at.next_avail >> 15;
            }
            _ => self.index = at.next_avail,
        }
    }

    /// What the device may write to, given the places of the ring: address and length.
    #[must_use]
    pub fn device_writes(layout: Layout, size: u16, places: [u64; 3]) -> Vec<(u64, u64)> {
        let [desc, _, used] = places;
        match layout {
            Layout::Split => vec![(used, 4 + 8 * u64::from(size) + 2)],
            Layout::Packed => vec![(desc, 16 * u64::from(size)), (used, 4)],
            Layout::Elements => Vec::new(),
        }
    }

    /// Makes a chain available.
    pub fn offer(&mut self, guest: &mut Guest, segments: &[Segment], indirect: bool) {
        let size = self.size.clamp(1, 64);
        let limit = if indirect { 64 } else { size };
        let segments = &segments[..segments.len().min(limit.into())];
        if segments.is_empty() {
            return;
        }
        let head = self.next % size;
        if indirect {
            // Behind the pages of the rings; some of them are pages for buffers, too.
            let table = (0x15 + self.queue) * PAGE as u64;
            self.write_chain(guest, table, segments, 0, 64);
            let entry = Entry {
                address: table,
                length: 16 * u32::try_from(segments.len()).unwrap_or(0),
                id: head,
                flags: INDIRECT | if segments[0].odd == 7 { NEXT } else { 0 },
            };
            self.write_entry(guest, self.places()[0], head, entry, true);
            self.advance(1, size);
        } else {
            self.write_chain(guest, self.places()[0], segments, head, size);
            self.advance(u16::try_from(segments.len()).unwrap_or(0), size);
        }
        if self.layout == Layout::Split {
            let avail = self.places()[1];
            let slot = u64::from(self.index % size);
            guest.write(avail + 4 + 2 * slot, &head.to_le_bytes());
            self.index = self.index.wrapping_add(1);
            guest.write(avail + 2, &self.index.to_le_bytes());
        }
    }

    fn advance(&mut self, by: u16, size: u16) {
        let next = self.next % size + by;
        self.next = next % size;
        if next >= size && self.layout == Layout::Packed {
            self.index ^= 1;
        }
    }

    /// Writes descriptors from `first` on; of a packed ring the first one last.
    fn write_chain(
        &self,
        guest: &mut Guest,
        table: u64,
        segments: &[Segment],
        first: u16,
        size: u16,
    ) {
        let direct = table == self.places()[0];
        for (number, segment) in segments.iter().enumerate().rev() {
            let last = number + 1 == segments.len();
            let at = (first + u16::try_from(number).unwrap_or(0)) % size;
            let next = (at + 1) % size;
            let mut flags = if last { 0 } else { NEXT };
            if segment.writable {
                flags |= WRITE;
            }
            flags ^= match segment.odd {
                1 => NEXT,
                2 => INDIRECT,
                3 => INDIRECT | NEXT,
                4 => PACKED_AVAIL,
                5 => PACKED_USED,
                _ => 0,
            };
            let entry = Entry {
                address: segment.address.gpa(),
                length: segment.length.bytes(),
                id: match (self.layout, segment.odd) {
                    (_, 6) => 0xfff0,
                    (Layout::Packed, _) => first,
                    _ => next,
                },
                flags,
            };
            self.write_entry(guest, table, at, entry, direct);
        }
    }

    fn write_entry(&self, guest: &mut Guest, table: u64, at: u16, entry: Entry, direct: bool) {
        let place = table + 16 * u64::from(at);
        guest.write(place, &entry.address.to_le_bytes());
        guest.write(place + 8, &entry.length.to_le_bytes());
        let mut flags = entry.flags;
        if self.layout == Layout::Packed {
            guest.write(place + 12, &entry.id.to_le_bytes());
            if direct {
                // A descriptor in front of the next one to be used is in the following lap.
                let wrap = (self.index == 1) == (at >= self.next % self.size.clamp(1, 64));
                flags ^= if wrap { PACKED_AVAIL } else { PACKED_USED };
            }
            guest.write(place + 14, &flags.to_le_bytes());
        } else {
            guest.write(place + 12, &flags.to_le_bytes());
            guest.write(place + 14, &entry.id.to_le_bytes());
        }
    }
}

/// A descriptor of either layout: `id` is the next one's number in a split ring.
#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    length: u32,
    id: u16,
    flags: u16,
}
