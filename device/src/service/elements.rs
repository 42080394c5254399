//! Elements, which the VMM pops from its own virtqueues: their way to the queues and back.

use super::{Service, Shared};
use crate::error::{Error, Result};
use crate::ring::source::{Completion, Element, Source};
use crate::runtime::{Patience, Scratch, Servable};
use std::sync::atomic::Ordering;

/// The most elements that may wait for a device. VMMs have at most a queue's worth outstanding.
const MAX_WAITING_ELEMENTS: usize = 1 << 16;

impl Shared {
    /// `here` has the calling thread serve one turn, unless a worker is with the device.
    pub(crate) fn submit(&self, elements: Vec<Element>, here: bool) -> Result<()> {
        let count = elements.len();
        let waiting = self.outstanding.fetch_add(count, Ordering::AcqRel);
        if waiting + count > MAX_WAITING_ELEMENTS {
            self.outstanding.fetch_sub(count, Ordering::AcqRel);
            return Err(Error::Full(waiting));
        }
        let mut queues = 0;
        for element in elements {
            queues |= 1u32.checked_shl(u32::from(element.queue)).unwrap_or(0);
            // The receiver is ours: the channel is open.
            let _ = self.submitted.0.send(element);
        }
        let count = self.protocol.kind().queues();
        // Whoever is woken has the device; what one turn here leaves is for a worker.
        let mut left = self.wake(queues & ((1 << count) - 1) | Self::SUBMITTED);
        if left && here {
            left = self.serve(&mut Scratch::default(), &Patience::NONE);
        }
        if left && let Some(this) = self.this.upgrade() {
            self.pool.submit(self.home.load(Ordering::Relaxed), this);
        }
        Ok(())
    }

    /// Moves submitted elements to their queues; those without a queue go back.
    pub(super) fn accept_elements(&self, service: &mut Service) {
        let mut unwanted = false;
        while let Ok(element) = self.submitted.1.try_recv() {
            match service.queues.source(element.queue) {
                Some(Source::Elements(queue)) => queue.waiting.push_back(element),
                _ => {
                    let Element { token, queue, .. } = element;
                    let back = Completion {
                        token,
                        queue,
                        written: 0,
                        served: false,
                    };
                    let _ = self.completed.0.send(back);
                    unwanted = true;
                }
            }
        }
        if let Some(event) = self.completion_event.as_ref().filter(|_| unwanted) {
            event.signal();
        }
    }

    /// Serves all elements that were submitted: a VMM that pauses wants them back.
    pub(crate) fn finish_elements(&self, service: &mut Service) {
        self.accept_elements(service);
        let mut scratch = Scratch::default();
        let mut left = service.queues.waiting_elements();
        while left > 0 {
            // Element queues cannot break. Elements of a queue without a role stay for the reset.
            let _ = service.run(service.queues.of_elements(), self, &mut scratch);
            let before = std::mem::replace(&mut left, service.queues.waiting_elements());
            if left == before {
                break;
            }
        }
        self.show(service);
    }

    pub(crate) fn completions(&self, max: usize, into: &mut Vec<Completion>) {
        let before = into.len();
        into.extend(self.completed.1.try_iter().take(max));
        self.outstanding
            .fetch_sub(into.len() - before, Ordering::AcqRel);
    }
}
