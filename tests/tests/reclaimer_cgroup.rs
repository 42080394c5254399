//! Real cgroup v2, in the host VM: limits, pressure triggers, memory.reclaim, delegation, and books that
//! are found again after the daemon was killed.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use aerostat_tests::{
    artifacts,
    host_vm::{HostVmConfig, run_tests},
};

#[test]
fn cgroup_v2_in_a_host_vm() {
    run_tests(
        &HostVmConfig::new()
            .memory_mib(1024)
            .nodes(2)
            .swap_mib(512)
            .carry(artifacts::aerostatd())
            .carry_library(),
        &["inside::"],
    );
}

mod inside {
    use std::{
        fs,
        io::Write as _,
        os::unix::net::UnixListener,
        path::{Path, PathBuf},
        process::{Child, Command, Stdio},
        thread,
        time::Duration,
    };

    use aerostat_reclaim::{
        cgroup::{Cgroup, CgroupError, Delegated, PressureTrigger, Reclaimed},
        ledger::{ByNode, Ledger, limits},
        policy::{NodeId, VmId},
    };
    use aerostat_tests::reclaimer::Reclaimer;
    use aerostat_tests::vmm::{GuestConfig, Vmm, mapping::Backing};
    use parking_lot::Mutex;

    const MIB: u64 = 1 << 20;
    const MOUNT: &str = "/sys/fs/cgroup";

    /// A delegated cgroup for one test.
    fn delegated(name: &str) -> Delegated {
        let path = Path::new(MOUNT).join(name);
        fs::create_dir_all(&path).unwrap();
        Delegated::open(&path).unwrap()
    }

    /// A process in a cgroup of its own that fills memory (a file in /dev/shm) and then sleeps.
    struct Load {
        process: Child,
        file: PathBuf,
    }

    impl Load {
        fn start(cgroup: &Cgroup, mib: u64) -> Self {
            let name = cgroup
                .path()
                .file_name()
                .unwrap()
                .to_string_lossy()
                .into_owned();
            let file = PathBuf::from(format!("/dev/shm/load-{name}"));
            let script = format!(
                "echo $$ > {}/cgroup.procs; dd if=/dev/zero of={} bs=1M count={mib} 2>/dev/null; \
                 echo full; exec sleep 1000",
                cgroup.path().display(),
                file.display()
            );
            let mut process = Command::new("/bin/sh")
                .args(["-c", &script])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            let output = process.stdout.take().unwrap();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).unwrap();
            assert_eq!(line, "full\n");
            Self { process, file }
        }
    }

    impl Drop for Load {
        fn drop(&mut self) {
            let _ = self.process.kill();
            let _ = self.process.wait();
            let _ = fs::remove_file(&self.file);
        }
    }

    #[test]
    #[ignore = "needs cgroup v2: runs in the host VM"]
    fn attributes_limits_and_reclaim_of_a_real_cgroup() {
        let root = delegated("attributes");
        let vm = root.create("vm").unwrap();
        let load = Load::start(&vm, 96);

        let current = vm.memory_current_bytes().unwrap();
        assert!(current >= 96 * MIB, "{current}");
        let stat = vm.memory_stat().unwrap().unwrap();
        assert!(stat.shmem_bytes.unwrap() >= 96 * MIB);
        let nodes: u64 = vm
            .numa_stat()
            .unwrap()
            .values()
            .map(|n| n.current_bytes())
            .sum();
        assert!(nodes >= 96 * MIB, "{nodes}");
        assert!(vm.pressure().unwrap().is_some());
        assert_eq!(vm.processes().unwrap(), [load.process.id()]);
        assert_eq!(vm.limits().unwrap().high_bytes, None);

        root.protect(&vm, 16 * MIB).unwrap();
        vm.set_high_bytes(Some(200 * MIB)).unwrap();
        vm.set_max_bytes(Some(300 * MIB)).unwrap();
        let limits = vm.limits().unwrap();
        assert_eq!(limits.low_bytes, Some(16 * MIB));
        assert_eq!(
            (limits.high_bytes, limits.max_bytes),
            (Some(200 * MIB), Some(300 * MIB))
        );
        vm.set_max_bytes(None).unwrap();
        assert_eq!(vm.limits().unwrap().max_bytes, None);

        // Shared memory leaves by swap.
        assert_eq!(vm.reclaim(32 * MIB, None).unwrap(), Reclaimed::All);
        assert!(vm.memory_current_bytes().unwrap() <= current - 24 * MIB);
        assert!(vm.swap_current_bytes().unwrap().unwrap() >= 24 * MIB);
        assert_eq!(vm.reclaim(1 << 40, None).unwrap(), Reclaimed::Short);
        drop(load);
        root.remove("vm").unwrap();
        assert!(vm.memory_current_bytes().unwrap_err().is_gone());
    }

    #[test]
    #[ignore = "needs cgroup v2: runs in the host VM"]
    fn only_sub_cgroups_are_limited_and_errors_say_what_to_do() {
        let root = delegated("rules");
        let refused = root.protect(root.root(), 1).unwrap_err();
        assert!(
            matches!(refused, CgroupError::NotDelegated { .. }),
            "{refused}"
        );
        assert!(root.create("../outside").is_err());
        // The root of all cgroups has no memory.current.
        let top = Cgroup::open(Path::new(MOUNT)).unwrap();
        let error = top.memory_current_bytes().unwrap_err().to_string();
        assert!(error.contains("memory controller"), "{error}");
        let error = Cgroup::open(Path::new("/proc")).unwrap_err().to_string();
        assert!(error.contains("not on a cgroup v2"), "{error}");
    }

    #[test]
    #[ignore = "needs cgroup v2: runs in the host VM"]
    fn a_pressure_trigger_fires_when_a_cgroup_lacks_memory() {
        let root = delegated("pressure");
        let vm = root.create("vm").unwrap();
        let trigger =
            PressureTrigger::on_cgroup(&vm, Duration::from_millis(50), Duration::from_secs(1))
                .unwrap();
        assert!(
            !trigger.wait(Duration::from_millis(10)).unwrap(),
            "nothing waits yet"
        );
        vm.set_high_bytes(Some(32 * MIB)).unwrap();
        // Twice as much as it may have, in a circle: every page waits for reclaim.
        let path = vm.path().to_owned();
        let mut process = Command::new("/bin/sh")
            .args(["-c", &format!(
                "echo $$ > {}/cgroup.procs; while :; do dd if=/dev/zero of=/dev/shm/circle bs=1M count=64 2>/dev/null; done",
                path.display()
            )])
            .spawn()
            .unwrap();
        let fired = trigger.wait(Duration::from_secs(60)).unwrap();
        let pressure = vm.pressure().unwrap().unwrap();
        let events = vm.memory_events().unwrap().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
        let _ = fs::remove_file("/dev/shm/circle");
        assert!(fired, "{pressure:?}");
        assert!(pressure.some_total_us > 0 && events.high.unwrap() > 0);
    }

    #[test]
    #[ignore = "needs cgroup v2: runs in the host VM"]
    fn a_limit_falls_only_by_what_has_left_a_real_cgroup() {
        let root = delegated("ledger");
        let vm = root.create("vm").unwrap();
        let load = Load::start(&vm, 64);
        let name = VmId::new("vm");
        let ledger = Mutex::new(Ledger::new(&ByNode::from([
            (NodeId(0), 200 * MIB),
            (NodeId(1), 200 * MIB),
        ])));
        let used: ByNode = vm
            .numa_stat()
            .unwrap()
            .into_iter()
            .map(|(node, stat)| (node, stat.current_bytes()))
            .collect();
        vm.set_high_bytes(Some(128 * MIB)).unwrap();
        ledger.lock().adopt(&name, 128 * MIB, &used).unwrap();

        // What it occupies stays its own, whatever is wanted.
        let limit = limits::lower(&ledger, &name, &vm, 0, 8 * MIB).unwrap();
        assert!(limit >= 64 * MIB + 8 * MIB, "{limit}");
        let in_file = vm.limits().unwrap().high_bytes.unwrap();
        assert!(in_file <= limit && limit - in_file < 65536);

        // It leaves; now the limit may fall.
        fs::remove_file(&load.file).unwrap();
        let limit = limits::lower(&ledger, &name, &vm, 0, 8 * MIB).unwrap();
        assert!(limit < 64 * MIB, "{limit}");
        let raised = limits::raise(&ledger, &name, &vm, 100 * MIB, None).unwrap();
        assert_eq!(vm.limits().unwrap().high_bytes, Some(raised & !4095));
        assert!(ledger.lock().balanced());
    }

    #[test]
    #[ignore = "needs cgroup v2: runs in the host VM"]
    fn the_limit_of_an_attached_cgroup_follows_the_balloon_through_the_c_interface() {
        let root = delegated("attached");
        let cgroup = root.create("vm").unwrap();
        let vmm = Vmm::new().unwrap();
        let in_it = |path: &Path| {
            fs::write(path.join("cgroup.procs"), std::process::id().to_string()).unwrap();
        };
        // Who touches memory first pays for it.
        in_it(cgroup.path());
        let guest = vmm
            .boot(&GuestConfig::new(Backing::Memfd { offset_bytes: 0 }, 128))
            .unwrap();
        let device = guest.device();
        let refused = device.attach_cgroup(cgroup.path()).unwrap_err().to_string();
        assert!(
            refused.contains("memory.high"),
            "no limit, no budget: {refused}"
        );
        assert!(
            device
                .attach_cgroup(Path::new("/sys/fs/cgroup/absent"))
                .is_err()
        );
        let budget = 256 * MIB;
        cgroup.set_high_bytes(Some(budget)).unwrap();
        device.attach_cgroup(cgroup.path()).unwrap();
        assert!(device.attach_cgroup(cgroup.path()).is_err(), "only once");
        guest.fill_memory(1000, 3).unwrap();
        let full = cgroup.memory_current_bytes().unwrap();

        guest.balloon_to(96 * MIB).unwrap();
        guest.settled_books().unwrap();

        let occupied = cgroup.memory_current_bytes().unwrap();
        assert!(full - occupied >= 80 * MIB, "{full} to {occupied}");
        let account = device.query_cgroup().unwrap();
        assert!(account.pool_bytes >= 92 * MIB, "{account:?}");
        assert_eq!(account.limit_bytes + account.pool_bytes, budget);
        assert_eq!(account.failures, 0);
        let in_file = cgroup.limits().unwrap().high_bytes.unwrap();
        assert_eq!(in_file, account.limit_bytes & !4095);
        assert!(in_file >= occupied);

        guest.balloon_to(0).unwrap();
        assert_eq!(
            cgroup.limits().unwrap().high_bytes,
            Some(budget),
            "before the guest has it"
        );
        guest.balloon_to(64 * MIB).unwrap();
        guest.settled_books().unwrap();
        device.reset().unwrap();
        assert_eq!(
            cgroup.limits().unwrap().high_bytes,
            Some(budget),
            "a reset returns all"
        );
        device.detach_cgroup().unwrap();
        assert!(device.query_cgroup().is_err());
        drop(guest);
        in_it(Path::new(MOUNT));
    }

    /// A VM's control socket: a balloon of `balloon` bytes in a guest of 256 MiB.
    fn control_socket(path: &Path, balloon: u64) {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let mut target = balloon;
            for stream in listener.incoming().map_while(Result::ok) {
                let mut stream = stream;
                let _ = writeln!(stream, r#"{{"QMP":{{"version":{{}},"capabilities":[]}}}}"#);
                let lines = std::io::BufReader::new(stream.try_clone().unwrap());
                for line in std::io::BufRead::lines(lines).map_while(Result::ok) {
                    let request: serde_json::Value = serde_json::from_str(&line).unwrap();
                    let answer = match request["execute"].as_str().unwrap_or_default() {
                        "aerostat-query" => serde_json::json!({
                            "state": "active", "memory-bytes": 256 * MIB, "target-bytes": target,
                            "actual-bytes": target, "ballooned-bytes": target,
                        }),
                        "aerostat-set-target" => {
                            target = request["arguments"]["bytes"].as_u64().unwrap();
                            serde_json::json!({})
                        }
                        _ => serde_json::json!({"stats": {}, "last-update": 0}),
                    };
                    let reply = serde_json::json!({ "return": answer });
                    if writeln!(stream, "{reply}").is_err() {
                        break;
                    }
                }
            }
        });
    }

    #[test]
    #[ignore = "needs cgroup v2: runs in the host VM"]
    fn the_books_are_found_again_after_kill_9_of_the_daemon() {
        let root = delegated("daemon");
        let sockets = tempfile::tempdir().unwrap();
        let vms = ["a", "b"].map(|name| root.create(name).unwrap());
        let _loads = vms.each_ref().map(|vm| Load::start(vm, 48));
        control_socket(&sockets.path().join("a.ctl"), 128 * MIB);
        control_socket(&sockets.path().join("b.ctl"), 0);
        let host = format!(
            "period-ms = 100\ncgroup-root = \"{}\"\nbudget = \"600M\"\noverhead = \"32M\"\nslack = \"8M\"",
            root.root().path().display()
        );
        let vms_text = format!(
            "[policy]\nname = \"none\"\n[[vm]]\nprotocol = \"aerostat\"\nsocket = \"{}/{{name}}.ctl\"\n\
             cgroup = \"{{name}}\"\n",
            sockets.path().display()
        );
        let mut daemon = Reclaimer::start(&host, &vms_text).unwrap();
        let settled = |d: &Reclaimer| {
            d.number("a", "limit-bytes") == 160 * MIB && d.number("b", "limit-bytes") == 288 * MIB
        };
        daemon.until("limits follow the balloons", settled).unwrap();
        let files = || {
            vms.each_ref()
                .map(|vm| vm.limits().unwrap().high_bytes.unwrap())
        };
        assert_eq!(files(), [160 * MIB, 288 * MIB]);
        let pool = daemon.status()["ledger"]["pool-bytes"].as_u64().unwrap();
        assert_eq!(pool, (600 - 160 - 288) * MIB);

        daemon.kill_and_restart().unwrap();

        daemon.until("the same books", settled).unwrap();
        assert_eq!(files(), [160 * MIB, 288 * MIB]);
        let ledger = &daemon.status()["ledger"];
        assert_eq!(ledger["pool-bytes"].as_u64().unwrap(), pool);
        assert!(ledger["balanced"].as_bool().unwrap());
        // Someone else raises a limit: it is written again.
        vms[0].set_high_bytes(None).unwrap();
        daemon
            .until("restored", |_| {
                vms[0].limits().unwrap().high_bytes == Some(160 * MIB)
            })
            .unwrap();
        // A sub-cgroup goes under way: its account is closed.
        drop(_loads);
        root.remove("b").unwrap();
        daemon
            .until("closed", |d| {
                d.number("b", "limit-bytes") == 0 && d.status()["ledger"]["pool-bytes"] == 440 * MIB
            })
            .unwrap_or_else(|error| panic!("{error}"));
    }

    #[test]
    #[ignore = "sets the clock: runs in the host VM"]
    fn a_clock_that_jumps_by_a_day_and_back_changes_nothing() {
        let root = delegated("clock");
        let sockets = tempfile::tempdir().unwrap();
        let vm = root.create("a").unwrap();
        let _load = Load::start(&vm, 16);
        control_socket(&sockets.path().join("a.ctl"), 128 * MIB);
        let host = format!(
            "period-ms = 100\ncgroup-root = \"{}\"\nbudget = \"600M\"\noverhead = \"32M\"\nslack = \"8M\"",
            root.root().path().display()
        );
        let vms = format!(
            "[policy]\nname = \"none\"\n[[vm]]\nprotocol = \"aerostat\"\nsocket = \"{}/{{name}}.ctl\"\n\
             cgroup = \"{{name}}\"\n",
            sockets.path().display()
        );
        let daemon = Reclaimer::start(&host, &vms).unwrap();
        let settled = |d: &Reclaimer| {
            d.number("a", "limit-bytes") == 160 * MIB && d.number("a", "actual-bytes") == 128 * MIB
        };
        daemon
            .until("the limit follows the balloon", settled)
            .unwrap();
        let ticks = |d: &Reclaimer| d.status()["ticks"].as_u64().unwrap_or(0);
        let now = || {
            let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
            i64::try_from(since.as_secs()).unwrap()
        };
        for jump in [86_400, -2 * 86_400, 86_400] {
            let date = format!("@{}", now() + jump);
            let set = Command::new("/bin/busybox")
                .args(["date", "-s", &date])
                .output();
            assert!(set.unwrap().status.success());
            let before = ticks(&daemon);
            daemon
                .until("it goes on deciding", |d| {
                    ticks(d) >= before + 5 && settled(d)
                })
                .unwrap();
            assert_eq!(vm.limits().unwrap().high_bytes, Some(160 * MIB));
        }
    }
}
