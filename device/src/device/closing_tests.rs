//! Descriptors whose closing takes long, or that are refused: nobody who needs the device waits for that.
#![allow(
    unsafe_code,
    reason = "eventfds and lingering sockets are made by system calls"
)]

use super::*;
use crate::memory::tests::heap_memory;
use crate::runtime::RuntimeConfig;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

const VERSION_1: u64 = 1 << 32;
/// How long a close lingers, unless the other end goes.
const LINGER_SECONDS: i32 = 5;
/// Longer than it takes to get to a close.
const MOMENT: Duration = Duration::from_millis(200);
/// Longer than it takes to get a lock that is free, and shorter than a close.
const PATIENCE: Duration = Duration::from_secs(3);

fn device() -> Device {
    let runtime = Runtime::new(&RuntimeConfig {
        workers_per_node: 1,
    });
    let device = Device::new(&runtime.unwrap(), DeviceConfig::default()).unwrap();
    device.set_features(VERSION_1).unwrap();
    device.set_memory(heap_memory(&[(0, 0x4000)])).unwrap();
    device
}

fn eventfd() -> OwnedFd {
    // SAFETY: eventfd takes two integers, and what it returns is nobody else's.
    unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) }
}

fn queue(kick: OwnedFd, call: Option<OwnedFd>) -> QueueConfig {
    QueueConfig {
        size: 4,
        ring: Some(RingConfig {
            desc: Gpa(0),
            avail: Gpa(0x1000),
            used: Gpa(0x2000),
            kick,
            call,
            position: QueuePosition::SPLIT_START,
        }),
    }
}

/// A socket whose close waits for the other end to read what was sent, and that end.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 1 << 16]).is_ok() {}
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: LINGER_SECONDS,
    };
    let len = libc::socklen_t::try_from(size_of_val(&linger)).unwrap();
    // SAFETY: the option is a live `linger`, as long as the last argument says.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            len,
        )
    };
    assert_eq!(result, 0);
    (socket.into(), other)
}

/// Whoever needs the device does not wait while a call descriptor is closed by `closes`.
fn check_nobody_waits(closes: impl FnOnce(&Device, OwnedFd) + Send) {
    let device = device();
    let (socket, other) = lingering();
    thread::scope(|scope| {
        let closing = scope.spawn(|| closes(&device, socket));
        thread::sleep(MOMENT);
        assert!(!closing.is_finished(), "the close does not linger");
        let asked = Instant::now();
        device.inhibit();
        let waited = asked.elapsed();
        // Ends the close.
        drop(other);
        assert!(waited < PATIENCE, "{waited:?}");
    });
}

#[test]
fn nobody_waits_for_a_call_descriptor_that_is_replaced() {
    check_nobody_waits(|device, call| {
        device.start_queue(0, queue(eventfd(), Some(call))).unwrap();
        device.set_queue_call(0, None).unwrap();
    });
}

#[test]
fn nobody_waits_for_a_call_descriptor_that_is_refused() {
    check_nobody_waits(|device, call| {
        device.start_queue(0, queue(eventfd(), None)).unwrap();
        let again = device.start_queue(0, queue(eventfd(), Some(call)));
        assert!(matches!(again, Err(Error::AlreadyStarted(_))));
    });
    check_nobody_waits(|device, call| {
        let replaced = device.set_queue_call(0, Some(call));
        assert!(matches!(replaced, Err(Error::NoQueue { index: 0 })));
    });
}

#[test]
fn nobody_waits_for_the_call_descriptor_of_a_queue_that_stops() {
    check_nobody_waits(|device, call| {
        device.start_queue(0, queue(eventfd(), Some(call))).unwrap();
        device.stop_queue(0).unwrap();
    });
    check_nobody_waits(|device, call| {
        device.start_queue(0, queue(eventfd(), Some(call))).unwrap();
        device.reset();
    });
}

/// The device is held for as long as this takes: what is not an eventfd may take any time to look at, and to
/// close.
#[test]
fn descriptors_are_refused_without_waiting_for_the_device() {
    let device = Arc::new(device());
    let service = device.shared.service.lock();
    let (done, result) = channel();
    for (kick, call) in [(true, false), (false, true)] {
        let (device, done) = (Arc::clone(&device), done.clone());
        let bad = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let kick = if kick { bad() } else { eventfd() };
        let call = call.then(bad);
        thread::spawn(move || done.send(device.start_queue(0, queue(kick, call))));
        let result = result.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(matches!(result, Err(Error::BadFd { .. })), "{result:?}");
    }
    drop(service);
}
