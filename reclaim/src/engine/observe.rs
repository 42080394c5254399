//! From what was seen to a sample that a policy can rely upon, and to the status.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Engine, by_vm,
    fleet::{Member, Settings, Where},
    limits::{CGROUP_MOUNT, cgroup_of},
    status::{Condition, HostStatus, LedgerStatus, Status, VmStatus},
    worker::Seen,
};
use crate::{
    cgroup::{Cgroup, CgroupError},
    config::Limits,
    policy::{Decision, GuestMemory, VmId, VmNodeSample, VmSample, configured_floor_bytes},
    vm::Observation,
};

/// Observations older than this many periods (and the time-outs of one look) say nothing any more.
const STALE_PERIODS: u32 = 3;

impl Engine {
    /// Makes the sample.
    pub(super) fn observe(&mut self) {
        self.find_cgroups();
        let stale = self.config.period() * STALE_PERIODS + self.config.timeout() * 2;
        let mut samples = Vec::with_capacity(self.members.len());
        for (vm, member) in &mut self.members {
            let seen = member.worker.seen();
            let (mut sample, lie) = vm_sample(vm, &member.settings, &seen, stale);
            member.note(vm, Where::Values, lie);
            if let Some(limits) = member.cgroup.clone() {
                let error = read_cgroup(limits.cgroup(), &mut sample).err();
                if error.as_ref().is_some_and(CgroupError::is_gone) {
                    member.cgroup = None;
                }
                member.note(vm, Where::Cgroup, error.map(|error| error.to_string()));
            }
            samples.push(sample);
        }
        self.sample.vms = samples;
    }

    /// Gives each VM its cgroup: as configured, or that of the VMM's process. One that two VMs are
    /// in tells nothing about either.
    fn find_cgroups(&mut self) {
        let slack =
            (self.config.limits() == Limits::HighAndMax).then_some(self.config.host.max_slack.0);
        let proc = self.world.root.join("proc");
        let mut places: Vec<(VmId, PathBuf)> = Vec::new();
        for (vm, member) in &self.members {
            let of_process = || {
                member
                    .worker
                    .seen()
                    .pid
                    .and_then(|pid| cgroup_of(&proc, Path::new(CGROUP_MOUNT), pid))
            };
            if let Some(path) = member.wanted.cgroup.clone().or_else(of_process) {
                places.push((vm.clone(), path));
            }
        }
        let mut inhabitants = HashMap::<&Path, usize>::new();
        for (_, path) in &places {
            *inhabitants.entry(path).or_default() += 1;
        }
        for (vm, path) in &places {
            let shared = inhabitants.get(path.as_path()).is_some_and(|vms| *vms > 1);
            let Some(member) = self.members.get_mut(vm) else {
                continue;
            };
            if shared {
                member.cgroup = None;
                member.limited = false;
                let text = format!(
                    "{} holds several VMs: what this one occupies is not known; give each VM a cgroup \
                     of its own (systemd-run --scope)",
                    path.display()
                );
                member.note(vm, Where::Cgroup, Some(text));
                continue;
            }
            member.enter_cgroup(vm, path, self.world.open_cgroup, slack);
            let foreign = self.root.as_ref().map(|root| root.check(path).err());
            member.limited = member.cgroup.is_some() && matches!(foreign, Some(None));
            if !member.limited {
                let text = foreign.flatten().map(|error| error.to_string());
                member.note(vm, Where::Limit, text);
            }
        }
    }

    /// Replaces the status.
    pub(super) fn publish(&mut self, decisions: &[Decision], took: Duration) {
        let at_ms = millis(self.sample.at);
        let host = &self.sample.host;
        let (pool, budget, balanced) = {
            let ledger = self.ledger.lock();
            (
                ledger.pool_bytes(),
                ledger.budget_bytes(),
                ledger.balanced(),
            )
        };
        if !balanced {
            tracing::error!("the ledger does not balance; please report this");
        }
        let by_vm = by_vm(decisions);
        let mut vms = Vec::with_capacity(self.members.len());
        for ((vm, member), sample) in self.members.iter_mut().zip(&self.sample.vms) {
            let decision = by_vm.get(vm).copied();
            let target = match decision {
                Some(decision) if !self.dry_run => decision.target_bytes,
                _ => sample.target_bytes,
            };
            let seen = member.worker.seen();
            member.record(at_ms, target, sample.ballooned_bytes);
            let floor = decision.map_or_else(
                || configured_floor_bytes(sample, &self.config.policy),
                |decision| decision.floor_bytes,
            );
            vms.push(VmStatus {
                name: vm.clone(),
                protocol: protocol(member),
                socket: member.wanted.endpoint.socket.display().to_string(),
                cgroup: member
                    .cgroup
                    .as_ref()
                    .map(|l| l.cgroup().path().display().to_string()),
                condition: condition(sample, &seen),
                mode: sample.mode,
                weight: sample.weight,
                memory_bytes: sample.memory_bytes,
                target_bytes: target,
                ballooned_bytes: sample.ballooned_bytes,
                floor_bytes: floor,
                manual_target_bytes: sample.manual_target_bytes,
                current_bytes: sample.current_bytes,
                swap_bytes: sample.swap_current_bytes,
                limit_bytes: self.ledger.lock().account_bytes(vm),
                pressure: sample.pressure,
                guest: sample.guest,
                reason: member.reason.clone(),
                trouble: troubles(&seen, member),
                errors: seen.errors,
                history: member.history.clone(),
            });
        }
        let status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: at_ms,
            ticks: self.ticks,
            tick_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            policy: self.policy.name().to_owned(),
            dry_run: self.dry_run,
            host: HostStatus {
                total_bytes: host.total_bytes,
                available_bytes: host.available_bytes,
                high_bytes: self.config.policy.high_watermark_bytes(host),
                low_bytes: self.config.policy.low_watermark_bytes(host),
                swap_free_bytes: host.swap_free_bytes,
                pressure: host.pressure,
                pressure_events: self.pressure_events,
            },
            ledger: LedgerStatus {
                enabled: self.config.limits() != Limits::None,
                budget_bytes: budget,
                pool_bytes: i64::try_from(pool).unwrap_or(i64::MIN),
                balanced,
            },
            vms,
        };
        *self.status.write() = Arc::new(status);
    }
}

/// Everything that is wrong, in a line.
fn troubles(seen: &Seen, member: &Member) -> Option<String> {
    let all: Vec<&str> = seen
        .trouble
        .iter()
        .chain(&seen.step_trouble)
        .chain(member.troubles.values())
        .map(String::as_str)
        .collect();
    (!all.is_empty()).then(|| all.join(" / "))
}

fn protocol(member: &Member) -> String {
    serde_json::to_value(member.wanted.endpoint.protocol)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn condition(sample: &VmSample, seen: &Seen) -> Condition {
    match &seen.observation {
        None if seen.trouble.is_some() => Condition::Unreachable,
        None => Condition::Absent,
        Some(_) if sample.reachable => Condition::Running,
        Some((last, _)) if !last.running && seen.trouble.is_none() => Condition::Idle,
        Some(_) => Condition::Unreachable,
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// One VM's sample, and what is wrong with it.
fn vm_sample(
    vm: &VmId,
    settings: &Settings,
    seen: &Seen,
    stale: Duration,
) -> (VmSample, Option<String>) {
    let mut sample = VmSample::new(vm.clone(), 0);
    sample.mode = settings.mode;
    sample.weight = settings.weight;
    sample.floor_bytes = settings.floor_bytes;
    sample.manual_target_bytes = settings.manual_target_bytes;
    sample.floor_override = settings.floor_override;
    sample.traits = settings.traits;
    sample.reachable = false;
    let mut trouble = None;
    if let Some((observation, at)) = &seen.observation {
        let (honest, lie) = plausible(observation);
        let age = Instant::now().saturating_duration_since(*at);
        sample.memory_bytes = honest.memory_bytes;
        sample.reach_bytes = honest.reach_bytes;
        sample.ballooned_bytes = honest.ballooned_bytes;
        sample.target_bytes = honest
            .target_bytes
            .or(seen.target_bytes)
            .unwrap_or(honest.ballooned_bytes);
        sample.guest = GuestMemory {
            age: honest.guest.age.map(|at_look| at_look + age),
            ..honest.guest
        };
        sample.capabilities = honest.capabilities;
        sample.reachable = honest.running && age <= stale && honest.memory_bytes > 0;
        trouble = lie;
    }
    (sample, trouble)
}

/// What a VM says, without what cannot be. A lie is about itself alone: it is left out and named.
fn plausible(said: &Observation) -> (Observation, Option<String>) {
    let mut honest = said.clone();
    let mut lies = Vec::new();
    if honest.ballooned_bytes > honest.memory_bytes {
        lies.push("a balloon larger than its memory");
        honest.ballooned_bytes = honest.memory_bytes;
    }
    honest.target_bytes = honest
        .target_bytes
        .map(|target| target.min(honest.memory_bytes));
    let guest = &honest.guest;
    let total = guest.total_bytes.unwrap_or(honest.memory_bytes);
    let above = |part: Option<u64>, whole: u64| part.is_some_and(|part| part > whole);
    if above(guest.total_bytes, honest.memory_bytes)
        || above(guest.available_bytes, total)
        || above(guest.free_bytes, total)
        || above(guest.caches_bytes, total)
    {
        lies.push("more memory than it has");
        honest.guest = GuestMemory::default();
    }
    let trouble = (!lies.is_empty()).then(|| {
        format!(
            "its guest claims {}: that is ignored, its statistics are not relied upon; look into the \
             guest's balloon driver",
            lies.join(", and ")
        )
    });
    (honest, trouble)
}

fn read_cgroup(cgroup: &Cgroup, sample: &mut VmSample) -> Result<(), CgroupError> {
    sample.current_bytes = Some(cgroup.memory_current_bytes()?);
    sample.swap_current_bytes = cgroup.swap_current_bytes()?;
    sample.pressure = cgroup.pressure()?;
    sample.limits = cgroup.limits()?;
    sample.nodes = cgroup
        .numa_stat()?
        .into_iter()
        .map(|(node, stat)| VmNodeSample {
            node,
            current_bytes: stat.current_bytes(),
            ..VmNodeSample::default()
        })
        .collect();
    Ok(())
}
