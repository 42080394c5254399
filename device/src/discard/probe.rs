//! What this host can do, found by trying it on a page of our own: never from a version number.
#![allow(
    unsafe_code,
    reason = "the probe tries system calls on memory of its own"
)]

use crate::error::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The primitives that work here. Everything not listed is available on every Linux.
#[derive(Debug)]
pub struct Capabilities {
    /// A descriptor of this process through which vectored `MADV_DONTNEED` works on ourselves.
    pub process_madvise: Option<OwnedFd>,
    /// Make a system call a page, as others do.
    #[cfg(feature = "bench")]
    pub(super) one_call_a_page: bool,
}

impl Capabilities {
    /// What every host can do.
    #[must_use]
    pub fn none() -> Self {
        Self {
            process_madvise: None,
            #[cfg(feature = "bench")]
            one_call_a_page: false,
        }
    }

    /// What others do: a call a page.
    #[cfg(feature = "bench")]
    pub(crate) fn one_call_a_page() -> Self {
        Self {
            one_call_a_page: true,
            ..Self::none()
        }
    }

    /// Tries what this host can do.
    ///
    /// # Errors
    /// Fails if not even two pages can be mapped.
    pub fn probe() -> Result<Self> {
        let page = ProbePages::new()?;
        let process_madvise = open_own_process().filter(|pidfd| page.vectored_advice_works(pidfd));
        let mut capabilities = Self::none();
        capabilities.process_madvise = process_madvise;
        Ok(capabilities)
    }
}

/// The size of the transparent huge pages that this host puts behind private memory; `None` where it does
/// not, or does not tell.
#[must_use]
pub fn transparent_frame_bytes() -> Option<u64> {
    let read =
        |file: &str| std::fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/{file}"));
    if read("enabled").ok()?.contains("[never]") {
        return None;
    }
    read("hpage_pmd_size").ok()?.trim().parse().ok()
}

/// A pidfd of this process, if the kernel has pidfds.
fn open_own_process() -> Option<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel just returned this descriptor to us, and nobody else owns it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Two private pages with something written to each.
struct ProbePages {
    base: *mut libc::c_void,
}

const PAGE: usize = 4096;
const PROBE_BYTES: usize = 64 * 1024;

impl ProbePages {
    fn new() -> Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice affects nothing else.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PROBE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Error::last_os("cannot map memory to probe the host with"));
        }
        Ok(Self { base })
    }

    /// Whether vectored advice through `pidfd` empties pages, and only those it names.
    fn vectored_advice_works(&self, pidfd: &OwnedFd) -> bool {
        // The host's own page size decides how far advice reaches: use the ends of the mapping.
        let last = PROBE_BYTES - PAGE;
        let byte = |offset: usize| self.base.cast::<u8>().wrapping_add(offset);
        // SAFETY: both offsets lie inside the mapping that `new` made and that nobody else knows.
        unsafe {
            byte(0).write_volatile(1);
            byte(last).write_volatile(2);
        }
        let vector = libc::iovec {
            iov_base: self.base,
            iov_len: PROBE_BYTES / 2,
        };
        // SAFETY: one valid iovec over our own mapping; its contents are ours to lose.
        let advised = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                pidfd.as_raw_fd(),
                &raw const vector,
                1usize,
                libc::MADV_DONTNEED,
                0u32,
            )
        };
        // SAFETY: as for the writes above.
        let (first, second) = unsafe { (byte(0).read_volatile(), byte(last).read_volatile()) };
        usize::try_from(advised).is_ok_and(|bytes| bytes == PROBE_BYTES / 2)
            && first == 0
            && second == 2
    }
}

impl Drop for ProbePages {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped; no reference into it exists.
        unsafe { libc::munmap(self.base, PROBE_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_never_fails_and_leaves_no_descriptor_without_the_primitive() {
        let capabilities = Capabilities::probe().unwrap();
        println!(
            "process_madvise on self: {}",
            capabilities.process_madvise.is_some()
        );
        assert!(Capabilities::none().process_madvise.is_none());
    }
}
