//! In which order a guest gives its pages: arrays of 256 page frame numbers, as Linux sends them.

use aerostat_tests::vmm::allocator::mix;

/// Page frame numbers in one array.
pub(crate) const ARRAY: usize = 256;

/// How the pages lie.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shape {
    /// One after the other.
    Sequential,
    /// Runs of 64 KiB, in random order: a guest whose memory is fragmented.
    Clumps,
    /// Single pages in random order.
    Random,
}

impl Shape {
    pub(crate) const ALL: [Self; 3] = [Self::Sequential, Self::Clumps, Self::Random];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Clumps => "64K clumps",
            Self::Random => "random 4K",
        }
    }

    /// Half of the `pages` pages from `first` on, in arrays.
    pub(crate) fn arrays(self, first: u64, pages: u64) -> Vec<Vec<u64>> {
        let run = match self {
            Self::Sequential => pages / 2,
            Self::Clumps => 16,
            Self::Random => 1,
        };
        let mut starts: Vec<u64> = (0..pages / run).map(|index| first + index * run).collect();
        if !matches!(self, Self::Sequential) {
            starts.sort_by_key(|start| mix(*start));
        }
        let half = starts.len() / 2;
        let given = starts.into_iter().take(half.max(1));
        let pfns: Vec<u64> = given.flat_map(|start| start..start + run).collect();
        pfns.chunks(ARRAY).map(<[u64]>::to_vec).collect()
    }
}
