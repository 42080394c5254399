//! The memory balloon with device ID 13, through the C ABI (docs/memballoon.md; requirements R).

use aerostat::{
    AEROSTAT_KIND_MEMBALLOON, AEROSTAT_MEMBALLOON_FEATURE_EXTRA_MEM,
    AEROSTAT_MEMBALLOON_FEATURE_PAGE_SIZES,
};
use aerostat_tests::vmm::device::{Device, State};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::memballoon::{EXCHANGE, GET, GIVE, Memballoon, size_feature};
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::vring::Piece;
use aerostat_tests::vmm::{MIB, PAGE_BYTES, Result, Vmm};

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };
const SMALL: u64 = PAGE_BYTES;
const LARGE: u64 = 2 * MIB;
const EXTRA_GPA: u64 = 1 << 32;

fn boot(vmm: &Vmm, page_bytes: u64) -> Result<Memballoon> {
    let regions = [RegionSpec::new(0, 64 * MIB, MEMFD)];
    Memballoon::boot(
        vmm,
        &regions,
        Memballoon::TRANSPORT | size_feature(page_bytes),
    )
}

/// With 16 MiB that it did not boot with.
fn boot_with_extra(vmm: &Vmm) -> Result<Memballoon> {
    let extra = RegionSpec {
        extra: true,
        ..RegionSpec::new(EXTRA_GPA, 16 * MIB, MEMFD)
    };
    let regions = [RegionSpec::new(0, 32 * MIB, MEMFD), extra];
    let selected = Memballoon::TRANSPORT | size_feature(LARGE);
    Memballoon::boot(
        vmm,
        &regions,
        selected | AEROSTAT_MEMBALLOON_FEATURE_EXTRA_MEM,
    )
}

fn pages(from: u64, count: u64, page_bytes: u64) -> Vec<u64> {
    (0..count).map(|page| from + page * page_bytes).collect()
}

fn ballooned(guest: &Memballoon) -> Result<u64> {
    let balloon = guest.device().query()?;
    assert_eq!(balloon.actual_bytes, balloon.ballooned_bytes);
    Ok(balloon.ballooned_bytes)
}

/// Fills memory, so that the host has it allocated.
fn fill(guest: &Memballoon, from: u64, bytes: u64) {
    for page in pages(from, bytes / PAGE_BYTES, PAGE_BYTES) {
        guest.ram().write(page, &page.to_le_bytes());
    }
}

/// R2: exactly one page size.
#[test]
fn features_ok_takes_exactly_one_page_size() -> Result<()> {
    let vmm = Vmm::new()?;
    let kind = AEROSTAT_KIND_MEMBALLOON;
    let device = Device::of_kind(vmm.runtime(), kind, 0, -1, -1)?;
    let sizes = AEROSTAT_MEMBALLOON_FEATURE_PAGE_SIZES;
    assert_eq!(
        device.offered_features()? & (sizes | 1),
        sizes,
        "all sizes, not EXTRA_MEM"
    );
    let refused = |selected, errno| {
        let error = device.set_features(selected).expect_err("it was accepted");
        assert_eq!(error.errno(), Some(errno), "{selected:#x}: {error}");
    };
    refused(1 << 32, libc::EINVAL);
    refused(1 << 1 | 1 << 10, libc::EINVAL);
    refused(sizes, libc::EINVAL);
    refused(1, libc::ENOTSUP);
    for bit in 1..24 {
        device.set_features(1 << 32 | 1 << bit)?;
    }
    let books = device.counters()?;
    assert_eq!((books.handshakes, books.handshakes_failed), (23, 4));
    let none = Device::of_kind(vmm.runtime(), kind, 1 << 32, -1, -1);
    let error = none.expect_err("a device that offers no page size");
    assert_eq!(error.errno(), Some(libc::EINVAL));
    Ok(())
}

/// R4, R5, and the pages really come back to the host.
#[test]
fn pages_of_every_size_are_given_and_got_back() -> Result<()> {
    let vmm = Vmm::new()?;
    for page_bytes in [SMALL, 64 << 10, LARGE, 16 * MIB] {
        let mut guest = boot(&vmm, page_bytes)?;
        let given = pages(32 * MIB, 16 * MIB / page_bytes, page_bytes);
        fill(&guest, 32 * MIB, 32 * MIB);
        let before = guest.ram().allocated_bytes()?;
        guest.give(&given)?;
        guest.device().flush()?;
        assert_eq!(ballooned(&guest)?, 16 * MIB);
        assert_eq!(
            before - guest.ram().allocated_bytes()?,
            16 * MIB,
            "{page_bytes}"
        );
        assert_eq!(guest.get(&given[..1])?, 1);
        let rest = &given[1..];
        for rest in rest.chunks(1000) {
            assert_eq!(guest.get(rest)?, rest.len() as u64);
        }
        assert_eq!(ballooned(&guest)?, 0);
        let books = guest.books()?;
        assert_eq!(books.balloon.discarded_bytes, 16 * MIB);
        assert_eq!((books.returned_bytes, books.chain_errors), (16 * MIB, 0));
        for page in pages(48 * MIB, 16 * MIB / PAGE_BYTES, PAGE_BYTES) {
            assert_eq!(u64::from(guest.ram().load_u32(page)), page, "not given");
        }
    }
    Ok(())
}

/// R5: the first n of the list are given; what follows the first page that cannot be given is not.
#[test]
fn a_partial_grant_is_a_prefix_of_the_list() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, LARGE)?;
    let given = pages(16 * MIB, 4, LARGE);
    guest.give(&given)?;
    let never_given = 32 * MIB;
    assert_eq!(guest.get(&[given[0], never_given, given[1]])?, 1);
    assert_eq!(
        guest.get(&[given[1], given[2], given[1]])?,
        2,
        "named twice"
    );
    assert_eq!(
        guest.get(&[given[3] + PAGE_BYTES, given[3]])?,
        0,
        "misaligned"
    );
    assert_eq!(guest.get(&[given[0]])?, 0, "it has that one");
    assert_eq!(guest.get(&[1 << 40])?, 0, "no memory");
    assert_eq!(
        guest.get(&[u64::MAX & !(LARGE - 1)])?,
        0,
        "the end of all addresses"
    );
    assert_eq!(guest.get(&[given[3]])?, 1);
    let books = guest.books()?;
    assert_eq!(books.returned_bytes, 8 * MIB);
    assert_eq!(books.rejected_take_bytes, 8 * LARGE);
    Ok(())
}

/// R6: zero-sum, and nothing happens if one page of it is wrong.
#[test]
fn an_exchange_is_all_or_nothing() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, LARGE)?;
    let given = pages(16 * MIB, 4, LARGE);
    let others = pages(32 * MIB, 4, LARGE);
    guest.give(&given)?;
    fill(&guest, 32 * MIB, 8 * MIB);
    assert_eq!(guest.exchange(&given[..2], &others[..2])?, 2);
    assert_eq!(ballooned(&guest)?, 8 * MIB, "zero-sum");
    for (wanted, instead) in [
        (vec![given[0]], vec![others[2]]),
        (vec![given[2]], vec![others[0]]),
        (vec![given[2]], vec![given[2]]),
        (vec![given[2], given[2]], vec![others[2], others[3]]),
        (vec![given[2], given[3]], vec![others[2], others[2]]),
        (vec![given[2]], vec![others[2] + PAGE_BYTES]),
        (vec![given[2]], vec![1 << 40]),
    ] {
        assert_eq!(
            guest.exchange(&wanted, &instead)?,
            0,
            "{wanted:x?} {instead:x?}"
        );
    }
    let odd = [EXCHANGE, given[2], given[3], others[2]];
    assert_eq!(guest.command(&odd, 8)?, (8, 0));
    let books = guest.books()?;
    assert_eq!(books.chain_errors, 8);
    assert_eq!(books.returned_bytes, 4 * MIB);
    assert_eq!(ballooned(&guest)?, 8 * MIB);
    assert_eq!(guest.exchange(&given[2..], &others[2..])?, 2, "and goes on");
    // An exchange needs no answer.
    assert_eq!(guest.command(&[EXCHANGE, others[0], given[0]], 0)?.0, 0);
    assert_eq!(guest.get(&[given[0]])?, 1);
    Ok(())
}

/// R3, R7: one buffer; the latest value wins until it is refilled.
#[test]
fn the_latest_minimum_is_told_when_there_is_a_buffer() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, SMALL)?;
    let device = std::sync::Arc::clone(guest.device());
    device.set_target(8 * MIB)?;
    assert_eq!(guest.wait_message()?.written, 16);
    assert_eq!(guest.last_message(), 8 << 20);
    // No buffer is there.
    for mib in 9..20 {
        device.set_target(mib * MIB)?;
    }
    guest.leave_buffer(16)?;
    assert_eq!(guest.minimum()?, 19 << 20);
    assert!(!guest.has_message(), "once is enough");
    device.set_target(19 * MIB)?;
    assert_eq!(guest.minimum()?, 19 << 20, "the same again (S11)");
    Ok(())
}

/// R10: buffers that are too short are of no use, and do not swallow the message.
#[test]
fn short_buffers_on_the_fromdevq_are_given_back_empty() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, SMALL)?;
    guest.device().set_target(MIB)?;
    assert_eq!(guest.minimum()?, 1 << 20);
    assert_eq!(guest.device().query()?.target_bytes, MIB);
    guest.device().set_target(2 * MIB)?;
    guest.wait_message()?;
    guest.leave_buffer(15)?;
    guest.device().set_target(3 * MIB)?;
    assert_eq!(guest.wait_message()?.written, 0);
    guest.leave_buffer(24)?;
    assert_eq!(guest.wait_message()?.written, 16, "a longer one will do");
    assert_eq!(guest.last_message(), 3 << 20);
    assert_eq!(guest.books()?.chain_errors, 1);
    Ok(())
}

/// R2, R7, R8: memory that the guest did not boot with, as far as the grant goes.
#[test]
fn extra_memory_is_handed_out_within_the_grant() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot_with_extra(&vmm)?;
    let extra = pages(EXTRA_GPA, 8, LARGE);
    let sizes = |guest: &Memballoon| -> Result<(u64, u64)> {
        let balloon = guest.device().query()?;
        Ok((balloon.ballooned_bytes, balloon.extra_bytes))
    };
    assert_eq!(sizes(&guest)?, (0, 0));
    assert_eq!(guest.get(&extra)?, 0, "nothing was granted");
    guest.device().set_extra_grant(6 * MIB)?;
    assert_eq!(
        guest.minimum()?,
        -(6 << 20),
        "as far below zero as it may go"
    );
    assert_eq!(guest.get(&extra)?, 3, "a partial grant");
    assert_eq!(sizes(&guest)?, (0, 6 * MIB));
    // What is given makes room for as much.
    guest.give(&pages(16 * MIB, 2, LARGE))?;
    assert_eq!(sizes(&guest)?, (0, 2 * MIB));
    assert_eq!(guest.get(&extra[3..])?, 2);
    assert_eq!(guest.get(&[16 * MIB])?, 0, "its own, but beyond the grant");
    assert_eq!(
        guest.exchange(&[16 * MIB], &[extra[0]])?,
        1,
        "zero-sum needs no grant"
    );
    guest.give(&extra[1..5])?;
    assert_eq!(sizes(&guest)?, (2 * MIB, 0));
    // A target goes before the grant.
    guest.device().set_target(4 * MIB)?;
    assert_eq!(guest.minimum()?, 4 << 20);
    guest.books()?;
    Ok(())
}

/// A reset leaves nothing with a guest that it did not boot with, and the host has it back.
#[test]
fn a_reset_takes_extra_memory_back() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot_with_extra(&vmm)?;
    guest.device().set_extra_grant(16 * MIB)?;
    guest.minimum()?;
    let extra = pages(EXTRA_GPA, 8, LARGE);
    assert_eq!(guest.get(&extra)?, 8);
    fill(&guest, EXTRA_GPA, 16 * MIB);
    guest.give(&pages(16 * MIB, 1, LARGE))?;
    guest.restart()?;
    assert_eq!(guest.ram().allocated_bytes_at(EXTRA_GPA)?, 0);
    let balloon = guest.device().query()?;
    assert_eq!((balloon.ballooned_bytes, balloon.extra_bytes), (0, 0));
    assert_eq!(guest.minimum()?, -(16 << 20), "a new driver is told");
    assert_eq!(guest.get(&[16 * MIB])?, 0, "empty after reset (R1)");
    assert_eq!(guest.get(&extra)?, 8);
    guest.books()?;
    Ok(())
}

/// R8: without EXTRA_MEM there is no such memory.
#[test]
fn extra_regions_need_a_device_that_offers_them() -> Result<()> {
    let vmm = Vmm::new()?;
    let extra = RegionSpec {
        extra: true,
        ..RegionSpec::new(EXTRA_GPA, 16 * MIB, MEMFD)
    };
    let regions = [RegionSpec::new(0, 32 * MIB, MEMFD), extra];
    let selected = Memballoon::TRANSPORT | size_feature(LARGE);
    let error = Memballoon::boot(&vmm, &regions, selected).expect_err("it was accepted");
    assert_eq!(error.errno(), Some(libc::ENOTSUP));
    let guest = boot(&vmm, LARGE)?;
    let error = guest
        .device()
        .set_extra_grant(MIB)
        .expect_err("it was accepted");
    assert_eq!(error.errno(), Some(libc::ENOTSUP));
    Ok(())
}

/// R10, hostile drivers: whatever it is, it comes back, it is counted, and nothing else happens.
#[test]
fn nonsense_is_acknowledged_and_counted() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, LARGE)?;
    fill(&guest, 0x20_0000, 62 * MIB);
    let long: Vec<u64> = [GIVE].into_iter().chain(pages(0, 1025, LARGE)).collect();
    let page = 16 * MIB;
    let nonsense: [(&str, &[u64]); 9] = [
        ("no command", &[]),
        ("no pages", &[GIVE]),
        ("no pages", &[GET]),
        ("an unknown command", &[3, page]),
        ("the device's command", &[32768, page]),
        ("an unknown command", &[1 << 63, page]),
        ("too long", &long),
        ("misaligned", &[GIVE, page + PAGE_BYTES]),
        ("outside", &[GIVE, 1 << 40]),
    ];
    for (what, fields) in nonsense {
        let mut fields = fields.to_vec();
        let empty = fields.is_empty();
        fields.resize(fields.len().max(1), 0);
        let room = if empty { 8 } else { 0 };
        assert_eq!(guest.command(&fields, room)?.0, 0, "{what}");
    }
    // GET without room for the count gives nothing.
    guest.give(&[page])?;
    assert_eq!(guest.command(&[GET, page], 0)?.0, 0);
    assert_eq!(guest.command(&[GET, page], 7)?.0, 0);
    let piece = |gpa, len, writable| Piece { gpa, len, writable };
    let at = guest.command_gpa();
    for (what, pieces) in [
        ("not whole fields", vec![piece(at, 17, false)]),
        ("only writable", vec![piece(at, 16, true)]),
        ("outside memory", vec![piece(1 << 40, 16, false)]),
        ("half outside memory", vec![piece(64 * MIB - 8, 16, false)]),
        (
            "a count before the command",
            vec![piece(at, 8, true), piece(at, 16, false)],
        ),
    ] {
        assert_eq!(guest.send(&pieces)?.written, 0, "{what}");
    }
    let books = guest.books()?;
    assert_eq!(books.chain_errors, 9 + 2 + 5);
    assert_eq!(ballooned(&guest)?, LARGE, "but for the page that was given");
    assert_eq!(books.balloon.skipped_out_of_range_bytes, 2 * LARGE);
    assert_eq!(guest.device().state()?, State::Active);
    for other in pages(0x20_0000, 30, LARGE) {
        if other != page {
            assert_eq!(u64::from(guest.ram().load_u32(other)), other, "untouched");
        }
    }
    assert_eq!(guest.get(&[page])?, 1);
    Ok(())
}

/// R10: fields that straddle descriptors, and pages that were given twice.
#[test]
fn fields_may_straddle_descriptors_and_duplicates_are_counted() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, SMALL)?;
    let given = pages(16 * MIB, 5, SMALL);
    let fields: Vec<u64> = [GIVE].iter().chain(&given).copied().collect();
    let bytes: Vec<u8> = fields
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect();
    let at = guest.command_gpa();
    guest.ram().write(at, &bytes);
    let mut pieces = Vec::new();
    let (mut done, length) = (0u32, u32::try_from(bytes.len()).unwrap_or(0));
    for part in [3, 10, 1, 20, 100] {
        let len = part.min(length - done);
        let gpa = at + u64::from(done);
        pieces.push(Piece {
            gpa,
            len,
            writable: false,
        });
        done += len;
    }
    guest.send(&pieces)?;
    assert_eq!(ballooned(&guest)?, 5 * SMALL);
    guest.give(&[given[0], given[0], 17 * MIB, 17 * MIB])?;
    let books = guest.books()?;
    assert_eq!(books.balloon.skipped_duplicate_bytes, 3 * SMALL);
    assert_eq!(ballooned(&guest)?, 6 * SMALL);
    Ok(())
}

/// S13: a balloon moves, and so does memory that the guest did not boot with.
#[test]
fn a_ballooned_guest_moves_to_another_device() -> Result<()> {
    let (vmm, elsewhere) = (Vmm::new()?, Vmm::new()?);
    let mut guest = boot_with_extra(&vmm)?;
    guest.device().set_target(4 * MIB)?;
    guest.minimum()?;
    guest.device().set_extra_grant(8 * MIB)?;
    guest.minimum()?;
    let (given, extra) = (pages(16 * MIB, 5, LARGE), pages(EXTRA_GPA, 8, LARGE));
    guest.give(&given)?;
    assert_eq!(guest.get(&extra[..2])?, 2);
    let before = guest.device().query()?;
    guest.move_to(&elsewhere)?;
    let after = guest.device().query()?;
    assert_eq!(
        (after.target_bytes, after.ballooned_bytes, after.extra_bytes),
        (
            before.target_bytes,
            before.ballooned_bytes,
            before.extra_bytes
        )
    );
    assert_eq!(guest.minimum()?, 4 << 20, "told again");
    assert_eq!(
        after.extra_grant_bytes, 0,
        "the grant is the host's to give"
    );
    assert_eq!(guest.get(&given)?, 3, "down to zero");
    guest.device().set_extra_grant(4 * MIB)?;
    guest.minimum()?;
    assert_eq!(guest.get(&given[3..])?, 2);
    assert_eq!(guest.device().query()?.extra_bytes, 4 * MIB);
    guest.books()?;
    Ok(())
}

/// A save of one protocol is not another's.
#[test]
fn the_state_of_another_protocol_is_refused() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot(&vmm, LARGE)?;
    guest.device().pause()?;
    let state = guest.device().save()?;
    let other = Device::new(vmm.runtime(), 0, -1, -1)?;
    other.set_memory(guest.ram())?;
    let error = other.restore(&state).expect_err("it was accepted");
    assert_eq!(error.errno(), Some(libc::EBADMSG));
    Ok(())
}

/// The history and the inhibit barrier are those of any device (J8).
#[test]
fn inhibited_pages_are_acknowledged_counted_and_kept() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, LARGE)?;
    fill(&guest, 16 * MIB, 4 * MIB);
    let before = guest.ram().allocated_bytes()?;
    guest.device().inhibit()?;
    guest.give(&pages(16 * MIB, 2, LARGE))?;
    assert_eq!(guest.books()?.balloon.skipped_inhibited_bytes, 2 * LARGE);
    assert_eq!(guest.ram().allocated_bytes()?, before);
    guest.device().uninhibit()?;
    let history = guest.device().history(0, 100)?;
    let last = history.last().expect("something happened");
    assert!(
        history
            .iter()
            .any(|entry| entry.event == 2 && entry.actual_bytes == 2 * LARGE)
    );
    assert_eq!(last.ballooned_bytes, 2 * LARGE);
    Ok(())
}

/// A ring that breaks is this protocol's to survive as well (S4).
#[test]
fn a_broken_todevq_needs_a_reset_and_gets_one() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, LARGE)?;
    guest.give(&[16 * MIB])?;
    guest.break_todevq();
    assert!(guest.config_event.wait(std::time::Duration::from_secs(20)));
    assert_eq!(guest.device().state()?, State::NeedsReset);
    guest.restart()?;
    assert_eq!(ballooned(&guest)?, 0);
    guest.give(&[16 * MIB])?;
    assert_eq!(ballooned(&guest)?, LARGE);
    Ok(())
}
