//! Stock QEMU under `aerostatd` by QMP, with a real guest: Debian's QEMU, Debian's kernel, its own
//! virtio_balloon driver. Nothing in the guest or in QEMU knows Aerostat.

#![allow(
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use aerostat_tests::{
    host_vm::{HostVm, HostVmConfig, HostVmPrerequisites},
    reclaimer::Reclaimer,
};

const MIB: u64 = 1 << 20;

/// Memory that the guest's kernel counts as its own.
fn guest_total_bytes(guest: &mut HostVm) -> u64 {
    let line = guest.run("grep MemTotal /proc/meminfo").unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

#[test]
fn stock_qemu_under_aerostatd_by_qmp_works_with_a_real_guest() {
    let Some(parts) = HostVmPrerequisites::find_or_skip("stock QEMU by QMP") else {
        return;
    };
    let sockets = tempfile::tempdir().unwrap();
    let driver = parts.drivers.join("virtio/virtio_balloon.ko");
    let socket = sockets.path().join("guest.qmp");
    let mut guest = HostVmConfig::new()
        .memory_mib(768)
        .carry(&driver)
        .qemu_argument("-device")
        .qemu_argument("virtio-balloon-pci,id=balloon0")
        .qemu_argument("-qmp")
        .qemu_argument(format!("unix:{},server=on,wait=off", socket.display()))
        .boot()
        .unwrap();
    let module = format!("insmod {}", driver.display());
    guest.run(&module).unwrap();
    let before = guest_total_bytes(&mut guest);

    // A host that is never content: every guest gives what it can spare, down to its floor.
    let policy = "[policy]\nhigh-percent = 90\nlow-percent = 0\nhold-ms = 0\nstep-percent = 50\n";
    let vms = format!(
        "[[vm]]\nprotocol = \"qmp\"\nsocket = \"{}/{{name}}.qmp\"\nfloor = \"512M\"\n",
        sockets.path().display()
    );
    let mut daemon = Reclaimer::start(
        "period-ms = 200\ntimeout-ms = 20000",
        &format!("{policy}{vms}"),
    )
    .unwrap();

    // Found by its socket, observed, statistics switched on.
    daemon
        .until("the guest is seen with its statistics", |d| {
            d.number("guest", "memory-bytes") == 768 * MIB
                && d.number("guest", "guest-available-bytes") > 0
        })
        .unwrap();
    // The policy inflates it; the guest's own kernel has less, and never less than its floor.
    daemon
        .until("the policy takes what can be spared", |d| {
            d.number("guest", "actual-bytes") >= 32 * MIB
        })
        .unwrap();
    let taken = daemon.number("guest", "actual-bytes");
    let floor = daemon.number("guest", "floor-bytes");
    assert!(
        taken <= 768 * MIB - floor.max(512 * MIB),
        "taken {taken}, floor {floor}"
    );
    let after = guest_total_bytes(&mut guest);
    assert!(before - after >= 32 * MIB, "{before} to {after}");
    let explained = daemon.ask(&["explain", "guest"]).unwrap();
    assert!(explained.contains("running by qmp"), "{explained}");

    // By hand: manual mode, a target, and the guest follows to the page.
    daemon.ask(&["set", "guest", "mode", "manual"]).unwrap();
    daemon.ask(&["set", "guest", "target", "128M"]).unwrap();
    daemon
        .until("it has the size set by hand", |d| {
            d.number("guest", "actual-bytes") == 128 * MIB
        })
        .unwrap();
    let refused = daemon.ask(&["set", "guest", "target", "700M"]).unwrap_err();
    assert!(refused.to_string().contains("floor"), "{refused}");

    // The daemon is killed: the guest keeps its balloon, and the next daemon finds it as it is.
    daemon.kill_and_restart().unwrap();
    daemon
        .until("found again with its balloon", |d| {
            d.number("guest", "actual-bytes") >= 32 * MIB
        })
        .unwrap();

    // The VM ends: it is gone from the fleet, and the daemon goes on.
    drop(guest);
    std::fs::remove_file(&socket).unwrap();
    daemon
        .until("it is gone", |d| {
            d.status()["vms"].as_array().is_some_and(Vec::is_empty)
        })
        .unwrap();
}
