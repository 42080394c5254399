//! The demonstration's synthetic guest: the same story where no real guest can be had.
//!
//! The project's own test VMM drives the device through the C ABI of `libaerostat.so`, with a
//! driver that behaves as Linux's does, on memory in a memfd. The blocks of that file are what the
//! guest costs its host.

use std::sync::Arc;

use super::{
    DemoError,
    guest::{DemoGuest, DemoObserver, Reading},
    options::Options,
};
use crate::vmm::{
    Guest, GuestConfig, MIB, PAGE_BYTES, Vmm, device::Device, mapping::Backing, ram::GuestRam,
    working_set::WorkingSet,
};

/// Where the working set's contents start from.
const SEED: u64 = 0x6261_6c6c_6f6f_6e73;

/// A guest of the test VMM.
#[derive(Debug)]
pub struct SyntheticGuest {
    // Dropped in this order: the guest goes before the runtime that serves it.
    guest: Guest,
    working_set: Option<(WorkingSet, u64)>,
    _vmm: Vmm,
}

impl SyntheticGuest {
    /// Loads the library and boots the guest.
    ///
    /// # Errors
    /// The library is missing or refuses.
    pub fn start(options: &Options) -> Result<Self, DemoError> {
        let vmm = Vmm::new()?;
        let memory = Backing::Memfd { offset_bytes: 0 };
        let mut guest = vmm.boot(&GuestConfig::new(memory, options.memory_mib))?;
        guest.start_following()?;
        Ok(Self {
            guest,
            working_set: None,
            _vmm: vmm,
        })
    }
}

impl DemoGuest for SyntheticGuest {
    fn description(&self) -> String {
        format!(
            "Guest: a synthetic one with {} MiB, whose driver behaves as Linux's does.\n\
             Device: libaerostat.so through its C ABI. Host memory: blocks of the memfd that holds \
             the guest's memory.\n",
            self.guest.ram().total_bytes() / MIB,
        )
    }

    fn observer(&self) -> Result<Box<dyn DemoObserver>, DemoError> {
        Ok(Box::new(SyntheticObserver {
            device: Arc::clone(self.guest.device()),
            ram: Arc::clone(self.guest.ram()),
        }))
    }

    fn make_working_set(&mut self, mib: u64) -> Result<String, DemoError> {
        let ram = self.guest.ram();
        let pages = mib * MIB / PAGE_BYTES;
        let set = WorkingSet::allocate(ram, &mut self.guest.driver().allocator, pages, SEED)?;
        let checksum = set.checksum(ram);
        self.working_set = Some((set, checksum));
        Ok(format!("{checksum:016x}"))
    }

    fn working_set_is_intact(&mut self) -> Result<bool, DemoError> {
        let ram = self.guest.ram();
        Ok(self.working_set.as_ref().is_some_and(|(set, checksum)| {
            set.damaged(ram).is_empty() && set.checksum(ram) == *checksum
        }))
    }

    fn touch_unused_memory(&mut self) -> Result<u64, DemoError> {
        Ok(self.guest.driver().touch_unused(u64::MAX) * PAGE_BYTES)
    }

    fn touch_memory(&mut self, mib: u64) -> Result<(), DemoError> {
        let pages = mib * MIB / PAGE_BYTES;
        if self.guest.driver().touch_unused(pages) < pages {
            return Err(DemoError::Sizes(format!(
                "the guest has not got {mib} MiB any more"
            )));
        }
        Ok(())
    }

    fn set_target(&mut self, ballooned_bytes: u64) -> Result<(), DemoError> {
        Ok(self.guest.device().set_target(ballooned_bytes)?)
    }
}

/// Reads the device's counters and the memfd's blocks.
pub(super) struct SyntheticObserver {
    pub(super) device: Arc<Device>,
    pub(super) ram: Arc<GuestRam>,
}

impl DemoObserver for SyntheticObserver {
    fn observe(&mut self) -> Result<Reading, DemoError> {
        let sizes = self.device.query()?;
        let counters = self.device.counters()?;
        Ok(Reading {
            target_bytes: sizes.target_bytes,
            actual_bytes: sizes.actual_bytes,
            discarded_bytes: counters.balloon.discarded_bytes,
            outstanding_bytes: counters.balloon.pending_bytes,
            discard_calls: counters.discard_calls,
            discard_ranges: counters.discard_ranges,
            discard_ns: counters.discard_ns,
            host_bytes: self.ram.allocated_bytes()?,
        })
    }
}
