//! Host reset: all pages are the guest's at once, and whatever was under way is harmless (requirement V3;
//! invariants I1, I4; docs/virtio-balloon-extensions.md). Each test runs with the library's own rings and
//! with elements.

use aerostat::{
    AEROSTAT_CONFIG_BYTES, AEROSTAT_CONFIG_BYTES_HOST_RESET, AEROSTAT_FEATURE_HOST_RESET,
    AEROSTAT_FEATURE_PAGE_REFUSAL,
};
use aerostat_tests::vmm::driver::{CONFIG_RESET_ID, Role};
use aerostat_tests::vmm::elements::ElementQueues;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::vring::{Piece, Used};
use aerostat_tests::vmm::working_set::WorkingSet;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };
const EXTENSIONS: u64 = AEROSTAT_FEATURE_PAGE_REFUSAL | AEROSTAT_FEATURE_HOST_RESET;
const PATIENCE: Duration = Duration::from_secs(10);

/// A guest whose device offers host reset, and page refusal if asked to.
fn config(elements: bool, refusal: bool) -> Result<GuestConfig> {
    let mut config = GuestConfig::new(MEMFD, 16);
    let stock = Vmm::new()?.assemble(&config)?.device().offered_features()?;
    config.offered = stock | AEROSTAT_FEATURE_HOST_RESET;
    if refusal {
        config.offered |= AEROSTAT_FEATURE_PAGE_REFUSAL;
    }
    config.selected |= config.offered & EXTENSIONS;
    config.elements = elements;
    Ok(config)
}

/// Runs `test` with rings and elements, with and without page refusal.
fn all_ways(test: impl Fn(&GuestConfig) -> Result<()>) -> Result<()> {
    for (elements, refusal) in [(false, false), (false, true), (true, false), (true, true)] {
        test(&config(elements, refusal)?)?;
    }
    Ok(())
}

/// Pages that went back to the guest hold what it writes to them from then on.
fn use_again(guest: &Guest, pages: Vec<u64>) -> WorkingSet {
    WorkingSet::fill(guest.ram(), pages, 21)
}

#[test]
fn a_reset_needs_the_feature_and_a_driver() -> Result<()> {
    let vmm = Vmm::new()?;
    let stock = vmm.boot(&GuestConfig::new(MEMFD, 8))?;
    let error = stock.device().reset_balloon().expect_err("not negotiated");
    assert_eq!(error.errno(), Some(libc::ENOTSUP));
    assert_eq!(stock.books()?.host_resets, 0);

    let mut config = config(false, false)?;
    let guest = vmm.assemble(&config)?;
    let error = guest.device().reset_balloon().expect_err("no driver");
    assert_eq!(error.errno(), Some(libc::ENOTCONN));

    config.selected &= !AEROSTAT_FEATURE_HOST_RESET;
    let guest = vmm.boot(&config)?;
    let error = guest.device().reset_balloon().expect_err("offered only");
    assert_eq!(error.errno(), Some(libc::ENOTSUP));
    Ok(())
}

/// V4: the two fields are there where the feature is offered, and nowhere else.
#[test]
fn the_configuration_space_grows_only_where_the_feature_is_offered() -> Result<()> {
    let vmm = Vmm::new()?;
    let stock = vmm.assemble(&GuestConfig::new(MEMFD, 8))?;
    let end = u64::from(AEROSTAT_CONFIG_BYTES);
    let fields = AEROSTAT_CONFIG_BYTES_HOST_RESET as usize - AEROSTAT_CONFIG_BYTES as usize;
    stock.device().write_config(end, &vec![0x5a; fields])?;
    let mut bytes = vec![0xee; fields];
    stock.device().read_config(end, &mut bytes)?;
    assert_eq!(bytes, vec![0; fields]);
    assert_eq!(stock.books()?.config_errors, 1);

    let guest = vmm.boot(&config(false, false)?)?;
    assert_eq!(guest.driver().reset_fields()?, (0, 0));
    guest.device().write_config(CONFIG_RESET_ID, &[7; 4])?;
    assert_eq!(
        guest.driver().reset_fields()?,
        (0, 0),
        "reset_id is the device's"
    );
    assert_eq!(guest.books()?.config_errors, 1);
    Ok(())
}

#[test]
fn a_reset_returns_everything_at_once() -> Result<()> {
    all_ways(|config| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(config)?;
        let working_set = guest.fill_memory(500, 2)?;
        guest.balloon_to(8 * MIB)?;
        // Nothing waits in the window that the reset would withdraw.
        guest.settled_books()?;
        guest.config_event.take();

        guest.device().reset_balloon()?;

        assert_eq!(
            guest.device().query()?.ballooned_bytes,
            0,
            "accounting is zero"
        );
        assert_eq!(guest.config_event.take(), 1, "the guest is told");
        let books = guest.books()?;
        assert_eq!((books.host_resets, books.host_resets_acknowledged), (1, 0));
        assert_eq!(books.host_reset_bytes, 8 * MIB);
        assert_eq!(books.returned_bytes, 0, "not page by page");

        let freed = guest.driver().follow_host_reset()?.unwrap_or_default();
        assert_eq!(freed.len() as u64, 8 * MIB / PAGE_BYTES);
        let again = use_again(&guest, freed);
        assert_eq!(guest.device().query()?.actual_bytes, 0);
        let books = guest.books()?;
        assert_eq!(books.host_resets_acknowledged, 1);
        assert_eq!(books.deflate_chains, 0);

        // The target stands: from now on it counts again.
        for _ in 0..4 {
            guest.driver().fill(256)?;
        }
        let given = guest.driver().balloon().to_vec();
        assert_eq!(guest.device().query()?.ballooned_bytes, 4 * MIB);
        let lost = again.damaged(guest.ram());
        assert!(lost.iter().all(|pfn| given.contains(pfn)), "{lost:?}");
        guest.assert_intact(&working_set);
        assert_eq!(guest.settled_books()?.balloon.discarded_bytes, 12 * MIB);
        Ok(())
    })
}

/// I1, V3: the guest has its pages, uses them, and what it sent before it knew does no harm.
#[test]
fn late_messages_are_acknowledged_counted_and_not_taken() -> Result<()> {
    all_ways(|config| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(config)?;
        guest.fill_memory(500, 2)?;
        guest.balloon_to(4 * MIB)?;
        guest.device().reset_balloon()?;
        let ballooned = guest.driver().balloon().to_vec();
        let again = use_again(&guest, ballooned.clone());
        let fresh: Vec<u64> = guest.driver().allocator.unused().take(200).collect();
        let untouched = WorkingSet::fill(guest.ram(), fresh.clone(), 4);
        let discarded = guest.books()?.balloon.discarded_bytes;

        // Inflates of pages that were in the balloon, and of others.
        for pfns in [&ballooned[..256], &fresh] {
            if guest.driver().has_refusal() {
                let (_, refused) = guest.driver().offer(pfns)?;
                assert_eq!(refused, pfns);
            } else {
                assert_eq!(guest.driver().tell(Role::Inflate, pfns)?.written, 0);
            }
            guest.books()?;
        }
        guest.driver().tell(Role::Deflate, &ballooned[..100])?;

        let books = guest.books()?;
        assert_eq!(books.balloon.skipped_late_bytes, 456 * PAGE_BYTES);
        assert_eq!(books.late_take_bytes, 100 * PAGE_BYTES);
        let refused = if guest.driver().has_refusal() {
            456 * PAGE_BYTES
        } else {
            0
        };
        assert_eq!(books.refused_bytes, refused);
        assert_eq!(books.balloon.discarded_bytes, discarded);
        assert_eq!((books.returned_bytes, books.rejected_take_bytes), (0, 0));
        assert_eq!(books.chain_errors, 0);
        assert_eq!(guest.device().query()?.ballooned_bytes, 0);
        guest.assert_intact(&again);
        guest.assert_intact(&untouched);
        Ok(())
    })
}

/// Makes a buffer available, runs `between`, has the buffer served.
fn in_flight(
    guest: &Guest,
    role: Role,
    pfns: &[u64],
    between: impl FnOnce() -> Result<()>,
) -> Result<Used> {
    let elements = guest.config().elements;
    if !elements {
        guest.device().pause()?;
    }
    let ram = Arc::clone(guest.ram());
    {
        let mut driver = guest.driver();
        let mut pieces: Vec<Piece> = vec![driver.write_pfns(pfns)];
        if driver.has_refusal() && role == Role::Inflate {
            pieces.push(driver.answer(pfns.len()));
        }
        driver.queue(role)?.add(&ram, &pieces)?;
    }
    between()?;
    if elements {
        let mut queues = ElementQueues::new(guest)?;
        assert_eq!(queues.submit_available()?, 1);
        queues.collect_within(PATIENCE)?;
    } else {
        guest.device().resume()?;
    }
    guest.driver().queue(role)?.wait_used(&ram, PATIENCE)
}

/// A guest whose queues nobody else serves, for buffers that are in flight.
fn by_hand(vmm: &Vmm, config: &GuestConfig) -> Result<Guest> {
    let mut guest = vmm.assemble(config)?;
    let features = guest.negotiate()?;
    guest.start_queues(features)?;
    guest.device().activate()?;
    guest.device().set_target(8 * MIB)?;
    Ok(guest)
}

/// I1: a buffer that was available before the reset and is served after it.
#[test]
fn a_buffer_in_flight_across_a_reset_is_late() -> Result<()> {
    all_ways(|config| {
        for role in [Role::Inflate, Role::Deflate] {
            let vmm = Vmm::new()?;
            let guest = by_hand(&vmm, config)?;
            let pfns: Vec<u64> = guest.driver().allocator.unused().take(100).collect();
            let mut set = None;
            let used = in_flight(&guest, role, &pfns, || {
                guest.device().reset_balloon()?;
                set = Some(use_again(&guest, pfns.clone()));
                Ok(())
            })?;
            let refusing = guest.driver().has_refusal() && role == Role::Inflate;
            assert_eq!(used.written, if refusing { 13 } else { 0 });
            let books = guest.books()?;
            let late = books.balloon.skipped_late_bytes + books.late_take_bytes;
            assert_eq!(late, 100 * PAGE_BYTES);
            assert_eq!(books.balloon.discarded_bytes, 0);
            assert_eq!(guest.device().query()?.ballooned_bytes, 0);
            set.iter().for_each(|set| guest.assert_intact(set));
        }
        Ok(())
    })
}

/// A reset under load: a driver that inflates and deflates all the time, and follows each reset. Nothing
/// that the guest holds is ever damaged, and in the end the books of both sides agree.
#[test]
fn resets_under_load_leave_the_guest_whole() -> Result<()> {
    all_ways(|config| {
        let vmm = Vmm::new()?;
        let mut guest = vmm.boot(config)?;
        let working_set = guest.fill_memory(800, 12)?;
        guest.start_following()?;
        for round in 0..150u64 {
            guest.device().set_target((round % 9) * MIB)?;
            if round % 3 == 0 {
                guest.device().reset_balloon()?;
            }
            if round % 10 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
            guest.books()?;
        }
        // `actual` may be what it was before the last reset until that is acknowledged.
        let deadline = Instant::now() + PATIENCE;
        while guest.books()?.host_resets_acknowledged < 50 {
            assert!(Instant::now() < deadline, "the driver does not follow");
            std::thread::yield_now();
        }
        guest.device().set_target(3 * MIB)?;
        guest.wait_actual(3 * MIB, PATIENCE)?;
        guest.stop_following();
        // A step that had read an earlier target may have been the last one.
        guest.driver().follow_target()?;
        let books = guest.settled_books()?;
        assert_eq!(
            (books.host_resets, books.host_resets_acknowledged),
            (50, 50)
        );
        assert_eq!(guest.device().query()?.ballooned_bytes, 3 * MIB);
        guest.assert_intact(&working_set);
        Ok(())
    })
}

/// I1 as a race: the host resets at any moment of an inflate. The guest uses its pages again before it
/// acknowledges, and none is lost but to what it gives afterwards.
#[test]
fn pages_are_the_guests_from_the_moment_of_the_reset() -> Result<()> {
    all_ways(|config| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(config)?;
        guest.device().set_target(12 * MIB)?;
        let (device, stop) = (Arc::clone(guest.device()), Arc::new(AtomicBool::new(false)));
        let stopping = Arc::clone(&stop);
        let host = std::thread::spawn(move || -> Result<()> {
            let mut round = 0;
            while !stopping.load(Ordering::Acquire) {
                device.reset_balloon()?;
                std::thread::sleep(Duration::from_micros(round * 97 % 700));
                round += 1;
            }
            Ok(())
        });
        let (mut resets, deadline) = (0, Instant::now() + PATIENCE);
        while resets < 60 && Instant::now() < deadline {
            let (id, ack) = guest.driver().reset_fields()?;
            if id != ack {
                resets += 1;
                let pages = guest.driver().balloon().to_vec();
                let again = use_again(&guest, pages);
                guest.driver().follow_host_reset()?;
                guest.assert_intact(&again);
                guest.driver().fill(100)?;
                let given = guest.driver().balloon().to_vec();
                let lost = again.damaged(guest.ram());
                assert!(lost.iter().all(|pfn| given.contains(pfn)), "{lost:?}");
            }
            guest.driver().fill(100)?;
            guest.books()?;
        }
        stop.store(true, Ordering::Release);
        assert!(host.join().is_ok_and(|outcome| outcome.is_ok()));
        guest.driver().follow_host_reset()?;
        let books = guest.books()?;
        assert!(resets == 60 && books.host_resets >= 60, "{resets}");
        assert_eq!(books.host_resets, books.host_resets_acknowledged);
        Ok(())
    })
}

/// Reporting and statistics go on as if nothing had happened.
#[test]
fn reports_and_statistics_go_on_while_a_reset_is_pending() -> Result<()> {
    let vmm = Vmm::new()?;
    all_ways(|config| {
        let guest = vmm.boot(config)?;
        guest.balloon_to(4 * MIB)?;
        guest.device().reset_balloon()?;
        let before = guest.books()?.report.discarded_bytes;
        let reported = guest.driver().report_unused(256)?;
        assert!(reported > 0);
        let after = guest.settled_books()?.report.discarded_bytes;
        assert_eq!(after - before, reported);

        guest.tell_statistics(4711, PATIENCE)?;
        let (id, ack) = guest.driver().reset_fields()?;
        assert_ne!(id, ack, "still pending");
        Ok(())
    })
}

#[test]
fn a_wrong_acknowledgement_leaves_the_reset_pending() -> Result<()> {
    all_ways(|config| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(config)?;
        guest.balloon_to(2 * MIB)?;
        guest.device().reset_balloon()?;
        let again = use_again(&guest, guest.driver().balloon().to_vec());
        let (id, _) = guest.driver().reset_fields()?;
        for wrong in [0, id + 1, u32::MAX, !id] {
            guest.driver().acknowledge_reset(wrong)?;
            guest.driver().fill(64)?;
            assert_eq!(guest.device().query()?.ballooned_bytes, 0);
            assert_eq!(guest.books()?.host_resets_acknowledged, 0);
        }
        guest.assert_intact(&again);
        guest.driver().follow_host_reset()?;
        assert_eq!(guest.books()?.host_resets_acknowledged, 1);
        guest.driver().fill(64)?;
        assert_eq!(guest.device().query()?.ballooned_bytes, 64 * PAGE_BYTES);
        Ok(())
    })
}

#[test]
fn after_two_resets_only_the_newest_can_be_acknowledged() -> Result<()> {
    all_ways(|config| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(config)?;
        guest.balloon_to(2 * MIB)?;
        guest.device().reset_balloon()?;
        let (first, _) = guest.driver().reset_fields()?;
        guest.device().reset_balloon()?;
        let (second, _) = guest.driver().reset_fields()?;
        assert_ne!(first, second);
        guest.driver().acknowledge_reset(first)?;
        guest.driver().fill(64)?;
        let books = guest.books()?;
        assert_eq!(books.balloon.skipped_late_bytes, 64 * PAGE_BYTES);
        assert_eq!((books.host_resets, books.host_resets_acknowledged), (2, 0));
        assert_eq!(books.host_reset_bytes, 2 * MIB, "the second found nothing");
        guest.driver().follow_host_reset()?;
        assert_eq!(guest.books()?.host_resets_acknowledged, 2);
        // Acknowledging once more changes nothing, with whatever id.
        let errors = guest.books()?.config_errors;
        guest.driver().acknowledge_reset(second)?;
        assert_eq!(guest.books()?.config_errors, errors);
        guest.driver().acknowledge_reset(first)?;
        assert_eq!(guest.books()?.config_errors, errors + 1);
        assert_eq!(guest.driver().reset_fields()?, (second, second));
        guest.balloon_to(MIB)?;
        assert_eq!(guest.device().query()?.ballooned_bytes, MIB);
        Ok(())
    })
}

/// What is pending outlasts pause, inhibit and a new memory table, and a reset may be asked for meanwhile.
#[test]
fn a_pending_reset_survives_pause_and_new_memory() -> Result<()> {
    for refusal in [false, true] {
        let vmm = Vmm::new()?;
        let mut guest = vmm.boot(&config(false, refusal)?)?;
        guest.balloon_to(4 * MIB)?;
        guest.device().pause()?;
        guest.device().reset_balloon()?;
        assert_eq!(guest.device().query()?.ballooned_bytes, 0);
        guest.change_memory(Some(RegionSpec::new(64 * MIB, 2 * MIB, MEMFD)), None)?;
        guest.device().inhibit()?;
        guest.device().resume()?;
        guest.device().uninhibit()?;
        let again = use_again(&guest, guest.driver().balloon().to_vec());

        guest.driver().fill(200)?;
        assert_eq!(guest.books()?.balloon.skipped_late_bytes, 200 * PAGE_BYTES);
        guest.assert_intact(&again);
        guest.driver().follow_host_reset()?;
        guest.balloon_to(2 * MIB)?;
        assert_eq!(guest.device().query()?.ballooned_bytes, 2 * MIB);
    }
    Ok(())
}

/// A6: a reset of the device gives everything back too, so nothing is pending for the next driver.
#[test]
fn a_device_reset_ends_a_pending_reset() -> Result<()> {
    all_ways(|config| {
        let vmm = Vmm::new()?;
        let mut guest = vmm.boot(config)?;
        guest.balloon_to(4 * MIB)?;
        guest.device().reset_balloon()?;
        let (id, _) = guest.driver().reset_fields()?;
        guest.restart_driver()?;
        assert_eq!(guest.driver().reset_fields()?, (id, id));
        let books = guest.books()?;
        assert_eq!((books.host_resets, books.host_resets_acknowledged), (1, 1));
        guest.balloon_to(2 * MIB)?;
        assert_eq!(guest.device().query()?.ballooned_bytes, 2 * MIB);
        guest.device().reset_balloon()?;
        assert_ne!(guest.driver().reset_fields()?.0, id, "no id comes back");
        Ok(())
    })
}

/// Held parts of huge frames go back as well, and are not discarded when the frame is completed later.
#[test]
fn pages_held_in_incomplete_frames_are_withdrawn() -> Result<()> {
    all_ways(|config| {
        let vmm = Vmm::new()?;
        let mut config = config.clone();
        config.regions[0].page_size_bytes = 2 * MIB;
        let guest = vmm.boot(&config)?;
        guest.fill_memory(0, 1)?;
        guest.device().set_target(8 * MIB)?;
        let frame: Vec<u64> = (8 * MIB / PAGE_BYTES..10 * MIB / PAGE_BYTES).collect();
        guest.driver().give(&frame[..300])?;
        assert_eq!(guest.books()?.balloon.held_bytes, 300 * PAGE_BYTES);

        guest.device().reset_balloon()?;
        let books = guest.books()?.balloon;
        assert_eq!(
            (books.held_bytes, books.withdrawn_bytes),
            (0, 300 * PAGE_BYTES)
        );
        let again = use_again(&guest, frame[..300].to_vec());
        let (id, _) = guest.driver().reset_fields()?;
        guest.driver().acknowledge_reset(id)?;
        guest.driver().give(&frame[300..])?;
        assert_eq!(guest.books()?.balloon.held_bytes, 212 * PAGE_BYTES);
        guest.assert_intact(&again);
        Ok(())
    })
}

/// S7, I1: what was acknowledged and waits to be discarded goes back with its contents.
#[test]
fn pages_that_wait_to_be_discarded_go_back_untouched() -> Result<()> {
    all_ways(|config| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(config)?;
        guest.device().set_write_behind(1 << 40, 3_600_000)?;
        // Below the target, at which the device would flush.
        guest.device().set_target(8 * MIB)?;
        let pfns: Vec<u64> = guest.driver().allocator.unused().take(256).collect();
        let set = WorkingSet::fill(guest.ram(), pfns.clone(), 31);
        guest.driver().give(&pfns)?;
        let books = guest.books()?.balloon;
        assert_eq!((books.pending_bytes, books.discarded_bytes), (MIB, 0));

        guest.device().reset_balloon()?;

        let books = guest.books()?;
        assert_eq!(books.balloon.pending_bytes, 0);
        assert_eq!(books.balloon.withdrawn_bytes, MIB);
        assert_eq!(books.host_reset_bytes, MIB);
        guest.driver().follow_host_reset()?;
        // A drain discards what waits: nothing does.
        guest.device().inhibit()?;
        guest.device().uninhibit()?;
        assert_eq!(guest.books()?.balloon.discarded_bytes, 0);
        guest.assert_intact(&set);
        Ok(())
    })
}
