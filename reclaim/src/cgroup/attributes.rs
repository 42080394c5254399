//! The memory attributes of a cgroup, typed. Sizes are bytes.

use std::collections::BTreeMap;

use rustix::io::Errno;

use super::{
    Cgroup, CgroupError,
    parse::{by_node, flat_keyed, parse_limit, parse_pressure},
};
use crate::policy::{MemoryLimits, NodeId, Pressure};

/// `memory.stat`: what the memory is used for, and how reclaim went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStat {
    /// Anonymous memory.
    pub anon_bytes: Option<u64>,
    /// Caches of files, shared memory included.
    pub file_bytes: Option<u64>,
    /// Shared memory: guest memory in a memfd is here.
    pub shmem_bytes: Option<u64>,
    /// Kernel memory.
    pub kernel_bytes: Option<u64>,
    /// Anonymous memory in huge pages.
    pub anon_thp_bytes: Option<u64>,
    /// Memory on the inactive list of anonymous pages.
    pub inactive_anon_bytes: Option<u64>,
    /// Memory on the inactive list of file pages: what reclaim takes first.
    pub inactive_file_bytes: Option<u64>,
    /// Counter: pages that came back soon after they were reclaimed, anonymous ones.
    pub workingset_refault_anon: Option<u64>,
    /// Counter: the same for files.
    pub workingset_refault_file: Option<u64>,
    /// Counter: major faults.
    pub major_faults: Option<u64>,
    /// Counter: pages reclaimed.
    pub pages_stolen: Option<u64>,
    /// Counter: pages scanned for it.
    pub pages_scanned: Option<u64>,
}

/// `memory.events`: how often a limit was met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryEvents {
    /// Reclaimed although below `memory.low`.
    pub low: Option<u64>,
    /// Throttled above `memory.high`.
    pub high: Option<u64>,
    /// About to exceed `memory.max`.
    pub max: Option<u64>,
    /// Out of memory.
    pub oom: Option<u64>,
    /// Processes killed.
    pub oom_kill: Option<u64>,
}

/// `memory.swap.events`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapEvents {
    /// Swap was above `memory.swap.high`.
    pub high: Option<u64>,
    /// Swap was about to exceed `memory.swap.max`.
    pub max: Option<u64>,
    /// No swap space could be had.
    pub fail: Option<u64>,
}

/// One host node's part of `memory.numa_stat`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeStat {
    /// Anonymous memory.
    pub anon_bytes: Option<u64>,
    /// Caches of files, shared memory included.
    pub file_bytes: Option<u64>,
    /// Shared memory.
    pub shmem_bytes: Option<u64>,
    /// Kernel memory that is counted by node: stacks and page tables.
    pub kernel_bytes: Option<u64>,
}

impl NodeStat {
    /// What the cgroup occupies on the node.
    #[must_use]
    pub fn current_bytes(&self) -> u64 {
        [self.anon_bytes, self.file_bytes, self.kernel_bytes]
            .into_iter()
            .flatten()
            .fold(0, u64::saturating_add)
    }
}

/// What `memory.reclaim` got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reclaimed {
    /// As much as was asked for.
    All,
    /// Less: nothing more could be reclaimed.
    Short,
    /// This kernel has no `memory.reclaim` (Linux 5.19 brought it).
    Unsupported,
}

impl Cgroup {
    /// What the cgroup and all below it occupy.
    ///
    /// # Errors
    /// The cgroup is gone, cannot be read, or has no memory controller.
    pub fn memory_current_bytes(&self) -> Result<u64, CgroupError> {
        let file = "memory.current";
        let text = self
            .read(file)?
            .ok_or_else(|| CgroupError::NoMemoryController {
                path: self.path().to_owned(),
            })?;
        text.trim()
            .parse()
            .map_err(|_| CgroupError::malformed(&self.path().join(file), &text))
    }

    /// What of it is swapped out; `None` without swap accounting.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    pub fn swap_current_bytes(&self) -> Result<Option<u64>, CgroupError> {
        self.number("memory.swap.current")
    }

    /// `memory.stat`.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    pub fn memory_stat(&self) -> Result<Option<MemoryStat>, CgroupError> {
        let text = self.read("memory.stat")?;
        Ok(text.as_deref().map(|text| {
            let values = flat_keyed(text);
            let get = |key: &str| values.get(key).copied();
            MemoryStat {
                anon_bytes: get("anon"),
                file_bytes: get("file"),
                shmem_bytes: get("shmem"),
                kernel_bytes: get("kernel"),
                anon_thp_bytes: get("anon_thp"),
                inactive_anon_bytes: get("inactive_anon"),
                inactive_file_bytes: get("inactive_file"),
                workingset_refault_anon: get("workingset_refault_anon"),
                workingset_refault_file: get("workingset_refault_file"),
                major_faults: get("pgmajfault"),
                pages_stolen: get("pgsteal"),
                pages_scanned: get("pgscan"),
            }
        }))
    }

    /// `memory.events`.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    pub fn memory_events(&self) -> Result<Option<MemoryEvents>, CgroupError> {
        let text = self.read("memory.events")?;
        Ok(text.as_deref().map(|text| {
            let values = flat_keyed(text);
            let get = |key: &str| values.get(key).copied();
            MemoryEvents {
                low: get("low"),
                high: get("high"),
                max: get("max"),
                oom: get("oom"),
                oom_kill: get("oom_kill"),
            }
        }))
    }

    /// `memory.swap.events`.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    pub fn swap_events(&self) -> Result<Option<SwapEvents>, CgroupError> {
        let text = self.read("memory.swap.events")?;
        Ok(text.as_deref().map(|text| {
            let values = flat_keyed(text);
            let get = |key: &str| values.get(key).copied();
            SwapEvents {
                high: get("high"),
                max: get("max"),
                fail: get("fail"),
            }
        }))
    }

    /// `memory.numa_stat`, by host node; empty on a kernel without it.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    pub fn numa_stat(&self) -> Result<BTreeMap<NodeId, NodeStat>, CgroupError> {
        let text = self.read("memory.numa_stat")?.unwrap_or_default();
        let nodes = by_node(&text).into_iter().map(|(node, values)| {
            let get = |key: &str| values.get(key).copied();
            let kernel = [get("kernel_stack"), get("pagetables")]
                .into_iter()
                .flatten()
                .reduce(u64::saturating_add);
            let stat = NodeStat {
                anon_bytes: get("anon"),
                file_bytes: get("file"),
                shmem_bytes: get("shmem"),
                kernel_bytes: kernel,
            };
            (node, stat)
        });
        Ok(nodes.collect())
    }

    /// Memory pressure in the cgroup; `None` without PSI.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    pub fn pressure(&self) -> Result<Option<Pressure>, CgroupError> {
        let text = self.read("memory.pressure")?;
        Ok(text.as_deref().and_then(parse_pressure))
    }

    /// The four limits.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    pub fn limits(&self) -> Result<MemoryLimits, CgroupError> {
        Ok(MemoryLimits {
            min_bytes: self.limit("memory.min")?,
            low_bytes: self.limit("memory.low")?,
            high_bytes: self.limit("memory.high")?,
            max_bytes: self.limit("memory.max")?,
        })
    }

    /// `memory.swap.max`; `None` is no limit, or no swap accounting.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    pub fn swap_max_bytes(&self) -> Result<Option<u64>, CgroupError> {
        self.limit("memory.swap.max")
    }

    /// Sets `memory.high`; `None` is no limit. It does not wait for reclaim where the kernel can
    /// set a limit without (about 6.16); on older ones a limit below what is used blocks, so write
    /// none.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be written.
    pub fn set_high_bytes(&self, limit: Option<u64>) -> Result<(), CgroupError> {
        self.set_limit("memory.high", limit)
    }

    /// Sets `memory.max`; `None` is no limit. Below what is used, the kernel reclaims and then kills.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be written.
    pub fn set_max_bytes(&self, limit: Option<u64>) -> Result<(), CgroupError> {
        self.set_limit("memory.max", limit)
    }

    /// Takes memory from the cgroup, by swapping or dropping caches; it blocks until done. With
    /// `swappiness` 0 only caches are taken; kernels before 6.7 know no such argument, and nothing
    /// is taken there rather than by other means than asked for.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be written.
    pub fn reclaim(&self, bytes: u64, swappiness: Option<u8>) -> Result<Reclaimed, CgroupError> {
        let text = match swappiness {
            Some(swappiness) => format!("{bytes} swappiness={swappiness}"),
            None => bytes.to_string(),
        };
        match self.write("memory.reclaim", &text) {
            Ok(()) => Ok(Reclaimed::All),
            Err(CgroupError::Io { source, .. })
                if source.raw_os_error() == Some(Errno::AGAIN.raw_os_error()) =>
            {
                Ok(Reclaimed::Short)
            }
            Err(CgroupError::Io { source, .. })
                if [Errno::NOENT, Errno::INVAL]
                    .map(|errno| Some(errno.raw_os_error()))
                    .contains(&source.raw_os_error()) =>
            {
                Ok(Reclaimed::Unsupported)
            }
            Err(error) => Err(error),
        }
    }

    /// Processes in the cgroup itself.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    pub fn processes(&self) -> Result<Vec<u32>, CgroupError> {
        let text = self.read("cgroup.procs")?.unwrap_or_default();
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    fn number(&self, file: &str) -> Result<Option<u64>, CgroupError> {
        let Some(text) = self.read(file)? else {
            return Ok(None);
        };
        match text.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(CgroupError::malformed(&self.path().join(file), &text)),
        }
    }

    fn limit(&self, file: &str) -> Result<Option<u64>, CgroupError> {
        let Some(text) = self.read(file)? else {
            return Ok(None);
        };
        parse_limit(&text).ok_or_else(|| CgroupError::malformed(&self.path().join(file), &text))
    }

    fn set_limit(&self, file: &str, limit: Option<u64>) -> Result<(), CgroupError> {
        match limit {
            Some(bytes) => self.write(file, &bytes.to_string()),
            None => self.write(file, "max"),
        }
    }
}
