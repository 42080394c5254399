//! Memory for pages that a guest takes back, before it touches them. Both ways are optional and off by
//! default: a guest that takes pages back need not use all of them, and waits meanwhile.
//!
//! References: madvise(2), MADV_POPULATE_WRITE (Linux 5.14) and MADV_COLLAPSE (Linux 6.1). What the host
//! cannot do, or has no memory for, is left to the guest's own page faults.
#![allow(unsafe_code, reason = "advice on the guest's memory")]

use super::plan::Piece;
use crate::memory::{BALLOON_PAGE_SHIFT, GuestMemory, Pfn, PfnRange, Region};

/// What is done for a guest that takes pages out of the balloon, before it is acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeflateOptions {
    /// Has the host allocate the pages at once, by one call a run instead of a fault a page.
    pub prefault: bool,
    /// Has the host make huge frames of 2 MiB again, of those that have no page in the balloon any more.
    pub rebuild: bool,
}

impl DeflateOptions {
    /// Whether there is anything to do.
    pub(crate) fn is_any(self) -> bool {
        self.prefault || self.rebuild
    }
}

/// Base pages of a frame that can be rebuilt.
const FRAME_PAGES: u64 = 512;
/// The most frames that are rebuilt at a time. Each may cost a copy of 2 MiB, and a guest may name as many
/// frames as it names pages (I3); khugepaged sees to the rest, if the host has it on.
const MAX_REBUILT: u32 = 16;

/// Does what `options` say for `pieces`, which were just taken out of the balloon; `owned` counts the
/// pages of a range, in a region, that are still in it.
pub(crate) fn restore(
    memory: &GuestMemory,
    pieces: &[Piece],
    options: DeflateOptions,
    mut owned: impl FnMut(usize, PfnRange) -> u64,
) {
    let (mut rebuilt, mut left) = (None, MAX_REBUILT);
    for piece in pieces {
        let Some(region) = memory.regions().get(piece.region) else {
            continue;
        };
        if options.prefault {
            advise(region, piece.range, libc::MADV_POPULATE_WRITE);
        }
        // Huge pages care about the host's address.
        let distance = (region.hva as u64).wrapping_sub(region.gpa.0) >> BALLOON_PAGE_SHIFT;
        let skew = distance % FRAME_PAGES;
        let (first, end) = (piece.range.start.0 + skew, piece.range.end.0 + skew);
        for frame in first / FRAME_PAGES..end.div_ceil(FRAME_PAGES) {
            let Some(start) = (frame * FRAME_PAGES).checked_sub(skew) else {
                continue;
            };
            let frame = PfnRange::new(Pfn(start), FRAME_PAGES);
            let whole = frame.intersection(region.pfns()) == frame;
            let again = rebuilt == Some((piece.region, frame.start));
            if options.rebuild && left > 0 && whole && !again && owned(piece.region, frame) == 0 {
                advise(region, frame, libc::MADV_COLLAPSE);
                rebuilt = Some((piece.region, frame.start));
                left -= 1;
            }
        }
    }
}

fn advise(region: &Region, range: PfnRange, advice: libc::c_int) {
    let offset = (range.start.0 << BALLOON_PAGE_SHIFT) - region.gpa.0;
    let place = usize::try_from(offset).map(|offset| region.hva + offset);
    let (Ok(address), Ok(len)) = (place, usize::try_from(range.bytes())) else {
        return;
    };
    // SAFETY: the range lies inside the region, which the table's maker promised to be mapped and
    // writable; neither advice changes what is in it.
    let result = unsafe { libc::madvise(address as *mut libc::c_void, len, advice) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        log::debug!("advice {advice} on {len:#x} bytes at {address:#x} failed: {error}");
    }
}
