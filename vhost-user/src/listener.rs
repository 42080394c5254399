//! UNIX sockets to listen on: made with the right mode, put in the place of dead ones only, and
//! taken away at the end.

use rustix::fs::Mode;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    #[error("{0}: somebody is listening there already")]
    InUse(PathBuf),
    #[error("{0}: there is something that is not a socket; remove it, or choose another path")]
    NotASocket(PathBuf),
    #[error("{path}: cannot listen", path = .0.display())]
    Io(PathBuf, #[source] io::Error),
}

/// A listening socket whose file goes when this goes.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, to remove no one else's.
    identity: (u64, u64),
}

impl Listener {
    /// Listens on `path`, whose file gets `mode`.
    ///
    /// The mode is set through the umask, so that there is no moment at which the file is open to
    /// more; the caller has to have no other threads that make files at this time.
    pub(crate) fn bind(path: &Path, mode: u32) -> Result<Self, ListenError> {
        let failed = |error| ListenError::Io(path.to_owned(), error);
        remove_dead_socket(path)?;
        let old = rustix::process::umask(Mode::from_raw_mode(!mode & 0o777));
        let bound = UnixListener::bind(path);
        rustix::process::umask(old);
        let socket = bound.map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    /// The next connection, if one is waiting.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock
                | io::ErrorKind::Interrupted
                | io::ErrorKind::ConnectionAborted => Ok(None),
                _ => Err(error),
            },
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{}: cannot be removed: {error}", self.path.display());
        }
    }
}

/// Removes a socket that a process left behind when it died.
fn remove_dead_socket(path: &Path) -> Result<(), ListenError> {
    let failed = |error| ListenError::Io(path.to_owned(), error);
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Ok(_) => Err(ListenError::InUse(path.to_owned())),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_dead_sockets_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let live = Listener::bind(&path, 0o600).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(
            Listener::bind(&path, 0o600),
            Err(ListenError::InUse(_))
        ));
        drop(live);
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a dead socket stays behind");
        drop(Listener::bind(&path, 0o600).unwrap());

        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            Listener::bind(&path, 0o600),
            Err(ListenError::NotASocket(_))
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_that_took_our_place_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let ours = Listener::bind(&path, 0o600).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }
}
