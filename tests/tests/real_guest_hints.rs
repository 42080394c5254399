//! Free page hints and history with an unmodified Linux guest, served by `aerostat-vhost-user`.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use aerostat_reclaim::vm::{ControlClient, GuestRange, HintState, Hints};
use aerostat_tests::artifacts;
use aerostat_tests::backend::Backend;
use aerostat_tests::guest::{Prerequisites, UmlConfig, UmlGuest};
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 320;
const WORKING_SET_MIB: u64 = 64;
const PATIENCE: Duration = Duration::from_secs(30);
/// Linux hints in blocks of its largest order.
const BLOCK_BYTES: u64 = 4 * MIB;

/// A guest, its device's control socket, and the back-end; dropped in this order.
fn boot(test: &str) -> Option<(UmlGuest, ControlClient, Backend)> {
    Prerequisites::find_or_skip(test)?;
    let options = &["--features", "default,free-page-hint"];
    let backend = Backend::start_with(&artifacts::vhost_user_backend(), 1, options)
        .unwrap_or_else(|error| panic!("{error}"));
    let config = UmlConfig::new(MEMORY_MIB)
        .balloon(&backend.socket(0))
        .without_reporting();
    let guest = UmlGuest::boot(&config)
        .unwrap_or_else(|error| panic!("{error}\nthe back-end said:\n{}", backend.log()));
    let control = backend.control(0).unwrap();
    Some((guest, control, backend))
}

/// Takes hints until the round is no longer running.
fn collect(control: &mut ControlClient) -> (Vec<GuestRange>, HintState) {
    let deadline = Instant::now() + PATIENCE;
    let mut all = Vec::new();
    loop {
        let Hints { state, ranges } = control.take_hints().unwrap();
        let empty = ranges.is_empty();
        all.extend(ranges);
        if empty && state != HintState::Running {
            return (all, state);
        }
        assert!(Instant::now() < deadline, "{state:?}, {} ranges", all.len());
        thread::sleep(Duration::from_millis(10));
    }
}

/// S9: a stock driver tells most of its unused memory, in whole blocks; nothing is discarded, nothing
/// is lost; round after round.
#[test]
fn a_stock_driver_tells_its_unused_memory() {
    let Some((mut guest, mut control, _backend)) = boot("free page hints") else {
        return;
    };
    let set = guest.make_working_set("data", WORKING_SET_MIB).unwrap();
    guest.touch_unused_memory().unwrap();
    let mut last_id = 1;
    for _ in 0..3 {
        let unused = guest.memory().unwrap().unused_bytes;
        let host = guest.host_memory_bytes().unwrap();

        let id = control.start_hints(Duration::from_secs(60)).unwrap();
        let (ranges, state) = collect(&mut control);

        assert!(id > last_id);
        last_id = id;
        assert_eq!(state, HintState::Complete);
        let blocks = ranges.iter();
        assert!(blocks.clone().all(|range| range.len_bytes == BLOCK_BYTES));
        assert!(blocks.clone().all(|range| range.gpa % BLOCK_BYTES == 0));
        let hinted: u64 = blocks.map(|range| range.len_bytes).sum();
        assert!(
            hinted > unused / 2 && hinted <= unused,
            "{hinted} of {unused}"
        );
        // The guest has no more of it until the round ends.
        let during = guest.memory().unwrap().unused_bytes;
        assert!(during < unused - hinted / 2, "{during} of {unused}");
        control.finish_hints().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while guest.memory().unwrap().unused_bytes + 16 * MIB < unused {
            assert!(
                Instant::now() < deadline,
                "the guest did not get its pages back"
            );
            thread::sleep(Duration::from_millis(10));
        }
        assert!(
            guest.host_memory_bytes().unwrap() + MIB > host,
            "nothing is discarded"
        );
        assert!(guest.verify_working_set(&set).unwrap());
    }
    let status = control.query().unwrap();
    assert_eq!(status.counters.requested_bytes, 0);
}

/// S9: a guest that gave up nearly all of its memory gets it back although the VMM forgot the round.
#[test]
fn a_forgotten_round_ends_by_itself() {
    let Some((mut guest, mut control, _backend)) = boot("a forgotten round") else {
        return;
    };
    let unused = guest.memory().unwrap().unused_bytes;
    control.start_hints(Duration::from_secs(1)).unwrap();
    thread::sleep(Duration::from_millis(1500));
    let deadline = Instant::now() + PATIENCE;
    while guest.memory().unwrap().unused_bytes + 16 * MIB < unused {
        assert!(
            Instant::now() < deadline,
            "the guest did not get its pages back"
        );
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(collect(&mut control).1, HintState::Idle);
    assert!(control.finish_hints().is_err());
    // The next one works.
    control.start_hints(Duration::from_secs(60)).unwrap();
    assert_eq!(collect(&mut control).1, HintState::Complete);
    control.finish_hints().unwrap();
}

/// A9: an inflation by a stock driver can be read back: the target, values on the way, the end.
#[test]
fn history_tells_of_an_inflation() {
    let Some((_guest, mut control, _backend)) = boot("history") else {
        return;
    };
    let before = control.history(0).unwrap();
    let since = before.last().map_or(0, |entry| entry.sequence);
    control.set_target(128 * MIB).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while control.query().unwrap().actual_bytes != 128 * MIB {
        assert!(Instant::now() < deadline, "{:?}", control.query());
        thread::sleep(Duration::from_millis(10));
    }
    let entries = control.history(since).unwrap();
    let first = entries.first().unwrap();
    assert_eq!(
        (first.event.as_str(), first.target_bytes),
        ("target-set", 128 * MIB)
    );
    let last = entries.last().unwrap();
    assert_eq!(last.event, "actual-written");
    assert_eq!(
        (last.actual_bytes, last.ballooned_bytes),
        (128 * MIB, 128 * MIB)
    );
    assert!(entries.len() >= 3, "{entries:?}");
    for pair in entries.windows(2) {
        assert!(pair[0].monotonic_ns <= pair[1].monotonic_ns);
        assert!(pair[0].actual_bytes <= pair[1].actual_bytes);
    }
}
