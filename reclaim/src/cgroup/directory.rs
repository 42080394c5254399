//! A cgroup as a directory handle: every file is opened below it, so a cgroup that is removed and
//! made again under the same name is not taken for the old one.

use std::{
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Dir, Mode, OFlags, fstatfs, openat},
    io::Errno,
};

use super::CgroupError;

/// `f_type` of cgroup v2 (`statfs(2)`).
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
/// `f_type` of cgroup v1.
const CGROUP_SUPER_MAGIC: u64 = 0x0027_e0eb;

/// The most that is read of one file. `memory.numa_stat` is the largest: 60 lines of 20 bytes a node.
const FILE_LIMIT_BYTES: u64 = 4 << 20;

/// A cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Opens the cgroup at `path`.
    ///
    /// # Errors
    /// It does not exist, cannot be opened, or is not on a cgroup v2 file system.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        let cgroup = Self::open_unchecked(path)?;
        let kind = fstatfs(&cgroup.directory)
            .map_err(|errno| CgroupError::io(path.to_owned(), "statfs", errno.into()))?;
        // The field's type differs between architectures.
        #[allow(
            clippy::cast_sign_loss,
            clippy::unnecessary_cast,
            reason = "a magic number of 32 bits, positive whatever the type"
        )]
        let magic = kind.f_type as u64;
        let advice = match magic {
            CGROUP2_SUPER_MAGIC => return Ok(cgroup),
            CGROUP_SUPER_MAGIC => {
                "this is cgroup v1; boot with systemd.unified_cgroup_hierarchy=1 (and without \
                 cgroup_enable=memory settings for v1), or run without limits: limits = \"none\""
            }
            _ => "give the path of a cgroup below /sys/fs/cgroup",
        };
        Err(CgroupError::NotV2 {
            path: path.to_owned(),
            advice,
        })
    }

    /// Opens any directory as if it were a cgroup: for tests on made-up trees.
    ///
    /// # Errors
    /// It does not exist or cannot be opened.
    pub fn open_unchecked(path: &Path) -> Result<Self, CgroupError> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        match openat(CWD, path, flags, Mode::empty()) {
            Ok(directory) => Ok(Self {
                path: path.to_owned(),
                directory,
            }),
            Err(Errno::NOENT | Errno::NODEV) => Err(CgroupError::Gone {
                path: path.to_owned(),
            }),
            Err(errno) => Err(CgroupError::io(path.to_owned(), "open", errno.into())),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it still exists.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.open_file("cgroup.controllers", OFlags::RDONLY).is_ok()
    }

    /// Whether the memory controller works in this cgroup.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    pub fn has_memory_controller(&self) -> Result<bool, CgroupError> {
        let controllers = self.read("cgroup.controllers")?.unwrap_or_default();
        Ok(controllers.split_ascii_whitespace().any(|c| c == "memory"))
    }

    /// Names of its sub-cgroups.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    pub fn children(&self) -> Result<Vec<String>, CgroupError> {
        let fail = |errno: Errno| CgroupError::io(self.path.clone(), "list", errno.into());
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.directory).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type() == rustix::fs::FileType::Directory && name != "." && name != ".." {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// The text of one of its files; `None` if this kernel or this cgroup does not have it.
    pub(super) fn read(&self, file: &str) -> Result<Option<String>, CgroupError> {
        let mut text = String::new();
        let opened = match self.open_file(file, OFlags::RDONLY) {
            Ok(opened) => opened,
            Err(Errno::NOENT) if self.exists() => return Ok(None),
            Err(errno) => return Err(self.failed(file, "open", errno.into())),
        };
        match std::fs::File::from(opened)
            .take(FILE_LIMIT_BYTES)
            .read_to_string(&mut text)
        {
            Ok(_) => Ok(Some(text)),
            // Pressure files exist and say so when PSI is off.
            Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => Ok(None),
            Err(error) => Err(self.failed(file, "read", error)),
        }
    }

    /// Writes one of its files. With `O_NONBLOCK` kernels from about 6.16 on only set a limit and
    /// leave the reclaim to whoever allocates next; older ones ignore the flag.
    pub(super) fn write(&self, file: &str, text: &str) -> Result<(), CgroupError> {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::TRUNC;
        let opened = self
            .open_file(file, flags)
            .map_err(|errno| self.failed(file, "open for writing", errno.into()))?;
        // One write: the kernel takes the whole value or none of it.
        std::fs::File::from(opened)
            .write_all(text.as_bytes())
            .map_err(|error| self.failed(file, "write", error))
    }

    pub(super) fn open_file(&self, file: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        openat(
            self.directory.as_fd(),
            file,
            flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::empty(),
        )
    }

    pub(super) fn failed(&self, file: &str, action: &'static str, error: io::Error) -> CgroupError {
        let gone = [Errno::NOENT, Errno::NODEV].map(|errno| Some(errno.raw_os_error()));
        if gone.contains(&error.raw_os_error()) && !self.exists() {
            return CgroupError::Gone {
                path: self.path.clone(),
            };
        }
        CgroupError::io(self.path.join(file), action, error)
    }
}
