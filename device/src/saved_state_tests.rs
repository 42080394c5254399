use super::*;
use proptest::prelude::*;

fn state() -> SavedState {
    let position = QueuePosition {
        next_avail: 0x8003,
        next_used: 7,
    };
    SavedState {
        state: DeviceState::Paused,
        offered: 0x1_3000_003f,
        negotiated: Some(0x1_0000_0003),
        kind: DeviceKind::VirtioBalloon,
        wanted: Target::whole(1000 << 12),
        own: vec![0xa0; 20],
        queues: vec![
            Some(SavedQueue::Ring { position }),
            Some(SavedQueue::Elements),
            None,
            None,
            None,
        ],
    }
}

fn range(start: u64, end: u64) -> PfnRange {
    PfnRange {
        start: Pfn(start),
        end: Pfn(end),
    }
}

fn encoded(state: &SavedState, list: &[PfnRange]) -> Vec<u8> {
    encode(state, |each| list.iter().for_each(|run| each(*run)))
}

fn decoded(bytes: &[u8]) -> Result<(SavedState, Vec<PfnRange>)> {
    let (state, runs) = decode(bytes)?;
    Ok((state, runs.collect::<Result<_>>()?))
}

/// Length and checksum as they should be: what a hostile sender does too.
fn seal(bytes: &mut Vec<u8>) {
    let total = (bytes.len() + CHECKSUM_BYTES) as u64;
    bytes[LENGTH_AT..LENGTH_AT + 8].copy_from_slice(&total.to_le_bytes());
    bytes.extend(crc32(bytes).to_le_bytes());
}

/// Where the runs of [`state`] begin.
const RUNS_AT: usize = HEADER_BYTES + 5 * 8 + 20;

/// A sealed state with these bytes in place of runs.
fn with_runs(runs: &[u8]) -> Vec<u8> {
    let mut bytes = encoded(&state(), &[]);
    bytes.truncate(RUNS_AT);
    bytes.extend(runs);
    seal(&mut bytes);
    bytes
}

#[test]
fn the_checksum_is_the_common_one() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}

/// docs/saved-state.md shows these bytes.
#[test]
fn the_layout_is_the_documented_one() {
    let bytes = encoded(&state(), &[range(0x100, 0x180), range(0x200, 0x201)]);
    assert_eq!(&bytes[..16], b"AEROSTAT\x02\0\0\0\x02\0\0\0");
    assert_eq!(bytes[16..24], 135u64.to_le_bytes());
    assert_eq!(bytes[40..48], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[48..56], (1000u64 << 12).to_le_bytes());
    assert_eq!(bytes[56..64], [5, 0, 0, 0, 20, 0, 0, 0]);
    assert_eq!(bytes[64..72], [1, 0, 3, 0x80, 7, 0, 0, 0]);
    assert_eq!(bytes[72..80], [2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[104..124], [0xa0; 20]);
    assert_eq!(bytes[124..131], [0x80, 2, 0x80, 1, 0x80, 1, 1]);
    assert_eq!(bytes.len(), 135);
}

/// The only difference is behind the own part, and what is there has to make sense.
#[test]
fn targets_of_nodes_follow_the_protocols_own_part() {
    let wanted = Target::by_node(&[600 << 12, 400 << 12]).unwrap();
    let state = SavedState { wanted, ..state() };
    let bytes = encoded(&state, &[range(0x100, 0x180)]);
    assert_eq!(&bytes[..12], b"AEROSTAT\x03\0\0\0");
    assert_eq!(bytes[48..56], (1000u64 << 12).to_le_bytes());
    assert_eq!(bytes[124..128], [2, 0, 0, 0]);
    assert_eq!(bytes[128..136], (600u64 << 12).to_le_bytes());
    assert_eq!(bytes[144..147], [0x80, 2, 0x80]);
    for (at, value) in [(124, 0), (124, 1), (124, 17), (128, 1), (137, 1)] {
        let mut bytes = bytes.clone();
        bytes.truncate(bytes.len() - CHECKSUM_BYTES);
        bytes[at] = value;
        seal(&mut bytes);
        assert!(decoded(&bytes).is_err(), "byte {at} = {value}");
    }
}

/// What the library wrote before other protocols came.
#[test]
fn the_first_version_is_still_read() {
    let mut bytes = b"AEROSTAT\x01\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend(
        [0x1_3000_003f_u64, 0x1_0000_0003]
            .map(u64::to_le_bytes)
            .concat(),
    );
    let words: [u32; 8] = [1, 1000, 900, 0xaaaa_aaaa, 5, 9, 8, 5];
    bytes.extend(words.map(u32::to_le_bytes).concat());
    bytes.extend([1, 0, 3, 0x80, 7, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend([0; 24]);
    bytes.extend([0x80, 2, 0x80, 1, 0x80, 1, 1]);
    seal(&mut bytes);
    let own: [u32; 5] = [900, 0xaaaa_aaaa, 5, 9, 8];
    let expected = SavedState {
        own: own.map(u32::to_le_bytes).concat(),
        ..state()
    };
    let runs = vec![range(0x100, 0x180), range(0x200, 0x201)];
    assert_eq!(decoded(&bytes).unwrap(), (expected, runs));
    for len in 0..bytes.len() {
        assert!(decoded(&bytes[..len]).is_err(), "{len} bytes");
    }
    bytes.truncate(bytes.len() - CHECKSUM_BYTES);
    bytes[68] = 4;
    seal(&mut bytes);
    assert!(decoded(&bytes).is_err(), "another number of queues");
}

#[test]
fn touching_runs_are_written_as_one() {
    let bytes = encoded(&state(), &[range(0, 5), range(5, 9), range(20, 21)]);
    let (_, runs) = decoded(&bytes).unwrap();
    assert_eq!(runs, [range(0, 9), range(20, 21)]);
}

#[test]
fn every_truncation_and_every_changed_byte_is_refused() {
    let bytes = encoded(&state(), &[range(3, 5), range(700, 1 << 30)]);
    assert!(decoded(&bytes).is_ok());
    for len in 0..bytes.len() {
        assert!(decoded(&bytes[..len]).is_err(), "{len} bytes");
    }
    for at in 0..bytes.len() {
        // miri is too slow for all of them.
        for flip in (1..=255).step_by(if cfg!(miri) { 200 } else { 1 }) {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            assert!(decoded(&damaged).is_err(), "byte {at} ^ {flip:#x}");
        }
    }
    let mut longer = bytes;
    longer.push(0);
    assert!(decoded(&longer).is_err());
}

#[test]
fn what_a_sealed_state_may_not_say_is_refused() {
    let refused: [(&str, &[u8]); 8] = [
        ("an empty run", &[1, 0]),
        ("runs that touch", &[1, 1, 0, 1]),
        ("half a run", &[1]),
        ("half a number", &[1, 0x80]),
        ("a number in too many bytes", &[0x80, 0, 1]),
        (
            "more than 64 bits",
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 1],
        ),
        (
            "pages that overflow",
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1],
        ),
        (
            "pages beyond any guest",
            &[1, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 4],
        ),
    ];
    for (what, runs) in refused {
        assert!(decoded(&with_runs(runs)).is_err(), "{what}");
    }
    assert_eq!(
        decoded(&with_runs(&[0, 1, 1, 1])).unwrap().1,
        [range(0, 1), range(2, 3)]
    );
    // Offset and value of a byte that makes a field wrong.
    for (at, value) in [
        (12, 4),
        (12, 0xff),
        (32, 0x80),
        (40, 3),
        (40, 0),
        (44, 0xff),
        (56, 4),
        (61, 0x11),
        (64, 3),
        (70, 1),
    ] {
        let mut bytes = encoded(&state(), &[]);
        bytes.truncate(RUNS_AT);
        bytes[at] = value;
        seal(&mut bytes);
        assert!(decoded(&bytes).is_err(), "byte {at} = {value}");
    }
    let mut bytes = encoded(&state(), &[]);
    bytes[8] = 4;
    assert!(matches!(
        decoded(&bytes),
        Err(Error::SavedVersion { found: 4, known: 3 })
    ));
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        gaps in prop::collection::vec((1u64..1 << 20, 1u64..1 << 20), 0..50),
        features in any::<u64>(),
        nodes in prop::collection::vec(0u64..1 << 50, 0..=MAX_TARGET_NODES),
        own in prop::collection::vec(any::<u8>(), 0..100),
        kinds in any::<[Option<Option<(u16, u16)>>; 5]>(),
        stands in 0u32..4,
    ) {
        let mut at = 0;
        let runs: Vec<_> = gaps.into_iter().map(|(gap, pages)| {
            let start = at + gap;
            at = start + pages;
            range(start, at)
        }).collect();
        let queues = kinds.map(|kind| kind.map(|ring| match ring {
            None => SavedQueue::Elements,
            Some((next_avail, next_used)) => SavedQueue::Ring {
                position: QueuePosition { next_avail, next_used },
            },
        }));
        let state = SavedState {
            state: [DeviceState::Configuring, DeviceState::Active, DeviceState::Paused, DeviceState::NeedsReset]
                [stands as usize],
            offered: u64::MAX,
            negotiated: Some(features),
            kind: DeviceKind::VirtioBalloon,
            wanted: Target::by_node(&nodes).unwrap_or(Target::whole(features)),
            queues: queues.to_vec(),
            own,
        };
        prop_assert_eq!(decoded(&encoded(&state, &runs)).unwrap(), (state, runs));
    }

    /// A sender who knows the checksum: refused or read, never a panic, and what is read is in order.
    #[test]
    fn sealed_noise_does_no_harm(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        patches in prop::collection::vec((8usize..RUNS_AT, any::<u8>()), 0..4),
    ) {
        let mut bytes = encoded(&state(), &[]);
        bytes.truncate(RUNS_AT);
        for (at, value) in patches {
            bytes[at] = value;
        }
        bytes.extend(noise);
        seal(&mut bytes);
        if let Ok((_, runs)) = decoded(&bytes) {
            for pair in runs.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
        }
    }
}
