//! Sessions as a front-end sees them: hand-shake, rings, configuration, reconnection.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test program ends with a panic when anything is not as it should be"
)]

mod common;

use common::frontend::{
    F_PAGE_POISON, F_PAGE_REPORTING, FIRST_FREE_PFN, Frontend, Guest, MEMORY_BYTES, RING_SIZE,
    USER_BASE, becomes_readable, packed_base, request,
};
use common::{Backend, eventually};
use serde_json::json;
use std::io::Read;
use std::os::fd::AsFd;

const PAGES: std::ops::Range<u32> = FIRST_FREE_PFN..FIRST_FREE_PFN + 256;
const PAGES_BYTES: u64 = 256 * 4096;

fn set_target(control: &mut common::Control, bytes: u64) {
    let target = control.execute("aerostat-set-target", json!({ "bytes": bytes }));
    assert_eq!(target.unwrap()["target-bytes"], bytes);
}

#[test]
fn inflated_pages_leave_the_host_and_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let mut guest = Guest::new();
    guest.touch(PAGES);
    let before = guest.host_bytes();
    let _frontend = Frontend::run(&backend.socket(0), &guest);
    assert_eq!(control.query()["memory-bytes"], MEMORY_BYTES);
    control.wait_for_state("active");

    guest.inflate(PAGES);
    let query = control.query();
    assert_eq!(query["ballooned-bytes"], PAGES_BYTES);
    assert_eq!(query["counters"]["requested-bytes"], PAGES_BYTES);
    assert!(becomes_readable(&guest.rings[0].call), "no interrupt");
    eventually("the host gets the memory", || {
        (control.counter("discarded-bytes") == PAGES_BYTES).then_some(())
    });
    assert!(guest.host_bytes() <= before - PAGES_BYTES + (64 << 10));

    guest.deflate(PAGES);
    let query = control.query();
    assert_eq!(query["ballooned-bytes"], 0);
    assert_eq!(query["counters"]["returned-bytes"], PAGES_BYTES);
    let nodes = query["nodes"].as_array().unwrap();
    let sum: u64 = nodes
        .iter()
        .map(|node| node["counters"]["discarded-bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(sum, PAGES_BYTES);
}

#[test]
fn the_configuration_space_is_the_devices() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    // Set before there is any front-end: the driver finds it when it looks.
    set_target(&mut control, 5 << 20);
    let mut frontend = Frontend::connect(&backend.socket(0));
    frontend.negotiate();
    assert_eq!(frontend.get_config(0, 4), 1280_u32.to_le_bytes());
    assert_eq!(frontend.get_config(0, 32).len(), 32);

    // A front-end may write all of it back. `actual` is the driver's, num_pages is not.
    let mut space = frontend.get_config(0, 16);
    space[..4].copy_from_slice(&7_u32.to_le_bytes());
    space[4..8].copy_from_slice(&3_u32.to_le_bytes());
    assert!(frontend.set_config(0, &space));
    assert_eq!(frontend.get_config(0, 4), 1280_u32.to_le_bytes());
    assert_eq!(control.query()["actual-bytes"], 3 * 4096);
    assert!(frontend.set_config(4, &9_u32.to_le_bytes()));
    assert_eq!(control.query()["actual-bytes"], 9 * 4096);
}

/// QEMU's generic device passes `poison_val` on when the driver writes it, with all of the space around it; the
/// features come when the driver is about to run, and a reset is not told of at all (S10).
#[test]
fn poison_that_comes_before_the_features_is_heeded_and_is_no_later_drivers() {
    const PLAIN: u64 = 1 << 32 | F_PAGE_REPORTING;
    const POISONED: u64 = PLAIN | F_PAGE_POISON;
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let mut guest = Guest::new();
    let mut frontend = Frontend::connect(&backend.socket(0));
    frontend.introduce(POISONED);
    let mut discarded = 0;
    for (features, poison) in [
        (POISONED, Some(0xaaaa_aaaa)),
        (POISONED, Some(0xaaaa_aaaa)),
        (POISONED, None),
        (PLAIN, Some(0xaaaa_aaaa)),
        (POISONED, Some(0xaaaa_aaaa_u32)),
        (POISONED, Some(0)),
    ] {
        if let Some(poison) = poison {
            let mut space = frontend.get_config(0, 16);
            space[12..].copy_from_slice(&poison.to_le_bytes());
            assert!(frontend.set_config(0, &space));
            assert_eq!(frontend.get_config(0, 16), space);
        }
        assert!(frontend.set_features(features));
        frontend.start(&guest);
        guest.touch(PAGES);
        guest.report(PAGES);
        // A driver that told nobody here told a back-end that was there before.
        let poisoned = features == POISONED && poison != Some(0);
        discarded += if poisoned { 0 } else { PAGES_BYTES };
        assert_eq!(control.counter("report-discarded-bytes"), discarded);
        frontend.stop(&guest);
        guest.reset_driver();
    }
    assert_eq!(control.counter("config-errors"), 0);
}

#[test]
fn a_new_target_is_told_over_the_back_end_channel() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let guest = Guest::new();
    let mut frontend = Frontend::connect(&backend.socket(0));
    frontend.negotiate();
    let mut channel = frontend.backend_channel();
    frontend.start(&guest);

    set_target(&mut control, 1 << 20);
    let mut message = [0; 12];
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message.as_slice(), Frontend::encode(2, 1, &[]));
    assert_eq!(frontend.get_config(0, 4), 256_u32.to_le_bytes());

    // A front-end that does not read there is no reason to stop.
    for _ in 0..20_000 {
        set_target(&mut control, 2 << 20);
    }
    assert_eq!(frontend.get_config(0, 4), 512_u32.to_le_bytes());
    // Nor is one that closed it.
    drop(channel);
    set_target(&mut control, 3 << 20);
    assert_eq!(frontend.get_config(0, 4), 768_u32.to_le_bytes());
    let _again = frontend.backend_channel();
}

#[test]
fn a_guest_that_comes_back_finds_its_target_and_an_empty_balloon() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let mut guest = Guest::new();
    let frontend = Frontend::run(&backend.socket(0), &guest);
    set_target(&mut control, 4 << 20);
    guest.inflate(PAGES);
    drop(frontend);
    control.wait_for_state("disconnected");
    let query = control.query();
    assert_eq!(
        (&query["memory-bytes"], &query["ballooned-bytes"]),
        (&json!(0), &json!(0))
    );
    assert_eq!(query["target-bytes"], 4 << 20);

    let mut guest = Guest::new();
    let mut frontend = Frontend::run(&backend.socket(0), &guest);
    assert_eq!(frontend.get_config(0, 4), 1024_u32.to_le_bytes());
    guest.inflate(PAGES);
    let query = control.query();
    assert_eq!(query["ballooned-bytes"], PAGES_BYTES);
    assert_eq!(
        query["counters"]["requested-bytes"],
        2 * PAGES_BYTES,
        "over sessions"
    );
}

#[test]
fn a_paused_machine_keeps_its_balloon_and_a_new_driver_does_not() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let mut guest = Guest::new();
    let mut frontend = Frontend::run(&backend.socket(0), &guest);
    guest.inflate(PAGES);
    guest.inflate(PAGES.end..PAGES.end + 1);
    assert_eq!(frontend.stop(&guest), [2, 0, 0]);
    assert_eq!(control.query()["state"], "paused");
    frontend.start(&guest);
    assert_eq!(control.query()["ballooned-bytes"], PAGES_BYTES + 4096);
    guest.deflate(PAGES);
    assert_eq!(control.query()["ballooned-bytes"], 4096);
    assert_eq!(control.counter("rejected-take-bytes"), 0);

    assert_eq!(frontend.stop(&guest), [2, 1, 0]);
    guest.reset_driver();
    frontend.start(&guest);
    assert_eq!(control.query()["ballooned-bytes"], 0);
    guest.inflate(PAGES);
    assert_eq!(control.counter("skipped-duplicate-bytes"), 0);

    assert!(frontend.tell(request::RESET_DEVICE, &[]));
    assert_eq!(control.query()["state"], "configured");
    assert_eq!(control.query()["ballooned-bytes"], 0);
}

/// Packed rings are stopped and go on anywhere in a lap, also where their base is the number that stands for
/// a new ring.
#[test]
fn a_machine_with_packed_rings_goes_on_where_it_was_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start_with(directory.path(), 1, &["--features", "default,ring-packed"]);
    let mut control = backend.control(0);
    let mut guest = Guest::packed();
    let mut frontend = Frontend::run(&backend.socket(0), &guest);
    control.wait_for_state("active");
    let mut chains = 0;
    for pages in [1, 62, 1, 30, 34, 100] {
        for page in 0..pages {
            let pfn = FIRST_FREE_PFN + page;
            guest.inflate(pfn..pfn + 1);
            guest.deflate(pfn..pfn + 1);
        }
        guest.inflate(PAGES);
        chains += u16::try_from(pages).unwrap();
        let stopped = [packed_base(chains + 1), packed_base(chains), 0x8000_8000];
        assert_eq!(frontend.stop(&guest), stopped);
        frontend.start(&guest);
        assert_eq!(control.query()["ballooned-bytes"], PAGES_BYTES);
        guest.deflate(PAGES);
        chains += 1;
        assert_eq!(control.query()["ballooned-bytes"], 0);
    }
    assert_eq!(control.counter("rejected-take-bytes"), 0);

    // A new driver's rings are new, though they say base 0 as a ring does that is one lap old.
    guest.inflate(PAGES);
    frontend.stop(&guest);
    guest.reset_driver();
    frontend.start(&guest);
    assert_eq!(control.query()["ballooned-bytes"], 0);
    guest.inflate(PAGES);
    assert_eq!(control.query()["ballooned-bytes"], PAGES_BYTES);
}

#[test]
fn a_restarted_back_end_takes_over_a_running_guest() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut guest = Guest::new();
    let frontend = Frontend::run(&backend.socket(0), &guest);
    guest.inflate(PAGES);
    backend.kill();
    drop(frontend);
    assert!(
        directory.path().join("0.sock").exists(),
        "a dead socket stays"
    );

    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let _frontend = Frontend::run(&backend.socket(0), &guest);
    // The new process never saw these pages go; the guest gets its acknowledgement all the same.
    guest.deflate(PAGES);
    assert_eq!(control.counter("rejected-take-bytes"), PAGES_BYTES);
    guest.inflate(PAGES);
    assert_eq!(control.query()["ballooned-bytes"], PAGES_BYTES);
}

#[test]
fn a_broken_ring_is_told_and_a_reset_heals_it() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 2);
    let mut control = backend.control(0);
    let (mut guest, mut other) = (Guest::new(), Guest::new());
    let mut frontend = Frontend::run(&backend.socket(0), &guest);
    let _other_frontend = Frontend::run(&backend.socket(1), &other);

    let avail = guest.rings[0].base + 0x1002;
    guest.write(avail, &(RING_SIZE + 1).to_le_bytes());
    guest.kick(0);
    assert!(becomes_readable(&guest.rings[0].err), "no error signal");
    control.wait_for_state("needs-reset");
    assert_eq!(frontend.ask_u64(request::GET_STATUS) & 64, 64);
    assert_eq!(control.counter("broken-rings"), 1);
    other.inflate(PAGES);

    assert!(frontend.tell(request::RESET_DEVICE, &[]));
    guest.reset_driver();
    frontend.start(&guest);
    guest.inflate(PAGES);
    assert_eq!(control.query()["state"], "active");
}

#[test]
fn statistics_reach_the_control_socket() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let mut guest = Guest::new();
    let mut frontend = Frontend::run(&backend.socket(0), &guest);
    let mut stats = 4_u16.to_le_bytes().to_vec();
    stats.extend_from_slice(&123_456_u64.to_le_bytes());
    guest.write(0x18_0000, &stats);
    guest.offer(2, 0x18_0000, 10, 0);
    eventually("the statistics arrive", || {
        (control.counter("stats-chains") == 1).then_some(())
    });
    let arguments = json!({ "path": "/machine/balloon0", "property": "guest-stats" });
    let shown = control.execute("qom-get", arguments).unwrap();
    assert_eq!(shown["stats"]["stat-free-memory"], 123_456);
    assert_eq!(shown["stats"]["stat-swap-in"], -1);
    assert!(shown["last-update"].as_u64().unwrap() > 1_600_000_000);

    // The device keeps the buffer; a pause has to give it back, or statistics end there.
    assert_eq!(guest.used_index(2), 0);
    let bases = frontend.stop(&guest);
    assert_eq!(bases[2], u32::from(guest.used_index(2)));
    // Nobody answers: it says so, in time.
    frontend.start(&guest);
    eventually("the buffer is read again", || {
        (control.counter("stats-chains") == 2).then_some(())
    });
    let error = control.execute("aerostat-guest-stats", json!({ "timeout-ms": 50 }));
    assert!(
        error.unwrap_err()["desc"]
            .as_str()
            .unwrap()
            .contains("50 ms")
    );
}

#[test]
fn memory_can_come_region_by_region() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let mut guest = Guest::new();
    let mut frontend = Frontend::connect(&backend.socket(0));
    frontend.negotiate();
    assert!(frontend.ask_u64(request::GET_MAX_MEM_SLOTS) >= 32);
    let region = |gpa: u64, len: u64| {
        [0, gpa, len, USER_BASE + gpa, gpa]
            .map(u64::to_ne_bytes)
            .concat()
    };
    let half = MEMORY_BYTES / 2;
    let fd = guest.memory.as_fd();
    assert!(frontend.tell_with(request::ADD_MEM_REG, &region(0, half), &[fd]));
    for index in 0..guest.rings.len() {
        frontend.start_ring(&guest, index);
    }
    assert_eq!(control.query()["memory-bytes"], half);
    assert!(frontend.tell_with(request::ADD_MEM_REG, &region(half, half), &[fd]));
    assert_eq!(control.query()["memory-bytes"], MEMORY_BYTES);
    assert!(
        !frontend.tell_with(request::ADD_MEM_REG, &region(half, half), &[fd]),
        "overlap"
    );
    let upper = u32::try_from(half >> 12).unwrap();
    guest.inflate(upper..upper + 16);
    assert!(
        !frontend.tell(request::REM_MEM_REG, &region(0, half)),
        "rings are there"
    );
    assert!(frontend.tell(request::REM_MEM_REG, &region(half, half)));
    assert_eq!(control.query()["memory-bytes"], half);
    assert_eq!(control.query()["ballooned-bytes"], 0);
    assert!(
        !frontend.tell(request::REM_MEM_REG, &region(half, half)),
        "gone already"
    );
    guest.inflate(PAGES);
    assert_eq!(control.query()["ballooned-bytes"], PAGES_BYTES);
}
