//! A running machine.

use std::{
    collections::BTreeMap,
    env, fs,
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::{
    Backing, Balloon, MachineConfig, Monitor,
    config::{BALLOON_PATH, Files},
    initramfs,
};
use crate::{
    artifacts,
    guest::{GuestError, Shell, console::Console, prerequisites::skip_or_fail},
    host_vm::{HostVmPrerequisites, accelerator::Accelerator},
};
use serde_json::{Value, json};

/// How long QEMU may take to end once it was killed.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// A machine. It ends when this value is dropped, and no later than the thread that started it.
#[derive(Debug)]
pub struct Machine {
    process: Child,
    shell: Shell,
    /// QEMU's monitor.
    pub monitor: Monitor,
    config: MachineConfig,
    files: tempfile::TempDir,
}

/// What a machine needs on this host.
#[derive(Clone, Debug)]
pub struct MachinePrerequisites {
    host: HostVmPrerequisites,
    qemu: Program,
    accelerator: Accelerator,
}

/// A QEMU.
#[derive(Clone, Debug)]
struct Program {
    /// What to start, and its first arguments.
    words: Vec<PathBuf>,
    /// Where it finds its libraries.
    environment: (&'static str, PathBuf),
    firmware: Vec<PathBuf>,
}

impl MachinePrerequisites {
    /// Looks for everything. `AEROSTAT_QEMU` names another QEMU, with its library beside it in `lib`.
    ///
    /// # Errors
    /// [`GuestError::Prerequisite`] names the first thing that is missing.
    pub fn find() -> Result<Self, GuestError> {
        let host = HostVmPrerequisites::find()?;
        let qemu = env::var_os("AEROSTAT_QEMU").map(PathBuf::from);
        let qemu = qemu
            .into_iter()
            .chain(
                artifacts::directory()
                    .ancestors()
                    .map(|directory| directory.join("qemu/qemu-system-x86_64")),
            )
            .find(|file| file.is_file())
            .ok_or_else(|| GuestError::Prerequisite {
                missing: "there is no target/qemu/qemu-system-x86_64".to_owned(),
                remedy: "build it with scripts/build-qemu",
            })?;
        let qemu = Program {
            environment: ("LD_LIBRARY_PATH", qemu.with_file_name("lib")),
            words: vec![qemu],
            firmware: ["/usr/share/qemu", "/usr/share/seabios"]
                .map(PathBuf::from)
                .into(),
        };
        let accelerator = Accelerator::find(&host);
        Ok(Self {
            host,
            qemu,
            accelerator,
        })
    }

    /// The same with a stock QEMU 11 (`scripts/stock-qemu`), which can have a device of a back-end over
    /// vhost-user.
    ///
    /// # Errors
    /// It cannot be fetched, or something else is missing.
    pub fn find_stock() -> Result<Self, GuestError> {
        let host = HostVmPrerequisites::find()?;
        let root = script("stock-qemu")?;
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let accelerator = Accelerator::find(&host);
        let qemu = Program {
            words: vec![
                libraries.join("ld-linux-x86-64.so.2"),
                "--library-path".into(),
                libraries.clone(),
                root.join("usr/bin/qemu-system-x86_64"),
            ],
            environment: ("QEMU_MODULE_DIR", libraries.join("qemu")),
            firmware: ["usr/share/qemu", "usr/share/seabios"]
                .map(|directory| root.join(directory))
                .into(),
        };
        Ok(Self {
            host,
            qemu,
            accelerator,
        })
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

    /// As [`Self::find_stock`], for tests.
    ///
    /// # Panics
    /// As [`Self::find_or_skip`].
    #[must_use]
    pub fn find_stock_or_skip(test: &str) -> Option<Self> {
        Self::find_stock()
            .map_err(|error| skip_or_fail(test, &error))
            .ok()
    }
}

impl Machine {
    /// Starts a machine, and waits until its guest takes commands, unless it is an incoming one.
    ///
    /// # Errors
    /// QEMU does not start, or the guest does not come up in time.
    pub fn start(parts: &MachinePrerequisites, config: &MachineConfig) -> Result<Self, GuestError> {
        let parent = artifacts::directory();
        let files = tempfile::Builder::new()
            .prefix("qemu-")
            .tempdir_in(&parent)
            .map_err(GuestError::io("making a directory in", parent))?;
        let initramfs = files.path().join("initramfs.cpio");
        let driver = match config.balloon {
            Balloon::Memballoon => Some(script("guest-driver")?),
            _ => None,
        };
        let archive = initramfs::build(
            &parts.host,
            config.balloon,
            &config.programs,
            driver.as_deref(),
        )?;
        fs::write(&initramfs, archive).map_err(GuestError::io("writing", &initramfs))?;
        let command_line = config.command_line(
            parts.accelerator.arguments(),
            &Files {
                kernel: &parts.host.kernel,
                initramfs: &initramfs,
                monitor: Path::new("monitor"),
                firmware: &parts.qemu.firmware,
            },
        );
        // QEMU ends with the thread that started it, whatever becomes of that.
        let mut process = Command::new(&parts.host.setpriv)
            .args(["--pdeathsig", "KILL", "--"])
            .args(&parts.qemu.words)
            .args(command_line)
            .env(parts.qemu.environment.0, &parts.qemu.environment.1)
            .current_dir(files.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(GuestError::io("starting", &parts.host.setpriv))?;
        let streams = (
            process.stdin.take(),
            process.stdout.take(),
            process.stderr.take(),
        );
        let (Some(input), Some(output), Some(errors)) = streams else {
            unreachable!("all three streams were asked for");
        };
        let mut shell = Shell::new(Console::new(input, output, errors));
        let started = if config.incoming {
            Ok(())
        } else {
            shell.console.wait_until_ready(config.boot_timeout)
        };
        let short = short_path(files.path(), &process);
        match started.and_then(|()| Monitor::connect(&short.join("monitor"))) {
            Ok(monitor) => Ok(Self {
                process,
                shell,
                monitor,
                config: config.clone(),
                files,
            }),
            Err(error) => {
                end(&mut process, &mut shell);
                Err(error)
            }
        }
    }

    /// What it was started with.
    #[must_use]
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// What QEMU and the guest's kernel said.
    #[must_use]
    pub fn log(&self) -> String {
        self.shell.console.log().text()
    }

    /// Asks for a balloon of this size.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn set_target_mib(&mut self, mib: u64) -> Result<(), GuestError> {
        let left = (self.config.memory_mib - mib) << 20;
        self.monitor
            .execute("balloon", json!({ "value": left }))
            .map(drop)
    }

    /// The balloon's size by the guest's own account.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn actual_mib(&mut self) -> Result<u64, GuestError> {
        let answer = self.monitor.execute("query-balloon", json!({}))?;
        let left = answer["actual"].as_u64().unwrap_or(0);
        Ok(self.config.memory_mib - (left >> 20))
    }

    /// The books of an aerostat balloon.
    ///
    /// # Errors
    /// QEMU is gone, or the device is another one.
    pub fn counters(&mut self) -> Result<Value, GuestError> {
        self.monitor.property(BALLOON_PATH, "counters")
    }

    /// What the guest's memory occupies on the host, as the kernel counts it: the blocks of its file,
    /// or the resident pages of its mapping.
    ///
    /// # Errors
    /// The files of the process cannot be read.
    pub fn host_memory_bytes(&self) -> Result<u64, GuestError> {
        let id = self.process.id();
        if self.config.backing == Backing::Anonymous {
            return resident_bytes(id, self.config.memory_mib << 20);
        }
        let directory = PathBuf::from(format!("/proc/{id}/fd"));
        let entries = fs::read_dir(&directory).map_err(GuestError::io("reading", &directory))?;
        for entry in entries.flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            if target.to_string_lossy().contains("memfd:memory-backend") {
                let file = fs::metadata(entry.path())
                    .map_err(GuestError::io("looking at", entry.path()))?;
                return Ok(std::os::unix::fs::MetadataExt::blocks(&file) * 512);
            }
        }
        Err(GuestError::Answer {
            command: directory.display().to_string(),
            output: "no memfd".to_owned(),
        })
    }

    /// Processor time of each thread so far, by its name; threads of one name are added up.
    ///
    /// # Errors
    /// The files of the process cannot be read.
    pub fn thread_times(&self) -> Result<BTreeMap<String, Duration>, GuestError> {
        let directory = PathBuf::from(format!("/proc/{}/task", self.process.id()));
        let entries = fs::read_dir(&directory).map_err(GuestError::io("reading", &directory))?;
        let mut times = BTreeMap::new();
        for entry in entries.flatten() {
            let read = |name: &str| fs::read_to_string(entry.path().join(name));
            // A thread that ended meanwhile took no time worth counting.
            let (Ok(name), Ok(ran)) = (read("comm"), read("schedstat")) else {
                continue;
            };
            let ns = ran
                .split_whitespace()
                .next()
                .and_then(|word| word.parse().ok());
            *times.entry(name.trim().to_owned()).or_default() +=
                Duration::from_nanos(ns.unwrap_or(0));
        }
        Ok(times)
    }

    /// Resets the machine, as its button would, and waits until its guest takes commands again.
    ///
    /// # Errors
    /// It does not come back in time.
    pub fn reset(&mut self) -> Result<(), GuestError> {
        self.monitor.execute("system_reset", json!({}))?;
        self.shell
            .console
            .wait_until_ready(self.config.boot_timeout)
    }

    /// Moves the guest to another machine, which was started as an incoming one, and ends this one.
    ///
    /// # Errors
    /// The migration fails, or takes longer than a minute.
    pub fn migrate(mut self, mut to: Self) -> Result<Self, GuestError> {
        let socket = to.short_path().join("migration");
        let uri = format!("unix:{}", socket.display());
        to.monitor
            .execute("migrate-incoming", json!({ "uri": uri }))?;
        self.monitor.execute("migrate", json!({ "uri": uri }))?;
        self.monitor.wait_for_migration()?;
        to.monitor.event("RESUME")?;
        Ok(to)
    }

    /// A directory of this machine's by a name that is short enough for a socket.
    #[must_use]
    pub fn short_path(&self) -> PathBuf {
        short_path(self.files.path(), &self.process)
    }
}

impl Deref for Machine {
    type Target = Shell;

    fn deref(&self) -> &Shell {
        &self.shell
    }
}

impl DerefMut for Machine {
    fn deref_mut(&mut self) -> &mut Shell {
        &mut self.shell
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        end(&mut self.process, &mut self.shell);
    }
}

/// Runs a script of this project that prints where something is that it made.
fn script(name: &str) -> Result<PathBuf, GuestError> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let script = repository.join("scripts").join(name);
    let output = Command::new(&script)
        .output()
        .map_err(GuestError::io("starting", &script))?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if output.status.success() {
        return Ok(repository.join(said));
    }
    Err(GuestError::Answer {
        command: script.display().to_string(),
        output: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn short_path(directory: &Path, process: &Child) -> PathBuf {
    // 108 bytes are the most that a socket's address holds.
    if directory.as_os_str().len() < 90 {
        return directory.to_owned();
    }
    PathBuf::from(format!("/proc/{}/cwd", process.id()))
}

fn end(process: &mut Child, shell: &mut Shell) {
    // Failure means that it has ended already.
    let _ = process.kill();
    let _ = process.wait();
    shell.console.wait_for_end(END_TIMEOUT);
}

/// Resident pages of the mapping that has this size.
fn resident_bytes(process: u32, bytes: u64) -> Result<u64, GuestError> {
    let file = PathBuf::from(format!("/proc/{process}/smaps"));
    let text = fs::read_to_string(&file).map_err(GuestError::io("reading", &file))?;
    let kib = |line: &str, name: &str| -> Option<u64> {
        let value = line.strip_prefix(name)?.trim().strip_suffix("kB")?;
        value.trim().parse().ok()
    };
    let mut of_guest = false;
    for line in text.lines() {
        if let Some(size) = kib(line, "Size:") {
            of_guest = size * 1024 == bytes;
        }
        if let Some(resident) = kib(line, "Rss:").filter(|_| of_guest) {
            return Ok(resident * 1024);
        }
    }
    Err(GuestError::Answer {
        command: file.display().to_string(),
        output: format!("no mapping of {bytes} bytes"),
    })
}
