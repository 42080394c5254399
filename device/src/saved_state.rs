//! The bytes of a saved device (requirement S13), as docs/saved-state.md specifies them. Pure: bytes to
//! values and back.
//!
//! What is read is untrusted (I3): a checksum finds accidents, and since it keeps nobody from writing
//! what he likes, every field is checked as well. Nothing is allocated by a number in the input: runs of
//! pages are handed on one by one.

use crate::device::{DeviceState, QueuePosition};
use crate::error::{Error, Result};
use crate::memory::{BALLOON_PAGE_SHIFT, Pfn, PfnRange};
use crate::protocol::DeviceKind;
use crate::target::{MAX_TARGET_NODES, Target};

/// The first eight bytes.
const MAGIC: [u8; 8] = *b"AEROSTAT";
/// The version that is written where the target is one for the whole balloon.
const VERSION: u32 = 2;
/// The version that is written where there is a target for each node.
const NODES_VERSION: u32 = 3;
/// Had the traditional balloon's fields and queues in fixed places; is still read.
const FIRST_VERSION: u32 = 1;
/// What every state has before its queues, the protocol's own part, and the runs.
const HEADER_BYTES: usize = 64;
/// Queues of the traditional balloon, and bytes of its own part, in the first version.
const FIRST_QUEUES: u32 = 5;
const FIRST_OWN_BYTES: usize = 20;
/// The most bytes that a protocol's own part may have.
pub(crate) const MAX_OWN_BYTES: usize = 4096;
const CHECKSUM_BYTES: usize = 4;
const LENGTH_AT: usize = 16;
pub(crate) const KIND_AT: usize = 44;
/// The features were selected: without it `negotiated` is 0.
const FLAG_NEGOTIATED: u32 = 1 << 0;
/// What a queue entry says of its kind.
const QUEUE_STOPPED: u16 = 0;
const QUEUE_RING: u16 = 1;
const QUEUE_ELEMENTS: u16 = 2;
/// Page numbers stay far below this, so that addresses cannot overflow.
const MAX_PFN: u64 = 1 << 51;

/// A queue that was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SavedQueue {
    Ring {
        position: QueuePosition,
    },
    /// The VMM popped its elements and knows where it was.
    Elements,
}

/// A device but for the pages in its balloon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SavedState {
    pub(crate) state: DeviceState,
    pub(crate) offered: u64,
    pub(crate) negotiated: Option<u64>,
    pub(crate) kind: DeviceKind,
    /// The target as it was set, which may be more than the guest's memory can give.
    pub(crate) wanted: Target,
    pub(crate) queues: Vec<Option<SavedQueue>>,
    /// What the protocol alone understands.
    pub(crate) own: Vec<u8>,
}

/// Bytes that are no saved state.
fn bad(what: &'static str, offset: usize) -> Error {
    Error::SavedState { what, offset }
}

/// Writes a state; `runs` calls back with the runs of ballooned pages in ascending order.
pub(crate) fn encode(state: &SavedState, runs: impl FnOnce(&mut dyn FnMut(PfnRange))) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4096);
    bytes.extend(MAGIC);
    let nodes = state.wanted.nodes();
    let version = if nodes.is_empty() {
        VERSION
    } else {
        NODES_VERSION
    };
    bytes.extend(version.to_le_bytes());
    bytes.extend((state.state as u32).to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(state.offered.to_le_bytes());
    bytes.extend(state.negotiated.unwrap_or(0).to_le_bytes());
    let flags = state.negotiated.map_or(0, |_| FLAG_NEGOTIATED);
    bytes.extend(flags.to_le_bytes());
    bytes.extend((state.kind as u32).to_le_bytes());
    bytes.extend(state.wanted.bytes().to_le_bytes());
    // Both are far below 4 Gi: of a protocol's own making.
    for count in [state.queues.len(), state.own.len()] {
        bytes.extend(u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
    }
    for queue in &state.queues {
        let entry = match queue {
            None => [QUEUE_STOPPED, 0, 0, 0],
            Some(SavedQueue::Elements) => [QUEUE_ELEMENTS, 0, 0, 0],
            Some(SavedQueue::Ring { position }) => {
                [QUEUE_RING, position.next_avail, position.next_used, 0]
            }
        };
        bytes.extend(entry.iter().flat_map(|half| half.to_le_bytes()));
    }
    bytes.extend(&state.own);
    if !nodes.is_empty() {
        let count = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
        bytes.extend(count.to_le_bytes());
        bytes.extend(nodes.iter().flat_map(|node| node.to_le_bytes()));
    }
    // Runs of neighbouring regions may touch; here each is as long as it can be.
    let mut last = Pfn(0);
    let mut current: Option<PfnRange> = None;
    let mut put = |run: PfnRange| {
        put_number(&mut bytes, run.start.0 - last.0);
        put_number(&mut bytes, run.pages());
        last = run.end;
    };
    runs(&mut |run| match &mut current {
        Some(open) if open.end == run.start => open.end = run.end,
        _ => {
            if let Some(done) = current.replace(run) {
                put(done);
            }
        }
    });
    if let Some(done) = current {
        put(done);
    }
    let total = (bytes.len() + CHECKSUM_BYTES) as u64;
    for (byte, of_total) in bytes.iter_mut().skip(LENGTH_AT).zip(total.to_le_bytes()) {
        *byte = of_total;
    }
    bytes.extend(crc32(&bytes).to_le_bytes());
    bytes
}

/// Reads a state; the runs of ballooned pages are still to be read.
pub(crate) fn decode(bytes: &[u8]) -> Result<(SavedState, Runs<'_>)> {
    if !bytes.starts_with(&MAGIC) {
        return Err(bad("it does not begin like one", 0));
    }
    let mut fields = Fields {
        bytes,
        at: MAGIC.len(),
    };
    let version = fields.u32()?;
    if !(FIRST_VERSION..=NODES_VERSION).contains(&version) {
        return Err(Error::SavedVersion {
            found: version,
            known: NODES_VERSION,
        });
    }
    let state = fields.u32()?;
    let total = fields.u64()?;
    if total != bytes.len() as u64 {
        return Err(bad(
            "it is not as long as it says: cut off, or not one whole state",
            LENGTH_AT,
        ));
    }
    let covered = bytes
        .split_last_chunk::<CHECKSUM_BYTES>()
        .filter(|(covered, _)| covered.len() >= HEADER_BYTES);
    let (covered, checksum) = covered.ok_or_else(|| bad("it is too short", bytes.len()))?;
    if crc32(covered) != u32::from_le_bytes(*checksum) {
        return Err(bad("its checksum is wrong: it was damaged", covered.len()));
    }
    let state = match state {
        0 => DeviceState::Configuring,
        1 => DeviceState::Active,
        2 => DeviceState::Paused,
        3 => DeviceState::NeedsReset,
        _ => return Err(bad("an unknown device state", 12)),
    };
    let offered = fields.u64()?;
    let negotiated = fields.u64()?;
    let flags = fields.u32()?;
    if flags & !FLAG_NEGOTIATED != 0 {
        return Err(bad("unknown flags", 40));
    }
    let selected = flags & FLAG_NEGOTIATED != 0;
    if negotiated & !offered != 0 || (!selected && negotiated != 0) {
        return Err(bad("selected features that were not offered", 32));
    }
    if !selected && state != DeviceState::Configuring {
        return Err(bad("a device that runs without features", 40));
    }
    let body = if version == FIRST_VERSION {
        first_body(&mut fields, selected)?
    } else {
        body(&mut fields, version, selected)?
    };
    let saved = SavedState {
        state,
        offered,
        negotiated: selected.then_some(negotiated),
        kind: body.kind,
        wanted: body.wanted,
        queues: body.queues,
        own: body.own,
    };
    let (bytes, at) = (covered, fields.at);
    let runs = Runs {
        fields: Fields { bytes, at },
        last: Pfn(0),
        first: true,
    };
    Ok((saved, runs))
}

/// What versions put into different places.
struct Body {
    kind: DeviceKind,
    wanted: Target,
    queues: Vec<Option<SavedQueue>>,
    own: Vec<u8>,
}

/// What follows the flags in all versions but the first.
fn body(fields: &mut Fields<'_>, version: u32, selected: bool) -> Result<Body> {
    let at = fields.at;
    let kind = DeviceKind::from_number(fields.u32()?);
    let kind = kind.ok_or_else(|| bad("an unknown protocol", at))?;
    let wanted_bytes = fields.u64()?;
    if fields.u32()? != u32::from(kind.queues()) {
        return Err(bad("another number of queues", fields.at - 4));
    }
    let own_bytes = usize::try_from(fields.u32()?).unwrap_or(usize::MAX);
    if own_bytes > MAX_OWN_BYTES {
        return Err(bad(
            "a part of the protocol that is too long",
            fields.at - 4,
        ));
    }
    let queues = queues(fields, u32::from(kind.queues()), selected)?;
    let own = fields.bytes(own_bytes)?.to_vec();
    let wanted = if version == NODES_VERSION {
        node_targets(fields, wanted_bytes)?
    } else {
        Target::whole(wanted_bytes)
    };
    Ok(Body {
        kind,
        wanted,
        queues,
        own,
    })
}

/// A target for each node, whose sum is `bytes`.
fn node_targets(fields: &mut Fields<'_>, bytes: u64) -> Result<Target> {
    let at = fields.at;
    let count = usize::try_from(fields.u32()?).unwrap_or(usize::MAX);
    let nodes = (0..count.min(MAX_TARGET_NODES + 1)).map(|_| fields.u64());
    let nodes = nodes.collect::<Result<Vec<_>>>()?;
    let target = Target::by_node(&nodes).ok();
    target
        .filter(|target| target.bytes() == bytes && target.nodes() == nodes)
        .ok_or_else(|| bad("targets of nodes that are not the balloon's", at))
}

/// The same in the first version, which knew the traditional balloon only.
fn first_body(fields: &mut Fields<'_>, selected: bool) -> Result<Body> {
    let target_pages = fields.u32()?;
    let own = fields.bytes(FIRST_OWN_BYTES)?.to_vec();
    if fields.u32()? != FIRST_QUEUES {
        return Err(bad("another number of queues", fields.at - 4));
    }
    Ok(Body {
        kind: DeviceKind::VirtioBalloon,
        wanted: Target::whole(u64::from(target_pages) << BALLOON_PAGE_SHIFT),
        queues: queues(fields, FIRST_QUEUES, selected)?,
        own,
    })
}

fn queues(fields: &mut Fields<'_>, count: u32, selected: bool) -> Result<Vec<Option<SavedQueue>>> {
    let queue = |_| {
        let at = fields.at;
        let entry = [fields.u16()?, fields.u16()?, fields.u16()?, fields.u16()?];
        let queue = match entry {
            [QUEUE_STOPPED, 0, 0, 0] => None,
            [QUEUE_ELEMENTS, 0, 0, 0] => Some(SavedQueue::Elements),
            [QUEUE_RING, next_avail, next_used, 0] => {
                let position = QueuePosition {
                    next_avail,
                    next_used,
                };
                Some(SavedQueue::Ring { position })
            }
            _ => return Err(bad("an unknown kind of queue", at)),
        };
        if queue.is_some() && !selected {
            return Err(bad("a queue without features", at));
        }
        Ok(queue)
    };
    (0..count).map(queue).collect()
}

/// The runs of ballooned pages: ascending, none empty, none touching the next.
#[derive(Debug)]
pub(crate) struct Runs<'a> {
    fields: Fields<'a>,
    last: Pfn,
    first: bool,
}

impl Runs<'_> {
    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.fields.at >= self.fields.bytes.len()
    }

    fn read(&mut self) -> Result<PfnRange> {
        let at = self.fields.at;
        let gap = self.fields.number()?;
        let pages = self.fields.number()?;
        if pages == 0 || (gap == 0 && !self.first) {
            return Err(bad("an empty run of pages, or two that touch", at));
        }
        self.first = false;
        let start = self.last.0.checked_add(gap);
        let end = start.and_then(|start| start.checked_add(pages));
        match (start, end) {
            (Some(start), Some(end)) if end <= MAX_PFN => {
                self.last = Pfn(end);
                Ok(PfnRange {
                    start: Pfn(start),
                    end: Pfn(end),
                })
            }
            _ => Err(bad("a page number that no guest can have", at)),
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<PfnRange>;

    /// The next run, or what is wrong with it; nothing comes behind an error.
    fn next(&mut self) -> Option<Self::Item> {
        if self.fields.at >= self.fields.bytes.len() {
            return None;
        }
        let run = self.read();
        if run.is_err() {
            self.fields.at = self.fields.bytes.len();
        }
        Some(run)
    }
}

/// Reads numbers one after the other.
#[derive(Debug)]
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..);
        let taken = rest.and_then(|rest| rest.get(..count));
        let taken = taken.ok_or_else(|| bad("it ends too early", self.at))?;
        self.at += count;
        Ok(taken)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let rest = self.bytes.get(self.at..);
        let chunk = rest.and_then(|rest| rest.first_chunk::<N>());
        let chunk = chunk.ok_or_else(|| bad("it ends too early", self.at))?;
        self.at += N;
        Ok(*chunk)
    }

    fn u16(&mut self) -> Result<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// A number in groups of seven bits, low ones first, in as few bytes as possible (LEB128).
    fn number(&mut self) -> Result<u64> {
        let at = self.at;
        let mut value = 0u64;
        for shift in (0..u64::BITS).step_by(7) {
            let [byte] = self.take::<1>()?;
            let group = u64::from(byte & 0x7f);
            if group << shift >> shift != group || (byte == 0 && shift > 0) {
                break;
            }
            value |= group << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(bad("a number that is too long", at))
    }
}

fn put_number(bytes: &mut Vec<u8>, mut value: u64) {
    loop {
        let [group, ..] = (value & 0x7f).to_le_bytes();
        value >>= 7;
        if value == 0 {
            bytes.push(group);
            return;
        }
        bytes.push(group | 0x80);
    }
}

/// CRC-32 as in Ethernet and zlib (polynomial 0xedb88320, reflected).
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0u32;
        while index < 256 {
            let mut value = index;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 1 {
                    value >> 1 ^ 0xedb8_8320
                } else {
                    value >> 1
                };
                bit += 1;
            }
            table[index as usize] = value;
            index += 1;
        }
        table
    };
    let step = |crc: u32, byte: &u8| {
        let [low, ..] = crc.to_le_bytes();
        crc >> 8 ^ TABLE[usize::from(low ^ byte)]
    };
    !bytes.iter().fold(!0, step)
}

#[cfg(test)]
#[path = "saved_state_tests.rs"]
mod tests;
