//! What a real guest needs on this machine, found once and reported in words a newcomer can act on.

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use super::{GuestError, launch};

/// Debian's packages for everything looked for here (`unshare` and `setpriv` are in util-linux).
pub const INSTALL: &str =
    "install it with: apt-get install user-mode-linux busybox-static util-linux";

/// What helps where namespaces are not allowed.
const ALLOW_NAMESPACES: &str =
    "run as root, in a container with CAP_SYS_ADMIN, or allow unprivileged user namespaces";

/// The files a guest is made of, on a host that lets it run.
#[derive(Clone, Debug)]
pub struct Prerequisites {
    /// The kernel: a program of this host.
    pub kernel: PathBuf,
    /// The stock driver that belongs to that kernel.
    pub balloon_module: PathBuf,
    /// The guest's only program.
    pub busybox: PathBuf,
    /// Makes the namespaces that the guest's processes and mounts live in.
    pub unshare: PathBuf,
    /// Ties the guest's life to the harness.
    pub setpriv: PathBuf,
}

impl Prerequisites {
    /// Looks for everything.
    ///
    /// # Errors
    /// [`GuestError::Prerequisite`] names the first thing that is missing.
    pub fn find() -> Result<Self, GuestError> {
        let found = Self {
            kernel: program("linux.uml").or_else(|_| program("linux"))?,
            balloon_module: balloon_module(Path::new("/usr/lib/uml/modules"))?,
            busybox: static_busybox()?,
            unshare: program("unshare")?,
            setpriv: program("setpriv")?,
        };
        found.check_namespaces()?;
        Ok(found)
    }

    fn check_namespaces(&self) -> Result<(), GuestError> {
        let probe = launch::in_namespaces(&self.setpriv, &self.unshare)
            .arg("true")
            .stdin(Stdio::null())
            .output()
            .map_err(GuestError::io("starting", &self.setpriv))?;
        if probe.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&probe.stderr).trim().to_owned();
        Err(GuestError::Prerequisite {
            missing: format!("namespaces of its own are not allowed ({said})"),
            remedy: ALLOW_NAMESPACES,
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
}

/// Says why a test cannot run. On a machine that runs the project's checks (`CI=true`) it fails.
#[expect(clippy::panic, reason = "this is how a test fails")]
pub(crate) fn skip_or_fail(test: &str, error: &GuestError) {
    if env::var("CI").is_ok_and(|value| value == "true") {
        panic!("{test}: {error}");
    }
    // The print macros are captured in a test that passes; this has to be seen.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {error}");
}

fn missing(what: String) -> GuestError {
    GuestError::Prerequisite {
        missing: what,
        remedy: INSTALL,
    }
}

pub(crate) fn program(name: &str) -> Result<PathBuf, GuestError> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/bin", "/bin", "/usr/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .ok_or_else(|| missing(format!("there is no program `{name}`")))
}

/// Debian installs one directory for the one kernel version that the package holds.
fn balloon_module(modules: &Path) -> Result<PathBuf, GuestError> {
    let versions = fs::read_dir(modules)
        .map_err(|_| missing(format!("there is no directory {}", modules.display())))?;
    versions
        .flatten()
        .map(|version| {
            version
                .path()
                .join("kernel/drivers/virtio/virtio_balloon.ko")
        })
        .find(|file| file.is_file())
        .ok_or_else(|| {
            missing(format!(
                "there is no virtio_balloon.ko in {}",
                modules.display()
            ))
        })
}

/// The guest has no shared libraries, so a busybox that needs any is of no use.
pub(crate) fn static_busybox() -> Result<PathBuf, GuestError> {
    let file = program("busybox")?;
    let image = fs::read(&file).map_err(GuestError::io("reading", &file))?;
    if names_an_interpreter(&image) {
        return Err(missing(format!(
            "{} needs shared libraries",
            file.display()
        )));
    }
    Ok(file)
}

/// Whether a 64-bit little-endian ELF file has a program header of type `PT_INTERP` (elf(5)).
fn names_an_interpreter(image: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let number = |offset: usize, bytes: usize| {
        let field = image.get(offset..offset.checked_add(bytes)?)?;
        field.iter().rev().try_fold(0, |value: usize, byte| {
            Some(value.checked_mul(256)? + usize::from(*byte))
        })
    };
    let interpreter = || {
        let (start, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        (0..count)
            .filter_map(|index| number(start.checked_add(index * size)?, 4))
            .any(|kind| kind == PT_INTERP as usize)
            .then_some(())
    };
    interpreter().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_told_from_others() {
        let this_test = fs::read(env::current_exe().unwrap()).unwrap();
        assert!(names_an_interpreter(&this_test));
        assert!(!names_an_interpreter(b"\x7fELF"));
        assert!(!names_an_interpreter(&[]));
    }
}
