//! What has to be true after each step, whatever the script did (invariants I1, I3, I4).
//!
//! None of it asks the device's own walk of the rings: a page may have become zero only if something in
//! guest memory, as it was, names it, and the balloon is counted again page by page.

use crate::guest::{FRAME_PAGES, Guest, Kind, PAGE, REGIONS};
use aerostat_device::memory::NodeId;
use aerostat_device::{Counters, Device, DeviceState, Flow};
use std::collections::BTreeSet;
use std::ops::Range;

/// An answer has a bit for each of at most 1024 pages.
const MAX_ANSWER_BYTES: u64 = 128;

/// What the VMM and the driver have said that matters for what may be discarded and written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms {
    /// All regions are pinned.
    pub pinned: bool,
    /// Discarding is inhibited.
    pub inhibited: bool,
    /// Inflated pages may wait to be discarded.
    pub window: bool,
    /// The driver takes pages out of the balloon before it uses them again.
    pub told: bool,
    /// The device answers inflate buffers in guest memory.
    pub answers: bool,
    /// A device was restored that needs a reset.
    pub broken: bool,
}

/// The device as it was after the last step.
#[derive(Debug)]
pub struct Oracle {
    balloon: BTreeSet<u64>,
    /// Pages of the balloon that are to be discarded and were not yet.
    owed: BTreeSet<u64>,
    counters: Counters,
    /// A host reset was not acknowledged.
    late: bool,
}

impl Oracle {
    /// Nothing happened yet.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        Self {
            balloon: BTreeSet::new(),
            owed: BTreeSet::new(),
            counters: device.counters(),
            late: false,
        }
    }

    /// Goes on with another device, which was restored.
    ///
    /// # Panics
    /// If its balloon is not in memory.
    pub fn go_on_with(&mut self, device: &Device, guest: &Guest) {
        self.balloon = recount(device, guest);
        self.owed.clear();
        self.counters = device.counters();
        self.late = device.reset_pending();
    }

    /// Looks at everything. `writes` is where the device may write besides (rings): address and length;
    /// `mapped` the device-writable buffers that were handed over by other means than guest memory.
    ///
    /// # Panics
    /// If anything is not as it has to be.
    pub fn check(
        &mut self,
        device: &Device,
        guest: &mut Guest,
        terms: Terms,
        writes: &[(u64, u64)],
        mapped: &[(u64, u64)],
    ) {
        let counters = device.counters();
        check_books(device, &counters);
        let balloon = recount(device, guest);
        assert_eq!(
            device.ballooned_bytes(),
            balloon.len() as u64 * PAGE as u64,
            "recount"
        );
        let told = device.features() & 1 != 0;
        let held = if told {
            incomplete_frames(&balloon) * PAGE as u64
        } else {
            0
        };
        assert_eq!(
            counters.balloon.held_bytes, held,
            "held in incomplete frames"
        );
        if device.state() == DeviceState::NeedsReset {
            assert!(
                counters.broken_rings > 0 || terms.broken,
                "needs a reset, and no ring broke: a panic?"
            );
        }
        let late = device.reset_pending();
        assert!(
            !late || balloon.is_empty(),
            "a balloon that the host has reset"
        );
        let told = told || terms.told;
        // Pages that wait and were zero are not owed, and may have been written to meanwhile.
        let waited = self.counters.balloon.pending_bytes > 0;
        let before = self.owe(&balloon, guest, Terms { told, ..terms }) || waited;
        let deflated = counters.deflate_chains != self.counters.deflate_chains;
        let inflated = counters
            .inflate_chains
            .wrapping_sub(self.counters.inflate_chains);
        let report = counters.report_chains != self.counters.report_chains;
        let (mut emptied, mut touched) = (Vec::new(), Vec::new());
        let (mut answered, mut due) = (0, 0);
        for index in 0..guest.pages().len() {
            let pfn = guest.pages()[index].pfn;
            if guest.is_as_seen(index) && !self.owed.contains(&pfn) {
                continue;
            }
            let now = guest.page(index);
            let change = compare(guest.seen(index), &now, pfn, writes);
            if change.zero {
                let owed = self.owed.remove(&pfn);
                if !change.bytes.is_empty() {
                    emptied.push(index);
                    // What was booked before may be emptied again, where it is a gap between others.
                    due += u64::from(owed || !self.balloon.contains(&pfn));
                }
            } else if !change.bytes.is_empty() {
                let allowed = terms.answers && is_buffer(guest, &change.bytes, mapped);
                assert!(allowed, "page {pfn:#x} was written to");
                answered += change.bytes.len();
            }
            touched.push(index);
        }
        assert!(
            answered as u64 <= inflated.saturating_mul(MAX_ANSWER_BYTES),
            "more answers than buffers"
        );
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
            assert!(
                told || deflated || report || !kind.has_frames() || !self.balloon.contains(&pfn),
                "page {pfn:#x} may be in use again, and was discarded with its frame"
            );
            let kept = self.balloon.contains(&pfn) || balloon.contains(&pfn);
            let given = (inflated > 0 || before) && kept
                || inflated > 0 && !(late && self.late) && is_named(guest, pfn);
            let free = report && (is_reported(guest, pfn) || covers(mapped, pfn));
            assert!(
                given || free,
                "page {pfn:#x} was discarded, and nobody gave or reported it"
            );
        }
        let pending = counters.balloon.pending_bytes;
        assert!(
            (self.owed.len() * PAGE) as u64 <= pending,
            "in the balloon, not discarded and not pending: {:x?}",
            self.owed
        );
        assert!(
            pending == 0 || terms.window && pending <= device.ballooned_bytes(),
            "{pending} bytes wait"
        );
        let discarded = |counters: &Counters| {
            counters
                .balloon
                .discarded_bytes
                .wrapping_add(counters.report.discarded_bytes)
        };
        let booked = discarded(&counters).wrapping_sub(discarded(&self.counters));
        assert!(
            booked >= due * PAGE as u64,
            "more was discarded than the books say"
        );
        for index in touched {
            let now = guest.page(index);
            guest.see(index, &now);
        }
        self.balloon = balloon;
        self.counters = counters;
        self.late = late;
    }

    /// Notes which pages are to be discarded by now, or soon. Returns whether there were any before.
    fn owe(&mut self, balloon: &BTreeSet<u64>, guest: &Guest, terms: Terms) -> bool {
        let before = !self.owed.is_empty();
        // A frame of which a page was taken back is held again.
        let framed = |pfn: u64| {
            let index = guest.index_of(pfn * PAGE as u64);
            index.is_some_and(|index| guest.kind(index).has_frames())
        };
        let complete = |pfn| frame_of(pfn).all(|page| balloon.contains(&page));
        self.owed
            .retain(|&pfn| balloon.contains(&pfn) && (!framed(pfn) || complete(pfn)));
        if terms.inhibited || terms.pinned {
            return before;
        }
        for &pfn in balloon.difference(&self.balloon) {
            let kind = guest
                .index_of(pfn * PAGE as u64)
                .map(|index| guest.kind(index));
            match kind {
                Some(kind) if kind.has_frames() => {
                    if terms.told && complete(pfn) {
                        self.owed.extend(frame_of(pfn));
                    }
                }
                Some(Kind::Pinned | Kind::Rom) | None => {}
                Some(_) => drop(self.owed.insert(pfn)),
            }
        }
        before
    }
}

/// I4, for the whole and for each node.
pub(crate) fn check_books(device: &Device, total: &Counters) {
    for flow in [&total.balloon, &total.report] {
        assert!(flow.balances(), "{flow:?}");
        assert_eq!(flow.skipped_failed_bytes, 0, "{flow:?}");
    }
    assert_eq!(total.report.pending_bytes, 0, "reports never wait");
    assert!(total.refused_bytes <= total.balloon.skipped_bytes());
    assert!(total.host_resets_acknowledged <= total.host_resets);
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
pub(crate) fn recount(device: &Device, guest: &Guest) -> BTreeSet<u64> {
    let mut balloon = BTreeSet::new();
    for range in device.ballooned_ranges() {
        assert!(guest.may_hold(range), "{range:?} is not in one region");
        balloon.extend(range.start.0..range.end.0);
    }
    balloon
}

/// The pages of the frame that a page is in.
fn frame_of(pfn: u64) -> Range<u64> {
    let first = pfn / FRAME_PAGES * FRAME_PAGES;
    first..first + FRAME_PAGES
}

/// How many pages of the balloon are in frames that are not all in it.
fn incomplete_frames(balloon: &BTreeSet<u64>) -> u64 {
    let regions = REGIONS.iter().filter(|spec| spec.kind.has_frames());
    let frames = regions.flat_map(|spec| (spec.first..spec.first + spec.pages).step_by(4));
    let pages = frames.map(|frame| balloon.range(frame..frame + FRAME_PAGES).count() as u64);
    pages.filter(|pages| *pages < FRAME_PAGES).sum()
}

/// What became of a page.
struct Change {
    /// The addresses of bytes that changed where they must not; the first suffices for a page that is zero.
    bytes: Vec<u64>,
    /// Whether the page is zero but for where the device may write.
    zero: bool,
}

fn compare(seen: &[u8], now: &[u8; PAGE], pfn: u64, writes: &[(u64, u64)]) -> Change {
    let start = pfn * PAGE as u64;
    let inside = |(from, len): &&(u64, u64)| *from < start + PAGE as u64 && start < from + len;
    let here: Vec<_> = writes.iter().filter(inside).collect();
    let mine = |offset: u64| {
        let mut areas = here.iter();
        areas.any(|(from, len)| (*from..from + len).contains(&offset))
    };
    if here.is_empty() && now == &[0; PAGE] {
        let first = (start..).zip(seen).find(|(_, old)| **old != 0);
        return Change {
            bytes: first.map(|(offset, _)| offset).into_iter().collect(),
            zero: true,
        };
    }
    let mut change = Change {
        bytes: Vec::new(),
        zero: true,
    };
    for (offset, (old, new)) in (start..).zip(seen.iter().zip(now)) {
        if (old != new || *new != 0) && !mine(offset) {
            if old != new {
                change.bytes.push(offset);
            }
            change.zero &= *new == 0;
        }
    }
    change
}

/// Whether all the bytes at `addresses`, which are in one page, are in a device-writable buffer: one of
/// `mapped`, or one that any bytes of guest memory describe.
fn is_buffer(guest: &Guest, addresses: &[u64], mapped: &[(u64, u64)]) -> bool {
    let (Some(&first), Some(&last)) = (addresses.first(), addresses.last()) else {
        return true;
    };
    let stretches = guest.seen_other_than_canary(15);
    let windows = stretches.flat_map(|stretch| stretch.windows(16));
    let described = windows.filter_map(|window| {
        // The canary has the highest bit of every byte set, addresses of buffers have not. A split ring's
        // descriptors have their flags behind the length, a packed one's at the end.
        let writable = [window[12], window[14]].iter().any(|flags| flags & 2 != 0);
        let (address, rest) = (window[7] == 0 && writable).then(|| window.split_at(8))?;
        let address = u64::from_le_bytes(address.try_into().ok()?);
        let length = u32::from_le_bytes(rest.get(..4)?.try_into().ok()?);
        Some((address, length.into()))
    });
    let buffers = described.chain(mapped.iter().copied());
    let buffers = buffers.filter(|(from, len)| *from <= last && first < from.saturating_add(*len));
    let buffers: Vec<_> = buffers.collect();
    let holds = |at: u64| {
        let mut buffers = buffers.iter();
        buffers.any(|(from, len)| *from <= at && at - from < *len)
    };
    addresses.iter().all(|at| holds(*at))
}

/// Whether any four bytes of guest memory are the page's number.
fn is_named(guest: &Guest, pfn: u64) -> bool {
    let Ok(number) = u32::try_from(pfn) else {
        return false;
    };
    let number = number.to_le_bytes();
    let mut stretches = guest.seen_other_than_canary(3);
    stretches.any(|stretch| {
        let mut windows = stretch.windows(4);
        windows.any(|window| window[0] == number[0] && window == number)
    })
}

/// Whether any bytes of guest memory are the address and length of whole pages with the page among
/// them, as a descriptor has them.
fn is_reported(guest: &Guest, pfn: u64) -> bool {
    let page = PAGE as u64;
    let stretches = guest.seen_other_than_canary(11);
    let mut windows = stretches.flat_map(|stretch| stretch.windows(12));
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
