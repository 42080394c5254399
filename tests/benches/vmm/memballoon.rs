//! The memory balloon with pages of 2 MiB against QEMU's own virtio-balloon: the same QEMU, guest and kernel,
//! by turns.
//!
//! Debian's kernel is built to clear all memory that is allocated (`init_on_alloc`), a balloon's pages too,
//! which no driver can keep it from. Under emulation that alone takes most of a stock inflation's time. So
//! both are measured twice: as the kernel comes, and with `init_on_alloc=0`, as most other kernels come.

use super::{Options, Result, median};
use aerostat_tests::qemu::{Balloon, Machine, MachineConfig, MachinePrerequisites};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(180);
/// Inflations of one machine: booting it costs more than they do.
const CYCLES: usize = 3;
/// The rows of a table.
pub(super) const ROWS: [(&str, &str); 4] = [
    ("inflate", "inflate, s"),
    ("freed", "until the host has all of it, s"),
    ("guest", "inflate: the guest's own CPU time, s"),
    ("deflate", "deflate, s"),
];
const KINDS: [(&str, Balloon); 2] = [
    ("virtio-balloon", Balloon::Virtio),
    ("memballoon", Balloon::Memballoon),
];

/// Samples in seconds, by kind and row.
pub(super) type Samples = BTreeMap<(&'static str, &'static str), Vec<f64>>;

/// Measures with both settings of the kernel; returns what to write to the results.
pub(super) fn measure(
    parts: &MachinePrerequisites,
    options: &Options,
) -> Result<Vec<(&'static str, Samples)>> {
    let mut all = Vec::new();
    for setting in ["init_on_alloc=1", "init_on_alloc=0"] {
        let mut samples = Samples::new();
        for round in 1..=options.rounds {
            for (name, balloon) in KINDS {
                eprintln!(
                    "memballoon, {setting}, round {round} of {}: {name}",
                    options.rounds
                );
                run(parts, options, setting, (name, balloon), &mut samples)?;
            }
        }
        print_table(options, setting, &samples);
        all.push((setting, samples));
    }
    Ok(all)
}

fn run(
    parts: &MachinePrerequisites,
    options: &Options,
    setting: &str,
    (name, balloon): (&'static str, Balloon),
    samples: &mut Samples,
) -> Result<()> {
    let config = MachineConfig::new(options.memory_mib, balloon).kernel_argument(setting);
    let mut machine = Machine::start(parts, &config)?;
    for _ in 0..CYCLES {
        machine.touch_unused_memory()?;
        let before = machine.host_memory_bytes()?;
        let guest = guest_time(&machine)?;
        let begin = Instant::now();
        reach(&mut machine, options.target_mib, begin)?;
        let inflate = begin.elapsed();
        let freed = wait_until_freed(&mut machine, balloon, begin)?;
        let guest = guest_time(&machine)?.saturating_sub(guest);
        let back = before.saturating_sub(machine.host_memory_bytes()?);
        if back < options.target_mib * MIB * 95 / 100 {
            return Err(format!("{name}: only {} MiB came back", back / MIB).into());
        }
        let begin = Instant::now();
        reach(&mut machine, 0, begin)?;
        let deflate = begin.elapsed();
        for (row, time) in ROWS.iter().zip([inflate, freed, guest, deflate]) {
            samples
                .entry((name, row.0))
                .or_default()
                .push(time.as_secs_f64());
        }
    }
    Ok(())
}

/// Sets a target and looks, as often as the monitor answers, until it is reached.
fn reach(machine: &mut Machine, target_mib: u64, begin: Instant) -> Result<()> {
    machine.set_target_mib(target_mib)?;
    while machine.actual_mib()? != target_mib {
        if begin.elapsed() > PATIENCE {
            return Err(format!("the balloon is not {target_mib} MiB after {PATIENCE:?}").into());
        }
    }
    Ok(())
}

/// QEMU's own device discards before it acknowledges; this one may do so within milliseconds after.
fn wait_until_freed(machine: &mut Machine, balloon: Balloon, begin: Instant) -> Result<Duration> {
    while balloon != Balloon::Virtio && machine.counters()?["balloon"]["pending-bytes"] != 0 {
        if begin.elapsed() > PATIENCE {
            return Err("pages wait to be discarded for ever".into());
        }
    }
    Ok(begin.elapsed())
}

fn guest_time(machine: &Machine) -> Result<Duration> {
    let times = machine.thread_times()?;
    let guest = times.iter().filter(|(name, _)| name.starts_with("CPU "));
    Ok(guest.map(|(_, time)| *time).sum())
}

fn print_table(options: &Options, setting: &str, samples: &Samples) {
    println!(
        "\n{} MiB of {} MiB, touched before, kernel with {setting}: median of {} (smallest to largest)",
        options.target_mib,
        options.memory_mib,
        options.rounds * CYCLES
    );
    println!("| figure | virtio-balloon | memballoon, 2 MiB | times as fast |\n|---|---|---|---|");
    for (row, title) in ROWS {
        let [theirs, ours] = KINDS.map(|(name, _)| {
            let mut values = samples[&(name, row)].clone();
            let middle = median(&mut values);
            let (low, high) = (values[0], values[values.len() - 1]);
            (middle, format!("{middle:.4} ({low:.4} to {high:.4})"))
        });
        println!(
            "| {title} | {} | {} | {:.1} |",
            theirs.1,
            ours.1,
            theirs.0 / ours.0
        );
    }
}
