//! As much HTTP/1.1 as the API sockets of VMMs need: one request, one answer, one connection each.
//!
//! Both servers met here (Cloud Hypervisor, Firecracker) send `Content-Length` whenever there is a
//! body, and keep the connection open after it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::net::SocketType;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    VmError,
    socket::{Deadline, Socket},
};

/// The most accepted of the head of an answer.
const HEAD_LIMIT_BYTES: usize = 16 << 10;
/// The most accepted of its body: a VM's whole configuration is some KiB.
const BODY_LIMIT_BYTES: usize = 1 << 20;
/// Header lines looked at.
const HEADER_LIMIT: usize = 64;

/// A server behind a UNIX socket.
#[derive(Debug)]
pub(super) struct HttpSocket {
    path: PathBuf,
    timeout: Duration,
}

impl HttpSocket {
    pub(super) fn new(path: &Path, timeout: Duration) -> Self {
        Self {
            path: path.to_owned(),
            timeout,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The process that listens.
    pub(super) fn peer_pid(&self) -> Option<u32> {
        let socket = Socket::connect(&self.path, SocketType::STREAM).ok()?;
        socket.peer_pid()
    }

    /// Gets a value.
    pub(super) fn get<T: DeserializeOwned>(&self, resource: &str) -> Result<T, VmError> {
        let body = self.request("GET", resource, None)?;
        serde_json::from_slice(&body)
            .map_err(|error| self.malformed(format!("answer to GET {resource}: {error}")))
    }

    /// Sends a value with `method`.
    pub(super) fn send(&self, method: &str, resource: &str, body: &Value) -> Result<(), VmError> {
        self.request(method, resource, Some(body)).map(drop)
    }

    fn request(
        &self,
        method: &str,
        resource: &str,
        body: Option<&Value>,
    ) -> Result<Vec<u8>, VmError> {
        let command = format!("{method} {resource}");
        let mut deadline = Deadline::after(self.timeout);
        let body = body.map(Value::to_string).unwrap_or_default();
        let mut request =
            format!("{command} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
        if !body.is_empty() {
            let length = body.len();
            request.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {length}\r\n"
            ));
        }
        request.push_str("\r\n");
        request.push_str(&body);
        let mut socket = Socket::connect(&self.path, SocketType::STREAM)?;
        socket.send(request.as_bytes(), self.timeout)?;
        let (status, body) = self.answer(&mut socket, &command, &mut deadline)?;
        if (200..300).contains(&status) {
            return Ok(body);
        }
        Err(VmError::Refused {
            path: self.path.clone(),
            command,
            class: status.to_string(),
            description: description(&body),
        })
    }

    fn answer(
        &self,
        socket: &mut Socket,
        command: &str,
        deadline: &mut Deadline,
    ) -> Result<(u16, Vec<u8>), VmError> {
        let mut received = Vec::new();
        let (head_bytes, status, length) = loop {
            if let Some(head) = self.head(&received)? {
                break head;
            }
            if received.len() > HEAD_LIMIT_BYTES {
                return Err(self.malformed(format!("a head above {HEAD_LIMIT_BYTES} bytes")));
            }
            self.fill(socket, &mut received, command, deadline)?;
        };
        if length > BODY_LIMIT_BYTES {
            return Err(self.malformed(format!("a body of {length} bytes")));
        }
        while received.len() < head_bytes + length {
            self.fill(socket, &mut received, command, deadline)?;
        }
        received.truncate(head_bytes + length);
        Ok((status, received.split_off(head_bytes)))
    }

    fn fill(
        &self,
        socket: &mut Socket,
        received: &mut Vec<u8>,
        command: &str,
        deadline: &mut Deadline,
    ) -> Result<(), VmError> {
        if socket.fill(received, 16 << 10, deadline)? {
            return Ok(());
        }
        Err(VmError::Timeout {
            path: self.path.clone(),
            command: command.to_owned(),
            waited: self.timeout,
        })
    }

    /// Length of the head, status, and length of the body; `None` until the head is complete.
    fn head(&self, received: &[u8]) -> Result<Option<(usize, u16, usize)>, VmError> {
        let mut headers = [httparse::EMPTY_HEADER; HEADER_LIMIT];
        let mut response = httparse::Response::new(&mut headers);
        let head_bytes = match response.parse(received) {
            Ok(httparse::Status::Complete(bytes)) => bytes,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(error) => return Err(self.malformed(error.to_string())),
        };
        let mut length = 0;
        for header in response.headers.iter() {
            let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
            if header.name.eq_ignore_ascii_case("content-length") {
                length = value
                    .parse()
                    .map_err(|_| self.malformed("Content-Length is no number".to_owned()))?;
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                return Err(self.malformed(format!("an unknown encoding, {value}")));
            }
        }
        Ok(Some((head_bytes, response.code.unwrap_or(0), length)))
    }

    pub(super) fn malformed(&self, detail: String) -> VmError {
        VmError::Malformed {
            path: self.path.clone(),
            detail,
        }
    }
}

/// What a refusal says: `fault_message` of Firecracker, a list of sentences of Cloud Hypervisor.
fn description(body: &[u8]) -> String {
    let text = match serde_json::from_slice::<Value>(body) {
        Ok(Value::Object(members)) => members
            .get("fault_message")
            .and_then(Value::as_str)
            .map(str::to_owned),
        Ok(Value::Array(sentences)) => {
            let sentences: Vec<&str> = sentences.iter().filter_map(Value::as_str).collect();
            Some(sentences.join(": "))
        }
        Ok(_) | Err(_) => None,
    };
    text.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned())
        .chars()
        .take(400)
        .collect()
}
