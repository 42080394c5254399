//! Which pages of the guest are in use: the least of a page allocator.

use std::collections::BTreeSet;

/// In which order pages are handed out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Ascending, as an allocator with large free blocks does.
    #[default]
    Ascending,
    /// Descending.
    Descending,
    /// At random, from this seed.
    Random(u64),
}

/// The guest's unused pages.
#[derive(Clone, Debug, Default)]
pub struct PageAllocator {
    unused: BTreeSet<u64>,
    order: Order,
    draws: u64,
}

impl PageAllocator {
    /// All of `pfns` are unused.
    #[must_use]
    pub fn new(pfns: impl Iterator<Item = u64>, order: Order) -> Self {
        Self {
            unused: pfns.collect(),
            order,
            draws: 0,
        }
    }

    /// How many pages are unused.
    #[must_use]
    pub fn unused_pages(&self) -> u64 {
        self.unused.len() as u64
    }

    /// The unused pages, in ascending order.
    pub fn unused(&self) -> impl Iterator<Item = u64> + '_ {
        self.unused.iter().copied()
    }

    /// Changes the order of what is handed out from now on.
    pub fn set_order(&mut self, order: Order) {
        self.order = order;
    }

    /// Takes a page.
    pub fn allocate(&mut self) -> Option<u64> {
        let pfn = match self.order {
            Order::Ascending => self.unused.first().copied()?,
            Order::Descending => self.unused.last().copied()?,
            Order::Random(seed) => {
                self.draws += 1;
                let (first, last) = (*self.unused.first()?, *self.unused.last()?);
                let at = first + mix(seed ^ self.draws) % (last - first + 1);
                let above = self.unused.range(at..).next();
                *above.or(self.unused.first())?
            }
        };
        self.unused.remove(&pfn);
        Some(pfn)
    }

    /// Takes this page, if it is unused.
    pub fn take(&mut self, pfn: u64) -> bool {
        self.unused.remove(&pfn)
    }

    /// Takes a block of `pages` pages that begins at a multiple of as many.
    pub fn allocate_block(&mut self, pages: u64) -> Option<u64> {
        let mut candidates = self.unused.iter().copied();
        let start = candidates.find(|start| {
            start.is_multiple_of(pages)
                && self.unused.range(*start..start + pages).count() as u64 == pages
        })?;
        for pfn in start..start + pages {
            self.unused.remove(&pfn);
        }
        Some(start)
    }

    /// Gives pages back.
    ///
    /// # Panics
    /// If one is unused already: the test has lost track.
    pub fn release(&mut self, pfns: impl IntoIterator<Item = u64>) {
        for pfn in pfns {
            assert!(self.unused.insert(pfn), "page {pfn:#x} is unused already");
        }
    }
}

/// A number that looks random, from one that does not (SplitMix64's output function).
#[must_use]
pub fn mix(value: u64) -> u64 {
    let mut value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
