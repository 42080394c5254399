//! The driver's half of a packed virtqueue (virtio 1.4, 2.8).

use super::super::ram::GuestRam;
use super::{
    DESC_BYTES, DESC_F_AVAIL, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_USED, DESC_F_WRITE,
    MAX_INDIRECT, Piece, Placement, Used,
};
use std::collections::VecDeque;

const EVENT_FLAGS: u64 = 2;
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;
const WRAP: u16 = 1 << 15;

/// A slot of the ring, and the wrap counter of the lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    slot: u16,
    wrap: bool,
}

impl Place {
    fn next(self, size: u16) -> Self {
        if self.slot + 1 < size {
            return Self {
                slot: self.slot + 1,
                ..self
            };
        }
        Self {
            slot: 0,
            wrap: !self.wrap,
        }
    }

    fn pack(self) -> u16 {
        self.slot | if self.wrap { WRAP } else { 0 }
    }

    /// The flags that make a descriptor at this place available.
    fn available(self) -> u16 {
        if self.wrap { DESC_F_AVAIL } else { DESC_F_USED }
    }
}

/// Where the driver stands in its ring.
#[derive(Debug)]
pub(super) struct Packed {
    placement: Placement,
    event_idx: bool,
    free_ids: VecDeque<u16>,
    free_slots: usize,
    next_avail: Place,
    /// Slots made available since the last kick.
    added: u16,
    next_used: Place,
}

impl Packed {
    pub(super) fn new(placement: Placement, event_idx: bool) -> Self {
        let start = Place {
            slot: 0,
            wrap: true,
        };
        Self {
            placement,
            event_idx,
            // Any id will do for the device, so the smallest does not come first.
            free_ids: (0..placement.size).rev().collect(),
            free_slots: usize::from(placement.size),
            next_avail: start,
            added: 0,
            next_used: start,
        }
    }

    fn slot(&self, place: Place) -> u64 {
        self.placement.desc + DESC_BYTES * u64::from(place.slot)
    }

    /// Makes a buffer available; returns its id and its slots, unless there are too few. The flags of
    /// its first descriptor, written last, show all of it.
    pub(super) fn add(
        &mut self,
        ram: &GuestRam,
        pieces: &[Piece],
        indirect: bool,
    ) -> Option<(u16, Vec<u16>)> {
        let needed = if indirect { 1 } else { pieces.len() };
        if needed > self.free_slots || needed == 0 {
            return None;
        }
        let id = self.free_ids.pop_front()?;
        let one_table;
        let (pieces, table_flag) = if indirect {
            one_table = [self.write_table(ram, id, pieces)];
            (&one_table[..], DESC_F_INDIRECT)
        } else {
            (pieces, 0)
        };
        let mut slots = Vec::new();
        let mut first = None;
        for (position, piece) in pieces.iter().enumerate() {
            let at = self.slot(self.next_avail);
            write_buffer(ram, at, piece, id);
            let mut flags = self.next_avail.available() | table_flag;
            flags |= if piece.writable { DESC_F_WRITE } else { 0 };
            if position + 1 < pieces.len() {
                flags |= DESC_F_NEXT;
            }
            match first {
                None => first = Some((at, flags)),
                Some(_) => ram.store_u16(at + 14, flags),
            }
            slots.push(self.next_avail.slot);
            self.next_avail = self.next_avail.next(self.placement.size);
        }
        let (at, flags) = first?;
        ram.store_u16(at + 14, flags);
        self.free_slots -= needed;
        self.added = self.added.wrapping_add(u16::try_from(needed).unwrap_or(0));
        Some((id, slots))
    }

    /// Writes a table whose entries say nothing but where, how long and in which direction.
    fn write_table(&self, ram: &GuestRam, id: u16, pieces: &[Piece]) -> Piece {
        let gpa = self.placement.tables + DESC_BYTES * MAX_INDIRECT * u64::from(id);
        for (piece, entry) in pieces.iter().zip(0u64..) {
            let at = gpa + DESC_BYTES * entry;
            write_buffer(ram, at, piece, 0);
            let flags = if piece.writable { DESC_F_WRITE } else { 0 };
            ram.store_u16(at + 14, flags);
        }
        Piece {
            gpa,
            len: u32::try_from(DESC_BYTES * pieces.len() as u64).unwrap_or(0),
            writable: false,
        }
    }

    /// Whether the device wants a kick for what was added since the last one.
    pub(super) fn wants_kick(&mut self, ram: &GuestRam) -> bool {
        let added = std::mem::take(&mut self.added);
        let flags = ram.load_u16(self.placement.used + EVENT_FLAGS);
        if flags != EVENT_DESC {
            return flags != EVENT_DISABLE;
        }
        let wanted = ram.load_u16(self.placement.used);
        let (new, size) = (self.next_avail.slot, self.placement.size);
        let mut event = wanted & !WRAP;
        if (wanted & WRAP != 0) != self.next_avail.wrap {
            event = event.wrapping_sub(size);
        }
        new.wrapping_sub(event).wrapping_sub(1) < added
    }

    /// The next used descriptor.
    pub(super) fn used(&self, ram: &GuestRam) -> Option<Used> {
        let at = self.slot(self.next_used);
        let flags = ram.load_u16(at + 14);
        let marks = (flags & DESC_F_AVAIL != 0, flags & DESC_F_USED != 0);
        if marks != (self.next_used.wrap, self.next_used.wrap) {
            return None;
        }
        let written = if flags & DESC_F_WRITE == 0 {
            0
        } else {
            ram.load_u32(at + 8)
        };
        let head = ram.load_u16(at + 12);
        Some(Used { head, written })
    }

    /// Takes a buffer's id and slots back, and goes on behind them.
    pub(super) fn recycle(&mut self, id: u16, slots: Vec<u16>) {
        self.free_ids.push_back(id);
        self.free_slots += slots.len();
        for _ in slots {
            self.next_used = self.next_used.next(self.placement.size);
        }
    }

    /// Asks to be told of the next buffer.
    pub(super) fn ask_for_interrupt(&self, ram: &GuestRam) {
        let flags = self.placement.avail + EVENT_FLAGS;
        if self.event_idx {
            ram.store_u16(self.placement.avail, self.next_used.pack());
            ram.store_u16(flags, EVENT_DESC);
        } else {
            ram.store_u16(flags, EVENT_ENABLE);
        }
    }
}

/// Writes all of a descriptor but its flags.
fn write_buffer(ram: &GuestRam, at: u64, piece: &Piece, id: u16) {
    ram.write(at, &piece.gpa.to_le_bytes());
    ram.write(at + 8, &piece.len.to_le_bytes());
    ram.write(at + 12, &id.to_le_bytes());
}
