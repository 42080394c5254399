//! The daemon's control socket: one request and one answer a connection, each one line of JSON.
//!
//! Who may connect is decided by the socket's permissions. Changing anything takes more: root, the
//! daemon's own user, or the group of the socket, as the kernel says of the peer (`SO_PEERCRED`).

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use crossbeam_channel::{Sender, bounded};
use parking_lot::RwLock;
use rustix::{
    net::sockopt::socket_peercred,
    process::{getegid, geteuid},
};
use serde::{Deserialize, Serialize};

use crate::engine::{Command, Input, status::Status};

/// A request is a line of at most this.
const REQUEST_LIMIT_BYTES: u64 = 64 << 10;
/// Clients served at a time.
const CLIENT_LIMIT: usize = 32;
/// How long a client may take to ask, and to read its answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(5);
/// How long the engine may take: a round, and VMs that are waited for.
const ENGINE_PATIENCE: Duration = Duration::from_secs(20);

/// What a client can ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Everything.
    Status,
    /// Change something.
    Set {
        /// What.
        #[serde(flatten)]
        command: Command,
    },
}

/// What it gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// Everything.
    Status {
        /// As of the last decision.
        status: Arc<Status>,
    },
    /// It was changed.
    Done {
        /// What was done.
        text: String,
    },
    /// It was not.
    Refused {
        /// Why.
        text: String,
    },
}

/// The socket could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another daemon serves it.
    #[error("{path}: another aerostatd answers there; stop it, or set host.control-socket")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something failed.
    #[error(
        "{path}: {action} failed: {source}; set host.control-socket to a place that can be written"
    )]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Serves the socket until the process ends.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
}

impl ControlServer {
    /// Listens at `path` with these permission bits, on threads of its own.
    ///
    /// # Errors
    /// Another daemon is there, or the socket cannot be made.
    pub fn start(
        path: &Path,
        mode: u32,
        status: Arc<RwLock<Arc<Status>>>,
        engine: Sender<Input>,
    ) -> Result<Self, ListenError> {
        let fail = |action| {
            move |source| ListenError::Io {
                path: path.to_owned(),
                action,
                source,
            }
        };
        if UnixStream::connect(path).is_ok() {
            return Err(ListenError::InUse {
                path: path.to_owned(),
            });
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(fail("making its directory"))?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(fail("removing the old socket")(error));
            }
            Ok(()) | Err(_) => {}
        }
        // Nobody connects before the permissions are right: they connect to the final name.
        let fresh = path.with_extension("new");
        let _ = fs::remove_file(&fresh);
        let listener = UnixListener::bind(&fresh).map_err(fail("bind"))?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))
            .map_err(fail("setting permissions"))?;
        let group = fs::metadata(&fresh).map_err(fail("stat"))?.gid();
        fs::rename(&fresh, path).map_err(fail("rename"))?;
        let clients = Arc::new(AtomicUsize::new(0));
        thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                for stream in listener.incoming() {
                    let Ok(stream) = stream else {
                        // Out of descriptors, for a moment.
                        thread::sleep(Duration::from_millis(100));
                        continue;
                    };
                    let (status, engine, clients) =
                        (status.clone(), engine.clone(), clients.clone());
                    if clients.fetch_add(1, Ordering::AcqRel) >= CLIENT_LIMIT {
                        clients.fetch_sub(1, Ordering::AcqRel);
                        continue;
                    }
                    let served = clients.clone();
                    let spawned = thread::Builder::new().name("client".into()).spawn(move || {
                        if let Err(error) = serve(&stream, group, &status, &engine) {
                            tracing::debug!("a client of the control socket: {error}");
                        }
                        served.fetch_sub(1, Ordering::AcqRel);
                    });
                    if spawned.is_err() {
                        clients.fetch_sub(1, Ordering::AcqRel);
                    }
                }
            })
            .map_err(fail("starting a thread"))?;
        Ok(Self {
            path: path.to_owned(),
        })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn serve(
    stream: &UnixStream,
    group: u32,
    status: &RwLock<Arc<Status>>,
    engine: &Sender<Input>,
) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_PATIENCE))?;
    stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(REQUEST_LIMIT_BYTES)).read_line(&mut line)?;
    let answer = match serde_json::from_str(&line) {
        Ok(Request::Status) => Answer::Status {
            status: status.read().clone(),
        },
        Ok(Request::Set { command }) if may_change(stream, group) => change(command, engine),
        Ok(Request::Set { .. }) => Answer::Refused {
            text: "only root, aerostatd's own user and the socket's group may change anything"
                .into(),
        },
        Err(error) => Answer::Refused {
            text: format!("not a request: {error}"),
        },
    };
    let mut text = serde_json::to_string(&answer)?;
    text.push('\n');
    let mut stream = stream;
    stream.write_all(text.as_bytes())
}

fn may_change(stream: &UnixStream, group: u32) -> bool {
    let Ok(peer) = socket_peercred(stream) else {
        return false;
    };
    peer.uid.is_root()
        || peer.uid == geteuid()
        || peer.gid == getegid()
        || peer.gid.as_raw() == group
}

fn change(command: Command, engine: &Sender<Input>) -> Answer {
    let (sender, receiver) = bounded(1);
    let sent = engine.send_timeout(Input::Command(command, sender), ENGINE_PATIENCE);
    let outcome = sent
        .map_err(|_| ())
        .and_then(|()| receiver.recv_timeout(ENGINE_PATIENCE).map_err(|_| ()));
    match outcome {
        Ok(Ok(text)) => Answer::Done { text },
        Ok(Err(error)) => Answer::Refused {
            text: error.to_string(),
        },
        Err(()) => Answer::Refused {
            text: "the engine does not answer; see its log".into(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{daemon::client::ask, policy::VmId};

    fn server(path: &Path) -> (ControlServer, crossbeam_channel::Receiver<Input>) {
        let (sender, receiver) = bounded(4);
        let status = Arc::new(RwLock::new(Arc::new(Status {
            ticks: 7,
            ..Status::default()
        })));
        (
            ControlServer::start(path, 0o660, status, sender).unwrap(),
            receiver,
        )
    }

    #[test]
    fn status_is_served_and_changes_go_to_the_engine() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/control");
        let (_server, inputs) = server(&path);
        let engine = thread::spawn(move || {
            let Ok(Input::Command(command, answer)) = inputs.recv() else {
                return None;
            };
            answer.send(Ok("done".to_owned())).unwrap();
            Some(command)
        });

        let Answer::Status { status } = ask(&path, &Request::Status).unwrap() else {
            panic!("no status")
        };
        let command = Command::FloorBytes {
            vm: VmId::new("a"),
            bytes: 5,
        };
        let answer = ask(
            &path,
            &Request::Set {
                command: command.clone(),
            },
        )
        .unwrap();

        assert_eq!(status.ticks, 7);
        assert!(matches!(answer, Answer::Done { text } if text == "done"));
        assert_eq!(engine.join().unwrap(), Some(command));
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o660
        );
    }

    #[test]
    fn a_second_daemon_is_told_and_a_dead_ones_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        drop(UnixListener::bind(&path).unwrap());
        let (_first, _inputs) = server(&path);

        let status = Arc::default();
        let second = ControlServer::start(&path, 0o600, status, bounded(1).0);

        assert!(matches!(second, Err(ListenError::InUse { .. })));
    }

    #[test]
    fn nonsense_and_silence_harm_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let (_server, _inputs) = server(&path);
        let silent = UnixStream::connect(&path).unwrap();
        let mut endless = UnixStream::connect(&path).unwrap();
        let _ = endless.write_all(&[b'['; 100 << 10]);
        let mut nonsense = UnixStream::connect(&path).unwrap();
        nonsense.write_all(b"{\"request\":\"levitate\"}\n").unwrap();

        let mut text = String::new();
        nonsense.read_to_string(&mut text).unwrap();

        assert!(text.contains("not a request"), "{text}");
        assert!(matches!(
            ask(&path, &Request::Status),
            Ok(Answer::Status { .. })
        ));
        drop(silent);
    }
}
