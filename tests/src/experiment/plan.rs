//! How large everything is, and what is compared.

use aerostat_reclaim::policy::NAMES;
use clap::{Args, ValueEnum as _};

use super::load::Load;

/// Sizes and rules of a round. The defaults keep the proportions of A10, where 35 GiB of guests shared
/// a host of 32 GiB with half as much swap, but are tighter, since small guests have less to give.
#[derive(Clone, Debug, Args)]
pub struct Plan {
    /// Guests
    #[arg(long, default_value_t = 4)]
    pub guests: usize,
    /// Memory of each guest
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub guest_mib: u64,
    /// Memory of the host that guests can have
    #[arg(long, value_name = "MIB", default_value_t = 360)]
    pub room_mib: u64,
    /// All memory of the host VM; what is above the room is locked
    #[arg(long, value_name = "MIB", default_value_t = 768)]
    pub host_mib: u64,
    /// Swap space of the host
    #[arg(long, value_name = "MIB", default_value_t = 768)]
    pub swap_mib: u64,
    /// Requests a second that the disk for swap can do
    #[arg(long, default_value_t = 1000)]
    pub swap_iops: u32,
    /// Floor of each guest, as an operator would configure it
    #[arg(long, value_name = "MIB", default_value_t = 40)]
    pub floor_mib: u64,
    /// What guests do
    #[arg(long, value_enum, default_value_t = Load::Builds)]
    pub load: Load,
    /// With peaks: how much memory one needs
    #[arg(long, value_name = "MIB", default_value_t = 72)]
    pub peak_mib: u64,
    /// How often each guest goes through its phases
    #[arg(long, default_value_t = 1)]
    pub repeat: u32,
    /// Limits that aerostatd keeps in the guests' cgroups: none, high, high-and-max
    #[arg(long, default_value = "none")]
    pub limits: String,
    /// The rules to compare (may be repeated); all but squeezed if there is none
    #[arg(long = "rule", value_name = "NAME")]
    pub rules: Vec<String>,
    /// Shows every decision that changes a target
    #[arg(long)]
    pub explain: bool,
    /// Decides the order of the rules
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

impl Plan {
    /// The rules in the order in which this round takes them: rotated by the seed, so that none is
    /// always first or last.
    #[must_use]
    pub fn order(&self) -> Vec<String> {
        let mut rules = self.rules.clone();
        if rules.is_empty() {
            let compared = NAMES.iter().filter(|name| **name != "squeezed");
            rules = compared.map(|name| (*name).to_owned()).collect();
        }
        let shift = usize::try_from(self.seed).unwrap_or(0) % rules.len();
        rules.rotate_left(shift);
        rules
    }

    /// The same on the command line of the program inside.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut words: Vec<String> = [
            ("guests", self.guests as u64),
            ("guest-mib", self.guest_mib),
            ("room-mib", self.room_mib),
            ("host-mib", self.host_mib),
            ("swap-mib", self.swap_mib),
            ("peak-mib", self.peak_mib),
            ("floor-mib", self.floor_mib),
            ("repeat", u64::from(self.repeat)),
            ("seed", self.seed),
        ]
        .iter()
        .flat_map(|(name, value)| [format!("--{name}"), value.to_string()])
        .collect();
        words.extend(["--limits".to_owned(), self.limits.clone()]);
        if let Some(load) = self.load.to_possible_value() {
            words.extend(["--load".to_owned(), load.get_name().to_owned()]);
        }
        if self.explain {
            words.push("--explain".to_owned());
        }
        for rule in &self.rules {
            words.extend(["--rule".to_owned(), rule.clone()]);
        }
        words
    }
}
