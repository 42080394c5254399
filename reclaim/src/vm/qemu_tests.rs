//! Clients of every kind against peers that behave, and against peers that do not.

use std::time::{Duration, Instant};

use rustix::net::SocketType;
use serde_json::{Value, json};

use super::super::{
    Endpoint, Protocol, Vm, VmError,
    test_peer::{MISDEEDS, Peer, http, misbehaving, monitor, packets},
};

use crate::policy::{Capabilities, GuestMemory};

const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(60);

fn connect(peer: &Peer, protocol: Protocol) -> Result<Box<dyn Vm>, VmError> {
    endpoint(peer, protocol).connect(LONG)
}

fn endpoint(peer: &Peer, protocol: Protocol) -> Endpoint {
    Endpoint {
        protocol,
        socket: peer.path.clone(),
        memory_bytes: None,
        domain: Some(7),
    }
}

/// QEMU with 1 GiB, a DIMM of 256 MiB, 2 GiB of virtio-mem, an NVDIMM, and 100 MiB ballooned.
fn qemu(kind: &'static str) -> Peer {
    monitor(move |command, arguments| match command {
        "qom-list" if arguments["path"] == "/machine/peripheral" => Ok(json!([
            {"name": "type", "type": "string"},
            {"name": "net0", "type": "child<virtio-net-pci>"},
            {"name": "balloon0", "type": kind},
        ])),
        "qom-list" => Err("Device '/machine/peripheral-anon' not found"),
        "qom-set" | "balloon" => Ok(json!({})),
        "qom-get" if arguments["property"] == "deflate-on-oom" => Ok(json!(true)),
        "qom-get" => Ok(json!({
            "stats": {
                "stat-free-memory": 7 * MIB,
                "stat-available-memory": 9 * MIB,
                "stat-swap-in": -1,
                "stat-oom-kills": u64::MAX,
            },
            "last-update": 1_700_000_000,
        })),
        "query-memory-size-summary" => {
            Ok(json!({"base-memory": 1024 * MIB, "plugged-memory": 10496 * MIB}))
        }
        "query-memory-devices" => Ok(json!([
            {"type": "virtio-mem", "data": {"size": 2048 * MIB, "max-size": 4096 * MIB}},
            {"type": "dimm", "data": {"size": 256 * MIB, "slot": 0}},
            {"type": "nvdimm", "data": {"size": 8192 * MIB, "slot": 1}},
        ])),
        "query-status" => Ok(json!({"running": true, "status": "running"})),
        "query-balloon" => Ok(json!({"actual": 1180 * MIB})),
        _ => Err("The command has not been found"),
    })
}

#[test]
fn qemu_is_observed_in_ballooned_bytes_and_its_statistics_are_switched_on() {
    let peer = qemu("child<virtio-balloon-pci>");
    let mut vm = connect(&peer, Protocol::Qmp).unwrap();

    let seen = vm.observe().unwrap();

    assert_eq!(
        (seen.memory_bytes, seen.reach_bytes, seen.ballooned_bytes),
        (3328 * MIB, Some(1280 * MIB), 100 * MIB)
    );
    assert!(seen.running && seen.capabilities.guest_stats && seen.capabilities.deflate_on_oom);
    assert_eq!(seen.target_bytes, None);
    assert_eq!(seen.guest.free_bytes, Some(7 * MIB));
    assert_eq!(
        (seen.guest.swap_in_bytes, seen.guest.oom_kills),
        (None, None)
    );
    let asked = peer.asked.lock().unwrap();
    let interval = json!({"execute": "qom-set", "arguments": {
        "path": "/machine/peripheral/balloon0",
        "property": "guest-stats-polling-interval",
        "value": 2,
    }});
    assert!(
        asked
            .iter()
            .any(|line| serde_json::from_str::<Value>(line).unwrap() == interval)
    );
}

#[test]
fn qemu_is_told_what_is_left_to_the_guest() {
    let peer = qemu("child<aerostat-balloon-pci>");
    let mut vm = connect(&peer, Protocol::Qmp).unwrap();

    vm.set_target_bytes(280 * MIB).unwrap();
    vm.set_target_bytes(9999 * MIB).unwrap();

    assert_eq!(vm.observe().unwrap().target_bytes, Some(9999 * MIB));
    let asked = peer.asked.lock().unwrap().join("\n");
    let left = |bytes: u64| json!({"arguments": {"value": bytes}, "execute": "balloon"});
    assert!(asked.contains(&left(1000 * MIB).to_string()), "{asked}");
    assert!(
        asked.contains(&left(MIB).to_string()),
        "never nothing: {asked}"
    );
}

#[test]
fn qemu_without_a_balloon_is_told_which_option_is_missing() {
    let peer = qemu("child<virtio-rng-pci>");
    let error = connect(&peer, Protocol::Qmp).unwrap_err();
    assert!(
        error.to_string().contains("-device virtio-balloon-pci"),
        "{error}"
    );
}

#[test]
fn a_guest_whose_driver_is_not_up_has_an_empty_balloon_and_does_not_run() {
    let peer = monitor(|command, arguments| match command {
        "qom-list" => Ok(json!([{"name": "b", "type": "child<virtio-balloon-pci>"}])),
        "qom-set" => Err("this balloon has no statistics"),
        "qom-get" if arguments["property"] == "guest-stats" => Err("timer hasn't been enabled"),
        "qom-get" => Ok(json!(false)),
        "query-memory-size-summary" => Ok(json!({"base-memory": MIB})),
        "query-status" => Ok(json!({"running": true})),
        _ => Err("No balloon device has been activated"),
    });
    let mut vm = connect(&peer, Protocol::Qmp).unwrap();

    let seen = vm.observe().unwrap();

    assert!(!seen.running && seen.ballooned_bytes == 0 && !seen.capabilities.guest_stats);
    assert!(matches!(
        vm.set_target_bytes(5),
        Err(VmError::Refused { .. })
    ));
}

#[test]
fn balloons_without_statistics_are_found_in_qemu() {
    for kind in [
        "child<aerostat-memballoon-pci>",
        "child<aerostat-vmware-balloon>",
    ] {
        let peer = monitor(move |command, arguments| match command {
            "qom-list" if arguments["path"] == "/machine/peripheral" => Ok(json!([])),
            "qom-list" => Ok(json!([{"name": "device[0]", "type": kind}])),
            "query-memory-size-summary" => Ok(json!({"base-memory": 1024 * MIB})),
            "query-status" => Ok(json!({"running": true})),
            "query-balloon" => Ok(json!({"actual": 1000 * MIB})),
            _ => Err("Property not found"),
        });
        let seen = connect(&peer, Protocol::Qmp).unwrap().observe().unwrap();
        assert!(seen.running, "{kind}");
        assert_eq!(seen.ballooned_bytes, 24 * MIB, "{kind}");
        assert_eq!(seen.guest, GuestMemory::default(), "{kind}");
        assert_eq!(seen.capabilities, Capabilities::default(), "{kind}");
    }
}

/// 4 Gi - 1 pages, the most that the configuration space of a traditional balloon holds.
const CLAIMED: u64 = 0xffff_ffff << 12;

#[test]
fn a_guest_that_claims_a_balloon_larger_than_its_memory_is_observed_in_qemu() {
    let peer = monitor(|command, _| match command {
        "qom-list" => Ok(json!([{"name": "b", "type": "child<virtio-balloon-pci>"}])),
        "query-memory-size-summary" => Ok(json!({"base-memory": 1024 * MIB})),
        "query-status" => Ok(json!({"running": true})),
        "query-balloon" => Ok(json!({"actual": (1024 * MIB).wrapping_sub(CLAIMED).cast_signed()})),
        _ => Err("not found"),
    });
    let seen = connect(&peer, Protocol::Qmp).unwrap().observe().unwrap();
    assert!(seen.running);
    assert_eq!(seen.ballooned_bytes, CLAIMED);
}

#[test]
fn a_guest_that_claims_a_balloon_larger_than_its_memory_is_observed_in_cloud_hypervisor() {
    let peer = http(|_, _| {
        let info = json!({
            "config": {"memory": {"size": 1024 * MIB}, "balloon": {}},
            "state": "Running",
            "memory_actual_size": (1024 * MIB).wrapping_sub(CLAIMED),
        });
        (200, info.to_string())
    });
    let mut vm = connect(&peer, Protocol::CloudHypervisor).unwrap();
    assert_eq!(vm.observe().unwrap().ballooned_bytes, CLAIMED);
}

#[test]
fn cloud_hypervisor_is_observed_and_resized() {
    let peer = http(|request, _| match request {
        "GET /api/v1/vm.info" => (
            200,
            json!({
                "config": {
                    "memory": {"size": 512 * MIB, "hotplugged_size": 512 * MIB},
                    "balloon": {"size": 300 * MIB, "deflate_on_oom": true},
                },
                "state": "Running",
                "memory_actual_size": 824 * MIB,
            })
            .to_string(),
        ),
        "PUT /api/v1/vm.resize" => (204, String::new()),
        _ => (404, String::new()),
    });
    let mut vm = connect(&peer, Protocol::CloudHypervisor).unwrap();

    let seen = vm.observe().unwrap();
    vm.set_target_bytes(256 * MIB).unwrap();

    assert_eq!(seen.memory_bytes, 1024 * MIB);
    assert_eq!(
        (seen.target_bytes, seen.ballooned_bytes),
        (Some(300 * MIB), 200 * MIB)
    );
    assert!(seen.running && seen.capabilities.deflate_on_oom && !seen.capabilities.guest_stats);
    let last = peer.asked.lock().unwrap().last().unwrap().clone();
    assert_eq!(
        last,
        r#"PUT /api/v1/vm.resize {"desired_balloon":268435456}"#
    );
    assert_eq!(vm.peer_pid(), Some(std::process::id()));
}

#[test]
fn cloud_hypervisor_says_why_it_refuses() {
    let peer = http(|request, _| match request {
        "GET /api/v1/vm.info" => (
            200,
            json!({"config": {"memory": {"size": MIB}, "balloon": {}}, "state": "Paused"})
                .to_string(),
        ),
        _ => (
            500,
            json!(["Error from API", "VM is not running"]).to_string(),
        ),
    });
    let mut vm = connect(&peer, Protocol::CloudHypervisor).unwrap();
    let error = vm.set_target_bytes(1).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("Error from API: VM is not running"),
        "{error}"
    );
    assert!(!vm.observe().unwrap().running);
}

#[test]
fn firecracker_is_observed_and_patched_in_mib() {
    let peer = http(|request, _| match request {
        "GET /" => (200, json!({"state": "Running", "id": "x"}).to_string()),
        "GET /machine-config" => (
            200,
            json!({"mem_size_mib": 512, "vcpu_count": 2}).to_string(),
        ),
        "GET /balloon" => (
            200,
            json!({"amount_mib": 64, "deflate_on_oom": true, "stats_polling_interval_s": 1})
                .to_string(),
        ),
        "GET /balloon/statistics" => (
            200,
            json!({
                "target_pages": 16384, "actual_pages": 8192, "target_mib": 64, "actual_mib": 32,
                "free_memory": 5, "total_memory": 9, "disk_caches": 3,
            })
            .to_string(),
        ),
        "PATCH /balloon" => (204, String::new()),
        _ => (400, json!({"fault_message": "unknown"}).to_string()),
    });
    let mut vm = connect(&peer, Protocol::Firecracker).unwrap();

    let seen = vm.observe().unwrap();
    vm.set_target_bytes(100 * MIB + 5).unwrap();

    assert_eq!(seen.memory_bytes, 512 * MIB);
    assert_eq!(
        (seen.target_bytes, seen.ballooned_bytes),
        (Some(64 * MIB), 32 * MIB)
    );
    assert_eq!(
        (seen.guest.caches_bytes, seen.guest.available_bytes),
        (Some(3), None)
    );
    let last = peer.asked.lock().unwrap().last().unwrap().clone();
    assert_eq!(last, r#"PATCH /balloon {"amount_mib":100}"#);
}

#[test]
fn firecracker_without_statistics_is_taken_at_its_target() {
    let peer = http(|request, _| match request {
        "GET /" => (200, json!({"state": "Not started"}).to_string()),
        "GET /machine-config" => (200, json!({"mem_size_mib": 512}).to_string()),
        "GET /balloon" => (200, json!({"amount_mib": 64}).to_string()),
        _ => (400, String::new()),
    });
    let seen = connect(&peer, Protocol::Firecracker)
        .unwrap()
        .observe()
        .unwrap();
    assert_eq!(seen.ballooned_bytes, 64 * MIB);
    assert!(!seen.running && !seen.capabilities.guest_stats);
}

#[test]
fn firecracker_without_a_balloon_is_told_how_to_get_one() {
    let peer = http(|_, _| (400, json!({"fault_message": "no balloon"}).to_string()));
    let error = connect(&peer, Protocol::Firecracker).unwrap_err();
    assert!(error.to_string().contains("PUT /balloon"), "{error}");
}

#[test]
fn crosvm_is_observed_and_adjusted_by_packets() {
    let peer = packets(|request| match request {
        request if *request == json!({"BalloonCommand": "Stats"}) => json!({"BalloonStats": {
            "stats": {"total_memory": 900 * MIB, "free_memory": 5, "unevictable_memory": null},
            "balloon_actual": 124 * MIB,
        }}),
        request if request["BalloonCommand"]["Adjust"]["num_bytes"] == json!(7) => json!("Ok"),
        _ => json!({"Err": 22}),
    });
    let mut vm = connect(&peer, Protocol::Crosvm).unwrap();

    let seen = vm.observe().unwrap();
    vm.set_target_bytes(7).unwrap();

    assert_eq!(
        (seen.memory_bytes, seen.ballooned_bytes),
        (1024 * MIB, 124 * MIB)
    );
    assert_eq!(vm.observe().unwrap().target_bytes, Some(7));
    assert!(matches!(
        vm.set_target_bytes(8),
        Err(VmError::Refused { .. })
    ));
}

#[test]
fn the_back_end_of_aerostat_is_observed_through_the_same_trait() {
    let peer = monitor(|command, _| match command {
        "aerostat-query" => Ok(json!({
            "state": "active", "memory-bytes": 10 * MIB, "target-bytes": 4 * MIB,
            "actual-bytes": 3 * MIB, "ballooned-bytes": 2 * MIB, "feature-names": ["stats-vq"],
        })),
        "aerostat-guest-stats" => Err("the guest's driver does not answer"),
        "aerostat-set-target" => Ok(json!({})),
        _ => Err("unknown"),
    });
    let mut vm = connect(&peer, Protocol::Aerostat).unwrap();

    let seen = vm.observe().unwrap();
    vm.set_target_bytes(MIB).unwrap();

    assert_eq!(
        (seen.target_bytes, seen.ballooned_bytes),
        (Some(4 * MIB), 3 * MIB)
    );
    assert!(seen.running && seen.capabilities.guest_stats && !seen.capabilities.deflate_on_oom);
    assert_eq!(seen.guest.age, None);
}

#[test]
fn a_peer_that_hangs_talks_nonsense_or_stops_half_way_is_an_error_in_bounded_time() {
    let kinds = [
        (Protocol::Aerostat, SocketType::STREAM),
        (Protocol::Qmp, SocketType::STREAM),
        (Protocol::CloudHypervisor, SocketType::STREAM),
        (Protocol::Firecracker, SocketType::STREAM),
        (Protocol::Crosvm, SocketType::SEQPACKET),
        (Protocol::Xen, SocketType::STREAM),
    ];
    for (protocol, kind) in kinds {
        for misdeed in MISDEEDS {
            let peer = misbehaving(kind, misdeed);
            let start = Instant::now();

            let error = endpoint(&peer, protocol).connect(SHORT).unwrap_err();

            assert!(start.elapsed() < LONG, "{protocol:?} {misdeed:?}");
            let text = error.to_string();
            assert!(text.contains(peer.path.to_str().unwrap()), "{text}");
            assert!(!error.advice().is_empty());
        }
    }
}

#[test]
fn a_peer_whose_queue_of_connections_is_full_does_not_block_the_client() {
    let peer = misbehaving(SocketType::STREAM, super::super::test_peer::Misdeed::Deaf);
    let mut held = Vec::new();
    let start = Instant::now();
    let refused = loop {
        let endpoint = endpoint(&peer, Protocol::Qmp);
        match super::super::socket::Socket::connect(&endpoint.socket, SocketType::STREAM) {
            Ok(socket) => held.push(socket),
            Err(error) => break error,
        }
        assert!(held.len() < 100 && start.elapsed() < LONG);
    };
    assert!(
        matches!(
            refused,
            VmError::Io {
                action: "connect",
                ..
            }
        ),
        "{refused}"
    );
}
