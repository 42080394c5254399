//! Where a queue's chains come from and where completions go: a ring in guest memory that this
//! library owns, or elements that the VMM popped itself.

use super::chain::{Chain, Segment};
use super::{Ring, RingError};
use crate::event::EventFd;
use crate::memory::{GuestMemory, IoVec};
use crate::sync::channel::Sender;
use std::collections::VecDeque;
use std::sync::Arc;

/// A chain that the VMM popped from its own virtqueue.
#[derive(Debug, Default)]
pub struct Element {
    /// The queue's index.
    pub queue: u16,
    /// Returned with the completion, otherwise not looked at.
    pub token: u64,
    /// What the device may read.
    pub readable: Vec<IoVec>,
    /// What the device may write; for the reporting queue: the reported pages.
    pub writable: Vec<IoVec>,
}

/// An element that is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The token of the element.
    pub token: u64,
    /// The queue's index.
    pub queue: u16,
    /// Bytes written to the element's writable part.
    pub written: u32,
    /// False if the device was reset before it was served: put it back or drop it.
    pub served: bool,
}

/// The elements of one queue.
#[derive(Debug)]
pub(crate) struct ElementQueue {
    pub(crate) index: u16,
    pub(crate) waiting: VecDeque<Element>,
    pub(crate) completions: Sender<Completion>,
    /// Signalled when completions are there to be collected.
    pub(crate) event: Option<Arc<EventFd>>,
    pub(crate) unpublished: bool,
}

impl ElementQueue {
    fn complete(&mut self, token: u64, written: u32, served: bool) {
        // The receiver lives as long as the device; without it nobody is left to be told.
        let _ = self.completions.send(Completion {
            token,
            queue: self.index,
            written,
            served,
        });
        self.unpublished = true;
    }
}

/// A ring and whom to tell about it.
#[derive(Debug)]
pub(crate) struct RingQueue {
    pub(crate) ring: Ring,
    pub(crate) call: Option<EventFd>,
}

/// One started queue.
#[derive(Debug)]
pub(crate) enum Source {
    Ring(RingQueue),
    Elements(ElementQueue),
}

impl Source {
    /// Takes the next chain; `Ok(false)` if there is none.
    pub(crate) fn pop(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<bool, RingError> {
        match self {
            Self::Ring(queue) => queue.ring.pop(memory, chain),
            Self::Elements(queue) => {
                let Some(element) = queue.waiting.pop_front() else {
                    return Ok(false);
                };
                chain.clear();
                chain.token = element.token;
                chain
                    .readable
                    .extend(element.readable.into_iter().map(Segment::Host));
                chain
                    .writable
                    .extend(element.writable.into_iter().map(Segment::Host));
                chain.finish();
                Ok(true)
            }
        }
    }

    /// Completes a chain; it becomes visible with [`Self::publish`].
    pub(crate) fn complete(&mut self, token: u64, written: u32) {
        match self {
            Self::Ring(queue) => queue.ring.complete(token, written),
            Self::Elements(queue) => queue.complete(token, written, true),
        }
    }

    /// Shows all completed chains at once and tells the other side if it wants to be told.
    pub(crate) fn publish(&mut self) {
        match self {
            Self::Ring(queue) => {
                if queue.ring.publish()
                    && let Some(call) = &queue.call
                {
                    call.signal();
                }
            }
            Self::Elements(queue) => {
                if std::mem::take(&mut queue.unpublished)
                    && let Some(event) = &queue.event
                {
                    event.signal();
                }
            }
        }
    }

    /// Puts back a chain that was popped last and is still held (a stats buffer), so that whoever
    /// serves the queue next finds it again. Elements are handed back as not served.
    pub(crate) fn put_back(&mut self, token: u64) {
        match self {
            Self::Ring(queue) => queue.ring.unpop(token),
            Self::Elements(queue) => queue.complete(token, 0, false),
        }
    }

    /// Who was told of completions, and is not any more.
    pub(crate) fn take_call(&mut self) -> Option<EventFd> {
        match self {
            Self::Ring(queue) => queue.call.take(),
            Self::Elements(_) => None,
        }
    }

    /// How many elements wait to be served.
    pub(crate) fn waiting_elements(&self) -> usize {
        match self {
            Self::Ring(_) => 0,
            Self::Elements(queue) => queue.waiting.len(),
        }
    }

    /// Hands all elements back that were not served.
    pub(crate) fn cancel(&mut self) {
        if let Self::Elements(queue) = self {
            while let Some(element) = queue.waiting.pop_front() {
                queue.complete(element.token, 0, false);
            }
        }
        self.publish();
    }

    /// Asks the other side not to kick while the queue is being served.
    pub(crate) fn suppress_kicks(&mut self) {
        if let Self::Ring(queue) = self {
            queue.ring.suppress_kicks();
        }
    }

    /// Asks for kicks again; returns true if there is more to serve at once.
    pub(crate) fn want_kicks(&mut self) -> bool {
        match self {
            Self::Ring(queue) => queue.ring.want_kicks(),
            Self::Elements(queue) => !queue.waiting.is_empty(),
        }
    }
}
