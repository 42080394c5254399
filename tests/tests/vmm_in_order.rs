//! IN_ORDER, over both layouts (requirement S6; virtio 1.4, 2.7.9 and 2.8.9): a batch of buffers comes back
//! with one used entry, one update of what the driver looks at, and one interrupt.

use aerostat::{
    AEROSTAT_FEATURE_EVENT_IDX, AEROSTAT_FEATURE_INDIRECT_DESC, AEROSTAT_FEATURE_MUST_TELL_HOST,
    AEROSTAT_FEATURE_PAGE_REPORTING, AEROSTAT_FEATURE_VERSION_1,
};
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::settings::Settings;
use aerostat_tests::vmm::vring::Piece;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);
const FEATURES: u64 = AEROSTAT_FEATURE_VERSION_1
    | AEROSTAT_FEATURE_MUST_TELL_HOST
    | AEROSTAT_FEATURE_PAGE_REPORTING
    | AEROSTAT_FEATURE_INDIRECT_DESC;

/// Both layouts, each with both kinds of suppression.
fn configs(in_order: bool) -> Vec<GuestConfig> {
    let rings = [false, true].map(|packed| [0, AEROSTAT_FEATURE_EVENT_IDX].map(|e| (packed, e)));
    let config = |(packed, event_idx)| {
        let mut config = GuestConfig::new(Backing::Memfd { offset_bytes: 0 }, 32);
        config.selected = FEATURES | event_idx;
        config.settings = Settings {
            packed,
            in_order,
            ..Settings::chosen()
        };
        config
    };
    rings.into_iter().flatten().map(config).collect()
}

/// What a batch came back with: entries, interrupts, and bytes said to be written.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    entries: u64,
    interrupts: u64,
    written_bytes: u64,
}

/// Makes buffers available while the device stands still, has them served together, and takes them.
fn exchange_at_once(guest: &Guest, role: Role, buffers: &[Vec<Piece>]) -> Result<Answer> {
    guest.device().pause()?;
    let call = {
        let mut driver = guest.driver();
        let queue = driver.queue(role)?;
        for buffer in buffers {
            queue.add(guest.ram(), buffer)?;
        }
        queue.kick(guest.ram());
        queue.call.take();
        queue.used_entries = 0;
        std::sync::Arc::clone(&queue.call)
    };
    guest.device().resume()?;
    let mut driver = guest.driver();
    let queue = driver.queue(role)?;
    let deadline = std::time::Instant::now() + PATIENCE;
    let mut written_bytes = 0;
    for _ in buffers {
        let used = loop {
            if let Some(used) = queue.take_used(guest.ram()) {
                break used;
            }
            assert!(std::time::Instant::now() < deadline, "no answer");
            std::thread::yield_now();
        };
        written_bytes += u64::from(used.written);
    }
    // Nothing is in flight behind a pause, so all interrupts are there.
    guest.device().pause()?;
    guest.device().resume()?;
    Ok(Answer {
        entries: queue.used_entries,
        interrupts: call.take(),
        written_bytes,
    })
}

/// A number a buffer, out of one page of them.
fn numbers(guest: &Guest, count: usize) -> (Vec<u64>, Vec<Vec<Piece>>) {
    let driver = guest.driver();
    let pages: Vec<u64> = driver.allocator.unused().take(count).collect();
    let list = driver.write_pfns(&pages);
    let one = |place: usize| Piece {
        gpa: list.gpa + 4 * place as u64,
        len: 4,
        writable: false,
    };
    (pages, (0..count).map(|place| vec![one(place)]).collect())
}

#[test]
fn a_batch_comes_back_with_one_entry_and_one_interrupt() -> Result<()> {
    for config in configs(true) {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(&config)?;
        // More than once around the ring, from a new place each time.
        for round in 1..=5 {
            let (pages, buffers) = numbers(&guest, 50);
            let once = Answer {
                entries: 1,
                interrupts: 1,
                written_bytes: 0,
            };
            for role in [Role::Inflate, Role::Deflate] {
                let answer = exchange_at_once(&guest, role, &buffers)?;
                assert_eq!(answer, once, "{role:?}, round {round}, {config:?}");
            }
            let books = guest.settled_books()?;
            let given = round * pages.len() as u64 * PAGE_BYTES;
            assert_eq!(books.returned_bytes, given);
            assert_eq!(books.broken_rings + books.chain_errors, 0);
        }
    }
    Ok(())
}

/// What an entry skips is assumed to be written in full, so what was not must not be skipped.
#[test]
fn buffers_that_could_be_written_have_entries_of_their_own() -> Result<()> {
    for config in configs(true) {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(&config)?;
        let report = |number: u64| Piece {
            gpa: (8 + number) * MIB,
            len: 1 << 20,
            writable: true,
        };
        let buffers: Vec<Vec<Piece>> = (0..10).map(|number| vec![report(number)]).collect();
        let answer = exchange_at_once(&guest, Role::Reporting, &buffers)?;
        let expected = Answer {
            entries: 10,
            interrupts: 1,
            written_bytes: 0,
        };
        assert_eq!(answer, expected, "{config:?}");
    }
    Ok(())
}

#[test]
fn without_it_every_buffer_has_its_entry() -> Result<()> {
    for config in configs(false) {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(&config)?;
        let (_, buffers) = numbers(&guest, 50);
        let answer = exchange_at_once(&guest, Role::Inflate, &buffers)?;
        assert_eq!((answer.entries, answer.interrupts), (50, 1), "{config:?}");
    }
    Ok(())
}
