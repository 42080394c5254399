//! The arguments of the calls as a fuzzer makes them up, and what every answer has to be like.

use crate::script::{Bytes, Few};
use aerostat::aerostat_last_error;
use arbitrary::Arbitrary;
use std::ffi::{CStr, c_int};

/// Room for every structure that is filled in, and for what must stay as it is behind it.
const ROOM: usize = 1024;

/// What a call may answer: the errnos that the header names.
pub(super) const ANSWERS: [c_int; 21] = [
    libc::EFAULT,
    libc::EINVAL,
    libc::ENOTSUP,
    libc::EBADF,
    libc::EMSGSIZE,
    libc::E2BIG,
    libc::EADDRNOTAVAIL,
    libc::ERANGE,
    libc::EEXIST,
    libc::EALREADY,
    libc::ENOTCONN,
    libc::EBUSY,
    libc::EPROTO,
    libc::ENOENT,
    libc::ENXIO,
    libc::ETIMEDOUT,
    libc::EAGAIN,
    libc::EROFS,
    libc::ENOBUFS,
    libc::EBADMSG,
    libc::EPROTONOSUPPORT,
];

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) enum Fd {
    Event,
    Other,
    None,
    File,
    Null,
    Closed,
}

/// A size field: right, or something else.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) enum Size {
    Right,
    Also,
    Small(u8),
    Large(u16),
    Any(u32),
}

impl Size {
    pub(super) fn of(self, right: usize) -> u32 {
        let right = u32::try_from(right).unwrap_or(0);
        match self {
            Self::Right | Self::Also => right,
            Self::Small(by) => right.saturating_sub(by.into()),
            Self::Large(by) => right + u32::from(by) % 128,
            Self::Any(size) => size,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) struct RegionArgument {
    pub(super) size: Size,
    pub(super) flags: u8,
    pub(super) gpa: u8,
    pub(super) pages: u8,
    pub(super) null: bool,
    pub(super) fd: Fd,
    pub(super) node: i8,
    pub(super) offset: u8,
    pub(super) page: u8,
}

#[derive(Arbitrary, Debug)]
pub(super) enum Call {
    /// All that a driver with rings, or elements, needs.
    SetUp {
        device: u8,
        elements: bool,
    },
    Runtime {
        size: Size,
        flags: u8,
        workers: u8,
        reserved: u8,
        null: u8,
    },
    Device {
        device: u8,
        size: Size,
        flags: u8,
        features: u64,
        fds: [Fd; 2],
        null: u8,
    },
    Destroy(u8),
    Memory {
        memory: u8,
        regions: Vec<RegionArgument>,
        null: u8,
    },
    DestroyMemory(u8),
    SetMemory(u8, u8),
    SetFeatures(u8, u8, u64),
    Simple(u8, u8),
    Start {
        device: u8,
        index: u8,
        size: Size,
        flags: u8,
        entries: u16,
        at: [u32; 3],
        next: [u16; 2],
        fds: [Fd; 2],
    },
    Stop(u8, u8, Size),
    Interrupt(u8, u8, Fd),
    Submit(u8, Vec<(u8, u16, u16, bool)>, bool),
    Completions(u8, u8),
    ReadConfig(u8, u64, u8),
    WriteConfig(u8, u8, Bytes),
    Target(u8, u64),
    Query(u8, u8, Size),
    Counters(u8, i8, Size),
    Stats(u8, bool, Size),
    Hints(u8, u8, u32),
    WriteBehind(u8, u64, u32),
    History(u8, u64, u8),
    /// How much room there is, and whether there is any.
    Save(u8, u16, u8),
    /// A saved state, changed somewhere.
    Restore(u8, Few<(u16, u8)>, u8),
    Position(u8, u8, Size),
    Poke(u16, Bytes),
    Kick,
    NodeTargets(u8, [u32; 2], u8),
    QueryNode(u8, u8, Size),
    Deflate(u8, u8),
    ExtraGrant(u8, u32),
    /// A command of a guest of VMware's, and which of its outputs are NULL.
    Vmware(u8, u8, [u32; 2], u8),
    /// Range mode, with or without answers.
    Discard(u8, Few<(u16, u16)>, u8),
    /// A cgroup that is not there.
    Cgroup(u8, u8, Size),
}

/// An answer that the header knows, with a message if it is a refusal.
pub(super) fn checked(answer: c_int) -> c_int {
    if answer < 0 {
        assert!(ANSWERS.contains(&-answer), "answered {answer}");
        let message = aerostat_last_error();
        assert!(!message.is_null(), "no message");
        // SAFETY: a C string that lives until this thread's next call.
        let message = unsafe { CStr::from_ptr(message) };
        assert!(!message.is_empty(), "an empty message for {answer}");
    }
    answer
}

/// A structure to be filled in, and the room behind it.
pub(super) struct Room([u64; ROOM / 8]);

impl Room {
    pub(super) fn new(size: u32) -> Self {
        let mut room = Self([u64::from_ne_bytes([0xa5; 8]); ROOM / 8]);
        // SAFETY: the first four bytes of the room.
        unsafe { room.0.as_mut_ptr().cast::<u32>().write(size) };
        room
    }

    pub(super) fn place<T>(&mut self) -> *mut T {
        self.0.as_mut_ptr().cast()
    }

    /// Nothing behind `size` was written, and nothing at all if the call was refused.
    pub(super) fn check(&self, size: u32, answer: c_int) {
        let from = if answer < 0 {
            4
        } else {
            usize::try_from(size).unwrap_or(ROOM)
        };
        let bytes = self.0.iter().flat_map(|word| word.to_ne_bytes());
        assert!(
            bytes.skip(from.min(ROOM)).all(|byte| byte == 0xa5),
            "written behind its end"
        );
    }
}

/// Calls with a structure to be filled in, whose size is told as `size`.
pub(super) fn with_room<T>(size: Size, call: impl FnOnce(*mut T) -> c_int) -> Option<Room> {
    // The library may read as far as the size says: never say more than there is.
    let size = match size.of(size_of::<T>()) {
        size if size as usize > ROOM && size <= 4096 => 4097,
        size => size,
    };
    let mut room = Room::new(size);
    let answer = checked(call(room.place()));
    room.check(size, answer);
    (answer >= 0).then_some(room)
}
