//! Pressure triggers: the kernel says when tasks have waited for memory too long, at once instead
//! of at the next sample.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
};

use super::{Cgroup, CgroupError};

/// The host's own pressure file.
pub const HOST_PRESSURE: &str = "/proc/pressure/memory";

/// An armed trigger. The kernel forgets it when this is dropped.
#[derive(Debug)]
pub struct PressureTrigger {
    path: PathBuf,
    file: OwnedFd,
}

impl PressureTrigger {
    /// Fires when some task of the host has waited for memory for `stall` within `window`.
    ///
    /// # Errors
    /// No PSI, no permission, or a window the kernel does not take: 500 ms to 10 s; without
    /// `CAP_SYS_RESOURCE` a multiple of 2 s.
    pub fn on_host(stall: Duration, window: Duration) -> Result<Self, CgroupError> {
        Self::on_file(Path::new(HOST_PRESSURE), stall, window)
    }

    /// The same for the tasks of a cgroup.
    ///
    /// # Errors
    /// As [`Self::on_host`]; or the cgroup is gone.
    pub fn on_cgroup(
        cgroup: &Cgroup,
        stall: Duration,
        window: Duration,
    ) -> Result<Self, CgroupError> {
        let name = "memory.pressure";
        let file = cgroup
            .open_file(name, OFlags::RDWR | OFlags::NONBLOCK)
            .map_err(|errno| cgroup.failed(name, "trigger", errno.into()))?;
        Self::arm(cgroup.path().join(name), file, stall, window)
    }

    /// The same on any pressure file.
    ///
    /// # Errors
    /// As [`Self::on_host`].
    pub fn on_file(path: &Path, stall: Duration, window: Duration) -> Result<Self, CgroupError> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(CWD, path, flags, Mode::empty())
            .map_err(|errno| CgroupError::io(path.to_owned(), "trigger", errno.into()))?;
        Self::arm(path.to_owned(), file, stall, window)
    }

    fn arm(
        path: PathBuf,
        file: OwnedFd,
        stall: Duration,
        window: Duration,
    ) -> Result<Self, CgroupError> {
        // The kernel wants the terminating zero.
        let text = format!("some {} {}\0", stall.as_micros(), window.as_micros());
        match rustix::io::write(&file, text.as_bytes()) {
            Ok(_) => Ok(Self { path, file }),
            Err(errno) => Err(CgroupError::io(path, "trigger", errno.into())),
        }
    }

    /// Waits until it fires (true) or `timeout` has passed (false).
    ///
    /// # Errors
    /// The cgroup is gone.
    pub fn wait(&self, timeout: Duration) -> Result<bool, CgroupError> {
        let timeout = Timespec::try_from(timeout).ok();
        let mut polled = [PollFd::new(&self.file, PollFlags::PRI)];
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(false),
            Err(errno) => return Err(CgroupError::io(self.path.clone(), "poll", errno.into())),
        }
        let events = polled[0].revents();
        if events.contains(PollFlags::ERR) {
            return Err(CgroupError::Gone {
                path: self.path.clone(),
            });
        }
        Ok(events.contains(PollFlags::PRI))
    }
}

impl AsFd for PressureTrigger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
