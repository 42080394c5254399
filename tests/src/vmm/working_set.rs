//! Pages whose contents are known, so that damage is found and named.

use super::allocator::{PageAllocator, mix};
use super::error::{Result, VmmError};
use super::ram::GuestRam;

/// Pages that hold words derived from a seed, the page and the place in it: a page that was lost,
/// or swapped with another one, is noticed.
#[derive(Clone, Debug)]
pub struct WorkingSet {
    seed: u64,
    pfns: Vec<u64>,
}

impl WorkingSet {
    /// Allocates `pages` pages and fills them.
    ///
    /// # Errors
    /// The guest has not got as many.
    pub fn allocate(
        ram: &GuestRam,
        allocator: &mut PageAllocator,
        pages: u64,
        seed: u64,
    ) -> Result<Self> {
        let pfns: Option<Vec<u64>> = (0..pages).map(|_| allocator.allocate()).collect();
        let pfns = pfns.ok_or(VmmError::NoMemory("a working set"))?;
        Ok(Self::fill(ram, pfns, seed))
    }

    /// Fills `pfns`, which the caller owns.
    #[must_use]
    pub fn fill(ram: &GuestRam, pfns: Vec<u64>, seed: u64) -> Self {
        let set = Self { seed, pfns };
        for pfn in &set.pfns {
            ram.fill_page(*pfn, set.word(*pfn));
        }
        set
    }

    fn word(&self, pfn: u64) -> impl Fn(u64) -> u64 + use<> {
        let base = mix(self.seed ^ mix(pfn));
        move |index| base.wrapping_mul(2 * index + 1) ^ index
    }

    /// Its pages.
    #[must_use]
    pub fn pfns(&self) -> &[u64] {
        &self.pfns
    }

    /// The pages that do not hold what was written to them.
    #[must_use]
    pub fn damaged(&self, ram: &GuestRam) -> Vec<u64> {
        let pfns = self.pfns.iter().copied();
        pfns.filter(|pfn| !ram.page_is(*pfn, self.word(*pfn)))
            .collect()
    }

    /// One number for all contents, as they are now.
    #[must_use]
    pub fn checksum(&self, ram: &GuestRam) -> u64 {
        let sums = self.pfns.iter().map(|pfn| ram.page_sum(*pfn));
        sums.fold(0, |sum, page| mix(sum ^ page))
    }
}
