//! An unmodified Linux guest whose queues are packed rings, served by `aerostat-vhost-user` with and
//! without write-behind (requirements S6, A5, A6).

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use aerostat_reclaim::vm::{ControlClient, DeviceState, DeviceStatus};
use aerostat_tests::artifacts;
use aerostat_tests::backend::Backend;
use aerostat_tests::guest::{Prerequisites, UmlConfig, UmlGuest};
use aerostat_tests::wait::eventually;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 320;
const TARGET_BYTES: u64 = 160 * MIB;
const WORKING_SET_MIB: u64 = 48;
const PATIENCE: Duration = Duration::from_secs(30);

/// A guest, its device's control socket, and the back-end; dropped in this order.
struct Scene {
    guest: UmlGuest,
    control: ControlClient,
    _backend: Backend,
}

impl Scene {
    fn new(test: &str, options: &'static [&'static str], reporting: bool) -> Option<Self> {
        Prerequisites::find_or_skip(test)?;
        let backend = Backend::start_with(&artifacts::vhost_user_backend(), 1, options)
            .unwrap_or_else(|error| panic!("{error}"));
        let mut config = UmlConfig::new(MEMORY_MIB).balloon(&backend.socket(0));
        if !reporting {
            config = config.without_reporting();
        }
        let guest = UmlGuest::boot(&config)
            .unwrap_or_else(|error| panic!("{error}\nthe back-end said:\n{}", backend.log()));
        let mut control = backend.control(0).unwrap();
        let names = control.query().unwrap().feature_names;
        assert!(names.iter().any(|name| name == "ring-packed"), "{names:?}");
        Some(Self {
            guest,
            control,
            _backend: backend,
        })
    }

    /// Looks at the device until it is as it should be.
    fn wait_until(&mut self, what: &str, is: impl Fn(&DeviceStatus) -> bool) -> DeviceStatus {
        eventually(what, PATIENCE, || {
            let status = self.control.query().unwrap();
            (is(&status), status)
        })
    }

    fn wait_for_balloon(&mut self, bytes: u64) -> DeviceStatus {
        self.wait_until("the balloon has its size", |status| {
            status.state == DeviceState::Active
                && status.actual_bytes == bytes
                && status.ballooned_bytes == bytes
                && status.counters.pending_bytes == 0
        })
    }

    /// Gives, takes back and gives again, asks for statistics, and has the driver go and come.
    fn plays_all_of_it(&mut self) {
        let set = self
            .guest
            .make_working_set("data", WORKING_SET_MIB)
            .unwrap();
        self.guest.populate_host_memory().unwrap();
        let before = self.guest.host_memory_bytes().unwrap();

        self.control.set_target(TARGET_BYTES).unwrap();
        let status = self.wait_for_balloon(TARGET_BYTES);
        let freed = before - self.guest.host_memory_bytes().unwrap();
        assert!(freed * 100 >= TARGET_BYTES * 99, "{freed}: {status:?}");
        assert_eq!(status.counters.discarded_bytes, TARGET_BYTES);

        // The statistics queue goes round several times.
        for _ in 0..200 {
            self.control.guest_stats(PATIENCE).unwrap();
        }
        // Statistics, inflate and deflate queues go on where they were; the driver's next rings begin
        // at their first slots again, though virtio_uml says base 0 of them.
        for _ in 0..2 {
            self.guest.unbind_balloon("virtio0").unwrap();
            self.wait_until("the balloon is empty", |status| status.ballooned_bytes == 0);
            self.guest.bind_balloon("virtio0").unwrap();
            self.wait_for_balloon(TARGET_BYTES);
        }
        self.control.set_target(0).unwrap();
        let status = self.wait_for_balloon(0);
        assert_eq!(status.counters.skipped_bytes(), 0, "{status:?}");
        let second = self.guest.make_working_set("second", 100).unwrap();
        assert!(self.guest.verify_working_set(&second).unwrap());
        assert!(self.guest.verify_working_set(&set).unwrap());
    }
}

#[test]
fn stock_linux_passes_with_packed_rings() {
    let options = &["--features", "default,ring-packed"];
    if let Some(mut scene) = Scene::new("packed rings", options, false) {
        scene.plays_all_of_it();
    }
}

#[test]
fn stock_linux_passes_with_packed_rings_and_without_write_behind() {
    let options = &["--features", "default,ring-packed", "--write-behind", "0"];
    if let Some(mut scene) = Scene::new("packed rings, at once", options, false) {
        scene.plays_all_of_it();
    }
}

/// S10 over packed rings: chains of up to 32 ranges, in tables.
#[test]
fn stock_linux_reports_its_unused_memory_through_packed_rings() {
    let options = &["--features", "default,ring-packed"];
    let Some(mut scene) = Scene::new("reports through packed rings", options, true) else {
        return;
    };
    let set = scene
        .guest
        .make_working_set("data", WORKING_SET_MIB)
        .unwrap();
    scene.guest.touch_unused_memory().unwrap();
    scene.wait_until("unused memory is free on the host", |status| {
        status.counters.report_discarded_bytes > 100 * MIB
    });
    assert!(scene.guest.verify_working_set(&set).unwrap());
}
