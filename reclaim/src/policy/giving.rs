//! Who gives what the host lacks.
//!
//! Weights are those of ESX's min-funding revocation: a page costs its owner the more, the more
//! weight it has and the less of its memory is idle, rho = S / (P (f + k (1 - f))); the lower the
//! price, the larger the part. Memory that is not in use at all goes first, since it costs its guest
//! nothing to lose: caches are touched only when free memory does not suffice.

use super::{
    aerostat::{GRANULE_BYTES, Plan, Round},
    amount::scaled,
    guest::follows_demand,
    nodes::{self, Domain, Place},
    reason::{Bound, Reason, Spared},
    share::{Claim, divide},
    types::VmSample,
};

/// One that can give.
#[derive(Clone, Copy, Debug)]
struct Giver {
    plan: usize,
    weight: f64,
    /// Bytes by which its balloon may grow in this round, above and within its free memory.
    step_bytes: u64,
    free_bytes: u64,
    given_bytes: u64,
}

/// Divides the demand of every domain over those that can give.
pub(super) fn divide_demand(
    round: &Round<'_>,
    domains: &[Domain],
    demand_bytes: u64,
    plans: &mut [Plan<'_>],
) {
    let mut givers = Vec::new();
    for (index, plan) in plans.iter_mut().enumerate() {
        match willing(round, plan) {
            Ok((step_bytes, free_bytes)) => givers.push(Giver {
                plan: index,
                weight: price(round, plan),
                step_bytes,
                free_bytes,
                given_bytes: 0,
            }),
            Err(why) if !plan.settled && plan.guest.distress.is_none() => {
                plan.reason = Reason::Spared { demand_bytes, why };
            }
            Err(_) => {}
        }
    }
    let mut missing = 0;
    for domain in domains {
        missing += divide_domain(round, domain, &mut givers, plans);
    }
    let of_budget = |domain: &&Domain| domain.place == Place::Budget;
    let budget = domains.iter().filter(of_budget);
    let budget_bytes = budget.map(|domain| domain.demand_bytes).sum();
    for giver in &givers {
        let plan = &mut plans[giver.plan];
        explain(round, (demand_bytes, budget_bytes), giver, plan);
    }
    if round.host.emergency && missing >= GRANULE_BYTES {
        last_resort(round, missing, plans);
    }
}

/// How much it can give in this round, and how much of that is not in use; or why nothing.
fn willing(round: &Round<'_>, plan: &Plan<'_>) -> Result<(u64, u64), Spared> {
    if plan.settled || !follows_demand(plan.vm.mode) {
        return Err(if plan.stuck {
            Spared::Stuck
        } else {
            Spared::Mode
        });
    }
    if plan.stuck {
        return Err(Spared::Stuck);
    }
    // In an emergency only those that suffer now are spared.
    if plan.guest.distress.is_some() || plan.may_not_grow && !round.host.emergency {
        return Err(Spared::Held);
    }
    let room = plan.room_bytes();
    if room < GRANULE_BYTES {
        return Err(Spared::AtFloor);
    }
    let step = round.step_bytes(plan.vm, &plan.guest).min(room);
    if step < GRANULE_BYTES {
        return Err(Spared::Busy);
    }
    let spare = plan.guest.free_margin_bytes() + plan.guest.pending_bytes;
    let free = plan.guest.free_bytes.saturating_sub(spare);
    Ok((step, free.min(step)))
}

/// The inverse of the price of its pages: how large its part is.
fn price(round: &Round<'_>, plan: &Plan<'_>) -> f64 {
    let active = plan.guest.active();
    let taxed = active + round.config.idle_cost() * (1.0 - active);
    // What the host cannot swap it can get from the balloon alone (J5).
    let only_way = round.sample.host.swap_free_bytes > 0
        && !plan.vm.traits.demand_fault_from_swap
        && plan.vm.current_bytes.is_some();
    let urgency = if only_way { 1.25 } else { 1.0 };
    plan.guest.left_bytes as f64 * taxed * urgency / f64::from(plan.vm.weight.max(1))
}

/// Divides one domain's demand, free memory first. Returns what nobody could give.
fn divide_domain(
    round: &Round<'_>,
    domain: &Domain,
    givers: &mut [Giver],
    plans: &mut [Plan<'_>],
) -> u64 {
    let mut missing = domain.demand_bytes;
    for free_only in [true, false] {
        if missing < GRANULE_BYTES {
            break;
        }
        // In bytes that reach the host: what a balloon takes without freeing it does not count.
        let claims: Vec<Claim> = givers
            .iter()
            .map(|giver| {
                let plan = &plans[giver.plan];
                let limit = if free_only {
                    giver.free_bytes
                } else {
                    giver.step_bytes
                };
                let on_node = nodes::part_on(plan.vm, domain);
                let left = limit.saturating_sub(giver.given_bytes);
                Claim {
                    limit_bytes: scaled(left, on_node * plan.guest.yields),
                    weight: giver.weight * on_node,
                }
            })
            .collect();
        let shares = divide(missing, &claims);
        let start = usize::try_from(round.number).unwrap_or(0);
        let shares = in_granules(&shares, &claims, start);
        for (giver, share) in givers.iter_mut().zip(&shares) {
            if *share == 0 {
                continue;
            }
            let plan = &mut plans[giver.plan];
            let on_node = nodes::part_on(plan.vm, domain);
            let spread = if nodes::by_node(plan.vm) {
                1.0
            } else {
                on_node
            };
            let most = giver.step_bytes.saturating_sub(giver.given_bytes);
            let give = scaled(*share, 1.0 / (plan.guest.yields * spread)).min(most);
            giver.given_bytes += give;
            plan.target_bytes += give;
            if let Place::Node(node, _) = domain.place
                && nodes::by_node(plan.vm)
            {
                plan.node_gives.push((node, give));
            }
            missing = missing.saturating_sub(*share);
        }
    }
    missing
}

/// Small parts are gathered: a thousand guests are not all woken for a page each. Who gives for its
/// neighbours differs from round to round.
fn in_granules(shares: &[u64], claims: &[Claim], start: usize) -> Vec<u64> {
    let mut gathered = vec![0; shares.len()];
    let mut carry = 0;
    for offset in 0..shares.len() {
        let index = (start + offset) % shares.len();
        carry += shares[index];
        let part = carry.min(claims[index].limit_bytes);
        if part >= GRANULE_BYTES && claims[index].weight > 0.0 {
            gathered[index] = part;
            carry -= part;
        }
    }
    gathered
}

/// Says why it gives, of a demand and as much of it as lacks in the budget.
fn explain(
    round: &Round<'_>,
    (demand_bytes, budget_bytes): (u64, u64),
    giver: &Giver,
    plan: &mut Plan<'_>,
) {
    if giver.given_bytes == 0 {
        let why = Spared::Enough;
        plan.reason = Reason::Spared { demand_bytes, why };
        return;
    }
    let able_bytes = plan.room_bytes() + giver.given_bytes;
    let bound = if giver.given_bytes >= able_bytes {
        Bound::Floor
    } else if giver.given_bytes < giver.step_bytes {
        Bound::Share
    } else if round.host.emergency {
        Bound::EmergencyStep
    } else {
        Bound::Step
    };
    plan.reason = Reason::Gives {
        demand_bytes,
        budget_bytes,
        available_bytes: round.host.available_bytes,
        expected_bytes: round.host.expected_bytes,
        high_bytes: round.host.high_bytes,
        give_bytes: giver.given_bytes,
        able_bytes,
        bound,
    };
}

/// Balloons that do not follow, in VMs whose memory the host can swap: reclaim from their cgroups,
/// down to their floors and no further.
fn last_resort(round: &Round<'_>, missing_bytes: u64, plans: &mut [Plan<'_>]) {
    if round.sample.host.swap_free_bytes == 0 {
        return;
    }
    let claims: Vec<Claim> = plans
        .iter()
        .map(|plan| {
            let vm: &VmSample = plan.vm;
            let helpless = vm.reachable && plan.stuck && follows_demand(vm.mode);
            let able = helpless && vm.traits.demand_fault_from_swap;
            let occupied = vm.current_bytes.filter(|_| able).unwrap_or(0);
            let above = occupied.saturating_sub(plan.guest.floor_bytes);
            let step = scaled(vm.memory_bytes, round.config.step_percent / 100.0);
            Claim {
                limit_bytes: above.min(step),
                weight: price(round, plan),
            }
        })
        .collect();
    for (plan, bytes) in plans.iter_mut().zip(divide(missing_bytes, &claims)) {
        if bytes >= GRANULE_BYTES {
            plan.reclaim_bytes = bytes;
            plan.reason = Reason::LastResort {
                bytes,
                demand_bytes: missing_bytes,
            };
        }
    }
}
