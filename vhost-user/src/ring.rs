//! A virtqueue's ring as the front-end describes it, message by message, until it can be started.
//!
//! Specification: vhost-user, "Ring states". A ring is stopped until its kick descriptor comes, and
//! disabled until SET_VRING_ENABLE if protocol features were negotiated; it is served when it is
//! neither. GET_VRING_BASE stops it.

use crate::mapping::{Slot, translate};
use crate::message::VringAddr;
use crate::wake::signal;
use aerostat_device::memory::Gpa;
use aerostat_device::{GuestMemory, QueueConfig, QueuePosition, RingConfig};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// The most entries of a ring (virtio 1.2, "Split Virtqueues").
const MAX_ENTRIES: u32 = 32768;

/// Why a ring cannot be started, or set up so.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingError {
    #[error("{0} entries; a split ring has a power of two of them, up to 32768")]
    Entries(u32),
    #[error("base {0:#x}; a split ring's position is a number of 16 bits")]
    Base(u32),
    #[error("{what} at front-end address {address:#x} is not in the memory table")]
    Address { what: &'static str, address: u64 },
    #[error("polling instead of a kick descriptor is not supported")]
    Polling,
    #[error("its size has not been set")]
    NoSize,
    #[error("descriptors cannot be handled")]
    Fd(#[from] io::Error),
}

/// What is known of a ring.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    entries: Option<u16>,
    addr: Option<VringAddr>,
    /// Where to go on, as the front-end or the last stop left it.
    base: u16,
    /// Whether the front-end gave the base, since the ring last ran.
    base_given: bool,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    pub(crate) enabled: bool,
    pub(crate) started: bool,
}

impl Ring {
    pub(crate) fn set_entries(&mut self, entries: u32) -> Result<(), RingError> {
        let valid = entries.is_power_of_two() && entries <= MAX_ENTRIES;
        self.entries = u16::try_from(entries).ok().filter(|_| valid);
        self.entries.map(drop).ok_or(RingError::Entries(entries))
    }

    pub(crate) fn set_base(&mut self, base: u32) -> Result<(), RingError> {
        self.base = u16::try_from(base).map_err(|_| RingError::Base(base))?;
        self.base_given = true;
        Ok(())
    }

    pub(crate) fn base(&self) -> u16 {
        self.base
    }

    /// Whether the front-end says that the ring begins at its first entry.
    pub(crate) fn is_new(&self) -> bool {
        self.base_given && self.base == 0
    }

    /// Whether the front-end says that the ring goes on where it was.
    pub(crate) fn is_resumed(&self) -> bool {
        self.base_given && self.base != 0
    }

    /// Notes where the ring is. An address outside the memory table is refused at once, so that the
    /// front-end learns of it from the message that is wrong.
    pub(crate) fn set_addr(&mut self, addr: VringAddr, slots: &[Slot]) -> Result<(), RingError> {
        self.addr = None;
        Addresses::of(addr, slots)?;
        self.addr = Some(addr);
        Ok(())
    }

    pub(crate) fn set_kick(&mut self, kick: Option<OwnedFd>) -> Result<(), RingError> {
        self.kick = None;
        let kick = kick.ok_or(RingError::Polling)?;
        never_block(&kick)?;
        self.kick = Some(kick);
        Ok(())
    }

    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) -> Result<(), RingError> {
        self.call = None;
        if let Some(call) = &call {
            never_block(call)?;
        }
        self.call = call;
        Ok(())
    }

    pub(crate) fn set_err(&mut self, err: Option<OwnedFd>) -> Result<(), RingError> {
        self.err = None;
        if let Some(err) = &err {
            never_block(err)?;
        }
        self.err = err;
        Ok(())
    }

    /// A second handle to the call descriptor.
    pub(crate) fn call(&self) -> io::Result<Option<OwnedFd>> {
        self.call.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// Tells the front-end that the ring broke.
    pub(crate) fn signal_error(&self) {
        if let Some(err) = &self.err {
            signal(err.as_fd());
        }
    }

    /// Whether everything that a start needs is there.
    pub(crate) fn is_ready(&self) -> bool {
        self.enabled && !self.started && self.kick.is_some() && self.addr.is_some()
    }

    /// What the device is told to start it.
    pub(crate) fn config(
        &self,
        slots: &[Slot],
        memory: Option<&GuestMemory>,
    ) -> Result<Option<QueueConfig>, RingError> {
        let (Some(addr), Some(kick)) = (self.addr, &self.kick) else {
            return Ok(None);
        };
        let addresses = Addresses::of(addr, slots)?;
        let next_used = memory
            .and_then(|memory| used_index(memory, addresses.used))
            .ok_or(RingError::Address {
                what: "the used ring",
                address: addr.used,
            })?;
        Ok(Some(QueueConfig {
            size: self.entries.ok_or(RingError::NoSize)?,
            ring: Some(RingConfig {
                desc: addresses.desc,
                avail: addresses.avail,
                used: addresses.used,
                kick: kick.try_clone()?,
                call: self.call()?,
                position: QueuePosition {
                    next_avail: self.base,
                    next_used,
                },
            }),
        }))
    }

    /// Notes that it was stopped at `position`.
    ///
    /// What was taken and not given back (the statistics buffer, which the device holds on to) is
    /// to be taken again, by us or by whoever serves the ring next: the position that the protocol
    /// knows is one number, so the ring goes on from the last entry that was given back.
    pub(crate) fn stopped(&mut self, position: QueuePosition) {
        self.started = false;
        self.base_given = false;
        self.base = position.next_used;
    }

    /// What GET_VRING_BASE leaves: a ring that waits for its next kick descriptor.
    pub(crate) fn forget_kick(&mut self) {
        self.kick = None;
    }
}

/// A ring's places in guest memory.
struct Addresses {
    desc: Gpa,
    avail: Gpa,
    used: Gpa,
}

impl Addresses {
    fn of(addr: VringAddr, slots: &[Slot]) -> Result<Self, RingError> {
        let find =
            |what, address| translate(slots, address).ok_or(RingError::Address { what, address });
        Ok(Self {
            desc: find("the descriptor table", addr.desc)?,
            avail: find("the available ring", addr.avail)?,
            used: find("the used ring", addr.used)?,
        })
    }
}

/// The used ring's index as the guest sees it ("idx", two bytes into the ring, little-endian). It is
/// the one place that says how far a ring was served by a back-end that is no more.
fn used_index(memory: &GuestMemory, used: Gpa) -> Option<u16> {
    let mut index = [0; 2];
    let slice = memory.slice_prefix(used, 4)?;
    (slice.read(2, &mut index) == index.len()).then(|| u16::from_le_bytes(index))
}

/// A read or write of a descriptor from outside must not stop a thread that serves other guests.
fn never_block(fd: &OwnedFd) -> io::Result<()> {
    let flags = fcntl_getfl(fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_bases_are_checked() {
        let mut ring = Ring::default();
        for entries in [0, 3, 65536, u32::MAX] {
            assert!(ring.set_entries(entries).is_err());
        }
        ring.set_entries(32768).unwrap();
        ring.set_base(65535).unwrap();
        assert!(ring.set_base(65536).is_err());
        assert_eq!(ring.base(), 65535);
    }

    #[test]
    fn addresses_outside_memory_are_refused() {
        let mut ring = Ring::default();
        let addr = VringAddr {
            index: 0,
            flags: 0,
            desc: 0,
            used: 0x1000,
            avail: u64::MAX,
        };
        assert!(matches!(
            ring.set_addr(addr, &[]),
            Err(RingError::Address { .. })
        ));
        assert!(!ring.is_ready());
    }

    #[test]
    fn a_stopped_ring_goes_on_from_what_it_gave_back() {
        let mut ring = Ring::default();
        ring.stopped(QueuePosition {
            next_avail: 8,
            next_used: 7,
        });
        assert_eq!(ring.base(), 7);
    }
}
