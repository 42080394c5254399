//! The program as an operator meets it: started, asked, reloaded, killed, and out of disk space.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use std::{
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// Far more than anything here takes on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);

fn aerostatd() -> Command {
    Command::new(env!("CARGO_BIN_EXE_aerostatd"))
}

/// A daemon with its configuration and log in a directory of its own.
struct Daemon {
    dir: tempfile::TempDir,
    process: Child,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_config(dir.path(), "");
        let log = File::create(dir.path().join("log")).unwrap();
        Self::start_in(dir, log.into())
    }

    fn start_in(dir: tempfile::TempDir, log: Stdio) -> Self {
        let process = aerostatd()
            .args(["run", "--config"])
            .arg(dir.path().join("aerostatd.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Self { dir, process };
        daemon.until("it answers", |daemon| {
            daemon.ask(&["status"]).status.success()
        });
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    fn ask(&self, words: &[&str]) -> Output {
        aerostatd()
            .args(words)
            .arg("--socket")
            .arg(self.socket())
            .output()
            .unwrap()
    }

    fn said(&self, words: &[&str]) -> String {
        let output = self.ask(words);
        assert!(
            output.status.success(),
            "{words:?}: {}",
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "{what}; log:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn write_config(dir: &Path, more: &str) {
    let text = format!(
        "[host]\nperiod-ms = 100\nmetrics = \"off\"\ncontrol-socket = \"{}\"\n{more}",
        dir.join("control").display()
    );
    fs::write(dir.join("aerostatd.toml"), text).unwrap();
}

const ABSENT_VM: &str =
    "[[vm]]\nname = \"web\"\nprotocol = \"qmp\"\nsocket = \"/nonexistent/web.qmp\"\n";

#[test]
fn it_runs_is_asked_and_ends_on_sigterm_leaving_no_socket() {
    let mut daemon = Daemon::start();

    assert!(daemon.said(&["status"]).starts_with("host: "));
    let json: serde_json::Value =
        serde_json::from_str(&daemon.said(&["status", "--json"])).unwrap();
    assert!(json["host"]["total-bytes"].as_u64().unwrap() > 0);
    let unknown = daemon.ask(&["explain", "nobody"]);
    assert!(!unknown.status.success());
    assert!(text(&unknown.stderr).contains("there is no VM nobody"));

    daemon.signal(Signal::TERM);
    assert!(daemon.process.wait().unwrap().success(), "{}", daemon.log());
    assert!(!daemon.socket().exists());
    assert!(
        daemon
            .log()
            .contains("stopped; balloons and limits stay as they are")
    );
}

#[test]
fn a_configuration_error_on_sighup_is_named_and_the_old_one_stays_in_force() {
    let daemon = Daemon::start();

    write_config(daemon.dir.path(), "reserve = \"lots\"\n");
    daemon.signal(Signal::HUP);
    daemon.until("the error is named", |d| {
        d.log().contains("aerostatd.toml:5:11: host.reserve")
    });
    assert!(daemon.log().contains("the configuration in force stays"));
    assert!(daemon.ask(&["status"]).status.success());

    write_config(daemon.dir.path(), ABSENT_VM);
    daemon.signal(Signal::HUP);
    daemon.until("the new one is in force", |d| {
        d.said(&["status"]).contains("web")
    });
    daemon.until("the VM's trouble is named", |d| {
        d.said(&["get", "web", "trouble"])
            .contains("start the VM, or correct its socket's path")
    });
    assert_eq!(daemon.said(&["get", "web", "mode"]), "auto\n");
    daemon.said(&["set", "web", "mode", "manual"]);
    daemon.said(&["set", "web", "floor", "1.5G"]);
    daemon.until("what was set is shown", |d| {
        d.said(&["get", "web", "mode"]) == "manual\n"
    });
    let bad = daemon.ask(&["set", "web", "floor", "much"]);
    assert!(!bad.status.success() && text(&bad.stderr).contains("not a size"));
}

#[test]
fn a_configuration_error_at_the_start_is_named_and_nothing_runs() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), "perod-ms = 7\n");

    let output = aerostatd()
        .args(["run", "--config"])
        .arg(dir.path().join("aerostatd.toml"))
        .output()
        .unwrap();

    assert!(!output.status.success());
    let said = text(&output.stderr);
    assert!(
        said.contains("aerostatd.toml:5:1: host.perod-ms: unknown field"),
        "{said}"
    );
}

#[test]
fn a_killed_daemon_is_replaced_by_the_next_one_and_a_running_one_is_not() {
    let mut first = Daemon::start();
    let second = aerostatd()
        .args(["run", "--config"])
        .arg(first.dir.path().join("aerostatd.toml"))
        .output()
        .unwrap();
    assert!(!second.status.success());
    assert!(text(&second.stderr).contains("another aerostatd answers there"));

    first.signal(Signal::KILL);
    first.process.wait().unwrap();
    assert!(first.socket().exists());

    let dir = std::mem::replace(&mut first.dir, tempfile::tempdir().unwrap());
    let next = Daemon::start_in(dir, Stdio::null());
    assert!(next.ask(&["status"]).status.success());
}

#[test]
fn a_full_disk_costs_log_lines_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), ABSENT_VM);
    // Every write to it fails with ENOSPC.
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();

    let daemon = Daemon::start_in(dir, full.into());

    // It has had things to say by now, and goes on deciding.
    daemon.until("it goes on", |d| {
        let status = d.said(&["status", "--json"]);
        serde_json::from_str::<serde_json::Value>(&status).unwrap()["ticks"]
            .as_u64()
            .unwrap()
            > 10
    });
    daemon.signal(Signal::HUP);
    daemon.until("the trouble is in the status", |d| {
        d.said(&["status"]).contains("start the VM")
    });
}

#[test]
fn check_says_what_is_wrong_and_how_to_fix_it() {
    let dir = tempfile::tempdir().unwrap();
    write_config(
        dir.path(),
        &format!("cgroup-root = \"{}\"\n{ABSENT_VM}", dir.path().display()),
    );

    let output = aerostatd()
        .args(["check", "--config"])
        .arg(dir.path().join("aerostatd.toml"))
        .output()
        .unwrap();

    assert!(!output.status.success(), "a tempdir is no cgroup");
    let said = text(&output.stdout);
    assert!(said.contains("ok    host memory"), "{said}");
    assert!(
        said.contains("BAD   cgroup v2") && said.contains("not on a cgroup v2 file system"),
        "{said}"
    );
    assert!(
        said.contains("BAD   VM web") && said.contains("start the VM"),
        "{said}"
    );
}

#[test]
fn help_has_examples_and_each_of_them_is_understood() {
    let help = text(&aerostatd().arg("--help").output().unwrap().stdout);
    let examples: Vec<Vec<&str>> = help
        .lines()
        .skip_while(|line| *line != "Examples:")
        .skip(1)
        .take_while(|line| line.trim_start().starts_with("aerostatd "))
        .map(|line| {
            let command = line.trim().split("  ").next().unwrap_or_default();
            command.split(' ').skip(1).collect()
        })
        .collect();
    assert!(examples.len() >= 10, "{help}");
    for example in examples
        .iter()
        .filter(|words| words.first() != Some(&"run"))
    {
        let output = aerostatd()
            .args(example)
            .args(["--socket", "/nonexistent"])
            .output()
            .unwrap();
        // 2 is a command line that was not understood.
        assert_ne!(
            output.status.code(),
            Some(2),
            "{example:?}: {}",
            text(&output.stderr)
        );
    }
}

#[test]
fn nobody_at_the_socket_is_said_so() {
    let output = aerostatd()
        .args(["status", "--socket", "/nonexistent/sock"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(
        text(&output.stderr).contains("is aerostatd running"),
        "{}",
        text(&output.stderr)
    );
    if output.status.code() == Some(101) {
        panic!("it panicked");
    }
}
