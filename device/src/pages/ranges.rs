//! From page numbers in the order of the guest to sorted ranges (the first half of "sort and
//! coalesce first, vector second").

use crate::memory::{Pfn, PfnRange};

/// Sorts `pages` and appends the ranges they form to `into`; returns how many were duplicates.
pub fn coalesce_pages(pages: &mut [Pfn], into: &mut Vec<PfnRange>) -> u64 {
    // Guests mostly send ascending or descending runs, which the standard sort takes in one pass.
    pages.sort_unstable();
    let mut duplicates = 0;
    let mut current: Option<PfnRange> = None;
    for &page in pages.iter() {
        match &mut current {
            Some(range) if page == range.end => range.end.0 += 1,
            Some(range) if page < range.end => duplicates += 1,
            _ => {
                into.extend(current.take());
                current = Some(PfnRange::new(page, 1));
            }
        }
    }
    into.extend(current);
    duplicates
}

/// Sorts `ranges` and merges what touches or overlaps; returns how many pages were duplicates.
pub fn coalesce_ranges(ranges: &mut Vec<PfnRange>) -> u64 {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut duplicates = 0;
    ranges.dedup_by(|next, last| {
        if next.start > last.end {
            return false;
        }
        duplicates += last.end.0.min(next.end.0) - next.start.0;
        last.end = last.end.max(next.end);
        true
    });
    duplicates
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
    fn descending_pages_become_one_range() {
        let mut pages: Vec<_> = (100..356).rev().map(Pfn).collect();
        let mut ranges = Vec::new();
        assert_eq!(coalesce_pages(&mut pages, &mut ranges), 0);
        assert_eq!(ranges, [range(100, 356)]);
    }

    #[test]
    fn nothing_becomes_nothing() {
        let mut ranges = Vec::new();
        assert_eq!(coalesce_pages(&mut [], &mut ranges), 0);
        assert_eq!(coalesce_ranges(&mut ranges), 0);
        assert!(ranges.is_empty());
    }

    #[test]
    fn overlapping_ranges_count_each_page_once() {
        let mut ranges = vec![
            range(10, 20),
            range(0, 4),
            range(15, 30),
            range(12, 13),
            range(4, 5),
        ];
        assert_eq!(coalesce_ranges(&mut ranges), 6);
        assert_eq!(ranges, [range(0, 5), range(10, 30)]);
    }

    proptest! {
        #[test]
        fn pages_agree_with_a_set(pages in prop::collection::vec(0u64..300, 0..400)) {
            let set: BTreeSet<u64> = pages.iter().copied().collect();
            let mut list: Vec<_> = pages.iter().copied().map(Pfn).collect();
            let mut ranges = Vec::new();
            let duplicates = coalesce_pages(&mut list, &mut ranges);
            prop_assert_eq!(duplicates as usize, pages.len() - set.len());
            let back: Vec<u64> = ranges.iter().flat_map(|r| r.start.0..r.end.0).collect();
            prop_assert_eq!(back, set.into_iter().collect::<Vec<_>>());
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end < pair[1].start, "not coalesced");
            }
        }

        #[test]
        fn ranges_agree_with_a_set(list in prop::collection::vec((0u64..300, 1u64..40), 0..60)) {
            let set: BTreeSet<u64> = list.iter().flat_map(|&(s, n)| s..s + n).collect();
            let total: u64 = list.iter().map(|&(_, n)| n).sum();
            let mut ranges: Vec<_> = list.iter().map(|&(s, n)| range(s, s + n)).collect();
            let duplicates = coalesce_ranges(&mut ranges);
            prop_assert_eq!(duplicates, total - set.len() as u64);
            let back: Vec<u64> = ranges.iter().flat_map(|r| r.start.0..r.end.0).collect();
            prop_assert_eq!(back, set.into_iter().collect::<Vec<_>>());
        }
    }
}
