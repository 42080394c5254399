//! One client's connection: lines in, answers and events out.

use super::Shared;
use super::commands::{execute, left_bytes};
use super::lines::{Line, Lines, MAX_LINE_BYTES};
use super::qmp::{Failure, answer, balloon_change, greeting, parse};
use crate::wake::{Wake, is_ready, wait};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde_json::Value;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a client may leave an answer unread before it is left.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// No more than one BALLOON_CHANGE in this time; the last one is always sent. As in QEMU.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// Serves a client until it goes, stops reading, or the process ends.
pub(super) fn serve(stream: &UnixStream, shared: &Shared) {
    let end = Client::new(stream, shared).and_then(|(mut client, changes)| client.run(&changes));
    if let Err(error) = end {
        log::debug!("{}: a control client is gone: {error}", shared.vm.name);
    }
}

/// The state of a connection.
#[derive(Debug)]
struct Client<'a> {
    stream: &'a UnixStream,
    shared: &'a Shared,
    negotiated: bool,
    lines: Lines,
    /// A change that the client has not been told of.
    change: bool,
    last_event: Option<Instant>,
}

impl<'a> Client<'a> {
    fn new(stream: &'a UnixStream, shared: &'a Shared) -> io::Result<(Self, std::sync::Arc<Wake>)> {
        let client = Self {
            stream,
            shared,
            negotiated: false,
            lines: Lines::default(),
            change: false,
            last_event: None,
        };
        Ok((client, shared.vm.watch_actual()?))
    }

    fn run(&mut self, changes: &Wake) -> io::Result<()> {
        self.send(&greeting())?;
        let mut buffer = vec![0; 4096];
        loop {
            let mut fds = [
                PollFd::new(&*self.shared.shutdown, PollFlags::IN),
                PollFd::new(self.stream, PollFlags::IN),
                PollFd::new(changes, PollFlags::IN),
            ];
            wait(&mut fds, self.time_to_event())?;
            let [shutdown, input, _] = fds.map(|fd| is_ready(&fd));
            if shutdown {
                return Ok(());
            }
            self.change |= changes.take() && self.negotiated;
            if self.time_to_event() == Some(Duration::ZERO) {
                self.send_event()?;
            }
            if input && !self.receive(&mut buffer)? {
                return Ok(());
            }
        }
    }

    /// Takes in what the client sent, and does it; false at the client's end.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let count = match rustix::net::recv(self.stream, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Ok(false),
            Ok((_, count)) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        for line in self.lines.feed(buffer.get(..count).unwrap_or_default()) {
            if let Some(answer) = self.answer(&line) {
                self.send(&answer)?;
            }
        }
        Ok(true)
    }

    fn answer(&mut self, line: &Line) -> Option<Value> {
        let line = match line {
            Line::TooLong => {
                let failure =
                    Failure::generic(format!("a line is longer than {MAX_LINE_BYTES} bytes"));
                return Some(answer(Err(failure), None));
            }
            Line::Complete(line) if line.trim_ascii().is_empty() => return None,
            Line::Complete(line) => line,
        };
        Some(match parse(line) {
            Err((failure, id)) => answer(Err(failure), id),
            Ok(mut command) => {
                let id = command.id.take();
                answer(execute(self.shared, command, &mut self.negotiated), id)
            }
        })
    }

    /// How long until an event is due; `None` if there is none to send.
    fn time_to_event(&self) -> Option<Duration> {
        let due = |last: Instant| EVENT_INTERVAL.saturating_sub(last.elapsed());
        self.change
            .then(|| self.last_event.map_or(Duration::ZERO, due))
    }

    fn send_event(&mut self) -> io::Result<()> {
        self.change = false;
        self.last_event = Some(Instant::now());
        // Without a guest there is nothing left to anybody, and no event either.
        match left_bytes(&self.shared.vm) {
            Ok(left) => self.send(&balloon_change(left)),
            Err(_) => Ok(()),
        }
    }

    /// Sends a value as a line; fails if the client does not read.
    fn send(&self, value: &Value) -> io::Result<()> {
        let text = format!("{value}\r\n");
        let deadline = Instant::now() + WRITE_TIMEOUT;
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            match rustix::net::send(self.stream, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait_for_room(deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn wait_for_room(&self, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [
            PollFd::new(self.stream, PollFlags::OUT),
            PollFd::new(&*self.shared.shutdown, PollFlags::IN),
        ];
        wait(&mut fds, Some(left))?;
        if left.is_zero() || is_ready(&fds[1]) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}
