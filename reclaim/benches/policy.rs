//! One round of the policy for 10,000 VMs, against the bound of 10 ms and against 1,000 VMs.

use std::time::{Duration, Instant};

use aerostat_reclaim::policy::{
    Aerostat, GuestMemory, HostSample, Policy, PolicyConfig, Sample, VmId, VmSample,
};

const MIB: u64 = 1 << 20;
const ROUNDS: u64 = 60;

/// Guests of all kinds on a host that lacks memory: every part of the rule has work.
fn crowd(count: u64) -> Sample {
    let vms = (0..count).map(|number| {
        let mut vm = VmSample::new(VmId::new(&format!("vm{number:05}")), 1024 * MIB);
        let used = 200 + number * 7919 % 600;
        let ballooned = if number % 7 == 0 { 100 } else { 0 };
        vm.ballooned_bytes = ballooned * MIB;
        vm.target_bytes = ballooned * MIB;
        vm.current_bytes = Some((1024 - ballooned) * MIB);
        vm.guest = GuestMemory {
            age: Some(Duration::ZERO),
            total_bytes: Some((1024 - ballooned) * MIB),
            available_bytes: Some((1024 - ballooned - used) * MIB),
            free_bytes: Some(number * 31 % 90 * MIB),
            ..GuestMemory::default()
        };
        vm
    });
    Sample {
        budget: None,
        at: Duration::ZERO,
        host: HostSample {
            total_bytes: count * 1024 * MIB,
            available_bytes: count * 1024 * MIB / 50,
            swap_free_bytes: MIB,
            ..HostSample::default()
        },
        vms: vms.collect(),
    }
}

/// Median and fastest of the rounds.
fn measure(count: u64) -> (Duration, Duration) {
    let mut policy = Aerostat::new(PolicyConfig::default());
    let mut sample = crowd(count);
    let mut times: Vec<Duration> = (0..ROUNDS)
        .map(|second| {
            sample.at = Duration::from_secs(second);
            for vm in sample
                .vms
                .iter_mut()
                .skip(usize::try_from(second).unwrap_or(0))
                .step_by(50)
            {
                vm.guest.oom_kills = Some(second);
            }
            let start = Instant::now();
            let decisions = policy.decide(&sample);
            let took = start.elapsed();
            assert_eq!(decisions.len(), sample.vms.len());
            took
        })
        .collect();
    times.sort_unstable();
    (times[times.len() / 2], times[0])
}

fn main() {
    let (few, few_best) = measure(1_000);
    let (many, many_best) = measure(10_000);
    println!("policy round, {ROUNDS} rounds each   median     fastest");
    println!("   1,000 VMs                  {few:>9.2?}  {few_best:>9.2?}");
    println!("  10,000 VMs                  {many:>9.2?}  {many_best:>9.2?}");
    println!(
        "  ratio                       {:>9.1}",
        many.as_secs_f64() / few.as_secs_f64()
    );
    assert!(
        many_best < Duration::from_millis(10),
        "10,000 VMs are to be decided in less than 10 ms"
    );
}
