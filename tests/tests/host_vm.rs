//! The host VM by itself: that the harness other tests stand on gives them the host they asked for. And
//! what a balloon does to the memory cgroup (version 2) that its guest's memory is charged to.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

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
            .swap_mib(256)
            .carry_library()
            .carry_guests(),
        &["inside::"],
    );
}

mod inside {
    use aerostat_tests::guest::{UmlConfig, UmlGuest};
    use aerostat_tests::vmm::mapping::Backing;
    use aerostat_tests::vmm::ram::RegionSpec;
    use aerostat_tests::vmm::{GuestConfig, MIB, PAGE_BYTES, Vmm};
    use std::{
        fs,
        path::{Path, PathBuf},
    };

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

    /// A cgroup of its own that this process can move into.
    struct Group(PathBuf);

    impl Group {
        fn new(name: &str) -> Self {
            let path = Path::new("/sys/fs/cgroup").join(name);
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn enter(&self) {
            fs::write(self.0.join("cgroup.procs"), std::process::id().to_string()).unwrap();
        }

        fn current_bytes(&self) -> u64 {
            let text = fs::read_to_string(self.0.join("memory.current")).unwrap();
            text.trim().parse().unwrap()
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            // Back to the root, where this process came from: an occupied group stays.
            let _ = fs::write(
                "/sys/fs/cgroup/cgroup.procs",
                std::process::id().to_string(),
            );
            let _ = fs::remove_dir(&self.0);
        }
    }

    /// The cgroup that touched a page first pays for it, until it is discarded: also when whoever
    /// discards it is in another cgroup by then. What the guest takes back is charged to whoever
    /// touches it.
    #[test]
    #[ignore = "needs cgroup v2: runs in the host VM"]
    fn discarded_memory_is_uncharged_from_the_cgroup_that_paid() {
        const SIZE: u64 = 64 * MIB;
        // Charges are taken in batches, and the test itself allocates a little.
        const NOISE: u64 = 2 * MIB;
        for backing in [
            Backing::Anonymous,
            Backing::Memfd { offset_bytes: 0 },
            Backing::SharedAnonymous,
        ] {
            let vmm = Vmm::new().unwrap();
            let (payer, other) = (Group::new("payer"), Group::new("other"));
            payer.enter();
            let low = RegionSpec::new(0, 16 * MIB, Backing::Anonymous);
            let spec = RegionSpec::new(1 << 30, SIZE, backing);
            let guest = vmm
                .boot(&GuestConfig::with_regions(vec![low, spec]))
                .unwrap();
            let first = (1 << 30) / PAGE_BYTES;
            let pages: Vec<u64> = (first..first + SIZE / PAGE_BYTES).collect();
            pages.iter().for_each(|pfn| guest.ram().touch(*pfn));
            let full = payer.current_bytes();
            assert!(full >= SIZE, "{backing:?}: {full}");

            other.enter();
            let half = pages.len() / 2;
            guest.driver().give(&pages[..half]).unwrap();
            let books = guest.settled_books().unwrap().balloon;
            assert_eq!(books.discarded_bytes, SIZE / 2);
            let fell = full.saturating_sub(payer.current_bytes());
            println!(
                "{backing:?}: discarded {} MiB, charge fell {} KiB",
                SIZE >> 21,
                fell >> 10
            );
            assert!(fell.abs_diff(SIZE / 2) < NOISE, "{backing:?}: {fell}");

            let before = other.current_bytes();
            guest.driver().take(&pages[half - 4096..half]).unwrap();
            pages[half - 4096..half]
                .iter()
                .for_each(|pfn| guest.ram().touch(*pfn));
            let rose = other.current_bytes().saturating_sub(before);
            assert!(rose.abs_diff(16 * MIB) < NOISE, "{backing:?}: {rose}");
        }
    }

    /// A stock guest inside: User-Mode Linux on the kernel of the host VM.
    #[test]
    #[ignore = "runs in the host VM"]
    fn a_real_guest_boots() {
        let patience = std::time::Duration::from_secs(200);
        let config = UmlConfig::new(96).on_cpu(0).boot_timeout(patience);
        let begin = std::time::Instant::now();
        let mut guest = UmlGuest::boot(&config).unwrap();
        println!("guest up after {:.1} s", begin.elapsed().as_secs_f64());
        assert_eq!(guest.run("echo $((6 * 7))").unwrap(), "42");
        guest.power_off().unwrap();
    }
}
