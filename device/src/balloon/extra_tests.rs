//! A balloon that may go below zero.

use super::*;
use crate::balloon::Balloon;
use crate::discard::Discarder;
use crate::discard::probe::Capabilities;
use crate::memory::tests::heap_memory_with;
use crate::memory::{GuestMemory, Pfn};
use std::sync::Arc;

const PAGE: u64 = 4096;
/// Where the extra region begins.
const EXTRA: u64 = 64;

/// 64 pages, and 16 that the guest did not boot with.
fn memory() -> Arc<GuestMemory> {
    heap_memory_with(&[(0, EXTRA * PAGE), (EXTRA * PAGE, 16 * PAGE)], |region| {
        region.extra = region.gpa.0 != 0;
    })
}

fn balloon() -> (Balloon, Books) {
    let discarder = Discarder::inline(Arc::new(Capabilities::probe().unwrap()));
    (Balloon::new(memory(), discarder), Books::new(1))
}

fn page(number: u64) -> PfnRange {
    PfnRange::new(Pfn(number), 1)
}

fn size(balloon: &Balloon) -> (u64, u64) {
    (
        balloon.ballooned_bytes() / PAGE,
        balloon.extra_bytes() / PAGE,
    )
}

#[test]
fn a_page_that_was_named_is_not_taken_again() {
    let pages: Vec<_> = [5, 9, 7, 9, 5].map(page).to_vec();
    assert_eq!(distinct(&pages), 3);
    assert_eq!(distinct(&pages[..3]), 3);
    assert_eq!(distinct(&[]), 0);
}

#[test]
fn the_size_is_what_was_given_less_what_was_got() {
    let (mut balloon, books) = balloon();
    balloon.set_extra_grant(3 * PAGE);
    assert_eq!(size(&balloon), (0, 0));
    let extra: Vec<_> = (EXTRA..EXTRA + 8).map(page).collect();
    assert_eq!(balloon.takeable(&extra, false), 0, "not negotiated");
    assert_eq!(balloon.takeable(&extra, true), 3);
    balloon.take(&[PfnRange::new(Pfn(EXTRA), 3)], 0, &books);
    assert_eq!(size(&balloon), (0, 3));
    assert_eq!(
        balloon.takeable(&extra[3..], true),
        0,
        "the grant is used up"
    );
    balloon.give(&[PfnRange::new(Pfn(0), 5)], 0, &books);
    assert_eq!(size(&balloon), (2, 0));
    assert_eq!(balloon.takeable(&extra[3..], true), 5);
    balloon.set_extra_grant(0);
    assert_eq!(balloon.takeable(&extra[3..], true), 2, "down to zero");
    assert!(books.total().balloon.balances());
}

#[test]
fn pages_are_the_guests_or_the_balloons_but_never_in_part() {
    let (mut balloon, books) = balloon();
    balloon.give(&[PfnRange::new(Pfn(8), 4)], 0, &books);
    let of_four = |number| PfnRange::new(Pfn(number), 4);
    assert_eq!(balloon.ballooned(&[of_four(8)], false), 1);
    assert_eq!(balloon.ballooned(&[of_four(6)], false), 0);
    assert!(balloon.are_the_guests(&[of_four(0), of_four(4)]));
    assert!(!balloon.are_the_guests(&[of_four(4), of_four(4)]));
    assert!(!balloon.are_the_guests(&[of_four(6)]));
    assert!(
        !balloon.are_the_guests(&[of_four(EXTRA)]),
        "in the balloon from the start"
    );
    assert!(!balloon.is_memory(of_four(EXTRA + 14)));
}

#[test]
fn a_reset_discards_what_was_handed_out() {
    let (mut balloon, books) = balloon();
    balloon.set_extra_grant(16 * PAGE);
    balloon.take(&[PfnRange::new(Pfn(EXTRA + 2), 5)], 0, &books);
    let address = crate::memory::Gpa((EXTRA + 3) * PAGE);
    let slice = balloon.memory().slice_prefix(address, 1).unwrap();
    slice.write(0, &[7]);
    balloon.reset(&books);
    assert_eq!(size(&balloon), (0, 0));
    let mut byte = [1];
    let slice = balloon.memory().slice_prefix(address, 1).unwrap();
    slice.read(0, &mut byte);
    assert_eq!(byte, [0], "discarded");
    assert_eq!(books.total().balloon.discarded_bytes, 5 * PAGE);
    assert!(books.total().balloon.balances());
}

/// I3: what a reset costs is not the guest's choice.
#[test]
fn scattered_pages_are_taken_back_in_one_call_a_region() {
    let (mut balloon, books) = balloon();
    balloon.set_extra_grant(16 * PAGE);
    let scattered: Vec<_> = (0..8).map(|number| page(EXTRA + 2 * number)).collect();
    balloon.take(&scattered, 0, &books);
    for page in &scattered {
        let slice = balloon
            .memory()
            .slice_prefix(crate::memory::Gpa(page.start.0 * PAGE), 1)
            .unwrap();
        slice.write(0, &[7]);
    }
    balloon.reset(&books);
    assert_eq!(size(&balloon), (0, 0));
    let total = books.total();
    assert_eq!((total.discard_calls, total.discard_ranges), (1, 1));
    assert_eq!(total.balloon.discarded_bytes, 8 * PAGE);
    assert_eq!(total.balloon.requested_bytes, 8 * PAGE);
    assert!(total.balloon.balances());
    for page in &scattered {
        let mut byte = [1];
        let slice = balloon
            .memory()
            .slice_prefix(crate::memory::Gpa(page.start.0 * PAGE), 1)
            .unwrap();
        slice.read(0, &mut byte);
        assert_eq!(byte, [0], "discarded");
    }
}

#[test]
fn memory_that_is_plugged_in_later_begins_in_the_balloon_too() {
    let (mut balloon, books) = balloon();
    balloon.set_extra_grant(16 * PAGE);
    balloon.take(&[PfnRange::new(Pfn(EXTRA), 4)], 0, &books);
    let places = [
        (0, EXTRA * PAGE),
        (EXTRA * PAGE, 16 * PAGE),
        (1 << 20, 8 * PAGE),
    ];
    let larger = heap_memory_with(&places, |region| region.extra = region.gpa.0 != 0);
    balloon.set_memory(larger, &books);
    assert_eq!(size(&balloon), (0, 4), "what was handed out stays so");
    assert_eq!(balloon.takeable(&[page(1 << 8)], true), 1);
}
