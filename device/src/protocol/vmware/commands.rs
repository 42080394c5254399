//! What the guest's commands do.
//!
//! A batch is a page of guest memory with up to 512 entries. It is copied once, and answered before
//! anything is discarded: it may lie in a page that is given (I3).

use super::{BASIC, BATCHED, BATCHED_2M, Vmware};
use crate::balloon::{Reason, bump};
use crate::memory::{BALLOON_PAGE_BYTES, BALLOON_PAGE_SHIFT, Gpa, Pfn, PfnRange};
use crate::pages::ranges::coalesce_ranges;
use crate::protocol::contract::Turn;
use std::collections::BTreeSet;
use std::sync::Arc;

pub(super) const START: u64 = 0;
const GET_TARGET: u64 = 1;
const LOCK: u64 = 2;
const UNLOCK: u64 = 3;
const GUEST_ID: u64 = 4;
const BATCHED_LOCK: u64 = 6;
const BATCHED_UNLOCK: u64 = 7;
const BATCHED_2M_LOCK: u64 = 8;
const BATCHED_2M_UNLOCK: u64 = 9;

const SUCCESS: u32 = 0;
const CMD_INVALID: u32 = 1;
const PPN_INVALID: u32 = 2;
const PPN_LOCKED: u32 = 3;
const PPN_UNLOCKED: u32 = 4;
const PPN_PINNED: u32 = 5;
const PPN_NOTNEEDED: u32 = 6;
const RESET: u32 = 7;
const BUSY: u32 = 8;
/// START was understood, and the capabilities are in ECX.
const SUCCESS_WITH_CAPABILITIES: u32 = 0x0300_0000;

/// The most entries of a batch: a page of them.
const MAX_ENTRIES: u64 = 512;
const ENTRY_BYTES: usize = 8;
/// The page that they fill.
const BATCH_BYTES: usize = 4096;
/// An entry's status, its low bits. Above them seven bits are zero, and then comes the page's number.
const STATUS_BITS: u64 = 0x1f;
/// Pages of 4 KiB in one of 2 MiB.
const LARGE: u64 = 512;

/// The registers after a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmwareAnswer {
    /// EAX: 0 for success, 0x03000000 for success with capabilities, else why not.
    pub status: u32,
    /// What START puts into ECX (the capabilities) and other commands into EBX (the target in pages).
    pub result: u64,
}

impl VmwareAnswer {
    fn new(status: u32, result: u64) -> Self {
        Self { status, result }
    }

    /// Whether the command was carried out.
    #[must_use]
    pub fn is_success(&self) -> bool {
        matches!(self.status, SUCCESS | SUCCESS_WITH_CAPABILITIES)
    }
}

/// The answer of a device that is not active.
pub(super) fn inactive(command: u64, paused: bool) -> VmwareAnswer {
    // A guest that is told of a reset begins anew, which would lose the balloon of one that was paused.
    let status = if paused || command == START {
        BUSY
    } else {
        RESET
    };
    VmwareAnswer::new(status, 0)
}

/// Carries out one command.
pub(super) fn carry_out(
    vmware: &Vmware,
    command: u64,
    [first, second]: [u64; 2],
    turn: &mut Turn<'_>,
) -> VmwareAnswer {
    if command == START {
        return start(vmware, first, turn);
    }
    let needed = match command {
        GET_TARGET | GUEST_ID => 0,
        LOCK | UNLOCK => BASIC,
        BATCHED_LOCK | BATCHED_UNLOCK => BATCHED,
        BATCHED_2M_LOCK | BATCHED_2M_UNLOCK => BATCHED_2M,
        _ => return refuse(CMD_INVALID, turn),
    };
    if !vmware.started() {
        late(command, second, turn);
        return VmwareAnswer::new(RESET, 0);
    }
    if turn.features & needed != needed {
        return refuse(CMD_INVALID, turn);
    }
    let status = match command {
        LOCK | UNLOCK => single(vmware, command == LOCK, first, turn),
        BATCHED_LOCK => batch(vmware, true, 1, first, second, turn),
        BATCHED_UNLOCK => batch(vmware, false, 1, first, second, turn),
        BATCHED_2M_LOCK => batch(vmware, true, LARGE, first, second, turn),
        BATCHED_2M_UNLOCK => batch(vmware, false, LARGE, first, second, turn),
        _ => SUCCESS,
    };
    if matches!(status, CMD_INVALID | PPN_INVALID) {
        turn.books
            .enter(|entry| bump(&mut entry.device().chain_errors, 1));
    }
    let target = if command == GUEST_ID {
        0
    } else {
        vmware.target_pages(turn.features)
    };
    VmwareAnswer::new(status, target)
}

/// START: the guest has freed all pages of its balloon, and says what it can do. The first version of the
/// protocol put its number, 2, where capabilities are, and knows no other success than 0.
fn start(vmware: &Vmware, wanted: u64, turn: &mut Turn<'_>) -> VmwareAnswer {
    turn.balloon.reset(turn.books);
    turn.show_size();
    turn.features = 0;
    vmware.end_session();
    if wanted != 0 && wanted & BASIC == 0 {
        return refuse(CMD_INVALID, turn);
    }
    turn.features = wanted & vmware.offered;
    vmware.start(turn.books);
    if wanted & !BASIC == 0 {
        return VmwareAnswer::new(SUCCESS, 0);
    }
    VmwareAnswer::new(SUCCESS_WITH_CAPABILITIES, turn.features)
}

fn refuse(status: u32, turn: &Turn<'_>) -> VmwareAnswer {
    turn.books
        .enter(|entry| bump(&mut entry.device().chain_errors, 1));
    VmwareAnswer::new(status, 0)
}

/// Enters what came before START, or between a host reset and the START that acknowledges it (V3).
fn late(command: u64, entries: u64, turn: &Turn<'_>) {
    let entries = entries.min(MAX_ENTRIES);
    let (pages, lock) = match command {
        LOCK | UNLOCK => (1, command == LOCK),
        BATCHED_LOCK | BATCHED_UNLOCK => (entries, command == BATCHED_LOCK),
        BATCHED_2M_LOCK | BATCHED_2M_UNLOCK => (entries * LARGE, command == BATCHED_2M_LOCK),
        _ => return,
    };
    if lock {
        turn.balloon.turn_away(pages, true, turn.books);
    } else {
        let bytes = pages << BALLOON_PAGE_SHIFT;
        turn.books
            .enter(|entry| bump(&mut entry.device().late_take_bytes, bytes));
    }
}

/// LOCK or UNLOCK of one page; returns its status, which is the command's.
fn single(vmware: &Vmware, lock: bool, page: u64, turn: &mut Turn<'_>) -> u32 {
    let mut statuses = [SUCCESS];
    lock_or_unlock(vmware, lock, 1, &[page], &mut statuses, turn, |_, _| ());
    statuses[0]
}

/// LOCK or UNLOCK of a batch: the command succeeds if the batch can be read, and each entry has a status of
/// its own.
fn batch(
    vmware: &Vmware,
    lock: bool,
    size: u64,
    batch_page: u64,
    count: u64,
    turn: &mut Turn<'_>,
) -> u32 {
    if !(1..=MAX_ENTRIES).contains(&count) {
        return CMD_INVALID;
    }
    let Some(gpa) = batch_page.checked_mul(BALLOON_PAGE_BYTES).map(Gpa) else {
        return PPN_INVALID;
    };
    let memory = turn.balloon.memory();
    let writable = memory.find(gpa).is_some_and(|(_, region)| !region.readonly);
    let mut bytes = [0; BATCH_BYTES];
    let slice = memory.slice_prefix(gpa, BALLOON_PAGE_BYTES);
    let read = slice.map_or(0, |slice| slice.read(0, &mut bytes));
    if !writable || read != bytes.len() {
        return PPN_INVALID;
    }
    let (entries, _rest) = bytes.as_chunks::<ENTRY_BYTES>();
    let entries = entries.iter().map(|entry| u64::from_le_bytes(*entry));
    let count = usize::try_from(count).unwrap_or(0);
    let pages: Vec<u64> = entries.take(count).map(page_of).collect();
    let mut statuses = vec![SUCCESS; count];
    let memory = Arc::clone(memory);
    lock_or_unlock(
        vmware,
        lock,
        size,
        &pages,
        &mut statuses,
        turn,
        |pages, statuses| {
            let entry = |(page, status): (&u64, &u32)| {
                let page = page << BALLOON_PAGE_SHIFT;
                (page | u64::from(*status) & STATUS_BITS).to_le_bytes()
            };
            let answers: Vec<u8> = pages.iter().zip(statuses).flat_map(entry).collect();
            if let Some(slice) = memory.slice_prefix(gpa, BALLOON_PAGE_BYTES) {
                slice.write(0, &answers);
            }
        },
    );
    SUCCESS
}

/// The page that an entry names.
fn page_of(entry: u64) -> u64 {
    entry >> BALLOON_PAGE_SHIFT
}

/// Locks or unlocks `pages` of `size` times 4 KiB, and calls `answer` when each has its status, before
/// anything is discarded.
fn lock_or_unlock(
    vmware: &Vmware,
    lock: bool,
    size: u64,
    pages: &[u64],
    statuses: &mut [u32],
    turn: &mut Turn<'_>,
    answer: impl FnOnce(&[u64], &[u32]),
) {
    if lock {
        let offered: Vec<Pfn> = pages.iter().map(|page| aligned(*page, size)).collect();
        let limit = vmware.target_pages(turn.features);
        turn.balloon
            .offer(&offered, size, limit, turn.books, |place, reason| {
                if let Some(status) = statuses.get_mut(place) {
                    *status = status_of(reason);
                }
            });
        answer(pages, statuses);
        turn.balloon.settle(turn.books);
    } else {
        unlock(pages, size, statuses, turn);
        answer(pages, statuses);
    }
    turn.show_size();
    turn.books.enter(|entry| {
        let device = entry.device();
        let chains = if lock {
            &mut device.inflate_chains
        } else {
            &mut device.deflate_chains
        };
        bump(chains, 1);
    });
}

/// A page's number, or one that is in no memory if it is not aligned to its size.
fn aligned(page: u64, size: u64) -> Pfn {
    const NOWHERE: u64 = u64::MAX >> BALLOON_PAGE_SHIFT;
    if page.is_multiple_of(size) {
        Pfn(page.min(NOWHERE))
    } else {
        Pfn(NOWHERE)
    }
}

fn status_of(reason: Reason) -> u32 {
    match reason {
        Reason::OutOfRange => PPN_INVALID,
        Reason::Duplicate => PPN_LOCKED,
        Reason::Inhibited => BUSY,
        Reason::Pinned => PPN_PINNED,
        Reason::OverTarget => PPN_NOTNEEDED,
    }
}

/// Takes those of `pages` out of the balloon that are wholly in it.
fn unlock(pages: &[u64], size: u64, statuses: &mut [u32], turn: &mut Turn<'_>) {
    let (mut taken, mut named) = (Vec::new(), BTreeSet::new());
    let mut rejected = 0;
    for (&page, status) in pages.iter().zip(statuses) {
        let page = PfnRange {
            start: aligned(page, size),
            end: Pfn(aligned(page, size).0.saturating_add(size)),
        };
        if !turn.balloon.is_memory(page) {
            *status = PPN_INVALID;
        } else if turn.balloon.ballooned(&[page], false) == 0 || !named.insert(page.start) {
            *status = PPN_UNLOCKED;
        } else {
            taken.push(page);
            continue;
        }
        rejected += page.bytes();
    }
    coalesce_ranges(&mut taken);
    turn.balloon.take(&taken, 0, turn.books);
    turn.books
        .enter(|entry| bump(&mut entry.device().rejected_take_bytes, rejected));
}
