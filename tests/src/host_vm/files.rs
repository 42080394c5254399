//! The host VM's file system: init, busybox, drivers, and whatever is carried, at its own path.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{HostVmPrerequisites, prerequisites::MODULES};
use crate::{cpio::Archive, guest::GuestError};

const INIT: &str = include_str!("../../host_vm/init");

/// Builds the initramfs with `files` and the shared libraries they need.
///
/// # Errors
/// A file cannot be read.
pub(super) fn initramfs(
    parts: &HostVmPrerequisites,
    files: &[PathBuf],
) -> Result<Vec<u8>, GuestError> {
    let mut archive = Archive::default();
    // The kernel opens its console before init can mount anything.
    archive.character_device("dev/console", (5, 1));
    archive.program("init", INIT.as_bytes());
    archive.program("bin/busybox", &read(&parts.busybox)?);
    for module in MODULES {
        let file = parts.drivers.join(module);
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.program(&format!("lib/modules/{name}"), &read(&file)?);
    }
    let mut carried = BTreeSet::new();
    for file in files {
        carried.insert(file.clone());
        carried.extend(shared_libraries(file)?);
    }
    for file in carried {
        let name = file.to_string_lossy();
        // A copy of busybox is in its place already.
        if name != "/bin/busybox" {
            archive.program(name.trim_start_matches('/'), &read(&file)?);
        }
    }
    Ok(archive.finish())
}

fn read(file: &Path) -> Result<Vec<u8>, GuestError> {
    fs::read(file).map_err(GuestError::io("reading", file))
}

/// The files that the dynamic linker would load for `file`, itself among them; none for a static
/// program or a file that is none.
fn shared_libraries(file: &Path) -> Result<Vec<PathBuf>, GuestError> {
    let output = Command::new("ldd")
        .arg(file)
        .output()
        .map_err(GuestError::io("asking ldd for the libraries of", file))?;
    if !output.status.success() {
        return Ok(Vec::new());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(libraries_in(&text))
}

/// Paths in the output of ldd(1): `name => /path (address)`, or `/path (address)`.
fn libraries_in(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            words.find(|word| word.starts_with('/')).map(PathBuf::from)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_of_a_program_are_found() {
        let text = "\tlinux-vdso.so.1 (0x7ffc)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        assert_eq!(
            libraries_in(text),
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
            .map(PathBuf::from)
        );
    }
}
