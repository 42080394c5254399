//! What a host is to be like.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{HostVmPrerequisites, accelerator::Accelerator, vm::HostVm};
use crate::{
    artifacts,
    guest::{self, GuestError},
};

/// How a host VM is to be started.
#[derive(Clone, Debug)]
pub struct HostVmConfig {
    memory_mib: u64,
    cpus: u32,
    nodes: u32,
    swap_mib: u64,
    swap_iops: Option<u32>,
    kernel_arguments: Vec<String>,
    qemu_arguments: Vec<OsString>,
    pub(super) files: Vec<PathBuf>,
    pub(super) guests: bool,
    pub(super) boot_timeout: Duration,
    /// How long the tests inside may take altogether; see [`Self::patience`].
    pub(super) patience: Duration,
}

impl Default for HostVmConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl HostVmConfig {
    /// A host with 1 GiB, two processors and one node. It has cgroup v2 with all controllers and PSI.
    #[must_use]
    pub fn new() -> Self {
        Self {
            memory_mib: 1024,
            cpus: 2,
            nodes: 1,
            swap_mib: 0,
            swap_iops: None,
            kernel_arguments: Vec::new(),
            qemu_arguments: Vec::new(),
            files: Vec::new(),
            guests: false,
            boot_timeout: Duration::from_secs(240),
            patience: Duration::from_secs(300),
        }
    }

    /// Memory of all nodes together. What is carried into the VM takes part of it.
    #[must_use]
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Processors of all nodes together; each node gets at least one.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// NUMA nodes of equal size.
    #[must_use]
    pub fn nodes(mut self, nodes: u32) -> Self {
        self.nodes = nodes.max(1);
        self
    }

    /// Huge pages of 2 MiB, spread over the nodes.
    #[must_use]
    pub fn hugepages_2m(self, pages: u64) -> Self {
        self.kernel_argument("hugepagesz=2M")
            .kernel_argument(&format!("hugepages={pages}"))
    }

    /// Huge pages of 1 GiB, on nodes that are larger.
    #[must_use]
    pub fn hugepages_1g(self, pages: u64) -> Self {
        self.kernel_argument("hugepagesz=1G")
            .kernel_argument(&format!("hugepages={pages}"))
    }

    /// Transparent huge pages: `always`, `madvise` or `never`.
    #[must_use]
    pub fn transparent_hugepages(self, policy: &str) -> Self {
        self.kernel_argument(&format!("transparent_hugepage={policy}"))
    }

    /// Keeps what is freed out of the processors' own lists, some MiB each, which do not count as free:
    /// `MemFree` then tells at once, and to the page.
    #[must_use]
    pub fn exact_free_memory(self) -> Self {
        self.kernel_argument("sysctl.vm.percpu_pagelist_high_fraction=1000000")
    }

    /// Swap space, on a disk of its own: a sparse file of the machine below.
    #[must_use]
    pub fn swap_mib(mut self, mib: u64) -> Self {
        self.swap_mib = mib;
        self
    }

    /// Slows the disk for swap down to so many requests a second: it is a file in the memory of the machine
    /// below, and no disk is as fast as that.
    #[must_use]
    pub fn swap_iops(mut self, iops: u32) -> Self {
        self.swap_iops = Some(iops);
        self
    }

    /// Adds a word to the kernel's command line.
    #[must_use]
    pub fn kernel_argument(mut self, argument: &str) -> Self {
        self.kernel_arguments.push(argument.to_owned());
        self
    }

    /// Adds a word to QEMU's command line.
    #[must_use]
    pub fn qemu_argument(mut self, argument: impl Into<OsString>) -> Self {
        self.qemu_arguments.push(argument.into());
        self
    }

    /// Carries a file into the VM, to the path it has outside; a program with its shared libraries.
    #[must_use]
    pub fn carry(mut self, file: impl Into<PathBuf>) -> Self {
        self.files.push(file.into());
        self
    }

    /// Carries the built `libaerostat.so`, which the test VMM loads.
    #[must_use]
    pub fn carry_library(self) -> Self {
        self.carry(artifacts::directory().join("libaerostat.so"))
    }

    /// Carries what User-Mode Linux guests are made of and the vhost-user back-end, so that
    /// [`crate::guest`] and [`crate::backend`] work inside.
    #[must_use]
    pub fn carry_guests(mut self) -> Self {
        self.guests = true;
        self.carry(artifacts::vhost_user_backend())
    }

    /// How long the tests inside may take altogether.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Boots the host and waits until it takes commands.
    ///
    /// # Errors
    /// Something is not installed, or the host does not come up in time; the error then holds the end
    /// of its console log.
    pub fn boot(&self) -> Result<HostVm, GuestError> {
        HostVm::boot(self)
    }

    /// All files to be carried: those of the guests are found on this machine.
    pub(super) fn all_files(&self) -> Result<Vec<PathBuf>, GuestError> {
        let mut files = self.files.clone();
        if self.guests {
            let parts = guest::Prerequisites::find()?;
            files.extend([
                parts.kernel,
                parts.balloon_module,
                parts.unshare,
                parts.setpriv,
                parts.busybox,
            ]);
        }
        Ok(files)
    }

    /// The size of the swap disk, if there is to be one.
    pub(super) fn swap_bytes(&self) -> Option<u64> {
        (self.swap_mib > 0).then_some(self.swap_mib << 20)
    }

    /// QEMU's arguments.
    pub(super) fn arguments(
        &self,
        parts: &HostVmPrerequisites,
        accelerator: Accelerator,
        initramfs: &Path,
        swap: Option<&Path>,
    ) -> Vec<OsString> {
        let cpus = self.cpus.max(self.nodes);
        let mut arguments: Vec<OsString> = [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            // Commands on the first serial line, the kernel's messages on the second.
            "-chardev",
            "stdio,id=commands,signal=off",
            "-serial",
            "chardev:commands",
            "-chardev",
            "file,id=log,path=/dev/stderr",
            "-serial",
            "chardev:log",
            "-machine",
            "q35",
        ]
        .map(OsString::from)
        .into();
        let mut add = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        for (name, value) in accelerator.arguments() {
            add(name, value.into());
        }
        add("-smp", cpus.to_string().into());
        add("-m", format!("{}M", self.memory_mib).into());
        if self.nodes > 1 {
            let share = self.memory_mib / u64::from(self.nodes);
            for node in 0..self.nodes {
                let cpus: String = (node..cpus)
                    .step_by(usize::try_from(self.nodes).unwrap_or(1))
                    .map(|cpu| format!(",cpus={cpu}"))
                    .collect();
                add(
                    "-object",
                    format!("memory-backend-memfd,id=node{node},size={share}M").into(),
                );
                add(
                    "-numa",
                    format!("node,nodeid={node},memdev=node{node}{cpus}").into(),
                );
            }
        }
        if let Some(swap) = swap {
            // Comma is the one character that QEMU wants to have doubled.
            let file = swap.to_string_lossy().replace(',', ",,");
            let mut drive = format!("if=none,id=swap,format=raw,cache=unsafe,file={file}");
            if let Some(iops) = self.swap_iops {
                drive += &format!(",throttling.iops-total={iops}");
            }
            add("-drive", drive.into());
            add("-device", "virtio-blk-pci,drive=swap".into());
        }
        arguments.extend(self.qemu_arguments.iter().cloned());
        let mut add = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        add("-kernel", parts.kernel.clone().into());
        add("-initrd", initramfs.into());
        add("-append", self.kernel_command_line().into());
        arguments
    }

    fn kernel_command_line(&self) -> String {
        let mut words = vec![
            "console=ttyS1",
            "quiet",
            // A panic ends the VM (with -no-reboot), and the test with it.
            "panic=-1",
            // The first file system in memory without a limit, and never swapped out.
            "rootfstype=ramfs",
            "cgroup_no_v1=all",
            "psi=1",
            // This host has nothing to protect, and emulation is slow enough.
            "mitigations=off",
            // An emulated timer that comes late on a busy machine is no broken one.
            "no_timer_check",
        ];
        if self.swap_mib > 0 {
            words.push("aerostat.swap");
        }
        words.extend(self.kernel_arguments.iter().map(String::as_str));
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_node_has_memory_and_processors() {
        let parts = HostVmPrerequisites {
            qemu: "qemu".into(),
            kernel: "/vmlinuz".into(),
            drivers: "/drivers".into(),
            busybox: "/busybox".into(),
            setpriv: "/setpriv".into(),
        };
        let config = HostVmConfig::new().nodes(2).cpus(4).hugepages_2m(7);

        let line = config
            .arguments(&parts, Accelerator::Tcg, Path::new("/i"), None)
            .join(" ".as_ref());
        let line = line.to_string_lossy();

        assert!(
            line.contains("-numa node,nodeid=1,memdev=node1,cpus=1,cpus=3"),
            "{line}"
        );
        assert!(line.contains("id=node1,size=512M"), "{line}");
        assert!(line.ends_with("hugepagesz=2M hugepages=7"), "{line}");
        assert!(!line.contains("virtio-blk"), "{line}");
    }
}
