//! The model: simple enough to be right.

use super::hints::Rounds;
use aerostat_tests::vmm::allocator::mix;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::{Guest, PAGE_BYTES, Result};
use std::collections::{BTreeMap, BTreeSet};

const FRAME_PAGES: u64 = 512;

/// The books that the model keeps, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) requested: u64,
    pub(super) discarded: u64,
    pub(super) held: u64,
    pub(super) inhibited: u64,
    pub(super) outside: u64,
    pub(super) duplicate: u64,
    pub(super) pinned: u64,
    pub(super) partial: u64,
    pub(super) over_target: u64,
    pub(super) late: u64,
    pub(super) withdrawn: u64,
    pub(super) reopened: u64,
    pub(super) pending: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Books {
    pub(super) balloon: Flow,
    pub(super) report: Flow,
    pub(super) returned: u64,
    pub(super) rejected: u64,
    pub(super) refused: u64,
    pub(super) late_takes: u64,
    pub(super) host_resets: u64,
    pub(super) acknowledged: u64,
    pub(super) reset_pages: u64,
}

#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) regions: Vec<RegionSpec>,
    pub(super) ballooned: BTreeSet<u64>,
    /// The seed of each page's contents; pages that are not listed hold zeros.
    pub(super) contents: BTreeMap<u64, u64>,
    /// Pages that came back to the guest with either what they held or zeros.
    pub(super) unknown: BTreeSet<u64>,
    pub(super) inhibits: u32,
    /// Write-behind is on, until something flushes it.
    pub(super) waits: bool,
    /// Pages of the balloon that are not discarded yet.
    pub(super) waiting: BTreeSet<u64>,
    /// How many pages the balloon had when it was last flushed since no more was to be expected.
    pub(super) hurried: usize,
    /// The device may refuse pages.
    pub(super) refuses: bool,
    pub(super) target: u64,
    /// A host reset was not acknowledged.
    pub(super) late: bool,
    pub(super) rounds: Rounds,
    pub(super) books: Books,
}

impl Model {
    pub(super) fn region(&self, pfn: u64) -> Option<&RegionSpec> {
        let gpa = pfn * PAGE_BYTES;
        let mut regions = self.regions.iter();
        regions.find(|region| (region.gpa..region.gpa + region.len_bytes).contains(&gpa))
    }

    pub(super) fn memory_pages(&self) -> u64 {
        let regions = self.regions.iter();
        regions.map(|region| region.len_bytes / PAGE_BYTES).sum()
    }

    pub(super) fn has_frames(region: &RegionSpec) -> bool {
        region.page_size_bytes > PAGE_BYTES
    }

    /// What becomes of pages of the balloon: they wait, or are discarded now.
    pub(super) fn release(&mut self, pages: &[u64]) {
        if self.waits && self.inhibits == 0 {
            self.waiting.extend(pages);
            self.flush_if_settled();
        } else {
            self.discard(pages, |books| &mut books.balloon);
        }
    }

    /// Nothing more is to be expected of a guest that has reached its target with more than before.
    pub(super) fn flush_if_settled(&mut self) {
        let pages = self.ballooned.len();
        if pages as u64 >= self.target && pages > self.hurried && !self.waiting.is_empty() {
            self.hurried = pages;
            self.flush();
        }
    }

    pub(super) fn flush(&mut self) {
        for pfn in std::mem::take(&mut self.waiting) {
            self.books.balloon.discarded += 1;
            self.contents.remove(&pfn);
        }
    }

    /// The balloon is empty; what waited is left alone.
    pub(super) fn clear(&mut self) {
        for pfn in std::mem::take(&mut self.ballooned) {
            self.back_to_guest(pfn);
        }
        self.waiting.clear();
        self.hurried = 0;
    }

    /// What the guest finds in a page of the balloon that it has again. A flush may discard pages once
    /// more that were in the balloon and left alone, to bridge a gap.
    pub(super) fn back_to_guest(&mut self, pfn: u64) {
        let sure = !self.waits || self.waiting.contains(&pfn);
        if !sure && self.contents.remove(&pfn).is_some() {
            self.unknown.insert(pfn);
        }
    }

    /// What becomes of pages that are discarded, on the account of `flow`.
    pub(super) fn discard(&mut self, pages: &[u64], flow: fn(&mut Books) -> &mut Flow) {
        for pfn in pages {
            let pinned = self.region(*pfn).is_some_and(|region| region.pinned);
            let flow = flow(&mut self.books);
            if self.inhibits > 0 {
                flow.inhibited += 1;
            } else if pinned {
                flow.pinned += 1;
            } else {
                flow.discarded += 1;
                self.contents.remove(pfn);
                self.unknown.remove(pfn);
            }
        }
    }

    pub(super) fn frame(pfn: u64) -> std::ops::Range<u64> {
        let start = pfn / FRAME_PAGES * FRAME_PAGES;
        start..start + FRAME_PAGES
    }

    /// The guest offers pages, one by one; returns those that are refused.
    pub(super) fn offer(&mut self, pfns: &[u64]) -> Vec<u64> {
        let mut refused = Vec::new();
        let (mut taken, mut frames) = (Vec::new(), BTreeSet::new());
        for &pfn in pfns {
            self.books.balloon.requested += 1;
            let region = self.region(pfn).filter(|region| !region.readonly).copied();
            let over = self.ballooned.len() as u64 >= self.target;
            let flow = &mut self.books.balloon;
            let reason = match region {
                _ if self.late => Some(&mut flow.late),
                None => Some(&mut flow.outside),
                Some(_) if self.ballooned.contains(&pfn) => Some(&mut flow.duplicate),
                Some(_) if self.inhibits > 0 => Some(&mut flow.inhibited),
                Some(region) if region.pinned => Some(&mut flow.pinned),
                Some(_) if over => Some(&mut flow.over_target),
                Some(_) => None,
            };
            if let Some(reason) = reason {
                *reason += 1;
                self.books.refused += 1;
                refused.push(pfn);
                continue;
            }
            self.ballooned.insert(pfn);
            if region.as_ref().is_some_and(Self::has_frames) {
                frames.insert(Self::frame(pfn).start);
            } else {
                taken.push(pfn);
            }
        }
        self.complete(frames, &mut taken);
        self.release(&taken);
        refused
    }

    /// Adds the pages of frames that are all in the balloon.
    pub(super) fn complete(&self, frames: BTreeSet<u64>, pages: &mut Vec<u64>) {
        for start in frames {
            if Self::frame(start).all(|pfn| self.ballooned.contains(&pfn)) {
                pages.extend(Self::frame(start));
            }
        }
    }

    pub(super) fn give(&mut self, pfns: &[u64]) {
        if self.late {
            self.books.balloon.requested += pfns.len() as u64;
            self.books.balloon.late += pfns.len() as u64;
            return;
        }
        let unique: BTreeSet<u64> = pfns.iter().copied().collect();
        self.books.balloon.requested += pfns.len() as u64;
        self.books.balloon.duplicate += (pfns.len() - unique.len()) as u64;
        let (mut discarded, mut frames) = (Vec::new(), BTreeSet::new());
        for pfn in unique {
            let Some(region) = self.region(pfn).filter(|region| !region.readonly) else {
                self.books.balloon.outside += 1;
                continue;
            };
            let framed = Self::has_frames(region);
            if !self.ballooned.insert(pfn) {
                self.books.balloon.duplicate += 1;
            } else if framed {
                frames.insert(Self::frame(pfn).start);
            } else {
                discarded.push(pfn);
            }
        }
        self.complete(frames, &mut discarded);
        self.release(&discarded);
    }

    pub(super) fn take(&mut self, pfns: &[u64]) {
        if self.late {
            self.books.late_takes += pfns.len() as u64;
            return;
        }
        for pfn in pfns {
            if !self.ballooned.remove(pfn) {
                self.books.rejected += 1;
                continue;
            }
            self.books.returned += 1;
            self.back_to_guest(*pfn);
            let framed = self.region(*pfn).is_some_and(Self::has_frames);
            if framed {
                // Its frame is complete no more, and nothing of it waits.
                for page in Self::frame(*pfn) {
                    self.waiting.remove(&page);
                }
            } else {
                self.waiting.remove(pfn);
            }
        }
        self.flush_if_settled();
    }

    pub(super) fn report(&mut self, ranges: &[(u64, u64)]) {
        let all = ranges
            .iter()
            .flat_map(|(start, pages)| *start..start + pages);
        let total = all.clone().count() as u64;
        let unique: BTreeSet<u64> = all.collect();
        self.books.report.requested += total;
        self.books.report.duplicate += total - unique.len() as u64;
        let mut discarded = Vec::new();
        for pfn in &unique {
            match self.region(*pfn).filter(|region| !region.readonly) {
                None => self.books.report.outside += 1,
                Some(region) => {
                    let whole = || Self::frame(*pfn).all(|page| unique.contains(&page));
                    if Self::has_frames(region) && !whole() {
                        self.books.report.partial += 1;
                    } else {
                        discarded.push(*pfn);
                    }
                }
            }
        }
        self.discard(&discarded, |books| &mut books.report);
    }

    /// Pages in frames of which only a part is in the balloon.
    pub(super) fn held(&self) -> u64 {
        let framed = |pfn: &&u64| self.region(**pfn).is_some_and(Self::has_frames);
        let mut frames: BTreeMap<u64, u64> = BTreeMap::new();
        for pfn in self.ballooned.iter().filter(framed) {
            *frames.entry(Self::frame(*pfn).start).or_default() += 1;
        }
        frames.values().filter(|pages| **pages < FRAME_PAGES).sum()
    }

    /// Compares everything that can be seen from outside.
    pub(super) fn check(&mut self, guest: &Guest, what: &str) -> Result<()> {
        self.books.balloon.pending = self.waiting.len() as u64;
        let counters = if self.waiting.is_empty() {
            guest.settled_books()?
        } else {
            guest.books()?
        };
        let flow = |flow: &aerostat::aerostat_flow| Flow {
            requested: flow.requested_bytes / PAGE_BYTES,
            discarded: flow.discarded_bytes / PAGE_BYTES,
            held: flow.held_bytes / PAGE_BYTES,
            inhibited: flow.skipped_inhibited_bytes / PAGE_BYTES,
            outside: flow.skipped_out_of_range_bytes / PAGE_BYTES,
            duplicate: flow.skipped_duplicate_bytes / PAGE_BYTES,
            pinned: flow.skipped_pinned_bytes / PAGE_BYTES,
            partial: flow.skipped_partial_bytes / PAGE_BYTES,
            over_target: flow.skipped_over_target_bytes / PAGE_BYTES,
            late: flow.skipped_late_bytes / PAGE_BYTES,
            withdrawn: flow.withdrawn_bytes / PAGE_BYTES,
            reopened: flow.reopened_bytes / PAGE_BYTES,
            pending: flow.pending_bytes / PAGE_BYTES,
        };
        let seen = Books {
            balloon: flow(&counters.balloon),
            report: flow(&counters.report),
            returned: counters.returned_bytes / PAGE_BYTES,
            rejected: counters.rejected_take_bytes / PAGE_BYTES,
            refused: counters.refused_bytes / PAGE_BYTES,
            late_takes: counters.late_take_bytes / PAGE_BYTES,
            host_resets: counters.host_resets,
            acknowledged: counters.host_resets_acknowledged,
            reset_pages: counters.host_reset_bytes / PAGE_BYTES,
        };
        self.books.balloon.held = self.held();
        // How frames were opened and closed is not followed page by page: the balance says what is right.
        let flow = &mut self.books.balloon;
        (flow.withdrawn, flow.reopened) = (seen.balloon.withdrawn, seen.balloon.reopened);
        assert_eq!(seen, self.books, "after {what}");
        let ballooned = self.ballooned.len() as u64 * PAGE_BYTES;
        assert_eq!(
            guest.device().query()?.ballooned_bytes,
            ballooned,
            "after {what}"
        );
        assert_eq!(
            counters.broken_rings + counters.chain_errors,
            0,
            "after {what}"
        );
        Ok(())
    }

    /// Compares the contents of `pages`.
    pub(super) fn check_pages(&self, guest: &Guest, pages: impl Iterator<Item = u64>, what: &str) {
        // Not those of which it is not sure whether they were discarded.
        let sure =
            |pfn: &u64| !(self.unknown.contains(pfn) || self.waits && self.ballooned.contains(pfn));
        for pfn in pages.filter(sure) {
            let as_expected = match self.contents.get(&pfn) {
                Some(seed) => guest.ram().page_is(pfn, |index| mix(seed ^ index)),
                None => guest.ram().page_is(pfn, |_| 0),
            };
            assert!(as_expected, "page {pfn:#x} after {what}");
        }
    }
}
