//! The cgroup that was given to us, and the rules that come with it: sub-cgroups are made and
//! limited, the cgroup itself belongs to its manager.

use std::path::{Component, Path, PathBuf};

use cgroups_rs::fs::{
    Cgroup as Tree, Hierarchy, MaxValue, Subsystem,
    memory::{MemController, SetMemory},
};

use super::{Cgroup, CgroupError};

/// A cgroup below which sub-cgroups may be made and limited.
#[derive(Debug)]
pub struct Delegated {
    root: Cgroup,
}

/// A hierarchy for cgroups-rs that begins at the delegated cgroup, so that it never touches what
/// is above.
#[derive(Clone, Debug)]
struct Below(PathBuf);

impl Hierarchy for Below {
    fn subsystems(&self) -> Vec<Subsystem> {
        vec![Subsystem::Mem(MemController::new(
            self.0.clone(),
            PathBuf::new(),
            true,
        ))]
    }

    fn root(&self) -> PathBuf {
        self.0.clone()
    }

    fn root_control_group(&self) -> Tree {
        Tree::load(Box::new(self.clone()), "")
    }

    fn parent_control_group(&self, path: &str) -> Tree {
        let parent = Path::new(path).parent().unwrap_or(Path::new(""));
        Tree::load(Box::new(self.clone()), parent)
    }

    fn v2(&self) -> bool {
        true
    }
}

impl Delegated {
    /// Takes `root` as delegated.
    ///
    /// # Errors
    /// It is not a cgroup v2 directory, or cannot be read.
    pub fn open(root: &Path) -> Result<Self, CgroupError> {
        Cgroup::open(root).map(|root| Self { root })
    }

    /// The same with another way to open a cgroup: [`Cgroup::open_unchecked`] on made-up trees.
    ///
    /// # Errors
    /// It does not exist, or cannot be opened.
    pub fn open_with(
        root: &Path,
        open: fn(&Path) -> Result<Cgroup, CgroupError>,
    ) -> Result<Self, CgroupError> {
        open(root).map(|root| Self { root })
    }

    /// The delegated cgroup itself: to be read only.
    #[must_use]
    pub fn root(&self) -> &Cgroup {
        &self.root
    }

    /// Whether `path` may be limited: it is below the root, not the root itself.
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self, path: &Path) -> Result<(), CgroupError> {
        let below = path.strip_prefix(self.root.path()).is_ok_and(|rest| {
            rest.components().next().is_some()
                && rest.components().all(|c| matches!(c, Component::Normal(_)))
        });
        if below {
            return Ok(());
        }
        Err(CgroupError::NotDelegated {
            path: path.to_owned(),
            root: self.root.path().to_owned(),
        })
    }

    /// Makes the sub-cgroup `name` (`a` or `a/b`) with the memory controller, unless it is there.
    ///
    /// # Errors
    /// The name leads elsewhere, or the cgroup could not be made.
    pub fn create(&self, name: &str) -> Result<Cgroup, CgroupError> {
        let path = self.root.path().join(name);
        self.check(&path)?;
        let controllers = Some(vec!["memory".to_owned()]);
        let below = Box::new(Below(self.root.path().to_owned()));
        Tree::new_with_specified_controllers(below, name, controllers).map_err(|error| {
            let source = std::io::Error::other(error.to_string());
            CgroupError::io(path.clone(), "create", source)
        })?;
        let cgroup = Cgroup::open(&path)?;
        if !cgroup.has_memory_controller()? {
            return Err(CgroupError::NoMemoryController { path });
        }
        Ok(cgroup)
    }

    /// Protects the sub-cgroup's first `bytes` from the kernel's own reclaim (`memory.low`).
    ///
    /// # Errors
    /// It is not below the root, or cannot be written.
    pub fn protect(&self, cgroup: &Cgroup, bytes: u64) -> Result<(), CgroupError> {
        self.check(cgroup.path())?;
        let values = SetMemory {
            low: Some(MaxValue::Value(i64::try_from(bytes).unwrap_or(i64::MAX))),
            high: None,
            min: None,
            max: None,
        };
        MemController::new(cgroup.path().to_owned(), PathBuf::new(), true)
            .set_mem(values)
            .map_err(|error| {
                let source = std::io::Error::other(error.to_string());
                CgroupError::io(cgroup.path().join("memory.low"), "write", source)
            })
    }

    /// Removes the sub-cgroup `name`. It must be empty.
    ///
    /// # Errors
    /// The name leads elsewhere, or the cgroup is in use.
    pub fn remove(&self, name: &str) -> Result<(), CgroupError> {
        let path = self.root.path().join(name);
        self.check(&path)?;
        std::fs::remove_dir(&path).map_err(|source| CgroupError::io(path, "remove", source))
    }
}
