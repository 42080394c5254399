//! Hostile drivers over packed rings (requirements S, "Hostile drivers"; S4, S5, S6; invariant I3): what
//! only this layout has, or has otherwise. What a driver says through well-made rings is the other suites'
//! matter, which run over both layouts.
#![expect(
    clippy::cast_possible_truncation,
    reason = "page frame numbers of these guests are small"
)]

use aerostat::AEROSTAT_FEATURE_INDIRECT_DESC;
use aerostat_tests::vmm::device::State;
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::hostile::{HostilePacked, Left, Raw};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::settings::Settings;
use aerostat_tests::vmm::vring::{
    DESC_F_AVAIL, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_USED, DESC_F_WRITE,
};
use aerostat_tests::vmm::working_set::WorkingSet;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);
const TABLE: u64 = 8 * MIB;
/// The page that lists name.
const PAGE: u64 = 0xe00;
const SIZE: u16 = 64;

fn config() -> GuestConfig {
    let mut config = GuestConfig::new(Backing::Memfd { offset_bytes: 0 }, 16);
    config.queue_size = SIZE;
    config.settings = Settings {
        packed: true,
        in_order: false,
        ..Settings::chosen()
    };
    config
}

/// A guest all of whose memory has known contents, but for the page at [`TABLE`], which begins with a list
/// of one page.
fn boot(vmm: &Vmm, config: &GuestConfig) -> Result<(Guest, WorkingSet, HostilePacked)> {
    let guest = vmm.boot(config)?;
    let mut pages: Vec<u64> = guest.driver().allocator.unused().collect();
    pages.retain(|pfn| *pfn != TABLE / PAGE_BYTES);
    let contents = WorkingSet::fill(guest.ram(), pages, 7);
    let hostile = HostilePacked::new(&guest, Role::Inflate)?;
    hostile.write(TABLE, &(PAGE as u32).to_le_bytes());
    Ok((guest, contents, hostile))
}

fn raw(gpa: u64, len: u32, flags: u16, id: u16) -> Raw {
    Raw {
        gpa,
        len,
        flags,
        next: id,
    }
}

/// A list of one page, with these flags.
fn list(flags: u16, id: u16) -> Raw {
    raw(TABLE, 4, flags, id)
}

/// Waits until the descriptor in `slot` has the marks of a used one of the first lap.
fn wait_used(hostile: &HostilePacked, slot: u16) -> Left {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = hostile.left(slot);
        let marks = DESC_F_AVAIL | DESC_F_USED;
        if left.flags & marks == marks {
            return left;
        }
        assert!(Instant::now() < deadline, "slot {slot}: {left:?}");
        std::thread::yield_now();
    }
}

/// A case of a broken ring: what is written to it.
type Break = (&'static str, fn(&HostilePacked));

const BREAKS: &[Break] = &[
    ("every descriptor has a next one", |h| {
        for slot in (0..SIZE).rev() {
            h.descriptor(slot, list(DESC_F_AVAIL | DESC_F_NEXT, slot));
        }
    }),
    ("a table has a next one", |h| {
        h.descriptor(
            0,
            raw(
                TABLE + 64,
                16,
                DESC_F_AVAIL | DESC_F_INDIRECT | DESC_F_NEXT,
                0,
            ),
        );
    }),
    ("a table comes behind a buffer", |h| {
        h.descriptor(1, raw(TABLE + 64, 16, DESC_F_AVAIL | DESC_F_INDIRECT, 0));
        h.descriptor(0, list(DESC_F_AVAIL | DESC_F_NEXT, 0));
    }),
    ("a table is empty", |h| {
        h.descriptor(0, raw(TABLE + 64, 0, DESC_F_AVAIL | DESC_F_INDIRECT, 0));
    }),
    ("a table is no multiple of 16", |h| {
        h.descriptor(0, raw(TABLE + 64, 40, DESC_F_AVAIL | DESC_F_INDIRECT, 0));
    }),
    ("a table is in a table", |h| {
        h.descriptor_at(TABLE + 64, 0, raw(TABLE + 128, 16, DESC_F_INDIRECT, 0));
        h.descriptor(0, raw(TABLE + 64, 16, DESC_F_AVAIL | DESC_F_INDIRECT, 0));
    }),
    ("a table is longer than the ring", |h| {
        let len = 16 * (u32::from(SIZE) + 1);
        h.descriptor(0, raw(TABLE + 64, len, DESC_F_AVAIL | DESC_F_INDIRECT, 0));
    }),
    ("a table is outside memory", |h| {
        h.descriptor(0, raw(16 * MIB, 16, DESC_F_AVAIL | DESC_F_INDIRECT, 0));
    }),
    ("a table overflows", |h| {
        h.descriptor(0, raw(u64::MAX - 15, 64, DESC_F_AVAIL | DESC_F_INDIRECT, 0));
    }),
];

#[test]
fn every_broken_packed_ring_needs_a_reset_and_touches_nothing() -> Result<()> {
    let vmm = Vmm::new()?;
    for (what, break_ring) in BREAKS {
        println!("{what}");
        let (mut guest, contents, hostile) = boot(&vmm, &config())?;
        break_ring(&hostile);
        let ring = hostile.placement().desc / PAGE_BYTES;
        let before = guest.ram().page_sum(ring);
        hostile.kick();
        guest.assert_needs_reset();
        let books = guest.books()?;
        assert_eq!((books.broken_rings, books.balloon.requested_bytes), (1, 0));
        assert_eq!(guest.ram().page_sum(ring), before, "{what}");
        guest.assert_intact(&contents);
        guest.restart_driver()?;
        guest.balloon_to(MIB)?;
    }
    Ok(())
}

#[test]
fn tables_that_were_not_negotiated_break_a_packed_ring_too() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut config = config();
    config.selected &= !AEROSTAT_FEATURE_INDIRECT_DESC;
    let (guest, _, hostile) = boot(&vmm, &config)?;
    hostile.descriptor_at(TABLE + 64, 0, list(0, 0));
    hostile.descriptor(0, raw(TABLE + 64, 16, DESC_F_AVAIL | DESC_F_INDIRECT, 0));
    hostile.kick();
    guest.assert_needs_reset();
    Ok(())
}

/// Marks that say anything but "available in this lap" are no buffer: nothing is consumed, and nothing is
/// broken either.
#[test]
fn descriptors_with_the_marks_of_another_lap_are_not_looked_at() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, contents, hostile) = boot(&vmm, &config())?;
    for marks in [0, DESC_F_USED, DESC_F_AVAIL | DESC_F_USED] {
        hostile.descriptor(0, list(marks, 3));
        let before = hostile.left(0);
        hostile.kick();
        // A pause returns when what was kicked for is done, or will not be done.
        std::thread::sleep(Duration::from_millis(30));
        guest.device().pause()?;
        guest.device().resume()?;
        assert_eq!(hostile.left(0), before, "marks {marks:#x}");
        assert_eq!(guest.books()?.inflate_chains, 0);
    }
    guest.assert_intact(&contents);
    // With the right ones it is served.
    hostile.descriptor(0, list(DESC_F_AVAIL, 3));
    hostile.kick();
    assert_eq!(wait_used(&hostile, 0).id, 3);
    // The same marks in the same slot are last lap's now: a second lap is not begun in the first.
    hostile.descriptor(0, list(DESC_F_AVAIL, 4));
    hostile.kick();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(guest.books()?.inflate_chains, 1);
    assert_eq!(guest.device().state()?, State::Active);
    Ok(())
}

/// An id means nothing to the device: it comes back as it was, whatever it is, and however often.
#[test]
fn ids_come_back_as_they_were_known_or_not() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, _, hostile) = boot(&vmm, &config())?;
    let ids = [u16::MAX, SIZE, 0x8000, 5, 5, 5];
    for (slot, id) in (0..).zip(ids) {
        hostile.descriptor(slot, list(DESC_F_AVAIL, id));
        hostile.kick();
        let left = wait_used(&hostile, slot);
        assert_eq!((left.id, left.flags & DESC_F_WRITE), (id, 0));
    }
    let books = guest.settled_books()?;
    assert_eq!(books.inflate_chains, ids.len() as u64);
    assert_eq!(books.balloon.discarded_bytes, PAGE_BYTES);
    Ok(())
}

/// A chain that reaches into slots that the driver never made available takes what is there: a descriptor
/// of no length, whose id is the chain's, being its last. Only the guest can be surprised by that.
#[test]
fn a_list_that_goes_on_into_empty_slots_ends_there() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, contents, hostile) = boot(&vmm, &config())?;
    hostile.descriptor(0, list(DESC_F_AVAIL | DESC_F_NEXT, 9));
    hostile.kick();
    assert_eq!(wait_used(&hostile, 0).id, 0);
    assert_eq!(guest.settled_books()?.balloon.discarded_bytes, PAGE_BYTES);
    assert_eq!(contents.damaged(guest.ram()), [PAGE]);
    assert_eq!(guest.device().state()?, State::Active);
    Ok(())
}

/// Offsets beyond the ring, with either wrap counter, and flags that are reserved: the device goes on and
/// serves what comes, told or not.
#[test]
fn events_beyond_the_ring_and_reserved_flags_do_no_harm() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, contents, hostile) = boot(&vmm, &config())?;
    let wishes = [
        (SIZE, 2),
        (0x7fff, 2),
        (0xffff, 2),
        (0x8000 | SIZE, 2),
        (0x1234, 3),
        (0, 0xffff),
        (u16::MAX, u16::MAX),
    ];
    for (slot, (offset, flags)) in (0..).zip(wishes) {
        hostile.event(offset, flags);
        hostile.descriptor(slot, list(DESC_F_AVAIL, slot));
        hostile.kick();
        assert_eq!(
            wait_used(&hostile, slot).id,
            slot,
            "{offset:#x}, {flags:#x}"
        );
    }
    assert_eq!(guest.settled_books()?.inflate_chains, wishes.len() as u64);
    assert_eq!(contents.damaged(guest.ram()), [PAGE]);
    assert_eq!(guest.device().state()?, State::Active);
    Ok(())
}
