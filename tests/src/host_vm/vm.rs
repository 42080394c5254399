//! A running host.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::{HostVmConfig, HostVmPrerequisites, accelerator::Accelerator, files};
use crate::{
    artifacts,
    guest::{
        GuestError,
        console::{Console, ConsoleLog},
    },
};

/// How long a shell command may take: emulation is slow, and the machine may be busy.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);

/// How long QEMU may take to end once it was killed.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// A host that has booted. It ends when this value is dropped, and no later than the thread that
/// started it.
#[derive(Debug)]
pub struct HostVm {
    process: Child,
    console: Console,
    accelerator: Accelerator,
    booted_in: Duration,
    /// The disk for swap space and the initramfs live as long as QEMU may read them.
    _files: tempfile::TempDir,
}

impl HostVm {
    pub(super) fn boot(config: &HostVmConfig) -> Result<Self, GuestError> {
        let parts = HostVmPrerequisites::find()?;
        Self::boot_with(config, &parts, Accelerator::find(&parts))
    }

    pub(super) fn boot_with(
        config: &HostVmConfig,
        parts: &HostVmPrerequisites,
        accelerator: Accelerator,
    ) -> Result<Self, GuestError> {
        let parent = artifacts::directory();
        let directory = tempfile::Builder::new()
            .prefix("host-vm-")
            .tempdir_in(&parent)
            .map_err(GuestError::io("making a directory in", parent))?;
        let initramfs = directory.path().join("initramfs.cpio");
        std::fs::write(&initramfs, files::initramfs(parts, &config.all_files()?)?)
            .map_err(GuestError::io("writing", &initramfs))?;
        let swap = match config.swap_bytes() {
            Some(bytes) => {
                let file = directory.path().join("swap");
                File::create(&file)
                    .and_then(|made| made.set_len(bytes))
                    .map_err(GuestError::io("making", &file))?;
                Some(file)
            }
            None => None,
        };
        let begin = Instant::now();
        // QEMU ends with the thread that started it, whatever becomes of that.
        let mut process = Command::new(&parts.setpriv)
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&parts.qemu)
            .args(config.arguments(parts, accelerator, &initramfs, swap.as_deref()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(GuestError::io("starting", &parts.setpriv))?;
        let streams = (
            process.stdin.take(),
            process.stdout.take(),
            process.stderr.take(),
        );
        let (Some(input), Some(output), Some(errors)) = streams else {
            unreachable!("all three streams were asked for");
        };
        let mut vm = Self {
            process,
            console: Console::new(input, output, errors),
            accelerator,
            booted_in: Duration::ZERO,
            _files: directory,
        };
        vm.console.wait_until_ready(config.boot_timeout)?;
        vm.booted_in = begin.elapsed();
        Ok(vm)
    }

    /// Runs a shell command and returns what it wrote.
    ///
    /// # Errors
    /// It failed, took longer than two minutes, or the host ended.
    pub fn run(&mut self, command: &str) -> Result<String, GuestError> {
        self.run_within(command, COMMAND_TIMEOUT)
    }

    /// As [`Self::run`], with another time-out.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_within(&mut self, command: &str, patience: Duration) -> Result<String, GuestError> {
        self.console.run(command, patience)
    }

    /// Runs a program that was carried, by its path outside, and hands over each line of its output
    /// as it comes.
    ///
    /// # Errors
    /// As [`Self::run`]; the program's exit status is that of [`GuestError::Command`].
    pub fn run_program(
        &mut self,
        program: &Path,
        arguments: &[&str],
        patience: Duration,
        each_line: impl FnMut(&str),
    ) -> Result<String, GuestError> {
        // Quotes for a shell: whatever is inside single ones stays as it is.
        let quoted = |word: &str| format!("'{}'", word.replace('\'', r"'\''"));
        let program = program.to_string_lossy();
        let words = std::iter::once(program.as_ref()).chain(arguments.iter().copied());
        let command: Vec<String> = words.map(quoted).collect();
        self.console
            .run_watched(&command.join(" "), patience, each_line)
    }

    /// What the kernel said so far.
    #[must_use]
    pub fn console_log(&self) -> &ConsoleLog {
        self.console.log()
    }

    /// Whether KVM runs it.
    #[must_use]
    pub fn has_kvm(&self) -> bool {
        self.accelerator == Accelerator::Kvm
    }

    /// How long it took until it accepted commands.
    #[must_use]
    pub fn booted_in(&self) -> Duration {
        self.booted_in
    }
}

impl Drop for HostVm {
    fn drop(&mut self) {
        // Failure means that it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
        self.console.wait_for_end(END_TIMEOUT);
    }
}

/// Boots a host and runs tests of the calling test program in it, one after the other: those whose names
/// contain one of `filters`, ignored or not. Their output is shown as it comes.
///
/// A machine without what a host VM needs skips them and says why, but not where the project's checks
/// run (`CI=true`).
///
/// # Panics
/// A test fails, or there is none; the host does not boot, or takes too long.
#[expect(clippy::panic, reason = "this is how a test fails")]
pub fn run_tests(config: &HostVmConfig, filters: &[&str]) {
    let name = filters.join(" ");
    if HostVmPrerequisites::find_or_skip(&name).is_none() {
        return;
    }
    let program = std::env::current_exe().unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut vm = config
        .clone()
        .carry(&program)
        .boot()
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let by = if vm.has_kvm() { "KVM" } else { "emulation" };
    println!(
        "host VM ({by}) up after {:.1} s",
        vm.booted_in().as_secs_f64()
    );
    let program = program.to_string_lossy();
    // Inside, nothing may be skipped.
    let mut arguments = vec!["CI=true", "RUST_BACKTRACE=1", &program];
    arguments.extend(["--include-ignored", "--nocapture", "--test-threads=1"]);
    arguments.extend(filters);
    let begin = Instant::now();
    let watch = |line: &str| {
        println!("{line}");
        // A long run can be followed with --nocapture.
        let _ = std::io::stdout().flush();
    };
    let ran = vm.run_program(Path::new("env"), &arguments, config.patience, watch);
    println!(
        "tests in the host VM took {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    match ran {
        Ok(output) if output.contains("test result: ok. 0 passed") => {
            panic!("no test is called {name}")
        }
        Ok(_) => {}
        Err(GuestError::Command { status, .. }) => {
            panic!("tests in the host VM ended with status {status}; their output is above")
        }
        Err(error) => panic!("{name}: {error}"),
    }
}
