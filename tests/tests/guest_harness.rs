//! The real guest by itself, without any device: that the harness other tests stand on tells the
//! truth about commands, memory and the end of a guest.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]
use std::{fs, time::Duration};

use aerostat_tests::guest::{GuestError, Prerequisites, UmlConfig, UmlGuest};

const MIB: u64 = 1 << 20;

fn boot(test: &str, config: &UmlConfig) -> Option<UmlGuest> {
    Prerequisites::find_or_skip(test)?;
    Some(UmlGuest::boot(config).unwrap_or_else(|error| panic!("{test}: {error}")))
}

/// Host processes whose command line holds this text.
fn processes_with(text: &str) -> usize {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).contains(text))
        .count()
}

#[test]
fn commands_return_their_output_and_their_failure() {
    let Some(mut guest) = boot("commands", &UmlConfig::new(128)) else {
        return;
    };

    assert_eq!(guest.run("echo one; echo two").unwrap(), "one\ntwo");
    assert_eq!(
        guest.run("printf 'no end of line'").unwrap(),
        "no end of line"
    );
    assert_eq!(guest.run("true").unwrap(), "");
    match guest.run("echo reason >&2; exit 7").unwrap_err() {
        GuestError::Command { status, output, .. } => {
            assert_eq!((status, output.as_str()), (7, "reason"));
        }
        other => panic!("{other}"),
    }

    // A command that takes too long is an error, and the next one is not confused by it.
    let late = guest.run_within("sleep 2; echo late", Duration::from_millis(300));
    assert!(matches!(late, Err(GuestError::Timeout { .. })), "{late:?}");
    assert_eq!(guest.run("echo next").unwrap(), "next");

    let memory = guest.memory().unwrap();
    assert!(
        memory.total_bytes > 96 * MIB && memory.total_bytes <= 128 * MIB,
        "{memory:?}"
    );
    guest.power_off().unwrap();
}

#[test]
fn host_memory_follows_what_the_guest_touches_and_stays_when_the_guest_lets_go() {
    let Some(mut guest) = boot("host memory", &UmlConfig::new(256)) else {
        return;
    };
    let before = guest.host_memory_bytes().unwrap();
    assert!(before < 96 * MIB, "an idle guest occupies {before} bytes");

    let touched = guest.touch_unused_memory().unwrap();

    // Nothing gives memory back here: what was touched once stays with the guest.
    let after = guest.host_memory_bytes().unwrap();
    assert!(touched > 150 * MIB, "{touched}");
    assert!(
        after > before + touched - 16 * MIB,
        "{before} {touched} {after}"
    );

    let set = guest.make_working_set("data", 32).unwrap();
    assert!(guest.verify_working_set(&set).unwrap());
    guest
        .run("dd if=/dev/zero of=/keep/data bs=16 count=1 seek=100 conv=notrunc")
        .unwrap();
    assert!(!guest.verify_working_set(&set).unwrap());
}

#[test]
fn a_reboot_brings_the_guest_back_with_new_memory() {
    let Some(mut guest) = boot("reboot", &UmlConfig::new(128)) else {
        return;
    };
    guest.run("echo gone >/run/file").unwrap();
    guest.touch_unused_memory().unwrap();
    let before = guest.host_memory_bytes().unwrap();

    guest.reboot().unwrap();

    assert!(guest.run("cat /run/file").is_err());
    assert!(guest.host_memory_bytes().unwrap() < before);
}

#[test]
fn nothing_is_left_of_a_guest_that_was_dropped() {
    let mark = format!("aerostat.mark={}", std::process::id());
    let config = UmlConfig::new(128).kernel_argument(&mark);
    let Some(mut guest) = boot("end", &config) else {
        return;
    };
    guest.run("sleep 1000 & sleep 1000 & true").unwrap();
    assert!(guest.is_running());
    assert!(processes_with(&mark) > 0);

    drop(guest);

    assert_eq!(processes_with(&mark), 0);
}

#[test]
fn a_guest_that_does_not_boot_is_an_error_with_its_console() {
    let mut config = UmlConfig::new(128)
        .kernel_argument("rdinit=/nothing")
        .kernel_argument("init=/no");
    config.boot_timeout = Duration::from_secs(10);
    if Prerequisites::find_or_skip("boot failure").is_none() {
        return;
    }

    let error = UmlGuest::boot(&config).unwrap_err();

    let text = error.to_string();
    assert!(
        matches!(error, GuestError::Boot { .. } | GuestError::Ended { .. }),
        "{text}"
    );
    assert!(
        text.contains("/nothing") || text.contains("Kernel panic"),
        "{text}"
    );
}
