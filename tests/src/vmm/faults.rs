//! Faults of the host: system calls of the library that fail, do less than they were asked, or take their
//! time.
//!
//! A thread filters its own system calls (seccomp(2), seccomp_unotify(2)) and then makes a runtime, whose
//! workers inherit the filter. Each call of theirs that frees memory is then asked about elsewhere in this
//! process, which lets it happen, fails it, or does a part of it in its place: the addresses mean the same
//! there. So the library that is tested is the one that is shipped, without any place for faults in it.
#![allow(
    unsafe_code,
    reason = "filters system calls, and makes some of them in place of others"
)]

use super::error::{Result, VmmError};
use parking_lot::Mutex;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// The longest that a call is held up: a test that failed meanwhile has to end too.
const MAX_HOLD: Duration = Duration::from_secs(30);

/// A system call that would free memory, or have it back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// Addresses and lengths of a vectored call.
    ProcessMadvise(Vec<(u64, u64)>),
    /// An address and a length.
    Madvise(u64, u64),
    /// An offset in a file and a length.
    PunchHole(u64, u64),
    /// An address and a length that the guest is going to use again.
    Restore(u64, u64),
}

impl Call {
    /// How many bytes it is to free.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::ProcessMadvise(ranges) => ranges.iter().map(|(_, len)| len).sum(),
            Self::Madvise(_, len) | Self::PunchHole(_, len) => *len,
            Self::Restore(..) => 0,
        }
    }
}

/// What is to become of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is made.
    Allow,
    /// It is not made, and fails with this errno.
    Fail(i32),
    /// Of a vectored call only so many ranges are done; any other is made.
    Partly(usize),
    /// It is made when the faults are told to go on.
    Hold,
}

type Judge = Box<dyn FnMut(&Call) -> Verdict + Send>;

/// What was decided and what is waiting.
struct State {
    judge: Option<Judge>,
    made: Vec<(Call, Verdict)>,
    held: Vec<(u64, Instant)>,
    released: bool,
}

/// Faults as the test's body sees them.
#[derive(Clone)]
pub struct Faults(Arc<Mutex<State>>);

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Faults")
    }
}

impl Faults {
    /// From now on `judge` decides; what was decided before is forgotten.
    pub fn judge(&self, judge: impl FnMut(&Call) -> Verdict + Send + 'static) {
        let mut state = self.0.lock();
        state.judge = Some(Box::new(judge));
        state.made.clear();
    }

    /// From now on everything succeeds.
    pub fn none(&self) {
        self.0.lock().judge = None;
    }

    /// The calls that were decided on since [`Self::judge`], in their order.
    #[must_use]
    pub fn made(&self) -> Vec<(Call, Verdict)> {
        self.0.lock().made.clone()
    }

    /// How many calls are being held up.
    #[must_use]
    pub fn held(&self) -> usize {
        self.0.lock().held.len()
    }

    /// Lets go of calls that are held up, and holds no more of them up.
    pub fn release(&self) {
        let mut state = self.0.lock();
        state.judge = None;
        state.released = true;
    }
}

/// Runs `body` in a thread whose system calls, and those of the threads that it starts, may have faults. It
/// ends only when they all have ended.
///
/// # Errors
/// The kernel has no such filters, or will not have them here.
///
/// # Panics
/// With `body`.
pub fn with_faults<T: Send>(body: impl FnOnce(&Faults) -> Result<T> + Send) -> Result<T> {
    let faults = Faults(Arc::new(Mutex::new(State {
        judge: None,
        made: Vec::new(),
        held: Vec::new(),
        released: false,
    })));
    let (to_supervisor, from_thread) = channel();
    std::thread::scope(|scope| {
        let shared = faults.clone();
        let thread = scope.spawn(move || {
            let _ = to_supervisor.send(filter_this_thread()?);
            drop(to_supervisor);
            body(&shared)
        });
        if let Ok(listener) = from_thread.recv() {
            supervise(&listener, &faults)?;
        }
        match thread.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// `struct seccomp_data`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Data {
    number: i32,
    arch: u32,
    instruction_pointer: u64,
    args: [u64; 6],
}

/// `struct seccomp_notif`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Notification {
    id: u64,
    pid: u32,
    flags: u32,
    data: Data,
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// `_IOWR('!', 0, struct seccomp_notif)` and `_IOWR('!', 1, struct seccomp_notif_resp)`.
const NOTIF_RECV: libc::c_ulong = 0xc050_2100;
const NOTIF_SEND: libc::c_ulong = 0xc018_2101;
const RESPONSE_CONTINUE: u32 = 1;
/// The advice that frees memory, as the kernel is given it.
const DONTNEED: u64 = libc::MADV_DONTNEED.cast_unsigned() as u64;
const REMOVE: u64 = libc::MADV_REMOVE.cast_unsigned() as u64;
/// The advice that has memory back, all at once or in huge frames.
const POPULATE_WRITE: u64 = libc::MADV_POPULATE_WRITE.cast_unsigned() as u64;
const COLLAPSE: u64 = libc::MADV_COLLAPSE.cast_unsigned() as u64;

/// Has the calls that free memory asked about, and returns where.
fn filter_this_thread() -> Result<OwnedFd> {
    let load = libc::sock_filter {
        // LD | W | ABS: the call's number is at offset 0.
        code: 0x20,
        jt: 0,
        jf: 0,
        k: 0,
    };
    let asked = [
        libc::SYS_process_madvise,
        libc::SYS_madvise,
        libc::SYS_fallocate,
    ];
    let mut program = vec![load];
    for (number, left) in asked.iter().zip((1..=3u8).rev()) {
        program.push(libc::sock_filter {
            // JMP | JEQ | K: to the last instruction if it is this one.
            code: 0x15,
            jt: left,
            jf: 0,
            k: u32::try_from(*number).unwrap_or(u32::MAX),
        });
    }
    for k in [libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_USER_NOTIF] {
        program.push(libc::sock_filter {
            // RET | K
            code: 0x06,
            jt: 0,
            jf: 0,
            k,
        });
    }
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap_or(0),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: prctl takes integers here.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(VmmError::last_os("cannot give up new privileges"));
    }
    // SAFETY: the program lives across the call, and its length is right.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const filter,
        )
    };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
    let fd = fd.ok_or_else(|| VmmError::last_os("cannot filter system calls"))?;
    // SAFETY: the kernel just returned this descriptor to us, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Answers until no thread has the filter any more.
fn supervise(listener: &OwnedFd, faults: &Faults) -> Result<()> {
    loop {
        let mut polled = libc::pollfd {
            fd: listener.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, which lives across the call.
        unsafe { libc::poll(&raw mut polled, 1, 5) };
        let mut state = faults.0.lock();
        let all = std::mem::take(&mut state.released);
        let ends = |since: &Instant| all || since.elapsed() > MAX_HOLD;
        for (id, _) in state.held.extract_if(.., |(_, since)| ends(since)) {
            answer(listener, id, None);
        }
        if polled.revents & libc::POLLIN == 0 {
            if polled.revents & libc::POLLHUP != 0 {
                return Ok(());
            }
            continue;
        }
        let mut asked = Notification::default();
        // SAFETY: the structure is zeroed, of the size that the request says, and lives across the call.
        if unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_RECV, &raw mut asked) } != 0 {
            match std::io::Error::last_os_error().raw_os_error() {
                // The thread that asked is gone.
                Some(libc::ENOENT | libc::EINTR) => continue,
                _ => return Err(VmmError::last_os("cannot learn of a system call")),
            }
        }
        let call = call_of(&asked.data);
        let verdict = match (&call, &mut state.judge) {
            (Some(call), Some(judge)) => judge(call),
            _ => Verdict::Allow,
        };
        match (verdict, &call) {
            (Verdict::Fail(errno), _) => answer(listener, asked.id, Some((0, -errno))),
            (Verdict::Partly(count), Some(Call::ProcessMadvise(ranges))) => {
                let bytes = in_its_place(ranges.get(..count).unwrap_or(ranges));
                answer(listener, asked.id, Some((bytes, 0)));
            }
            (Verdict::Hold, _) => state.held.push((asked.id, Instant::now())),
            (Verdict::Allow | Verdict::Partly(_), _) => answer(listener, asked.id, None),
        }
        if let (Some(call), true) = (call, state.judge.is_some()) {
            state.made.push((call, verdict));
        }
    }
}

/// What is asked about, if it is to free memory. Runtimes have other uses for madvise.
fn call_of(data: &Data) -> Option<Call> {
    let [first, second, third, fourth, ..] = data.args;
    match i64::from(data.number) {
        libc::SYS_process_madvise if fourth == DONTNEED => {
            let vector = second as *const libc::iovec;
            let count = usize::try_from(third).ok()?;
            // SAFETY: the library handed this vector to the kernel and waits for our answer.
            let ranges = unsafe { std::slice::from_raw_parts(vector, count) };
            let range = |range: &libc::iovec| (range.iov_base as u64, range.iov_len as u64);
            Some(Call::ProcessMadvise(ranges.iter().map(range).collect()))
        }
        libc::SYS_madvise if third == DONTNEED || third == REMOVE => {
            Some(Call::Madvise(first, second))
        }
        libc::SYS_madvise if third == POPULATE_WRITE || third == COLLAPSE => {
            Some(Call::Restore(first, second))
        }
        libc::SYS_fallocate => Some(Call::PunchHole(third, fourth)),
        _ => None,
    }
}

/// Frees ranges in place of the thread that asked; returns how many bytes that was.
fn in_its_place(ranges: &[(u64, u64)]) -> i64 {
    let mut bytes = 0;
    for (start, len) in ranges {
        let length = usize::try_from(*len).unwrap_or(0);
        // SAFETY: the library is about to discard just this range, and waits for our answer.
        let result = unsafe { libc::madvise(*start as *mut _, length, libc::MADV_DONTNEED) };
        assert_eq!(result, 0, "{start:#x}, {len:#x}");
        bytes += i64::try_from(*len).unwrap_or(0);
    }
    bytes
}

/// Answers with a value or a negative errno; `None` has the kernel make the call.
fn answer(listener: &OwnedFd, id: u64, result: Option<(i64, i32)>) {
    let (value, error) = result.unwrap_or((0, 0));
    let response = Response {
        id,
        value,
        error,
        flags: if result.is_none() {
            RESPONSE_CONTINUE
        } else {
            0
        },
    };
    // SAFETY: the structure is of the size that the request says and lives across the call. It fails only if
    // the thread that asked is gone.
    unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_SEND, &raw const response) };
}
