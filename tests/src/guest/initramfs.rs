//! The guest's file system: busybox, the stock driver and `tests/guest/init`, as an initramfs.
//!
//! Written in the "newc" form that Documentation/driver-api/early-userspace/buffer-format.rst of
//! the Linux kernel describes. It is built when something it is made of has changed, and kept.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{GuestError, Prerequisites};

const INIT: &str = include_str!("../../guest/init");

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

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
    for name in ["bin", "dev", "lib", "lib/modules"] {
        archive.add(name, DIRECTORY, (0, 0), &[]);
    }
    // The kernel opens its console before init can mount anything.
    archive.add("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    archive.add("bin/busybox", PROGRAM, (0, 0), &busybox);
    archive.add("lib/modules/virtio_balloon.ko", PROGRAM, (0, 0), &module);
    archive.add("init", PROGRAM, (0, 0), INIT.as_bytes());
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

/// A newc archive under construction.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        let header = [
            self.entries, // inode
            mode,
            0, // user
            0, // group
            links,
            0, // modification time
            length(content.len()),
            0, // device that holds the file
            0,
            device.0,
            device.1,
            length(name.len() + 1),
            0, // checksum, unused in this form
        ];
        self.bytes.extend(b"070701");
        for field in header {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    /// Names and contents both start on a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_carry_their_sizes() {
        let mut archive = Archive::default();
        archive.add("ab", PROGRAM, (0, 0), b"12345");
        let bytes = archive.finish();

        let field = |index: usize| &bytes[6 + 8 * index..14 + 8 * index];
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(field(1), format!("{PROGRAM:08x}").as_bytes());
        assert_eq!(field(6), b"00000005");
        assert_eq!(field(11), b"00000003");
        // 110 bytes of header, 3 of name, padded to 116; 5 of content, padded to 124.
        assert_eq!(&bytes[110..113], b"ab\0");
        assert_eq!(&bytes[116..121], b"12345");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(bytes.len() % 4, 0);
    }
}
