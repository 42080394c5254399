//! Peers for the tests of the clients: VMMs that answer as a handler says, and ones that misbehave.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, socket_with,
};
use serde_json::{Value, json};

/// A peer's socket in a directory of its own, and what it was asked.
#[derive(Debug)]
pub(crate) struct Peer {
    _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
    pub(crate) asked: Arc<Mutex<Vec<String>>>,
}

type Log = Arc<Mutex<Vec<String>>>;

fn listen_on(kind: SocketType, serve: impl Fn(UnixStream, Log) + Send + Sync + 'static) -> Peer {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let asked = Log::default();
    let listener = listener(&path, kind);
    let log = asked.clone();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        while let Ok(stream) = accept(&listener) {
            let (serve, log) = (serve.clone(), log.clone());
            thread::spawn(move || serve(UnixStream::from(stream), log));
        }
    });
    Peer {
        _dir: dir,
        path,
        asked,
    }
}

fn listener(path: &Path, kind: SocketType) -> OwnedFd {
    if kind == SocketType::STREAM {
        return UnixListener::bind(path).unwrap().into();
    }
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 8).unwrap();
    socket
}

/// A monitor: `answer` gets the command and its arguments, and gives the value or a refusal.
pub(crate) fn monitor(
    answer: impl Fn(&str, &Value) -> Result<Value, &'static str> + Send + Sync + 'static,
) -> Peer {
    listen_on(SocketType::STREAM, move |mut stream, log| {
        let greeting = json!({"QMP": {"version": {}, "capabilities": []}});
        if writeln!(stream, "{greeting}").is_err() {
            return;
        }
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        for line in lines.map_while(Result::ok) {
            let request: Value = serde_json::from_str(&line).unwrap();
            log.lock().unwrap().push(line);
            let name = request["execute"].as_str().unwrap_or_default();
            let reply = match name {
                "qmp_capabilities" => json!({"return": {}}),
                name => match answer(name, &request["arguments"]) {
                    Ok(value) => json!({ "return": value }),
                    Err(text) => json!({"error": {"class": "GenericError", "desc": text}}),
                },
            };
            if writeln!(stream, "{reply}").is_err() {
                return;
            }
        }
    })
}

/// An HTTP server: `answer` gets `METHOD /path` and the body.
pub(crate) fn http(answer: impl Fn(&str, &str) -> (u16, String) + Send + Sync + 'static) -> Peer {
    listen_on(SocketType::STREAM, move |mut stream, log| {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        loop {
            let mut head = Vec::new();
            let mut length = 0;
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 {
                    return;
                }
                let line = line.trim_end().to_owned();
                if let Some(value) = line.strip_prefix("Content-Length: ") {
                    length = value.parse().unwrap();
                }
                if line.is_empty() {
                    break;
                }
                head.push(line);
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let body = String::from_utf8(body).unwrap();
            let request = head[0].trim_end_matches(" HTTP/1.1").to_owned();
            log.lock()
                .unwrap()
                .push(format!("{request} {body}").trim().to_owned());
            let (status, text) = answer(&request, &body);
            let length = text.len();
            let head = match text.is_empty() {
                true => {
                    format!("HTTP/1.1 {status} \r\nServer: test\r\nConnection: keep-alive\r\n\r\n")
                }
                false => format!("HTTP/1.1 {status} \r\nContent-Length: {length}\r\n\r\n"),
            };
            if stream.write_all((head + &text).as_bytes()).is_err() {
                return;
            }
        }
    })
}

/// A server of packets: `answer` gets the request.
pub(crate) fn packets(answer: impl Fn(&Value) -> Value + Send + Sync + 'static) -> Peer {
    listen_on(SocketType::SEQPACKET, move |mut stream, log| {
        let mut packet = vec![0; 64 << 10];
        while let Ok(length @ 1..) = stream.read(&mut packet) {
            let request: Value = serde_json::from_slice(&packet[..length]).unwrap();
            log.lock().unwrap().push(request.to_string());
            let reply = answer(&request).to_string();
            if stream.write_all(reply.as_bytes()).is_err() {
                return;
            }
        }
    })
}

/// How a peer can misbehave.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Misdeed {
    /// Accepts and says nothing.
    Hang,
    /// Does not even accept.
    Deaf,
    /// Answers with bytes of no protocol.
    Garbage,
    /// Begins an answer that every one of these protocols could begin with, and stops.
    HalfALine,
    /// Closes at once.
    Close,
    /// Sends for ever without coming to an end.
    Endless,
    /// Sends empty lines: there is always something to read, and never a message.
    Blank,
}

pub(crate) const MISDEEDS: [Misdeed; 7] = [
    Misdeed::Hang,
    Misdeed::Deaf,
    Misdeed::Garbage,
    Misdeed::HalfALine,
    Misdeed::Close,
    Misdeed::Endless,
    Misdeed::Blank,
];

/// A peer that misbehaves from the first moment on.
pub(crate) fn misbehaving(kind: SocketType, misdeed: Misdeed) -> Peer {
    if matches!(misdeed, Misdeed::Deaf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&socket, 1).unwrap();
        // Lives as long as the test program, and never accepts.
        std::mem::forget(socket);
        return Peer {
            _dir: dir,
            path,
            asked: Log::default(),
        };
    }
    listen_on(kind, move |mut stream, _| {
        let half = match kind {
            SocketType::STREAM => r#"{"QMP":{"version":"#,
            _ => r#"{"BalloonStats":{"#,
        };
        let _ = match misdeed {
            Misdeed::Garbage => stream.write_all(b"\x00\xff not a protocol \r\n\r\n\n"),
            Misdeed::HalfALine => stream.write_all(half.as_bytes()),
            Misdeed::Endless => {
                while stream.write_all(&[b'1'; 4096]).is_ok() {}
                Ok(())
            }
            Misdeed::Blank => {
                // Longer than the test allows, and no longer.
                let start = Instant::now();
                while start.elapsed() < Duration::from_secs(25)
                    && stream.write_all(&[b'\n'; 4096]).is_ok()
                {}
                Ok(())
            }
            Misdeed::Hang | Misdeed::Close | Misdeed::Deaf => Ok(()),
        };
        if !matches!(misdeed, Misdeed::Close) {
            // Until the client goes.
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
        }
    })
}
