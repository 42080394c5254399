//! Pieces of guest memory to batches of host ranges: pure, so that it can be tested and timed alone.

use super::probe::Capabilities;
use crate::memory::{BALLOON_PAGE_SHIFT, GuestMemory, NodeId, Pfn, PfnRange, Region};

/// Batches are cut at multiples of this, so that no huge page is split between two workers.
pub(super) const CUT_BYTES: u64 = 2 << 20;

/// A run of pages inside one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The region's position in the table.
    pub region: usize,
    /// The pages, all inside that region.
    pub range: PfnRange,
}

/// How the memory behind a region is freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Primitive {
    /// Vectored `process_madvise(MADV_DONTNEED)` on this process: private memory.
    ProcessMadvise,
    /// `madvise(MADV_DONTNEED)`, a call a range: private memory on kernels without the former.
    Madvise,
    /// `fallocate(PUNCH_HOLE)` on the region's file: memfd, shmem, hugetlbfs.
    PunchHole,
    /// `madvise(MADV_REMOVE)`: shared memory whose file was not handed over.
    MadviseRemove,
}

impl Primitive {
    /// What frees `region` on a host that can do `capabilities`.
    #[must_use]
    pub fn of(region: &Region, capabilities: &Capabilities) -> Self {
        match (region.shared, &region.fd) {
            // Dropping the pages of a private file mapping frees the guest's own copies; the file's
            // pages were never the guest's.
            (false, _) if capabilities.process_madvise.is_some() => Self::ProcessMadvise,
            (false, _) => Self::Madvise,
            (true, Some(_)) => Self::PunchHole,
            (true, None) => Self::MadviseRemove,
        }
    }

    /// Where `region` begins in the ranges of this primitive.
    fn base(self, region: &Region) -> u64 {
        match self {
            Self::PunchHole => region.fd_offset_bytes,
            _ => region.hva as u64,
        }
    }

    /// Whether two threads get through the same memory faster than one.
    #[must_use]
    pub fn scales(self) -> bool {
        matches!(self, Self::ProcessMadvise | Self::Madvise)
    }
}

/// A range of host addresses, or of file offsets for [`Primitive::PunchHole`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRange {
    /// The host address, or the offset in the region's file.
    pub start: u64,
    /// The length in bytes.
    pub len: u64,
    /// The region's position in the table.
    pub region: usize,
}

impl HostRange {
    /// The guest pages that this range of `memory` is, freed by `primitive`.
    #[must_use]
    pub fn pages(&self, memory: &GuestMemory, primitive: Primitive) -> Option<Piece> {
        let region = memory.regions().get(self.region)?;
        let offset = self.start.checked_sub(primitive.base(region))?;
        let start = Pfn((region.gpa.0 + offset) >> BALLOON_PAGE_SHIFT);
        let range = PfnRange::new(start, self.len >> BALLOON_PAGE_SHIFT);
        Some(Piece {
            region: self.region,
            range,
        })
    }
}

/// Ranges for one primitive (and one file, where it works on files), in ascending order.
#[derive(Clone, Debug)]
pub struct Batch {
    /// How to free them.
    pub primitive: Primitive,
    /// The host node that most likely holds them.
    pub node: Option<NodeId>,
    /// What to free.
    pub ranges: Vec<HostRange>,
}

impl Batch {
    /// The sum of its ranges.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }

    /// Cuts the batch into at most `parts` of about equal size, at multiples of 2 MiB of host
    /// address where it cuts a range, so that no huge page is split between two workers.
    pub fn split(self, parts: u64, into: &mut Vec<Self>) {
        if parts <= 1 {
            into.push(self);
            return;
        }
        let share = self.bytes().div_ceil(parts).next_multiple_of(CUT_BYTES);
        let (mut part, mut room) = (Vec::new(), share);
        for mut range in self.ranges {
            while range.len > room {
                let cut = (range.start + room) / CUT_BYTES * CUT_BYTES;
                if cut > range.start {
                    let len = cut - range.start;
                    part.push(HostRange { len, ..range });
                    range = HostRange {
                        start: cut,
                        len: range.len - len,
                        ..range
                    };
                }
                if part.is_empty() {
                    // The range begins inside a huge page that is larger than the room.
                    break;
                }
                into.push(Self {
                    ranges: std::mem::take(&mut part),
                    ..self
                });
                room = share;
            }
            room = room.saturating_sub(range.len);
            part.push(range);
        }
        if !part.is_empty() {
            into.push(Self {
                ranges: part,
                ..self
            });
        }
    }
}

/// All that is to be done for one set of pieces.
#[derive(Debug, Default)]
pub struct Plan {
    /// One batch a primitive and file and node.
    pub batches: Vec<Batch>,
}

impl Plan {
    /// Plans `pieces`, which are sorted, disjoint and inside their regions.
    #[must_use]
    pub fn new(memory: &GuestMemory, pieces: &[Piece], capabilities: &Capabilities) -> Self {
        let mut batches: Vec<Batch> = Vec::new();
        for piece in pieces {
            let Some(region) = memory.regions().get(piece.region) else {
                continue;
            };
            let primitive = Primitive::of(region, capabilities);
            let base = primitive.base(region);
            let offset = (piece.range.start.0 << BALLOON_PAGE_SHIFT) - region.gpa.0;
            let range = HostRange {
                start: base + offset,
                len: piece.range.bytes(),
                region: piece.region,
            };
            let fits = |batch: &Batch| {
                batch.primitive == primitive
                    && batch.node == region.node
                    && (primitive != Primitive::PunchHole || same_file(memory, batch, piece.region))
            };
            match batches.iter_mut().rev().find(|batch| fits(batch)) {
                Some(batch) => match batch.ranges.last_mut() {
                    Some(last)
                        if last.region == range.region && last.start + last.len == range.start =>
                    {
                        last.len += range.len;
                    }
                    _ => batch.ranges.push(range),
                },
                None => {
                    batches.push(Batch {
                        primitive,
                        node: region.node,
                        ranges: vec![range],
                    });
                }
            }
        }
        Self { batches }
    }
}

/// Whether `batch` punches the file of the region at `index`.
fn same_file(memory: &GuestMemory, batch: &Batch, index: usize) -> bool {
    let of_batch = batch
        .ranges
        .first()
        .map(|range| memory.file_id(range.region));
    of_batch == Some(memory.file_id(index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Gpa;
    use crate::memory::tests::heap_memory;

    fn piece(region: usize, start: u64, end: u64) -> Piece {
        Piece {
            region,
            range: PfnRange {
                start: Pfn(start),
                end: Pfn(end),
            },
        }
    }

    #[test]
    fn adjacent_pieces_become_one_range_and_regions_one_batch() {
        let memory = heap_memory(&[(0, 0x10000), (0x100000, 0x10000)]);
        let pieces = [
            piece(0, 1, 3),
            piece(0, 3, 4),
            piece(0, 8, 9),
            piece(1, 0x100, 0x101),
        ];
        let plan = Plan::new(&memory, &pieces, &Capabilities::none());
        assert_eq!(plan.batches.len(), 1);
        let hva = |index: usize| memory.regions()[index].hva as u64;
        assert_eq!(
            plan.batches[0].ranges,
            [
                HostRange {
                    start: hva(0) + 0x1000,
                    len: 0x3000,
                    region: 0
                },
                HostRange {
                    start: hva(0) + 0x8000,
                    len: 0x1000,
                    region: 0
                },
                HostRange {
                    start: hva(1),
                    len: 0x1000,
                    region: 1
                },
            ]
        );
        assert_eq!(memory.regions()[0].gpa, Gpa(0));
    }

    #[test]
    fn splitting_loses_no_byte_and_cuts_only_between_huge_pages() {
        const MIB: u64 = 1 << 20;
        let shapes: [&[(u64, u64)]; 4] = [
            &[(0, 128 * MIB)],
            &[(MIB, 7 * MIB), (9 * MIB, 3 * MIB), (32 * MIB, MIB)],
            &[(3 * MIB, 4096)],
            &[(MIB + 4096, 5 * MIB), (64 * MIB, 31 * MIB + 4096)],
        ];
        for shape in shapes {
            for parts in 1..6 {
                let ranges: Vec<_> = shape
                    .iter()
                    .map(|&(start, len)| HostRange {
                        start,
                        len,
                        region: 0,
                    })
                    .collect();
                let batch = Batch {
                    primitive: Primitive::Madvise,
                    node: None,
                    ranges,
                };
                let total = batch.bytes();
                let mut tasks = Vec::new();
                batch.clone().split(parts, &mut tasks);
                assert!(tasks.len() as u64 <= parts + 1, "{tasks:?}");
                assert_eq!(tasks.iter().map(Batch::bytes).sum::<u64>(), total);
                let mut at = 0;
                for range in tasks.iter().flat_map(|task| &task.ranges) {
                    assert!(range.start >= at && range.len > 0);
                    assert!(
                        range.start % (2 * MIB) == 0
                            || batch.ranges.iter().any(|whole| whole.start == range.start)
                    );
                    at = range.start + range.len;
                }
            }
        }
    }
}
