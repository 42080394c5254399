//! When pages of the balloon are discarded: at once, or later and many at a time.
//!
//! Invariants: I1 (a page that is taken leaves the window first, or the flush that has it is waited for),
//! I2 (drained when nothing waits and no flush is under way), I4 (what waits is pending).

use super::{Account, Balloon, Piece, carry_out, in_regions};
use crate::discard::window::{Flight, Load};
use crate::discard::{Discarder, WriteBehind};
use crate::memory::{GuestMemory, NodeId, PfnRange};
use crate::metrics::Books;
use crate::pages::frames::Frames;
use crossbeam_channel::Sender;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

impl Balloon {
    /// Discards `pieces`, which are in the balloon and pending, or lets them wait.
    pub(super) fn release(&mut self, pieces: &[Piece], books: &Books) {
        if self.window.is_open() && !self.inhibited && !self.has_pinned() {
            self.window.add(pieces);
        } else {
            self.discard(pieces, Account::Balloon, books);
        }
    }

    /// Changes when acknowledged pages are discarded. What waits is discarded first.
    pub(crate) fn set_write_behind(&mut self, setting: WriteBehind, books: &Books) {
        self.drain(books);
        self.window.set(setting);
    }

    /// When pages that were acknowledged are due to be discarded; `None` while a flush is under way,
    /// whose end is what to wait for.
    pub(crate) fn flush_deadline(&mut self) -> Option<Instant> {
        self.window.land();
        if self.window.flight().is_some() {
            None
        } else {
            self.window.deadline()
        }
    }

    /// Flushes the window if it is due, or if nothing more is to be expected (`settled`): a worker does
    /// it while the guest goes on, and calls `landed` when it is done. Waits only for an earlier flush
    /// that the guest outran.
    pub(crate) fn flush_if_due(
        &mut self,
        settled: bool,
        books: &Arc<Books>,
        landed: impl FnOnce() + Send + Sync + 'static,
    ) {
        self.window.land();
        if self.window.is_empty() || !(settled || self.window.is_due()) {
            return;
        }
        if self.window.flight().is_some() {
            if !self.window.is_overfull() {
                return;
            }
            self.wait_for_flight();
        }
        let load = self.window.unload(&self.memory, &mut self.ownership);
        let Some(pool) = self.discarder.pool() else {
            load.carry_out(&self.memory, &self.discarder, books);
            return;
        };
        let (end, done) = crossbeam_channel::bounded(0);
        let pieces = load.bridged.clone();
        let landing = Arc::new(Landing {
            end: Some(end),
            landed: Some(landed),
        });
        for (node, load) in load.by_node(&self.memory) {
            let (memory, books) = (Arc::clone(&self.memory), Arc::clone(books));
            let (discarder, landing) = (self.discarder.alone(), Arc::clone(&landing));
            pool.spawn(
                node,
                Box::new(move || {
                    load.carry_out(&memory, &discarder, &books);
                    // Whoever waits may unmap the memory as soon as the last part lands.
                    drop(memory);
                    drop(landing);
                }),
            );
        }
        self.window.set_flight(Some(Flight { pieces, done }));
    }

    /// Returns when nothing is pending: every acknowledged page is discarded.
    pub(crate) fn drain(&mut self, books: &Books) {
        self.wait_for_flight();
        let load = self.window.unload(&self.memory, &mut self.ownership);
        load.carry_out(&self.memory, &self.discarder, books);
    }

    pub(super) fn wait_for_flight(&mut self) {
        if let (Some(flight), Some(pool)) = (self.window.flight(), self.discarder.pool()) {
            pool.wait_helping(&flight.done);
        }
        self.window.set_flight(None);
    }

    /// Waits for a flush that has pages of `ranges`.
    pub(super) fn land_before(&mut self, ranges: &[PfnRange]) {
        let held = |range: &PfnRange| {
            let mut held = false;
            in_regions(&self.memory, *range, |index, region, range| {
                // Frames are discarded as a whole.
                let range = Frames::of(region).around(range);
                held |= self.window.flight_with(index, range).is_some();
            });
            held
        };
        if self.window.flight().is_some() && ranges.iter().any(held) {
            self.wait_for_flight();
        }
    }
}

/// What happens when the last part of a flush is done.
struct Landing<F: FnOnce()> {
    end: Option<Sender<()>>,
    landed: Option<F>,
}

impl<F: FnOnce()> Drop for Landing<F> {
    fn drop(&mut self) {
        // The channel closes first: whoever is called may look at it.
        drop(self.end.take());
        if let Some(landed) = self.landed.take() {
            landed();
        }
    }
}

impl Load {
    /// A load for each host node that has pages of it, so that each is discarded by its own workers.
    fn by_node(self, memory: &GuestMemory) -> BTreeMap<Option<NodeId>, Self> {
        let regions = memory.regions();
        let node = |piece: &Piece| regions.get(piece.region).and_then(|region| region.node);
        let mut loads: BTreeMap<_, Self> = BTreeMap::new();
        for piece in self.exact {
            loads.entry(node(&piece)).or_default().exact.push(piece);
        }
        for piece in self.bridged {
            loads.entry(node(&piece)).or_default().bridged.push(piece);
        }
        loads
    }

    /// Discards what was in the window.
    fn carry_out(&self, memory: &Arc<GuestMemory>, discarder: &Discarder, books: &Books) {
        carry_out(
            memory,
            discarder,
            &self.exact,
            &self.bridged,
            Account::Balloon,
            books,
        );
    }
}
