//! The demonstration's summary as a table of plain text.

use std::{fmt::Write as _, time::Duration};

use super::{
    mib,
    story::{Outcome, intact},
};

/// The table.
#[must_use]
pub fn table(outcome: &Outcome) -> String {
    let (inflate, deflate) = (&outcome.inflate, &outcome.deflate);
    let (before, after) = (&inflate.before, &inflate.after);
    let discarded = after.discarded_bytes.saturating_sub(before.discarded_bytes);
    let calls = after.discard_calls.saturating_sub(before.discard_calls);
    let ranges = after.discard_ranges.saturating_sub(before.discard_ranges);
    let nanoseconds = after.discard_ns.saturating_sub(before.discard_ns);

    let mut rows = Rows::default();
    rows.add("guest memory", outcome.memory_bytes, "");
    rows.add(
        "on the host, all of it in use",
        before.host_bytes,
        "blocks of the guest's memory file",
    );
    rows.add("requested", outcome.target_bytes, "");
    let speed = format!(
        "in {:.2} s, {:.2} GiB/s",
        inflate.seconds(),
        inflate.gib_per_second()
    );
    rows.add("acknowledged by the guest", after.actual_bytes, &speed);
    rows.add(
        "discarded by the device",
        discarded,
        &discards(calls, ranges, nanoseconds),
    );
    let share = format!("{:.2} % of the request", outcome.freed_share() * 100.0);
    rows.add("freed on the host", inflate.freed_bytes(), &share);
    rows.add("on the host, inflated", after.host_bytes, "");
    let speed = format!(
        "in {:.2} s, {:.2} GiB/s",
        deflate.seconds(),
        deflate.gib_per_second()
    );
    rows.add(
        "returned to the guest",
        after
            .actual_bytes
            .saturating_sub(deflate.after.actual_bytes),
        &speed,
    );
    rows.add("on the host, used again", outcome.used_again.host_bytes, "");
    let checksum: String = outcome.checksum.chars().take(12).collect();
    let data = format!(
        "checksum {checksum}..., {} when inflated, {} at the end",
        intact(outcome.intact_while_inflated),
        intact(outcome.intact_at_end)
    );
    rows.add("working set", outcome.working_set_bytes, &data);

    let verdict = if outcome.passed() { "PASSED" } else { "FAILED" };
    format!("\nSummary\n{}\n{verdict}: {}\n", rows.0, reason(outcome))
}

fn discards(calls: u64, ranges: u64, nanoseconds: u64) -> String {
    let mut text = format!("{calls} system calls for {ranges} ranges");
    if nanoseconds > 0 {
        let _ = write!(
            text,
            ", {:.1} ms in them",
            Duration::from_nanos(nanoseconds).as_secs_f64() * 1e3
        );
    }
    text
}

fn reason(outcome: &Outcome) -> String {
    if !outcome.intact_while_inflated || !outcome.intact_at_end {
        return "the guest's data did not survive".to_owned();
    }
    if outcome.deflate.after.actual_bytes != 0 {
        return format!(
            "{:.1} MiB stayed in the balloon",
            mib(outcome.deflate.after.actual_bytes)
        );
    }
    format!(
        "{:.2} % of the request became free on the host; at least 99 % must",
        outcome.freed_share() * 100.0
    )
}

#[derive(Default)]
struct Rows(String);

impl Rows {
    fn add(&mut self, name: &str, bytes: u64, remark: &str) {
        // Writing to a string cannot fail.
        let row = format!("  {name:30} {:8.1} MiB   {remark}", mib(bytes));
        let _ = writeln!(self.0, "{}", row.trim_end());
    }
}
