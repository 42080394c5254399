//! Free page hints (requirement S9): rounds, what belongs to them, and their end.

use aerostat::{
    AEROSTAT_FEATURE_FREE_PAGE_HINT, AEROSTAT_FEATURE_STATS_VQ, aerostat_hint_state, aerostat_range,
};
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::hinting::{BLOCK_PAGES, CMD_DONE, CMD_STOP, CONFIG_HINT_CMD_ID};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::vring::Piece;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, Numbering, PAGE_BYTES, Result, Vmm, VmmError};
use std::fmt::Debug;
use std::time::{Duration, Instant};

const IDLE: u32 = aerostat_hint_state::AEROSTAT_HINT_IDLE as u32;
const RUNNING: u32 = aerostat_hint_state::AEROSTAT_HINT_RUNNING as u32;
const COMPLETE: u32 = aerostat_hint_state::AEROSTAT_HINT_COMPLETE as u32;
const LONG_MS: u32 = 60_000;

/// A guest whose device offers hints besides what it recommends.
fn hinting(vmm: &Vmm, mib: u64) -> Result<GuestConfig> {
    let mut config = GuestConfig::new(Backing::Memfd { offset_bytes: 0 }, mib);
    let recommended = vmm.assemble(&config)?.device().offered_features()?;
    config.offered = recommended | AEROSTAT_FEATURE_FREE_PAGE_HINT;
    Ok(config)
}

/// Begins a round; returns its id.
fn start(guest: &Guest) -> Result<u32> {
    guest.device().start_hints(LONG_MS)?;
    hint_command(guest)
}

/// What the guest is told of rounds; its driver may be waiting for the device meanwhile.
fn hint_command(guest: &Guest) -> Result<u32> {
    let mut bytes = [0; 4];
    guest.device().read_config(CONFIG_HINT_CMD_ID, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

#[track_caller]
fn assert_errno<T: Debug>(outcome: Result<T, VmmError>, errno: i32) {
    let error = outcome.expect_err("it was accepted");
    assert_eq!(error.errno(), Some(errno), "{error}");
}

fn sum(ranges: &[aerostat_range]) -> u64 {
    ranges.iter().map(|range| range.len_bytes).sum()
}

/// One round as a stock driver takes part in it.
fn tells_its_unused_memory(guest: &Guest) -> Result<()> {
    let working_set = guest.fill_memory(300, 9)?;
    let before = guest.settled_books()?;
    let full = guest.ram().allocated_bytes()?;
    guest.config_event.take();

    let id = start(guest)?;

    assert!(guest.config_event.take() > 0, "no configuration change");
    assert_eq!(guest.driver().hint_command()?, id);
    assert!(guest.driver().answer_hints()?);
    let kept = guest.driver().hinted_bytes();
    assert!(kept > guest.ram().total_bytes() / 2, "{kept}");
    let (ranges, state) = guest.device().take_hints(1000)?;
    assert_eq!((sum(&ranges), state), (kept, COMPLETE));
    let lens = ranges.iter().map(|range| range.len_bytes);
    assert!(lens.into_iter().all(|len| len == BLOCK_PAGES * PAGE_BYTES));
    assert_eq!(
        guest.device().take_hints(10)?.0.len(),
        0,
        "each hint is told once"
    );

    // Nothing is discarded: that the pages were free once does not mean that they are.
    let books = guest.books()?;
    assert!(guest.ram().allocated_bytes()? >= full);
    assert_eq!(
        books.balloon.requested_bytes,
        before.balloon.requested_bytes
    );
    assert_eq!(books.report.requested_bytes, before.report.requested_bytes);
    let hint_chains = books.hint_chains - before.hint_chains;
    assert_eq!(hint_chains, ranges.len() as u64 + 2, "id, blocks, STOP");
    assert_eq!(books.chain_errors, 0);

    // The guest keeps what it hinted until DONE.
    guest.config_event.take();
    guest.device().finish_hints()?;
    assert!(guest.config_event.take() > 0, "no configuration change");
    assert_eq!(guest.driver().hint_command()?, CMD_DONE);
    assert!(guest.driver().answer_hints()?);
    assert_eq!(guest.driver().hinted_bytes(), 0);
    assert_eq!(guest.device().take_hints(1)?.1, IDLE);
    guest.assert_intact(&working_set);
    Ok(())
}

#[test]
fn a_round_tells_unused_memory_and_discards_nothing() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&hinting(&vmm, 64)?)?;
    tells_its_unused_memory(&guest)?;
    guest.balloon_to(8 * MIB)?;
    tells_its_unused_memory(&guest)
}

/// S, "Queues": the queue of hints is found in either numbering, also as elements.
#[test]
fn the_queue_of_hints_is_found_in_either_numbering() -> Result<()> {
    let vmm = Vmm::new()?;
    for numbering in [Numbering::Dense, Numbering::Fixed] {
        for without in [0, AEROSTAT_FEATURE_STATS_VQ] {
            for elements in [false, true] {
                let mut config = hinting(&vmm, 32)?;
                config.numbering = numbering;
                config.selected &= !without;
                config.elements = elements;
                let guest = vmm.boot(&config)?;
                tells_its_unused_memory(&guest)?;
                guest.driver().report_unused(512)?;
                assert!(guest.settled_books()?.report.discarded_bytes > 0);
            }
        }
    }
    Ok(())
}

#[test]
fn hints_belong_to_the_round_whose_id_came_before_them() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&hinting(&vmm, 16)?)?;
    let mut driver = guest.driver();
    driver.hint_range(0x400, 1)?;
    assert_eq!(guest.device().take_hints(10)?.0, [], "outside any round");

    let first = start(&guest)?;
    driver.hint_range(0x401, 1)?;
    for id in [CMD_STOP, CMD_DONE, first + 1, u32::MAX] {
        driver.say_hint_id(id)?;
        driver.hint_range(0x402, 1)?;
        assert_eq!(guest.device().take_hints(10)?, (vec![], RUNNING), "id {id}");
        assert_eq!(
            driver.hint_command()?,
            first,
            "DONE is not the guest's to say"
        );
    }
    driver.say_hint_id(first)?;
    driver.hint_range(0x403, 3)?;
    driver.say_hint_id(CMD_STOP)?;
    driver.hint_range(0x404, 1)?;
    let expected = aerostat_range {
        gpa: 0x403 * PAGE_BYTES,
        len_bytes: 3 * PAGE_BYTES,
    };
    assert_eq!(guest.device().take_hints(10)?, (vec![expected], COMPLETE));

    guest.device().finish_hints()?;
    driver.say_hint_id(first)?;
    driver.hint_range(0x405, 1)?;
    assert_eq!(guest.device().take_hints(10)?, (vec![], IDLE));
    let second = start(&guest)?;
    assert!(second > first, "no id comes back");
    driver.hint_range(0x406, 1)?;
    assert_eq!(
        guest.device().take_hints(10)?,
        (vec![], RUNNING),
        "a stale id"
    );
    drop(driver);
    guest.books()?;
    Ok(())
}

/// A guest that gave up all it has gets it back whatever the VMM does.
#[test]
fn a_round_ends_when_its_time_is_up() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&hinting(&vmm, 64)?)?;
    guest.start_following()?;
    for pause in [false, true] {
        let unused = guest.driver().allocator.unused_pages();
        let begun = Instant::now();
        let limit = Duration::from_millis(150);
        guest.device().start_hints(150)?;
        if pause {
            guest.device().pause()?;
        }
        while hint_command(&guest)? != CMD_DONE {
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "the round goes on"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(begun.elapsed() >= limit);
        if pause {
            guest.device().resume()?;
        }
        while guest.driver().allocator.unused_pages() != unused {
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "the guest keeps pages"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(guest.device().take_hints(0)?.1, IDLE);
        assert_errno(guest.device().finish_hints(), libc::EPROTO);
    }
    Ok(())
}

#[test]
fn hints_that_came_are_kept_until_the_next_round() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&hinting(&vmm, 32)?)?;
    start(&guest)?;
    guest.driver().answer_hints()?;
    guest.device().finish_hints()?;
    guest.driver().answer_hints()?;
    let (first, state) = guest.device().take_hints(2)?;
    assert_eq!((first.len(), state), (2, IDLE));
    guest.device().start_hints(LONG_MS)?;
    assert_eq!(guest.device().take_hints(10)?, (vec![], RUNNING));
    Ok(())
}

/// S3: a driver that goes away in a round takes the round and its hints with it.
#[test]
fn a_reset_in_a_round_ends_it() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&hinting(&vmm, 32)?)?;
    let unused = guest.driver().allocator.unused_pages();
    let first = start(&guest)?;
    guest.driver().answer_hints()?;

    guest.restart_driver()?;

    assert_eq!(guest.driver().hint_command()?, CMD_STOP);
    assert_eq!(guest.device().take_hints(10)?, (vec![], IDLE));
    assert_errno(guest.device().finish_hints(), libc::EPROTO);
    assert_eq!(guest.driver().allocator.unused_pages(), unused);
    assert_eq!(start(&guest)?, first + 1);
    guest.device().finish_hints()?;
    tells_its_unused_memory(&guest)
}

/// I3: what a hostile guest says is cut to its memory, counted, and bounded.
#[test]
fn hostile_hints_are_cut_counted_and_bounded() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&hinting(&vmm, 16)?)?;
    let id = start(&guest)?;
    let mut driver = guest.driver();
    driver.say_hint_id(id)?;
    let end = guest.ram().total_bytes();
    let odd = [
        (0x40_0001, 4096, true),
        (0x40_0000, 4095, true),
        (0x40_0000, 0, true),
        (end, 4096, true),
        (u64::MAX - 4095, 4096, true),
        (end - 4096, u32::MAX - 4095, true),
        (0x40_0000, 3, false),
        (0x40_0000, 4096, false),
    ];
    for (gpa, len, writable) in odd {
        driver.exchange(Role::Hints, &[Piece { gpa, len, writable }])?;
    }
    assert_eq!(guest.books()?.chain_errors, odd.len() as u64);
    let last = aerostat_range {
        gpa: end - 4096,
        len_bytes: 4096,
    };
    assert_eq!(guest.device().take_hints(10)?.0, [last]);

    // An odd id is none, so the round's still counts.
    let gpa = 0x40_0000;
    let (len, writable) = (4096, true);
    let chain = [Piece { gpa, len, writable }; 32];
    for _ in 0..2100 {
        driver.exchange(Role::Hints, &chain)?;
    }
    let (kept, state) = guest.device().take_hints(1 << 16)?;
    assert_eq!((kept.len(), state), (1 << 16, RUNNING));
    assert_eq!(guest.device().take_hints(1)?.0, []);
    Ok(())
}

#[test]
fn rounds_need_the_feature_a_device_that_runs_and_one_at_a_time() -> Result<()> {
    let vmm = Vmm::new()?;
    let without = vmm.boot(&GuestConfig::new(Backing::Anonymous, 8))?;
    assert_errno(without.device().start_hints(LONG_MS), libc::ENOTSUP);

    let guest = vmm.boot(&hinting(&vmm, 8)?)?;
    for limit_ms in [0, 600_001, u32::MAX] {
        assert_errno(guest.device().start_hints(limit_ms), libc::EINVAL);
    }
    guest.device().start_hints(600_000)?;
    assert_errno(guest.device().start_hints(1), libc::EALREADY);
    guest.device().pause()?;
    guest.device().finish_hints()?;
    assert_errno(guest.device().start_hints(LONG_MS), libc::EBUSY);
    guest.device().reset()?;
    assert_errno(guest.device().start_hints(LONG_MS), libc::ENOTCONN);
    Ok(())
}
