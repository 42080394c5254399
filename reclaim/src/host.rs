//! The host's memory and pressure, as a sample has them.
//!
//! Source: proc_meminfo(5), `Documentation/accounting/psi.rst`, `Documentation/ABI/stable/sysfs-devices-node`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    cgroup::parse_pressure,
    policy::{HostNodeSample, HostSample, NodeId},
};

/// Where the host's files are: `/`, or a made-up tree in a test.
#[derive(Clone, Debug)]
pub struct HostFiles {
    root: PathBuf,
}

/// The host's own files could not be read: nothing can be decided then.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}; mount /proc (in a container: hostPID and the host's /proc)")]
pub struct HostError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl HostFiles {
    /// The files below `root`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Where the pressure file is.
    #[must_use]
    pub fn pressure_path(&self) -> PathBuf {
        self.root.join("proc/pressure/memory")
    }

    /// Looks at the host. The pressure event is the caller's to enter.
    ///
    /// # Errors
    /// `/proc/meminfo` cannot be read.
    pub fn sample(&self) -> Result<HostSample, HostError> {
        let path = self.root.join("proc/meminfo");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) => return Err(HostError { path, source }),
        };
        let total_bytes = kib(&text, "MemTotal:").unwrap_or(0);
        // Kernels before 3.14 did not estimate it.
        let available_bytes = kib(&text, "MemAvailable:").unwrap_or_else(|| {
            ["MemFree:", "Inactive(file):"]
                .iter()
                .filter_map(|key| kib(&text, key))
                .sum()
        });
        let pressure = fs::read_to_string(self.pressure_path()).ok();
        Ok(HostSample {
            total_bytes,
            available_bytes,
            swap_free_bytes: kib(&text, "SwapFree:").unwrap_or(0),
            pressure: pressure.as_deref().and_then(parse_pressure),
            pressure_event: false,
            nodes: self.nodes(),
        })
    }

    fn nodes(&self) -> Vec<HostNodeSample> {
        let folder = self.root.join("sys/devices/system/node");
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let mut nodes: Vec<HostNodeSample> = entries
            .filter_map(|entry| {
                let name = entry.file_name();
                let number = name.to_str()?.strip_prefix("node")?.parse().ok()?;
                let text = fs::read_to_string(entry.path().join("meminfo")).ok()?;
                // Lines of "Node 0 MemTotal: 123 kB".
                let get = |key: &str| kib(&text, key);
                // As the kernel's estimate for the whole host has it, but for the watermarks of zones.
                let parts = [
                    "MemFree:",
                    "Active(file):",
                    "Inactive(file):",
                    "SReclaimable:",
                ];
                Some(HostNodeSample {
                    node: NodeId(number),
                    total_bytes: get("MemTotal:")?,
                    available_bytes: parts.iter().filter_map(|key| get(key)).sum(),
                })
            })
            .filter(|node| node.total_bytes > 0)
            .collect();
        nodes.sort_by_key(|node| node.node);
        nodes
    }
}

/// The value behind `key` in bytes; the file has it in KiB.
fn kib(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line
            .split_ascii_whitespace()
            .skip_while(|word| *word != key);
        words.next()?;
        words.next()?.parse::<u64>().ok()?.checked_mul(1024)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_memory_pressure_and_nodes_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(
            "proc/meminfo",
            "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\nSwapFree: 7 kB\n",
        );
        write(
            "proc/pressure/memory",
            "some avg10=2.00 avg60=0.00 avg300=0.00 total=5\n",
        );
        write(
            "sys/devices/system/node/node1/meminfo",
            "Node 1 MemTotal: 500 kB\nNode 1 MemFree: 20 kB\nNode 1 SReclaimable: 3 kB\n",
        );
        write(
            "sys/devices/system/node/node0/meminfo",
            "Node 0 MemTotal: 500 kB\nNode 0 MemFree: 10 kB\nNode 0 Active(file): 2 kB\n\
             Node 0 Inactive(file): 3 kB\n",
        );
        write("sys/devices/system/node/has_cpu", "0-1\n");

        let host = HostFiles::new(dir.path()).sample().unwrap();

        assert_eq!(
            (host.total_bytes, host.available_bytes),
            (1000 << 10, 400 << 10)
        );
        assert_eq!(host.swap_free_bytes, 7 << 10);
        assert_eq!(host.pressure.unwrap().some_avg10, 2.0);
        let nodes: Vec<_> = host
            .nodes
            .iter()
            .map(|n| (n.node.0, n.available_bytes >> 10))
            .collect();
        assert_eq!(nodes, [(0, 15), (1, 23)]);
    }

    #[test]
    fn a_host_without_proc_is_an_error_with_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let error = HostFiles::new(dir.path()).sample().unwrap_err().to_string();
        assert!(
            error.contains("proc/meminfo") && error.contains("mount"),
            "{error}"
        );
    }
}
