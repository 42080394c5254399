//! Why a decision came out as it did: its inputs, rule and outcome, one line when displayed.
//!
//! Kept as numbers and written out only when somebody asks, since a host may decide about ten
//! thousand VMs every second.

use std::{fmt, time::Duration};

use serde::{Serialize, Serializer};

use super::{amount::Size, distress::Distress};

/// What bounded a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Its share of the demand was all that was needed.
    Share,
    /// The step bound, or the speed at which it was seen to inflate.
    Step,
    /// The larger step of an emergency.
    EmergencyStep,
    /// Its floor.
    Floor,
}

impl fmt::Display for Bound {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Share => "its share",
            Self::Step => "bounded by its step",
            Self::EmergencyStep => "bounded by its emergency step",
            Self::Floor => "bounded by its floor",
        })
    }
}

/// Why a VM's target is what it is.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Reason {
    /// Its control interface does not answer.
    Unreachable,
    /// Mode manual: the operator's target, or as much of it as the configured floor allows.
    Manual {
        /// The operator's target, or the one that was found.
        wanted_bytes: u64,
        /// The configured floor.
        floor_bytes: u64,
        /// The floor stood in the way.
        clamped: bool,
        /// The operator overrode the floor.
        overridden: bool,
    },
    /// The guest returns to the operator's target.
    TowardsManual {
        /// The operator's target.
        wanted_bytes: u64,
        /// By how much in this step.
        step_bytes: u64,
    },
    /// The host lacks memory and this guest gives.
    Gives {
        /// What all guests together are asked for.
        demand_bytes: u64,
        /// As much of it lacks in the budget of limits, and not on the host.
        budget_bytes: u64,
        /// What the host has available.
        available_bytes: u64,
        /// What will be available soon, if it goes on falling as it does.
        expected_bytes: u64,
        /// What it should have available.
        high_bytes: u64,
        /// By how much this balloon grows.
        give_bytes: u64,
        /// How much the guest could give above its floor.
        able_bytes: u64,
        /// What bounded it.
        bound: Bound,
    },
    /// The host lacks memory, but not from this guest.
    Spared {
        /// What all guests together are asked for.
        demand_bytes: u64,
        /// Why not.
        why: Spared,
    },
    /// The guest suffers, and gets memory back.
    GivesBack {
        /// From what.
        distress: Distress,
        /// What it asks for.
        ask_bytes: u64,
        /// What it gets.
        grant_bytes: u64,
        /// What was in the reserve for all that ask.
        reserve_bytes: u64,
    },
    /// The guest does not follow: its balloon is accepted as it is.
    Stalled {
        /// What it should have reached.
        target_bytes: u64,
        /// What it has.
        ballooned_bytes: u64,
        /// When it will be asked again.
        pause: Duration,
    },
    /// The host has more than it needs: the balloon shrinks.
    Surplus {
        /// What the host has to give back to all.
        surplus_bytes: u64,
        /// What this guest gets.
        grant_bytes: u64,
        /// The guest uses all it has.
        hungry: bool,
    },
    /// Fluid: idle memory goes to another guest.
    Lends {
        /// How much.
        bytes: u64,
        /// What all fluid guests need.
        needs_bytes: u64,
    },
    /// Fluid: idle memory of another guest comes here.
    Borrows {
        /// How much.
        bytes: u64,
        /// What all fluid guests offer.
        offers_bytes: u64,
    },
    /// Nothing to do.
    Steady {
        /// What the host has available.
        available_bytes: u64,
        /// What will be available soon, if it goes on falling as it does.
        expected_bytes: u64,
        /// What it should have available.
        high_bytes: u64,
        /// What is on its way to the host.
        pending_bytes: u64,
    },
    /// Last resort: the host reclaims from the VM's cgroup what the balloon does not bring.
    LastResort {
        /// How much.
        bytes: u64,
        /// What all guests together are asked for.
        demand_bytes: u64,
    },
    /// The floor rose above what the balloon left.
    Floor {
        /// What must be left.
        floor_bytes: u64,
        /// What would have been left.
        left_bytes: u64,
    },
    /// One of the rules written for comparison.
    Rival {
        /// Its name and what it looks at.
        rule: &'static str,
        /// What it saw, in percent.
        percent: f64,
        /// By how much the memory left to the guest changes.
        change_bytes: i64,
    },
}

/// Why a guest does not give although the host lacks memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spared {
    /// It is at its floor.
    AtFloor,
    /// It got memory back a moment ago.
    Held,
    /// It did not follow its target before.
    Stuck,
    /// It has its hands full with what it was asked for already.
    Busy,
    /// Others give enough.
    Enough,
    /// Its mode is not automatic.
    Mode,
}

impl fmt::Display for Spared {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::AtFloor => "it is at its floor",
            Self::Held => "it got memory back a moment ago",
            Self::Stuck => "it did not follow its target before",
            Self::Busy => "it still works on its last step",
            Self::Enough => "others give enough",
            Self::Mode => "its mode leaves it to the operator",
        })
    }
}

/// What the host has available, and how much of it will soon be gone.
struct Available(u64, u64);

impl fmt::Display for Available {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(now, expected) = *self;
        write!(f, "available {}", Size(now))?;
        if expected < now {
            write!(f, ", soon {}", Size(expected))?;
        }
        Ok(())
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unreachable => write!(f, "keeps its target: it cannot be reached"),
            Self::Manual {
                wanted_bytes,
                floor_bytes,
                clamped,
                overridden,
            } => {
                write!(f, "manual: target {}", Size(wanted_bytes))?;
                if clamped {
                    write!(f, ", less as its floor is {}", Size(floor_bytes))?;
                }
                if overridden {
                    write!(
                        f,
                        ", below its floor of {} by explicit override",
                        Size(floor_bytes)
                    )?;
                }
                Ok(())
            }
            Self::TowardsManual {
                wanted_bytes,
                step_bytes,
            } => write!(
                f,
                "calm again: {} on the way to the operator's target of {}",
                Size(step_bytes),
                Size(wanted_bytes)
            ),
            Self::Gives {
                demand_bytes,
                budget_bytes,
                available_bytes,
                expected_bytes,
                high_bytes,
                give_bytes,
                able_bytes,
                bound,
            } => write!(
                f,
                "{} lacks {} ({}, high {}): gives {} of {} above its floor, {bound}",
                match budget_bytes {
                    0 => "host",
                    budget if budget < demand_bytes => "host, with the budget,",
                    _ => "budget",
                },
                Size(demand_bytes),
                Available(available_bytes, expected_bytes),
                Size(high_bytes),
                Size(give_bytes),
                Size(able_bytes)
            ),
            Self::Spared { demand_bytes, why } => {
                write!(f, "host lacks {}: gives nothing, {why}", Size(demand_bytes))
            }
            Self::GivesBack {
                distress,
                ask_bytes,
                grant_bytes,
                reserve_bytes,
            } => write!(
                f,
                "guest in distress ({distress}): gets back {} of {} asked, reserve {}",
                Size(grant_bytes),
                Size(ask_bytes),
                Size(reserve_bytes)
            ),
            Self::Stalled {
                target_bytes,
                ballooned_bytes,
                pause,
            } => write!(
                f,
                "no progress towards {}: accepts {} and asks again in {} s",
                Size(target_bytes),
                Size(ballooned_bytes),
                pause.as_secs()
            ),
            Self::Surplus {
                surplus_bytes,
                grant_bytes,
                hungry,
            } => write!(
                f,
                "host has {} to spare: gets {}{}",
                Size(surplus_bytes),
                Size(grant_bytes),
                if hungry {
                    ", as it uses all it has"
                } else {
                    ""
                }
            ),
            Self::Lends { bytes, needs_bytes } => write!(
                f,
                "fluid: lends {} of idle memory, others need {}",
                Size(bytes),
                Size(needs_bytes)
            ),
            Self::Borrows {
                bytes,
                offers_bytes,
            } => write!(
                f,
                "fluid: borrows {}, others offer {}",
                Size(bytes),
                Size(offers_bytes)
            ),
            Self::Steady {
                available_bytes,
                expected_bytes,
                high_bytes,
                pending_bytes,
            } => {
                write!(
                    f,
                    "steady: {}, high {}",
                    Available(available_bytes, expected_bytes),
                    Size(high_bytes)
                )?;
                if pending_bytes > 0 {
                    write!(f, ", {} of its own on the way", Size(pending_bytes))?;
                }
                Ok(())
            }
            Self::LastResort {
                bytes,
                demand_bytes,
            } => write!(
                f,
                "emergency, host lacks {} and the balloon does not follow: reclaim {} from its cgroup",
                Size(demand_bytes),
                Size(bytes)
            ),
            Self::Floor {
                floor_bytes,
                left_bytes,
            } => write!(
                f,
                "floor {} is above the {} left: raised at once",
                Size(floor_bytes),
                Size(left_bytes)
            ),
            Self::Rival {
                rule,
                percent,
                change_bytes,
            } => write!(
                f,
                "{rule} {percent:.1} %: {}{}",
                if change_bytes < 0 { "-" } else { "+" },
                Size(change_bytes.unsigned_abs())
            ),
        }
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
