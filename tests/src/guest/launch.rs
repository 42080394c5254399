//! Processes and mounts of one guest, made so that all of them end together with it.
//!
//! User-Mode Linux is a handful of host processes: the kernel and one for each address space of
//! the guest. They run in a process and a mount namespace of their own. The kernel of the host then
//! sees to it that nothing is left over: when the namespace's first process dies, everything in it
//! dies, the tmpfs of the guest's memory with it, and that process dies with the harness, even if
//! the harness is killed. Without root the namespaces are made inside a user namespace.

use std::{
    ffi::OsString,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::{GuestError, Prerequisites};

/// Virtio's device number of the traditional memory balloon.
const BALLOON_DEVICE_ID: u32 = 5;

/// Room on the tmpfs beside the guest's memory file and, for a moment after it rebooted, the one of before,
/// which its back-end still has: the kernel's run-time directory.
const SPARE_MIB: u64 = 64;

/// Runs inside the namespaces. The shell stays the first process there: it reaps what User-Mode
/// Linux leaves behind, and a first process that is not its own parent ignores signals that
/// User-Mode Linux sends itself.
const SCRIPT: &str = r#"
ram=$1 size=$2 group=$3
shift 3
[ -z "$group" ] || echo 0 >"$group/cgroup.procs" || exit 125
mount -t tmpfs -o "size=$size,mode=700" aerostat-guest "$ram" || exit 125
export TMPDIR="$ram" HOME="$ram"
"$@"
exit $?
"#;

/// How a guest is to be started.
#[derive(Clone, Debug)]
pub struct UmlConfig {
    /// Size of the guest's memory.
    pub memory_mib: u64,
    /// Sockets of vhost-user balloon devices; may be empty.
    pub balloon_sockets: Vec<PathBuf>,
    /// Further words for the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// The processor that the guest is confined to, if it is.
    pub cpu: Option<u32>,
    /// The cgroup that pays for the guest, if it has one.
    pub cgroup: Option<PathBuf>,
    /// How long the guest may take until it accepts commands.
    pub boot_timeout: Duration,
}

impl UmlConfig {
    /// A guest of this size without any device.
    #[must_use]
    pub fn new(memory_mib: u64) -> Self {
        Self {
            memory_mib,
            balloon_sockets: Vec::new(),
            kernel_arguments: Vec::new(),
            cpu: None,
            cgroup: None,
            boot_timeout: Duration::from_secs(60),
        }
    }

    /// Adds a balloon device behind a vhost-user socket.
    #[must_use]
    pub fn balloon(mut self, socket: &Path) -> Self {
        self.balloon_sockets.push(socket.to_owned());
        self
    }

    /// Keeps the guest from reporting unused memory, so that the balloon alone gives memory back.
    #[must_use]
    pub fn without_reporting(self) -> Self {
        self.kernel_argument("aerostat.reporting=off")
    }

    /// Confines the guest to a processor. Its kernel and its programs are processes that wait for each
    /// other all the time; on an emulated host, waking another processor up is what costs most.
    #[must_use]
    pub fn on_cpu(mut self, cpu: u32) -> Self {
        self.cpu = Some(cpu);
        self
    }

    /// Puts the guest's processes, and so its memory, into a cgroup that exists.
    #[must_use]
    pub fn in_cgroup(mut self, directory: &Path) -> Self {
        self.cgroup = Some(directory.to_owned());
        self
    }

    /// Changes how long the guest may take until it accepts commands.
    #[must_use]
    pub fn boot_timeout(mut self, timeout: Duration) -> Self {
        self.boot_timeout = timeout;
        self
    }

    /// Adds a word to the kernel's command line.
    #[must_use]
    pub fn kernel_argument(mut self, argument: &str) -> Self {
        self.kernel_arguments.push(argument.to_owned());
        self
    }

    fn kernel_command_line(&self, initramfs: &Path) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec![
            format!("mem={}M", self.memory_mib).into(),
            joined("initrd=", initramfs, ""),
            // Kernel messages go to standard error; the first serial line carries the commands.
            "con=null".into(),
            "con0=null,fd:2".into(),
            "ssl=null".into(),
            "ssl0=fd:0,fd:1".into(),
            "umid=guest".into(),
            // Hundreds of terminals of the old kind that nobody opens take most of a slow boot.
            "pty.legacy_count=0".into(),
            // A guest that panics ends at once instead of waiting for its time-out.
            "panic=-1".into(),
        ];
        for socket in &self.balloon_sockets {
            let suffix = format!(":{BALLOON_DEVICE_ID}");
            words.push(joined("virtio_uml.device=", socket, &suffix));
        }
        words.extend(self.kernel_arguments.iter().map(OsString::from));
        words
    }
}

fn joined(prefix: &str, path: &Path, suffix: &str) -> OsString {
    let mut word = OsString::from(prefix);
    word.push(path);
    word.push(suffix);
    word
}

/// A command to which the program to be run inside the namespaces is to be added.
pub(super) fn in_namespaces(setpriv: &Path, unshare: &Path) -> Command {
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", "KILL", "--"]).arg(unshare);
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args([
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--",
    ]);
    command
}

/// Starts the guest's processes; `ram` is an empty directory for its memory.
///
/// The guest ends when the *thread* that called this ends (prctl(2), `PR_SET_PDEATHSIG`).
///
/// # Errors
/// A program cannot be started.
pub(super) fn start(
    parts: &Prerequisites,
    config: &UmlConfig,
    initramfs: &Path,
    ram: &Path,
) -> Result<Child, GuestError> {
    let mut command = in_namespaces(&parts.setpriv, &parts.unshare);
    command
        .args(["/bin/sh", "-c", SCRIPT, "aerostat-guest"])
        .arg(ram)
        .arg(format!("{}M", 2 * config.memory_mib + SPARE_MIB))
        .arg(config.cgroup.as_deref().unwrap_or(Path::new("")));
    if let Some(cpu) = config.cpu {
        command.args(["taskset", "-c", &cpu.to_string()]);
    }
    command
        .arg(&parts.kernel)
        .args(config.kernel_command_line(initramfs))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
        .spawn()
        .map_err(GuestError::io("starting", &parts.setpriv))
}

/// The kernel command line as one string, for error messages and the demo.
#[must_use]
pub fn describe(config: &UmlConfig, initramfs: &Path) -> String {
    config
        .kernel_command_line(initramfs)
        .iter()
        .fold("linux".to_owned(), |mut line, word| {
            // Writing to a string cannot fail.
            let _ = write!(line, " {}", word.to_string_lossy());
            line
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_balloon_becomes_a_device_of_the_command_line() {
        let config = UmlConfig::new(512)
            .balloon(Path::new("/run/a.sock"))
            .balloon(Path::new("/run/b.sock"))
            .kernel_argument("page_poison=1");

        let line = describe(&config, Path::new("/i.cpio"));

        assert!(line.starts_with("linux mem=512M initrd=/i.cpio "), "{line}");
        assert!(
            line.ends_with(
                "virtio_uml.device=/run/a.sock:5 virtio_uml.device=/run/b.sock:5 page_poison=1"
            ),
            "{line}"
        );
    }
}
