//! The attributes of a VM: one value each, in the manner of sysfs (J8). The same table serves
//! `aerostatd get` and `set`, the metrics and the documentation, so they cannot disagree.

use std::time::Duration;

use super::status::VmStatus;

/// What an attribute counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Milliseconds.
    Milliseconds,
    /// Percent of time.
    Percent,
    /// A number without a unit.
    Number,
    /// One of some words.
    Word,
    /// A line for people.
    Line,
}

impl Unit {
    /// Its name in the documentation.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Milliseconds => "ms",
            Self::Percent => "percent",
            Self::Number => "number",
            Self::Word => "word",
            Self::Line => "line",
        }
    }
}

/// One attribute.
#[derive(Clone, Copy, Debug)]
pub struct Attribute {
    /// Its name.
    pub name: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// `aerostatd set` changes it.
    pub writable: bool,
    /// What it is.
    pub purpose: &'static str,
    /// Its value; `None` if it is not known for this VM.
    pub value: fn(&VmStatus) -> Option<String>,
}

const fn bytes(
    name: &'static str,
    purpose: &'static str,
    value: fn(&VmStatus) -> Option<String>,
) -> Attribute {
    Attribute {
        name,
        unit: Unit::Bytes,
        writable: false,
        purpose,
        value,
    }
}

const fn other(
    name: &'static str,
    unit: Unit,
    purpose: &'static str,
    value: fn(&VmStatus) -> Option<String>,
) -> Attribute {
    Attribute {
        name,
        unit,
        writable: false,
        purpose,
        value,
    }
}

const fn writable(attribute: Attribute) -> Attribute {
    Attribute {
        writable: true,
        ..attribute
    }
}

fn text(number: Option<u64>) -> Option<String> {
    number.map(|number| number.to_string())
}

fn age_ms(age: Duration) -> String {
    age.as_millis().to_string()
}

/// All of them. The names are the same on every device.
pub const ATTRIBUTES: &[Attribute] = &[
    writable(bytes(
        "target-bytes",
        "what the balloon should hold",
        |vm| text(Some(vm.target_bytes)),
    )),
    bytes("actual-bytes", "what the balloon holds", |vm| {
        text(Some(vm.ballooned_bytes))
    }),
    writable(bytes(
        "floor-bytes",
        "memory always left to the guest",
        |vm| text(Some(vm.floor_bytes)),
    )),
    writable(other(
        "mode",
        Unit::Word,
        "manual, floor-only, auto or fluid: how far the policy is followed",
        |vm| {
            serde_json::to_value(vm.mode)
                .ok()?
                .as_str()
                .map(str::to_owned)
        },
    )),
    writable(other(
        "weight",
        Unit::Number,
        "share against other VMs, 100 is ordinary",
        |vm| Some(vm.weight.to_string()),
    )),
    other(
        "condition",
        Unit::Word,
        "absent, unreachable, idle or running",
        |vm| Some(vm.condition.as_str().to_owned()),
    ),
    other("protocol", Unit::Word, "how the VM is reached", |vm| {
        Some(vm.protocol.clone())
    }),
    bytes(
        "memory-bytes",
        "the guest's memory, balloon included",
        |vm| text(Some(vm.memory_bytes)),
    ),
    bytes("current-bytes", "what the VM occupies on the host", |vm| {
        text(vm.current_bytes)
    }),
    bytes("limit-bytes", "what it may occupy, by the ledger", |vm| {
        text(vm.limit_bytes)
    }),
    bytes(
        "swap-bytes",
        "what of its memory the host has swapped out",
        |vm| text(vm.swap_bytes),
    ),
    bytes("guest-total-bytes", "memory the guest says it has", |vm| {
        text(vm.guest.total_bytes)
    }),
    bytes(
        "guest-available-bytes",
        "what the guest could use without swapping",
        |vm| text(vm.guest.available_bytes),
    ),
    bytes(
        "guest-free-bytes",
        "what the guest uses for nothing",
        |vm| text(vm.guest.free_bytes),
    ),
    other(
        "guest-stats-age-ms",
        Unit::Milliseconds,
        "age of the guest's statistics",
        |vm| vm.guest.age.map(age_ms),
    ),
    other(
        "pressure-some-percent",
        Unit::Percent,
        "time in which some task of the VM waited for memory, over 10 s",
        |vm| vm.pressure.map(|pressure| pressure.some_avg10.to_string()),
    ),
    other(
        "errors",
        Unit::Number,
        "errors since the VM was first seen",
        |vm| Some(vm.errors.to_string()),
    ),
    other(
        "reason",
        Unit::Line,
        "the last decision: inputs, rule and outcome",
        |vm| Some(vm.reason.clone()),
    ),
    other(
        "trouble",
        Unit::Line,
        "what is wrong, and what to do",
        |vm| vm.trouble.clone(),
    ),
];

/// The attribute of this name.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static Attribute> {
    ATTRIBUTES.iter().find(|attribute| attribute.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_carry_their_units() {
        for (index, attribute) in ATTRIBUTES.iter().enumerate() {
            assert!(
                ATTRIBUTES[..index]
                    .iter()
                    .all(|other| other.name != attribute.name)
            );
            let suffix = match attribute.unit {
                Unit::Bytes => "-bytes",
                Unit::Milliseconds => "-ms",
                Unit::Percent => "-percent",
                Unit::Number | Unit::Word | Unit::Line => "",
            };
            assert!(attribute.name.ends_with(suffix), "{}", attribute.name);
        }
    }

    #[test]
    fn every_attribute_is_described_in_the_operations_guide() {
        let guide = include_str!("../../../docs/operations.md");
        for attribute in ATTRIBUTES {
            let row = format!("| `{}` | {} |", attribute.name, attribute.unit.as_str());
            assert!(guide.contains(&row), "docs/operations.md lacks: {row}");
        }
    }
}
