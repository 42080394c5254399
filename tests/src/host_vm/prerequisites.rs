//! What a host VM needs on this machine.

use std::{
    env,
    path::{Path, PathBuf},
};

use crate::{
    artifacts,
    guest::{
        GuestError,
        prerequisites::{program, skip_or_fail, static_busybox},
    },
};

/// What helps when something is not there.
const INSTALL: &str = "run scripts/setup, which installs qemu-system-x86, busybox-static and \
                       util-linux and unpacks Debian's cloud kernel to target/host-kernel";

/// The modules that a host VM loads, in the order in which they need each other; `tests/host_vm/init`
/// has the same list.
pub(super) const MODULES: [&str; 6] = [
    "virtio/virtio_ring.ko",
    "virtio/virtio.ko",
    "virtio/virtio_pci_modern_dev.ko",
    "virtio/virtio_pci_legacy_dev.ko",
    "virtio/virtio_pci.ko",
    "block/virtio_blk.ko",
];

/// The files that a host VM is made of.
#[derive(Clone, Debug)]
pub struct HostVmPrerequisites {
    /// The emulator.
    pub qemu: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    /// The directory of that kernel's drivers.
    pub drivers: PathBuf,
    /// The shell inside.
    pub busybox: PathBuf,
    /// Ties the VM's life to the harness.
    pub setpriv: PathBuf,
}

impl HostVmPrerequisites {
    /// Looks for everything. `AEROSTAT_HOST_KERNEL` names the directory of another kernel: with
    /// `boot/vmlinuz-*` and `lib/modules/*`, as Debian packages it, the modules not compressed.
    ///
    /// # Errors
    /// [`GuestError::Prerequisite`] names the first thing that is missing.
    pub fn find() -> Result<Self, GuestError> {
        let directory = kernel_directory()?;
        let kernel = only_entry(&directory.join("boot"), "vmlinuz-")?;
        let modules = only_entry(&directory.join("lib/modules"), "")
            .or_else(|_| only_entry(&directory.join("usr/lib/modules"), ""))?;
        let found = Self {
            qemu: program("qemu-system-x86_64").map_err(remedy)?,
            kernel,
            drivers: modules.join("kernel/drivers"),
            busybox: static_busybox().map_err(remedy)?,
            setpriv: program("setpriv").map_err(remedy)?,
        };
        for module in MODULES {
            let file = found.drivers.join(module);
            if !file.is_file() {
                return Err(missing(format!("there is no {}", file.display())));
            }
        }
        Ok(found)
    }

    /// As [`Self::find`], for tests: `None` after a printed reason where a test may be skipped.
    ///
    /// # Panics
    /// On a machine that runs the project's checks (`CI=true`) nothing may be skipped.
    #[must_use]
    pub fn find_or_skip(test: &str) -> Option<Self> {
        Self::find()
            .map_err(|error| skip_or_fail(test, &error))
            .ok()
    }
}

fn missing(what: String) -> GuestError {
    GuestError::Prerequisite {
        missing: what,
        remedy: INSTALL,
    }
}

fn remedy(error: GuestError) -> GuestError {
    match error {
        GuestError::Prerequisite { missing, .. } => GuestError::Prerequisite {
            missing,
            remedy: INSTALL,
        },
        other => other,
    }
}

/// `target/host-kernel`, wherever in `target` the running program was built to.
fn kernel_directory() -> Result<PathBuf, GuestError> {
    if let Some(directory) = env::var_os("AEROSTAT_HOST_KERNEL") {
        return Ok(directory.into());
    }
    artifacts::directory()
        .ancestors()
        .map(|directory| directory.join("host-kernel"))
        .find(|directory| directory.join("complete").is_file())
        .ok_or_else(|| missing("there is no kernel in target/host-kernel".to_owned()))
}

/// The entry of a directory that begins with `prefix`: each holds one kernel's.
fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf, GuestError> {
    let entries = directory.read_dir().ok().into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .max()
        .ok_or_else(|| missing(format!("there is no {prefix}* in {}", directory.display())))
}
