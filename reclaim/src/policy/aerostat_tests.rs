//! What the rule does in one situation at a time. `world` has the figures.

use std::time::Duration;

use super::{test_world::*, *};

fn decide_once(sample: &Sample) -> Vec<Decision> {
    Aerostat::new(PolicyConfig::default()).decide(sample)
}

#[test]
fn j4_a_host_with_enough_memory_asks_nobody() {
    let sample = sample(20 * GIB, vec![guest("a", 1024, 300, 600)]);

    let decisions = decide_once(&sample);

    assert_eq!(decisions[0].target_bytes, 0);
    assert!(matches!(decisions[0].reason, Reason::Steady { .. }));
}

#[test]
fn a3_a_host_below_its_watermark_asks_for_what_lacks() {
    let guests = (0..16).map(|n| guest(&format!("vm{n:02}"), 4096, 1000, 2000));
    let sample = sample(2 * GIB, guests.collect());

    let decisions = decide_once(&sample);

    // 8 % of 32 GiB is 2.56 GiB.
    let asked: u64 = decisions.iter().map(|d| d.target_bytes).sum();
    assert!(asked.abs_diff(573 * MIB) < 17 * MIB, "{}", asked / MIB);
}

#[test]
fn a3_a_host_whose_memory_falls_fast_asks_before_it_lacks_any() {
    let mut policy = Aerostat::new(PolicyConfig::default());
    let mut sample = sample(14 * GIB, vec![guest("a", 8192, 1000, 6000)]);
    let mut decision = None;
    // High is 2.56 GiB, and 4 GiB go each second.
    for _ in 0..3 {
        decision = policy.decide(&sample).pop();
        sample.at += Duration::from_secs(1);
        sample.host.available_bytes -= 4 * GIB;
    }
    let decision = decision.unwrap();
    assert!(decision.target_bytes > GIB, "{decision:?}");
    let said = decision.reason.to_string();
    assert!(said.contains("available 6144 MiB, soon"), "{said}");
}

#[test]
fn idle_memory_is_taken_before_memory_in_use() {
    let busy = guest("busy", 4096, 2500, 100);
    let idle = guest("idle", 4096, 400, 3000);
    let sample = sample(2200 * MIB, vec![busy, idle]);

    let decisions = decide_once(&sample);

    assert!(
        decisions[1].target_bytes > 4 * decisions[0].target_bytes,
        "{decisions:?}"
    );
}

#[test]
fn of_two_guests_with_full_caches_the_idle_one_pays_the_tax() {
    let mut busy = guest("busy", 4096, 2000, 0);
    let mut idle = guest("idle", 4096, 500, 0);
    busy.guest.free_bytes = Some(20 * MIB);
    idle.guest.free_bytes = Some(20 * MIB);
    let sample = sample(2500 * MIB, vec![busy, idle]);

    let decisions = decide_once(&sample);

    assert!(
        decisions[1].target_bytes > decisions[0].target_bytes * 5 / 4,
        "{decisions:?}"
    );
}

#[test]
fn a_weight_of_double_gives_half() {
    let mut heavy = guest("heavy", 4096, 1000, 0);
    heavy.weight = 200;
    let light = guest("light", 4096, 1000, 0);
    let sample = sample(2500 * MIB, vec![heavy, light]);

    let decisions = decide_once(&sample);

    let (heavy, light) = (decisions[0].target_bytes, decisions[1].target_bytes);
    assert!(light.abs_diff(2 * heavy) <= 2 * MIB, "{heavy} {light}");
}

#[test]
fn a_step_is_bounded_and_larger_in_an_emergency() {
    let full = || guest("a", 8192, 1000, 0);
    let short = decide_once(&sample(1100 * MIB, vec![full()]));
    let emergency = decide_once(&sample(300 * MIB, vec![full()]));

    assert_eq!(short[0].target_bytes, 256 * MIB);
    assert!(matches!(
        short[0].reason,
        Reason::Gives {
            bound: Bound::Step,
            ..
        }
    ));
    assert_eq!(emergency[0].target_bytes, 8192 * MIB / 5 / 4096 * 4096);
}

#[test]
fn what_is_on_its_way_is_not_asked_for_again() {
    let mut on_its_way = guest("a", 4096, 1000, 1000);
    on_its_way.target_bytes = 800 * MIB;
    let decisions = decide_once(&sample(
        2 * GIB,
        vec![on_its_way, guest("b", 4096, 1000, 1000)],
    ));

    assert_eq!(decisions[0].target_bytes, 800 * MIB);
    assert_eq!(decisions[1].target_bytes, 0);
}

#[test]
fn j2_the_floor_is_what_the_guest_uses_and_a_fifth() {
    let mut policy = Aerostat::new(PolicyConfig::default());
    let mut world = World::new(
        8 * GIB,
        vec![guest("a", 4096, 2000, 1500), guest("b", 4096, 2000, 1500)],
    );
    for _ in 0..100 {
        world.step(&mut policy);
    }
    for vm in &world.sample.vms {
        // 2000 MiB in use, and a margin of 16 MiB.
        assert!(vm.left_bytes() >= 2416 * MIB, "{}", vm.left_bytes() / MIB);
        assert!(vm.left_bytes() < 4000 * MIB);
    }
}

#[test]
fn j2_memory_min_of_the_cgroup_is_a_floor_as_well() {
    let mut vm = guest("a", 4096, 200, 3800);
    vm.limits.min_bytes = Some(4000 * MIB);
    let decisions = decide_once(&sample(300 * MIB, vec![vm]));
    assert_eq!(decisions[0].floor_bytes, 4000 * MIB);
    assert_eq!(decisions[0].target_bytes, 96 * MIB);
}

#[test]
fn a_guest_that_says_nothing_keeps_what_it_has() {
    let mut silent = guest("silent", 4096, 200, 3800);
    silent.guest = GuestMemory::default();
    let mut stale = guest("stale", 4096, 200, 3800);
    stale.guest.age = Some(Duration::from_secs(60));
    let mut configured = silent.clone();
    configured.id = VmId::new("configured");
    configured.floor_bytes = 2048 * MIB;

    let decisions = decide_once(&sample(300 * MIB, vec![configured, silent, stale]));

    assert!(
        decisions[0].target_bytes > 0,
        "the operator said what it needs"
    );
    assert_eq!(decisions[1].target_bytes, 0);
    assert_eq!(decisions[2].target_bytes, 0);
}

/// A guest with half its memory in the balloon, looked at twice, with something happening between.
fn second_look(available_bytes: u64, change: impl FnOnce(&mut VmSample)) -> Decision {
    let mut policy = Aerostat::new(PolicyConfig::default());
    let mut vm = guest("a", 4096, 1000, 500);
    vm.set_balloon(2048);
    let mut sample = sample(available_bytes, vec![vm]);
    policy.decide(&sample);
    sample.at += Duration::from_secs(1);
    change(&mut sample.vms[0]);
    policy.decide(&sample).remove(0)
}

#[test]
fn a_guest_in_distress_gets_memory_back_at_once() {
    type Sign = (Distress, fn(&mut VmSample));
    let signs: [Sign; 4] = [
        (Distress::SwapIn, |vm| vm.guest.swap_in_bytes = Some(MIB)),
        (Distress::OomKill, |vm| vm.guest.oom_kills = Some(1)),
        (Distress::AllocStall, |vm| vm.guest.alloc_stalls = Some(1)),
        (Distress::MajorFaults, |vm| {
            vm.guest.major_faults = Some(500);
            vm.guest.available_bytes = Some(300 * MIB);
        }),
    ];
    for (expected, sign) in signs {
        let decision = second_look(2 * GIB, sign);
        let Reason::GivesBack { distress, .. } = decision.reason else {
            panic!("{expected}: {}", decision.reason);
        };
        assert_eq!(distress, expected);
        assert!(decision.target_bytes <= 2048 * MIB - 16 * MIB);
    }
}

#[test]
fn program_starts_in_a_guest_with_memory_are_no_distress() {
    let decision = second_look(3000 * MIB, |vm| vm.guest.major_faults = Some(500));
    assert_eq!(decision.target_bytes, 2048 * MIB, "{}", decision.reason);
}

#[test]
fn a7_a_guest_gets_back_even_when_the_host_has_nothing() {
    let decision = second_look(0, |vm| vm.guest.oom_kills = Some(1));
    assert_eq!(decision.target_bytes, 2044 * MIB);
}

#[test]
fn give_back_doubles_while_distress_lasts_and_starts_small_after() {
    let mut policy = Aerostat::new(PolicyConfig::default());
    let mut vm = guest("a", 4096, 1000, 500);
    vm.set_balloon(2048);
    let mut sample = sample(3000 * MIB, vec![vm]);
    policy.decide(&sample);
    let mut grants = Vec::new();
    for round in [1, 2, 3, 3, 4] {
        sample.at += Duration::from_secs(1);
        sample.vms[0].guest.oom_kills = Some(round);
        let target = policy.decide(&sample)[0].target_bytes;
        let vm = &mut sample.vms[0];
        grants.push((vm.target_bytes - target) / MIB);
        let used = vm.left_bytes();
        vm.target_bytes = target;
        vm.ballooned_bytes = target;
        vm.guest.total_bytes = Some(vm.left_bytes());
        let more = vm.left_bytes() - used;
        vm.guest.available_bytes = vm.guest.available_bytes.map(|bytes| bytes + more);
    }
    assert_eq!(grants, [16, 32, 64, 0, 16]);
}

#[test]
fn a1_unsolicited_deflate_is_accepted_and_not_undone_for_a_while() {
    let mut policy = Aerostat::new(PolicyConfig::default());
    let mut vm = guest("a", 4096, 500, 1000);
    vm.set_balloon(2048);
    let mut sample = sample(2 * GIB, vec![vm, guest("b", 4096, 500, 0)]);
    policy.decide(&sample);
    sample.vms[0].target_bytes = 2048 * MIB;
    sample.at += Duration::from_secs(1);
    policy.decide(&sample);

    sample.at += Duration::from_secs(1);
    sample.vms[0].target_bytes = policy.decide(&sample)[0].target_bytes;
    sample.vms[0].ballooned_bytes = 1500 * MIB;
    sample.at += Duration::from_secs(1);
    let taken_back = policy.decide(&sample)[0].target_bytes;
    assert!(taken_back <= 1500 * MIB);

    sample.vms[0].target_bytes = taken_back;
    sample.vms[0].ballooned_bytes = taken_back;
    for _ in 0..8 {
        sample.at += Duration::from_secs(1);
        let decisions = policy.decide(&sample);
        assert_eq!(
            decisions[0].target_bytes, taken_back,
            "{}",
            decisions[0].reason
        );
        assert!(decisions[1].target_bytes > 0, "the other one gives");
    }
}

#[test]
fn a2_a_guest_that_does_not_follow_is_accepted_and_the_others_give() {
    let mut policy = Aerostat::new(PolicyConfig::default());
    let mut sample = sample(
        2 * GIB,
        vec![
            guest("deaf", 4096, 500, 3000),
            guest("good", 4096, 500, 3000),
        ],
    );
    let mut accepted = None;
    for second in 0..12 {
        sample.at = Duration::from_secs(second);
        let decisions = policy.decide(&sample);
        if let Reason::Stalled { .. } = decisions[0].reason {
            assert_eq!(decisions[0].target_bytes, 0);
            accepted = accepted.or(Some(second));
        }
        sample.vms[0].target_bytes = decisions[0].target_bytes;
        sample.vms[1].set_balloon(decisions[1].target_bytes / MIB);
    }
    assert_eq!(accepted, Some(5));
    assert!(
        sample.vms[1].target_bytes >= 900 * MIB,
        "{}",
        sample.vms[1].target_bytes / MIB
    );
}

#[test]
fn surplus_goes_back_and_first_to_those_that_use_all_they_have() {
    let mut policy = Aerostat::new(PolicyConfig::default());
    let mut hungry = guest("hungry", 4096, 1000, 0);
    hungry.set_balloon(2048);
    hungry.guest.free_bytes = Some(10 * MIB);
    let mut sated = guest("sated", 4096, 500, 1500);
    sated.set_balloon(2048);
    sated.guest.free_bytes = Some(1000 * MIB);
    sated.current_bytes = Some(600 * MIB);
    let decisions = policy.decide(&sample(6 * GIB, vec![hungry, sated]));
    assert!(
        decisions[0].target_bytes < 1000 * MIB,
        "{}",
        decisions[0].reason
    );
    assert!(
        decisions[1].target_bytes > 1500 * MIB,
        "{}",
        decisions[1].reason
    );
}

#[test]
fn j3_a_manual_vm_is_left_to_its_operator() {
    let mut vm = guest("a", 4096, 500, 3000);
    vm.mode = Mode::Manual;
    vm.set_balloon(100);
    vm.manual_target_bytes = Some(1000 * MIB);
    let decision = decide_once(&sample(100 * MIB, vec![vm])).remove(0);
    assert_eq!(decision.target_bytes, 1000 * MIB);
}

#[test]
fn j2_a_manual_target_below_the_floor_needs_an_explicit_override() {
    let config = PolicyConfig::default();
    let mut vm = guest("a", 4096, 500, 3000);
    vm.mode = Mode::Manual;
    vm.floor_bytes = 2048 * MIB;

    let refused = check_manual_target(&vm, &config, 3000 * MIB, false).unwrap_err();
    assert_eq!(refused.largest_bytes, 2048 * MIB);
    assert_eq!(
        check_manual_target(&vm, &config, 3000 * MIB, true),
        Ok(3000 * MIB)
    );
    assert!(check_manual_target(&vm, &config, 5000 * MIB, true).is_err());
    assert_eq!(
        check_manual_target(&vm, &config, 2048 * MIB, false),
        Ok(2048 * MIB)
    );

    vm.manual_target_bytes = Some(3000 * MIB);
    let clamped = decide_once(&sample(20 * GIB, vec![vm.clone()])).remove(0);
    assert_eq!(clamped.target_bytes, 2048 * MIB, "{}", clamped.reason);
    vm.floor_override = true;
    let overridden = decide_once(&sample(20 * GIB, vec![vm])).remove(0);
    assert_eq!(overridden.target_bytes, 3000 * MIB, "{}", overridden.reason);
}

#[test]
fn a7_floor_only_keeps_the_operators_target_but_for_distress() {
    let mut policy = Aerostat::new(PolicyConfig::default());
    let mut vm = guest("a", 4096, 500, 1500);
    vm.mode = Mode::FloorOnly;
    vm.manual_target_bytes = Some(1024 * MIB);
    vm.set_balloon(1024);
    let mut sample = sample(100 * MIB, vec![vm]);
    assert_eq!(
        policy.decide(&sample)[0].target_bytes,
        1024 * MIB,
        "not for the host"
    );

    sample.at = Duration::from_secs(1);
    sample.vms[0].guest.oom_kills = Some(1);
    let given_back = policy.decide(&sample)[0].target_bytes;
    assert!(given_back < 1024 * MIB);

    sample.vms[0].set_balloon(given_back / MIB);
    for second in 2..60 {
        sample.at = Duration::from_secs(second);
        let target = policy.decide(&sample)[0].target_bytes;
        sample.vms[0].set_balloon(target / MIB);
    }
    assert_eq!(
        sample.vms[0].target_bytes,
        1024 * MIB,
        "and back when it is calm"
    );
}

#[test]
fn j7_fluid_guests_trade_idle_memory_while_the_host_lacks_nothing() {
    let mut idle = guest("idle", 2048, 300, 1000);
    let mut needy = guest("needy", 2048, 900, 0);
    for vm in [&mut idle, &mut needy] {
        vm.mode = Mode::Fluid;
        vm.set_balloon(700);
    }
    needy.guest.free_bytes = Some(MIB);
    // Between the watermarks: neither demand nor surplus.
    let decisions = decide_once(&sample(2800 * MIB, vec![idle, needy]));

    let lent = decisions[0].target_bytes - 700 * MIB;
    let borrowed = 700 * MIB - decisions[1].target_bytes;
    assert_eq!(lent, borrowed);
    assert_eq!(lent, 32 * MIB);
}

#[test]
fn j5_what_the_hypervisor_can_do_changes_who_gives() {
    let mut plain = guest("a-plain", 4096, 1000, 0);
    plain.traits.demand_fault_from_swap = false;
    let mut shared = plain.clone();
    shared.id = VmId::new("b-shared");
    shared.traits.page_sharing = true;
    let mut swappable = plain.clone();
    swappable.id = VmId::new("c-swappable");
    swappable.traits.demand_fault_from_swap = true;

    let decisions = decide_once(&sample(2200 * MIB, vec![plain, shared, swappable]));

    let [plain, shared, swappable] = [0, 1, 2].map(|n| decisions[n].target_bytes);
    assert!(
        shared > plain,
        "twice the balloon for the same gain: {shared} {plain}"
    );
    assert!(
        plain > swappable,
        "its memory can be had in no other way: {plain} {swappable}"
    );
}

#[test]
fn j5_last_resort_is_reclaim_from_swappable_vms_whose_balloon_does_not_follow() {
    let mut policy = Aerostat::new(PolicyConfig::default());
    let mut deaf = guest("deaf", 4096, 500, 3000);
    deaf.traits.demand_fault_from_swap = true;
    let mut pinned = guest("pinned", 4096, 500, 3000);
    pinned.traits.demand_fault_from_swap = false;
    let mut sample = sample(300 * MIB, vec![deaf, pinned]);
    let mut reclaimed = [0, 0];
    for second in 0..8 {
        sample.at = Duration::from_secs(second);
        let decisions = policy.decide(&sample);
        for (index, decision) in decisions.iter().enumerate() {
            reclaimed[index] += decision.reclaim_bytes;
            sample.vms[index].target_bytes = decision.target_bytes;
        }
    }
    assert!(reclaimed[0] > 0);
    assert_eq!(reclaimed[1], 0);
}

#[test]
fn x2_a_node_that_lacks_memory_is_helped_by_what_lies_there() {
    let on = |name: &str, node: u32| {
        let mut vm = guest(name, 4096, 1000, 2000);
        vm.capabilities.per_node_targets = true;
        vm.nodes = [0, 1]
            .map(|id| VmNodeSample {
                node: NodeId(id),
                current_bytes: if id == node { 4096 * MIB } else { 0 },
                ..VmNodeSample::default()
            })
            .to_vec();
        vm
    };
    let mut sample = sample(6 * GIB, vec![on("a", 0), on("b", 1)]);
    sample.host.nodes = vec![
        HostNodeSample {
            node: NodeId(0),
            total_bytes: 16 * GIB,
            available_bytes: GIB,
        },
        HostNodeSample {
            node: NodeId(1),
            total_bytes: 16 * GIB,
            available_bytes: 5 * GIB,
        },
    ];

    let decisions = decide_once(&sample);

    assert!(
        decisions[0].target_bytes > 200 * MIB,
        "{}",
        decisions[0].reason
    );
    assert_eq!(decisions[1].target_bytes, 0, "{}", decisions[1].reason);
    let nodes: Vec<u64> = decisions[0]
        .nodes
        .iter()
        .map(|node| node.target_bytes)
        .collect();
    assert_eq!(nodes, [decisions[0].target_bytes, 0]);
}

#[test]
fn x2_a_node_that_lacks_memory_for_ever_takes_nothing_from_those_that_may_not_be_there() {
    let node = |id, available_bytes| HostNodeSample {
        node: NodeId(id),
        total_bytes: 16 * GIB,
        available_bytes,
    };
    let mut ballooned = guest("b", 4096, 1000, 2000);
    ballooned.set_balloon(512);
    let mut sample = sample(16 * GIB, vec![guest("a", 4096, 1000, 2000), ballooned]);
    // Something else is on node 1.
    sample.host.nodes = vec![node(0, 15 * GIB), node(1, GIB / 4)];

    let decisions = decide_once(&sample);

    assert_eq!(decisions[0].target_bytes, 0, "{}", decisions[0].reason);
    assert!(
        decisions[1].target_bytes < 512 * MIB,
        "{}",
        decisions[1].reason
    );
}

#[test]
fn every_decision_is_explained_in_a_line() {
    let mut stale = guest("stale", 4096, 200, 3800);
    stale.guest.age = Some(Duration::from_secs(60));
    let mut manual = guest("manual", 4096, 500, 100);
    manual.mode = Mode::Manual;
    let decisions = decide_once(&sample(
        300 * MIB,
        vec![guest("a", 4096, 500, 3000), stale, manual],
    ));
    assert_eq!(decisions.len(), 3);
    for decision in &decisions {
        let line = decision.reason.to_string();
        assert!(!line.contains('\n') && line.len() > 10, "{line}");
    }
    assert_eq!(
        decisions[0].reason.to_string(),
        "host lacks 2321 MiB (available 300 MiB, high 2621 MiB): gives 2321 MiB of 3072 MiB above \
         its floor, its share"
    );
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let wrong = PolicyConfig {
        low_percent: 9.0,
        ..PolicyConfig::default()
    };
    assert_eq!(wrong.validate().unwrap_err().key, "low-percent");
    let unknown = PolicyConfig {
        name: "magic".to_owned(),
        ..PolicyConfig::default()
    };
    assert_eq!(unknown.validate().unwrap_err().key, "name");
    assert_eq!(PolicyConfig::default().validate(), Ok(()));
    for name in NAMES {
        assert_eq!(
            by_name(name, &PolicyConfig::default()).unwrap().name(),
            name
        );
    }
}

/// A guest with a limit that comes out of a budget.
fn limited(name: &str) -> VmSample {
    let mut vm = guest(name, 4096, 1000, 2000);
    vm.limited = true;
    vm
}

#[test]
fn what_lacks_in_the_budget_is_asked_of_those_with_a_limit() {
    let mut sample = sample(16 * GIB, vec![limited("a"), guest("b", 4096, 1000, 2000)]);
    sample.budget = Some(Budget {
        total_bytes: 8 * GIB,
        needed_bytes: 8 * GIB + 100 * MIB,
    });

    let decisions = decide_once(&sample);

    assert!(
        decisions[0].target_bytes >= 100 * MIB,
        "{}",
        decisions[0].reason
    );
    assert_eq!(decisions[1].target_bytes, 0, "{}", decisions[1].reason);
    assert!(
        decisions[0]
            .reason
            .to_string()
            .starts_with("budget lacks 100 MiB")
    );
}

#[test]
fn a_budget_that_is_full_keeps_nothing_from_those_without_a_limit() {
    let ballooned = |mut vm: VmSample| {
        vm.set_balloon(512);
        vm
    };
    let vms = vec![
        ballooned(limited("a")),
        ballooned(guest("b", 4096, 1000, 2000)),
    ];
    let mut sample = sample(16 * GIB, vms);
    for (total_bytes, returns) in [(8 * GIB, false), (16 * GIB, true)] {
        sample.budget = Some(Budget {
            total_bytes,
            needed_bytes: 8 * GIB,
        });
        let decisions = decide_once(&sample);
        assert_eq!(
            decisions[0].target_bytes < 512 * MIB,
            returns,
            "{}",
            decisions[0].reason
        );
        assert!(
            decisions[1].target_bytes < 512 * MIB,
            "{}",
            decisions[1].reason
        );
    }
}

#[test]
fn x2_a_node_that_lacks_more_than_the_host_is_helped_by_those_that_may_be_there() {
    let node = |id, gib, available_bytes| HostNodeSample {
        node: NodeId(id),
        total_bytes: gib * GIB,
        available_bytes,
    };
    // 32 GiB of which 2.6 should be available: node 0 alone lacks more than that.
    let mut sample = sample(GIB, vec![guest("a", 4096, 1000, 2000)]);
    sample.host.nodes = vec![node(0, 30, GIB / 16), node(1, 2, GIB - GIB / 16)];

    let decisions = decide_once(&sample);

    assert!(decisions[0].target_bytes > 0, "{}", decisions[0].reason);
}

#[test]
fn what_a_manual_vm_does_not_follow_is_not_on_its_way() {
    let mut manual = guest("manual", 8192, 1000, 4000);
    manual.mode = Mode::Manual;
    manual.manual_target_bytes = Some(4 * GIB);
    manual.target_bytes = 4 * GIB;
    let mut sample = sample(GIB, vec![guest("a", 4096, 1000, 2000), manual]);
    let mut policy = Aerostat::new(PolicyConfig::default());
    assert_eq!(policy.decide(&sample)[0].target_bytes, 0);

    sample.at = Duration::from_secs(20);

    let decisions = policy.decide(&sample);
    assert!(decisions[0].target_bytes > 0, "{}", decisions[0].reason);
}
