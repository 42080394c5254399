//! The device's books (invariant I4): what the guest asked for and what became of it.
//!
//! A batch is entered as a whole under one lock, so that a reader at any instant sees books that
//! balance; the hot path takes that lock once a batch, not once a page.

use crate::accounting::Accountant;
use crate::memory::NodeId;
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::time::Instant;

/// Where the bytes of one kind of request went. All values only grow, but for `pending` and `held`.
///
/// The books balance when
/// `requested + reopened == discarded + pending + held + withdrawn + skipped()`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Bytes that the guest handed over (4 KiB for each PFN, whatever became of it).
    pub requested_bytes: u64,
    /// Bytes that the host really got: a system call that frees them succeeded.
    pub discarded_bytes: u64,
    /// Bytes acknowledged to the guest whose discarding is still to come (write-behind).
    pub pending_bytes: u64,
    /// Bytes in incomplete huge frames, which the host gets when the frame is complete.
    pub held_bytes: u64,
    /// Bytes of discarded huge frames that count as held again since a part was taken back.
    pub reopened_bytes: u64,
    /// Bytes taken back while they were pending or held: never discarded, rightly so.
    pub withdrawn_bytes: u64,
    /// Not discarded because the VMM inhibits it.
    pub skipped_inhibited_bytes: u64,
    /// Not discarded: outside guest memory, in a hole, or in a read-only region.
    pub skipped_out_of_range_bytes: u64,
    /// Not discarded: in the balloon already, or twice in one batch.
    pub skipped_duplicate_bytes: u64,
    /// Not discarded: the region is marked as pinned.
    pub skipped_pinned_bytes: u64,
    /// Not discarded: reported pages that cover only a part of a huge frame, or are poisoned.
    pub skipped_partial_bytes: u64,
    /// Not discarded: the system call failed.
    pub skipped_failed_bytes: u64,
    /// Not taken: the balloon would have grown beyond its target (only where pages can be refused).
    pub skipped_over_target_bytes: u64,
    /// Not taken: the guest sent them before it acknowledged a host reset.
    pub skipped_late_bytes: u64,
}

/// Counters wrap instead of overflowing: the guest decides how fast they grow.
fn wrapping_sum(values: &[u64]) -> u64 {
    values.iter().fold(0, |sum, value| sum.wrapping_add(*value))
}

impl Flow {
    /// The sum of all reasons for which bytes were not discarded.
    #[must_use]
    pub fn skipped_bytes(&self) -> u64 {
        wrapping_sum(&[
            self.skipped_inhibited_bytes,
            self.skipped_out_of_range_bytes,
            self.skipped_duplicate_bytes,
            self.skipped_pinned_bytes,
            self.skipped_partial_bytes,
            self.skipped_failed_bytes,
            self.skipped_over_target_bytes,
            self.skipped_late_bytes,
        ])
    }

    /// Whether every requested byte is accounted for exactly once (I4).
    #[must_use]
    pub fn balances(&self) -> bool {
        wrapping_sum(&[self.requested_bytes, self.reopened_bytes])
            == wrapping_sum(&[
                self.discarded_bytes,
                self.pending_bytes,
                self.held_bytes,
                self.withdrawn_bytes,
                self.skipped_bytes(),
            ])
    }
}

/// All counters of a device, or of one host node's share of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages put into the balloon (inflate queue).
    pub balloon: Flow,
    /// Pages reported as free (reporting queue); they stay the guest's.
    pub report: Flow,
    /// Bytes taken out of the balloon (deflate queue).
    pub returned_bytes: u64,
    /// Bytes the guest wanted back that were not in the balloon, not in its memory, or beyond its grant.
    pub rejected_take_bytes: u64,
    /// System calls made to discard.
    pub discard_calls: u64,
    /// Ranges handed to those calls.
    pub discard_ranges: u64,
    /// Time spent in those calls, summed over threads, in nanoseconds.
    pub discard_ns: u64,
    /// Chains completed on the inflate queue.
    pub inflate_chains: u64,
    /// Chains completed on the deflate queue.
    pub deflate_chains: u64,
    /// Chains completed on the reporting queue.
    pub report_chains: u64,
    /// Stats buffers read.
    pub stats_chains: u64,
    /// Chains completed on the free page hint queue.
    pub hint_chains: u64,
    /// Chains that were malformed or held content that makes no sense; completed all the same.
    pub chain_errors: u64,
    /// Queues that broke so badly that the device needs a reset.
    pub broken_rings: u64,
    /// Times that a driver began to speak the protocol: feature selections or START commands that were
    /// accepted (J10).
    pub handshakes: u64,
    /// The same, refused.
    pub handshakes_failed: u64,
    /// Writes to fields of the configuration space that are not the driver's.
    pub config_errors: u64,
    /// Of the bytes that the balloon's flow skipped, those that the guest was told are refused: the
    /// pages are its own. Not a term of the balance, as the reason's counter has them already.
    pub refused_bytes: u64,
    /// Bytes the guest wanted back before it acknowledged a host reset, which had returned them.
    pub late_take_bytes: u64,
    /// Host resets of the balloon that were asked for.
    pub host_resets: u64,
    /// Host resets that are over: acknowledged by the driver, or ended by its reset of the device.
    pub host_resets_acknowledged: u64,
    /// Bytes that were in the balloon at the moment of a host reset, and went back through it.
    pub host_reset_bytes: u64,
}

impl Counters {
    /// What an entry gave back to the host; and of what it took out of the balloon, what the host had:
    /// pages that were waiting or held never left the guest, and one page of a huge frame brings all of the
    /// frame back.
    fn moved_since(&self, before: &Self) -> (u64, u64) {
        let grown = |count: fn(&Self) -> u64| count(self).wrapping_sub(count(before));
        let reclaimed = grown(|counters| counters.balloon.discarded_bytes);
        let returned = grown(|counters| counters.returned_bytes);
        let reopened = grown(|counters| counters.balloon.reopened_bytes);
        let withdrawn = grown(|counters| counters.balloon.withdrawn_bytes);
        (reclaimed, (returned + reopened).saturating_sub(withdrawn))
    }
}

/// The books of one device: totals for each host node.
#[derive(Debug)]
pub(crate) struct Books {
    /// One entry a node, the last one for memory whose node is not known.
    nodes: Mutex<Vec<Counters>>,
    /// Who else wants to know what leaves and what goes back.
    accountant: RwLock<Option<Arc<dyn Accountant>>>,
}

impl Books {
    /// Empty books for `nodes` host nodes, and memory of unknown node.
    pub(crate) fn new(nodes: usize) -> Self {
        Self {
            nodes: Mutex::new(vec![Counters::default(); nodes + 1]),
            accountant: RwLock::new(None),
        }
    }

    /// From now on `accountant` is told what leaves and what goes back.
    pub(crate) fn set_accountant(&self, accountant: Option<Arc<dyn Accountant>>) {
        *self.accountant.write() = accountant;
    }

    /// The guest gets all of it back, without asking for it page by page.
    pub(crate) fn emptied(&self) {
        if let Some(accountant) = self.accountant.read().as_ref() {
            accountant.emptied();
        }
    }

    /// Enters one batch as a whole: `enter` gets the page of each node.
    pub(crate) fn enter(&self, enter: impl FnOnce(&mut Entry<'_>)) {
        let accountant = self.accountant.read();
        let Some(accountant) = accountant.as_ref() else {
            enter(&mut Entry {
                nodes: &mut self.nodes.lock(),
            });
            return;
        };
        let moved: Vec<(u64, u64)> = {
            let mut nodes = self.nodes.lock();
            let before = nodes.clone();
            enter(&mut Entry { nodes: &mut nodes });
            let pages = before.iter().zip(nodes.iter());
            let moved = pages.map(|(before, after)| after.moved_since(before));
            moved.collect()
        };
        let nodes = (0..).map(NodeId).map(Some).take(moved.len() - 1);
        for (node, (reclaimed, returning)) in nodes.chain([None]).zip(moved) {
            if reclaimed > 0 {
                accountant.reclaimed(node, reclaimed);
            }
            if returning > 0 {
                accountant.returning(node, returning);
            }
        }
    }

    /// The sum over all nodes, as of one instant.
    pub(crate) fn total(&self) -> Counters {
        let nodes = self.nodes.lock();
        nodes
            .iter()
            .fold(Counters::default(), |sum, node| sum.combine(*node))
    }

    /// One node's share; `None` asks for memory of unknown node.
    pub(crate) fn node(&self, node: Option<NodeId>) -> Option<Counters> {
        let nodes = self.nodes.lock();
        let unknown = nodes.len() - 1;
        match node {
            None => nodes.get(unknown).copied(),
            Some(id) => nodes
                .get(id.0 as usize)
                .filter(|_| (id.0 as usize) < unknown)
                .copied(),
        }
    }
}

/// Access to the books while a batch is entered.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    nodes: &'a mut Vec<Counters>,
}

impl Entry<'_> {
    /// The page of `node`; unknown nodes share the last page.
    pub(crate) fn node(&mut self, node: Option<NodeId>) -> &mut Counters {
        let unknown = self.nodes.len() - 1;
        let index = node.map_or(unknown, |id| (id.0 as usize).min(unknown));
        &mut self.nodes[index]
    }

    /// The page for what belongs to no node: chains, errors.
    pub(crate) fn device(&mut self) -> &mut Counters {
        self.node(None)
    }
}

/// Addition that wraps, see [`wrapping_sum`].
trait Combine {
    fn combine(self, other: Self) -> Self;
}

impl Combine for u64 {
    fn combine(self, other: Self) -> Self {
        self.wrapping_add(other)
    }
}

/// Combines field by field; naming each field here keeps a new counter from being forgotten.
macro_rules! impl_combine {
    ($ty:ident { $($field:ident),* $(,)? }) => {
        impl Combine for $ty {
            fn combine(self, other: Self) -> Self {
                Self { $($field: self.$field.combine(other.$field)),* }
            }
        }

        impl std::ops::Add for $ty {
            type Output = Self;

            fn add(self, other: Self) -> Self {
                self.combine(other)
            }
        }
    };
}

impl_combine!(Flow {
    requested_bytes,
    discarded_bytes,
    pending_bytes,
    held_bytes,
    reopened_bytes,
    withdrawn_bytes,
    skipped_inhibited_bytes,
    skipped_out_of_range_bytes,
    skipped_duplicate_bytes,
    skipped_pinned_bytes,
    skipped_partial_bytes,
    skipped_failed_bytes,
    skipped_over_target_bytes,
    skipped_late_bytes,
});

impl_combine!(Counters {
    balloon,
    report,
    returned_bytes,
    rejected_take_bytes,
    discard_calls,
    discard_ranges,
    discard_ns,
    inflate_chains,
    deflate_chains,
    report_chains,
    stats_chains,
    hint_chains,
    chain_errors,
    broken_rings,
    handshakes,
    handshakes_failed,
    config_errors,
    refused_bytes,
    late_take_bytes,
    host_resets,
    host_resets_acknowledged,
    host_reset_bytes,
});

/// The number of statistics that the standard names (tags 0 to 15).
pub const STATS_TAGS: usize = 16;

/// What a guest last said of its memory. Fields that it did not send are `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestStats {
    /// Values by tag: 0 SWAP_IN to 15 DIRECT_RECLAIM (requirement S8).
    pub values: [Option<u64>; STATS_TAGS],
    /// How often the guest has answered since the device was made; it goes on over resets.
    pub sequence: u64,
    /// When this answer came; `None` if none came yet.
    pub received: Option<Instant>,
}
