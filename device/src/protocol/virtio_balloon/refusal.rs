//! Inflate buffers with an answer (docs/virtio-balloon-extensions.md, PAGE_REFUSAL; requirements V1, V2).
//!
//! The buffer's readable part is the list of page frame numbers that it always was. Its writable part
//! takes a bitmap in the order of the list: a set bit says that the page is refused and still the
//! guest's. The device writes no further than the last set bit, and the used length says how far.
//!
//! A buffer is answered before anything of its batch is discarded: the bitmap may lie in a page that is
//! given, and must not bring back what was just freed.

use super::{MAX_CHAIN_PFNS, PFN_BYTES, Turn, read_list};
use crate::trace::Kind;

/// Bits of a byte of the bitmap; the first page is bit 0 of byte 0.
const BITS: usize = 8;

/// Reads one inflate buffer, offers its pages to the balloon, and writes the answer. Returns whether the
/// buffer made sense, and how many bytes were written to it.
pub(super) fn answer(turn: &mut Turn<'_>) -> (bool, u32) {
    let memory = turn.balloon.memory();
    let scratch = &mut *turn.scratch;
    let start = scratch.pages.len();
    let understood =
        !scratch.chain.malformed && read_list(&scratch.chain, memory, &mut scratch.pages);
    let pages = scratch.pages.len() - start;
    let given = scratch.pages.get(start..).unwrap_or_default();
    turn.tape.pages(Kind::Inflate, given);
    if !understood || scratch.chain.room(memory, bitmap_bytes(pages)) < bitmap_bytes(pages) {
        return (false, refuse_all_of_nonsense(turn));
    }
    let (_, offered) = scratch.pages.split_at(start);
    let refused = &mut scratch.refused;
    refused.clear();
    refused.resize(bitmap_bytes(pages), 0);
    if turn.config.reset_pending() {
        turn.balloon.turn_away(pages as u64, true, turn.books);
        (0..pages).for_each(|place| set(refused, place));
    } else {
        let limit = u64::from(turn.config.num_pages());
        turn.balloon
            .offer(offered, 1, limit, turn.books, |place, _| {
                set(refused, place);
            });
    }
    (true, write(turn))
}

/// A buffer whose content makes no sense gives nothing, and is told so as far as it has room: a driver
/// that does not look for errors must not take its pages for ballooned.
fn refuse_all_of_nonsense(turn: &mut Turn<'_>) -> u32 {
    let memory = turn.balloon.memory();
    let scratch = &mut *turn.scratch;
    let listed = (scratch.chain.readable_bytes() / PFN_BYTES).min(MAX_CHAIN_PFNS);
    let pages = usize::try_from(listed).unwrap_or(0);
    let room = scratch.chain.room(memory, bitmap_bytes(pages));
    scratch.refused.clear();
    scratch.refused.resize(room, 0);
    (0..pages.min(room * BITS)).for_each(|place| set(&mut scratch.refused, place));
    write(turn)
}

/// Writes the bitmap up to its last set bit, as far as there is room.
fn write(turn: &Turn<'_>) -> u32 {
    let refused = &turn.scratch.refused;
    let needed = refused.iter().rposition(|byte| *byte != 0);
    let bytes = needed.and_then(|last| refused.get(..=last));
    let memory = turn.balloon.memory();
    let written = turn.scratch.chain.write(memory, bytes.unwrap_or_default());
    u32::try_from(written).unwrap_or(u32::MAX)
}

fn bitmap_bytes(pages: usize) -> usize {
    pages.div_ceil(BITS)
}

fn set(bitmap: &mut [u8], place: usize) {
    if let Some(byte) = bitmap.get_mut(place / BITS) {
        *byte |= 1 << (place % BITS);
    }
}

#[cfg(test)]
#[path = "refusal_tests.rs"]
mod tests;
