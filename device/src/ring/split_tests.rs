//! A driver's side of a split ring in a few lines, and what a hostile one may write.

use super::*;
use crate::memory::tests::heap_memory;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const SIZE: u16 = 8;

struct Driver {
    memory: Arc<GuestMemory>,
}

impl Driver {
    fn new() -> Self {
        Self {
            memory: heap_memory(&[(0, 0x10000)]),
        }
    }

    fn ring(&self, features: RingFeatures) -> SplitRing {
        SplitRing::new(&self.memory, SIZE, PLACES, START, features).unwrap()
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        assert_eq!(
            self.memory
                .slice_prefix(Gpa(gpa), 64)
                .unwrap()
                .write(0, bytes),
            bytes.len()
        );
    }

    fn get_u16(&self, gpa: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory
            .slice_prefix(Gpa(gpa), 2)
            .unwrap()
            .read(0, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn desc(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.put(at, &addr.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    fn offer(&self, slot: u16, head: u16, index: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        self.put(AVAIL + 2, &index.to_le_bytes());
    }
}

const PLACES: [Gpa; 3] = [Gpa(DESC), Gpa(AVAIL), Gpa(USED)];
const START: QueuePosition = QueuePosition {
    next_avail: 0,
    next_used: 0,
};

const INDIRECT: RingFeatures = RingFeatures {
    packed: false,
    indirect: true,
    event_idx: false,
    in_order: false,
};
const EVENT_IDX: RingFeatures = RingFeatures {
    packed: false,
    indirect: false,
    event_idx: true,
    in_order: false,
};

fn pop(ring: &mut SplitRing, driver: &Driver) -> Result<Option<Chain>, RingError> {
    let mut chain = Chain::default();
    Ok(ring.pop(&driver.memory, &mut chain)?.then_some(chain))
}

#[test]
fn a_chain_is_walked_and_completed_once() {
    let driver = Driver::new();
    let mut ring = driver.ring(RingFeatures::default());
    assert!(pop(&mut ring, &driver).unwrap().is_none());
    driver.desc(DESC, 3, 0x5000, 16, DESC_F_NEXT, 5);
    driver.desc(DESC, 5, 0x6000, 32, DESC_F_WRITE, 0);
    driver.offer(0, 3, 1);
    let chain = pop(&mut ring, &driver).unwrap().unwrap();
    assert_eq!(
        (chain.token, chain.readable_bytes(), chain.writable_bytes()),
        (3, 16, 32)
    );
    assert!(pop(&mut ring, &driver).unwrap().is_none());
    ring.complete(chain.token, 7);
    assert_eq!(
        driver.get_u16(USED + 2),
        0,
        "not visible before it is published"
    );
    assert!(ring.publish());
    assert_eq!(driver.get_u16(USED + 2), 1);
    assert_eq!((driver.get_u16(USED + 4), driver.get_u16(USED + 8)), (3, 7));
    assert!(!ring.publish(), "nothing new");
}

#[test]
fn indices_wrap_at_sixteen_bits() {
    let driver = Driver::new();
    let start = QueuePosition {
        next_avail: u16::MAX,
        next_used: u16::MAX,
    };
    let mut ring =
        SplitRing::new(&driver.memory, SIZE, PLACES, start, RingFeatures::default()).unwrap();
    driver.desc(DESC, 1, 0x5000, 4, 0, 0);
    driver.offer(u16::MAX % SIZE, 1, 0);
    driver.offer(0, 1, 1);
    for _ in 0..2 {
        let chain = pop(&mut ring, &driver).unwrap().unwrap();
        ring.complete(chain.token, 0);
    }
    ring.publish();
    assert_eq!(driver.get_u16(USED + 2), 1);
    assert_eq!(ring.position().next_avail, 1);
}

#[test]
fn broken_structure_is_told_apart() {
    let cases: [(&str, fn(&Driver), RingError); 9] = [
        (
            "index",
            |d| d.offer(0, 0, SIZE + 1),
            RingError::AvailableIndexJumped(SIZE + 1),
        ),
        (
            "head",
            |d| d.offer(0, SIZE, 1),
            RingError::DescriptorBeyondTable(SIZE),
        ),
        (
            "next",
            |d| {
                d.desc(DESC, 0, 0, 4, DESC_F_NEXT, 999);
                d.offer(0, 0, 1);
            },
            RingError::DescriptorBeyondTable(999),
        ),
        (
            "loop",
            |d| {
                d.desc(DESC, 0, 0, 4, DESC_F_NEXT, 0);
                d.offer(0, 0, 1);
            },
            RingError::ChainTooLong,
        ),
        (
            "nested",
            |d| {
                d.desc(DESC, 0, 0x5000, 16, DESC_F_INDIRECT, 0);
                d.desc(0x5000, 0, 0x6000, 16, DESC_F_INDIRECT, 0);
                d.offer(0, 0, 1);
            },
            RingError::NestedIndirect,
        ),
        (
            "indirect with next",
            |d| {
                d.desc(DESC, 0, 0x5000, 16, DESC_F_INDIRECT | DESC_F_NEXT, 0);
                d.offer(0, 0, 1);
            },
            RingError::IndirectWithNext,
        ),
        (
            "empty indirect",
            |d| {
                d.desc(DESC, 0, 0x5000, 0, DESC_F_INDIRECT, 0);
                d.offer(0, 0, 1);
            },
            RingError::IndirectLength(0),
        ),
        (
            "odd indirect",
            |d| {
                d.desc(DESC, 0, 0x5000, 17, DESC_F_INDIRECT, 0);
                d.offer(0, 0, 1);
            },
            RingError::IndirectLength(17),
        ),
        (
            "indirect outside",
            |d| {
                d.desc(DESC, 0, u64::MAX - 7, 16, DESC_F_INDIRECT, 0);
                d.offer(0, 0, 1);
            },
            RingError::IndirectOutsideMemory,
        ),
    ];
    for (name, write, expected) in cases {
        let driver = Driver::new();
        let mut ring = driver.ring(INDIRECT);
        write(&driver);
        assert_eq!(pop(&mut ring, &driver).unwrap_err(), expected, "{name}");
    }
}

#[test]
fn indirect_tables_need_negotiation_and_ignore_write() {
    let driver = Driver::new();
    driver.desc(DESC, 2, 0x5000, 16, 0, 0);
    driver.desc(DESC, 0, 0x5000, 32, DESC_F_INDIRECT | DESC_F_WRITE, 0);
    driver.desc(0x5000, 0, 0x6000, 8, DESC_F_NEXT, 1);
    driver.desc(0x5000, 1, 0x7000, 8, 0, 0);
    driver.offer(0, 0, 1);
    let mut ring = driver.ring(INDIRECT);
    let chain = pop(&mut ring, &driver).unwrap().unwrap();
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (16, 0));
    let mut ring = driver.ring(RingFeatures::default());
    assert_eq!(
        pop(&mut ring, &driver).unwrap_err(),
        RingError::IndirectNotNegotiated
    );
}

#[test]
fn direct_descriptors_may_end_in_an_indirect_table() {
    let driver = Driver::new();
    driver.desc(DESC, 0, 0x6000, 8, DESC_F_NEXT, 1);
    driver.desc(DESC, 1, 0x5000, 32, DESC_F_INDIRECT, 0);
    driver.desc(0x5000, 0, 0x6000, 8, DESC_F_NEXT, 1);
    driver.desc(0x5000, 1, 0x7000, 8, DESC_F_WRITE, 0);
    driver.offer(0, 0, 1);
    let mut ring = driver.ring(INDIRECT);
    let chain = pop(&mut ring, &driver).unwrap().unwrap();
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (16, 8));
}

#[test]
fn event_index_asks_and_answers() {
    let driver = Driver::new();
    let mut ring = driver.ring(EVENT_IDX);
    driver.desc(DESC, 0, 0x5000, 4, 0, 0);
    let used_event = AVAIL + 4 + 2 * u64::from(SIZE);
    let avail_event = USED + 4 + 8 * u64::from(SIZE);
    for (index, event, expected) in [
        (1u16, 0u16, true),
        (2, 5, false),
        (3, 2, true),
        (4, 2, false),
    ] {
        driver.offer(index - 1, 0, index);
        driver.put(used_event, &event.to_le_bytes());
        assert!(ring.want_kicks(), "a chain came without a kick");
        let chain = pop(&mut ring, &driver).unwrap().unwrap();
        ring.complete(chain.token, 0);
        assert_eq!(ring.publish(), expected, "index {index}, event {event}");
        assert!(!ring.want_kicks());
        assert_eq!(driver.get_u16(avail_event), index);
    }
}

#[test]
fn a_suppressed_event_index_is_one_that_the_guest_has_passed() {
    let driver = Driver::new();
    let mut ring = driver.ring(EVENT_IDX);
    driver.desc(DESC, 0, 0x5000, 4, 0, 0);
    driver.offer(0, 0, 1);
    assert!(ring.has_next());
    pop(&mut ring, &driver).unwrap().unwrap();
    let avail_event = USED + 4 + 8 * u64::from(SIZE);
    ring.suppress_kicks();
    assert_eq!(driver.get_u16(avail_event), 0);
    assert!(!super::super::passed(driver.get_u16(avail_event), 1, 2));
    assert!(!ring.want_kicks());
    assert_eq!(driver.get_u16(avail_event), 1);
    assert!(super::super::passed(driver.get_u16(avail_event), 1, 2));
}

#[test]
fn flags_suppress_in_both_directions() {
    let driver = Driver::new();
    let mut ring = driver.ring(RingFeatures::default());
    ring.suppress_kicks();
    assert_eq!(driver.get_u16(USED), USED_F_NO_NOTIFY);
    assert!(!ring.want_kicks());
    assert_eq!(driver.get_u16(USED), 0);
    driver.desc(DESC, 0, 0x5000, 4, 0, 0);
    driver.offer(0, 0, 1);
    driver.put(AVAIL, &AVAIL_F_NO_INTERRUPT.to_le_bytes());
    let chain = pop(&mut ring, &driver).unwrap().unwrap();
    ring.complete(chain.token, 0);
    assert!(!ring.publish());
}

/// Rings of all small sizes from every kind of position: as many chains as are there, each slot's own
/// head, and the used index behind them, across the wrap of 16 bits.
#[test]
fn indices_of_small_rings_are_those_of_a_counter() {
    for size in [1u16, 2, 4, 8] {
        let driver = Driver::new();
        for index in 0..size {
            driver.desc(DESC, index, 0x5000, 4, 0, 0);
        }
        let starts = (0..2 * size).chain((1..=2 * size).map(|by| 0u16.wrapping_sub(by)));
        for (start, waiting) in starts.flat_map(|start| (0..=size + 1).map(move |n| (start, n))) {
            let position = QueuePosition {
                next_avail: start,
                next_used: start.wrapping_add(3),
            };
            let features = RingFeatures::default();
            let mut ring =
                SplitRing::new(&driver.memory, size, PLACES, position, features).unwrap();
            for number in 0..size {
                let index = start.wrapping_add(number);
                driver.offer(index % size, number, start.wrapping_add(waiting));
            }
            if waiting > size {
                let jumped = RingError::AvailableIndexJumped(waiting);
                assert_eq!(pop(&mut ring, &driver).unwrap_err(), jumped);
                continue;
            }
            for number in 0..waiting {
                let chain = pop(&mut ring, &driver).unwrap().unwrap();
                assert_eq!(chain.token, u64::from(number));
                ring.complete(chain.token, 0);
            }
            assert!(pop(&mut ring, &driver).unwrap().is_none());
            ring.publish();
            let end = QueuePosition {
                next_avail: start.wrapping_add(waiting),
                next_used: start.wrapping_add(3).wrapping_add(waiting),
            };
            assert_eq!(ring.position(), end);
            if waiting > 0 {
                assert_eq!(driver.get_u16(USED + 2), end.next_used);
            }
            for number in 0..waiting {
                let slot = u64::from(position.next_used.wrapping_add(number) % size);
                assert_eq!(driver.get_u16(USED + 4 + 8 * slot), number);
            }
        }
    }
}

#[test]
fn bad_places_are_refused() {
    let driver = Driver::new();
    let refused = |size: u16, places: [u64; 3]| {
        SplitRing::new(&driver.memory, size, places.map(Gpa), START, EVENT_IDX)
            .unwrap_err()
            .errno()
    };
    for size in [0, 12, 65535] {
        assert_eq!(refused(size, [DESC, AVAIL, USED]), libc::EINVAL);
    }
    assert_eq!(refused(SIZE, [DESC + 8, AVAIL, USED]), libc::EADDRNOTAVAIL);
    assert_eq!(refused(SIZE, [DESC, AVAIL + 1, USED]), libc::EADDRNOTAVAIL);
    assert_eq!(refused(SIZE, [DESC, AVAIL, USED + 2]), libc::EADDRNOTAVAIL);
    assert_eq!(refused(SIZE, [0xffff0, AVAIL, USED]), libc::ERANGE);
    assert_eq!(refused(SIZE, [DESC, AVAIL, 0xfff8]), libc::ERANGE);
}

/// 2.7.9: one entry for the last buffer of a batch, in the place of the first; the index counts all. A
/// buffer of which something could be written is skipped by no entry.
#[test]
fn a_batch_in_order_is_one_entry_unless_something_could_be_written() {
    let driver = Driver::new();
    let features = RingFeatures {
        in_order: true,
        ..EVENT_IDX
    };
    let mut ring = driver.ring(features);
    let entry = |slot: u64| {
        let at = USED + 4 + 8 * slot;
        (driver.get_u16(at), driver.get_u16(at + 4))
    };
    // Readable ones, but for the fourth.
    for head in 0..6 {
        let flags = if head == 3 { DESC_F_WRITE } else { 0 };
        driver.desc(DESC, head, 0x5000, 4, flags, 0);
        driver.offer(head, head, head + 1);
    }
    for written in [0, 0, 0, 2, 0, 0] {
        let chain = pop(&mut ring, &driver).unwrap().unwrap();
        ring.complete(chain.token, written);
    }
    assert_eq!(driver.get_u16(USED + 2), 0, "nothing is shown yet");
    assert!(ring.publish());
    assert_eq!(driver.get_u16(USED + 2), 6);
    // Buffers 0 to 3 in the entry of the first, 4 and 5 in that of the fifth.
    assert_eq!(entry(0), (3, 2));
    assert_eq!(entry(4), (5, 0));
    assert_eq!(
        [1, 2, 3, 5].map(entry),
        [(0, 0); 4],
        "no other entry is written"
    );
    // The next batch begins behind all of this one.
    driver.offer(6, 0, 7);
    let chain = pop(&mut ring, &driver).unwrap().unwrap();
    ring.complete(chain.token, 0);
    ring.publish();
    assert_eq!((driver.get_u16(USED + 2), entry(6)), (7, (0, 0)));
}
