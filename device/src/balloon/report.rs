//! Free page reporting: what the guest offers and keeps (S10).
//!
//! Invariants: I2 (all is discarded or skipped when the report is acknowledged), I4.

use super::{Account, Balloon, Frames, Piece, bump, bytes, in_regions, lower};
use crate::memory::{GuestMemory, PfnRange};
use crate::metrics::Books;

/// Memory that is discarded between two looks at who waits: one or two milliseconds, at the rates that
/// were measured of punched memfds, the slowest kind. A report of Linux may be 32 times as much.
const PART_PAGES: u64 = 1024;

impl Balloon {
    /// The guest says that `ranges` hold nothing it needs (page reporting): discards them now. They
    /// stay the guest's. `duplicate_pages` as for [`Self::give`]; `poisoned` leaves them alone since
    /// the guest expects its poison there (S10).
    ///
    /// A report is an offer. If somebody waits for the device to stand still, what is left of it is
    /// skipped, which takes the wait to a few milliseconds however much was reported.
    pub(crate) fn report(
        &mut self,
        ranges: &[PfnRange],
        duplicate_pages: u64,
        poisoned: bool,
        books: &Books,
    ) {
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.clear();
        books.enter(|entry| {
            let flow = &mut entry.device().report;
            bump(&mut flow.requested_bytes, bytes(duplicate_pages));
            bump(&mut flow.skipped_duplicate_bytes, bytes(duplicate_pages));
            for &range in ranges {
                let outside = in_regions(&self.memory, range, |index, region, range| {
                    let flow = &mut entry.node(region.node).report;
                    bump(&mut flow.requested_bytes, range.bytes());
                    if region.readonly {
                        bump(&mut flow.skipped_out_of_range_bytes, range.bytes());
                        return;
                    }
                    let whole = if poisoned {
                        None
                    } else {
                        Frames::of(region).inside(range)
                    };
                    let discard = whole.map_or(0, |whole| whole.bytes());
                    bump(&mut flow.skipped_partial_bytes, range.bytes() - discard);
                    bump(&mut flow.pending_bytes, discard);
                    pieces.extend(whole.map(|range| Piece {
                        region: index,
                        range,
                    }));
                });
                let flow = &mut entry.device().report;
                bump(&mut flow.requested_bytes, bytes(outside));
                bump(&mut flow.skipped_out_of_range_bytes, bytes(outside));
            }
        });
        for (number, part) in parts(&self.memory, &pieces).iter().enumerate() {
            if number > 0 && self.waiting.is_anybody() {
                self.leave(part, books);
            } else {
                self.discard(part, part, Account::Report, books);
            }
        }
        self.pieces = pieces;
    }

    /// Leaves pieces as they are, for the sake of who waits.
    fn leave(&self, pieces: &[Piece], books: &Books) {
        books.enter(|entry| {
            for piece in pieces {
                let flow = Account::Report.of(entry.node(self.node(piece)));
                lower(&mut flow.pending_bytes, piece.range.bytes());
                bump(&mut flow.skipped_inhibited_bytes, piece.range.bytes());
            }
        });
    }
}

/// Cuts pieces into parts of at most [`PART_PAGES`], and what it takes to leave frames whole.
fn parts(memory: &GuestMemory, pieces: &[Piece]) -> Vec<Vec<Piece>> {
    let mut parts = Vec::new();
    let (mut part, mut room) = (Vec::new(), PART_PAGES);
    for piece in pieces {
        let Some(region) = memory.regions().get(piece.region) else {
            continue;
        };
        let Piece { region: index, .. } = *piece;
        let mut left = piece.range;
        while left.pages() > 0 {
            // Frames stay whole; pieces begin and end at their edges.
            let next = PfnRange::new(left.start, left.pages().min(room));
            let end = Frames::of(region).around(next).end.min(left.end);
            let range = PfnRange { end, ..left };
            part.push(Piece {
                region: index,
                range,
            });
            left.start = end;
            room = room.saturating_sub(range.pages());
            if room == 0 {
                parts.push(std::mem::take(&mut part));
                room = PART_PAGES;
            }
        }
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}
