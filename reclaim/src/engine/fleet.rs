//! Which VMs there are: those that are configured, and those whose sockets fit a pattern. They come
//! and go as they like.

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    limits::VmLimits,
    status::{HISTORY_LIMIT, HistoryPoint},
    worker::Worker,
};
use crate::{
    cgroup::Cgroup,
    config::{Config, PLACEHOLDER, VmEntry, is_name},
    policy::{HypervisorTraits, Mode, VmId},
    vm::Endpoint,
};

/// More VMs than this on one host are taken for a pattern that fits the wrong directory.
const FLEET_LIMIT: usize = 4096;

/// A VM that should be there.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wanted {
    pub(super) endpoint: Endpoint,
    /// The cgroup from the configuration; else that of the process behind the socket.
    pub(super) cgroup: Option<PathBuf>,
    pub(super) settings: Settings,
}

/// What the operator decides about a VM.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Settings {
    pub(super) mode: Mode,
    pub(super) weight: u32,
    pub(super) floor_bytes: u64,
    pub(super) manual_target_bytes: Option<u64>,
    pub(super) floor_override: bool,
    pub(super) traits: HypervisorTraits,
}

/// Where something was seen to be wrong with a VM; its control socket is its thread's to watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Where {
    Values,
    Cgroup,
    Limit,
}

/// A VM that is there, or was.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) wanted: Wanted,
    /// As configured, or as set since.
    pub(super) settings: Settings,
    pub(super) worker: Worker,
    pub(super) cgroup: Option<Arc<VmLimits>>,
    /// Its cgroup is ours to limit.
    pub(super) limited: bool,
    pub(super) reason: String,
    /// What is wrong with it, by where that was seen.
    pub(super) troubles: BTreeMap<Where, String>,
    pub(super) history: VecDeque<HistoryPoint>,
}

impl Member {
    /// Enters a change of target or size (A9).
    pub(super) fn record(&mut self, at_ms: u64, target_bytes: u64, ballooned_bytes: u64) {
        let last = self.history.back();
        let retargeted = last.is_none_or(|point| point.target_bytes != target_bytes);
        let moved = last.is_none_or(|point| point.ballooned_bytes != ballooned_bytes);
        if !retargeted && !moved {
            return;
        }
        if self.history.len() == HISTORY_LIMIT {
            self.history.pop_front();
        }
        let reason = if retargeted {
            self.reason.clone()
        } else {
            String::new()
        };
        self.history.push_back(HistoryPoint {
            at_ms,
            target_bytes,
            ballooned_bytes,
            reason,
        });
    }

    /// Enters what is wrong with it, or that nothing is; logged when it is news.
    pub(super) fn note(&mut self, vm: &VmId, place: Where, trouble: Option<String>) {
        if self.troubles.get(&place) == trouble.as_ref() {
            return;
        }
        match trouble {
            Some(text) => {
                tracing::warn!(vm = %vm, "{text}");
                self.troubles.insert(place, text);
            }
            None => {
                if let Some(old) = self.troubles.remove(&place) {
                    tracing::info!(vm = %vm, "no longer: {old}");
                }
            }
        }
    }

    /// Opens the cgroup at `path`, unless it is the one it has.
    pub(super) fn enter_cgroup(
        &mut self,
        vm: &VmId,
        path: &Path,
        open: fn(&Path) -> Result<Cgroup, crate::cgroup::CgroupError>,
        max_slack_bytes: Option<u64>,
    ) {
        if self
            .cgroup
            .as_ref()
            .is_some_and(|limits| limits.cgroup().path() == path)
        {
            return;
        }
        match open(path) {
            Ok(cgroup) => {
                tracing::debug!(vm = %vm, cgroup = %path.display(), "has a cgroup");
                self.cgroup = Some(Arc::new(VmLimits::new(cgroup, max_slack_bytes)));
                self.note(vm, Where::Cgroup, None);
            }
            Err(error) => self.note(vm, Where::Cgroup, Some(error.to_string())),
        }
    }
}

/// The VMs that should be there now.
pub(super) fn wanted(config: &Config) -> (BTreeMap<VmId, Wanted>, Vec<io::Error>) {
    let mut found = BTreeMap::new();
    let mut errors = Vec::new();
    // A VM with a name of its own in the configuration goes before a pattern that fits it too.
    let (named, patterns): (Vec<_>, Vec<_>) =
        config.vms.iter().partition(|entry| entry.name.is_some());
    for entry in named {
        if let Some(name) = entry.name() {
            found.insert(VmId::new(name), want(config, entry, name));
        }
    }
    for entry in patterns {
        match matching(entry.socket.get_ref()) {
            Ok(names) => {
                for name in names {
                    if found.len() >= FLEET_LIMIT {
                        let text =
                            format!("{}: more than {FLEET_LIMIT} VMs", entry.socket.get_ref());
                        errors.push(io::Error::other(text));
                        break;
                    }
                    found
                        .entry(VmId::new(&name))
                        .or_insert_with(|| want(config, entry, &name));
                }
            }
            Err(error) => errors.push(error),
        }
    }
    (found, errors)
}

fn want(config: &Config, entry: &VmEntry, name: &str) -> Wanted {
    let fill = |text: &str| PathBuf::from(text.replace(PLACEHOLDER, name));
    let root = config.host.cgroup_root.clone().unwrap_or_default();
    Wanted {
        endpoint: Endpoint {
            protocol: entry.protocol,
            socket: fill(entry.socket.get_ref()),
            memory_bytes: entry.memory.map(|size| size.0),
            domain: entry.domain,
        },
        // An absolute path replaces the root.
        cgroup: entry.cgroup.as_deref().map(|text| root.join(fill(text))),
        settings: Settings {
            mode: entry.mode,
            weight: *entry.weight.get_ref(),
            floor_bytes: entry.floor.0,
            manual_target_bytes: entry.target.map(|size| size.0),
            floor_override: false,
            traits: entry.traits,
        },
    }
}

/// The names for which a socket fits the pattern. A directory that is not there yet has none.
fn matching(pattern: &str) -> io::Result<Vec<String>> {
    let path = Path::new(pattern);
    let (Some(folder), Some(last)) = (path.parent(), path.file_name().and_then(|n| n.to_str()))
    else {
        return Ok(Vec::new());
    };
    let (before, after) = last.split_once(PLACEHOLDER).unwrap_or((last, ""));
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            let text = format!(
                "{}: {error}; let aerostatd read the directory",
                folder.display()
            );
            return Err(io::Error::new(error.kind(), text));
        }
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let file = entry.file_name();
            let name = file.to_str()?.strip_prefix(before)?.strip_suffix(after)?;
            is_name(name).then(|| name.to_owned())
        })
        .collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vms_are_found_by_name_and_by_pattern_and_a_name_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        for file in [
            "vm-a.qmp",
            "vm-b.qmp",
            "vm-.qmp",
            "vm-c.other",
            "b.qmp",
            "vm-x y.qmp",
        ] {
            fs::write(dir.path().join(file), "").unwrap();
        }
        let folder = dir.path().display();
        let text = format!(
            "[host]\ncgroup-root = \"/sys/fs/cgroup/vms\"\n\
             [[vm]]\nprotocol = \"qmp\"\nsocket = \"{folder}/vm-{{name}}.qmp\"\ncgroup = \"{{name}}.scope\"\n\
             [[vm]]\nname = \"b\"\nprotocol = \"crosvm\"\nsocket = \"/b\"\ncgroup = \"/elsewhere\"\nmemory = \"1G\"\n\
             [[vm]]\nprotocol = \"qmp\"\nsocket = \"{folder}/absent/{{name}}\"\n"
        );
        let config = Config::parse(&text, Path::new("test.toml")).unwrap();

        let (found, errors) = wanted(&config);

        assert!(errors.is_empty());
        let names: Vec<_> = found.keys().map(VmId::as_str).collect();
        assert_eq!(names, ["a", "b"]);
        let a = &found[&VmId::new("a")];
        assert_eq!(a.endpoint.socket, dir.path().join("vm-a.qmp"));
        assert_eq!(
            a.cgroup.as_deref(),
            Some(Path::new("/sys/fs/cgroup/vms/a.scope"))
        );
        let b = &found[&VmId::new("b")];
        assert_eq!(
            (b.endpoint.memory_bytes, b.cgroup.as_deref()),
            (Some(1 << 30), Some(Path::new("/elsewhere")))
        );
    }
}
