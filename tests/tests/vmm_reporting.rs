//! Page reporting (requirement S10): unused memory is freed on the host and stays the guest's.

use aerostat::{AEROSTAT_FEATURE_PAGE_POISON, AEROSTAT_FEATURE_STATS_VQ};
use aerostat_tests::vmm::driver::{CONFIG_POISON, Role};
use aerostat_tests::vmm::guest::{queue_config, resumed};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::vring::Piece;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, Numbering, PAGE_BYTES, Result, Vmm};

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };

fn frees_what_is_reported(config: &GuestConfig, block_pages: u64) -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(config)?;
    let working_set = guest.fill_memory(1500, 3)?;
    let full = guest.ram().allocated_bytes()?;

    let reported = guest.driver().report_unused(block_pages)?;

    let books = guest.settled_books()?;
    let freed = full - guest.ram().allocated_bytes()?;
    assert!(reported > guest.ram().total_bytes() / 2, "{reported}");
    assert!(freed * 100 >= reported * 99, "{freed} of {reported}");
    assert_eq!(books.report.requested_bytes, reported);
    assert_eq!(books.report.discarded_bytes, reported);
    assert_eq!(books.balloon.requested_bytes, 0);
    assert_eq!(
        guest.device().query()?.ballooned_bytes,
        0,
        "they stay the guest's"
    );
    guest.assert_intact(&working_set);
    // The guest goes on to use them, and may put them into the balloon as well.
    guest.fill_memory(2000, 4)?;
    guest.driver().fill(256)?;
    let books = guest.settled_books()?;
    assert_eq!(books.balloon.discarded_bytes, 256 * PAGE_BYTES);
    Ok(())
}

#[test]
fn reports_of_two_mib_free_anonymous_memory() -> Result<()> {
    frees_what_is_reported(&GuestConfig::new(Backing::Anonymous, 160), 512)
}

#[test]
fn reports_of_four_mib_free_a_memfd() -> Result<()> {
    frees_what_is_reported(&GuestConfig::new(MEMFD, 192), 1024)
}

#[test]
fn reports_come_through_direct_descriptors_too() -> Result<()> {
    let mut config = GuestConfig::new(Backing::Anonymous, 96);
    config.selected &= !aerostat::AEROSTAT_FEATURE_INDIRECT_DESC;
    frees_what_is_reported(&config, 512)
}

/// What the last queue of a dense numbering is for depends on those before it, as the driver set them up:
/// that one of them is stopped for a while changes nothing.
#[test]
fn a_report_that_comes_while_another_queue_is_stopped_is_answered() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 64))?;
    let device = guest.device();
    let index = guest.index_of(Role::Stats)?;
    let config = {
        let mut driver = guest.driver();
        queue_config(driver.queue(Role::Stats)?, false)
    };
    let position = device.stop_queue(index)?;

    let reported = guest.driver().report_unused(512)?;
    assert_eq!(guest.settled_books()?.report.discarded_bytes, reported);
    device.start_queue(index, &resumed(&config, &position))?;
    let reported = reported + guest.driver().report_unused(512)?;
    assert_eq!(guest.settled_books()?.report.discarded_bytes, reported);
    Ok(())
}

/// S, "Queues": Linux numbers densely, so the reporting queue is 2 without statistics and 3 with;
/// another driver uses 4.
#[test]
fn the_reporting_queue_is_found_in_either_numbering() -> Result<()> {
    for numbering in [Numbering::Dense, Numbering::Fixed] {
        for without in [0, AEROSTAT_FEATURE_STATS_VQ] {
            let mut config = GuestConfig::new(Backing::Anonymous, 24);
            config.numbering = numbering;
            config.selected &= !without;
            frees_what_is_reported(&config, 512)?;
        }
    }
    Ok(())
}

/// Boots a driver that negotiates PAGE_POISON and tells its value.
fn boot_with_poison(vmm: &Vmm, value: u32) -> Result<Guest> {
    let mut config = GuestConfig::new(MEMFD, 32);
    config.selected |= AEROSTAT_FEATURE_PAGE_POISON;
    let mut guest = vmm.assemble(&config)?;
    let features = guest.negotiate()?;
    assert_ne!(features & AEROSTAT_FEATURE_PAGE_POISON, 0);
    guest
        .device()
        .write_config(CONFIG_POISON, &value.to_le_bytes())?;
    guest.start_queues(features)?;
    guest.device().activate()?;
    Ok(guest)
}

#[test]
fn pages_poisoned_with_zero_are_freed() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot_with_poison(&vmm, 0)?;
    guest.fill_memory(100, 1)?;
    let reported = guest.driver().report_unused(512)?;
    assert_eq!(guest.settled_books()?.report.discarded_bytes, reported);
    Ok(())
}

/// S10: "they may become nothing but poison_val": what is not zero is acknowledged and left alone.
#[test]
fn pages_poisoned_with_anything_else_are_acknowledged_and_left_alone() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot_with_poison(&vmm, 0xaaaa_aaaa)?;
    let poison = 0xaaaa_aaaa_aaaa_aaaa;
    let pages: Vec<u64> = guest.driver().allocator.unused().collect();
    for pfn in &pages {
        guest.ram().fill_page(*pfn, |_| poison);
    }
    let full = guest.ram().allocated_bytes()?;

    let reported = guest.driver().report_unused(512)?;

    let books = guest.settled_books()?;
    assert!(guest.ram().allocated_bytes()? >= full);
    assert_eq!(books.report.requested_bytes, reported);
    assert_eq!(books.report.skipped_partial_bytes, reported);
    assert_eq!(books.report.discarded_bytes, 0);
    assert!(
        pages
            .iter()
            .all(|pfn| guest.ram().page_is(*pfn, |_| poison))
    );
    // The balloon does not depend on poison: its pages are the host's.
    guest.driver().fill(256)?;
    assert_eq!(
        guest.settled_books()?.balloon.discarded_bytes,
        256 * PAGE_BYTES
    );
    Ok(())
}

/// Hostile drivers: "reports unaligned, of 4 GiB x 32, smaller than a host page on hugetlb", READ
/// on reporting, addresses that overflow, ranges that leave guest memory.
#[test]
fn reports_that_make_no_sense_are_acknowledged_and_counted() -> Result<()> {
    let vmm = Vmm::new()?;
    let regions = vec![
        RegionSpec::new(0, 16 * MIB, Backing::Anonymous),
        RegionSpec::new(64 * MIB, 16 * MIB, MEMFD),
    ];
    let guest = vmm.boot(&GuestConfig::with_regions(regions))?;
    let working_set = guest.fill_memory(1000, 8)?;
    let piece = |gpa, len| Piece {
        gpa,
        len,
        writable: true,
    };
    let readable = Piece {
        writable: false,
        ..piece(8 * MIB, 4096)
    };
    let far = 1 << 40;
    let cases: [(&str, Vec<Piece>); 7] = [
        ("unaligned address", vec![piece(8 * MIB + 8, 4096)]),
        ("unaligned length", vec![piece(8 * MIB, 4095)]),
        ("no length", vec![piece(8 * MIB, 0)]),
        ("readable", vec![readable]),
        (
            "readable and writable",
            vec![readable, piece(8 * MIB, 4096)],
        ),
        ("overflow", vec![piece(u64::MAX - 4095, 8192)]),
        ("more than 4 GiB", vec![piece(far, 0xffff_f000); 32]),
    ];
    for (count, (what, pieces)) in cases.iter().enumerate() {
        let used = guest.driver().exchange(Role::Reporting, pieces)?;
        assert_eq!(used.written, 0, "{what}");
        let books = guest.books()?;
        assert_eq!(books.chain_errors, 1 + count as u64, "{what}");
        assert_eq!(books.broken_rings, 0, "{what}");
    }
    guest.assert_intact(&working_set);

    // Ranges that leave memory are cut to it: here 1 MiB of the first region, the hole behind it.
    let before = guest.settled_books()?.report;
    let touched = piece(15 * MIB, 2 << 20);
    guest.driver().exchange(Role::Reporting, &[touched])?;
    let after = guest.settled_books()?.report;
    assert_eq!(after.discarded_bytes - before.discarded_bytes, MIB);
    let outside = after.skipped_out_of_range_bytes - before.skipped_out_of_range_bytes;
    assert_eq!(outside, MIB);
    guest.assert_intact(&working_set);
    Ok(())
}
