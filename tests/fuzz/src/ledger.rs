//! A balloon that a model of the protocol predicts exactly, and what every byte of guest memory has to be then.

use crate::guest::{FRAME_PAGES, Guest, Kind, PAGE};
use crate::oracle::{check_books, recount};
use aerostat_device::Device;
use std::collections::BTreeSet;

/// What the model knows after a step.
#[derive(Debug, Default)]
pub struct Ledger {
    /// The pages in the balloon, by their numbers.
    pub balloon: BTreeSet<u64>,
    /// Those that came into it during this step, whether they are still there or not.
    pub given: BTreeSet<u64>,
    /// What the device wrote during this step: where, and what.
    pub written: Vec<(u64, Vec<u8>)>,
    before: BTreeSet<u64>,
}

/// When pages of the balloon are discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discards {
    /// Before they are acknowledged.
    AtOnce,
    /// At some later time.
    Later,
    /// Not at all.
    Never,
}

impl Ledger {
    /// Notes that a page is in the balloon from now on, if it was not already.
    pub fn give(&mut self, pfn: u64) {
        if self.balloon.insert(pfn) {
            self.given.insert(pfn);
        }
    }

    /// Looks at device and guest, and begins the next step.
    ///
    /// # Panics
    /// If balloon, books or contents are not as they have to be.
    pub fn check(
        &mut self,
        device: &Device,
        guest: &mut Guest,
        discards: Discards,
        rings: &[(u64, u64)],
    ) {
        check_books(device, &device.counters());
        assert_eq!(
            recount(device, guest),
            self.balloon,
            "the balloon, page by page"
        );
        for index in 0..guest.pages().len() {
            self.check_page(guest, index, discards, rings);
        }
        self.before.clone_from(&self.balloon);
        self.given.clear();
        self.written.clear();
    }

    fn check_page(
        &self,
        guest: &mut Guest,
        index: usize,
        discards: Discards,
        rings: &[(u64, u64)],
    ) {
        let pfn = guest.pages()[index].pfn;
        let now = guest.page(index);
        let start = pfn * PAGE as u64;
        let ring = |(from, len): &(u64, u64)| *from < start + PAGE as u64 && start < from + len;
        let mut kept = [0; PAGE];
        kept.copy_from_slice(guest.seen(index));
        let mut emptied = [0; PAGE];
        for (at, bytes) in &self.written {
            let bytes = (*at..).zip(bytes);
            for (at, byte) in bytes.filter(|(at, _)| at / PAGE as u64 == pfn) {
                let offset = usize::try_from(at - start).unwrap_or(0);
                (kept[offset], emptied[offset]) = (*byte, *byte);
            }
        }
        guest.see(index, &now);
        // Rings are written by the device in its own way; other targets look at them.
        if rings.iter().any(ring) {
            return;
        }
        let kind = guest.kind(index);
        let discardable = discards != Discards::Never && !matches!(kind, Kind::Rom | Kind::Pinned);
        let ballooned = |sets: [&BTreeSet<u64>; 3]| sets.iter().any(|set| set.contains(&pfn));
        let may = discardable && ballooned([&self.before, &self.balloon, &self.given]);
        let must = may
            && discards == Discards::AtOnce
            && self.balloon.contains(&pfn)
            && self.given.contains(&pfn)
            && self.is_whole(kind, pfn);
        let is_emptied = may && (now == emptied || now == [0; PAGE]);
        assert!(
            is_emptied || now == kept,
            "page {pfn:#x} ({kind:?}) was written to, or discarded wrongly: {discards:?}"
        );
        assert!(
            is_emptied || !must,
            "page {pfn:#x} ({kind:?}) was given and is not discarded"
        );
    }

    /// Whether the memory that is freed at a time is all in the balloon.
    fn is_whole(&self, kind: Kind, pfn: u64) -> bool {
        let frame = pfn / FRAME_PAGES * FRAME_PAGES;
        let mut frame = frame..frame + FRAME_PAGES;
        !kind.has_frames() || frame.all(|page| self.balloon.contains(&page))
    }
}
