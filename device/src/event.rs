//! Eventfds: how kicks arrive and how the library signals (eventfd(2)).
//!
//! User-Mode Linux cannot get SIGIO from eventfds, so the interrupts of its virtio_uml driver arrive
//! on what it calls pipes, which are UNIX stream sockets: eight bytes on one are taken as on an eventfd.
#![allow(unsafe_code, reason = "an eventfd is written through its descriptor")]

mod shared;

use crate::error::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// An eventfd, or what a VMM has in place of one, that this library signals.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
    by: By,
}

/// How it is signalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Write,
    /// A socket, where a write would raise SIGPIPE if the other end is gone.
    Send,
    /// An eventfd that is shared with somebody who may make it blocking again.
    Kernel,
}

/// Who else has the eventfds that a device signals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharer {
    /// Somebody who leaves them non-blocking, as the VMM does that links this library.
    #[default]
    Trusted,
    /// A peer that may do anything to them, as a vhost-user front-end may. What such a peer can have whoever
    /// writes to it wait on is refused: pipes, and sockets other than UNIX stream sockets.
    Untrusted,
}

impl EventFd {
    /// Takes over `fd`, which has to be an eventfd, a pipe or a socket, and makes it non-blocking:
    /// what nobody reads must not stop a worker. Errors call it `what`.
    ///
    /// # Errors
    /// It is something else, or what `sharer` could have others wait on.
    pub fn new(what: &'static str, fd: OwnedFd, sharer: Sharer) -> Result<Self> {
        let by = match sharer {
            Sharer::Trusted if is_socket(&fd) => By::Send,
            Sharer::Trusted if is_eventfd(&fd) || is_pipe(&fd) => By::Write,
            Sharer::Untrusted if is_eventfd(&fd) => By::Kernel,
            Sharer::Untrusted if is_unix_stream(&fd) => By::Send,
            _ => {
                let expected = match sharer {
                    Sharer::Trusted => "an eventfd, the writing end of a pipe, or a socket",
                    Sharer::Untrusted => "an eventfd or a UNIX stream socket",
                };
                return Err(Error::BadFd {
                    what,
                    fd: fd.as_raw_fd(),
                    expected,
                });
            }
        };
        set_nonblocking(&fd)?;
        Ok(Self { fd, by })
    }

    /// An eventfd of our own.
    pub(crate) fn create() -> Result<Self> {
        use std::os::fd::FromRawFd;
        // SAFETY: eventfd takes two integers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(Error::last_os("cannot create an eventfd"));
        }
        Ok(Self {
            // SAFETY: the kernel just returned this descriptor to us, and nobody else owns it.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
            by: By::Write,
        })
    }

    /// Adds one to the counter. A full counter or pipe (EAGAIN) has been signalled already.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        let (raw, bytes) = (self.fd.as_raw_fd(), one.as_ptr().cast());
        match self.by {
            By::Send => {
                let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                // SAFETY: sends 8 bytes from a live array to an open descriptor.
                unsafe { libc::send(raw, bytes, one.len(), flags) };
            }
            By::Kernel if shared::signal(self.as_fd()) => {}
            By::Kernel | By::Write => {
                // SAFETY: writes 8 bytes from a live array to an open descriptor.
                unsafe { libc::write(raw, bytes, one.len()) };
            }
        }
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.fd)
    }
}

impl Sharer {
    /// Sets up what signalling takes, once a process, so that no worker has to.
    pub(crate) fn prepare(self) {
        if self == Self::Untrusted {
            shared::prepare();
        }
    }
}

/// Refuses what is not an eventfd.
pub(crate) fn check_eventfd(what: &'static str, fd: &OwnedFd) -> Result<()> {
    let expected = "an eventfd";
    is_eventfd(fd).then_some(()).ok_or(Error::BadFd {
        what,
        fd: fd.as_raw_fd(),
        expected,
    })
}

/// Without /proc, as in a jail, every descriptor that is no file of any kind has to do: those are
/// eventfds and their like.
fn is_eventfd(fd: &OwnedFd) -> bool {
    match std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())) {
        Ok(info) => info.lines().any(|line| line.starts_with("eventfd-count:")),
        Err(_) => file_type(fd) == Some(0),
    }
}

fn is_pipe(fd: &OwnedFd) -> bool {
    file_type(fd) == Some(libc::S_IFIFO)
}

fn is_socket(fd: &OwnedFd) -> bool {
    file_type(fd) == Some(libc::S_IFSOCK)
}

/// Those of other kinds have a lock that a send waits for, whatever its flags, and that their owner can hold on
/// to (TCP's), or linger when they are closed.
fn is_unix_stream(fd: &OwnedFd) -> bool {
    let is = |option, value| socket_option(fd, option) == Some(value);
    is(libc::SO_DOMAIN, libc::AF_UNIX) && is(libc::SO_TYPE, libc::SOCK_STREAM)
}

/// `None` for what is not a socket.
fn socket_option(fd: &OwnedFd, option: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut bytes: libc::socklen_t = 4;
    // SAFETY: the kernel writes at most four bytes to `value`, which has four; both live across the call.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut bytes,
        )
    };
    (result == 0).then_some(value)
}

/// The type bits of the file's mode; zero for what is not a file.
fn file_type(fd: &OwnedFd) -> Option<libc::mode_t> {
    let mut stat = std::mem::MaybeUninit::<libc::stat64>::zeroed();
    // SAFETY: the buffer is large enough for a stat64, which the call fills.
    if unsafe { libc::fstat64(fd.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: zeroed memory is a valid stat64, and the call filled it.
    Some(unsafe { stat.assume_init() }.st_mode & libc::S_IFMT)
}

fn set_nonblocking(fd: &OwnedFd) -> Result<()> {
    let raw = fd.as_raw_fd();
    // SAFETY: fcntl(F_GETFL) and fcntl(F_SETFL) take no pointers.
    let done = unsafe {
        let flags = libc::fcntl(raw, libc::F_GETFL);
        flags >= 0 && libc::fcntl(raw, libc::F_SETFL, flags | libc::O_NONBLOCK) >= 0
    };
    if done {
        Ok(())
    } else {
        Err(Error::last_os("cannot make an eventfd non-blocking"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_takes_signals_and_may_lose_its_reader() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let event = EventFd::new("call", ours.into(), Sharer::Untrusted).unwrap();
        event.signal();
        let mut bytes = [0; 8];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 1);
        // Nobody reads: it must neither wait nor raise a signal.
        (0..100_000).for_each(|_| event.signal());
        drop(theirs);
        event.signal();
    }

    #[test]
    fn eventfds_are_told_from_files_without_proc_too() {
        let event = EventFd::create().unwrap();
        assert!(is_eventfd(&event.fd) && file_type(&event.fd) == Some(0));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_ne!(file_type(&file.into()), Some(0));
    }

    #[test]
    fn files_are_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(EventFd::new("call", file.into(), Sharer::Trusted).is_err());
    }

    #[test]
    fn sockets_are_taken_from_a_peer_only_if_nothing_waits_for_them() {
        let others = || -> [OwnedFd; 3] {
            [
                std::net::TcpListener::bind("127.0.0.1:0").unwrap().into(),
                std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into(),
                std::os::unix::net::UnixDatagram::unbound().unwrap().into(),
            ]
        };
        for (sharer, taken) in [(Sharer::Trusted, true), (Sharer::Untrusted, false)] {
            for socket in others() {
                assert_eq!(EventFd::new("call", socket, sharer).is_ok(), taken);
            }
        }
    }

    #[test]
    fn pipes_are_taken_from_those_only_who_leave_them_non_blocking() {
        for (sharer, taken) in [(Sharer::Trusted, true), (Sharer::Untrusted, false)] {
            let (_, pipe) = std::io::pipe().unwrap();
            assert_eq!(EventFd::new("call", pipe.into(), sharer).is_ok(), taken);
        }
    }
}
