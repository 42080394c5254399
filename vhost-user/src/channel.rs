//! The two sockets of a session: the front-end's requests, and our own requests to it.
//!
//! Neither is ever waited for without an end: a peer that stops in the middle of a message, or
//! does not read its answers, holds up nothing but its own session, and that one can be ended.

use crate::message::{HEADER_BYTES, Header, MAX_FDS, Malformed, Message, config_change, reply};
use crate::wake::{is_ready, wait};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags,
    SocketType,
};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a front-end may take to read an answer before its session ends. Its socket holds
/// hundreds of answers, so only one that has stopped reading altogether gets here.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a session's main channel is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    #[error("the front-end closed the connection")]
    Closed,
    #[error("the front-end closed the connection in the middle of a message")]
    ClosedMidMessage,
    #[error("more than {MAX_FDS} file descriptors in a message")]
    TooManyFds,
    #[error("the front-end does not read its answers")]
    NotReading,
    #[error("the back-end is shutting down")]
    ShuttingDown,
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the connection failed")]
    Io(#[from] io::Error),
}

impl From<Errno> for ChannelError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            error => Self::Io(error.into()),
        }
    }
}

/// The socket that requests come in on and answers go out on.
#[derive(Debug)]
pub(crate) struct MainChannel {
    socket: UnixStream,
    /// What has come of the message under way.
    header: [u8; HEADER_BYTES],
    parsed: Option<Header>,
    received: usize,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl MainChannel {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            header: [0; HEADER_BYTES],
            parsed: None,
            received: 0,
            payload: Vec::new(),
            fds: Vec::new(),
        }
    }

    /// Takes in what is there; a message once it is complete.
    ///
    /// It never reads past the end of a message, so descriptors cannot be taken for the next one's.
    pub(crate) fn receive(&mut self) -> Result<Option<Message>, ChannelError> {
        loop {
            if let Some(header) = self.parsed {
                if self.received == header.payload_bytes {
                    self.parsed = None;
                    self.received = 0;
                    return Ok(Some(Message {
                        header,
                        payload: std::mem::take(&mut self.payload),
                        fds: std::mem::take(&mut self.fds),
                    }));
                }
            } else if self.received == HEADER_BYTES {
                let header = Header::parse(self.header)?;
                self.payload = vec![0; header.payload_bytes];
                self.parsed = Some(header);
                self.received = 0;
                continue;
            }
            match self.receive_some() {
                Ok(0) if self.parsed.is_none() && self.received == 0 => {
                    return Err(ChannelError::Closed);
                }
                Ok(0) => return Err(ChannelError::ClosedMidMessage),
                Ok(count) => self.received += count,
                Err(ChannelError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(None);
                }
                Err(ChannelError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// One read of what is missing of the header or of the payload.
    fn receive_some(&mut self) -> Result<usize, ChannelError> {
        let target = match self.parsed {
            None => self.header.as_mut_slice(),
            Some(_) => self.payload.as_mut_slice(),
        };
        let missing = target.get_mut(self.received..).unwrap_or_default();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(missing)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )?;
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = part {
                self.fds.extend(fds);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS {
            return Err(ChannelError::TooManyFds);
        }
        Ok(message.bytes)
    }

    /// Answers the request with number `code`. Gives up when `shutdown` becomes readable.
    pub(crate) fn reply(
        &mut self,
        code: u32,
        payload: &[u8],
        shutdown: BorrowedFd<'_>,
    ) -> Result<(), ChannelError> {
        let bytes = reply(code, payload);
        let deadline = Instant::now() + REPLY_TIMEOUT;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match rustix::net::send(
                &self.socket,
                rest,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait_for_room(deadline, shutdown)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn wait_for_room(
        &self,
        deadline: Instant,
        shutdown: BorrowedFd<'_>,
    ) -> Result<(), ChannelError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ChannelError::NotReading);
        }
        let mut fds = [
            PollFd::new(&self.socket, PollFlags::OUT),
            PollFd::from_borrowed_fd(shutdown, PollFlags::IN),
        ];
        wait(&mut fds, Some(left))?;
        if is_ready(&fds[1]) {
            return Err(ChannelError::ShuttingDown);
        }
        Ok(())
    }
}

impl AsFd for MainChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The socket for our own requests (SET_BACKEND_REQ_FD). Only configuration changes go there.
#[derive(Debug)]
pub(crate) struct BackendChannel {
    socket: UnixStream,
    /// What is left of a message that the socket took only a part of.
    unsent: Vec<u8>,
    /// A change that the front-end has to be told of.
    pending: bool,
}

impl BackendChannel {
    /// Takes the descriptor if it is what it should be.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let domain = rustix::net::sockopt::socket_domain(&fd)?;
        let kind = rustix::net::sockopt::socket_type(&fd)?;
        if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
            return Err(io::Error::other("not a UNIX stream socket"));
        }
        Ok(Self {
            socket: fd.into(),
            unsent: Vec::new(),
            pending: false,
        })
    }

    /// Notes that the configuration changed, and sends what can be sent at once. Several changes
    /// that the front-end was not yet told of become one message.
    pub(crate) fn config_changed(&mut self) -> io::Result<()> {
        self.pending = true;
        self.flush()
    }

    /// Whether something waits for room in the socket.
    pub(crate) fn is_blocked(&self) -> bool {
        self.pending || !self.unsent.is_empty()
    }

    /// Sends what waits, as far as there is room.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        loop {
            if self.unsent.is_empty() {
                if !self.pending {
                    return Ok(());
                }
                self.pending = false;
                self.unsent = config_change();
            }
            match rustix::net::send(
                &self.socket,
                &self.unsent,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Throws away what the front-end says here: we ask for no replies. An error is its end.
    pub(crate) fn discard_input(&mut self) -> io::Result<()> {
        let mut buffer = [0_u8; 512];
        match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for BackendChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wake::Wake;
    use std::io::Write;

    fn pair() -> (MainChannel, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (MainChannel::new(ours), theirs)
    }

    #[test]
    fn a_message_is_complete_whatever_pieces_it_comes_in() {
        let (mut channel, mut peer) = pair();
        let bytes = [2_u32, 1, 8, 0xabcd, 0].map(u32::to_ne_bytes).concat();
        for byte in &bytes {
            assert!(channel.receive().unwrap().is_none());
            peer.write_all(&[*byte]).unwrap();
        }
        let message = channel.receive().unwrap().unwrap();
        assert_eq!(message.header.code, 2);
        assert_eq!(message.number().unwrap(), 0xabcd);
        drop(peer);
        assert!(matches!(channel.receive(), Err(ChannelError::Closed)));
    }

    #[test]
    fn death_in_the_middle_of_a_message_is_noticed() {
        let (mut channel, mut peer) = pair();
        peer.write_all(&[2, 0, 0]).unwrap();
        drop(peer);
        assert!(matches!(
            channel.receive(),
            Err(ChannelError::ClosedMidMessage)
        ));
    }

    #[test]
    fn a_front_end_that_does_not_read_can_still_be_left() {
        let (mut channel, _peer) = pair();
        let shutdown = Wake::new().unwrap();
        shutdown.raise();
        let payload = [0; 4096];
        let error = (0..10_000)
            .find_map(|_| channel.reply(24, &payload, shutdown.as_fd()).err())
            .unwrap();
        assert!(matches!(error, ChannelError::ShuttingDown), "{error:?}");
    }

    #[test]
    fn config_changes_merge_while_the_front_end_does_not_read() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut channel = BackendChannel::new(ours.into()).unwrap();
        for _ in 0..100_000 {
            channel.config_changed().unwrap();
        }
        assert!(channel.is_blocked());
        assert!(channel.unsent.len() <= HEADER_BYTES);
        drop(theirs);
        assert!(channel.config_changed().is_err());
    }

    #[test]
    fn only_unix_stream_sockets_become_back_end_channels() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(BackendChannel::new(file.into()).is_err());
        let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(BackendChannel::new(datagram.into()).is_err());
    }
}
