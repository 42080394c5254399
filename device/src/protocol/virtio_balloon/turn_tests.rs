//! What one turn may cost, whatever the guest makes available.

use super::*;
use crate::discard::Discarder;
use crate::discard::probe::Capabilities;
use crate::memory::IoVec;
use crate::memory::tests::heap_memory;
use crate::ring::source::{Element, ElementQueue};
use std::collections::VecDeque;
use std::sync::Arc;

/// A chain of as many empty buffers as any chain can have: they bring nothing, and cost a walk.
fn of_empty_buffers(writable: bool) -> Element {
    // SAFETY: nothing is read from or written to buffers of no length.
    let buffers = vec![unsafe { IoVec::new(1, 0) }; MAX_BUFFERS_PER_TURN];
    let mut element = Element::default();
    if writable {
        element.writable = buffers;
    } else {
        element.readable = buffers;
    }
    element
}

#[test]
fn chains_of_empty_buffers_are_one_to_a_turn() {
    for role in [
        Role::Inflate,
        Role::Deflate,
        Role::Stats,
        Role::Hints,
        Role::Reporting,
    ] {
        let waiting = VecDeque::from([(); 3].map(|()| of_empty_buffers(role == Role::Reporting)));
        let (completions, _receiver) = crate::sync::channel::unbounded();
        let mut source = Source::Elements(ElementQueue {
            index: 0,
            waiting,
            completions,
            event: None,
            unpublished: false,
        });
        let discarder = Discarder::inline(Arc::new(Capabilities::none()));
        let mut turn = Turn {
            balloon: &mut Balloon::new(heap_memory(&[(0, 0x1000)]), discarder),
            scratch: &mut Scratch::default(),
            books: &Books::new(1),
            tape: &Tape::default(),
            stats: &StatsBoard::default(),
            hints: &HintBoard::default(),
            config: &ConfigSpace::new(Features::empty()),
            refusal: false,
            ballooned_bytes: &AtomicU64::new(0),
            poisoned: false,
        };
        for left in [2, 1, 0] {
            let more = serve_pages(role, &mut source, &mut turn).unwrap();
            assert_eq!(source.waiting_elements(), left, "{role:?}");
            assert!(more || left == 0, "{role:?}: more is left");
        }
    }
}
