//! The bytes of a saved device as somebody else may have written them (docs/saved-state.md): anything, or
//! fields of which some make no sense, with the right checksum. What is accepted has to behave: the device
//! goes on from there under the same oracles as any other.

use crate::device;
use crate::script::{Few, Layout, Script, interesting};
use arbitrary::{Arbitrary, Result, Unstructured};

const LENGTH_AT: usize = 16;
const CHECKSUM_BYTES: usize = 4;
const PACKED: u64 = 1 << 34;

/// Restores what the bytes describe, and plays what follows in them.
///
/// # Panics
/// If an oracle is violated.
pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let (Ok(saved), Ok(script)) = (input.arbitrary::<Saved>(), input.arbitrary::<Script>()) else {
        return;
    };
    let layout = if saved.negotiated() & PACKED == 0 {
        Layout::Split
    } else {
        Layout::Packed
    };
    device::play_saved(&saved.bytes(), &script, layout);
}

#[derive(Arbitrary, Debug)]
enum Saved {
    Fields(Box<Fields>),
    Anything(Few<u8>),
}

impl Saved {
    fn negotiated(&self) -> u64 {
        match self {
            Self::Fields(fields) => fields.negotiated.0,
            Self::Anything(_) => 0,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Fields(fields) => fields.bytes(),
            Self::Anything(bytes) => bytes.0.clone(),
        }
    }
}

/// A set of features: mostly those that the device knows.
#[derive(Debug)]
struct FeatureBits(u64);

impl<'a> Arbitrary<'a> for FeatureBits {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        let bits: u64 = input.arbitrary()?;
        let known = aerostat_device::DeviceKind::VirtioBalloon.supported_features();
        let anything = input.ratio(1u8, 16u8)?;
        Ok(Self(if anything { bits } else { bits & known }))
    }
}

#[derive(Arbitrary, Debug)]
struct Fields {
    version: u8,
    state: u8,
    offered: FeatureBits,
    negotiated: FeatureBits,
    flags: u8,
    /// Target, `actual`, `poison_val`, id of hints, `reset_id`, `reset_ack`.
    words: [u32; 6],
    queue_count: u8,
    /// Kind, positions, what has to be zero.
    queues: [(u8, u16, u16, u8); 5],
    runs: Few<(Number, Number)>,
    /// What the length says beyond what is right.
    extra: i8,
    behind: Few<u8>,
    sealed: bool,
}

/// A number of a run of pages.
#[derive(Arbitrary, Debug)]
enum Number {
    /// How far it is to that page from where the last run ends, or so many pages.
    Page(u8),
    Few(u8),
    Any(u64),
    /// Written with a byte more than is needed.
    Long(u8),
}

impl Fields {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"AEROSTAT".to_vec();
        let rare = |byte: u8| u32::from(byte) * u32::from(byte >= 0xf0);
        let newest = self.version % 2 == 1;
        let version = 1 + u32::from(newest) + rare(self.version);
        bytes.extend(version.to_le_bytes());
        bytes.extend(u32::from(self.state % 5).to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        // Selected features that were not offered are seldom worth a try.
        let offered = self.offered.0
            | if self.flags < 0xf0 {
                self.negotiated.0
            } else {
                0
            };
        bytes.extend(offered.to_le_bytes());
        bytes.extend(self.negotiated.0.to_le_bytes());
        let flags = if self.flags < 0xf0 {
            1
        } else {
            u32::from(self.flags & 3)
        };
        bytes.extend(flags.to_le_bytes());
        let [target, own @ ..] = self.words;
        let own: Vec<u8> = own.iter().flat_map(|word| word.to_le_bytes()).collect();
        let queue_count = 5 + rare(self.queue_count);
        if newest {
            // The protocol, the target, the queues, the protocol's own part.
            bytes.extend((rare(self.state) % 4).to_le_bytes());
            bytes.extend((u64::from(target) << 12).to_le_bytes());
            bytes.extend(queue_count.to_le_bytes());
            bytes.extend((20 + rare(self.flags)).to_le_bytes());
        } else {
            bytes.extend(target.to_le_bytes());
            bytes.extend(&own);
            bytes.extend(queue_count.to_le_bytes());
        }
        for (kind, avail, used, zero) in self.queues {
            let kind = u16::from(kind % 4);
            let ring = u16::from(kind == 1 || zero >= 0xf0);
            // A device that has nothing in flight is where it says twice.
            let used = if zero % 4 == 0 { used } else { avail };
            let zero = u16::from(zero) * u16::from(zero >= 0xf0);
            let entry = [kind, avail * ring, used * ring, zero];
            bytes.extend(entry.iter().flat_map(|half| half.to_le_bytes()));
        }
        if newest {
            bytes.extend(&own);
        }
        let mut end = 0;
        for (gap, pages) in &self.runs.0 {
            end = gap.put(&mut bytes, end);
            end = end.wrapping_add(pages.put(&mut bytes, 0));
        }
        bytes.extend(&self.behind.0);
        let length = (bytes.len() + CHECKSUM_BYTES) as u64;
        let length = length.wrapping_add_signed(i64::from(self.extra / 64));
        bytes[LENGTH_AT..][..8].copy_from_slice(&length.to_le_bytes());
        bytes.extend([0; CHECKSUM_BYTES]);
        if self.sealed {
            seal(&mut bytes);
        }
        bytes
    }
}

impl Number {
    /// Writes it; returns the number, counted from `from`.
    fn put(&self, bytes: &mut Vec<u8>, from: u64) -> u64 {
        let number = match self {
            Self::Page(choice) => interesting(*choice).wrapping_sub(from),
            Self::Few(few) | Self::Long(few) => u64::from(*few),
            Self::Any(number) => *number,
        };
        let mut left = number;
        while left >= 0x80 {
            bytes.push(0x80 | u8::try_from(left & 0x7f).unwrap_or(0));
            left >>= 7;
        }
        bytes.push(u8::try_from(left).unwrap_or(0));
        if let (Self::Long(_), Some(last)) = (self, bytes.last_mut()) {
            *last |= 0x80;
            bytes.push(0);
        }
        from.wrapping_add(number)
    }
}

/// `saved` with some bytes changed, and a checksum that is right for them if it is `sealed`.
#[must_use]
pub fn tampered(saved: &[u8], edits: &[(u16, u8)], sealed: bool) -> Vec<u8> {
    let mut bytes = saved.to_vec();
    for (at, value) in edits {
        let at = usize::from(*at) % bytes.len().max(1);
        if let Some(byte) = bytes.get_mut(at) {
            *byte = *value;
        }
    }
    if sealed {
        seal(&mut bytes);
    }
    bytes
}

/// Writes the checksum: the harness's own, bit by bit.
fn seal(bytes: &mut [u8]) {
    let Some((covered, place)) = bytes.split_last_chunk_mut::<CHECKSUM_BYTES>() else {
        return;
    };
    let mut crc = u32::MAX;
    for byte in covered.iter() {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 * (crc & 1));
        }
    }
    *place = (!crc).to_le_bytes();
}
