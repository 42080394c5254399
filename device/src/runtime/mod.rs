//! The threads that serve the devices, and where they run.
//!
//! One [`Runtime`] serves many devices. Each host node with processors has its workers; all of a
//! node's workers wait on one epoll instance that holds the kick eventfds of the devices at home
//! there, so a kick wakes one idle worker directly, with no thread between. Work from elsewhere (a
//! device that is not finished, a part of a large discard) comes through lock-free channels, and an
//! eventfd in the same epoll instance wakes a worker for it.
//!
//! System calls of the workers (for seccomp filters): epoll_wait, poll, read, write, futex, madvise,
//! process_madvise, fallocate, sendto, timerfd_settime, rt_sigprocmask, sched_setaffinity, sched_yield, clock_gettime, mmap, munmap, exit;
//! io_submit and io_getevents where call eventfds are shared with somebody who is not trusted ([`crate::Sharer`]).

mod signals;
mod timer;
mod topology;
mod worker;

pub(crate) use timer::{Timer, monotonic_ns};
pub(crate) use worker::{KickRegistration, Patience, Pool, Scratch, Servable};

use crate::discard::probe::Capabilities;
use crate::discard::{Discarder, NotDiscarded};
use crate::error::{Error, Result};
use crate::memory::{Gpa, GuestMemory};
use std::sync::Arc;
use std::thread::JoinHandle;

/// The most workers a node can be given.
const MAX_WORKERS_PER_NODE: u32 = 64;

/// How many workers a node gets if nobody says otherwise, processors permitting: discarding scales
/// to a few threads before the kernel's locks stop it.
const DEFAULT_WORKERS_PER_NODE: u32 = 4;

/// How a runtime is set up.
#[derive(Clone, Copy, Debug, Default)]
pub struct RuntimeConfig {
    /// Worker threads for each host node that has processors; 0 chooses by the processors.
    pub workers_per_node: u32,
}

/// The worker pool. Dropping it stops its threads; devices keep it alive.
#[derive(Debug)]
pub struct Runtime {
    pool: Arc<Pool>,
    capabilities: Arc<Capabilities>,
    threads: Vec<JoinHandle<()>>,
}

impl Runtime {
    /// Probes the host, then starts all threads; none is created later.
    ///
    /// # Errors
    /// Fails if threads or descriptors cannot be had.
    pub fn new(config: &RuntimeConfig) -> Result<Arc<Self>> {
        Self::with_capabilities(config, Capabilities::probe()?)
    }

    /// A rival: its devices discard by a system call a page, in the thread that serves them.
    ///
    /// # Errors
    /// As [`Self::new`].
    #[cfg(feature = "bench")]
    #[doc(hidden)]
    pub fn one_call_a_page(config: &RuntimeConfig) -> Result<Arc<Self>> {
        Self::with_capabilities(config, Capabilities::one_call_a_page())
    }

    fn with_capabilities(config: &RuntimeConfig, capabilities: Capabilities) -> Result<Arc<Self>> {
        if config.workers_per_node > MAX_WORKERS_PER_NODE {
            return Err(Error::Invalid {
                what: "workers_per_node",
                value: u64::from(config.workers_per_node),
                expected: "at most 64",
            });
        }
        let host = topology::Host::discover();
        let workers = |node: &topology::Node| match config.workers_per_node {
            0 => node.processors.min(DEFAULT_WORKERS_PER_NODE),
            count => count,
        };
        let counts: Vec<u32> = host.nodes.iter().map(workers).collect();
        let pool = Arc::new(Pool::new(host, &counts)?);
        let mut runtime = Self {
            pool,
            capabilities: Arc::new(capabilities),
            threads: Vec::new(),
        };
        let _blocked = signals::Blocked::new();
        for (station, count) in counts.iter().enumerate() {
            for number in 0..*count {
                // Dropping `runtime` on an error stops the threads that run already.
                runtime
                    .threads
                    .push(worker::spawn(&runtime.pool, station, number)?);
            }
        }
        Ok(Arc::new(runtime))
    }

    /// A runtime without threads: its devices are served by [`Self::turn`], so that every step of a
    /// test is over when the call returns. One station, as on a host with a single node.
    ///
    /// # Errors
    /// As [`Self::new`].
    #[cfg(feature = "fuzzing")]
    #[doc(hidden)]
    pub fn inline() -> Result<Arc<Self>> {
        let capabilities = Arc::new(Capabilities::probe()?);
        let pool = Arc::new(Pool::new(topology::Host::discover(), &[1])?);
        Ok(Arc::new(Self {
            pool,
            capabilities,
            threads: Vec::new(),
        }))
    }

    /// The same for models of threads, on a host with processors to spare: the threads of a model are the
    /// workers, and call [`Self::turn`].
    #[cfg(all(test, loom))]
    pub(crate) fn modelled(capabilities: Arc<Capabilities>) -> Arc<Self> {
        let node = topology::Node {
            id: crate::memory::NodeId(0),
            cpus: None,
            processors: 8,
        };
        let host = topology::Host::of_nodes(vec![node]);
        Arc::new(Self {
            pool: Arc::new(Pool::new(host, &[1]).expect("an epoll instance")),
            capabilities,
            threads: Vec::new(),
        })
    }

    /// Does one piece of the work that waits; false if there is none. For [`Self::inline`] only. Without
    /// `parts`, discards that were handed to another worker stay undone.
    #[cfg(any(feature = "fuzzing", loom))]
    #[doc(hidden)]
    pub fn turn(&self, parts: bool) -> bool {
        self.pool.work_inline(parts)
    }

    /// One more than the highest number of a host node: nodes are numbered from 0.
    #[must_use]
    pub fn nodes(&self) -> u32 {
        self.pool.node_count()
    }

    /// How many worker threads there are.
    #[must_use]
    pub fn workers(&self) -> u32 {
        self.pool.workers()
    }

    /// Discards ranges of guest addresses and lengths in bytes, for a VMM that has rings and a balloon of its
    /// own; see [`Discarder::discard_ranges`]. No device's books know of it.
    pub fn discard_ranges(
        &self,
        memory: &Arc<GuestMemory>,
        ranges: &[(Gpa, u64)],
    ) -> Vec<std::result::Result<(), NotDiscarded>> {
        self.discarder().discard_ranges(memory, ranges)
    }

    /// What discards for the devices of this runtime.
    pub(crate) fn discarder(&self) -> Discarder {
        Discarder::pooled(Arc::clone(&self.capabilities), Arc::clone(&self.pool))
    }

    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.pool.stop();
        for thread in self.threads.drain(..) {
            // Workers catch what they run; a join error has nothing left to tell.
            let _ = thread.join();
        }
        self.pool.forget_work();
    }
}
