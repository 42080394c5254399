//! Write-behind: pages that were acknowledged and are discarded later, many at a time.
//!
//! With MUST_TELL_HOST the device may change a page of the balloon until it acknowledges the page's
//! *deflate* (S7). So an inflate can be acknowledged at once, and its pages wait here, where runs from
//! many buffers grow together. The window is flushed by a worker while the guest goes on; one flush is
//! under way at most. Whoever takes a page back takes it out of the window first, or waits for the flush
//! that has it (I1).

use super::plan::Piece;
use crate::memory::{GuestMemory, PfnRange};
use crate::pages::ownership::Ownership;
use crossbeam_channel::Receiver;
use std::time::{Duration, Instant};

/// When a window is flushed. Zero bytes turn write-behind off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteBehind {
    /// At this many bytes. At twice as many, an inflate waits for the flush under way.
    pub limit_bytes: u64,
    /// This long after its first page came.
    pub delay: Duration,
}

impl WriteBehind {
    /// A setting that serves stock guests: large enough for long runs, back on the host soon.
    pub const RECOMMENDED: Self = Self {
        limit_bytes: 32 << 20,
        delay: Duration::from_millis(10),
    };
}

/// The most empty pages between two runs that are discarded once more to save a system call's range.
const MAX_BRIDGE_PAGES: u64 = 16;

/// A flush under way.
#[derive(Debug)]
pub(crate) struct Flight {
    /// What is being discarded, in ascending order.
    pub(crate) pieces: Vec<Piece>,
    /// Closed when it is done.
    pub(crate) done: Receiver<()>,
}

impl Flight {
    /// Whether any page of `range`, in the region at `region`, is being discarded.
    fn holds(&self, region: usize, range: PfnRange) -> bool {
        let first = self
            .pieces
            .partition_point(|piece| (piece.region, piece.range.end) <= (region, range.start));
        self.pieces.get(first).is_some_and(|piece| {
            piece.region == region && piece.range.intersection(range).pages() > 0
        })
    }
}

/// The pages of a window, ready to be discarded.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// The pages that wait, as maximal runs: what the books are about.
    pub(crate) exact: Vec<Piece>,
    /// The same, with small gaps of pages that are in the balloon and empty already bridged over.
    pub(crate) bridged: Vec<Piece>,
}

/// The window of one balloon.
#[derive(Debug)]
pub(crate) struct Window {
    setting: WriteBehind,
    waiting: Ownership,
    /// Where in each region pages wait, so that unloading need not look everywhere.
    touched: Vec<Option<PfnRange>>,
    waiting_bytes: u64,
    since: Option<Instant>,
    flight: Option<Flight>,
}

impl Window {
    /// An empty window over `memory`.
    pub(crate) fn new(memory: &GuestMemory) -> Self {
        Self {
            setting: WriteBehind::default(),
            waiting: Ownership::new(memory),
            touched: vec![None; memory.regions().len()],
            waiting_bytes: 0,
            since: None,
            flight: None,
        }
    }

    /// An empty window with the same setting over another table. What waited is the caller's to flush.
    pub(crate) fn over(&self, memory: &GuestMemory) -> Self {
        Self {
            setting: self.setting,
            ..Self::new(memory)
        }
    }

    /// Changes when it is flushed; what waits is the caller's to flush.
    pub(crate) fn set(&mut self, setting: WriteBehind) {
        self.setting = setting;
    }

    /// Whether pages may wait here at all.
    pub(crate) fn is_open(&self) -> bool {
        self.setting.limit_bytes > 0
    }

    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting_bytes == 0
    }

    /// When the pages that wait are due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.since
            .and_then(|since| since.checked_add(self.setting.delay))
    }

    /// Whether it holds as much as it should, or what waits has waited long enough.
    pub(crate) fn is_due(&self) -> bool {
        let full = self.waiting_bytes >= self.setting.limit_bytes;
        !self.is_empty() && (full || self.deadline().is_none_or(|due| Instant::now() >= due))
    }

    /// Whether it holds so much that more has to wait for the flush under way.
    pub(crate) fn is_overfull(&self) -> bool {
        self.waiting_bytes >= self.setting.limit_bytes.saturating_mul(2)
    }

    /// Adds pages that are in the balloon and not discarded.
    pub(crate) fn add(&mut self, pieces: &[Piece]) {
        for piece in pieces {
            let bitmap = self.waiting.region(piece.region);
            let touched = self.touched.get_mut(piece.region);
            if let (Some(bitmap), Some(touched)) = (bitmap, touched) {
                bitmap.insert(piece.range, |run| self.waiting_bytes += run.bytes());
                *touched = Some(touched.map_or(piece.range, |touched| PfnRange {
                    start: touched.start.min(piece.range.start),
                    end: touched.end.max(piece.range.end),
                }));
            }
        }
        if self.since.is_none() && !self.is_empty() {
            self.since = Some(Instant::now());
        }
    }

    /// Takes out what waits of `range`; calls `taken` for each run that did.
    pub(crate) fn remove(
        &mut self,
        region: usize,
        range: PfnRange,
        mut taken: impl FnMut(PfnRange),
    ) {
        if self.is_empty() {
            return;
        }
        if let Some(bitmap) = self.waiting.region(region) {
            bitmap.remove(range, |run| {
                self.waiting_bytes -= run.bytes();
                taken(run);
            });
        }
        if self.is_empty() {
            self.since = None;
        }
    }

    /// The flush under way, if it may hold pages of `range`.
    pub(crate) fn flight_with(&self, region: usize, range: PfnRange) -> Option<&Flight> {
        self.flight
            .as_ref()
            .filter(|flight| flight.holds(region, range))
    }

    /// The flush under way.
    pub(crate) fn flight(&self) -> Option<&Flight> {
        self.flight.as_ref()
    }

    /// Notes a flush, or that there is none any more.
    pub(crate) fn set_flight(&mut self, flight: Option<Flight>) {
        self.flight = flight;
    }

    /// Forgets a flush that is done.
    pub(crate) fn land(&mut self) {
        let done = |flight: &Flight| {
            flight.done.try_recv() == Err(crossbeam_channel::TryRecvError::Disconnected)
        };
        if self.flight.as_ref().is_some_and(done) {
            self.flight = None;
        }
    }

    /// Empties the window. `owned` says which pages are in the balloon.
    pub(crate) fn unload(&mut self, memory: &GuestMemory, owned: &mut Ownership) -> Load {
        let mut load = Load::default();
        self.since = None;
        if self.is_empty() {
            return load;
        }
        self.waiting_bytes = 0;
        for (region, of_memory) in memory.regions().iter().enumerate() {
            let touched = self.touched.get_mut(region).and_then(Option::take);
            let bitmap = self.waiting.region(region);
            let (Some(bitmap), Some(touched)) = (bitmap, touched) else {
                continue;
            };
            bitmap.remove(touched, |range| load.exact.push(Piece { region, range }));
            // Huge frames are bridged by whole frames or not at all.
            let reach = MAX_BRIDGE_PAGES.max(of_memory.pages_per_frame());
            let Some(owned) = owned.region(region) else {
                continue;
            };
            let first = load.exact.partition_point(|piece| piece.region < region);
            for piece in load.exact.iter().skip(first) {
                match load.bridged.last_mut().filter(|last| last.region == region) {
                    Some(last) => {
                        let gap = PfnRange {
                            start: last.range.end,
                            end: piece.range.start,
                        };
                        if gap.pages() <= reach && owned.count(gap) == gap.pages() {
                            last.range.end = piece.range.end;
                        } else {
                            load.bridged.push(*piece);
                        }
                    }
                    None => load.bridged.push(*piece),
                }
            }
        }
        load
    }
}
