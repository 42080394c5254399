//! When pages of the balloon are discarded: at once, or later and many at a time.
//!
//! Invariants: I1 (a page that is taken leaves the window first, or the flush that has it is waited for),
//! I2 (drained when nothing waits and no flush is under way), I4 (what waits is pending).

use super::{Account, Balloon, Piece, Region, bump, bytes, carry_out, in_regions};
use crate::discard::window::{Flight, Load};
use crate::discard::{Discarder, WriteBehind};
use crate::memory::{GuestMemory, Pfn, PfnRange};
use crate::metrics::Books;
use crate::pages::frames::Frames;
use crate::pages::ranges::{coalesce_pages, coalesce_ranges};
use crate::sync::channel::{Receiver, Sender, bounded};
use std::sync::Arc;
use std::time::Instant;

impl Balloon {
    /// As [`Self::give`], of single pages in the order of the guest; `ranges` is empty and lent.
    pub(crate) fn give_pages(
        &mut self,
        pages: &mut [Pfn],
        ranges: &mut Vec<PfnRange>,
        books: &Books,
    ) {
        let regions = self.memory.regions();
        let plain = |region: &Region| !region.pinned && region.pages_per_frame() == 1;
        if self.window.is_open() && !self.inhibited && regions.iter().all(plain) {
            self.let_wait(pages, ranges, books);
        } else {
            let duplicate_pages = coalesce_pages(pages, ranges);
            self.give(ranges, duplicate_pages, books);
        }
    }

    /// Lets pages wait. Bitmaps put them in order, so that they need not be sorted before; those that can
    /// never be in the balloon are, into `nowhere`.
    fn let_wait(&mut self, pages: &[Pfn], nowhere: &mut Vec<PfnRange>, books: &Books) {
        let regions = self.memory.regions();
        books.enter(|entry| {
            let mut rest = pages;
            while let Some(first) = rest.first() {
                let index = regions.partition_point(|region| region.pfns().end <= *first);
                let region = regions.get(index).filter(|region| !region.readonly);
                let span = region.map_or(PfnRange::new(*first, 0), Region::pfns);
                let inside = |page: &&Pfn| span.start <= **page && **page < span.end;
                let (here, after) = rest.split_at(rest.iter().take_while(inside).count());
                let (Some(region), Some(bitmap), false) =
                    (region, self.ownership.region(index), here.is_empty())
                else {
                    nowhere.push(PfnRange::new(*first, 1));
                    rest = rest.get(1..).unwrap_or_default();
                    continue;
                };
                rest = after;
                let fresh = here.iter().copied();
                let fresh = fresh.filter(|page| bitmap.insert_page(*page));
                let added = self.window.add_pages(index, fresh);
                self.ballooned_pages += added;
                let flow = &mut entry.node(region.node).balloon;
                let listed = here.len() as u64;
                bump(&mut flow.requested_bytes, bytes(listed));
                bump(&mut flow.pending_bytes, bytes(added));
                bump(&mut flow.skipped_duplicate_bytes, bytes(listed - added));
            }
            let listed = nowhere.len() as u64;
            let duplicate = coalesce_ranges(nowhere);
            let flow = &mut entry.device().balloon;
            bump(&mut flow.requested_bytes, bytes(listed));
            bump(&mut flow.skipped_duplicate_bytes, bytes(duplicate));
            bump(
                &mut flow.skipped_out_of_range_bytes,
                bytes(listed - duplicate),
            );
        });
    }

    /// Discards `pieces`, which are in the balloon and pending, or lets them wait.
    pub(super) fn release(&mut self, pieces: &[Piece], books: &Books) {
        if self.window.is_open() && !self.inhibited && !self.has_pinned() {
            self.window.add(pieces);
        } else {
            self.discard(pieces, pieces, Account::Balloon, books);
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
    ///
    /// `busy` tells that the caller is going to do it by [`Self::flush_a_morsel`], while it waits for more.
    pub(crate) fn flush_if_due(
        &mut self,
        settled: bool,
        busy: bool,
        books: &Arc<Books>,
        landed: impl Fn() + Clone + Send + 'static,
    ) {
        self.window.land();
        let settled = settled.then_some(self.ballooned_pages);
        while self.window.flushes(settled) {
            if busy && !self.has_spare() && !self.window.is_overfull() {
                return;
            }
            // The first part is the caller's, if others are not to be woken.
            let mut own = true;
            while self.launch_part(own, books, &landed) {
                own = false;
            }
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

    fn has_spare(&self) -> bool {
        let pool = self.discarder.pool();
        pool.is_some_and(|pool| pool.has_spare())
    }

    /// Discards a little of what is due, in some 10 us; false if nothing is.
    pub(crate) fn flush_a_morsel(&mut self, books: &Books) -> bool {
        if !self.window.flushes(None) {
            return false;
        }
        let (memory, discarder) = (&self.memory, &self.discarder);
        let scales = |region| discarder.scales(memory, region);
        let load = self.window.morsel(memory, &mut self.ownership, scales);
        load.is_some_and(|load| {
            load.carry_out(memory, &discarder.alone(), books);
            true
        })
    }

    /// Has a worker discard a part of what waits, the calling one if `own` and nobody else needs it; false
    /// if none is left, or enough are at it.
    fn launch_part(
        &mut self,
        own: bool,
        books: &Arc<Books>,
        landed: &(impl Fn() + Clone + Send + 'static),
    ) -> bool {
        let Some(pool) = self.discarder.pool().map(Arc::clone) else {
            self.drain(books);
            return false;
        };
        // Where processors are scarce the worker that serves the guest does it between kicks.
        let hurries = self.window.hurries();
        let most = if hurries || pool.has_spare() {
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
        if own && (hurries || !pool.has_spare()) {
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
