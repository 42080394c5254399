//! A machine: memory, device, queues and driver, put together as a VMM does it.

use super::allocator::{Order, PageAllocator};
use super::books::assert_balanced;
use super::device::{Device, Runtime, State, size_of_u32};
use super::driver::{Driver, ROLES, Role, Slot};
use super::elements::ElementPump;
use super::error::{Result, VmmError};
use super::eventfd::EventFd;
use super::follower::Follower;
use super::mapping::Backing;
use super::ram::{GuestRam, RegionSpec};
use super::settings::Settings;
use super::vring::{Placement, Vring};
use super::working_set::WorkingSet;
use super::{MIB, PAGE_BYTES};
use aerostat::{
    AEROSTAT_FEATURE_DEFLATE_ON_OOM, AEROSTAT_FEATURE_EVENT_IDX, AEROSTAT_FEATURE_FREE_PAGE_HINT,
    AEROSTAT_FEATURE_INDIRECT_DESC, AEROSTAT_FEATURE_MUST_TELL_HOST,
    AEROSTAT_FEATURE_PAGE_REPORTING, AEROSTAT_FEATURE_STATS_VQ, AEROSTAT_FEATURE_VERSION_1,
    AEROSTAT_QUEUE_ELEMENT, AEROSTAT_QUEUE_PACKED_START, aerostat_counters, aerostat_queue_config,
    aerostat_queue_position,
};
use parking_lot::{Mutex, MutexGuard, RwLock};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How the driver numbers its queues (requirements S, "Queues").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Numbering {
    /// As Linux: those of the negotiated features, without gaps.
    #[default]
    Dense,
    /// As the text of the standard: 0, 1, 2, 3, 4.
    Fixed,
}

/// A guest to be made.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// What its memfds are called.
    pub name: &'static str,
    /// Its memory. The lowest region holds the driver's queues and buffers.
    pub regions: Vec<RegionSpec>,
    /// What the device is to offer; 0 leaves the choice to the library.
    pub offered: u64,
    /// What the driver selects, as far as it is offered.
    pub selected: u64,
    /// How it numbers its queues.
    pub numbering: Numbering,
    /// Descriptors a queue.
    pub queue_size: u16,
    /// Whether the VMM pops the queues itself.
    pub elements: bool,
    /// In which order the guest hands out pages.
    pub order: Order,
    /// What the test leaves open.
    pub settings: Settings,
}

impl GuestConfig {
    /// What stock Linux selects, as far as this driver can do it: with split rings.
    /// Linux drops poison unless free pages are initialised.
    pub const LINUX: u64 = AEROSTAT_FEATURE_MUST_TELL_HOST
        | AEROSTAT_FEATURE_STATS_VQ
        | AEROSTAT_FEATURE_DEFLATE_ON_OOM
        | AEROSTAT_FEATURE_FREE_PAGE_HINT
        | AEROSTAT_FEATURE_PAGE_REPORTING
        | AEROSTAT_FEATURE_INDIRECT_DESC
        | AEROSTAT_FEATURE_EVENT_IDX
        | AEROSTAT_FEATURE_VERSION_1;

    /// A guest with one region at 0.
    #[must_use]
    pub fn new(backing: Backing, mib: u64) -> Self {
        Self::with_regions(vec![RegionSpec::new(0, mib * MIB, backing)])
    }

    /// A guest with these regions.
    #[must_use]
    pub fn with_regions(regions: Vec<RegionSpec>) -> Self {
        Self {
            name: "guest",
            regions,
            offered: 0,
            selected: Self::LINUX,
            numbering: Numbering::Dense,
            queue_size: 128,
            elements: false,
            order: Order::Ascending,
            settings: Settings::chosen(),
        }
    }

    /// For a test that writes split rings itself, whatever the suites run with.
    #[must_use]
    pub fn with_plain_split_rings(mut self) -> Self {
        self.settings = self.settings.with_plain_split_rings();
        self
    }

    /// With the features of the settings, where the library sees rings.
    fn resolved(&self, runtime: &Runtime) -> Result<Self> {
        let mut config = self.clone();
        let rings = config.settings.features();
        if !config.elements && rings != 0 {
            if config.offered == 0 {
                config.offered = Device::new(runtime, 0, -1, -1)?.offered_features()?;
            }
            config.offered |= rings;
            config.selected |= rings;
        }
        Ok(config)
    }
}

/// A process that runs guests: one runtime of the library for all of them.
#[derive(Debug)]
pub struct Vmm {
    runtime: Runtime,
}

impl Vmm {
    /// Loads the library and starts its threads, as many as it chooses.
    ///
    /// # Errors
    /// The library is missing, or refuses.
    pub fn new() -> Result<Self> {
        Self::with_workers(0)
    }

    /// As [`Self::new`], with this many threads for each host node.
    ///
    /// # Errors
    /// The library is missing, or refuses.
    pub fn with_workers(workers_per_node: u32) -> Result<Self> {
        let runtime = Runtime::new(workers_per_node)?;
        Ok(Self { runtime })
    }

    /// Its runtime.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// A machine whose driver has not begun: device and memory only.
    ///
    /// # Errors
    /// Host or library refuse.
    pub fn assemble(&self, config: &GuestConfig) -> Result<Guest> {
        let config = &config.resolved(&self.runtime)?;
        let ram = Arc::new(GuestRam::new(config.name, &config.regions)?);
        let config_event = Arc::new(EventFd::new()?);
        let completion_event = Arc::new(EventFd::new()?);
        let device = Arc::new(Device::new(
            &self.runtime,
            config.offered,
            config_event.raw(),
            completion_event.raw(),
        )?);
        config.settings.apply(&device)?;
        device.set_memory(&ram)?;
        let (buffers, kernel_end) = buffers_of(config);
        let pfns = ram.pfns().filter(|pfn| pfn * PAGE_BYTES >= kernel_end);
        let allocator = PageAllocator::new(pfns, config.order);
        let slot = Arc::new(RwLock::new(Arc::clone(&device)));
        let driver = Driver::new(
            Arc::clone(&slot),
            Arc::clone(&ram),
            Vec::new(),
            buffers,
            allocator,
        );
        Ok(Guest {
            follower: None,
            pump: None,
            driver: Arc::new(Mutex::new(driver)),
            slot,
            wiring: Vec::new(),
            device,
            ram,
            config_event,
            completion_event,
            config: config.clone(),
        })
    }

    /// A machine whose driver is up: what Linux does until its probe function returns.
    ///
    /// # Errors
    /// Host or library refuse.
    pub fn boot(&self, config: &GuestConfig) -> Result<Guest> {
        let mut guest = self.assemble(config)?;
        guest.start_driver()?;
        Ok(guest)
    }
}

/// A machine. Fields that use others stand before them.
#[derive(Debug)]
pub struct Guest {
    follower: Option<Follower>,
    pump: Option<ElementPump>,
    driver: Arc<Mutex<Driver>>,
    slot: Slot,
    /// The started queues, by index, as they were when they were new.
    wiring: Vec<(u32, aerostat_queue_config)>,
    device: Arc<Device>,
    ram: Arc<GuestRam>,
    /// Signalled when the guest is to get a configuration change interrupt.
    pub config_event: Arc<EventFd>,
    /// Signalled when completions of elements wait.
    pub completion_event: Arc<EventFd>,
    config: GuestConfig,
}

impl Guest {
    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Where its driver finds the device.
    pub(super) fn slot(&self) -> Slot {
        Arc::clone(&self.slot)
    }

    /// The started queues.
    pub(super) fn wiring(&self) -> &[(u32, aerostat_queue_config)] {
        &self.wiring
    }

    /// Takes another device, also for the slot.
    pub(super) fn plug(&mut self, device: Device) -> Arc<Device> {
        self.device = Arc::new(device);
        Arc::clone(&self.device)
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Its driver.
    pub fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock()
    }

    /// How it was made.
    #[must_use]
    pub fn config(&self) -> &GuestConfig {
        &self.config
    }

    /// Negotiation up to FEATURES_OK; returns what was selected.
    ///
    /// # Errors
    /// The device refuses.
    pub fn negotiate(&self) -> Result<u64> {
        let features = self.device.offered_features()? & self.config.selected;
        self.device.set_features(features)?;
        Ok(features)
    }

    /// Lays the queues out and starts them.
    ///
    /// # Errors
    /// The device refuses.
    pub fn start_queues(&mut self, features: u64) -> Result<()> {
        let queues = self.lay_out_queues(features)?;
        self.wiring.clear();
        for (role, queue) in &queues {
            let index = queue_index(*role, features, self.config.numbering);
            let config = queue_config(queue, self.config.elements);
            self.device.start_queue(index, &config)?;
            self.wiring.push((index, config));
        }
        let mut driver = self.driver.lock();
        driver.restart(queues);
        driver.set_features(features);
        drop(driver);
        Ok(())
    }

    fn lay_out_queues(&self, features: u64) -> Result<Vec<(Role, Vring)>> {
        let placements = placements(&self.config);
        let present = ROLES.into_iter().zip(placements).filter(|(role, _)| {
            let needed = feature_of(*role);
            features & needed == needed
        });
        let ring = |(role, placement)| {
            let queue = Vring::new(&self.ram, placement, features)?;
            Ok((role, queue))
        };
        present.map(ring).collect()
    }

    /// Everything that Linux does until its driver is up: FEATURES_OK, queues, the first statistics
    /// buffer (kicked before DRIVER_OK, as Linux does), DRIVER_OK.
    ///
    /// # Errors
    /// The device refuses.
    pub fn start_driver(&mut self) -> Result<()> {
        let features = self.negotiate()?;
        self.start_queues(features)?;
        if features & AEROSTAT_FEATURE_STATS_VQ != 0 {
            let mut driver = self.driver.lock();
            driver.set_stats(&[(4, self.ram.total_bytes()), (5, self.ram.total_bytes())]);
            driver.post_stats()?;
        }
        self.device.activate()?;
        if self.config.elements {
            self.pump = Some(ElementPump::start(self)?);
        }
        Ok(())
    }

    /// The device's index of the queue of `role`.
    ///
    /// # Errors
    /// The device does not tell what was negotiated.
    pub fn index_of(&self, role: Role) -> Result<u32> {
        let queues = self.driver.lock();
        let features = queues.queues().fold(0, |all, (of, _)| all | feature_of(of));
        Ok(queue_index(role, features, self.config.numbering))
    }

    /// The driver goes away and comes back: reset, then everything again.
    ///
    /// # Errors
    /// The device refuses.
    pub fn restart_driver(&mut self) -> Result<()> {
        self.pump = None;
        self.device.reset()?;
        // What the old driver had out is of no interest to the new one.
        while !self.device.completions()?.is_empty() {}
        self.start_driver()
    }

    /// Starts the driver's work queue: from now on it follows the target by itself.
    ///
    /// # Errors
    /// There are no descriptors or threads left.
    pub fn start_following(&mut self) -> Result<()> {
        let config_event = Arc::clone(&self.config_event);
        self.follower = Some(Follower::start(Arc::clone(&self.driver), config_event)?);
        Ok(())
    }

    /// Ends it again.
    pub fn stop_following(&mut self) {
        self.follower = None;
    }

    /// Makes a working set of `pages` pages, and has the host allocate all the rest of the guest's
    /// memory too.
    ///
    /// # Errors
    /// The guest has not got as many pages.
    pub fn fill_memory(&self, pages: u64, seed: u64) -> Result<WorkingSet> {
        let mut driver = self.driver.lock();
        let set = WorkingSet::allocate(&self.ram, &mut driver.allocator, pages, seed)?;
        driver.touch_unused(u64::MAX);
        Ok(set)
    }

    /// Sets the target and lets the driver move there at once, in this thread.
    ///
    /// # Errors
    /// The device refuses or does not answer.
    ///
    /// # Panics
    /// If there is no configuration change interrupt, or the books do not balance.
    pub fn balloon_to(&self, bytes: u64) -> Result<()> {
        self.device.set_target(bytes)?;
        assert!(self.config_event.take() > 0, "no configuration change");
        self.driver.lock().follow_target()?;
        self.books().map(drop)
    }

    /// The books, which have to balance (I4).
    ///
    /// # Errors
    /// The device does not answer.
    ///
    /// # Panics
    /// If they do not balance.
    #[track_caller]
    pub fn books(&self) -> Result<aerostat_counters> {
        let counters = self.device.counters()?;
        assert_balanced(&counters);
        Ok(counters)
    }

    /// Fails unless `set` holds what was written to it.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn assert_intact(&self, set: &WorkingSet) {
        let damaged = set.damaged(&self.ram);
        assert!(damaged.is_empty(), "damaged pages: {damaged:x?}");
    }

    /// Fails unless the device needs a reset, or does so soon, and has said so (S4).
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn assert_needs_reset(&self) {
        let told = self.config_event.wait(Duration::from_secs(10));
        assert!(told, "no configuration change interrupt");
        let state = self.device.state();
        assert!(matches!(state, Ok(State::NeedsReset)), "{state:?}");
    }

    /// The books once nothing is pending any more.
    ///
    /// # Errors
    /// Something stays pending.
    pub fn settled_books(&self) -> Result<aerostat_counters> {
        poll("pending discards", Duration::from_secs(5), || {
            let counters = self.books()?;
            let pending = counters.balloon.pending_bytes + counters.report.pending_bytes;
            Ok((pending == 0).then_some(counters))
        })
    }

    /// Waits until the guest says that its balloon has `bytes`.
    ///
    /// # Errors
    /// It does not in time.
    pub fn wait_actual(&self, bytes: u64, timeout: Duration) -> Result<()> {
        poll("the balloon's target", timeout, || {
            Ok((self.device.query()?.actual_bytes == bytes).then_some(()))
        })
    }

    /// Has the device ask for statistics until it knows that the free memory (tag 4) is `value`, and so all that the
    /// driver sent before.
    ///
    /// # Errors
    /// It does not in time.
    pub fn tell_statistics(&self, value: u64, timeout: Duration) -> Result<()> {
        self.driver().set_stats(&[(4, value)]);
        poll("the statistics", timeout, || {
            if self.device.guest_stats(0)?.values[4] == value {
                return Ok(Some(()));
            }
            // Nobody answers while this thread waits; the request is out all the same.
            let _ = self.device.guest_stats(1);
            self.driver().answer_stats()?;
            Ok(None)
        })
    }

    /// Waits until the driver, which follows its target, has seen that the host reset its balloon.
    ///
    /// # Errors
    /// It has not in time.
    pub fn wait_host_reset(&self, timeout: Duration) -> Result<()> {
        poll("the acknowledgement of a host reset", timeout, || {
            let (id, acknowledged) = self.driver.lock().reset_fields()?;
            Ok((id == acknowledged).then_some(()))
        })
    }

    /// Replaces the guest's memory: hot-add with `add`, hot-remove with the `remove`d region's
    /// address. The driver does not use the new region, nor stop using the old one, by itself.
    ///
    /// # Errors
    /// The device refuses; the guest has its old memory then.
    pub fn change_memory(&mut self, add: Option<RegionSpec>, remove: Option<u64>) -> Result<()> {
        let mut ram = GuestRam::clone(&self.ram);
        if let Some(gpa) = remove {
            ram = ram.without(gpa);
        }
        if let Some(spec) = add {
            ram = ram.with(spec)?;
        }
        self.device.set_memory(&ram)?;
        self.ram = Arc::new(ram);
        self.driver.lock().set_ram(Arc::clone(&self.ram));
        Ok(())
    }
}

/// The feature that a queue depends on.
fn feature_of(role: Role) -> u64 {
    match role {
        Role::Inflate | Role::Deflate => 0,
        Role::Stats => AEROSTAT_FEATURE_STATS_VQ,
        Role::Hints => AEROSTAT_FEATURE_FREE_PAGE_HINT,
        Role::Reporting => AEROSTAT_FEATURE_PAGE_REPORTING,
    }
}

/// The index of the queue of `role`.
#[must_use]
pub fn queue_index(role: Role, features: u64, numbering: Numbering) -> u32 {
    let stats = u32::from(features & AEROSTAT_FEATURE_STATS_VQ != 0);
    let hints = u32::from(features & AEROSTAT_FEATURE_FREE_PAGE_HINT != 0);
    match (role, numbering) {
        (Role::Inflate, _) => 0,
        (Role::Deflate, _) => 1,
        (Role::Stats, _) => 2,
        (Role::Hints, Numbering::Dense) => 2 + stats,
        (Role::Hints, Numbering::Fixed) => 3,
        (Role::Reporting, Numbering::Dense) => 2 + stats + hints,
        (Role::Reporting, Numbering::Fixed) => 4,
    }
}

/// What the device is told of a queue that goes on at `position`.
#[must_use]
pub fn resumed(
    config: &aerostat_queue_config,
    position: &aerostat_queue_position,
) -> aerostat_queue_config {
    aerostat_queue_config {
        next_avail: position.next_avail,
        next_used: position.next_used,
        ..*config
    }
}

/// What the device is told of a queue.
#[must_use]
pub fn queue_config(queue: &Vring, elements: bool) -> aerostat_queue_config {
    let placement = queue.placement();
    let start = if queue.is_packed() {
        AEROSTAT_QUEUE_PACKED_START
    } else {
        0
    };
    aerostat_queue_config {
        size: size_of_u32::<aerostat_queue_config>(),
        flags: if elements { AEROSTAT_QUEUE_ELEMENT } else { 0 },
        queue_size: placement.size,
        next_avail: start,
        next_used: start,
        reserved: 0,
        kick_fd: if elements { -1 } else { queue.kick.raw() },
        call_fd: if elements { -1 } else { queue.call.raw() },
        desc_gpa: placement.desc,
        avail_gpa: placement.avail,
        used_gpa: placement.used,
    }
}

/// Where each role's queue lies.
fn placements(config: &GuestConfig) -> Vec<Placement> {
    let mut next = lowest(config);
    ROLES
        .iter()
        .map(|_| {
            let (placement, end) = Placement::lay_out(next, config.queue_size);
            next = end;
            placement
        })
        .collect()
}

/// Where the driver's two buffer pages lie, and what follows the kernel's own memory.
fn buffers_of(config: &GuestConfig) -> (u64, u64) {
    let queues = placements(config);
    let end = queues
        .last()
        .map_or(0, |last| Placement::lay_out(last.desc, last.size).1);
    (end, end + 2 * PAGE_BYTES)
}

fn lowest(config: &GuestConfig) -> u64 {
    let starts = config.regions.iter().map(|region| region.gpa);
    starts.min().unwrap_or(0)
}

/// Looks every millisecond until there is something.
fn poll<T>(
    what: &'static str,
    timeout: Duration,
    look: impl Fn() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(seen) = look()? {
            return Ok(seen);
        }
        if Instant::now() > deadline {
            let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            return Err(VmmError::TimedOut { what, millis });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
