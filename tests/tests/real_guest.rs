//! An unmodified Linux guest with its own balloon driver, served by `aerostat-vhost-user`.
//!
//! Every test names the requirements it shows. Host memory is measured outside guest and device: by
//! the blocks of the tmpfs that holds the guest's memory. Guests do not report unused memory unless
//! a test is about that, so what becomes free is the balloon's doing.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use std::{thread, time::Duration};

use aerostat_reclaim::vm::{ControlClient, DeviceState, DeviceStatus};
use aerostat_tests::{
    artifacts,
    backend::Backend,
    guest::{Prerequisites, UmlConfig, UmlGuest, WorkingSet},
    wait::eventually,
};

const MIB: u64 = 1 << 20;

/// Size of the guests, and how much of it their kernel and programs need.
const MEMORY_MIB: u64 = 448;

/// What the guests are asked for, and the data they keep meanwhile.
const TARGET_BYTES: u64 = 224 * MIB;
const WORKING_SET_MIB: u64 = 64;

/// The most that anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A guest on a back-end of its own.
struct Scene {
    // Dropped in this order: the guest goes before its device.
    guest: UmlGuest,
    control: ControlClient,
    backend: Backend,
}

fn config(backend: &Backend, device: usize) -> UmlConfig {
    UmlConfig::new(MEMORY_MIB).balloon(&backend.socket(device))
}

fn backend(devices: usize) -> Backend {
    Backend::start(&artifacts::vhost_user_backend(), devices).unwrap_or_else(|e| panic!("{e}"))
}

impl Scene {
    /// Boots a guest, unless it cannot be had and tests may be skipped.
    fn new(test: &str, configure: impl FnOnce(UmlConfig) -> UmlConfig) -> Option<Self> {
        Self::with_options(test, &[], configure)
    }

    /// As [`Self::new`], on a back-end with these options.
    fn with_options(
        test: &str,
        options: &'static [&'static str],
        configure: impl FnOnce(UmlConfig) -> UmlConfig,
    ) -> Option<Self> {
        Prerequisites::find_or_skip(test)?;
        let backend = Backend::start_with(&artifacts::vhost_user_backend(), 1, options)
            .unwrap_or_else(|error| panic!("{error}"));
        let guest = UmlGuest::boot(&configure(config(&backend, 0)))
            .unwrap_or_else(|error| panic!("{error}\nthe back-end said:\n{}", backend.log()));
        let control = backend.control(0).unwrap();
        Some(Self {
            guest,
            control,
            backend,
        })
    }

    fn without_reporting(test: &str) -> Option<Self> {
        Self::new(test, UmlConfig::without_reporting)
    }

    fn status(&mut self) -> DeviceStatus {
        self.control
            .query()
            .unwrap_or_else(|error| panic!("{error}\n{}", self.backend.log()))
    }

    fn host_bytes(&self) -> u64 {
        self.guest.host_memory_bytes().unwrap()
    }

    /// Fills the guest: data that must survive; and all its memory is on the host.
    fn fill(&mut self) -> WorkingSet {
        let set = self
            .guest
            .make_working_set("data", WORKING_SET_MIB)
            .unwrap();
        self.guest.populate_host_memory().unwrap();
        set
    }

    /// Sets a target and waits until guest and device agree that it is reached.
    fn inflate_to(&mut self, target_bytes: u64) -> DeviceStatus {
        self.control.set_target(target_bytes).unwrap();
        self.wait_for_balloon(target_bytes)
    }

    fn wait_for_balloon(&mut self, bytes: u64) -> DeviceStatus {
        eventually("the balloon has its size", PATIENCE, || {
            let status = self.status();
            let there = status.state == DeviceState::Active
                && status.actual_bytes == bytes
                && status.ballooned_bytes == bytes
                && status.counters.pending_bytes == 0;
            (there, status)
        })
    }

    fn assert_intact(&mut self, set: &WorkingSet) {
        assert!(
            self.guest.verify_working_set(set).unwrap(),
            "the guest's data changed"
        );
    }
}

fn assert_books_balance(status: &DeviceStatus) {
    let books = &status.counters;
    let explained = books.discarded_bytes
        + books.pending_bytes
        + books.held_bytes
        + books.withdrawn_bytes
        + books.skipped_bytes();
    assert_eq!(
        books.requested_bytes + books.reopened_bytes,
        explained,
        "{books:?}"
    );
}

/// J6 memory below boot size; X1 the target is the ballooned area; S7 the acknowledgement; I4 what
/// was acknowledged and what was freed agree, on three independent counts: the device's books, the
/// guest's, and the host's.
#[test]
fn inflate_frees_on_the_host_what_was_requested() {
    let Some(mut scene) = Scene::without_reporting("inflate") else {
        return;
    };
    let set = scene.fill();
    let total_before = scene.guest.memory().unwrap().total_bytes;
    let before = scene.host_bytes();

    let status = scene.inflate_to(TARGET_BYTES);

    let freed = before - scene.host_bytes();
    assert!(
        freed * 100 >= TARGET_BYTES * 99,
        "{freed} of {TARGET_BYTES} bytes: {status:?}"
    );
    assert!(freed <= TARGET_BYTES, "more than requested: {freed}");
    assert_eq!(status.counters.requested_bytes, TARGET_BYTES);
    assert_eq!(status.counters.discarded_bytes, TARGET_BYTES);
    assert_books_balance(&status);
    assert!(status.counters.discard_calls < status.counters.requested_bytes / 4096 / 4);
    assert_eq!(
        scene.guest.balloon_pages().unwrap().held_bytes(),
        TARGET_BYTES
    );
    assert_eq!(
        scene.guest.memory().unwrap().total_bytes,
        total_before - TARGET_BYTES
    );
    scene.assert_intact(&set);
}

/// A5 the host sees `actual` after each step; A11 no over-deflation; S7 pages may be used again after
/// the deflate; I1 nothing that was given back is discarded.
#[test]
fn deflate_gives_everything_back_for_use() {
    let Some(mut scene) = Scene::without_reporting("deflate") else {
        return;
    };
    let set = scene.fill();
    let full = scene.host_bytes();
    scene.inflate_to(TARGET_BYTES);

    let half = scene.inflate_to(TARGET_BYTES / 2);
    assert_eq!(half.counters.returned_bytes, TARGET_BYTES / 2);
    scene.assert_intact(&set);
    let none = scene.inflate_to(0);
    assert_eq!(none.counters.returned_bytes, TARGET_BYTES);
    assert_books_balance(&none);

    // Memory that came back holds data, and the host gives it again.
    let second = scene
        .guest
        .make_working_set("second", TARGET_BYTES / MIB)
        .unwrap();
    assert!(scene.host_bytes() + 16 * MIB > full);
    assert!(scene.guest.verify_working_set(&second).unwrap());
    scene.assert_intact(&set);
}

/// A2 the target is an upper bound; A1 `actual` may stay below it; J2 is the reclaimer's to keep, not
/// the device's: a guest that is asked for all it has, and may help itself when it runs out of memory
/// (DEFLATE_ON_OOM), lives and gets it back.
#[test]
fn a_target_that_cannot_be_reached_does_no_harm() {
    let options = &["--features", "default,deflate-on-oom"];
    let scene = Scene::with_options("unreachable target", options, UmlConfig::without_reporting);
    let Some(mut scene) = scene else {
        return;
    };
    let set = scene.fill();
    let asked = (MEMORY_MIB - WORKING_SET_MIB) * MIB;

    scene.control.set_target(asked).unwrap();
    eventually("the guest gave most of what it has", PATIENCE, || {
        let status = scene.status();
        (status.actual_bytes > asked / 2, status)
    });
    // The driver tries again for ever; after a while the target comes down.
    thread::sleep(Duration::from_secs(1));
    let status = scene.status();
    assert!(status.actual_bytes < asked, "{status:?}");
    assert_eq!(status.target_bytes, asked);

    let status = scene.inflate_to(TARGET_BYTES / 4);
    assert_books_balance(&status);
    scene.assert_intact(&set);
    scene.inflate_to(0);
    scene.assert_intact(&set);
}

/// A7 targets may follow each other at any time: the last one counts.
#[test]
fn targets_that_change_on_the_way_end_at_the_last_one() {
    let Some(mut scene) = Scene::without_reporting("changing targets") else {
        return;
    };
    let set = scene.fill();

    for step in [8, 1, 6, 2, 7, 3, 5, 4] {
        scene.control.set_target(TARGET_BYTES / 8 * step).unwrap();
        thread::sleep(Duration::from_millis(15));
    }

    let status = scene.wait_for_balloon(TARGET_BYTES / 2);
    assert_books_balance(&status);
    let moved = status.counters.requested_bytes - status.counters.returned_bytes;
    assert_eq!(moved, TARGET_BYTES / 2);
    scene.assert_intact(&set);
}

/// S8 statistics on demand, with a time-out, under their names.
#[test]
fn statistics_are_what_the_guest_says_itself() {
    let Some(mut scene) = Scene::without_reporting("statistics") else {
        return;
    };
    scene
        .guest
        .make_working_set("data", WORKING_SET_MIB)
        .unwrap();

    let stats = scene.control.guest_stats(PATIENCE).unwrap();
    let own = scene.guest.memory().unwrap();

    let close = |one: u64, other: u64| one.abs_diff(other) <= 8 * MIB;
    assert_eq!(stats.total_memory_bytes(), Some(own.total_bytes));
    assert!(
        close(stats.free_memory_bytes().unwrap(), own.unused_bytes),
        "{stats:?} {own:?}"
    );
    assert!(close(
        stats.available_memory_bytes().unwrap(),
        own.available_bytes
    ));
    assert!(stats.get("stat-minor-faults").unwrap() > 0);
    assert!(stats.last_update_unix_seconds() > 1_700_000_000);

    // Each answer is a new one: memory taken since then is seen.
    scene
        .guest
        .make_working_set("more", WORKING_SET_MIB)
        .unwrap();
    let later = scene.control.guest_stats(PATIENCE).unwrap();
    let less = stats.free_memory_bytes().unwrap() - later.free_memory_bytes().unwrap();
    assert!(close(less, WORKING_SET_MIB * MIB), "{less}");
    for _ in 0..50 {
        scene.control.guest_stats(PATIENCE).unwrap();
    }
}

/// S10 unused memory comes back without any request; X1 the balloon's size has no part in it.
#[test]
fn reported_memory_becomes_free_without_a_balloon() {
    let Some(mut scene) = Scene::new("reporting", |config| config) else {
        return;
    };
    let set = scene
        .guest
        .make_working_set("data", WORKING_SET_MIB)
        .unwrap();
    scene.guest.touch_unused_memory().unwrap();
    let full = scene.host_bytes();
    assert!(full > (MEMORY_MIB - 64) * MIB, "{full}");

    // The guest reports blocks of 4 MiB that stayed unused for two seconds.
    eventually(
        "most of the unused memory is free on the host",
        PATIENCE,
        || {
            let host = scene.host_bytes();
            (host < full - 160 * MIB, host)
        },
    );

    let status = scene.status();
    assert!(
        status.counters.report_discarded_bytes > 160 * MIB,
        "{status:?}"
    );
    assert_eq!((status.actual_bytes, status.ballooned_bytes), (0, 0));
    assert_books_balance(&status);
    scene.assert_intact(&set);
    // Reported memory is used again without a word to anybody.
    let second = scene.guest.make_working_set("second", 160).unwrap();
    assert!(scene.guest.verify_working_set(&second).unwrap());
    scene.assert_intact(&set);
}

/// A6 everything is returned when the driver goes away; S3 set up again after a reset, with the same
/// features (S1); S11 the target is there for the new driver.
#[test]
fn a_driver_that_goes_returns_all_and_finds_the_target_when_it_comes_back() {
    let Some(mut scene) = Scene::without_reporting("unbind and rebind") else {
        return;
    };
    let set = scene.fill();
    let total = scene.guest.memory().unwrap().total_bytes;
    let features = scene.guest.negotiated_features("virtio0").unwrap();
    scene.inflate_to(TARGET_BYTES);

    for _ in 0..3 {
        scene.guest.unbind_balloon("virtio0").unwrap();

        assert_eq!(scene.guest.bound_balloons().unwrap(), [""; 0]);
        assert_eq!(scene.guest.memory().unwrap().total_bytes, total);
        let status = scene.status();
        assert_eq!(
            (status.actual_bytes, status.ballooned_bytes),
            (0, 0),
            "{status:?}"
        );
        assert_books_balance(&status);

        scene.guest.bind_balloon("virtio0").unwrap();

        scene.wait_for_balloon(TARGET_BYTES);
        assert_eq!(
            scene.guest.negotiated_features("virtio0").unwrap(),
            features
        );
        scene.assert_intact(&set);
    }
}

/// S3 and A6 over a reboot from inside: the next kernel finds an empty balloon and the target.
#[test]
fn a_guest_that_reboots_finds_the_target() {
    let Some(mut scene) = Scene::without_reporting("reboot") else {
        return;
    };
    scene.fill();
    scene.inflate_to(TARGET_BYTES);

    scene.guest.reboot().unwrap();

    let status = scene.wait_for_balloon(TARGET_BYTES);
    assert_books_balance(&status);
    let set = scene
        .guest
        .make_working_set("data", WORKING_SET_MIB)
        .unwrap();
    scene.inflate_to(0);
    scene.guest.touch_unused_memory().unwrap();
    scene.assert_intact(&set);
}

/// I3 a guest that dies ends its own session: the back-end goes on and serves the next guest.
#[test]
fn a_guest_that_dies_while_ballooned_leaves_an_empty_device() {
    let Some(mut scene) = Scene::without_reporting("death of the guest") else {
        return;
    };
    scene.fill();
    scene.inflate_to(TARGET_BYTES);

    scene.guest.power_cycle().unwrap();

    assert!(scene.backend.is_running());
    let set = scene.fill();
    scene.wait_for_balloon(TARGET_BYTES);
    scene.inflate_to(TARGET_BYTES / 2);
    scene.assert_intact(&set);

    let Scene {
        guest, mut control, ..
    } = scene;
    drop(guest);
    eventually("the device is alone", PATIENCE, || {
        let status = control.query().unwrap();
        let alone = status.state == DeviceState::Disconnected
            && (status.actual_bytes, status.ballooned_bytes) == (0, 0);
        (alone, status)
    });
}

/// I1 and I2 across the death of the back-end. The stock vhost-user transport of the guest does not
/// connect again (it breaks the device and waits for ever to remove it), so the strongest that can
/// hold with it is: the guest goes on with its data and does not touch the memory it gave; a new
/// back-end answers on the same sockets; the guest has its balloon again after a power cycle.
#[test]
fn a_back_end_that_is_killed_while_ballooned_costs_the_guest_no_data() {
    let Some(mut scene) = Scene::without_reporting("death of the back-end") else {
        return;
    };
    let set = scene.fill();
    scene.inflate_to(TARGET_BYTES);
    let ballooned = scene.host_bytes();

    scene.backend.kill();

    scene.assert_intact(&set);
    scene.guest.touch_unused_memory().unwrap();
    scene.assert_intact(&set);
    let grown = scene.host_bytes().saturating_sub(ballooned);
    assert!(
        grown < 16 * MIB,
        "the guest used {grown} bytes of what it gave"
    );

    scene
        .backend
        .restart()
        .unwrap_or_else(|error| panic!("{error}"));
    let mut control = scene.backend.control(0).unwrap();
    assert_eq!(control.query().unwrap().state, DeviceState::Disconnected);
    scene.assert_intact(&set);

    scene.guest.power_cycle().unwrap();
    scene.control = control;
    let set = scene.fill();
    let before = scene.host_bytes();
    scene.inflate_to(TARGET_BYTES);
    assert!((before - scene.host_bytes()) * 100 >= TARGET_BYTES * 99);
    scene.assert_intact(&set);
}

/// I3 guests on one back-end have nothing to do with each other, not even when one dies.
#[test]
fn several_guests_on_one_back_end_are_strangers() {
    if Prerequisites::find_or_skip("several guests").is_none() {
        return;
    }
    let backend = backend(2);
    let boot = |device| UmlGuest::boot(&config(&backend, device).without_reporting()).unwrap();
    let (mut one, mut two) = (boot(0), boot(1));
    let (mut control_one, mut control_two) =
        (backend.control(0).unwrap(), backend.control(1).unwrap());
    let sets = [&mut one, &mut two].map(|guest| guest.make_working_set("data", 32).unwrap());
    let wait = |control: &mut ControlClient, bytes: u64| {
        eventually("the balloon has its size", PATIENCE, || {
            let status = control.query().unwrap();
            (
                status.actual_bytes == bytes && status.ballooned_bytes == bytes,
                status,
            )
        })
    };

    control_one.set_target(128 * MIB).unwrap();
    control_two.set_target(64 * MIB).unwrap();

    let first = wait(&mut control_one, 128 * MIB);
    let second = wait(&mut control_two, 64 * MIB);
    assert_eq!(first.counters.requested_bytes, 128 * MIB);
    assert_eq!(second.counters.requested_bytes, 64 * MIB);

    drop(one);

    control_two.set_target(96 * MIB).unwrap();
    wait(&mut control_two, 96 * MIB);
    assert_eq!(
        control_one.query().unwrap().state,
        DeviceState::Disconnected
    );
    assert!(two.verify_working_set(&sets[1]).unwrap());
}

/// J8 the control surface that tools know, memory *left* to the guest, says the same as the native
/// one; a change of the balloon is an event.
#[test]
fn the_dialect_of_qmp_tools_says_the_same_in_memory_left() {
    let Some(mut scene) = Scene::without_reporting("dialect") else {
        return;
    };
    let memory = scene.status().memory_bytes;
    assert!(
        memory > (MEMORY_MIB - 32) * MIB && memory <= (MEMORY_MIB + 32) * MIB,
        "{memory}"
    );
    assert_eq!(scene.control.query_balloon_left_bytes().unwrap(), memory);

    scene
        .control
        .balloon_leave_bytes(memory - TARGET_BYTES)
        .unwrap();

    scene.wait_for_balloon(TARGET_BYTES);
    assert_eq!(
        scene.control.query_balloon_left_bytes().unwrap(),
        memory - TARGET_BYTES
    );
    let last = eventually("an event tells of the last change", PATIENCE, || {
        let event = scene.control.next_event(Duration::from_secs(2)).unwrap();
        (
            event.is_some_and(|event| event.left_bytes == memory - TARGET_BYTES),
            event,
        )
    });
    assert!(last.is_some_and(|event| event.unix_micros > 1_700_000_000_000_000));
}
