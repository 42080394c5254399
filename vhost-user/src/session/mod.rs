//! A front-end's connection: what its messages do to the device, until one of the two goes.
//!
//! Specification: vhost-user, "Communication" and "Front-end message types". The session's thread
//! waits for the front-end, for the device (whose configuration changed, or which broke), for room
//! in the back-end channel and for the end of the process, and for none of them alone.
//!
//! When a device begins: the protocol has no DRIVER_OK unless STATUS is negotiated, and QEMU's
//! generic vhost-user device negotiates STATUS without ever sending it. All front-ends known start
//! rings only for a driver that is about to run, so the first ring that starts begins it, too.
//!
//! When a device ends: pausing a virtual machine stops its rings just as resetting the driver does.
//! Rings that stop therefore leave the balloon as it is. Whether it was a pause shows when a ring
//! starts again: where it was (nothing happened), or at zero (a new driver, which owns all its pages).

mod error;
mod memory;
mod poison;
mod rings;

use crate::channel::{BackendChannel, ChannelError, MainChannel};
use crate::mapping::Slot;
use crate::message::{F_PROTOCOL_FEATURES, Message, Request, protocol};
use crate::ring::Ring;
use crate::vm::{Attached, Vm};
use crate::wake::{Wake, is_ready, wait};
use aerostat_device::{Device, DeviceState, GuestMemory};
use error::Refusal;
pub(crate) use error::SessionError;
pub(crate) use memory::MAX_MAPPINGS;
use memory::MAX_MEM_SLOTS;
use rustix::event::{PollFd, PollFlags};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// `DRIVER_OK` and `DEVICE_NEEDS_RESET` (virtio 1.4, "Device Status Field").
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_NEEDS_RESET: u8 = 64;

/// What a request is answered with.
enum Answer {
    Done,
    Payload(Vec<u8>),
}

/// The state of one connection.
#[derive(Debug)]
struct Session<'a> {
    vm: &'a Vm,
    attached: &'a Attached,
    backend: Option<BackendChannel>,
    /// What the front-end selected, with the bit for protocol features; `None` before.
    features: Option<u64>,
    protocol_features: u64,
    status: u8,
    slots: Vec<Slot>,
    memory: Option<Arc<GuestMemory>>,
    rings: Vec<Ring>,
    /// The `poison_val` of a driver that does not run yet (`poison`).
    poison: Option<[u8; 4]>,
    /// The configuration changed and the front-end has not been told.
    config_changed: bool,
    broken: bool,
}

/// Serves `socket` until the front-end goes, breaks the protocol, or `shutdown` is readable.
pub(crate) fn serve(
    vm: &Vm,
    socket: UnixStream,
    shutdown: BorrowedFd<'_>,
) -> Result<(), SessionError> {
    let config_event = Wake::new()?;
    let attached = vm.attach(config_event.handle()?)?;
    // What was set before the session is read by the driver when it starts.
    config_event.take();
    let _detach = Detach {
        vm,
        attached: &attached,
    };
    let mut channel = MainChannel::new(socket);
    let mut session = Session::new(vm, &attached);
    loop {
        let events = session.wait(&channel, &config_event, shutdown)?;
        if events.shutdown {
            return Err(ChannelError::ShuttingDown.into());
        }
        // One at a time: a flood of requests keeps nothing else from being seen to.
        if let Some(message) = channel.receive()? {
            session.answer(&mut channel, message, shutdown)?;
        }
        session.look_at_device(&config_event);
        session.look_at_backend_channel();
        if session.slots.iter().any(Slot::is_lost) {
            return Err(SessionError::MemoryLost);
        }
    }
}

/// Takes the device from the virtual machine however the session ends.
struct Detach<'a> {
    vm: &'a Vm,
    attached: &'a Attached,
}

impl Drop for Detach<'_> {
    fn drop(&mut self) {
        self.vm.detach(self.attached);
    }
}

/// What a wait ended with, as far as it needs to be known.
struct Events {
    shutdown: bool,
}

impl<'a> Session<'a> {
    fn new(vm: &'a Vm, attached: &'a Attached) -> Self {
        Self {
            vm,
            attached,
            backend: None,
            features: None,
            protocol_features: 0,
            status: 0,
            slots: Vec::new(),
            memory: None,
            rings: (0..attached.device.kind().queues())
                .map(|_| Ring::default())
                .collect(),
            poison: None,
            config_changed: false,
            broken: false,
        }
    }

    fn device(&self) -> &Device {
        &self.attached.device
    }

    fn wait(
        &self,
        channel: &MainChannel,
        config_event: &Wake,
        shutdown: BorrowedFd<'_>,
    ) -> io::Result<Events> {
        let mut fds = vec![
            PollFd::from_borrowed_fd(shutdown, PollFlags::IN),
            PollFd::new(channel, PollFlags::IN),
            PollFd::new(config_event, PollFlags::IN),
        ];
        if let Some(backend) = &self.backend {
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, backend.is_blocked());
            fds.push(PollFd::new(backend, flags));
        }
        wait(&mut fds, None)?;
        Ok(Events {
            shutdown: fds.first().is_some_and(is_ready),
        })
    }

    /// Handles a message and answers it, if an answer is wanted.
    fn answer(
        &mut self,
        channel: &mut MainChannel,
        message: Message,
        shutdown: BorrowedFd<'_>,
    ) -> Result<(), SessionError> {
        let header = message.header;
        let request = Request::from_code(header.code);
        log::debug!(
            "{}: {request:?} ({}), {} bytes, {} descriptors",
            self.vm.name,
            header.code,
            header.payload_bytes,
            message.fds.len()
        );
        let result = match request {
            Some(request) => self.handle(request, message),
            None => Err(Refusal::Unknown),
        };
        let acknowledge = header.needs_reply() && self.protocol_features & protocol::REPLY_ACK != 0;
        let payload = match (request, result) {
            (_, Err(Refusal::Malformed(source))) => {
                return Err(ChannelError::from(source).into());
            }
            (_, Ok(Answer::Payload(payload))) => payload,
            (_, Ok(Answer::Done)) if acknowledge => 0_u64.to_ne_bytes().to_vec(),
            (_, Ok(Answer::Done)) => return Ok(()),
            // "the back-end replies with a zero-length payload to indicate an error"
            (Some(Request::GetConfig), Err(source)) => {
                self.refused(header.code, &source);
                Vec::new()
            }
            (request, Err(source)) => {
                if !acknowledge || request.is_some_and(Request::has_own_reply) {
                    return Err(SessionError::Unanswerable {
                        code: header.code,
                        source,
                    });
                }
                self.refused(header.code, &source);
                1_u64.to_ne_bytes().to_vec()
            }
        };
        Ok(channel.reply(header.code, &payload, shutdown)?)
    }

    fn refused(&self, code: u32, refusal: &Refusal) {
        log::log!(
            self.vm.front_end_log.level(log::Level::Warn),
            "{}: request {code} refused: {}",
            self.vm.name,
            crate::chain(refusal)
        );
    }

    fn handle(&mut self, request: Request, mut message: Message) -> Result<Answer, Refusal> {
        message.check_fds(request)?;
        match request {
            Request::GetFeatures => {
                message.empty()?;
                self.end_if_driver_is_removed();
                let offered = self.device().offered_features() | F_PROTOCOL_FEATURES;
                return Ok(number(offered));
            }
            Request::GetProtocolFeatures => {
                message.empty()?;
                return Ok(number(protocol::OFFERED));
            }
            Request::GetQueueNum => {
                message.empty()?;
                return Ok(number(self.device().kind().queues().into()));
            }
            Request::GetMaxMemSlots => {
                message.empty()?;
                return Ok(number(MAX_MEM_SLOTS as u64));
            }
            Request::GetStatus => {
                message.empty()?;
                let broken = self.device().state() == DeviceState::NeedsReset;
                let bit = if broken { STATUS_NEEDS_RESET } else { 0 };
                return Ok(number((self.status | bit).into()));
            }
            Request::GetConfig => return self.get_config(&message),
            Request::GetVringBase => {
                // "num" is not used.
                let (index, _) = message.vring_state()?;
                return self.get_vring_base(index);
            }
            Request::SetOwner => message.empty()?,
            Request::ResetOwner | Request::ResetDevice => {
                message.empty()?;
                self.reset();
                self.poison = None;
            }
            Request::SetFeatures => self.set_features(message.number()?)?,
            Request::SetProtocolFeatures => self.set_protocol_features(message.number()?)?,
            Request::SetStatus => self.set_status(message.number()?)?,
            Request::SetConfig => self.set_config(&message)?,
            Request::SetBackendReqFd => {
                let fd = message.single_fd()?;
                self.backend = Some(BackendChannel::new(fd).map_err(Refusal::BackendChannel)?);
            }
            Request::SetMemTable | Request::AddMemReg | Request::RemMemReg => {
                self.change_memory(request, message)?;
            }
            _ => self.set_vring(request, message)?,
        }
        Ok(Answer::Done)
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        let unknown = features & !(self.device().offered_features() | F_PROTOCOL_FEATURES);
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        let selected = features & !F_PROTOCOL_FEATURES;
        let fresh = self.device().state() == DeviceState::Configuring;
        if !fresh && self.device().features() != selected {
            // Another selection is another driver: nothing of the old one is left.
            self.reset();
        }
        self.features = Some(features);
        log::debug!("{}: features {features:#x}", self.vm.name);
        if features & F_PROTOCOL_FEATURES == 0 {
            // "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly
            // in the enabled state."
            for ring in &mut self.rings {
                ring.enabled = true;
            }
        }
        self.select_features()
    }

    /// Linux's virtio_uml has a driver removed without a word of it where the balloon is concerned:
    /// the driver clears PAGE_POISON, features are negotiated a second time, and the bit that allows
    /// SET_VRING_ENABLE is lost on the way. What it does send, before it frees the rings, is
    /// GET_FEATURES, which no front-end has another use for while rings run. To go on would be to
    /// write into memory that the guest uses for something else.
    fn end_if_driver_is_removed(&mut self) {
        let cannot_disable = self
            .features
            .is_some_and(|bits| bits & F_PROTOCOL_FEATURES == 0);
        if cannot_disable && self.rings.iter().any(|ring| ring.started) {
            let level = self.vm.driver_log.level(log::Level::Info);
            log::log!(level, "{}: the driver was removed", self.vm.name);
            self.reset();
        }
    }

    /// Passes the selection on to a device that does not have it (any more).
    fn select_features(&self) -> Result<(), Refusal> {
        let selected = self.features.unwrap_or(0) & !F_PROTOCOL_FEATURES;
        let device = self.device();
        if device.state() == DeviceState::Configuring && device.features() != selected {
            device.set_features(selected)?;
        }
        Ok(())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<(), Refusal> {
        let unknown = features & !protocol::OFFERED;
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        self.protocol_features = features;
        Ok(())
    }

    fn set_status(&mut self, value: u64) -> Result<(), Refusal> {
        let status = u8::try_from(value).map_err(|_| Refusal::Value(value))?;
        self.status = status & !STATUS_NEEDS_RESET;
        if status == 0 {
            self.poison = None;
            for index in 0..self.device().kind().queues() {
                self.stop(index);
            }
        }
        if status & STATUS_DRIVER_OK != 0 && self.rings.iter().any(|ring| ring.started) {
            self.activate()?;
        }
        Ok(())
    }

    fn get_config(&self, message: &Message) -> Result<Answer, Refusal> {
        let config = message.config()?;
        let mut data = vec![0; config.data.len()];
        self.device().read_config(config.offset.into(), &mut data);
        self.show_poison(config.offset, &mut data);
        let mut payload = message.payload.clone();
        let head = payload.len() - data.len();
        payload.truncate(head);
        payload.append(&mut data);
        Ok(Answer::Payload(payload))
    }

    fn set_config(&mut self, message: &Message) -> Result<(), Refusal> {
        let config = message.config()?;
        let mut data = config.data.to_vec();
        self.keep_poison(config.offset, &mut data);
        if self.device().write_config(config.offset.into(), &data) {
            self.vm.actual_changed();
        }
        Ok(())
    }

    /// As if the front-end had just connected, but for what was negotiated and the memory table.
    fn reset(&mut self) {
        self.reset_device();
        let enabled = self
            .features
            .is_some_and(|bits| bits & F_PROTOCOL_FEATURES == 0);
        for ring in &mut self.rings {
            ring.reset(enabled);
        }
        self.status = 0;
    }

    fn reset_device(&mut self) {
        self.device().reset();
        for ring in &mut self.rings {
            ring.started = false;
        }
        self.broken = false;
        self.attached.set_serving(false);
        self.vm.actual_changed();
    }

    /// Sees whether the device signalled: a changed configuration, or a broken ring.
    fn look_at_device(&mut self, config_event: &Wake) {
        if config_event.take() {
            self.config_changed = true;
        }
        let state = self.device().state();
        if state == DeviceState::NeedsReset && !self.broken {
            self.broken = true;
            let level = self.vm.driver_log.level(log::Level::Error);
            log::log!(
                level,
                "{}: the guest broke a ring; it is not served until it resets the device",
                self.vm.name
            );
            for ring in self.rings.iter().filter(|ring| ring.started) {
                ring.signal_error();
            }
        }
        // Nobody listens before a driver runs, and it reads the configuration when it starts (S2).
        if self.config_changed && state != DeviceState::Configuring {
            self.config_changed = false;
            let result = self.backend.as_mut().map(BackendChannel::config_changed);
            self.end_backend_channel_on(result);
        }
    }

    fn look_at_backend_channel(&mut self) {
        let result = self.backend.as_mut().map(|backend| {
            backend.discard_input()?;
            backend.flush()
        });
        self.end_backend_channel_on(result);
    }

    fn end_backend_channel_on(&mut self, result: Option<io::Result<()>>) {
        if let Some(Err(error)) = result {
            let level = self.vm.front_end_log.level(log::Level::Info);
            log::log!(
                level,
                "{}: the back-end channel is closed: {error}",
                self.vm.name
            );
            self.backend = None;
        }
    }
}

fn number(value: u64) -> Answer {
    Answer::Payload(value.to_ne_bytes().to_vec())
}
