//! A UNIX socket with a deadline on everything and a bound on what is kept of a talkative peer.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
        sockopt::socket_peercred,
    },
};

use super::VmError;

/// When an exchange has to be over, however much the peer has still to say.
#[derive(Debug)]
pub(super) struct Deadline {
    at: Instant,
    over: bool,
}

impl Deadline {
    pub(super) fn after(wait: Duration) -> Self {
        Self {
            at: Instant::now() + wait,
            over: false,
        }
    }

    /// How long the next read may take. The last one is for what arrived in time, while this process
    /// had no processor; none is after it.
    fn left(&mut self) -> Option<Duration> {
        let left = self.at.saturating_duration_since(Instant::now());
        if left.is_zero() && std::mem::replace(&mut self.over, true) {
            return None;
        }
        // Zero would mean "for ever".
        Some(left.max(Duration::from_millis(1)))
    }
}

/// A connected socket.
#[derive(Debug)]
pub(super) struct Socket {
    path: PathBuf,
    stream: UnixStream,
}

impl Socket {
    /// Connects at once or not at all: a peer that hangs with a full queue of connections is an error.
    pub(super) fn connect(path: &Path, kind: SocketType) -> Result<Self, VmError> {
        let fail = |errno: Errno| VmError::Io {
            path: path.to_owned(),
            action: "connect",
            source: errno.into(),
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, kind, flags, None).map_err(fail)?;
        let address = SocketAddrUnix::new(path).map_err(fail)?;
        connect(&socket, &address).map_err(fail)?;
        let stream = UnixStream::from(socket);
        stream
            .set_nonblocking(false)
            .map_err(|source| VmError::Io {
                path: path.to_owned(),
                action: "connect",
                source,
            })?;
        Ok(Self {
            path: path.to_owned(),
            stream,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The process at the other end.
    pub(super) fn peer_pid(&self) -> Option<u32> {
        let credentials = socket_peercred(&self.stream).ok()?;
        u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()
    }

    pub(super) fn send(&mut self, bytes: &[u8], timeout: Duration) -> Result<(), VmError> {
        // Zero would mean "for ever".
        self.stream
            .set_write_timeout(Some(timeout.max(Duration::from_millis(1))))
            .and_then(|()| self.stream.write_all(bytes))
            .map_err(|source| self.io_error("write", source))
    }

    /// Adds what arrives to `received`; false when the deadline has passed, and nothing was read.
    pub(super) fn fill(
        &mut self,
        received: &mut Vec<u8>,
        chunk_bytes: usize,
        deadline: &mut Deadline,
    ) -> Result<bool, VmError> {
        let Some(left) = deadline.left() else {
            return Ok(false);
        };
        let start = received.len();
        received.resize(start + chunk_bytes, 0);
        let read = self.stream.set_read_timeout(Some(left)).and_then(|()| {
            let (_, room) = received.split_at_mut(start);
            self.stream.read(room)
        });
        received.truncate(start + read.as_ref().map_or(0, |count| *count));
        match read {
            Ok(0) => Err(VmError::Closed {
                path: self.path.clone(),
            }),
            Ok(_) => Ok(true),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted
                        | io::ErrorKind::WouldBlock
                        | io::ErrorKind::TimedOut
                ) =>
            {
                Ok(true)
            }
            Err(source) => Err(self.io_error("read", source)),
        }
    }

    fn io_error(&self, action: &'static str, source: io::Error) -> VmError {
        VmError::Io {
            path: self.path.clone(),
            action,
            source,
        }
    }
}
