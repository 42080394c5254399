//! The host VM by itself: that the harness other tests stand on gives them the host they asked for.

#![expect(clippy::panic, reason = "the helpers of a test fail like the test")]

use aerostat_tests::host_vm::{HostVmConfig, run_tests};

#[test]
fn host_vm_has_what_was_asked_for() {
    run_tests(
        &HostVmConfig::new()
            .memory_mib(1024)
            .nodes(2)
            .cpus(2)
            .hugepages_2m(8)
            .transparent_hugepages("madvise")
            .swap_mib(256),
        "inside::",
    );
}

mod inside {
    use std::{fs, path::Path};

    fn read(file: &str) -> String {
        fs::read_to_string(file).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    #[test]
    #[ignore = "runs in the host VM"]
    fn nodes_with_memory_and_processors() {
        assert_eq!(read("/sys/devices/system/node/has_memory").trim(), "0-1");
        assert_eq!(read("/sys/devices/system/node/has_cpu").trim(), "0-1");
        let total = |node| {
            let text = read(&format!("/sys/devices/system/node/node{node}/meminfo"));
            let line = text.lines().find(|line| line.contains("MemTotal")).unwrap();
            let kib: u64 = line.split_whitespace().nth(3).unwrap().parse().unwrap();
            kib
        };
        assert!(total(0) > 300 << 10 && total(1) > 300 << 10);
    }

    #[test]
    #[ignore = "runs in the host VM"]
    fn huge_pages_and_swap() {
        let huge = read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        assert_eq!(huge.trim(), "8");
        let policy = read("/sys/kernel/mm/transparent_hugepage/enabled");
        assert!(policy.contains("[madvise]"), "{policy}");
        assert!(read("/proc/swaps").contains("/dev/vda"));
    }

    #[test]
    #[ignore = "runs in the host VM"]
    fn cgroup_v2_with_the_memory_controller_and_pressure() {
        let group = Path::new("/sys/fs/cgroup/probe");
        fs::create_dir(group).unwrap();
        for file in [
            "memory.current",
            "memory.high",
            "memory.reclaim",
            "memory.pressure",
        ] {
            assert!(group.join(file).exists(), "{file}");
        }
        fs::remove_dir(group).unwrap();
        assert!(read("/proc/pressure/memory").contains("some avg10="));
    }
}
