//! When pages of the balloon are discarded: at once, or later and many at a time.
//!
//! Invariants: I1 (a page that is taken leaves the window first, or the flush that has it is waited for),
//! I2 (drained when nothing waits and no flush is under way), I4 (what waits is pending).

use super::{Account, Balloon, Piece, carry_out, in_regions, whole_frames_around};
use crate::discard::window::{Flight, Load};
use crate::discard::{Discarder, WriteBehind};
use crate::memory::{GuestMemory, PfnRange};
use crate::metrics::Books;
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
        landed: impl FnOnce() + Send + 'static,
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
        let (memory, books) = (Arc::clone(&self.memory), Arc::clone(books));
        let (discarder, pieces) = (self.discarder.alone(), load.bridged.clone());
        let node = pieces.first().and_then(|piece| self.node(piece));
        pool.spawn(
            node,
            Box::new(move || {
                load.carry_out(&memory, &discarder, &books);
                // Whoever waits may unmap the memory as soon as the channel closes.
                drop(memory);
                drop::<crossbeam_channel::Sender<()>>(end);
                landed();
            }),
        );
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
                let range = whole_frames_around(region, range);
                held |= self.window.flight_with(index, range).is_some();
            });
            held
        };
        if self.window.flight().is_some() && ranges.iter().any(held) {
            self.wait_for_flight();
        }
    }
}

impl Load {
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
