//! The program as a whole: its command line, its sockets, its beginning and end; and an independent
//! front-end, that of the vhost crate.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test program ends with a panic when anything is not as it should be"
)]

mod common;

use common::Backend;
use common::frontend::{F_PROTOCOL_FEATURES, FEATURES, Frontend, Guest, MEMORY_BYTES, USER_BASE};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend as VhostFrontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

fn program(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_aerostat-vhost-user"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn capabilities_are_printed_as_json() {
    let output = program(&["--print-capabilities"]);
    assert!(output.status.success());
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["type"], "balloon");
    assert!(
        printed["features"]
            .as_array()
            .unwrap()
            .contains(&"stats-vq".into())
    );
}

#[test]
fn mistakes_on_the_command_line_are_explained() {
    let fails_with = |arguments: &[&str], text: &str| {
        let output = program(arguments);
        assert!(!output.status.success());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(text), "{stderr}");
    };
    fails_with(&[], "--socket-path");
    fails_with(&["--socket-path", "/nowhere/s"], "/nowhere/s");
    fails_with(
        &[
            "--socket-path",
            "s",
            "--control-path",
            "a",
            "--control-path",
            "b",
        ],
        "control",
    );
    fails_with(&["--socket-path", "s", "--features", "warp"], "stats-vq");
    fails_with(&["--socket-path", "s", "--socket-mode", "9"], "octal");
    let help = program(&["--help"]);
    assert!(
        String::from_utf8(help.stdout)
            .unwrap()
            .contains("Examples:")
    );
}

#[test]
fn it_ends_cleanly_on_a_signal() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start_with(directory.path(), 2, &["--socket-mode", "640"]);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&backend.socket(0)), 0o640);
    assert_eq!(mode(&directory.path().join("1.ctl")), 0o640);
    let mut guest = Guest::new();
    let mut frontend = Frontend::run(&backend.socket(0), &guest);
    guest.inflate(0x200..0x300);
    let mut client = backend.control(1);
    assert!(backend.terminate().success());
    assert!(frontend.receive().is_none());
    assert!(client.line().is_none());
    assert_eq!(
        std::fs::read_dir(directory.path()).unwrap().count(),
        0,
        "sockets are left"
    );
}

#[test]
fn a_socket_in_use_is_not_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let output = program(&["--socket-path", path.to_str().unwrap()]);
    assert!(!output.status.success());
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("listening")
    );
    assert!(path.exists());
    drop(listener);
}

#[test]
fn the_vhost_crates_front_end_gets_along_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut guest = Guest::new();
    let mut frontend = VhostFrontend::connect(backend.socket(0), 3).unwrap();
    frontend.set_owner().unwrap();
    let offered = frontend.get_features().unwrap();
    assert_eq!(
        offered & (FEATURES | F_PROTOCOL_FEATURES),
        FEATURES | F_PROTOCOL_FEATURES
    );
    let wanted = VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::RESET_DEVICE;
    assert!(frontend.get_protocol_features().unwrap().contains(wanted));
    frontend.set_protocol_features(wanted).unwrap();
    frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    frontend
        .set_features(FEATURES | F_PROTOCOL_FEATURES)
        .unwrap();
    assert_eq!(frontend.get_queue_num().unwrap(), 5);

    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES,
        userspace_addr: USER_BASE,
        mmap_offset: 0,
        mmap_handle: guest.memory.as_raw_fd(),
    };
    frontend.set_mem_table(&[region]).unwrap();
    let kick = EventFd::new(0).unwrap();
    let call = EventFd::new(0).unwrap();
    let base = USER_BASE + guest.rings[0].base;
    let vring = VringConfigData {
        queue_max_size: 64,
        queue_size: 64,
        flags: 0,
        desc_table_addr: base,
        used_ring_addr: base + 0x2000,
        avail_ring_addr: base + 0x1000,
        log_addr: None,
    };
    frontend.set_vring_num(0, 64).unwrap();
    frontend.set_vring_addr(0, &vring).unwrap();
    frontend.set_vring_base(0, 0).unwrap();
    frontend.set_vring_call(0, &call).unwrap();
    frontend.set_vring_kick(0, &kick).unwrap();
    frontend.set_vring_enable(0, true).unwrap();

    let empty = [0; 16];
    let (_, space) = frontend
        .get_config(0, 16, VhostUserConfigFlags::WRITABLE, &empty)
        .unwrap();
    assert_eq!(space, empty);
    frontend
        .set_config(4, VhostUserConfigFlags::WRITABLE, &[2, 0, 0, 0])
        .unwrap();
    assert_eq!(backend.control(0).query()["actual-bytes"], 8192);

    let pfns: Vec<u8> = (0x200_u32..0x210).flat_map(u32::to_le_bytes).collect();
    guest.write(0x10_0000, &pfns);
    guest.offer(0, 0x10_0000, 64, 0);
    kick.write(1).unwrap();
    guest.wait_used(0);
    call.read().unwrap();
    assert_eq!(frontend.get_vring_base(0).unwrap(), 1);
    frontend.reset_device().unwrap();
}
