//! Give, take, report and their books, on real memory.

use super::*;
use crate::accounting::Accountant;
use crate::discard::probe::Capabilities;
use crate::memory::tests::anonymous_region;
use crate::memory::{Gpa, Pfn};
use memmap2::{MmapOptions, MmapRaw};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;

const FRAME: u64 = 512;

pub(super) struct Guest {
    pub(super) balloon: Balloon,
    books: Books,
    file: File,
    map: MmapRaw,
}

/// A guest on a file of 8 MiB at guest address 2 MiB, all of it touched.
pub(super) fn guest(change: impl Fn(&mut Region)) -> Guest {
    const BYTES: u64 = 8 << 20;
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(BYTES).unwrap();
    // Mapped two MiB longer than needed, to find a place that suits a huge frame.
    let map = MmapOptions::new()
        .len((BYTES + (2 << 20)) as usize)
        .map_raw(&file)
        .unwrap();
    for offset in (0..BYTES as usize).step_by(4096) {
        // SAFETY: inside the file's part of the mapping; nothing else refers to it.
        unsafe { map.as_mut_ptr().add(offset).write_volatile(1) };
    }
    let mut region = Region {
        gpa: Gpa(2 << 20),
        len_bytes: BYTES,
        hva: map.as_mut_ptr() as usize,
        fd: Some(Arc::new(file.try_clone().unwrap().into())),
        shared: true,
        ..anonymous_region()
    };
    change(&mut region);
    // Only the address has to look aligned to a huge frame: memory is freed through the file.
    region.hva = region.hva.next_multiple_of(region.page_size_bytes as usize);
    // SAFETY: the mapping lives in the guest, beside the balloon.
    let memory = unsafe { GuestMemory::new(vec![region]) }.unwrap();
    let discarder = Discarder::inline(Arc::new(Capabilities::probe().unwrap()));
    Guest {
        balloon: Balloon::new(memory, discarder),
        books: Books::new(1),
        file,
        map,
    }
}

pub(super) fn huge(region: &mut Region) {
    region.page_size_bytes = FRAME * 4096;
}

pub(super) fn range(start: u64, pages: u64) -> PfnRange {
    PfnRange::new(Pfn(start), pages)
}

impl Guest {
    fn give(&mut self, ranges: &[PfnRange]) -> Flow {
        self.balloon.give(ranges, 0, &self.books);
        self.flow()
    }

    /// The byte of a page of the region, which the file begins with.
    fn byte(&self, page: u64) -> *mut u8 {
        assert!((512..2560).contains(&page));
        self.map
            .as_mut_ptr()
            .wrapping_add((page as usize - 512) * 4096 + 7)
    }

    pub(super) fn write(&self, page: u64, value: u8) {
        // SAFETY: inside the file's part of the mapping; nothing else refers to it.
        unsafe { self.byte(page).write_volatile(value) };
    }

    pub(super) fn read(&self, page: u64) -> u8 {
        // SAFETY: as for `write`.
        unsafe { self.byte(page).read_volatile() }
    }

    fn take(&mut self, ranges: &[PfnRange]) -> Flow {
        self.balloon.take(ranges, 0, &self.books);
        self.flow()
    }

    fn flow(&self) -> Flow {
        let total = self.books.total();
        assert!(
            total.balloon.balances() && total.report.balances(),
            "{total:?}"
        );
        assert_eq!(total.balloon.pending_bytes, 0);
        total.balloon
    }

    pub(super) fn host_pages(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512 / 4096
    }
}

#[test]
fn given_pages_leave_the_host_and_nothing_else_does() {
    let mut guest = guest(|_| ());
    assert_eq!(guest.host_pages(), 2048);
    let flow = guest.give(&[range(512, 3), range(1000, 100)]);
    assert_eq!(flow.discarded_bytes, 103 * 4096);
    assert_eq!(guest.host_pages(), 2048 - 103);
    assert_eq!(guest.balloon.ballooned_bytes(), 103 * 4096);
}

#[test]
fn each_reason_has_its_counter() {
    let mut guest = guest(|_| ());
    // 100 pages before the region, 2048 in it, 100 behind it.
    let flow = guest.give(&[range(412, 2248)]);
    assert_eq!(flow.requested_bytes, 2248 * 4096);
    assert_eq!(flow.skipped_out_of_range_bytes, 200 * 4096);
    assert_eq!(flow.discarded_bytes, 2048 * 4096);
    assert_eq!(
        guest.give(&[range(600, 10)]).skipped_duplicate_bytes,
        10 * 4096
    );
    guest.take(&[range(600, 10), range(600 + (1 << 40), 7)]);
    let total = guest.books.total();
    assert_eq!(
        (total.returned_bytes, total.rejected_take_bytes),
        (10 * 4096, 7 * 4096)
    );
    guest.balloon.set_inhibited(true, &guest.books);
    assert_eq!(
        guest.give(&[range(600, 10)]).skipped_inhibited_bytes,
        10 * 4096
    );
}

#[test]
fn pinned_and_readonly_regions_are_left_alone() {
    let mut pinned = guest(|region| region.pinned = true);
    assert_eq!(pinned.give(&[range(512, 8)]).skipped_pinned_bytes, 8 * 4096);
    assert_eq!(
        (pinned.host_pages(), pinned.balloon.ballooned_bytes()),
        (2048, 8 * 4096)
    );
    let mut rom = guest(|region| region.readonly = true);
    assert_eq!(
        rom.give(&[range(512, 8)]).skipped_out_of_range_bytes,
        8 * 4096
    );
    assert_eq!((rom.host_pages(), rom.balloon.ballooned_bytes()), (2048, 0));
}

#[test]
fn failed_calls_are_not_counted_as_freed() {
    // Without a descriptor the region is removed by address, and the address is not mapped.
    let mut guest = guest(|region| {
        region.fd = None;
        region.hva = 0x1000;
    });
    let flow = guest.give(&[range(512, 8), range(600, 8)]);
    assert_eq!(
        (flow.skipped_failed_bytes, flow.discarded_bytes),
        (16 * 4096, 0)
    );
}

#[test]
fn a_frame_is_freed_when_its_last_page_comes() {
    let mut guest = guest(huge);
    let flow = guest.give(&[range(512, 511), range(1024, 1)]);
    assert_eq!((flow.held_bytes, flow.discarded_bytes), (512 * 4096, 0));
    assert_eq!(guest.host_pages(), 2048);
    let flow = guest.give(&[range(1023, 1)]);
    assert_eq!((flow.held_bytes, flow.discarded_bytes), (4096, 512 * 4096));
    assert_eq!(guest.host_pages(), 2048 - 512);
    // Two runs of one frame in one batch complete it once.
    let flow = guest.give(&[range(1025, 200), range(1226, 310)]);
    assert_eq!(flow.held_bytes, 511 * 4096);
    assert_eq!(guest.give(&[range(1225, 1)]).discarded_bytes, 1024 * 4096);
}

#[test]
fn taking_from_a_frame_reopens_or_withdraws() {
    let mut guest = guest(huge);
    guest.give(&[range(512, 512), range(1024, 10)]);
    let flow = guest.take(&[range(600, 2), range(1030, 4)]);
    assert_eq!(flow.reopened_bytes, 510 * 4096);
    assert_eq!(flow.withdrawn_bytes, 4 * 4096);
    assert_eq!(flow.held_bytes, (510 + 6) * 4096);
    let flow = guest.give(&[range(600, 2)]);
    assert_eq!(
        (flow.discarded_bytes, flow.held_bytes),
        (1024 * 4096, 6 * 4096)
    );
}

/// I1, S7: a page may be in use again from its acknowledgement on.
#[test]
fn a_frame_of_a_driver_that_does_not_tell_is_freed_if_it_comes_at_once() {
    let mut guest = guest(huge);
    guest.balloon.set_told(false, &guest.books);
    let flow = guest.give(&[range(512, 511), range(1024, 512)]);
    assert_eq!(flow.skipped_partial_bytes, 511 * 4096);
    assert_eq!((flow.held_bytes, flow.discarded_bytes), (0, 512 * 4096));
    // The guest has written to the others meanwhile.
    let flow = guest.give(&[range(1023, 1)]);
    assert_eq!(flow.skipped_partial_bytes, 512 * 4096);
    assert_eq!(guest.host_pages(), 2048 - 512);
    // Not even the frame that was free once.
    guest.take(&[range(1030, 1)]);
    let flow = guest.give(&[range(1030, 1)]);
    assert_eq!(flow.skipped_partial_bytes, 513 * 4096);
    assert_eq!(guest.balloon.ballooned_bytes(), 1024 * 4096);
    assert_eq!((flow.reopened_bytes, flow.withdrawn_bytes), (0, 0));
}

#[test]
fn what_is_held_follows_what_the_driver_promised() {
    let mut guest = guest(huge);
    guest.give(&[range(512, 10)]);
    guest.balloon.set_told(false, &guest.books);
    let flow = guest.flow();
    assert_eq!((flow.held_bytes, flow.withdrawn_bytes), (0, 10 * 4096));
    guest.balloon.set_told(true, &guest.books);
    assert_eq!(guest.flow().held_bytes, 10 * 4096);
}

#[test]
fn reports_free_whole_frames_only_and_leave_ownership_alone() {
    let mut guest = guest(huge);
    guest
        .balloon
        .report(&[range(500, 600)], 0, false, &guest.books);
    let report = guest.books.total().report;
    assert_eq!(report.discarded_bytes, 512 * 4096);
    assert_eq!(report.skipped_out_of_range_bytes, 12 * 4096);
    assert_eq!(report.skipped_partial_bytes, 76 * 4096);
    guest
        .balloon
        .report(&[range(1024, 512)], 3, true, &guest.books);
    assert_eq!(guest.books.total().report.discarded_bytes, 512 * 4096);
    assert_eq!(guest.balloon.ballooned_bytes(), 0);
    guest.flow();
}

#[test]
fn a_report_is_left_when_somebody_waits_for_the_device() {
    for frames in [false, true] {
        let change = |region: &mut Region| {
            if frames {
                huge(region);
            }
        };
        let mut guest = guest(change);
        let waiting = Arc::<Waiting>::default();
        guest.balloon.heed(Arc::clone(&waiting));
        let all = [range(512, FRAME), range(1024, 1536)];
        guest.balloon.report(&all, 0, false, &guest.books);
        let before = guest.books.total().report;
        assert_eq!(before.discarded_bytes, 2048 * 4096, "nobody waits");

        waiting.come();
        guest.balloon.report(&all, 0, false, &guest.books);
        let report = guest.books.total().report;
        let discarded = report.discarded_bytes - before.discarded_bytes;
        assert_eq!(discarded, 1024 * 4096, "what was begun is finished");
        assert_eq!(report.skipped_inhibited_bytes, 1024 * 4096);
        assert_eq!(report.pending_bytes, 0);
        guest.flow();
    }
}

#[test]
fn a_new_table_keeps_what_it_still_has() {
    let mut guest = guest(huge);
    guest.give(&[range(512, 600)]);
    let old = guest.balloon.memory().regions()[0].clone();
    // SAFETY: half of what was mapped before.
    let half = unsafe {
        GuestMemory::new(vec![Region {
            len_bytes: 2 << 20,
            ..old.clone()
        }])
    };
    guest.balloon.set_memory(half.unwrap(), &guest.books);
    assert_eq!(guest.balloon.ballooned_bytes(), 512 * 4096);
    assert_eq!(guest.flow().withdrawn_bytes, 88 * 4096);
    guest.balloon.reset(&guest.books);
    assert_eq!(
        (guest.balloon.ballooned_bytes(), guest.flow().held_bytes),
        (0, 0)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// I4 and the ownership bitmap against a set, with and without frames.
    #[test]
    fn books_balance_whatever_the_guest_does(
        frames: bool,
        told: bool,
        steps in prop::collection::vec((any::<bool>(), 400u64..2700, 1u64..700), 1..30),
    ) {
        let mut guest = guest(|region| if frames { huge(region) });
        guest.balloon.set_told(told, &guest.books);
        let mut model = BTreeSet::new();
        for (give, start, pages) in steps {
            let inside = (start..start + pages).filter(|page| (512..2560).contains(page));
            if give {
                guest.give(&[range(start, pages)]);
                model.extend(inside);
            } else {
                guest.take(&[range(start, pages)]);
                inside.for_each(|page| { model.remove(&page); });
            }
            let flow = guest.flow();
            prop_assert_eq!(guest.balloon.ballooned_bytes(), model.len() as u64 * 4096);
            let held: u64 = (1..5).map(|frame| {
                let pages = model.range(frame * FRAME..(frame + 1) * FRAME).count() as u64;
                if frames && told && pages < FRAME { pages * 4096 } else { 0 }
            }).sum();
            prop_assert_eq!(flow.held_bytes, held);
        }
    }
}

impl Guest {
    /// Offers pages and settles; returns the places of those refused.
    fn offer(&mut self, pages: impl IntoIterator<Item = u64>, limit_pages: u64) -> Vec<usize> {
        let pages: Vec<Pfn> = pages.into_iter().map(Pfn).collect();
        let mut refused = Vec::new();
        self.balloon
            .offer(&pages, 1, limit_pages, &self.books, |place, _| {
                refused.push(place);
            });
        // In between the books balance too: what is taken is pending.
        assert!(self.books.total().balloon.balances());
        self.balloon.settle(&self.books);
        refused
    }
}

#[test]
fn offers_over_the_limit_are_refused_in_the_order_of_the_guest() {
    let mut guest = guest(|_| ());
    assert_eq!(guest.offer((600..620).rev(), 15), [15, 16, 17, 18, 19]);
    assert_eq!(guest.host_pages(), 2048 - 15);
    let flow = guest.flow();
    assert_eq!(flow.skipped_over_target_bytes, 5 * 4096);
    assert_eq!(guest.books.total().refused_bytes, 5 * 4096);
    // The limit counts what is in the balloon, not what was offered.
    guest.take(&[range(605, 4)]);
    assert_eq!(guest.offer(700..705, 15), [4]);
}

#[test]
fn each_reason_to_refuse_has_its_counter_and_the_sum_tells_all() {
    let mut guest = guest(|_| ());
    // Out of memory, taken, twice, at the end of what a number can say.
    assert_eq!(guest.offer([511, 512, 512, u64::MAX], 2048), [0, 2, 3]);
    guest.balloon.set_inhibited(true, &guest.books);
    assert_eq!(guest.offer([513, 512], 2048), [0, 1]);
    let flow = guest.flow();
    assert_eq!(flow.skipped_out_of_range_bytes, 2 * 4096);
    assert_eq!(flow.skipped_duplicate_bytes, 2 * 4096);
    assert_eq!(flow.skipped_inhibited_bytes, 4096);
    assert_eq!(guest.books.total().refused_bytes, flow.skipped_bytes());
    assert_eq!(guest.balloon.ballooned_bytes(), 4096);
}

#[test]
fn offers_of_pinned_and_readonly_pages_stay_the_guests() {
    let mut pinned = guest(|region| region.pinned = true);
    assert_eq!(pinned.offer(512..514, 2048), [0, 1]);
    assert_eq!(pinned.flow().skipped_pinned_bytes, 2 * 4096);
    assert_eq!(pinned.balloon.ballooned_bytes(), 0);
    let mut rom = guest(|region| region.readonly = true);
    assert_eq!(rom.offer(512..514, 2048), [0, 1]);
    assert_eq!(rom.flow().skipped_out_of_range_bytes, 2 * 4096);
}

#[test]
fn scattered_offers_complete_a_frame_once() {
    let mut guest = guest(huge);
    assert!(guest.offer((512..1024).rev().step_by(2), 2048).is_empty());
    assert_eq!(guest.flow().held_bytes, 256 * 4096);
    assert!(guest.offer((512..1024).step_by(2), 2048).is_empty());
    let flow = guest.flow();
    assert_eq!((flow.held_bytes, flow.discarded_bytes), (0, 512 * 4096));
    assert_eq!(guest.host_pages(), 2048 - 512);
}

/// V3, I1: whatever was discarded or held, the guest has everything back.
#[test]
fn a_host_reset_returns_all_and_withdraws_what_was_held() {
    let mut guest = guest(huge);
    guest.give(&[range(512, 512), range(1024, 10)]);
    guest.balloon.reset_by_host(&guest.books);
    let flow = guest.flow();
    assert_eq!((flow.held_bytes, flow.withdrawn_bytes), (0, 10 * 4096));
    assert_eq!(guest.balloon.ballooned_bytes(), 0);
    assert_eq!(guest.books.total().host_reset_bytes, 522 * 4096);
    // A frame that was complete before is not discarded for its last page alone.
    assert_eq!(guest.give(&[range(600, 1)]).held_bytes, 4096);
}

#[test]
fn late_pages_are_entered_without_being_looked_at() {
    let guest = guest(|_| ());
    guest.balloon.turn_away(7, false, &guest.books);
    guest.balloon.turn_away(5, true, &guest.books);
    assert_eq!(guest.flow().skipped_late_bytes, 12 * 4096);
    assert_eq!(guest.books.total().refused_bytes, 5 * 4096);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// The same with offers that may be refused, and resets by the host.
    #[test]
    fn books_balance_whatever_is_refused(
        frames: bool,
        steps in prop::collection::vec((0u8..8, 400u64..2700, 1u64..300, 0u64..1500), 1..30),
    ) {
        let mut guest = guest(|region| if frames { huge(region) });
        let mut model = BTreeSet::new();
        for (step, start, pages, limit) in steps {
            match step {
                0 => {
                    guest.balloon.reset_by_host(&guest.books);
                    model.clear();
                }
                1 | 2 => {
                    guest.take(&[range(start, pages)]);
                    (start..start + pages).for_each(|page| { model.remove(&page); });
                }
                _ => {
                    // Every third page twice, in descending order.
                    let list: Vec<u64> = (start..start + pages)
                        .rev()
                        .flat_map(|page| [page].repeat(1 + usize::from(page % 3 == 0)))
                        .collect();
                    let expected: Vec<usize> = list
                        .iter()
                        .enumerate()
                        .filter(|(_, page)| {
                            let room = (model.len() as u64) < limit;
                            let inside = (512..2560).contains(*page);
                            !(inside && room && model.insert(**page))
                        })
                        .map(|(place, _)| place)
                        .collect();
                    prop_assert_eq!(guest.offer(list, limit), expected);
                }
            }
            let flow = guest.flow();
            let total = guest.books.total();
            prop_assert_eq!(guest.balloon.ballooned_bytes(), model.len() as u64 * 4096);
            prop_assert_eq!(total.refused_bytes, flow.skipped_bytes());
            let back = total.returned_bytes + total.host_reset_bytes;
            let entered = flow.requested_bytes - flow.skipped_bytes();
            prop_assert_eq!(entered - back, model.len() as u64 * 4096);
        }
    }
}

/// Notes what it is told.
#[derive(Debug, Default)]
pub(super) struct Notes(parking_lot::Mutex<Vec<(&'static str, u64)>>);

impl Accountant for Notes {
    fn reclaimed(&self, _: Option<NodeId>, bytes: u64) {
        self.0.lock().push(("reclaimed", bytes));
    }

    fn returning(&self, _: Option<NodeId>, bytes: u64) {
        self.0.lock().push(("returning", bytes));
    }

    fn emptied(&self) {
        self.0.lock().push(("emptied", 0));
    }
}

impl Notes {
    pub(super) fn on(books: &Books) -> Arc<Self> {
        let notes = Arc::new(Self::default());
        books.set_accountant(Some(Arc::clone(&notes) as Arc<dyn Accountant>));
        notes
    }

    pub(super) fn take(&self) -> Vec<(&'static str, u64)> {
        std::mem::take(&mut self.0.lock())
    }
}

#[test]
fn an_accountant_hears_what_leaves_and_what_goes_back() {
    let mut guest = guest(|_| ());
    let notes = Notes::on(&guest.books);
    guest.give(&[range(512, 8), range(600, 8)]);
    // In the balloon already: nothing more leaves.
    guest.give(&[range(512, 8)]);
    assert_eq!(notes.take(), [("reclaimed", 16 * 4096)]);
    guest.take(&[range(604, 8)]);
    assert_eq!(notes.take(), [("returning", 4 * 4096)]);
    guest.balloon.reset(&guest.books);
    assert_eq!(notes.take(), [("emptied", 0)]);
    guest.books.set_accountant(None);
    guest.give(&[range(512, 8)]);
    assert!(notes.take().is_empty());
}

#[test]
fn an_accountant_hears_of_frames_when_they_leave_and_when_they_are_touched_again() {
    let mut guest = guest(huge);
    let notes = Notes::on(&guest.books);
    guest.give(&[range(1024, FRAME - 1)]);
    guest.take(&[range(1024, 1)]);
    assert!(notes.take().is_empty(), "what was held never left");
    guest.give(&[range(1024, 1), range(1024 + FRAME - 1, 1)]);
    assert_eq!(notes.take(), [("reclaimed", FRAME * 4096)]);
    guest.take(&[range(1024, 1)]);
    assert_eq!(notes.take(), [("returning", FRAME * 4096)]);
}
