//! Memory on its way to guests: to those in distress at once, to the others when there is surplus,
//! and between fluid guests by need.

use super::{
    aerostat::{GRANULE_BYTES, Plan, Round},
    amount::{ratio, scaled},
    distress::Distress,
    guest::follows_demand,
    nodes::{self, Domain},
    reason::Reason,
    share::{Claim, divide},
    types::Mode,
};

/// What a guest in distress asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    pub(super) index: usize,
    pub(super) distress: Distress,
    /// The balloon from which it gets back.
    pub(super) base_bytes: u64,
    /// What it gets in any case: a VM may always ask back.
    pub(super) owed_bytes: u64,
    /// What it asks for, the owed part included.
    pub(super) ask_bytes: u64,
}

/// Serves those in distress: what they are owed, and by weight what the reserve holds. Returns what
/// they asked for and did not get.
pub(super) fn serve(round: &Round<'_>, asks: &[Ask], plans: &mut [Plan<'_>]) -> u64 {
    let host = &round.host;
    let owed: u64 = asks.iter().map(|ask| ask.owed_bytes).sum();
    let reserve = host.available_bytes.saturating_sub(host.low_bytes);
    let claims: Vec<Claim> = asks
        .iter()
        .map(|ask| Claim {
            limit_bytes: ask.ask_bytes.saturating_sub(ask.owed_bytes),
            weight: f64::from(plans[ask.index].vm.weight),
        })
        .collect();
    let extra = divide(reserve.saturating_sub(owed), &claims);
    let mut unmet = 0;
    for (ask, extra) in asks.iter().zip(extra) {
        let grant_bytes = ask.owed_bytes + extra;
        let plan = &mut plans[ask.index];
        plan.target_bytes = ask.base_bytes - grant_bytes;
        plan.reason = Reason::GivesBack {
            distress: ask.distress,
            ask_bytes: ask.ask_bytes.max(grant_bytes),
            grant_bytes,
            reserve_bytes: reserve,
        };
        unmet += ask.ask_bytes.saturating_sub(grant_bytes);
    }
    unmet
}

/// Gives surplus back: half of it to those that use all they have, a quarter of the rest to anybody.
///
/// A smaller balloon is only a permission, and costs the host nothing before it is used. So what
/// guests are permitted and have not used yet is taken off before more is permitted to guests that
/// show no need; otherwise the same surplus would be promised again and again.
///
/// Guests from which something is asked, or would be, since it lacks in one of `domains`, get none.
pub(super) fn divide_surplus(round: &Round<'_>, domains: &[Domain], plans: &mut [Plan<'_>]) {
    let surplus_bytes = round.host.surplus_bytes;
    let unused = |plan: &Plan<'_>| {
        let left = plan.guest.left_bytes;
        left.saturating_sub(plan.vm.current_bytes.unwrap_or(left))
    };
    let promised = plans.iter().map(unused).fold(0, u64::saturating_add);
    let limited = plans.iter().filter(|plan| plan.vm.limited);
    let promised_of_limited = limited.map(unused).fold(0, u64::saturating_add);
    let mut spares = round.budget_spares_bytes();
    let mut rest = surplus_bytes;
    for hungry in [true, false] {
        if !hungry {
            spares = spares.saturating_sub(promised_of_limited);
        }
        let claims: Vec<Claim> = plans
            .iter()
            .map(|plan| {
                let open = !plan.settled
                    && follows_demand(plan.vm.mode)
                    && !plan.may_not_shrink
                    && !nodes::lacks_where_it_is(plan.vm, domains);
                let wants = open && plan.guest.distress.is_none() && plan.guest.hungry() == hungry;
                let above = plan.target_bytes.saturating_sub(plan.baseline_bytes());
                Claim {
                    limit_bytes: if wants { above } else { 0 },
                    weight: f64::from(plan.vm.weight),
                }
            })
            .collect();
        let budget = if hungry {
            surplus_bytes / 2
        } else {
            rest.saturating_sub(promised) / 4
        };
        let shares = divide(budget, &claims);
        let limited = plans
            .iter()
            .zip(&shares)
            .filter(|(plan, _)| plan.vm.limited);
        let of_limited = limited
            .map(|(_, share)| *share)
            .fold(0, u64::saturating_add);
        let within = ratio(spares, of_limited).min(1.0);
        for (plan, share_bytes) in plans.iter_mut().zip(shares) {
            let grant_bytes = if plan.vm.limited {
                scaled(share_bytes, within)
            } else {
                share_bytes
            };
            if grant_bytes >= GRANULE_BYTES.min(plan.target_bytes) && grant_bytes > 0 {
                plan.target_bytes -= grant_bytes;
                rest -= grant_bytes.min(rest);
                if plan.vm.limited {
                    spares = spares.saturating_sub(grant_bytes);
                }
                plan.reason = Reason::Surplus {
                    surplus_bytes,
                    grant_bytes,
                    hungry,
                };
            }
        }
    }
}

/// An operator's target is where a balloon returns to once its guest can afford it (A7).
pub(super) fn return_to_operators_targets(round: &Round<'_>, plans: &mut [Plan<'_>]) {
    for plan in plans {
        let calm = !plan.settled && !plan.stuck && plan.guest.distress.is_none();
        let wanted_bytes = plan.baseline_bytes();
        if plan.vm.mode == Mode::FloorOnly && calm && plan.target_bytes > wanted_bytes {
            // Less is never a burden to the guest.
            plan.target_bytes = wanted_bytes;
            plan.reason = Reason::TowardsManual {
                wanted_bytes,
                step_bytes: 0,
            };
        }
        if !calm || plan.may_not_grow || wanted_bytes <= plan.target_bytes {
            continue;
        }
        let step_bytes = (wanted_bytes - plan.target_bytes)
            .min(round.step_bytes(plan.vm, &plan.guest))
            .min(plan.room_bytes());
        if step_bytes >= GRANULE_BYTES {
            plan.target_bytes += step_bytes;
            plan.reason = Reason::TowardsManual {
                wanted_bytes,
                step_bytes,
            };
        }
    }
}

/// Fluid guests trade (J7): those with idle memory lend it to those that use all they have, in small
/// steps, as much as is taken and no more, so the host's share does not change.
pub(super) fn trade(round: &Round<'_>, plans: &mut [Plan<'_>]) {
    let step = round.config.fluid_step_bytes;
    let mut offers = vec![Claim::default(); plans.len()];
    let mut needs = offers.clone();
    for ((plan, offer), need) in plans.iter().zip(&mut offers).zip(&mut needs) {
        if plan.settled || plan.stuck || plan.vm.mode != Mode::Fluid {
            continue;
        }
        let margin = plan.guest.free_margin_bytes();
        if plan.guest.distress.is_some() || plan.guest.hungry() {
            need.limit_bytes = step.min(plan.target_bytes);
            need.weight = f64::from(plan.vm.weight);
        } else if plan.guest.informed && plan.target_bytes <= plan.vm.target_bytes {
            let spare = plan.guest.free_bytes.saturating_sub(
                margin
                    .saturating_mul(2)
                    .saturating_add(plan.guest.pending_bytes),
            );
            offer.limit_bytes = step.min(spare).min(plan.room_bytes());
            offer.weight = offer.limit_bytes as f64 / f64::from(plan.vm.weight.max(1));
        }
    }
    let sum = |claims: &[Claim]| claims.iter().map(|claim| claim.limit_bytes).sum::<u64>();
    let (offers_bytes, needs_bytes) = (sum(&offers), sum(&needs));
    let amount = offers_bytes.min(needs_bytes);
    if amount < GRANULE_BYTES {
        return;
    }
    let lent = divide(amount, &offers);
    let borrowed = divide(amount, &needs);
    for ((plan, lends), borrows) in plans.iter_mut().zip(lent).zip(borrowed) {
        if lends > 0 {
            plan.target_bytes += lends;
            plan.reason = Reason::Lends {
                bytes: lends,
                needs_bytes,
            };
        }
        if borrows > 0 {
            plan.target_bytes -= borrows;
            plan.reason = Reason::Borrows {
                bytes: borrows,
                offers_bytes,
            };
        }
    }
}
