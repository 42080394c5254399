//! KVM where it works, else emulation.
//!
//! That /dev/kvm opens says little: inside some virtual machines it is one whose guests stall early. So
//! a kernel is booted with it, once for each boot of this machine.

use std::{fs, path::PathBuf, time::Duration};

use super::{HostVmConfig, HostVmPrerequisites, vm::HostVm};
use crate::artifacts;

/// A kernel that boots at all is up within a second or two.
const PROBE_TIMEOUT: Duration = Duration::from_secs(8);

/// How QEMU runs the processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// The host's processors.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Accelerator {
    /// What works here. `AEROSTAT_HOST_VM_ACCEL` (`kvm` or `tcg`) decides without a probe.
    pub(crate) fn find(parts: &HostVmPrerequisites) -> Self {
        match std::env::var("AEROSTAT_HOST_VM_ACCEL").as_deref() {
            Ok("kvm") => return Self::Kvm,
            Ok("tcg") => return Self::Tcg,
            _ => {}
        }
        let device = fs::File::options().read(true).write(true).open("/dev/kvm");
        if device.is_err() {
            return Self::Tcg;
        }
        let note = note();
        let known = note.as_ref().and_then(|note| fs::read_to_string(note).ok());
        match known.as_deref() {
            Some("kvm") => return Self::Kvm,
            Some("tcg") => return Self::Tcg,
            _ => {}
        }
        let mut probe = HostVmConfig::new();
        probe.boot_timeout = PROBE_TIMEOUT;
        let (found, word) = match HostVm::boot_with(&probe, parts, Self::Kvm) {
            Ok(_) => (Self::Kvm, "kvm"),
            Err(_) => (Self::Tcg, "tcg"),
        };
        // Without the note the next test probes again.
        let _ = note.map(|note| fs::write(note, word));
        found
    }

    /// QEMU's arguments for it.
    pub(crate) fn arguments(self) -> [(&'static str, &'static str); 2] {
        match self {
            Self::Kvm => [("-accel", "kvm"), ("-cpu", "host")],
            // The fifth level of page tables costs time at every miss of the emulated TLB.
            Self::Tcg => [("-accel", "tcg,thread=multi"), ("-cpu", "max,la57=off")],
        }
    }
}

/// Where the result of the probe is kept: one file for each boot of this machine.
fn note() -> Option<PathBuf> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let directory = artifacts::directory().join("host-vm");
    fs::create_dir_all(&directory).ok()?;
    Some(directory.join(format!("accelerator-{}", boot.trim())))
}
