//! Guest statistics (5.5.6.4; S8): the device holds the driver's buffer and returns it to ask for
//! fresh values.

use super::Turn;
use crate::balloon::bump;
use crate::memory::GuestMemory;
use crate::metrics::{GuestStats, STATS_TAGS};
use crate::ring::RingError;
use crate::ring::chain::Chain;
use crate::ring::source::Source;
use crate::sync::{AtomicU64, Condvar, Mutex, Ordering};
use std::time::{Duration, Instant};

/// A record is {le16 tag, le64 value}, packed.
const RECORD_BYTES: usize = 10;
/// The most bytes of statistics that are read; stock drivers send 160.
const MAX_STATS_BYTES: u64 = 4096;
/// Buffers taken in one turn. A driver has one; a second gives the first back.
const MAX_CHAINS_PER_TURN: u32 = 16;

/// The last answer, and who waits for the next.
#[derive(Debug, Default)]
pub(crate) struct StatsBoard {
    held: Mutex<Option<u64>>,
    latest: Mutex<GuestStats>,
    news: Condvar,
    /// Drivers that have gone: nobody waits for the answer of one.
    resets: AtomicU64,
    polling: Mutex<Polling>,
}

/// The last answer before a question, and the driver that was asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    sequence: u64,
    resets: u64,
}

/// Asking without being asked to.
#[derive(Debug, Default)]
struct Polling {
    interval: Option<Duration>,
    next: Option<Instant>,
}

impl StatsBoard {
    /// The last answer.
    pub(crate) fn latest(&self) -> GuestStats {
        *self.latest.lock()
    }

    /// Where a question begins, for [`Self::wait_behind`].
    pub(crate) fn mark(&self) -> Mark {
        let sequence = self.latest.lock().sequence;
        Mark {
            sequence,
            resets: self.resets.load(Ordering::Acquire),
        }
    }

    /// The first answer after `mark`, if it comes in time and from the same driver.
    pub(crate) fn wait_behind(&self, mark: Mark, timeout: Duration) -> Option<GuestStats> {
        let deadline = Instant::now().checked_add(timeout);
        let mut latest = self.latest.lock();
        while latest.sequence == mark.sequence {
            if self.resets.load(Ordering::Acquire) != mark.resets {
                return None;
            }
            match deadline {
                Some(deadline) => {
                    if self.news.wait_until(&mut latest, deadline).timed_out() {
                        return None;
                    }
                }
                None => self.news.wait(&mut latest),
            }
        }
        Some(*latest)
    }

    /// Asks the guest every `interval` from now on, or no longer.
    pub(crate) fn poll_every(&self, interval: Option<Duration>) {
        let next = interval.and_then(|interval| Instant::now().checked_add(interval));
        *self.polling.lock() = Polling { interval, next };
    }

    /// When the guest is to be asked next.
    pub(crate) fn next_poll(&self) -> Option<Instant> {
        self.polling.lock().next
    }

    /// Whether it is time to ask; the next time is one interval later.
    pub(crate) fn poll_is_due(&self) -> bool {
        let now = Instant::now();
        let mut polling = self.polling.lock();
        let due = polling.next.is_some_and(|next| now >= next);
        if due {
            polling.next = polling
                .interval
                .and_then(|interval| now.checked_add(interval));
        }
        due
    }

    fn post(&self, values: [Option<u64>; STATS_TAGS]) {
        let mut latest = self.latest.lock();
        let sequence = latest.sequence + 1;
        *latest = GuestStats {
            values,
            sequence,
            received: Some(Instant::now()),
        };
        self.news.notify_all();
    }

    /// Gives the held buffer back, which asks the driver for fresh values.
    pub(crate) fn request(&self, source: &mut Source) {
        if let Some(token) = self.held.lock().take() {
            source.complete(token, 0);
            source.publish();
        }
    }

    /// The buffer that is held.
    pub(crate) fn held(&self) -> Option<u64> {
        *self.held.lock()
    }

    /// Puts the held buffer back into its queue, for whoever serves the queue next.
    pub(crate) fn put_back(&self, source: &mut Source) {
        if let Some(token) = self.held.lock().take() {
            source.put_back(token);
        }
    }

    /// Forgets buffer and values: a new driver comes. The sequence goes on, so that nobody takes
    /// the old driver's answer for the new one's.
    pub(crate) fn reset(&self) {
        *self.held.lock() = None;
        let mut latest = self.latest.lock();
        latest.values = [None; STATS_TAGS];
        latest.received = None;
        self.resets.fetch_add(1, Ordering::AcqRel);
        self.news.notify_all();
    }
}

/// Takes what the stats queue has; true if there is more.
pub(super) fn serve(source: &mut Source, turn: &mut Turn<'_>) -> Result<bool, RingError> {
    let mut buffers = 0;
    for _ in 0..MAX_CHAINS_PER_TURN {
        if buffers >= super::MAX_BUFFERS_PER_TURN {
            break;
        }
        let memory = turn.balloon.memory();
        let chain = &mut turn.scratch.chain;
        if !source.pop(memory, chain)? {
            if !source.want_kicks() {
                return Ok(false);
            }
            continue;
        }
        buffers += chain.buffers();
        let (values, understood) = parse(chain, memory);
        turn.books.enter(|entry| {
            let device = entry.device();
            bump(&mut device.stats_chains, 1);
            bump(&mut device.chain_errors, u64::from(!understood));
        });
        // The newest buffer is the one that is held.
        turn.stats.request(source);
        *turn.stats.held.lock() = Some(chain.token);
        // What makes no sense is no answer: the last good one stays.
        if understood {
            turn.stats.post(values);
        }
    }
    Ok(true)
}

/// Reads the records in any order, the last of a tag counts; unknown tags are ignored.
fn parse(chain: &Chain, memory: &GuestMemory) -> ([Option<u64>; STATS_TAGS], bool) {
    let mut values = [None; STATS_TAGS];
    let length = chain.readable_bytes();
    if chain.malformed || length > MAX_STATS_BYTES {
        return (values, false);
    }
    let whole = chain.read(memory, |bytes| {
        let (records, _rest) = bytes.as_chunks::<RECORD_BYTES>();
        for [t0, t1, value @ ..] in records {
            let tag = usize::from(u16::from_le_bytes([*t0, *t1]));
            if let Some(slot) = values.get_mut(tag) {
                *slot = Some(u64::from_le_bytes(*value));
            }
        }
    });
    let understood =
        whole && length.is_multiple_of(RECORD_BYTES as u64) && chain.writable.is_empty();
    (values, understood)
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Without a deadline: whoever is not woken sleeps for ever, which loom finds.
    fn ask(board: &StatsBoard, mark: Mark) -> Option<GuestStats> {
        board.wait_behind(mark, Duration::MAX)
    }

    #[test]
    fn an_answer_wakes_all_who_wait() {
        loom::model(|| {
            let board = Arc::new(StatsBoard::default());
            let mark = board.mark();
            let other = Arc::clone(&board);
            let other = thread::spawn(move || ask(&other, mark).unwrap().sequence);
            let poster = Arc::clone(&board);
            let poster = thread::spawn(move || poster.post([Some(1); STATS_TAGS]));
            assert_eq!(ask(&board, mark).unwrap().sequence, 1);
            assert_eq!(other.join().unwrap(), 1);
            poster.join().unwrap();
        });
    }

    #[test]
    fn a_reset_ends_the_wait_or_the_answer_came_before() {
        loom::model(|| {
            let board = Arc::new(StatsBoard::default());
            let mark = board.mark();
            let gone = Arc::clone(&board);
            let gone = thread::spawn(move || gone.reset());
            let poster = Arc::clone(&board);
            let poster = thread::spawn(move || poster.post([None; STATS_TAGS]));
            let answer = ask(&board, mark);
            assert!(answer.is_none_or(|answer| answer.sequence == 1));
            gone.join().unwrap();
            poster.join().unwrap();
        });
    }
}
