//! Hostile drivers over split rings (requirements S, "Hostile drivers"; S4, S5, S6; invariant I3).
//!
//! Content that makes no sense is acknowledged and counted; only a broken ring sets NEEDS_RESET.
//! Either way nothing is touched that the guest did not give: all of its memory is compared, byte
//! for byte, with what it was before.
#![expect(
    clippy::cast_possible_truncation,
    reason = "page frame numbers and sizes of these guests are small"
)]

use aerostat::{
    AEROSTAT_FEATURE_FREE_PAGE_HINT, AEROSTAT_FEATURE_INDIRECT_DESC, AEROSTAT_FEATURE_STATS_VQ,
    aerostat_counters,
};
use aerostat_tests::vmm::device::State;
use aerostat_tests::vmm::driver::{ROLES, Role};
use aerostat_tests::vmm::hostile::{Hostile, Raw};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::vring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Piece, Placement};
use aerostat_tests::vmm::working_set::WorkingSet;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use aerostat_tests::wait::eventually;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };
const PATIENCE: Duration = Duration::from_secs(10);

/// Two regions with a hole between them, the second one reaching up to where a third, which can
/// never be ballooned, begins.
fn regions() -> Vec<RegionSpec> {
    let rom = RegionSpec {
        readonly: true,
        ..RegionSpec::new(40 * MIB, MIB, Backing::Anonymous)
    };
    vec![
        RegionSpec::new(0, 16 * MIB, Backing::Anonymous),
        RegionSpec::new(32 * MIB, 8 * MIB, MEMFD),
        rom,
    ]
}

/// Boots a guest all of whose memory has known contents.
fn boot(vmm: &Vmm) -> Result<(Guest, WorkingSet)> {
    boot_as(vmm, GuestConfig::with_regions(regions()))
}

/// The same with split rings, for those who write them.
fn boot_split(vmm: &Vmm) -> Result<(Guest, WorkingSet)> {
    let config = GuestConfig::with_regions(regions());
    boot_as(vmm, config.with_plain_split_rings())
}

fn boot_as(vmm: &Vmm, mut config: GuestConfig) -> Result<(Guest, WorkingSet)> {
    config.selected &= !AEROSTAT_FEATURE_STATS_VQ;
    let guest = vmm.boot(&config)?;
    let pages: Vec<u64> = guest.driver().allocator.unused().collect();
    let contents = WorkingSet::fill(guest.ram(), pages, 99);
    Ok((guest, contents))
}

/// Fails if anything but `given` and the driver's own pages (rings and buffers) has changed.
#[track_caller]
fn assert_only(guest: &Guest, contents: &WorkingSet, given: &[u64]) {
    let mut changed = contents.damaged(guest.ram());
    changed.retain(|pfn| !given.contains(pfn));
    assert!(changed.is_empty(), "pages {changed:x?} were touched");
}

/// What the guest has put into the balloon, or tried to.
fn requested_bytes(guest: &Guest) -> u64 {
    guest
        .books()
        .map_or(0, |books| books.balloon.requested_bytes)
}

/// Tells the device `pfns` on the queue of `role`; returns how the books changed.
fn tell(guest: &Guest, role: Role, pfns: &[u64]) -> Result<[u64; 4]> {
    let figures = |books: aerostat_counters| {
        [
            books.balloon.discarded_bytes / PAGE_BYTES,
            books.balloon.skipped_out_of_range_bytes / PAGE_BYTES,
            books.balloon.skipped_duplicate_bytes / PAGE_BYTES,
            books.rejected_take_bytes / PAGE_BYTES,
        ]
    };
    let before = figures(guest.settled_books()?);
    assert_eq!(guest.driver().tell(role, pfns)?.written, 0);
    let after = figures(guest.settled_books()?);
    Ok([0, 1, 2, 3].map(|index| after[index] - before[index]))
}

#[test]
fn pfns_outside_in_holes_and_in_rom_are_acknowledged_and_counted() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, contents) = boot(&vmm)?;
    let mib = MIB / PAGE_BYTES;
    let outside = [
        16 * mib,
        32 * mib - 1,
        41 * mib,
        40 * mib,
        41 * mib - 1,
        1 << 31,
        0xffff_ffff,
    ];
    assert_eq!(tell(&guest, Role::Inflate, &outside)?, [0, 7, 0, 0]);
    assert_only(&guest, &contents, &[]);
    // Between good ones they do not keep those from being given.
    let mixed = [
        16 * mib - 1,
        16 * mib,
        32 * mib - 1,
        32 * mib,
        40 * mib - 1,
        40 * mib,
    ];
    let good = [mixed[0], mixed[3], mixed[4]];
    assert_eq!(tell(&guest, Role::Inflate, &mixed)?, [3, 3, 0, 0]);
    assert_only(&guest, &contents, &good);
    assert_eq!(tell(&guest, Role::Deflate, &mixed)?, [0, 0, 0, 3]);
    assert_eq!(guest.device().query()?.ballooned_bytes, 0);
    assert_eq!(guest.books()?.chain_errors, 0);
    Ok(())
}

#[test]
fn duplicates_are_counted_and_freed_once() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, contents) = boot(&vmm)?;
    let page = contents.pfns()[10];
    assert_eq!(tell(&guest, Role::Inflate, &[page; 256])?, [1, 0, 255, 0]);
    assert_eq!(
        tell(&guest, Role::Inflate, &[page, page + 1])?,
        [1, 0, 1, 0]
    );
    assert_eq!(guest.device().query()?.ballooned_bytes, 2 * PAGE_BYTES);
    assert_only(&guest, &contents, &[page, page + 1]);
    assert_eq!(
        tell(&guest, Role::Deflate, &[page, page, page + 1])?,
        [0, 0, 0, 1]
    );
    assert_eq!(guest.device().query()?.ballooned_bytes, 0);
    Ok(())
}

/// I1: what was never given is never touched by a deflate, and what was taken back is not touched
/// any more.
#[test]
fn pages_that_were_never_given_cannot_be_taken() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, contents) = boot(&vmm)?;
    let pages = &contents.pfns()[..300];
    assert_eq!(tell(&guest, Role::Deflate, pages)?, [0, 0, 0, 300]);
    assert_only(&guest, &contents, &[]);
    guest.driver().tell(Role::Inflate, &pages[..100])?;
    assert_eq!(tell(&guest, Role::Deflate, pages)?, [0, 0, 0, 200]);
    let data = WorkingSet::fill(guest.ram(), pages.to_vec(), 5);
    assert_eq!(tell(&guest, Role::Deflate, pages)?, [0, 0, 0, 300]);
    guest.assert_intact(&data);
    Ok(())
}

/// The array that is being read, and the rings themselves, are pages like any other: copied first,
/// then discarded.
#[test]
fn a_guest_may_give_away_its_own_rings_and_the_list_it_gives() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, contents) = boot_split(&vmm)?;
    let list = guest.driver().pfn_array();
    let first = contents.pfns()[0];
    let pfns = [list / PAGE_BYTES, first];
    assert_eq!(tell(&guest, Role::Inflate, &pfns)?, [2, 0, 0, 0]);
    assert_only(&guest, &contents, &pfns);

    // All of the driver's own pages, rings included, given through a list elsewhere. Descriptors
    // and indices are zeros then: whatever follows, nothing else is touched.
    let mut hostile = Hostile::new(&guest, Role::Inflate)?;
    let own: Vec<u64> = (0..list / PAGE_BYTES).collect();
    let bytes: Vec<u8> = own
        .iter()
        .flat_map(|pfn| (*pfn as u32).to_le_bytes())
        .collect();
    let at = first * PAGE_BYTES;
    hostile.write(at, &bytes);
    let raw = Raw {
        gpa: at,
        len: bytes.len() as u32,
        ..Raw::default()
    };
    hostile.descriptor(3, raw);
    hostile.offer(3);
    hostile.kick();
    let served = (own.len() as u64 + 2) * PAGE_BYTES;
    eventually("it is served", PATIENCE, || {
        let requested = requested_bytes(&guest);
        (requested == served, requested)
    });
    assert_only(&guest, &contents, &pfns);
    Ok(())
}

/// A case of a broken ring: what is written, and whether the device had anything to serve before.
type Break = (&'static str, fn(&mut Hostile));

fn table() -> u64 {
    8 * MIB
}

fn raw(gpa: u64, len: u32, flags: u16, next: u16) -> Raw {
    Raw {
        gpa,
        len,
        flags,
        next,
    }
}

/// Offers head 0 with this descriptor.
fn one(hostile: &mut Hostile, descriptor: Raw) {
    hostile.descriptor(0, descriptor);
    hostile.offer(0);
}

const BREAKS: &[Break] = &[
    ("the available index jumps", |h| {
        let index = h.avail_index().wrapping_add(h.placement().size + 1);
        h.set_avail_index(index);
    }),
    ("the available index goes back", |h| {
        let index = h.avail_index().wrapping_sub(1);
        h.set_avail_index(index);
    }),
    ("a head is as large as the queue", |h| {
        let head = h.placement().size;
        h.offer(head);
    }),
    ("a head is the largest number", |h| h.offer(u16::MAX)),
    ("a chain leads out of the table", |h| {
        let next = h.placement().size;
        one(h, raw(table(), 4, DESC_F_NEXT, next));
    }),
    ("a chain leads to itself", |h| {
        one(h, raw(table(), 4, DESC_F_NEXT, 0))
    }),
    ("a chain is a circle", |h| {
        h.descriptor(1, raw(table(), 4, DESC_F_NEXT, 2));
        h.descriptor(2, raw(table(), 4, DESC_F_NEXT, 0));
        one(h, raw(table(), 4, DESC_F_NEXT, 1));
    }),
    ("an indirect table is empty", |h| {
        one(h, raw(table(), 0, DESC_F_INDIRECT, 0))
    }),
    ("an indirect table is no multiple of 16", |h| {
        one(h, raw(table(), 40, DESC_F_INDIRECT, 0));
    }),
    ("an indirect table is nested", |h| {
        h.descriptor_at(table(), 0, raw(table() + 4096, 16, DESC_F_INDIRECT, 0));
        one(h, raw(table(), 16, DESC_F_INDIRECT, 0));
    }),
    ("an indirect descriptor has a next one", |h| {
        one(h, raw(table(), 16, DESC_F_INDIRECT | DESC_F_NEXT, 1));
    }),
    ("an indirect table is in a hole", |h| {
        one(h, raw(20 * MIB, 16, DESC_F_INDIRECT, 0))
    }),
    ("an indirect table leaves memory", |h| {
        h.descriptor_at(16 * MIB - 16, 0, raw(table(), 4, DESC_F_NEXT, 1));
        one(h, raw(16 * MIB - 16, 32, DESC_F_INDIRECT, 0));
    }),
    ("an indirect table overflows", |h| {
        one(h, raw(u64::MAX - 15, 64, DESC_F_INDIRECT, 0));
    }),
    ("an indirect chain leads out of its table", |h| {
        h.descriptor_at(table(), 0, raw(table(), 4, DESC_F_NEXT, 2));
        one(h, raw(table(), 32, DESC_F_INDIRECT, 0));
    }),
    ("an indirect chain is a circle", |h| {
        h.descriptor_at(table(), 0, raw(table(), 4, DESC_F_NEXT, 0));
        one(h, raw(table(), 16, DESC_F_INDIRECT, 0));
    }),
    ("an indirect chain is longer than the queue", |h| {
        for index in 0..400 {
            h.descriptor_at(table(), index, raw(table(), 4, DESC_F_NEXT, index + 1));
        }
        one(h, raw(table(), 16 * 400, DESC_F_INDIRECT, 0));
    }),
];

#[test]
fn every_broken_ring_needs_a_reset_and_touches_nothing() -> Result<()> {
    let vmm = Vmm::new()?;
    let stock = vmm.assemble(&GuestConfig::new(MEMFD, 16))?;
    let offered = stock.device().offered_features()? | AEROSTAT_FEATURE_FREE_PAGE_HINT;
    for role in ROLES {
        for (what, break_ring) in BREAKS {
            let mut config = GuestConfig::with_regions(regions()).with_plain_split_rings();
            config.offered = offered;
            let mut guest = vmm.boot(&config)?;
            // A stock driver's first buffer, which is held.
            eventually("statistics are there", PATIENCE, || {
                let chains = guest.books().map(|books| books.stats_chains);
                (matches!(chains, Ok(1)), chains.ok())
            });
            let mut hostile = Hostile::new(&guest, role)?;
            break_ring(&mut hostile);
            let before = guest.ram().snapshot();
            hostile.kick();
            println!("{role:?}: {what}");
            guest.assert_needs_reset();
            let books = guest.books()?;
            assert_eq!(books.broken_rings, 1, "{what}");
            assert_eq!(books.balloon.requested_bytes, 0, "{what}");
            assert_eq!(hostile.used_index(), 0, "{what}: nothing is used");
            let own = queue_pages(&hostile.placement());
            let changed = guest.ram().changed_since(&before);
            assert!(
                changed.iter().all(|pfn| own.contains(pfn)),
                "{what}: {changed:x?}"
            );
            guest.restart_driver()?;
            guest.balloon_to(MIB)?;
        }
    }
    Ok(())
}

/// The pages of a queue that a device may write: its used ring.
fn queue_pages(placement: &Placement) -> Vec<u64> {
    (placement.used / PAGE_BYTES..placement.tables / PAGE_BYTES).collect()
}

#[test]
fn what_was_available_before_the_fault_is_served() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, contents) = boot_split(&vmm)?;
    let mut hostile = Hostile::new(&guest, Role::Inflate)?;
    let page = contents.pfns()[50];
    hostile.write(table(), &(page as u32).to_le_bytes());
    one(&mut hostile, raw(table(), 4, 0, 0));
    hostile.offer(u16::MAX);
    hostile.kick();
    guest.assert_needs_reset();
    assert_eq!(hostile.used_index(), 1);
    assert_eq!(guest.settled_books()?.balloon.discarded_bytes, PAGE_BYTES);
    assert_only(&guest, &contents, &[page, table() / PAGE_BYTES]);
    Ok(())
}

#[test]
fn indirect_tables_that_were_not_negotiated_break_the_ring() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut config = GuestConfig::new(Backing::Anonymous, 16);
    config.selected &= !AEROSTAT_FEATURE_INDIRECT_DESC;
    let guest = vmm.boot(&config.with_plain_split_rings())?;
    let mut hostile = Hostile::new(&guest, Role::Inflate)?;
    hostile.descriptor_at(table(), 0, raw(table(), 4, 0, 0));
    one(&mut hostile, raw(table(), 16, DESC_F_INDIRECT, 0));
    hostile.kick();
    guest.assert_needs_reset();
    Ok(())
}

/// A chain whose content makes no sense: what is written, and how many PFNs are understood of it.
type Nonsense = (&'static str, u64, fn(&mut Hostile));

const NONSENSE: &[Nonsense] = &[
    ("no bytes at all", 0, |h| one(h, raw(table(), 0, 0, 0))),
    ("less than a PFN", 0, |h| one(h, raw(table(), 3, 0, 0))),
    ("a PFN and a half", 1, |h| one(h, raw(table(), 6, 0, 0))),
    ("a list in a hole", 0, |h| one(h, raw(20 * MIB, 8, 0, 0))),
    ("a list that leaves memory", 1, |h| {
        h.write(16 * MIB - 4, &0xf00u32.to_le_bytes());
        one(h, raw(16 * MIB - 4, 8, 0, 0));
    }),
    ("a list that overflows", 0, |h| {
        one(h, raw(u64::MAX - 3, 8, 0, 0))
    }),
    ("a writable list", 0, |h| {
        one(h, raw(table(), 4, DESC_F_WRITE, 0))
    }),
    ("a list and something writable", 1, |h| {
        h.descriptor(1, raw(table() + 64, 64, DESC_F_WRITE, 0));
        one(h, raw(table(), 4, DESC_F_NEXT, 1));
    }),
    ("writable before readable", 0, |h| {
        h.descriptor(1, raw(table(), 4, 0, 0));
        one(h, raw(table() + 64, 4, DESC_F_NEXT | DESC_F_WRITE, 1));
    }),
    ("more than 2^10 PFNs", 0, |h| {
        one(h, raw(0, (4 << 10) + 4, 0, 0))
    }),
    ("more than 4 GiB", 0, |h| {
        h.descriptor(1, raw(table(), u32::MAX, 0, 0));
        one(h, raw(table(), u32::MAX, DESC_F_NEXT, 1));
    }),
];

#[test]
fn nonsense_is_acknowledged_counted_and_the_device_goes_on() -> Result<()> {
    let vmm = Vmm::new()?;
    for role in [Role::Inflate, Role::Deflate] {
        for (what, pfns, write) in NONSENSE {
            let (guest, contents) = boot_split(&vmm)?;
            let mut hostile = Hostile::new(&guest, role)?;
            hostile.write(table(), &0xe00u32.to_le_bytes());
            write(&mut hostile);
            hostile.kick();
            println!("{role:?}: {what}");
            hostile.wait_used(PATIENCE)?;
            assert_eq!(hostile.used_entry(0), (0, 0), "{what}");
            let books = guest.settled_books()?;
            assert_eq!(books.chain_errors, 1, "{what}");
            let handled = match role {
                Role::Inflate => books.balloon.requested_bytes,
                _ => books.rejected_take_bytes,
            };
            assert_eq!(handled, pfns * PAGE_BYTES, "{what}");
            assert_eq!(guest.device().state()?, State::Active, "{what}");
            let list = [table() / PAGE_BYTES, 16 * MIB / PAGE_BYTES - 1];
            assert_only(&guest, &contents, &[&list[..], &[0xe00, 0xf00]].concat());
        }
    }
    Ok(())
}

/// S5: "readable buffers are never written; WRITE on a descriptor that points to an indirect table
/// is ignored; direct descriptors followed by one indirect table are handled", in any arrangement.
#[test]
fn odd_arrangements_that_are_allowed_work() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, contents) = boot_split(&vmm)?;
    let mut hostile = Hostile::new(&guest, Role::Inflate)?;
    let pages: Vec<u64> = contents.pfns()[100..108].to_vec();
    let list = table() + MIB;
    let bytes: Vec<u8> = pages
        .iter()
        .flat_map(|pfn| (*pfn as u32).to_le_bytes())
        .collect();
    hostile.write(list, &bytes);
    // 3 bytes, then nothing, then 10 more (PFNs straddle descriptors), then a table with the rest.
    hostile.descriptor(5, raw(list, 3, DESC_F_NEXT, 9));
    hostile.descriptor(9, raw(list, 0, DESC_F_NEXT, 2));
    hostile.descriptor(2, raw(list + 3, 10, DESC_F_NEXT, 7));
    hostile.descriptor(7, raw(table() + 8, 48, DESC_F_INDIRECT | DESC_F_WRITE, 0));
    hostile.descriptor_at(table() + 8, 0, raw(list + 13, 18, DESC_F_NEXT, 2));
    hostile.descriptor_at(table() + 8, 2, raw(list + 31, 1, 0, 0));
    hostile.offer(5);
    hostile.kick();
    hostile.wait_used(PATIENCE)?;
    assert_eq!(hostile.used_entry(0), (5, 0));
    let books = guest.settled_books()?;
    assert_eq!(books.chain_errors + books.broken_rings, 0);
    assert_eq!(books.balloon.discarded_bytes, 8 * PAGE_BYTES);
    let own = [table() / PAGE_BYTES, list / PAGE_BYTES];
    assert_only(&guest, &contents, &[&pages[..], &own].concat());
    Ok(())
}

/// An indirect table and a list that straddle two regions that touch: the second region begins
/// where the first ends, elsewhere on the host.
#[test]
fn tables_and_lists_may_straddle_regions() -> Result<()> {
    let vmm = Vmm::new()?;
    let regions = vec![
        RegionSpec::new(0, 8 * MIB, Backing::Anonymous),
        RegionSpec::new(8 * MIB, 8 * MIB, MEMFD),
    ];
    let guest = vmm.boot(&GuestConfig::with_regions(regions).with_plain_split_rings())?;
    let mut hostile = Hostile::new(&guest, Role::Inflate)?;
    let pages: [u32; 2] = [0x700, 0x901];
    let list = 8 * MIB - 4;
    write_across(&hostile, list, &pages.map(u32::to_le_bytes).concat());
    one(&mut hostile, raw(list, 8, 0, 0));
    hostile.kick();
    hostile.wait_used(PATIENCE)?;
    assert_eq!(
        guest.settled_books()?.balloon.discarded_bytes,
        2 * PAGE_BYTES
    );

    // Other pages, from a list that lies in one region.
    let (other, others) = (4 * MIB, [0x702u32, 0x903]);
    write_across(&hostile, other, &others.map(u32::to_le_bytes).concat());
    let mut descriptor = Vec::new();
    descriptor.extend(other.to_le_bytes());
    descriptor.extend(8u32.to_le_bytes());
    descriptor.extend([0; 4]);
    let straddling = 8 * MIB - 24;
    write_across(&hostile, straddling, &[vec![0; 16], descriptor].concat());
    write_across(&hostile, straddling + 14, &1u16.to_le_bytes());
    write_across(&hostile, straddling + 12, &DESC_F_NEXT.to_le_bytes());
    let second = raw(straddling, 32, DESC_F_INDIRECT, 0);
    hostile.descriptor(1, second);
    hostile.offer(1);
    hostile.kick();
    hostile.wait_used(PATIENCE)?;
    let books = guest.settled_books()?;
    assert_eq!(books.broken_rings + books.chain_errors, 0);
    assert_eq!(books.inflate_chains, 2);
    assert_eq!(books.balloon.discarded_bytes, 4 * PAGE_BYTES);
    Ok(())
}

/// Writes bytes that lie in more than one region.
fn write_across(hostile: &Hostile, gpa: u64, bytes: &[u8]) {
    for (byte, at) in bytes.iter().zip(gpa..) {
        hostile.write(at, &[*byte]);
    }
}

/// "Descriptors changing while they are read (fetch once)": a thread rewrites a descriptor, in the ring or in
/// an indirect table, and the list that it is of, all the time; whatever the device sees, only the guest's own
/// unused pages may change.
#[test]
fn descriptors_that_change_while_they_are_read_do_no_harm() -> Result<()> {
    let vmm = Vmm::new()?;
    for indirect in [false, true] {
        let (guest, contents) = boot_split(&vmm)?;
        let mut hostile = Hostile::new(&guest, Role::Inflate)?;
        let (stop, turns) = (AtomicBool::new(false), AtomicU64::new(0));
        let victim: Vec<u64> = (0xa00..0xb00).collect();
        let writer = Hostile::new(&guest, Role::Inflate)?;
        let descriptors = if indirect {
            table() + 2 * PAGE_BYTES
        } else {
            writer.placement().desc
        };
        hostile.descriptor_at(descriptors, 0, raw(table(), 4, 0, 0));
        if indirect {
            hostile.descriptor(0, raw(descriptors, 16, DESC_F_INDIRECT, 0));
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut turn = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    turn += 1;
                    turns.store(turn, Ordering::Relaxed);
                    let pfn = victim[(turn % 256) as usize] as u32;
                    let wild = if turn.is_multiple_of(3) {
                        u32::MAX
                    } else {
                        pfn
                    };
                    writer.write(table(), &wild.to_le_bytes());
                    let gpa = if turn.is_multiple_of(5) {
                        u64::MAX - 8
                    } else {
                        table()
                    };
                    let len = if turn.is_multiple_of(7) { u32::MAX } else { 4 };
                    writer.descriptor_at(descriptors, 0, raw(gpa, len, 0, 0));
                }
            });
            let mut outcome = Ok(());
            let mut offers = 0;
            // Until both have been at it for long enough.
            while outcome.is_ok() && (offers < 2000 || turns.load(Ordering::Relaxed) < 10_000) {
                offers += 1;
                hostile.offer(0);
                hostile.kick();
                outcome = outcome.and_then(|()| hostile.wait_used(PATIENCE));
            }
            stop.store(true, Ordering::Relaxed);
            outcome
        })?;
        assert_eq!(guest.device().state()?, State::Active);
        // A descriptor of 4 GiB that was read with a good address has too many PFNs to be taken.
        let own = [table() / PAGE_BYTES, descriptors / PAGE_BYTES];
        assert_only(&guest, &contents, &[&victim[..], &own].concat());
        assert!(guest.settled_books()?.inflate_chains >= 2000);
    }
    Ok(())
}

/// Rings that lie over each other do harm to their guest at most.
#[test]
fn overlapping_rings_hurt_nobody_else() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, contents) = boot_split(&vmm)?;
    let (neighbour, its_contents) = boot_split(&vmm)?;
    let index = guest.index_of(Role::Deflate)?;
    let mut config = {
        let mut driver = guest.driver();
        aerostat_tests::vmm::guest::queue_config(driver.queue(Role::Inflate)?, false)
    };
    guest.device().stop_queue(index)?;
    config.used_gpa = config.avail_gpa & !3;
    guest.device().start_queue(index, &config)?;
    let page = contents.pfns()[50];
    let piece: Piece = guest.driver().write_pfns(&[page]);
    let mut driver = guest.driver();
    let queue = driver.queue(Role::Inflate)?;
    queue.add(guest.ram(), &[piece])?;
    queue.kick.signal();
    drop(driver);
    let its_page = its_contents.pfns()[50];
    neighbour.driver().tell(Role::Inflate, &[its_page])?;
    eventually("it is served", PATIENCE, || {
        let requested = requested_bytes(&guest);
        (requested == PAGE_BYTES, requested)
    });
    // The queue whose used ring lies over the available one of the other: served, or broken.
    Hostile::new(&guest, Role::Deflate)?.kick();
    eventually("the other queue was looked at", PATIENCE, || {
        let deflated = guest.books().map(|books| books.deflate_chains).unwrap_or(0);
        let broken = matches!(guest.device().state(), Ok(State::NeedsReset));
        (deflated > 0 || broken, (deflated, broken))
    });
    assert_only(&guest, &contents, &[page]);
    assert_only(&neighbour, &its_contents, &[its_page]);
    Ok(())
}

/// Spurious kicks, with nothing to serve, and on a queue that is not there.
#[test]
fn spurious_kicks_do_nothing() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, contents) = boot_split(&vmm)?;
    for role in [Role::Inflate, Role::Deflate, Role::Reporting] {
        let hostile = Hostile::new(&guest, role)?;
        (0..100).for_each(|_| hostile.kick());
        guest.device().stop_queue(guest.index_of(role)?)?;
        (0..100).for_each(|_| hostile.kick());
    }
    std::thread::sleep(Duration::from_millis(20));
    let books = guest.books()?;
    assert_eq!(
        books.inflate_chains + books.deflate_chains + books.report_chains,
        0
    );
    assert_only(&guest, &contents, &[]);
    Ok(())
}
