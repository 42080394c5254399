//! History (requirement A9): what happened with a balloon can be asked for afterwards.

use aerostat::{aerostat_history_entry, aerostat_history_event as event};
use aerostat_tests::vmm::driver::{CONFIG_ACTUAL, Role};
use aerostat_tests::vmm::hostile::Hostile;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, Result, Vmm};
use std::time::Duration;

const TARGET: u32 = event::AEROSTAT_HISTORY_TARGET_SET as u32;
const ACTUAL: u32 = event::AEROSTAT_HISTORY_ACTUAL_WRITTEN as u32;
const RESET: u32 = event::AEROSTAT_HISTORY_RESET as u32;
const INHIBITED: u32 = event::AEROSTAT_HISTORY_INHIBITED as u32;
const UNINHIBITED: u32 = event::AEROSTAT_HISTORY_UNINHIBITED as u32;
const NEEDS_RESET: u32 = event::AEROSTAT_HISTORY_NEEDS_RESET as u32;
const RESTORED: u32 = event::AEROSTAT_HISTORY_RESTORED as u32;

fn all(guest: &Guest) -> Result<Vec<aerostat_history_entry>> {
    let entries = guest.device().history(0, 5000)?;
    let pairs = || entries.iter().zip(entries.iter().skip(1));
    assert!(pairs().all(|(one, next)| one.sequence < next.sequence));
    assert!(pairs().all(|(one, next)| one.monotonic_ns <= next.monotonic_ns));
    Ok(entries)
}

#[test]
fn it_tells_of_targets_of_what_the_guest_did_and_why() -> Result<()> {
    let vmm = Vmm::new()?;
    let config = GuestConfig::new(Backing::Anonymous, 16).with_plain_split_rings();
    let mut guest = vmm.boot(&config)?;
    guest.balloon_to(MIB)?;
    guest.device().inhibit()?;
    guest.device().uninhibit()?;
    let mut hostile = Hostile::new(&guest, Role::Deflate)?;
    hostile.offer(u16::MAX);
    hostile.kick();
    guest.assert_needs_reset();
    drop(hostile);
    guest.restart_driver()?;

    let entries = all(&guest)?;

    let events: Vec<u32> = entries.iter().map(|entry| entry.event).collect();
    let expected = [TARGET, ACTUAL, INHIBITED, UNINHIBITED, NEEDS_RESET, RESET];
    assert_eq!(events, expected);
    let sizes = |entry: &aerostat_history_entry| {
        (
            entry.target_bytes,
            entry.actual_bytes,
            entry.ballooned_bytes,
        )
    };
    let (before, after, gone) = ((MIB, 0, 0), (MIB, MIB, MIB), (MIB, 0, 0));
    let expected = [before, after, after, after, after, gone];
    assert_eq!(entries.iter().map(sizes).collect::<Vec<_>>(), expected);
    assert_eq!(guest.device().history(4, 1)?, entries[4..5]);

    guest.move_to(&vmm)?;
    assert_eq!(
        all(&guest)?
            .iter()
            .map(|entry| entry.event)
            .collect::<Vec<_>>(),
        [RESTORED]
    );
    Ok(())
}

/// I3: a guest that writes `actual` in a loop costs no memory, and does not hide what the VMM did.
#[test]
fn a_guest_that_writes_in_a_loop_hides_nothing() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 8))?;
    guest.device().set_target(MIB)?;
    for value in 1..=100_000u32 {
        guest
            .device()
            .write_config(CONFIG_ACTUAL, &value.to_le_bytes())?;
    }
    let entries = all(&guest)?;
    assert!(entries.len() <= 1024);
    assert_eq!(
        entries.first().map(|entry| (entry.sequence, entry.event)),
        Some((1, TARGET))
    );
    let last = entries
        .last()
        .map(|entry| (entry.sequence, entry.actual_bytes));
    assert_eq!(last, Some((100_001, 100_000 * 4096)));
    // Even the VMM's own entries are bounded.
    for _ in 0..3000 {
        guest.device().set_target(MIB)?;
    }
    assert_eq!(all(&guest)?.len(), 1024);
    Ok(())
}

/// It never waits for a device that works.
#[test]
fn it_can_be_followed_under_load() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 64))?;
    guest.fill_memory(100, 1)?;
    guest.start_following()?;
    let (mut last, mut followed) = (0, Vec::new());
    for round in 0..20 {
        guest.device().set_target(round % 3 * 20 * MIB)?;
        std::thread::sleep(Duration::from_millis(5));
        let news = guest.device().history(last, 1000)?;
        last = news.last().map_or(last, |entry| entry.sequence);
        followed.extend(news);
    }
    assert!(
        followed
            .iter()
            .filter(|entry| entry.event == TARGET)
            .count()
            == 20
    );
    assert!(
        followed
            .iter()
            .any(|entry| entry.event == ACTUAL && entry.actual_bytes > 0)
    );
    Ok(())
}
