//! `aerostatd check`: what this host can and cannot do, and how to fix it. Nothing is changed.

use std::{fmt, path::Path, time::Duration};

use crate::{
    cgroup::{Cgroup, HOST_PRESSURE, PressureTrigger},
    config::{Config, Limits},
    engine::wanted_vms,
    host::HostFiles,
};

/// How serious a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grade {
    /// As it should be.
    Good,
    /// Works, with less.
    Limited,
    /// Does not work.
    Bad,
}

impl fmt::Display for Grade {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Good => "ok  ",
            Self::Limited => "less",
            Self::Bad => "BAD ",
        })
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How serious it is.
    pub grade: Grade,
    /// What it is about.
    pub subject: String,
    /// What was found, and what to do.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{}  {:<24} {}",
            self.grade, self.subject, self.text
        )
    }
}

/// Looks at the host, and at every VM that is configured.
#[must_use]
pub fn check(config: &Config) -> Vec<Finding> {
    let mut findings = vec![memory(Path::new("/")), pressure()];
    findings.push(trigger(config));
    findings.extend(cgroup(config));
    findings.extend(vms(config));
    findings
}

fn finding(grade: Grade, subject: &str, text: impl Into<String>) -> Finding {
    Finding {
        grade,
        subject: subject.to_owned(),
        text: text.into(),
    }
}

fn memory(root: &Path) -> Finding {
    match HostFiles::new(root).sample() {
        Ok(host) => {
            let text = format!(
                "{} of {} available on {} node(s), {} of swap free",
                super::view::size(host.available_bytes),
                super::view::size(host.total_bytes),
                host.nodes.len().max(1),
                super::view::size(host.swap_free_bytes)
            );
            finding(Grade::Good, "host memory", text)
        }
        Err(error) => finding(Grade::Bad, "host memory", error.to_string()),
    }
}

fn pressure() -> Finding {
    match HostFiles::new(Path::new("/"))
        .sample()
        .map(|host| host.pressure)
    {
        Ok(Some(pressure)) => {
            let text = format!("{:.2} % over 10 s", pressure.some_avg10);
            finding(Grade::Good, "pressure (PSI)", text)
        }
        Ok(None) | Err(_) => finding(
            Grade::Limited,
            "pressure (PSI)",
            "not to be had: decisions rest on available memory alone; boot with psi=1",
        ),
    }
}

fn trigger(config: &Config) -> Finding {
    let stall = Duration::from_millis(*config.host.pressure_stall_ms.get_ref());
    let window = Duration::from_millis(*config.host.pressure_window_ms.get_ref());
    match PressureTrigger::on_file(Path::new(HOST_PRESSURE), stall, window) {
        Ok(_) => finding(
            Grade::Good,
            "pressure triggers",
            "work: pressure is acted on at once",
        ),
        Err(error) => finding(Grade::Limited, "pressure triggers", error.to_string()),
    }
}

fn cgroup(config: &Config) -> Vec<Finding> {
    let Some(root) = &config.host.cgroup_root else {
        let text = "host.cgroup-root is not set: balloons only, memory limits are left alone";
        return vec![finding(Grade::Limited, "cgroup v2", text)];
    };
    if config.limits() == Limits::None {
        let text = "limits = \"none\": balloons only";
        return vec![finding(Grade::Limited, "cgroup v2", text)];
    }
    let cgroup = match Cgroup::open(root) {
        Ok(cgroup) => cgroup,
        Err(error) => return vec![finding(Grade::Bad, "cgroup v2", error.to_string())],
    };
    let mut findings = vec![finding(
        Grade::Good,
        "cgroup v2",
        format!("{} is one", root.display()),
    )];
    findings.push(match cgroup.has_memory_controller() {
        Ok(true) => finding(Grade::Good, "memory controller", "enabled"),
        Ok(false) => finding(
            Grade::Bad,
            "memory controller",
            "not enabled: write \"+memory\" to cgroup.subtree_control of the cgroups above \
             (systemd: MemoryAccounting=yes)",
        ),
        Err(error) => finding(Grade::Bad, "memory controller", error.to_string()),
    });
    findings.push(writable(root));
    findings
}

/// Whether limits below the root can be written; found out by permissions, not by writing.
fn writable(root: &Path) -> Finding {
    let children = Cgroup::open(root).and_then(|cgroup| cgroup.children());
    let first = match &children {
        Ok(names) => names.first(),
        Err(error) => return finding(Grade::Bad, "delegation", error.to_string()),
    };
    let Some(first) = first else {
        let text = "no sub-cgroup yet: VMs go into cgroups of their own below it";
        return finding(Grade::Limited, "delegation", text);
    };
    let file = root.join(first).join("memory.high");
    match rustix::fs::access(&file, rustix::fs::Access::WRITE_OK) {
        Ok(()) => finding(
            Grade::Good,
            "delegation",
            "limits of sub-cgroups can be written",
        ),
        Err(errno) => finding(
            Grade::Bad,
            "delegation",
            format!(
                "{}: {errno}; run as root, or have it delegated to this user (systemd: Delegate=memory)",
                file.display()
            ),
        ),
    }
}

fn vms(config: &Config) -> Vec<Finding> {
    let vms = wanted_vms(config);
    if vms.is_empty() {
        let text = "none found: check the [[vm]] entries, or start one";
        return vec![finding(Grade::Limited, "VMs", text)];
    }
    vms.into_iter()
        .map(|(vm, endpoint)| {
            let subject = format!("VM {vm}");
            let looked = endpoint
                .connect(config.timeout())
                .and_then(|mut vm| vm.observe());
            match looked {
                Ok(seen) if !seen.running => finding(
                    Grade::Limited,
                    &subject,
                    "answers, but its guest or the guest's balloon driver does not run",
                ),
                Ok(seen) if !seen.capabilities.guest_stats => finding(
                    Grade::Limited,
                    &subject,
                    "answers, without statistics of its guest: it is ballooned by its floor alone, so \
                     set one",
                ),
                Ok(seen) => finding(
                    Grade::Good,
                    &subject,
                    format!("answers: {} of memory", super::view::size(seen.memory_bytes)),
                ),
                Err(error) => {
                    let text = format!("{error}; {}", error.advice());
                    finding(Grade::Bad, &subject, text)
                }
            }
        })
        .collect()
}
