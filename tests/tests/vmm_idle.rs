//! A guest that does nothing costs the host nothing, however busy it was a moment ago: no worker looks at
//! its rings, and none is woken.

use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::{GuestConfig, MIB, Result, Vmm};
use std::fs;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

/// What the library's threads did so far: how often they were switched, and ticks of processor time.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Activity(Vec<(String, Vec<String>)>);

fn activity() -> Activity {
    let mut threads = Vec::new();
    for thread in fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten()
    {
        let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        if !read("comm").starts_with("aerostat-") {
            continue;
        }
        let status = read("status");
        let switches = status.lines().filter(|line| line.contains("ctxt_switches"));
        // Fields 14 and 15 (proc_pid_stat(5)), behind the name in parentheses.
        let stat = read("stat");
        let fields = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let ticks = fields.skip(11).take(2);
        let all = switches.chain(ticks).map(str::to_owned).collect();
        threads.push((thread.path().display().to_string(), all));
    }
    threads.sort();
    Activity(threads)
}

#[test]
fn workers_sleep_once_a_busy_guest_is_quiet() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(Backing::Memfd { offset_bytes: 0 }, 64))?;
    guest.device().set_write_behind(128 * MIB, 10)?;
    guest.fill_memory(1000, 42)?;
    for target in [32 * MIB, 0, 32 * MIB] {
        guest.balloon_to(target)?;
    }
    guest.settled_books()?;
    assert!(!activity().0.is_empty(), "no threads of the library");
    assert_asleep(Duration::from_millis(500));
    Ok(())
}

/// A worker may still be on its way to bed.
#[track_caller]
fn assert_asleep(for_this_long: Duration) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let before = activity();
        std::thread::sleep(for_this_long);
        let after = activity();
        if before == after {
            return;
        }
        assert!(Instant::now() < deadline, "{before:?}, then {after:?}");
    }
}

/// I3: nothing is due once a flush has taken all, what came in the middle of it included: here of a guest that stops
/// giving below its target, again and again.
#[test]
fn workers_sleep_wherever_a_guest_stops_giving() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(Backing::Memfd { offset_bytes: 0 }, 64))?;
    guest.device().set_write_behind(MIB / 4, 1)?;
    guest.device().set_target(48 * MIB)?;
    let pages: Vec<u64> = guest.driver().allocator.unused().collect();
    for round in 0..40 {
        let some: Vec<u64> = pages
            .iter()
            .copied()
            .skip(round)
            .step_by(3)
            .take(160)
            .collect();
        for pfns in some.chunks(10 + round) {
            guest.driver().tell(Role::Inflate, pfns)?;
        }
        std::thread::sleep(Duration::from_millis(3));
        assert_asleep(Duration::from_millis(20));
        guest.driver().tell(Role::Deflate, &some)?;
    }
    Ok(())
}
