//! Scenarios: hosts, guests and what they do, as TOML.

use std::{fs, io, path::Path};

use serde::Deserialize;

use crate::policy::{Mode, PolicyConfig};

/// Scenarios that come with the program.
const BUILT_IN: [(&str, &str); 5] = [
    ("builds", include_str!("../../scenarios/builds.toml")),
    (
        "offset-peaks",
        include_str!("../../scenarios/offset-peaks.toml"),
    ),
    ("fluid", include_str!("../../scenarios/fluid.toml")),
    ("mixed", include_str!("../../scenarios/mixed.toml")),
    ("fleet", include_str!("../../scenarios/fleet.toml")),
];

/// A whole scenario.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Scenario {
    /// What it is about.
    pub title: String,
    /// The rules to compare; all of them if it says nothing.
    #[serde(default)]
    pub policies: Vec<String>,
    /// Runs of each rule, with different chances.
    #[serde(default = "one")]
    pub runs: u32,
    /// Equal hosts, with different chances.
    #[serde(default = "one")]
    pub hosts: u32,
    /// It ends then at the latest.
    pub limit_s: f64,
    /// How often the rule is asked.
    #[serde(default = "second")]
    pub period_s: f64,
    /// The host.
    pub host: HostSpec,
    /// Its guests.
    pub guests: Vec<GuestSpec>,
    /// Settings of the rule.
    #[serde(default)]
    pub policy: PolicyConfig,
}

/// A host.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct HostSpec {
    /// All its memory.
    pub memory_mib: f64,
    /// What its kernel and services use.
    #[serde(default)]
    pub own_mib: f64,
    /// Swap space.
    #[serde(default)]
    pub swap_mib: f64,
    /// Processors, shared by the guests that have something to do.
    pub cores: f64,
    /// Speed of its disk in sequential order; images and swap are on it.
    pub disk_mib_per_s: f64,
    /// Speed at which pages come back from swap, in the order in which they are touched.
    pub swap_in_mib_per_s: f64,
}

/// Some equal guests.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct GuestSpec {
    /// Their name; they are numbered.
    pub name: String,
    /// How many.
    #[serde(default = "one")]
    pub count: u32,
    /// Memory of each.
    pub memory_mib: f64,
    /// What the VMM needs beside it.
    #[serde(default)]
    pub overhead_mib: f64,
    /// What its kernel and services use.
    pub kernel_mib: f64,
    /// Swap of its own.
    #[serde(default)]
    pub swap_mib: f64,
    /// Each begins at a random time up to this.
    #[serde(default)]
    pub start_spread_s: f64,
    /// Amounts of each guest differ at random by up to this.
    #[serde(default)]
    pub jitter_percent: f64,
    /// Its floor, weight and mode as an operator would configure them.
    #[serde(default)]
    pub floor_mib: u64,
    #[serde(default = "hundred")]
    /// Its weight.
    pub weight: u32,
    /// Its mode.
    #[serde(default)]
    pub mode: Mode,
    /// It reports unused memory by itself.
    #[serde(default)]
    pub reports_free_pages: bool,
    /// What it does, one after the other.
    pub phases: Vec<Phase>,
    /// How often it does all that.
    #[serde(default = "one")]
    pub repeat: u32,
}

/// A part of a guest's work.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Phase {
    /// Processor time it needs; with `idle`, time that passes.
    pub work_s: f64,
    /// Nothing is computed, and nothing is touched.
    #[serde(default)]
    pub idle: bool,
    /// Memory of its processes at the end of the phase's first fifth.
    pub anon_mib: f64,
    /// Part of that which is touched in each second of work.
    #[serde(default = "tenth")]
    pub touch: f64,
    /// The files it works on.
    #[serde(default)]
    pub files_mib: f64,
    /// What it reads and writes of them in all, again and again.
    #[serde(default)]
    pub reads_mib: f64,
    /// The part of those that it has in common with the phase before.
    #[serde(default)]
    pub common: f64,
}

fn one() -> u32 {
    1
}

fn hundred() -> u32 {
    100
}

fn second() -> f64 {
    1.0
}

fn tenth() -> f64 {
    0.1
}

/// What is wrong with a scenario.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// There is no such file, and none of the scenarios that come with the program.
    #[error("scenario {name}: cannot be read, and is none of {}", names().join(", "))]
    Read {
        /// What was asked for.
        name: String,
        /// Why it cannot be read.
        #[source]
        source: io::Error,
    },
    /// It is not what a scenario looks like; the source names line and key.
    #[error("scenario {name}")]
    Parse {
        /// What was asked for.
        name: String,
        /// Where and what.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// An amount in it makes no sense.
    #[error("scenario {name}: {detail}")]
    Invalid {
        /// What was asked for.
        name: String,
        /// Which and why.
        detail: String,
    },
}

/// The names of the scenarios that come with the program.
#[must_use]
pub fn names() -> Vec<&'static str> {
    BUILT_IN.iter().map(|(name, _)| *name).collect()
}

impl Scenario {
    /// Loads a scenario that comes with the program by its name, or a file by its path.
    ///
    /// # Errors
    /// See [`ScenarioError`].
    pub fn load(name: &str) -> Result<Self, ScenarioError> {
        let text = match BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => (*text).to_owned(),
            None => fs::read_to_string(Path::new(name)).map_err(|source| ScenarioError::Read {
                name: name.to_owned(),
                source,
            })?,
        };
        Self::parse(name, &text)
    }

    /// Reads a scenario from its text.
    ///
    /// # Errors
    /// See [`ScenarioError`].
    pub fn parse(name: &str, text: &str) -> Result<Self, ScenarioError> {
        let scenario: Self = toml::from_str(text).map_err(|source| ScenarioError::Parse {
            name: name.to_owned(),
            source: Box::new(source),
        })?;
        scenario.check().map_err(|detail| ScenarioError::Invalid {
            name: name.to_owned(),
            detail,
        })?;
        Ok(scenario)
    }

    fn check(&self) -> Result<(), String> {
        let host = &self.host;
        for (key, value) in [
            ("limit-s", self.limit_s),
            ("period-s", self.period_s),
            ("host.memory-mib", host.memory_mib),
            ("host.cores", host.cores),
            ("host.disk-mib-per-s", host.disk_mib_per_s),
            ("host.swap-in-mib-per-s", host.swap_in_mib_per_s),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(format!("{key} is to be above 0"));
            }
        }
        if self.guests.is_empty() || self.hosts == 0 || self.runs == 0 {
            return Err("guests, hosts and runs are to be at least one each".to_owned());
        }
        for guest in &self.guests {
            let name = &guest.name;
            if guest.phases.is_empty() || guest.count == 0 || guest.repeat == 0 {
                return Err(format!(
                    "guests {name}: phases, count, repeat: at least one each"
                ));
            }
            if !(guest.kernel_mib >= 0.0 && guest.memory_mib > guest.kernel_mib) {
                return Err(format!(
                    "guests {name}: memory-mib is to be more than kernel-mib"
                ));
            }
            for phase in &guest.phases {
                let amounts = [
                    phase.anon_mib,
                    phase.files_mib,
                    phase.reads_mib,
                    phase.touch,
                ];
                let sound = amounts
                    .iter()
                    .all(|amount| *amount >= 0.0 && amount.is_finite());
                if !(sound && phase.work_s > 0.0 && (0.0..=1.0).contains(&phase.common)) {
                    return Err(format!("guests {name}: a phase has an amount below 0"));
                }
            }
        }
        self.policy
            .validate()
            .map_err(|error| format!("policy: {error}"))
    }
}
