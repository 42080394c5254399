//! The memory balloon (device ID 13) in QEMU, with the reference Linux driver in a stock Debian kernel:
//! what `docs/memballoon.md` asks of a driver, and what the host gets (requirements R, V5).
//!
//! Host memory is measured outside QEMU and device, as in `qemu_guest`.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use std::{
    thread,
    time::{Duration, Instant},
};

use aerostat_tests::qemu::{
    Backing, Balloon, Machine, MachineConfig, MachinePrerequisites,
    balloon::{PATIENCE, eventually},
    config::BALLOON_PATH,
};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 512;
const TARGET_MIB: u64 = 256;
const WORKING_SET_MIB: u64 = 32;
/// How much more a guest is asked for whose large pages are all taken.
const SMALL_MIB: u64 = 4;
/// All large pages: none of them is kept back for bad times, and no other one is made of small pages.
const TAKE_LARGE_PAGES: &str = "echo 2048 >/proc/sys/vm/min_free_kbytes
    echo 1000 >/proc/sys/vm/extfrag_threshold; echo 0 >/proc/sys/vm/compaction_proactiveness
    echo 1000 >/proc/sys/vm/nr_hugepages";
const LET_LARGE_PAGES_GO: &str = "echo 0 >/proc/sys/vm/nr_hugepages
    echo 500 >/proc/sys/vm/extfrag_threshold; echo 20 >/proc/sys/vm/compaction_proactiveness";
/// Two files of 16 MiB whose pages lie side by side, one of this and one of that.
const INTERLEAVED: &str = "awk 'BEGIN { for (i = 0; i < 4096; i++) {
    printf \"%4096s\", \"\" >\"/mem/even\"; fflush(\"/mem/even\")
    printf \"%4096s\", \"\" >\"/mem/odd\"; fflush(\"/mem/odd\") } }'";

const MODULE: &str = "virtio_memballoon";
const ATTRIBUTES: &str = "/sys/bus/virtio/drivers/virtio_memballoon/virtio*/memballoon";

/// A machine with the driver; `None` where it cannot run, which was said.
fn start(test: &str, config: &MachineConfig) -> Option<Machine> {
    let parts = MachinePrerequisites::find_or_skip(test)?;
    Some(Machine::start(&parts, config).unwrap_or_else(|error| panic!("{error}")))
}

fn config() -> MachineConfig {
    MachineConfig::new(MEMORY_MIB, Balloon::Memballoon)
}

/// An attribute of the driver's.
fn attribute(machine: &mut Machine, name: &str) -> u64 {
    let text = machine.run(&format!("cat {ATTRIBUTES}/{name}")).unwrap();
    text.trim()
        .parse()
        .unwrap_or_else(|_| panic!("{name}: {text}"))
}

fn set_attribute(machine: &mut Machine, name: &str, value: u64) {
    let command = format!("echo {value} >$(echo {ATTRIBUTES}/{name})");
    machine.run_within(&command, PATIENCE).unwrap();
}

/// Waits until the device's balloon has a size that will do, and nothing waits to be discarded.
fn wait_until(machine: &mut Machine, what: &str, will_do: impl Fn(u64) -> bool) -> Value {
    eventually(what, || {
        let counters = machine.counters().unwrap();
        let size = counters["ballooned-bytes"].as_u64().unwrap();
        let settled = will_do(size) && counters["balloon"]["pending-bytes"] == 0;
        (settled, counters)
    })
}

/// Waits until device and driver agree on the balloon's size.
fn wait_for_balloon(machine: &mut Machine, bytes: u64) -> Value {
    let what = format!("the balloon has {bytes} bytes");
    let counters = wait_until(machine, &what, |size| size == bytes);
    assert_eq!(counters["chain-errors"], 0, "{counters}");
    assert_eq!(attribute(machine, "size_bytes"), bytes);
    counters
}

fn inflate(machine: &mut Machine, mib: u64) -> Value {
    machine.set_target_mib(mib).unwrap();
    wait_for_balloon(machine, mib * MIB)
}

#[test]
fn a_guest_gives_pages_of_2_mib_and_takes_them_back() {
    let Some(mut machine) = start("memballoon", &config().backing(Backing::Memfd)) else {
        return;
    };
    let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
    let total = machine.memory().unwrap().total_bytes;
    machine.touch_unused_memory().unwrap();
    let full = machine.host_memory_bytes().unwrap();
    assert_eq!(attribute(&mut machine, "page_bytes"), 2 * MIB);

    let counters = inflate(&mut machine, TARGET_MIB);

    assert_eq!(machine.actual_mib().unwrap(), TARGET_MIB);
    // One command has all of it, and whole pages of 2 MiB are free on the host.
    assert_eq!(counters["balloon"]["requested-bytes"], TARGET_MIB * MIB);
    assert_eq!(counters["balloon"]["discarded-bytes"], TARGET_MIB * MIB);
    assert_eq!(attribute(&mut machine, "small_bytes"), 0);
    let back = full - machine.host_memory_bytes().unwrap();
    assert!(back >= TARGET_MIB * MIB * 99 / 100, "{back}: {counters}");
    assert_eq!(
        machine.memory().unwrap().total_bytes,
        total - TARGET_MIB * MIB
    );
    assert!(machine.verify_working_set(&set).unwrap());

    // MIN_BALLOON is rounded up to whole pages (messages, 4), and followed downwards too.
    let left = MEMORY_MIB * MIB - (101 * MIB + 4096);
    machine
        .monitor
        .execute("balloon", json!({ "value": left }))
        .unwrap();
    wait_for_balloon(&mut machine, 102 * MIB);
    let counters = inflate(&mut machine, 0);
    assert_eq!(counters["returned-bytes"], TARGET_MIB * MIB);
    assert_eq!(machine.memory().unwrap().total_bytes, total);
    machine.touch_unused_memory().unwrap();
    assert!(machine.verify_working_set(&set).unwrap());
    let events = machine.monitor.events().unwrap();
    let told = |mib: u64| {
        events.iter().any(|event| {
            event["event"] == "BALLOON_CHANGE"
                && event["data"]["actual"] == (MEMORY_MIB - mib) * MIB
        })
    };
    assert!(told(0), "{events:?}");

    // A driver that goes away gives everything back; the next one follows the target from nothing.
    inflate(&mut machine, TARGET_MIB);
    machine.run(&format!("rmmod {MODULE}")).unwrap();
    let counters = machine.counters().unwrap();
    assert_eq!(counters["ballooned-bytes"], 0, "{counters}");
    assert_eq!(machine.memory().unwrap().total_bytes, total);
    machine.touch_unused_memory().unwrap();
    machine
        .run(&format!("insmod /lib/modules/{MODULE}.ko"))
        .unwrap();
    wait_for_balloon(&mut machine, TARGET_MIB * MIB);
    assert!(machine.verify_working_set(&set).unwrap());
    assert!(!machine.log().contains("BUG"), "{}", machine.log());
}

#[test]
fn a_guest_without_large_pages_gives_small_ones_and_exchanges_them_later() {
    let config = config().packed().backing(Backing::Memfd);
    let Some(mut machine) = start("memballoon, fragmented", &config) else {
        return;
    };
    let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
    inflate(&mut machine, 64);
    // Small pages that lie between others, to be had once all large ones went to another use.
    machine.run_within(INTERLEAVED, PATIENCE).unwrap();
    machine.run_within(TAKE_LARGE_PAGES, PATIENCE).unwrap();
    machine.run("rm /mem/even").unwrap();
    // What there was stays in the balloon, page by page, and what comes is small: as much as the guest has
    // above what its kernel needs. The kernel may free a large page meanwhile, which comes then: once more.
    let mut size = 64;
    let first = loop {
        size += SMALL_MIB;
        machine.set_target_mib(size).unwrap();
        let first = eventually("it gives what it has", || {
            let full = attribute(&mut machine, "size_bytes") == size * MIB;
            let small = attribute(&mut machine, "small_bytes");
            (full || small > 0, small)
        });
        if first > 0 {
            break first;
        }
        assert!(size < 64 + 3 * SMALL_MIB, "large pages only: {size} MiB");
        machine.run_within(TAKE_LARGE_PAGES, PATIENCE).unwrap();
    };
    assert!(first <= SMALL_MIB * MIB, "{first}");
    assert_eq!(attribute(&mut machine, "page_bytes"), 4096);
    assert_eq!(attribute(&mut machine, "negotiations"), 1);
    assert!(machine.verify_working_set(&set).unwrap());

    // What is missing comes once there is memory again. The kernel may move single pages: each is exchanged
    // for the one that it goes to. Which pages are in its way depends on where the small ones were found, so
    // it may move none.
    machine.run_within("rm /mem/odd", PATIENCE).unwrap();
    machine.run_within(LET_LARGE_PAGES_GO, PATIENCE).unwrap();
    wait_for_balloon(&mut machine, size * MIB);
    machine
        .run_within("echo 1 >/proc/sys/vm/compact_memory", PATIENCE)
        .unwrap();
    let moved = attribute(&mut machine, "exchanged_bytes");
    println!("{first} bytes came small at {size} MiB, and the kernel moved {moved}");
    let given = wait_for_balloon(&mut machine, size * MIB);
    let small = attribute(&mut machine, "small_bytes");
    assert!(
        (first..=SMALL_MIB * MIB).contains(&small),
        "{small}: {given}"
    );
    let host = machine.host_memory_bytes().unwrap();

    // Small pages are exchanged for large ones, and then large ones are all there is,
    // as far as there are any when it is asked for: the kernel may need a moment to have pages in one piece.
    eventually("all are large", || {
        set_attribute(&mut machine, "compact", 1);
        let left = attribute(&mut machine, "small_bytes");
        (left == 0, left)
    });
    assert!(attribute(&mut machine, "exchanged_bytes") >= moved + small);
    wait_for_balloon(&mut machine, size * MIB);
    assert_eq!(attribute(&mut machine, "small_bytes"), 0);
    assert_eq!(attribute(&mut machine, "page_bytes"), 2 * MIB);
    let counters = machine.counters().unwrap();
    let returned = counters["returned-bytes"].as_u64().unwrap();
    assert!(returned >= moved + small, "{given}, then {counters}");
    // An exchange needs no memory of the host.
    assert!(machine.host_memory_bytes().unwrap() <= host + 16 * MIB);
    inflate(&mut machine, 0);
    machine.touch_memory(320).unwrap();
    assert!(machine.verify_working_set(&set).unwrap());
    assert!(!machine.log().contains("BUG"), "{}", machine.log());
}

#[test]
fn a_guest_that_runs_out_of_memory_has_it_back_before_anything_is_killed() {
    let Some(mut machine) = start("memballoon, out of memory", &config()) else {
        return;
    };
    let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
    inflate(&mut machine, 320);
    let wants = "dd if=/dev/zero of=/mem/fill bs=1M count=200 2>/dev/null";
    machine.run_within(wants, PATIENCE).unwrap();

    // It took what was needed, in steps of 16 MiB, and not all there was (A4).
    let size = attribute(&mut machine, "size_bytes");
    assert!((96 * MIB..320 * MIB).contains(&size), "{size}");
    assert!(attribute(&mut machine, "oom_bytes") >= 16 * MIB);
    assert!(!machine.log().contains("Killed process"));
    assert!(machine.verify_working_set(&set).unwrap());
    // It is left alone until it is told again.
    machine.run("rm /mem/fill").unwrap();
    inflate(&mut machine, 320);

    // A driver that is told to keep what nobody needs gives the kernel as much as it reclaims.
    machine
        .run(&format!("echo Y >/sys/module/{MODULE}/parameters/lazy"))
        .unwrap();
    let before = attribute(&mut machine, "oom_bytes");
    machine.set_target_mib(128).unwrap();
    machine.run_within(wants, PATIENCE).unwrap();
    let counters = wait_until(&mut machine, "less is left", |size| size < 320 * MIB);
    assert!(
        counters["ballooned-bytes"].as_u64().unwrap() >= 128 * MIB,
        "{counters}"
    );
    assert_eq!(attribute(&mut machine, "oom_bytes"), before);
    assert!(!machine.log().contains("Killed process"));
    assert!(machine.verify_working_set(&set).unwrap());
}

#[test]
fn a_guest_that_cannot_give_all_that_is_asked_for_stays_alive_and_idle() {
    let Some(mut machine) = start("memballoon, too much", &config()) else {
        return;
    };
    let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
    machine.set_target_mib(MEMORY_MIB - 1).unwrap();
    wait_until(&mut machine, "most of it is given", |size| size > 320 * MIB);

    // It tries ever more seldom (V5): what it takes of the processor is next to nothing.
    let busy = |machine: &mut Machine| {
        let times = machine.thread_times().unwrap();
        let of_guest = times.iter().filter(|(name, _)| name.starts_with("CPU "));
        of_guest.map(|(_, time)| *time).sum::<Duration>()
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let before = busy(&mut machine);
        thread::sleep(Duration::from_secs(2));
        let spent = busy(&mut machine) - before;
        if spent < Duration::from_millis(600) {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{spent:?} of 2 s\n{}",
            machine.log()
        );
    }
    assert!(machine.verify_working_set(&set).unwrap());
    assert!(!machine.log().contains("Killed process"));
    inflate(&mut machine, 0);
}

#[test]
fn a_device_without_a_size_that_suits_is_left_alone() {
    // 1 GiB only: no driver has such a page to give, and this one says so.
    let config = config().option("page-sizes=0x40000000");
    let Some(mut machine) = start("memballoon, no size", &config) else {
        return;
    };
    let bound = machine
        .run(&format!("ls -d {ATTRIBUTES} 2>/dev/null || true"))
        .unwrap();
    assert_eq!(bound.trim(), "");
    assert!(machine.log().contains("no page size that suits"));
    assert_eq!(machine.counters().unwrap()["chain-errors"], 0);
}

/// X1, X2: each node of the guest is brought to its own target, and none makes up for another one; a target
/// for the whole balloon leaves the nodes to the driver again.
#[test]
fn each_node_of_the_guest_has_its_own_target() {
    let Some(mut machine) = start("memballoon, nodes", &config().nodes(2).option("node=on")) else {
        return;
    };
    let mut say = |value: &str| {
        machine
            .monitor
            .execute(
                "qom-set",
                json!({"path": BALLOON_PATH, "property": "node-targets", "value": value}),
            )
            .unwrap();
        eventually("each node has what it should", || {
            let held = machine.monitor.property(BALLOON_PATH, "node-ballooned");
            let held = held.unwrap();
            (held == value, held)
        });
    };
    for mib in [[32, 96], [128, 0], [16, 64]] {
        say(&mib.map(|mib| (mib * MIB).to_string()).join(","));
    }
    let counters = inflate(&mut machine, TARGET_MIB + 64);
    assert_eq!(counters["chain-errors"], 0, "{counters}");
    let targets = machine.monitor.property(BALLOON_PATH, "node-targets");
    assert_eq!(targets.unwrap(), "");
    inflate(&mut machine, 0);
}
