//! VMware's balloon in QEMU (`ffi/examples/qemu`), with the driver that a stock Debian kernel has for it
//! (requirements W4, V1 to V3): the guest finds port 0x5670, and speaks through it as it would on VMware.
//!
//! One machine for all of it, as the driver asks for its target once a second only.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use aerostat_tests::qemu::{
    Balloon, Machine, MachineConfig, MachinePrerequisites,
    balloon::{assert_balance, counters, eventually, wait_for_balloon},
    config::BALLOON_PATH,
};
use serde_json::json;
use std::{
    io::{self, Read},
    os::unix::net::UnixListener,
    thread,
    time::Duration,
};

const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 512;
const TARGET_MIB: u64 = 256;
const WORKING_SET_MIB: u64 = 64;

/// What the driver counts (debugfs), in its balloon.
fn held_by_the_guest_bytes(machine: &mut Machine) -> u64 {
    let status = machine.run("cat /sys/kernel/debug/vmmemctl").unwrap();
    let current = status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == "current")
        .unwrap_or_else(|| panic!("{status}"));
    current.1.trim().parse::<u64>().unwrap() * 4096
}

/// Reads all of a stream at about 8 MiB a second.
fn read_slowly(listener: &UnixListener) -> io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    let mut piece = vec![0; 128 << 10];
    while stream.read(&mut piece)? > 0 {
        thread::sleep(Duration::from_millis(16));
    }
    Ok(())
}

#[test]
fn the_stock_driver_inflates_is_refused_is_reset_and_deflates() {
    let Some(parts) = MachinePrerequisites::find_or_skip("VMware's balloon") else {
        return;
    };
    let config = MachineConfig::new(MEMORY_MIB, Balloon::Vmware);
    let mut machine = Machine::start(&parts, &config).unwrap_or_else(|error| panic!("{error}"));
    machine
        .run("mount -t debugfs debugfs /sys/kernel/debug")
        .unwrap();
    let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
    machine.touch_unused_memory().unwrap();
    let full = machine.host_memory_bytes().unwrap();

    // Inflate: the guest gives pages, and the host gets them.
    machine.set_target_mib(TARGET_MIB).unwrap();
    let inflated = wait_for_balloon(&mut machine, TARGET_MIB);
    assert_balance(&inflated["balloon"]);
    assert_eq!(inflated["handshakes"], 1, "{inflated}");
    let back = full.saturating_sub(machine.host_memory_bytes().unwrap());
    assert!(
        back >= TARGET_MIB * MIB * 95 / 100,
        "{} of {TARGET_MIB} MiB came back: {inflated}",
        back / MIB
    );
    assert_eq!(held_by_the_guest_bytes(&mut machine), TARGET_MIB * MIB);

    // Refuse: a background snapshot needs every page, and the guest keeps what it offers (V1, V2).
    machine
        .monitor
        .execute(
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "background-snapshot", "state": true}]}),
        )
        .unwrap();
    // To somebody who reads slowly, so that it lasts until it is cancelled: the driver asks once a second, and QEMU
    // takes such a snapshot as fast as it can.
    let file = machine.short_path().join("snapshot");
    let listener = UnixListener::bind(&file).unwrap();
    let reader = thread::spawn(move || read_slowly(&listener));
    machine
        .monitor
        .execute(
            "migrate",
            json!({"uri": format!("unix:{}", file.display())}),
        )
        .unwrap();
    eventually("the snapshot is being taken", || {
        let answer = machine.monitor.execute("query-migrate", json!({})).unwrap();
        (answer["status"] == "active", answer)
    });
    machine.set_target_mib(TARGET_MIB + 32).unwrap();
    let refused = eventually("pages are refused", || {
        let counters = counters(&mut machine);
        (counters["refused-bytes"] != 0, counters)
    });
    assert_eq!(refused["ballooned-bytes"], TARGET_MIB * MIB, "{refused}");
    assert_balance(&refused["balloon"]);
    machine
        .monitor
        .execute("migrate_cancel", json!({}))
        .unwrap();
    // It ends with an error where it was cut off.
    let _ = reader.join().unwrap();
    wait_for_balloon(&mut machine, TARGET_MIB + 32);

    // Reset by the host: all pages are the guest's, and it begins anew (V3).
    machine.set_target_mib(0).unwrap();
    machine
        .monitor
        .execute(
            "qom-set",
            json!({"path": BALLOON_PATH, "property": "reset-balloon", "value": true}),
        )
        .unwrap();
    let reset = eventually("the guest has begun anew", || {
        let counters = counters(&mut machine);
        (counters["host-resets-acknowledged"] == 1, counters)
    });
    assert_eq!(reset["ballooned-bytes"], 0, "{reset}");
    assert_eq!(held_by_the_guest_bytes(&mut machine), 0);
    assert!(machine.verify_working_set(&set).unwrap());

    // And deflate, page by page.
    machine.set_target_mib(64).unwrap();
    wait_for_balloon(&mut machine, 64);
    machine.set_target_mib(0).unwrap();
    let deflated = wait_for_balloon(&mut machine, 0);
    assert!(deflated["returned-bytes"].as_u64().unwrap() >= 64 * MIB);
    assert_balance(&deflated["balloon"]);
    machine.touch_unused_memory().unwrap();
    assert!(machine.verify_working_set(&set).unwrap());
    // The monitor was told of each size; QEMU says so once a second at most.
    let mut events = Vec::new();
    eventually("the monitor tells of the last size", || {
        events.extend(machine.monitor.events().unwrap());
        let told = events
            .iter()
            .rfind(|event| event["event"] == "BALLOON_CHANGE");
        let last = told.is_some_and(|event| event["data"]["actual"] == MEMORY_MIB * MIB);
        (last, events.len())
    });
}
