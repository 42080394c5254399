//! The balloon core: give, take, reset, and the books about them. It knows no wire format.
//!
//! Invariants: I1 (a page is discarded only while its bit in the ownership bitmap is set, under the
//! lock of the device that owns this core), I4 (each requested byte is entered exactly once).

mod extra;
mod refusal;
mod report;
mod write_behind;

pub(crate) use refusal::Reason;

use crate::discard::plan::Piece;
use crate::discard::restore::restore;
use crate::discard::window::Window;
use crate::discard::{DeflateOptions, Discarder};
use crate::memory::{BALLOON_PAGE_SHIFT, GuestMemory, GuestNode, NodeId, PfnRange, Region};
use crate::metrics::{Books, Counters, Entry, Flow};
use crate::pages::frames::Frames;
use crate::pages::ownership::Ownership;
use crate::service::lock::Waiting;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Pages to bytes.
fn bytes(pages: u64) -> u64 {
    pages << BALLOON_PAGE_SHIFT
}

/// Adds to a counter. Counters wrap instead of overflowing: the guest decides how fast they grow,
/// and balances hold modulo 2^64 all the same.
pub(crate) fn bump(counter: &mut u64, by: u64) {
    *counter = counter.wrapping_add(by);
}

/// Takes from a gauge.
fn lower(gauge: &mut u64, by: u64) {
    *gauge = gauge.wrapping_sub(by);
}

/// Whether a discard belongs to the balloon's books or to those of page reporting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Account {
    Balloon,
    Report,
}

impl Account {
    fn of(self, counters: &mut Counters) -> &mut Flow {
        match self {
            Self::Balloon => &mut counters.balloon,
            Self::Report => &mut counters.report,
        }
    }
}

/// A guest's balloon over one memory table.
#[derive(Debug)]
pub(crate) struct Balloon {
    memory: Arc<GuestMemory>,
    ownership: Ownership,
    ballooned_pages: u64,
    /// Those that were in it from the start.
    extra_pages: u64,
    extra_grant_bytes: u64,
    discarder: Discarder,
    inhibited: bool,
    /// Whether the driver takes a page out before it uses it again (S7). If not, each page of the balloon may
    /// be in use from its acknowledgement on, so that a huge frame is discarded if all of it comes at once.
    told: bool,
    window: Window,
    /// What is done for pages that the guest takes back.
    deflate: DeflateOptions,
    /// Whether somebody waits for the device to stand still.
    waiting: Arc<Waiting>,
    /// Kept between calls for its allocation only.
    pieces: Vec<Piece>,
    /// What was taken of an offer and is to be settled; else empty.
    taken: Vec<Piece>,
}

impl Balloon {
    /// An empty balloon.
    pub(crate) fn new(memory: Arc<GuestMemory>, discarder: Discarder) -> Self {
        let ownership = extra::untouched(&memory);
        let extra_pages = extra::extra_pages(&memory);
        Self {
            window: Window::new(&memory),
            memory,
            ownership,
            ballooned_pages: extra_pages,
            extra_pages,
            extra_grant_bytes: 0,
            discarder,
            inhibited: false,
            told: true,
            deflate: DeflateOptions::default(),
            waiting: Arc::default(),
            pieces: Vec::new(),
            taken: Vec::new(),
        }
    }

    /// Heeds whether somebody waits for the device to stand still.
    pub(crate) fn heed(&mut self, waiting: Arc<Waiting>) {
        self.waiting = waiting;
    }

    /// The table it works on.
    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// How many bytes are in the balloon, without those that began there.
    pub(crate) fn ballooned_bytes(&self) -> u64 {
        bytes(self.ballooned_pages.saturating_sub(self.extra_pages))
    }

    /// What is in the balloon of one node of the guest, without what began there, and the node's memory.
    pub(crate) fn ballooned_on(&mut self, node: GuestNode) -> (u64, u64) {
        let (mut pages, mut memory) = (0, 0);
        for (index, region) in self.memory.regions().iter().enumerate() {
            if region.guest_node != node {
                continue;
            }
            memory += region.len_bytes;
            let bitmap = self.ownership.region(index);
            let held = bitmap.map_or(0, |bitmap| bitmap.count(region.pfns()));
            let began = if region.extra {
                region.pfns().pages()
            } else {
                0
            };
            pages += held.saturating_sub(began);
        }
        (bytes(pages), memory)
    }

    /// What is in the balloon, run by run.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn ranges(&self) -> Vec<PfnRange> {
        let mut ranges = Vec::new();
        self.ownership.runs(|run| ranges.push(run));
        ranges
    }

    /// From now on nothing is discarded, or discarded again. What was acknowledged before is
    /// discarded first.
    pub(crate) fn set_inhibited(&mut self, inhibited: bool, books: &Books) {
        self.drain(books);
        self.inhibited = inhibited;
    }

    /// The guest puts `ranges` in: sorted and disjoint, otherwise as the guest sent them.
    /// `duplicate_pages` were dropped while they were sorted, and are entered here.
    ///
    /// When this returns, all of it is discarded, held, skipped for a reason, or waits in the window.
    pub(crate) fn give(&mut self, ranges: &[PfnRange], duplicate_pages: u64, books: &Books) {
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.clear();
        books.enter(|entry| {
            let flow = &mut entry.device().balloon;
            bump(&mut flow.requested_bytes, bytes(duplicate_pages));
            bump(&mut flow.skipped_duplicate_bytes, bytes(duplicate_pages));
            for &range in ranges {
                let (memory, ownership) = (&self.memory, &mut self.ownership);
                let outside = in_regions(memory, range, |index, region, range| {
                    let flow = &mut entry.node(region.node).balloon;
                    bump(&mut flow.requested_bytes, range.bytes());
                    if region.readonly {
                        bump(&mut flow.skipped_out_of_range_bytes, range.bytes());
                        return;
                    }
                    let Some(bitmap) = ownership.region(index) else {
                        return;
                    };
                    let mut fresh_pages = 0;
                    bitmap.insert(range, |run| {
                        fresh_pages += run.pages();
                        pieces.push(Piece {
                            region: index,
                            range: run,
                        });
                    });
                    bump(
                        &mut flow.skipped_duplicate_bytes,
                        range.bytes() - bytes(fresh_pages),
                    );
                    self.ballooned_pages += fresh_pages;
                });
                let flow = &mut entry.device().balloon;
                bump(&mut flow.requested_bytes, bytes(outside));
                bump(&mut flow.skipped_out_of_range_bytes, bytes(outside));
            }
            // Until the discard below is entered these bytes are pending: the books always balance.
            for piece in &pieces {
                let flow = &mut entry.node(self.node(piece)).balloon;
                bump(&mut flow.pending_bytes, piece.range.bytes());
            }
        });
        self.complete_frames(&mut pieces, books);
        self.release(&pieces, books);
        self.pieces = pieces;
    }

    /// The guest wants `ranges` back: sorted and disjoint. From now on they are never discarded.
    pub(crate) fn take(&mut self, ranges: &[PfnRange], duplicate_pages: u64, books: &Books) {
        self.land_before(ranges);
        let restores = self.deflate.is_any() && !self.inhibited;
        let told = self.told;
        let mut returned = std::mem::take(&mut self.pieces);
        returned.clear();
        books.enter(|entry| {
            bump(
                &mut entry.device().rejected_take_bytes,
                bytes(duplicate_pages),
            );
            let mut open: Option<OpenFrame> = None;
            for &range in ranges {
                let (memory, ownership) = (&self.memory, &mut self.ownership);
                let window = &mut self.window;
                let outside = in_regions(memory, range, |index, region, range| {
                    let Some(bitmap) = ownership.region(index) else {
                        return;
                    };
                    let mut taken_pages = 0;
                    let mut take = |run: PfnRange| {
                        taken_pages += run.pages();
                        if restores && !region.pinned {
                            returned.push(Piece {
                                region: index,
                                range: run,
                            });
                        }
                    };
                    if region.pages_per_frame() == 1 || !told {
                        bitmap.remove(range, take);
                        let flow = &mut entry.node(region.node).balloon;
                        window.remove(index, range, |run| {
                            lower(&mut flow.pending_bytes, run.bytes());
                            bump(&mut flow.withdrawn_bytes, run.bytes());
                        });
                    } else {
                        for frame in Frames::of(region).touching(range) {
                            let open = OpenFrame::switch(&mut open, frame, entry, || {
                                // A frame that waits to be discarded no longer does: it is held again.
                                let mut waiting_bytes = 0;
                                window.remove(index, frame, |run| waiting_bytes += run.bytes());
                                (region.node, bitmap.count(frame), waiting_bytes)
                            });
                            bitmap.remove(frame.intersection(range), |run| {
                                take(run);
                                open.after_pages -= run.pages();
                            });
                        }
                    }
                    self.ballooned_pages -= taken_pages;
                    let counters = entry.node(region.node);
                    bump(&mut counters.returned_bytes, bytes(taken_pages));
                    bump(
                        &mut counters.rejected_take_bytes,
                        range.bytes() - bytes(taken_pages),
                    );
                });
                bump(&mut entry.device().rejected_take_bytes, bytes(outside));
            }
            if let Some(open) = open {
                open.close(entry);
            }
        });
        let ownership = &mut self.ownership;
        restore(&self.memory, &returned, self.deflate, |region, range| {
            let bitmap = ownership.region(region);
            bitmap.map_or(0, |bitmap| bitmap.count(range))
        });
        self.pieces = returned;
    }

    /// Says whether the driver takes a page out before it uses it again.
    pub(crate) fn set_told(&mut self, told: bool, books: &Books) {
        if self.told != told {
            self.carry_held_over(books, |balloon| balloon.told = told);
        }
    }

    /// Changes what is done for pages that the guest takes back.
    pub(crate) fn set_deflate(&mut self, options: DeflateOptions) {
        self.deflate = options;
    }

    /// The balloon is empty again: the guest owns every page that it booted with, and no other (device
    /// reset). What waits is not discarded any more.
    pub(crate) fn reset(&mut self, books: &Books) {
        self.wait_for_flights();
        let load = self.window.unload(&self.memory, &mut self.ownership);
        books.enter(|entry| {
            for piece in &load.exact {
                let flow = &mut entry.node(self.node(piece)).balloon;
                lower(&mut flow.pending_bytes, piece.range.bytes());
                bump(&mut flow.withdrawn_bytes, piece.range.bytes());
            }
        });
        self.taken.clear();
        self.take_back_extra(books);
        books.emptied();
        let empty = extra::untouched(&self.memory);
        self.replace(Arc::clone(&self.memory), empty, books);
    }

    /// Calls `each` for every run of pages in the balloon, in ascending order.
    pub(crate) fn runs(&self, each: impl FnMut(PfnRange)) {
        self.ownership.runs(each);
    }

    /// Goes on with the balloon of a saved device, whose pages are all in this memory.
    pub(crate) fn restore(&mut self, ownership: Ownership, books: &Books) {
        self.replace(Arc::clone(&self.memory), ownership, books);
    }

    /// Goes on with another memory table. What is in the balloon stays in it where the new table
    /// still has the page, and is forgotten where it has not.
    pub(crate) fn set_memory(&mut self, memory: Arc<GuestMemory>, books: &Books) {
        self.drain(books);
        let mut ownership = Ownership::new(&memory);
        self.ownership.runs(|run| {
            in_regions(&memory, run, |index, region, range| {
                if let Some(bitmap) = ownership.region(index).filter(|_| !region.readonly) {
                    bitmap.insert(range, |_| ());
                }
            });
        });
        extra::insert_new(&memory, &self.memory, &mut ownership);
        self.replace(memory, ownership, books);
    }

    /// Swaps table and bitmap.
    fn replace(&mut self, memory: Arc<GuestMemory>, ownership: Ownership, books: &Books) {
        self.carry_held_over(books, |balloon| {
            balloon.ballooned_pages = 0;
            ownership.runs(|run| balloon.ballooned_pages += run.pages());
            balloon.extra_pages = extra::extra_pages(&memory);
            balloon.ownership = ownership;
            balloon.window = balloon.window.over(&memory);
            balloon.memory = memory;
        });
    }

    /// Makes a change upon which bytes that were held in incomplete frames may no longer be, or now be.
    fn carry_held_over(&mut self, books: &Books, change: impl FnOnce(&mut Self)) {
        let before = self.held();
        change(self);
        let mut held: BTreeMap<_, _> = self.held().into_iter().map(|(n, b)| (n, (0, b))).collect();
        for (node, bytes) in before {
            held.entry(node).or_default().0 = bytes;
        }
        books.enter(|entry| {
            for (node, (before, after)) in held {
                set_held(&mut entry.node(node).balloon, before, after);
            }
        });
    }

    /// The bytes that incomplete frames hold, on each node of the host.
    fn held(&mut self) -> BTreeMap<Option<NodeId>, u64> {
        let mut held = BTreeMap::new();
        for (index, region) in self.memory.regions().iter().enumerate() {
            if self.told
                && region.pages_per_frame() > 1
                && let Some(bitmap) = self.ownership.region(index)
            {
                let frames = Frames::of(region).touching(region.pfns());
                let of_region: u64 = frames
                    .map(|frame| held_of(frame, bitmap.count(frame)))
                    .sum();
                *held.entry(region.node).or_default() += of_region;
            }
        }
        held
    }

    /// The node that the books know a piece under.
    fn node(&self, piece: &Piece) -> Option<NodeId> {
        self.memory
            .regions()
            .get(piece.region)
            .and_then(|region| region.node)
    }

    /// In regions with huge frames, replaces fresh runs by the frames that are complete now and
    /// enters the rest as held. Runs in other regions stay as they are.
    fn complete_frames(&mut self, pieces: &mut Vec<Piece>, books: &Books) {
        let regions = self.memory.regions();
        let frame_of = |piece: &Piece| regions.get(piece.region).map_or(1, Region::pages_per_frame);
        if pieces.iter().all(|piece| frame_of(piece) == 1) {
            return;
        }
        let fresh = std::mem::take(pieces);
        // Fresh pages by frame; the runs of one frame follow each other.
        let mut touched: Vec<(Piece, u64)> = Vec::new();
        for piece in fresh {
            let Some(region) = regions.get(piece.region).filter(|_| frame_of(&piece) > 1) else {
                pieces.push(piece);
                continue;
            };
            for range in Frames::of(region).touching(piece.range) {
                let pages = range.intersection(piece.range).pages();
                let frame = Piece {
                    region: piece.region,
                    range,
                };
                match touched.last_mut() {
                    Some((last, fresh)) if *last == frame => *fresh += pages,
                    _ => touched.push((frame, pages)),
                }
            }
        }
        books.enter(|entry| {
            for (frame, fresh_pages) in touched {
                let flow = &mut entry.node(self.node(&frame)).balloon;
                let Some(bitmap) = self.ownership.region(frame.region) else {
                    continue;
                };
                let pages = frame.range.pages();
                if fresh_pages == pages || self.told && bitmap.count(frame.range) == pages {
                    let earlier = frame.range.bytes() - bytes(fresh_pages);
                    lower(&mut flow.held_bytes, earlier);
                    bump(&mut flow.pending_bytes, earlier);
                    pieces.push(frame);
                } else {
                    lower(&mut flow.pending_bytes, bytes(fresh_pages));
                    let left = if self.told {
                        &mut flow.held_bytes
                    } else {
                        &mut flow.skipped_partial_bytes
                    };
                    bump(left, bytes(fresh_pages));
                }
            }
        });
    }

    fn has_pinned(&self) -> bool {
        self.memory.regions().iter().any(|region| region.pinned)
    }

    /// Discards `bridged`, which is `pieces` and may be gaps of free pages between them; if some of `pieces` are not
    /// to be discarded, the others alone. Enters what became of `pieces`, all of which were pending.
    fn discard(&self, pieces: &[Piece], bridged: &[Piece], account: Account, books: &Books) {
        let regions = self.memory.regions();
        let pinned = |piece: &Piece| regions.get(piece.region).is_some_and(|r| r.pinned);
        let skipped = |piece: &Piece| self.inhibited || pinned(piece);
        if !self.inhibited && !self.has_pinned() {
            let (memory, discarder) = (&self.memory, &self.discarder);
            return carry_out(memory, discarder, pieces, bridged, account, books);
        }
        let free: Vec<_> = pieces
            .iter()
            .filter(|piece| !skipped(piece))
            .copied()
            .collect();
        let (memory, discarder) = (&self.memory, &self.discarder);
        carry_out(memory, discarder, &free, &free, account, books);
        books.enter(|entry| {
            for piece in pieces.iter().filter(|piece| skipped(piece)) {
                let flow = account.of(entry.node(self.node(piece)));
                let size = piece.range.bytes();
                lower(&mut flow.pending_bytes, size);
                if self.inhibited {
                    bump(&mut flow.skipped_inhibited_bytes, size);
                } else {
                    bump(&mut flow.skipped_pinned_bytes, size);
                }
            }
        });
    }
}

/// Discards `bridged` and enters what became of `exact`, all of which were pending.
fn carry_out(
    memory: &Arc<GuestMemory>,
    discarder: &Discarder,
    exact: &[Piece],
    bridged: &[Piece],
    account: Account,
    books: &Books,
) {
    if exact.is_empty() {
        return;
    }
    let regions = memory.regions();
    let node = |index: usize| regions.get(index).and_then(|region| region.node);
    let outcome = discarder.discard(memory, bridged);
    books.enter(|entry| {
        for piece in exact {
            let flow = account.of(entry.node(node(piece.region)));
            lower(&mut flow.pending_bytes, piece.range.bytes());
            bump(&mut flow.discarded_bytes, piece.range.bytes());
        }
        let mut sorted = Vec::new();
        if !outcome.failed.is_empty() {
            // Many failures among many pieces: each is looked up.
            sorted.extend_from_slice(exact);
            sorted.sort_unstable_by_key(|piece| (piece.region, piece.range.start));
        }
        for failed in &outcome.failed {
            // Pages that were only bridged over were free before.
            let before = |piece: &Piece| {
                (piece.region, piece.range.end) <= (failed.region, failed.range.start)
            };
            let behind = sorted.iter().skip(sorted.partition_point(before));
            let bytes = behind
                .take_while(|piece| {
                    piece.region == failed.region && piece.range.start < failed.range.end
                })
                .map(|piece| piece.range.intersection(failed.range).bytes())
                .sum();
            let flow = account.of(entry.node(node(failed.region)));
            lower(&mut flow.discarded_bytes, bytes);
            bump(&mut flow.skipped_failed_bytes, bytes);
        }
        let device = entry.device();
        bump(&mut device.discard_calls, outcome.calls);
        bump(&mut device.discard_ranges, outcome.ranges);
        bump(&mut device.discard_ns, outcome.nanoseconds);
    });
}

/// Calls `each` for the part of `range` in every region it touches; returns how many of its pages
/// are in none.
pub(crate) fn in_regions(
    memory: &GuestMemory,
    range: PfnRange,
    mut each: impl FnMut(usize, &Region, PfnRange),
) -> u64 {
    let regions = memory.regions();
    let first = regions.partition_point(|region| region.pfns().end <= range.start);
    let mut outside = range.pages();
    for (index, region) in regions.iter().enumerate().skip(first) {
        let part = region.pfns().intersection(range);
        if part.pages() == 0 {
            break;
        }
        outside -= part.pages();
        each(index, region, part);
    }
    outside
}

/// What `pages` pages in the balloon hold of `frame`: nothing once it is complete.
fn held_of(frame: PfnRange, pages: u64) -> u64 {
    if pages == frame.pages() {
        0
    } else {
        bytes(pages)
    }
}

/// A huge frame that pages are being taken from. It is counted once, not once a page: a frame has up
/// to 4 Mi pages, and the guest decides how many ranges it names in it (I3).
struct OpenFrame {
    frame: PfnRange,
    node: Option<NodeId>,
    before_pages: u64,
    after_pages: u64,
    /// What of it waited to be discarded: all, or nothing.
    waiting_bytes: u64,
}

impl OpenFrame {
    /// Goes on with `frame`, which is looked at if it is another one: its node, its pages in the balloon and
    /// bytes that waited. The one before it is entered.
    fn switch<'a>(
        open: &'a mut Option<Self>,
        frame: PfnRange,
        entry: &mut Entry<'_>,
        look: impl FnOnce() -> (Option<NodeId>, u64, u64),
    ) -> &'a mut Self {
        if let Some(last) = open.take_if(|open| open.frame != frame) {
            last.close(entry);
        }
        open.get_or_insert_with(|| {
            let (node, pages, waiting_bytes) = look();
            Self {
                frame,
                node,
                before_pages: pages,
                after_pages: pages,
                waiting_bytes,
            }
        })
    }

    fn close(self, entry: &mut Entry<'_>) {
        let flow = &mut entry.node(self.node).balloon;
        lower(&mut flow.pending_bytes, self.waiting_bytes);
        bump(&mut flow.held_bytes, self.waiting_bytes);
        let before = self.waiting_bytes + held_of(self.frame, self.before_pages);
        let after = held_of(self.frame, self.after_pages);
        set_held(flow, before, after);
    }
}

/// Enters that held bytes changed from `before` to `after` without a discard.
fn set_held(flow: &mut Flow, before: u64, after: u64) {
    lower(&mut flow.held_bytes, before);
    bump(&mut flow.held_bytes, after);
    bump(&mut flow.reopened_bytes, after.saturating_sub(before));
    bump(&mut flow.withdrawn_bytes, before.saturating_sub(after));
}

#[cfg(test)]
#[path = "balloon_tests.rs"]
#[allow(unsafe_code, reason = "the tests map memory to balloon")]
mod tests;

#[cfg(test)]
#[path = "balloon_window_tests.rs"]
mod window_tests;
