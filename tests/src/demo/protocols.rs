//! The demonstration's guests that speak other protocols: memballoon (device ID 13), and VMware's commands.
//!
//! As the synthetic guest: the test VMM, the library through its C ABI, memory in a memfd. Their drivers give
//! and take pages of 2 MiB.

use std::{
    collections::BTreeSet,
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    DemoError,
    guest::{DemoGuest, DemoObserver},
    options::{Options, Protocol},
    synthetic::SyntheticObserver,
};
use crate::vmm::{
    MIB, PAGE_BYTES, Result, Vmm,
    device::Device,
    mapping::Backing,
    memballoon::{MAX_ADDRESSES, Memballoon, Said, size_feature},
    ram::{GuestRam, RegionSpec},
    vmware::{ALL_CAPABILITIES, LARGE, VmwareGuest},
    working_set::WorkingSet,
};

const SEED: u64 = 0x6d65_6d62_616c;
const LARGE_BYTES: u64 = LARGE * PAGE_BYTES;
/// How often a driver looks what the host wants; VMware's does every second.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A guest's driver, and what the guest has of its memory: pages of 2 MiB, by the number of their first
/// page of 4 KiB.
trait Driver: Debug + Send {
    fn device(&self) -> Arc<Device>;
    fn ram(&self) -> GuestRam;
    /// Moves towards what the host asks for.
    fn step(&mut self) -> Result<()>;
    /// Pages that the guest does not use.
    fn unused(&mut self) -> &mut BTreeSet<u64>;
}

impl Driver for VmwareGuest {
    fn device(&self) -> Arc<Device> {
        Arc::clone(VmwareGuest::device(self))
    }

    fn ram(&self) -> GuestRam {
        VmwareGuest::ram(self).clone()
    }

    fn step(&mut self) -> Result<()> {
        self.poll()
    }

    fn unused(&mut self) -> &mut BTreeSet<u64> {
        &mut self.large_free
    }
}

/// A driver of memballoon: it keeps to the minimum that it was told last, in either direction.
#[derive(Debug)]
struct MemballoonDriver {
    machine: Memballoon,
    target_bytes: u64,
    unused: BTreeSet<u64>,
    balloon: Vec<u64>,
}

impl MemballoonDriver {
    fn boot(vmm: &Vmm, regions: &[RegionSpec]) -> Result<Self> {
        let selected = Memballoon::TRANSPORT | size_feature(LARGE_BYTES);
        let machine = Memballoon::boot(vmm, regions, selected)?;
        let first = machine.kernel_end.next_multiple_of(LARGE_BYTES) / PAGE_BYTES;
        let pages = machine.ram().pfns();
        let pages = pages.filter(|pfn| pfn.is_multiple_of(LARGE) && *pfn >= first);
        Ok(Self {
            unused: pages.collect(),
            machine,
            target_bytes: 0,
            balloon: Vec::new(),
        })
    }
}

impl Driver for MemballoonDriver {
    fn device(&self) -> Arc<Device> {
        Arc::clone(self.machine.device())
    }

    fn ram(&self) -> GuestRam {
        GuestRam::clone(self.machine.ram())
    }

    fn step(&mut self) -> Result<()> {
        if let Some(Said::Minimum(bytes)) = self.machine.heard()? {
            self.target_bytes = bytes.max(0).cast_unsigned();
        }
        let target = usize::try_from(self.target_bytes.div_ceil(LARGE_BYTES)).unwrap_or(0);
        let gpas =
            |pages: &[u64]| -> Vec<u64> { pages.iter().map(|pfn| pfn * PAGE_BYTES).collect() };
        let missing = target.saturating_sub(self.balloon.len()).min(MAX_ADDRESSES);
        let given: Vec<u64> = (0..missing)
            .map_while(|_| self.unused.pop_first())
            .collect();
        if !given.is_empty() {
            self.machine.give(&gpas(&given))?;
            self.balloon.extend(given);
        }
        let excess = self.balloon.len().saturating_sub(target).min(MAX_ADDRESSES);
        let wanted = self.balloon.split_off(self.balloon.len() - excess);
        if !wanted.is_empty() {
            let granted = self.machine.get(&gpas(&wanted))?;
            let granted = usize::try_from(granted).unwrap_or(0);
            let (back, kept) = wanted.split_at(granted);
            self.unused.extend(back);
            self.balloon.extend(kept);
        }
        Ok(())
    }

    fn unused(&mut self) -> &mut BTreeSet<u64> {
        &mut self.unused
    }
}

/// A guest whose driver has a thread of its own.
#[derive(Debug)]
pub struct ProtocolGuest {
    // Dropped in this order: driver and device go before the runtime that serves them.
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    driver: Arc<Mutex<dyn Driver>>,
    device: Arc<Device>,
    ram: GuestRam,
    working_set: Option<(WorkingSet, u64)>,
    protocol: Protocol,
    _vmm: Vmm,
}

impl ProtocolGuest {
    /// Loads the library and boots the guest.
    ///
    /// # Errors
    /// The library is missing or refuses.
    pub fn start(options: &Options) -> std::result::Result<Self, DemoError> {
        let vmm = Vmm::new()?;
        let memory = Backing::Memfd { offset_bytes: 0 };
        let regions = [RegionSpec::new(0, options.memory_mib * MIB, memory)];
        let driver: Arc<Mutex<dyn Driver>> = if options.protocol == Protocol::Vmware {
            Arc::new(Mutex::new(VmwareGuest::boot(
                &vmm,
                &regions,
                ALL_CAPABILITIES,
            )?))
        } else {
            Arc::new(Mutex::new(MemballoonDriver::boot(&vmm, &regions)?))
        };
        let (device, ram) = {
            let driver = driver.lock();
            (driver.device(), driver.ram())
        };
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, steps) = (Arc::clone(&stop), Arc::clone(&driver));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                if let Err(error) = steps.lock().step() {
                    eprintln!("the guest's driver gives up: {error}");
                    break;
                }
                thread::sleep(LOOK_EVERY);
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
            driver,
            device,
            ram,
            working_set: None,
            protocol: options.protocol,
            _vmm: vmm,
        })
    }
}

impl Drop for ProtocolGuest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // It told of its own failure.
            let _ = thread.join();
        }
    }
}

impl DemoGuest for ProtocolGuest {
    fn description(&self) -> String {
        let speaks = match self.protocol {
            Protocol::Vmware => "VMware's balloon commands, as Linux's vmw_balloon does",
            _ => "memballoon, virtio device ID 13",
        };
        format!(
            "Guest: a synthetic one with {} MiB, which speaks {speaks}, in pages of 2 MiB.\n\
             Device: libaerostat.so through its C ABI. Host memory: blocks of the memfd that holds \
             the guest's memory.\n",
            self.ram.total_bytes() / MIB,
        )
    }

    fn observer(&self) -> std::result::Result<Box<dyn DemoObserver>, DemoError> {
        Ok(Box::new(SyntheticObserver {
            device: Arc::clone(&self.device),
            ram: Arc::new(self.ram.clone()),
        }))
    }

    fn make_working_set(&mut self, mib: u64) -> std::result::Result<String, DemoError> {
        let mut driver = self.driver.lock();
        let unused = driver.unused();
        let count = (mib * MIB).div_ceil(LARGE_BYTES);
        let pages: Vec<u64> = (0..count)
            .map_while(|_| unused.pop_first())
            .flat_map(|first| first..first + LARGE)
            .collect();
        let set = WorkingSet::fill(&self.ram, pages, SEED);
        let checksum = set.checksum(&self.ram);
        self.working_set = Some((set, checksum));
        Ok(format!("{checksum:016x}"))
    }

    fn working_set_is_intact(&mut self) -> std::result::Result<bool, DemoError> {
        Ok(self.working_set.as_ref().is_some_and(|(set, checksum)| {
            set.damaged(&self.ram).is_empty() && set.checksum(&self.ram) == *checksum
        }))
    }

    fn touch_unused_memory(&mut self) -> std::result::Result<u64, DemoError> {
        let mut driver = self.driver.lock();
        let unused = driver.unused();
        for pfn in unused.iter().flat_map(|first| *first..*first + LARGE) {
            self.ram.touch(pfn);
        }
        Ok(unused.len() as u64 * LARGE_BYTES)
    }

    fn touch_memory(&mut self, mib: u64) -> std::result::Result<(), DemoError> {
        let mut driver = self.driver.lock();
        let pages = driver.unused();
        let count = usize::try_from((mib * MIB).div_ceil(LARGE_BYTES)).unwrap_or(usize::MAX);
        if pages.len() < count {
            return Err(DemoError::Sizes(format!(
                "the guest has not got {mib} MiB any more"
            )));
        }
        let pages = pages.iter().take(count);
        for pfn in pages.flat_map(|first| *first..*first + LARGE) {
            self.ram.touch(pfn);
        }
        Ok(())
    }

    fn set_target(&mut self, ballooned_bytes: u64) -> std::result::Result<(), DemoError> {
        Ok(self.device.set_target(ballooned_bytes)?)
    }
}
