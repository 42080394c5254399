//! A balloon device: its life cycle, and what a VMM does with it.

use crate::error::Result;
use crate::memory::{Gpa, GuestMemory, NodeId};
use crate::metrics::{Counters, GuestStats};
use crate::runtime::Runtime;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// How a device is set up.
#[derive(Debug, Default)]
pub struct DeviceConfig {
    /// The features to offer, a subset of [`Device::SUPPORTED_FEATURES`]; 0 offers the default set.
    pub features: u64,
    /// An eventfd signalled when the guest is to get a configuration-change interrupt: the target
    /// changed, or the device needs a reset. The VMM then reads [`Device::state`].
    pub config_event: Option<OwnedFd>,
    /// An eventfd signalled when completions of element queues are waiting.
    pub completion_event: Option<OwnedFd>,
}

/// A queue's place in guest memory, and the descriptors of its two directions.
#[derive(Debug)]
pub struct RingConfig {
    /// The descriptor table's guest address.
    pub desc: Gpa,
    /// The available ring's.
    pub avail: Gpa,
    /// The used ring's.
    pub used: Gpa,
    /// The eventfd that the guest's kicks arrive on.
    pub kick: OwnedFd,
    /// The eventfd to signal for an interrupt; `None` for a guest that polls.
    pub call: Option<OwnedFd>,
    /// Where to go on: zero for a new ring, else what [`Device::stop_queue`] returned.
    pub position: QueuePosition,
}

/// One queue to start.
#[derive(Debug)]
pub struct QueueConfig {
    /// Its number of descriptors: a power of two up to 32768.
    pub size: u16,
    /// Its rings, or `None` for a queue whose elements the VMM pops itself.
    pub ring: Option<RingConfig>,
}

/// How far a ring has been served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueuePosition {
    /// The next entry of the available ring.
    pub next_avail: u16,
    /// The next entry of the used ring.
    pub next_used: u16,
}

/// Where a device stands in its life cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// New or reset: features, memory and queues may be set.
    Configuring,
    /// Serving its queues.
    Active,
    /// Set up, but nothing is served until it is resumed.
    Paused,
    /// A ring broke; nothing is served until the guest resets the device.
    NeedsReset,
}

/// A piece of memory handed over by the VMM in element mode.
#[derive(Clone, Copy, Debug)]
pub struct IoVec {
    /// The host address.
    pub base: usize,
    /// The length in bytes.
    pub len: usize,
}

/// A chain that the VMM popped from its own virtqueue.
#[derive(Debug, Default)]
pub struct Element {
    /// The queue's index.
    pub queue: u16,
    /// Returned with the completion, otherwise not looked at.
    pub token: u64,
    /// What the device may read.
    pub readable: Vec<IoVec>,
    /// What the device may write; for the reporting queue: the reported pages.
    pub writable: Vec<IoVec>,
}

/// An element that is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The token of the element.
    pub token: u64,
    /// The queue's index.
    pub queue: u16,
    /// Bytes written to the element's writable part.
    pub written: u32,
    /// False if the device was reset before it was served: put it back or drop it.
    pub served: bool,
}

/// A virtio balloon device (device ID 5).
///
/// All methods may be called from any thread. Those that say so wait until nothing is in flight;
/// they must not be called from a thread that the guest's progress depends on for longer than a
/// batch takes (milliseconds).
#[derive(Debug)]
pub struct Device {}

impl Device {
    /// Every feature bit that this version can offer.
    pub const SUPPORTED_FEATURES: u64 = 0;
    /// What is offered if the configuration leaves the choice.
    pub const DEFAULT_FEATURES: u64 = 0;
    /// The length of the configuration space in bytes.
    pub const CONFIG_BYTES: usize = 16;
    /// The number of queues of the fixed numbering.
    pub const MAX_QUEUES: u16 = 5;

    /// Makes a device that is served by `runtime`.
    pub fn new(_runtime: &Arc<Runtime>, _config: DeviceConfig) -> Result<Self> {
        todo!()
    }

    /// The features that the guest may select from.
    #[must_use]
    pub fn offered_features(&self) -> u64 {
        todo!()
    }

    /// The features that were selected; 0 before [`Self::set_features`].
    #[must_use]
    pub fn features(&self) -> u64 {
        todo!()
    }

    /// Takes the driver's selection (FEATURES_OK). Only while configuring.
    pub fn set_features(&self, _features: u64) -> Result<()> {
        todo!()
    }

    /// Gives or replaces the memory table; allowed in every state. Waits until nothing is in flight
    /// and no use of the old table is left. Running rings have to lie in the new table too. Balloon
    /// pages of regions that went away are forgotten.
    pub fn set_memory(&self, _memory: Arc<GuestMemory>) -> Result<()> {
        todo!()
    }

    /// Starts a queue: before activation, or while active or paused (vhost-user adds queues one by one).
    pub fn start_queue(&self, _index: u16, _queue: QueueConfig) -> Result<()> {
        todo!()
    }

    /// Stops a queue after draining it and says how far it was served.
    pub fn stop_queue(&self, _index: u16) -> Result<QueuePosition> {
        todo!()
    }

    /// Replaces a started ring's call eventfd (vhost-user does so under way).
    pub fn set_queue_call(&self, _index: u16, _call: Option<OwnedFd>) -> Result<()> {
        todo!()
    }

    /// DRIVER_OK: begins to serve, and looks at every queue once, kicked or not (S2).
    pub fn activate(&self) -> Result<()> {
        todo!()
    }

    /// Stops serving; returns when nothing is in flight. Pausing twice is allowed.
    pub fn pause(&self) -> Result<()> {
        todo!()
    }

    /// Serves again after [`Self::pause`].
    pub fn resume(&self) -> Result<()> {
        todo!()
    }

    /// Back to configuring: the queues are gone, the balloon is empty, the target stays. Waits until
    /// nothing is in flight; elements that were not served complete with `served == false`.
    pub fn reset(&self) {
        todo!()
    }

    /// Where the device stands.
    #[must_use]
    pub fn state(&self) -> DeviceState {
        todo!()
    }

    /// From its return on nothing is discarded until [`Self::uninhibit`]; calls nest. Waits until
    /// nothing is in flight. Guests are still acknowledged, and what is skipped is counted.
    pub fn inhibit(&self) {
        todo!()
    }

    /// Takes back one [`Self::inhibit`].
    pub fn uninhibit(&self) -> Result<()> {
        todo!()
    }

    /// Reads the configuration space; what lies behind its end reads as zero. Never waits.
    pub fn read_config(&self, _offset: u64, _data: &mut [u8]) {
        todo!()
    }

    /// A driver's write to the configuration space. Fields that are not the driver's keep their
    /// value. Never waits. Returns true if `actual` changed.
    pub fn write_config(&self, _offset: u64, _data: &[u8]) -> bool {
        todo!()
    }

    /// Sets how many bytes the balloon should hold (rounded down to 4 KiB) and signals
    /// `config_event`, also when the target is unchanged (S11). Returns the target as set.
    pub fn set_target_bytes(&self, _bytes: u64) -> Result<u64> {
        todo!()
    }

    /// How many bytes the balloon should hold.
    #[must_use]
    pub fn target_bytes(&self) -> u64 {
        todo!()
    }

    /// How many bytes the driver says the balloon holds (its `actual` field).
    #[must_use]
    pub fn actual_bytes(&self) -> u64 {
        todo!()
    }

    /// How many bytes the device holds by its own ownership bitmap.
    #[must_use]
    pub fn ballooned_bytes(&self) -> u64 {
        todo!()
    }

    /// The sum of the memory table's regions; 0 without a table.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        todo!()
    }

    /// What the guest last said of its memory; asks for news and waits for them if `timeout` is
    /// more than zero.
    pub fn guest_stats(&self, _timeout: Duration) -> Result<GuestStats> {
        todo!()
    }

    /// The device's books, as of one instant.
    #[must_use]
    pub fn counters(&self) -> Counters {
        todo!()
    }

    /// One host node's share of the books; `None` is memory whose node is not known.
    pub fn node_counters(&self, _node: Option<NodeId>) -> Result<Counters> {
        todo!()
    }

    /// Hands over elements that the VMM popped.
    ///
    /// # Errors
    /// [`crate::Error::Full`] when too many wait; nothing of `elements` was taken then.
    ///
    /// # Safety
    /// The iovecs stay mapped until the element's completion has been collected, or the device was reset.
    #[allow(unsafe_code, reason = "the iovecs are the caller's promise")]
    pub unsafe fn submit(&self, _elements: Vec<Element>) -> Result<()> {
        todo!()
    }

    /// Collects up to `max` completions, in the order in which they were finished.
    pub fn completions(&self, _max: usize, _into: &mut Vec<Completion>) {
        todo!()
    }
}
