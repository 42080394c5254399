//! When pages of the balloon are discarded: at once, or later and many at a time.
//!
//! Invariants: I1 (a page that is taken leaves the window first, or the flush that has it is waited for),
//! I2 (drained when nothing waits and no flush is under way), I4 (what waits is pending).

use super::{Account, Balloon, Piece, carry_out, in_regions};
use crate::discard::window::{Flight, Load};
use crate::discard::{Discarder, WriteBehind};
use crate::memory::{GuestMemory, PfnRange};
use crate::metrics::Books;
use crate::pages::frames::Frames;
use crate::sync::channel::{Receiver, Sender, bounded};
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
        if self.window.flights().is_empty() {
            self.window.deadline()
        } else {
            None
        }
    }

    /// Flushes the window if it is due, or if nothing more is to be expected (`settled`): workers do it
    /// part by part while the guest goes on, and call `landed` after each, upon which this is to be called
    /// again. Waits only for a guest that outruns the flush.
    pub(crate) fn flush_if_due(
        &mut self,
        settled: bool,
        books: &Arc<Books>,
        landed: impl Fn() + Clone + Send + 'static,
    ) {
        self.window.land();
        while self.window.flushes(settled) {
            while self.launch_part(settled, books, &landed) {}
            let earliest = self
                .window
                .flights()
                .first()
                .map(|flight| flight.done.clone());
            let (true, Some(done)) = (self.window.is_overfull(), earliest) else {
                return;
            };
            self.wait_for(&done);
        }
    }

    /// Has a worker discard a part of what waits; false if none is left, or enough are at it.
    fn launch_part(
        &mut self,
        settled: bool,
        books: &Arc<Books>,
        landed: &(impl Fn() + Clone + Send + 'static),
    ) -> bool {
        let Some(pool) = self.discarder.pool().map(Arc::clone) else {
            self.drain(books);
            return false;
        };
        // Where processors are scarce the worker that serves the guest does it between kicks.
        let most = if settled || pool.has_spare() {
            pool.workers() as usize
        } else {
            1
        };
        let under_way = self.window.flights().len();
        if under_way >= most {
            return false;
        }
        let (memory, discarder) = (&self.memory, &self.discarder);
        let busy: Vec<usize> = self.window.flights().iter().map(Flight::region).collect();
        let may = |region| {
            // Punching holes holds the inode's lock exclusively: one worker a file.
            discarder.scales(memory, region)
                || !busy
                    .iter()
                    .any(|other| memory.file_id(*other) == memory.file_id(region))
        };
        // Each node's memory is discarded by its own workers, side by side.
        let node = |region: usize| memory.regions().get(region).and_then(|region| region.node);
        let other_node = |region| may(region) && !busy.iter().any(|at| node(*at) == node(region));
        let window = &mut self.window;
        let load = window
            .slice(memory, &mut self.ownership, other_node)
            .or_else(|| window.slice(memory, &mut self.ownership, may));
        let Some(load) = load else {
            return false;
        };
        let (end, done) = bounded(0);
        let (memory, books) = (Arc::clone(memory), Arc::clone(books));
        let (discarder, pieces, landed) = (discarder.alone(), load.bridged.clone(), landed.clone());
        let node = pieces.first().and_then(|piece| self.node(piece));
        let part = Box::new(move || {
            load.carry_out(&memory, &discarder, &books);
            // Whoever waits may unmap the memory as soon as the channel closes.
            drop(memory);
            drop::<Sender<()>>(end);
            landed();
        });
        self.window.launch(Flight { pieces, done });
        if under_way == 0 && !pool.has_spare() {
            pool.spawn_here(node, part);
        } else {
            pool.spawn(node, part);
        }
        true
    }

    /// Returns when nothing is pending: every acknowledged page is discarded.
    pub(crate) fn drain(&mut self, books: &Books) {
        self.wait_for_flights();
        let load = self.window.unload(&self.memory, &mut self.ownership);
        load.carry_out(&self.memory, &self.discarder, books);
    }

    pub(super) fn wait_for_flights(&mut self) {
        while let Some(flight) = self.window.flights().first() {
            let done = flight.done.clone();
            self.wait_for(&done);
        }
    }

    fn wait_for(&mut self, done: &Receiver<()>) {
        if let Some(pool) = self.discarder.pool() {
            pool.wait_helping(done);
        }
        self.window.land();
    }

    /// Waits for parts of a flush that have pages of `ranges`.
    pub(super) fn land_before(&mut self, ranges: &[PfnRange]) {
        let held = |range: &PfnRange| {
            let mut held = false;
            in_regions(&self.memory, *range, |index, region, range| {
                // Frames are discarded as a whole.
                let range = Frames::of(region).around(range);
                held |= self.window.is_in_flight(index, range);
            });
            held
        };
        if !self.window.flights().is_empty() && ranges.iter().any(held) {
            self.wait_for_flights();
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
