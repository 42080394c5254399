//! One mapping of guest memory, and how much of it the host has allocated.
//!
//! A mapping lies in a reservation with inaccessible pages around it: it has the alignment that
//! huge frames need, the kernel cannot merge it with its neighbours, so that `/proc/self/smaps`
//! tells of it alone, and a discard that missed it would be noticed.
//!
//! Nothing here makes a Rust reference into the memory: what a guest may change at any time is
//! read and written through pointers only (see `ram`).
#![allow(unsafe_code, reason = "maps guest memory")]

use super::error::{Result, VmmError};
use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::ptr;

/// The alignment of a mapping: that of the huge frames most tests use.
const ALIGN: usize = 2 << 20;
/// And that of the largest.
const GIGANTIC: usize = 1 << 30;

/// What is behind a piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory, in pages of 4 KiB.
    Anonymous,
    /// Private anonymous memory with MADV_HUGEPAGE.
    AnonymousHuge,
    /// Shared anonymous memory, whose file the library is not given.
    SharedAnonymous,
    /// A memfd mapped shared, the region starting at this offset in it.
    Memfd {
        /// The offset in the file.
        offset_bytes: u64,
    },
    /// The same from its beginning, with MADV_HUGEPAGE.
    MemfdHuge,
    /// A memfd of huge pages of 2 MiB, mapped shared.
    Hugetlb,
    /// A memfd of huge pages of 1 GiB, mapped shared.
    HugetlbGigantic,
    /// Private anonymous memory in huge pages of 2 MiB (MAP_HUGETLB).
    AnonymousHugetlb,
}

/// A mapping that lives as long as this value.
#[derive(Debug)]
pub struct Mapping {
    reservation: *mut libc::c_void,
    reserved: usize,
    base: *mut u8,
    len: usize,
    file: Option<File>,
    backing: Backing,
}

// SAFETY: the mapping belongs to the process, not to a thread, and this type hands out raw
// addresses only.
unsafe impl Send for Mapping {}
// SAFETY: as above; all methods take `&self` and change nothing of the value.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len_bytes` of zeros; `name` is that of the memfd, if there is one.
    ///
    /// # Errors
    /// The host has not got the memory, or no huge pages for [`Backing::Hugetlb`].
    pub fn new(name: &str, backing: Backing, len_bytes: u64) -> Result<Self> {
        let len = usize::try_from(len_bytes).map_err(|_| VmmError::NoMemory("the mapping"))?;
        let align = match backing {
            Backing::HugetlbGigantic => GIGANTIC,
            _ => ALIGN,
        };
        let reserved = len.next_multiple_of(align) + 2 * align;
        // SAFETY: a new mapping at an address of the kernel's choice affects nothing else.
        let reservation = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserved,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reservation == libc::MAP_FAILED {
            return Err(VmmError::last_os("cannot reserve address space"));
        }
        let start = (reservation as usize + 1).next_multiple_of(align);
        // From here on dropping `mapping` gives the reservation back.
        let mut mapping = Self {
            reservation,
            reserved,
            base: start as *mut u8,
            len,
            file: None,
            backing,
        };
        let (flags, offset) = match backing {
            Backing::Anonymous | Backing::AnonymousHuge => {
                (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, 0)
            }
            Backing::SharedAnonymous => (libc::MAP_SHARED | libc::MAP_ANONYMOUS, 0),
            Backing::Memfd { offset_bytes } => {
                mapping.file = Some(memfd(name, 0, offset_bytes + len_bytes)?);
                (libc::MAP_SHARED, offset_bytes)
            }
            Backing::MemfdHuge => {
                mapping.file = Some(memfd(name, 0, len_bytes)?);
                (libc::MAP_SHARED, 0)
            }
            Backing::Hugetlb | Backing::HugetlbGigantic => {
                let size = match backing {
                    Backing::Hugetlb => libc::MFD_HUGE_2MB,
                    _ => libc::MFD_HUGE_1GB,
                };
                mapping.file = Some(memfd(name, libc::MFD_HUGETLB | size, len_bytes)?);
                (libc::MAP_SHARED, 0)
            }
            Backing::AnonymousHugetlb => (
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
                0,
            ),
        };
        let offset = i64::try_from(offset).map_err(|_| VmmError::NoMemory("the file offset"))?;
        // SAFETY: [base, base + len) lies inside the reservation that was just made and that
        // nobody else knows of, so MAP_FIXED replaces nothing of others.
        let mapped = unsafe {
            libc::mmap(
                mapping.base.cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED,
                mapping.fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(VmmError::last_os("cannot map guest memory"));
        }
        if matches!(backing, Backing::AnonymousHuge | Backing::MemfdHuge) {
            // SAFETY: advice on the mapping that was just made. Where the host has no huge pages
            // it stays with small ones.
            unsafe { libc::madvise(mapping.base.cast(), len, libc::MADV_HUGEPAGE) };
        }
        Ok(mapping)
    }

    /// Its first address.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// Its length.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len as u64
    }

    /// What is behind it.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The file behind it, or -1.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.file.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Whether it is mapped shared.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        !matches!(
            self.backing,
            Backing::Anonymous | Backing::AnonymousHuge | Backing::AnonymousHugetlb
        )
    }

    /// Has the host take its memory from `node` alone (mbind(2)).
    ///
    /// # Errors
    /// The host has no such node.
    pub fn bind(&self, node: u32) -> Result<()> {
        const MPOL_BIND: libc::c_int = 2;
        let nodes = 1u64 << node.min(63);
        // SAFETY: the mapping is ours; the mask has 64 bits, which is one less than the call is told,
        // as it wants it. No contents change.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base,
                self.len,
                MPOL_BIND,
                &raw const nodes,
                65usize,
                0u32,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(VmmError::last_os("cannot bind guest memory to a node"))
        }
    }

    /// How much host memory is allocated behind it, as the kernel says: for a file its blocks
    /// (fstat), else the resident set of exactly this mapping (smaps), where pages that were only
    /// read do not count. With transparent huge pages the resident set may tell less than is
    /// allocated: the host splits such pages late.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn allocated_bytes(&self) -> Result<u64> {
        let failed = |source| VmmError::Os {
            what: "cannot measure guest memory",
            source,
        };
        match &self.file {
            Some(file) => Ok(file.metadata().map_err(failed)?.blocks() * 512),
            None => self.resident_bytes().map_err(failed),
        }
    }

    fn resident_bytes(&self) -> std::io::Result<u64> {
        let (mut sum, mut inside) = (0, false);
        let (start, end) = (self.base as usize, self.base as usize + self.len);
        for line in BufReader::new(File::open("/proc/self/smaps")?).lines() {
            let line = line?;
            let mut words = line.split_ascii_whitespace();
            let first = words.next().unwrap_or_default();
            let address = |text| usize::from_str_radix(text, 16).ok();
            if let Some((Some(from), Some(to))) = first
                .split_once('-')
                .map(|(from, to)| (address(from), address(to)))
            {
                inside = start <= from && to <= end;
            } else if inside && matches!(first, "Rss:" | "Private_Hugetlb:") {
                // The resident set leaves huge pages of hugetlbfs out.
                let kib: u64 = words.next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
                sum += kib << 10;
            }
        }
        Ok(sum)
    }
}

/// What khugepaged has filled up to whole huge pages since the machine started, at most and everywhere: where
/// it finds a frame that is partly free it may take host memory for all of it, whoever freed it.
#[must_use]
pub fn collapsed_bytes() -> u64 {
    let read = |name: &str| {
        let file = format!("/sys/kernel/mm/transparent_hugepage/{name}");
        let text = std::fs::read_to_string(file).ok()?;
        text.trim().parse::<u64>().ok()
    };
    // A kernel without huge pages has none of the two.
    let pages = read("khugepaged/pages_collapsed").unwrap_or(0);
    pages * read("hpage_pmd_size").unwrap_or(0)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` reserved, the mapping inside included. The library was
        // told to let go of it first: `Guest` drops its device before its memory.
        unsafe { libc::munmap(self.reservation, self.reserved) };
    }
}

fn memfd(name: &str, flags: libc::c_uint, len_bytes: u64) -> Result<File> {
    let name = CString::new(name).unwrap_or_default();
    // SAFETY: the name is a C string, and the call takes no other pointer.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(VmmError::last_os("cannot make a memfd"));
    }
    // SAFETY: the kernel just returned this descriptor to us, and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len_bytes).map_err(|source| VmmError::Os {
        what: "cannot size a memfd",
        source,
    })?;
    Ok(file)
}
