//! A vhost-user front-end with a guest, both made of bytes: guest memory is a memfd that is read
//! and written through its descriptor, so nothing here needs the library that is tested.

use super::PATIENCE;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The guest's memory.
pub const MEMORY_BYTES: u64 = 64 << 20;
/// Where the front-end has it. Guest addresses start at 0.
pub const USER_BASE: u64 = 0x7f00_0000_0000;
/// Entries of each ring.
pub const RING_SIZE: u16 = 64;
/// The first page that rings and buffers do not use.
pub const FIRST_FREE_PFN: u32 = 0x200;

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS.
pub const PROTOCOL_FEATURES: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 15 | 1 << 16;
/// VERSION_1, STATS_VQ, MUST_TELL_HOST: plain rings without event indexes.
pub const FEATURES: u64 = 1 << 32 | 1 << 1 | 1 << 0;
/// PAGE_POISON.
pub const F_PAGE_POISON: u64 = 1 << 4;
/// PAGE_REPORTING.
pub const F_PAGE_REPORTING: u64 = 1 << 5;
/// RING_PACKED.
pub const F_RING_PACKED: u64 = 1 << 34;
/// A descriptor's flag: its buffer is for the device to write to.
const DEVICE_WRITES: u16 = 2;
/// The marks of a packed descriptor, each equal to the lap's wrap counter: available, used.
const PACKED_AVAIL: u16 = 1 << 7;
const PACKED_USED: u16 = 1 << 15;

/// Request numbers.
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}
use request::*;

/// A guest's side of one ring.
#[derive(Debug)]
pub struct GuestRing {
    /// Where its three parts start; they are a page apart.
    pub base: u64,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub err: OwnedFd,
    pub avail: u16,
    pub used: u16,
}

impl GuestRing {
    fn new(index: u64) -> Self {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        Self {
            base: 0x10000 * (index + 1),
            kick: event(),
            call: event(),
            err: event(),
            avail: 0,
            used: 0,
        }
    }
}

/// A guest's memory and driver. It can be without a front-end, and change front-ends.
#[derive(Debug)]
pub struct Guest {
    pub memory: File,
    pub rings: Vec<GuestRing>,
    /// Whether its driver negotiates packed rings. All chains have one descriptor then.
    pub packed: bool,
}

impl Guest {
    pub fn new() -> Self {
        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY_BYTES).unwrap();
        Self {
            memory,
            rings: (0..3).map(GuestRing::new).collect(),
            packed: false,
        }
    }

    /// The same with packed rings.
    pub fn packed() -> Self {
        Self {
            packed: true,
            ..Self::new()
        }
    }

    /// Writes to pages, so that the host has to have memory for them.
    pub fn touch(&self, pfns: std::ops::Range<u32>) {
        for pfn in pfns {
            self.write(u64::from(pfn) * 4096, &[0xa5; 4096]);
        }
    }

    /// What the memory costs the host.
    pub fn host_bytes(&self) -> u64 {
        self.memory.metadata().unwrap().blocks() * 512
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, address).unwrap();
    }

    fn read_u16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read_exact_at(&mut bytes, address).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Puts a chain of one descriptor into ring `index`, and kicks.
    pub fn offer(&mut self, index: usize, address: u64, len: u32, flags: u16) {
        let ring = &self.rings[index];
        let slot = u64::from(ring.avail % RING_SIZE);
        let mut descriptor = address.to_le_bytes().to_vec();
        descriptor.extend_from_slice(&len.to_le_bytes());
        if self.packed {
            let marks = match wrap(ring.avail) {
                true => PACKED_AVAIL,
                false => PACKED_USED,
            };
            descriptor.extend_from_slice(&(ring.avail % RING_SIZE).to_le_bytes());
            self.write(ring.base + 16 * slot, &descriptor);
            // The flags last: they show the rest.
            self.write(ring.base + 16 * slot + 14, &(flags | marks).to_le_bytes());
            self.rings[index].avail = ring.avail.wrapping_add(1);
            self.kick(index);
            return;
        }
        descriptor.extend_from_slice(&flags.to_le_bytes());
        descriptor.extend_from_slice(&[0; 2]);
        self.write(ring.base + 16 * slot, &descriptor);
        let avail = ring.base + 0x1000;
        self.write(
            avail + 4 + 2 * slot,
            &(ring.avail % RING_SIZE).to_le_bytes(),
        );
        let next = ring.avail.wrapping_add(1);
        self.write(avail + 2, &next.to_le_bytes());
        self.rings[index].avail = next;
        self.kick(index);
    }

    pub fn kick(&self, index: usize) {
        rustix::io::write(&self.rings[index].kick, &1_u64.to_ne_bytes()).unwrap();
    }

    /// The device's place in ring `index`.
    pub fn used_index(&self, index: usize) -> u16 {
        self.read_u16(self.rings[index].base + 0x2002)
    }

    /// Waits until all that was offered in ring `index` is used.
    pub fn wait_used(&mut self, index: usize) {
        super::eventually("the device uses the buffer", || {
            self.has_used(index).then_some(())
        });
        self.rings[index].used = self.rings[index].avail;
    }

    /// Whether all that was offered in ring `index` is used.
    fn has_used(&self, index: usize) -> bool {
        let ring = &self.rings[index];
        if !self.packed {
            return self.used_index(index) == ring.avail;
        }
        let last = ring.avail.wrapping_sub(1);
        let flags = self.read_u16(ring.base + 16 * u64::from(last % RING_SIZE) + 14);
        let marks = if wrap(last) {
            PACKED_AVAIL | PACKED_USED
        } else {
            0
        };
        flags & (PACKED_AVAIL | PACKED_USED) == marks
    }

    /// What the front-end says of ring `index` when it is started: where it goes on. Of a new packed ring it
    /// says 0, as Linux's virtio_uml does, though that is a place in the second lap.
    fn vring_base(&self, index: usize) -> u32 {
        let used = self.rings[index].used;
        if self.packed && used > 0 {
            packed_base(used)
        } else {
            used.into()
        }
    }

    fn offer_pfns(&mut self, index: usize, pfns: std::ops::Range<u32>) {
        let bytes: Vec<u8> = pfns.flat_map(u32::to_le_bytes).collect();
        let address = 0x10_0000 + 0x10000 * index as u64;
        self.write(address, &bytes);
        self.offer(index, address, bytes.len().try_into().unwrap(), 0);
        self.wait_used(index);
    }

    /// Gives pages to the balloon, and waits for the acknowledgement.
    pub fn inflate(&mut self, pfns: std::ops::Range<u32>) {
        self.offer_pfns(0, pfns);
    }

    /// Takes pages out of the balloon, and waits for the acknowledgement.
    pub fn deflate(&mut self, pfns: std::ops::Range<u32>) {
        self.offer_pfns(1, pfns);
    }

    /// Reports pages that are free, on ring 2, and waits for the acknowledgement.
    pub fn report(&mut self, pfns: std::ops::Range<u32>) {
        let len = (pfns.end - pfns.start) * 4096;
        self.offer(2, u64::from(pfns.start) * 4096, len, DEVICE_WRITES);
        self.wait_used(2);
    }

    /// A driver that starts afresh.
    pub fn reset_driver(&mut self) {
        for index in 0..self.rings.len() {
            let base = self.rings[index].base;
            self.write(base, &[0; 0x3000]);
            self.rings[index].avail = 0;
            self.rings[index].used = 0;
        }
    }
}

/// The wrap counter of the lap of a packed ring's chain number `chain`.
fn wrap(chain: u16) -> bool {
    (chain / RING_SIZE).is_multiple_of(2)
}

/// Where a packed ring stands in front of chain number `chain`, with nothing outstanding.
pub fn packed_base(chain: u16) -> u32 {
    let lap = if wrap(chain) { 1 << 15 } else { 0 };
    let place = (chain % RING_SIZE) | lap;
    u32::from(place) | u32::from(place) << 16
}

/// A reply as it came.
#[derive(Debug)]
pub struct Reply {
    pub code: u32,
    pub payload: Vec<u8>,
}

/// A connection to the back-end.
#[derive(Debug)]
pub struct Frontend {
    pub stream: UnixStream,
}

impl Frontend {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream }
    }

    /// The bytes of a message.
    pub fn encode(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for field in [code, flags, u32::try_from(payload.len()).unwrap()] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Sends bytes with descriptors; false if the back-end has closed the connection.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        );
        sent.is_ok()
    }

    /// The next reply; `None` if the back-end closed the connection.
    pub fn receive(&mut self) -> Option<Reply> {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header).ok()?;
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(field(4), 5, "version 1, reply, no more flags");
        let mut payload = vec![0; field(8) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        Some(Reply {
            code: field(0),
            payload,
        })
    }

    /// Asks for something that has a reply of its own.
    pub fn ask(&mut self, code: u32, payload: &[u8]) -> Vec<u8> {
        assert!(self.send_raw(&Self::encode(code, 1, payload), &[]));
        let reply = self.receive().expect("a reply");
        assert_eq!(reply.code, code);
        reply.payload
    }

    pub fn ask_u64(&mut self, code: u32) -> u64 {
        u64::from_ne_bytes(self.ask(code, &[]).try_into().unwrap())
    }

    /// Asks for an acknowledgement: whether the request was carried out.
    pub fn tell_with(&mut self, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        assert!(self.send_raw(&Self::encode(code, 9, payload), fds));
        let reply = self.receive().expect("an acknowledgement");
        assert_eq!((reply.code, reply.payload.len()), (code, 8));
        reply.payload == [0; 8]
    }

    pub fn tell(&mut self, code: u32, payload: &[u8]) -> bool {
        self.tell_with(code, payload, &[])
    }

    pub fn vring(&mut self, code: u32, index: u32, value: u32) -> bool {
        self.tell(code, &[index.to_ne_bytes(), value.to_ne_bytes()].concat())
    }

    pub fn vring_fd(&mut self, code: u32, index: u64, fd: BorrowedFd<'_>) -> bool {
        self.tell_with(code, &index.to_ne_bytes(), &[fd])
    }

    /// Owner, features, protocol features.
    pub fn negotiate(&mut self) {
        self.negotiate_with(FEATURES);
    }

    fn negotiate_with(&mut self, selected: u64) {
        self.introduce(selected);
        assert!(self.set_features(selected));
    }

    /// All that but the selection, which QEMU's generic device sends when the driver is about to run.
    pub fn introduce(&mut self, selected: u64) {
        let offered = self.ask_u64(GET_FEATURES);
        assert_eq!(offered & F_PROTOCOL_FEATURES, F_PROTOCOL_FEATURES);
        assert_eq!(offered & selected, selected);
        assert_eq!(
            self.ask_u64(GET_PROTOCOL_FEATURES) & PROTOCOL_FEATURES,
            PROTOCOL_FEATURES
        );
        let payload = PROTOCOL_FEATURES.to_ne_bytes();
        assert!(self.send_raw(&Self::encode(SET_PROTOCOL_FEATURES, 1, &payload), &[]));
        assert!(self.tell(SET_OWNER, &[]));
    }

    /// Selects features, and those of the protocol.
    pub fn set_features(&mut self, selected: u64) -> bool {
        let features = selected | F_PROTOCOL_FEATURES;
        self.tell(SET_FEATURES, &features.to_ne_bytes())
    }

    pub fn set_mem_table(&mut self, guest: &Guest) -> bool {
        let payload = mem_table(&[[0, MEMORY_BYTES, USER_BASE, 0]]);
        self.tell_with(SET_MEM_TABLE, &payload, &[guest.memory.as_fd()])
    }

    /// Everything about a ring but its start.
    pub fn describe_ring(&mut self, guest: &Guest, index: usize) {
        let ring = &guest.rings[index];
        let (at, number) = (u64::try_from(index).unwrap(), u32::try_from(index).unwrap());
        assert!(self.vring(SET_VRING_NUM, number, RING_SIZE.into()));
        assert!(self.vring(SET_VRING_BASE, number, guest.vring_base(index)));
        assert!(self.tell(SET_VRING_ADDR, &vring_addr(number, ring.base + USER_BASE)));
        assert!(self.vring_fd(SET_VRING_CALL, at, ring.call.as_fd()));
        assert!(self.vring_fd(SET_VRING_ERR, at, ring.err.as_fd()));
    }

    /// Sets up and starts a ring.
    pub fn start_ring(&mut self, guest: &Guest, index: usize) {
        self.describe_ring(guest, index);
        let (at, number) = (u64::try_from(index).unwrap(), u32::try_from(index).unwrap());
        assert!(self.vring_fd(SET_VRING_KICK, at, guest.rings[index].kick.as_fd()));
        assert!(self.vring(SET_VRING_ENABLE, number, 1));
    }

    /// Connects and starts all rings of a guest.
    pub fn run(path: &Path, guest: &Guest) -> Self {
        let mut frontend = Self::connect(path);
        let layout = if guest.packed { F_RING_PACKED } else { 0 };
        frontend.negotiate_with(FEATURES | layout);
        frontend.start(guest);
        frontend
    }

    /// Memory, then all rings, as at a driver's start.
    pub fn start(&mut self, guest: &Guest) {
        assert!(self.set_mem_table(guest));
        for index in 0..guest.rings.len() {
            self.start_ring(guest, index);
        }
    }

    /// Stops all rings; where each stood.
    pub fn stop(&mut self, guest: &Guest) -> Vec<u32> {
        (0..u32::try_from(guest.rings.len()).unwrap())
            .map(|index| {
                let payload = [index.to_ne_bytes(), [0; 4]].concat();
                let reply = self.ask(GET_VRING_BASE, &payload);
                assert_eq!(reply[..4], index.to_ne_bytes());
                u32::from_ne_bytes(reply[4..].try_into().unwrap())
            })
            .collect()
    }

    pub fn get_config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let payload = config(offset, &vec![0; size as usize]);
        let reply = self.ask(GET_CONFIG, &payload);
        assert_eq!(reply[..12], payload[..12]);
        reply[12..].to_vec()
    }

    pub fn set_config(&mut self, offset: u32, data: &[u8]) -> bool {
        self.tell(SET_CONFIG, &config(offset, data))
    }

    /// Gives the back-end a channel for its own requests; our end of it.
    pub fn backend_channel(&mut self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(self.tell_with(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
        ours
    }
}

/// A configuration space description.
pub fn config(offset: u32, data: &[u8]) -> Vec<u8> {
    let size = u32::try_from(data.len()).unwrap();
    let mut payload = [offset, size, 0].map(u32::to_ne_bytes).concat();
    payload.extend_from_slice(data);
    payload
}

/// A memory table of regions: guest address, length, front-end's address, offset.
pub fn mem_table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut payload = u32::try_from(regions.len()).unwrap().to_ne_bytes().to_vec();
    payload.extend_from_slice(&[0; 4]);
    for field in regions.iter().flatten() {
        payload.extend_from_slice(&field.to_ne_bytes());
    }
    payload
}

/// A vring address description: three parts, a page apart.
pub fn vring_addr(index: u32, base: u64) -> Vec<u8> {
    let mut payload = [index, 0].map(u32::to_ne_bytes).concat();
    for address in [base, base + 0x2000, base + 0x1000, 0] {
        payload.extend_from_slice(&address.to_ne_bytes());
    }
    payload
}

/// Whether `fd` becomes readable in time.
pub fn becomes_readable(fd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: PATIENCE.as_secs().try_into().unwrap(),
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&timeout)).unwrap() == 1
}
