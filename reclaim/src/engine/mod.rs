//! The loop of aerostatd: observe, decide, act.
//!
//! ```text
//! VM threads ──┐                                             ┌─▶ VM threads: raise, retarget, lower
//! cgroups ─────┼─▶ sample ─▶ policy (pure) ─▶ floor ─▶ steps ─┤
//! host, PSI ───┘                                             └─▶ status: sockets, metrics, history
//! ```
//!
//! Everything that can hang on one VM happens in that VM's thread; the engine itself reads files of
//! the kernel and decides. It holds nothing that cannot be found again: accounts are the limits in the
//! cgroups, targets are in the devices. So it may be killed at any moment (I5).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::{Mutex, RwLock};

pub mod attributes;
mod command;
mod fleet;
mod limits;
mod observe;
pub mod status;
mod steps;
mod worker;

pub use command::{Command, CommandError};

use self::{
    fleet::{Member, Wanted},
    status::Status,
    worker::Worker,
};
use crate::{
    cgroup::{Cgroup, CgroupError, Delegated},
    config::{Config, Limits},
    host::{HostError, HostFiles},
    ledger::{ByNode, Ledger},
    policy::{self, Decision, MemoryLimits, Policy, Sample, VmId},
    vm::Endpoint,
};

/// The longest that a decision waits for VMs to answer; one that is later is seen at the next.
const PATIENCE: Duration = Duration::from_millis(250);

/// What reaches the engine from other threads.
#[derive(Debug)]
pub enum Input {
    /// A pressure trigger fired: decide now.
    Pressure,
    /// An operator wants something; the answer goes to the sender.
    Command(Command, Sender<Result<String, CommandError>>),
    /// A new configuration.
    Reload(Box<Config>),
    /// End.
    Stop,
}

/// Where the engine finds the host; another place in tests.
#[derive(Clone, Debug)]
pub struct World {
    /// The root of `/proc` and `/sys`.
    pub root: PathBuf,
    /// How a cgroup is opened: with the check that it is one, or without.
    pub open_cgroup: fn(&Path) -> Result<Cgroup, CgroupError>,
}

impl Default for World {
    fn default() -> Self {
        Self {
            root: "/".into(),
            open_cgroup: Cgroup::open,
        }
    }
}

/// The engine.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    world: World,
    host: HostFiles,
    policy: Box<dyn Policy>,
    dry_run: bool,
    started: Instant,
    ledger: Arc<Mutex<Ledger>>,
    members: BTreeMap<VmId, Member>,
    /// Accounts whose VM has gone while its cgroup has not.
    orphans: BTreeMap<VmId, PathBuf>,
    observed: (Sender<VmId>, Receiver<VmId>),
    sample: Sample,
    /// What the last steps could not raise because the pool was short.
    wanting_bytes: u64,
    pressure_events: u64,
    ticks: u64,
    scan_trouble: BTreeSet<String>,
    /// The delegated cgroup, if limits are kept and it can be opened.
    root: Option<Delegated>,
    /// What is wrong with it.
    root_trouble: Option<String>,
    status: Arc<RwLock<Arc<Status>>>,
}

impl Engine {
    /// An engine that has not looked at anything yet.
    ///
    /// # Errors
    /// The host's memory cannot be read.
    pub fn new(config: Config, world: World, dry_run: bool) -> Result<Self, HostError> {
        let host = HostFiles::new(&world.root);
        let policy = make_policy(&config);
        let mut engine = Self {
            config,
            world,
            host,
            policy,
            dry_run,
            started: Instant::now(),
            ledger: Arc::default(),
            members: BTreeMap::new(),
            orphans: BTreeMap::new(),
            observed: bounded(64 << 10),
            sample: Sample::default(),
            wanting_bytes: 0,
            pressure_events: 0,
            ticks: 0,
            scan_trouble: BTreeSet::new(),
            root: None,
            root_trouble: None,
            status: Arc::default(),
        };
        engine.sample.host = engine.host.sample()?;
        Ok(engine)
    }

    /// The status, as of the last decision; it is replaced at each.
    #[must_use]
    pub fn status(&self) -> Arc<RwLock<Arc<Status>>> {
        self.status.clone()
    }

    /// The books.
    #[must_use]
    pub fn ledger(&self) -> Arc<Mutex<Ledger>> {
        self.ledger.clone()
    }

    /// Decides again and again, until told to stop.
    pub fn run(&mut self, inputs: &Receiver<Input>) {
        let mut due = Instant::now();
        let mut pressure = false;
        loop {
            // A round that was called for begins a period of its own; others keep to the beat.
            let begin = Instant::now().min(due);
            self.tick(pressure);
            pressure = false;
            due = (begin + self.config.period()).max(Instant::now());
            loop {
                match inputs.recv_deadline(due) {
                    Ok(Input::Pressure) => {
                        self.pressure_events += 1;
                        pressure = true;
                        break;
                    }
                    Ok(Input::Command(command, answer)) => {
                        let outcome = self.command(&command);
                        let changed = outcome.is_ok();
                        // Who asked may have gone.
                        let _ = answer.try_send(outcome);
                        if changed || Instant::now() >= due {
                            break;
                        }
                    }
                    Ok(Input::Reload(config)) => {
                        self.reload(*config);
                        break;
                    }
                    Ok(Input::Stop) => return,
                    Err(error) if error.is_timeout() => break,
                    Err(_) => return,
                }
            }
        }
    }

    /// One round.
    pub fn tick(&mut self, pressure_event: bool) {
        let begin = Instant::now();
        self.refresh();
        self.await_observations();
        match self.host.sample() {
            Ok(host) => self.sample.host = host,
            Err(error) => {
                // Without the host's figures nothing can be decided; nothing is changed either.
                tracing::error!("{error}");
                return;
            }
        }
        self.sample.host.pressure_event = pressure_event;
        self.sample.at = self.started.elapsed();
        self.set_budget();
        self.observe();
        self.adopt();
        self.count_budget();
        let mut decisions = self.policy.decide(&self.sample);
        self.keep_floors(&mut decisions);
        self.explain(&decisions);
        if !self.dry_run {
            self.act(&decisions);
        }
        self.ticks += 1;
        self.publish(&decisions, begin.elapsed());
    }

    /// Takes a new configuration. VMs that are configured as before keep what was set by hand.
    pub fn reload(&mut self, config: Config) {
        if config.policy != self.config.policy {
            self.policy = make_policy(&config);
        }
        let before = self.config.limits();
        self.config = config;
        self.lift_limits(before);
        self.refresh();
        for member in self.members.values_mut() {
            // Limits and cgroups are looked at afresh.
            member.cgroup = None;
            member.limited = false;
        }
        tracing::info!(
            "configuration loaded, {} entries for VMs",
            self.config.vms.len()
        );
    }

    /// Brings the members in line with what should be there.
    fn refresh(&mut self) {
        let (wanted, errors) = fleet::wanted(&self.config);
        let errors: BTreeSet<String> = errors.iter().map(ToString::to_string).collect();
        for error in errors.difference(&self.scan_trouble) {
            tracing::warn!("{error}");
        }
        self.scan_trouble = errors;
        let gone: Vec<VmId> = self
            .members
            .iter()
            .filter(|(vm, member)| {
                wanted
                    .get(*vm)
                    .is_none_or(|w| w.endpoint != member.wanted.endpoint)
            })
            .map(|(vm, _)| vm.clone())
            .collect();
        for vm in gone {
            self.remove(&vm);
        }
        for (vm, wanted) in wanted {
            match self.members.get_mut(&vm) {
                Some(member) if member.wanted == wanted => {}
                Some(member) => {
                    member.settings = wanted.settings.clone();
                    member.wanted = wanted;
                }
                None => self.add(vm, wanted),
            }
        }
    }

    fn add(&mut self, vm: VmId, wanted: Wanted) {
        let worker = Worker::start(
            vm.clone(),
            wanted.endpoint.clone(),
            self.config.timeout(),
            self.ledger.clone(),
            self.observed.0.clone(),
        );
        let worker = match worker {
            Ok(worker) => worker,
            Err(error) => {
                tracing::error!(vm = %vm, "no thread for it: {error}; raise TasksMax=");
                return;
            }
        };
        tracing::info!(vm = %vm, socket = %wanted.endpoint.socket.display(), "found");
        self.orphans.remove(&vm);
        let settings = wanted.settings.clone();
        self.members.insert(
            vm,
            Member {
                wanted,
                settings,
                worker,
                cgroup: None,
                limited: false,
                reason: String::new(),
                troubles: BTreeMap::new(),
                history: std::collections::VecDeque::new(),
            },
        );
    }

    /// Forgets a VM. Its account stays open until its cgroup has gone, with the memory in it.
    fn remove(&mut self, vm: &VmId) {
        let Some(member) = self.members.remove(vm) else {
            return;
        };
        tracing::info!(vm = %vm, "gone");
        if let Some(limits) = member.cgroup.filter(|_| member.limited) {
            self.orphans
                .insert(vm.clone(), limits.cgroup().path().to_owned());
        }
    }

    /// Has all VMs looked at, and waits for those that may answer in time: they have nothing else to do, and
    /// took no longer the last time.
    fn await_observations(&mut self) {
        while self.observed.1.try_recv().is_ok() {}
        let patience = PATIENCE.min(self.config.period() / 2);
        let prompt = |member: &Member| member.worker.seen().took <= patience;
        let members = self.members.iter();
        let mut awaited: BTreeSet<VmId> = members
            .filter(|(_, member)| member.worker.observe() && prompt(member))
            .map(|(vm, _)| vm.clone())
            .collect();
        let deadline = Instant::now() + patience;
        while !awaited.is_empty() {
            let Ok(vm) = self.observed.1.recv_deadline(deadline) else {
                break;
            };
            awaited.remove(&vm);
        }
    }

    /// Enters why each VM's target is what it is.
    fn explain(&mut self, decisions: &[Decision]) {
        for decision in decisions {
            let before = self.vm(&decision.vm).map(|vm| vm.target_bytes);
            let Some(member) = self.members.get_mut(&decision.vm) else {
                continue;
            };
            member.reason = decision.reason.to_string();
            let target = decision.target_bytes;
            if before == Some(target) {
                continue;
            }
            if self.dry_run {
                tracing::info!(vm = %decision.vm, target, "would be set: {}", member.reason);
            } else {
                tracing::debug!(vm = %decision.vm, target, "{}", member.reason);
            }
        }
    }

    /// Opens the delegated cgroup; `None` if no limits are kept.
    fn open_root(&self) -> Option<Result<Delegated, CgroupError>> {
        let root = self.config.host.cgroup_root.as_deref();
        let root = root.filter(|_| self.config.limits() != Limits::None)?;
        Some(Delegated::open_with(root, self.world.open_cgroup))
    }

    /// What all VMs may occupy: as configured, else what the root cgroup may, else the host's memory
    /// without its reserve. The root may come, go and be limited at any time.
    fn set_budget(&mut self) {
        let opened = self.open_root();
        self.root = None;
        let Some(opened) = opened else {
            return;
        };
        let looked = opened.and_then(|root| {
            let root = self.root.insert(root);
            root.root().limits()
        });
        let (limits, trouble) = match looked {
            Ok(limits) => (limits, None),
            Err(error) => (MemoryLimits::default(), Some(error.to_string())),
        };
        if let Some(text) = trouble.as_ref().filter(|_| trouble != self.root_trouble) {
            tracing::warn!("{text}: no limits are kept below it");
        }
        self.root_trouble = trouble;
        let of_root = [limits.high_bytes, limits.max_bytes];
        let of_root = of_root.into_iter().flatten().min();
        let host = &self.sample.host;
        let budget = match (self.config.host.budget, of_root) {
            (Some(size), _) => size.0,
            (None, Some(bytes)) => bytes,
            (None, None) => host.total_bytes.saturating_sub(self.config.host.reserve.0),
        };
        let mut nodes: ByNode = host
            .nodes
            .iter()
            .map(|node| {
                let part = u128::from(budget) * u128::from(node.total_bytes)
                    / u128::from(host.nodes.iter().map(|n| n.total_bytes).sum::<u64>().max(1));
                (node.node, u64::try_from(part).unwrap_or(0))
            })
            .collect();
        let rest = budget - nodes.values().sum::<u64>();
        *nodes
            .entry(host.nodes.first().map_or(policy::NodeId(0), |n| n.node))
            .or_default() += rest;
        self.ledger.lock().set_budget(&nodes);
    }
}

fn make_policy(config: &Config) -> Box<dyn Policy> {
    // The name was checked with the rest of the configuration.
    policy::by_name(&config.policy.name, &config.policy)
        .unwrap_or_else(|| Box::new(policy::Aerostat::new(config.policy.clone())))
}

/// Decisions by the VM that each is about.
fn by_vm(decisions: &[Decision]) -> HashMap<&VmId, &Decision> {
    let decisions = decisions.iter();
    decisions.map(|decision| (&decision.vm, decision)).collect()
}

/// The VMs that are there by the configuration now, and how they are reached.
#[must_use]
pub fn wanted_vms(config: &Config) -> Vec<(VmId, Endpoint)> {
    let (wanted, _) = fleet::wanted(config);
    wanted
        .into_iter()
        .map(|(vm, wanted)| (vm, wanted.endpoint))
        .collect()
}

#[cfg(test)]
mod tests;
