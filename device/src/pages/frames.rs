//! Frames: the units in which the memory behind a region is freed, where they are larger than a page of
//! the balloon.
//!
//! A frame lies where the *host* address is a multiple of its size: that is what its huge page covers.
//! With hugetlb, guest addresses are aligned as well; transparent huge pages care about the host's only, so
//! a frame may begin anywhere in guest memory, and those at the ends of a region may be cut. Pure.

use crate::memory::{BALLOON_PAGE_SHIFT, Pfn, PfnRange, Region};

/// How a region is divided into frames.
#[derive(Clone, Copy, Debug)]
pub struct Frames {
    span: PfnRange,
    /// Pages in a frame that is not cut; a power of two.
    pages: u64,
    /// How far page 0 of the guest lies behind a frame's beginning, in pages.
    skew: u64,
}

impl Frames {
    /// The frames of `region`.
    #[must_use]
    pub fn of(region: &Region) -> Self {
        let pages = region.pages_per_frame();
        let distance = (region.hva as u64).wrapping_sub(region.gpa.0) >> BALLOON_PAGE_SHIFT;
        Self {
            span: region.pfns(),
            pages,
            skew: distance % pages,
        }
    }

    /// The frame that holds `page`, as far as it is in the region.
    fn at(&self, page: Pfn) -> PfnRange {
        let first = (page.0 + self.skew) / self.pages * self.pages;
        PfnRange {
            start: Pfn(first.saturating_sub(self.skew)).max(self.span.start),
            end: Pfn(first + self.pages - self.skew).min(self.span.end),
        }
    }

    /// The frames that `range`, a part of the region, touches.
    pub fn touching(self, range: PfnRange) -> impl Iterator<Item = PfnRange> {
        let mut next = range.start;
        std::iter::from_fn(move || {
            (next < range.end).then(|| {
                let frame = self.at(next);
                next = frame.end;
                frame
            })
        })
    }

    /// `range`, a part of the region, with the frames that it cuts made whole.
    #[must_use]
    pub fn around(&self, range: PfnRange) -> PfnRange {
        if range.pages() == 0 {
            return range;
        }
        PfnRange {
            start: self.at(range.start).start,
            end: self.at(Pfn(range.end.0 - 1)).end,
        }
    }

    /// The part of `range`, itself a part of the region, that consists of whole frames.
    #[must_use]
    pub fn inside(&self, range: PfnRange) -> Option<PfnRange> {
        let around = self.around(range);
        let mut whole = range;
        if around.start < range.start {
            whole.start = self.at(range.start).end;
        }
        if around.end > range.end {
            whole.end = self.at(range.end).start;
        }
        (whole.start < whole.end).then_some(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Gpa;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    fn region(first: u64, pages: u64, host: u64, frame: u64) -> Region {
        Region {
            gpa: Gpa(first * PAGE),
            len_bytes: pages * PAGE,
            hva: usize::try_from(host * PAGE).unwrap(),
            fd: None,
            fd_offset_bytes: 0,
            page_size_bytes: PAGE,
            frame_bytes: frame * PAGE,
            shared: false,
            readonly: false,
            extra: false,
            guest_node: crate::memory::GuestNode(0),
            pinned: false,
            node: None,
        }
    }

    fn range(start: u64, end: u64) -> PfnRange {
        PfnRange {
            start: Pfn(start),
            end: Pfn(end),
        }
    }

    #[test]
    fn frames_follow_the_host_address_and_end_with_the_region() {
        // Guest page 0 is host page 1027: three pages into a frame of 8.
        let frames = Frames::of(&region(0, 20, 1027, 8));
        let all: Vec<_> = frames.touching(range(0, 20)).collect();
        assert_eq!(all, [range(0, 5), range(5, 13), range(13, 20)]);
        assert_eq!(frames.around(range(6, 7)), range(5, 13));
        assert_eq!(frames.inside(range(0, 14)), Some(range(0, 13)));
        assert_eq!(frames.inside(range(6, 12)), None);
        assert_eq!(frames.inside(range(1, 20)), Some(range(5, 20)));
    }

    #[test]
    fn frames_of_a_page_are_the_pages() {
        let frames = Frames::of(&region(7, 20, 1000, 1));
        let all: Vec<_> = frames.touching(range(9, 11)).collect();
        assert_eq!(all, [range(9, 10), range(10, 11)]);
        assert_eq!(frames.around(range(9, 11)), range(9, 11));
        assert_eq!(frames.inside(range(9, 11)), Some(range(9, 11)));
    }

    proptest! {
        #[test]
        fn agrees_with_host_addresses(
            first in 0u64..100, pages in 1u64..200, host in 100u64..300, shift in 0u32..6,
            from in 0u64..200, len in 1u64..200,
        ) {
            let size = 1 << shift;
            let region = region(first, pages, host, size);
            let part = range(first + from, first + from + len).intersection(region.pfns());
            prop_assume!(part.pages() > 0);
            let frames = Frames::of(&region);
            // A page's frame, as its host address tells.
            let of = |page: u64| (page - first + host) / size;
            let touched: Vec<_> = frames.touching(part).collect();
            for frame in &touched {
                prop_assert!(frame.intersection(part).pages() > 0);
                prop_assert_eq!(of(frame.start.0), of(frame.end.0 - 1));
                prop_assert!(frame.start == region.pfns().start || of(frame.start.0 - 1) != of(frame.start.0));
                prop_assert!(frame.end == region.pfns().end || of(frame.end.0) != of(frame.start.0));
            }
            let around = frames.around(part);
            prop_assert_eq!(around.start, touched[0].start);
            prop_assert_eq!(around.end, touched[touched.len() - 1].end);
            let whole: u64 = touched.iter().filter(|f| f.intersection(part) == **f).map(PfnRange::pages).sum();
            prop_assert_eq!(frames.inside(part).map_or(0, |range| range.pages()), whole);
        }
    }
}
