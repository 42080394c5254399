//! What tests do with the guest's memory: fill it, look at it, and keep data that must survive.

use std::time::Duration;

use super::{GuestError, Shell};

/// Filling and hashing run at some hundred MiB a second; a busy machine is slower.
const BULK_TIMEOUT: Duration = Duration::from_secs(180);

const MIB: u64 = 1 << 20;

/// Memory that stays untouched when the rest is filled: with less, the out-of-memory killer ends
/// the program that fills.
const UNTOUCHED_BYTES: u64 = 6 * MIB;
/// Of large guests, one part in so many: their kernels keep more for themselves.
const UNTOUCHED_SHARE: u64 = 64;

/// What the kernel keeps for emergencies meanwhile; its default grows with the size of the guest.
const FILL_RESERVE_KIB: &str = "1024";

/// A file in memory has an index, of 9 bytes for each page of 4 KiB and a little more.
const FILE_INDEX_SHARE: u64 = 400;

/// The guest's own view of its memory, from `/proc/meminfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMemory {
    /// Memory the kernel manages; a balloon takes its pages out of this.
    pub total_bytes: u64,
    /// Memory that is not in use at all.
    pub unused_bytes: u64,
    /// Memory that could be used without swapping.
    pub available_bytes: u64,
}

/// Data in the guest whose checksum is known.
#[derive(Clone, Debug)]
pub struct WorkingSet {
    file: String,
    checksum: String,
    bytes: u64,
}

impl WorkingSet {
    /// The data's size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its SHA-256, in hexadecimal.
    #[must_use]
    pub fn checksum(&self) -> &str {
        &self.checksum
    }
}

impl Shell {
    /// The guest's own view of its memory.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn memory(&mut self) -> Result<GuestMemory, GuestError> {
        let command = "cat /proc/meminfo";
        let output = self.run(command)?;
        let value = |name: &str| {
            let line = output.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
            Some(kib * 1024)
        };
        let memory = || {
            Some(GuestMemory {
                total_bytes: value("MemTotal:")?,
                unused_bytes: value("MemFree:")?,
                available_bytes: value("MemAvailable:")?,
            })
        };
        memory().ok_or_else(|| GuestError::Answer {
            command: command.to_owned(),
            output: output.clone(),
        })
    }

    /// Writes to practically all unused memory and gives it up again, so that the host really has
    /// allocated it. Returns how much was written.
    ///
    /// # Errors
    /// The guest does not answer or runs out of memory.
    pub fn touch_unused_memory(&mut self) -> Result<u64, GuestError> {
        let reserve = self.run("cat /proc/sys/vm/min_free_kbytes")?;
        let set_reserve = |kib: &str| format!("echo {kib} >/proc/sys/vm/min_free_kbytes");
        self.run(&set_reserve(FILL_RESERVE_KIB))?;
        let unused = self.memory()?.unused_bytes;
        let unused = unused.saturating_sub(UNTOUCHED_BYTES.max(unused / UNTOUCHED_SHARE));
        let mib = (unused - unused / FILE_INDEX_SHARE) / MIB;
        self.touch_memory(mib)?;
        self.run(&set_reserve(&reserve))?;
        Ok(mib * MIB)
    }

    /// Writes to this much memory and gives it up again.
    ///
    /// # Errors
    /// The guest does not answer or runs out of memory.
    pub fn touch_memory(&mut self, mib: u64) -> Result<(), GuestError> {
        let command = format!(
            "dd if=/dev/zero of=/mem/fill bs=1M count={mib} 2>/dev/null; s=$?; rm -f /mem/fill; exit $s"
        );
        self.run_within(&command, BULK_TIMEOUT).map(drop)
    }

    /// Fills a file in the guest's memory with random data and remembers its checksum.
    ///
    /// # Errors
    /// The guest does not answer or runs out of memory.
    pub fn make_working_set(&mut self, name: &str, mib: u64) -> Result<WorkingSet, GuestError> {
        let file = format!("/keep/{name}");
        let fill = format!("dd if=/dev/urandom of={file} bs=1M count={mib} 2>/dev/null");
        self.run_within(&fill, BULK_TIMEOUT)?;
        let checksum = self.checksum(&file)?;
        Ok(WorkingSet {
            file,
            checksum,
            bytes: mib * MIB,
        })
    }

    /// Whether the data is still what it was.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn verify_working_set(&mut self, set: &WorkingSet) -> Result<bool, GuestError> {
        Ok(self.checksum(&set.file)? == set.checksum)
    }

    fn checksum(&mut self, file: &str) -> Result<String, GuestError> {
        let command = format!("sha256sum {file}");
        let output = self.run_within(&command, BULK_TIMEOUT)?;
        match output.split_whitespace().next() {
            Some(sum) if sum.len() == 64 => Ok(sum.to_owned()),
            _ => Err(GuestError::Answer { command, output }),
        }
    }
}
