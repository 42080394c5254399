//! Inflating and deflating: what a guest gives is free on the host, what it keeps is untouched, and
//! what it takes back is usable (requirements S7, A1, A5; invariants I1, I4).
//!
//! Host memory is measured from outside the library: blocks of the memfd (fstat), or the resident
//! set of the mapping (smaps) where there is no file.

use aerostat::{
    AEROSTAT_FEATURE_EVENT_IDX, AEROSTAT_FEATURE_INDIRECT_DESC, AEROSTAT_FEATURE_VERSION_1,
};
use aerostat_tests::vmm::allocator::Order;
use aerostat_tests::vmm::books::accepted;
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::mapping::{Backing, collapsed_bytes};
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::working_set::WorkingSet;
use aerostat_tests::vmm::{GuestConfig, MIB, PAGE_BYTES, Result, Vmm};

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };

/// Fills a guest, gives 3/4 of what is unused, measures, takes it all back, and gives again.
fn gives_and_takes_back(config: &GuestConfig) -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(config)?;
    let working_set = guest.fill_memory(1000, 42)?;
    let given = guest.driver().allocator.unused_pages() * 3 / 4 * PAGE_BYTES;

    let full = guest.ram().allocated_bytes()?;
    let collapsed = collapsed_bytes();
    guest.balloon_to(given)?;
    let books = guest.settled_books()?;
    let left = guest.ram().allocated_bytes()?;
    // What the kernel took again meanwhile was freed nevertheless.
    let taken = collapsed_bytes() - collapsed;

    let freed = (full + taken).saturating_sub(left);
    assert!(
        freed * 100 >= given * 99,
        "{freed} of {given} bytes came back ({full} -> {left}, {taken} taken again) on {config:?}"
    );
    assert_eq!(guest.device().query()?.actual_bytes, given);
    assert_eq!(guest.device().query()?.ballooned_bytes, given);
    assert_eq!(books.balloon.requested_bytes, given);
    assert_eq!(books.balloon.discarded_bytes, given);
    assert_eq!(books.chain_errors + books.broken_rings, 0);
    guest.assert_intact(&working_set);

    let ballooned = guest.driver().balloon().to_vec();
    guest.balloon_to(0)?;
    let books = guest.settled_books()?;
    assert_eq!(guest.device().query()?.ballooned_bytes, 0);
    assert_eq!(guest.device().query()?.actual_bytes, 0);
    assert_eq!(books.returned_bytes, given);
    assert_eq!(accepted(&books.balloon), given);
    let dirty = ballooned
        .iter()
        .filter(|pfn| !guest.ram().page_is(**pfn, |_| 0));
    assert_eq!(dirty.count(), 0, "pages that were freed have zeros");

    // They are the guest's again: what it writes stays, but for what it gives again.
    let second = WorkingSet::fill(guest.ram(), ballooned, 77);
    guest.driver().fill(256)?;
    let given_again = guest.driver().balloon().to_vec();
    let lost = second.damaged(guest.ram());
    assert!(lost.iter().all(|pfn| given_again.contains(pfn)), "{lost:?}");
    guest.assert_intact(&working_set);
    guest.settled_books()?;
    Ok(())
}

#[test]
fn anonymous_memory_comes_back() -> Result<()> {
    gives_and_takes_back(&GuestConfig::new(Backing::Anonymous, 64))
}

#[test]
fn anonymous_memory_in_transparent_huge_pages_comes_back() -> Result<()> {
    gives_and_takes_back(&GuestConfig::new(Backing::AnonymousHuge, 64))
}

#[test]
fn shared_anonymous_memory_comes_back_though_its_file_is_not_known() -> Result<()> {
    gives_and_takes_back(&GuestConfig::new(Backing::SharedAnonymous, 64))
}

#[test]
fn a_memfd_comes_back() -> Result<()> {
    gives_and_takes_back(&GuestConfig::new(MEMFD, 64))
}

#[test]
fn a_memfd_that_is_mapped_from_the_middle_comes_back() -> Result<()> {
    let backing = Backing::Memfd {
        offset_bytes: 5 * MIB + PAGE_BYTES,
    };
    gives_and_takes_back(&GuestConfig::new(backing, 64))
}

#[test]
fn regions_of_all_kinds_with_holes_between_them_come_back() -> Result<()> {
    let backings = [MEMFD, Backing::Anonymous, Backing::SharedAnonymous, MEMFD];
    let regions = backings.iter().zip(1..).map(|(backing, place)| {
        // Odd lengths and places: nothing is aligned to more than a page.
        RegionSpec::new(
            place * 33 * MIB + 3 * PAGE_BYTES,
            12 * MIB + PAGE_BYTES,
            *backing,
        )
    });
    gives_and_takes_back(&GuestConfig::with_regions(regions.collect()))
}

#[test]
fn pages_in_descending_order_come_back() -> Result<()> {
    let mut config = GuestConfig::new(Backing::Anonymous, 32);
    config.order = Order::Descending;
    gives_and_takes_back(&config)
}

#[test]
fn scattered_pages_come_back() -> Result<()> {
    for backing in [MEMFD, Backing::Anonymous] {
        let mut config = GuestConfig::new(backing, 32);
        config.order = Order::Random(5);
        gives_and_takes_back(&config)?;
    }
    Ok(())
}

/// S5, S6: suppression by flags instead of by index, without indirect tables, in a small ring, and
/// the other way round.
#[test]
fn every_way_of_using_a_split_ring_works() -> Result<()> {
    let both = AEROSTAT_FEATURE_INDIRECT_DESC | AEROSTAT_FEATURE_EVENT_IDX;
    for (ring, queue_size) in [(0, 2), (both, 2), (AEROSTAT_FEATURE_EVENT_IDX, 256)] {
        let mut config = GuestConfig::new(Backing::Anonymous, 16);
        config.selected = AEROSTAT_FEATURE_VERSION_1 | ring;
        config.queue_size = queue_size;
        gives_and_takes_back(&config)?;
    }
    Ok(())
}

/// S12: numbers are units of 4 KiB whatever the guest's pages are, so a guest with pages of 64 KiB sends 16
/// in a row. To a host with pages of 64 KiB each row is one of its own; to any host it is one range.
#[test]
fn a_guest_with_pages_of_64_kib_sends_sixteen_numbers_in_a_row() -> Result<()> {
    const ROW: u64 = 16;
    for host_page_bytes in [0, ROW * PAGE_BYTES] {
        for backing in [MEMFD, Backing::Anonymous] {
            let low = RegionSpec::new(0, 8 * MIB, Backing::Anonymous);
            let high = RegionSpec {
                page_size_bytes: host_page_bytes,
                ..RegionSpec::new(64 * MIB, 16 * MIB, backing)
            };
            let vmm = Vmm::new()?;
            let guest = vmm.boot(&GuestConfig::with_regions(vec![low, high]))?;
            let first = 64 * MIB / PAGE_BYTES;
            let all: Vec<u64> = (first..first + 16 * MIB / PAGE_BYTES).collect();
            let contents = WorkingSet::fill(guest.ram(), all.clone(), 12);
            // Every second page of 64 KiB: 16 pages of the guest in a buffer of 256 numbers.
            let rows: Vec<u64> = (0..64).map(|row| first + 2 * ROW * row).collect();
            let pages: Vec<u64> = rows.iter().flat_map(|row| *row..row + ROW).collect();

            guest.driver().give(&pages)?;
            let books = guest.settled_books()?;
            assert_eq!(books.balloon.discarded_bytes, 64 * ROW * PAGE_BYTES);
            assert_eq!(books.balloon.held_bytes, 0, "no page is given in part");
            assert!(books.discard_ranges <= 64, "{books:?}");
            assert_eq!(contents.damaged(guest.ram()), pages);

            // Taken back page by page, the other ones keep what they hold.
            for row in rows.iter().rev() {
                guest
                    .driver()
                    .take(&(*row..row + ROW).collect::<Vec<_>>())?;
            }
            assert_eq!(guest.device().query()?.ballooned_bytes, 0);
            assert_eq!(guest.settled_books()?.returned_bytes, 64 * ROW * PAGE_BYTES);
            assert_eq!(contents.damaged(guest.ram()), pages);
        }
    }
    Ok(())
}

/// S6: used lengths are not overstated; a balloon's buffers are read only.
#[test]
fn acknowledgements_say_that_nothing_was_written() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(MEMFD, 16))?;
    let pfns: Vec<u64> = guest.driver().allocator.unused().take(10).collect();
    for role in [Role::Inflate, Role::Deflate] {
        assert_eq!(guest.driver().tell(role, &pfns)?.written, 0);
        guest.books()?;
    }
    Ok(())
}

/// A1, A2: a guest may stay below its target, and deflate unasked; `actual` tells (A5).
#[test]
fn a_guest_may_stay_below_its_target_and_deflate_unasked() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 16))?;
    guest.fill_memory(2000, 1)?;
    let spare = guest.driver().allocator.unused_pages() * PAGE_BYTES;

    guest.balloon_to(16 * MIB)?;
    assert_eq!(guest.device().query()?.actual_bytes, spare);
    assert_eq!(guest.device().query()?.target_bytes, 16 * MIB);

    guest.driver().leak(100)?;
    guest.driver().update_actual()?;
    let balloon = guest.device().query()?;
    assert_eq!(balloon.actual_bytes, spare - 100 * PAGE_BYTES);
    assert_eq!(balloon.ballooned_bytes, spare - 100 * PAGE_BYTES);
    assert_eq!(balloon.target_bytes, 16 * MIB);
    guest.books()?;
    Ok(())
}

/// The driver's own thread follows the target, as Linux's work queue does.
#[test]
fn a_driver_in_the_background_follows_the_target() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&GuestConfig::new(MEMFD, 64))?;
    let working_set = guest.fill_memory(2000, 9)?;
    let full = guest.ram().allocated_bytes()?;
    guest.start_following()?;
    let patience = std::time::Duration::from_secs(20);

    guest.device().set_target(40 * MIB)?;
    guest.wait_actual(40 * MIB, patience)?;
    guest.settled_books()?;
    assert!(full - guest.ram().allocated_bytes()? >= 40 * MIB * 99 / 100);

    guest.device().set_target(10 * MIB)?;
    guest.wait_actual(10 * MIB, patience)?;
    guest.stop_following();
    guest.assert_intact(&working_set);
    assert_eq!(guest.device().query()?.ballooned_bytes, 10 * MIB);
    guest.books()?;
    Ok(())
}
