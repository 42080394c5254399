//! The rules written for comparison do what their authors describe.

use std::time::Duration;

use super::{test_world::*, *};

fn decide(name: &str, sample: &Sample) -> Vec<Decision> {
    by_name(name, &PolicyConfig::default())
        .unwrap()
        .decide(sample)
}

#[test]
fn mom_shrinks_by_five_percent_when_a_fifth_of_the_host_is_not_free() {
    let sample = sample(3 * GIB, vec![guest("a", 1000, 300, 600)]);
    assert_eq!(decide("mom", &sample)[0].target_bytes, 50 * MIB);
}

#[test]
fn mom_counts_caches_as_used() {
    let sample = sample(3 * GIB, vec![guest("a", 1000, 300, 50)]);
    assert!(
        decide("mom", &sample).is_empty(),
        "700 MiB of caches are not touched"
    );
}

#[test]
fn mom_grows_when_the_host_has_memory() {
    let mut vm = guest("a", 1000, 300, 100);
    vm.set_balloon(500);
    vm.guest.free_bytes = Some(100 * MIB);
    assert_eq!(
        decide("mom", &sample(20 * GIB, vec![vm]))[0].target_bytes,
        475 * MIB
    );
}

#[test]
fn rivals_act_once_in_their_period() {
    let mut mom = by_name("mom", &PolicyConfig::default()).unwrap();
    let mut sample = sample(3 * GIB, vec![guest("a", 1000, 300, 600)]);
    let acted: Vec<u64> = (0..25)
        .filter(|second| {
            sample.at = Duration::from_secs(*second);
            !mom.decide(&sample).is_empty()
        })
        .collect();
    assert_eq!(acted, [0, 10, 20]);
}

#[test]
fn proxmox_divides_what_exceeds_eighty_percent_in_steps_of_a_hundred_mebibytes() {
    let guests = |count: u64| {
        (0..count)
            .map(|n| guest(&format!("{n}"), 2000, 500, 0))
            .collect()
    };
    let few = decide("proxmox", &sample(GIB, guests(3)));
    assert!(
        few.iter()
            .all(|decision| decision.target_bytes == 100 * MIB)
    );
    let many = decide("proxmox", &sample(6400 * MIB, guests(10)));
    let all: u64 = many.iter().map(|decision| decision.target_bytes).sum();
    // 20 % of 32 GiB should be available: 153.6 MiB lack.
    assert!(all.abs_diff(153 * MIB) <= MIB, "{all}");
}

#[test]
fn proxmox_does_not_give_back_to_a_guest_in_distress_while_the_host_is_above_its_goal() {
    let mut vm = guest("a", 2000, 1400, 0);
    vm.set_balloon(500);
    vm.guest.oom_kills = Some(7);
    assert!(decide("proxmox", &sample(GIB, vec![vm]))[0].target_bytes >= 500 * MIB);
}

#[test]
fn senpai_reclaims_a_percent_from_who_does_not_wait() {
    let waits = |name: &str, percent: f64| {
        let mut vm = guest(name, 1000, 300, 100);
        vm.pressure = Some(Pressure {
            some_avg10: percent,
            ..Pressure::default()
        });
        vm
    };
    let decisions = decide(
        "senpai",
        &sample(GIB, vec![waits("a", 0.0), waits("b", 0.5)]),
    );
    assert_eq!(decisions.len(), 1);
    assert_eq!(decisions[0].vm, VmId::new("a"));
    assert_eq!(decisions[0].reclaim_bytes, 10 * MIB);
    assert_eq!(decisions[0].target_bytes, 0);
}

#[test]
fn squeezed_gives_everyone_the_same_part_of_its_range() {
    let small = guest("a", 1000, 900, 0);
    let large = guest("b", 3000, 100, 0);
    let mut sample = sample(0, vec![small, large]);
    sample.host.total_bytes = 2000 * MIB;
    sample.host.available_bytes = 0;
    // 4000 MiB are occupied although the host has 2000: the part is of what can be had.
    for vm in &mut sample.vms {
        vm.current_bytes = vm.current_bytes.map(|bytes| bytes / 2);
    }
    let decisions = decide("squeezed", &sample);
    let parts: Vec<f64> = decisions
        .iter()
        .zip(&sample.vms)
        .map(|(decision, vm)| {
            let floor = vm.memory_bytes / 4;
            let left = vm.memory_bytes - decision.target_bytes;
            (left - floor) as f64 / (vm.memory_bytes - floor) as f64
        })
        .collect();
    assert!((parts[0] - parts[1]).abs() < 0.001, "{parts:?}");
    assert!((parts[0] - 0.3).abs() < 0.01, "{parts:?}");
}

#[test]
fn no_rival_leaves_less_than_the_configured_minimum() {
    for name in NAMES {
        let mut policy = by_name(name, &PolicyConfig::default()).unwrap();
        let mut vm = guest("a", 1000, 100, 800);
        vm.floor_bytes = 700 * MIB;
        let mut sample = sample(100 * MIB, vec![vm]);
        for second in 0..200 {
            sample.at = Duration::from_secs(second);
            for decision in policy.decide(&sample) {
                sample.vms[0].set_balloon(decision.target_bytes / MIB);
                assert!(decision.target_bytes <= 300 * MIB, "{name}");
            }
        }
    }
}
