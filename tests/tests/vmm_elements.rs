//! Element mode: the VMM pops chains and pushes completions itself, as QEMU does. The device
//! behaves as with rings (invariants I2, I4; requirements S7, S8, S10).

use aerostat::AEROSTAT_COMPLETION_UNSERVED;
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::elements::ElementQueues;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use std::time::Duration;

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };
const PATIENCE: Duration = Duration::from_secs(10);

fn config(backing: Backing, mib: u64) -> GuestConfig {
    let mut config = GuestConfig::new(backing, mib);
    config.elements = true;
    config
}

#[test]
fn memory_comes_back_and_the_working_set_stays() -> Result<()> {
    for backing in [MEMFD, Backing::Anonymous] {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(&config(backing, 64))?;
        let working_set = guest.fill_memory(1000, 11)?;
        let full = guest.ram().allocated_bytes()?;

        guest.balloon_to(40 * MIB)?;

        let books = guest.settled_books()?;
        let freed = full - guest.ram().allocated_bytes()?;
        assert!(freed >= 40 * MIB * 99 / 100, "{freed}");
        assert_eq!(books.balloon.discarded_bytes, 40 * MIB);
        assert_eq!(books.inflate_chains, 40);
        guest.balloon_to(0)?;
        assert_eq!(guest.device().query()?.ballooned_bytes, 0);
        guest.assert_intact(&working_set);
    }
    Ok(())
}

#[test]
fn reports_are_freed() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&config(MEMFD, 96))?;
    let working_set = guest.fill_memory(1000, 11)?;
    let full = guest.ram().allocated_bytes()?;
    let reported = guest.driver().report_unused(512)?;
    let freed = full - guest.ram().allocated_bytes()?;
    assert!(freed >= reported * 99 / 100, "{freed} of {reported}");
    assert_eq!(guest.settled_books()?.report.discarded_bytes, reported);
    guest.assert_intact(&working_set);
    Ok(())
}

#[test]
fn the_statistics_buffer_is_held_until_somebody_asks() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&config(Backing::Anonymous, 8))?;
    while guest.device().guest_stats(0)?.sequence == 0 {
        std::thread::yield_now();
    }
    assert_eq!(guest.driver().queue(Role::Stats)?.outstanding(), 1);
    guest.driver().set_stats(&[(4, 17)]);
    guest.start_following()?;
    let stats = guest.device().guest_stats(5000)?;
    assert_eq!((stats.present, stats.values[4]), (1 << 4, 17));
    Ok(())
}

/// A guest whose elements the test submits by hand.
fn by_hand(vmm: &Vmm, pages: usize) -> Result<(Guest, ElementQueues)> {
    let mut guest = vmm.assemble(&config(MEMFD, 32))?;
    let features = guest.negotiate()?;
    guest.start_queues(features)?;
    guest.device().activate()?;
    offer(&guest, pages)?;
    let queues = ElementQueues::new(&guest)?;
    Ok((guest, queues))
}

/// Makes a buffer of unused pages available without waiting.
fn offer(guest: &Guest, pages: usize) -> Result<()> {
    let mut driver = guest.driver();
    let pfns: Vec<u64> = driver.allocator.unused().take(pages).collect();
    let piece = driver.write_pfns(&pfns);
    driver.queue(Role::Inflate)?.add(guest.ram(), &[piece])?;
    Ok(())
}

#[test]
fn each_element_is_completed_once_and_told_of() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, mut queues) = by_hand(&vmm, 256)?;
    for _ in 0..99 {
        offer(&guest, 256)?;
    }
    assert_eq!(queues.submit_available()?, 100);
    let mut completed = 0;
    while completed < 100 {
        let completions = queues.collect_within(PATIENCE)?;
        assert!(
            completions
                .iter()
                .all(|done| done.flags == 0 && done.written_bytes == 0)
        );
        completed += completions.len();
    }
    assert_eq!((completed, queues.submitted()), (100, 0));
    assert_eq!(queues.collect()?.len(), 0);
    let books = guest.settled_books()?;
    assert_eq!(books.inflate_chains, 100);
    assert_eq!(books.balloon.discarded_bytes, MIB);
    assert_eq!(books.balloon.skipped_duplicate_bytes, 99 * MIB);
    Ok(())
}

/// I2: a VMM that pauses gets all of its elements back, served.
#[test]
fn pause_completes_what_was_submitted() -> Result<()> {
    let vmm = Vmm::new()?;
    for _ in 0..30 {
        let (guest, mut queues) = by_hand(&vmm, 200)?;
        queues.submit_available()?;
        guest.device().pause()?;
        let completions = queues.collect()?;
        assert_eq!(completions.len(), 1);
        assert_eq!(completions[0].flags, 0);
        assert_eq!(guest.books()?.balloon.discarded_bytes, 200 * PAGE_BYTES);
        offer(&guest, 1)?;
        let error = queues.submit_available().expect_err("paused");
        assert_eq!(error.errno(), Some(libc::EBUSY));
    }
    Ok(())
}

/// I2: a reset returns every element, served or not, exactly once.
#[test]
fn reset_returns_every_element() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut unserved = 0;
    for round in 0..50 {
        let (guest, mut queues) = by_hand(&vmm, 256)?;
        for _ in 0..60 {
            offer(&guest, 256)?;
        }
        queues.submit_available()?;
        for _ in 0..round * 20 {
            std::hint::spin_loop();
        }
        guest.device().reset()?;
        let before = guest.ram().allocated_bytes()?;
        let completions = queues.collect()?;
        assert_eq!((completions.len(), queues.submitted()), (61, 0));
        let is_unserved = |flags: u16| flags & AEROSTAT_COMPLETION_UNSERVED != 0;
        let missed = completions
            .iter()
            .filter(|done| is_unserved(done.flags))
            .count();
        unserved += missed;
        let books = guest.books()?;
        assert_eq!(books.inflate_chains, 61 - missed as u64);
        assert_eq!(guest.device().query()?.ballooned_bytes, 0);
        assert_eq!(guest.ram().allocated_bytes()?, before);
    }
    println!("{unserved} of {} elements came back unserved", 50 * 61);
    Ok(())
}

/// I4: elements that are served while discarding is inhibited say so.
#[test]
fn inhibition_is_counted() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, mut queues) = by_hand(&vmm, 256)?;
    guest.device().inhibit()?;
    queues.submit_available()?;
    queues.collect_within(PATIENCE)?;
    assert_eq!(guest.books()?.balloon.skipped_inhibited_bytes, MIB);
    Ok(())
}
