//! Write-behind: acknowledged first, freed soon after, and never after the guest has its page back
//! (requirement S7; invariants I1, I2, I4).

use aerostat::AEROSTAT_FEATURE_VERSION_1;
use aerostat_tests::vmm::allocator::Order;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::working_set::WorkingSet;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use std::time::{Duration, Instant};

/// Long enough that only what a test does flushes.
const FOREVER_MS: u32 = 3_600_000;

fn config() -> GuestConfig {
    GuestConfig::new(Backing::Memfd { offset_bytes: 0 }, 64)
}

fn guest(vmm: &Vmm, limit_bytes: u64, delay_ms: u32) -> Result<Guest> {
    let guest = vmm.boot(&config())?;
    guest.device().set_write_behind(limit_bytes, delay_ms)?;
    Ok(guest)
}

/// Gives `buffers` times 256 pages without a target.
fn give(guest: &Guest, buffers: usize) -> Result<u64> {
    for _ in 0..buffers {
        guest.driver().fill(256)?;
    }
    Ok(buffers as u64 * 256 * PAGE_BYTES)
}

/// What the guest's memory takes on the host once the driver has its buffers.
fn filled(guest: &Guest) -> Result<u64> {
    guest.fill_memory(1000, 42)?;
    guest.device().set_target(32 * MIB)?;
    guest.driver().write_pfns(&[0; 256]);
    guest.ram().allocated_bytes()
}

/// Waits until nothing is pending; returns how long that took.
fn settle(guest: &Guest) -> Result<Duration> {
    let start = Instant::now();
    while guest.device().counters()?.balloon.pending_bytes > 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "still pending");
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(start.elapsed())
}

#[test]
fn acknowledged_bytes_are_pending_until_the_delay_is_over() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = guest(&vmm, 64 * MIB, 50)?;
    let full = filled(&guest)?;
    let given = give(&guest, 4)?;
    let books = guest.device().counters()?;
    assert_eq!(books.balloon.requested_bytes, given);
    assert_eq!(books.balloon.pending_bytes, given);
    assert_eq!(guest.ram().allocated_bytes()?, full);

    let took = settle(&guest)?;
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(full - guest.ram().allocated_bytes()?, given);
    assert_eq!(guest.settled_books()?.balloon.discarded_bytes, given);
    Ok(())
}

#[test]
fn the_limit_flushes_without_a_delay() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = guest(&vmm, 2 * MIB, FOREVER_MS)?;
    guest.fill_memory(1000, 42)?;
    guest.device().set_target(32 * MIB)?;
    give(&guest, 2)?;
    settle(&guest)?;
    assert_eq!(guest.device().counters()?.balloon.discarded_bytes, 2 * MIB);
    Ok(())
}

#[test]
fn reaching_the_target_flushes_at_once() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = guest(&vmm, 1 << 40, FOREVER_MS)?;
    let full = filled(&guest)?;
    guest.balloon_to(5 * MIB)?;
    let took = settle(&guest)?;
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(full - guest.ram().allocated_bytes()?, 5 * MIB);
    Ok(())
}

#[test]
fn every_barrier_leaves_nothing_pending() -> Result<()> {
    let vmm = Vmm::new()?;
    type Barrier = fn(&Guest) -> Result<()>;
    let barriers: [(&str, Barrier); 4] = [
        ("flush", |guest| guest.device().flush()),
        ("pause", |guest| guest.device().pause()),
        ("inhibit", |guest| guest.device().inhibit()),
        ("turning it off", |guest| {
            guest.device().set_write_behind(0, 0)
        }),
    ];
    for (name, barrier) in barriers {
        let guest = guest(&vmm, 1 << 40, FOREVER_MS)?;
        guest.fill_memory(1000, 42)?;
        guest.device().set_target(32 * MIB)?;
        let given = give(&guest, 3)?;
        assert_eq!(guest.device().counters()?.balloon.pending_bytes, given);
        barrier(&guest)?;
        let books = guest.device().counters()?.balloon;
        assert_eq!(
            (books.pending_bytes, books.discarded_bytes),
            (0, given),
            "{name}"
        );
    }
    Ok(())
}

#[test]
fn a_page_that_is_taken_back_keeps_what_the_guest_writes() -> Result<()> {
    let vmm = Vmm::new()?;
    // After three MiB, two are being discarded and one waits.
    let guest = guest(&vmm, 2 * MIB, FOREVER_MS)?;
    let working_set = guest.fill_memory(1000, 42)?;
    guest.device().set_target(32 * MIB)?;
    for round in 0..40 {
        give(&guest, 3)?;
        let ballooned = guest.driver().balloon().to_vec();
        // The newest pages first: those that wait, then those that are being discarded.
        for _ in 0..2 {
            guest.driver().leak(256)?;
        }
        let left = guest.driver().balloon().to_vec();
        let back = ballooned.into_iter().filter(|pfn| !left.contains(pfn));
        let written = WorkingSet::fill(guest.ram(), back.collect(), 1000 + round);
        guest.device().flush()?;
        assert!(written.damaged(guest.ram()).is_empty(), "round {round}");
        guest.driver().leak(256)?;
    }
    guest.assert_intact(&working_set);
    let books = guest.settled_books()?;
    assert!(
        books.balloon.withdrawn_bytes > 0,
        "nothing was taken out of the window"
    );
    Ok(())
}

#[test]
fn without_must_tell_host_discarding_comes_before_the_acknowledgement() -> Result<()> {
    let vmm = Vmm::new()?;
    let config = GuestConfig {
        selected: AEROSTAT_FEATURE_VERSION_1,
        ..config()
    };
    let guest = vmm.boot(&config)?;
    guest.device().set_write_behind(1 << 40, FOREVER_MS)?;
    let full = filled(&guest)?;
    let given = give(&guest, 1)?;
    assert_eq!(full - guest.ram().allocated_bytes()?, given);
    assert_eq!(guest.device().counters()?.balloon.pending_bytes, 0);
    Ok(())
}

/// Hostile drivers, amplification: a guest that gives its pages in the worst order does not get a system call
/// for each. In a file runs grow together while they wait; private memory is advised in vectors at once.
#[test]
fn scattered_pages_do_not_cost_a_call_each() -> Result<()> {
    let vmm = Vmm::new()?;
    for (backing, limit_bytes) in [
        (Backing::Memfd { offset_bytes: 0 }, 1 << 40),
        (Backing::Anonymous, 1 << 40),
        (Backing::Anonymous, 0),
    ] {
        let config = GuestConfig {
            order: Order::Random(9),
            ..GuestConfig::new(backing, 64)
        };
        let guest = vmm.boot(&config)?;
        guest.device().set_write_behind(limit_bytes, FOREVER_MS)?;
        guest.device().set_target(64 * MIB)?;
        let pages = guest.driver().allocator.unused_pages();
        while guest.driver().fill(256)? > 0 {}
        guest.device().flush()?;
        let books = guest.settled_books()?;
        assert_eq!(books.balloon.discarded_bytes, pages * PAGE_BYTES);
        let calls = books.discard_calls;
        assert!(
            calls * 100 < pages,
            "{calls} calls, {pages} pages, {backing:?}"
        );
    }
    Ok(())
}

#[test]
fn a_reset_returns_what_waits_untouched() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = guest(&vmm, 1 << 40, FOREVER_MS)?;
    let full = filled(&guest)?;
    let given = give(&guest, 2)?;
    guest.device().reset()?;
    let books = guest.device().counters()?.balloon;
    assert_eq!((books.pending_bytes, books.withdrawn_bytes), (0, given));
    assert_eq!(guest.ram().allocated_bytes()?, full);
    Ok(())
}
