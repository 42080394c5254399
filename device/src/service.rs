//! What a worker does with a device, and the state that it needs the lock for.

mod elements;
mod linger;
pub(crate) mod lock;
#[cfg(all(test, loom))]
mod models;
pub(crate) mod queues;
mod turnstile;

use crate::balloon::{Balloon, bump};
use crate::device::{DeviceState, QueueConfig, QueuePosition};
use crate::discard::{DeflateOptions, WriteBehind};
use crate::error::{Error, Result};
use crate::event::{EventFd, Sharer};
use crate::history::{History, HistoryEvent};
use crate::memory::GuestMemory;
use crate::metrics::Books;
use crate::protocol::contract::{ASKED, Broken, Notice, Protocol, Turn};
use crate::ring::source::{Completion, Element, ElementQueue, RingQueue, Source};
use crate::ring::{Ring, RingFeatures};
use crate::runtime::{Patience, Pool, Runtime, Scratch, Servable, Timer};
use crate::sync::Mutex;
use crate::sync::channel::{Receiver, Sender, unbounded};
use crate::target::{self, NodeBytes, Target};
use crate::trace::Tape;
use linger::Attention;
use lock::ServiceLock;
use queues::{Queue, Queues, position_of};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;
use turnstile::Turnstile;

/// How many broken queues of a balloon are worth a warning each: a guest that breaks them and resets
/// its device for ever, or has its VMM make another, must not be able to fill a log (I3).
const MAX_LOGGED_BREAKS: u64 = 20;

/// The kicks that more may follow soon: those of queues.
const LINGERING: u32 = 0xff;

/// Everything that serving changes.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) state: DeviceState,
    pub(crate) features: Option<u64>,
    pub(crate) balloon: Option<Balloon>,
    pub(crate) inhibits: u32,
    /// Where rings go on, if the device was restored since its last reset.
    pub(crate) restored: Option<Vec<Option<QueuePosition>>>,
    pub(crate) write_behind: WriteBehind,
    /// What is done for pages that the guest takes back.
    pub(crate) deflate: DeflateOptions,
    /// How much more than it booted with the guest may have.
    pub(crate) extra_grant_bytes: u64,
    pub(crate) queues: Queues,
    attention: Attention,
}

/// A device as its handle and the workers share it.
#[derive(Debug)]
pub(crate) struct Shared {
    this: Weak<Self>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) protocol: Box<dyn Protocol>,
    pub(crate) config_event: Option<EventFd>,
    pub(crate) books: Arc<Books>,
    pub(crate) history: Arc<History>,
    /// What the guest gives and takes, while it is recorded.
    pub(crate) tape: Tape,
    /// When pages that wait to be discarded are due.
    flush_due: Mutex<Option<Instant>>,
    /// Locked from when it is found out what is due next until it is set so.
    timer: Mutex<Timer>,
    pub(crate) service: ServiceLock,
    /// The station that serves the device: that of most of its memory.
    pub(crate) home: AtomicUsize,
    /// Queues that were kicked and not looked at since, and whether a worker sees to them.
    turnstile: Turnstile,
    submitted: (Sender<Element>, Receiver<Element>),
    completed: (Sender<Completion>, Receiver<Completion>),
    completion_event: Option<Arc<EventFd>>,
    calls_shared_with: Sharer,
    /// Elements submitted whose completion was not collected yet.
    outstanding: AtomicUsize,
    /// Copies of what is in the service, for those who must not wait.
    state: AtomicU8,
    pub(crate) features: AtomicU64,
    pub(crate) memory_bytes: AtomicU64,
    /// How much of that is on each node of the guest.
    memory_on_nodes: Mutex<NodeBytes>,
    /// The target as it was set, which may be more than the guest's memory turns out to be.
    pub(crate) wanted: Mutex<Target>,
    /// As much of it as the guest's memory can give.
    pub(crate) target_bytes: AtomicU64,
    pub(crate) ballooned_bytes: AtomicU64,
    pub(crate) extra_bytes: AtomicU64,
}

impl Service {
    /// Fails unless features and memory are set.
    pub(crate) fn ready(&self) -> Result<(u64, &Balloon)> {
        let features = self.features.ok_or(Error::NotReady("set the features"))?;
        let balloon = self
            .balloon
            .as_ref()
            .ok_or(Error::NotReady("set the memory table"))?;
        Ok((features, balloon))
    }

    /// Fails once the driver has begun: what it selected stays until the device is reset.
    pub(crate) fn expect_fresh(&self) -> Result<()> {
        if self.state != DeviceState::Configuring || self.queues.started() != 0 {
            return Err(Error::AlreadyStarted("the device"));
        }
        Ok(())
    }

    /// Lets pages wait before they are discarded, alone or for the rest of a huge frame, if the driver promised
    /// to tell before it uses them.
    pub(crate) fn open_window(&mut self, protocol: &dyn Protocol, books: &Books) {
        let told = self
            .features
            .is_some_and(|features| protocol.tells_before_use(features));
        let setting = if told {
            self.write_behind
        } else {
            WriteBehind::default()
        };
        if let Some(balloon) = &mut self.balloon {
            balloon.set_write_behind(setting, books);
            balloon.set_told(told, books);
        }
    }

    /// Discards what waits in the window.
    pub(crate) fn drain(&mut self, books: &Books) {
        if let Some(balloon) = &mut self.balloon {
            balloon.drain(books);
        }
    }

    pub(crate) fn change_inhibits(&mut self, by: i32, books: &Books) {
        self.inhibits = self.inhibits.saturating_add_signed(by);
        let inhibited = self.inhibits > 0;
        if let Some(balloon) = &mut self.balloon {
            balloon.set_inhibited(inhibited, books);
        }
    }

    /// Does `work` for one turn; returns the queues that have more, or why one broke.
    fn run(&mut self, work: u32, shared: &Shared, scratch: &mut Scratch) -> Result<u32, Broken> {
        let Self {
            balloon: Some(balloon),
            features: Some(features),
            queues,
            ..
        } = self
        else {
            return Ok(0);
        };
        let mut turn = shared.lend(balloon, *features, scratch);
        shared.protocol.serve(work, queues, &mut turn)
    }
}

impl Shared {
    /// The number under which the timer kicks.
    pub(crate) const TIMER: u16 = 30;
    /// The mark that a flush of the window is done.
    const FLUSHED: u32 = 1 << 29;
    /// The mark that elements were submitted, be it to a queue that is not there.
    const SUBMITTED: u32 = 1 << 28;

    pub(crate) fn new(
        runtime: &Runtime,
        protocol: Box<dyn Protocol>,
        config_event: Option<EventFd>,
        completion_event: Option<Arc<EventFd>>,
        calls_shared_with: Sharer,
        history: Arc<History>,
    ) -> Result<Arc<Self>> {
        let timer = Timer::new()?;
        let service = Service {
            state: DeviceState::Configuring,
            features: protocol.preselected(),
            balloon: None,
            inhibits: 0,
            restored: None,
            write_behind: WriteBehind::default(),
            deflate: DeflateOptions::default(),
            extra_grant_bytes: 0,
            queues: Queues::new(protocol.kind().queues()),
            attention: Attention::default(),
        };
        Ok(Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            pool: Arc::clone(runtime.pool()),
            protocol,
            config_event,
            books: Arc::new(Books::new(usize::try_from(runtime.nodes()).unwrap_or(1))),
            history,
            tape: Tape::default(),
            flush_due: Mutex::new(None),
            timer: Mutex::new(timer),
            service: ServiceLock::new(service),
            home: AtomicUsize::new(0),
            turnstile: Turnstile::new(),
            submitted: unbounded(),
            completed: unbounded(),
            completion_event,
            calls_shared_with,
            outstanding: AtomicUsize::new(0),
            state: AtomicU8::new(DeviceState::Configuring as u8),
            features: AtomicU64::new(0),
            memory_bytes: AtomicU64::new(0),
            memory_on_nodes: Mutex::new(NodeBytes::default()),
            wanted: Mutex::new(Target::default()),
            target_bytes: AtomicU64::new(0),
            ballooned_bytes: AtomicU64::new(0),
            extra_bytes: AtomicU64::new(0),
        }))
    }

    pub(crate) fn state(&self) -> DeviceState {
        match self.state.load(Ordering::Acquire) {
            1 => DeviceState::Active,
            2 => DeviceState::Paused,
            3 => DeviceState::NeedsReset,
            _ => DeviceState::Configuring,
        }
    }

    /// Shows the driver the target, as far as its memory goes.
    pub(crate) fn show_target(&self) {
        // Under its lock, so that the last target that was set is the one that is shown.
        let wanted = self.wanted.lock();
        let target = self.within_memory(&wanted);
        self.target_bytes.store(target.bytes(), Ordering::Release);
        self.protocol.show_target(&target);
    }

    /// The target that the driver is shown.
    pub(crate) fn shown_target(&self) -> Target {
        self.within_memory(&self.wanted.lock())
    }

    fn within_memory(&self, wanted: &Target) -> Target {
        match self.memory_bytes.load(Ordering::Acquire) {
            0 => wanted.clone(),
            memory => wanted.within(memory, &self.memory_on_nodes()),
        }
    }

    /// The guest's memory on each of its nodes.
    pub(crate) fn memory_on_nodes(&self) -> NodeBytes {
        *self.memory_on_nodes.lock()
    }

    /// How many bytes the driver says the balloon holds, or else how many it holds.
    pub(crate) fn actual_bytes(&self) -> u64 {
        let counted = || self.ballooned_bytes.load(Ordering::Acquire);
        self.protocol.actual_bytes().unwrap_or_else(counted)
    }

    /// Lets the guest hear of its target.
    pub(crate) fn announce_target(self: &Arc<Self>) {
        match self.protocol.announce() {
            Notice::ConfigChange => self.signal_config(),
            Notice::Queue => self.schedule(ASKED),
            Notice::Polled => {}
        }
    }

    /// Makes a worker look at `work`: queues (a bit each), or what the VMM asked for.
    pub(crate) fn schedule(self: &Arc<Self>, work: u32) {
        if self.wake(work) {
            let home = self.home.load(Ordering::Relaxed);
            let device = Arc::clone(self) as Arc<dyn Servable>;
            self.pool.submit(home, device);
        }
    }

    /// Shows the service's state to those who must not wait for it.
    pub(crate) fn show(&self, service: &Service) {
        self.state.store(service.state as u8, Ordering::Release);
        self.features
            .store(service.features.unwrap_or(0), Ordering::Release);
        let balloon = service.balloon.as_ref();
        let memory = balloon.map_or(0, |balloon| balloon.memory().total_bytes());
        self.memory_bytes.store(memory, Ordering::Release);
        *self.memory_on_nodes.lock() = balloon
            .map(|balloon| target::node_bytes(balloon.memory()))
            .unwrap_or_default();
        let ballooned = balloon.map_or(0, Balloon::ballooned_bytes);
        self.ballooned_bytes.store(ballooned, Ordering::Release);
        let extra = balloon.map_or(0, Balloon::extra_bytes);
        self.extra_bytes.store(extra, Ordering::Release);
    }

    /// Moves the device to the station of the node that holds most of its memory.
    pub(crate) fn find_home(&self, memory: &GuestMemory) {
        let bytes_on = |node| {
            let of_node = memory.regions().iter().filter(|region| region.node == node);
            of_node.map(|region| region.len_bytes).sum::<u64>()
        };
        let nodes = memory.regions().iter().map(|region| region.node);
        let most = nodes.max_by_key(|node| bytes_on(*node)).flatten();
        self.home
            .store(self.pool.station_of(most), Ordering::Relaxed);
    }

    /// Starts a queue with kick and `call` descriptors that were looked at; takes `call` if it does start.
    pub(crate) fn start_queue(
        &self,
        service: &mut Service,
        index: u16,
        config: QueueConfig,
        call: &mut Option<EventFd>,
    ) -> Result<()> {
        let started = service.queues.slot(index)?.is_some();
        if service.state == DeviceState::NeedsReset {
            return Err(Error::NotReady("reset the device"));
        }
        if started {
            return Err(Error::AlreadyStarted("the queue"));
        }
        // What came before the queue is none of its elements.
        self.accept_elements(service);
        let (features, balloon) = service.ready()?;
        let queue = match config.ring {
            None => Queue {
                source: Source::Elements(ElementQueue {
                    index,
                    waiting: VecDeque::new(),
                    completions: self.completed.0.clone(),
                    event: self.completion_event.clone(),
                    unpublished: false,
                }),
                _kick: None,
            },
            Some(ring) => {
                let ring_features = RingFeatures::negotiated(features);
                let places = [ring.desc, ring.avail, ring.used];
                let memory = balloon.memory();
                let taken = Ring::new(memory, config.size, places, ring.position, ring_features)?;
                let home = self.home.load(Ordering::Relaxed);
                let device: Weak<dyn Servable> = self.this.clone();
                let kick = self.pool.register(home, ring.kick, device, index)?;
                Queue {
                    source: Source::Ring(RingQueue {
                        ring: taken,
                        call: call.take(),
                    }),
                    _kick: Some(kick),
                }
            }
        };
        service.queues.start(index, queue)
    }

    /// What a queue's interrupts are signalled on.
    pub(crate) fn call_event(&self, call: Option<OwnedFd>) -> Result<Option<EventFd>> {
        let event = |fd| EventFd::new("call", fd, self.calls_shared_with);
        call.map(event).transpose()
    }

    /// Returns how far the queue was served, and its call descriptor, which is to be closed without the lock
    /// ([`Queues::swap_call`]).
    pub(crate) fn stop_queue(
        &self,
        service: &mut Service,
        index: u16,
    ) -> Result<(QueuePosition, Option<EventFd>)> {
        self.accept_elements(service);
        let features = service.features.unwrap_or(0);
        self.protocol.put_back(index, features, &mut service.queues);
        let queue = service.queues.slot(index)?.take();
        let mut queue = queue.ok_or(Error::NoQueue {
            index: u32::from(index),
        })?;
        queue.source.cancel();
        Ok((position_of(&queue.source), queue.source.take_call()))
    }

    /// Returns the queues' call descriptors, which are to be closed without the lock ([`Queues::swap_call`]).
    #[must_use]
    pub(crate) fn reset(&self, service: &mut Service) -> Vec<EventFd> {
        let set_up = service.features != self.protocol.preselected() || self.actual_bytes() != 0;
        // Queues that are not started have nothing to stop.
        let calls = (0..service.queues.count())
            .filter_map(|index| self.stop_queue(service, index).ok()?.1)
            .collect();
        service.queues.forget();
        self.protocol.reset(&self.books);
        service.features = self.protocol.preselected();
        service.restored = None;
        service.state = DeviceState::Configuring;
        if let Some(balloon) = &mut service.balloon {
            balloon.reset(&self.books);
        }
        service.open_window(&*self.protocol, &self.books);
        // The timer rings once, and is set again by who heard it; elements are to be answered.
        self.turnstile
            .forget_all_but(1 << Self::TIMER | Self::SUBMITTED);
        self.show(service);
        // From here on nobody may submit any. What came while queues were being stopped goes back.
        self.accept_elements(service);
        if set_up {
            self.record(HistoryEvent::Reset);
        }
        calls
    }

    /// Notes work; true if the caller has to bring the device to a worker.
    pub(crate) fn wake(&self, queues: u32) -> bool {
        self.turnstile.note(queues)
    }

    /// Another descriptor of the timer, to listen on.
    pub(crate) fn timer_descriptor(&self) -> Result<OwnedFd> {
        self.timer.lock().descriptor()
    }

    /// Sets the timer for whatever is due next.
    pub(crate) fn set_timer(&self) {
        let timer = self.timer.lock();
        let due = [self.protocol.deadline(), *self.flush_due.lock()];
        timer.arm(due.into_iter().flatten().min());
    }

    /// Does what is due; returns what is to be done as if it had been kicked for.
    fn on_timer(&self) -> u32 {
        let due = self.protocol.on_timer();
        if due.config_change {
            self.signal_config();
        }
        self.set_timer();
        due.work
    }

    /// Has the VMM raise a configuration-change interrupt.
    pub(crate) fn signal_config(&self) {
        if let Some(event) = &self.config_event {
            event.signal();
        }
    }

    /// Has a worker discard what waits in the window, if it is time, and sets the alarm for what is left.
    /// A worker that `lingers` does it itself between the buffers of a busy guest.
    fn tend_window(&self, service: &mut Service, lingers: bool) {
        let busy = lingers && service.is_worth_waiting();
        let Some(balloon) = &mut service.balloon else {
            return;
        };
        let target = self.target_bytes.load(Ordering::Acquire);
        let settled = balloon.ballooned_bytes() >= target;
        let this = Weak::clone(&self.this);
        balloon.flush_if_due(settled, busy && !settled, &self.books, move || {
            if let Some(shared) = this.upgrade().filter(|shared| shared.wake(Self::FLUSHED)) {
                let home = shared.home.load(Ordering::Relaxed);
                Arc::clone(&shared.pool).submit(home, shared);
            }
        });
        let due = balloon.flush_deadline();
        if std::mem::replace(&mut *self.flush_due.lock(), due) != due {
            self.set_timer();
        }
    }

    fn note_broken(&self, Broken { queue, error }: Broken) {
        let level = match self.history.count_break() {
            0..MAX_LOGGED_BREAKS => log::Level::Warn,
            _ => log::Level::Debug,
        };
        log::log!(
            level,
            "queue {queue} broke: {error}; the device needs a reset"
        );
        self.books
            .enter(|entry| bump(&mut entry.device().broken_rings, 1));
    }

    /// One turn under the lock, with the queues that were `seen` to have something; returns those that have
    /// more. `lingers` if the caller is going to look for more when it left nothing.
    fn turn(&self, seen: u32, scratch: &mut Scratch, lingers: bool) -> u32 {
        let mut service = self.service.lock();
        let mut work = self.turnstile.collect() | seen;
        if work & (1 << Self::TIMER) != 0 {
            work |= self.on_timer();
        }
        self.accept_elements(&mut service);
        if service.state != DeviceState::Active {
            self.tend_window(&mut service, false);
            return 0;
        }
        let rings = work & service.queues.started();
        if rings != 0 {
            service.attention.woken();
        }
        let before = self.ballooned_bytes.load(Ordering::Acquire);
        let more = service.run(work, self, scratch).unwrap_or_else(|broken| {
            self.note_broken(broken);
            service.state = DeviceState::NeedsReset;
            0
        });
        if rings != 0 && more == 0 {
            let given = self.ballooned_bytes.load(Ordering::Acquire);
            let owes = given < self.target_bytes.load(Ordering::Acquire);
            service.attention.served(owes);
        }
        self.end_turn(&mut service, before, lingers && more == 0);
        if service.state == DeviceState::NeedsReset {
            self.record(HistoryEvent::NeedsReset);
            self.signal_config();
        }
        more
    }

    /// What a protocol gets for a turn.
    fn lend<'a>(
        &'a self,
        balloon: &'a mut Balloon,
        features: u64,
        scratch: &'a mut Scratch,
    ) -> Turn<'a> {
        Turn {
            balloon,
            scratch,
            books: &self.books,
            tape: &self.tape,
            ballooned_bytes: &self.ballooned_bytes,
            extra_bytes: &self.extra_bytes,
            features,
        }
    }

    /// After a turn in which the balloon may have changed from `before_bytes`.
    fn end_turn(&self, service: &mut Service, before_bytes: u64, lingers: bool) {
        self.tend_window(service, lingers);
        self.show(service);
        if self.protocol.actual_bytes().is_none()
            && self.ballooned_bytes.load(Ordering::Acquire) != before_bytes
        {
            self.record(HistoryEvent::ActualWritten);
        }
    }

    /// A turn in the calling thread, for what reaches a device by other ways than queues. `None` if the
    /// device is not active, or has no memory.
    pub(crate) fn call<R>(&self, turn: impl FnOnce(&mut Turn<'_>) -> R) -> Option<R> {
        let mut service = self.service.lock();
        let before = self.ballooned_bytes.load(Ordering::Acquire);
        let Service {
            state: DeviceState::Active,
            balloon: Some(balloon),
            features: Some(features),
            ..
        } = &mut *service
        else {
            return None;
        };
        let mut scratch = Scratch::default();
        let mut lent = self.lend(balloon, *features, &mut scratch);
        let returned = turn(&mut lent);
        // Where features are selected by the protocol itself.
        *features = lent.features;
        self.end_turn(&mut service, before, false);
        Some(returned)
    }

    /// Counts a driver's attempt to speak the protocol.
    pub(crate) fn count_handshake(&self, accepted: bool) {
        self.books.enter(|entry| {
            let device = entry.device();
            let counter = if accepted {
                &mut device.handshakes
            } else {
                &mut device.handshakes_failed
            };
            bump(counter, 1);
        });
    }
}

/// Hands the device back to the kicks however a turn ends.
struct Scheduled<'a>(&'a Shared);

impl Drop for Scheduled<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut service = self.0.service.lock();
            service.state = DeviceState::NeedsReset;
            self.0.show(&service);
            self.0.record(HistoryEvent::NeedsReset);
            self.0.signal_config();
            self.0.turnstile.release();
        }
    }
}

impl Servable for Shared {
    fn kicked(&self, queue: u16) -> bool {
        self.wake(1 << queue)
    }

    fn serve(&self, scratch: &mut Scratch, patience: &Patience<'_>) -> bool {
        let guard = Scheduled(self);
        let queues = self.turnstile.noted() & LINGERING;
        let lingers = queues != 0 && patience.lasts();
        let mut more = self.turn(0, scratch, lingers);
        if lingers {
            if more == 0 {
                more = self.linger(queues, scratch, patience);
            }
            // What was left for the pauses of the guest.
            self.tend_window(&mut self.service.lock(), false);
        }
        drop(guard);
        self.turnstile.leave(more)
    }
}
