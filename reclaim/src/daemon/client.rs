//! How `aerostatd status` and the others ask the daemon.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::control::{Answer, Request};
use crate::engine::status::Status;

/// How long the daemon may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The daemon could not be asked, or said no.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It is not there, or does not answer.
    #[error("{path}: {source}; is aerostatd running, and may you open its socket? (--socket PATH)")]
    Io {
        /// Its socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It answered with something else.
    #[error("{path}: the daemon's answer makes no sense: {detail}; are both of one version?")]
    Malformed {
        /// Its socket.
        path: PathBuf,
        /// What was wrong.
        detail: String,
    },
    /// It refused.
    #[error("{0}")]
    Refused(String),
}

/// Asks the daemon at `path`.
///
/// # Errors
/// It cannot be reached, or the answer makes no sense.
pub fn ask(path: &Path, request: &Request) -> Result<Answer, ClientError> {
    let line = exchange(path, request).map_err(|source| ClientError::Io {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_str(&line).map_err(|error| ClientError::Malformed {
        path: path.to_owned(),
        detail: error.to_string(),
    })
}

/// The status of the daemon at `path`.
///
/// # Errors
/// As [`ask`].
pub fn status(path: &Path) -> Result<Arc<Status>, ClientError> {
    match ask(path, &Request::Status)? {
        Answer::Status { status } => Ok(status),
        Answer::Refused { text } => Err(ClientError::Refused(text)),
        Answer::Done { text } => Err(ClientError::Malformed {
            path: path.to_owned(),
            detail: text,
        }),
    }
}

fn exchange(path: &Path, request: &Request) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer)
}
