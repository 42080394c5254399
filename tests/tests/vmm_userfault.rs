//! Memory armed with userfaultfd(2): what VMMs do for postcopy and background snapshots, with discarding
//! inhibited, and what happens if they do it without (invariants I1, I4).
//!
//! Where the host does not let a process handle its own faults these tests say so, and fail in CI.

use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::{GuestRam, RegionSpec};
use aerostat_tests::vmm::userfault::{Arming, Userfault};
use aerostat_tests::vmm::vring::Piece;
use aerostat_tests::vmm::working_set::WorkingSet;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm, VmmError};
use std::time::{Duration, Instant};

const HIGH: u64 = 64 * MIB;
const FIRST: u64 = HIGH / PAGE_BYTES;
const PAGES: u64 = 4 * MIB / PAGE_BYTES;
const BACKINGS: [Backing; 2] = [Backing::Anonymous, Backing::Memfd { offset_bytes: 0 }];

/// A guest with its rings in ordinary memory, and 4 MiB that is to be armed.
fn boot(vmm: &Vmm, backing: Backing) -> Result<Guest> {
    let low = RegionSpec::new(0, 8 * MIB, Backing::Anonymous);
    let high = RegionSpec::new(HIGH, 4 * MIB, backing);
    vmm.boot(&GuestConfig::with_regions(vec![low, high]))
}

/// Arms it; `None`, and a reason, where that cannot be had outside of CI.
fn arm(
    ram: &GuestRam,
    arming: Arming,
    source: impl Fn(u64, &mut [u8]) + Send + 'static,
) -> Result<Option<Userfault>> {
    match Userfault::arm(ram, FIRST, PAGES, arming, source) {
        Ok(armed) => Ok(Some(armed)),
        Err(error @ VmmError::Os { .. }) if std::env::var_os("CI").is_none() => {
            println!("skipped: {error}; run as root, or set vm.unprivileged_userfaultfd to 1");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// What a page holds on the machine that it comes from.
fn at_the_source(pfn: u64, contents: &mut [u8]) {
    for (byte, index) in contents.iter_mut().zip(0u64..) {
        *byte = u8::try_from((pfn * 7 + index) % 251).unwrap_or(0);
    }
}

fn has_come(ram: &GuestRam, pfn: u64) -> bool {
    let (mut found, mut expected) = ([0; 4096], [0; 4096]);
    ram.read(pfn * PAGE_BYTES, &mut found);
    at_the_source(pfn, &mut expected);
    found == expected
}

/// Without an inhibit armed memory is discarded like any other: the monitor has just those pages come again,
/// and it is told when they go. Holes in a file are punched through its descriptor, which the kernel tells no
/// monitor of, but where there are several they leave the page tables first, and of that it does.
#[test]
fn armed_memory_is_discarded_and_its_monitor_told_of_each_page() -> Result<()> {
    for backing in BACKINGS {
        let vmm = Vmm::new()?;
        let guest = boot(&vmm, backing)?;
        let all: Vec<u64> = (FIRST..FIRST + PAGES).collect();
        let contents = WorkingSet::fill(guest.ram(), all, 8);
        let zeros = |_: u64, _: &mut [u8]| ();
        let Some(armed) = arm(guest.ram(), Arming::Missing, zeros)? else {
            return Ok(());
        };
        // Runs and single pages.
        let mut given: Vec<u64> = (FIRST + 10..FIRST + 200).collect();
        given.extend((0..100).map(|page| FIRST + 300 + 3 * page));

        guest.driver().give(&given)?;
        let books = guest.settled_books()?.balloon;
        assert_eq!(books.discarded_bytes, given.len() as u64 * PAGE_BYTES);
        let mut seen = armed.take_seen();
        // The library goes on as soon as the monitor has read the last event, which it then notes.
        let deadline = Instant::now() + Duration::from_secs(10);
        while seen.removed.len() < given.len() && Instant::now() < deadline {
            std::thread::yield_now();
            seen.removed.extend(armed.take_seen().removed);
        }
        assert_eq!((seen.removed, seen.missing), (given.clone(), vec![]));

        guest.driver().take(&given)?;
        assert_eq!(contents.damaged(guest.ram()), given, "the rest is there");
        assert_eq!(
            armed.take_seen().missing,
            given,
            "zeros, each by its own fault"
        );
    }
    Ok(())
}

/// Postcopy: the guest runs before its pages have come. The VMM inhibits, so nothing that comes is thrown
/// away, and nothing is touched that has not come.
#[test]
fn an_inhibited_device_neither_removes_nor_touches_what_has_not_come() -> Result<()> {
    for backing in BACKINGS {
        let vmm = Vmm::new()?;
        let guest = boot(&vmm, backing)?;
        guest.device().inhibit()?;
        let Some(armed) = arm(guest.ram(), Arming::Missing, at_the_source)? else {
            return Ok(());
        };
        let given: Vec<u64> = (FIRST..FIRST + 600).collect();
        guest.driver().give(&given)?;
        guest.driver().report(&[(FIRST + 700, 100)])?;
        let books = guest.settled_books()?;
        let bytes = given.len() as u64 * PAGE_BYTES;
        assert_eq!(books.balloon.skipped_inhibited_bytes, bytes);
        assert_eq!(books.report.skipped_inhibited_bytes, 100 * PAGE_BYTES);
        assert_eq!(armed.take_seen(), Default::default());

        // The guest takes some back and uses them: they come from the source.
        guest.driver().take(&given[..100])?;
        assert!(given[..100].iter().all(|pfn| has_come(guest.ram(), *pfn)));
        assert_eq!(armed.take_seen().missing, given[..100]);

        // All has come; from now on pages are discarded again.
        drop(armed);
        guest.device().uninhibit()?;
        guest.driver().give(&given[..100])?;
        let books = guest.settled_books()?.balloon;
        assert_eq!(books.discarded_bytes, 100 * PAGE_BYTES);
    }
    Ok(())
}

/// A list of pages that has not come yet is waited for by the worker that reads it, as by any processor.
#[test]
fn a_list_that_has_not_come_yet_is_waited_for() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot(&vmm, Backing::Anonymous)?;
    let list = |_: u64, contents: &mut [u8]| {
        let pfns = (0..64u64).map(|page| u32::try_from(FIRST + 100 + page).unwrap_or(0));
        let bytes: Vec<u8> = pfns.flat_map(u32::to_le_bytes).collect();
        contents[..bytes.len()].copy_from_slice(&bytes);
    };
    let Some(armed) = arm(guest.ram(), Arming::Missing, list)? else {
        return Ok(());
    };
    let (gpa, len) = (HIGH, 4 * 64);
    let piece = Piece {
        gpa,
        len,
        writable: false,
    };
    guest.driver().exchange(Role::Inflate, &[piece])?;
    let books = guest.settled_books()?;
    assert_eq!(books.balloon.discarded_bytes, 64 * PAGE_BYTES);
    assert_eq!(
        (books.chain_errors, armed.take_seen().missing),
        (0, vec![FIRST])
    );
    Ok(())
}

/// A background snapshot protects memory from writes and saves it piece by piece: an inhibited device leaves
/// what is not saved yet as it is.
#[test]
fn a_background_snapshot_sees_no_write_of_an_inhibited_device() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot(&vmm, Backing::Anonymous)?;
    let all: Vec<u64> = (FIRST..FIRST + PAGES).collect();
    let contents = WorkingSet::fill(guest.ram(), all.clone(), 4);
    guest.device().inhibit()?;
    let Some(armed) = arm(guest.ram(), Arming::Writes, |_, _| ())? else {
        return Ok(());
    };
    guest.driver().give(&all[..512])?;
    guest.settled_books()?;
    assert_eq!(armed.take_seen(), Default::default());
    guest.assert_intact(&contents);
    guest.driver().take(&all[..512])?;
    // The guest's own writes are seen, as ever.
    guest.ram().touch(all[5]);
    assert_eq!(armed.take_seen().written, [all[5]]);
    Ok(())
}
