//! Inflating and deflating: what a guest gives is free on the host, what it keeps is untouched, and
//! what it takes back is usable (requirements S7, A1, A5; invariants I1, I4; issue "Done when").

use aerostat_tests::vmm::allocator::Order;
use aerostat_tests::vmm::books::accepted;
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::working_set::WorkingSet;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use std::time::Duration;

/// Fills a guest, gives 3/4 of what is unused, measures, and takes it all back.
///
/// Host memory is measured from outside: blocks of the memfd, or the resident set of the mapping.
fn gives_and_takes_back(config: &GuestConfig) -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(config)?;
    let working_set = fill(&guest, 1000)?;
    let unused = guest.driver().allocator.unused_pages();
    let given = unused * 3 / 4 * PAGE_BYTES;

    let full = guest.ram().allocated_bytes()?;
    guest.balloon_to(given)?;
    let books = guest.settled_books()?;
    let left = guest.ram().allocated_bytes()?;

    assert_eq!(guest.device().query()?.actual_bytes, given);
    assert_eq!(guest.device().query()?.ballooned_bytes, given);
    assert_eq!(books.balloon.requested_bytes, given);
    assert_eq!(books.balloon.discarded_bytes, given);
    let freed = full.saturating_sub(left);
    assert!(
        freed * 100 >= given * 99,
        "{freed} of {given} bytes came back ({full} -> {left}) on {config:?}"
    );
    assert_eq!(working_set.damaged(guest.ram()), [] as [u64; 0]);

    let ballooned = guest.driver().balloon().to_vec();
    guest.balloon_to(0)?;
    let books = guest.settled_books()?;
    assert_eq!(guest.device().query()?.ballooned_bytes, 0);
    assert_eq!(books.returned_bytes, given);
    assert_eq!(accepted(&books.balloon), given);
    for pfn in &ballooned {
        assert!(guest.ram().page_is(*pfn, |_| 0), "page {pfn:#x} has no zeros");
    }
    // They are the guest's again: what it writes stays.
    let second = WorkingSet::fill(guest.ram(), ballooned, 77);
    guest.driver().fill(256)?;
    let given: Vec<u64> = guest.driver().balloon().to_vec();
    let lost = second.damaged(guest.ram());
    assert!(lost.iter().all(|pfn| given.contains(pfn)), "{lost:?}");
    assert_eq!(working_set.damaged(guest.ram()), [] as [u64; 0]);
    guest.settled_books()?;
    Ok(())
}

/// Allocates all of the guest's memory on the host, and keeps `pages` of it with known contents.
fn fill(guest: &Guest, pages: u64) -> Result<WorkingSet> {
    let mut driver = guest.driver();
    let set = WorkingSet::allocate(guest.ram(), &mut driver.allocator, pages, 42)?;
    driver.touch_unused(u64::MAX);
    Ok(set)
}

#[test]
fn anonymous_memory_comes_back() -> Result<()> {
    gives_and_takes_back(&GuestConfig::new(Backing::Anonymous, 64))
}
