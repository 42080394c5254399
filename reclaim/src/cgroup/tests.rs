//! The readers on made-up trees; real cgroups are in the host VM's tests.

use std::{fs, path::Path, time::Duration};

use super::*;
use crate::policy::{MemoryLimits, NodeId};

const STAT: &str = "anon 1048576\nfile 4096\nkernel 8192\nshmem 12\npgmajfault 7\npgsteal 9\n\
                    a_key_of_next_year 3\nbroken line\n";

/// A directory that looks like a cgroup with these files.
fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("cgroup.controllers"), "cpu memory\n").unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    let cgroup = Cgroup::open_unchecked(dir.path()).unwrap();
    (dir, cgroup)
}

#[test]
fn attributes_are_read_with_their_types() {
    let (_dir, cgroup) = tree(&[
        ("memory.current", "123456\n"),
        ("memory.stat", STAT),
        (
            "memory.events",
            "low 0\nhigh 5\nmax 0\noom 0\noom_kill 1\nsock_throttled 2\n",
        ),
        ("memory.swap.current", "77\n"),
        ("memory.swap.max", "max\n"),
        ("memory.swap.events", "high 0\nmax 0\nfail 3\n"),
        ("memory.min", "0\n"),
        ("memory.high", "max\n"),
        ("memory.max", "1073741824\n"),
        (
            "memory.numa_stat",
            "anon N0=10 N1=20\nfile N0=1 N1=2\nkernel_stack N0=4 N1=0\npagetables N0=0 N1=5\n",
        ),
        (
            "memory.pressure",
            "some avg10=1.50 avg60=0.30 avg300=0.10 total=900\n\
             full avg10=0.50 avg60=0.00 avg300=0.00 total=100\n",
        ),
        ("cgroup.procs", "12\n345\n"),
    ]);

    assert!(cgroup.has_memory_controller().unwrap());
    assert_eq!(cgroup.memory_current_bytes().unwrap(), 123_456);
    let stat = cgroup.memory_stat().unwrap().unwrap();
    assert_eq!(
        (stat.anon_bytes, stat.shmem_bytes, stat.major_faults),
        (Some(1 << 20), Some(12), Some(7))
    );
    assert_eq!(stat.anon_thp_bytes, None);
    let events = cgroup.memory_events().unwrap().unwrap();
    assert_eq!((events.high, events.oom_kill), (Some(5), Some(1)));
    assert_eq!(cgroup.swap_current_bytes().unwrap(), Some(77));
    assert_eq!(cgroup.swap_max_bytes().unwrap(), None);
    assert_eq!(cgroup.swap_events().unwrap().unwrap().fail, Some(3));
    assert_eq!(
        cgroup.limits().unwrap(),
        MemoryLimits {
            min_bytes: Some(0),
            low_bytes: None,
            high_bytes: None,
            max_bytes: Some(1 << 30),
        }
    );
    let nodes = cgroup.numa_stat().unwrap();
    assert_eq!(nodes[&NodeId(0)].current_bytes(), 15);
    assert_eq!(nodes[&NodeId(1)].current_bytes(), 27);
    let pressure = cgroup.pressure().unwrap().unwrap();
    assert_eq!((pressure.some_avg10, pressure.full_total_us), (1.5, 100));
    assert_eq!(cgroup.processes().unwrap(), [12, 345]);
}

#[test]
fn absent_attributes_are_none_and_a_missing_controller_is_an_error_with_advice() {
    let (_dir, cgroup) = tree(&[]);

    assert_eq!(cgroup.swap_current_bytes().unwrap(), None);
    assert_eq!(cgroup.memory_stat().unwrap(), None);
    assert_eq!(cgroup.pressure().unwrap(), None);
    assert!(cgroup.numa_stat().unwrap().is_empty());
    assert_eq!(cgroup.limits().unwrap(), MemoryLimits::default());
    let error = cgroup.memory_current_bytes().unwrap_err();
    assert!(matches!(error, CgroupError::NoMemoryController { .. }));
    assert!(error.to_string().contains("+memory"), "{error}");
    assert_eq!(cgroup.reclaim(4096, None).unwrap(), Reclaimed::Unsupported);
}

#[test]
fn a_deleted_cgroup_is_gone_not_absent() {
    let (dir, cgroup) = tree(&[("memory.current", "1\n")]);
    drop(dir);

    assert!(!cgroup.exists());
    assert!(cgroup.memory_current_bytes().unwrap_err().is_gone());
    assert!(cgroup.pressure().unwrap_err().is_gone());
    assert!(cgroup.set_high_bytes(Some(1)).unwrap_err().is_gone());
    let absent = Cgroup::open(Path::new("/no/such/cgroup")).unwrap_err();
    assert!(absent.is_gone() && absent.to_string().contains("/no/such/cgroup"));
}

#[test]
fn limits_are_written_as_the_kernel_reads_them() {
    let (dir, cgroup) = tree(&[("memory.high", ""), ("memory.max", "")]);

    cgroup.set_high_bytes(Some(4096)).unwrap();
    cgroup.set_max_bytes(None).unwrap();

    let read = |name| fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!(
        (read("memory.high"), read("memory.max")),
        ("4096".to_owned(), "max".to_owned())
    );
}

#[test]
fn a_directory_that_is_no_cgroup_v2_is_refused_with_its_path() {
    let dir = tempfile::tempdir().unwrap();

    let error = Cgroup::open(dir.path()).unwrap_err();

    assert!(matches!(error, CgroupError::NotV2 { .. }));
    assert!(error.to_string().contains(&*dir.path().to_string_lossy()));
}

#[test]
fn a_v1_hierarchy_is_refused_and_the_error_says_how_to_get_v2() {
    let v1 = Path::new("/sys/fs/cgroup/memory");
    if !v1.join("memory.usage_in_bytes").exists() {
        eprintln!("not shown here: this host has no cgroup v1 memory hierarchy");
        return;
    }
    let error = Cgroup::open(v1).unwrap_err().to_string();
    assert!(
        error.contains("cgroup v1") && error.contains("unified_cgroup_hierarchy"),
        "{error}"
    );
}

#[test]
fn a_file_that_makes_no_sense_is_named() {
    let (_dir, cgroup) = tree(&[("memory.current", "many\n"), ("memory.high", "-3\n")]);

    let error = cgroup.memory_current_bytes().unwrap_err().to_string();
    assert!(
        error.contains("memory.current") && error.contains("many"),
        "{error}"
    );
    assert!(matches!(
        cgroup.limits(),
        Err(CgroupError::Malformed { .. })
    ));
}

#[test]
fn pressure_without_a_some_line_is_no_pressure() {
    assert_eq!(parse_pressure(""), None);
    assert_eq!(parse_pressure("full avg10=1.00 total=3\n"), None);
    let partial = parse_pressure("some avg10=x total=5").unwrap();
    assert_eq!((partial.some_avg10, partial.some_total_us), (0.0, 5));
}

#[test]
fn a_trigger_with_a_window_the_kernel_refuses_says_which_are_allowed() {
    if !Path::new(HOST_PRESSURE).exists() {
        eprintln!("not shown here: this kernel has no PSI");
        return;
    }
    let error = PressureTrigger::on_host(Duration::from_millis(1), Duration::from_millis(100))
        .unwrap_err()
        .to_string();
    assert!(error.contains("500 ms to 10 s"), "{error}");
    let quiet = PressureTrigger::on_host(Duration::from_millis(1900), Duration::from_secs(2));
    match quiet {
        Ok(trigger) => assert!(!trigger.wait(Duration::ZERO).unwrap()),
        Err(error) => assert!(error.to_string().contains(HOST_PRESSURE), "{error}"),
    }
}

#[cfg(feature = "daemon")]
#[test]
fn only_what_is_below_the_delegated_cgroup_may_be_limited() {
    let dir = tempfile::tempdir().unwrap();
    let delegated = Delegated::open_with(dir.path(), Cgroup::open_unchecked).unwrap();

    assert!(delegated.check(&dir.path().join("vm1")).is_ok());
    assert!(delegated.check(&dir.path().join("a/vm1")).is_ok());
    for path in [
        dir.path().to_owned(),
        dir.path().join("../elsewhere"),
        "/sys/fs/cgroup".into(),
    ] {
        let error = delegated.check(&path).unwrap_err();
        assert!(matches!(error, CgroupError::NotDelegated { .. }), "{error}");
    }
    assert!(delegated.create("../elsewhere").is_err());
    assert!(delegated.remove("").is_err());
}

#[cfg(feature = "daemon")]
#[test]
fn protection_is_written_through_cgroups_rs() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("vm1")).unwrap();
    fs::write(dir.path().join("vm1/memory.low"), "").unwrap();
    let delegated = Delegated::open_with(dir.path(), Cgroup::open_unchecked).unwrap();
    let vm = Cgroup::open_unchecked(&dir.path().join("vm1")).unwrap();

    delegated.protect(&vm, 4096).unwrap();

    assert_eq!(
        fs::read_to_string(dir.path().join("vm1/memory.low")).unwrap(),
        "4096"
    );
    assert!(delegated.protect(delegated.root(), 1).is_err());
}
