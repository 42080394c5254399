//! Pages that the guest offers and the balloon may refuse (requirements V1, V2): the guest is told which,
//! page by page, and keeps them.
//!
//! Refusing is for guests that were told of it; others use [`Balloon::give`], which takes whole ranges
//! and looks at no page by itself.
//!
//! Invariants: I1 (a refused page never enters the ownership bitmap, so nothing discards it), I4 (each
//! offered page is entered as pending or under the reason for which it was refused; the sum of the
//! refused is entered beside that).

use super::{Balloon, bump, bytes};
use crate::discard::plan::Piece;
use crate::memory::{Pfn, PfnRange, Region};
use crate::metrics::{Books, Flow};

/// Why a page is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    OutOfRange,
    Duplicate,
    Inhibited,
    Pinned,
    OverTarget,
}

impl Reason {
    fn counter(self, flow: &mut Flow) -> &mut u64 {
        match self {
            Self::OutOfRange => &mut flow.skipped_out_of_range_bytes,
            Self::Duplicate => &mut flow.skipped_duplicate_bytes,
            Self::Inhibited => &mut flow.skipped_inhibited_bytes,
            Self::Pinned => &mut flow.skipped_pinned_bytes,
            Self::OverTarget => &mut flow.skipped_over_target_bytes,
        }
    }
}

impl Balloon {
    /// The guest offers pages of `size` times 4 KiB that begin at `pages`, which are considered one by one
    /// in its own order; `refuse` gets the places of those that are refused, and why. A page is refused
    /// if the balloon holds `limit_pages` already, and where [`Self::give`] would not discard all of it.
    ///
    /// The others are in the balloon from now on, and pending until [`Self::settle`]. No other
    /// operation may come between.
    pub(crate) fn offer(
        &mut self,
        pages: &[Pfn],
        size: u64,
        limit_pages: u64,
        books: &Books,
        mut refuse: impl FnMut(usize, Reason),
    ) {
        let mut found = None;
        books.enter(|entry| {
            for (place, &page) in pages.iter().enumerate() {
                let one = PfnRange {
                    start: page,
                    end: Pfn(page.0.saturating_add(size)),
                };
                // Guests send runs: the next page is mostly in the region of the last one.
                found = self
                    .region_of(found, one)
                    .or_else(|| self.region_holding(one));
                let node = found
                    .and_then(|index| self.memory.regions().get(index))
                    .and_then(|region| region.node);
                let verdict = self.consider(found, one, limit_pages);
                // In full, also of a page that ends beyond all numbers.
                let (counters, length) = (entry.node(node), bytes(size));
                bump(&mut counters.balloon.requested_bytes, length);
                match verdict {
                    Ok(()) => bump(&mut counters.balloon.pending_bytes, length),
                    Err(reason) => {
                        bump(reason.counter(&mut counters.balloon), length);
                        bump(&mut counters.refused_bytes, length);
                        refuse(place, reason);
                    }
                }
            }
        });
    }

    /// Discards, or holds, all pages taken by [`Self::offer`] since the last call.
    pub(crate) fn settle(&mut self, books: &Books) {
        let mut pieces = std::mem::take(&mut self.taken);
        pieces.sort_unstable_by_key(|piece| (piece.region, piece.range.start));
        pieces.dedup_by(|next, last| {
            let touches = next.region == last.region && next.range.start == last.range.end;
            if touches {
                last.range.end = next.range.end;
            }
            touches
        });
        self.complete_frames(&mut pieces, books);
        self.release(&pieces, books);
        pieces.clear();
        self.taken = pieces;
    }

    /// Enters `pages` that came too late (V3): the host has reset the balloon, and the guest has not
    /// acknowledged that yet. They are the guest's, `refused` or not, and nothing is looked at.
    pub(crate) fn turn_away(&self, pages: u64, refused: bool, books: &Books) {
        books.enter(|entry| {
            let counters = entry.device();
            let size = bytes(pages);
            bump(&mut counters.balloon.requested_bytes, size);
            bump(&mut counters.balloon.skipped_late_bytes, size);
            bump(&mut counters.refused_bytes, if refused { size } else { 0 });
        });
    }

    /// The host gives all pages back to the guest, which has not asked for it (V3). From now on none
    /// of them is discarded.
    pub(crate) fn reset_by_host(&mut self, books: &Books) {
        books.enter(|entry| {
            for (index, region) in self.memory.regions().iter().enumerate() {
                let bitmap = self.ownership.region(index);
                let pages = bitmap.map_or(0, |bitmap| bitmap.count(region.pfns()));
                let counters = entry.node(region.node);
                bump(&mut counters.host_reset_bytes, bytes(pages));
            }
        });
        self.reset(books);
    }

    /// The region at `index`, if it holds all of `page`.
    fn region_of(&self, index: Option<usize>, page: PfnRange) -> Option<usize> {
        let holds = |region: &Region| page.pages() > 0 && region.pfns().intersection(page) == page;
        index.filter(|index| self.memory.regions().get(*index).is_some_and(holds))
    }

    /// The region that holds `page`.
    fn region_holding(&self, page: PfnRange) -> Option<usize> {
        let regions = self.memory.regions();
        let index = regions.partition_point(|region| region.pfns().end <= page.start);
        self.region_of(Some(index), page)
    }

    /// Takes `page`, or says why not.
    fn consider(
        &mut self,
        index: Option<usize>,
        page: PfnRange,
        limit_pages: u64,
    ) -> Result<(), Reason> {
        let index = index.ok_or(Reason::OutOfRange)?;
        let region = self.memory.regions().get(index).ok_or(Reason::OutOfRange)?;
        if region.readonly {
            return Err(Reason::OutOfRange);
        }
        let bitmap = self.ownership.region(index).ok_or(Reason::OutOfRange)?;
        if bitmap.count(page) != 0 {
            return Err(Reason::Duplicate);
        }
        if self.inhibited {
            return Err(Reason::Inhibited);
        }
        if region.pinned {
            return Err(Reason::Pinned);
        }
        if self.ballooned_pages >= limit_pages {
            return Err(Reason::OverTarget);
        }
        bitmap.insert(page, |_| ());
        self.ballooned_pages += page.pages();
        match self.taken.last_mut() {
            Some(last) if last.region == index && last.range.end == page.start => {
                last.range.end = page.end;
            }
            _ => self.taken.push(Piece {
                region: index,
                range: page,
            }),
        }
        Ok(())
    }
}
