//! The driver's half of a virtqueue in guest memory (virtio 1.4, 2.7 and 2.8), of either layout.
//!
//! It does what Linux's virtio_ring does: buffers of more than one piece go into an indirect table
//! if that was negotiated, kicks and interrupts are suppressed by flag or event index, and waiting
//! means to sleep until the interrupt. With IN_ORDER it takes a used entry for all the buffers that it
//! stands for.

mod packed;
mod split;

use super::error::{Result, VmmError};
use super::eventfd::EventFd;
use super::ram::GuestRam;
use aerostat::{
    AEROSTAT_FEATURE_EVENT_IDX, AEROSTAT_FEATURE_IN_ORDER, AEROSTAT_FEATURE_INDIRECT_DESC,
    AEROSTAT_FEATURE_RING_PACKED,
};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

/// The chain goes on at `next`.
pub const DESC_F_NEXT: u16 = 1;
/// The device may write the buffer.
pub const DESC_F_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;
/// Packed rings: a descriptor is available: equal to the lap's wrap counter.
pub const DESC_F_AVAIL: u16 = 1 << 7;
/// Packed rings: a descriptor is used: equal to the lap's wrap counter.
pub const DESC_F_USED: u16 = 1 << 15;

/// Where a queue lies in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    /// The number of descriptors.
    pub size: u16,
    /// The descriptor table; the descriptor ring of the packed layout.
    pub desc: u64,
    /// The available ring; the driver's event area of the packed layout.
    pub avail: u64,
    /// The used ring; the device's event area of the packed layout.
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

/// A buffer that is with the device.
#[derive(Debug)]
struct Outstanding {
    head: u16,
    /// The descriptors that it takes in the ring.
    slots: Vec<u16>,
    /// How much of it the device may write.
    writable_bytes: u32,
}

/// The two layouts.
#[derive(Debug)]
enum Layout {
    Split(split::Split),
    Packed(packed::Packed),
}

/// Calls the same method of whichever layout it is.
macro_rules! either {
    ($ring:expr, $inner:ident => $call:expr) => {
        match $ring {
            Layout::Split($inner) => $call,
            Layout::Packed($inner) => $call,
        }
    };
}

/// One queue, as its driver sees it.
#[derive(Debug)]
pub struct Vring {
    placement: Placement,
    layout: Layout,
    indirect: bool,
    in_order: bool,
    /// Signalled by the driver.
    pub kick: Arc<EventFd>,
    /// Signalled by the device.
    pub call: Arc<EventFd>,
    outstanding: VecDeque<Outstanding>,
    /// Buffers that came back with a later one, and were not taken yet (IN_ORDER).
    skipped: VecDeque<Used>,
    /// Kicks made and kicks that the device did not want.
    pub kicks: (u64, u64),
    /// Used entries that the device wrote.
    pub used_entries: u64,
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
        let event_idx = features & AEROSTAT_FEATURE_EVENT_IDX != 0;
        let layout = if features & AEROSTAT_FEATURE_RING_PACKED == 0 {
            Layout::Split(split::Split::new(placement, event_idx))
        } else {
            Layout::Packed(packed::Packed::new(placement, event_idx))
        };
        Ok(Self {
            placement,
            layout,
            indirect: features & AEROSTAT_FEATURE_INDIRECT_DESC != 0,
            in_order: features & AEROSTAT_FEATURE_IN_ORDER != 0,
            kick: Arc::new(EventFd::new()?),
            call: Arc::new(EventFd::new()?),
            outstanding: VecDeque::new(),
            skipped: VecDeque::new(),
            kicks: (0, 0),
            used_entries: 0,
        })
    }

    /// Where it lies.
    #[must_use]
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Whether it has the packed layout.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        matches!(self.layout, Layout::Packed(_))
    }

    /// How many buffers are with the device.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Makes a buffer available without a kick; returns its head (the buffer id of the packed layout).
    ///
    /// # Errors
    /// There are not enough descriptors left.
    pub fn add(&mut self, ram: &GuestRam, pieces: &[Piece]) -> Result<u16> {
        let indirect = self.indirect && pieces.len() > 1 && pieces.len() as u64 <= MAX_INDIRECT;
        let added = either!(&mut self.layout, ring => ring.add(ram, pieces, indirect));
        let (head, slots) = added.ok_or(VmmError::NoMemory("descriptors"))?;
        let writable = pieces.iter().filter(|piece| piece.writable);
        let writable_bytes = writable.fold(0, |sum: u32, piece| sum.saturating_add(piece.len));
        self.outstanding.push_back(Outstanding {
            head,
            slots,
            writable_bytes,
        });
        Ok(head)
    }

    /// Kicks, unless the device does not want it (virtqueue_kick).
    pub fn kick(&mut self, ram: &GuestRam) {
        fence(Ordering::SeqCst);
        if either!(&mut self.layout, ring => ring.wants_kick(ram)) {
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
        if let Some(used) = self.skipped.pop_front() {
            return Some(used);
        }
        let used = either!(&self.layout, ring => ring.used(ram))?;
        self.used_entries += 1;
        let place = self
            .outstanding
            .iter()
            .position(|buffer| buffer.head == used.head);
        assert!(place.is_some(), "{used:?} is not with the device");
        let place = place?;
        // Without IN_ORDER an entry stands for its own buffer; with it, for all that came before too,
        // which count as written in full (2.7.9, 2.8.9).
        let first = if self.in_order { 0 } else { place };
        for buffer in self.outstanding.drain(first..=place) {
            let head = buffer.head;
            let written = if head == used.head {
                used.written
            } else {
                buffer.writable_bytes
            };
            either!(&mut self.layout, ring => ring.recycle(head, buffer.slots));
            self.skipped.push_back(Used { head, written });
        }
        either!(&self.layout, ring => ring.ask_for_interrupt(ram));
        fence(Ordering::SeqCst);
        self.skipped.pop_front()
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

/// Writes one descriptor of a split ring or table, whatever it says.
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
