//! Memory on several nodes of the host, bound there by a real memory policy: it is counted under its
//! node, comes back to its node, and workers of its node discard it (design, "NUMA").

#![expect(clippy::panic, reason = "the helpers of a test fail like the test")]

use aerostat_tests::host_vm::{HostVmConfig, run_tests};

fn host(nodes: u32) -> HostVmConfig {
    HostVmConfig::new()
        .nodes(nodes)
        .cpus(nodes)
        .memory_mib(384 * u64::from(nodes))
        .transparent_hugepages("never")
        .exact_free_memory()
        .carry_library()
}

#[test]
fn host_vm_with_two_nodes() {
    run_tests(&host(2), &["inside::"]);
}

#[test]
fn host_vm_with_four_nodes() {
    run_tests(&host(4), &["inside::"]);
}

/// Ratios only: the nodes of an emulated host are equally far from each other.
#[test]
#[ignore = "a measurement: wants a quiet machine"]
fn whether_binding_matters() {
    run_tests(&host(2), &["measure::"]);
}

/// The nodes of this host, and what is free on them.
mod host {
    use std::fs;

    fn read(file: &str) -> String {
        fs::read_to_string(file).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    /// The processors of a node as the kernel lists them.
    pub(crate) fn processors(node: u32) -> String {
        let text = read(&format!("/sys/devices/system/node/node{node}/cpulist"));
        text.trim().to_owned()
    }

    /// How many nodes there are; they are numbered without gaps.
    pub(crate) fn nodes() -> u32 {
        let list = read("/sys/devices/system/node/has_memory");
        let last = list.trim().rsplit('-').next().and_then(|n| n.parse().ok());
        last.map_or(1, |last: u32| last + 1)
    }

    pub(crate) fn free_bytes(node: u32) -> u64 {
        let text = read(&format!("/sys/devices/system/node/node{node}/meminfo"));
        let line = text.lines().find(|line| line.contains("MemFree:"));
        let kib: Option<u64> = line.and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
        kib.unwrap_or_else(|| panic!("no MemFree of node {node}")) << 10
    }

    /// Name, allowed processors and time on a processor of each worker of the library.
    pub(crate) fn workers() -> Vec<(String, String, u64)> {
        let tasks = fs::read_dir("/proc/self/task").into_iter().flatten();
        let of = |task: fs::DirEntry| {
            let file = |name| fs::read_to_string(task.path().join(name)).ok();
            let name = file("comm")?.trim().to_owned();
            let status = file("status")?;
            let allowed = status
                .lines()
                .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
            let times = file("schedstat")?;
            let nanoseconds = times.split_whitespace().next()?.parse().ok()?;
            let worker = (name, allowed.trim().to_owned(), nanoseconds);
            worker.0.starts_with("aerostat-").then_some(worker)
        };
        tasks.flatten().filter_map(of).collect()
    }

    /// Time on a processor of all workers of a node.
    pub(crate) fn busy_ns(node: u32) -> u64 {
        let prefix = format!("aerostat-{node}.");
        let workers = workers();
        let of_node = workers
            .iter()
            .filter(|(name, ..)| name.starts_with(&prefix));
        of_node.map(|(.., nanoseconds)| nanoseconds).sum()
    }
}

/// A guest with memory on every node.
mod machine {
    use aerostat_tests::vmm::mapping::Backing;
    use aerostat_tests::vmm::ram::RegionSpec;
    use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};

    /// What it has on each node.
    pub(crate) const SHARE: u64 = 64 * MIB;

    fn gpa(node: u32) -> u64 {
        u64::from(node + 1) << 30
    }

    pub(crate) fn pages(node: u32) -> Vec<u64> {
        let first = gpa(node) / PAGE_BYTES;
        (first..first + SHARE / PAGE_BYTES).collect()
    }

    /// Boots it, and has the host allocate all of its memory.
    pub(crate) fn boot(vmm: &Vmm, backing: Backing, nodes: u32) -> Result<Guest> {
        let mut regions = vec![RegionSpec::new(0, 16 * MIB, Backing::Anonymous)];
        let node = |node| RegionSpec {
            node: i32::try_from(node).unwrap_or(-1),
            bound: Some(node),
            ..RegionSpec::new(gpa(node), SHARE, backing)
        };
        regions.extend((0..nodes).map(node));
        let guest = vmm.boot(&GuestConfig::with_regions(regions))?;
        for pfn in (0..nodes).flat_map(pages) {
            guest.ram().touch(pfn);
        }
        Ok(guest)
    }
}

mod inside {
    use super::{host, machine};
    use aerostat_tests::vmm::mapping::Backing;
    use aerostat_tests::vmm::{MIB, Result, Vmm};

    /// How far other things on this host move a node's free memory meanwhile.
    const NOISE: u64 = 4 * MIB;
    const BACKINGS: [Backing; 2] = [Backing::Anonymous, Backing::Memfd { offset_bytes: 0 }];

    #[test]
    #[ignore = "needs several nodes: runs in the host VM"]
    fn every_node_has_workers_on_its_processors_alone() -> Result<()> {
        let _vmm = Vmm::with_workers(2)?;
        let workers = host::workers();
        for node in 0..host::nodes() {
            let prefix = format!("aerostat-{node}.");
            let of_node: Vec<_> = workers
                .iter()
                .filter(|w| w.0.starts_with(&prefix))
                .collect();
            assert_eq!(of_node.len(), 2, "{workers:?}");
            for (name, allowed, _) in of_node {
                assert_eq!(*allowed, host::processors(node), "{name}");
            }
        }
        Ok(())
    }

    #[test]
    #[ignore = "needs several nodes: runs in the host VM"]
    fn memory_is_counted_under_its_node_and_comes_back_to_it() -> Result<()> {
        let nodes = host::nodes();
        for backing in BACKINGS {
            let vmm = Vmm::new()?;
            let guest = machine::boot(&vmm, backing, nodes)?;
            for node in 0..nodes {
                let free = |node| (0..nodes).map(host::free_bytes).nth(node as usize);
                let before: Vec<_> = (0..nodes).filter_map(free).collect();
                guest.driver().give(&machine::pages(node))?;
                guest.settled_books()?;
                let after: Vec<_> = (0..nodes).filter_map(free).collect();

                for other in 0..nodes {
                    let index = i32::try_from(other).unwrap_or(-1);
                    let books = guest.device().node_counters(index)?.balloon;
                    let expected = if other <= node { machine::SHARE } else { 0 };
                    assert_eq!(books.discarded_bytes, expected, "node {other}");
                    let (before, after) = (before[other as usize], after[other as usize]);
                    if other == node {
                        assert!(after >= before + machine::SHARE - NOISE, "node {other}");
                    } else {
                        assert!(before.abs_diff(after) < NOISE, "node {other}");
                    }
                }
            }
        }
        Ok(())
    }

    /// What waits in the window is discarded by the nodes it came from, all of them at once.
    #[test]
    #[ignore = "needs several nodes: runs in the host VM"]
    fn the_window_is_flushed_by_workers_of_each_node() -> Result<()> {
        let nodes = host::nodes();
        for backing in BACKINGS {
            let vmm = Vmm::new()?;
            let guest = machine::boot(&vmm, backing, nodes)?;
            // All of it waits, until the target is reached.
            let all = u64::from(nodes) * machine::SHARE;
            guest.device().set_target(all)?;
            guest.device().set_write_behind(all, 60_000)?;
            for node in 0..nodes - 1 {
                guest.driver().give(&machine::pages(node))?;
            }
            let last = machine::pages(nodes - 1);
            let (most, end) = last.split_at(last.len() - 256);
            guest.driver().give(most)?;
            assert_eq!(guest.books()?.balloon.discarded_bytes, 0, "it waits");
            let before: Vec<u64> = (0..nodes).map(host::busy_ns).collect();
            guest.driver().give(end)?;
            guest.settled_books()?;

            // Much more than waking up costs, much less than freeing that many pages does.
            const WORK_NS: u64 = 500_000;
            for node in 0..nodes {
                let spent = host::busy_ns(node) - before[node as usize];
                println!("{backing:?}: node {node} spent {} us", spent / 1000);
                assert!(spent > WORK_NS, "node {node} had {spent} ns of work");
                let index = i32::try_from(node).unwrap_or(-1);
                let books = guest.device().node_counters(index)?.balloon;
                assert_eq!(books.discarded_bytes, machine::SHARE, "node {node}");
            }
        }
        Ok(())
    }
}

mod measure {
    use super::host;
    use aerostat_tests::vmm::mapping::Backing;
    use aerostat_tests::vmm::ram::RegionSpec;
    use aerostat_tests::vmm::{GuestConfig, MIB, PAGE_BYTES, Result, Vmm};

    const SIZE: u64 = 192 * MIB;
    const ROUNDS: usize = 7;

    /// Time in system calls for the memory of node 1, discarded by workers of the node that the library
    /// is told: the right one, or the other.
    #[test]
    #[ignore = "a measurement: runs in the host VM on a quiet machine"]
    fn discards_by_near_and_far_workers() -> Result<()> {
        assert!(host::nodes() > 1);
        for backing in [Backing::Anonymous, Backing::Memfd { offset_bytes: 0 }] {
            let mut times = [Vec::new(), Vec::new()];
            for _ in 0..ROUNDS {
                for (told, times) in times.iter_mut().enumerate() {
                    times.push(round(backing, i32::try_from(told).unwrap_or(0))?);
                }
            }
            let [far, near] = times.map(|mut times| {
                times.sort_unstable();
                (times[ROUNDS / 2], times[0], times[ROUNDS - 1])
            });
            println!(
                "{backing:?}: near {near:?}, far {far:?} us per GiB (median, least, most); far/near {:.2}",
                far.0 as f64 / near.0 as f64
            );
        }
        Ok(())
    }

    fn round(backing: Backing, told: i32) -> Result<u64> {
        let vmm = Vmm::with_workers(1)?;
        let high = 1 << 30;
        let low = RegionSpec::new(0, 16 * MIB, Backing::Anonymous);
        let spec = RegionSpec {
            node: told,
            bound: Some(1),
            ..RegionSpec::new(high, SIZE, backing)
        };
        let guest = vmm.boot(&GuestConfig::with_regions(vec![low, spec]))?;
        let first = high / PAGE_BYTES;
        let pages: Vec<u64> = (first..first + SIZE / PAGE_BYTES).collect();
        pages.iter().for_each(|pfn| guest.ram().touch(*pfn));
        guest.device().set_write_behind(32 * MIB, 10)?;
        guest.driver().give(&pages)?;
        guest.device().flush()?;
        let books = guest.settled_books()?;
        assert_eq!(books.balloon.discarded_bytes, SIZE);
        Ok(books.discard_ns / 1000 * (1 << 30) / SIZE)
    }
}
