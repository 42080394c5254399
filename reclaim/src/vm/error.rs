//! What can go wrong on the way to a virtual machine. It is that machine's trouble alone.

use std::{io, path::PathBuf, time::Duration};

/// An error on a VM's control interface.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
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
    /// The peer sent something that is not part of its protocol.
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
    /// The VM has no balloon.
    #[error("control socket {path}: the VM has no balloon device; start it with {option}")]
    NoBalloon {
        /// The socket.
        path: PathBuf,
        /// What to add to its command line.
        option: &'static str,
    },
}

impl VmError {
    /// What an operator can do about it.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => "start the VM, or correct its socket's path",
                io::ErrorKind::PermissionDenied => {
                    "let aerostatd's user into the socket's group, or run it as root"
                }
                io::ErrorKind::ConnectionRefused => {
                    "nobody listens: the VM has ended and left its socket behind"
                }
                _ => "look into the VMM's own log",
            },
            Self::Timeout { .. } => {
                "the VMM hangs, or another client holds the socket: give aerostatd one of its own"
            }
            Self::Closed { .. } | Self::Broken { .. } => "the VM is connected to again",
            Self::Refused { .. } | Self::NoBalloon { .. } => "see what the VMM says",
            Self::Malformed { .. } => "check that the socket's kind in the configuration is right",
        }
    }
}
