//! Front-ends that send nonsense, lie, or die: each ends at most its own session. A second virtual
//! machine on the same process is served throughout.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test program ends with a panic when anything is not as it should be"
)]

mod common;

use common::frontend::{
    F_PROTOCOL_FEATURES, FEATURES, FIRST_FREE_PFN, Frontend, Guest, MEMORY_BYTES, RING_SIZE,
    USER_BASE, becomes_readable, config, mem_table, request, vring_addr,
};
use common::{Backend, Control};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, OFlags, fcntl_setfl, memfd_create};
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use tempfile::TempDir;

/// Numbers that look random and are the same in each run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[3]).collect()
    }
}

/// A process with a victim's and a bystander's virtual machine.
struct Scene {
    backend: Backend,
    bystander: Guest,
    frontend: Frontend,
    control: Control,
    rounds: u32,
    _directory: TempDir,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let backend = Backend::start(directory.path(), 2);
        let bystander = Guest::new();
        let frontend = Frontend::run(&backend.socket(1), &bystander);
        let control = backend.control(1);
        Self {
            backend,
            bystander,
            frontend,
            control,
            rounds: 0,
            _directory: directory,
        }
    }

    fn connect(&self) -> Frontend {
        Frontend::connect(&self.backend.socket(0))
    }

    fn negotiated(&self) -> Frontend {
        let mut frontend = self.connect();
        frontend.negotiate();
        frontend
    }

    /// The process lives, and the bystander is served: pages, configuration and control.
    fn check(&mut self) {
        self.backend.assert_alive();
        let pfn = FIRST_FREE_PFN + self.rounds % 4096;
        self.rounds += 1;
        self.bystander.inflate(pfn..pfn + 1);
        self.bystander.deflate(pfn..pfn + 1);
        assert_eq!(self.frontend.get_config(0, 16).len(), 16);
        assert_eq!(self.control.query()["state"], "active");
    }

    /// The victim's socket takes a new front-end, and serves it.
    fn check_recovery(&mut self) {
        self.check();
        let mut guest = Guest::new();
        let frontend = Frontend::run(&self.backend.socket(0), &guest);
        guest.inflate(FIRST_FREE_PFN..FIRST_FREE_PFN + 8);
        drop(frontend);
    }
}

#[test]
fn every_request_with_every_kind_of_nonsense() {
    let mut scene = Scene::new();
    let mut random = Random(0x5eed);
    let file = File::open("/dev/null").unwrap();
    let (pipe, _other_end) = std::io::pipe().unwrap();
    let pipe = OwnedFd::from(pipe);
    for code in (0..50).chain([0xffff, u32::MAX]) {
        for round in 0..24 {
            let frontend = if round % 2 == 0 {
                scene.negotiated()
            } else {
                scene.connect()
            };
            let len = [0, 1, 7, 8, 12, 20, 40, 72, 200, 4096][random.next() as usize % 10];
            let mut payload = random.bytes(len);
            if round % 3 == 0 {
                // Small numbers get further than random ones.
                payload.iter_mut().for_each(|byte| *byte &= 3);
            }
            let fds: Vec<BorrowedFd<'_>> = match round % 4 {
                0 => Vec::new(),
                1 => vec![file.as_fd()],
                2 => vec![pipe.as_fd()],
                _ => vec![file.as_fd(), pipe.as_fd(), frontend.stream.as_fd()],
            };
            let flags = if round % 5 == 0 {
                random.next() as u32
            } else {
                9
            };
            frontend.send_raw(&Frontend::encode(code, flags, &payload), &fds);
        }
        scene.check();
    }
    scene.check_recovery();
}

#[test]
fn random_bytes_end_the_session_and_nothing_else() {
    let mut scene = Scene::new();
    let mut random = Random(77);
    for _ in 0..100 {
        let frontend = scene.connect();
        let len = random.next() as usize % 300;
        frontend.send_raw(&random.bytes(len + 1), &[]);
    }
    scene.check_recovery();
}

#[test]
fn death_at_each_byte_of_a_hand_shake() {
    let mut scene = Scene::new();
    let guest = Guest::new();
    let protocol = common::frontend::PROTOCOL_FEATURES.to_ne_bytes();
    let features = (FEATURES | F_PROTOCOL_FEATURES).to_ne_bytes();
    let table = mem_table(&[[0, MEMORY_BYTES, USER_BASE, 0]]);
    let messages: [(u32, &[u8], bool); 6] = [
        (request::GET_FEATURES, &[], false),
        (request::SET_PROTOCOL_FEATURES, &protocol, false),
        (request::SET_FEATURES, &features, false),
        (request::SET_MEM_TABLE, &table, true),
        (request::SET_VRING_ADDR, &vring_addr(0, USER_BASE), false),
        (request::SET_VRING_KICK, &[0; 8], true),
    ];
    for (last, (code, payload, with_fd)) in messages.iter().enumerate() {
        let bytes = Frontend::encode(*code, 9, payload);
        for cut in 1..bytes.len() {
            let frontend = scene.connect();
            for (code, payload, with_fd) in &messages[..last] {
                let fds = [guest.memory.as_fd()];
                let fds = if *with_fd { &fds[..] } else { &[] };
                frontend.send_raw(&Frontend::encode(*code, 1, payload), fds);
            }
            let fds = [guest.memory.as_fd()];
            let fds = if *with_fd { &fds[..] } else { &[] };
            frontend.send_raw(&bytes[..cut], fds);
        }
        scene.check();
    }
    scene.check_recovery();
}

#[test]
fn a_front_end_that_stops_in_the_middle_of_a_message_hurts_nobody() {
    let mut scene = Scene::new();
    let mut frontend = scene.negotiated();
    let message = Frontend::encode(request::SET_OWNER, 9, &[]);
    frontend.stream.write_all(&message[..5]).unwrap();
    scene.check();
    let mut control = scene.backend.control(0);
    control
        .execute("aerostat-set-target", json!({ "bytes": 4096 }))
        .unwrap();
    assert_eq!(control.query()["state"], "configured");
    frontend.stream.write_all(&message[5..]).unwrap();
    assert_eq!(frontend.receive().unwrap().payload, [0; 8]);
}

#[test]
fn a_front_end_that_reads_no_answers_hurts_nobody() {
    let mut scene = Scene::new();
    let frontend = scene.negotiated();
    frontend.stream.set_nonblocking(true).unwrap();
    let request = Frontend::encode(request::GET_CONFIG, 1, &config(0, &[0; 256]));
    // Until both directions are full.
    while (&frontend.stream)
        .write(&request)
        .is_ok_and(|count| count == request.len())
    {}
    scene.check();
    drop(frontend);
    scene.check_recovery();
}

#[test]
fn rings_and_memory_that_do_not_fit_are_refused() {
    let mut scene = Scene::new();
    let guest = Guest::new();
    let fd = guest.memory.as_fd();
    let mut frontend = scene.negotiated();
    let kick = guest.rings[0].kick.as_fd();
    let far = |base: u64| vring_addr(0, base);

    // Before there is memory.
    assert!(!frontend.tell(request::SET_VRING_ADDR, &far(USER_BASE)));
    assert!(frontend.vring(request::SET_VRING_NUM, 0, 64));
    assert!(
        frontend.vring_fd(request::SET_VRING_KICK, 0, kick),
        "kept for later"
    );
    assert!(frontend.vring(request::SET_VRING_ENABLE, 0, 1));

    let mut refused = |table: &[[u64; 4]], fds: &[BorrowedFd<'_>]| {
        assert!(
            !frontend.tell_with(request::SET_MEM_TABLE, &mem_table(table), fds),
            "{table:x?}"
        );
    };
    refused(&[[0, MEMORY_BYTES * 2, USER_BASE, 0]], &[fd]);
    refused(&[[0, MEMORY_BYTES, USER_BASE, 4096]], &[fd]);
    refused(&[[0, 0, USER_BASE, 0]], &[fd]);
    refused(&[[u64::MAX - 4096, 8192, USER_BASE, 0]], &[fd]);
    refused(&[[0, 8192, u64::MAX - 4096, 0]], &[fd]);
    refused(&[[0, 8192, USER_BASE, u64::MAX - 4096]], &[fd]);
    refused(&[[0, u64::MAX, USER_BASE, 0]], &[fd]);
    refused(
        &[[0, 8192, USER_BASE, 0], [4096, 8192, USER_BASE, 0]],
        &[fd, fd],
    );
    refused(&[[7, 8192, USER_BASE, 0]], &[fd]);
    refused(&[[0, 16, USER_BASE, 0]], &[fd]);
    refused(&[[0, 8192, USER_BASE, 0]], &[kick]);
    refused(
        &[[0, 8192, USER_BASE, 0]],
        &[File::open("/dev/zero").unwrap().as_fd()],
    );
    refused(
        &[[0, 8192, USER_BASE, 0]],
        &[scene.bystander.rings[0].call.as_fd()],
    );

    assert!(frontend.set_mem_table(&guest));
    for base in [
        0,
        USER_BASE - 4096,
        USER_BASE + MEMORY_BYTES - 8192,
        u64::MAX - 0x3000,
    ] {
        assert!(
            !frontend.tell(request::SET_VRING_ADDR, &far(base)),
            "{base:#x}"
        );
    }
    // Inside, but not where a ring may start, or too near to the end.
    for base in [USER_BASE + 1, USER_BASE + MEMORY_BYTES - 0x2000 - 4] {
        assert!(
            !frontend.tell(request::SET_VRING_ADDR, &far(base)),
            "{base:#x}"
        );
    }
    for size in [0, 3, 32769, 65536, u32::MAX] {
        assert!(!frontend.vring(request::SET_VRING_NUM, 0, size));
    }
    for index in [5, 255, 256, 32768, u32::MAX] {
        assert!(!frontend.vring(request::SET_VRING_NUM, index, 64));
        assert!(!frontend.vring(request::SET_VRING_BASE, index, 0));
        assert!(!frontend.vring(request::SET_VRING_ENABLE, index, 1));
        assert!(!frontend.tell(request::SET_VRING_ADDR, &vring_addr(index, USER_BASE)));
    }
    assert!(!frontend.vring(request::SET_VRING_BASE, 0, 65536));
    assert!(!frontend.vring(request::SET_VRING_ENABLE, 0, 2));
    assert!(!frontend.tell(request::SET_FEATURES, &u64::MAX.to_ne_bytes()));
    assert!(!frontend.tell(request::SET_PROTOCOL_FEATURES, &u64::MAX.to_ne_bytes()));
    assert!(!frontend.tell(request::SET_STATUS, &256_u64.to_ne_bytes()));
    assert!(!frontend.tell_with(request::SET_BACKEND_REQ_FD, &[], &[fd]));

    // After all that it still works.
    frontend.start(&guest);
    let mut guest = guest;
    guest.inflate(FIRST_FREE_PFN..FIRST_FREE_PFN + 4);
    drop(frontend);
    scene.check_recovery();
}

/// A sparse file costs its owner nothing, but a bit of a bitmap for each page costs this process.
#[test]
fn more_memory_than_page_numbers_can_name_is_refused() {
    const HALF: u64 = 8 << 40;
    let mut scene = Scene::new();
    let sparse = File::from(memfd_create("sparse", MemfdFlags::CLOEXEC).unwrap());
    sparse.set_len(HALF + 4096).unwrap();
    let fd = sparse.as_fd();
    let mut frontend = scene.negotiated();
    let halves = |len| mem_table(&[[0, HALF, 0, 0], [HALF, len, HALF, 0]]);
    let small = mem_table(&[[0, MEMORY_BYTES, 0, 0]]);
    let table = request::SET_MEM_TABLE;
    assert!(!frontend.tell_with(table, &halves(HALF + 4096), &[fd, fd]));
    // One region after the other comes to the same.
    let region = |at: u64, len: u64| [0, at, len, at, 0].map(u64::to_ne_bytes).concat();
    assert!(frontend.tell_with(table, &small, &[fd]));
    assert!(frontend.tell_with(request::ADD_MEM_REG, &region(1 << 41, HALF), &[fd]));
    assert!(!frontend.tell_with(request::ADD_MEM_REG, &region(1 << 45, HALF), &[fd]));
    scene.check();
    drop(frontend);
    scene.check_recovery();
}

#[test]
fn wrong_descriptors_for_rings_are_refused() {
    let mut scene = Scene::new();
    let guest = Guest::new();
    let mut frontend = scene.negotiated();
    assert!(frontend.set_mem_table(&guest));
    let null = File::open("/dev/null").unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    for kick in [null.as_fd(), guest.memory.as_fd(), socket.as_fd()] {
        frontend.describe_ring(&guest, 0);
        assert!(frontend.vring(request::SET_VRING_ENABLE, 0, 1));
        assert!(!frontend.vring_fd(request::SET_VRING_KICK, 0, kick));
        assert!(frontend.vring(request::SET_VRING_ENABLE, 0, 0));
        scene.check();
    }
    // Polling in place of kicks is not offered.
    assert!(!frontend.tell(request::SET_VRING_KICK, &0x100_u64.to_ne_bytes()));
    frontend.start(&guest);
    for request in [request::SET_VRING_CALL, request::SET_VRING_ERR] {
        assert!(!frontend.vring_fd(request, 0, null.as_fd()));
        scene.check();
    }
}

#[test]
fn a_flood_of_descriptors_ends_the_session() {
    let mut scene = Scene::new();
    let guest = Guest::new();
    let before = descriptors(&scene.backend);
    for _ in 0..20 {
        let mut frontend = scene.negotiated();
        let fds = vec![guest.memory.as_fd(); 60];
        frontend.send_raw(
            &Frontend::encode(request::SET_MEM_TABLE, 9, &[0; 2000]),
            &fds,
        );
        assert!(
            frontend.receive().is_none(),
            "the session should have ended"
        );
    }
    // Descriptors along with a message that has none are closed, too.
    let mut frontend = scene.negotiated();
    let fds = [guest.memory.as_fd()];
    frontend.send_raw(&Frontend::encode(request::SET_OWNER, 9, &[]), &fds);
    assert!(frontend.receive().is_none());
    scene.check_recovery();
    drop(frontend);
    common::eventually("all descriptors are closed", || {
        (descriptors(&scene.backend) <= before).then_some(())
    });
}

fn descriptors(backend: &Backend) -> usize {
    let path = format!("/proc/{}/fd", backend.pid());
    std::fs::read_dir(path).unwrap().count()
}

#[test]
fn memory_that_is_taken_away_ends_the_session_each_time() {
    let mut scene = Scene::new();
    let mut control = scene.backend.control(0);
    for _ in 0..4 {
        let mut guest = Guest::new();
        let mut frontend = Frontend::run(&scene.backend.socket(0), &guest);
        guest.inflate(FIRST_FREE_PFN..FIRST_FREE_PFN + 4);
        guest.memory.set_len(0).unwrap();
        guest.kick(0);
        assert!(
            frontend.receive().is_none(),
            "the session should have ended"
        );
        control.wait_for_state("disconnected");
        scene.check_recovery();
    }
}

/// O_NONBLOCK belongs to the open file, which the peer has as well. There is one worker for both machines.
#[test]
fn a_peer_that_makes_its_eventfds_block_and_fills_them_keeps_nobody_waiting() {
    let mut scene = Scene::new();
    for semaphore in [EventfdFlags::empty(), EventfdFlags::SEMAPHORE] {
        let mut guest = Guest::new();
        for ring in &mut guest.rings {
            ring.call = eventfd(0, EventfdFlags::CLOEXEC | semaphore).unwrap();
            ring.err = eventfd(0, EventfdFlags::CLOEXEC | semaphore).unwrap();
        }
        let mut frontend = Frontend::run(&scene.backend.socket(0), &guest);
        guest.inflate(FIRST_FREE_PFN..FIRST_FREE_PFN + 1);
        for event in guest.rings.iter().flat_map(|ring| [&ring.call, &ring.err]) {
            fill(event);
        }
        // Each of these is told of on a call eventfd that is full.
        for page in 0..20 {
            guest.inflate(FIRST_FREE_PFN + page..FIRST_FREE_PFN + page + 1);
            scene.check();
        }
        // A broken ring is told of on an error eventfd that is full.
        let avail = guest.rings[1].base + 0x1002;
        guest.write(avail, &0x4000_u16.to_le_bytes());
        guest.kick(1);
        scene.check();
        // The session itself goes on, too.
        assert_eq!(frontend.get_config(0, 16).len(), 16);
        scene.check();
        drop(frontend);
    }
    scene.check_recovery();
}

/// Takes the counter as high as it goes, and has whoever writes to it wait.
fn fill(event: &OwnedFd) {
    fcntl_setfl(event, OFlags::NONBLOCK).unwrap();
    let mut count = [0; 8];
    while rustix::io::read(event, &mut count).is_ok() {}
    rustix::io::write(event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    fcntl_setfl(event, OFlags::empty()).unwrap();
    let mut fds = [PollFd::new(event, PollFlags::OUT)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    assert_eq!(
        poll(&mut fds, Some(&at_once)).unwrap(),
        0,
        "a write would wait"
    );
}

#[test]
fn pipes_and_network_sockets_for_interrupts_are_refused() {
    let mut scene = Scene::new();
    let (_read, pipe) = std::io::pipe().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    for call in [OwnedFd::from(pipe), socket.into()] {
        let mut guest = Guest::new();
        guest.rings[0].call = call;
        let mut frontend = scene.negotiated();
        assert!(frontend.set_mem_table(&guest));
        frontend.describe_ring(&guest, 0);
        assert!(frontend.vring(request::SET_VRING_ENABLE, 0, 1));
        assert!(!frontend.vring_fd(request::SET_VRING_KICK, 0, guest.rings[0].kick.as_fd()));
        drop(frontend);
        scene.check();
    }
    scene.check_recovery();
}

/// Whatever is told of once is done over and over, in sessions that each begin anew.
#[test]
fn a_peer_that_comes_again_and_again_does_not_fill_the_log() {
    const ROUNDS: u64 = 150;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let log = File::create(&path).unwrap();
    let backend = Backend::start_logging(directory.path(), log);
    let tiny = [MEMORY_BYTES + 0x800, 0x700, USER_BASE + MEMORY_BYTES, 0x800];
    let table = mem_table(&[[0, MEMORY_BYTES, USER_BASE, 0], tiny]);
    for _ in 0..ROUNDS {
        let guest = Guest::new();
        let mut frontend = Frontend::run(&backend.socket(0), &guest);
        let memory = guest.memory.as_fd();
        assert!(frontend.tell_with(request::SET_MEM_TABLE, &table, &[memory, memory]));
        assert!(!frontend.tell(request::SET_STATUS, &u64::MAX.to_ne_bytes()));
        drop(frontend.backend_channel());
        guest.write(guest.rings[1].base + 0x1002, &0x4000_u16.to_le_bytes());
        guest.kick(1);
        assert!(becomes_readable(&guest.rings[1].err));
    }
    backend.terminate();
    let log = std::fs::read_to_string(path).unwrap();
    // Of the front-end, of the driver, of queues that broke, and of the process itself.
    assert!(log.lines().count() < 100 + 100 + 20 + 10, "{log}");
    for told in [
        "connected",
        "gone",
        "smaller than a page",
        "refused",
        "channel",
        "active",
        "broke a ring",
    ] {
        assert!(log.contains(told), "{told}: {log}");
    }
}

#[test]
fn guests_that_lie_in_their_rings_are_acknowledged_or_stopped() {
    let mut scene = Scene::new();
    let mut random = Random(4711);
    for _ in 0..50 {
        let mut guest = Guest::new();
        let _frontend = Frontend::run(&scene.backend.socket(0), &guest);
        for index in 0..3 {
            let base = guest.rings[index].base;
            guest.write(base, &random.bytes(0x1000));
            let avail = random.next() % u64::from(RING_SIZE);
            guest.write(base + 0x1004, &random.bytes(2 * usize::from(RING_SIZE)));
            guest.write(base + 0x1002, &avail.to_le_bytes()[..2]);
            guest.kick(index);
        }
        guest.rings[0].avail = 1;
    }
    scene.check_recovery();
}
