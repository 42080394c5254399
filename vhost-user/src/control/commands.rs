//! What each command does.

use super::Shared;
use super::qmp::{Arguments, Command, Failure, version};
use super::report;
use crate::vm::{Vm, VmError, VmState};
use serde_json::{Value, json};
use std::time::Duration;

/// The longest that `aerostat-guest-stats` waits, whatever it is asked to.
const MAX_STATS_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a round of hints lasts unless the client chooses.
const HINTS_LIMIT_MS: u64 = 60_000;
/// Hints and entries of the history in one answer.
const MAX_LIST: u64 = 4096;

type Outcome = Result<Value, Failure>;
type Handler = fn(&Shared, &mut Arguments) -> Outcome;

/// All commands, by name.
const COMMANDS: [(&str, Handler); 19] = [
    ("aerostat-guest-stats", guest_stats),
    ("aerostat-hints-finish", hints_finish),
    ("aerostat-hints-start", hints_start),
    ("aerostat-hints-take", hints_take),
    ("aerostat-history", history),
    ("aerostat-inhibit", inhibit),
    ("aerostat-query", query),
    ("aerostat-reset-balloon", reset_balloon),
    ("aerostat-set-target", set_target),
    ("aerostat-uninhibit", uninhibit),
    ("balloon", balloon),
    ("qmp_capabilities", capabilities),
    ("qom-get", qom_get),
    ("qom-list", qom_list),
    ("qom-set", qom_set),
    ("query-balloon", query_balloon),
    ("query-commands", query_commands),
    ("query-status", query_status),
    ("query-version", query_version),
];

impl From<VmError> for Failure {
    fn from(error: VmError) -> Self {
        match error {
            VmError::Disconnected => Self::not_active(error),
            error => Self::generic(crate::chain(&error)),
        }
    }
}

/// Runs a command for a client; `negotiated` is the client's mode.
pub(super) fn execute(shared: &Shared, command: Command, negotiated: &mut bool) -> Outcome {
    let name = command.name.as_str();
    if !*negotiated && name != "qmp_capabilities" {
        return Err(Failure::command_not_found(
            "Expecting capabilities negotiation with 'qmp_capabilities'",
        ));
    }
    if *negotiated && name == "qmp_capabilities" {
        return Err(Failure::command_not_found(
            "Capabilities negotiation is already complete, command ignored",
        ));
    }
    let (_, handler) = COMMANDS
        .iter()
        .find(|(known, _)| *known == name)
        .ok_or_else(|| {
            let shown: String = name.chars().take(80).collect();
            Failure::command_not_found(format!("The command {shown} has not been found"))
        })?;
    let mut arguments = command.arguments;
    let outcome = handler(shared, &mut arguments)?;
    *negotiated = true;
    Ok(outcome)
}

/// Takes no more arguments than were taken, before anything is done.
fn checked(arguments: &mut Arguments) -> Result<(), Failure> {
    std::mem::take(arguments).done()
}

fn capabilities(_: &Shared, arguments: &mut Arguments) -> Outcome {
    let enable = arguments.take_optional("enable").unwrap_or(json!([]));
    checked(arguments)?;
    match enable {
        Value::Array(list) if list.is_empty() => Ok(json!({})),
        _ => Err(Failure::generic(
            "No capability can be enabled here; leave 'enable' out",
        )),
    }
}

fn query_commands(_: &Shared, arguments: &mut Arguments) -> Outcome {
    checked(arguments)?;
    let names = COMMANDS.iter().map(|(name, _)| json!({ "name": name }));
    Ok(names.collect())
}

fn query_version(_: &Shared, arguments: &mut Arguments) -> Outcome {
    checked(arguments)?;
    Ok(version())
}

fn query_status(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    checked(arguments)?;
    let running = shared.vm.snapshot().state == VmState::Active;
    let status = if running { "running" } else { "paused" };
    Ok(json!({ "status": status, "running": running }))
}

/// The guest's memory, or the error that QEMU has for a machine without a balloon.
fn memory_bytes(vm: &Vm) -> Result<u64, Failure> {
    match vm.attached()?.device.memory_bytes() {
        0 => Err(Failure::not_active(
            "the guest's memory is not known yet; wait until its driver runs",
        )),
        bytes => Ok(bytes),
    }
}

/// How many bytes are left to the guest, as its driver has it.
pub(super) fn left_bytes(vm: &Vm) -> Result<u64, Failure> {
    let memory = memory_bytes(vm)?;
    Ok(memory.saturating_sub(vm.attached()?.device.actual_bytes()))
}

fn query_balloon(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    checked(arguments)?;
    Ok(json!({ "actual": left_bytes(&shared.vm)? }))
}

fn balloon(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    let value = arguments.take_u64("value")?;
    checked(arguments)?;
    if value == 0 {
        return Err(Failure::generic(
            "Parameter 'value' expects a target size: the bytes left to the guest, more than 0",
        ));
    }
    // As in QEMU, more than there is means all of it.
    let target = memory_bytes(&shared.vm)?.saturating_sub(value);
    shared.vm.set_target_bytes(target)?;
    Ok(json!({}))
}

fn set_target(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    let bytes = arguments.take_u64("bytes")?;
    checked(arguments)?;
    let target = shared.vm.set_target_bytes(bytes)?;
    Ok(json!({ "target-bytes": target }))
}

fn reset_balloon(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    checked(arguments)?;
    shared.vm.reset_balloon()?;
    Ok(json!({}))
}

fn query(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    checked(arguments)?;
    Ok(report::query(&shared.vm.snapshot()))
}

fn guest_stats(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    let timeout = optional(arguments, "timeout-ms", 0)?;
    checked(arguments)?;
    let timeout = Duration::from_millis(timeout).min(MAX_STATS_TIMEOUT);
    Ok(report::guest_stats(&shared.vm.guest_stats(timeout)?))
}

/// An integer that may be left out.
fn optional(arguments: &mut Arguments, name: &str, default: u64) -> Result<u64, Failure> {
    match arguments.take_optional(name) {
        None => Ok(default),
        Some(value) => value.as_u64().ok_or_else(|| {
            Failure::generic(format!("Parameter '{name}' expects an integer from 0"))
        }),
    }
}

fn hints_start(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    let limit = optional(arguments, "limit-ms", HINTS_LIMIT_MS)?;
    checked(arguments)?;
    let id = shared.vm.start_hints(Duration::from_millis(limit))?;
    Ok(json!({ "id": id }))
}

fn hints_finish(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    checked(arguments)?;
    shared.vm.finish_hints()?;
    Ok(json!({}))
}

fn hints_take(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    let max = optional(arguments, "max", MAX_LIST)?.min(MAX_LIST);
    checked(arguments)?;
    let max = usize::try_from(max).unwrap_or(usize::MAX);
    let (ranges, state) = shared.vm.take_hints(max)?;
    Ok(report::hints(&ranges, state))
}

fn history(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    let since = optional(arguments, "since", 0)?;
    checked(arguments)?;
    let max = usize::try_from(MAX_LIST).unwrap_or(usize::MAX);
    Ok(report::history(&shared.vm.history(since, max)))
}

fn inhibit(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    checked(arguments)?;
    shared.vm.inhibit();
    Ok(json!({}))
}

fn uninhibit(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    checked(arguments)?;
    shared.vm.uninhibit()?;
    Ok(json!({}))
}

const STATS: &str = "guest-stats";
const POLLING: &str = "guest-stats-polling-interval";

fn qom_list(_: &Shared, arguments: &mut Arguments) -> Outcome {
    arguments.take_string("path")?;
    checked(arguments)?;
    Ok(json!([
        { "name": "type", "type": "string" },
        { "name": STATS, "type": "guest statistics" },
        { "name": POLLING, "type": "int" },
    ]))
}

fn qom_get(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    // There is one balloon here, whatever path a tool knows it by.
    arguments.take_string("path")?;
    let property = arguments.take_string("property")?;
    checked(arguments)?;
    match property.as_str() {
        "type" => Ok("virtio-balloon".into()),
        STATS => {
            let stats = match shared.vm.guest_stats(Duration::ZERO) {
                // As in QEMU, a guest that has not said anything has said -1.
                Err(VmError::Device(_)) => aerostat_device::GuestStats::default(),
                stats => stats?,
            };
            Ok(report::guest_stats_qemu(&stats))
        }
        POLLING => Ok(shared.vm.stats_interval_seconds().into()),
        _ => Err(no_property(&property)),
    }
}

fn qom_set(shared: &Shared, arguments: &mut Arguments) -> Outcome {
    arguments.take_string("path")?;
    let property = arguments.take_string("property")?;
    if property != POLLING {
        return Err(no_property(&property));
    }
    let seconds = arguments.take_u64("value")?;
    checked(arguments)?;
    if seconds > u32::MAX.into() {
        return Err(Failure::generic(
            "timer value is too big; pass seconds, 0 for off",
        ));
    }
    shared.vm.set_stats_interval_seconds(seconds);
    Ok(json!({}))
}

fn no_property(name: &str) -> Failure {
    let shown: String = name.chars().take(80).collect();
    Failure::generic(format!("Property '{shown}' not found"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_sorted_and_unique() {
        assert!(COMMANDS.is_sorted_by(|one, next| one.0 < next.0));
    }
}
