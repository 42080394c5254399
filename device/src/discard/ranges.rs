//! Ranges of guest memory discarded as they are, for VMMs that speak to the guest themselves and keep their
//! own account of its balloon.
#![cfg_attr(test, allow(unsafe_code, reason = "maps a guest"))]

use super::Discarder;
use super::plan::Piece;
use crate::balloon::in_regions;
use crate::memory::{BALLOON_PAGE_BYTES, BALLOON_PAGE_SHIFT, Gpa, GuestMemory, Pfn, PfnRange};
use crate::pages::frames::Frames;
use crate::pages::ranges::coalesce_ranges;
use std::sync::Arc;

/// Why memory of a range was not discarded, or not all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotDiscarded {
    /// Nothing was: the range is empty, no multiple of a page, or ends behind all addresses (`EINVAL`).
    #[error("the range does not consist of pages of 4096 bytes")]
    NoPages,
    /// Nothing was: a part of it is in no region (`EFAULT`).
    #[error("a part of the range is in no region of guest memory")]
    OutOfMemory,
    /// Nothing was: a part of it is in a region that is read-only (`EROFS`).
    #[error("a part of the range is in a read-only region")]
    ReadOnly,
    /// Nothing was: a part of it is in a region that is pinned (`EBUSY`).
    #[error("a part of the range is in a region that is pinned")]
    Pinned,
    /// The rest was: of some frame that backs the range not all pages were given (`EAGAIN`).
    #[error("the range cuts a huge page whose other part was not given")]
    PartOfFrame,
    /// The kernel refused a part of it, or of a range that it was put together with; what of it is free is not
    /// known (`EIO`).
    #[error("the kernel did not free all of the range and its neighbours")]
    Failed,
}

impl NotDiscarded {
    /// The number of the error in C.
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Self::NoPages => libc::EINVAL,
            Self::OutOfMemory => libc::EFAULT,
            Self::ReadOnly => libc::EROFS,
            Self::Pinned => libc::EBUSY,
            Self::PartOfFrame => libc::EAGAIN,
            Self::Failed => libc::EIO,
        }
    }
}

impl Discarder {
    /// Discards ranges of guest addresses and lengths in bytes, in any order; they may overlap. Says of each
    /// whether all of its memory is free now.
    ///
    /// All that is given in one call is put together first, so many small ranges cost no more than
    /// the few that they are parts of. A frame that is larger than a page is discarded only whole.
    pub fn discard_ranges(
        &self,
        memory: &Arc<GuestMemory>,
        ranges: &[(Gpa, u64)],
    ) -> Vec<Result<(), NotDiscarded>> {
        let checked: Vec<Result<PfnRange, NotDiscarded>> = ranges
            .iter()
            .map(|&(gpa, len_bytes)| check(memory, gpa, len_bytes))
            .collect();
        let mut union: Vec<PfnRange> = checked.iter().flatten().copied().collect();
        coalesce_ranges(&mut union);

        let (mut pieces, mut cut) = (Vec::new(), Vec::new());
        for &range in &union {
            in_regions(memory, range, |index, region, part| {
                let whole = Frames::of(region).inside(part).unwrap_or(PfnRange {
                    start: part.end,
                    end: part.end,
                });
                let (head, tail) = ((part.start, whole.start), (whole.end, part.end));
                let cuts = [head, tail].map(|(start, end)| PfnRange { start, end });
                cut.extend(cuts.into_iter().filter(|range| range.pages() > 0));
                if whole.pages() > 0 {
                    pieces.push(Piece {
                        region: index,
                        range: whole,
                    });
                }
            });
        }
        let failed = self.discard(memory, &pieces).failed;
        let mut failed: Vec<PfnRange> = failed.iter().map(|piece| piece.range).collect();
        coalesce_ranges(&mut failed);

        let verdict = |range: PfnRange| {
            if touches(&failed, range) {
                Err(NotDiscarded::Failed)
            } else if touches(&cut, range) {
                Err(NotDiscarded::PartOfFrame)
            } else {
                Ok(())
            }
        };
        checked
            .into_iter()
            .map(|range| range.and_then(verdict))
            .collect()
    }
}

/// The pages of a range, if all of them can be discarded.
fn check(memory: &GuestMemory, gpa: Gpa, len_bytes: u64) -> Result<PfnRange, NotDiscarded> {
    let page = BALLOON_PAGE_BYTES;
    let whole = gpa.0.is_multiple_of(page) && len_bytes.is_multiple_of(page);
    if len_bytes == 0 || !whole || gpa.0.checked_add(len_bytes).is_none() {
        return Err(NotDiscarded::NoPages);
    }
    let start = Pfn(gpa.0 >> BALLOON_PAGE_SHIFT);
    let range = PfnRange::new(start, len_bytes >> BALLOON_PAGE_SHIFT);
    let mut hindrance = None;
    let outside = in_regions(memory, range, |_, region, _| {
        if region.readonly {
            hindrance = Some(NotDiscarded::ReadOnly);
        } else if region.pinned {
            hindrance = hindrance.or(Some(NotDiscarded::Pinned));
        }
    });
    match hindrance {
        _ if outside > 0 => Err(NotDiscarded::OutOfMemory),
        Some(hindrance) => Err(hindrance),
        None => Ok(range),
    }
}

/// Whether one of the ranges, which are sorted and disjoint, shares a page with `range`.
fn touches(ranges: &[PfnRange], range: PfnRange) -> bool {
    let first = ranges.partition_point(|other| other.end <= range.start);
    ranges
        .get(first)
        .is_some_and(|other| other.start < range.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Runtime;
    use crate::memory::Region;
    use crate::memory::tests::anonymous_region;
    use memmap2::{MmapOptions, MmapRaw};
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::os::unix::fs::MetadataExt;

    const PAGES: u64 = 256;

    struct Guest {
        file: File,
        memory: Arc<GuestMemory>,
        _mapping: MmapRaw,
    }

    /// Touched memory in a file from guest address 1 MiB on, and a page without a neighbour at 16 MiB.
    fn guest(change: impl Fn(&mut Region)) -> Guest {
        let bytes = PAGES * 4096;
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a string that ends with a zero.
        let number = unsafe { libc::memfd_create(c"guest".as_ptr(), flags) };
        assert!(number >= 0);
        // SAFETY: nobody else has the descriptor.
        let file = unsafe { File::from_raw_fd(number) };
        file.set_len(bytes + 4096).unwrap();
        let mapping = MmapOptions::new().map_raw(&file).unwrap();
        // SAFETY: the mapping is this long and nobody else knows of it.
        unsafe { std::ptr::write_bytes(mapping.as_mut_ptr(), 1, mapping.len()) };
        let region = |gpa, offset: u64, len_bytes| Region {
            gpa: Gpa(gpa),
            len_bytes,
            hva: mapping.as_mut_ptr() as usize + offset as usize,
            fd: Some(Arc::new(file.try_clone().unwrap().into())),
            fd_offset_bytes: offset,
            shared: true,
            ..anonymous_region()
        };
        let mut first = region(1 << 20, 0, bytes);
        change(&mut first);
        // SAFETY: the mapping lives as long as the table, and nothing refers to it but by address.
        let memory =
            unsafe { GuestMemory::new(vec![first, region(16 << 20, bytes, 4096)]) }.unwrap();
        Guest {
            file,
            memory,
            _mapping: mapping,
        }
    }

    impl Guest {
        fn discard(&self, ranges: &[(u64, u64)]) -> Vec<Result<(), NotDiscarded>> {
            let runtime = Runtime::new(&crate::RuntimeConfig::default()).unwrap();
            let ranges: Vec<_> = ranges.iter().map(|&(gpa, len)| (Gpa(gpa), len)).collect();
            runtime.discard_ranges(&self.memory, &ranges)
        }

        /// Pages that the host has in use for it.
        fn host_pages(&self) -> u64 {
            self.file.metadata().unwrap().blocks() / 8
        }
    }

    const BASE: u64 = 1 << 20;

    #[test]
    fn each_range_has_its_answer_and_hinders_no_other() {
        let guest = guest(|_| ());
        let answers = guest.discard(&[
            (BASE + 8 * 4096, 4096),
            (BASE, 4096),
            (BASE + 1, 4096),
            (BASE + 4096, 0),
            (BASE + (PAGES - 1) * 4096, 2 * 4096),
            (16 << 20, 4096),
            (BASE, 2 * 4096),
            (u64::MAX - 4095, 4096),
        ]);
        use NotDiscarded::{NoPages, OutOfMemory};
        let expected = [
            Ok(()),
            Ok(()),
            Err(NoPages),
            Err(NoPages),
            Err(OutOfMemory),
            Ok(()),
            Ok(()),
            Err(NoPages),
        ];
        assert_eq!(answers, expected);
        assert_eq!(guest.host_pages(), PAGES + 1 - 4);
        assert!(guest.discard(&[]).is_empty());
    }

    #[test]
    fn what_must_stay_stays_and_says_why() {
        let rom = guest(|region| region.readonly = true);
        let answer = rom.discard(&[(BASE, 4096), (16 << 20, 4096)]);
        assert_eq!(answer, [Err(NotDiscarded::ReadOnly), Ok(())]);
        let pinned = guest(|region| region.pinned = true);
        assert_eq!(pinned.discard(&[(BASE, 4096)]), [Err(NotDiscarded::Pinned)]);
        assert_eq!((rom.host_pages(), pinned.host_pages()), (PAGES, PAGES + 1));
    }

    #[test]
    fn a_frame_goes_whole_or_not_at_all() {
        let guest = guest(|region| region.frame_bytes = 16 * 4096);
        let frame = |region: &Region| Frames::of(region).touching(region.pfns()).nth(1).unwrap();
        let frame = frame(&guest.memory.regions()[0]);
        let at = |page: u64| (frame.start.0 + page) * 4096;
        // The halves of one frame, in two ranges; and three quarters of the next.
        let answers = guest.discard(&[(at(8), 8 * 4096), (at(0), 8 * 4096), (at(16), 12 * 4096)]);
        assert_eq!(answers, [Ok(()), Ok(()), Err(NotDiscarded::PartOfFrame)]);
        assert_eq!(guest.host_pages(), PAGES + 1 - 16);
    }

    #[test]
    fn what_the_kernel_refuses_is_told() {
        let guest = guest(|_| ());
        let seal = libc::F_SEAL_FUTURE_WRITE;
        // SAFETY: takes no pointer. No hole is punched into a file that is sealed against writes.
        let sealed = unsafe { libc::fcntl(guest.file.as_raw_fd(), libc::F_ADD_SEALS, seal) };
        assert_eq!(sealed, 0);
        assert_eq!(guest.discard(&[(BASE, 4096)]), [Err(NotDiscarded::Failed)]);
    }
}
