//! Everything a VMM may do to a device, at random, while its guest inflates and deflates: nothing
//! hangs, no interrupt is lost, nothing is discarded behind an inhibit, the guest keeps what is its own, and the
//! books balance (invariants I1, I2, I4).

use aerostat::{aerostat_counters, aerostat_queue_config};
use aerostat_tests::vmm::allocator::mix;
use aerostat_tests::vmm::books::assert_balanced;
use aerostat_tests::vmm::device::Device;
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::guest::{queue_config, resumed};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::GuestRam;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, Result, Vmm};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);
const GUEST_MIB: u64 = 32;

/// A guest's queues as they are to be started again.
fn queues(guest: &Guest) -> Result<Vec<(u32, aerostat_queue_config)>> {
    let roles = [Role::Inflate, Role::Deflate, Role::Stats, Role::Reporting];
    let config = |role| {
        let index = guest.index_of(role)?;
        Ok((index, queue_config(guest.driver().queue(role)?, false)))
    };
    roles.into_iter().map(config).collect()
}

/// One thing that a VMM does.
fn disturb(
    device: &Device,
    ram: &GuestRam,
    queues: &[(u32, aerostat_queue_config)],
    number: u64,
) -> Result<()> {
    let wait = || std::thread::sleep(Duration::from_micros(number >> 8 & 0xff));
    match number % 8 {
        0 => {
            device.pause()?;
            wait();
            device.resume()
        }
        1 => {
            device.inhibit()?;
            let before = device.counters()?;
            wait();
            let after = device.counters()?;
            let discarded = |counters: &aerostat_counters| {
                (
                    counters.balloon.discarded_bytes,
                    counters.report.discarded_bytes,
                )
            };
            assert_eq!(discarded(&after), discarded(&before), "while inhibited");
            assert_balanced(&after);
            device.uninhibit()
        }
        2 => device.set_memory(ram),
        3 | 4 => {
            let place = usize::try_from(number >> 16).unwrap_or(0) % queues.len().max(1);
            let Some((index, config)) = queues.get(place) else {
                return Ok(());
            };
            let position = device.stop_queue(*index)?;
            wait();
            device.start_queue(*index, &resumed(config, &position))
        }
        5 => match queues.first() {
            Some((index, config)) => device.set_queue_call(*index, config.call_fd),
            None => Ok(()),
        },
        6 => device.set_target((number >> 16) % (GUEST_MIB - 8) * MIB),
        _ => device.query().map(drop),
    }
}

/// Disturbs the guest until `end`, and starts its driver anew from time to time.
fn live(guest: &mut Guest, seed: u64, end: Instant) -> Result<u64> {
    let mut number = seed;
    let mut done = 0;
    let working_set = guest.fill_memory(1000, seed)?;
    while Instant::now() < end {
        let elements = guest.config().elements;
        let queues = if elements { vec![] } else { queues(guest)? };
        guest.start_following()?;
        for _ in 0..500 {
            number = mix(number);
            disturb(guest.device(), guest.ram(), &queues, number)?;
            done += 1;
        }
        guest.device().set_target(8 * MIB)?;
        guest.wait_actual(8 * MIB, PATIENCE)?;
        guest.stop_following();
        guest.settled_books()?;
        guest.assert_intact(&working_set);
        guest.restart_driver()?;
    }
    Ok(done)
}

#[test]
fn nothing_that_a_vmm_does_under_load_is_lost() -> Result<()> {
    let seconds = std::env::var("AEROSTAT_CHAOS_SECONDS").ok();
    let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(3);
    let end = Instant::now() + Duration::from_secs(seconds);
    let vmm = Vmm::new()?;
    let backings = [Backing::Anonymous, Backing::Memfd { offset_bytes: 0 }];
    let mut guests = Vec::new();
    for place in 0..6 {
        let mut config = GuestConfig::new(backings[place % 2], GUEST_MIB);
        config.elements = place == 5;
        guests.push(vmm.boot(&config)?);
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = guests
            .iter_mut()
            .zip(1..)
            .map(|(guest, seed)| scope.spawn(move || live(guest, seed, end)))
            .collect();
        for thread in threads {
            let done = thread.join().expect("the guest's thread lives")?;
            assert!(done > 0);
        }
        Result::Ok(())
    })?;
    // Some of it came while discarding was inhibited, and was told so.
    let skipped = guests.iter().map(|guest| {
        let books = guest.books()?;
        Ok(books.balloon.skipped_inhibited_bytes + books.report.skipped_inhibited_bytes)
    });
    assert!(skipped.sum::<Result<u64>>()? > 0);
    Ok(())
}
