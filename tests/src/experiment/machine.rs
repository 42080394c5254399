//! The host VM, from inside: its cgroups, counters and swap.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use super::{ExperimentError, failed};

const VMS: &str = "/sys/fs/cgroup/vms";
const SWAP: &str = "/dev/vda";
/// On the root file system, which is never swapped out and has no limit.
const BALLAST: &str = "/ballast";
const MIB: u64 = 1 << 20;

/// Counters of the host at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Pages read from swap.
    pub swapped_in_pages: u64,
    /// Pages written to swap.
    pub swapped_out_pages: u64,
    /// Microseconds in which at least one task waited for memory.
    pub some_us: u64,
    /// Microseconds in which all did.
    pub full_us: u64,
}

impl Counters {
    /// Now.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn read() -> Result<Self, ExperimentError> {
        let vmstat = read("/proc/vmstat")?;
        let pressure = read("/proc/pressure/memory")?;
        let total = |line: &str| {
            let line = pressure.lines().find(|text| text.starts_with(line))?;
            line.rsplit("total=").next()?.trim().parse().ok()
        };
        Ok(Self {
            swapped_in_pages: field(&vmstat, "pswpin ").unwrap_or(0),
            swapped_out_pages: field(&vmstat, "pswpout ").unwrap_or(0),
            some_us: total("some").unwrap_or(0),
            full_us: total("full").unwrap_or(0),
        })
    }
}

/// Memory of the host at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// What could be used without swapping.
    pub available_bytes: u64,
    /// What is in swap.
    pub swapped_bytes: u64,
}

impl Memory {
    /// Now.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn read() -> Result<Self, ExperimentError> {
        let text = read("/proc/meminfo")?;
        let kib = |name: &str| field(&text, name).unwrap_or(0) * 1024;
        Ok(Self {
            available_bytes: kib("MemAvailable:"),
            swapped_bytes: kib("SwapTotal:") - kib("SwapFree:").min(kib("SwapTotal:")),
        })
    }
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

fn read(path: &str) -> Result<String, ExperimentError> {
    fs::read_to_string(path).map_err(failed("reading", path))
}

fn write(path: &Path, text: &str) -> Result<(), ExperimentError> {
    fs::write(path, text).map_err(failed("writing", path))
}

/// The cgroup above all guests.
#[must_use]
pub fn cgroup_root() -> &'static Path {
    Path::new(VMS)
}

/// The cgroup of a guest, made if need be.
///
/// # Errors
/// It cannot be made.
pub fn cgroup(guest: usize) -> Result<PathBuf, ExperimentError> {
    let root = cgroup_root();
    fs::create_dir_all(root).map_err(failed("making", root))?;
    write(&root.join("cgroup.subtree_control"), "+memory")?;
    let path = root.join(format!("g{guest}"));
    fs::create_dir_all(&path).map_err(failed("making", &path))?;
    Ok(path)
}

/// What a guest's cgroup occupies.
///
/// # Errors
/// It cannot be read.
pub fn occupied_bytes(guest: usize) -> Result<u64, ExperimentError> {
    let path = cgroup_root().join(format!("g{guest}/memory.current"));
    let text = fs::read_to_string(&path).map_err(failed("reading", &path))?;
    Ok(text.trim().parse().unwrap_or(0))
}

/// Locks so much memory away that guests which occupy `occupied_bytes` now can have `room_bytes`.
///
/// # Errors
/// There is less than that, or it cannot be written.
pub fn leave_room(room_bytes: u64, occupied_bytes: u64) -> Result<(), ExperimentError> {
    let there = Memory::read()?.available_bytes + occupied_bytes;
    let Some(ballast) = there.checked_sub(room_bytes) else {
        return Err(ExperimentError::Unexpected(format!(
            "the host VM has room for {} MiB of guests, {} are wanted: enlarge --host-mib",
            there / MIB,
            room_bytes / MIB
        )));
    };
    let mut file = File::create(BALLAST).map_err(failed("making", BALLAST))?;
    let block = vec![1; 1 << 20];
    for _ in 0..ballast / MIB {
        file.write_all(&block).map_err(failed("writing", BALLAST))?;
    }
    Ok(())
}

/// Reads everything back from swap, and begins with an empty one.
///
/// # Errors
/// It does not fit into memory.
pub fn empty_swap() -> Result<(), ExperimentError> {
    for program in ["swapoff", "swapon"] {
        let status = Command::new("/bin/busybox")
            .args([program, SWAP])
            .status()
            .map_err(failed("running", program))?;
        if !status.success() {
            return Err(ExperimentError::Unexpected(format!(
                "{program} {SWAP}: {status}"
            )));
        }
    }
    Ok(())
}
