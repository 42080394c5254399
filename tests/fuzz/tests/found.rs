//! What hostile scripts brought to light, one test each.

use aerostat_fuzz::device::play;
use aerostat_fuzz::script::{Address, Few, Layout, Length, Pages, Script, Segment, Step};

const STATS_AND_REPORTING: u16 = 0b101;
/// The place of MUST_TELL_HOST in [`Script::features`].
const MUST_TELL_HOST: u16 = 1 << 6;
/// And of PAGE_REFUSAL.
const PAGE_REFUSAL: u16 = 1 << 8;

fn offer(queue: u8, address: Address, writable: bool) -> Step {
    let length = Length::Pages(1);
    let segment = Segment {
        address,
        length,
        writable,
        odd: 0,
    };
    Step::Offer {
        queue,
        segments: Few(vec![segment]),
        indirect: false,
    }
}

fn script(steps: Vec<Step>) -> Script {
    Script {
        features: STATS_AND_REPORTING,
        queues: 0b1111,
        sizes: [3; 5],
        regions: u8::MAX,
        write_behind: 0,
        steps,
    }
}

/// While the first of densely numbered queues is stopped, the numbers read as fixed ones, and the
/// reporting queue has no role: its kick must not be lost when all queues are there again.
#[test]
fn a_kick_during_the_restart_of_another_queue_is_not_lost() {
    for layout in [Layout::Split, Layout::Packed] {
        let counters = play(
            &script(vec![
                Step::Stop(0),
                offer(3, Address::Buffer(3), true),
                Step::Kick(3),
                Step::Start(0),
            ]),
            layout,
        );
        assert_eq!(counters.report_chains, 1, "{layout:?}");
        assert_eq!(counters.report.discarded_bytes, 4096, "{layout:?}");
    }
}

/// ROM may be mapped without the right to write: a used ring there ended the process.
#[test]
fn a_ring_in_rom_is_refused() {
    // The pages of ROM among the interesting ones: behind 56 others.
    let rom = Address::Page(56);
    assert_eq!(rom.gpa(), 0x90_000);
    let steps = |places| {
        vec![
            Step::Stop(0),
            Step::StartAt(0, places),
            offer(0, Address::Buffer(0), false),
            Step::Kick(0),
        ]
    };
    let here = Address::Page(0);
    for layout in [Layout::Split, Layout::Packed] {
        for places in [[here, here, rom], [rom, here, here]] {
            play(&script(steps(places)), layout);
        }
    }
}

/// The answer to an inflate goes to the beginning of a device-writable buffer, however long that says it is.
#[test]
fn an_answer_may_go_to_a_buffer_of_more_than_two_gib() {
    let segment = |address, length, writable| Segment {
        address,
        length: Length::Raw(length),
        writable,
        odd: 0,
    };
    let long = segment(Address::Buffer(0), 0xc716_a6b6, true);
    let list = segment(Address::Page(206), 223, false);
    let steps = vec![
        Step::Offer {
            queue: 0,
            segments: Few(vec![long, list]),
            indirect: false,
        },
        Step::Kick(0),
    ];
    let script = Script {
        features: STATS_AND_REPORTING | PAGE_REFUSAL,
        ..script(steps)
    };
    for layout in [Layout::Split, Layout::Packed] {
        assert_eq!(play(&script, layout).inflate_chains, 1, "{layout:?}");
    }
}

/// A frame page by page, in every order of giving and taking that fits: the oracles see what is held, what
/// was discarded and that the guest's own pages are left alone.
#[test]
fn frames_fill_up_and_open_again() {
    let list = |page: u32| Step::List {
        buffer: 0,
        pages: Pages(vec![page]),
    };
    let send = |queue| {
        let address = Address::Buffer(0);
        let length = Length::Numbers(1);
        let segment = Segment {
            address,
            length,
            writable: false,
            odd: 0,
        };
        Step::Offer {
            queue,
            segments: Few(vec![segment]),
            indirect: false,
        }
    };
    let mut state = 1u32;
    for layout in [Layout::Split, Layout::Packed] {
        let mut steps = Vec::new();
        for _ in 0..200 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let queue = u8::from(state >> 29 > 4);
            steps.extend([
                list(0x80 + (state >> 20) % 5),
                send(queue),
                Step::Kick(queue),
            ]);
        }
        let script = Script {
            features: STATS_AND_REPORTING | MUST_TELL_HOST,
            ..script(steps)
        };
        let counters = play(&script, layout);
        assert!(
            counters.balloon.reopened_bytes > 0,
            "{layout:?}: {counters:?}"
        );
        assert!(
            counters.balloon.withdrawn_bytes > 0,
            "{layout:?}: {counters:?}"
        );
    }
}
