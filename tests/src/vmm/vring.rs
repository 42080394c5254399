//! The driver's half of a split virtqueue in guest memory (virtio 1.4, 2.7).
//!
//! It does what Linux's virtio_ring does: buffers of more than one piece go into an indirect table
//! if that was negotiated, kicks and interrupts are suppressed by flag or event index, and waiting
//! means to sleep until the interrupt.

use super::error::{Result, VmmError};
use super::eventfd::EventFd;
use super::ram::GuestRam;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

/// The chain goes on at `next`.
pub const DESC_F_NEXT: u16 = 1;
/// The device may write the buffer.
pub const DESC_F_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;
const USED_F_NO_NOTIFY: u16 = 1;

/// Where a queue lies in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    /// The number of descriptors.
    pub size: u16,
    /// The descriptor table.
    pub desc: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
    /// Room for indirect tables: [`MAX_INDIRECT`] entries for each of the `size` heads.
    pub tables: u64,
}

/// The most pieces of a buffer; reporting has 32.
pub const MAX_INDIRECT: u64 = 32;
/// Bytes of a descriptor.
pub const DESC_BYTES: u64 = 16;

impl Placement {
    /// Lays a queue out from `gpa` on, each part at the start of a page; returns what follows it.
    #[must_use]
    pub fn lay_out(gpa: u64, size: u16) -> (Self, u64) {
        let page = |bytes: u64| bytes.next_multiple_of(super::PAGE_BYTES);
        let entries = u64::from(size);
        let avail = gpa + page(DESC_BYTES * entries);
        let used = avail + page(6 + 2 * entries);
        let tables = used + page(6 + 8 * entries);
        let end = tables + page(DESC_BYTES * MAX_INDIRECT * entries);
        let placement = Self {
            size,
            desc: gpa,
            avail,
            used,
            tables,
        };
        (placement, end)
    }

    /// The index of the available ring.
    #[must_use]
    pub fn avail_index(&self) -> u64 {
        self.avail + 2
    }

    /// The entry of the available ring for `index`.
    #[must_use]
    pub fn avail_entry(&self, index: u16) -> u64 {
        self.avail + 4 + 2 * u64::from(index % self.size)
    }

    /// The index of the used ring.
    #[must_use]
    pub fn used_index(&self) -> u64 {
        self.used + 2
    }

    /// The entry of the used ring for `index`.
    #[must_use]
    pub fn used_entry(&self, index: u16) -> u64 {
        self.used + 4 + 8 * u64::from(index % self.size)
    }

    /// The driver's field that says at which used index it wants an interrupt.
    #[must_use]
    pub fn used_event(&self) -> u64 {
        self.avail + 4 + 2 * u64::from(self.size)
    }

    /// The device's field that says at which available index it wants a kick.
    #[must_use]
    pub fn avail_event(&self) -> u64 {
        self.used + 4 + 8 * u64::from(self.size)
    }
}

/// A piece of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its guest address.
    pub gpa: u64,
    /// Its length.
    pub len: u32,
    /// Whether the device may write it.
    pub writable: bool,
}

/// A buffer that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// What [`Vring::add`] returned for it.
    pub head: u16,
    /// How much the device says it wrote.
    pub written: u32,
}

/// One queue, as its driver sees it.
#[derive(Debug)]
pub struct Vring {
    placement: Placement,
    event_idx: bool,
    indirect: bool,
    /// Signalled by the driver.
    pub kick: Arc<EventFd>,
    /// Signalled by the device.
    pub call: Arc<EventFd>,
    free: Vec<u16>,
    /// The descriptors of each outstanding head.
    outstanding: Vec<(u16, Vec<u16>)>,
    next_avail: u16,
    kicked_at: u16,
    next_used: u16,
    /// Kicks made and kicks that the device did not want.
    pub kicks: (u64, u64),
}

impl Vring {
    /// An empty queue; clears its rings.
    ///
    /// # Errors
    /// There are no descriptors for eventfds.
    pub fn new(ram: &GuestRam, placement: Placement, features: u64) -> Result<Self> {
        let words = (placement.tables - placement.desc) / 8;
        for word in 0..words {
            ram.write(placement.desc + 8 * word, &[0; 8]);
        }
        Ok(Self {
            placement,
            event_idx: features & aerostat::AEROSTAT_FEATURE_EVENT_IDX != 0,
            indirect: features & aerostat::AEROSTAT_FEATURE_INDIRECT_DESC != 0,
            kick: Arc::new(EventFd::new()?),
            call: Arc::new(EventFd::new()?),
            free: (0..placement.size).rev().collect(),
            outstanding: Vec::new(),
            next_avail: 0,
            kicked_at: 0,
            next_used: 0,
            kicks: (0, 0),
        })
    }

    /// Where it lies.
    #[must_use]
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// How many buffers are with the device.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Makes a buffer available without a kick; returns its head.
    ///
    /// # Errors
    /// There are not enough descriptors left.
    pub fn add(&mut self, ram: &GuestRam, pieces: &[Piece]) -> Result<u16> {
        let indirect = self.indirect && pieces.len() > 1 && pieces.len() as u64 <= MAX_INDIRECT;
        let needed = if indirect { 1 } else { pieces.len() };
        if needed > self.free.len() || needed == 0 {
            return Err(VmmError::NoMemory("descriptors"));
        }
        let taken = self.free.split_off(self.free.len() - needed);
        let head = taken.first().copied().unwrap_or_default();
        if indirect {
            let table = self.placement.tables + DESC_BYTES * MAX_INDIRECT * u64::from(head);
            for (piece, index) in pieces.iter().zip(0u16..) {
                let last = usize::from(index) + 1 == pieces.len();
                let next = (!last).then_some(index + 1);
                write_descriptor(ram, table, index, piece, next);
            }
            let len = u32::try_from(DESC_BYTES * pieces.len() as u64).unwrap_or(0);
            put_descriptor(
                ram,
                self.placement.desc,
                head,
                table,
                len,
                DESC_F_INDIRECT,
                0,
            );
        } else {
            for (position, piece) in pieces.iter().enumerate() {
                let index = taken.get(position).copied().unwrap_or_default();
                let next = taken.get(position + 1).copied();
                write_descriptor(ram, self.placement.desc, index, piece, next);
            }
        }
        self.outstanding.push((head, taken));
        let entry = self.placement.avail_entry(self.next_avail);
        ram.store_u16(entry, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        ram.store_u16(self.placement.avail_index(), self.next_avail);
        Ok(head)
    }

    /// Kicks, unless the device does not want it (virtqueue_kick).
    pub fn kick(&mut self, ram: &GuestRam) {
        fence(Ordering::SeqCst);
        let (old, new) = (self.kicked_at, self.next_avail);
        self.kicked_at = new;
        let wanted = if self.event_idx {
            let event = ram.load_u16(self.placement.avail_event());
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            ram.load_u16(self.placement.used) & USED_F_NO_NOTIFY == 0
        };
        if wanted {
            self.kicks.0 += 1;
            self.kick.signal();
        } else {
            self.kicks.1 += 1;
        }
    }

    /// Takes the next buffer that came back.
    ///
    /// # Panics
    /// If the device returned what it was not given, or twice.
    pub fn take_used(&mut self, ram: &GuestRam) -> Option<Used> {
        if ram.load_u16(self.placement.used_index()) == self.next_used {
            return None;
        }
        let entry = self.placement.used_entry(self.next_used);
        let (head, written) = (ram.load_u32(entry), ram.load_u32(entry + 4));
        self.next_used = self.next_used.wrapping_add(1);
        let position = self
            .outstanding
            .iter()
            .position(|(outstanding, _)| u32::from(*outstanding) == head);
        assert!(position.is_some(), "head {head} is not with the device");
        let (head, descriptors) = self.outstanding.swap_remove(position?);
        self.free.extend(descriptors);
        self.ask_for_interrupt(ram);
        Some(Used { head, written })
    }

    /// Waits for a buffer by interrupt.
    ///
    /// # Errors
    /// None came back in time.
    pub fn wait_used(&mut self, ram: &GuestRam, timeout: Duration) -> Result<Used> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.take_used(ram) {
                return Ok(used);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.call.wait(left) && left.is_zero() {
                return Err(VmmError::TimedOut {
                    what: "a used buffer",
                    millis: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
                });
            }
        }
    }

    /// Asks to be told of the next buffer: with EVENT_IDX for each anew, as virtqueue_get_buf()
    /// does; the flag is never set.
    fn ask_for_interrupt(&self, ram: &GuestRam) {
        if self.event_idx {
            ram.store_u16(self.placement.used_event(), self.next_used);
        }
        fence(Ordering::SeqCst);
    }

    /// Offers a buffer, kicks, and waits until it comes back.
    ///
    /// # Errors
    /// It did not come back in time.
    pub fn exchange(
        &mut self,
        ram: &GuestRam,
        pieces: &[Piece],
        timeout: Duration,
    ) -> Result<Used> {
        let head = self.add(ram, pieces)?;
        self.kick(ram);
        loop {
            let used = self.wait_used(ram, timeout)?;
            if used.head == head {
                return Ok(used);
            }
        }
    }
}

fn write_descriptor(ram: &GuestRam, table: u64, index: u16, piece: &Piece, next: Option<u16>) {
    let flags = if piece.writable { DESC_F_WRITE } else { 0 }
        | if next.is_some() { DESC_F_NEXT } else { 0 };
    put_descriptor(
        ram,
        table,
        index,
        piece.gpa,
        piece.len,
        flags,
        next.unwrap_or(0),
    );
}

/// Writes one descriptor, whatever it says.
pub fn put_descriptor(
    ram: &GuestRam,
    table: u64,
    index: u16,
    gpa: u64,
    len: u32,
    flags: u16,
    next: u16,
) {
    let at = table + DESC_BYTES * u64::from(index);
    ram.write(at, &gpa.to_le_bytes());
    ram.write(at + 8, &len.to_le_bytes());
    ram.write(at + 12, &flags.to_le_bytes());
    ram.write(at + 14, &next.to_le_bytes());
}
