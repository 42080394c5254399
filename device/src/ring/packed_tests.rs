//! A driver's side of a packed ring in a few lines, and what a hostile one may write.

use super::*;
use crate::memory::tests::heap_memory;
use proptest::prelude::*;

const DESC: u64 = 0x1000;
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PLACES: [Gpa; 3] = [Gpa(DESC), Gpa(DRIVER), Gpa(DEVICE)];
const PLAIN: RingFeatures = RingFeatures {
    packed: true,
    indirect: false,
    event_idx: false,
    in_order: false,
};
const IN_ORDER: RingFeatures = RingFeatures {
    in_order: true,
    ..PLAIN
};
const INDIRECT: RingFeatures = RingFeatures {
    indirect: true,
    ..PLAIN
};
const EVENT_IDX: RingFeatures = RingFeatures {
    event_idx: true,
    ..PLAIN
};

struct Driver {
    memory: Arc<GuestMemory>,
    size: u16,
    next: Place,
    used: Place,
}

impl Driver {
    fn new(size: u16) -> Self {
        let memory = heap_memory(&[(0, 0x10000)]);
        let start = Place {
            slot: 0,
            wrap: true,
        };
        Self {
            memory,
            size,
            next: start,
            used: start,
        }
    }

    fn ring(&self, features: RingFeatures) -> PackedRing {
        let position = QueuePosition::PACKED_START;
        PackedRing::new(&self.memory, self.size, PLACES, position, features).unwrap()
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

    fn desc(&self, table: u64, index: u16, addr: u64, len: u32, id: u16, flags: u16) {
        let at = table + 16 * u64::from(index);
        self.put(at, &addr.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &id.to_le_bytes());
        self.put(at + 14, &flags.to_le_bytes());
    }

    /// Makes a chain of `count` readable buffers of 8 bytes available; the first one's flags last.
    fn offer(&mut self, id: u16, count: u16, extra_flags: u16) {
        let mut place = self.next;
        let mut flags = Vec::new();
        for number in 1..=count {
            let mut value = if place.wrap {
                DESC_F_AVAIL
            } else {
                DESC_F_USED
            };
            value |= extra_flags | if number < count { DESC_F_NEXT } else { 0 };
            self.put(DESC + 16 * u64::from(place.slot), &0x5000u64.to_le_bytes());
            self.put(DESC + 16 * u64::from(place.slot) + 8, &8u32.to_le_bytes());
            self.put(DESC + 16 * u64::from(place.slot) + 12, &id.to_le_bytes());
            flags.push((place.slot, value));
            place = place.forward(1, self.size);
        }
        for (slot, value) in flags.into_iter().rev() {
            self.put(DESC + 16 * u64::from(slot) + 14, &value.to_le_bytes());
        }
        self.next = place;
    }

    /// The next used descriptor, if there is one: id and written length. `count` descriptors are
    /// skipped.
    fn collect(&mut self, count: u16) -> Option<(u16, u16)> {
        let at = DESC + 16 * u64::from(self.used.slot);
        let flags = self.get_u16(at + 14);
        let marks = (flags & DESC_F_AVAIL != 0, flags & DESC_F_USED != 0);
        if marks != (self.used.wrap, self.used.wrap) {
            return None;
        }
        self.used = self.used.forward(count, self.size);
        Some((self.get_u16(at + 12), self.get_u16(at + 8)))
    }
}

fn pop(ring: &mut PackedRing, driver: &Driver) -> Result<Option<Chain>, RingError> {
    let mut chain = Chain::default();
    Ok(ring.pop(&driver.memory, &mut chain)?.then_some(chain))
}

#[test]
fn a_batch_becomes_visible_as_a_whole() {
    let mut driver = Driver::new(8);
    let mut ring = driver.ring(PLAIN);
    assert!(pop(&mut ring, &driver).unwrap().is_none());
    driver.offer(7, 2, 0);
    driver.offer(9, 3, 0);
    for count in [2, 3] {
        let chain = pop(&mut ring, &driver).unwrap().unwrap();
        assert_eq!(chain.readable_bytes(), 8 * count);
        ring.complete(chain.token, 0);
    }
    assert!(pop(&mut ring, &driver).unwrap().is_none());
    assert!(
        driver.collect(2).is_none(),
        "not visible before it is published"
    );
    assert!(ring.publish());
    assert_eq!(driver.collect(2), Some((7, 0)));
    assert_eq!(driver.collect(3), Some((9, 0)));
    assert!(!ring.publish(), "nothing new");
}

#[test]
fn broken_structure_is_told_apart() {
    let loops = DESC_F_NEXT;
    let indirect = DESC_F_INDIRECT;
    let cases: [(&str, RingFeatures, u16, u32, RingError); 5] = [
        (
            "all descriptors chained",
            PLAIN,
            loops,
            16,
            RingError::ChainTooLong,
        ),
        (
            "not negotiated",
            PLAIN,
            indirect,
            16,
            RingError::IndirectNotNegotiated,
        ),
        (
            "indirect with next",
            INDIRECT,
            indirect | loops,
            16,
            RingError::IndirectWithNext,
        ),
        (
            "odd table",
            INDIRECT,
            indirect,
            24,
            RingError::IndirectLength(24),
        ),
        (
            "long table",
            INDIRECT,
            indirect,
            16 * 9,
            RingError::ChainTooLong,
        ),
    ];
    for (name, features, flags, len, expected) in cases {
        let driver = Driver::new(8);
        for index in 0..8 {
            driver.desc(DESC, index, TABLE, len, 0, flags | DESC_F_AVAIL);
        }
        let mut ring = driver.ring(features);
        assert_eq!(pop(&mut ring, &driver).unwrap_err(), expected, "{name}");
    }
}

#[test]
fn a_table_is_read_in_order_whatever_its_next_fields_say() {
    let mut driver = Driver::new(8);
    driver.desc(TABLE, 0, 0x6000, 8, 99, 0);
    driver.desc(TABLE, 1, 0x7000, 32, 99, DESC_F_WRITE);
    driver.offer(3, 1, DESC_F_INDIRECT);
    driver.put(DESC, &TABLE.to_le_bytes());
    driver.put(DESC + 8, &32u32.to_le_bytes());
    let mut ring = driver.ring(INDIRECT);
    let chain = pop(&mut ring, &driver).unwrap().unwrap();
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (8, 32));
    ring.complete(chain.token, 5);
    ring.publish();
    assert_eq!(driver.collect(1), Some((3, 5)));
    driver.desc(TABLE, 0, 0x6000, 16, 0, DESC_F_INDIRECT);
    driver.offer(3, 1, DESC_F_INDIRECT);
    driver.put(DESC + 16, &TABLE.to_le_bytes());
    driver.put(DESC + 24, &16u32.to_le_bytes());
    assert_eq!(
        pop(&mut ring, &driver).unwrap_err(),
        RingError::NestedIndirect
    );
}

#[test]
fn flags_and_offsets_suppress_in_both_directions() {
    let mut driver = Driver::new(8);
    let mut ring = driver.ring(EVENT_IDX);
    ring.suppress_kicks();
    assert_eq!(driver.get_u16(DEVICE + 2), EVENT_DISABLE);
    assert!(!ring.want_kicks());
    assert_eq!(
        (driver.get_u16(DEVICE), driver.get_u16(DEVICE + 2)),
        (WRAP, EVENT_DESC)
    );
    // (flags, offset and wrap, is told) for the chains that use slots 0, 1, 2, 3.
    let wishes = [
        (EVENT_DISABLE, 0, false),
        (EVENT_DESC, WRAP | 5, false),
        (EVENT_DESC, WRAP | 2, true),
        (EVENT_ENABLE, 0, true),
    ];
    for (flags, offset, told) in wishes {
        driver.put(DRIVER, &u16::to_le_bytes(offset));
        driver.put(DRIVER + 2, &u16::to_le_bytes(flags));
        driver.offer(1, 1, 0);
        assert!(ring.want_kicks(), "a chain came without a kick");
        let chain = pop(&mut ring, &driver).unwrap().unwrap();
        ring.complete(chain.token, 0);
        assert_eq!(ring.publish(), told, "flags {flags}, offset {offset:#x}");
    }
}

/// 2.8.9: one used descriptor for the last buffer of a batch, in the place of the first; all slots of the
/// batch are skipped, across the wrap too. A buffer of which something could be written is skipped by none.
#[test]
fn a_batch_in_order_is_one_descriptor_unless_something_could_be_written() {
    let mut driver = Driver::new(8);
    let mut ring = driver.ring(IN_ORDER);
    for lap in 0..5u16 {
        // Six slots a batch, so that it begins elsewhere each time.
        let ids = [3 * lap, 3 * lap + 1, 3 * lap + 2];
        for (id, flags) in ids.into_iter().zip([0, DESC_F_WRITE, 0]) {
            driver.offer(id, 2, flags);
        }
        for written in [0, 5, 0] {
            let chain = pop(&mut ring, &driver).unwrap().unwrap();
            ring.complete(chain.token, written);
        }
        let first = driver.used;
        assert!(driver.collect(4).is_none(), "nothing is shown yet");
        ring.publish();
        let at = DESC + 16 * u64::from(first.slot);
        let flags = driver.get_u16(at + 14);
        assert_ne!(flags & DESC_F_WRITE, 0, "the last one's length is meant");
        assert_eq!(driver.collect(4), Some((ids[1], 5)), "lap {lap}");
        assert_eq!(driver.collect(2), Some((ids[2], 0)), "lap {lap}");
        assert!(driver.collect(1).is_none());
    }
}

#[test]
fn bad_places_are_refused() {
    let driver = Driver::new(8);
    let refused = |size: u16, places: [u64; 3], next_avail: u16| {
        let position = QueuePosition {
            next_avail,
            next_used: WRAP,
        };
        PackedRing::new(&driver.memory, size, places.map(Gpa), position, PLAIN)
            .unwrap_err()
            .errno()
    };
    assert_eq!(refused(0, [DESC, DRIVER, DEVICE], 0), libc::EINVAL);
    assert_eq!(refused(32769, [DESC, DRIVER, DEVICE], 0), libc::EINVAL);
    assert_eq!(refused(8, [DESC, DRIVER, DEVICE], 8), libc::EINVAL);
    assert_eq!(
        refused(8, [DESC + 8, DRIVER, DEVICE], 0),
        libc::EADDRNOTAVAIL
    );
    assert_eq!(
        refused(8, [DESC, DRIVER + 2, DEVICE], 0),
        libc::EADDRNOTAVAIL
    );
    assert_eq!(refused(8, [DESC, DRIVER, 0x10000], 0), libc::ERANGE);
}

/// Every place of every small ring, as the number of steps from its start: a lap is `size` steps, and the
/// wrap counter is that of the lap.
#[test]
fn places_go_forward_and_back_as_steps_are_counted() {
    for size in 1..=8u16 {
        let at = |steps: u16| Place {
            slot: steps % size,
            wrap: (steps / size).is_multiple_of(2),
        };
        for steps in 0..2 * size {
            for by in 0..=size {
                let (from, to) = (at(steps), at(steps + by));
                assert_eq!(from.forward(by, size), to, "{size}: {steps} + {by}");
                assert_eq!(to.back(by, size), from, "{size}: {steps} + {by} back");
            }
            assert_eq!(Place::unpack(at(steps).pack()), at(steps));
        }
    }
    // The largest ring there is, where sums are the largest.
    let last = Place {
        slot: 32767,
        wrap: true,
    };
    for by in [0, 1, 32767, 32768] {
        assert_eq!(last.forward(by, 32768).back(by, 32768), last);
    }
}

proptest! {
    /// Chains of any length, completed in batches, over many laps of rings of any size: each is
    /// popped once and completed once, in order.
    #[test]
    fn nothing_is_lost_or_doubled_over_many_laps(
        size in 1u16..20,
        batches in prop::collection::vec(prop::collection::vec(1u16..6, 1..6), 1..60),
        give_back: bool,
    ) {
        let mut driver = Driver::new(size);
        let mut ring = driver.ring(PLAIN);
        let mut id = 0u16;
        for batch in batches {
            let mut room = size;
            let mut offered = Vec::new();
            for count in batch {
                if count > room {
                    break;
                }
                room -= count;
                id = id.wrapping_add(1);
                driver.offer(id, count, 0);
                offered.push((id, count));
            }
            for &(id, count) in &offered {
                let before = ring.position();
                let mut chain = pop(&mut ring, &driver).unwrap().unwrap();
                prop_assert_eq!(ring.position_before(chain.token), before);
                prop_assert_eq!((buffer_id(chain.token), descriptors(chain.token)), (id, count));
                if give_back {
                    ring.unpop(chain.token);
                    chain = pop(&mut ring, &driver).unwrap().unwrap();
                    prop_assert_eq!(buffer_id(chain.token), id);
                }
                ring.complete(chain.token, u32::from(count));
            }
            prop_assert!(pop(&mut ring, &driver).unwrap().is_none());
            ring.publish();
            // A position is all it takes to go on.
            ring = PackedRing::new(&driver.memory, size, PLACES, ring.position(), PLAIN).unwrap();
            for (id, count) in offered {
                prop_assert_eq!(driver.collect(count), Some((id, count)));
            }
            prop_assert!(driver.collect(1).is_none());
        }
    }
}
