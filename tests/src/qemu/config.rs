//! What a machine is like.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

/// The balloon device of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balloon {
    /// That of this project, linked into QEMU.
    Aerostat,
    /// This project's memory balloon, device ID 13, with the reference driver.
    Memballoon,
    /// QEMU's own.
    Virtio,
    /// VMware's, answered by this project at a port, in a machine that looks like VMware's to its guest.
    Vmware,
    /// The back-end's, over vhost-user: [`MachineConfig::vhost_user`].
    VhostUser,
}

/// What is behind the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A memfd, shared.
    Memfd,
    /// A memfd of huge pages of 2 MiB, shared.
    Hugetlb,
}

/// How a machine is to be started.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    pub(super) memory_mib: u64,
    pub(super) cpus: u32,
    pub(super) nodes: u32,
    pub(super) backing: Backing,
    pub(super) balloon: Balloon,
    pub(super) socket: PathBuf,
    pub(super) packed: bool,
    pub(super) reporting: bool,
    pub(super) options: Vec<String>,
    pub(super) kernel_arguments: Vec<String>,
    pub(super) arguments: Vec<String>,
    pub(super) programs: Vec<PathBuf>,
    pub(super) incoming: bool,
    pub(super) boot_timeout: Duration,
}

/// The name by which QMP knows the balloon.
pub const BALLOON_PATH: &str = "/machine/peripheral/balloon";

impl MachineConfig {
    /// A machine with this much memory, one processor, and a balloon on split rings. Its guest does not
    /// report unused memory.
    #[must_use]
    pub fn new(memory_mib: u64, balloon: Balloon) -> Self {
        Self {
            memory_mib,
            cpus: 1,
            nodes: 1,
            backing: Backing::Anonymous,
            balloon,
            socket: PathBuf::new(),
            packed: false,
            reporting: false,
            options: Vec::new(),
            kernel_arguments: Vec::new(),
            arguments: Vec::new(),
            programs: Vec::new(),
            incoming: false,
            boot_timeout: Duration::from_secs(240),
        }
    }

    /// A machine whose balloon is that of a back-end at this socket. Its memory is a memfd.
    #[must_use]
    pub fn vhost_user(memory_mib: u64, socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            ..Self::new(memory_mib, Balloon::VhostUser).backing(Backing::Memfd)
        }
    }

    /// The guest's memory, in MiB.
    #[must_use]
    pub fn memory_mib(&self) -> u64 {
        self.memory_mib
    }

    /// What is behind the guest's memory.
    #[must_use]
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Processors of the guest.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// NUMA nodes of the guest, of equal size.
    #[must_use]
    pub fn nodes(mut self, nodes: u32) -> Self {
        self.nodes = nodes;
        self
    }

    /// Packed rings.
    #[must_use]
    pub fn packed(mut self) -> Self {
        self.packed = true;
        self
    }

    /// The guest reports memory that it does not use.
    #[must_use]
    pub fn reporting(mut self) -> Self {
        self.reporting = true;
        self
    }

    /// Adds `name=value` to the balloon device.
    #[must_use]
    pub fn option(mut self, option: &str) -> Self {
        self.options.push(option.to_owned());
        self
    }

    /// Adds a word to the kernel's command line.
    #[must_use]
    pub fn kernel_argument(mut self, word: &str) -> Self {
        self.kernel_arguments.push(word.to_owned());
        self
    }

    /// Adds words to QEMU's command line.
    #[must_use]
    pub fn arguments(mut self, words: &[&str]) -> Self {
        self.arguments
            .extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    /// Adds a program to the guest; it must not need shared libraries.
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        self.programs.push(program.to_owned());
        self
    }

    /// The machine waits for the state of another one.
    #[must_use]
    pub fn incoming(mut self) -> Self {
        self.incoming = true;
        self
    }

    pub(super) fn command_line(
        &self,
        accelerator: [(&str, &str); 2],
        files: &Files<'_>,
    ) -> Vec<OsString> {
        let mut words: Vec<OsString> = [
            "-nodefaults",
            "-no-user-config",
            // Threads have names, by which their processor time is told apart.
            "-name",
            "guest,debug-threads=on",
            "-display",
            "none",
            // Commands on the first serial line, the kernel's messages on the second.
            "-chardev",
            "stdio,id=commands,signal=off",
            "-serial",
            "chardev:commands",
            "-chardev",
            "file,id=log,path=/dev/stderr",
            "-serial",
            "chardev:log",
        ]
        .map(OsString::from)
        .into();
        let mut add = |name: &str, value: OsString| words.extend([name.into(), value]);
        // What makes Linux look for VMware's port: no other hypervisor, and a serial number.
        let vmware = self.balloon == Balloon::Vmware;
        for (name, value) in accelerator {
            let hide = name == "-cpu" && vmware;
            add(
                name,
                format!("{value}{}", if hide { ",-hypervisor" } else { "" }).into(),
            );
        }
        let mut machine = "q35".to_owned();
        if vmware {
            machine += ",vmport=on";
            add("-smbios", "type=1,serial=VMware-1".into());
        }
        if self.nodes == 1 {
            machine += ",memory-backend=ram0";
        }
        add("-machine", machine.into());
        add("-smp", self.cpus.to_string().into());
        add("-m", format!("{}M", self.memory_mib).into());
        let kind = match self.backing {
            Backing::Anonymous => "memory-backend-ram",
            Backing::Memfd => "memory-backend-memfd,share=on",
            Backing::Hugetlb => "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
        };
        for node in 0..self.nodes {
            let mib = self.memory_mib / u64::from(self.nodes);
            add("-object", format!("{kind},id=ram{node},size={mib}M").into());
            if self.nodes > 1 {
                add(
                    "-numa",
                    format!("node,nodeid={node},memdev=ram{node}").into(),
                );
            }
        }
        for directory in files.firmware {
            add("-L", directory.into());
        }
        if self.balloon == Balloon::VhostUser {
            let mut channel = OsString::from("socket,id=balloon-channel,path=");
            channel.push(&self.socket);
            add("-chardev", channel);
        }
        add("-device", self.device().into());
        let mut monitor = OsString::from("unix:");
        monitor.push(files.monitor);
        monitor.push(",server=on,wait=off");
        add("-qmp", monitor);
        add("-kernel", files.kernel.into());
        add("-initrd", files.initramfs.into());
        add("-append", self.kernel_command_line().into());
        if self.incoming {
            add("-incoming", "defer".into());
        }
        words.extend(self.arguments.iter().map(OsString::from));
        words
    }

    fn device(&self) -> String {
        let name = match self.balloon {
            Balloon::Aerostat => "aerostat-balloon-pci",
            Balloon::Memballoon => "aerostat-memballoon-pci",
            Balloon::Virtio => "virtio-balloon-pci",
            Balloon::Vmware => "aerostat-vmware-balloon",
            Balloon::VhostUser => "vhost-user-test-device-pci",
        };
        let switch = |on: bool| if on { "on" } else { "off" };
        let mut device = format!("{name},id=balloon");
        if self.balloon != Balloon::Vmware {
            device += &format!(",packed={}", switch(self.packed));
        }
        if matches!(self.balloon, Balloon::Aerostat | Balloon::Virtio) {
            let reporting = switch(self.reporting);
            device += &format!(",disable-legacy=on,free-page-reporting={reporting}");
        }
        if self.balloon == Balloon::VhostUser {
            device += ",chardev=balloon-channel,virtio-id=5,num_vqs=5,config_size=16";
        }
        for option in &self.options {
            device += &format!(",{option}");
        }
        device
    }

    fn kernel_command_line(&self) -> String {
        // A guest that panics is a guest that does not answer: its last words are in the log.
        let mut words = vec!["console=ttyS1", "quiet", "panic=-1"];
        words.extend(self.kernel_arguments.iter().map(String::as_str));
        words.join(" ")
    }
}

/// Files of a command line.
pub(super) struct Files<'a> {
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    pub(super) monitor: &'a Path,
    /// Directories of firmware.
    pub(super) firmware: &'a [PathBuf],
}
