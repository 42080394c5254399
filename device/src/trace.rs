//! What a guest gave and took, in its own order, as a file: recorded from a device that serves a real
//! guest, played back by benchmarks (docs/performance.md).
//!
//! The format is compact, since guests send runs: after the eight bytes of [`MAGIC`] come entries, one a
//! buffer, of variable-length integers (LEB128; *signed* ones zigzag encoded):
//!
//! | field | meaning |
//! |---|---|
//! | kind | 1 inflate, 2 deflate, 3 report |
//! | microseconds | since the entry before |
//! | runs | how many follow |
//! | of each run: start, signed | its first page less the page that would have continued the last run |
//! | of each run: steps, signed | pages beyond the first; negative for a descending run |
//!
//! Recording costs a device nothing unless it is on. A file that cannot be written any more ends the
//! recording, not the device.

use crate::memory::{Pfn, PfnRange};
use parking_lot::Mutex;
use std::fs::File;
use std::io::{self, BufRead, BufWriter, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// How a trace begins.
pub const MAGIC: [u8; 8] = *b"aerotrc1";

/// The most pages that a run of a trace may claim, so that a broken file cannot fill the memory.
const MAX_RUN_PAGES: u64 = 1 << 20;

/// What the guest did with the pages of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Put them into the balloon.
    Inflate,
    /// Took them out.
    Deflate,
    /// Reported them as free.
    Report,
}

impl Kind {
    fn code(self) -> u64 {
        match self {
            Self::Inflate => 1,
            Self::Deflate => 2,
            Self::Report => 3,
        }
    }

    fn of(code: u64) -> Option<Self> {
        [Self::Inflate, Self::Deflate, Self::Report]
            .into_iter()
            .find(|kind| kind.code() == code)
    }
}

/// One buffer of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it was for.
    pub kind: Kind,
    /// How long after the entry before it came, in microseconds.
    pub microseconds: u64,
    /// Its pages, in the guest's order.
    pub pages: Vec<Pfn>,
}

/// Writes a trace.
#[derive(Debug)]
pub struct TraceWriter<W: Write> {
    sink: W,
    last: Instant,
    /// The page that would continue the last run.
    next: u64,
}

impl<W: Write> TraceWriter<W> {
    /// Begins a trace.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn new(mut sink: W) -> io::Result<Self> {
        sink.write_all(&MAGIC)?;
        Ok(Self {
            sink,
            last: Instant::now(),
            next: 0,
        })
    }

    /// Adds a buffer of pages, in the guest's order.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn pages(&mut self, kind: Kind, pages: &[Pfn]) -> io::Result<()> {
        let mut runs: Vec<(u64, i64)> = Vec::new();
        for &Pfn(page) in pages {
            match runs.last_mut() {
                Some((start, steps))
                    if *steps >= 0 && page == *start + steps.unsigned_abs() + 1 =>
                {
                    *steps += 1;
                }
                Some((start, steps))
                    if *steps <= 0
                        && page.checked_add(steps.unsigned_abs() + 1) == Some(*start) =>
                {
                    *steps -= 1;
                }
                _ => runs.push((page, 0)),
            }
        }
        self.entry(kind, &runs)
    }

    /// Adds a buffer of ranges.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn ranges(&mut self, kind: Kind, ranges: &[PfnRange]) -> io::Result<()> {
        let steps = |range: &PfnRange| i64::try_from(range.pages()).unwrap_or(i64::MAX) - 1;
        let ranges = ranges.iter().filter(|range| range.pages() > 0);
        let runs: Vec<_> = ranges.map(|range| (range.start.0, steps(range))).collect();
        self.entry(kind, &runs)
    }

    fn entry(&mut self, kind: Kind, runs: &[(u64, i64)]) -> io::Result<()> {
        let elapsed = self.last.elapsed();
        self.last += elapsed;
        let mut bytes = Vec::with_capacity(8 + 8 * runs.len());
        put(&mut bytes, kind.code());
        put(
            &mut bytes,
            u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX),
        );
        put(&mut bytes, runs.len() as u64);
        for &(start, steps) in runs {
            put(
                &mut bytes,
                zigzag(start.wrapping_sub(self.next).cast_signed()),
            );
            put(&mut bytes, zigzag(steps));
            let direction = if steps < 0 { -1 } else { 1 };
            self.next = start
                .wrapping_add_signed(steps)
                .wrapping_add_signed(direction);
        }
        self.sink.write_all(&bytes)
    }

    /// Writes what is buffered.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// Reads a trace, entry by entry; the first error ends it.
#[derive(Debug)]
pub struct TraceReader<R: BufRead> {
    source: io::Bytes<R>,
    next: u64,
}

impl<R: BufRead> TraceReader<R> {
    /// Begins to read.
    ///
    /// # Errors
    /// It is no trace.
    pub fn new(mut source: R) -> io::Result<Self> {
        let mut magic = [0; 8];
        source.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(broken("it does not begin as a trace does"));
        }
        Ok(Self {
            source: source.bytes(),
            next: 0,
        })
    }

    fn entry(&mut self) -> io::Result<Option<Entry>> {
        let Some(code) = self.number()? else {
            return Ok(None);
        };
        let kind = Kind::of(code).ok_or_else(|| broken("an entry of no known kind"))?;
        let microseconds = self.inside()?;
        let mut pages = Vec::new();
        for _ in 0..self.inside()? {
            let start = self.next.wrapping_add_signed(unzigzag(self.inside()?));
            let steps = unzigzag(self.inside()?);
            if steps.unsigned_abs() >= MAX_RUN_PAGES {
                return Err(broken("a run that is too long"));
            }
            let direction = if steps < 0 { -1 } else { 1 };
            let mut page = start;
            for _ in 0..=steps.unsigned_abs() {
                pages.push(Pfn(page));
                page = page.wrapping_add_signed(direction);
            }
            self.next = page;
        }
        Ok(Some(Entry {
            kind,
            microseconds,
            pages,
        }))
    }

    /// A number that has to be there.
    fn inside(&mut self) -> io::Result<u64> {
        self.number()?
            .ok_or_else(|| ErrorKind::UnexpectedEof.into())
    }

    /// The next number, or `None` at the end.
    fn number(&mut self) -> io::Result<Option<u64>> {
        let mut value = 0;
        for (shift, byte) in (0..64).step_by(7).zip(&mut self.source) {
            let byte = byte?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(Some(value));
            }
            if shift == 63 {
                return Err(broken("a number that is too long"));
            }
        }
        // Nothing at all is the end; a number that breaks off is none.
        if value == 0 {
            Ok(None)
        } else {
            Err(ErrorKind::UnexpectedEof.into())
        }
    }
}

impl<R: BufRead> Iterator for TraceReader<R> {
    type Item = io::Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        self.entry().transpose()
    }
}

fn broken(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

fn put(bytes: &mut Vec<u8>, mut value: u64) {
    loop {
        let low = u8::try_from(value & 0x7f).unwrap_or(0);
        value >>= 7;
        if value == 0 {
            bytes.push(low);
            return;
        }
        bytes.push(low | 0x80);
    }
}

fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

/// The recording of a device, which is off most of the time.
#[derive(Debug, Default)]
pub(crate) struct Tape {
    /// So that a device that is not recorded takes no lock.
    running: AtomicBool,
    writer: Mutex<Option<TraceWriter<BufWriter<File>>>>,
}

impl Tape {
    /// Records to `file` from now on, or no more. What was recorded before is written.
    pub(crate) fn record(&self, file: Option<File>) -> io::Result<()> {
        let new = file
            .map(|file| TraceWriter::new(BufWriter::new(file)))
            .transpose()?;
        let mut writer = self.writer.lock();
        self.running.store(new.is_some(), Ordering::Relaxed);
        match std::mem::replace(&mut *writer, new) {
            Some(mut old) => old.flush(),
            None => Ok(()),
        }
    }

    /// Adds a buffer of pages.
    pub(crate) fn pages(&self, kind: Kind, pages: &[Pfn]) {
        self.add(|writer| writer.pages(kind, pages));
    }

    /// Adds a buffer of ranges.
    pub(crate) fn ranges(&self, kind: Kind, ranges: &[PfnRange]) {
        self.add(|writer| writer.ranges(kind, ranges));
    }

    fn add(&self, add: impl FnOnce(&mut TraceWriter<BufWriter<File>>) -> io::Result<()>) {
        if !self.running.load(Ordering::Relaxed) {
            return;
        }
        let mut writer = self.writer.lock();
        if let Some(Err(error)) = writer.as_mut().map(add) {
            log::warn!("the recording ends here: {error}");
            *writer = None;
            self.running.store(false, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(entries: &[(Kind, Vec<u64>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = TraceWriter::new(&mut bytes).unwrap();
        for (kind, pages) in entries {
            let pages: Vec<_> = pages.iter().copied().map(Pfn).collect();
            writer.pages(*kind, &pages).unwrap();
        }
        bytes
    }

    #[test]
    fn an_array_of_a_run_takes_a_few_bytes() {
        let up: Vec<u64> = (1_000_000..1_000_256).collect();
        let down: Vec<u64> = (1_000_256..1_000_512).rev().collect();
        let bytes = write(&[(Kind::Inflate, up), (Kind::Inflate, down)]);
        assert!(bytes.len() < 8 + 2 * 16, "{} bytes", bytes.len());
    }

    #[test]
    fn ranges_are_read_as_their_pages() {
        let mut bytes = Vec::new();
        let mut writer = TraceWriter::new(&mut bytes).unwrap();
        let ranges = [PfnRange::new(Pfn(512), 1024), PfnRange::new(Pfn(0), 512)];
        writer.ranges(Kind::Report, &ranges).unwrap();
        let entries: Vec<_> = TraceReader::new(&bytes[..]).unwrap().collect();
        let pages: Vec<_> = (512..1536).chain(0..512).map(Pfn).collect();
        assert_eq!(entries[0].as_ref().unwrap().pages, pages);
    }

    #[test]
    fn what_is_no_trace_or_breaks_off_is_an_error() {
        assert!(TraceReader::new(&b"aerotrc0"[..]).is_err());
        let whole = write(&[(Kind::Deflate, vec![7, 9, 1 << 40])]);
        for length in 9..whole.len() {
            let mut reader = TraceReader::new(&whole[..length]).unwrap();
            assert!(
                reader.next().unwrap().is_err(),
                "{length} of {} bytes",
                whole.len()
            );
        }
        let mut bomb = MAGIC.to_vec();
        bomb.extend([1, 0, 1, 0]);
        put(&mut bomb, zigzag(i64::MAX));
        assert!(
            TraceReader::new(&bomb[..])
                .unwrap()
                .next()
                .unwrap()
                .is_err()
        );
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            entries in prop::collection::vec(
                (
                    prop::sample::select(vec![Kind::Inflate, Kind::Deflate, Kind::Report]),
                    prop::collection::vec(prop_oneof![0u64..40, any::<u64>()], 0..40),
                ),
                0..10,
            )
        ) {
            let bytes = write(&entries);
            let read: Vec<_> = TraceReader::new(&bytes[..])
                .unwrap()
                .map(|entry| entry.map(|entry| (entry.kind, entry.pages.iter().map(|p| p.0).collect())))
                .collect::<Result<_, _>>()
                .unwrap();
            prop_assert_eq!(read, entries);
        }
    }
}
