//! The split ring against that of the virtio-queue crate: the same guest memory, well-formed or not, and
//! the same chains out of it wherever both accept it.
//!
//! Where they differ ours is the stricter one, on purpose; [`lax`] lists how. The other crate cannot tell
//! a chain that ends from one that breaks off: both are the end of its iterator.
#![allow(unsafe_code, reason = "both rings look at the same memory")]

use super::chain::{Chain, Segment};
use super::split::SplitRing;
use super::{RingError, RingFeatures};
use crate::device::QueuePosition;
use crate::memory::tests::anonymous_region;
use crate::memory::{Gpa, GuestMemory, Region};
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor as TheirDescriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: u16 = 8;
const BYTES: u64 = 0x10000;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Indirect tables: two of sixteen entries, and one that memory ends in.
const TABLES: [u64; 3] = [0x4000, 0x4100, BYTES - 16];
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor as a driver writes it: address, length, flags, next.
type Entry = (u64, u32, u16, u16);

/// A buffer as a device sees it: address, length, writable.
type Buffer = (u64, u32, bool);

#[derive(Clone, Debug)]
struct Case {
    negotiated: bool,
    /// Where the ring goes on.
    start: u16,
    /// The available index.
    index: u16,
    heads: Vec<u16>,
    direct: Vec<Entry>,
    tables: [Vec<Entry>; 2],
}

fn number(limit: u16) -> impl Strategy<Value = u16> {
    // Mostly inside the table, and a little beyond its end.
    prop_oneof![30 => 0..limit, 1 => 0..limit + 3, 1 => any::<u16>()]
}

fn entry(limit: u16) -> impl Strategy<Value = Entry> {
    let buffer = (
        prop_oneof![Just(0x5000u64), Just(BYTES - 8), any::<u64>()],
        prop_oneof![6 => 0u32..0x2000, 1 => Just(1u32 << 31), 1 => any::<u32>()],
        prop_oneof![1 => Just(0), 2 => Just(NEXT), 1 => Just(WRITE), 3 => Just(NEXT | WRITE)],
        number(limit),
    );
    let table = (
        prop_oneof![8 => prop::sample::select(TABLES.to_vec()), 1 => any::<u64>()],
        prop_oneof![8 => (0u32..20).prop_map(|count| count * 16), 1 => 0u32..300],
        prop_oneof![4 => Just(INDIRECT), 2 => Just(INDIRECT | WRITE), 1 => Just(INDIRECT | NEXT)],
        number(limit),
    );
    prop_oneof![9 => buffer, 1 => table]
}

fn case() -> impl Strategy<Value = Case> {
    let table = || prop::collection::vec(entry(16), 16);
    (
        any::<bool>(),
        prop_oneof![Just(0), any::<u16>()],
        prop_oneof![9 => 0..=SIZE, 1 => any::<u16>()],
        prop::collection::vec(number(SIZE), usize::from(SIZE)),
        prop::collection::vec(entry(SIZE), usize::from(SIZE)),
        [table(), table()],
    )
        .prop_map(|(negotiated, start, ahead, heads, direct, tables)| Case {
            negotiated,
            start,
            index: start.wrapping_add(ahead),
            heads,
            direct,
            tables,
        })
}

impl Case {
    fn memory(&self) -> GuestMemoryMmap {
        let ranges = [(GuestAddress(0), BYTES as usize)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let tables = [
            (DESC, &self.direct),
            (TABLES[0], &self.tables[0]),
            (TABLES[1], &self.tables[1]),
        ];
        for (table, entries) in tables {
            for (number, (addr, len, flags, next)) in (0..).zip(entries) {
                put(table + 16 * number, &addr.to_le_bytes());
                put(table + 16 * number + 8, &len.to_le_bytes());
                put(table + 16 * number + 12, &flags.to_le_bytes());
                put(table + 16 * number + 14, &next.to_le_bytes());
            }
        }
        put(AVAIL + 2, &self.index.to_le_bytes());
        for (number, head) in (0..).zip(&self.heads) {
            let slot = self.start.wrapping_add(number) % SIZE;
            put(AVAIL + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        }
        memory
    }
}

/// What the other crate makes of it: its chains, or that the available index is wrong.
fn theirs(memory: &GuestMemoryMmap, start: u16) -> Option<Vec<Vec<TheirDescriptor>>> {
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    let low = |gpa: u64| Some(gpa as u32);
    queue.set_desc_table_address(low(DESC), Some(0));
    queue.set_avail_ring_address(low(AVAIL), Some(0));
    queue.set_used_ring_address(low(USED), Some(0));
    queue.set_ready(true);
    queue.set_next_avail(start);
    queue.set_next_used(start);
    assert!(queue.is_valid(memory));
    Some(queue.iter(memory).ok()?.map(Iterator::collect).collect())
}

fn buffers(chain: &Chain) -> [Vec<Buffer>; 2] {
    [(&chain.readable, false), (&chain.writable, true)].map(|(segments, writable)| {
        let buffer = |segment: &Segment| match segment {
            Segment::Guest { gpa, len } => (gpa.0, *len, writable),
            Segment::Host(_) => unreachable!("a ring names guest memory"),
        };
        segments.iter().map(buffer).collect()
    })
}

fn their_buffers(chain: &[TheirDescriptor]) -> [Vec<Buffer>; 2] {
    [false, true].map(|writable| {
        let wanted = chain.iter().filter(|desc| desc.is_write_only() == writable);
        wanted
            .map(|desc| (desc.addr().0, desc.len(), writable))
            .collect()
    })
}

/// Why what we call an error may be fine there.
fn lax(error: RingError, chain: &[TheirDescriptor], case: &Case) -> bool {
    // It breaks off: nothing came, or what came last says that there is more.
    let broken_off = chain.last().is_none_or(TheirDescriptor::has_next);
    match error {
        // They stop where memory or the table ends, or where a table is nested, and say no more.
        RingError::DescriptorBeyondTable(_)
        | RingError::NestedIndirect
        | RingError::IndirectOutsideMemory
        | RingError::IndirectLength(_) => broken_off,
        // They count an indirect table's entries for themselves: a chain may be longer than its queue.
        // Loops are followed until that count is used up; more than 4 GiB ends a chain before.
        RingError::ChainTooLong => broken_off || chain.len() > usize::from(SIZE),
        // They follow tables that were not negotiated.
        RingError::IndirectNotNegotiated => !case.negotiated,
        // They ignore NEXT beside INDIRECT.
        RingError::IndirectWithNext => true,
        RingError::AvailableIndexJumped(_) => false,
    }
}

fn compare(case: &Case) {
    let memory = case.memory();
    let region = Region {
        len_bytes: BYTES,
        hva: memory.get_host_address(GuestAddress(0)).unwrap() as usize,
        ..anonymous_region()
    };
    // SAFETY: the mapping lives as long as `memory`, and no reference covers it.
    let table = unsafe { GuestMemory::new(vec![region]) }.unwrap();
    let features = RingFeatures {
        indirect: case.negotiated,
        ..RingFeatures::default()
    };
    let places = [DESC, AVAIL, USED].map(Gpa);
    let start = QueuePosition {
        next_avail: case.start,
        next_used: case.start,
    };
    let mut ours = SplitRing::new(&table, SIZE, places, start, features).unwrap();
    let mut chain = Chain::default();
    let Some(theirs) = theirs(&memory, case.start) else {
        let refused = ours.pop(&table, &mut chain).unwrap_err();
        assert_eq!(
            refused,
            RingError::AvailableIndexJumped(case.index.wrapping_sub(case.start))
        );
        return;
    };
    for (their, head) in theirs.iter().zip(&case.heads) {
        match ours.pop(&table, &mut chain) {
            Ok(popped) => {
                assert!(popped, "they have a chain that we have not");
                assert_eq!(chain.token, u64::from(*head));
                let (ours, theirs) = (buffers(&chain), their_buffers(their));
                if chain.readable_bytes() + chain.writable_bytes() < 1 << 32 {
                    assert_eq!(ours, theirs);
                    assert!(
                        !their.last().unwrap().has_next(),
                        "a chain that ends for us"
                    );
                } else {
                    // They cut a chain off at 4 GiB; we have it whole, and mark it as malformed if
                    // it is longer.
                    let prefix = |n: usize| ours[n].starts_with(&theirs[n]);
                    assert!(prefix(0) && prefix(1), "{ours:?} {theirs:?}");
                }
            }
            Err(error) => {
                assert!(lax(error, their, case), "{error}: {their:?}");
                return;
            }
        }
    }
    assert!(
        !ours.pop(&table, &mut chain).unwrap(),
        "we have a chain that they have not"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn both_pop_the_same_chains(case in case()) {
        compare(&case);
    }
}
