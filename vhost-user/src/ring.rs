//! A virtqueue's ring as the front-end describes it, message by message, until it can be started.
//!
//! Specification: vhost-user, "Ring states". A ring is stopped until its kick descriptor comes, and
//! disabled until SET_VRING_ENABLE if protocol features were negotiated; it is served when it is
//! neither. GET_VRING_BASE stops it.

use crate::mapping::{Slot, translate};
use crate::message::VringAddr;
use aerostat_device::memory::Gpa;
use aerostat_device::{EventFd, GuestMemory, QueueConfig, QueuePosition, RingConfig, Sharer};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::io;
use std::os::fd::OwnedFd;

/// The most entries of a ring (virtio 1.4, "Split Virtqueues", "Packed Virtqueues").
const MAX_ENTRIES: u32 = 32768;
/// Where a new packed ring starts: slot 0 of the lap whose wrap counter is 1, twice.
const PACKED_START: u32 = 0x8000_8000;
/// "used" among the flags of a packed descriptor, which are its last two bytes.
const PACKED_USED: u16 = 1 << 15;
const PACKED_FLAGS: u64 = 14;

/// Why a ring cannot be started, or set up so.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingError {
    #[error("{0} entries; a ring has up to 32768 of them, a split one a power of two")]
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
    #[error(transparent)]
    Device(#[from] aerostat_device::Error),
}

/// What is known of a ring.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    entries: Option<u16>,
    addr: Option<VringAddr>,
    /// Where to go on, as the front-end or the last stop left it: of a split ring the next entry of the
    /// available ring, of a packed one the next slots to be taken and to be used, each with its wrap
    /// counter (vhost-user, "Vring base").
    base: u32,
    /// Whether the front-end gave the base, since the ring last ran.
    base_given: bool,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    err: Option<EventFd>,
    pub(crate) enabled: bool,
    pub(crate) started: bool,
}

impl Ring {
    pub(crate) fn set_entries(&mut self, entries: u32, packed: bool) -> Result<(), RingError> {
        let allowed = entries.is_power_of_two() || packed && entries > 0;
        let valid = allowed && entries <= MAX_ENTRIES;
        self.entries = u16::try_from(entries).ok().filter(|_| valid);
        self.entries.map(drop).ok_or(RingError::Entries(entries))
    }

    pub(crate) fn set_base(&mut self, base: u32, packed: bool) -> Result<(), RingError> {
        if !packed && base > u32::from(u16::MAX) {
            return Err(RingError::Base(base));
        }
        self.base = base;
        self.base_given = true;
        Ok(())
    }

    pub(crate) fn base(&self) -> u32 {
        self.base
    }

    /// Whether the front-end says that the ring begins at its first entry.
    pub(crate) fn is_new(
        &self,
        slots: &[Slot],
        memory: Option<&GuestMemory>,
        packed: bool,
    ) -> bool {
        let first = match self.base {
            0 => !packed || self.has_unused_start(slots, memory),
            base => packed && base == PACKED_START,
        };
        self.base_given && first
    }

    /// Whether the front-end says that the ring goes on where it was.
    pub(crate) fn is_resumed(&self) -> bool {
        self.base_given && self.base != 0 && self.base != PACKED_START
    }

    /// Whether nothing was ever used of a packed ring. Linux's virtio_uml gives the base of a new one as
    /// zero, which says the second lap; behind a first one the first slot is marked as used.
    fn has_unused_start(&self, slots: &[Slot], memory: Option<&GuestMemory>) -> bool {
        let start = self.addr.and_then(|addr| translate(slots, addr.desc));
        let flags = start
            .and_then(|start| start.0.checked_add(PACKED_FLAGS))
            .and_then(|at| read_u16(memory?, Gpa(at)));
        flags.is_some_and(|flags| flags & PACKED_USED == 0)
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
        let event = |fd| EventFd::new("err", fd, Sharer::Untrusted);
        self.err = err.map(event).transpose()?;
        Ok(())
    }

    /// A second handle to the call descriptor.
    pub(crate) fn call(&self) -> io::Result<Option<OwnedFd>> {
        self.call.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// Tells the front-end that the ring broke.
    pub(crate) fn signal_error(&self) {
        if let Some(err) = &self.err {
            err.signal();
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
        packed: bool,
    ) -> Result<Option<QueueConfig>, RingError> {
        let (Some(addr), Some(kick)) = (self.addr, &self.kick) else {
            return Ok(None);
        };
        let addresses = Addresses::of(addr, slots)?;
        let position = if packed {
            self.packed_position(slots, memory)
        } else {
            let next_avail = low(self.base);
            let index = memory.and_then(|memory| used_index(memory, addresses.used));
            let next_used = index.ok_or(RingError::Address {
                what: "the used ring",
                address: addr.used,
            })?;
            QueuePosition {
                next_avail,
                next_used,
            }
        };
        Ok(Some(QueueConfig {
            size: self.entries.ok_or(RingError::NoSize)?,
            ring: Some(RingConfig {
                desc: addresses.desc,
                avail: addresses.avail,
                used: addresses.used,
                kick: kick.try_clone()?,
                call: self.call()?,
                position,
            }),
        }))
    }

    /// Where a packed ring goes on.
    fn packed_position(&self, slots: &[Slot], memory: Option<&GuestMemory>) -> QueuePosition {
        if self.base == 0 && self.has_unused_start(slots, memory) {
            return QueuePosition::PACKED_START;
        }
        QueuePosition {
            next_avail: low(self.base),
            next_used: low(self.base >> 16),
        }
    }

    /// Notes that it was stopped at `position`.
    ///
    /// What was taken and not given back (the statistics buffer, which the device holds on to) is
    /// to be taken again, by us or by whoever serves the ring next: the position that the protocol
    /// knows is one number, so the ring goes on from the last entry that was given back.
    pub(crate) fn stopped(&mut self, position: QueuePosition, packed: bool) {
        self.started = false;
        self.base_given = false;
        let used = u32::from(position.next_used);
        self.base = if packed { used | used << 16 } else { used };
    }

    /// Back to the beginning, but for the descriptors that the device signals. QEMU does not send
    /// them again after a reset, and Linux's virtio_uml complains of an interrupt whose other end is
    /// closed before the driver has gone.
    pub(crate) fn reset(&mut self, enabled: bool) {
        *self = Self {
            call: self.call.take(),
            err: self.err.take(),
            enabled,
            ..Self::default()
        };
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
    read_u16(memory, Gpa(used.0.checked_add(2)?))
}

fn read_u16(memory: &GuestMemory, at: Gpa) -> Option<u16> {
    let mut bytes = [0; 2];
    let slice = memory.slice_prefix(at, 2)?;
    (slice.read(0, &mut bytes) == bytes.len()).then(|| u16::from_le_bytes(bytes))
}

/// The lower half.
fn low(value: u32) -> u16 {
    u16::try_from(value & u32::from(u16::MAX)).unwrap_or(0)
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
            assert!(ring.set_entries(entries, false).is_err());
        }
        ring.set_entries(32768, false).unwrap();
        ring.set_base(65535, false).unwrap();
        assert!(ring.set_base(65536, false).is_err());
        assert_eq!(ring.base(), 65535);
        for entries in [0, 32769, u32::MAX] {
            assert!(ring.set_entries(entries, true).is_err());
        }
        ring.set_entries(3, true).unwrap();
        ring.set_base(u32::MAX, true).unwrap();
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
        let position = QueuePosition {
            next_avail: 8,
            next_used: 7,
        };
        ring.stopped(position, false);
        assert_eq!(ring.base(), 7);
        ring.stopped(position, true);
        assert_eq!(ring.base(), 7 | 7 << 16);
    }
}
