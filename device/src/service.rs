//! What a worker does with a device, and the state that it needs the lock for.

mod elements;
pub(crate) mod lock;
mod turnstile;

use crate::balloon::{Balloon, bump};
use crate::device::{DeviceState, QueueConfig, QueuePosition};
use crate::discard::WriteBehind;
use crate::error::{Error, Result};
use crate::event::{EventFd, check_eventfd};
use crate::history::{History, HistoryEvent};
use crate::memory::{BALLOON_PAGE_SHIFT, GuestMemory};
use crate::metrics::Books;
use crate::protocol::virtio_balloon::{
    ConfigSpace, Features, HintBoard, QUEUES, Role, StatsBoard, Turn, role_of, serve_pages,
};
use crate::ring::source::{Completion, Element, ElementQueue, RingQueue, Source};
use crate::ring::{Ring, RingError, RingFeatures};
use crate::runtime::{KickRegistration, Pool, Runtime, Scratch, Servable, Timer};
use crate::saved_state::SavedQueue;
use crossbeam_channel::{Receiver, Sender, unbounded};
use lock::ServiceLock;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;
use turnstile::Turnstile;

/// How many broken queues of a device are worth a warning each: a guest that breaks them and resets
/// its device for ever must not be able to fill a log (I3).
const MAX_LOGGED_BREAKS: u64 = 20;

/// A started queue.
#[derive(Debug)]
pub(crate) struct Queue {
    source: Source,
    /// Dropped with the queue: then no kick of it arrives any more.
    _kick: Option<KickRegistration>,
}

/// Everything that serving changes.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) state: DeviceState,
    pub(crate) features: Option<Features>,
    pub(crate) balloon: Option<Balloon>,
    pub(crate) inhibits: u32,
    /// Where rings go on, if the device was restored since its last reset.
    pub(crate) restored: Option<[Option<QueuePosition>; QUEUES as usize]>,
    pub(crate) write_behind: WriteBehind,
    queues: [Option<Queue>; QUEUES as usize],
}

/// A device as its handle and the workers share it.
#[derive(Debug)]
pub(crate) struct Shared {
    this: Weak<Self>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) offered: Features,
    pub(crate) config: ConfigSpace,
    pub(crate) config_event: Option<EventFd>,
    pub(crate) books: Arc<Books>,
    pub(crate) stats: StatsBoard,
    pub(crate) hints: HintBoard,
    pub(crate) history: Arc<History>,
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
    /// Elements submitted whose completion was not collected yet.
    outstanding: AtomicUsize,
    /// Copies of what is in the service, for those who must not wait.
    state: AtomicU8,
    pub(crate) features: AtomicU64,
    pub(crate) memory_bytes: AtomicU64,
    /// The target as it was set, which may be more than the guest's memory turns out to be.
    pub(crate) wanted_bytes: AtomicU64,
    pub(crate) ballooned_bytes: AtomicU64,
}

impl Service {
    /// The started queues, a bit each.
    pub(crate) fn started(&self) -> u32 {
        self.queues_that(|_| true)
    }

    /// The started queues whose elements the VMM pops, a bit each.
    fn element_queues(&self) -> u32 {
        self.queues_that(|queue| matches!(queue.source, Source::Elements(_)))
    }

    fn queues_that(&self, wanted: impl Fn(&Queue) -> bool) -> u32 {
        let bits = self.queues.iter().zip(0..);
        bits.filter(|(queue, _)| queue.as_ref().is_some_and(&wanted))
            .fold(0, |mask, (_, bit)| mask | 1 << bit)
    }

    /// Fails unless features and memory are set.
    pub(crate) fn ready(&self) -> Result<(Features, &Balloon)> {
        let features = self.features.ok_or(Error::NotReady("set the features"))?;
        let balloon = self
            .balloon
            .as_ref()
            .ok_or(Error::NotReady("set the memory table"))?;
        Ok((features, balloon))
    }

    fn queue(&mut self, index: u16) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(index))?.as_mut()
    }

    /// The running rings as they would lie in another table.
    pub(crate) fn moved_rings(&self, memory: &Arc<GuestMemory>) -> Result<Vec<Option<Ring>>> {
        let moved = |queue: &Option<Queue>| match queue {
            Some(Queue {
                source: Source::Ring(queue),
                ..
            }) => queue.ring.moved(memory).map(Some),
            _ => Ok(None),
        };
        self.queues.iter().map(moved).collect()
    }

    /// Goes on with the rings that [`Self::moved_rings`] returned.
    pub(crate) fn replace_rings(&mut self, rings: Vec<Option<Ring>>) {
        for (queue, ring) in self.queues.iter_mut().zip(rings) {
            if let (
                Some(Queue {
                    source: Source::Ring(queue),
                    ..
                }),
                Some(ring),
            ) = (queue, ring)
            {
                queue.ring = ring;
            }
        }
    }

    pub(crate) fn set_call(&mut self, index: u16, call: Option<EventFd>) -> Result<()> {
        match self.queue(index) {
            Some(Queue {
                source: Source::Ring(queue),
                ..
            }) => {
                queue.call = call;
                // The old descriptor may have swallowed a signal that the new one's owner needs.
                if let Some(call) = &queue.call {
                    call.signal();
                }
                Ok(())
            }
            _ => Err(Error::NoQueue {
                index: u32::from(index),
            }),
        }
    }

    /// Lets pages wait before they are discarded, if the driver promised to tell before it uses them.
    pub(crate) fn open_window(&mut self, books: &Books) {
        let told = self
            .features
            .is_some_and(|f| f.contains(Features::MUST_TELL_HOST));
        let setting = if told {
            self.write_behind
        } else {
            WriteBehind::default()
        };
        if let Some(balloon) = &mut self.balloon {
            balloon.set_write_behind(setting, books);
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

    /// The queues as they are saved; `held` is the stats buffer, which counts as not taken.
    pub(crate) fn saved_queues(
        &mut self,
        held: Option<u64>,
    ) -> [Option<SavedQueue>; QUEUES as usize] {
        let started = self.started();
        let stats = self.queue_of(Role::Stats, started).map(|(index, _)| index);
        let mut saved = [None; QUEUES as usize];
        for ((slot, queue), index) in saved.iter_mut().zip(&self.queues).zip(0..) {
            let held = held.filter(|_| stats == Some(index));
            *slot = queue.as_ref().map(|queue| match &queue.source {
                Source::Ring(queue) => {
                    let position = queue.ring.position_before(held);
                    SavedQueue::Ring { position }
                }
                Source::Elements(_) => SavedQueue::Elements,
            });
        }
        saved
    }

    /// The started queue that has `role`, and its index.
    fn queue_of(&mut self, role: Role, started: u32) -> Option<(u16, &mut Queue)> {
        let index = index_of(role, self.features?, started)?;
        Some((index, self.queue(index)?))
    }

    /// Serves the kicked queues for one turn; returns those that have more.
    fn run(
        &mut self,
        kicks: u32,
        shared: &Shared,
        scratch: &mut Scratch,
    ) -> Result<u32, RingError> {
        let started = self.started();
        let Self {
            balloon: Some(balloon),
            features: Some(features),
            queues,
            ..
        } = self
        else {
            return Ok(0);
        };
        let mut turn = Turn {
            balloon,
            scratch,
            books: &shared.books,
            stats: &shared.stats,
            hints: &shared.hints,
            config: &shared.config,
            refusal: features.contains(Features::PAGE_REFUSAL),
            ballooned_bytes: &shared.ballooned_bytes,
            poisoned: shared.config.poison_val() != 0 && features.contains(Features::PAGE_POISON),
        };
        let mut more = Ok(0);
        for role in [
            Role::Inflate,
            Role::Deflate,
            Role::Stats,
            Role::Hints,
            Role::Reporting,
        ] {
            let Some(index) = index_of(role, *features, started) else {
                continue;
            };
            let Some(Some(queue)) = queues.get_mut(usize::from(index)) else {
                continue;
            };
            if role == Role::Stats && kicks & Shared::STATS_REQUEST != 0 {
                shared.stats.request(&mut queue.source);
            }
            if kicks & (1 << index) == 0 {
                continue;
            }
            match serve_pages(role, &mut queue.source, &mut turn) {
                Ok(true) => more = more.map(|mask| mask | 1 << index),
                Ok(false) => {}
                Err(error) => {
                    let level = match shared.books.total().broken_rings {
                        0..MAX_LOGGED_BREAKS => log::Level::Warn,
                        _ => log::Level::Debug,
                    };
                    log::log!(
                        level,
                        "queue {index} broke: {error}; the device needs a reset"
                    );
                    more = Err(error);
                    break;
                }
            }
        }
        more
    }
}

/// The started queue that has `role`.
fn index_of(role: Role, features: Features, started: u32) -> Option<u16> {
    (0..QUEUES).find(|index| {
        started & (1 << index) != 0 && role_of(*index, features, started) == Some(role)
    })
}

impl Shared {
    /// The mark, among the kicks, that asks for guest statistics.
    pub(crate) const STATS_REQUEST: u32 = 1 << 31;
    /// The number under which the timer kicks.
    pub(crate) const TIMER: u16 = 30;
    /// The mark that a flush of the window is done.
    const FLUSHED: u32 = 1 << 29;

    pub(crate) fn new(
        runtime: &Runtime,
        offered: Features,
        config_event: Option<EventFd>,
        completion_event: Option<Arc<EventFd>>,
        history: Arc<History>,
    ) -> Result<Arc<Self>> {
        let timer = Timer::new()?;
        let service = Service {
            state: DeviceState::Configuring,
            features: None,
            balloon: None,
            inhibits: 0,
            restored: None,
            write_behind: WriteBehind::default(),
            queues: [const { None }; QUEUES as usize],
        };
        Ok(Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            pool: Arc::clone(runtime.pool()),
            offered,
            config: ConfigSpace::new(offered),
            config_event,
            books: Arc::new(Books::new(usize::try_from(runtime.nodes()).unwrap_or(1))),
            stats: StatsBoard::default(),
            hints: HintBoard::default(),
            history,
            flush_due: Mutex::new(None),
            timer: Mutex::new(timer),
            service: ServiceLock::new(service),
            home: AtomicUsize::new(0),
            turnstile: Turnstile::new(),
            submitted: unbounded(),
            completed: unbounded(),
            completion_event,
            outstanding: AtomicUsize::new(0),
            state: AtomicU8::new(DeviceState::Configuring as u8),
            features: AtomicU64::new(0),
            memory_bytes: AtomicU64::new(0),
            wanted_bytes: AtomicU64::new(0),
            ballooned_bytes: AtomicU64::new(0),
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
        let memory = match self.memory_bytes.load(Ordering::Acquire) {
            0 => u64::MAX,
            memory => memory,
        };
        let bytes = self.wanted_bytes.load(Ordering::Acquire).min(memory);
        let pages = bytes >> BALLOON_PAGE_SHIFT;
        self.config
            .set_num_pages(u32::try_from(pages).unwrap_or(u32::MAX));
    }

    /// Shows the service's state to those who must not wait for it.
    pub(crate) fn show(&self, service: &Service) {
        self.state.store(service.state as u8, Ordering::Release);
        self.features
            .store(service.features.map_or(0, |f| f.bits()), Ordering::Release);
        let balloon = service.balloon.as_ref();
        let memory = balloon.map_or(0, |balloon| balloon.memory().total_bytes());
        self.memory_bytes.store(memory, Ordering::Release);
        let ballooned = balloon.map_or(0, Balloon::ballooned_bytes);
        self.ballooned_bytes.store(ballooned, Ordering::Release);
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

    pub(crate) fn start_queue(
        &self,
        pool: &Arc<Pool>,
        service: &mut Service,
        index: u16,
        config: QueueConfig,
    ) -> Result<()> {
        if index >= QUEUES {
            return Err(Error::NoQueue {
                index: u32::from(index),
            });
        }
        if service.state == DeviceState::NeedsReset {
            return Err(Error::NotReady("reset the device"));
        }
        if service.queue(index).is_some() {
            return Err(Error::AlreadyStarted("the queue"));
        }
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
                let ring_features = RingFeatures {
                    packed: features.contains(Features::RING_PACKED),
                    indirect: features.contains(Features::INDIRECT_DESC),
                    event_idx: features.contains(Features::EVENT_IDX),
                    in_order: features.contains(Features::IN_ORDER),
                };
                let places = [ring.desc, ring.avail, ring.used];
                let memory = balloon.memory();
                let taken = Ring::new(memory, config.size, places, ring.position, ring_features)?;
                check_eventfd("kick", &ring.kick)?;
                let call = ring.call.map(|fd| EventFd::new("call", fd)).transpose()?;
                let home = self.home.load(Ordering::Relaxed);
                let device: Weak<dyn Servable> = self.this.clone();
                let kick = pool.register(home, ring.kick, device, index)?;
                Queue {
                    source: Source::Ring(RingQueue { ring: taken, call }),
                    _kick: Some(kick),
                }
            }
        };
        if let Some(slot) = service.queues.get_mut(usize::from(index)) {
            *slot = Some(queue);
        }
        Ok(())
    }

    pub(crate) fn stop_queue(&self, service: &mut Service, index: u16) -> Result<QueuePosition> {
        self.accept_elements(service);
        let started = service.started();
        let is_stats = service
            .queue_of(Role::Stats, started)
            .is_some_and(|(at, _)| at == index);
        let slot = service.queues.get_mut(usize::from(index));
        let mut queue = slot.and_then(Option::take).ok_or(Error::NoQueue {
            index: u32::from(index),
        })?;
        if is_stats {
            self.stats.put_back(&mut queue.source);
        }
        queue.source.cancel();
        Ok(match queue.source {
            Source::Ring(queue) => queue.ring.position(),
            Source::Elements(_) => QueuePosition::SPLIT_START,
        })
    }

    pub(crate) fn reset(&self, service: &mut Service) {
        let set_up = service.features.is_some() || self.config.actual() != 0;
        for index in 0..QUEUES {
            // Queues that are not started have nothing to stop.
            let _ = self.stop_queue(service, index);
        }
        self.stats.reset();
        let ended = self.config.reset();
        self.books
            .enter(|entry| bump(&mut entry.device().host_resets_acknowledged, ended));
        self.hints.reset(&self.config);
        service.features = None;
        service.restored = None;
        service.state = DeviceState::Configuring;
        if let Some(balloon) = &mut service.balloon {
            balloon.reset(&self.books);
        }
        service.open_window(&self.books);
        self.turnstile.forget();
        self.show(service);
        if set_up {
            self.record(HistoryEvent::Reset);
        }
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
        let due = [
            self.hints.deadline(),
            self.stats.next_poll(),
            *self.flush_due.lock(),
        ];
        timer.arm(due.into_iter().flatten().min());
    }

    /// Does what is due; returns what is to be done as if it had been kicked for.
    fn on_timer(&self) -> u32 {
        if self.hints.expire(&self.config) {
            log::info!("a round of free page hints took too long; the guest has its pages back");
            self.signal_config();
        }
        let kicks = if self.stats.poll_is_due() {
            Self::STATS_REQUEST
        } else {
            0
        };
        self.set_timer();
        kicks
    }

    /// Has the VMM raise a configuration-change interrupt.
    pub(crate) fn signal_config(&self) {
        if let Some(event) = &self.config_event {
            event.signal();
        }
    }

    /// Has a worker discard what waits in the window, if it is time, and sets the alarm for what is left.
    fn tend_window(&self, service: &mut Service) {
        let Some(balloon) = &mut service.balloon else {
            return;
        };
        let target = u64::from(self.config.num_pages()) << BALLOON_PAGE_SHIFT;
        let settled = balloon.ballooned_bytes() >= target;
        let this = Weak::clone(&self.this);
        balloon.flush_if_due(settled, &self.books, move || {
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

    /// One turn under the lock; returns the queues that have more.
    fn turn(&self, scratch: &mut Scratch) -> u32 {
        let mut service = self.service.lock();
        let mut kicks = self.turnstile.collect();
        if kicks & (1 << Self::TIMER) != 0 {
            kicks |= self.on_timer();
        }
        self.accept_elements(&mut service);
        if service.state != DeviceState::Active {
            self.tend_window(&mut service);
            return 0;
        }
        let more = service.run(kicks, self, scratch).unwrap_or_else(|_| {
            self.books
                .enter(|entry| bump(&mut entry.device().broken_rings, 1));
            service.state = DeviceState::NeedsReset;
            0
        });
        self.tend_window(&mut service);
        self.show(&service);
        if service.state == DeviceState::NeedsReset {
            self.record(HistoryEvent::NeedsReset);
            self.signal_config();
        }
        more
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

    fn serve(&self, scratch: &mut Scratch) -> bool {
        let guard = Scheduled(self);
        let more = self.turn(scratch);
        drop(guard);
        self.turnstile.leave(more, || !self.submitted.1.is_empty())
    }
}
