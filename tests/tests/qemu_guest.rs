//! A stock Debian guest in QEMU whose balloon device is this library, linked into QEMU
//! (`ffi/examples/qemu`): what users of QEMU's monitor see, what the host gets, and what moves along.
//!
//! Host memory is measured outside QEMU and device: by the blocks of the guest's memory file, or the
//! resident pages of its mapping.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use std::{thread, time::Duration};

use aerostat_tests::qemu::{
    Backing, Balloon, Machine, MachineConfig, MachinePrerequisites,
    balloon::{PATIENCE, assert_balance, counters, eventually, wait_for_balloon},
    config::BALLOON_PATH,
};
use serde_json::json;

const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 512;
const TARGET_MIB: u64 = 256;
const WORKING_SET_MIB: u64 = 64;

fn config() -> MachineConfig {
    MachineConfig::new(MEMORY_MIB, Balloon::Aerostat)
}

fn start(parts: &MachinePrerequisites, config: &MachineConfig) -> Machine {
    Machine::start(parts, config).unwrap_or_else(|error| panic!("{error}"))
}

/// Fills the guest, inflates, deflates; what the guest keeps stays what it is.
fn inflate_and_deflate(config: &MachineConfig, test: &str) {
    let Some(parts) = MachinePrerequisites::find_or_skip(test) else {
        return;
    };
    let mut machine = start(&parts, config);
    let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
    machine.touch_unused_memory().unwrap();
    let full = machine.host_memory_bytes().unwrap();

    machine.set_target_mib(TARGET_MIB).unwrap();
    let counters = wait_for_balloon(&mut machine, TARGET_MIB);
    assert_balance(&counters["balloon"]);
    assert_eq!(machine.actual_mib().unwrap(), TARGET_MIB);

    // Nearly all of it is back: the guest's kernel touches some of its memory meanwhile.
    let back = full.saturating_sub(machine.host_memory_bytes().unwrap());
    assert!(
        back >= TARGET_MIB * MIB * 95 / 100,
        "{} of {TARGET_MIB} MiB came back: {counters}",
        back / MIB
    );
    assert!(machine.verify_working_set(&set).unwrap());

    machine.set_target_mib(0).unwrap();
    let counters = wait_for_balloon(&mut machine, 0);
    assert_balance(&counters["balloon"]);
    machine.touch_unused_memory().unwrap();
    assert!(machine.verify_working_set(&set).unwrap());
    // What users of QEMU see: an event for each change, in bytes that are left to the guest.
    let events = machine.monitor.events().unwrap();
    let left: Vec<u64> = events
        .iter()
        .filter(|event| event["event"] == "BALLOON_CHANGE")
        .filter_map(|event| event["data"]["actual"].as_u64())
        .collect();
    assert_eq!(left.last(), Some(&(MEMORY_MIB * MIB)), "{events:?}");
    assert!(
        left.contains(&((MEMORY_MIB - TARGET_MIB) * MIB)),
        "{left:?}"
    );
    // And how it went.
    let history = machine
        .monitor
        .property(BALLOON_PATH, "balloon-history")
        .unwrap();
    let wanted = format!("target-set target {} ", TARGET_MIB * MIB);
    assert!(history.as_str().unwrap().contains(&wanted), "{history}");
}

#[test]
fn a_guest_inflates_and_deflates_over_split_rings() {
    inflate_and_deflate(&config(), "split rings");
}

#[test]
fn a_guest_inflates_and_deflates_over_packed_rings_in_a_memfd() {
    inflate_and_deflate(
        &config().packed().backing(Backing::Memfd),
        "packed rings, memfd",
    );
}

#[test]
fn without_must_tell_host_pages_are_discarded_before_the_acknowledgement() {
    inflate_and_deflate(
        &config()
            .backing(Backing::Memfd)
            .option("must-tell-host=off"),
        "no must-tell-host",
    );
}

/// X9: the driver knows nothing of targets for nodes, and its kernel counts by itself what is missing where.
#[test]
fn what_the_balloon_holds_is_known_for_each_node_of_the_guest() {
    let Some(parts) = MachinePrerequisites::find_or_skip("nodes") else {
        return;
    };
    let mut machine = start(&parts, &config().nodes(2));
    let memory = |machine: &mut Machine| -> Vec<u64> {
        let text = machine
            .run("grep -h MemTotal /sys/devices/system/node/node*/meminfo")
            .unwrap();
        let kib = text
            .lines()
            .filter_map(|line| line.split_whitespace().nth(3));
        kib.map(|kib| kib.parse::<u64>().unwrap() * 1024).collect()
    };
    let before = memory(&mut machine);
    assert_eq!(before.len(), 2, "{before:?}");
    // More than one node can give.
    machine.set_target_mib(TARGET_MIB + 64).unwrap();
    wait_for_balloon(&mut machine, TARGET_MIB + 64);
    let held = machine
        .monitor
        .property(BALLOON_PATH, "node-ballooned")
        .unwrap();
    let held: Vec<u64> = held
        .as_str()
        .unwrap()
        .split(',')
        .map(|bytes| bytes.parse().unwrap())
        .collect();
    let missing: Vec<u64> = before
        .iter()
        .zip(memory(&mut machine))
        .map(|(before, now)| before - now)
        .collect();
    assert_eq!(held, missing);
    assert_eq!(held.iter().sum::<u64>(), (TARGET_MIB + 64) * MIB);
    assert!(held.iter().all(|bytes| *bytes > 0), "{held:?}");
}

#[test]
fn statistics_come_at_the_interval_that_was_set() {
    let Some(parts) = MachinePrerequisites::find_or_skip("statistics") else {
        return;
    };
    let mut machine = start(&parts, &config());
    let stats = |machine: &mut Machine| machine.monitor.property(BALLOON_PATH, "guest-stats");
    machine
        .monitor
        .execute(
            "qom-set",
            json!({"path": BALLOON_PATH, "property": "guest-stats-polling-interval", "value": 1}),
        )
        .unwrap();

    let first = eventually("the guest tells of its memory", || {
        let seen = stats(&mut machine).unwrap();
        (seen["last-update"] != 0, seen)
    });
    let total = first["stats"]["stat-total-memory"].as_u64().unwrap();
    assert!(
        total > 384 * MIB && total < MEMORY_MIB * MIB,
        "{total} bytes: {first}"
    );
    // A value that the guest did not send is all ones; this kernel sends all up to the tenth.
    assert_ne!(first["stats"]["stat-htlb-pgfail"], u64::MAX);
    eventually("news come by themselves", || {
        let seen = stats(&mut machine).unwrap();
        (seen["last-update"] != first["last-update"], seen)
    });
}

/// S11: afterwards the guest inflates again when it is told of its target again, be it the same.
#[test]
fn a_guest_that_runs_out_of_memory_takes_pages_back_from_the_balloon() {
    let Some(parts) = MachinePrerequisites::find_or_skip("deflate on OOM") else {
        return;
    };
    let mut machine = start(&parts, &config().option("deflate-on-oom=on"));
    let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
    machine.set_target_mib(TARGET_MIB).unwrap();
    wait_for_balloon(&mut machine, TARGET_MIB);

    // Memory that nothing can be written out of, and more than is left: without the balloon's pages the
    // kernel would have to kill.
    let left = machine.memory().unwrap().available_bytes / MIB;
    let fill = format!("dd if=/dev/zero of=/mem/fill bs=1M count={}", left + 48);
    machine.run_within(&fill, PATIENCE).unwrap();

    let counters = eventually("the guest tells of its smaller balloon", || {
        let counters = counters(&mut machine);
        let agreed = counters["actual-bytes"] == counters["ballooned-bytes"];
        (agreed, counters)
    });
    let held = counters["ballooned-bytes"].as_u64().unwrap();
    assert!(held <= (TARGET_MIB - 32) * MIB, "{counters}");
    assert_balance(&counters["balloon"]);
    assert!(machine.verify_working_set(&set).unwrap());
    machine.run("rm /mem/fill").unwrap();
    machine.set_target_mib(TARGET_MIB).unwrap();
    wait_for_balloon(&mut machine, TARGET_MIB);
    assert!(machine.verify_working_set(&set).unwrap());
}

#[test]
fn memory_that_the_guest_reports_comes_back_without_a_balloon() {
    let Some(parts) = MachinePrerequisites::find_or_skip("reporting") else {
        return;
    };
    let mut machine = start(&parts, &config().reporting().backing(Backing::Memfd));
    let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
    machine.touch_unused_memory().unwrap();

    let bytes = eventually("unused memory is back on the host", || {
        let bytes = machine.host_memory_bytes().unwrap();
        (bytes < (MEMORY_MIB - 256) * MIB, bytes)
    });
    let counters = machine.counters().unwrap();
    assert!(
        counters["report"]["discarded-bytes"].as_u64().unwrap() >= 256 * MIB,
        "{bytes} bytes on the host: {counters}"
    );
    assert_balance(&counters["report"]);
    assert_eq!(counters["ballooned-bytes"], 0);
    assert!(machine.verify_working_set(&set).unwrap());
}

#[test]
fn a_guest_with_half_its_memory_in_the_balloon_moves_and_loses_nothing() {
    let Some(parts) = MachinePrerequisites::find_or_skip("migration") else {
        return;
    };
    for config in [config(), config().packed().backing(Backing::Memfd)] {
        let mut machine = start(&parts, &config);
        let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
        machine.touch_unused_memory().unwrap();
        machine.set_target_mib(TARGET_MIB).unwrap();
        wait_for_balloon(&mut machine, TARGET_MIB);

        let destination = start(&parts, &config.clone().incoming());
        let mut machine = machine.migrate(destination).unwrap();

        // The balloon came along, in the device's own count and in the guest's.
        assert_eq!(machine.actual_mib().unwrap(), TARGET_MIB);
        let counters = wait_for_balloon(&mut machine, TARGET_MIB);
        assert_eq!(counters["balloon"]["requested-bytes"], 0, "{counters}");
        assert!(machine.verify_working_set(&set).unwrap());
        // It goes on there: the rings, the statistics, the pages that come back.
        machine.set_target_mib(TARGET_MIB + 32).unwrap();
        wait_for_balloon(&mut machine, TARGET_MIB + 32);
        machine.set_target_mib(0).unwrap();
        wait_for_balloon(&mut machine, 0);
        machine.touch_unused_memory().unwrap();
        assert!(machine.verify_working_set(&set).unwrap());
        machine
            .monitor
            .execute(
                "qom-set",
                json!({"path": BALLOON_PATH, "property": "guest-stats-polling-interval", "value": 1}),
            )
            .unwrap();
        eventually("the guest tells of its memory here, too", || {
            let seen = machine
                .monitor
                .property(BALLOON_PATH, "guest-stats")
                .unwrap();
            (seen["last-update"] != 0, seen)
        });
    }
}

#[test]
fn a_guest_that_moves_while_it_inflates_goes_on_inflating() {
    let Some(parts) = MachinePrerequisites::find_or_skip("migration under way") else {
        return;
    };
    let config = config().backing(Backing::Memfd);
    let mut machine = start(&parts, &config);
    let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
    let destination = start(&parts, &config.clone().incoming());
    machine.set_target_mib(TARGET_MIB).unwrap();

    let mut machine = machine.migrate(destination).unwrap();

    wait_for_balloon(&mut machine, TARGET_MIB);
    assert!(machine.verify_working_set(&set).unwrap());
    machine.set_target_mib(0).unwrap();
    wait_for_balloon(&mut machine, 0);
    assert!(machine.verify_working_set(&set).unwrap());
}

#[test]
fn memory_that_the_guest_hints_at_is_not_sent() {
    let Some(parts) = MachinePrerequisites::find_or_skip("free page hints") else {
        return;
    };
    let config = config().option("free-page-hint=on");
    let mut machine = start(&parts, &config);
    let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
    // Not zeros, which migrate as such: what was unused is full of random data.
    machine
        .run_within(
            "dd if=/dev/urandom of=/mem/fill bs=1M count=160 2>/dev/null; rm /mem/fill",
            PATIENCE,
        )
        .unwrap();
    let destination = start(&parts, &config.clone().incoming());
    // The guest is to have the time to hint before all is sent.
    machine
        .monitor
        .execute("migrate-set-parameters", json!({"max-bandwidth": 24 * MIB}))
        .unwrap();
    let socket = destination.short_path().join("migration");
    let uri = format!("unix:{}", socket.display());
    let mut destination = destination;
    destination
        .monitor
        .execute("migrate-incoming", json!({ "uri": uri }))
        .unwrap();
    machine
        .monitor
        .execute("migrate", json!({ "uri": uri }))
        .unwrap();
    let sent = machine.monitor.wait_for_migration().unwrap();
    let hinted = machine.counters().unwrap()["hinted-bytes"]
        .as_u64()
        .unwrap();
    destination.monitor.event("RESUME").unwrap();

    assert!(hinted > 200 * MIB, "{hinted} bytes hinted: {sent}");
    let normal = sent["ram"]["normal-bytes"].as_u64().unwrap();
    assert!(
        normal < (WORKING_SET_MIB + 128) * MIB,
        "{normal} bytes sent: {sent}"
    );
    assert!(destination.verify_working_set(&set).unwrap());
    // The guest has its pages back: it can use them all.
    destination.touch_unused_memory().unwrap();
    assert!(destination.verify_working_set(&set).unwrap());
}

#[test]
fn a_machine_that_is_reset_while_it_inflates_starts_with_an_empty_balloon() {
    let Some(parts) = MachinePrerequisites::find_or_skip("reset") else {
        return;
    };
    let mut machine = start(&parts, &config().backing(Backing::Memfd));
    machine.set_target_mib(TARGET_MIB).unwrap();
    eventually("the balloon has begun to grow", || {
        let counters = machine.counters().unwrap();
        (counters["ballooned-bytes"] != 0, counters)
    });

    machine.reset().unwrap();

    // The target survives, and the driver follows it from nothing.
    let counters = wait_for_balloon(&mut machine, TARGET_MIB);
    assert_balance(&counters["balloon"]);
    let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
    machine.set_target_mib(0).unwrap();
    wait_for_balloon(&mut machine, 0);
    assert!(machine.verify_working_set(&set).unwrap());
    // The driver alone is taken away and comes back, under way too.
    machine.set_target_mib(TARGET_MIB).unwrap();
    let device = machine.bound_balloons().unwrap().remove(0);
    machine.unbind_balloon(&device).unwrap();
    let counters = machine.counters().unwrap();
    assert_eq!(counters["ballooned-bytes"], 0, "{counters}");
    machine.bind_balloon(&device).unwrap();
    wait_for_balloon(&mut machine, TARGET_MIB);
    assert!(machine.verify_working_set(&set).unwrap());
}

#[test]
fn a_machine_that_is_stopped_while_it_inflates_has_nothing_in_flight() {
    let Some(parts) = MachinePrerequisites::find_or_skip("stop") else {
        return;
    };
    let mut machine = start(&parts, &config().packed());
    machine.set_target_mib(TARGET_MIB).unwrap();
    eventually("the balloon has begun to grow", || {
        let counters = machine.counters().unwrap();
        (counters["ballooned-bytes"] != 0, counters)
    });

    machine.monitor.execute("stop", json!({})).unwrap();
    let stopped = machine.counters().unwrap();
    assert_eq!(stopped["balloon"]["pending-bytes"], 0, "{stopped}");
    thread::sleep(Duration::from_millis(50));
    assert_eq!(machine.counters().unwrap(), stopped, "it goes on");
    machine.monitor.execute("cont", json!({})).unwrap();

    wait_for_balloon(&mut machine, TARGET_MIB);
}

#[test]
fn whoever_pins_memory_finds_nothing_in_flight_and_the_guest_is_still_served() {
    let Some(parts) = MachinePrerequisites::find_or_skip("inhibit") else {
        return;
    };
    let mut machine = start(
        &parts,
        &config().arguments(&["-trace", "aerostat_balloon_inhibit"]),
    );
    // A background snapshot needs every page that there was when it began.
    let directory = machine.short_path();
    machine
        .monitor
        .execute(
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "background-snapshot", "state": true}]}),
        )
        .unwrap();
    machine
        .monitor
        .execute("migrate-set-parameters", json!({"max-bandwidth": 8 * MIB}))
        .unwrap();
    machine
        .run_within("dd if=/dev/urandom of=/keep/x bs=1M count=64", PATIENCE)
        .unwrap();
    let file = directory.join("snapshot");
    machine
        .monitor
        .execute(
            "migrate",
            json!({"uri": format!("file:{}", file.display())}),
        )
        .unwrap();
    eventually("the snapshot is being taken", || {
        let answer = machine.monitor.execute("query-migrate", json!({})).unwrap();
        (answer["status"] == "active", answer)
    });
    machine.set_target_mib(32).unwrap();
    let counters = wait_for_balloon(&mut machine, 32);
    assert_eq!(counters["balloon"]["discarded-bytes"], 0, "{counters}");
    assert_eq!(counters["balloon"]["inhibited-bytes"], 32 * MIB);
    machine.monitor.wait_for_migration().unwrap();

    machine.set_target_mib(64).unwrap();
    let counters = wait_for_balloon(&mut machine, 64);
    assert_eq!(counters["balloon"]["discarded-bytes"], 32 * MIB);
    assert_balance(&counters["balloon"]);
    let log = machine.log();
    assert!(log.contains("aerostat_balloon_inhibit 1"), "{log}");
    assert!(log.contains("aerostat_balloon_inhibit 0"), "{log}");
}
