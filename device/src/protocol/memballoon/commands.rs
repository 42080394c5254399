//! The driver's commands on the todevq: GIVE, GET, EXCHANGE (R4 to R6; docs/memballoon.md).
//!
//! Commands are carried out in the order in which they came. What is given is gathered over commands that
//! follow each other, and discarded in one go before the next command of another kind, and before any of
//! them is completed.

use super::{EXTRA_MEM, pages_per_page};
use crate::balloon::bump;
use crate::memory::{BALLOON_PAGE_BYTES, BALLOON_PAGE_SHIFT, GuestMemory, Pfn, PfnRange};
use crate::pages::ranges::coalesce_ranges;
use crate::protocol::contract::Turn;
use crate::ring::RingError;
use crate::ring::chain::Chain;
use crate::ring::source::Source;

const GET: u64 = 0;
const GIVE: u64 = 1;
const EXCHANGE: u64 = 2;

/// The size of every field.
const FIELD_BYTES: u64 = 8;
/// The most addresses a command may have, however small its pages: each may cost a call (I3).
const MAX_ADDRESSES: u64 = 1024;
/// The most memory a command may name, in pages of 4 KiB, if it is more than two pages: 2 GiB, which a worker
/// discards in some tenths of a second.
const MAX_PAGES: u64 = 1 << 19;
/// How much is served before other devices get a turn: commands, buffers that they consist of, addresses,
/// and pages of 4 KiB that they name.
const MAX_COMMANDS_PER_TURN: usize = 256;
pub(super) const MAX_BUFFERS_PER_TURN: usize = 1 << 15;
const MAX_ADDRESSES_PER_TURN: u64 = MAX_ADDRESSES;
const MAX_PAGES_PER_TURN: u64 = 1 << 18;
/// How often a queue that keeps filling up is looked at again within one turn.
const MAX_ROUNDS_PER_TURN: u32 = 4;

/// Carries out what the queue has; true if there is more.
pub(super) fn serve(source: &mut Source, turn: &mut Turn<'_>) -> Result<bool, RingError> {
    for _ in 0..MAX_ROUNDS_PER_TURN {
        source.suppress_kicks();
        if !serve_batch(source, turn)? {
            return Ok(true);
        }
        if !source.want_kicks() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What a batch has done so far, beside what is in the scratch buffers.
#[derive(Debug, Default)]
struct Batch {
    /// The fields of the command that is being carried out.
    fields: Vec<u64>,
    addresses: u64,
    pages: u64,
    buffers: usize,
    gives: u64,
    gets: u64,
    errors: u64,
}

/// Pops, carries out, completes. Returns whether the queue was empty at the end.
fn serve_batch(source: &mut Source, turn: &mut Turn<'_>) -> Result<bool, RingError> {
    turn.scratch.ranges.clear();
    turn.scratch.done.clear();
    let mut batch = Batch::default();
    let end = loop {
        if turn.scratch.done.len() >= MAX_COMMANDS_PER_TURN
            || batch.buffers >= MAX_BUFFERS_PER_TURN
            || batch.addresses >= MAX_ADDRESSES_PER_TURN
            || batch.pages >= MAX_PAGES_PER_TURN
        {
            break Ok(false);
        }
        match source.pop(turn.balloon.memory(), &mut turn.scratch.chain) {
            Ok(true) => {
                let token = turn.scratch.chain.token;
                batch.buffers += turn.scratch.chain.buffers();
                let written = carry_out(&mut batch, turn);
                turn.scratch.done.push((token, written));
            }
            Ok(false) => break Ok(true),
            Err(error) => break Err(error),
        }
    };
    if turn.scratch.done.is_empty() {
        return end;
    }
    give(turn);
    // Size and books are right before the guest, or anyone it tells, can look at them.
    turn.show_size();
    turn.books.enter(|entry| {
        let device = entry.device();
        bump(&mut device.inflate_chains, batch.gives);
        bump(&mut device.deflate_chains, batch.gets);
        bump(&mut device.chain_errors, batch.errors);
    });
    for &(token, written) in &turn.scratch.done {
        source.complete(token, written);
    }
    source.publish();
    end
}

/// Carries out the command in the scratch chain; returns how many bytes were written to it.
fn carry_out(batch: &mut Batch, turn: &mut Turn<'_>) -> u32 {
    let mut fields = std::mem::take(&mut batch.fields);
    let size = pages_per_page(turn.features);
    let understood = read(
        &turn.scratch.chain,
        turn.balloon.memory(),
        size,
        &mut fields,
    );
    let command = fields.first().copied().filter(|_| understood);
    let addresses = fields.get(1..).unwrap_or_default();
    batch.addresses += addresses.len() as u64;
    batch.pages += addresses.len() as u64 * size;
    let (right, written) = match command {
        Some(GIVE) => {
            batch.gives += 1;
            (gather(addresses, size, turn), 0)
        }
        Some(GET) => {
            batch.gets += 1;
            get(addresses, size, turn)
        }
        Some(EXCHANGE) => {
            batch.gives += 1;
            batch.gets += 1;
            exchange(addresses, size, turn)
        }
        _ => (false, 0),
    };
    batch.errors += u64::from(!right);
    batch.fields = fields;
    written
}

/// The most addresses that a command may have, of pages of `size`.
fn max_addresses(size: u64) -> u64 {
    (MAX_PAGES / size).clamp(2, MAX_ADDRESSES)
}

/// Reads a command: le64 fields, of which there are at least two, wherever descriptors divide them.
fn read(chain: &Chain, memory: &GuestMemory, size: u64, fields: &mut Vec<u64>) -> bool {
    fields.clear();
    let length = chain.readable_bytes();
    let lengths = 2 * FIELD_BYTES..=(1 + max_addresses(size)) * FIELD_BYTES;
    if chain.malformed || !lengths.contains(&length) || !length.is_multiple_of(FIELD_BYTES) {
        return false;
    }
    chain.read(memory, |bytes| {
        let (words, _rest) = bytes.as_chunks::<8>();
        fields.extend(words.iter().map(|word| u64::from_le_bytes(*word)));
    })
}

/// The page at `address`, which has to be aligned to its size.
fn page(address: u64, size: u64) -> Option<PfnRange> {
    address
        .is_multiple_of(size * BALLOON_PAGE_BYTES)
        .then(|| PfnRange::new(Pfn(address >> BALLOON_PAGE_SHIFT), size))
}

/// The pages at `addresses`, up to the first that is misaligned.
fn pages(addresses: &[u64], size: u64) -> Vec<PfnRange> {
    let pages = addresses.iter().map_while(|address| page(*address, size));
    pages.collect()
}

/// GIVE: notes the pages, which [`give`] puts into the balloon. False if one is no page of the guest's
/// memory; the others are taken all the same.
fn gather(addresses: &[u64], size: u64, turn: &mut Turn<'_>) -> bool {
    let before = turn.scratch.ranges.len();
    let whole = addresses.iter().filter_map(|address| page(*address, size));
    let whole = whole.filter(|page| turn.balloon.is_memory(*page));
    turn.scratch.ranges.extend(whole);
    let taken = turn.scratch.ranges.len() - before;
    let outside = (addresses.len() - taken) as u64;
    turn.balloon.refuse_outside(outside * size, turn.books);
    outside == 0
}

/// Puts all pages that were given since the last call into the balloon.
fn give(turn: &mut Turn<'_>) {
    if turn.scratch.ranges.is_empty() {
        return;
    }
    let duplicates = coalesce_ranges(&mut turn.scratch.ranges);
    turn.balloon
        .give(&turn.scratch.ranges, duplicates, turn.books);
    turn.scratch.ranges.clear();
}

/// GET: gives the guest as many pages from the first on as it may have, and tells it how many.
fn get(addresses: &[u64], size: u64, turn: &mut Turn<'_>) -> (bool, u32) {
    // Pages that an earlier command gave may be wanted back.
    give(turn);
    if !has_room(turn) {
        reject(addresses.len(), size, turn);
        return (false, 0);
    }
    let mut pages = pages(addresses, size);
    let granted = turn
        .balloon
        .takeable(&pages, turn.features & EXTRA_MEM != 0);
    reject(addresses.len() - granted, size, turn);
    pages.truncate(granted);
    take(&mut pages, turn);
    (true, answer(granted, turn))
}

/// EXCHANGE: as many pages come back as are given, or none at all.
fn exchange(addresses: &[u64], size: u64, turn: &mut Turn<'_>) -> (bool, u32) {
    give(turn);
    let (wanted, given) = addresses.split_at(addresses.len() / 2);
    let pairs = wanted.len();
    let (mut wanted, given) = (pages(wanted, size), pages(given, size));
    let extra = turn.features & EXTRA_MEM != 0;
    // Zero-sum: no grant is needed, as the balloon is as large afterwards as it was before.
    let right = [pairs, pairs] == [wanted.len(), given.len()]
        && addresses.len().is_multiple_of(2)
        && turn.balloon.ballooned(&wanted, extra) == pairs
        && turn.balloon.are_the_guests(&given);
    if right {
        turn.scratch.ranges.extend(given);
        give(turn);
        take(&mut wanted, turn);
    }
    let pairs = if right { pairs } else { 0 };
    let answer = if has_room(turn) {
        answer(pairs, turn)
    } else {
        0
    };
    (right, answer)
}

/// Takes `pages` out of the balloon: all are in it.
fn take(pages: &mut Vec<PfnRange>, turn: &mut Turn<'_>) {
    coalesce_ranges(pages);
    turn.balloon.take(pages, 0, turn.books);
}

/// Enters pages that were wanted and not given.
fn reject(pages: usize, size: u64, turn: &Turn<'_>) {
    let bytes = (pages as u64 * size).wrapping_mul(BALLOON_PAGE_BYTES);
    turn.books
        .enter(|entry| bump(&mut entry.device().rejected_take_bytes, bytes));
}

/// Whether the command has room for an answer.
fn has_room(turn: &Turn<'_>) -> bool {
    let count = size_of::<u64>();
    turn.scratch.chain.room(turn.balloon.memory(), count) == count
}

/// Writes how many pages went the guest's way.
fn answer(count: usize, turn: &Turn<'_>) -> u32 {
    let bytes = (count as u64).to_le_bytes();
    let written = turn.scratch.chain.write(turn.balloon.memory(), &bytes);
    u32::try_from(written).unwrap_or(0)
}
