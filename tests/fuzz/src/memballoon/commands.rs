//! What the commands do, as docs/memballoon.md has it.

use super::Run;
use crate::guest::PAGE;
use std::collections::BTreeSet;

impl Run<'_> {
    /// The page at `address` as pages of 4 KiB, if it is one.
    fn page(&self, address: u64) -> Option<Vec<u64>> {
        let pfn = address / PAGE as u64;
        let aligned = address.is_multiple_of(self.size * PAGE as u64);
        aligned.then(|| (pfn..pfn + self.size).collect())
    }

    fn is_memory(&self, page: &[u64]) -> bool {
        const ROM: u8 = 1 << 3;
        let memory = self.pages_of(!ROM);
        page.iter().all(|pfn| memory.contains(pfn))
    }

    /// What the document says that a command does; the answer, if there is one.
    pub(super) fn carry_out(&mut self, bytes: &[u8], room: usize) -> Option<u64> {
        if !bytes.len().is_multiple_of(8) || bytes.len() < 16 {
            return None;
        }
        let field = |field: &[u8]| u64::from_le_bytes(field.try_into().unwrap_or_default());
        let fields: Vec<u64> = bytes.chunks(8).map(field).collect();
        let addresses = &fields[1..];
        match fields[0] {
            1 => {
                let pages = addresses.iter().filter_map(|address| self.page(*address));
                let pages: Vec<_> = pages.filter(|page| self.is_memory(page)).collect();
                for pfn in pages.iter().flatten() {
                    self.ledger.give(*pfn);
                }
                None
            }
            0 if room >= 8 => {
                let mut granted = 0;
                let mut named = BTreeSet::new();
                for address in addresses {
                    let Some(page) = self.page(*address).filter(|_| named.insert(*address)) else {
                        break;
                    };
                    if !self.may_get(&page) || self.size_after(&page) < -self.grant_pages() {
                        break;
                    }
                    for pfn in &page {
                        self.ledger.balloon.remove(pfn);
                    }
                    granted += 1;
                }
                Some(granted)
            }
            2 => {
                let (wanted, given) = addresses.split_at(addresses.len() / 2);
                let pages = |addresses: &[u64]| -> Option<Vec<Vec<u64>>> {
                    addresses
                        .iter()
                        .map(|address| self.page(*address))
                        .collect()
                };
                let right = wanted.len() == given.len();
                let (wanted, given) = (pages(wanted), pages(given));
                let once = addresses.iter().collect::<BTreeSet<_>>().len() == addresses.len();
                let exchanged = match (wanted, given) {
                    (Some(wanted), Some(given)) if right && once => {
                        let free = |page: &Vec<u64>| {
                            self.is_memory(page)
                                && page.iter().all(|pfn| !self.ledger.balloon.contains(pfn))
                        };
                        let fits =
                            wanted.iter().all(|page| self.may_get(page)) && given.iter().all(free);
                        fits.then_some((wanted, given))
                    }
                    _ => None,
                };
                let pairs = exchanged.as_ref().map_or(0, |(wanted, _)| wanted.len());
                if let Some((wanted, given)) = exchanged {
                    given
                        .iter()
                        .flatten()
                        .for_each(|pfn| self.ledger.give(*pfn));
                    for pfn in wanted.iter().flatten() {
                        self.ledger.balloon.remove(pfn);
                    }
                }
                (room >= 8).then_some(pairs as u64)
            }
            _ => None,
        }
    }

    /// Whether a page is wholly in the balloon, and one that the driver may have.
    fn may_get(&self, page: &[u64]) -> bool {
        // Without EXTRA_MEM there are no extra regions here.
        page.iter().all(|pfn| self.ledger.balloon.contains(pfn))
    }

    fn size_after(&self, page: &[u64]) -> i64 {
        let pages = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        pages(self.ledger.balloon.len()) - pages(self.extra_pages().len()) - pages(page.len())
    }

    fn grant_pages(&self) -> i64 {
        i64::try_from(self.grant / PAGE as u64).unwrap_or(i64::MAX)
    }
}
