//! Huge frames: what is smaller than a page of the host is held until the frame is complete, across
//! buffers and kicks, and the books tell of it (design, "Huge frames"; invariant I4).
//!
//! With huge pages on the host (hugetlb) the memory is real; without, a region of ordinary memory
//! is declared to have pages of 2 MiB, which the library has to treat the same way.
#![expect(
    clippy::cast_possible_truncation,
    reason = "page frame numbers and sizes of these guests are small"
)]

use aerostat_tests::vmm::allocator::Order;
use aerostat_tests::vmm::mapping::{Backing, Mapping};
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::working_set::WorkingSet;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};

const FRAME: u64 = 2 * MIB;
const PAGES: u64 = FRAME / PAGE_BYTES;
/// Where the region with huge frames begins.
const HIGH: u64 = 64 * MIB;
const FIRST: u64 = HIGH / PAGE_BYTES;

/// A guest with its rings in ordinary memory, and 16 MiB in frames of 2 MiB.
fn boot(vmm: &Vmm, backing: Backing) -> Result<Guest> {
    let frames = RegionSpec {
        page_size_bytes: FRAME,
        ..RegionSpec::new(HIGH, 16 * MIB, backing)
    };
    let low = RegionSpec::new(0, 8 * MIB, Backing::Anonymous);
    vmm.boot(&GuestConfig::with_regions(vec![low, frames]))
}

fn backings() -> Vec<Backing> {
    let mut backings = vec![Backing::Memfd { offset_bytes: 0 }, Backing::Anonymous];
    match huge_pages_free() {
        Some(8..) => backings.push(Backing::Hugetlb),
        _ => println!("the host has no huge pages to spare: tested on declared frames only"),
    }
    backings
}

fn huge_pages_free() -> Option<u64> {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Pages of the n-th frame.
fn frame(n: u64) -> Vec<u64> {
    (FIRST + n * PAGES..FIRST + (n + 1) * PAGES).collect()
}

fn fill(guest: &Guest) -> WorkingSet {
    let pages = (FIRST..FIRST + 8 * PAGES).collect();
    WorkingSet::fill(guest.ram(), pages, 8)
}

#[test]
fn a_frame_is_freed_when_its_last_page_comes() -> Result<()> {
    for backing in backings() {
        let vmm = Vmm::new()?;
        let guest = boot(&vmm, backing)?;
        let contents = fill(&guest);
        let full = guest.ram().allocated_bytes()?;
        let (most, last) = (
            &frame(1)[..PAGES as usize - 1],
            frame(1)[PAGES as usize - 1],
        );

        guest.driver().give(most)?;
        let books = guest.settled_books()?.balloon;
        assert_eq!(
            (books.held_bytes, books.discarded_bytes),
            (FRAME - PAGE_BYTES, 0)
        );
        guest.assert_intact(&contents);

        guest.driver().give(&[last])?;
        let books = guest.settled_books()?.balloon;
        assert_eq!((books.held_bytes, books.discarded_bytes), (0, FRAME));
        // The driver's own memory may have grown by a page or two.
        assert!(full - guest.ram().allocated_bytes()? >= FRAME * 99 / 100);
        assert_eq!(
            contents.damaged(guest.ram()),
            frame(1),
            "that frame and no other"
        );
    }
    Ok(())
}

/// Pages that are taken back from an incomplete frame were never gone; those of a complete one
/// reopen it: the rest counts as held again, and the frame is freed anew when it is complete again.
#[test]
fn taking_a_page_back_withdraws_or_reopens() -> Result<()> {
    for backing in backings() {
        let vmm = Vmm::new()?;
        let guest = boot(&vmm, backing)?;
        let contents = fill(&guest);
        let pages = frame(2);

        guest.driver().give(&pages[..300])?;
        guest.driver().take(&pages[100..200])?;
        let books = guest.settled_books()?.balloon;
        assert_eq!(books.held_bytes, 200 * PAGE_BYTES);
        assert_eq!(books.withdrawn_bytes, 100 * PAGE_BYTES);
        guest.assert_intact(&contents);

        guest.driver().give(&pages[100..200])?;
        guest.driver().give(&pages[300..])?;
        assert_eq!(guest.settled_books()?.balloon.discarded_bytes, FRAME);

        guest.driver().take(&pages[7..8])?;
        let books = guest.settled_books()?.balloon;
        assert_eq!(books.held_bytes, FRAME - PAGE_BYTES);
        assert_eq!(books.reopened_bytes, FRAME - PAGE_BYTES);
        // I1: the guest's page is not touched by whatever comes next.
        let mine = WorkingSet::fill(guest.ram(), pages[7..8].to_vec(), 4);
        guest.driver().give(&frame(3))?;
        guest.assert_intact(&mine);

        guest.driver().give(&pages[7..8])?;
        let books = guest.settled_books()?;
        assert_eq!(books.balloon.held_bytes, 0);
        assert_eq!(books.balloon.discarded_bytes, 3 * FRAME);
        assert_eq!(books.returned_bytes, 101 * PAGE_BYTES);
    }
    Ok(())
}

/// Linux's arrays of 1 MiB never fill a frame by themselves; scattered ones fill them in the end.
#[test]
fn scattered_pages_free_all_frames_in_the_end() -> Result<()> {
    for backing in backings() {
        let vmm = Vmm::new()?;
        let guest = boot(&vmm, backing)?;
        fill(&guest);
        let full = guest.ram().allocated_bytes()?;
        let low: Vec<u64> = guest
            .driver()
            .allocator
            .unused()
            .filter(|pfn| *pfn < FIRST)
            .collect();
        for pfn in low {
            guest.driver().allocator.take(pfn);
        }
        guest.driver().allocator.set_order(Order::Random(3));
        for _ in 0..16 {
            guest.driver().fill(256)?;
            let books = guest.books()?.balloon;
            assert_eq!(books.held_bytes % PAGE_BYTES, 0);
        }
        let books = guest.settled_books()?.balloon;
        assert_eq!((books.held_bytes, books.discarded_bytes), (0, 16 * MIB));
        assert!(full - guest.ram().allocated_bytes()? >= 16 * MIB * 99 / 100);

        while guest.driver().leak(256)? > 0 {
            guest.books()?;
        }
        let books = guest.settled_books()?;
        assert_eq!(books.balloon.held_bytes, 0);
        assert_eq!(books.balloon.reopened_bytes, books.balloon.withdrawn_bytes);
        assert_eq!(books.returned_bytes, 16 * MIB);
    }
    Ok(())
}

#[test]
fn reports_of_less_than_a_frame_are_left_alone() -> Result<()> {
    for backing in backings() {
        let vmm = Vmm::new()?;
        let guest = boot(&vmm, backing)?;
        let contents = fill(&guest);
        // Half of frame 0, all of 1 and 2, a page of 3.
        guest
            .driver()
            .report(&[(FIRST + PAGES / 2, 2 * PAGES + PAGES / 2 + 1)])?;
        let books = guest.settled_books()?.report;
        assert_eq!(books.discarded_bytes, 2 * FRAME);
        assert_eq!(books.skipped_partial_bytes, FRAME / 2 + PAGE_BYTES);
        assert_eq!(contents.damaged(guest.ram()), [frame(1), frame(2)].concat());
    }
    Ok(())
}

#[test]
fn reset_and_memory_changes_forget_what_was_held() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, Backing::Anonymous)?;
    let contents = fill(&guest);
    guest.driver().give(&frame(1)[..100])?;
    assert_eq!(guest.books()?.balloon.held_bytes, 100 * PAGE_BYTES);
    guest.restart_driver()?;
    let books = guest.books()?.balloon;
    assert_eq!(
        (books.held_bytes, books.withdrawn_bytes),
        (0, 100 * PAGE_BYTES)
    );

    guest.driver().give(&frame(2)[..50])?;
    guest.change_memory(None, Some(HIGH))?;
    let books = guest.books()?.balloon;
    assert_eq!(
        (books.held_bytes, books.withdrawn_bytes),
        (0, 150 * PAGE_BYTES)
    );
    assert_eq!(guest.device().query()?.ballooned_bytes, 0);
    let _ = contents;
    Ok(())
}

/// Frames that were complete while discarding was inhibited are counted as skipped, once.
#[test]
fn frames_that_complete_while_inhibited_are_skipped() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot(&vmm, Backing::Memfd { offset_bytes: 0 })?;
    let contents = fill(&guest);
    guest.driver().give(&frame(0)[..200])?;
    guest.device().inhibit()?;
    guest.driver().give(&frame(0)[200..])?;
    let books = guest.settled_books()?.balloon;
    assert_eq!(
        (books.skipped_inhibited_bytes, books.held_bytes),
        (FRAME, 0)
    );
    guest.assert_intact(&contents);
    guest.device().uninhibit()?;
    guest.driver().take(&frame(0)[..1])?;
    guest.driver().give(&frame(0)[..1])?;
    assert_eq!(guest.settled_books()?.balloon.discarded_bytes, FRAME);
    Ok(())
}

/// The mapping that these tests rely on has the alignment that frames need.
#[test]
fn mappings_are_aligned_to_frames() -> Result<()> {
    for backing in backings() {
        let mapping = Mapping::new("frames", backing, FRAME)?;
        assert!((mapping.base() as usize).is_multiple_of(FRAME as usize));
        assert_eq!(mapping.len_bytes(), FRAME);
    }
    Ok(())
}
