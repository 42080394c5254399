//! What has to be true after each step, whatever the script did (invariants I1, I3, I4).
//!
//! None of it asks the device's own walk of the rings: a page may have become zero only if something in
//! guest memory, as it was, names it, and the balloon is counted again page by page.

use crate::guest::{FRAME_PAGES, Guest, Kind, PAGE, REGIONS};
use aerostat_device::memory::NodeId;
use aerostat_device::{Counters, Device, DeviceState, Flow};
use std::collections::BTreeSet;

/// What the VMM has said that matters for what may be discarded.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Regions in the table, a bit each.
    pub regions: u8,
    /// All regions are pinned.
    pub pinned: bool,
    /// Discarding is inhibited.
    pub inhibited: bool,
}

/// The device as it was after the last step.
#[derive(Debug)]
pub struct Oracle {
    balloon: BTreeSet<u64>,
    counters: Counters,
}

impl Oracle {
    /// Nothing happened yet.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        Self {
            balloon: BTreeSet::new(),
            counters: device.counters(),
        }
    }

    /// Looks at everything. `writes` is where the device may write besides (rings): address and length;
    /// `reported` what was handed over for reporting by other means than guest memory.
    ///
    /// # Panics
    /// If anything is not as it has to be.
    pub fn check(
        &mut self,
        device: &Device,
        guest: &mut Guest,
        terms: Terms,
        writes: &[(u64, u64)],
        reported: &[(u64, u64)],
    ) {
        let counters = device.counters();
        check_books(device, &counters);
        let balloon = recount(device, guest);
        assert_eq!(
            device.ballooned_bytes(),
            balloon.len() as u64 * PAGE as u64,
            "recount"
        );
        let held = incomplete_frames(&balloon) * PAGE as u64;
        assert_eq!(
            counters.balloon.held_bytes, held,
            "held in incomplete frames"
        );
        if device.state() == DeviceState::NeedsReset {
            assert!(
                counters.broken_rings > 0,
                "needs a reset, and no ring broke: a panic?"
            );
        }
        let inflated = counters.inflate_chains != self.counters.inflate_chains;
        let report = counters.report_chains != self.counters.report_chains;
        let mut emptied = Vec::new();
        let mut touched = Vec::new();
        for index in 0..guest.pages().len() {
            let pfn = guest.pages()[index].pfn;
            let now = guest.page(index);
            let same = now.as_slice() == guest.seen(index);
            let fresh = balloon.contains(&pfn) && !self.balloon.contains(&pfn);
            if same && !fresh {
                continue;
            }
            let (changed, zero) = compare(guest.seen(index), &now, pfn, writes);
            if changed {
                assert!(zero, "page {pfn:#x} was written to");
                emptied.push(index);
            }
            if fresh && must_be_empty(guest.kind(index), pfn, &balloon, terms) {
                assert!(
                    zero,
                    "page {pfn:#x} is in the balloon and was not discarded"
                );
            }
            touched.push(index);
        }
        for &index in &emptied {
            let pfn = guest.pages()[index].pfn;
            assert!(
                !terms.inhibited,
                "page {pfn:#x} was discarded while inhibited"
            );
            assert!(!terms.pinned, "page {pfn:#x} is pinned and was discarded");
            let kind = guest.kind(index);
            assert!(
                !matches!(kind, Kind::Rom | Kind::Pinned),
                "page {pfn:#x}: {kind:?}"
            );
            let given =
                self.balloon.contains(&pfn) || balloon.contains(&pfn) || is_named(guest, pfn);
            let free = is_reported(guest, pfn) || covers(reported, pfn);
            assert!(
                inflated && given || report && free,
                "page {pfn:#x} was discarded, and nobody gave or reported it"
            );
        }
        let discarded = |counters: &Counters| {
            counters
                .balloon
                .discarded_bytes
                .wrapping_add(counters.report.discarded_bytes)
        };
        let booked = discarded(&counters).wrapping_sub(discarded(&self.counters));
        assert!(
            booked >= (emptied.len() * PAGE) as u64,
            "more was discarded than the books say"
        );
        for index in touched {
            let now = guest.page(index);
            guest.see(index, &now);
        }
        self.balloon = balloon;
        self.counters = counters;
    }
}

/// I4, for the whole and for each node.
fn check_books(device: &Device, total: &Counters) {
    for flow in [&total.balloon, &total.report] {
        assert!(flow.balances(), "{flow:?}");
        assert_eq!(
            (flow.pending_bytes, flow.skipped_failed_bytes),
            (0, 0),
            "{flow:?}"
        );
    }
    let mut sum = device.node_counters(None).expect("what belongs to no node");
    let mut node = 0;
    while let Ok(counters) = device.node_counters(Some(NodeId(node))) {
        sum = sum + counters;
        node += 1;
    }
    assert_eq!(sum, *total, "the nodes' books and the device's");
    assert_eq!(total.report.held_bytes, Flow::default().held_bytes);
}

/// The pages that the bitmap holds.
fn recount(device: &Device, guest: &Guest) -> BTreeSet<u64> {
    let mut balloon = BTreeSet::new();
    for range in device.ballooned_ranges() {
        assert!(guest.may_hold(range), "{range:?} is not in one region");
        balloon.extend(range.start.0..range.end.0);
    }
    balloon
}

/// How many pages of the balloon are in frames that are not all in it.
fn incomplete_frames(balloon: &BTreeSet<u64>) -> u64 {
    let spec = REGIONS.iter().find(|spec| spec.kind == Kind::Frames);
    let Some(spec) = spec else { return 0 };
    let frames = (spec.first..spec.first + spec.pages).step_by(4);
    let pages = frames.map(|frame| balloon.range(frame..frame + FRAME_PAGES).count() as u64);
    pages.filter(|pages| *pages < FRAME_PAGES).sum()
}

fn must_be_empty(kind: Kind, pfn: u64, balloon: &BTreeSet<u64>, terms: Terms) -> bool {
    let frame = pfn / FRAME_PAGES * FRAME_PAGES;
    let whole = balloon.range(frame..frame + FRAME_PAGES).count() as u64 == FRAME_PAGES;
    !terms.inhibited && !terms.pinned && kind != Kind::Pinned && (kind != Kind::Frames || whole)
}

/// Whether the page changed where it must not, and whether it is zero there.
fn compare(seen: &[u8], now: &[u8; PAGE], pfn: u64, writes: &[(u64, u64)]) -> (bool, bool) {
    let start = pfn * PAGE as u64;
    let inside = |(from, len): &&(u64, u64)| *from < start + PAGE as u64 && start < from + len;
    let here: Vec<_> = writes.iter().filter(inside).collect();
    if here.is_empty() {
        return (seen != now, *now == [0; PAGE]);
    }
    let (mut changed, mut zero) = (false, true);
    for (offset, (old, new)) in (start..).zip(seen.iter().zip(now)) {
        if (old != new || *new != 0)
            && !here
                .iter()
                .any(|(from, len)| (*from..from + len).contains(&offset))
        {
            changed |= old != new;
            zero &= *new == 0;
        }
    }
    (changed, zero)
}

/// Whether any four bytes of guest memory are the page's number.
fn is_named(guest: &Guest, pfn: u64) -> bool {
    let Ok(number) = u32::try_from(pfn) else {
        return false;
    };
    let number = number.to_le_bytes();
    let mut windows = guest.seen_all().windows(4);
    windows.any(|window| window[0] == number[0] && window == number)
}

/// Whether any bytes of guest memory are the address and length of whole pages with the page among
/// them, as a descriptor has them.
fn is_reported(guest: &Guest, pfn: u64) -> bool {
    let page = PAGE as u64;
    let mut windows = guest.seen_all().windows(12);
    windows.any(|window| {
        // The canary has no zeros, and whole pages begin and end with them.
        if window[0] != 0 || window[8] != 0 {
            return false;
        }
        let (address, length) = window.split_at(8);
        let address = u64::from_le_bytes(address.try_into().unwrap_or_default());
        let length = u64::from(u32::from_le_bytes(length.try_into().unwrap_or_default()));
        address.is_multiple_of(page)
            && length.is_multiple_of(page)
            && covers(&[(address, length)], pfn)
    })
}

fn covers(ranges: &[(u64, u64)], pfn: u64) -> bool {
    let start = pfn * PAGE as u64;
    ranges
        .iter()
        .any(|(from, len)| *from <= start && start - from < *len)
}
