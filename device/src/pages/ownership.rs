//! Who owns each page (invariant I1): one bit a page, set while it is in the balloon.
//!
//! The bitmap's size follows the memory table that the VMM gives, never a number that the guest
//! chose (I3).

use crate::memory::{GuestMemory, Pfn, PfnRange};

const WORD_BITS: u64 = u64::BITS as u64;

/// The pages of one region.
#[derive(Clone, Debug)]
pub struct Bitmap {
    span: PfnRange,
    words: Vec<u64>,
}

/// The low `count` bits, 1 to 64 of them.
fn low_bits(count: u64) -> u64 {
    u64::MAX >> (WORD_BITS - count)
}

impl Bitmap {
    /// A bitmap for the pages of `span`, all with the guest.
    #[must_use]
    pub fn new(span: PfnRange) -> Self {
        let words = usize::try_from(span.pages().div_ceil(WORD_BITS)).unwrap_or(usize::MAX);
        Self {
            span,
            words: vec![0; words],
        }
    }

    /// Calls `each` with (word, mask) for the part of `range` in each word.
    fn masks(&self, range: PfnRange, mut each: impl FnMut(usize, u64)) {
        let first = self.span.start.0;
        let (mut at, end) = (range.start.0 - first, range.end.0 - first);
        while at < end {
            let bit = at % WORD_BITS;
            let count = (WORD_BITS - bit).min(end - at);
            let word = usize::try_from(at / WORD_BITS).unwrap_or(usize::MAX);
            each(word, low_bits(count) << bit);
            at += count;
        }
    }

    /// How many pages of `range` are in the balloon.
    #[must_use]
    pub fn count(&self, range: PfnRange) -> u64 {
        let mut count = 0;
        self.masks(range, |word, mask| {
            count += u64::from((self.words.get(word).copied().unwrap_or(0) & mask).count_ones());
        });
        count
    }

    /// Puts `range` into the balloon; calls `fresh` for each run that was not there before.
    pub fn insert(&mut self, range: PfnRange, fresh: impl FnMut(PfnRange)) {
        self.change(range, true, fresh);
    }

    /// Puts one page of the span into the balloon; whether it was not there before.
    pub fn insert_page(&mut self, page: Pfn) -> bool {
        let at = page.0.wrapping_sub(self.span.start.0);
        let word = usize::try_from(at / WORD_BITS).ok();
        let Some(word) = word.and_then(|word| self.words.get_mut(word)) else {
            return false;
        };
        let bit = 1 << (at % WORD_BITS);
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    /// Takes `range` out of the balloon; calls `taken` for each run that was in it.
    pub fn remove(&mut self, range: PfnRange, taken: impl FnMut(PfnRange)) {
        self.change(range, false, taken);
    }

    /// Calls `each` for every run of pages in the balloon.
    pub fn runs(&self, each: impl FnMut(PfnRange)) {
        let mut runs = Runs::new(self.span.start, each);
        for (index, word) in self.words.iter().enumerate() {
            runs.add(index, *word);
        }
        runs.end();
    }

    fn change(&mut self, range: PfnRange, insert: bool, changed: impl FnMut(PfnRange)) {
        let mut words = std::mem::take(&mut self.words);
        let mut runs = Runs::new(self.span.start, changed);
        self.masks(range, |index, mask| {
            let Some(word) = words.get_mut(index) else {
                return;
            };
            let flipped = if insert { !*word & mask } else { *word & mask };
            *word ^= flipped;
            runs.add(index, flipped);
        });
        self.words = words;
        runs.end();
    }
}

/// Joins the bits of ascending words to runs of pages.
struct Runs<F> {
    first: Pfn,
    run: Option<PfnRange>,
    each: F,
}

impl<F: FnMut(PfnRange)> Runs<F> {
    fn new(first: Pfn, each: F) -> Self {
        Self {
            first,
            run: None,
            each,
        }
    }

    fn add(&mut self, index: usize, mut bits: u64) {
        while bits != 0 {
            let bit = u64::from(bits.trailing_zeros());
            let count = u64::from((bits >> bit).trailing_ones());
            bits &= !(low_bits(count) << bit);
            let next = PfnRange::new(Pfn(self.first.0 + index as u64 * WORD_BITS + bit), count);
            match &mut self.run {
                Some(run) if run.end == next.start => run.end = next.end,
                _ => {
                    if let Some(done) = self.run.replace(next) {
                        (self.each)(done);
                    }
                }
            }
        }
    }

    fn end(mut self) {
        if let Some(done) = self.run {
            (self.each)(done);
        }
    }
}

/// The bitmaps of all regions, in the order of [`GuestMemory::regions`].
#[derive(Debug, Default)]
pub struct Ownership {
    bitmaps: Vec<Bitmap>,
}

impl Ownership {
    /// Bitmaps for `memory`, all pages with the guest.
    #[must_use]
    pub fn new(memory: &GuestMemory) -> Self {
        Self {
            bitmaps: memory
                .regions()
                .iter()
                .map(|region| Bitmap::new(region.pfns()))
                .collect(),
        }
    }

    /// The bitmap of the region at `index`.
    pub fn region(&mut self, index: usize) -> Option<&mut Bitmap> {
        self.bitmaps.get_mut(index)
    }

    /// Calls `each` for every run of pages in the balloon.
    pub fn runs(&self, mut each: impl FnMut(PfnRange)) {
        for bitmap in &self.bitmaps {
            bitmap.runs(&mut each);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn range(start: u64, end: u64) -> PfnRange {
        PfnRange {
            start: Pfn(start),
            end: Pfn(end),
        }
    }

    #[test]
    fn inserting_twice_reports_nothing_fresh() {
        let mut bitmap = Bitmap::new(range(1000, 1200));
        let mut fresh = Vec::new();
        bitmap.insert(range(1060, 1190), |run| fresh.push(run));
        assert_eq!(fresh, [range(1060, 1190)]);
        bitmap.insert(range(1060, 1190), |run| panic!("{run:?} is not fresh"));
        assert_eq!(bitmap.count(range(1000, 1200)), 130);
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(steps in prop::collection::vec((any::<bool>(), 0u64..400, prop_oneof![Just(1u64), 1u64..200]), 1..40)) {
            let span = range(77, 77 + 600);
            let mut bitmap = Bitmap::new(span);
            let mut model = BTreeSet::new();
            for (insert, start, pages) in steps {
                let range = range(77 + start, 77 + start + pages);
                let mut changed = Vec::new();
                if insert {
                    if pages == 1 {
                        let fresh = bitmap.insert_page(range.start);
                        changed.extend(fresh.then_some(range));
                    } else {
                        bitmap.insert(range, |run| changed.push(run));
                    }
                } else {
                    bitmap.remove(range, |run| changed.push(run));
                }
                let expected: Vec<u64> = (range.start.0..range.end.0)
                    .filter(|page| if insert { model.insert(*page) } else { model.remove(page) })
                    .collect();
                let listed: Vec<u64> = changed.iter().flat_map(|r| r.start.0..r.end.0).collect();
                prop_assert_eq!(listed, expected);
                for pair in changed.windows(2) {
                    prop_assert!(pair[0].end < pair[1].start, "runs are not maximal");
                }
                prop_assert_eq!(bitmap.count(span), model.len() as u64);
            }
            let mut runs = Vec::new();
            bitmap.runs(|run| runs.extend(run.start.0..run.end.0));
            prop_assert_eq!(runs, model.into_iter().collect::<Vec<_>>());
        }
    }
}
