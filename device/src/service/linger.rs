//! Looking a little longer. A stock Linux guest has one buffer outstanding and sends the next as soon as
//! it has the last one back, so what it waits for is mostly that a worker wakes up. A worker that has
//! served such a guest keeps looking at its rings for a moment, and asks it not to kick meanwhile.
//!
//! Idle guests cost nothing: the first buffer after a pause is served as any other, and only the next,
//! if it comes soon, is worth a look for more. The worker looks no longer than anybody else needs it
//! ([`Patience`]), and holds the device's lock only while it looks (the drain barrier stays as it is).

use super::{Service, Shared};
use crate::device::DeviceState;
use crate::metrics::Books;
use crate::runtime::{Patience, Scratch};
use crate::sync::{Instant, spin_loop};
use std::time::Duration;

/// How long to look after the last buffer: a guest that allocates 256 pages and is woken by an interrupt
/// takes some 50 us from one buffer to the next.
const LINGER: Duration = Duration::from_micros(100);

/// How often to pause between two looks: other processors get at the lock and the ring meanwhile. In a
/// model, once lets all others go on.
const PAUSES: u32 = if cfg!(loom) { 1 } else { 16 };

/// Whether a guest's buffers come one soon after the other.
#[derive(Debug, Default)]
pub(super) struct Attention {
    idle_since: Option<Instant>,
    /// The last two times that the guest took to send the next buffer.
    gaps: [Duration; 2],
    /// How long it took last to discard a little.
    morsel: Duration,
    pays: bool,
}

impl Attention {
    /// The guest sent something.
    pub(super) fn woken(&mut self) {
        let gap = self
            .idle_since
            .map_or(Duration::MAX, |since| since.elapsed());
        self.gaps = [gap, self.gaps[0]];
        self.pays = gap <= LINGER;
    }

    /// It was served, and nothing is left. A guest that `owes` more than it gave is going to send more.
    pub(super) fn served(&mut self, owes: bool) {
        self.idle_since = Some(Instant::now());
        self.pays |= owes;
    }

    /// Whether something else can be done before the guest is likely to send its next buffer.
    fn has_time(&self) -> bool {
        let [last, before] = self.gaps;
        let gap = last.min(before).min(LINGER);
        let passed = self.idle_since.map_or(gap, |since| since.elapsed());
        passed + self.morsel < gap
    }
}

impl Service {
    /// The rings among `queues` in which something waits.
    fn waiting(&mut self, queues: u32) -> u32 {
        let rings = self
            .queues
            .rings(queues)
            .filter(|(_, ring)| ring.has_next());
        rings.fold(0, |mask, (bit, _)| mask | bit)
    }

    /// Asks the guest to kick `queues` again; returns those in which something waits.
    fn want_kicks(&mut self, queues: u32) -> u32 {
        self.queues.rings(queues).fold(
            0,
            |mask, (bit, ring)| {
                if ring.want_kicks() { mask | bit } else { mask }
            },
        )
    }

    /// Whether the rings are worth another look soon.
    pub(super) fn is_worth_waiting(&self) -> bool {
        self.attention.pays && self.state == DeviceState::Active
    }

    /// Flushes a little of the window while the guest is busy with its next buffer; false if there is
    /// nothing to flush, or no time.
    fn flush_meanwhile(&mut self, books: &Books) -> bool {
        let Some(balloon) = self.balloon.as_mut().filter(|_| self.attention.has_time()) else {
            return false;
        };
        let begin = Instant::now();
        let some = balloon.flush_a_morsel(books);
        if some {
            self.attention.morsel = begin.elapsed();
        }
        some
    }
}

impl Shared {
    /// Serves what comes soon after a turn that left nothing; returns the queues that have more.
    pub(super) fn linger(
        &self,
        queues: u32,
        scratch: &mut Scratch,
        patience: &Patience<'_>,
    ) -> u32 {
        let mut until = Instant::now() + LINGER;
        if !patience.lasts() || !self.begin_to_linger(queues) {
            return 0;
        }
        loop {
            let mut service = self.service.lock();
            if !service.is_worth_waiting() {
                drop(service);
                return self.end_lingering(queues);
            }
            let seen = service.waiting(queues);
            if seen == 0 && (!patience.lasts() || Instant::now() >= until) {
                // What came since the last look may have come without a kick.
                return service.want_kicks(queues);
            }
            let flushed = seen == 0 && service.flush_meanwhile(&self.books);
            drop(service);
            if seen | self.turnstile.noted() != 0 {
                let more = self.turn(seen, scratch, true);
                // What a turn leaves lying is for a later one, and for others to have theirs first.
                if more != 0 || !self.begin_to_linger(queues) {
                    return more | self.end_lingering(queues);
                }
                until = Instant::now() + LINGER;
            } else if !flushed {
                (0..PAUSES).for_each(|_| spin_loop());
            }
        }
    }

    /// Asks the guest not to kick, if it pays.
    fn begin_to_linger(&self, queues: u32) -> bool {
        let mut service = self.service.lock();
        let pays = service.is_worth_waiting() && service.waiting(queues) == 0;
        if pays {
            service
                .queues
                .rings(queues)
                .for_each(|(_, ring)| ring.suppress_kicks());
        }
        pays
    }

    /// Asks it to kick again; returns the queues that it may not have kicked for.
    fn end_lingering(&self, queues: u32) -> u32 {
        let mut service = self.service.lock();
        if service.state == DeviceState::Active {
            service.want_kicks(queues)
        } else {
            // Nothing is written to its rings. Resuming serves all queues, and asks for kicks then.
            0
        }
    }
}
