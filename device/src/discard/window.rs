//! Write-behind: pages that were acknowledged and are discarded later, many at a time.
//!
//! With MUST_TELL_HOST the device may change a page of the balloon until it acknowledges the page's
//! *deflate* (S7). So an inflate can be acknowledged at once, and its pages wait here, where runs from
//! many buffers grow together. The window is flushed in small parts by workers while the guest goes on.
//! Whoever takes a page back takes it out of the window first, or waits for the part that has it (I1).

use super::plan::Piece;
use crate::memory::{BALLOON_PAGE_SHIFT, GuestMemory, Pfn, PfnRange};
use crate::pages::frames::Frames;
use crate::pages::ownership::Ownership;
use crate::sync::channel::{Receiver, TryRecvError};
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
    /// A setting that serves stock guests: a burst of inflation (hosts move by 256 MiB and less at a time)
    /// is acknowledged without a wait, and what waits is back on the host within some 50 ms, which a
    /// kernel needs for twice the limit of a memfd's pages.
    pub const RECOMMENDED: Self = Self {
        limit_bytes: 128 << 20,
        delay: Duration::from_millis(10),
    };
}

/// The most empty pages between two runs that are discarded once more to save a system call's range.
const MAX_BRIDGE_PAGES: u64 = 16;

/// How much of the window is taken out at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slice {
    /// Pages, in a block of as many; a power of two.
    pages: u64,
    /// Frames, where those are larger than a page: they go much faster.
    frames: u64,
    /// No more runs than about this, as a run may cost as much as 64 KiB of pages side by side.
    runs: usize,
    /// How many blocks to look at for pages that wait.
    blocks: usize,
}

impl Slice {
    /// What a worker discards at a time: 2 MiB of small pages, which takes some 0.1 ms, so that kicks, and
    /// deflates that want one of these pages, wait no longer.
    const PART: Self = Self {
        pages: 512,
        frames: 16,
        runs: 128,
        // So few pages may wait in so much memory that looking at all of it would take longer.
        blocks: 4096,
    };
    /// What fits between two buffers of a guest that sends one after the other, some 10 us: of private
    /// memory, and of files, where a run costs a call.
    const MORSEL: Self = Self {
        pages: 32,
        frames: 1,
        runs: 16,
        blocks: 64,
    };
    const MORSEL_OF_FILE: Self = Self {
        pages: 8,
        frames: 1,
        runs: 4,
        blocks: 64,
    };
}

/// A part of the window that is being discarded.
#[derive(Debug)]
pub(crate) struct Flight {
    /// What is being discarded, in ascending order, of one region.
    pub(crate) pieces: Vec<Piece>,
    /// Closed when it is done.
    pub(crate) done: Receiver<()>,
}

impl Flight {
    /// The region that its pages are in.
    pub(crate) fn region(&self) -> usize {
        self.pieces.first().map_or(usize::MAX, |piece| piece.region)
    }

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
    /// What is still to be taken out of what waited when the flush began; 0 if none is under way.
    flushing_bytes: u64,
    /// How large the balloon was when that flush, or the last one, began since the guest gives no more; 0 if it
    /// came by itself.
    hurried_pages: u64,
    flights: Vec<Flight>,
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
            flushing_bytes: 0,
            hurried_pages: 0,
            flights: Vec::new(),
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

    /// Begins to flush what waits if it is as much as there should be, or has waited long enough, or no more
    /// is to be expected, with so many pages in a balloon that is `settled`; true while there is more to flush.
    ///
    /// A guest that takes back what it gave, and gives it again, is not settled: it could have each of its
    /// buffers flushed by itself otherwise.
    pub(crate) fn flushes(&mut self, settled: Option<u64>) -> bool {
        let due = || {
            let full = self.waiting_bytes >= self.setting.limit_bytes;
            full || self.deadline().is_none_or(|due| Instant::now() >= due)
        };
        let more = settled.filter(|pages| *pages > self.hurried_pages);
        if !self.is_empty() && (more.is_some() || self.flushing_bytes == 0 && due()) {
            self.flushing_bytes = self.waiting_bytes;
            self.since = None;
            self.hurried_pages = more.unwrap_or(0);
        }
        self.flushing_bytes > 0
    }

    /// Whether the flush under way is for a guest that gives no more: it has all workers that there are.
    pub(crate) fn hurries(&self) -> bool {
        self.hurried_pages > 0
    }

    /// Whether it holds so much that more has to wait for the flush under way.
    pub(crate) fn is_overfull(&self) -> bool {
        self.waiting_bytes >= self.setting.limit_bytes.saturating_mul(2)
    }

    /// Adds pages that are in the balloon and not discarded.
    pub(crate) fn add(&mut self, pieces: &[Piece]) {
        let before = self.waiting_bytes;
        for piece in pieces {
            let bitmap = self.waiting.region(piece.region);
            let touched = self.touched.get_mut(piece.region);
            if let (Some(bitmap), Some(touched)) = (bitmap, touched) {
                bitmap.insert(piece.range, |run| self.waiting_bytes += run.bytes());
                stretch(touched, piece.range);
            }
        }
        if self.waiting_bytes > before {
            self.since.get_or_insert_with(Instant::now);
        }
    }

    /// Adds single pages of the region at `region`, all in the balloon and not discarded; returns how many.
    pub(crate) fn add_pages(&mut self, region: usize, pages: impl Iterator<Item = Pfn>) -> u64 {
        let bitmap = self.waiting.region(region);
        let (Some(bitmap), Some(touched)) = (bitmap, self.touched.get_mut(region)) else {
            return 0;
        };
        let (mut count, mut first, mut last) = (0, Pfn(u64::MAX), Pfn(0));
        for page in pages {
            bitmap.insert_page(page);
            count += 1;
            first = first.min(page);
            last = last.max(page);
        }
        if count > 0 {
            let end = Pfn(last.0 + 1);
            stretch(touched, PfnRange { start: first, end });
            self.waiting_bytes += count << BALLOON_PAGE_SHIFT;
            self.since.get_or_insert_with(Instant::now);
        }
        count
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
        self.note_taken();
    }

    /// After pages were taken out: nothing is due where nothing waits.
    fn note_taken(&mut self) {
        self.flushing_bytes = self.flushing_bytes.min(self.waiting_bytes);
        if self.is_empty() {
            self.since = None;
        }
    }

    /// Whether a part under way may hold pages of `range`.
    pub(crate) fn is_in_flight(&self, region: usize, range: PfnRange) -> bool {
        self.flights
            .iter()
            .any(|flight| flight.holds(region, range))
    }

    /// The parts that are under way.
    pub(crate) fn flights(&self) -> &[Flight] {
        &self.flights
    }

    /// Notes a part that is under way.
    pub(crate) fn launch(&mut self, flight: Flight) {
        self.flights.push(flight);
    }

    /// Forgets parts that are done.
    pub(crate) fn land(&mut self) {
        let under_way = |flight: &Flight| flight.done.try_recv() != Err(TryRecvError::Disconnected);
        self.flights.retain(under_way);
    }

    /// Takes out the next part of what waits, of a region that `may` be discarded now. `owned` says which
    /// pages are in the balloon.
    pub(crate) fn slice(
        &mut self,
        memory: &GuestMemory,
        owned: &mut Ownership,
        may: impl Fn(usize) -> bool,
    ) -> Option<Load> {
        let waits = |region: &usize| self.touched.get(*region).is_some_and(Option::is_some);
        let region = (0..self.touched.len()).find(|region| waits(region) && may(*region))?;
        Some(self.take_slice(region, Slice::PART, memory, owned))
    }

    /// Takes out as much as is discarded in some 10 us, or finds in that time that less waits. `scales`
    /// tells what is cheap to discard in many runs.
    pub(crate) fn morsel(
        &mut self,
        memory: &GuestMemory,
        owned: &mut Ownership,
        scales: impl Fn(usize) -> bool,
    ) -> Option<Load> {
        let region = self.touched.iter().position(Option::is_some)?;
        let slice = if scales(region) {
            Slice::MORSEL
        } else {
            Slice::MORSEL_OF_FILE
        };
        Some(self.take_slice(region, slice, memory, owned))
    }

    fn take_slice(
        &mut self,
        region: usize,
        slice: Slice,
        memory: &GuestMemory,
        owned: &mut Ownership,
    ) -> Load {
        let load = self.take_from(region, Some(slice), memory, owned);
        let bytes: u64 = load.exact.iter().map(|piece| piece.range.bytes()).sum();
        self.flushing_bytes = self.flushing_bytes.saturating_sub(bytes);
        self.note_taken();
        load
    }

    /// Empties the window. `owned` says which pages are in the balloon.
    pub(crate) fn unload(&mut self, memory: &GuestMemory, owned: &mut Ownership) -> Load {
        let mut load = Load::default();
        for region in 0..self.touched.len() {
            let part = self.take_from(region, None, memory, owned);
            load.exact.extend(part.exact);
            load.bridged.extend(part.bridged);
        }
        self.note_taken();
        load
    }

    /// Takes what waits of a region, or the first slice of it.
    fn take_from(
        &mut self,
        region: usize,
        slice: Option<Slice>,
        memory: &GuestMemory,
        owned: &mut Ownership,
    ) -> Load {
        let mut load = Load::default();
        let bitmap = self.waiting.region(region);
        let place = self.touched.get_mut(region);
        let (Some(bitmap), Some(place), Some(of_memory), Some(owned)) = (
            bitmap,
            place,
            memory.regions().get(region),
            owned.region(region),
        ) else {
            return load;
        };
        let Some(touched) = place.take() else {
            return load;
        };
        let frame = of_memory.pages_per_frame();
        let shape = slice.unwrap_or(Slice::PART);
        let block = if frame == 1 {
            shape.pages
        } else {
            shape.frames * frame
        };
        // No huge page is cut in two.
        let frames = Frames::of(of_memory);
        let (mut at, mut pages, mut blocks) = (touched.start, 0, 0);
        let enough = |pages, runs, blocks| {
            slice.is_some() && (pages >= block || runs >= shape.runs || blocks >= shape.blocks)
        };
        while at < touched.end && !enough(pages, load.exact.len(), blocks) {
            let here = PfnRange {
                start: at,
                end: Pfn((at.0 / block + 1) * block).min(touched.end),
            };
            let end = frames.around(here).end.min(touched.end);
            blocks += 1;
            bitmap.remove(PfnRange { start: at, end }, |range| {
                pages += range.pages();
                match load
                    .exact
                    .last_mut()
                    .filter(|last| last.range.end == range.start)
                {
                    Some(last) => last.range.end = range.end,
                    None => load.exact.push(Piece { region, range }),
                }
            });
            at = end;
        }
        if at < touched.end {
            *place = Some(PfnRange {
                start: at,
                end: touched.end,
            });
        }
        self.waiting_bytes -= pages << BALLOON_PAGE_SHIFT;
        // Huge frames are bridged by whole frames or not at all.
        let reach = MAX_BRIDGE_PAGES.max(frame);
        for piece in &load.exact {
            let gap = |last: &Piece| PfnRange {
                start: last.range.end,
                end: piece.range.start,
            };
            let empty = |gap: PfnRange| gap.pages() <= reach && owned.count(gap) == gap.pages();
            match load.bridged.last_mut() {
                Some(last) if empty(gap(last)) => last.range.end = piece.range.end,
                _ => load.bridged.push(*piece),
            }
        }
        load
    }
}

/// Has `touched` reach over `added` too.
fn stretch(touched: &mut Option<PfnRange>, added: PfnRange) {
    *touched = Some(touched.map_or(added, |touched| PfnRange {
        start: touched.start.min(added.start),
        end: touched.end.max(added.end),
    }));
}
