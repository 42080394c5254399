//! The rings: set up message by message, started, stopped.
//!
//! Specification: vhost-user, "Ring states" and the SET_VRING and GET_VRING messages.

use super::{Answer, Refusal, Session};
use crate::features::RING_PACKED;
use crate::message::{Message, Request};
use crate::ring::Ring;
use aerostat_device::DeviceState;

impl Session<'_> {
    pub(super) fn set_vring(
        &mut self,
        request: Request,
        mut message: Message,
    ) -> Result<(), Refusal> {
        match request {
            Request::SetVringNum => {
                let (index, entries) = message.vring_state()?;
                let packed = self.has_packed_rings();
                self.stopped_ring(index)?
                    .set_entries(entries, packed)
                    .map_err(|source| Refusal::Ring { index, source })
            }
            Request::SetVringBase => {
                let (index, base) = message.vring_state()?;
                let packed = self.has_packed_rings();
                self.stopped_ring(index)?
                    .set_base(base, packed)
                    .map_err(|source| Refusal::Ring { index, source })
            }
            Request::SetVringAddr => {
                let addr = message.vring_addr()?;
                let index = addr.index;
                let slots = std::mem::take(&mut self.slots);
                let result = self.stopped_ring(index).and_then(|ring| {
                    ring.set_addr(addr, &slots)
                        .map_err(|source| Refusal::Ring { index, source })
                });
                self.slots = slots;
                result?;
                self.start_if_ready(index)
            }
            Request::SetVringKick => {
                let (index, kick) = message.vring_fd()?;
                let queue = self.queue(index)?;
                self.stop(queue);
                self.ring(index)?
                    .set_kick(kick)
                    .map_err(|source| Refusal::Ring { index, source })?;
                let started = self.start_if_ready(index);
                if started.is_err() {
                    // Not to be tried again with the next message.
                    self.ring(index)?.forget_kick();
                }
                started
            }
            Request::SetVringCall => {
                let (index, call) = message.vring_fd()?;
                let queue = self.queue(index)?;
                let ring = self.ring(index)?;
                ring.set_call(call)
                    .map_err(|source| Refusal::Ring { index, source })?;
                if ring.started {
                    let call = ring.call().map_err(|error| Refusal::Ring {
                        index,
                        source: error.into(),
                    })?;
                    self.device().set_queue_call(queue, call)?;
                }
                Ok(())
            }
            Request::SetVringErr => {
                let (index, err) = message.vring_fd()?;
                self.ring(index)?
                    .set_err(err)
                    .map_err(|source| Refusal::Ring { index, source })
            }
            Request::SetVringEnable => {
                let (index, enable) = message.vring_state()?;
                let queue = self.queue(index)?;
                match enable {
                    0 => {
                        self.ring(index)?.enabled = false;
                        self.stop(queue);
                        Ok(())
                    }
                    1 => {
                        self.ring(index)?.enabled = true;
                        self.start_if_ready(index)
                    }
                    _ => Err(Refusal::Value(enable.into())),
                }
            }
            _ => Err(Refusal::Unknown),
        }
    }

    pub(super) fn get_vring_base(&mut self, index: u32) -> Result<Answer, Refusal> {
        let queue = self.queue(index)?;
        self.stop(queue);
        let ring = self.ring(index)?;
        ring.forget_kick();
        let mut payload = index.to_ne_bytes().to_vec();
        payload.extend_from_slice(&ring.base().to_ne_bytes());
        Ok(Answer::Payload(payload))
    }

    /// The device's number of the ring with that index.
    fn queue(&self, index: u32) -> Result<u16, Refusal> {
        u16::try_from(index)
            .ok()
            .filter(|queue| *queue < self.device().kind().queues())
            .ok_or(Refusal::NoRing(index))
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring, Refusal> {
        usize::try_from(index)
            .ok()
            .and_then(|at| self.rings.get_mut(at))
            .ok_or(Refusal::NoRing(index))
    }

    /// A ring that may be set up anew. One that runs is stopped, though a front-end should have
    /// done so, and waits for its next kick descriptor.
    fn stopped_ring(&mut self, index: u32) -> Result<&mut Ring, Refusal> {
        let queue = self.queue(index)?;
        let running = self.ring(index)?.started;
        if running {
            self.stop(queue);
        }
        let ring = self.ring(index)?;
        if running {
            ring.forget_kick();
        }
        Ok(ring)
    }

    /// Starts a ring once all that it needs has come.
    fn start_if_ready(&mut self, index: u32) -> Result<(), Refusal> {
        if self.features.is_none() || !self.ring(index)?.is_ready() {
            return Ok(());
        }
        self.begin_again_if_new_driver(index)?;
        self.select_features()?;
        self.give_poison();
        let queue = self.queue(index)?;
        let slots = std::mem::take(&mut self.slots);
        let memory = self.memory.clone();
        let packed = self.has_packed_rings();
        let config = self
            .ring(index)
            .map(|ring| ring.config(&slots, memory.as_deref(), packed));
        self.slots = slots;
        let config = config?.map_err(|source| Refusal::Ring { index, source })?;
        let Some(config) = config else {
            return Ok(());
        };
        self.device().start_queue(queue, config)?;
        self.ring(index)?.started = true;
        self.poison = None;
        self.attached.set_serving(true);
        self.activate()
    }

    /// A ring that starts at zero, after all were stopped, is that of a driver that starts afresh.
    fn begin_again_if_new_driver(&mut self, index: u32) -> Result<(), Refusal> {
        let (memory, packed) = (self.memory.clone(), self.has_packed_rings());
        let slots = std::mem::take(&mut self.slots);
        let new = self
            .ring(index)
            .map(|ring| ring.is_new(&slots, memory.as_deref(), packed));
        self.slots = slots;
        let new = new?;
        let mut others = self.rings.iter();
        let goes_on = others.any(|ring| ring.started || ring.is_resumed());
        if new && !goes_on && self.device().state() != DeviceState::Configuring {
            let level = self.vm.driver_log.level(log::Level::Info);
            log::log!(
                level,
                "{}: a new driver; the balloon is empty",
                self.vm.name
            );
            self.reset_device();
        }
        Ok(())
    }

    pub(super) fn activate(&mut self) -> Result<(), Refusal> {
        if self.device().state() != DeviceState::Configuring {
            return Ok(());
        }
        self.device().activate()?;
        let level = self.vm.driver_log.level(log::Level::Info);
        log::log!(
            level,
            "{}: active, {} MiB, features {:#x}",
            self.vm.name,
            self.device().memory_bytes() >> 20,
            self.device().features()
        );
        Ok(())
    }

    /// Whether rings have the packed layout, as the features say that came last.
    fn has_packed_rings(&self) -> bool {
        self.features
            .is_some_and(|features| features & RING_PACKED != 0)
    }

    /// Stops a ring if it is started, and notes how far it was served.
    pub(super) fn stop(&mut self, queue: u16) {
        // Features may have changed since it was started: its own are the device's.
        let packed = self.device().features() & RING_PACKED != 0;
        let Some(ring) = self.rings.get_mut(usize::from(queue)) else {
            return;
        };
        if ring.started {
            match self.attached.device.stop_queue(queue) {
                Ok(position) => ring.stopped(position, packed),
                // A broken ring has no position; the front-end gets the one it gave.
                Err(error) => {
                    let level = self.vm.front_end_log.level(log::Level::Warn);
                    log::log!(level, "{}: stopping ring {queue}: {error}", self.vm.name);
                    ring.started = false;
                }
            }
            let serving = self.rings.iter().any(|ring| ring.started);
            self.attached.set_serving(serving);
        }
    }
}
