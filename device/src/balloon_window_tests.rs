//! Write-behind: what waits, what is flushed, and that nothing is discarded once it was taken back.

use super::tests::{Guest, Notes, guest, huge, range};
use super::*;
use crate::discard::WriteBehind;
use crate::memory::Pfn;
use crate::pages::ranges::coalesce_pages;
use crate::runtime::{Runtime, RuntimeConfig};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const LIMIT: WriteBehind = WriteBehind {
    limit_bytes: 1 << 20,
    delay: Duration::from_secs(3600),
};

/// A guest with an open window, whose flushes a worker carries out.
fn windowed(change: impl Fn(&mut Region)) -> (Guest, Arc<Books>, Arc<Runtime>) {
    let runtime = Runtime::new(&RuntimeConfig {
        workers_per_node: 1,
    })
    .unwrap();
    let mut guest = guest(change);
    guest.balloon = Balloon::new(Arc::clone(guest.balloon.memory()), runtime.discarder());
    let books = Arc::new(Books::new(1));
    guest.balloon.set_write_behind(LIMIT, &books);
    (guest, books, runtime)
}

fn flow(books: &Books) -> Flow {
    let total = books.total();
    assert!(total.balloon.balances(), "{total:?}");
    total.balloon
}

#[test]
fn pages_wait_until_the_limit_and_go_in_one_call() {
    let (mut guest, books, _runtime) = windowed(|_| ());
    // Every second page, then those between: one run in the end.
    for start in [512, 513] {
        let pages: Vec<_> = (0..128).map(|page| range(start + 2 * page, 1)).collect();
        guest.balloon.give(&pages, 0, &books);
        guest.balloon.flush_if_due(false, false, &books, || ());
    }
    guest.balloon.drain(&books);
    assert_eq!(flow(&books).discarded_bytes, 256 * 4096);
    assert_eq!(
        (books.total().discard_calls, books.total().discard_ranges),
        (1, 1)
    );
    assert_eq!(guest.host_pages(), 2048 - 256);
}

#[test]
fn below_the_limit_nothing_is_freed_and_all_is_pending() {
    let (mut guest, books, _runtime) = windowed(|_| ());
    guest.balloon.give(&[range(600, 100)], 0, &books);
    guest.balloon.flush_if_due(false, false, &books, || ());
    assert_eq!(flow(&books).pending_bytes, 100 * 4096);
    assert_eq!(guest.host_pages(), 2048);
    guest.balloon.take(&[range(610, 20)], 0, &books);
    let after = flow(&books);
    assert_eq!(
        (after.pending_bytes, after.withdrawn_bytes),
        (80 * 4096, 20 * 4096)
    );
    guest.balloon.flush_if_due(true, false, &books, || ());
    guest.balloon.drain(&books);
    assert_eq!(flow(&books).discarded_bytes, 80 * 4096);
    assert_eq!(guest.host_pages(), 2048 - 80);
}

/// I3: a guest at its target cannot have each of its buffers flushed by itself.
#[test]
fn a_guest_that_gives_the_same_again_is_flushed_in_its_time() {
    let (mut guest, books, _runtime) = windowed(|_| ());
    let give = |guest: &mut Guest, start| {
        guest.balloon.give(&[range(start, 100)], 0, &books);
        guest.balloon.flush_if_due(true, false, &books, || ());
        guest.balloon.wait_for_flights();
        flow(&books).pending_bytes
    };
    assert_eq!(give(&mut guest, 600), 0, "no more is to be expected");
    guest.balloon.take(&[range(600, 100)], 0, &books);
    assert_eq!(give(&mut guest, 800), 100 * 4096, "as large as before");
    assert_eq!(give(&mut guest, 1000), 0, "larger than before");
}

/// I3: a device whose window is empty is not brought to a worker again and again.
#[test]
fn nothing_is_due_after_a_flush_that_took_all() {
    let (mut guest, books, _runtime) = windowed(|_| ());
    let balloon = &mut guest.balloon;
    balloon.give(&[range(600, 100)], 0, &books);
    assert!(balloon.window.flushes(Some(100)), "no more is expected");
    // Neither what is there already, nor what the same flush takes with it, is due later.
    balloon.give(&[range(600, 10)], 0, &books);
    assert_eq!(balloon.flush_deadline(), None);
    balloon.give(&[range(700, 10)], 0, &books);
    assert!(balloon.flush_deadline().is_some());
    balloon.flush_if_due(false, false, &books, || ());
    balloon.wait_for_flights();
    assert_eq!(flow(&books).pending_bytes, 0);
    assert_eq!(balloon.flush_deadline(), None);
}

#[test]
fn an_accountant_hears_nothing_of_pages_that_only_waited() {
    let (mut guest, books, _runtime) = windowed(|_| ());
    let notes = Notes::on(&books);
    guest.balloon.give(&[range(600, 100)], 0, &books);
    guest.balloon.take(&[range(610, 20)], 0, &books);
    assert!(notes.take().is_empty());
    guest.balloon.drain(&books);
    assert_eq!(notes.take(), [("reclaimed", 80 * 4096)]);
    guest.balloon.give(&[range(610, 20)], 0, &books);
    guest.balloon.reset(&books);
    assert_eq!(notes.take(), [("emptied", 0)]);
}

#[test]
fn what_is_due_goes_in_morsels_between_the_buffers_of_a_busy_guest() {
    let (mut guest, books, _runtime) = windowed(|_| ());
    assert!(!guest.balloon.flush_a_morsel(&books), "nothing waits");
    let pages = LIMIT.limit_bytes / 4096;
    guest.balloon.give(&[range(600, pages - 1)], 0, &books);
    assert!(!guest.balloon.flush_a_morsel(&books), "nothing is due");
    guest.balloon.give(&[range(700 + pages, 1)], 0, &books);
    let mut before = 0;
    while guest.balloon.flush_a_morsel(&books) {
        let now = flow(&books).discarded_bytes;
        assert!(now - before <= 64 * 4096, "{now} after {before}");
        before = now;
    }
    assert_eq!(before, LIMIT.limit_bytes);
    assert_eq!(guest.host_pages(), 2048 - pages);
}

#[test]
fn small_gaps_that_are_empty_already_are_bridged() {
    let (mut guest, books, _runtime) = windowed(|_| ());
    guest.balloon.give(&[range(600, 4)], 0, &books);
    guest.balloon.drain(&books);
    guest
        .balloon
        .give(&[range(590, 10), range(604, 10), range(700, 1)], 0, &books);
    guest.balloon.drain(&books);
    assert_eq!(flow(&books).discarded_bytes, 25 * 4096);
    assert_eq!(books.total().discard_ranges, 1 + 2);
}

#[test]
fn a_frame_that_waits_is_held_again_when_a_page_is_taken() {
    let (mut guest, books, _runtime) = windowed(huge);
    guest.balloon.give(&[range(512, 1024)], 0, &books);
    assert_eq!(flow(&books).pending_bytes, 1024 * 4096);
    guest.balloon.take(&[range(700, 12)], 0, &books);
    let after = flow(&books);
    assert_eq!(after.pending_bytes, 512 * 4096);
    assert_eq!(
        (after.held_bytes, after.withdrawn_bytes),
        (500 * 4096, 12 * 4096)
    );
    guest.balloon.drain(&books);
    assert_eq!(guest.host_pages(), 2048 - 512);
}

#[test]
fn inhibiting_discards_what_was_acknowledged_before_and_nothing_after() {
    let (mut guest, books, _runtime) = windowed(|_| ());
    guest.balloon.give(&[range(600, 10)], 0, &books);
    guest.balloon.set_inhibited(true, &books);
    guest.balloon.give(&[range(700, 10)], 0, &books);
    guest.balloon.drain(&books);
    let after = flow(&books);
    assert_eq!(
        (after.discarded_bytes, after.skipped_inhibited_bytes),
        (40960, 40960)
    );
    assert_eq!(guest.host_pages(), 2048 - 10);
}

#[test]
fn reset_gives_waiting_pages_back_untouched() {
    let (mut guest, books, _runtime) = windowed(|_| ());
    guest.balloon.give(&[range(600, 10)], 0, &books);
    guest.balloon.reset(&books);
    guest.balloon.drain(&books);
    let after = flow(&books);
    assert_eq!((after.withdrawn_bytes, after.pending_bytes), (40960, 0));
    assert_eq!(guest.host_pages(), 2048);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Single pages in any order, some of them twice or nowhere, are what the same pages are as ranges.
    #[test]
    fn pages_that_wait_unsorted_are_what_they_are_sorted(
        lists in prop::collection::vec(prop::collection::vec(400u64..2700, 0..300), 1..6),
    ) {
        let mut seen = Vec::new();
        for unsorted in [true, false] {
            let (mut guest, books, _runtime) = windowed(|_| ());
            guest.balloon.set_write_behind(
                WriteBehind { limit_bytes: 1 << 40, ..LIMIT },
                &books,
            );
            for list in &lists {
                let mut pages: Vec<Pfn> = list.iter().copied().map(Pfn).collect();
                let mut ranges = Vec::new();
                if unsorted {
                    guest.balloon.give_pages(&mut pages, &mut ranges, &books);
                } else {
                    let duplicates = coalesce_pages(&mut pages, &mut ranges);
                    guest.balloon.give(&ranges, duplicates, &books);
                }
            }
            let waiting = flow(&books);
            guest.balloon.drain(&books);
            let mut runs = Vec::new();
            guest.balloon.runs(|run| runs.push(run));
            let ranges = books.total().discard_ranges;
            let discarded = flow(&books).discarded_bytes;
            seen.push((waiting, discarded, runs, ranges, guest.host_pages()));
        }
        prop_assert_eq!(&seen[0], &seen[1]);
    }

    /// I1 and I4 with flushes under way: what the guest wrote to pages it owns stays, in frames too.
    #[test]
    fn pages_taken_back_keep_what_the_guest_writes(
        frames: bool,
        steps in prop::collection::vec((0u8..5, 512u64..2560, 1u64..900), 1..40),
    ) {
        let (mut guest, books, _runtime) = windowed(|region| if frames { huge(region) });
        let mut ballooned = BTreeSet::new();
        let mut written: BTreeMap<u64, u8> = BTreeMap::new();
        for (number, (action, start, pages)) in steps.into_iter().enumerate() {
            let run = range(start, pages.min(2560 - start));
            match action {
                0 | 1 => {
                    guest.balloon.give(&[run], 0, &books);
                    for page in run.start.0..run.end.0 {
                        ballooned.insert(page);
                        written.remove(&page);
                    }
                    guest.balloon.flush_if_due(action == 1, false, &books, || ());
                }
                2 => {
                    guest.balloon.take(&[run], 0, &books);
                    // The acknowledgement: from here on the guest uses its pages.
                    for page in run.start.0..run.end.0 {
                        if ballooned.remove(&page) {
                            guest.write(page, number as u8 + 1);
                            written.insert(page, number as u8 + 1);
                        }
                    }
                }
                3 => guest.balloon.drain(&books),
                _ => {
                    guest.balloon.flush_if_due(false, true, &books, || ());
                    for _ in 0..pages % 32 {
                        guest.balloon.flush_a_morsel(&books);
                    }
                }
            }
            flow(&books);
            prop_assert_eq!(guest.balloon.ballooned_bytes(), ballooned.len() as u64 * 4096);
        }
        guest.balloon.drain(&books);
        prop_assert_eq!(flow(&books).pending_bytes, 0);
        for (page, value) in written {
            prop_assert_eq!(guest.read(page), value, "page {}", page);
        }
    }
}
