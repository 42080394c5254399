//! A device's queues: which are started, where their rings lie, and how far they were served.

use crate::device::QueuePosition;
use crate::error::{Error, Result};
use crate::event::EventFd;
use crate::memory::GuestMemory;
use crate::ring::Ring;
use crate::ring::source::Source;
use crate::runtime::KickRegistration;
use crate::saved_state::SavedQueue;
use std::sync::Arc;

/// A started queue.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) source: Source,
    /// Dropped with the queue: then no kick of it arrives any more.
    pub(super) _kick: Option<KickRegistration>,
}

/// The queues by their numbers; those that are not started are empty places.
#[derive(Debug)]
pub(crate) struct Queues {
    places: Vec<Option<Queue>>,
    /// Those that were started since the last reset, a bit each, whether they are now or not.
    known: u32,
}

impl Queues {
    /// No queue of `count` is started.
    pub(crate) fn new(count: u16) -> Self {
        Self {
            places: (0..count).map(|_| None).collect(),
            known: 0,
        }
    }

    /// How many there can be.
    pub(crate) fn count(&self) -> u16 {
        // Made of a u16.
        u16::try_from(self.places.len()).unwrap_or(u16::MAX)
    }

    /// The started queues, a bit each.
    pub(crate) fn started(&self) -> u32 {
        self.that(|_| true)
    }

    /// The queues that the driver set up, a bit each: which is which does not change while some of them
    /// are stopped for a while.
    pub(crate) fn known(&self) -> u32 {
        self.known
    }

    /// The rings among `queues`, with their bits.
    pub(super) fn rings(&mut self, queues: u32) -> impl Iterator<Item = (u32, &mut Ring)> {
        let bits = (0..u32::BITS).map(|index| 1 << index);
        let places = self.places.iter_mut().zip(bits);
        places.filter_map(
            move |(queue, bit)| match queue.as_mut().map(|queue| &mut queue.source) {
                Some(Source::Ring(queue)) if queues & bit != 0 => Some((bit, &mut queue.ring)),
                _ => None,
            },
        )
    }

    /// Puts a queue into its place.
    pub(super) fn start(&mut self, index: u16, queue: Queue) -> Result<()> {
        *self.slot(index)? = Some(queue);
        self.known |= 1u32.checked_shl(u32::from(index)).unwrap_or(0);
        Ok(())
    }

    /// The next driver may set up others.
    pub(crate) fn forget(&mut self) {
        self.known = self.started();
    }

    /// The started queues whose elements the VMM pops, a bit each.
    pub(super) fn of_elements(&self) -> u32 {
        self.that(|source| matches!(source, Source::Elements(_)))
    }

    fn that(&self, wanted: impl Fn(&Source) -> bool) -> u32 {
        let bits = self.places.iter().zip(0..);
        bits.filter(|(queue, _)| queue.as_ref().is_some_and(|queue| wanted(&queue.source)))
            .fold(0, |mask, (_, bit)| mask | 1 << bit)
    }

    /// The source of a started queue.
    pub(crate) fn source(&mut self, index: u16) -> Option<&mut Source> {
        let queue = self.places.get_mut(usize::from(index))?.as_mut()?;
        Some(&mut queue.source)
    }

    /// Where queue `index` is, or is to be.
    pub(super) fn slot(&mut self, index: u16) -> Result<&mut Option<Queue>> {
        let missing = Error::NoQueue {
            index: u32::from(index),
        };
        self.places.get_mut(usize::from(index)).ok_or(missing)
    }

    /// How many elements wait in all queues.
    pub(super) fn waiting_elements(&self) -> usize {
        let queues = self.places.iter().flatten();
        queues.map(|queue| queue.source.waiting_elements()).sum()
    }

    /// The running rings as they would lie in another table.
    pub(crate) fn moved_rings(&self, memory: &Arc<GuestMemory>) -> Result<Vec<Option<Ring>>> {
        let moved = |queue: &Option<Queue>| match queue {
            Some(Queue {
                source: Source::Ring(queue),
                ..
            }) => queue.ring.moved(memory).map(Some),
            _ => Ok(None),
        };
        self.places.iter().map(moved).collect()
    }

    /// Goes on with the rings that [`Self::moved_rings`] returned.
    pub(crate) fn replace_rings(&mut self, rings: Vec<Option<Ring>>) {
        for (queue, ring) in self.places.iter_mut().zip(rings) {
            if let (
                Some(Queue {
                    source: Source::Ring(queue),
                    ..
                }),
                Some(ring),
            ) = (queue, ring)
            {
                queue.ring = ring;
            }
        }
    }

    /// Tells another eventfd of completions from now on, and leaves the old one in its place.
    ///
    /// Descriptors that a peer gave are closed when nothing is locked: what hangs on them may take as long as
    /// the peer likes, such as a connection that lingers and lies unread in a UNIX socket.
    pub(crate) fn swap_call(&mut self, index: u16, call: &mut Option<EventFd>) -> Result<()> {
        match self.source(index) {
            Some(Source::Ring(queue)) => {
                std::mem::swap(&mut queue.call, call);
                // The old descriptor may have swallowed a signal that the new one's owner needs.
                if let Some(call) = &queue.call {
                    call.signal();
                }
                Ok(())
            }
            _ => Err(Error::NoQueue {
                index: u32::from(index),
            }),
        }
    }

    /// The queues as they are saved; a buffer that is `held` counts as not taken.
    pub(crate) fn saved(&self, held: Option<(u16, u64)>) -> Vec<Option<SavedQueue>> {
        let saved = |(queue, index): (&Option<Queue>, u16)| {
            queue.as_ref().map(|queue| match &queue.source {
                Source::Ring(queue) => {
                    let held = held.filter(|(of, _)| *of == index);
                    let position = queue.ring.position_before(held.map(|(_, token)| token));
                    SavedQueue::Ring { position }
                }
                Source::Elements(_) => SavedQueue::Elements,
            })
        };
        self.places.iter().zip(0..).map(saved).collect()
    }
}

/// How far a queue that is stopped was served.
pub(super) fn position_of(source: &Source) -> QueuePosition {
    match source {
        Source::Ring(queue) => queue.ring.position(),
        Source::Elements(_) => QueuePosition::SPLIT_START,
    }
}
