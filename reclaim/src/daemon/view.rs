//! The status in words: tables and sentences for a terminal.

use std::fmt::Write as _;

use crate::{
    config::Size,
    engine::status::{Status, VmStatus},
};

/// The whole status as a table.
#[must_use]
pub fn table(status: &Status) -> String {
    let mut text = host_line(status);
    text.push('\n');
    if status.vms.is_empty() {
        text.push_str("no VMs: check the [[vm]] entries of the configuration\n");
        return text;
    }
    let name_width = status
        .vms
        .iter()
        .map(|vm| vm.name.as_str().len())
        .max()
        .unwrap_or(0)
        .max(4);
    let _ = writeln!(
        text,
        "{:name_width$}  {:<11} {:<10} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}  LAST DECISION",
        "NAME", "CONDITION", "MODE", "MEMORY", "BALLOON", "TARGET", "FLOOR", "CURRENT", "LIMIT"
    );
    for vm in &status.vms {
        let _ = writeln!(
            text,
            "{:name_width$}  {:<11} {:<10} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}  {}",
            vm.name.as_str(),
            vm.condition.as_str(),
            mode(vm),
            size(vm.memory_bytes),
            size(vm.ballooned_bytes),
            size(vm.target_bytes),
            size(vm.floor_bytes),
            optional(vm.current_bytes),
            optional(vm.limit_bytes),
            vm.reason,
        );
        if let Some(trouble) = &vm.trouble {
            let _ = writeln!(text, "{:name_width$}  ! {trouble}", "");
        }
    }
    text
}

/// One line about the host.
#[must_use]
pub fn host_line(status: &Status) -> String {
    let host = &status.host;
    let mut line = format!(
        "host: {} of {} available, {} wanted",
        size(host.available_bytes),
        size(host.total_bytes),
        size(host.high_bytes)
    );
    if let Some(pressure) = host.pressure {
        let _ = write!(line, "; pressure {:.1} %", pressure.some_avg10);
    }
    if status.ledger.enabled {
        let pool = status.ledger.pool_bytes;
        let sign = if pool < 0 { "-" } else { "" };
        let _ = write!(
            line,
            "; budget {}, pool {sign}{}",
            size(status.ledger.budget_bytes),
            size(pool.unsigned_abs())
        );
    } else {
        line.push_str("; no limits are kept");
    }
    let _ = write!(line, "; policy {}", status.policy);
    if status.dry_run {
        line.push_str(" (dry run: nothing is carried out)");
    }
    line
}

/// Everything about one VM.
#[must_use]
pub fn explain(vm: &VmStatus) -> String {
    let mut text = format!(
        "{}: {} by {} at {}\n",
        vm.name,
        vm.condition.as_str(),
        vm.protocol,
        vm.socket
    );
    let _ = writeln!(text, "  decision   {}", vm.reason);
    if let Some(trouble) = &vm.trouble {
        let _ = writeln!(text, "  trouble    {trouble}");
    }
    let _ = writeln!(
        text,
        "  balloon    {} of {} of memory, target {}, so {} are left; floor {}",
        size(vm.ballooned_bytes),
        size(vm.memory_bytes),
        size(vm.target_bytes),
        size(vm.memory_bytes.saturating_sub(vm.ballooned_bytes)),
        size(vm.floor_bytes)
    );
    let _ = writeln!(text, "  mode       {}, weight {}", mode(vm), vm.weight);
    if let Some(target) = vm.manual_target_bytes {
        let _ = writeln!(text, "  by hand    target {}", size(target));
    }
    match vm.guest.age {
        Some(age) => {
            let _ = writeln!(
                text,
                "  guest      {} available, {} free, of {}; said {:.1} s ago",
                optional(vm.guest.available_bytes),
                optional(vm.guest.free_bytes),
                optional(vm.guest.total_bytes),
                age.as_secs_f64()
            );
        }
        None => text.push_str("  guest      says nothing about its memory\n"),
    }
    match (&vm.cgroup, vm.current_bytes) {
        (Some(cgroup), Some(current)) => {
            let _ = writeln!(
                text,
                "  cgroup     {cgroup}: occupies {}, may occupy {}",
                size(current),
                optional(vm.limit_bytes)
            );
        }
        _ => text.push_str("  cgroup     none of its own\n"),
    }
    if !vm.history.is_empty() {
        text.push_str("  history    (seconds since the daemon started)\n");
    }
    for point in vm.history.iter().rev().take(12).rev() {
        let _ = writeln!(
            text,
            "    {:>9.1}  target {:>8}  balloon {:>8}  {}",
            point.at_ms as f64 / 1000.0,
            size(point.target_bytes),
            size(point.ballooned_bytes),
            point.reason
        );
    }
    text
}

/// A VM's mode by its name.
#[must_use]
pub fn mode(vm: &VmStatus) -> String {
    serde_json::to_value(vm.mode)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

/// A size as it is shown.
#[must_use]
pub fn size(bytes: u64) -> String {
    Size(bytes).to_string()
}

fn optional(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".to_owned(), size)
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        engine::status::{Condition, HistoryPoint, HostStatus, LedgerStatus},
        policy::{GuestMemory, Mode, VmId},
    };

    /// A status with one VM.
    pub(in crate::daemon) fn example() -> Status {
        let vm = VmStatus {
            name: VmId::new("web"),
            protocol: "qmp".into(),
            socket: "/run/web.qmp".into(),
            cgroup: Some("/sys/fs/cgroup/vms/web".into()),
            condition: Condition::Running,
            mode: Mode::FloorOnly,
            weight: 100,
            memory_bytes: 4 << 30,
            target_bytes: 3 << 29,
            ballooned_bytes: 1 << 30,
            floor_bytes: 1 << 30,
            manual_target_bytes: None,
            current_bytes: Some(3 << 30),
            swap_bytes: None,
            limit_bytes: Some(13 << 28),
            pressure: None,
            guest: GuestMemory {
                age: Some(Duration::from_millis(1500)),
                available_bytes: Some(2 << 30),
                ..GuestMemory::default()
            },
            reason: "gives 256M of 1G".into(),
            trouble: Some("it hangs; wake it".into()),
            errors: 2,
            history: [HistoryPoint {
                at_ms: 1500,
                target_bytes: 3 << 29,
                ballooned_bytes: 0,
                reason: "gives".into(),
            }]
            .into(),
        };
        Status {
            ticks: 12,
            policy: "aerostat".into(),
            host: HostStatus {
                total_bytes: 16 << 30,
                available_bytes: 4 << 30,
                ..HostStatus::default()
            },
            ledger: LedgerStatus {
                enabled: true,
                budget_bytes: 14 << 30,
                pool_bytes: -5,
                balanced: true,
            },
            vms: vec![vm],
            ..Status::default()
        }
    }

    #[test]
    fn the_table_has_a_line_for_each_vm_and_its_trouble_below() {
        let text = table(&example());
        let lines: Vec<_> = text.lines().collect();
        assert!(
            lines[0].contains("4G of 16G available") && lines[0].contains("pool -5"),
            "{text}"
        );
        assert!(
            lines[2].starts_with("web   running     floor-only"),
            "{text}"
        );
        assert!(
            lines[2].contains("1.5G") && lines[2].ends_with("gives 256M of 1G"),
            "{text}"
        );
        assert!(lines[3].ends_with("! it hangs; wake it"), "{text}");
        assert!(table(&Status::default()).contains("no VMs"));
    }

    #[test]
    fn an_explanation_says_what_was_decided_on_which_figures() {
        let text = explain(&example().vms[0]);
        for part in [
            "decision   gives 256M of 1G",
            "1G of 4G of memory, target 1.5G, so 3G are left; floor 1G",
            "2G available, - free, of -; said 1.5 s ago",
            "occupies 3G, may occupy 3.2G",
            "      1.5  target     1.5G",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
