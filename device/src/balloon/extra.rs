//! Memory beyond what the guest booted with (requirements J6, R2, R8): regions whose pages begin in the
//! balloon, so that a guest that takes them has a balloon of less than nothing.
//!
//! With their pages in the ownership bitmap from the start, such a region needs no books of its own: the
//! balloon's size is what is in the bitmap less what began there.
//!
//! Invariant: the size never falls below zero by more than the grant, which is the host's to set (I5).

use super::{Account, Balloon, Piece, bytes, in_regions};
use crate::memory::{GuestMemory, PfnRange};
use crate::metrics::Books;
use crate::pages::frames::Frames;
use crate::pages::ownership::Ownership;
use std::sync::Arc;

/// What is taken back at a time: 128 MiB of small pages, and not many more runs than a turn has.
const PART_PAGES: u64 = 1 << 15;

/// The pages of the regions that begin in the balloon.
pub(super) fn extra_pages(memory: &GuestMemory) -> u64 {
    let extra = memory.regions().iter().filter(|region| region.extra);
    extra.map(|region| region.pfns().pages()).sum()
}

/// The bitmaps of a balloon that was never used.
pub(super) fn untouched(memory: &GuestMemory) -> Ownership {
    let mut ownership = Ownership::new(memory);
    for (index, region) in memory.regions().iter().enumerate() {
        if let Some(bitmap) = ownership.region(index).filter(|_| region.extra) {
            bitmap.insert(region.pfns(), |_| ());
        }
    }
    ownership
}

/// Puts those pages of `memory`'s extra regions into the balloon that `before` did not have at all.
pub(super) fn insert_new(memory: &GuestMemory, before: &GuestMemory, ownership: &mut Ownership) {
    for (index, region) in memory.regions().iter().enumerate() {
        let Some(bitmap) = ownership.region(index).filter(|_| region.extra) else {
            continue;
        };
        let mut at = region.pfns().start;
        in_regions(before, region.pfns(), |_, _, known| {
            bitmap.insert(
                PfnRange {
                    start: at,
                    end: known.start,
                },
                |_| (),
            );
            at = known.end;
        });
        let end = region.pfns().end;
        bitmap.insert(PfnRange { start: at, end }, |_| ());
    }
}

impl Balloon {
    /// How much more memory the guest has than it booted with.
    pub(crate) fn extra_bytes(&self) -> u64 {
        bytes(self.extra_pages.saturating_sub(self.ballooned_pages))
    }

    /// Lets the guest have up to so much more than it booted with. What it has already it keeps.
    pub(crate) fn set_extra_grant(&mut self, bytes: u64) {
        self.extra_grant_bytes = bytes;
    }

    /// Discards what the guest has beyond what it booted with: nobody is left to give it back. How it is
    /// scattered is the guest's choice, so whole parts of the regions are discarded, not what it has in them.
    pub(super) fn take_back_extra(&mut self, books: &Books) {
        let memory = Arc::clone(&self.memory);
        for (index, region) in memory.regions().iter().enumerate() {
            if region.extra {
                let mut at = region.pfns().start;
                while at < region.pfns().end {
                    let range = Frames::of(region).around(PfnRange::new(at, PART_PAGES));
                    let range = range.intersection(region.pfns());
                    self.take_back(
                        Piece {
                            region: index,
                            range,
                        },
                        books,
                    );
                    at = range.end;
                }
            }
        }
    }

    /// Discards what the guest has of `part`, all of which is in the balloon then.
    fn take_back(&mut self, part: Piece, books: &Books) {
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.clear();
        let mut pages = 0;
        if let Some(bitmap) = self.ownership.region(part.region) {
            bitmap.insert(part.range, |range| {
                pages += range.pages();
                pieces.push(Piece { range, ..part });
            });
        }
        self.ballooned_pages += pages;
        books.enter(|entry| {
            let flow = &mut entry.node(self.node(&part)).balloon;
            super::bump(&mut flow.requested_bytes, bytes(pages));
            super::bump(&mut flow.pending_bytes, bytes(pages));
        });
        self.complete_frames(&mut pieces, books);
        self.discard(&pieces, &[part], Account::Balloon, books);
        self.pieces = pieces;
    }

    /// How many of `pages`, from the first on, may be taken out: those that are wholly in the balloon,
    /// named once, and do not bring the size below the grant. Pages that the guest did not boot with
    /// count as not in the balloon unless `extra`.
    pub(crate) fn takeable(&mut self, pages: &[PfnRange], extra: bool) -> usize {
        let room = self
            .ballooned_bytes()
            .saturating_add(self.extra_grant_bytes)
            .saturating_sub(self.extra_bytes());
        let mut taken = 0;
        let grantable = pages.iter().take_while(|page| {
            taken += page.bytes();
            taken <= room
        });
        let grantable = grantable.count();
        self.ballooned(pages.get(..grantable).unwrap_or_default(), extra)
    }

    /// How many of `pages`, from the first on, are wholly in the balloon and named once.
    pub(crate) fn ballooned(&mut self, pages: &[PfnRange], extra: bool) -> usize {
        let named_once = distinct(pages);
        let pages = pages.iter().take(named_once);
        let whole = |page: &&PfnRange| {
            let mut missing = false;
            let ownership = &mut self.ownership;
            let outside = in_regions(&self.memory, **page, |index, region, part| {
                let held = ownership
                    .region(index)
                    .map_or(0, |bitmap| bitmap.count(part));
                missing |= held != part.pages() || (region.extra && !extra);
            });
            outside == 0 && !missing
        };
        pages.take_while(whole).count()
    }

    /// Whether the whole of `page` is memory that can be ballooned.
    pub(crate) fn is_memory(&self, page: PfnRange) -> bool {
        let mut readonly = false;
        let outside = in_regions(&self.memory, page, |_, region, _| {
            readonly |= region.readonly
        });
        outside == 0 && !readonly
    }

    /// Whether all of `pages` are whole memory, named once, and none is in the balloon.
    pub(crate) fn are_the_guests(&mut self, pages: &[PfnRange]) -> bool {
        let mut ballooned = 0;
        for page in pages {
            let ownership = &mut self.ownership;
            in_regions(&self.memory, *page, |index, _, part| {
                ballooned += ownership
                    .region(index)
                    .map_or(0, |bitmap| bitmap.count(part));
            });
        }
        ballooned == 0
            && distinct(pages) == pages.len()
            && pages.iter().all(|page| self.is_memory(*page))
    }

    /// Enters `pages` that the guest gave and that are no memory of its own.
    pub(crate) fn refuse_outside(&self, pages: u64, books: &Books) {
        books.enter(|entry| {
            let flow = &mut entry.device().balloon;
            super::bump(&mut flow.requested_bytes, bytes(pages));
            super::bump(&mut flow.skipped_out_of_range_bytes, bytes(pages));
        });
    }
}

/// How many of `pages`, which are of one size and aligned to it, come before the first that was named
/// already.
fn distinct(pages: &[PfnRange]) -> usize {
    let mut places: Vec<_> = pages.iter().map(|page| page.start).zip(0..).collect();
    places.sort_unstable();
    let again = places.iter().zip(places.iter().skip(1));
    let again = again.filter(|((page, _), (next, _))| page == next);
    again
        .map(|(_, (_, place))| *place)
        .min()
        .unwrap_or(pages.len())
}

#[cfg(test)]
#[path = "extra_tests.rs"]
mod tests;
