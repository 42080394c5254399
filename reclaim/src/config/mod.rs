//! The configuration of aerostatd: a TOML file. Errors name line, column and key.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use toml::Spanned;

use crate::{
    policy::{HypervisorTraits, Mode, PolicyConfig},
    vm::Protocol,
};

mod size;

pub use size::{Size, SizeError};

/// What a VM's name stands for in the path of a socket or cgroup.
pub const PLACEHOLDER: &str = "{name}";

/// Everything that can be configured. docs/operations.md has each key.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Config {
    /// The host and the daemon itself.
    pub host: HostConfig,
    /// The policy's own settings.
    pub policy: PolicyConfig,
    /// VMs, one by one or by a pattern.
    #[serde(rename = "vm")]
    pub vms: Vec<VmEntry>,
}

/// How memory limits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limits {
    /// Not at all: balloons only.
    None,
    /// `memory.high` follows the balloon: it throttles, and never kills.
    #[default]
    High,
    /// And `memory.max` above it, by [`HostConfig::max_slack`].
    HighAndMax,
}

/// `[host]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct HostConfig {
    /// Time from one decision to the next.
    pub period_ms: Spanned<u64>,
    /// How long any VM may take to answer one command.
    pub timeout_ms: Spanned<u64>,
    /// The cgroup that was delegated to aerostatd: only VMs below it get limits.
    pub cgroup_root: Option<PathBuf>,
    /// How limits are kept. Without `cgroup-root`: not at all.
    pub limits: Limits,
    /// What all VMs together may occupy. Without it: the root cgroup's own limit, else the host's
    /// memory without `reserve`.
    pub budget: Option<Size>,
    /// What the host keeps for itself if there is no `budget`.
    pub reserve: Size,
    /// What a VMM needs besides the guest's memory.
    pub overhead: Size,
    /// Room between what a VM occupies and the lowest limit it gets.
    pub slack: Size,
    /// With `limits = "high-and-max"`: from memory.high up to memory.max.
    pub max_slack: Size,
    /// Take memory by `memory.reclaim` where the policy asks for it as a last resort.
    pub allow_reclaim: bool,
    /// Where `aerostatd status` and the others connect.
    pub control_socket: PathBuf,
    /// Permission bits of that socket, octal as text.
    pub control_mode: Spanned<String>,
    /// Where OpenMetrics is served; `"off"` for nowhere.
    pub metrics: Spanned<String>,
    /// Pressure trigger: act at once when tasks have waited this long ...
    pub pressure_stall_ms: Spanned<u64>,
    /// ... within this window.
    pub pressure_window_ms: Spanned<u64>,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            period_ms: plain(1000),
            timeout_ms: plain(1000),
            cgroup_root: None,
            limits: Limits::High,
            budget: None,
            reserve: Size(1 << 30),
            overhead: Size(256 << 20),
            slack: Size(64 << 20),
            max_slack: Size(256 << 20),
            allow_reclaim: true,
            control_socket: "/run/aerostat/aerostatd.sock".into(),
            control_mode: plain("0660".to_owned()),
            metrics: plain("127.0.0.1:9750".to_owned()),
            pressure_stall_ms: plain(100),
            pressure_window_ms: plain(2000),
        }
    }
}

fn plain<T>(value: T) -> Spanned<T> {
    Spanned::new(0..0, value)
}

/// `[[vm]]`: one VM, or all whose sockets fit a pattern.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmEntry {
    /// Its name; left out where the socket has a `{name}`.
    pub name: Option<Spanned<String>>,
    /// The kind of its control interface.
    pub protocol: Protocol,
    /// Its control socket. With `{name}` in the last component: every socket that fits is a VM.
    pub socket: Spanned<String>,
    /// Its cgroup: absolute, or below `cgroup-root`, with `{name}` if need be. Without it: the
    /// cgroup of the process behind the socket.
    pub cgroup: Option<String>,
    /// The guest's memory, where the VMM does not tell it (crosvm).
    pub memory: Option<Size>,
    /// The number of the domain, for `protocol = "xen"`.
    pub domain: Option<u32>,
    /// How far it follows the policy.
    #[serde(default)]
    pub mode: Mode,
    /// Its share against the others.
    #[serde(default = "default_weight")]
    pub weight: Spanned<u32>,
    /// Memory that is always left to the guest.
    #[serde(default)]
    pub floor: Size,
    /// For mode manual: what the balloon should hold.
    pub target: Option<Size>,
    /// What its hypervisor can do.
    #[serde(default)]
    pub traits: HypervisorTraits,
}

fn default_weight() -> Spanned<u32> {
    plain(100)
}

impl VmEntry {
    /// Its name, if it is one VM.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_ref().map(|name| name.get_ref().as_str())
    }
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its text is wrong at some place.
    #[error("{path}:{line}:{column}: {key}: {message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
        /// The key, with its table.
        key: String,
        /// What is wrong with it, and what to write.
        message: String,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Io {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Checks a text; `path` is for the errors.
    ///
    /// # Errors
    /// Something in it is wrong.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let place = Place { text, path };
        let config: Self = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            place.invalid(at, &key_at(text, at), error.message().to_owned())
        })?;
        config.check(&place)?;
        Ok(config)
    }

    /// Time from one decision to the next.
    #[must_use]
    pub fn period(&self) -> Duration {
        Duration::from_millis(*self.host.period_ms.get_ref())
    }

    /// How long a VM may take to answer.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(*self.host.timeout_ms.get_ref())
    }

    /// How limits are kept: not at all without a delegated cgroup.
    #[must_use]
    pub fn limits(&self) -> Limits {
        match self.host.cgroup_root {
            Some(_) => self.host.limits,
            None => Limits::None,
        }
    }

    /// Permission bits of the control socket.
    #[must_use]
    pub fn control_mode(&self) -> u32 {
        u32::from_str_radix(self.host.control_mode.get_ref(), 8).unwrap_or(0o660)
    }

    /// Where metrics are served.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.host.metrics.get_ref().parse().ok()
    }

    fn check(&self, place: &Place<'_>) -> Result<(), ConfigError> {
        let host = &self.host;
        for (key, value, least, most) in [
            ("period-ms", &host.period_ms, 50, 60_000),
            ("timeout-ms", &host.timeout_ms, 10, 60_000),
            ("pressure-stall-ms", &host.pressure_stall_ms, 1, 10_000),
            ("pressure-window-ms", &host.pressure_window_ms, 500, 10_000),
        ] {
            if !(least..=most).contains(value.get_ref()) {
                let message = format!("{} is not between {least} and {most}", value.get_ref());
                return Err(place.invalid(value.span().start, &format!("host.{key}"), message));
            }
        }
        let metrics = host.metrics.get_ref();
        if metrics != "off" && metrics.parse::<SocketAddr>().is_err() {
            let message = "write an address with a port, as in \"127.0.0.1:9750\", or \"off\"";
            return Err(place.invalid(host.metrics.span().start, "host.metrics", message.into()));
        }
        let mode = host.control_mode.get_ref();
        if u32::from_str_radix(mode, 8).is_ok_and(|mode| mode & !0o666 == 0) {
        } else {
            let message = "write octal permission bits for reading and writing, as in \"0660\"";
            let at = host.control_mode.span().start;
            return Err(place.invalid(at, "host.control-mode", message.into()));
        }
        if let Err(error) = self.policy.validate() {
            let at = find_key(place.text, "policy", error.key);
            let message = format!("{}: {}", error.value, error.advice);
            return Err(place.invalid(at, &format!("policy.{}", error.key), message));
        }
        let mut names = std::collections::BTreeSet::new();
        for entry in &self.vms {
            entry.check(place)?;
            if let Some(name) = &entry.name
                && !names.insert(name.get_ref())
            {
                let message = format!("{:?} is used twice; each VM needs its own", name.get_ref());
                return Err(place.invalid(name.span().start, "vm.name", message));
            }
        }
        Ok(())
    }
}

impl VmEntry {
    fn check(&self, place: &Place<'_>) -> Result<(), ConfigError> {
        let socket = self.socket.get_ref();
        let at = self.socket.span().start;
        let last = Path::new(socket).file_name().unwrap_or_default();
        let in_last = last.to_string_lossy().matches(PLACEHOLDER).count();
        let pattern = socket.contains(PLACEHOLDER);
        let wrong = |message: &str| Err(place.invalid(at, "vm.socket", message.to_owned()));
        if !socket.starts_with('/') {
            return wrong("write an absolute path");
        }
        if pattern && (in_last != 1 || socket.matches(PLACEHOLDER).count() != 1) {
            return wrong("{name} may stand once, in the last component of the path");
        }
        match (&self.name, pattern) {
            (None, false) => return wrong("give the VM a name, or put {name} into this path"),
            (Some(name), true) => {
                let message = "leave it out: the socket's {name} names the VMs";
                return Err(place.invalid(name.span().start, "vm.name", message.to_owned()));
            }
            (Some(name), false) if !is_name(name.get_ref()) => {
                let message = "letters, digits, '.', '_' and '-' only, up to 64";
                return Err(place.invalid(name.span().start, "vm.name", message.to_owned()));
            }
            (Some(_), false) | (None, true) => {}
        }
        if (self.protocol == Protocol::Xen) != self.domain.is_some() {
            return wrong(
                "protocol \"xen\" wants the domain's number in the key domain, and only that one",
            );
        }
        if !(1..=10_000).contains(self.weight.get_ref()) {
            let message = "between 1 and 10000; 100 is ordinary".to_owned();
            return Err(place.invalid(self.weight.span().start, "vm.weight", message));
        }
        Ok(())
    }
}

/// Whether a text can name a VM: it becomes part of paths and of metrics.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=64).contains(&text.len()) && text.chars().all(plain) && !text.starts_with('.')
}

/// A text and where it is from.
struct Place<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Place<'_> {
    fn invalid(&self, at: usize, key: &str, message: String) -> ConfigError {
        let before = self.text.get(..at).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        ConfigError::Invalid {
            path: self.path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before.len() - line_start + 1,
            key: key.to_owned(),
            message,
        }
    }
}

/// The key of the line at `at`, with the table it is in.
fn key_at(text: &str, at: usize) -> String {
    let start = text
        .get(..at)
        .and_then(|before| before.rfind('\n'))
        .map_or(0, |n| n + 1);
    let line = text
        .get(start..)
        .and_then(|rest| rest.lines().next())
        .unwrap_or_default();
    let table = text
        .get(..start)
        .and_then(|before| {
            before
                .lines()
                .rev()
                .find(|line| line.trim_start().starts_with('['))
        })
        .map(|line| line.trim().trim_matches(['[', ']']).to_owned());
    let key = line
        .split('=')
        .next()
        .unwrap_or_default()
        .trim()
        .trim_matches(['[', ']']);
    match table {
        Some(table) if !line.trim_start().starts_with('[') => format!("{table}.{key}"),
        _ => key.to_owned(),
    }
}

/// Where `key` stands in `table`, for errors about values that were checked later.
fn find_key(text: &str, table: &str, key: &str) -> usize {
    let mut at = 0;
    let mut within = false;
    for line in text.split_inclusive('\n') {
        let trimmed = line.trim();
        if trimmed.starts_with('[') {
            within = trimmed.trim_matches(['[', ']']) == table;
        } else if within
            && trimmed
                .split('=')
                .next()
                .is_some_and(|name| name.trim() == key)
        {
            return at;
        }
        at += line.len();
    }
    0
}

#[cfg(test)]
mod tests;
