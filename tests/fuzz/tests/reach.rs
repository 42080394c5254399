//! What scripts reach: every queue, every feature and every moment that a fuzzer is to try has a script
//! here that gets there, under the same oracles.

use aerostat_fuzz::device::play;
use aerostat_fuzz::script::{Address, Bytes, Few, Hint, Layout, Pace, Pages, Script, Step};

const LAYOUTS: [Layout; 3] = [Layout::Split, Layout::Packed, Layout::Elements];
/// STATS_VQ, FREE_PAGE_HINT, PAGE_REPORTING.
const QUEUES: u16 = 0b111;
const MUST_TELL_HOST: u16 = 1 << 6;
const IN_ORDER: u16 = 1 << 7;
const PAGE_REFUSAL: u16 = 1 << 8;
const HOST_RESET: u16 = 1 << 9;
const DENSE: u8 = 1 << 5;
/// All regions but the pinned one, with which nothing may wait.
const UNPINNED: u8 = !(1 << 4);
/// Write-behind that is flushed from three pages on, and one that is not.
const FEW: u8 = 1;
const NEVER: u8 = 3;

fn script(features: u16, write_behind: u8, steps: Vec<Step>) -> Script {
    Script {
        features,
        queues: DENSE,
        sizes: [5; 5],
        regions: UNPINNED,
        write_behind,
        steps,
    }
}

fn tell(deflate: bool, pages: &[u32]) -> Step {
    Step::Tell {
        deflate,
        pages: Pages(pages.to_vec()),
        answer: 2,
        indirect: false,
    }
}

fn write(page: u64) -> Step {
    Step::Poke(Address::Raw(page << 12), Bytes(b"the guest's".to_vec()))
}

fn relocate() -> Step {
    Step::Move {
        edits: Few(Vec::new()),
        seal: false,
    }
}

#[test]
fn each_queue_is_served_in_each_layout_in_order_or_not() {
    for layout in LAYOUTS {
        for (features, queues) in [
            (QUEUES, DENSE),
            (QUEUES, 0x1f),
            (QUEUES | IN_ORDER, DENSE),
            (QUEUES & !1, DENSE),
        ] {
            let mut script = script(
                features,
                0,
                vec![
                    tell(false, &[0x20, 0x21]),
                    tell(true, &[0x21]),
                    Step::Statistics(Few(vec![(4, 1), (5, 2)])),
                    Step::AskStats,
                    Step::Statistics(Few(vec![(4, 1)])),
                    Step::Hints(0),
                    Step::Hint(Hint::Id(0)),
                    Step::Hint(Hint::Pages(20, 3)),
                    Step::Hint(Hint::Stop),
                    Step::Hints(2),
                    Step::Hints(1),
                    Step::Report(Few(vec![(24, 2), (30, 1)]), false),
                ],
            );
            script.queues = queues;
            let asks = features & 1 != 0;
            let fits = |step: &Step| asks || !matches!(step, Step::Statistics(_));
            script.steps.retain(fits);
            let counters = play(&script, layout);
            let reached = [
                counters.inflate_chains,
                counters.deflate_chains,
                counters.hint_chains,
                counters.report_chains,
            ];
            let what = format!("{layout:?} {features:#x} {queues:#x}: {counters:?}");
            assert_eq!(reached, [1, 1, 3, 1], "{what}");
            assert_eq!(counters.stats_chains, u64::from(features & 1) * 2, "{what}");
            assert_eq!(counters.chain_errors, 0, "{what}");
            assert_eq!(counters.balloon.discarded_bytes, 2 << 12, "{what}");
            assert_eq!(counters.report.discarded_bytes, 3 << 12, "{what}");
        }
    }
}

/// I1: the deflate of a page whose flush has been handed to another worker, which is slow.
#[test]
fn a_page_that_is_taken_back_from_a_slow_flush_keeps_what_the_guest_writes() {
    for layout in LAYOUTS {
        let counters = play(
            &script(
                MUST_TELL_HOST,
                FEW,
                vec![
                    Step::Target(60),
                    Step::Pace(Pace::Alone),
                    tell(false, &[0x20, 0x21, 0x22]),
                    tell(false, &[0x24]),
                    tell(true, &[0x21, 0x24]),
                    write(0x21),
                    write(0x24),
                    Step::Pace(Pace::All),
                    Step::Flush,
                ],
            ),
            layout,
        );
        assert_eq!(counters.balloon.discarded_bytes, 3 << 12, "{layout:?}");
        assert_eq!(counters.balloon.withdrawn_bytes, 1 << 12, "{layout:?}");
    }
}

/// A guest that writes to a page of its balloon: the page is emptied once more when the pages around it
/// are, and is in the books once.
#[test]
fn a_gap_that_the_guest_wrote_to_is_bridged_all_the_same() {
    for layout in LAYOUTS {
        let counters = play(
            &script(
                MUST_TELL_HOST,
                NEVER,
                vec![
                    Step::Target(60),
                    tell(false, &[0x21]),
                    Step::Flush,
                    write(0x21),
                    tell(false, &[0x20, 0x22]),
                    Step::Flush,
                ],
            ),
            layout,
        );
        assert_eq!(counters.balloon.discarded_bytes, 3 << 12, "{layout:?}");
        assert_eq!(counters.discard_ranges, 2, "{layout:?}");
    }
}

#[test]
fn pages_are_refused_over_the_target_and_while_inhibited() {
    for layout in LAYOUTS {
        let counters = play(
            &script(
                PAGE_REFUSAL,
                0,
                vec![
                    Step::Target(2),
                    tell(false, &[0x20, 0x21, 0x22]),
                    Step::Inhibit(true),
                    Step::Target(9),
                    tell(false, &[0x23]),
                    Step::Inhibit(false),
                    tell(false, &[0x24, 0x24, 0x5000]),
                ],
            ),
            layout,
        );
        assert_eq!(counters.refused_bytes, 4 << 12, "{layout:?} {counters:?}");
        assert_eq!(counters.balloon.discarded_bytes, 3 << 12, "{layout:?}");
    }
}

#[test]
fn a_host_reset_takes_what_waits_and_turns_late_messages_away() {
    for layout in LAYOUTS {
        let counters = play(
            &script(
                MUST_TELL_HOST | HOST_RESET,
                NEVER,
                vec![
                    Step::Target(60),
                    tell(false, &[0x20, 0x21]),
                    Step::ResetBalloon,
                    tell(false, &[0x22]),
                    tell(true, &[0x20]),
                    Step::AcknowledgeReset,
                    tell(false, &[0x23]),
                    Step::Flush,
                ],
            ),
            layout,
        );
        let flow = counters.balloon;
        assert_eq!(flow.withdrawn_bytes, 2 << 12, "{layout:?}");
        assert_eq!(flow.skipped_late_bytes, 1 << 12, "{layout:?}");
        assert_eq!(flow.discarded_bytes, 1 << 12, "{layout:?}");
        assert_eq!(counters.host_resets_acknowledged, 1, "{layout:?}");
    }
}

/// S13: with pages in the window, in a flush, in an incomplete frame; with chains that nobody has looked
/// at; in a round of hints; paused; inhibited; with a stats buffer held; before a reset is acknowledged.
#[test]
fn a_guest_moves_at_any_moment() {
    for layout in LAYOUTS {
        let all = QUEUES | MUST_TELL_HOST | PAGE_REFUSAL | HOST_RESET;
        let steps = vec![
            Step::Target(60),
            relocate(),
            Step::Statistics(Few(vec![(4, 1)])),
            tell(false, &[0x20, 0x21, 0x80, 0x81, 0xa0]),
            relocate(),
            Step::Pace(Pace::Alone),
            tell(false, &[0x22, 0x23, 0x24]),
            relocate(),
            Step::Pace(Pace::Nothing),
            tell(false, &[0x25]),
            tell(true, &[0x20]),
            relocate(),
            Step::Pace(Pace::All),
            Step::Hints(0),
            Step::Hint(Hint::Id(0)),
            relocate(),
            Step::Hint(Hint::Stop),
            Step::Pause(true),
            relocate(),
            Step::Pause(false),
            Step::Inhibit(true),
            relocate(),
            Step::Inhibit(false),
            Step::ResetBalloon,
            relocate(),
            tell(false, &[0x26]),
            Step::AcknowledgeReset,
            tell(false, &[0x27]),
        ];
        let counters = play(&script(all, FEW, steps), layout);
        assert_eq!(counters.balloon.skipped_late_bytes, 1 << 12, "{layout:?}");
        assert_eq!(counters.inflate_chains, 2, "{layout:?} {counters:?}");
        assert_eq!(counters.broken_rings, 0, "{layout:?}");
    }
}

/// Bytes that were changed are refused, all of them, wherever the change is; with a checksum that was
/// made right again they are refused or make a device like any other.
#[test]
fn a_saved_state_that_was_tampered_with_is_refused_or_behaves() {
    for layout in LAYOUTS {
        for at in 0..130 {
            for (value, seal) in [(0xff, false), (0xff, true), (0, true), (3, true)] {
                let steps = vec![
                    tell(false, &[0x20, 0x21, 0x80]),
                    Step::Move {
                        edits: Few(vec![(at, value)]),
                        seal,
                    },
                    tell(false, &[0x22]),
                    tell(true, &[0x20]),
                ];
                play(&script(QUEUES, 0, steps), layout);
            }
        }
    }
}
