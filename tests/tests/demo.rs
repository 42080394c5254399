//! The demonstration as a user runs it: exit status, summary and timeline.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use aerostat_tests::guest::Prerequisites;

/// Runs the demonstration with a small guest.
fn demo(kind: &[&str], out: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_aerostat-demo"))
        .args(kind)
        .args(["--memory-mib", "320", "--target-mib", "160"])
        .args(["--working-set-mib", "32", "--out"])
        .arg(out)
        .output()
        .unwrap()
}

fn assert_passed(output: &Output, out: &Path) {
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("PASSED"), "{text}");
    let chart = fs::read_to_string(out.join("timeline.svg")).unwrap();
    assert!(chart.starts_with("<svg ") && chart.trim_end().ends_with("</svg>"));
}

/// A real guest: at least 99 % of the request becomes free on the host, and its data survives.
#[test]
fn a_real_guest_passes() {
    if Prerequisites::find_or_skip("demo").is_none() {
        return;
    }
    let out = tempfile::tempdir().unwrap();
    assert_passed(&demo(&["--guest", "uml"], out.path()), out.path());
}

/// The other protocols tell the same story.
#[test]
fn guests_of_other_protocols_pass() {
    for protocol in ["memballoon", "vmware"] {
        let out = tempfile::tempdir().unwrap();
        let output = demo(&["--protocol", protocol], out.path());
        assert_passed(&output, out.path());
    }
}

/// The same with a synthetic guest, through the C ABI.
#[test]
fn a_synthetic_guest_passes() {
    let out = tempfile::tempdir().unwrap();
    assert_passed(&demo(&["--guest", "synthetic"], out.path()), out.path());
}

/// What cannot be done is said, with an exit status of its own.
#[test]
fn a_back_end_that_is_not_there_is_an_error_of_its_own() {
    if Prerequisites::find_or_skip("demo without back-end").is_none() {
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_aerostat-demo"))
        .args(["--guest", "uml", "--backend", "/nonexistent/back-end"])
        .output()
        .unwrap();

    assert_eq!(output.status.code(), Some(2));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("/nonexistent/back-end"), "{errors}");
}
