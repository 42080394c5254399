//! The same over a packed ring: descriptors with any marks, in any slot.

use super::super::driver::Role;
use super::super::error::{Result, VmmError};
use super::super::eventfd::EventFd;
use super::super::guest::Guest;
use super::super::ram::GuestRam;
use super::super::vring::{DESC_BYTES, Placement};
use super::Raw;
use std::sync::Arc;

/// A raw hold on one packed queue that nobody has used yet.
#[derive(Debug)]
pub struct HostilePacked {
    ram: Arc<GuestRam>,
    placement: Placement,
    kick: Arc<EventFd>,
}

/// A descriptor as the device left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// Its buffer id.
    pub id: u16,
    /// Its length.
    pub len: u32,
    /// Its flags.
    pub flags: u16,
}

impl HostilePacked {
    /// Takes the queue of `role` over from the guest's driver, which must not use it any more.
    ///
    /// # Errors
    /// There is no such queue, or its ring is a split one.
    pub fn new(guest: &Guest, role: Role) -> Result<Self> {
        let mut driver = guest.driver();
        let queue = driver.queue(role)?;
        if !queue.is_packed() {
            return Err(VmmError::Absent("packed ring"));
        }
        Ok(Self {
            ram: Arc::clone(guest.ram()),
            placement: queue.placement(),
            kick: Arc::clone(&queue.kick),
        })
    }

    /// Where the queue lies.
    #[must_use]
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Writes a descriptor of the ring, flags last; [`Raw::next`] is its id.
    pub fn descriptor(&self, slot: u16, raw: Raw) {
        self.descriptor_at(self.placement.desc, slot, raw);
    }

    /// Writes a descriptor of a table anywhere.
    pub fn descriptor_at(&self, table: u64, index: u16, raw: Raw) {
        let at = table + DESC_BYTES * u64::from(index);
        self.ram.write(at, &raw.gpa.to_le_bytes());
        self.ram.write(at + 8, &raw.len.to_le_bytes());
        self.ram.write(at + 12, &raw.next.to_le_bytes());
        self.ram.store_u16(at + 14, raw.flags);
    }

    /// Reads a descriptor of the ring.
    #[must_use]
    pub fn left(&self, slot: u16) -> Left {
        let at = self.placement.desc + DESC_BYTES * u64::from(slot);
        Left {
            flags: self.ram.load_u16(at + 14),
            id: self.ram.load_u16(at + 12),
            len: self.ram.load_u32(at + 8),
        }
    }

    /// Writes the driver's event area: offset with wrap counter, and flags.
    pub fn event(&self, offset: u16, flags: u16) {
        self.ram.store_u16(self.placement.avail, offset);
        self.ram.store_u16(self.placement.avail + 2, flags);
    }

    /// Writes bytes anywhere.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.ram.write(gpa, bytes);
    }

    /// Kicks, wanted or not.
    pub fn kick(&self) {
        self.kick.signal();
    }
}
