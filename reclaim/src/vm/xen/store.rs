//! A client of xenstore, by its wire protocol: as much as balloon keys need.
//!
//! Each message is a header of four 32-bit words in the machine's order (type, request, transaction,
//! length) and up to 4096 bytes. Texts end in a zero byte in requests that are followed by others.
//!
//! Source: `xen/include/public/io/xs_wire.h`, `docs/misc/xenstore.txt`.

use std::{path::Path, time::Duration};

use rustix::net::SocketType;

use super::super::{
    VmError,
    socket::{Deadline, Socket},
};

/// The most that a message may carry.
const PAYLOAD_LIMIT_BYTES: usize = 4096;
const HEADER_BYTES: usize = 16;

/// Kinds of messages.
pub(super) mod kind {
    pub(in super::super) const DIRECTORY: u32 = 1;
    pub(in super::super) const READ: u32 = 2;
    pub(in super::super) const WRITE: u32 = 11;
    pub(in super::super) const REMOVE: u32 = 13;
    pub(in super::super) const WATCH_EVENT: u32 = 15;
    pub(in super::super) const ERROR: u32 = 16;
}

/// A connection to xenstored.
#[derive(Debug)]
pub(super) struct Store {
    socket: Socket,
    timeout: Duration,
    request: u32,
    received: Vec<u8>,
    broken: bool,
}

impl Store {
    pub(super) fn connect(path: &Path, timeout: Duration) -> Result<Self, VmError> {
        Ok(Self {
            socket: Socket::connect(path, SocketType::STREAM)?,
            timeout,
            request: 0,
            received: Vec::new(),
            broken: false,
        })
    }

    pub(super) fn path(&self) -> &Path {
        self.socket.path()
    }

    /// A key's value; `None` if there is no such key.
    pub(super) fn read(&mut self, key: &str) -> Result<Option<String>, VmError> {
        let answer = self.exchange(kind::READ, key, &terminated(key))?;
        Ok(answer.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Names below a key; none if there is no such key.
    pub(super) fn directory(&mut self, key: &str) -> Result<Vec<String>, VmError> {
        let answer = self.exchange(kind::DIRECTORY, key, &terminated(key))?;
        let text = String::from_utf8_lossy(&answer.unwrap_or_default()).into_owned();
        let names = text.split('\0').filter(|name| !name.is_empty());
        Ok(names.map(str::to_owned).collect())
    }

    /// Writes a key, and makes it if need be.
    pub(super) fn write(&mut self, key: &str, value: &str) -> Result<(), VmError> {
        let mut payload = terminated(key);
        payload.extend(value.as_bytes());
        match self.exchange(kind::WRITE, key, &payload)? {
            Some(_) => Ok(()),
            None => Err(self.refused(key, "ENOENT")),
        }
    }

    /// Removes a key, if it is there.
    pub(super) fn remove(&mut self, key: &str) -> Result<(), VmError> {
        self.exchange(kind::REMOVE, key, &terminated(key)).map(drop)
    }

    /// Sends a request and waits for its answer; `None` is ENOENT.
    fn exchange(
        &mut self,
        kind: u32,
        key: &str,
        payload: &[u8],
    ) -> Result<Option<Vec<u8>>, VmError> {
        if self.broken {
            return Err(VmError::Broken {
                path: self.path().to_owned(),
            });
        }
        // Whatever goes wrong on the way: the stream is in an unknown state then.
        self.broken = true;
        self.request = self.request.wrapping_add(1);
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if payload.len() > PAYLOAD_LIMIT_BYTES {
            return Err(self.malformed(format!("{key}: a request of {length} bytes")));
        }
        let mut message = Vec::with_capacity(HEADER_BYTES + payload.len());
        for word in [kind, self.request, 0, length] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload);
        self.socket.send(&message, self.timeout)?;
        let mut deadline = Deadline::after(self.timeout);
        loop {
            let (answered, request, body) = self.message(key, &mut deadline)?;
            match answered {
                // Nobody here watches anything; a stray event is not an answer.
                kind::WATCH_EVENT => {}
                _ if request != self.request => {
                    return Err(self.malformed(format!("an answer to request {request}")));
                }
                kind::ERROR => {
                    self.broken = false;
                    let text = String::from_utf8_lossy(&body)
                        .trim_end_matches('\0')
                        .to_owned();
                    return match text.as_str() {
                        "ENOENT" => Ok(None),
                        text => Err(self.refused(key, text)),
                    };
                }
                answered if answered == kind => {
                    self.broken = false;
                    return Ok(Some(body));
                }
                answered => {
                    return Err(self.malformed(format!("an answer of kind {answered} to {kind}")));
                }
            }
        }
    }

    fn message(
        &mut self,
        key: &str,
        deadline: &mut Deadline,
    ) -> Result<(u32, u32, Vec<u8>), VmError> {
        self.fill_to(HEADER_BYTES, key, deadline)?;
        let word = |index: usize| {
            let bytes = self.received.iter().skip(index * 4).take(4).copied();
            let mut word = [0; 4];
            word.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
            u32::from_ne_bytes(word)
        };
        let (kind, request, length) = (word(0), word(1), word(3));
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > PAYLOAD_LIMIT_BYTES {
            return Err(self.malformed(format!("a message of {length} bytes")));
        }
        self.fill_to(HEADER_BYTES + length, key, deadline)?;
        let body = self
            .received
            .drain(..HEADER_BYTES + length)
            .skip(HEADER_BYTES)
            .collect();
        Ok((kind, request, body))
    }

    fn fill_to(&mut self, bytes: usize, key: &str, deadline: &mut Deadline) -> Result<(), VmError> {
        while self.received.len() < bytes {
            if !self
                .socket
                .fill(&mut self.received, PAYLOAD_LIMIT_BYTES, deadline)?
            {
                return Err(VmError::Timeout {
                    path: self.path().to_owned(),
                    command: key.to_owned(),
                    waited: self.timeout,
                });
            }
        }
        Ok(())
    }

    pub(super) fn refused(&self, key: &str, text: &str) -> VmError {
        VmError::Refused {
            path: self.path().to_owned(),
            command: key.to_owned(),
            class: "xenstore".to_owned(),
            description: text.chars().take(80).collect(),
        }
    }

    fn malformed(&self, detail: String) -> VmError {
        VmError::Malformed {
            path: self.path().to_owned(),
            detail,
        }
    }
}

fn terminated(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}
