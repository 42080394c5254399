//! Ranges of guest pages become free host memory.
//!
//! [`plan`] sorts pieces into one batch a primitive and file (pure), `primitive` makes the system
//! calls, [`probe`] found out at start which of them this host has, and [`Discarder`] here spreads
//! large batches over the worker pool. `ranges` is the way in for VMMs that keep the balloon themselves.

pub mod plan;
mod primitive;
pub mod probe;
mod ranges;
pub(crate) mod restore;
pub(crate) mod window;

pub use ranges::NotDiscarded;
pub use restore::DeflateOptions;
pub use window::WriteBehind;

use crate::memory::GuestMemory;
use crate::runtime::Pool;
use crate::sync::step;
use plan::{Batch, Piece, Plan};
use probe::Capabilities;
use std::panic::catch_unwind;
use std::sync::Arc;

/// The least work that pays a hand-over to another thread, measured on anonymous memory.
const MIN_TASK_BYTES: u64 = 2 << 20;

/// What became of a plan.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The pages whose memory could not be freed.
    pub failed: Vec<Piece>,
    /// System calls made.
    pub calls: u64,
    /// Ranges handed to them.
    pub ranges: u64,
    /// Time in them, summed over threads.
    pub nanoseconds: u64,
}

impl Outcome {
    fn absorb(&mut self, other: Self) {
        self.failed.extend(other.failed);
        self.calls += other.calls;
        self.ranges += other.ranges;
        self.nanoseconds += other.nanoseconds;
    }
}

/// Executes plans, alone or with the help of the pool.
#[derive(Clone, Debug)]
pub struct Discarder {
    capabilities: Arc<Capabilities>,
    pool: Option<Arc<Pool>>,
}

impl Discarder {
    /// A discarder that works in the calling thread only.
    #[must_use]
    pub fn inline(capabilities: Arc<Capabilities>) -> Self {
        Self {
            capabilities,
            pool: None,
        }
    }

    /// A discarder that hands large pieces of work to `pool`.
    pub(crate) fn pooled(capabilities: Arc<Capabilities>, pool: Arc<Pool>) -> Self {
        Self {
            capabilities,
            pool: Some(pool),
        }
    }

    /// The same discarder without the pool.
    pub(crate) fn alone(&self) -> Self {
        Self::inline(Arc::clone(&self.capabilities))
    }

    /// Whether two workers get through the memory of the region at `index` faster than one.
    pub(crate) fn scales(&self, memory: &GuestMemory, index: usize) -> bool {
        let region = memory.regions().get(index);
        region.is_some_and(|region| plan::Primitive::of(region, &self.capabilities).scales())
    }

    /// The pool that helps, if there is one.
    pub(crate) fn pool(&self) -> Option<&Arc<Pool>> {
        self.pool.as_ref()
    }

    /// Discards `pieces`, which have to be sorted, disjoint and inside their regions.
    ///
    /// Every piece's memory is free when this returns, but for [`Outcome::failed`].
    pub fn discard(&self, memory: &Arc<GuestMemory>, pieces: &[Piece]) -> Outcome {
        #[cfg(feature = "bench")]
        if self.capabilities.one_call_a_page {
            return self.discard_page_by_page(memory, pieces);
        }
        let plan = Plan::new(memory, pieces, &self.capabilities);
        let mut tasks = Vec::new();
        for batch in plan.batches {
            // Punching holes holds the inode's lock exclusively: one worker per file.
            let parts = match &self.pool {
                Some(pool) if batch.primitive.scales() && can_be_cut(memory, &batch) => {
                    (batch.bytes() / MIN_TASK_BYTES).clamp(1, u64::from(pool.workers()))
                }
                _ => 1,
            };
            batch.split(parts, &mut tasks);
        }
        let mut outcome = Outcome::default();
        match &self.pool {
            Some(pool) if tasks.len() > 1 => {
                let jobs = tasks.into_iter().map(|batch| {
                    let (memory, capabilities) =
                        (Arc::clone(memory), Arc::clone(&self.capabilities));
                    let node = batch.node;
                    (node, move || run(&memory, &capabilities, &batch))
                });
                for result in pool.scatter(jobs) {
                    outcome.absorb(result);
                }
            }
            _ => {
                for batch in &tasks {
                    outcome.absorb(run(memory, &self.capabilities, batch));
                }
            }
        }
        outcome
    }

    /// What others do: a call a page, and nothing else.
    #[cfg(feature = "bench")]
    fn discard_page_by_page(&self, memory: &GuestMemory, pieces: &[Piece]) -> Outcome {
        let mut outcome = Outcome::default();
        for mut batch in Plan::new(memory, pieces, &self.capabilities).batches {
            const PAGE: u64 = crate::memory::BALLOON_PAGE_BYTES;
            let pages = |range: &plan::HostRange| {
                let (region, end) = (range.region, range.start + range.len);
                let page = move |start| plan::HostRange {
                    start,
                    len: PAGE,
                    region,
                };
                (range.start..end).step_by(4096).map(page)
            };
            batch.ranges = batch.ranges.iter().flat_map(pages).collect();
            outcome.absorb(run(memory, &self.capabilities, &batch));
        }
        outcome
    }
}

/// Whether the batch may be cut where [`Batch::split`] does: not inside a larger page.
fn can_be_cut(memory: &GuestMemory, batch: &Batch) -> bool {
    let page_bytes = |range: &plan::HostRange| {
        let region = memory.regions().get(range.region);
        region.map_or(0, |region| region.page_size_bytes)
    };
    batch.ranges.iter().map(page_bytes).max() <= Some(plan::CUT_BYTES)
}

/// Runs one batch in this thread.
fn run(memory: &GuestMemory, capabilities: &Capabilities, batch: &Batch) -> Outcome {
    step();
    let start = std::time::Instant::now();
    // Should a call ever panic, its ranges count as not freed (I4).
    let calls = catch_unwind(|| primitive::discard(memory, capabilities, batch));
    let calls = calls.unwrap_or_else(|_| primitive::Calls {
        failed: batch.ranges.clone(),
        calls: 0,
    });
    let failed = calls
        .failed
        .iter()
        .filter_map(|range| range.pages(memory, batch.primitive));
    Outcome {
        failed: failed.collect(),
        calls: calls.calls,
        ranges: batch.ranges.len() as u64,
        nanoseconds: u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
    }
}
