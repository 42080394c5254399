//! From decisions to steps that keep the books and the floor.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Engine, by_vm, fleet::Where, limits::VmLimits, worker::Step};
use crate::{
    config::Limits,
    ledger::{
        ByNode,
        limits::{Foreign, LimitFile, reconcile},
    },
    policy::{Budget, Decision, Mode, VmId, VmSample, configured_floor_bytes},
};

/// Limits move in steps of at least this, so that small changes cause no writes.
const LIMIT_STEP_BYTES: u64 = 4 << 20;

/// What is to be done with one VM, before the pool has been shared out.
struct Plan {
    vm: VmId,
    step: Step,
    target_before_bytes: u64,
    /// From its limit to what it is entitled to.
    due_bytes: u64,
    /// From its limit to what it needs soon.
    urgent_bytes: u64,
}

impl Plan {
    fn is_idle(&self) -> bool {
        self.step
            .target_bytes
            .is_none_or(|target| target == self.target_before_bytes)
            && self.step.raise_bytes == 0
            && self.step.lower_to_bytes.is_none()
            && self.step.reclaim_bytes == 0
    }
}

impl Engine {
    /// The floor, once more and whatever the policy said (I6).
    pub(super) fn keep_floors(&self, decisions: &mut [Decision]) {
        for decision in decisions {
            let Some(vm) = self.vm(&decision.vm) else {
                continue;
            };
            if vm.mode == Mode::Manual && vm.floor_override {
                continue;
            }
            let floor = configured_floor_bytes(vm, &self.config.policy);
            let most = vm.memory_bytes.saturating_sub(floor);
            // A balloon that is larger already is not the policy's doing; it only may not grow.
            let most = most.max(vm.target_bytes.min(vm.ballooned_bytes));
            if vm.reachable && decision.target_bytes > most {
                tracing::error!(vm = %vm.id, "a decision below the floor was cut: {}", decision.reason);
                decision.target_bytes = most;
                decision.nodes.clear();
            }
        }
    }

    /// Opens accounts for VMs with a cgroup of ours, looks whether someone else changed limits, and
    /// closes the accounts of cgroups that have gone.
    pub(super) fn adopt(&mut self) {
        if self.dry_run || self.config.limits() == Limits::None {
            return;
        }
        self.close_gone();
        let keeps_max = self.config.limits() == Limits::HighAndMax;
        for vm in self.sample.vms.clone() {
            let Some(member) = self.members.get(&vm.id) else {
                continue;
            };
            let Some(limits) = member.cgroup.clone().filter(|_| member.limited) else {
                continue;
            };
            let outcome = if self.ledger.lock().account_bytes(&vm.id).is_some() {
                // Between the book and the file of a step there would seem to be somebody else.
                if member.worker.is_carrying() {
                    continue;
                }
                self.look_for_strangers(&vm.id, limits.as_ref())
            } else if vm.memory_bytes > 0 {
                self.open_account(&vm, limits.as_ref())
            } else {
                Ok(())
            };
            let trouble = outcome.err().or_else(|| {
                let max = vm.limits.max_bytes.filter(|_| !keeps_max)?;
                (max < vm.memory_bytes).then(|| {
                    format!(
                        "{}/memory.max is {max}, less than its memory: the kernel kills it when its balloon \
                         becomes small; write \"max\" there, or set limits = \"high-and-max\"",
                        limits.cgroup().path().display()
                    )
                })
            });
            if let Some(member) = self.members.get_mut(&vm.id) {
                member.note(&vm.id, Where::Limit, trouble);
            }
        }
    }

    /// Lifts the limits that the configuration does not keep any more: a limit that does not follow its balloon
    /// would throttle or kill the VM one day.
    pub(super) fn lift_limits(&mut self, before: Limits) {
        if self.dry_run || before == Limits::None {
            return;
        }
        let now = self.config.limits();
        let open = self.world.open_cgroup;
        let root = self.open_root().and_then(Result::ok);
        let is_ours = |path: &Path| root.as_ref().is_some_and(|root| root.check(path).is_ok());
        let max_slack = (before == Limits::HighAndMax).then_some(0);
        let orphans = self.orphans.iter().filter_map(|(vm, path)| {
            let limits = VmLimits::new(open(path).ok()?, max_slack);
            Some((vm.clone(), Arc::new(limits)))
        });
        let members = self.members.iter().filter_map(|(vm, member)| {
            // A step that waits is of the old configuration.
            member.worker.carry(None);
            Some((vm.clone(), member.cgroup.clone()?))
        });
        let all: Vec<_> = orphans.chain(members).collect();
        for (vm, limits) in all {
            let keeps_high = is_ours(limits.cgroup().path());
            if keeps_high && (now == before || now == Limits::HighAndMax)
                || self.ledger.lock().account_bytes(&vm).is_none()
            {
                continue;
            }
            if !keeps_high {
                let _ = self.ledger.lock().close(&vm);
                self.orphans.remove(&vm);
            }
            match limits.lift(keeps_high) {
                Ok(()) if keeps_high => tracing::info!(vm = %vm, "its memory.max is lifted"),
                Ok(()) => tracing::info!(vm = %vm, "its limit is lifted"),
                Err(error) => tracing::warn!(vm = %vm, "its limit was not lifted: {error}"),
            }
        }
    }

    /// Enters what all VMs with a limit may occupy, and what they need: what they occupy, with room for what they
    /// take until the next decision as far as their balloons leave them any. Of an account about which nothing is
    /// known all is needed.
    pub(super) fn count_budget(&mut self) {
        let ledger = self.ledger.lock();
        let mut needed = 0_u64;
        for vm in ledger.vms() {
            let account = ledger.account_bytes(vm).unwrap_or(0);
            let seen = self.vm(vm).filter(|vm| vm.memory_bytes > 0);
            let need = seen.and_then(|vm| {
                let current = vm.current_bytes?;
                Some(self.soon_bytes(vm, vm.ballooned_bytes).max(current))
            });
            needed = needed.saturating_add(need.unwrap_or(account));
        }
        self.sample.budget = (self.config.limits() != Limits::None).then(|| Budget {
            total_bytes: ledger.budget_bytes(),
            needed_bytes: needed,
        });
        for vm in &mut self.sample.vms {
            vm.limited = ledger.account_bytes(&vm.id).is_some();
        }
    }

    /// Without a limit so far, a VM begins with what it occupies; it is raised to its due at once, as
    /// far as the pool goes.
    fn open_account(&self, vm: &VmSample, limits: &impl LimitFile) -> Result<(), String> {
        // What keeps it from being read was said already.
        let Some(current) = vm.current_bytes else {
            return Ok(());
        };
        let used: ByNode = vm.nodes.iter().map(|n| (n.node, n.current_bytes)).collect();
        let least = current.saturating_add(self.config.host.slack.0);
        let limit = vm.limits.high_bytes.unwrap_or(least);
        let opened = self.ledger.lock().adopt(&vm.id, limit, &used);
        opened.map_err(|error| error.to_string())?;
        tracing::info!(vm = %vm.id, limit, current, "its account is opened");
        if vm.limits.high_bytes.is_none() {
            limits
                .set_limit_bytes(limit)
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn look_for_strangers(&self, vm: &VmId, limits: &impl LimitFile) -> Result<(), String> {
        match reconcile(&self.ledger, vm, limits).map_err(|error| error.to_string())? {
            Foreign::Untouched => {}
            Foreign::Lowered { to } => tracing::warn!(
                vm = %vm,
                "someone else lowered its limit to {to}: that holds until it needs more"
            ),
            Foreign::Restored { from, to } => tracing::warn!(
                vm = %vm,
                "someone else raised its limit to {from:?}: {to} was written again; to give it more, \
                 raise its floor or the budget"
            ),
            Foreign::Accepted { to } => tracing::warn!(
                vm = %vm,
                "someone else raised its limit, and it uses {to}: accepted, other VMs have less"
            ),
        }
        Ok(())
    }

    fn close_gone(&mut self) {
        let open = self.world.open_cgroup;
        let gone = |path: &PathBuf| open(path).is_err_and(|error| error.is_gone());
        let orphans: Vec<VmId> = self
            .orphans
            .iter()
            .filter(|(_, path)| gone(path))
            .map(|(vm, _)| vm.clone())
            .collect();
        let mut ledger = self.ledger.lock();
        let bereft: Vec<VmId> = ledger
            .vms()
            .filter(|vm| !self.orphans.contains_key(*vm))
            .filter(|vm| {
                self.members
                    .get(*vm)
                    .is_none_or(|member| member.cgroup.is_none())
            })
            .cloned()
            .collect();
        for vm in orphans.into_iter().chain(bereft) {
            self.orphans.remove(&vm);
            if let Ok(bytes) = ledger.close(&vm) {
                tracing::info!(vm = %vm, bytes, "its account is closed, its cgroup has gone");
            }
        }
    }

    /// What a VM may occupy if its balloon holds `ballooned`.
    fn entitled_bytes(&self, vm: &VmSample, ballooned: u64) -> u64 {
        let ballooned = ballooned.min(vm.ballooned_bytes);
        vm.memory_bytes
            .saturating_sub(ballooned)
            .saturating_add(self.config.host.overhead.0)
    }

    /// What a VM will occupy soon if its balloon holds `ballooned`: it uses what it is about to get back, and takes
    /// something until the next decision, but no more than it may have.
    fn soon_bytes(&self, vm: &VmSample, ballooned: u64) -> u64 {
        let due = self.entitled_bytes(vm, ballooned);
        let returning = vm.ballooned_bytes.saturating_sub(ballooned);
        let room = self.config.host.slack.0.saturating_mul(2);
        vm.current_bytes.map_or(due, |current| {
            due.min(current.saturating_add(returning).saturating_add(room))
        })
    }

    /// Carries decisions out.
    pub(super) fn act(&mut self, decisions: &[Decision]) {
        let mut pool = u64::try_from(self.ledger.lock().pool_bytes()).unwrap_or(0);
        let tight = self.wanting_bytes > 0;
        let by_vm = by_vm(decisions);
        // Limits follow the balloons also of VMs about which nothing was decided.
        let vms = self.sample.vms.iter();
        let mut plans: Vec<Plan> = vms
            .filter_map(|vm| self.plan(vm, by_vm.get(&vm.id).copied(), tight))
            .collect();
        // Urgent needs first, then dues, as far as the pool goes.
        let mut wanting = 0_u64;
        for plan in &mut plans {
            let raise = plan.urgent_bytes.min(pool);
            pool -= raise;
            plan.step.raise_bytes = raise;
            let short = plan.urgent_bytes - raise;
            wanting = wanting.saturating_add(short);
            if let Some(target) = &mut plan.step.target_bytes {
                // What is not covered stays in the balloon, on whatever node it is.
                if short > 0 {
                    plan.step.nodes.clear();
                }
                *target = target
                    .saturating_add(short)
                    .min(plan.target_before_bytes.max(*target));
            }
        }
        for plan in &mut plans {
            let raise = (plan.due_bytes - plan.urgent_bytes).min(pool);
            if raise >= LIMIT_STEP_BYTES {
                pool -= raise;
                plan.step.raise_bytes += raise;
            }
        }
        for plan in plans {
            if let Some(member) = self.members.get(&plan.vm) {
                let step = (!plan.is_idle()).then_some(plan.step);
                member.worker.carry(step);
            }
        }
        if wanting > 0 && !tight {
            tracing::warn!(
                "the pool is short of {wanting} bytes: what VMs do not use of their limits is taken \
                 back; raise the budget, or lower floors"
            );
        }
        self.wanting_bytes = wanting;
    }

    /// What a decision, or none, means for one VM and its limit.
    fn plan(&self, vm: &VmSample, decision: Option<&Decision>, tight: bool) -> Option<Plan> {
        let member = self.members.get(&vm.id)?;
        let target = decision.map_or(vm.target_bytes, |decision| decision.target_bytes);
        let mut plan = Plan {
            vm: vm.id.clone(),
            step: Step {
                target_bytes: (vm.reachable && target != vm.target_bytes).then_some(target),
                nodes: decision.map_or_else(Vec::new, |decision| decision.nodes.clone()),
                ..Step::default()
            },
            target_before_bytes: vm.target_bytes,
            due_bytes: 0,
            urgent_bytes: 0,
        };
        let account = self.ledger.lock().account_bytes(&vm.id);
        let limits = member.cgroup.clone().filter(|_| member.limited);
        let (Some(limits), Some(account)) = (limits, account) else {
            return Some(plan);
        };
        let slack = self.config.host.slack.0;
        plan.step.limits = Some((limits, slack));
        if self.config.host.allow_reclaim {
            plan.step.reclaim_bytes = decision.map_or(0, |decision| decision.reclaim_bytes);
        }
        if vm.memory_bytes == 0 {
            return Some(plan);
        }
        let due = self.entitled_bytes(vm, target);
        let soon = self.soon_bytes(vm, target);
        plan.due_bytes = due.saturating_sub(account);
        plan.urgent_bytes = soon.saturating_sub(account);
        // When others are short, what it does not use is theirs.
        let enough = if tight { soon } else { due };
        if account.saturating_sub(enough) >= LIMIT_STEP_BYTES {
            plan.step.lower_to_bytes = Some(enough);
        }
        if tight && plan.urgent_bytes == 0 {
            plan.due_bytes = 0;
        }
        Some(plan)
    }

    pub(super) fn vm(&self, id: &VmId) -> Option<&VmSample> {
        // The sample is in the order of the names.
        let at = self.sample.vms.binary_search_by(|vm| vm.id.cmp(id)).ok()?;
        self.sample.vms.get(at)
    }
}
