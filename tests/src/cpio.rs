//! Archives in the "newc" form, which the Linux kernel unpacks as its first file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel).

use std::collections::BTreeSet;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive under construction. Names have no leading slash; the directories above a file are
/// made with it.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// Adds a file that may be executed.
    pub fn program(&mut self, name: &str, content: &[u8]) {
        self.directories_above(name);
        self.add(name, PROGRAM, (0, 0), content);
    }

    /// Adds a character device.
    pub fn character_device(&mut self, name: &str, number: (u32, u32)) {
        self.directories_above(name);
        self.add(name, CHARACTER_DEVICE, number, &[]);
    }

    /// The whole archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn directories_above(&mut self, name: &str) {
        for (end, _) in name.match_indices('/') {
            let directory = &name[..end];
            if self.directories.insert(directory.to_owned()) {
                self.add(directory, DIRECTORY, (0, 0), &[]);
            }
        }
    }

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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_carry_their_sizes() {
        let mut archive = Archive::default();
        archive.program("ab", b"12345");
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

    #[test]
    fn directories_above_a_file_come_first_and_once() {
        let mut archive = Archive::default();
        archive.program("a/b/c", b"");
        archive.program("a/b/d", b"");
        let text = String::from_utf8_lossy(&archive.finish()).into_owned();

        let found = ["a\0", "a/b\0", "a/b/c\0", "a/b/d\0"].map(|name| text.find(name).unwrap());
        assert!(found.is_sorted(), "{found:?}");
        assert_eq!(text.matches("a/b\0").count(), 1);
    }
}
