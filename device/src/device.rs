//! A balloon device: what a VMM does with it, from negotiation to reset.
//!
//! Everything that serving touches is in `Service`, behind one lock. A worker holds that lock for
//! one bounded turn and discards within it, so whoever holds the lock knows that nothing is in
//! flight: the lock is the drain barrier of pause, reset, inhibit and the memory table (I2). What
//! vCPU threads and monitors need without waiting (configuration space, target, state) is outside.

mod extras;
mod host_reset;
mod nodes;

pub use nodes::NodeBalloon;

use crate::accounting::Accountant;
use crate::balloon::{Balloon, bump};
use crate::discard::WriteBehind;
use crate::error::{Error, Result};
use crate::event::{EventFd, Sharer, check_eventfd};
use crate::history::{History, HistoryEntry, HistoryEvent};
use crate::memory::{Gpa, GuestMemory, NodeId};
use crate::metrics::Counters;
use crate::protocol::DeviceKind;
use crate::protocol::contract::Protocol;
use crate::ring::source::{Completion, Element};
use crate::runtime::{KickRegistration, Runtime, Servable};
use crate::service::{Service, Shared};
use crate::target::Target;
use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

/// How a device is set up.
#[derive(Debug, Default)]
pub struct DeviceConfig {
    /// The protocol that the device speaks.
    pub kind: DeviceKind,
    /// The features to offer, a subset of [`DeviceKind::supported_features`]; 0 offers the default set.
    pub features: u64,
    /// An eventfd signalled when the guest is to get a configuration-change interrupt: the target
    /// changed, or the device needs a reset. The VMM then reads [`Device::state`].
    pub config_event: Option<OwnedFd>,
    /// An eventfd signalled when completions of element queues are waiting.
    pub completion_event: Option<OwnedFd>,
    /// Who else has the queues' call eventfds.
    pub calls_shared_with: Sharer,
}

/// A queue's place in guest memory, and the descriptors of its two directions.
#[derive(Debug)]
pub struct RingConfig {
    /// The guest address of the descriptors.
    pub desc: Gpa,
    /// Of the available ring; with RING_PACKED, of the driver's event area.
    pub avail: Gpa,
    /// Of the used ring; with RING_PACKED, of the device's event area.
    pub used: Gpa,
    /// The eventfd that the guest's kicks arrive on.
    pub kick: OwnedFd,
    /// The eventfd (or pipe) to signal for an interrupt; `None` for a guest that polls.
    pub call: Option<OwnedFd>,
    /// Where to go on: the start of a new ring, else what [`Device::stop_queue`] returned.
    pub position: QueuePosition,
}

/// One queue to start.
#[derive(Debug)]
pub struct QueueConfig {
    /// Its number of descriptors: up to 32768, a power of two unless RING_PACKED is negotiated. Not
    /// used for element queues.
    pub size: u16,
    /// Its rings, or `None` for a queue whose elements the VMM pops itself.
    pub ring: Option<RingConfig>,
}

/// How far a ring has been served.
///
/// For a split ring these are the indices, which run through all 16 bits; a new one starts at zero. For
/// a packed ring bits 0 to 14 are the slot and bit 15 is the wrap counter; a new one starts at 0x8000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePosition {
    /// The next entry of the available ring.
    pub next_avail: u16,
    /// The next entry of the used ring.
    pub next_used: u16,
}

impl QueuePosition {
    /// Where a new split ring starts.
    pub const SPLIT_START: Self = Self {
        next_avail: 0,
        next_used: 0,
    };
    /// Where a new packed ring starts: slot 0 of the lap whose wrap counter is 1.
    pub const PACKED_START: Self = Self {
        next_avail: 0x8000,
        next_used: 0x8000,
    };
}

/// Where a device stands in its life cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DeviceState {
    /// New or reset: features, memory and queues may be set.
    Configuring = 0,
    /// Serving its queues.
    Active = 1,
    /// Set up, but nothing is served until it is resumed.
    Paused = 2,
    /// A ring broke; nothing is served until the guest resets the device.
    NeedsReset = 3,
}

/// A balloon device.
///
/// All methods may be called from any thread. Those that say so wait until nothing is in flight,
/// which takes at most a batch (milliseconds). Dropping the device drains it too.
#[derive(Debug)]
pub struct Device {
    /// Dropped first: then the timer wakes nobody any more.
    _timer: KickRegistration,
    pub(crate) shared: Arc<Shared>,
    runtime: Arc<Runtime>,
}

impl Device {
    /// Makes a device that is served by `runtime`.
    ///
    /// # Errors
    /// Refuses features that cannot be offered and descriptors that are no eventfds.
    pub fn new(runtime: &Arc<Runtime>, config: DeviceConfig) -> Result<Self> {
        Self::with_history(runtime, config, History::new())
    }

    /// As [`Self::new`], for a balloon whose history began with an earlier device.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn with_history(
        runtime: &Arc<Runtime>,
        config: DeviceConfig,
        history: Arc<History>,
    ) -> Result<Self> {
        let kind = config.kind;
        refuse_others(config.features, kind.supported_features())?;
        let protocol = kind.protocol(match config.features {
            0 => kind.default_features(),
            chosen => chosen,
        })?;
        config.calls_shared_with.prepare();
        let own = |what, fd| EventFd::new(what, fd, Sharer::Trusted);
        let event = |what, fd: Option<OwnedFd>| fd.map(|fd| own(what, fd)).transpose();
        let config_event = event("config_event", config.config_event)?;
        let completion_event = event("completion_event", config.completion_event)?.map(Arc::new);
        let shared = Shared::new(
            runtime,
            protocol,
            config_event,
            completion_event,
            config.calls_shared_with,
            history,
        )?;
        let device: Weak<dyn Servable> =
            Arc::downgrade(&(Arc::clone(&shared) as Arc<dyn Servable>));
        let home = runtime.pool().station_of(None);
        let timer = shared.timer_descriptor()?;
        let timer = runtime
            .pool()
            .register(home, timer, device, Shared::TIMER)?;
        Ok(Self {
            _timer: timer,
            shared,
            runtime: Arc::clone(runtime),
        })
    }

    /// The protocol that it speaks.
    #[must_use]
    pub fn kind(&self) -> DeviceKind {
        self.shared.protocol.kind()
    }

    /// The features that the guest may select from.
    #[must_use]
    pub fn offered_features(&self) -> u64 {
        self.shared.protocol.offered()
    }

    /// The features that were selected; 0 before [`Self::set_features`].
    #[must_use]
    pub fn features(&self) -> u64 {
        self.shared.features.load(Ordering::Acquire)
    }

    /// Takes the driver's selection (FEATURES_OK), before queues are started.
    ///
    /// # Errors
    /// Refuses features that were not offered or make no sense together, and changes after the first
    /// queue was started.
    pub fn set_features(&self, features: u64) -> Result<()> {
        let protocol = &self.shared.protocol;
        let mut service = self.shared.service.lock();
        let acceptable = refuse_others(features, protocol.offered())
            .and_then(|()| protocol.check_features(features))
            .and_then(|()| service.expect_fresh());
        self.shared.count_handshake(acceptable.is_ok());
        acceptable?;
        service.queues.forget();
        service.features = Some(features);
        service.open_window(&**protocol, &self.shared.books);
        self.shared.show(&service);
        Ok(())
    }

    /// Gives or replaces the memory table; allowed in every state. Waits until nothing is in flight
    /// and no use of the old table is left. Running rings have to lie in the new table too. Balloon
    /// pages of regions that went away are forgotten, and a target that is more than the guest has
    /// is shown to it as all that it has.
    ///
    /// # Errors
    /// Refuses a table that does not hold a running queue's rings, and extra regions where the protocol
    /// has no use for them; the old table stays then.
    pub fn set_memory(&self, memory: Arc<GuestMemory>) -> Result<()> {
        let extra = memory.regions().iter().any(|region| region.extra);
        if extra && !self.shared.protocol.has_extra_memory() {
            return Err(Error::NotSupported("memory that begins in the balloon"));
        }
        let mut service = self.shared.service.lock();
        let rings = service.queues.moved_rings(&memory)?;
        service.queues.replace_rings(rings);
        self.shared.find_home(&memory);
        let (inhibited, extra_grant_bytes) = (service.inhibits > 0, service.extra_grant_bytes);
        let deflate = service.deflate;
        match &mut service.balloon {
            Some(balloon) => balloon.set_memory(memory, &self.shared.books),
            none => {
                let mut balloon = Balloon::new(memory, self.runtime.discarder());
                balloon.heed(Arc::clone(self.shared.service.waiting()));
                balloon.set_inhibited(inhibited, &self.shared.books);
                balloon.set_extra_grant(extra_grant_bytes);
                balloon.set_deflate(deflate);
                *none = Some(balloon);
            }
        }
        let before = self.shared.shown_target();
        self.shared.show(&service);
        self.shared.show_target();
        if self.shared.shown_target() != before {
            self.shared.announce_target();
        }
        Ok(())
    }

    /// Starts a queue: before activation, or while active or paused (vhost-user adds queues one by
    /// one).
    ///
    /// # Errors
    /// Needs features and a memory table; refuses rings outside memory, misaligned ones, descriptors
    /// of the wrong kind, and queues that are started already.
    pub fn start_queue(&self, index: u16, mut queue: QueueConfig) -> Result<()> {
        // What is refused is closed without the lock (`Queues::swap_call`).
        let mut call = None;
        if let Some(ring) = &mut queue.ring {
            check_eventfd("kick", &ring.kick)?;
            call = self.shared.call_event(ring.call.take())?;
        }
        let mut service = self.shared.service.lock();
        self.shared
            .start_queue(&mut service, index, queue, &mut call)?;
        if service.state == DeviceState::Active {
            // All of them: another queue may have got its role, or got it back, by this one (dense and
            // fixed numbers), and its kicks came to nothing before.
            self.shared.schedule(service.queues.started());
        }
        Ok(())
    }

    /// Stops a queue after draining it and says how far it was served. A held stats buffer goes back
    /// into its ring. The features stay.
    ///
    /// # Errors
    /// The queue is not started.
    pub fn stop_queue(&self, index: u16) -> Result<QueuePosition> {
        let mut service = self.shared.service.lock();
        service.drain(&self.shared.books);
        let stopped = self.shared.stop_queue(&mut service, index);
        drop(service);
        stopped.map(|(position, _call)| position)
    }

    /// Replaces a started ring's call eventfd (vhost-user does so under way).
    ///
    /// # Errors
    /// The queue is not started, is no ring, or the descriptor is of the wrong kind.
    pub fn set_queue_call(&self, index: u16, call: Option<OwnedFd>) -> Result<()> {
        // Then the one that it had, which goes after the lock does.
        let mut call = self.shared.call_event(call)?;
        let mut service = self.shared.service.lock();
        service.queues.swap_call(index, &mut call)
    }

    /// DRIVER_OK: begins to serve, and looks at every queue once, kicked or not (S2).
    ///
    /// # Errors
    /// Needs features and memory; refuses to activate twice.
    pub fn activate(&self) -> Result<()> {
        let mut service = self.shared.service.lock();
        match service.state {
            DeviceState::Configuring => {}
            DeviceState::Active => return Err(Error::AlreadyStarted("the device")),
            DeviceState::Paused => return Err(Error::Paused),
            DeviceState::NeedsReset => return Err(Error::NotReady("reset the device")),
        }
        service.ready()?;
        service.open_window(&*self.shared.protocol, &self.shared.books);
        self.shared.set_state(&mut service, DeviceState::Active);
        self.shared.schedule(service.queues.started());
        if service.restored.is_some() {
            // An interrupt may have been lost on the way, and the configuration may have changed.
            self.shared.announce_target();
        }
        Ok(())
    }

    /// Stops serving; returns when nothing is in flight and all submitted elements are completed.
    /// Pausing twice is allowed.
    ///
    /// # Errors
    /// The device was not activated.
    pub fn pause(&self) -> Result<()> {
        let mut service = self.shared.service.lock();
        match service.state {
            DeviceState::Configuring => Err(Error::NotReady("activate the device")),
            DeviceState::NeedsReset => Err(Error::NotReady("reset the device")),
            DeviceState::Paused => Ok(()),
            DeviceState::Active => {
                self.shared.finish_elements(&mut service);
                service.drain(&self.shared.books);
                self.shared.set_state(&mut service, DeviceState::Paused);
                Ok(())
            }
        }
    }

    /// Serves again after [`Self::pause`].
    ///
    /// # Errors
    /// The device is not paused.
    pub fn resume(&self) -> Result<()> {
        let mut service = self.shared.service.lock();
        if service.state != DeviceState::Paused {
            return Err(Error::Unbalanced("resume"));
        }
        self.shared.set_state(&mut service, DeviceState::Active);
        self.shared.schedule(service.queues.started());
        Ok(())
    }

    /// Back to configuring: the queues are gone, the balloon is empty, memory and target stay. Waits
    /// until nothing is in flight; elements that were not served complete with `served == false`.
    pub fn reset(&self) {
        let _calls = self.shared.reset(&mut self.shared.service.lock());
    }

    /// Where the device stands.
    #[must_use]
    pub fn state(&self) -> DeviceState {
        self.shared.state()
    }

    /// From its return on nothing is discarded until [`Self::uninhibit`]; calls nest. Waits until
    /// nothing is in flight. Guests are still acknowledged, and what is skipped is counted.
    pub fn inhibit(&self) {
        let mut service = self.shared.service.lock();
        service.change_inhibits(1, &self.shared.books);
        drop(service);
        self.shared.record(HistoryEvent::Inhibited);
    }

    /// Takes back one [`Self::inhibit`].
    ///
    /// # Errors
    /// Nothing is inhibited.
    pub fn uninhibit(&self) -> Result<()> {
        let mut service = self.shared.service.lock();
        if service.inhibits == 0 {
            return Err(Error::Unbalanced("uninhibit"));
        }
        service.change_inhibits(-1, &self.shared.books);
        self.shared.record(HistoryEvent::Uninhibited);
        Ok(())
    }

    /// Lets inflated pages be discarded after they were acknowledged, many at a time, for drivers that
    /// negotiated MUST_TELL_HOST; may be changed at any time. What waits is discarded first. Off by
    /// default; [`WriteBehind::RECOMMENDED`] suits stock guests.
    pub fn set_write_behind(&self, setting: WriteBehind) {
        let mut service = self.shared.service.lock();
        service.write_behind = setting;
        if service.state != DeviceState::Configuring {
            service.open_window(&*self.shared.protocol, &self.shared.books);
        }
    }

    /// Returns when nothing that was acknowledged waits to be discarded any more.
    pub fn flush(&self) {
        self.shared.service.lock().drain(&self.shared.books);
    }

    /// Reads the configuration space; what lies behind its end reads as zero. Never waits.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.protocol.read_config(offset, data);
    }

    /// A driver's write to the configuration space. Fields that are not the driver's keep their
    /// value, which is counted. Never waits. Returns true if `actual` changed.
    pub fn write_config(&self, offset: u64, data: &[u8]) -> bool {
        let (protocol, features) = (&self.shared.protocol, self.features());
        let active = self.state() != DeviceState::Configuring;
        let written = protocol.write_config(offset, data, features, active);
        if written.refused {
            self.shared
                .books
                .enter(|entry| bump(&mut entry.device().config_errors, 1));
        }
        if written.actual_changed {
            self.shared.record(HistoryEvent::ActualWritten);
        }
        if written.acknowledged_resets > 0 {
            self.shared.books.enter(|entry| {
                let acknowledged = &mut entry.device().host_resets_acknowledged;
                bump(acknowledged, written.acknowledged_resets);
            });
        }
        written.actual_changed
    }

    /// Sets how many bytes the balloon should hold (rounded down to 4 KiB), of which nodes is for the guest
    /// to choose, and lets the guest hear of it, also when the target is unchanged (S11). Returns the target as set.
    ///
    /// # Errors
    /// Refuses more than the guest's memory, or than the protocol can say.
    pub fn set_target_bytes(&self, bytes: u64) -> Result<u64> {
        let memory = self.memory_bytes();
        if memory > 0 && bytes > memory {
            return Err(Error::Invalid {
                what: "target_bytes",
                value: bytes,
                expected: "at most the guest's memory",
            });
        }
        self.set_target(Target::whole(bytes))
    }

    fn set_target(&self, target: Target) -> Result<u64> {
        let bytes = target.bytes();
        self.shared.protocol.check_target(bytes)?;
        *self.shared.wanted.lock() = target;
        self.shared.show_target();
        self.shared.record(HistoryEvent::TargetSet);
        self.shared.announce_target();
        Ok(bytes)
    }

    /// How many bytes the balloon should hold.
    #[must_use]
    pub fn target_bytes(&self) -> u64 {
        self.shared.target_bytes.load(Ordering::Acquire)
    }

    /// How many bytes the driver says the balloon holds (its `actual` field); what the device counts where
    /// the protocol has no such field.
    #[must_use]
    pub fn actual_bytes(&self) -> u64 {
        self.shared.actual_bytes()
    }

    /// How many bytes the device holds by its own ownership bitmap.
    #[must_use]
    pub fn ballooned_bytes(&self) -> u64 {
        self.shared.ballooned_bytes.load(Ordering::Acquire)
    }

    /// How many bytes the guest has beyond what it booted with: a balloon of less than nothing. At most
    /// one of this and [`Self::ballooned_bytes`] is not 0.
    #[must_use]
    pub fn extra_bytes(&self) -> u64 {
        self.shared.extra_bytes.load(Ordering::Acquire)
    }

    /// What the ownership bitmap holds, run by run, for tests that keep books of their own.
    #[cfg(feature = "fuzzing")]
    #[doc(hidden)]
    #[must_use]
    pub fn ballooned_ranges(&self) -> Vec<crate::memory::PfnRange> {
        let service = self.shared.service.lock();
        service
            .balloon
            .as_ref()
            .map_or_else(Vec::new, Balloon::ranges)
    }

    /// The sum of the memory table's regions; 0 without a table.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.shared.memory_bytes.load(Ordering::Acquire)
    }

    /// Fails unless the device is active.
    pub(crate) fn expect_active(&self) -> Result<()> {
        match self.state() {
            DeviceState::Configuring => Err(Error::NotReady("activate the device")),
            DeviceState::NeedsReset => Err(Error::NotReady("reset the device")),
            DeviceState::Paused => Err(Error::Paused),
            DeviceState::Active => Ok(()),
        }
    }

    /// The protocol, if it is of this type: for what only one protocol can do.
    pub(crate) fn protocol<P: Protocol>(&self) -> Option<&P> {
        let protocol: &dyn Any = &*self.shared.protocol;
        protocol.downcast_ref()
    }

    /// What happened behind entry number `since` of the history, oldest first, at most `max` entries
    /// (A9). Never waits for a batch.
    #[must_use]
    pub fn history(&self, since: u64, max: usize) -> Vec<HistoryEntry> {
        self.shared.history.since(since, max)
    }

    /// From now on `accountant` is told what leaves the guest and what goes back to it; `None` for
    /// nobody. When this returns, no call to the one before is under way.
    pub fn set_accountant(&self, accountant: Option<Arc<dyn Accountant>>) {
        self.shared.books.set_accountant(accountant);
    }

    /// The device's books, as of one instant.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.books.total()
    }

    /// One host node's share of the books; `None` is memory whose node is not known, and what
    /// belongs to no node (chains, calls, errors).
    ///
    /// # Errors
    /// There is no such node.
    pub fn node_counters(&self, node: Option<NodeId>) -> Result<Counters> {
        let missing = Error::NoNode {
            node: node.map_or(0, |id| id.0),
            count: self.runtime.nodes(),
        };
        self.shared.books.node(node).ok_or(missing)
    }

    /// Hands over elements that the VMM popped. Never waits. Elements of queues that are not started
    /// as element queues complete as not served.
    ///
    /// # Errors
    /// [`Error::Full`] when too many wait, and none of `elements` was taken then; the device has to
    /// be active.
    pub fn submit(&self, elements: Vec<Element>) -> Result<()> {
        self.expect_active()?;
        self.shared.submit(elements, false)
    }

    /// As [`Self::submit`], and serves the device on the calling thread, for one turn, unless a worker is
    /// with it: no other thread has to be woken, and the completions are there when this returns.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn submit_and_serve(&self, elements: Vec<Element>) -> Result<()> {
        self.expect_active()?;
        self.shared.submit(elements, true)
    }

    /// Collects up to `max` completions, in the order in which they were finished.
    pub fn completions(&self, max: usize, into: &mut Vec<Completion>) {
        self.shared.completions(max, into);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let mut service = self.shared.service.lock();
        let calls = self.shared.reset(&mut service);
        // A worker may still have hold of the shared part, but no longer of the guest's memory.
        service.balloon = None;
        drop(service);
        drop(calls);
    }
}

/// Fails if `features` has any but those.
pub(crate) fn refuse_others(features: u64, offered: u64) -> Result<()> {
    match features & !offered {
        0 => Ok(()),
        unsupported => Err(Error::Features {
            unsupported,
            offered,
        }),
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod closing_tests;

/// What a service is shown as to those who must not wait for it.
impl Shared {
    fn set_state(&self, service: &mut Service, state: DeviceState) {
        service.state = state;
        self.show(service);
    }
}
