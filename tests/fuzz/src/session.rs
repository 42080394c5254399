//! A vhost-user front-end that says anything: messages that are right as far as the script lets them be,
//! with descriptors that are what they should be or not, cut and glued as a stream may be.
//!
//! What is looked at: the session ends when the front-end goes, no message makes it panic, and it gives
//! back every descriptor.

use crate::script::Bytes;
use aerostat_device::{Runtime, RuntimeConfig};
use arbitrary::{Arbitrary, Unstructured};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
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
    /// The guest writes into its memory and kicks.
    Poke(u16, Bytes),
    Kick,
}

struct FrontEnd {
    socket: UnixStream,
    memory: OwnedFd,
    event: OwnedFd,
    null: OwnedFd,
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
    let front_end = FrontEnd {
        socket,
        memory: memory(),
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
    drop((memory, event, null));
    // A worker may still be about to let go of the device.
    while open_descriptors() > before {
        assert!(
            begin.elapsed() < PATIENCE,
            "a session leaves descriptors behind"
        );
        std::thread::yield_now();
    }
}

/// How many descriptors this process has.
fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fn memory() -> OwnedFd {
    let memory = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memory, MEMORY_BYTES).expect("room in a memfd");
    memory
}

impl FrontEnd {
    fn say(&self, say: &Say) {
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
                let at = u64::from(*at) % (MEMORY_BYTES - 32);
                let _ = rustix::io::pwrite(&self.memory, &bytes.0, at);
            }
            Say::Kick => drop(rustix::io::write(&self.event, &1u64.to_ne_bytes())),
        }
        self.discard_answers();
    }

    /// What QEMU does, in short.
    fn negotiate(&self, rings: u8) {
        self.send(
            16,
            &(1u64 << 3 | 1 << 9 | 1 << 15 | 1 << 16).to_ne_bytes(),
            &[],
        );
        self.send(2, &(1u64 << 32 | 1 << 30 | 0x22).to_ne_bytes(), &[]);
        self.table(0, 0);
        for index in (0..5u32).filter(|index| rings & (1 << index) != 0) {
            self.state(8, index, 16);
            self.state(10, index, 0);
            let page = u64::from(index) * 0x1000;
            self.addresses(index, [page, page + 0xc00, page + 0x800]);
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
