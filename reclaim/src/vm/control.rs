//! Client of the control socket of `aerostat-vhost-user`.
//!
//! A UNIX stream socket that speaks the QMP dialect: one JSON object on each line, a greeting
//! first, then commands and their answers in order, with events in between at any time. The client
//! blocks, and never longer than the time it was given.
//!
//! A command whose answer did not arrive in time leaves the conversation in an unknown state, so
//! the client refuses further commands then; connect again. Events that arrive while an answer is
//! awaited are kept, up to a bound, for [`ControlClient::next_event`].
//!
//! ```no_run
//! use std::{path::Path, time::Duration};
//! use aerostat_reclaim::vm::ControlClient;
//!
//! let mut vm = ControlClient::connect(Path::new("/run/vm1.sock"), Duration::from_secs(2))?;
//! vm.set_target(256 << 20)?;
//! println!("{} bytes are in the balloon", vm.query()?.ballooned_bytes);
//! # Ok::<(), aerostat_reclaim::vm::ControlError>(())
//! ```

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::wire::{BalloonEvent, DeviceStatus, GuestStats, Hints, HistoryEntry};

/// Longest line accepted from the peer: far above a status with a thousand nodes, and a bound on
/// what a faulty peer can make this process hold.
const LINE_LIMIT_BYTES: usize = 4 << 20;

/// Events kept while nobody asks for them; the oldest is dropped first, because each one carries
/// the whole state.
const EVENT_LIMIT: usize = 1024;

/// What can go wrong on a control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket cannot be reached, or reading or writing failed.
    #[error("control socket {path}: {action} failed")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// No answer came in time.
    #[error("control socket {path}: no answer to {command} within {} ms", waited.as_millis())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The command that was sent.
        command: String,
        /// How long the client waited.
        waited: Duration,
    },
    /// The peer closed the connection.
    #[error("control socket {path}: closed by the peer")]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// The peer refused the command.
    #[error("control socket {path}: {command} refused: {description}")]
    Refused {
        /// The socket.
        path: PathBuf,
        /// The command that was sent.
        command: String,
        /// The error class the peer gave.
        class: String,
        /// The reason the peer gave.
        description: String,
    },
    /// The peer sent something that is not part of the dialect.
    #[error("control socket {path}: unexpected data: {detail}")]
    Malformed {
        /// The socket.
        path: PathBuf,
        /// What was wrong with it.
        detail: String,
    },
    /// An earlier command was left without an answer.
    #[error("control socket {path}: the conversation was broken off; connect again")]
    Broken {
        /// The socket.
        path: PathBuf,
    },
}

/// One line from the peer.
#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Return {
        #[serde(rename = "return")]
        value: Value,
    },
    Error {
        error: PeerError,
    },
    Event {
        event: String,
        #[serde(default)]
        data: Value,
        #[serde(default)]
        timestamp: Timestamp,
    },
    Greeting {
        #[serde(rename = "QMP")]
        _version: Value,
    },
}

#[derive(Deserialize)]
struct PeerError {
    #[serde(default)]
    class: String,
    #[serde(default, rename = "desc")]
    description: String,
}

#[derive(Default, Deserialize)]
struct Timestamp {
    #[serde(default)]
    seconds: u64,
    #[serde(default)]
    microseconds: u64,
}

/// A connection to one device's control socket.
#[derive(Debug)]
pub struct ControlClient {
    path: PathBuf,
    stream: UnixStream,
    timeout: Duration,
    received: Vec<u8>,
    events: VecDeque<BalloonEvent>,
    broken: bool,
}

impl ControlClient {
    /// Connects and completes the greeting; `timeout` then bounds every command.
    ///
    /// # Errors
    /// The socket does not exist, nobody listens, or the peer does not speak the dialect.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ControlError> {
        let stream = UnixStream::connect(path).map_err(|source| ControlError::Io {
            path: path.to_owned(),
            action: "connect",
            source,
        })?;
        let mut client = Self {
            path: path.to_owned(),
            stream,
            timeout,
            received: Vec::new(),
            events: VecDeque::new(),
            broken: false,
        };
        match client.receive(Instant::now() + timeout)? {
            Some(Message::Greeting { .. }) => {}
            Some(_) => return Err(client.malformed("no greeting".to_owned())),
            None => return Err(client.timed_out("the connection", timeout)),
        }
        let _: Value = client.execute("qmp_capabilities", None)?;
        Ok(client)
    }

    /// The socket this client is connected to.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Memory left to the guest, as QMP tools ask for it.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn query_balloon_left_bytes(&mut self) -> Result<u64, ControlError> {
        #[derive(Deserialize)]
        struct Left {
            actual: u64,
        }
        self.execute::<Left>("query-balloon", None)
            .map(|left| left.actual)
    }

    /// Sets the target by the memory to be left to the guest, as QMP tools do.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn balloon_leave_bytes(&mut self, left_bytes: u64) -> Result<(), ControlError> {
        self.execute::<Value>("balloon", Some(json!({ "value": left_bytes })))
            .map(drop)
    }

    /// Sets how large the balloon should be.
    ///
    /// The device accepts the target at once; the guest follows in its own time.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn set_target(&mut self, ballooned_bytes: u64) -> Result<(), ControlError> {
        let arguments = json!({ "bytes": ballooned_bytes });
        self.execute::<Value>("aerostat-set-target", Some(arguments))
            .map(drop)
    }

    /// The device's state, sizes and counters.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn query(&mut self) -> Result<DeviceStatus, ControlError> {
        self.execute("aerostat-query", None)
    }

    /// Asks the guest for fresh statistics and waits for them up to `wait`.
    ///
    /// # Errors
    /// See [`ControlError`]; in particular the device refuses if the guest's driver does not answer.
    pub fn guest_stats(&mut self, wait: Duration) -> Result<GuestStats, ControlError> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let arguments = json!({ "timeout-ms": wait_ms });
        let patience = wait.saturating_add(self.timeout);
        self.execute_within("aerostat-guest-stats", Some(arguments), patience)
    }

    /// Begins a round of free page hints, which ends by itself after `limit`. Returns its id.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn start_hints(&mut self, limit: Duration) -> Result<u32, ControlError> {
        #[derive(Deserialize)]
        struct Started {
            id: u32,
        }
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let arguments = json!({ "limit-ms": limit_ms });
        self.execute::<Started>("aerostat-hints-start", Some(arguments))
            .map(|started| started.id)
    }

    /// Takes hints that came, as many as one answer holds.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn take_hints(&mut self) -> Result<Hints, ControlError> {
        self.execute("aerostat-hints-take", None)
    }

    /// Ends the round of hints.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn finish_hints(&mut self) -> Result<(), ControlError> {
        self.execute::<Value>("aerostat-hints-finish", None)
            .map(drop)
    }

    /// What happened with the balloon behind entry number `since`.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn history(&mut self, since: u64) -> Result<Vec<HistoryEntry>, ControlError> {
        #[derive(Deserialize)]
        struct Page {
            entries: Vec<HistoryEntry>,
        }
        let arguments = json!({ "since": since });
        self.execute::<Page>("aerostat-history", Some(arguments))
            .map(|page| page.entries)
    }

    /// The next event, kept or new; `None` if none came in time.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn next_event(&mut self, wait: Duration) -> Result<Option<BalloonEvent>, ControlError> {
        self.check_usable()?;
        let deadline = Instant::now() + wait;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.receive(deadline)? {
                None => return Ok(None),
                Some(Message::Event {
                    event,
                    data,
                    timestamp,
                }) => {
                    self.keep_event(&event, &data, &timestamp);
                }
                Some(_) => return Err(self.malformed("an answer nobody asked for".to_owned())),
            }
        }
    }

    fn execute<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Option<Value>,
    ) -> Result<T, ControlError> {
        self.execute_within(command, arguments, self.timeout)
    }

    fn execute_within<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Option<Value>,
        patience: Duration,
    ) -> Result<T, ControlError> {
        self.check_usable()?;
        let mut request = json!({ "execute": command });
        if let (Some(arguments), Some(members)) = (arguments, request.as_object_mut()) {
            members.insert("arguments".to_owned(), arguments);
        }
        let deadline = Instant::now() + patience;
        self.send(&request)?;
        loop {
            match self.receive(deadline)? {
                None => return Err(self.timed_out(command, patience)),
                Some(Message::Event {
                    event,
                    data,
                    timestamp,
                }) => {
                    self.keep_event(&event, &data, &timestamp);
                }
                Some(Message::Return { value }) => {
                    return serde_json::from_value(value)
                        .map_err(|error| self.malformed(format!("answer to {command}: {error}")));
                }
                Some(Message::Error { error }) => {
                    return Err(ControlError::Refused {
                        path: self.path.clone(),
                        command: command.to_owned(),
                        class: error.class,
                        description: error.description,
                    });
                }
                Some(Message::Greeting { .. }) => {
                    return Err(self.malformed("a second greeting".to_owned()));
                }
            }
        }
    }

    fn check_usable(&self) -> Result<(), ControlError> {
        if self.broken {
            return Err(ControlError::Broken {
                path: self.path.clone(),
            });
        }
        Ok(())
    }

    fn send(&mut self, request: &Value) -> Result<(), ControlError> {
        let mut line = request.to_string();
        line.push('\n');
        let sent = self
            .stream
            .set_write_timeout(Some(self.timeout.max(Duration::from_millis(1))))
            .and_then(|()| self.stream.write_all(line.as_bytes()));
        sent.map_err(|source| self.io_error("write", source))
    }

    /// Reads the next message; `None` when the deadline has passed.
    fn receive(&mut self, deadline: Instant) -> Result<Option<Message>, ControlError> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return match serde_json::from_slice(&line) {
                    Ok(message) => Ok(Some(message)),
                    Err(error) => Err(self.malformed(error.to_string())),
                };
            }
            if self.received.len() > LINE_LIMIT_BYTES {
                return Err(self.malformed(format!("a line above {LINE_LIMIT_BYTES} bytes")));
            }
            if !self.fill(deadline)? {
                return Ok(None);
            }
        }
    }

    /// Reads more bytes; false when the deadline has passed.
    fn fill(&mut self, deadline: Instant) -> Result<bool, ControlError> {
        // A time-out of zero would mean "for ever" to the socket, so the least is a millisecond:
        // what has arrived already is read even when the deadline has passed.
        let left = deadline.saturating_duration_since(Instant::now());
        let mut chunk = [0; 4096];
        let read = self
            .stream
            .set_read_timeout(Some(left.max(Duration::from_millis(1))))
            .and_then(|()| self.stream.read(&mut chunk));
        match read {
            Ok(0) => {
                self.broken = true;
                Err(ControlError::Closed {
                    path: self.path.clone(),
                })
            }
            Ok(count) => {
                self.received.extend(chunk.iter().take(count));
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                Ok(Instant::now() < deadline)
            }
            Err(source) => Err(self.io_error("read", source)),
        }
    }

    fn keep_event(&mut self, name: &str, data: &Value, timestamp: &Timestamp) {
        let Some(left_bytes) = data.get("actual").and_then(Value::as_u64) else {
            return;
        };
        if name != "BALLOON_CHANGE" {
            return;
        }
        if self.events.len() == EVENT_LIMIT {
            self.events.pop_front();
        }
        let unix_micros = timestamp
            .seconds
            .saturating_mul(1_000_000)
            .saturating_add(timestamp.microseconds);
        self.events.push_back(BalloonEvent {
            left_bytes,
            unix_micros,
        });
    }

    fn io_error(&mut self, action: &'static str, source: io::Error) -> ControlError {
        self.broken = true;
        ControlError::Io {
            path: self.path.clone(),
            action,
            source,
        }
    }

    fn malformed(&mut self, detail: String) -> ControlError {
        self.broken = true;
        ControlError::Malformed {
            path: self.path.clone(),
            detail,
        }
    }

    fn timed_out(&mut self, command: &str, waited: Duration) -> ControlError {
        self.broken = true;
        ControlError::Timeout {
            path: self.path.clone(),
            command: command.to_owned(),
            waited,
        }
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
