//! VMware's balloon commands through the C ABI, from a guest that does what Linux's vmw_balloon does
//! (docs/vmware-balloon.md; requirements W, V1 to V3, J10).

use aerostat::AEROSTAT_KIND_VMWARE;
use aerostat_tests::vmm::device::Device;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::vmware::{
    ALL_CAPABILITIES, BATCHED_2M_LOCK, BATCHED_LOCK, BATCHED_UNLOCK, FIRST_VERSION, GET_TARGET,
    GUEST_ID, LARGE, LOCK, RESET, START, SUCCESS, SUCCESS_WITH_CAPABILITIES, UNLOCK, VmwareGuest,
};
use aerostat_tests::vmm::{MIB, PAGE_BYTES, Result, Vmm};

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };

const CMD_INVALID: u32 = 1;
const PPN_INVALID: u32 = 2;
const PPN_LOCKED: u32 = 3;
const PPN_UNLOCKED: u32 = 4;
const PPN_PINNED: u32 = 5;
const PPN_NOTNEEDED: u32 = 6;
const BUSY: u32 = 8;

fn boot(vmm: &Vmm, capabilities: u64) -> Result<VmwareGuest> {
    VmwareGuest::boot(vmm, &[RegionSpec::new(0, 64 * MIB, MEMFD)], capabilities)
}

/// All versions of the protocol, from 2010 to now.
const VERSIONS: [u64; 4] = [
    FIRST_VERSION,
    FIRST_VERSION | 1 << 2,
    FIRST_VERSION | 1 << 2 | 1 << 3,
    ALL_CAPABILITIES,
];

#[test]
fn guests_of_every_version_follow_the_target_up_and_down() -> Result<()> {
    let vmm = Vmm::new()?;
    for capabilities in VERSIONS {
        let mut guest = boot(&vmm, capabilities)?;
        for page in 512..64 * MIB / PAGE_BYTES {
            guest.ram().write(page * PAGE_BYTES, &page.to_le_bytes());
        }
        let before = guest.ram().allocated_bytes()?;
        guest.device().set_target(32 * MIB)?;
        guest.poll()?;
        assert_eq!(guest.ballooned_bytes(), 32 * MIB, "{capabilities:#x}");
        let balloon = guest.device().query()?;
        assert_eq!(
            [balloon.actual_bytes, balloon.ballooned_bytes],
            [32 * MIB; 2]
        );
        assert_eq!(before - guest.ram().allocated_bytes()?, 32 * MIB);
        guest.device().set_target(10 * MIB)?;
        guest.poll()?;
        // The driver leaves less than a large page above the target alone.
        let left = guest.ballooned_bytes();
        assert!((10 * MIB..12 * MIB).contains(&left), "{left}");
        assert_eq!(guest.device().query()?.ballooned_bytes, left);
        guest.device().set_target(0)?;
        guest.poll()?;
        assert_eq!(guest.device().query()?.ballooned_bytes, 0);
        let books = guest.books()?;
        assert_eq!(books.balloon.discarded_bytes, 32 * MIB);
        assert_eq!(books.returned_bytes, 32 * MIB);
        assert_eq!((books.refused_bytes, books.chain_errors), (0, 0));
        assert_eq!((books.handshakes, books.handshakes_failed), (1, 0));
    }
    Ok(())
}

/// J10, W: the first version is answered as it was in 2010, later ones with what both sides can do.
#[test]
fn start_negotiates_capabilities() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, 0)?;
    assert_eq!(guest.command(START, [FIRST_VERSION, 0])?, (SUCCESS, 0));
    assert_eq!(guest.device().features()?, FIRST_VERSION);
    let all = guest.command(START, [u64::MAX, 0])?;
    assert_eq!(all, (SUCCESS_WITH_CAPABILITIES, ALL_CAPABILITIES));
    let batches = guest.command(START, [0b110, 0])?;
    assert_eq!(batches, (SUCCESS_WITH_CAPABILITIES, 0b110));
    assert_eq!(
        guest.command(BATCHED_2M_LOCK, [1, 1])?.0,
        CMD_INVALID,
        "not negotiated"
    );
    assert_eq!(
        guest.command(START, [0, 0])?,
        (SUCCESS, 0),
        "a guest that gives up"
    );
    assert_eq!(guest.command(LOCK, [600, 1])?.0, CMD_INVALID);
    assert_eq!(
        guest.command(START, [0b100, 0])?.0,
        CMD_INVALID,
        "batches without pages"
    );
    assert_eq!(guest.command(LOCK, [600, 1])?.0, RESET);
    let books = guest.books()?;
    assert_eq!((books.handshakes, books.handshakes_failed), (4, 1));
    Ok(())
}

/// The target of a guest that knows 32 bits, and of one that knows more, above 16 TiB.
#[test]
fn targets_have_as_many_bits_as_the_guest_can_read() -> Result<()> {
    let vmm = Vmm::new()?;
    let device = Device::of_kind(vmm.runtime(), AEROSTAT_KIND_VMWARE, 0, -1, -1)?;
    device.set_target(32 << 40)?;
    let guest = boot(&vmm, 0)?;
    device.set_memory(guest.ram())?;
    device.set_target(32 * MIB)?;
    device.activate()?;
    device.vmware_command(START, [FIRST_VERSION, 0])?;
    assert_eq!(
        device.vmware_command(GET_TARGET, [1000, 0])?,
        (SUCCESS, 32 << 8)
    );
    Ok(())
}

/// V1, V2: refusal, page by page, with its reason; refused pages keep their contents.
#[test]
fn pages_are_refused_with_a_reason_and_stay_untouched() -> Result<()> {
    let vmm = Vmm::new()?;
    let regions = [
        RegionSpec::new(0, 32 * MIB, MEMFD),
        RegionSpec {
            pinned: true,
            ..RegionSpec::new(32 * MIB, 2 * MIB, MEMFD)
        },
        RegionSpec {
            readonly: true,
            ..RegionSpec::new(34 * MIB, 2 * MIB, MEMFD)
        },
    ];
    let mut guest = VmwareGuest::boot(&vmm, &regions, FIRST_VERSION)?;
    let page_of = |bytes: u64| bytes / PAGE_BYTES;
    assert_eq!(guest.command(LOCK, [600, 1])?.0, RESET, "before START");
    guest.command(START, [FIRST_VERSION, 0])?;
    assert_eq!(guest.command(LOCK, [600, 1])?, (PPN_NOTNEEDED, 0));
    guest.device().set_target(4 * PAGE_BYTES)?;
    for page in [600, 601] {
        assert_eq!(
            guest.command(LOCK, [page, 1])?,
            (SUCCESS, 4),
            "with the target"
        );
    }
    guest.ram().write(602 * PAGE_BYTES, b"kept");
    assert_eq!(guest.command(LOCK, [600, 1])?.0, PPN_LOCKED);
    assert_eq!(guest.command(LOCK, [page_of(32 * MIB), 1])?.0, PPN_PINNED);
    for outside in [
        page_of(34 * MIB),
        page_of(36 * MIB),
        u64::from(u32::MAX),
        u64::MAX >> 12,
        u64::MAX,
    ] {
        assert_eq!(
            guest.command(LOCK, [outside, 1])?.0,
            PPN_INVALID,
            "{outside:#x}"
        );
        assert_eq!(
            guest.command(UNLOCK, [outside, 1])?.0,
            PPN_INVALID,
            "{outside:#x}"
        );
    }
    guest.device().inhibit()?;
    assert_eq!(guest.command(LOCK, [602, 1])?.0, BUSY);
    guest.device().uninhibit()?;
    assert_eq!(guest.command(UNLOCK, [602, 1])?.0, PPN_UNLOCKED);
    guest.device().set_target(2 * PAGE_BYTES)?;
    assert_eq!(
        guest.command(LOCK, [602, 1])?.0,
        PPN_NOTNEEDED,
        "the target went down"
    );
    assert_eq!(
        &guest.ram().load_u32(602 * PAGE_BYTES).to_le_bytes(),
        b"kept"
    );
    assert_eq!(guest.command(UNLOCK, [601, 1])?, (SUCCESS, 2));
    assert_eq!(guest.device().query()?.ballooned_bytes, PAGE_BYTES);
    let books = guest.books()?;
    assert_eq!(books.balloon.skipped_over_target_bytes, 2 * PAGE_BYTES);
    assert_eq!(books.balloon.skipped_inhibited_bytes, PAGE_BYTES);
    assert_eq!(books.balloon.skipped_pinned_bytes, PAGE_BYTES);
    Ok(())
}

/// V3: the guest frees all at once, without a word, and begins anew; what comes late does no harm.
#[test]
fn a_host_reset_empties_the_balloon_and_late_pages_are_the_guests() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, ALL_CAPABILITIES)?;
    guest.device().set_target(16 * MIB)?;
    guest.poll()?;
    guest.device().reset_balloon()?;
    assert_eq!(guest.device().query()?.ballooned_bytes, 0);
    let late = 4000;
    guest.ram().write(late * PAGE_BYTES, b"late");
    assert_eq!(guest.command(LOCK, [late, 1])?.0, RESET);
    assert_eq!(guest.command(UNLOCK, [late, 1])?.0, RESET);
    assert_eq!(
        &guest.ram().load_u32(late * PAGE_BYTES).to_le_bytes(),
        b"late"
    );
    let books = guest.books()?;
    assert_eq!((books.host_resets, books.host_resets_acknowledged), (1, 0));
    assert_eq!(books.balloon.skipped_late_bytes, PAGE_BYTES);
    assert_eq!(books.late_take_bytes, PAGE_BYTES);
    assert_eq!(books.host_reset_bytes, 16 * MIB);
    guest.poll()?;
    assert_eq!(guest.ballooned_bytes(), 16 * MIB, "the target stayed");
    let books = guest.books()?;
    assert_eq!((books.host_resets_acknowledged, books.handshakes), (1, 2));
    assert_eq!(
        (books.returned_bytes, books.rejected_take_bytes),
        (0, 0),
        "not page by page"
    );
    Ok(())
}

/// W: a batch is a page of 512 entries, each with a status of its own.
#[test]
fn a_batch_has_a_status_for_each_page() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, ALL_CAPABILITIES)?;
    guest.device().set_target(64 * MIB)?;
    guest.command(START, [ALL_CAPABILITIES, 0])?;
    let batch = |guest: &VmwareGuest, entries: &[u64]| {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect();
        guest.ram().write(PAGE_BYTES, &bytes);
    };
    let statuses = |guest: &VmwareGuest, count: u64| -> Vec<u32> {
        (0..count)
            .map(|at| guest.ram().load_u32(PAGE_BYTES + 8 * at) & 0xfff)
            .collect()
    };
    let end = 64 * MIB / PAGE_BYTES;
    batch(
        &guest,
        &[
            600 << 12,
            601 << 12,
            600 << 12,
            end << 12,
            u64::MAX << 12,
            602 << 12 | 0x1f,
        ],
    );
    assert_eq!(guest.command(BATCHED_LOCK, [1, 6])?, (SUCCESS, end));
    assert_eq!(
        statuses(&guest, 6),
        [0, 0, PPN_LOCKED, PPN_INVALID, PPN_INVALID, 0]
    );
    assert_eq!(
        guest.ram().load_u32(PAGE_BYTES) >> 12,
        600,
        "the numbers stay"
    );
    batch(&guest, &[600 << 12, 600 << 12, 700 << 12, end << 12]);
    assert_eq!(guest.command(BATCHED_UNLOCK, [1, 4])?.0, SUCCESS);
    assert_eq!(
        statuses(&guest, 4),
        [0, PPN_UNLOCKED, PPN_UNLOCKED, PPN_INVALID]
    );
    // Large pages: whole, and aligned.
    batch(
        &guest,
        &[
            LARGE << 12,
            (4 * LARGE) << 12,
            (4 * LARGE + 1) << 12,
            (end - LARGE / 2) << 12,
        ],
    );
    assert_eq!(guest.command(BATCHED_2M_LOCK, [1, 4])?.0, SUCCESS);
    assert_eq!(
        statuses(&guest, 4),
        [PPN_LOCKED, 0, PPN_INVALID, PPN_INVALID]
    );
    // 601, 602 and the large page.
    assert_eq!(
        guest.device().query()?.ballooned_bytes,
        (2 + LARGE) * PAGE_BYTES
    );
    guest.books()?;
    Ok(())
}

/// Hostile guests: numbers of any size in any register.
#[test]
fn nonsense_is_answered_and_counted() -> Result<()> {
    let vmm = Vmm::new()?;
    let regions = [
        RegionSpec::new(0, 16 * MIB, MEMFD),
        RegionSpec {
            readonly: true,
            ..RegionSpec::new(16 * MIB, 2 * MIB, MEMFD)
        },
    ];
    let mut guest = VmwareGuest::boot(&vmm, &regions, ALL_CAPABILITIES)?;
    guest.device().set_target(16 * MIB)?;
    for page in 2..4096 {
        guest.ram().write(page * PAGE_BYTES, &page.to_le_bytes());
    }
    guest.command(START, [ALL_CAPABILITIES, 0])?;
    for command in [5, 10, 11, 1 << 32, u64::MAX] {
        assert_eq!(
            guest.command(command, [u64::MAX; 2])?.0,
            CMD_INVALID,
            "{command}"
        );
    }
    for command in [BATCHED_LOCK, BATCHED_UNLOCK, BATCHED_2M_LOCK] {
        for count in [0, 513, u64::MAX] {
            assert_eq!(guest.command(command, [1, count])?.0, CMD_INVALID);
        }
        for page in [4096, 16 * MIB / PAGE_BYTES, 1 << 40, u64::MAX] {
            assert_eq!(
                guest.command(command, [page, 1])?.0,
                PPN_INVALID,
                "{page:#x}"
            );
        }
    }
    let books = guest.books()?;
    assert_eq!(books.chain_errors, 5 + 3 * 7);
    assert_eq!(guest.device().query()?.ballooned_bytes, 0);
    for page in 2..4096 {
        assert_eq!(
            u64::from(guest.ram().load_u32(page * PAGE_BYTES)),
            page,
            "untouched"
        );
    }
    // A batch that gives the page that it is in: the guest harms but itself.
    guest.ram().write(8 * MIB, &(8 * MIB).to_le_bytes());
    assert_eq!(
        guest.command(BATCHED_LOCK, [8 * MIB / PAGE_BYTES, 1])?.0,
        SUCCESS
    );
    assert_eq!(guest.device().query()?.ballooned_bytes, PAGE_BYTES);
    guest.books()?;
    Ok(())
}

/// A guest that reboots has its pages back, and a device that is paused loses none.
#[test]
fn start_empties_the_balloon_and_a_paused_device_is_busy() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, ALL_CAPABILITIES)?;
    guest.device().set_target(8 * MIB)?;
    guest.poll()?;
    guest.device().pause()?;
    assert_eq!(guest.command(GET_TARGET, [0, 0])?.0, BUSY);
    assert_eq!(guest.command(START, [ALL_CAPABILITIES, 0])?.0, BUSY);
    guest.device().resume()?;
    assert_eq!(guest.device().query()?.ballooned_bytes, 8 * MIB);
    guest.command(START, [FIRST_VERSION, 0])?;
    assert_eq!(guest.device().query()?.ballooned_bytes, 0);
    assert_eq!(guest.command(GUEST_ID, [1, 0])?, (SUCCESS, 0));
    guest.device().reset()?;
    assert_eq!(guest.command(GET_TARGET, [0, 0])?.0, RESET);
    let books = guest.books()?;
    assert_eq!((books.handshakes, books.handshakes_failed), (2, 1));
    Ok(())
}

/// S13 for a guest without queues: it goes on in the middle of its session.
#[test]
fn a_session_moves_to_another_device() -> Result<()> {
    let (vmm, elsewhere) = (Vmm::new()?, Vmm::new()?);
    let mut guest = boot(&vmm, ALL_CAPABILITIES)?;
    guest.device().set_target(20 * MIB)?;
    guest.poll()?;
    for pending in [false, true] {
        if pending {
            guest.device().reset_balloon()?;
        }
        guest.device().pause()?;
        let state = guest.device().save()?;
        let device = Device::of_kind(elsewhere.runtime(), AEROSTAT_KIND_VMWARE, 0, -1, -1)?;
        device.set_memory(guest.ram())?;
        device.restore(&state)?;
        device.activate()?;
        guest.plug(device);
        guest
            .device()
            .set_target(if pending { 6 * MIB } else { 4 * MIB })?;
        guest.poll()?;
        if pending {
            // Told of the reset by the answer to its question.
            guest.poll()?;
        }
        let size = guest.ballooned_bytes();
        assert_eq!(size, if pending { 6 * MIB } else { 4 * MIB });
        assert_eq!(guest.device().query()?.ballooned_bytes, size);
        let books = guest.books()?;
        assert_eq!(books.rejected_take_bytes, 0);
        assert_eq!(books.host_resets, books.host_resets_acknowledged);
    }
    Ok(())
}

/// Only devices of this kind understand it, and only through calls.
#[test]
fn other_devices_have_no_commands_and_this_one_no_queues() -> Result<()> {
    let vmm = Vmm::new()?;
    let other = Device::new(vmm.runtime(), 0, -1, -1)?;
    let error = other
        .vmware_command(START, [2, 0])
        .expect_err("it was accepted");
    assert_eq!(error.errno(), Some(libc::ENOTSUP));
    let guest = boot(&vmm, 0)?;
    let error = guest.device().stop_queue(0).expect_err("it has a queue");
    assert_eq!(error.errno(), Some(libc::ENOENT));
    Ok(())
}
