//! The driver's half of a split virtqueue (virtio 1.4, 2.7).

use super::super::ram::GuestRam;
use super::{
    DESC_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, MAX_INDIRECT, Piece, Placement, Used,
    put_descriptor,
};
use std::collections::VecDeque;

const USED_F_NO_NOTIFY: u16 = 1;

/// Where the driver stands in its rings.
#[derive(Debug)]
pub(super) struct Split {
    placement: Placement,
    event_idx: bool,
    /// In the order of the ring at first, and for ever if buffers come back in order, as IN_ORDER asks.
    free: VecDeque<u16>,
    next_avail: u16,
    kicked_at: u16,
    next_used: u16,
}

impl Split {
    pub(super) fn new(placement: Placement, event_idx: bool) -> Self {
        Self {
            placement,
            event_idx,
            free: (0..placement.size).collect(),
            next_avail: 0,
            kicked_at: 0,
            next_used: 0,
        }
    }

    /// Makes a buffer available; returns its head and its descriptors, unless there are too few.
    pub(super) fn add(
        &mut self,
        ram: &GuestRam,
        pieces: &[Piece],
        indirect: bool,
    ) -> Option<(u16, Vec<u16>)> {
        let needed = if indirect { 1 } else { pieces.len() };
        if needed > self.free.len() {
            return None;
        }
        let taken: Vec<u16> = self.free.drain(..needed).collect();
        let head = *taken.first()?;
        let table = self.placement.desc;
        if indirect {
            let inner = self.placement.tables + DESC_BYTES * MAX_INDIRECT * u64::from(head);
            let order: Vec<u16> = (0u16..).take(pieces.len()).collect();
            write_chain(ram, inner, &order, pieces);
            let len = u32::try_from(DESC_BYTES * pieces.len() as u64).unwrap_or(0);
            put_descriptor(ram, table, head, inner, len, DESC_F_INDIRECT, 0);
        } else {
            write_chain(ram, table, &taken, pieces);
        }
        ram.store_u16(self.placement.avail_entry(self.next_avail), head);
        self.next_avail = self.next_avail.wrapping_add(1);
        ram.store_u16(self.placement.avail_index(), self.next_avail);
        Some((head, taken))
    }

    /// Whether the device wants a kick for what was added since the last one.
    pub(super) fn wants_kick(&mut self, ram: &GuestRam) -> bool {
        let (old, new) = (self.kicked_at, self.next_avail);
        self.kicked_at = new;
        if self.event_idx {
            let event = ram.load_u16(self.placement.avail_event());
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            ram.load_u16(self.placement.used) & USED_F_NO_NOTIFY == 0
        }
    }

    /// The next used entry.
    pub(super) fn used(&self, ram: &GuestRam) -> Option<Used> {
        if ram.load_u16(self.placement.used_index()) == self.next_used {
            return None;
        }
        let entry = self.placement.used_entry(self.next_used);
        let (head, written) = (ram.load_u32(entry), ram.load_u32(entry + 4));
        let head = u16::try_from(head).unwrap_or(u16::MAX);
        Some(Used { head, written })
    }

    /// Takes a buffer's descriptors back, and goes on by its entry.
    pub(super) fn recycle(&mut self, _head: u16, slots: Vec<u16>) {
        self.next_used = self.next_used.wrapping_add(1);
        self.free.extend(slots);
    }

    /// Asks to be told of the next buffer: with EVENT_IDX for each anew, as virtqueue_get_buf() does;
    /// the flag is never set.
    pub(super) fn ask_for_interrupt(&self, ram: &GuestRam) {
        if self.event_idx {
            ram.store_u16(self.placement.used_event(), self.next_used);
        }
    }
}

/// Writes a chain through these entries of a table.
fn write_chain(ram: &GuestRam, table: u64, order: &[u16], pieces: &[Piece]) {
    for (position, (piece, index)) in pieces.iter().zip(order).enumerate() {
        let next = order.get(position + 1).copied();
        let flags = if piece.writable { DESC_F_WRITE } else { 0 }
            | if next.is_some() { DESC_F_NEXT } else { 0 };
        let next = next.unwrap_or(0);
        put_descriptor(ram, table, *index, piece.gpa, piece.len, flags, next);
    }
}
