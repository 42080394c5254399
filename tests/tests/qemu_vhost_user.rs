//! Stock QEMU 11 with a stock guest and its own virtio-balloon driver, and the balloon in a process of its own:
//! `aerostat-vhost-user` behind QEMU's vhost-user-test-device-pci.

#![expect(
    clippy::unwrap_used,
    reason = "the helper of a test fails like the test"
)]

use aerostat_reclaim::vm::{ControlClient, DeviceStatus};
use aerostat_tests::{
    artifacts,
    backend::Backend,
    qemu::{Machine, MachineConfig, MachinePrerequisites, balloon::eventually},
};

const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 512;
const TARGET: u64 = 256 * MIB;
const WORKING_SET_MIB: u64 = 64;

/// Sets a target and waits until the guest is there and all of it is discarded.
fn inflate_to(control: &mut ControlClient, target: u64) -> DeviceStatus {
    control.set_target(target).unwrap();
    eventually("the balloon has its size", || {
        let status = control.query().unwrap();
        let there = status.actual_bytes == target && status.counters.pending_bytes == 0;
        (there, status)
    })
}

#[test]
fn stock_qemu_11_and_its_guest_work_with_the_back_end() {
    let Some(parts) = MachinePrerequisites::find_stock_or_skip("stock QEMU over vhost-user") else {
        return;
    };
    for packed in [false, true] {
        let options: &'static [&'static str] = if packed {
            &["--features", "default,ring-packed"]
        } else {
            &[]
        };
        let program = artifacts::vhost_user_backend();
        let backend = Backend::start_with(&program, 1, options).unwrap();
        let mut config = MachineConfig::vhost_user(MEMORY_MIB, &backend.socket(0));
        if packed {
            config = config.packed();
        }
        let mut machine = Machine::start(&parts, &config).unwrap_or_else(|error| panic!("{error}"));
        let mut control = backend.control(0).unwrap();
        let set = machine.make_working_set("data", WORKING_SET_MIB).unwrap();
        machine.touch_unused_memory().unwrap();
        let full = machine.host_memory_bytes().unwrap();

        let inflated = inflate_to(&mut control, TARGET);
        let back = full.saturating_sub(machine.host_memory_bytes().unwrap());
        assert!(
            back >= TARGET * 95 / 100,
            "{} MiB: {inflated:?}",
            back / MIB
        );
        // Pages that the guest's kernel moves come on top.
        assert!(inflated.counters.discarded_bytes >= TARGET, "{inflated:?}");
        assert!(machine.verify_working_set(&set).unwrap());

        // The monitor stops and goes on with the rings; the guest's machine is reset with its balloon full.
        machine
            .monitor
            .execute("stop", serde_json::json!({}))
            .unwrap();
        machine
            .monitor
            .execute("cont", serde_json::json!({}))
            .unwrap();
        let deflated = inflate_to(&mut control, TARGET / 2);
        assert!(
            deflated.counters.returned_bytes >= TARGET / 2,
            "{deflated:?}"
        );
        machine.touch_memory(TARGET / 4 / MIB).unwrap();
        assert!(machine.verify_working_set(&set).unwrap());
        machine.reset().unwrap();
        inflate_to(&mut control, TARGET);
    }
}
