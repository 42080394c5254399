//! One virtual machine as this process knows it: what outlives its sessions, and the device of the
//! session that is on.
//!
//! The target belongs to the virtual machine, not to a session: it is there when a guest comes back
//! after a reboot, and before the first guest comes. The books go on over sessions as well.

use crate::books::Books;
use crate::mapping::MemoryTable;
use crate::quota::LogQuota;
use crate::wake::Wake;
use aerostat_device::memory::{BALLOON_PAGE_BYTES, NodeId, PfnRange};
use aerostat_device::{
    Device, DeviceConfig, DeviceKind, DeviceState, Error, GuestStats, HintState, History,
    HistoryEntry, Runtime, Sharer, WriteBehind,
};
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// The largest target: the configuration space has 32 bits for a number of 4 KiB pages.
const MAX_TARGET_BYTES: u64 = u32::MAX as u64 * BALLOON_PAGE_BYTES;

/// How long a question for statistics holds on to a device at a time.
const STATS_SLICE: Duration = Duration::from_millis(200);

/// Why something cannot be done for a virtual machine. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmError {
    #[error("no guest is connected; start it, or wait for it to connect")]
    Disconnected,
    #[error("{bytes} is more than {limit} bytes, {what}; pass at most that")]
    TooLarge {
        bytes: u64,
        limit: u64,
        what: &'static str,
    },
    #[error("nothing is inhibited; call aerostat-inhibit first")]
    NotInhibited,
    #[error(transparent)]
    Device(#[from] Error),
}

/// A device while a front-end is connected, and the memory that it works on.
///
/// The order of the fields is the order of their end: the device goes before the mappings.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) device: Device,
    tables: Mutex<Vec<MemoryTable>>,
    /// Whether rings are being served; without them an active device counts as paused.
    serving: AtomicBool,
}

impl Attached {
    /// Gives the device a new memory table.
    pub(crate) fn set_memory(&self, table: MemoryTable) -> aerostat_device::Result<()> {
        // Kept from before the device has it until nobody has it any more (`Self::sweep`).
        let memory = Arc::clone(table.memory());
        self.tables.lock().push(table);
        self.device.set_memory(memory)
    }

    /// Lets go of the mappings of tables that nobody refers to any more.
    pub(crate) fn sweep(&self) {
        self.tables.lock().retain(MemoryTable::is_in_use);
    }

    /// Says whether any ring is served.
    pub(crate) fn set_serving(&self, serving: bool) {
        self.serving.store(serving, Ordering::Relaxed);
    }
}

/// What every driver of a virtual machine finds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Offer {
    /// The protocol that its device speaks.
    pub(crate) kind: DeviceKind,
    /// The feature bits; 0 is the device's default.
    pub(crate) features: u64,
    /// When acknowledged pages are discarded.
    pub(crate) write_behind: WriteBehind,
}

/// A virtual machine.
#[derive(Debug)]
pub(crate) struct Vm {
    /// What logs call it.
    pub(crate) name: String,
    /// For what its front-ends do. Here, and not in a session, as a front-end may connect as often as it likes.
    pub(crate) front_end_log: LogQuota,
    /// For its drivers' comings and goings, and the rings that they break.
    pub(crate) driver_log: LogQuota,
    runtime: Arc<Runtime>,
    offer: Offer,
    /// Where what its guest gives and takes is recorded.
    record: Option<PathBuf>,
    state: Mutex<State>,
    history: Arc<History>,
    /// Who wants to know that the driver's `actual` changed.
    watchers: Mutex<Vec<Weak<Wake>>>,
}

#[derive(Debug)]
struct State {
    attached: Option<Arc<Attached>>,
    target_bytes: u64,
    inhibits: u32,
    stats_interval_seconds: u64,
    past: Books,
}

/// Where a virtual machine stands, as `aerostat-query` words it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmState {
    Disconnected,
    Configured,
    Active,
    Paused,
    NeedsReset,
}

/// All that there is to know at one moment.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) state: VmState,
    pub(crate) memory_bytes: u64,
    pub(crate) target_bytes: u64,
    pub(crate) actual_bytes: u64,
    pub(crate) ballooned_bytes: u64,
    pub(crate) features: u64,
    pub(crate) inhibits: u32,
    pub(crate) books: Books,
}

impl Vm {
    /// A virtual machine that nobody has connected for yet; `record` is where what its guest gives and
    /// takes is recorded.
    pub(crate) fn new(
        name: String,
        runtime: Arc<Runtime>,
        offer: Offer,
        record: Option<PathBuf>,
    ) -> Arc<Self> {
        let past = Books::new(runtime.nodes());
        Arc::new(Self {
            name,
            front_end_log: LogQuota::new(),
            driver_log: LogQuota::new(),
            runtime,
            offer,
            record,
            state: Mutex::new(State {
                attached: None,
                target_bytes: 0,
                inhibits: 0,
                stats_interval_seconds: 0,
                past,
            }),
            history: History::new(),
            watchers: Mutex::default(),
        })
    }

    /// The host node of all memory, on a host that has but one. Otherwise front-ends do not say
    /// where their memory is.
    pub(crate) fn only_node(&self) -> Option<NodeId> {
        (self.runtime.nodes() == 1).then_some(NodeId(0))
    }

    /// Makes the device for a new session; `config_event` is signalled when its configuration changes.
    pub(crate) fn attach(&self, config_event: OwnedFd) -> aerostat_device::Result<Arc<Attached>> {
        let device = Device::with_history(
            &self.runtime,
            DeviceConfig {
                kind: self.offer.kind,
                features: self.offer.features,
                config_event: Some(config_event),
                completion_event: None,
                calls_shared_with: Sharer::Untrusted,
            },
            Arc::clone(&self.history),
        )?;
        device.set_write_behind(self.offer.write_behind);
        self.record(&device);
        let mut state = self.state.lock();
        if state.target_bytes > 0 {
            device.set_target_bytes(state.target_bytes)?;
        }
        for _ in 0..state.inhibits {
            device.inhibit();
        }
        device.set_stats_interval(interval(state.stats_interval_seconds));
        let attached = Arc::new(Attached {
            device,
            tables: Mutex::default(),
            serving: AtomicBool::new(false),
        });
        state.attached = Some(Arc::clone(&attached));
        Ok(attached)
    }

    /// Begins a recording, if there is to be one. A file that cannot be written is no reason to turn a
    /// guest away.
    fn record(&self, device: &Device) {
        if let Some(path) = &self.record {
            let begun = File::create(path).and_then(|file| device.record(Some(file)));
            if let Err(error) = begun {
                let level = self.front_end_log.level(log::Level::Warn);
                log::log!(
                    level,
                    "{}: recording to {}: {error}",
                    self.name,
                    path.display()
                );
            }
        }
    }

    /// Ends a session: the balloon is empty again, and the books are kept.
    pub(crate) fn detach(&self, attached: &Attached) {
        attached.device.reset();
        if let Err(error) = attached.device.record(None) {
            let level = self.front_end_log.level(log::Level::Warn);
            log::log!(level, "{}: the recording is incomplete: {error}", self.name);
        }
        let mut state = self.state.lock();
        state.past = state.past.clone().plus(&attached.device);
        state.attached = None;
        drop(state);
        self.actual_changed();
    }

    /// The device, if a front-end is connected.
    pub(crate) fn attached(&self) -> Result<Arc<Attached>, VmError> {
        self.state
            .lock()
            .attached
            .clone()
            .ok_or(VmError::Disconnected)
    }

    /// Sets how many bytes the balloon should hold, now and in later sessions. Returns the target as set.
    pub(crate) fn set_target_bytes(&self, bytes: u64) -> Result<u64, VmError> {
        let mut state = self.state.lock();
        let memory = state
            .attached
            .as_ref()
            .map_or(0, |attached| attached.device.memory_bytes());
        let (limit, what) = match memory {
            0 => (MAX_TARGET_BYTES, "the most that the protocol can express"),
            memory => (memory, "the guest's memory"),
        };
        if bytes > limit {
            return Err(VmError::TooLarge { bytes, limit, what });
        }
        let bytes = match &state.attached {
            Some(attached) => attached.device.set_target_bytes(bytes)?,
            None => bytes - bytes % BALLOON_PAGE_BYTES,
        };
        state.target_bytes = bytes;
        Ok(bytes)
    }

    /// Gives all ballooned pages back to the guest at once.
    pub(crate) fn reset_balloon(&self) -> Result<(), VmError> {
        Ok(self.attached()?.device.reset_balloon()?)
    }

    /// The guest's statistics; waits up to `timeout` for news.
    ///
    /// It waits in slices: whoever waits holds on to the device and so to the guest's memory, which
    /// must not cost the host anything for long when the guest is gone.
    pub(crate) fn guest_stats(&self, timeout: Duration) -> Result<GuestStats, VmError> {
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            let slice = left.min(STATS_SLICE);
            match self.attached()?.device.guest_stats(slice) {
                Err(Error::TimedOut { .. }) if left > slice => {}
                Err(Error::TimedOut { .. }) => {
                    let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
                    return Err(Error::TimedOut { timeout_ms }.into());
                }
                result => return Ok(result?),
            }
        }
    }

    /// How often the guest is asked for statistics, in seconds; 0 is never.
    pub(crate) fn stats_interval_seconds(&self) -> u64 {
        self.state.lock().stats_interval_seconds
    }

    /// Has this guest, and those of later sessions, asked for statistics every so many seconds; 0 is off.
    pub(crate) fn set_stats_interval_seconds(&self, seconds: u64) {
        let mut state = self.state.lock();
        state.stats_interval_seconds = seconds;
        if let Some(attached) = &state.attached {
            attached.device.set_stats_interval(interval(seconds));
        }
    }

    /// Begins a round of free page hints that lasts no longer than `limit`; returns its id.
    pub(crate) fn start_hints(&self, limit: Duration) -> Result<u32, VmError> {
        Ok(self.attached()?.device.start_hints(limit)?)
    }

    /// Ends the round of hints.
    pub(crate) fn finish_hints(&self) -> Result<(), VmError> {
        Ok(self.attached()?.device.finish_hints()?)
    }

    /// Takes up to `max` hints.
    pub(crate) fn take_hints(&self, max: usize) -> Result<(Vec<PfnRange>, HintState), VmError> {
        let mut ranges = Vec::new();
        let state = self.attached()?.device.take_hints(max, &mut ranges);
        Ok((ranges, state))
    }

    /// What happened behind entry number `since`, in all sessions.
    pub(crate) fn history(&self, since: u64, max: usize) -> Vec<HistoryEntry> {
        self.history.since(since, max)
    }

    /// From its return on nothing is discarded. Calls nest, and outlast sessions.
    pub(crate) fn inhibit(&self) {
        // Under the lock, so that a session that begins sees either none or all of it.
        let mut state = self.state.lock();
        state.inhibits = state.inhibits.saturating_add(1);
        if let Some(attached) = &state.attached {
            attached.device.inhibit();
        }
    }

    /// Takes back one [`Self::inhibit`].
    pub(crate) fn uninhibit(&self) -> Result<(), VmError> {
        let mut state = self.state.lock();
        state.inhibits = state.inhibits.checked_sub(1).ok_or(VmError::NotInhibited)?;
        if let Some(attached) = &state.attached {
            attached.device.uninhibit()?;
        }
        Ok(())
    }

    /// Where everything stands.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.state.lock();
        let mut snapshot = Snapshot {
            state: VmState::Disconnected,
            memory_bytes: 0,
            target_bytes: state.target_bytes,
            actual_bytes: 0,
            ballooned_bytes: 0,
            features: 0,
            inhibits: state.inhibits,
            books: state.past.clone(),
        };
        if let Some(attached) = &state.attached {
            let device = &attached.device;
            snapshot.state = match device.state() {
                DeviceState::Configuring => VmState::Configured,
                DeviceState::NeedsReset => VmState::NeedsReset,
                DeviceState::Active if attached.serving.load(Ordering::Relaxed) => VmState::Active,
                DeviceState::Active | DeviceState::Paused => VmState::Paused,
            };
            snapshot.memory_bytes = device.memory_bytes();
            snapshot.actual_bytes = device.actual_bytes();
            snapshot.ballooned_bytes = device.ballooned_bytes();
            snapshot.features = device.features();
            snapshot.books = snapshot.books.plus(device);
        }
        snapshot
    }

    /// Wakes those who watch the driver's `actual`.
    pub(crate) fn actual_changed(&self) {
        self.watchers.lock().retain(|watcher| {
            let watcher = watcher.upgrade();
            if let Some(wake) = &watcher {
                wake.raise();
            }
            watcher.is_some()
        });
    }

    /// A level that is raised whenever the driver's `actual` changes, as long as it is kept.
    pub(crate) fn watch_actual(&self) -> io::Result<Arc<Wake>> {
        let wake = Arc::new(Wake::new()?);
        let mut watchers = self.watchers.lock();
        // Those who left since the last change: clients come and go while a guest does nothing.
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(Arc::downgrade(&wake));
        drop(watchers);
        Ok(wake)
    }
}

/// An interval as the device takes it.
fn interval(seconds: u64) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds))
}
