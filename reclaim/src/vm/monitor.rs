//! A conversation in the dialect of QEMU's monitor (QMP), as QEMU and `aerostat-vhost-user` speak it.
//!
//! One JSON object on each line: a greeting first, then commands and their answers in order, with
//! events in between at any time. The client blocks, and never longer than the time it was given.
//!
//! A command whose answer did not arrive in time leaves the conversation in an unknown state, so
//! further commands are refused then. Events that arrive while an answer is awaited are kept, up to
//! a bound, for [`Monitor::next_event`].

use std::{collections::VecDeque, path::Path, time::Duration};

use rustix::net::SocketType;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    VmError,
    socket::{Deadline, Socket},
    wire::BalloonEvent,
};

/// Longest line accepted from the peer: far above a status with a thousand nodes, and a bound on
/// what a faulty peer can make this process hold.
const LINE_LIMIT_BYTES: usize = 4 << 20;

/// Events kept while nobody asks for them; the oldest is dropped first, because each one carries
/// the whole state.
const EVENT_LIMIT: usize = 1024;

/// Lines that are not the awaited answer, after which a peer is taken for a babbler.
const BABBLE_LIMIT: usize = 10_000;

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
    seconds: i64,
    #[serde(default)]
    microseconds: i64,
}

/// A connection to one monitor.
#[derive(Debug)]
pub(super) struct Monitor {
    socket: Socket,
    timeout: Duration,
    received: Vec<u8>,
    events: VecDeque<BalloonEvent>,
    broken: bool,
}

impl Monitor {
    /// Connects and completes the greeting; `timeout` then bounds every command.
    pub(super) fn connect(path: &Path, timeout: Duration) -> Result<Self, VmError> {
        let mut monitor = Self {
            socket: Socket::connect(path, SocketType::STREAM)?,
            timeout,
            received: Vec::new(),
            events: VecDeque::new(),
            broken: false,
        };
        match monitor.receive(&mut Deadline::after(timeout))? {
            Some(Message::Greeting { .. }) => {}
            Some(_) => return Err(monitor.malformed("no greeting".to_owned())),
            None => return Err(monitor.timed_out("the connection", timeout)),
        }
        let _: Value = monitor.execute("qmp_capabilities", None)?;
        Ok(monitor)
    }

    pub(super) fn path(&self) -> &Path {
        self.socket.path()
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(super) fn peer_pid(&self) -> Option<u32> {
        self.socket.peer_pid()
    }

    /// The next event, kept or new; `None` if none came in time.
    pub(super) fn next_event(&mut self, wait: Duration) -> Result<Option<BalloonEvent>, VmError> {
        self.check_usable()?;
        let mut deadline = Deadline::after(wait);
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.receive(&mut deadline)? {
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

    pub(super) fn execute<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Option<Value>,
    ) -> Result<T, VmError> {
        self.execute_within(command, arguments, self.timeout)
    }

    pub(super) fn execute_within<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Option<Value>,
        patience: Duration,
    ) -> Result<T, VmError> {
        self.check_usable()?;
        let mut request = json!({ "execute": command });
        if let (Some(arguments), Some(members)) = (arguments, request.as_object_mut()) {
            members.insert("arguments".to_owned(), arguments);
        }
        let mut deadline = Deadline::after(patience);
        self.send(&request)?;
        for _ in 0..BABBLE_LIMIT {
            match self.receive(&mut deadline)? {
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
                    return Err(VmError::Refused {
                        path: self.path().to_owned(),
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
        Err(self.malformed(format!("{BABBLE_LIMIT} events and no answer to {command}")))
    }

    /// A failure that the protocol did not foresee: nothing more is said on this connection.
    pub(super) fn malformed(&mut self, detail: String) -> VmError {
        self.broken = true;
        VmError::Malformed {
            path: self.path().to_owned(),
            detail,
        }
    }

    fn check_usable(&self) -> Result<(), VmError> {
        if self.broken {
            return Err(VmError::Broken {
                path: self.path().to_owned(),
            });
        }
        Ok(())
    }

    fn send(&mut self, request: &Value) -> Result<(), VmError> {
        let mut line = request.to_string();
        line.push('\n');
        let sent = self.socket.send(line.as_bytes(), self.timeout);
        self.broken |= sent.is_err();
        sent
    }

    /// Reads the next message; `None` when the deadline has passed.
    fn receive(&mut self, deadline: &mut Deadline) -> Result<Option<Message>, VmError> {
        let mut searched = 0;
        loop {
            let end = self
                .received
                .iter()
                .skip(searched)
                .position(|byte| *byte == b'\n');
            if let Some(end) = end {
                let line: Vec<u8> = self.received.drain(..=searched + end).collect();
                searched = 0;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return match serde_json::from_slice(&line) {
                    Ok(message) => Ok(Some(message)),
                    Err(error) => Err(self.malformed(error.to_string())),
                };
            }
            searched = self.received.len();
            if searched > LINE_LIMIT_BYTES {
                return Err(self.malformed(format!("a line above {LINE_LIMIT_BYTES} bytes")));
            }
            match self.socket.fill(&mut self.received, 16 << 10, deadline) {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) => {
                    self.broken = true;
                    return Err(error);
                }
            }
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
        // QEMU writes -1 where it could not read the clock.
        let micros = |value: i64| u64::try_from(value).unwrap_or(0);
        let unix_micros = micros(timestamp.seconds)
            .saturating_mul(1_000_000)
            .saturating_add(micros(timestamp.microseconds));
        self.events.push_back(BalloonEvent {
            left_bytes,
            unix_micros,
        });
    }

    fn timed_out(&mut self, command: &str, waited: Duration) -> VmError {
        self.broken = true;
        VmError::Timeout {
            path: self.path().to_owned(),
            command: command.to_owned(),
            waited,
        }
    }
}
