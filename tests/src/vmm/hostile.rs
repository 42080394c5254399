//! A driver that writes anything anywhere: descriptors, ring entries and indices as they are, with
//! no regard for what a ring is.

mod packed;

pub use packed::{HostilePacked, Left};

use super::driver::Role;
use super::error::{Result, VmmError};
use super::eventfd::EventFd;
use super::guest::Guest;
use super::ram::GuestRam;
use super::vring::{Placement, put_descriptor};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A raw hold on one queue.
#[derive(Debug)]
pub struct Hostile {
    ram: Arc<GuestRam>,
    placement: Placement,
    kick: Arc<EventFd>,
    /// Descriptors go here, in the queue's table or wherever an indirect one is said to be.
    next_avail: u16,
}

/// A descriptor of any content.
#[derive(Clone, Copy, Debug, Default)]
pub struct Raw {
    /// Its address.
    pub gpa: u64,
    /// Its length.
    pub len: u32,
    /// Its flags.
    pub flags: u16,
    /// The next descriptor.
    pub next: u16,
}

impl Hostile {
    /// Takes the queue of `role` over from the guest's driver, which must not use it any more.
    ///
    /// # Errors
    /// There is no such queue, or its ring is a packed one.
    pub fn new(guest: &Guest, role: Role) -> Result<Self> {
        let mut driver = guest.driver();
        let queue = driver.queue(role)?;
        if queue.is_packed() {
            return Err(VmmError::Absent("split ring"));
        }
        let placement = queue.placement();
        Ok(Self {
            ram: Arc::clone(guest.ram()),
            placement,
            kick: Arc::clone(&queue.kick),
            next_avail: guest.ram().load_u16(placement.avail_index()),
        })
    }

    /// Where the queue lies.
    #[must_use]
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Writes a descriptor of the queue's table.
    pub fn descriptor(&self, index: u16, raw: Raw) {
        self.descriptor_at(self.placement.desc, index, raw);
    }

    /// Writes a descriptor of a table anywhere.
    pub fn descriptor_at(&self, table: u64, index: u16, raw: Raw) {
        let Raw {
            gpa,
            len,
            flags,
            next,
        } = raw;
        put_descriptor(&self.ram, table, index, gpa, len, flags, next);
    }

    /// Writes bytes anywhere.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.ram.write(gpa, bytes);
    }

    /// Makes `head` available, whatever it is, without a kick.
    pub fn offer(&mut self, head: u16) {
        let entry = self.placement.avail_entry(self.next_avail);
        self.ram.store_u16(entry, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_avail_index(self.next_avail);
    }

    /// Sets the available index.
    pub fn set_avail_index(&mut self, index: u16) {
        self.next_avail = index;
        self.ram.store_u16(self.placement.avail_index(), index);
    }

    /// The available index that was last written.
    #[must_use]
    pub fn avail_index(&self) -> u16 {
        self.next_avail
    }

    /// Kicks, wanted or not.
    pub fn kick(&self) {
        self.kick.signal();
    }

    /// The used index.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.ram.load_u16(self.placement.used_index())
    }

    /// The entry of the used ring for `index`: (head, written bytes).
    #[must_use]
    pub fn used_entry(&self, index: u16) -> (u32, u32) {
        let entry = self.placement.used_entry(index);
        (self.ram.load_u32(entry), self.ram.load_u32(entry + 4))
    }

    /// Waits until the used index is that of all that was made available.
    ///
    /// # Errors
    /// That does not come in time.
    pub fn wait_used(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while self.used_index() != self.next_avail {
            if Instant::now() > deadline {
                return Err(VmmError::TimedOut {
                    what: "the used index",
                    millis: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
                });
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}
