//! Faults of the host while memory is discarded: no page is lost, none is discarded twice or when it is the
//! guest's, and the books balance (invariants I1, I2, I4).

use aerostat::{AEROSTAT_DEFLATE_PREFAULT, AEROSTAT_DEFLATE_REBUILD};
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::eventfd::EventFd;
use aerostat_tests::vmm::faults::{Call, Faults, Verdict, with_faults};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::settings::Settings;
use aerostat_tests::vmm::working_set::WorkingSet;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use std::time::{Duration, Instant};

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };
const PATIENCE: Duration = Duration::from_secs(20);
/// Where the memory begins that the tests give away.
const HIGH: u64 = 64 * MIB;
const FIRST: u64 = HIGH / PAGE_BYTES;

/// A guest with its rings in one region and 8 MiB of known contents in another.
fn boot(vmm: &Vmm, backing: Backing, frame_bytes: u64) -> Result<(Guest, WorkingSet)> {
    let low = RegionSpec::new(0, 8 * MIB, Backing::Anonymous);
    let high = RegionSpec {
        page_size_bytes: frame_bytes,
        ..RegionSpec::new(HIGH, 8 * MIB, backing)
    };
    let guest = vmm.boot(&GuestConfig::with_regions(vec![low, high]))?;
    let pages = (FIRST..FIRST + 8 * MIB / PAGE_BYTES).collect();
    let contents = WorkingSet::fill(guest.ram(), pages, 3);
    Ok((guest, contents))
}

/// Every second page of the first 4 MiB: as many ranges as pages.
fn scattered() -> Vec<u64> {
    (0..512).map(|page| FIRST + 2 * page).collect()
}

/// Which bytes were discarded how often, by the calls that were made.
fn discarded_once(faults: &Faults) -> u64 {
    let mut ranges = Vec::new();
    for (call, verdict) in faults.made() {
        match (call, verdict) {
            (Call::ProcessMadvise(all), Verdict::Allow | Verdict::Hold) => ranges.extend(all),
            (Call::ProcessMadvise(all), Verdict::Partly(count)) => {
                ranges.extend(all.into_iter().take(count));
            }
            (Call::Madvise(start, len) | Call::PunchHole(start, len), verdict)
                if !matches!(verdict, Verdict::Fail(_)) =>
            {
                ranges.push((start, len));
            }
            _ => {}
        }
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "twice: {pair:x?}");
    }
    ranges.iter().map(|(_, len)| len).sum()
}

/// Calls that fail for good: what cannot be freed is acknowledged, counted and untouched; taken back and
/// given again it is freed.
#[test]
fn memory_that_cannot_be_freed_is_counted_and_stays_whole() -> Result<()> {
    let errors = [
        libc::ENOMEM,
        libc::EPERM,
        libc::EBADF,
        libc::EINVAL,
        libc::ENOSPC,
        libc::EIO,
    ];
    with_faults(|faults| {
        let vmm = Vmm::new()?;
        for (backing, frame_bytes) in [(Backing::Anonymous, 0), (MEMFD, 0), (MEMFD, 2 * MIB)] {
            for errno in errors {
                let (guest, contents) = boot(&vmm, backing, frame_bytes)?;
                let pages = contents.pfns()[..1024].to_vec();
                let given = pages.len() as u64 * PAGE_BYTES;
                faults.judge(move |_| Verdict::Fail(errno));

                guest.driver().give(&pages)?;
                let books = guest.settled_books()?.balloon;
                assert!(!faults.made().is_empty());
                assert_eq!(books.skipped_failed_bytes, given, "{backing:?}, {errno}");
                assert_eq!((books.discarded_bytes, books.held_bytes), (0, 0));
                guest.assert_intact(&contents);
                assert_eq!(guest.device().query()?.ballooned_bytes, given);

                faults.judge(|_| Verdict::Allow);
                guest.driver().take(&pages)?;
                assert_eq!(guest.books()?.returned_bytes, given);
                guest.assert_intact(&contents);
                guest.driver().give(&pages)?;
                assert_eq!(guest.settled_books()?.balloon.discarded_bytes, given);
                assert_eq!(discarded_once(faults), given);
                assert_eq!(contents.damaged(guest.ram()), pages);
                faults.none();
            }
        }
        Ok(())
    })
}

/// Calls that are interrupted, or find something busy, are made again, but not for ever.
#[test]
fn interrupted_and_busy_calls_are_made_again_a_bounded_number_of_times() -> Result<()> {
    with_faults(|faults| {
        let vmm = Vmm::new()?;
        for backing in [Backing::Anonymous, MEMFD] {
            for errno in [libc::EINTR, libc::EAGAIN] {
                let (guest, contents) = boot(&vmm, backing, 0)?;
                let (now, later) = (scattered(), FIRST + 1024..FIRST + 1280);
                // Two of three calls are in vain.
                let mut count = 0;
                faults.judge(move |_| {
                    count += 1;
                    if count % 3 == 0 {
                        Verdict::Allow
                    } else {
                        Verdict::Fail(errno)
                    }
                });
                guest.driver().give(&now)?;
                let books = guest.settled_books()?.balloon;
                let given = now.len() as u64 * PAGE_BYTES;
                assert_eq!(books.discarded_bytes, given, "{backing:?}, {errno}");
                assert_eq!(discarded_once(faults), given);
                assert_eq!(contents.damaged(guest.ram()), now);

                faults.judge(move |_| Verdict::Fail(errno));
                let later: Vec<u64> = later.collect();
                guest.driver().give(&later)?;
                let failed = guest.settled_books()?.balloon.skipped_failed_bytes;
                assert_eq!(failed, later.len() as u64 * PAGE_BYTES);
                assert!(faults.made().len() < 200, "{}", faults.made().len());
                assert_eq!(contents.damaged(guest.ram()), now);
                faults.none();
            }
        }
        Ok(())
    })
}

/// A vectored call may stop anywhere: what it did is not done again, and what it did not is done.
#[test]
fn a_vectored_call_that_does_less_goes_on_where_it_stopped() -> Result<()> {
    with_faults(|faults| {
        let vmm = Vmm::new()?;
        for ranges in [0, 1, 7, 255] {
            let (guest, contents) = boot(&vmm, Backing::Anonymous, 0)?;
            faults.judge(move |_| Verdict::Partly(ranges));
            let pages = scattered();
            guest.driver().give(&pages)?;
            let books = guest.settled_books()?.balloon;
            let given = pages.len() as u64 * PAGE_BYTES;
            assert_eq!(books.discarded_bytes, given, "{ranges} ranges a call");
            assert_eq!(discarded_once(faults), given);
            assert_eq!(contents.damaged(guest.ram()), pages);
            let vectored = faults
                .made()
                .iter()
                .any(|(call, _)| matches!(call, Call::ProcessMadvise(_)));
            if !vectored {
                println!(
                    "this host has no vectored process_madvise: there is nothing to cut short"
                );
            }
            faults.none();
        }
        Ok(())
    })
}

/// In a vectored call one range may fail for its own reason: only that one is not freed.
#[test]
fn one_range_that_fails_keeps_no_other_from_being_freed() -> Result<()> {
    with_faults(|faults| {
        let vmm = Vmm::new()?;
        let (guest, contents) = boot(&vmm, Backing::Anonymous, 0)?;
        // Vectored calls stop at their fifth range, which then fails alone.
        faults.judge(|call| match call {
            Call::ProcessMadvise(_) => Verdict::Partly(4),
            _ => Verdict::Fail(libc::ENOMEM),
        });
        let pages = scattered();
        guest.driver().give(&pages)?;
        let books = guest.settled_books()?.balloon;
        let freed = discarded_once(faults);
        assert_eq!(books.discarded_bytes, freed);
        let given = pages.len() as u64 * PAGE_BYTES;
        assert_eq!(books.skipped_failed_bytes, given - freed);
        let damaged = contents.damaged(guest.ram()).len() as u64;
        assert_eq!(damaged * PAGE_BYTES, freed);
        let made = faults.made();
        let is_vectored = |(call, _): &&(Call, Verdict)| matches!(call, Call::ProcessMadvise(_));
        if made.iter().any(|made| is_vectored(&made)) {
            // Four of five were, all the way to the end.
            assert!(
                freed * 5 >= given * 4 - 5 * PAGE_BYTES,
                "{freed} of {given}"
            );
        }
        Ok(())
    })
}

/// What is done for a guest that takes memory back is best effort: where the host has no memory, or does not know
/// how, the deflate is acknowledged all the same, and the guest's own faults see to it.
#[test]
fn a_deflate_whose_memory_cannot_be_had_at_once_is_acknowledged() -> Result<()> {
    with_faults(|faults| {
        let vmm = Vmm::new()?;
        for errno in [libc::ENOMEM, libc::EFAULT, libc::EAGAIN, libc::EINVAL] {
            let (guest, contents) = boot(&vmm, Backing::Anonymous, 0)?;
            let pages = contents.pfns()[..1024].to_vec();
            let given = pages.len() as u64 * PAGE_BYTES;
            guest.driver().give(&pages)?;
            assert_eq!(guest.settled_books()?.balloon.discarded_bytes, given);

            let all = AEROSTAT_DEFLATE_PREFAULT | AEROSTAT_DEFLATE_REBUILD;
            guest.device().set_deflate(all)?;
            faults.judge(move |call| match call {
                Call::Restore(..) => Verdict::Fail(errno),
                _ => Verdict::Allow,
            });
            guest.driver().take(&pages)?;
            let made = faults.made();
            assert!(
                made.iter()
                    .all(|(call, _)| matches!(call, Call::Restore(..)))
            );
            assert!(made.len() >= 2, "one for each option at least: {made:?}");
            assert_eq!(guest.books()?.returned_bytes, given);
            assert_eq!(guest.device().query()?.ballooned_bytes, 0);
            let used_again = WorkingSet::fill(guest.ram(), pages, 5);
            guest.assert_intact(&used_again);
            faults.none();
        }
        Ok(())
    })
}

/// A guest that goes up and down while every third call fails: it loses nothing that it keeps, and the
/// books tell of it all.
#[test]
fn faults_under_load_lose_nothing() -> Result<()> {
    with_faults(|faults| {
        for write_behind in [false, true] {
            let vmm = Vmm::new()?;
            let mut config = GuestConfig::new(MEMFD, 48);
            config.settings = Settings {
                write_behind,
                ..Settings::chosen()
            };
            let mut guest = vmm.boot(&config)?;
            let working_set = guest.fill_memory(2000, 11)?;
            let mut count = 0;
            faults.judge(move |_| {
                count += 1;
                match count % 6 {
                    0 => Verdict::Fail(libc::ENOMEM),
                    3 => Verdict::Fail(libc::EINTR),
                    _ => Verdict::Allow,
                }
            });
            guest.start_following()?;
            for round in 1..=12 {
                let target = if round % 2 == 0 { 2 } else { 20 + round } * MIB;
                guest.device().set_target(target)?;
                if round % 3 == 0 {
                    guest.device().inhibit()?;
                    guest.device().uninhibit()?;
                }
                guest.wait_actual(target, PATIENCE)?;
                guest.books()?;
            }
            guest.stop_following();
            let books = guest.settled_books()?.balloon;
            assert!(books.skipped_failed_bytes > 0 && books.discarded_bytes > 0);
            guest.assert_intact(&working_set);
            // What is in the balloon now and could not be freed comes back as it was given; the rest as
            // zeros. Either way it is usable.
            faults.none();
            guest.balloon_to(0)?;
            guest.balloon_to(24 * MIB)?;
            guest.settled_books()?;
            guest.assert_intact(&working_set);
        }
        Ok(())
    })
}

/// A call that takes its time holds up its own guest only, and whoever waits for that guest to be drained.
#[test]
fn a_worker_that_stalls_holds_up_its_own_guest_only() -> Result<()> {
    with_faults(|faults| {
        let vmm = Vmm::with_workers(2)?;
        let (stalled, contents) = boot(&vmm, Backing::Anonymous, 0)?;
        let other = vmm.boot(&GuestConfig::new(MEMFD, 16))?;
        faults.judge(|call| match call {
            Call::PunchHole(..) => Verdict::Allow,
            _ => Verdict::Hold,
        });
        let pages = scattered()[..256].to_vec();
        {
            let mut driver = stalled.driver();
            let list = driver.write_pfns(&pages);
            let queue = driver.queue(Role::Inflate)?;
            queue.add(stalled.ram(), &[list])?;
            queue.kick(stalled.ram());
        }
        let begun = Instant::now();
        while faults.held() == 0 {
            assert!(begun.elapsed() < PATIENCE, "nothing was discarded");
            std::thread::yield_now();
        }

        // The other guest notices nothing, and nobody has to wait to look at this one.
        for target in [8 * MIB, MIB, 4 * MIB] {
            other.balloon_to(target)?;
        }
        stalled.device().set_target(MIB)?;
        assert_eq!(stalled.device().query()?.target_bytes, MIB);
        assert_eq!(stalled.books()?.balloon.discarded_bytes, 0);
        std::thread::scope(|scope| {
            let device = stalled.device();
            let pause = scope.spawn(move || device.pause());
            std::thread::sleep(Duration::from_millis(50));
            assert!(
                !pause.is_finished(),
                "pause returned while a page was on its way"
            );
            faults.release();
            pause.join().expect("the pausing thread lives")
        })?;
        let books = stalled.books()?.balloon;
        let given = pages.len() as u64 * PAGE_BYTES;
        assert_eq!((books.discarded_bytes, books.pending_bytes), (given, 0));
        assert_eq!(contents.damaged(stalled.ram()), pages);
        stalled.device().resume()?;
        stalled.driver().leak(0)?;
        Ok(())
    })
}

/// Signals of the device: what nobody reads is full one day, and what the VMM closed is gone. Neither stops
/// a worker, nor keeps a guest that looks for itself from its buffers.
#[test]
fn eventfds_that_are_full_or_closed_stop_nobody() -> Result<()> {
    let vmm = Vmm::with_workers(1)?;
    let guest = vmm.boot(&GuestConfig::new(MEMFD, 16))?;
    let index = guest.index_of(Role::Inflate)?;
    let by_looking = |pages: usize| -> Result<()> {
        let mut driver = guest.driver();
        let pfns: Vec<u64> = driver.allocator.unused().take(pages).collect();
        let list = driver.write_pfns(&pfns);
        let queue = driver.queue(Role::Inflate)?;
        queue.add(guest.ram(), &[list])?;
        queue.kick.signal();
        let begun = Instant::now();
        while queue.take_used(guest.ram()).is_none() {
            assert!(begun.elapsed() < PATIENCE, "no answer");
            std::thread::yield_now();
        }
        Ok(())
    };

    let full = EventFd::new()?;
    full.fill();
    guest.device().set_queue_call(index, full.raw())?;
    for pages in 1..20 {
        by_looking(pages)?;
    }
    guest.config_event.fill();
    guest.device().set_target(MIB)?;
    guest.device().set_target(2 * MIB)?;

    // The library has descriptors of its own; that these are gone is nothing to it.
    drop(full);
    by_looking(20)?;
    {
        let gone = EventFd::new()?;
        guest.device().set_queue_call(index, gone.raw())?;
    }
    by_looking(21)?;
    let call = guest.driver().queue(Role::Inflate)?.call.raw();
    guest.device().set_queue_call(index, call)?;
    guest.config_event.take();
    guest.balloon_to(4 * MIB)?;
    guest.device().pause()?;
    assert_eq!(guest.settled_books()?.balloon.pending_bytes, 0);
    Ok(())
}
