//! The bitmap as the driver finds it, in split and packed rings, and what nonsense gets.

use super::super::{ConfigSpace, Features, HintBoard, Role, StatsBoard, serve_pages};
use super::*;
use crate::balloon::Balloon;
use crate::device::QueuePosition;
use crate::discard::Discarder;
use crate::discard::probe::Capabilities;
use crate::memory::tests::heap_memory_with;
use crate::memory::{BALLOON_PAGE_BYTES, Gpa, GuestMemory};
use crate::metrics::{Books, Counters};
use crate::ring::source::{RingQueue, Source};
use crate::ring::{Ring, RingFeatures};
use crate::runtime::Scratch;
use crate::target::Target;
use crate::trace::Tape;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const LIST: u64 = 0x3000;
const ANSWER: u64 = 0x4000;
/// The first page that is given; 64 pages are writable, and as many behind them read-only.
const FIRST: u64 = 16;
const READONLY: u64 = 64;
/// Where memory ends.
const END: u64 = 2 * READONLY * BALLOON_PAGE_BYTES;
const PATTERN: u8 = 0xa5;

/// One buffer: a list, and room for the answer.
struct Buffer {
    pages: Vec<u64>,
    list: u64,
    /// Length of the list in bytes, if it is not that of the pages.
    list_bytes: u32,
    answer: (u64, u32),
}

/// Pages, with as much room as they need.
fn buffer(pages: impl IntoIterator<Item = u64>) -> Buffer {
    let pages: Vec<u64> = pages.into_iter().collect();
    Buffer {
        list: LIST,
        list_bytes: pages.len() as u32 * 4,
        answer: (ANSWER, pages.len().div_ceil(8) as u32),
        pages,
    }
}

struct Bench {
    memory: Arc<GuestMemory>,
    balloon: Balloon,
    books: Books,
    config: ConfigSpace,
}

impl Bench {
    fn new(target_pages: u32) -> Self {
        let size = READONLY * BALLOON_PAGE_BYTES;
        let memory = heap_memory_with(&[(0, size), (size, size)], |region| {
            region.readonly = region.gpa.0 != 0;
        });
        let discarder = Discarder::inline(Arc::new(Capabilities::probe().unwrap()));
        let config = ConfigSpace::new(Features::all());
        config.set_target(&Target::whole(u64::from(target_pages) << 12));
        let bench = Self {
            balloon: Balloon::new(Arc::clone(&memory), discarder),
            memory,
            books: Books::new(1),
            config,
        };
        for page in FIRST..READONLY {
            bench.put(page * BALLOON_PAGE_BYTES, &[PATTERN; 4096]);
        }
        bench
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        let slice = self.memory.slice_prefix(Gpa(gpa), bytes.len() as u64);
        assert_eq!(slice.unwrap().write(0, bytes), bytes.len());
    }

    fn get<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let slice = self.memory.slice_prefix(Gpa(gpa), N as u64);
        assert_eq!(slice.unwrap().read(0, &mut bytes), N);
        bytes
    }

    fn is_untouched(&self, page: u64) -> bool {
        self.get::<4096>(page * BALLOON_PAGE_BYTES) == [PATTERN; 4096]
    }

    /// Serves one buffer in a new ring; returns the used length.
    fn serve(&mut self, packed: bool, buffer: &Buffer) -> u32 {
        let list: Vec<u8> = buffer
            .pages
            .iter()
            .flat_map(|page| (*page as u32).to_le_bytes())
            .collect();
        for (number, at) in list.chunks(4).zip((buffer.list..END).step_by(4)) {
            self.put(at, number);
        }
        let descriptor = |at: u64, gpa: u64, len: u32, tail: [u16; 2]| {
            self.put(DESC + 16 * at, &gpa.to_le_bytes());
            self.put(DESC + 16 * at + 8, &len.to_le_bytes());
            self.put(DESC + 16 * at + 12, &tail[0].to_le_bytes());
            self.put(DESC + 16 * at + 14, &tail[1].to_le_bytes());
        };
        let (next, write, avail) = (1u16, 2u16, 1u16 << 7);
        let (answer, room) = buffer.answer;
        if packed {
            // Id before flags, unlike in a split ring.
            descriptor(0, buffer.list, buffer.list_bytes, [0, next | avail]);
            descriptor(1, answer, room, [5, write | avail]);
        } else {
            descriptor(0, buffer.list, buffer.list_bytes, [next, 1]);
            descriptor(1, answer, room, [write, 0]);
            self.put(AVAIL, &[0, 0, 1, 0, 0, 0]);
            self.put(USED, &[0; 4]);
        }
        let features = RingFeatures {
            packed,
            ..RingFeatures::default()
        };
        let position = if packed {
            QueuePosition::PACKED_START
        } else {
            QueuePosition::SPLIT_START
        };
        let places = [Gpa(DESC), Gpa(AVAIL), Gpa(USED)];
        let ring = Ring::new(&self.memory, 4, places, position, features).unwrap();
        let mut source = Source::Ring(RingQueue { ring, call: None });
        let mut turn = Turn {
            balloon: &mut self.balloon,
            scratch: &mut Scratch::default(),
            books: &self.books,
            tape: &Tape::default(),
            stats: &StatsBoard::default(),
            hints: &HintBoard::default(),
            config: &self.config,
            refusal: true,
            ballooned_bytes: &AtomicU64::new(0),
            poisoned: false,
        };
        assert!(!serve_pages(Role::Inflate, &mut source, &mut turn).unwrap());
        let used = if packed { DESC + 8 } else { USED + 8 };
        u32::from_le_bytes(self.get(used))
    }

    fn books(&self) -> Counters {
        let total = self.books.total();
        assert!(total.balloon.balances(), "{total:?}");
        assert_eq!(total.balloon.pending_bytes, 0);
        assert!(total.refused_bytes <= total.balloon.skipped_bytes());
        total
    }

    fn ballooned_pages(&self) -> u64 {
        self.balloon.ballooned_bytes() / BALLOON_PAGE_BYTES
    }
}

fn both_layouts(test: impl Fn(bool)) {
    [false, true].into_iter().for_each(test);
}

#[test]
fn nothing_is_written_if_nothing_is_refused() {
    both_layouts(|packed| {
        let mut bench = Bench::new(100);
        bench.put(ANSWER, &[0xee; 4]);
        assert_eq!(bench.serve(packed, &buffer(FIRST..FIRST + 20)), 0);
        assert_eq!(bench.get::<4>(ANSWER), [0xee; 4]);
        assert_eq!(bench.ballooned_pages(), 20);
        assert_eq!(bench.books().refused_bytes, 0);
        assert_eq!(bench.get::<4>(FIRST * BALLOON_PAGE_BYTES), [0; 4]);
    });
}

#[test]
fn bits_are_in_the_order_of_the_list_up_to_the_last_that_is_set() {
    both_layouts(|packed| {
        let mut bench = Bench::new(100);
        // 20 pages in descending order: the 2nd is read-only, the 4th out of memory, the 12th a
        // duplicate of the first. Nothing behind the 12th is refused.
        let mut pages: Vec<u64> = (FIRST..FIRST + 20).rev().collect();
        pages[1] = READONLY;
        pages[3] = 1 << 31;
        pages[11] = pages[0];
        bench.put(ANSWER, &[0xee; 4]);
        assert_eq!(bench.serve(packed, &buffer(pages)), 2);
        assert_eq!(bench.get::<4>(ANSWER), [0b1010, 0b1000, 0xee, 0xee]);
        let books = bench.books();
        assert_eq!(bench.ballooned_pages(), 17);
        assert_eq!(books.refused_bytes, 3 * BALLOON_PAGE_BYTES);
        assert_eq!(
            (
                books.balloon.skipped_out_of_range_bytes,
                books.balloon.skipped_duplicate_bytes
            ),
            (2 * BALLOON_PAGE_BYTES, BALLOON_PAGE_BYTES)
        );
    });
}

#[test]
fn pages_over_the_target_keep_their_contents() {
    both_layouts(|packed| {
        let mut bench = Bench::new(10);
        assert_eq!(bench.serve(packed, &buffer(FIRST..FIRST + 13)), 2);
        assert_eq!(bench.get::<2>(ANSWER), [0, 0b1_1100]);
        assert_eq!(bench.ballooned_pages(), 10);
        assert!((FIRST + 10..READONLY).all(|page| bench.is_untouched(page)));
        assert!((FIRST..FIRST + 10).all(|page| !bench.is_untouched(page)));
    });
}

#[test]
fn content_errors_take_nothing_and_refuse_all_that_there_is_room_for() {
    both_layouts(|packed| {
        for (change, used, answer) in [
            // One byte short for 20 pages.
            (
                Box::new(|buffer: &mut Buffer| buffer.answer.1 = 2) as Box<dyn Fn(&mut Buffer)>,
                2,
                [0xff, 0xff, 0xee],
            ),
            // Half a number at the end.
            (
                Box::new(|buffer| buffer.list_bytes -= 2),
                3,
                [0xff, 0xff, 0x7],
            ),
            // No room that can be written at all.
            (
                Box::new(|buffer| buffer.answer.0 = READONLY * BALLOON_PAGE_BYTES),
                0,
                [0xee; 3],
            ),
            (Box::new(|buffer| buffer.answer.0 = 1 << 40), 0, [0xee; 3]),
            // Ten numbers in memory, and ten behind it.
            (
                Box::new(|buffer| buffer.list = END - 40),
                3,
                [0xff, 0xff, 0xf],
            ),
        ] {
            let mut bench = Bench::new(100);
            bench.put(ANSWER, &[0xee; 3]);
            let mut nonsense = buffer(FIRST..FIRST + 20);
            change(&mut nonsense);
            assert_eq!(bench.serve(packed, &nonsense), used);
            assert_eq!(bench.get::<3>(ANSWER), answer);
            let books = bench.books();
            assert_eq!((books.chain_errors, books.inflate_chains), (1, 1));
            assert_eq!(books.balloon.requested_bytes, 0);
            assert!((FIRST..READONLY).all(|page| bench.is_untouched(page)));
        }
    });
}

#[test]
fn unusual_places_are_no_error_and_an_empty_list_is_acknowledged() {
    both_layouts(|packed| {
        let mut bench = Bench::new(100);
        bench.put(ANSWER, &[0xee; 3]);
        // Numbers that lie in two regions, and more room than they need.
        let mut odd = buffer(FIRST..FIRST + 20);
        odd.list = READONLY * BALLOON_PAGE_BYTES - 40;
        odd.answer.1 = 100;
        assert_eq!(bench.serve(packed, &odd), 0);
        assert_eq!(bench.get::<3>(ANSWER), [0xee; 3]);
        assert_eq!(bench.ballooned_pages(), 20);
        let books = bench.books();
        assert_eq!((books.chain_errors, books.inflate_chains), (0, 1));
        assert_eq!(bench.serve(packed, &buffer([])), 0, "an empty list");
        let books = bench.books();
        assert_eq!((books.chain_errors, books.inflate_chains), (1, 2));
    });
}

#[test]
fn a_list_over_the_limit_is_refused_in_bounded_work() {
    let mut bench = Bench::new(100);
    let mut nonsense = buffer([FIRST]);
    nonsense.list_bytes = u32::MAX - 4096;
    nonsense.answer = (ANSWER, 4096);
    // A bit for each of 1024 pages.
    assert_eq!(bench.serve(false, &nonsense), 128);
    assert_eq!(bench.get::<128>(ANSWER), [0xff; 128]);
    assert_eq!(bench.get::<1>(ANSWER + 128), [0]);
    assert_eq!(bench.books().chain_errors, 1);
}

#[test]
fn late_pages_are_all_refused_and_none_is_looked_at() {
    both_layouts(|packed| {
        let mut bench = Bench::new(100);
        bench.config.ask_for_reset();
        let mut pages: Vec<u64> = (FIRST..FIRST + 9).collect();
        pages[0] = 1 << 31;
        assert_eq!(bench.serve(packed, &buffer(pages)), 2);
        assert_eq!(bench.get::<2>(ANSWER), [0xff, 1]);
        let books = bench.books();
        assert_eq!(books.balloon.skipped_late_bytes, 9 * BALLOON_PAGE_BYTES);
        assert_eq!(books.refused_bytes, 9 * BALLOON_PAGE_BYTES);
        assert!((FIRST..READONLY).all(|page| bench.is_untouched(page)));
    });
}

/// The device writes the answer before it discards: a page that holds the bitmap is given away.
#[test]
fn an_answer_in_a_page_that_is_given_goes_with_the_page() {
    let mut bench = Bench::new(100);
    let mut own = buffer([FIRST, 1 << 31]);
    own.answer.0 = FIRST * BALLOON_PAGE_BYTES;
    assert_eq!(bench.serve(false, &own), 1);
    assert_eq!(bench.get::<4096>(FIRST * BALLOON_PAGE_BYTES), [0; 4096]);
}
