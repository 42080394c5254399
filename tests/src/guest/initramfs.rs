//! The guest's file system: busybox, the stock driver and `tests/guest/init`, as an initramfs.
//!
//! It is built when something it is made of has changed, and kept.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{GuestError, Prerequisites};
use crate::cpio::Archive;

const INIT: &str = include_str!("../../guest/init");

/// Builds the initramfs in `directory`, or finds that the one there is still right.
///
/// # Errors
/// A file cannot be read or written.
pub fn build(parts: &Prerequisites, directory: &Path) -> Result<PathBuf, GuestError> {
    let file = directory.join(format!("initramfs-{:016x}.cpio", fingerprint(parts)?));
    if file.is_file() {
        return Ok(file);
    }
    let busybox = read(&parts.busybox)?;
    let module = read(&parts.balloon_module)?;

    let mut archive = Archive::default();
    // The kernel opens its console before init can mount anything.
    archive.character_device("dev/console", (5, 1));
    archive.program("bin/busybox", &busybox);
    archive.program("lib/modules/virtio_balloon.ko", &module);
    archive.program("init", INIT.as_bytes());
    let image = archive.finish();

    fs::create_dir_all(directory).map_err(GuestError::io("creating", directory))?;
    // Tests run at the same time: each writes its own file, and the last rename wins.
    let partial = tempfile::NamedTempFile::new_in(directory)
        .map_err(GuestError::io("creating a file in", directory))?;
    fs::write(partial.path(), image).map_err(GuestError::io("writing", partial.path()))?;
    partial
        .persist(&file)
        .map_err(|error| GuestError::io("renaming to", &file)(error.error))?;
    Ok(file)
}

/// Changes when one of the parts changes (FNV-1a over the script and the files' sizes and times).
fn fingerprint(parts: &Prerequisites) -> Result<u64, GuestError> {
    let mut text = INIT.to_owned();
    for file in [&parts.busybox, &parts.balloon_module] {
        let metadata = fs::metadata(file).map_err(GuestError::io("looking at", file))?;
        let modified = metadata
            .modified()
            .ok()
            .and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        text += &format!("{} {} {modified:?}", file.display(), metadata.len());
    }
    Ok(text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    }))
}

fn read(file: &Path) -> Result<Vec<u8>, GuestError> {
    fs::read(file).map_err(GuestError::io("reading", file))
}
