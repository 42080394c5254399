//! Several guests on one runtime: what one does never reaches another (invariant I3; requirement
//! S4).
#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers that are cut are random ones"
)]

use aerostat_tests::vmm::allocator::mix;
use aerostat_tests::vmm::device::State;
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::hostile::{Hostile, Raw};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::vring::DESC_F_NEXT;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, Result, Vmm};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

fn guests(vmm: &Vmm, count: usize) -> Result<Vec<Guest>> {
    let backings = [Backing::Anonymous, Backing::Memfd { offset_bytes: 0 }];
    let config = |place: usize| {
        let mut config = GuestConfig::new(backings[place % 2], 32);
        config.elements = place % 3 == 2;
        config
    };
    (0..count).map(|place| vmm.boot(&config(place))).collect()
}

#[test]
fn many_guests_inflate_and_deflate_at_once() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guests = guests(&vmm, 9)?;
    let sets: Result<Vec<_>> = guests
        .iter()
        .zip(0..)
        .map(|(g, s)| g.fill_memory(500, s))
        .collect();
    let sets = sets?;
    for guest in &mut guests {
        guest.start_following()?;
    }
    for target in [20 * MIB, 3 * MIB, 24 * MIB] {
        for guest in &guests {
            guest.device().set_target(target)?;
        }
        for guest in &guests {
            guest.wait_actual(target, PATIENCE)?;
        }
    }
    for (guest, set) in guests.iter_mut().zip(&sets) {
        guest.stop_following();
        let books = guest.settled_books()?;
        assert_eq!(guest.device().query()?.ballooned_bytes, 24 * MIB);
        // What waited when it was taken back was not discarded, rightly so.
        let flow = books.balloon;
        assert_eq!(flow.discarded_bytes + flow.withdrawn_bytes, 41 * MIB);
        assert_eq!(books.balloon.skipped_duplicate_bytes, 0);
        guest.assert_intact(set);
    }
    Ok(())
}

#[test]
fn a_guest_that_breaks_its_ring_is_alone_with_it() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guests = guests(&vmm, 4)?;
    let bad = vmm.boot(&GuestConfig::new(Backing::Anonymous, 16).with_plain_split_rings())?;
    for guest in &mut guests {
        guest.start_following()?;
        guest.device().set_target(16 * MIB)?;
    }

    let mut hostile = Hostile::new(&bad, Role::Inflate)?;
    let endless = Raw {
        gpa: 8 * MIB,
        len: 4,
        flags: DESC_F_NEXT,
        next: 0,
    };
    hostile.descriptor(0, endless);
    hostile.offer(0);
    hostile.kick();

    bad.assert_needs_reset();
    assert_eq!(bad.books()?.broken_rings, 1);
    for guest in &mut guests {
        guest.wait_actual(16 * MIB, PATIENCE)?;
        guest.stop_following();
        assert_eq!(guest.device().state()?, State::Active);
        assert_eq!(guest.settled_books()?.broken_rings, 0);
        assert_eq!(guest.device().query()?.ballooned_bytes, 16 * MIB);
    }

    // S4: nothing more is served there until it is reset, and then all is well.
    hostile.offer(0);
    hostile.kick();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(bad.books()?.inflate_chains, 0);
    let mut bad = bad;
    bad.restart_driver()?;
    bad.balloon_to(4 * MIB)?;
    assert_eq!(bad.device().query()?.ballooned_bytes, 4 * MIB);
    Ok(())
}

/// Kick floods, on queues with and without work: the others finish.
#[test]
fn a_flood_of_kicks_keeps_nobody_from_finishing() -> Result<()> {
    let vmm = Vmm::with_workers(1)?;
    let mut guests = guests(&vmm, 2)?;
    let flooder = vmm.boot(&GuestConfig::new(Backing::Anonymous, 16).with_plain_split_rings())?;
    let roles = [Role::Inflate, Role::Deflate, Role::Stats, Role::Reporting];
    let hostiles: Result<Vec<_>> = roles
        .iter()
        .map(|role| Hostile::new(&flooder, *role))
        .collect();
    let hostiles = hostiles?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                hostiles.iter().for_each(Hostile::kick);
            }
        });
        let outcome = guests.iter_mut().try_for_each(|guest| {
            guest.start_following()?;
            guest.device().set_target(16 * MIB)?;
            guest.wait_actual(16 * MIB, PATIENCE)
        });
        stop.store(true, Ordering::Relaxed);
        outcome
    })?;
    assert_eq!(flooder.books()?.inflate_chains, 0);
    Ok(())
}

/// Waits until a worker is at work for `guest`.
fn hostile_is_served(guest: &Guest) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while guest.books()?.inflate_chains == 0 {
        assert!(Instant::now() < deadline, "nothing is served");
        std::thread::yield_now();
    }
    Ok(())
}

/// A guest that keeps its rings full gets no more than its turns: another one, on the same single
/// worker, is served in between.
#[test]
fn a_guest_with_endless_work_leaves_turns_to_others() -> Result<()> {
    let vmm = Vmm::with_workers(1)?;
    let greedy = vmm.boot(&GuestConfig::new(Backing::Anonymous, 16).with_plain_split_rings())?;
    let modest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 16))?;
    modest.fill_memory(100, 1)?;
    let mut hostile = Hostile::new(&greedy, Role::Inflate)?;
    let size = hostile.placement().size;
    // The largest list there is, in no order, of pages that are not there.
    let list = 4 * MIB;
    let far = |index: u64| (mix(index) as u32 | 1 << 31).to_le_bytes();
    hostile.write(list, &(0..1 << 10).flat_map(far).collect::<Vec<u8>>());
    for index in 0..size {
        let whole = Raw {
            gpa: list,
            len: 4 << 10,
            ..Raw::default()
        };
        hostile.descriptor(index, whole);
    }
    let stop = AtomicBool::new(false);
    let (slowest, served) = std::thread::scope(|scope| {
        let greed = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let used = hostile.used_index();
                while hostile.avail_index().wrapping_sub(used) < size {
                    let head = hostile.avail_index() % size;
                    hostile.offer(head);
                }
                hostile.kick();
                std::thread::yield_now();
            }
        });
        let mut slowest = Duration::ZERO;
        let mut outcome = hostile_is_served(&greedy);
        for round in 0..20 {
            let start = Instant::now();
            let target = if round % 2 == 0 { MIB } else { 0 };
            outcome = outcome.and_then(|()| modest.balloon_to(target));
            slowest = slowest.max(start.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
        let _ = greed.join();
        outcome.map(|()| (slowest, modest.books().map(|books| books.inflate_chains)))
    })?;
    println!("20 requests of 1 MiB; slowest one beside a greedy guest: {slowest:?}");
    assert_eq!(served?, 10);
    let books = greedy.settled_books()?;
    assert_eq!(books.chain_errors, 0);
    assert!(books.balloon.skipped_out_of_range_bytes > 0);
    assert_eq!(greedy.device().state()?, State::Active);
    Ok(())
}
