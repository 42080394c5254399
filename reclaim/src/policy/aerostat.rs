//! The rule that `aerostatd` uses: give what the host lacks, from those who can best do without it,
//! and give back at once to those who cannot.
//!
//! One round, in this order:
//! 1. every guest is looked at: floor, distress, speed ([`super::guest`], [`super::distress`]);
//! 2. what concerns one guest alone is settled: unreachable, manual, stalled, below its floor;
//! 3. guests in distress get memory back, from the reserve between the watermarks; what the reserve
//!    does not hold becomes demand upon the others;
//! 4. demand is divided over what guests have above their floors ([`super::giving`]), or surplus
//!    is given back ([`super::returning`]); both only where a node or the budget of limits lacks
//!    memory and the host does not, and then to others;
//! 5. fluid guests trade idle memory;
//! 6. no target leaves less than the floor, whatever the steps before said (I6).

use std::{collections::HashMap, time::Duration};

use super::{
    amount::{MIB, scaled, whole_pages},
    config::PolicyConfig,
    demand::{self, HostState, Trend},
    giving,
    guest::{self, Guest, configured_floor_bytes},
    nodes::{self, Domain, Place},
    reason::Reason,
    returning,
    state::VmState,
    types::{Decision, Mode, NodeTarget, Policy, Pressure, Sample, VmId, VmSample},
};

/// Targets change by at least this: below it a change is not worth waking a guest.
pub(super) const GRANULE_BYTES: u64 = MIB;

/// The period assumed before there is a second sample.
const FIRST_PERIOD: Duration = Duration::from_secs(1);

/// What is going to be decided about one VM.
#[derive(Clone, Debug)]
pub(super) struct Plan<'a> {
    pub(super) vm: &'a VmSample,
    pub(super) guest: Guest,
    pub(super) target_bytes: u64,
    /// What this round adds to the balloon on each host node, where demand is by node.
    pub(super) node_gives: Vec<(super::types::NodeId, u64)>,
    pub(super) reclaim_bytes: u64,
    pub(super) reason: Reason,
    /// Settled by a rule that nothing after may change.
    pub(super) settled: bool,
    /// It is left alone, since it did not follow.
    pub(super) stuck: bool,
    /// Its balloon shrank a moment ago.
    pub(super) may_not_grow: bool,
    /// Its balloon grew a moment ago.
    pub(super) may_not_shrink: bool,
}

impl Plan<'_> {
    /// How much the balloon could still grow above what is planned.
    pub(super) fn room_bytes(&self) -> u64 {
        let most = self.guest.most_ballooned_bytes(self.vm);
        most.saturating_sub(self.target_bytes)
    }

    /// The balloon the operator asked for.
    pub(super) fn baseline_bytes(&self) -> u64 {
        self.vm.manual_target_bytes.unwrap_or(0)
    }
}

/// What holds for all VMs in one round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round<'a> {
    pub(super) config: &'a PolicyConfig,
    pub(super) sample: &'a Sample,
    pub(super) host: HostState,
    pub(super) period: Duration,
    pub(super) number: u64,
}

impl Round<'_> {
    /// What VMs with a limit need beyond the budget.
    fn budget_lacks_bytes(&self) -> u64 {
        let budget = self.sample.budget.unwrap_or_default();
        budget.needed_bytes.saturating_sub(budget.total_bytes)
    }

    /// What VMs with a limit may have of a surplus, all together: what the budget holds beyond their needs and the
    /// band, so that what they get is not what they are asked for the next time.
    pub(super) fn budget_spares_bytes(&self) -> u64 {
        let Some(budget) = self.sample.budget else {
            return u64::MAX;
        };
        let band_bytes = scaled(budget.total_bytes, self.config.band_percent / 100.0);
        budget
            .total_bytes
            .saturating_sub(budget.needed_bytes.saturating_add(band_bytes))
    }

    /// How far a balloon may grow in this round: the step bound, and no further ahead than the guest
    /// was seen to follow. Memory the guest has not in use is no shock to it, so half of it may go
    /// at once, all of it in an emergency.
    pub(super) fn step_bytes(&self, vm: &VmSample, guest: &Guest) -> u64 {
        let config = self.config;
        let mut step = if self.host.emergency {
            scaled(vm.memory_bytes, config.emergency_step_percent / 100.0)
        } else {
            scaled(vm.memory_bytes, config.step_percent / 100.0).min(config.step_bytes)
        };
        if guest.informed {
            let idle = guest.free_bytes.saturating_sub(guest.free_margin_bytes());
            step = step.max(if self.host.emergency { idle } else { idle / 2 });
        }
        if let Some(rate) = guest.rate_bytes {
            let reach = scaled(rate, self.period.as_secs_f64());
            step = step.min(reach.max(4 * GRANULE_BYTES));
        }
        step.saturating_sub(guest.pending_bytes)
    }
}

/// The rule, with what it remembers.
#[derive(Clone, Debug)]
pub struct Aerostat {
    config: PolicyConfig,
    memory: Memory,
}

/// What is remembered from round to round.
#[derive(Clone, Debug, Default)]
struct Memory {
    /// In the order of the last sample, which is nearly always that of the next one.
    states: Vec<(VmId, VmState)>,
    round: u64,
    at: Option<Duration>,
    pressure: Option<Pressure>,
    trend: Trend,
}

impl Aerostat {
    /// The rule with these settings and no memory of any VM.
    #[must_use]
    pub fn new(config: PolicyConfig) -> Self {
        let memory = Memory::default();
        Self { config, memory }
    }
}

impl Policy for Aerostat {
    fn name(&self) -> &'static str {
        "aerostat"
    }

    fn decide(&mut self, sample: &Sample) -> Vec<Decision> {
        let memory = &mut self.memory;
        memory.round += 1;
        memory.line_up(&sample.vms);
        let balloons = sample.vms.iter().map(|vm| vm.ballooned_bytes);
        let ballooned_bytes = balloons.fold(0, u64::saturating_add);
        let available_bytes = sample.host.available_bytes;
        memory
            .trend
            .observe(sample.at, available_bytes, ballooned_bytes);
        let round = round(&self.config, sample, memory);
        let mut plans: Vec<Plan<'_>> = Vec::with_capacity(sample.vms.len());
        for (vm, (_, state)) in sample.vms.iter().zip(&mut memory.states) {
            plans.push(look(vm, state, &round));
        }

        let unmet = memory.give_back(&round, &mut plans);
        let pending = pending_bytes(plans.iter());
        let demand = round.host.demand_bytes.saturating_sub(pending);
        let demand = demand.saturating_add(unmet);
        let by_node = demand::node_demands(&sample.host, &self.config);
        let mut lacks = nodes::domains(&sample.host, demand, by_node, pending, &sample.vms);
        let of_host: u64 = lacks.iter().map(|domain| domain.demand_bytes).sum();
        let limited = plans.iter().filter(|plan| plan.vm.limited);
        let pending_of_limited = pending_bytes(limited);
        // What guests give to the host comes out of their limits too.
        let of_budget = round
            .budget_lacks_bytes()
            .saturating_sub(pending_of_limited)
            .saturating_sub(demand);
        lacks.push(Domain {
            place: Place::Budget,
            demand_bytes: of_budget,
        });
        let all = of_host.saturating_add(of_budget);
        if all >= GRANULE_BYTES {
            giving::divide_demand(&round, &lacks, all, &mut plans);
        }
        // A node, or the budget, may lack for ever what nobody can give: those that are not concerned have theirs.
        if demand < GRANULE_BYTES && round.host.surplus_bytes > 0 {
            returning::divide_surplus(&round, &lacks, &mut plans);
        }
        returning::return_to_operators_targets(&round, &mut plans);
        returning::trade(&round, &mut plans);

        memory.finish(&round, plans)
    }
}

fn round<'a>(config: &'a PolicyConfig, sample: &'a Sample, memory: &Memory) -> Round<'a> {
    let elapsed = memory.at.map(|at| sample.at.saturating_sub(at));
    let period = elapsed.filter(|elapsed| !elapsed.is_zero());
    let pressure = demand::recent_percent(
        sample.host.pressure.as_ref(),
        memory.pressure.as_ref(),
        period.unwrap_or_default().as_secs_f64(),
    );
    let guests = sample.vms.iter().map(VmSample::left_bytes);
    let guests_bytes = guests.fold(0, u64::saturating_add);
    Round {
        config,
        sample,
        host: demand::assess(&sample.host, &memory.trend, pressure, guests_bytes, config),
        period: period.unwrap_or(FIRST_PERIOD),
        number: memory.round,
    }
}

/// Looks at one VM and settles what concerns it alone.
fn look<'a>(vm: &'a VmSample, state: &mut VmState, round: &Round<'_>) -> Plan<'a> {
    let at = round.sample.at;
    let config = round.config;
    let mut plan = Plan {
        vm,
        guest: guest::assess(vm, state, at, config),
        target_bytes: vm.target_bytes,
        node_gives: Vec::new(),
        reclaim_bytes: 0,
        reason: Reason::Unreachable,
        settled: true,
        stuck: state.stuck(at),
        may_not_grow: false,
        may_not_shrink: false,
    };
    if !vm.reachable {
        return plan;
    }
    if vm.mode == Mode::Manual {
        // What it does not follow is not on its way.
        plan.stuck |= state.stalled(vm, at, config);
        manual(&mut plan, config);
        return plan;
    }
    plan.settled = false;
    plan.reason = Reason::Steady {
        available_bytes: round.host.available_bytes,
        expected_bytes: round.host.expected_bytes,
        high_bytes: round.host.high_bytes,
        pending_bytes: plan.guest.pending_bytes,
    };
    // Memory on loan is not held: that is what makes it fluid.
    let hold = match vm.mode {
        Mode::Fluid => Duration::ZERO,
        _ => config.hold(),
    };
    plan.may_not_grow = state.may_not_grow(at, hold);
    plan.may_not_shrink = state.may_not_shrink(at, hold);
    if plan.guest.distress.is_none() {
        state.calm();
        if state.stalled(vm, at, config) {
            plan.reason = Reason::Stalled {
                target_bytes: vm.target_bytes,
                ballooned_bytes: vm.ballooned_bytes,
                pause: state.give_up(at, config),
            };
            plan.target_bytes = vm.ballooned_bytes;
            plan.guest.pending_bytes = 0;
            plan.stuck = true;
            plan.settled = true;
        }
    }
    plan
}

/// Absolutely manual (J3): the operator's target. The configured floor holds even so, unless it was
/// overridden explicitly (J2).
fn manual(plan: &mut Plan<'_>, config: &PolicyConfig) {
    let vm = plan.vm;
    let floor_bytes = configured_floor_bytes(vm, config);
    plan.guest.floor_bytes = floor_bytes;
    let wanted_bytes = vm.manual_target_bytes.unwrap_or(vm.target_bytes);
    let most = vm.memory_bytes - floor_bytes;
    let overridden = vm.floor_override && vm.manual_target_bytes.is_some() && wanted_bytes > most;
    plan.target_bytes = if overridden {
        plan.guest.floor_bytes = vm.memory_bytes.saturating_sub(wanted_bytes);
        wanted_bytes.min(vm.memory_bytes)
    } else {
        wanted_bytes.min(most)
    };
    plan.reason = Reason::Manual {
        wanted_bytes,
        floor_bytes,
        clamped: plan.target_bytes < wanted_bytes,
        overridden,
    };
}

/// What guests have been asked for and will still bring.
fn pending_bytes<'a>(plans: impl Iterator<Item = &'a Plan<'a>>) -> u64 {
    let on_the_way =
        |plan: &&Plan<'_>| plan.vm.reachable && !plan.stuck && plan.guest.distress.is_none();
    let pending = plans.filter(on_the_way).map(|plan| {
        let ahead = plan.target_bytes.saturating_sub(plan.vm.ballooned_bytes);
        scaled(ahead, plan.guest.yields)
    });
    pending.fold(0, u64::saturating_add)
}

impl Memory {
    /// Brings the states into the order of the VMs: new ones begin, those that have gone are
    /// forgotten.
    fn line_up(&mut self, vms: &[VmSample]) {
        let known = self.states.iter().map(|(id, _)| id);
        if known.eq(vms.iter().map(|vm| &vm.id)) {
            return;
        }
        let mut known: HashMap<VmId, VmState> = self.states.drain(..).collect();
        let states = vms.iter().map(|vm| {
            let state = known.remove(&vm.id).unwrap_or_default();
            (vm.id.clone(), state)
        });
        self.states = states.collect();
    }

    /// Gives back to guests in distress; returns what the reserve did not hold for them.
    fn give_back(&mut self, round: &Round<'_>, plans: &mut [Plan<'_>]) -> u64 {
        let config = round.config;
        let mut asks = Vec::new();
        for (index, plan) in plans.iter().enumerate() {
            let Some(distress) = plan.guest.distress.filter(|_| !plan.settled) else {
                continue;
            };
            // What it was still asked for is cancelled; it asks on top of that.
            let base = plan.vm.target_bytes.min(plan.vm.ballooned_bytes);
            let Some((_, state)) = self.states.get_mut(index) else {
                continue;
            };
            let to_floor = base.saturating_sub(plan.guest.most_ballooned_bytes(plan.vm));
            let ask = state.next_give_back(config, plan.vm.memory_bytes);
            asks.push(returning::Ask {
                index,
                distress,
                base_bytes: base,
                // The floor is no favour: it does not come out of the reserve.
                owed_bytes: to_floor.max(config.least_give_back_bytes).min(base),
                ask_bytes: ask.max(to_floor).min(base),
            });
        }
        returning::serve(round, &asks, plans)
    }

    /// Keeps floors, remembers, and writes the decisions down.
    fn finish(&mut self, round: &Round<'_>, plans: Vec<Plan<'_>>) -> Vec<Decision> {
        let at = round.sample.at;
        let mut decisions = Vec::with_capacity(plans.len());
        for (mut plan, (_, state)) in plans.into_iter().zip(&mut self.states) {
            keep_floor(&mut plan);
            if plan.settled {
                state.remember(plan.vm, plan.target_bytes, at);
            } else {
                state.settle(plan.vm, plan.target_bytes, at);
            }
            let node_targets: Vec<NodeTarget> = nodes::targets(&plan);
            decisions.push(Decision {
                vm: plan.vm.id.clone(),
                target_bytes: plan.target_bytes,
                nodes: node_targets,
                reclaim_bytes: plan.reclaim_bytes,
                floor_bytes: plan.guest.floor_bytes,
                reason: plan.reason,
            });
        }
        self.at = Some(at);
        self.pressure = round.sample.host.pressure;
        decisions
    }
}

/// The last word (I6): a target in whole pages that leaves the floor to the guest.
fn keep_floor(plan: &mut Plan<'_>) {
    if !plan.vm.reachable {
        return;
    }
    let most = plan.guest.most_ballooned_bytes(plan.vm);
    if plan.target_bytes > most {
        let left_bytes = plan.vm.memory_bytes.saturating_sub(plan.target_bytes);
        plan.reason = Reason::Floor {
            floor_bytes: plan.guest.floor_bytes,
            left_bytes,
        };
        plan.target_bytes = most;
    }
    plan.target_bytes = whole_pages(plan.target_bytes);
}
