//! Saving and restoring (requirement S13): a guest moves to another device, in whatever state and at
//! whatever moment, and notices nothing.
#![expect(
    clippy::cast_possible_truncation,
    reason = "sizes and indices of these guests are small"
)]

use aerostat::{
    AEROSTAT_FEATURE_FREE_PAGE_HINT, AEROSTAT_FEATURE_HOST_RESET, AEROSTAT_FEATURE_PAGE_POISON,
    AEROSTAT_FEATURE_STATS_VQ, aerostat_balloon,
};
use aerostat_tests::vmm::allocator::mix;
use aerostat_tests::vmm::device::{Device, State};
use aerostat_tests::vmm::driver::{CONFIG_POISON, CONFIG_RESET_ID, Role};
use aerostat_tests::vmm::hinting::CMD_DONE;
use aerostat_tests::vmm::hostile::Hostile;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::{GuestRam, RegionSpec};
use aerostat_tests::vmm::{GuestConfig, MIB, Numbering, PAGE_BYTES, Result, Vmm, VmmError};
use std::fmt::Debug;
use std::time::{Duration, Instant};

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };

#[track_caller]
fn assert_errno<T: Debug>(outcome: Result<T, VmmError>, errno: i32) {
    let error = outcome.expect_err("it was accepted");
    assert_eq!(error.errno(), Some(errno), "{error}");
}

fn moves_while_ballooned(config: &GuestConfig) -> Result<()> {
    let (vmm, elsewhere) = (Vmm::new()?, Vmm::new()?);
    let mut guest = vmm.boot(config)?;
    let working_set = guest.fill_memory(1000, 1)?;
    guest.balloon_to(24 * MIB)?;
    guest.settled_books()?;
    guest.device().set_target(30 * MIB)?;
    let (before, allocated) = (guest.device().query()?, guest.ram().allocated_bytes()?);

    guest.move_to(&elsewhere)?;

    let after = guest.device().query()?;
    assert_eq!(after.state, 1, "active");
    let sizes = |balloon: &aerostat_balloon| {
        (
            balloon.target_bytes,
            balloon.actual_bytes,
            balloon.ballooned_bytes,
        )
    };
    assert_eq!(sizes(&after), sizes(&before));
    assert_eq!(guest.ram().allocated_bytes()?, allocated);
    assert!(
        guest.config_event.take() > 0,
        "interrupts may have been lost"
    );
    let books = guest.books()?;
    assert_eq!(
        books.balloon.requested_bytes, 0,
        "the old device's books are its own"
    );
    guest.assert_intact(&working_set);

    // It goes on in both directions, with the pages that the old device took.
    guest.balloon_to(40 * MIB)?;
    assert_eq!(guest.settled_books()?.balloon.discarded_bytes, 16 * MIB);
    guest.balloon_to(0)?;
    let books = guest.books()?;
    assert_eq!(
        (books.returned_bytes, books.rejected_take_bytes),
        (40 * MIB, 0)
    );
    guest.assert_intact(&working_set);
    guest.fill_memory(2000, 2)?;
    guest.assert_intact(&working_set);
    Ok(())
}

#[test]
fn a_ballooned_guest_moves() -> Result<()> {
    for backing in [Backing::Anonymous, MEMFD] {
        moves_while_ballooned(&GuestConfig::new(backing, 64))?;
    }
    let mut config = GuestConfig::with_regions(vec![
        RegionSpec::new(0, 32 * MIB, MEMFD),
        RegionSpec::new(32 * MIB, 16 * MIB, MEMFD),
        RegionSpec::new(1 << 32, 16 * MIB, Backing::Anonymous),
    ]);
    config.numbering = Numbering::Fixed;
    moves_while_ballooned(&config)
}

/// Any moment is a good one: between chains, with buffers that wait, with statistics on their way, in
/// a round of hints.
#[test]
fn a_guest_moves_at_random_moments_under_load() -> Result<()> {
    let mut config = GuestConfig::new(MEMFD, 64);
    let homes = [Vmm::new()?, Vmm::new()?];
    let recommended = homes[0].assemble(&config)?.device().offered_features()?;
    config.offered = recommended | AEROSTAT_FEATURE_FREE_PAGE_HINT;
    let mut guest = homes[0].boot(&config)?;
    let working_set = guest.fill_memory(2000, 3)?;
    guest.start_following()?;
    for round in 0..150u64 {
        let draw = mix(round);
        guest.device().set_target(draw % 48 * MIB)?;
        guest.device().set_stats_interval(1)?;
        if draw.is_multiple_of(5) {
            guest.device().start_hints(60_000)?;
        }
        std::thread::sleep(Duration::from_micros(draw >> 32 & 0xfff));
        guest.move_to(&homes[round as usize % 2])?;
        guest.books()?;
    }
    guest.device().set_target(20 * MIB)?;
    guest.wait_actual(20 * MIB, Duration::from_secs(20))?;
    guest.device().guest_stats(5000)?;
    guest.stop_following();
    assert_eq!(guest.device().query()?.ballooned_bytes, 20 * MIB);
    assert_eq!(guest.driver().ballooned_bytes(), 20 * MIB);
    guest.balloon_to(0)?;
    let books = guest.settled_books()?;
    assert_eq!((books.rejected_take_bytes, books.chain_errors), (0, 0));
    assert_eq!(guest.driver().hinted_bytes(), 0);
    guest.assert_intact(&working_set);
    Ok(())
}

/// S8: the buffer that the old device held is the new one's, and comes back exactly once.
#[test]
fn a_held_stats_buffer_moves() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 8))?;
    let told = |device: &Device| -> Result<()> {
        let begun = Instant::now();
        while device.guest_stats(0)?.sequence == 0 {
            assert!(begun.elapsed() < Duration::from_secs(10), "no statistics");
            std::thread::yield_now();
        }
        Ok(())
    };
    for _ in 0..3 {
        told(guest.device())?;
        guest.move_to(&vmm)?;
    }
    told(guest.device())?;
    assert!(!guest.driver().answer_stats()?, "nobody asked");
    guest.start_following()?;
    for _ in 0..3 {
        guest.device().guest_stats(5000)?;
    }
    guest.stop_following();
    assert_eq!(guest.driver().queue(Role::Stats)?.outstanding(), 1);
    Ok(())
}

/// I4: pages of incomplete frames are held over the move, and freed when the rest comes.
#[test]
fn held_frames_move_and_are_completed_elsewhere() -> Result<()> {
    let vmm = Vmm::new()?;
    let frames = RegionSpec {
        page_size_bytes: 2 * MIB,
        ..RegionSpec::new(64 * MIB, 16 * MIB, MEMFD)
    };
    let low = RegionSpec::new(0, 8 * MIB, Backing::Anonymous);
    let mut guest = vmm.boot(&GuestConfig::with_regions(vec![low, frames]))?;
    let first = 64 * MIB / PAGE_BYTES;
    let pages: Vec<u64> = (first..first + 1024).collect();
    for pfn in &pages {
        assert!(guest.driver().allocator.take(*pfn));
        guest.ram().touch(*pfn);
    }
    // A complete frame, and most of the next one.
    guest.driver().give(&pages[..1000])?;
    assert_eq!(guest.books()?.balloon.held_bytes, 488 * PAGE_BYTES);

    guest.move_to(&vmm)?;

    let flow = guest.books()?.balloon;
    assert_eq!(
        (flow.held_bytes, flow.reopened_bytes),
        (488 * PAGE_BYTES, 488 * PAGE_BYTES)
    );
    let full = guest.ram().allocated_bytes()?;
    guest.driver().give(&pages[1000..])?;
    let flow = guest.settled_books()?.balloon;
    assert_eq!((flow.held_bytes, flow.discarded_bytes), (0, 2 * MIB));
    assert_eq!(full - guest.ram().allocated_bytes()?, 2 * MIB);
    // The first frame was complete before the move: a part of it reopens the rest.
    guest.driver().take(&pages[..1])?;
    assert_eq!(guest.books()?.balloon.held_bytes, 511 * PAGE_BYTES);
    Ok(())
}

#[test]
fn a_device_that_needs_a_reset_still_does_elsewhere() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&GuestConfig::new(MEMFD, 16).with_plain_split_rings())?;
    guest.balloon_to(2 * MIB)?;
    let mut hostile = Hostile::new(&guest, Role::Deflate)?;
    hostile.offer(u16::MAX);
    hostile.kick();
    guest.assert_needs_reset();
    drop(hostile);
    guest.config_event.take();

    guest.move_to(&vmm)?;

    guest.assert_needs_reset();
    assert_eq!(guest.device().query()?.ballooned_bytes, 2 * MIB);
    guest.restart_driver()?;
    assert_eq!(guest.device().query()?.ballooned_bytes, 0);
    guest.balloon_to(4 * MIB)?;
    Ok(())
}

#[test]
fn a_device_that_is_not_set_up_moves_too() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.assemble(&GuestConfig::new(MEMFD, 16))?;
    guest.device().set_target(4 * MIB)?;
    guest.move_to(&vmm)?;
    assert_eq!(guest.device().state()?, State::Configuring);
    guest.negotiate()?;
    guest.move_to(&vmm)?;
    guest.start_driver()?;
    guest.driver().follow_target()?;
    assert_eq!(guest.device().query()?.ballooned_bytes, 4 * MIB);
    Ok(())
}

/// S10 and S13: the driver wrote its poison before DRIVER_OK and does not do it again.
#[test]
fn poison_moves() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut config = GuestConfig::new(MEMFD, 24);
    config.selected |= AEROSTAT_FEATURE_PAGE_POISON;
    let mut guest = vmm.assemble(&config)?;
    let features = guest.negotiate()?;
    assert!(features & AEROSTAT_FEATURE_PAGE_POISON != 0);
    guest
        .device()
        .write_config(CONFIG_POISON, &0xaa_u32.to_le_bytes())?;
    guest.start_queues(features)?;
    guest.device().activate()?;

    guest.move_to(&vmm)?;

    let mut poison = [0; 4];
    guest.device().read_config(CONFIG_POISON, &mut poison)?;
    assert_eq!(u32::from_le_bytes(poison), 0xaa);
    let reported = guest.driver().report_unused(512)?;
    let books = guest.settled_books()?;
    assert_eq!(books.report.skipped_partial_bytes, reported);
    assert_eq!(books.report.discarded_bytes, 0);
    Ok(())
}

/// S9: a round of the old device is done, and its id does not come back.
#[test]
fn a_round_of_hints_ends_with_the_move() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut config = GuestConfig::new(MEMFD, 32);
    let recommended = vmm.assemble(&config)?.device().offered_features()?;
    config.offered = recommended | AEROSTAT_FEATURE_FREE_PAGE_HINT;
    let mut guest = vmm.boot(&config)?;
    guest.device().start_hints(60_000)?;
    let first = guest.driver().hint_command()?;
    assert!(guest.driver().answer_hints()?);
    assert!(guest.driver().hinted_bytes() > 0);
    guest.config_event.take();

    guest.move_to(&vmm)?;

    assert!(guest.config_event.take() > 0);
    assert_eq!(guest.driver().hint_command()?, CMD_DONE);
    assert!(guest.driver().answer_hints()?);
    assert_eq!(guest.driver().hinted_bytes(), 0);
    guest.device().start_hints(60_000)?;
    assert_eq!(guest.driver().hint_command()?, first + 1);
    Ok(())
}

/// All or nothing, and from anybody: what does not fit, or is damaged, changes nothing.
#[test]
fn states_that_do_not_fit_are_refused_and_change_nothing() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(MEMFD, 16))?;
    guest.balloon_to(8 * MIB)?;
    guest.device().pause()?;
    let state = guest.device().save()?;
    assert_errno(guest.device().restore(&state), libc::EALREADY);

    let new = Device::new(vmm.runtime(), guest.config().offered, -1, -1)?;
    assert_errno(new.restore(&state), libc::ENOTCONN);
    let small = GuestRam::new("small", &[RegionSpec::new(0, 4 * MIB, Backing::Anonymous)])?;
    new.set_memory(&small)?;
    assert_errno(new.restore(&state), libc::ERANGE);
    let rom = RegionSpec {
        readonly: true,
        ..RegionSpec::new(0, 16 * MIB, Backing::Anonymous)
    };
    new.set_memory(&GuestRam::new("rom", &[rom])?)?;
    assert_errno(new.restore(&state), libc::ERANGE);
    new.set_memory(guest.ram())?;
    for len in 0..state.len() {
        assert_errno(new.restore(&state[..len]), libc::EBADMSG);
    }
    for at in 0..state.len() {
        let mut damaged = state.clone();
        damaged[at] ^= 1 << (at % 8);
        let error = new.restore(&damaged).expect_err("damaged");
        let expected = [Some(libc::EBADMSG), Some(libc::EPROTONOSUPPORT)];
        assert!(expected.contains(&error.errno()), "{error}");
    }
    let balloon = new.query()?;
    assert_eq!((balloon.target_bytes, balloon.ballooned_bytes), (0, 0));
    assert_errno(new.saved_position(0), libc::ENOENT);
    new.restore(&state)?;
    assert_eq!(new.query()?.ballooned_bytes, 8 * MIB);
    new.reset()?;
    assert_errno(new.saved_position(0), libc::ENOENT);
    new.restore(&state)?;
    assert_eq!(new.save()?.len(), state.len());

    let without = vmm
        .assemble(&GuestConfig::new(MEMFD, 16))?
        .device()
        .offered_features()?;
    let other = Device::new(vmm.runtime(), without & !AEROSTAT_FEATURE_STATS_VQ, -1, -1)?;
    other.set_memory(guest.ram())?;
    assert_errno(other.restore(&state), libc::ENOTSUP);
    Ok(())
}

/// Inhibits are the VMM's: a restored device has its own.
#[test]
fn inhibits_stay_behind() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&GuestConfig::new(MEMFD, 16))?;
    guest.device().inhibit()?;
    guest.balloon_to(2 * MIB)?;
    guest.move_to(&vmm)?;
    assert_errno(guest.device().uninhibit(), libc::EPROTO);
    guest.config_event.take();
    guest.balloon_to(4 * MIB)?;
    let flow = guest.settled_books()?.balloon;
    assert_eq!(
        (flow.discarded_bytes, flow.skipped_inhibited_bytes),
        (2 * MIB, 0)
    );
    Ok(())
}

/// I1: what waits in the old device's window is discarded before the guest goes on with the new one.
#[test]
fn pages_in_the_window_are_discarded_before_the_move() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&GuestConfig::new(MEMFD, 32))?;
    let working_set = guest.fill_memory(500, 6)?;
    let full = guest.ram().allocated_bytes()?;
    guest.device().set_write_behind(64 * MIB, 60_000)?;
    guest.driver().fill(200)?;
    guest.driver().fill(200)?;
    let old = guest.device().clone();
    guest.move_to(&vmm)?;
    assert_eq!(old.counters()?.balloon.pending_bytes, 0);
    // The driver's own buffers may be new.
    let freed = full - guest.ram().allocated_bytes()?;
    assert!(
        (398 * PAGE_BYTES..=400 * PAGE_BYTES).contains(&freed),
        "{freed}"
    );
    guest.driver().leak(256)?;
    let again = guest.fill_memory(200, 7)?;
    drop(old);
    guest.assert_intact(&again);
    guest.assert_intact(&working_set);
    guest.books()?;
    Ok(())
}

/// V3: a host reset that the driver has not acknowledged is still pending elsewhere.
#[test]
fn a_pending_host_reset_moves() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut config = GuestConfig::new(MEMFD, 16);
    let recommended = vmm.assemble(&config)?.device().offered_features()?;
    config.offered = recommended | AEROSTAT_FEATURE_HOST_RESET;
    config.selected |= AEROSTAT_FEATURE_HOST_RESET;
    let mut guest = vmm.boot(&config)?;
    guest.balloon_to(4 * MIB)?;
    guest.device().reset_balloon()?;
    let state = guest.device().save()?;
    guest.move_to(&vmm)?;
    let mut fields = [0; 8];
    guest.device().read_config(CONFIG_RESET_ID, &mut fields)?;
    assert_eq!(fields, [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.device().query()?.ballooned_bytes, 0);
    guest
        .device()
        .write_config(CONFIG_RESET_ID + 4, &[1, 0, 0, 0])?;
    let books = guest.books()?;
    assert_eq!((books.host_resets, books.host_resets_acknowledged), (1, 1));

    let stock = Device::new(vmm.runtime(), recommended, -1, -1)?;
    stock.set_memory(guest.ram())?;
    assert_errno(stock.restore(&state), libc::ENOTSUP);
    Ok(())
}
