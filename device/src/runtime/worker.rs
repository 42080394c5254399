//! The pool itself: stations (one a node), their workers, and the hand-over of work.
//!
//! Two kinds of work keep the pool free of deadlocks: to *serve* a device may wait for *parts* of
//! its discard, a part waits for nothing, and whoever waits for parts runs other parts meanwhile.
//!
//! A worker that has served a device may look at it a little longer before it sleeps ([`Patience`]).
#![allow(
    unsafe_code,
    reason = "epoll is called directly: its edge triggering is the design"
)]

use super::topology::Host;
use crate::error::{Error, Result};
use crate::event::EventFd;
use crate::memory::{NodeId, Pfn, PfnRange};
use crate::ring::chain::Chain;
#[cfg(not(loom))]
use crate::sync::channel::Select;
use crate::sync::channel::{Receiver, Sender, unbounded};
use crate::sync::{RwLock, step};
use std::cell::Cell;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

/// What a worker serves: a device.
pub(crate) trait Servable: Send + Sync + std::fmt::Debug {
    /// Notes that the guest kicked `queue`; true if the caller has to call [`Self::serve`].
    fn kicked(&self, queue: u16) -> bool;

    /// Serves a bounded amount of what is there, and may look for more as long as `patience` lasts; true
    /// if the caller has to bring it back.
    fn serve(&self, scratch: &mut Scratch, patience: &Patience<'_>) -> bool;
}

/// Whether a worker may go on looking at a device that it has served, instead of going to sleep.
///
/// It may while nobody needs the worker or its processor: nothing else waits for it, and half of the
/// processors are left to others, to the guest first of all.
#[derive(Debug)]
pub(crate) struct Patience<'a>(Option<(&'a Pool, &'a Station)>);

impl Patience<'_> {
    /// That of a caller that has other things to do.
    pub(crate) const NONE: Self = Self(None);

    /// Whether it still lasts.
    pub(crate) fn lasts(&self) -> bool {
        self.0.is_some_and(|(pool, station)| {
            pool.leaves_half()
                && station.parts.1.is_empty()
                && station.serve.1.is_empty()
                && (station.asleep.load(Ordering::Relaxed) > 0 || !station.is_signalled())
                && !pool.stopping.load(Ordering::Relaxed)
        })
    }
}

thread_local! {
    /// The station whose worker this thread is.
    static AT_STATION: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Buffers that a worker lends to whatever device it serves: their size is bounded by constants,
/// and there is one set a thread however many devices there are.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    pub(crate) chain: Chain,
    pub(crate) done: Vec<(u64, u32)>,
    pub(crate) pages: Vec<Pfn>,
    pub(crate) ranges: Vec<PfnRange>,
    /// A bit for each page of one inflate buffer that was refused.
    pub(crate) refused: Vec<u8>,
}

pub(crate) type Part = Box<dyn FnOnce() + Send>;

/// Both ends of a lock-free queue; it never closes while its station lives.
type Channel<T> = (Sender<T>, Receiver<T>);

/// The wake-up eventfd's mark among the epoll events; kicks are numbered from 1.
const WAKE: u64 = 0;

/// The part of the pool on one node.
#[derive(Debug)]
struct Station {
    epoll: OwnedFd,
    wake: EventFd,
    serve: Channel<Arc<dyn Servable>>,
    parts: Channel<Part>,
    /// Workers that wait for something to do.
    asleep: AtomicU32,
}

#[derive(Debug)]
struct Kick {
    device: Weak<dyn Servable>,
    queue: u16,
}

/// All stations, and who is registered for kicks.
#[derive(Debug)]
pub(crate) struct Pool {
    host: Host,
    stations: Vec<Station>,
    workers: u32,
    kicks: RwLock<HashMap<u64, Kick>>,
    next_kick: AtomicU64,
    stopping: AtomicBool,
}

/// A kick eventfd that the pool listens on until this is dropped.
#[derive(Debug)]
pub(crate) struct KickRegistration {
    pool: Arc<Pool>,
    station: usize,
    id: u64,
    fd: OwnedFd,
}

impl Drop for KickRegistration {
    fn drop(&mut self) {
        step();
        self.pool.kicks.write().remove(&self.id);
        if let Some(station) = self.pool.stations.get(self.station) {
            // SAFETY: both descriptors are open; EPOLL_CTL_DEL takes no event.
            unsafe {
                libc::epoll_ctl(
                    station.epoll.as_raw_fd(),
                    libc::EPOLL_CTL_DEL,
                    self.fd.as_raw_fd(),
                    std::ptr::null_mut(),
                )
            };
        }
    }
}

impl Station {
    fn new() -> Result<Self> {
        // SAFETY: epoll_create1 takes an integer.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(Error::last_os("cannot create an epoll instance"));
        }
        // SAFETY: the kernel just returned this descriptor to us, and nobody else owns it.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        let wake = EventFd::create()?;
        let station = Self {
            epoll,
            wake,
            serve: unbounded(),
            parts: unbounded(),
            asleep: AtomicU32::new(0),
        };
        station.listen(station.wake.as_fd(), WAKE)?;
        Ok(station)
    }

    /// Edge triggered: each write wakes one worker, and nobody has to read the counter.
    fn listen(&self, fd: BorrowedFd<'_>, id: u64) -> Result<()> {
        let events = (libc::EPOLLIN | libc::EPOLLET).cast_unsigned();
        let mut event = libc::epoll_event { events, u64: id };
        // SAFETY: both descriptors are open, and the event lives across the call.
        let result = unsafe {
            libc::epoll_ctl(
                self.epoll.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                fd.as_raw_fd(),
                &raw mut event,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(Error::last_os("cannot listen on an eventfd"))
        }
    }

    /// Sleeps until there is something to do, or only looks whether there is; returns the mark of
    /// what was signalled.
    fn wait(&self, sleep: bool) -> Option<u64> {
        step();
        let timeout = if sleep { -1 } else { 0 };
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        self.asleep.fetch_add(u32::from(sleep), Ordering::Relaxed);
        // SAFETY: room for one event, as the third argument says.
        let count = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), &raw mut event, 1, timeout) };
        self.asleep.fetch_sub(u32::from(sleep), Ordering::Relaxed);
        (count == 1).then_some(event.u64)
    }

    /// Whether something was signalled that no worker has taken yet.
    fn is_signalled(&self) -> bool {
        let mut entry = libc::pollfd {
            fd: self.epoll.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, as the second argument says, that lives across the call.
        unsafe { libc::poll(&raw mut entry, 1, 0) > 0 }
    }
}

impl Pool {
    pub(super) fn new(host: Host, workers: &[u32]) -> Result<Self> {
        let stations = workers
            .iter()
            .map(|_| Station::new())
            .collect::<Result<_>>()?;
        Ok(Self {
            host,
            stations,
            workers: workers.iter().sum(),
            kicks: RwLock::default(),
            next_kick: AtomicU64::new(WAKE + 1),
            stopping: AtomicBool::new(false),
        })
    }

    pub(crate) fn workers(&self) -> u32 {
        self.workers
    }

    pub(crate) fn node_count(&self) -> u32 {
        self.host.node_count
    }

    /// Workers that are at work.
    fn awake(&self) -> u32 {
        let asleep = |station: &Station| station.asleep.load(Ordering::Relaxed);
        self.workers
            .saturating_sub(self.stations.iter().map(asleep).sum())
    }

    /// Whether the workers that are awake leave half of the processors to others.
    fn leaves_half(&self) -> bool {
        2 * self.awake() <= self.host.processors()
    }

    /// Whether one more worker could be awake and still leave half of the processors to others.
    pub(crate) fn has_spare(&self) -> bool {
        2 * (self.awake() + 1) <= self.host.processors()
    }

    /// The station of a node; memory of unknown nodes, or of nodes without processors, is at home
    /// at the first.
    pub(crate) fn station_of(&self, node: Option<NodeId>) -> usize {
        let of_node = |id| self.host.nodes.iter().position(|node| node.id == id);
        node.and_then(of_node).unwrap_or(0)
    }

    /// Listens on a queue's kick eventfd.
    pub(crate) fn register(
        self: &Arc<Self>,
        station: usize,
        fd: OwnedFd,
        device: Weak<dyn Servable>,
        queue: u16,
    ) -> Result<KickRegistration> {
        let id = self.next_kick.fetch_add(1, Ordering::Relaxed);
        self.kicks.write().insert(id, Kick { device, queue });
        let registration = KickRegistration {
            pool: Arc::clone(self),
            station,
            id,
            fd,
        };
        if let Some(station) = self.stations.get(station) {
            station.listen(std::os::fd::AsFd::as_fd(&registration.fd), id)?;
        }
        Ok(registration)
    }

    /// Has a worker of `station` serve `device`: the calling one if it is one of them, when it is done
    /// with what it does.
    pub(crate) fn submit(&self, station: usize, device: Arc<dyn Servable>) {
        if let Some(to) = self.stations.get(station) {
            // The station holds a receiver, so the channel is open.
            let _ = to.serve.0.send(device);
            if AT_STATION.get() != Some(station) {
                to.wake.signal();
            }
        }
    }

    /// Runs all jobs, each preferably by a worker of its node, and returns their results when all
    /// are done. The calling thread takes part; it may be a worker or any other thread.
    pub(crate) fn scatter<T, J>(&self, jobs: impl Iterator<Item = (Option<NodeId>, J)>) -> Vec<T>
    where
        T: Send + 'static,
        J: FnOnce() -> T + Send + 'static,
    {
        let (results, collect) = unbounded();
        let mut own = None;
        let mut expected = 0;
        for (node, job) in jobs {
            expected += 1;
            if own.is_none() {
                own = Some(job);
                continue;
            }
            let results = results.clone();
            let part: Part = Box::new(move || {
                let _ = results.send(job());
            });
            self.spawn(node, part);
        }
        let mut done = Vec::with_capacity(expected);
        let Some(job) = own else { return done };
        done.push(job());
        drop(results);
        // A part that panicked closes its end without a result; the pool logged it.
        while done.len() < expected
            && let Some(result) = self.wait_helping(&collect)
        {
            done.push(result);
        }
        done
    }

    /// Has a worker of `node` run `part`, which must not wait for other parts.
    pub(crate) fn spawn(&self, node: Option<NodeId>, part: Part) {
        if let Some(station) = self.stations.get(self.station_of(node)) {
            // The station holds a receiver, so the channel is open.
            let _ = station.parts.0.send(part);
            station.wake.signal();
        }
    }

    /// As [`Self::spawn`], but wakes nobody if the calling thread is a worker of that node: it runs `part`
    /// itself when it is done with what it does.
    pub(crate) fn spawn_here(&self, node: Option<NodeId>, part: Part) {
        let index = self.station_of(node);
        match self.stations.get(index) {
            Some(station) if AT_STATION.get() == Some(index) => {
                // The station holds a receiver, so the channel is open.
                let _ = station.parts.0.send(part);
            }
            _ => self.spawn(node, part),
        }
    }

    /// Waits for the next value, or for the end of the channel, and runs parts meanwhile: those of any
    /// node, as all workers of one may be waiting for what the caller has locked.
    #[cfg(not(loom))]
    pub(crate) fn wait_helping<T>(&self, values: &Receiver<T>) -> Option<T> {
        loop {
            let mut select = Select::new();
            let value = select.recv(values);
            for station in &self.stations {
                select.recv(&station.parts.1);
            }
            let ready = select.select();
            let index = ready.index();
            if index == value {
                return ready.recv(values).ok();
            }
            // Receivers were added behind `values` in the order of the stations.
            if let Some(station) = index
                .checked_sub(1)
                .and_then(|index| self.stations.get(index))
                && let Ok(part) = ready.recv(&station.parts.1)
            {
                run_caught(part);
            }
        }
    }

    /// The same for a model, where looking again is waiting.
    #[cfg(loom)]
    pub(crate) fn wait_helping<T>(&self, values: &Receiver<T>) -> Option<T> {
        loop {
            match values.try_recv() {
                Err(crate::sync::channel::TryRecvError::Empty) => {}
                value => return value.ok(),
            }
            let parts = |station: &Station| station.parts.1.try_recv().ok();
            match self.stations.iter().find_map(parts) {
                Some(part) => run_caught(part),
                None => loom::thread::yield_now(),
            }
        }
    }

    /// Makes every worker leave its loop.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        for station in &self.stations {
            station.wake.signal();
        }
    }

    /// Lets go of the devices that were still waiting for a turn: they keep the pool, and it them.
    pub(super) fn forget_work(&self) {
        for station in &self.stations {
            station.serve.1.try_iter().for_each(drop);
            station.parts.1.try_iter().for_each(drop);
        }
    }

    /// A worker's life.
    fn work(&self, station: &Station) {
        let mut scratch = Scratch::default();
        while !self.stopping.load(Ordering::Acquire) {
            self.work_once(station, &mut scratch, true);
        }
        // One edge wakes one worker: pass it on so that all of them leave.
        station.wake.signal();
    }

    /// Waits for work, unless told not to, and does one piece of it; false if nothing was there.
    fn work_once(&self, station: &Station, scratch: &mut Scratch, may_sleep: bool) -> bool {
        // One part, one kick and one waiting device a turn: none can keep the others from theirs.
        let part = station.parts.1.try_recv().map(run_caught).is_ok();
        let lingers = may_sleep || cfg!(loom);
        self.serve_once(station, scratch, lingers, may_sleep && !part) || part
    }

    /// The same without the parts; `lingers` says whether it may look longer at what it has served.
    fn serve_once(
        &self,
        station: &Station,
        scratch: &mut Scratch,
        lingers: bool,
        may_sleep: bool,
    ) -> bool {
        let event = station.wait(may_sleep && station.serve.1.is_empty());
        let patience = Patience(lingers.then_some((self, station)));
        let kick = event.filter(|id| *id != WAKE);
        if let Some(device) = kick.and_then(|id| self.kicked(id)) {
            self.serve(station, device, scratch, &patience);
        }
        match station.serve.1.try_recv() {
            Ok(device) => self.serve(station, device, scratch, &patience),
            Err(_) => return event.is_some(),
        }
        true
    }

    /// What a worker of the first station would do next, done by the calling thread. Without `parts`, the
    /// worker that should run those is slow.
    #[cfg(any(feature = "fuzzing", loom))]
    pub(super) fn work_inline(&self, parts: bool) -> bool {
        let mut scratch = Scratch::default();
        self.stations.first().is_some_and(|station| {
            if parts {
                self.work_once(station, &mut scratch, false)
            } else {
                self.serve_once(station, &mut scratch, false, false)
            }
        })
    }

    /// The device that the kick `id` belongs to, if it is to be served now and by us.
    fn kicked(&self, id: u64) -> Option<Arc<dyn Servable>> {
        let kicks = self.kicks.read();
        let kick = kicks.get(&id)?;
        let device = kick.device.upgrade()?;
        device.kicked(kick.queue).then_some(device)
    }

    fn serve(
        &self,
        station: &Station,
        device: Arc<dyn Servable>,
        scratch: &mut Scratch,
        patience: &Patience<'_>,
    ) {
        let again = catch_unwind(AssertUnwindSafe(|| device.serve(scratch, patience)));
        match again {
            Ok(true) => {
                // Behind whoever else waits: a busy device must not keep the others from a turn.
                let _ = station.serve.0.send(device);
            }
            Ok(false) => {}
            Err(_) => log::error!("serving a device panicked; please report this"),
        }
    }
}

/// Runs a part; a panic ends the part, not the worker.
fn run_caught(part: Part) {
    if catch_unwind(AssertUnwindSafe(part)).is_err() {
        log::error!("a part of a discard panicked; please report this");
    }
}

/// Starts a worker of the station at index `station`.
pub(super) fn spawn(pool: &Arc<Pool>, station: usize, number: u32) -> Result<JoinHandle<()>> {
    let pool = Arc::clone(pool);
    std::thread::Builder::new()
        .name(format!("aerostat-{station}.{number}"))
        .spawn(move || {
            if let Some(node) = pool.host.nodes.get(station) {
                pool.host.bind_current_thread(node);
            }
            AT_STATION.set(Some(station));
            if let Some(station) = pool.stations.get(station) {
                pool.work(station);
            }
        })
        .map_err(|source| Error::Os {
            what: "cannot start a worker thread",
            source,
        })
}

#[cfg(not(loom))]
#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
