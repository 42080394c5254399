//! A vhost-user front-end that says anything: messages that are right as far as the script lets them be,
//! with descriptors that are what they should be or not, cut and glued as a stream may be.
//!
//! What is looked at: the session ends when the front-end goes, no message makes it panic, and it gives
//! back every descriptor; and the guest's memory, where the rings cannot be: each byte is what the guest wrote,
//! or zero in a page that something which the guest wrote names.

use crate::script::Bytes;
use aerostat_device::{Runtime, RuntimeConfig};
use arbitrary::{Arbitrary, Unstructured};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Guest memory of the front-end.
const MEMORY_BYTES: u64 = 64 << 10;
/// Where it says that it has it mapped.
const USER: u64 = 1 << 32;
/// The most messages of one script.
const MAX_MESSAGES: usize = 32;
/// How long a session may take to end after its front-end has gone.
const PATIENCE: Duration = Duration::from_secs(300);

/// A descriptor that goes with a message.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Fd {
    Event,
    Memory,
    Socket,
    Null,
}

/// One message, or something else on the wire.
#[derive(Arbitrary, Debug)]
enum Say {
    /// Everything that a driver with rings needs, up to those that are served.
    Negotiate(u8),
    Number(u8, u64),
    VringState(u8, u8, u16),
    VringAddr(u8, [u16; 3]),
    VringFd(u8, u8, Fd),
    MemTable(u8, u16),
    Config(bool, u8, Bytes),
    Any(u8, u8, Bytes, Option<Fd>),
    Raw(Bytes),
    /// The guest writes into its memory.
    Poke(u16, Bytes),
    Kick,
    /// The guest's driver sends page numbers on a queue, as split rings have it, and kicks.
    Pages(u8, Bytes),
    /// It reports pages as free: first, and how many.
    Report(u8, u8, u8),
}

/// What drivers select beside VERSION_1 and what vhost-user needs: statistics and reports; the same with
/// MUST_TELL_HOST, indirect tables and event indices; packed rings; IN_ORDER; refusal; host resets; all of it;
/// nothing.
const SELECTED: [u64; 8] = [
    0x22,
    0x23 | 1 << 28 | 1 << 29,
    0x2b | 1 << 34,
    0x23 | 1 << 35,
    0x21 | PAGE_REFUSAL,
    0x21 | 1 << 51,
    0x3b | 1 << 28 | 1 << 29 | 1 << 34 | 1 << 35 | PAGE_REFUSAL | 1 << 51,
    0,
];
const PAGE_REFUSAL: u64 = 1 << 50;
const PAGE: u64 = 4096;
/// Where the other parts of a ring are in its page.
const AVAIL: u64 = 0x800;
const USED: u64 = 0xc00;
/// Each queue has a page for its rings, and from here on nothing else is in them.
const RING_PAGES: u64 = 5;
/// The pages from here on are the canary's in the beginning: no four of its bytes number a page.
const CANARY: u64 = 6 * PAGE;

struct FrontEnd {
    socket: UnixStream,
    memory: OwnedFd,
    event: OwnedFd,
    null: OwnedFd,
    wrote: RefCell<Wrote>,
}

/// What the guest wrote to its memory, and where that may have come to nothing.
struct Wrote {
    bytes: Vec<u8>,
    /// Pages that any four bytes were the number of.
    named: BTreeSet<u64>,
    /// Ranges that any twelve bytes were the address and length of.
    reported: Vec<(u64, u64)>,
    /// Buffers that are in use, of each queue.
    sent: [u16; 8],
    /// Rings may be anywhere, or the device writes to buffers.
    anywhere: bool,
}

/// Plays one script.
///
/// # Panics
/// If the session does not end, or leaves descriptors behind.
pub fn run(bytes: &[u8]) {
    let Ok(script) = Vec::<Say>::arbitrary(&mut Unstructured::new(bytes)) else {
        return;
    };
    static RUNTIME: OnceLock<Arc<Runtime>> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| {
        let config = RuntimeConfig {
            workers_per_node: 1,
        };
        let runtime = Runtime::new(&config).expect("a runtime");
        // What the first session makes for all is not to be counted below.
        let (theirs, _) = UnixStream::pair().expect("sockets");
        aerostat_vhost_user::serve_one(&runtime, theirs);
        runtime
    });
    let before = open_descriptors();
    let (theirs, socket) = UnixStream::pair().expect("sockets");
    socket
        .set_nonblocking(true)
        .expect("a socket that does not block");
    let session = {
        let runtime = Arc::clone(runtime);
        std::thread::spawn(move || aerostat_vhost_user::serve_one(&runtime, theirs))
    };
    let wrote = Wrote::new();
    let front_end = FrontEnd {
        socket,
        memory: memory(&wrote.bytes),
        wrote: RefCell::new(wrote),
        event: eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd"),
        null: std::fs::File::open("/dev/null").expect("/dev/null").into(),
    };
    for say in script.iter().take(MAX_MESSAGES) {
        front_end.say(say);
        if session.is_finished() {
            break;
        }
    }
    let FrontEnd {
        socket,
        memory,
        event,
        null,
        wrote,
    } = front_end;
    drop(socket);
    let begin = std::time::Instant::now();
    while !session.is_finished() {
        assert!(
            begin.elapsed() < PATIENCE,
            "a session outlives its front-end"
        );
        std::thread::yield_now();
    }
    assert!(session.join().is_ok(), "a session panicked");
    let wrote = wrote.into_inner();
    let still = memory.try_clone().expect("a descriptor");
    drop((memory, event, null));
    // A worker may still be about to let go of the device.
    while open_descriptors() > before + 1 {
        assert!(
            begin.elapsed() < PATIENCE,
            "a session leaves descriptors behind"
        );
        std::thread::yield_now();
    }
    wrote.check(&still);
}

/// How many descriptors this process has.
fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fn memory(bytes: &[u8]) -> OwnedFd {
    let memory = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memory, MEMORY_BYTES).expect("room in a memfd");
    rustix::io::pwrite(&memory, bytes, 0).expect("a memfd takes all");
    memory
}

impl Wrote {
    fn new() -> Self {
        let canary = |at: u64| u8::try_from(at % 127).unwrap_or(0) | 0x80;
        let byte = |at| if at < CANARY { 0 } else { canary(at) };
        Self {
            bytes: (0..MEMORY_BYTES).map(byte).collect(),
            named: BTreeSet::new(),
            reported: Vec::new(),
            sent: [0; 8],
            anywhere: false,
        }
    }

    /// Notes what is written at `at`, and what it names together with what is around it.
    fn note(&mut self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap_or(0);
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        let around = |more: usize| {
            let end = (at + bytes.len() + more).min(self.bytes.len());
            self.bytes[at.saturating_sub(more)..end].windows(more + 1)
        };
        for window in around(3) {
            let number = window.try_into().map(u32::from_le_bytes);
            self.named.insert(number.unwrap_or(0).into());
        }
        for window in around(11) {
            let (address, length) = window.split_at(8);
            let address = u64::from_le_bytes(address.try_into().unwrap_or_default());
            let length = u32::from_le_bytes(length.try_into().unwrap_or_default());
            if length > 0 && address.is_multiple_of(PAGE) {
                self.reported.push((address / PAGE, length.into()));
            }
        }
    }

    /// Whether the guest said that it does without a page. Where its memory lies is the script's choice, but
    /// it begins at a multiple of its length.
    fn gave(&self, page: u64) -> bool {
        let pages = MEMORY_BYTES / PAGE;
        (0..4).map(|place| place * pages + page).any(|page| {
            let covers =
                |(first, bytes): &(u64, u64)| *first <= page && page < first + bytes / PAGE;
            self.named.contains(&page) || self.reported.iter().any(covers)
        })
    }

    /// Compares all memory but that of rings.
    fn check(&self, memory: &OwnedFd) {
        if self.anywhere {
            return;
        }
        let mut now = vec![0; self.bytes.len()];
        rustix::io::pread(memory, &mut now[..], 0).expect("a memfd can be read");
        let size = usize::try_from(PAGE).unwrap_or(0);
        let pages = self.bytes.chunks(size).zip(now.chunks(size));
        for (page, (wrote, now)) in (0..)
            .zip(pages)
            .skip(usize::try_from(RING_PAGES).unwrap_or(0))
        {
            let kept = wrote == now;
            let emptied = || {
                wrote
                    .iter()
                    .zip(now)
                    .all(|(wrote, now)| wrote == now || *now == 0)
            };
            assert!(kept || emptied(), "page {page} was written to");
            assert!(
                kept || self.gave(page),
                "page {page} was discarded, and not given"
            );
        }
    }
}

/// What the driver selects for a choice of [`Say::Negotiate`].
fn selected(choice: u8) -> u64 {
    SELECTED[usize::from(choice >> 5)]
}

impl FrontEnd {
    fn say(&self, say: &Say) {
        self.wrote.borrow_mut().anywhere |= match say {
            // SET_FEATURES, and SET_VRING_NUM by another name.
            Say::Number(code, _) => matches!(code % 48, 2 | 8),
            Say::VringState(code, ..) => code % 4 == 0,
            Say::Negotiate(choice) => selected(*choice) & PAGE_REFUSAL != 0,
            Say::VringAddr(..) | Say::Any(..) | Say::Raw(_) => true,
            _ => false,
        };
        match say {
            Say::Negotiate(rings) => self.negotiate(*rings),
            Say::Number(code, value) => self.send(u32::from(code % 48), &value.to_ne_bytes(), &[]),
            Say::VringState(code, index, value) => {
                let code = [8, 10, 11, 18][usize::from(code % 4)];
                self.state(code, (index % 8).into(), (*value).into());
            }
            Say::VringAddr(index, at) => self.addresses((index % 8).into(), at.map(u64::from)),
            Say::VringFd(code, index, fd) => {
                let code = [12, 13, 14][usize::from(code % 3)];
                self.send(code, &u64::from(index % 8).to_ne_bytes(), &[*fd]);
            }
            Say::MemTable(code, odd) => self.table(*code, u64::from(*odd)),
            Say::Config(write, offset, bytes) => {
                let mut payload = Vec::new();
                let length = u32::try_from(bytes.0.len()).unwrap_or(0);
                for field in [u32::from(*offset), length, 0] {
                    payload.extend(field.to_ne_bytes());
                }
                payload.extend(&bytes.0);
                self.send(if *write { 25 } else { 24 }, &payload, &[]);
            }
            Say::Any(code, flags, bytes, fd) => {
                let header = [u32::from(*code), u32::from(*flags)];
                let length = u32::try_from(bytes.0.len()).unwrap_or(0);
                let fds: Vec<Fd> = fd.iter().copied().collect();
                self.raw(
                    &[
                        &header.map(u32::to_ne_bytes).concat(),
                        &length.to_ne_bytes()[..],
                        &bytes.0,
                    ]
                    .concat(),
                    &fds,
                );
            }
            Say::Raw(bytes) => self.raw(&bytes.0, &[]),
            Say::Poke(at, bytes) => {
                self.write(u64::from(*at) % (MEMORY_BYTES - 32), &bytes.0);
            }
            Say::Kick => self.kick(),
            Say::Pages(queue, pages) => {
                let bytes: Vec<u8> = pages
                    .0
                    .iter()
                    .flat_map(|page| u32::from(page % 18).to_le_bytes())
                    .collect();
                let at = self.list(*queue);
                self.write(at, &bytes);
                self.offer(*queue, at, bytes.len() as u64, 0);
            }
            Say::Report(queue, first, pages) => {
                let length = u64::from(pages % 18) * PAGE;
                self.offer(*queue, u64::from(first % 18) * PAGE, length, 2);
            }
        }
        self.discard_answers();
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.wrote.borrow_mut().note(at, bytes);
        let _ = rustix::io::pwrite(&self.memory, bytes, at);
    }

    fn kick(&self) {
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Where the next list of a queue is: each has half a page behind the rings for eight of them.
    fn list(&self, queue: u8) -> u64 {
        let queue = queue % 5;
        let sent = self.wrote.borrow().sent[usize::from(queue)];
        RING_PAGES * PAGE + 0x300 * u64::from(queue) + 96 * u64::from(sent % 8)
    }

    /// Makes one buffer available, as a split ring of 16 has it, and kicks.
    fn offer(&self, queue: u8, at: u64, length: u64, flags: u16) {
        let queue = queue % 5;
        let sent = {
            let sent = &mut self.wrote.borrow_mut().sent[usize::from(queue)];
            *sent = sent.wrapping_add(1);
            *sent
        };
        let slot = sent.wrapping_sub(1) % 16;
        let base = PAGE * u64::from(queue);
        let length = u32::try_from(length).unwrap_or(0);
        let descriptor = [
            &at.to_le_bytes()[..],
            &length.to_le_bytes(),
            &flags.to_le_bytes(),
            &[0, 0],
        ];
        self.write(base + 16 * u64::from(slot), &descriptor.concat());
        self.write(base + AVAIL + 4 + 2 * u64::from(slot), &slot.to_le_bytes());
        self.write(base + AVAIL + 2, &sent.to_le_bytes());
        self.kick();
    }

    /// What QEMU does, in short: queues by the lower bits, features by the others.
    fn negotiate(&self, choice: u8) {
        let rings = choice;
        self.send(
            16,
            &(1u64 << 3 | 1 << 9 | 1 << 15 | 1 << 16).to_ne_bytes(),
            &[],
        );
        let features = 1u64 << 32 | 1 << 30 | selected(choice);
        self.send(2, &features.to_ne_bytes(), &[]);
        self.table(0, 0);
        for index in (0..5u32).filter(|index| rings & (1 << index) != 0) {
            self.state(8, index, 16);
            self.state(10, index, 0);
            let page = u64::from(index) * 0x1000;
            self.addresses(index, [page, page + USED, page + AVAIL]);
            self.send(13, &u64::from(index).to_ne_bytes(), &[Fd::Event]);
            self.send(12, &u64::from(index).to_ne_bytes(), &[Fd::Event]);
            self.state(18, index, 1);
        }
    }

    fn state(&self, code: u32, index: u32, value: u32) {
        self.send(
            code,
            &[index.to_ne_bytes(), value.to_ne_bytes()].concat(),
            &[],
        );
    }

    fn addresses(&self, index: u32, [desc, used, avail]: [u64; 3]) {
        let mut payload = [index.to_ne_bytes(), [0; 4]].concat();
        for address in [USER + desc, USER + used, USER + avail, 0] {
            payload.extend(address.to_ne_bytes());
        }
        self.send(9, &payload, &[]);
    }

    /// SET_MEM_TABLE, ADD_MEM_REG or REM_MEM_REG with one region; `odd` shifts what is said of it.
    fn table(&self, code: u8, odd: u64) {
        let (code, head) = match code % 3 {
            0 => (5, [1u32.to_ne_bytes(), [0; 4]].concat()),
            1 => (37, vec![0; 8]),
            _ => (38, vec![0; 8]),
        };
        let mut payload = head;
        let gpa = (odd % 4) * MEMORY_BYTES;
        for field in [gpa, MEMORY_BYTES - odd / 4 % 16, USER + gpa, odd / 64 % 3] {
            payload.extend(field.to_ne_bytes());
        }
        let fds: &[Fd] = if code == 38 { &[] } else { &[Fd::Memory] };
        self.send(code, &payload, fds);
    }

    fn send(&self, code: u32, payload: &[u8], fds: &[Fd]) {
        let length = u32::try_from(payload.len()).unwrap_or(0);
        // Version 1, with the wish for an acknowledgement: otherwise a refusal ends the session.
        let header = [code, 1 | 1 << 3, length].map(u32::to_ne_bytes).concat();
        self.raw(&[&header, payload].concat(), fds);
    }

    fn raw(&self, bytes: &[u8], fds: &[Fd]) {
        let (other, _) = UnixStream::pair().expect("sockets");
        let fds: Vec<BorrowedFd<'_>> = fds
            .iter()
            .map(|fd| match fd {
                Fd::Event => self.event.as_fd(),
                Fd::Memory => self.memory.as_fd(),
                Fd::Socket => other.as_fd(),
                Fd::Null => self.null.as_fd(),
            })
            .collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        // A session that has ended is none of the front-end's business.
        let _ = rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, flags);
    }

    fn discard_answers(&self) {
        let mut buffer = [0; 4096];
        while (&self.socket)
            .read(&mut buffer)
            .is_ok_and(|count| count > 0)
        {}
    }
}
