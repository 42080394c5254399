//! What this process has of the host: memory, descriptors, threads. A test that measures twice finds
//! what was not given back.
#![allow(unsafe_code, reason = "has the allocator give free memory back")]

use super::error::{Result, VmmError};
use rustix::process::{Resource, getrlimit, setrlimit};

/// What the process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Resident memory.
    pub resident_bytes: u64,
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
}

impl Usage {
    /// As it is now, without what the allocator only keeps.
    ///
    /// # Errors
    /// There is no /proc.
    pub fn now() -> Result<Self> {
        // SAFETY: takes an integer and returns free memory only.
        unsafe { libc::malloc_trim(0) };
        Ok(Self {
            resident_bytes: resident_bytes()?,
            descriptors: entries("/proc/self/fd")?,
            threads: entries("/proc/self/task")?,
        })
    }
}

/// The resident memory of this process.
///
/// # Errors
/// There is no /proc.
pub fn resident_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").map_err(|source| VmmError::Os {
        what: "cannot read /proc/self/statm",
        source,
    })?;
    let pages = text.split_whitespace().nth(1);
    let pages: u64 = pages.and_then(|pages| pages.parse().ok()).unwrap_or(0);
    Ok(pages * rustix::param::page_size() as u64)
}

fn entries(directory: &str) -> Result<usize> {
    let listed = std::fs::read_dir(directory).map_err(|source| VmmError::Os {
        what: "cannot list what the process has",
        source,
    })?;
    Ok(listed.count())
}

/// Lets the process open as many descriptors as it may at all; returns how many those are.
pub fn allow_many_descriptors() -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Where that is refused there are as many as before.
    let _ = setrlimit(Resource::Nofile, limit);
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
