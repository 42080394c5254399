//! Guest statistics (requirement S8): all tags, on demand, with a time-out.

use aerostat::{AEROSTAT_FEATURE_STATS_VQ, aerostat_guest_stats};
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::vring::Piece;
use aerostat_tests::vmm::{Guest, GuestConfig, Result, Vmm};
use std::time::{Duration, Instant};

/// A guest, after the device has read the statistics that its driver posted while it started.
fn boot(vmm: &Vmm) -> Result<Guest> {
    let guest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 8))?;
    wait_for(&guest, |stats| stats.sequence > 0)?;
    Ok(guest)
}

/// What the device knows, once `known` says so.
fn wait_for(
    guest: &Guest,
    known: impl Fn(&aerostat_guest_stats) -> bool,
) -> Result<aerostat_guest_stats> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let stats = guest.device().guest_stats(0)?;
        if known(&stats) {
            return Ok(stats);
        }
        assert!(Instant::now() < deadline, "{stats:?}");
        std::thread::yield_now();
    }
}

#[test]
fn what_linux_posts_before_driver_ok_is_there_at_once() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot(&vmm)?;
    let stats = guest.device().guest_stats(0)?;
    assert_eq!(stats.present, 1 << 4 | 1 << 5);
    assert_eq!(stats.values[5], guest.ram().total_bytes());
    assert!(stats.age_ms < 10_000);
    assert_eq!(guest.books()?.stats_chains, 1);
    Ok(())
}

#[test]
fn all_sixteen_tags_arrive_in_any_order_and_unknown_ones_are_ignored() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm)?;
    let mut records: Vec<(u16, u64)> = (0..16).map(|tag| (tag, 1 << (3 * tag + 1))).collect();
    records.reverse();
    records.insert(3, (16, 99));
    records.insert(7, (u16::MAX, 98));
    guest.driver().set_stats(&records);
    guest.start_following()?;

    let stats = guest.device().guest_stats(5000)?;

    assert_eq!(stats.present, 0xffff);
    for (tag, value) in stats.values.iter().enumerate() {
        assert_eq!(*value, 1 << (3 * tag + 1), "tag {tag}");
    }
    guest.books()?;
    Ok(())
}

#[test]
fn values_of_an_answer_replace_those_of_the_last_one() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm)?;
    guest.start_following()?;
    for round in 1..20 {
        guest.driver().set_stats(&[(10, round), (0, u64::MAX)]);
        let before = guest.device().guest_stats(0)?.sequence;
        let stats = guest.device().guest_stats(5000)?;
        assert_eq!(stats.sequence, before + 1);
        assert_eq!(stats.present, 1 << 10 | 1);
        assert_eq!((stats.values[10], stats.values[0]), (round, u64::MAX));
    }
    Ok(())
}

#[test]
fn a_guest_that_does_not_answer_times_out_and_its_last_values_stay() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot(&vmm)?;
    let asked = Instant::now();
    let error = guest.device().guest_stats(100).expect_err("nobody answers");
    assert_eq!(error.errno(), Some(libc::ETIMEDOUT), "{error}");
    assert!(asked.elapsed() >= Duration::from_millis(100));
    assert_eq!(guest.device().guest_stats(0)?.present, 1 << 4 | 1 << 5);

    // The buffer is back with the driver: its late answer counts, and the next request works.
    assert!(guest.driver().answer_stats()?);
    wait_for(&guest, |stats| stats.sequence == 2)?;
    guest.books()?;
    Ok(())
}

/// S8: the device asks by itself, as often as it was told to, until it is told to stop.
#[test]
fn statistics_come_periodically() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm)?;
    guest.start_following()?;
    guest.device().set_stats_interval(10)?;
    wait_for(&guest, |stats| stats.sequence >= 5)?;
    guest.device().set_stats_interval(0)?;
    // One that is under way may still arrive.
    std::thread::sleep(Duration::from_millis(100));
    let last = guest.device().guest_stats(0)?.sequence;
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(guest.device().guest_stats(0)?.sequence, last);
    Ok(())
}

#[test]
fn asking_needs_the_feature_and_a_device_that_runs() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut config = GuestConfig::new(Backing::Anonymous, 8);
    config.selected &= !AEROSTAT_FEATURE_STATS_VQ;
    let without = vmm.boot(&config)?;
    let errno = |guest: &Guest| guest.device().guest_stats(10).expect_err("refused").errno();
    assert_eq!(errno(&without), Some(libc::ENOTSUP));

    let guest = boot(&vmm)?;
    guest.device().pause()?;
    assert_eq!(errno(&guest), Some(libc::EBUSY));
    guest.device().reset()?;
    assert_eq!(errno(&guest), Some(libc::ENOTCONN));
    // Whatever the old driver said is not the new one's.
    assert_eq!(guest.device().guest_stats(0)?.present, 0);
    Ok(())
}

/// A second buffer gives the first one back: a driver gets each buffer exactly once (I2).
#[test]
fn a_second_buffer_returns_the_first() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot(&vmm)?;
    let ram = guest.ram();
    let mut driver = guest.driver();
    driver.post_stats()?;
    let queue = driver.queue(Role::Stats)?;
    let first = queue.wait_used(ram, Duration::from_secs(10))?;
    assert_eq!(first.written, 0);
    assert_eq!(queue.outstanding(), 1);
    Ok(())
}

/// Odd and oversize buffers are held like any other, and counted (I3).
#[test]
fn odd_and_huge_buffers_are_counted_and_do_no_harm() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot(&vmm)?;
    let readable = |gpa, len| Piece {
        gpa,
        len,
        writable: false,
    };
    let writable = Piece {
        gpa: 0x10_0000,
        len: 160,
        writable: true,
    };
    let odd: [&[Piece]; 5] = [
        &[readable(0x10_0000, 15)],
        &[readable(0x10_0000, 1 << 20)],
        &[readable(u64::MAX - 4, 20)],
        &[writable],
        &[readable(0x10_0000, 20), writable],
    ];
    for (count, pieces) in odd.iter().enumerate() {
        let before = guest.ram().snapshot();
        {
            let mut driver = guest.driver();
            let queue = driver.queue(Role::Stats)?;
            queue.add(guest.ram(), pieces)?;
            queue.kick(guest.ram());
            queue.wait_used(guest.ram(), Duration::from_secs(10))?;
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while guest.books()?.stats_chains < 2 + count as u64 {
            assert!(Instant::now() < deadline, "the buffer was not read");
        }
        let stats = guest.device().guest_stats(0)?;
        assert_eq!(
            (stats.sequence, stats.present),
            (1, 1 << 4 | 1 << 5),
            "no answer"
        );
        let books = guest.books()?;
        assert_eq!(books.chain_errors, 1 + count as u64);
        assert_eq!(books.broken_rings, 0);
        let data = guest.ram().changed_since(&before);
        assert!(data.iter().all(|pfn| *pfn < 0x100), "{data:x?}");
    }
    Ok(())
}

/// S8, periodic: the guest is asked by the device's own timer, also after a pause and a reset.
#[test]
fn an_interval_asks_again_and_again_until_it_is_taken_back() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm)?;
    guest.device().set_stats_interval(10)?;
    guest.start_following()?;
    let asked = |guest: &Guest, from: u64| wait_for(guest, |stats| stats.sequence >= from + 5);
    let first = asked(&guest, 1)?;
    guest.device().pause()?;
    let paused = guest.device().guest_stats(0)?.sequence;
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(
        guest.device().guest_stats(0)?.sequence,
        paused,
        "the VM stands still"
    );
    guest.device().resume()?;
    let second = asked(&guest, first.sequence)?;
    guest.stop_following();
    guest.restart_driver()?;
    guest.start_following()?;
    asked(&guest, second.sequence)?;

    guest.device().set_stats_interval(0)?;
    // One question may be on its way.
    std::thread::sleep(Duration::from_millis(100));
    let last = guest.device().guest_stats(0)?.sequence;
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(guest.device().guest_stats(0)?.sequence, last);
    guest.books()?;
    Ok(())
}
