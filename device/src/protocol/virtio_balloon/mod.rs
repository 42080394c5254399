//! The traditional memory balloon, device ID 5 (virtio 1.x, section 5.5; requirements S).

mod config;
mod control;
mod device;
mod hints;
mod queues;
mod refusal;
mod stats;

pub(crate) use config::config_bytes;
use config::{ConfigSpace, SavedConfig};
pub(crate) use device::VirtioBalloon;
pub use hints::HintState;
use hints::{HintBoard, MAX_ROUND};
pub(crate) use queues::QUEUES;
use queues::{Role, role_of};
use stats::StatsBoard;

use crate::balloon::{Balloon, bump};
use crate::memory::{BALLOON_PAGE_BYTES, Gpa, GuestMemory, Pfn, PfnRange};
use crate::metrics::{Books, Counters};
use crate::pages::ranges::{coalesce_pages, coalesce_ranges};
use crate::ring::RingError;
use crate::ring::chain::{Chain, Segment};
use crate::ring::source::Source;
use crate::runtime::Scratch;
use crate::trace::{Kind, Tape};
use std::sync::atomic::{AtomicU64, Ordering};

bitflags::bitflags! {
    /// The feature bits that this device knows (5.5.3, 6).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// The driver tells the device before it uses pages of the balloon again.
        const MUST_TELL_HOST = 1 << 0;
        /// The driver reports statistics.
        const STATS_VQ = 1 << 1;
        /// The driver may take pages back when the guest runs out of memory.
        const DEFLATE_ON_OOM = 1 << 2;
        /// The driver says which pages are free when it is asked.
        const FREE_PAGE_HINT = 1 << 3;
        /// The driver says what it fills free pages with.
        const PAGE_POISON = 1 << 4;
        /// The driver reports free pages.
        const PAGE_REPORTING = 1 << 5;
        /// Chains may be in indirect tables.
        const INDIRECT_DESC = 1 << 28;
        /// Notifications are suppressed by index.
        const EVENT_IDX = 1 << 29;
        /// The device and driver follow virtio 1.0 or later.
        const VERSION_1 = 1 << 32;
        /// Queues have the packed layout.
        const RING_PACKED = 1 << 34;
        /// Buffers are used in the order in which they were made available: the device always does.
        const IN_ORDER = 1 << 35;
        /// The device may refuse pages, and says which (docs/virtio-balloon-extensions.md; V1, V2).
        const PAGE_REFUSAL = 1 << 50;
        /// The device may give all pages back at once (docs/virtio-balloon-extensions.md; V3).
        const HOST_RESET = 1 << 51;
        /// The balloon has a target on each node of the guest (docs/virtio-balloon-extensions.md; X2).
        const NODE_TARGETS = 1 << 52;
    }
}

impl Features {
    /// What is offered unless the VMM chooses. DEFLATE_ON_OOM is left to the VMM since it lets a guest
    /// undo what the host decided; the packed layout and IN_ORDER since VMMs have to know about them;
    /// PAGE_REFUSAL, HOST_RESET and NODE_TARGETS since they are not in the standard (V4).
    pub(super) const DEFAULT: Self = Self::all()
        .difference(Self::DEFLATE_ON_OOM)
        .difference(Self::RING_PACKED)
        .difference(Self::IN_ORDER)
        .difference(Self::FREE_PAGE_HINT)
        .difference(Self::PAGE_REFUSAL)
        .difference(Self::HOST_RESET)
        .difference(Self::NODE_TARGETS);
}

/// The most PFNs a chain may carry: 4 MiB of memory; stock drivers send 256 to 1024. More is taken
/// as malformed, so that a single chain of scattered pages cannot keep a worker, and whoever waits for
/// the device, busy for longer than some milliseconds (I3).
const MAX_CHAIN_PFNS: u64 = 1 << 10;
/// The most buffers a report may have; stock drivers send up to 32. More is taken as malformed, as each may
/// cost a call.
const MAX_REPORT_BUFFERS: usize = 1 << 10;
/// A PFN is an le32 (5.5.6.1).
const PFN_BYTES: u64 = 4;
/// How much is served before other devices get a turn.
const MAX_CHAINS_PER_TURN: usize = 256;
/// Descriptors, as many as the largest queue has. A guest may have all its chains share one indirect table
/// of empty buffers, which bring no entry: without this bound a turn would walk millions.
const MAX_BUFFERS_PER_TURN: usize = 1 << 15;
/// Listed pages and reported ranges, each of which may cost a discard of its own.
const MAX_ENTRIES_PER_TURN: usize = 1 << 10;
/// Reported memory: 1 GiB, eight times what Linux reports in a chain.
const MAX_REPORTED_PAGES_PER_TURN: u64 = 1 << 18;
/// How often a queue that keeps filling up is looked at again within one turn.
const MAX_ROUNDS_PER_TURN: u32 = 4;

/// What one turn of serving works with.
#[derive(Debug)]
struct Turn<'a> {
    balloon: &'a mut Balloon,
    scratch: &'a mut Scratch,
    books: &'a Books,
    tape: &'a Tape,
    stats: &'a StatsBoard,
    hints: &'a HintBoard,
    config: &'a ConfigSpace,
    /// PAGE_REFUSAL was negotiated.
    refusal: bool,
    /// The balloon's size, for those who must not wait for its lock.
    ballooned_bytes: &'a AtomicU64,
    /// PAGE_POISON was negotiated with a value other than zero (S10).
    poisoned: bool,
}

/// How a batch of chains is read and carried out.
struct Handler {
    /// Reads the chain into the scratch buffers; false if its content makes no sense. Also returns how
    /// many bytes were written to it.
    read: fn(&mut Turn<'_>) -> (bool, u32),
    /// Acts on all chains of the batch at once.
    act: fn(&mut Turn<'_>),
    /// The counter of completed chains.
    chains: fn(&mut Counters) -> &mut u64,
}

/// Serves one of the queues that carry pages; true if there is more to do.
///
/// Chains are popped in batches, acted on together, and completed with one update of the used
/// index. With `Err`, what came before the fault has been served.
fn serve_pages(role: Role, source: &mut Source, turn: &mut Turn<'_>) -> Result<bool, RingError> {
    let handler = match role {
        Role::Inflate if turn.refusal => Handler {
            read: refusal::answer,
            act: |turn| turn.balloon.settle(turn.books),
            chains: |counters| &mut counters.inflate_chains,
        },
        Role::Inflate => Handler {
            read: |turn| read_pfns(turn, Kind::Inflate),
            act: |turn| {
                // Looked at after the chains were popped: what follows an acknowledgement is not late.
                if turn.config.reset_pending() {
                    let pages = turn.scratch.pages.len() as u64;
                    return turn.balloon.turn_away(pages, false, turn.books);
                }
                let Scratch { pages, ranges, .. } = &mut *turn.scratch;
                turn.balloon.give_pages(pages, ranges, turn.books);
            },
            chains: |counters| &mut counters.inflate_chains,
        },
        Role::Deflate => Handler {
            read: |turn| read_pfns(turn, Kind::Deflate),
            act: |turn| {
                if turn.config.reset_pending() {
                    let late = (turn.scratch.pages.len() as u64).wrapping_mul(BALLOON_PAGE_BYTES);
                    return turn
                        .books
                        .enter(|entry| bump(&mut entry.device().late_take_bytes, late));
                }
                let duplicates = coalesce_pages(&mut turn.scratch.pages, &mut turn.scratch.ranges);
                turn.balloon
                    .take(&turn.scratch.ranges, duplicates, turn.books);
            },
            chains: |counters| &mut counters.deflate_chains,
        },
        Role::Reporting => Handler {
            read: read_reports,
            act: |turn| {
                let duplicates = coalesce_ranges(&mut turn.scratch.ranges);
                turn.balloon
                    .report(&turn.scratch.ranges, duplicates, turn.poisoned, turn.books);
            },
            chains: |counters| &mut counters.report_chains,
        },
        Role::Stats => return stats::serve(source, turn),
        Role::Hints => return hints::serve(source, turn),
    };
    for _ in 0..MAX_ROUNDS_PER_TURN {
        source.suppress_kicks();
        let exhausted = serve_batch(&handler, source, turn)?;
        if !exhausted {
            return Ok(true);
        }
        if !source.want_kicks() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Pops, acts, completes. Returns whether the queue was empty at the end.
fn serve_batch(
    handler: &Handler,
    source: &mut Source,
    turn: &mut Turn<'_>,
) -> Result<bool, RingError> {
    turn.scratch.pages.clear();
    turn.scratch.ranges.clear();
    turn.scratch.done.clear();
    let (mut errors, mut buffers) = (0, 0);
    let end = loop {
        let scratch = &mut *turn.scratch;
        let reported_pages: u64 = scratch.ranges.iter().map(PfnRange::pages).sum();
        if scratch.done.len() >= MAX_CHAINS_PER_TURN
            || buffers >= MAX_BUFFERS_PER_TURN
            || scratch.pages.len() + scratch.ranges.len() >= MAX_ENTRIES_PER_TURN
            || reported_pages >= MAX_REPORTED_PAGES_PER_TURN
        {
            break Ok(false);
        }
        let memory = turn.balloon.memory();
        match source.pop(memory, &mut scratch.chain) {
            Ok(true) => {
                let token = scratch.chain.token;
                let (understood, written) = (handler.read)(turn);
                errors += u64::from(!understood);
                buffers += turn.scratch.chain.buffers();
                turn.scratch.done.push((token, written));
            }
            Ok(false) => break Ok(true),
            Err(error) => break Err(error),
        }
    };
    if turn.scratch.done.is_empty() {
        return end;
    }
    (handler.act)(turn);
    // Size and books are right before the guest, or anyone it tells, can look at them.
    turn.ballooned_bytes
        .store(turn.balloon.ballooned_bytes(), Ordering::Release);
    turn.books.enter(|entry| {
        let device = entry.device();
        bump((handler.chains)(device), turn.scratch.done.len() as u64);
        bump(&mut device.chain_errors, errors);
    });
    for &(token, written) in &turn.scratch.done {
        source.complete(token, written);
    }
    source.publish();
    end
}

/// Reads a chain that is a list of PFNs and nothing else. Nothing is written to it.
fn read_pfns(turn: &mut Turn<'_>, kind: Kind) -> (bool, u32) {
    let Scratch { chain, pages, .. } = &mut *turn.scratch;
    let before = pages.len();
    let understood = !chain.malformed && read_list(chain, turn.balloon.memory(), pages);
    turn.tape
        .pages(kind, pages.get(before..).unwrap_or_default());
    (understood && chain.writable.is_empty(), 0)
}

/// Appends the chain's PFNs (5.5.6.1). They are copied before anything is discarded: the pages may
/// be the ones that hold the list.
fn read_list(chain: &Chain, memory: &GuestMemory, pages: &mut Vec<Pfn>) -> bool {
    let length = chain.readable_bytes();
    if length > MAX_CHAIN_PFNS * PFN_BYTES {
        return false;
    }
    let whole = chain.read(memory, |bytes| {
        let (pfns, _rest) = bytes.as_chunks::<4>();
        pages.extend(
            pfns.iter()
                .map(|pfn| Pfn(u64::from(u32::from_le_bytes(*pfn)))),
        );
    });
    whole && length > 0 && length.is_multiple_of(PFN_BYTES)
}

/// Appends the reported ranges (5.5.6.7): they are the chain's writable buffers themselves.
fn read_reports(turn: &mut Turn<'_>) -> (bool, u32) {
    let Scratch { chain, ranges, .. } = &mut *turn.scratch;
    if chain.malformed || chain.writable.len() > MAX_REPORT_BUFFERS {
        return (false, 0);
    }
    let directions = chain.readable.is_empty() && !chain.writable.is_empty();
    let before = ranges.len();
    let understood = read_reports_of(&chain.writable, turn.balloon.memory(), ranges);
    turn.tape
        .ranges(Kind::Report, ranges.get(before..).unwrap_or_default());
    (understood && directions, 0)
}

/// Appends the pages that `buffers` are.
fn read_reports_of(buffers: &[Segment], memory: &GuestMemory, ranges: &mut Vec<PfnRange>) -> bool {
    let mut understood = true;
    for segment in buffers {
        let mut parts = [None; 2];
        match segment {
            Segment::Guest { gpa, len } => parts[0] = Some((*gpa, u64::from(*len))),
            Segment::Host(iov) => {
                // A buffer that the VMM mapped may reach over the end of one region into another
                // that happens to follow it; more than two is not a buffer any VMM hands over.
                let first = memory.guest_address_of(iov.address());
                if let Some((gpa, room)) = first {
                    let length = (iov.len() as u64).min(room);
                    parts[0] = Some((gpa, length));
                    let rest = iov.len() as u64 - length;
                    let next = iov
                        .address()
                        .wrapping_add(usize::try_from(length).unwrap_or(0));
                    if rest > 0 {
                        parts[1] = memory
                            .guest_address_of(next)
                            .filter(|(_, room)| rest <= *room)
                            .map(|(gpa, _)| (gpa, rest));
                        understood &= parts[1].is_some();
                    }
                }
                understood &= first.is_some();
            }
        }
        for (gpa, length) in parts.into_iter().flatten() {
            match whole_pages(gpa, length) {
                Some(range) => ranges.push(range),
                None => understood = false,
            }
        }
    }
    understood
}

/// The pages of a reported buffer, which has to consist of whole ones.
fn whole_pages(gpa: Gpa, length: u64) -> Option<PfnRange> {
    let page = BALLOON_PAGE_BYTES;
    let end = gpa.0.checked_add(length)?;
    let aligned = gpa.0.is_multiple_of(page) && length.is_multiple_of(page) && length > 0;
    aligned.then_some(PfnRange {
        start: Pfn(gpa.0 / page),
        end: Pfn(end / page),
    })
}

#[cfg(test)]
#[path = "turn_tests.rs"]
#[allow(unsafe_code, reason = "elements are described by raw memory")]
mod tests;
