//! A running guest.

use std::{
    ops::{Deref, DerefMut},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Child,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags};

use super::{GuestError, Prerequisites, Shell, UmlConfig, console::Console, initramfs, launch};
use crate::artifacts;

/// How long the host may take to tear the guest's processes down: it frees their memory.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// How often a condition is looked at again.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A guest that has booted. It ends when this value is dropped, and no later than the thread that
/// started it.
#[derive(Debug)]
pub struct UmlGuest {
    config: UmlConfig,
    running: Running,
}

/// The processes of one power cycle.
#[derive(Debug)]
struct Running {
    process: Child,
    shell: Shell,
    host_memory: HostMemoryGauge,
    _ram: tempfile::TempDir,
}

/// What a guest costs its host: the blocks in use on the tmpfs of its memory.
#[derive(Clone, Debug)]
pub struct HostMemoryGauge {
    mount: Arc<OwnedFd>,
    path: PathBuf,
}

impl HostMemoryGauge {
    /// The figure now.
    ///
    /// # Errors
    /// The file system cannot be asked.
    pub fn read_bytes(&self) -> Result<u64, GuestError> {
        let figures = rustix::fs::fstatvfs(&self.mount)
            .map_err(|error| GuestError::io("asking", &self.path)(error.into()))?;
        Ok((figures.f_blocks - figures.f_bfree) * figures.f_frsize)
    }

    /// Allocates every page of the guest's memory: the end of its file, behind the kernel and a gap as
    /// large as the host's address layout made it. The file has no name any more, so it is opened
    /// through a process that has it.
    fn populate(&self, memory_bytes: u64) -> Result<(), GuestError> {
        let failed = |error: rustix::io::Errno| GuestError::io("filling", &self.path)(error.into());
        let device = rustix::fs::fstat(&self.mount).map_err(failed)?.st_dev;
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            // Other users' processes, and those that are ending, have none that can be looked at.
            let files = std::fs::read_dir(process.path().join("fd"));
            for file in files.into_iter().flatten().flatten() {
                let Ok(kind) = rustix::fs::stat(file.path()) else {
                    continue;
                };
                if kind.st_dev == device && FileType::from_raw_mode(kind.st_mode).is_file() {
                    let memory = rustix::fs::open(file.path(), OFlags::RDWR, Mode::empty());
                    let memory = memory.map_err(failed)?;
                    let length = u64::try_from(kind.st_size).unwrap_or(0);
                    let start = length.saturating_sub(memory_bytes);
                    let flags = FallocateFlags::empty();
                    return rustix::fs::fallocate(&memory, flags, start, length - start)
                        .map_err(failed);
                }
            }
        }
        Err(failed(rustix::io::Errno::NOENT))
    }
}

impl UmlGuest {
    /// Boots a guest and waits until it takes commands.
    ///
    /// # Errors
    /// Something is not installed, or the guest does not come up in time; the error then holds the
    /// end of its console log.
    pub fn boot(config: &UmlConfig) -> Result<Self, GuestError> {
        Ok(Self {
            config: config.clone(),
            running: Running::start(config)?,
        })
    }

    /// Looks at a condition until it is true. `probe` returns whether it is, and a description of
    /// what it saw for the error message.
    ///
    /// # Errors
    /// The condition did not come true in time, or looking at it failed.
    pub fn wait_for(
        &mut self,
        what: &str,
        patience: Duration,
        mut probe: impl FnMut(&mut Self) -> Result<(bool, String), GuestError>,
    ) -> Result<(), GuestError> {
        let deadline = Instant::now() + patience;
        loop {
            let (done, last) = probe(self)?;
            if done {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(GuestError::Condition {
                    what: what.to_owned(),
                    waited: patience,
                    last,
                });
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Memory that the guest occupies on the host.
    ///
    /// # Errors
    /// The file system cannot be asked.
    pub fn host_memory_bytes(&self) -> Result<u64, GuestError> {
        self.running.host_memory.read_bytes()
    }

    /// A gauge of the same figure that another thread can read, until the next power cycle.
    #[must_use]
    pub fn host_memory_gauge(&self) -> HostMemoryGauge {
        self.running.host_memory.clone()
    }

    /// Has the host allocate all of the guest's memory, as if the guest had written to each page. What a
    /// balloon then frees does not depend on which pages the guest happens to pick.
    ///
    /// # Errors
    /// The file of the guest's memory cannot be found or filled.
    pub fn populate_host_memory(&self) -> Result<(), GuestError> {
        self.running
            .host_memory
            .populate(self.config.memory_mib << 20)
    }

    /// Reboots from inside: the guest's kernel starts again in the same host process, with new
    /// memory, and its devices are set up again.
    ///
    /// # Errors
    /// The guest does not come back in time.
    pub fn reboot(&mut self) -> Result<(), GuestError> {
        self.running.shell.console.send("reboot -f")?;
        self.running
            .shell
            .console
            .wait_until_ready(self.config.boot_timeout)
    }

    /// Ends the guest at once, without its knowledge, and boots it again with empty memory.
    ///
    /// # Errors
    /// As [`Self::boot`].
    pub fn power_cycle(&mut self) -> Result<(), GuestError> {
        let Running { process, shell, .. } = &mut self.running;
        end(process, shell);
        self.running = Running::start(&self.config)?;
        Ok(())
    }

    /// Switches the guest off from inside and waits until all its processes have ended.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn power_off(mut self) -> Result<(), GuestError> {
        self.running.shell.console.send("poweroff -f")?;
        if self.running.shell.console.wait_for_end(END_TIMEOUT) {
            return Ok(());
        }
        Err(GuestError::Timeout {
            command: "poweroff -f".to_owned(),
            waited: END_TIMEOUT,
            console: self.running.shell.console.log().tail(),
        })
    }

    /// Whether the guest's processes are still there.
    pub fn is_running(&mut self) -> bool {
        matches!(self.running.process.try_wait(), Ok(None))
    }

    /// What the guest was started with.
    #[must_use]
    pub fn config(&self) -> &UmlConfig {
        &self.config
    }
}

impl Deref for UmlGuest {
    type Target = Shell;

    fn deref(&self) -> &Shell {
        &self.running.shell
    }
}

impl DerefMut for UmlGuest {
    fn deref_mut(&mut self) -> &mut Shell {
        &mut self.running.shell
    }
}

impl Running {
    fn start(config: &UmlConfig) -> Result<Self, GuestError> {
        let parts = Prerequisites::find()?;
        let initramfs = initramfs::build(&parts, &artifacts::directory().join("guest"))?;
        let ram = tempfile::Builder::new()
            .prefix("aerostat-guest-")
            .tempdir()
            .map_err(GuestError::io(
                "making a directory in",
                std::env::temp_dir(),
            ))?;
        let mut process = launch::start(&parts, config, &initramfs, ram.path())?;
        let streams = (
            process.stdin.take(),
            process.stdout.take(),
            process.stderr.take(),
        );
        let (Some(input), Some(output), Some(errors)) = streams else {
            unreachable!("all three streams were asked for");
        };
        let mut shell = Shell::new(Console::new(input, output, errors));
        let booted = shell
            .console
            .wait_until_ready(config.boot_timeout)
            .and_then(|()| open_mount(&process, ram.path()));
        match booted {
            Ok(host_memory) => Ok(Self {
                process,
                shell,
                host_memory,
                _ram: ram,
            }),
            Err(error) => {
                end(&mut process, &mut shell);
                Err(error)
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.process, &mut self.shell);
    }
}

/// Opens the guest's tmpfs, which only its own namespace sees, through one of its processes.
fn open_mount(process: &Child, ram: &Path) -> Result<HostMemoryGauge, GuestError> {
    let inside = ram.strip_prefix("/").unwrap_or(ram);
    let path = PathBuf::from(format!("/proc/{}/root", process.id())).join(inside);
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::PATH;
    let mount = rustix::fs::open(&path, flags, Mode::empty())
        .map_err(|error| GuestError::io("opening", &path)(error.into()))?;
    Ok(HostMemoryGauge {
        mount: Arc::new(mount),
        path,
    })
}

/// Kills the guest. The process known here is the one that made the namespaces; its death takes the
/// first process inside along, and with that one all others.
fn end(process: &mut Child, shell: &mut Shell) {
    // Failure means that it has ended already.
    let _ = process.kill();
    let _ = process.wait();
    shell.console.wait_for_end(END_TIMEOUT);
}
