//! A VM's cgroup as the ledger sees it, and how it is found.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{
    cgroup::{Cgroup, CgroupError},
    ledger::limits::LimitFile,
};

/// Where cgroup v2 is mounted.
pub(super) const CGROUP_MOUNT: &str = "/sys/fs/cgroup";

/// The limit of a VM: `memory.high`, and `memory.max` above it if that was opted in.
#[derive(Debug)]
pub(super) struct VmLimits {
    cgroup: Cgroup,
    max_slack_bytes: Option<u64>,
    /// Lifted for good: a step that was under way must not write them again.
    without_max: AtomicBool,
    without_high: AtomicBool,
}

impl VmLimits {
    pub(super) fn new(cgroup: Cgroup, max_slack_bytes: Option<u64>) -> Self {
        Self {
            cgroup,
            max_slack_bytes,
            without_max: AtomicBool::new(false),
            without_high: AtomicBool::new(false),
        }
    }

    pub(super) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Lifts what is not kept any more: `memory.max`, and `memory.high` unless it goes on being kept.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be written.
    pub(super) fn lift(&self, keep_high: bool) -> Result<(), CgroupError> {
        self.without_max.store(true, Ordering::SeqCst);
        self.without_high.store(!keep_high, Ordering::SeqCst);
        self.keep_lifted()
    }

    fn keep_lifted(&self) -> Result<(), CgroupError> {
        if self.max_slack_bytes.is_some() && self.without_max.load(Ordering::SeqCst) {
            self.cgroup.set_max_bytes(None)?;
        }
        if self.without_high.load(Ordering::SeqCst) {
            self.cgroup.set_high_bytes(None)?;
        }
        Ok(())
    }
}

impl LimitFile for VmLimits {
    fn current_bytes(&self) -> Result<u64, CgroupError> {
        self.cgroup.memory_current_bytes()
    }

    fn limit_bytes(&self) -> Result<Option<u64>, CgroupError> {
        self.cgroup.limit_bytes()
    }

    fn set_limit_bytes(&self, limit: u64) -> Result<(), CgroupError> {
        let Some(slack) = self.max_slack_bytes else {
            self.cgroup.set_high_bytes(Some(limit))?;
            return self.keep_lifted();
        };
        // memory.max kills: it is never below memory.high, not even between the two writes.
        let max = Some(limit.saturating_add(slack));
        if self
            .cgroup
            .limits()?
            .high_bytes
            .is_none_or(|high| high > limit)
        {
            self.cgroup.set_high_bytes(Some(limit))?;
            self.cgroup.set_max_bytes(max)?;
        } else {
            self.cgroup.set_max_bytes(max)?;
            self.cgroup.set_high_bytes(Some(limit))?;
        }
        self.keep_lifted()
    }
}

/// The cgroup of a process that has its memory, from `/proc/PID/cgroup` and below `mount`; `None` for the root,
/// which has no memory files.
///
/// Below a threaded cgroup, in which libvirt has the threads of QEMU, memory is the first one's above that is not
/// (`Documentation/admin-guide/cgroup-v2.rst`, "Threads").
pub(super) fn cgroup_of(proc: &Path, mount: &Path, pid: u32) -> Option<PathBuf> {
    let text = fs::read_to_string(proc.join(pid.to_string()).join("cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = path.trim_start_matches('/');
    // A process that moved out of our cgroup namespace is shown with "..".
    if below.is_empty() || below.split('/').any(|part| part == "..") {
        return None;
    }
    let threaded = |path: &&Path| {
        let kind = fs::read_to_string(mount.join(path).join("cgroup.type"));
        kind.is_ok_and(|kind| kind.trim() == "threaded")
    };
    let mut places = Path::new(below).ancestors();
    let place = places.find(|path| !threaded(path))?;
    (place != Path::new("")).then(|| mount.join(place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_in_the_unified_hierarchy() {
        let dir = tempfile::tempdir().unwrap();
        let put = |pid: &str, text: &str| {
            fs::create_dir(dir.path().join(pid)).unwrap();
            fs::write(dir.path().join(pid).join("cgroup"), text).unwrap();
        };
        let mount = dir.path().join("mount");
        let kind = |path: &str, text: &str| {
            fs::create_dir_all(mount.join(path)).unwrap();
            fs::write(mount.join(path).join("cgroup.type"), text).unwrap();
        };
        kind("vm.scope", "domain\n");
        kind("vm.scope/libvirt", "domain threaded\n");
        kind("vm.scope/libvirt/emulator", "threaded\n");
        kind("vm.scope/libvirt/emulator/inner", "threaded\n");
        put("1", "3:memory:/v1\n0::/vms.slice/a.scope\n");
        put("2", "0::/\n");
        put("3", "0::/../elsewhere\n");
        put("5", "0::/vm.scope/libvirt/emulator/inner\n");

        let of = |pid| cgroup_of(dir.path(), &mount, pid);
        assert_eq!(of(1), Some(mount.join("vms.slice/a.scope")));
        assert_eq!(of(2), None);
        assert_eq!(of(3), None);
        assert_eq!(of(4), None);
        assert_eq!(of(5), Some(mount.join("vm.scope/libvirt")));
    }

    #[test]
    fn memory_max_is_never_below_memory_high() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("cgroup.controllers", "memory"),
            ("memory.high", "max"),
            ("memory.max", "max"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let limits = VmLimits::new(Cgroup::open_unchecked(dir.path()).unwrap(), Some(50));
        let read = |name| fs::read_to_string(dir.path().join(name)).unwrap();
        for limit in [400, 300, 900] {
            limits.set_limit_bytes(limit).unwrap();
            assert_eq!(
                (read("memory.high"), read("memory.max")),
                (limit.to_string(), (limit + 50).to_string())
            );
        }
    }
}
