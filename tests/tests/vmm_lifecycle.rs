//! The life of a device: activation, reset, pause, inhibition, memory that comes and goes
//! (requirements S1, S2, S3, S7, S11, A6; invariant I2).

use aerostat::AEROSTAT_FEATURE_VERSION_1;
use aerostat_tests::vmm::device::State;
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::guest::{queue_config, resumed};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::working_set::WorkingSet;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm, VmmError};
use std::time::Duration;

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };
/// Long enough for a worker that does what it must not do to be seen doing it.
const A_WHILE: Duration = Duration::from_millis(60);

#[track_caller]
fn assert_errno<T: std::fmt::Debug>(result: Result<T>, errno: i32) {
    let error = result.expect_err("has to be refused");
    assert_eq!(error.errno(), Some(errno), "{error}");
}

/// Makes a buffer of `pages` unused pages available on `role`'s queue and kicks, without waiting.
fn offer(guest: &Guest, role: Role, pages: usize) -> Result<Vec<u64>> {
    let mut driver = guest.driver();
    let pfns: Vec<u64> = driver.allocator.unused().take(pages).collect();
    let piece = driver.write_pfns(&pfns);
    let queue = driver.queue(role)?;
    queue.add(guest.ram(), &[piece])?;
    queue.kick(guest.ram());
    Ok(pfns)
}

fn acknowledged(guest: &Guest, role: Role) -> Result<bool> {
    Ok(guest.driver().queue(role)?.take_used(guest.ram()).is_some())
}

fn wait_acknowledged(guest: &Guest, role: Role) -> Result<()> {
    let mut driver = guest.driver();
    let queue = driver.queue(role)?;
    queue
        .wait_used(guest.ram(), Duration::from_secs(10))
        .map(drop)
}

/// S2: "No buffer is consumed and no notification sent before DRIVER_OK"; then every queue is
/// looked at, kicked or not.
#[test]
fn a_kick_before_driver_ok_consumes_nothing_and_driver_ok_finds_what_was_not_kicked() -> Result<()>
{
    let vmm = Vmm::new()?;
    let mut guest = vmm.assemble(&GuestConfig::new(MEMFD, 16))?;
    let features = guest.negotiate()?;
    guest.start_queues(features)?;
    offer(&guest, Role::Inflate, 100)?;
    let before = guest.ram().snapshot();
    std::thread::sleep(A_WHILE);
    assert!(!acknowledged(&guest, Role::Inflate)?);
    assert_eq!(guest.ram().changed_since(&before), [] as [u64; 0]);
    assert_eq!(guest.driver().queue(Role::Inflate)?.call.take(), 0);
    assert_eq!(guest.books()?.inflate_chains, 0);

    // The kicks are lost, as if they had never been: the device has to look by itself.
    guest.driver().queue(Role::Inflate)?.kick.take();
    guest.device().activate()?;
    wait_acknowledged(&guest, Role::Inflate)?;
    assert_eq!(
        guest.settled_books()?.balloon.discarded_bytes,
        100 * PAGE_BYTES
    );
    Ok(())
}

/// S1: any valid subset of what is offered is accepted, all else refused, and the same again after
/// a reset.
#[test]
fn features_are_negotiated_within_what_is_offered() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.assemble(&GuestConfig::new(Backing::Anonymous, 8))?;
    let offered = guest.device().offered_features()?;
    assert_ne!(offered & AEROSTAT_FEATURE_VERSION_1, 0);
    assert_errno(
        guest.device().set_features(offered | 1 << 60),
        libc::ENOTSUP,
    );
    for bit in (0..64)
        .map(|bit| 1u64 << bit)
        .filter(|bit| offered & bit != 0)
    {
        guest.device().set_features(offered & !bit)?;
        guest.device().set_features(bit)?;
    }
    let selected = guest.negotiate()?;
    guest.start_driver()?;
    guest.device().reset()?;
    assert_eq!(guest.device().offered_features()?, offered);
    assert_eq!(guest.negotiate()?, selected);
    guest.start_driver()?;
    assert_eq!(guest.device().state()?, State::Active);
    Ok(())
}

/// A8: a driver that did not promise to tell uses a page again and tells later, or never: from the
/// acknowledgement of its inflate on the page may be written to, and keeps what it is given.
#[test]
fn a_page_may_be_used_before_it_is_told() -> Result<()> {
    let vmm = Vmm::new()?;
    for backing in [MEMFD, Backing::Anonymous] {
        let config = GuestConfig {
            selected: AEROSTAT_FEATURE_VERSION_1,
            ..GuestConfig::new(backing, 32)
        };
        let guest = vmm.boot(&config)?;
        let pages: Vec<u64> = guest.driver().allocator.unused().take(1024).collect();
        let every_other = |from: usize| pages.iter().skip(from).step_by(2).copied().collect();
        let (even, odd): (Vec<u64>, Vec<u64>) = (every_other(0), every_other(1));
        guest.driver().give(&even)?;
        let used = WorkingSet::fill(guest.ram(), even.clone(), 7);
        // What lies between them is freed, and nothing with it.
        guest.driver().give(&odd)?;
        guest.device().flush()?;
        guest.assert_intact(&used);
        guest.device().pause()?;
        guest.device().resume()?;
        guest.device().inhibit()?;
        guest.device().uninhibit()?;
        guest.assert_intact(&used);
        guest.driver().take(&even)?;
        guest.assert_intact(&used);
        let books = guest.settled_books()?;
        assert_eq!(
            books.balloon.discarded_bytes,
            pages.len() as u64 * PAGE_BYTES
        );
        assert_eq!(books.returned_bytes, even.len() as u64 * PAGE_BYTES);
    }
    Ok(())
}

/// S3, A6: after reset the balloon is empty, and no ring is touched and nobody notified until the
/// driver has set the device up again.
#[test]
fn reset_empties_the_balloon_and_ends_all_access() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&GuestConfig::new(MEMFD, 32))?;
    let working_set = guest.fill_memory(500, 6)?;
    guest.balloon_to(8 * MIB)?;
    // Nothing waits in the window that the reset would withdraw.
    guest.settled_books()?;

    guest.device().reset()?;

    assert_eq!(guest.device().state()?, State::Configuring);
    let balloon = guest.device().query()?;
    assert_eq!((balloon.ballooned_bytes, balloon.actual_bytes), (0, 0));
    assert_eq!(balloon.target_bytes, 8 * MIB, "the target is the host's");
    offer(&guest, Role::Inflate, 50)?;
    guest.driver().queue(Role::Inflate)?.call.take();
    let before = guest.ram().snapshot();
    let books = guest.books()?;
    std::thread::sleep(A_WHILE);
    assert_eq!(guest.ram().changed_since(&before), [] as [u64; 0]);
    assert_eq!(guest.driver().queue(Role::Inflate)?.call.take(), 0);
    assert_eq!(guest.books()?.inflate_chains, books.inflate_chains);

    // The next driver finds the target and an empty balloon; its pages are no duplicates.
    guest.restart_driver()?;
    guest.driver().follow_target()?;
    let books = guest.settled_books()?;
    assert_eq!(guest.device().query()?.ballooned_bytes, 8 * MIB);
    assert_eq!(books.balloon.discarded_bytes, 16 * MIB);
    assert_eq!(books.balloon.skipped_duplicate_bytes, 0);
    guest.assert_intact(&working_set);
    Ok(())
}

/// I2: resets at any moment of an inflation, with buffers in flight.
#[test]
fn reset_in_flight_leaves_a_device_that_works() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 32))?;
    let working_set = guest.fill_memory(500, 6)?;
    for round in 0..100 {
        let offered = offer(&guest, Role::Inflate, 256)?;
        let ring = {
            let mut driver = guest.driver();
            let queue = driver.queue(Role::Inflate)?;
            let placement = queue.placement();
            // What the device writes of it.
            if queue.is_packed() {
                placement.desc
            } else {
                placement.used
            }
        } / PAGE_BYTES;
        for _ in 0..round * 40 {
            std::hint::spin_loop();
        }
        guest.device().reset()?;
        let before = guest.ram().page_sum(ring);
        // The guest uses its pages again at once.
        let used_again = WorkingSet::fill(guest.ram(), offered, round);
        guest.driver().queue(Role::Inflate)?.call.take();
        std::thread::yield_now();
        assert_eq!(guest.driver().queue(Role::Inflate)?.call.take(), 0);
        assert_eq!(guest.ram().page_sum(ring), before);
        guest.assert_intact(&used_again);
        guest.start_driver()?;
        guest.books()?;
        guest.assert_intact(&used_again);
    }
    guest.balloon_to(4 * MIB)?;
    guest.assert_intact(&working_set);
    Ok(())
}

/// I2: "pause returns only when nothing is in flight"; what comes meanwhile is served afterwards.
#[test]
fn pause_drains_and_resume_serves_what_came_meanwhile() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(MEMFD, 64))?;
    guest.fill_memory(100, 2)?;
    for _ in 0..20 {
        offer(&guest, Role::Inflate, 256)?;
        guest.device().pause()?;
        guest.device().pause()?;
        assert_eq!(guest.device().state()?, State::Paused);
        let mut driver = guest.driver();
        let queue = driver.queue(Role::Inflate)?;
        let served = queue.take_used(guest.ram()).is_some();
        queue.call.take();
        drop(driver);
        let (books, memory) = (guest.books()?, guest.ram().allocated_bytes()?);
        if served {
            offer(&guest, Role::Deflate, 256)?;
        }
        std::thread::sleep(Duration::from_millis(3));
        // Not one buffer, not one byte, not one signal.
        assert_eq!(guest.ram().allocated_bytes()?, memory);
        assert!(!acknowledged(&guest, Role::Inflate)?);
        assert!(!acknowledged(&guest, Role::Deflate)?);
        assert_eq!(guest.driver().queue(Role::Inflate)?.call.take(), 0);
        let now = guest.books()?;
        assert_eq!(now.inflate_chains, books.inflate_chains);
        assert_eq!(now.deflate_chains, books.deflate_chains);

        guest.device().resume()?;
        let role = if served { Role::Deflate } else { Role::Inflate };
        wait_acknowledged(&guest, role)?;
        if !served {
            offer(&guest, Role::Deflate, 256)?;
            wait_acknowledged(&guest, Role::Deflate)?;
        }
        guest.settled_books()?;
    }
    assert_errno(guest.device().resume(), libc::EPROTO);
    Ok(())
}

/// I2, I4: from the return of inhibit() on nothing is discarded; guests are acknowledged, and what
/// is skipped is counted.
#[test]
fn inhibition_keeps_memory_and_tells_of_what_was_skipped() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(MEMFD, 32))?;
    guest.fill_memory(100, 2)?;
    offer(&guest, Role::Inflate, 256)?;
    guest.device().inhibit()?;
    let first = guest.settled_books()?.balloon.discarded_bytes;
    let memory = guest.ram().allocated_bytes()?;
    wait_acknowledged(&guest, Role::Inflate)?;
    guest.device().inhibit()?;

    guest.balloon_to(4 * MIB)?;
    guest.driver().report_unused(512)?;

    let books = guest.settled_books()?;
    assert!(guest.ram().allocated_bytes()? >= memory);
    assert_eq!(books.balloon.discarded_bytes, first);
    assert_eq!(books.report.discarded_bytes, 0);
    assert_eq!(
        books.report.skipped_inhibited_bytes,
        books.report.requested_bytes
    );
    let skipped = books.balloon.skipped_inhibited_bytes;
    assert_eq!(skipped + first + books.balloon.skipped_duplicate_bytes, {
        books.balloon.requested_bytes
    });

    // Calls nest; afterwards everything goes on.
    guest.device().uninhibit()?;
    guest.driver().report_unused(512)?;
    assert_eq!(guest.settled_books()?.report.discarded_bytes, 0);
    guest.device().uninhibit()?;
    assert_errno(guest.device().uninhibit(), libc::EPROTO);
    let reported = guest.driver().report_unused(512)?;
    assert_eq!(guest.settled_books()?.report.discarded_bytes, reported);
    Ok(())
}

/// S11: an unchanged target is told again, so that a guest that deflated for want of memory tries
/// again.
#[test]
fn an_unchanged_target_is_told_again() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 16))?;
    guest.balloon_to(4 * MIB)?;
    // Out of memory: Linux gives itself 256 pages back, and does nothing until it is told to.
    guest.driver().leak(256)?;
    guest.driver().update_actual()?;
    assert_eq!(guest.device().query()?.actual_bytes, 3 * MIB);
    assert_eq!(guest.config_event.take(), 0);

    guest.balloon_to(4 * MIB)?;

    assert_eq!(guest.device().query()?.actual_bytes, 4 * MIB);
    Ok(())
}

#[test]
fn targets_beyond_memory_are_refused_and_change_nothing() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 16))?;
    guest.device().set_target(3 * MIB + 5)?;
    assert_eq!(guest.device().query()?.target_bytes, 3 * MIB);
    assert_errno(guest.device().set_target(16 * MIB + 4096), libc::EINVAL);
    assert_errno(guest.device().set_target(u64::MAX), libc::EINVAL);
    assert_eq!(guest.device().query()?.target_bytes, 3 * MIB);
    Ok(())
}

/// Memory is added under a running guest, ballooned, and taken away with pages in the balloon.
#[test]
fn memory_comes_and_goes_while_ballooned() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&GuestConfig::new(MEMFD, 32))?;
    let working_set = guest.fill_memory(1000, 5)?;
    guest.balloon_to(4 * MIB)?;
    let added = RegionSpec::new(256 * MIB, 16 * MIB, Backing::Anonymous);

    guest.change_memory(Some(added), None)?;
    let balloon = guest.device().query()?;
    assert_eq!(balloon.memory_bytes, 48 * MIB);
    assert_eq!(balloon.ballooned_bytes, 4 * MIB, "the balloon stays");
    let pages: Vec<u64> = (256 * MIB / PAGE_BYTES..260 * MIB / PAGE_BYTES).collect();
    let data = WorkingSet::fill(guest.ram(), pages.clone(), 3);
    guest.driver().give(&pages[..512])?;
    assert_eq!(guest.settled_books()?.balloon.discarded_bytes, 6 * MIB);
    let damaged = data.damaged(guest.ram());
    assert_eq!(damaged, pages[..512], "only what was given");

    guest.change_memory(None, Some(256 * MIB))?;
    let balloon = guest.device().query()?;
    assert_eq!(balloon.memory_bytes, 32 * MIB);
    assert_eq!(
        balloon.ballooned_bytes,
        4 * MIB,
        "pages of memory that is gone are forgotten"
    );
    guest.books()?;
    // The old driver does not know that they are gone: taking them back is acknowledged.
    assert_eq!(
        guest.driver().tell(Role::Deflate, &pages[..512])?.written,
        0
    );
    assert_eq!(guest.books()?.rejected_take_bytes, 2 * MIB);

    // What stayed is still known: giving it again is a duplicate, taking it is not.
    let held = guest.driver().balloon()[..256].to_vec();
    guest.driver().tell(Role::Inflate, &held)?;
    assert_eq!(guest.books()?.balloon.skipped_duplicate_bytes, MIB);
    guest.assert_intact(&working_set);
    Ok(())
}

#[test]
fn memory_without_a_running_ring_is_refused_and_the_old_stays() -> Result<()> {
    let vmm = Vmm::new()?;
    let low = RegionSpec::new(0, 8 * MIB, Backing::Anonymous);
    let high = RegionSpec::new(64 * MIB, 8 * MIB, Backing::Anonymous);
    let mut guest = vmm.boot(&GuestConfig::with_regions(vec![low, high]))?;
    assert_errno(guest.change_memory(None, Some(0)), libc::ERANGE);
    assert_eq!(guest.device().query()?.memory_bytes, 16 * MIB);
    guest.balloon_to(2 * MIB)?;
    Ok(())
}

#[test]
fn memory_changes_under_load_lose_nothing() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&GuestConfig::new(MEMFD, 64))?;
    let working_set = guest.fill_memory(1000, 5)?;
    guest.start_following()?;
    let added = RegionSpec::new(256 * MIB, 4 * MIB, Backing::Anonymous);
    for round in 0..40 {
        guest
            .device()
            .set_target(if round % 2 == 0 { 48 * MIB } else { 0 })?;
        guest.change_memory(Some(added), None)?;
        guest.device().inhibit()?;
        guest.change_memory(None, Some(256 * MIB))?;
        guest.device().uninhibit()?;
        guest.books()?;
    }
    guest.device().set_target(16 * MIB)?;
    guest.wait_actual(16 * MIB, Duration::from_secs(20))?;
    guest.stop_following();
    assert_eq!(guest.device().query()?.ballooned_bytes, 16 * MIB);
    guest.assert_intact(&working_set);
    guest.books()?;
    Ok(())
}

/// S13, vhost-user: a queue is stopped and goes on elsewhere; a held statistics buffer is found
/// again.
#[test]
fn a_queue_that_is_stopped_goes_on_where_it_was() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 16))?;
    guest.balloon_to(2 * MIB)?;
    for role in [Role::Inflate, Role::Deflate, Role::Stats] {
        let index = guest.index_of(role)?;
        let config = {
            let mut driver = guest.driver();
            queue_config(driver.queue(role)?, false)
        };
        assert_errno(guest.device().start_queue(index, &config), libc::EALREADY);
        let position = guest.device().stop_queue(index)?;
        assert_errno(guest.device().stop_queue(index), libc::ENOENT);
        guest
            .device()
            .start_queue(index, &resumed(&config, &position))?;
    }
    guest.balloon_to(MIB)?;
    guest.balloon_to(3 * MIB)?;
    assert_eq!(guest.device().query()?.ballooned_bytes, 3 * MIB);
    let sequence = guest.device().guest_stats(0)?.sequence;
    let error = guest.device().guest_stats(30).expect_err("nobody answers");
    assert!(matches!(error, VmmError::Call { .. }), "{error}");
    assert!(
        guest.driver().answer_stats()?,
        "the buffer came back {sequence}"
    );
    Ok(())
}

#[test]
fn calls_in_the_wrong_state_are_told_apart() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.assemble(&GuestConfig::new(Backing::Anonymous, 8))?;
    assert_errno(guest.device().pause(), libc::ENOTCONN);
    assert_errno(guest.device().resume(), libc::EPROTO);
    assert_errno(guest.device().activate(), libc::ENOTCONN);
    guest.start_driver()?;
    assert_errno(guest.device().activate(), libc::EALREADY);
    assert_errno(guest.device().set_features(0), libc::EALREADY);
    let books = guest.device().counters()?;
    assert_eq!((books.handshakes, books.handshakes_failed), (1, 1));
    guest.device().pause()?;
    assert_errno(guest.device().activate(), libc::EBUSY);
    Ok(())
}

/// Memory of guests that are gone is free, whatever a worker was about to do for them: no copy of
/// their descriptors is left.
#[test]
fn guests_that_are_gone_leave_no_memory_behind() -> Result<()> {
    const NAME: &str = "guest-that-goes";
    let open = || {
        let all = std::fs::read_dir("/proc/self/fd")
            .into_iter()
            .flatten()
            .flatten();
        all.filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .filter(|target| target.to_string_lossy().contains(NAME))
            .count()
    };
    let mut config = GuestConfig::new(MEMFD, 8);
    config.name = NAME;
    for _ in 0..20 {
        let vmm = Vmm::with_workers(1)?;
        let mut guests = Vec::new();
        for _ in 0..64 {
            let mut guest = vmm.assemble(&config)?;
            let features = guest.negotiate()?;
            guest.start_queues(features)?;
            offer(&guest, Role::Inflate, 256)?;
            guests.push(guest);
        }
        for guest in &guests {
            guest.device().activate()?;
        }
        // One worker for all of them: it has hardly begun.
        drop(guests);
        drop(vmm);
        assert_eq!(open(), 0);
    }
    Ok(())
}
