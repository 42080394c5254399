//! The control socket as a client sees it: the dialect, the events, and clients that misbehave.
//! Each statement of `docs/control-socket.md` that a client relies on is checked here.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test program ends with a panic when anything is not as it should be"
)]

mod common;

use common::frontend::{F_PROTOCOL_FEATURES, FEATURES, Frontend, Guest, MEMORY_BYTES, request};
use common::{Backend, Control};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

fn class(answer: &Value) -> &str {
    answer["error"]["class"].as_str().unwrap_or("none")
}

#[test]
fn a_client_negotiates_before_anything_else() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = Control::connect(&directory.path().join("0.ctl"));
    let greeting = control.greeting();
    assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
    assert!(
        greeting["QMP"]["version"]["package"]
            .as_str()
            .unwrap()
            .starts_with("aerostat ")
    );
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));

    control.send(b"{\"execute\":\"aerostat-query\",\"id\":1}\n");
    let refused = control.answer();
    assert_eq!(
        (class(&refused), &refused["id"]),
        ("CommandNotFound", &json!(1))
    );
    control.send(b"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}\n");
    assert_eq!(class(&control.answer()), "GenericError");
    control.send(b"{\"execute\":\"qmp_capabilities\"}\r\n");
    assert_eq!(control.answer(), json!({ "return": {} }));
    let again = control.execute("qmp_capabilities", json!({})).unwrap_err();
    assert_eq!(again["class"], "CommandNotFound");
    drop(backend);
}

#[test]
fn commands_say_what_is_wrong_with_them() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let mut error = |name: &str, arguments: Value| {
        let error = control.execute(name, arguments).unwrap_err();
        assert!(!error["desc"].as_str().unwrap().is_empty());
        error["class"].as_str().unwrap().to_owned()
    };
    assert_eq!(error("no-such-command", json!({})), "CommandNotFound");
    assert_eq!(error("aerostat-set-target", json!({})), "GenericError");
    assert_eq!(
        error("aerostat-set-target", json!({ "bytes": -1 })),
        "GenericError"
    );
    assert_eq!(
        error("aerostat-set-target", json!({ "bytes": "1" })),
        "GenericError"
    );
    assert_eq!(
        error("aerostat-set-target", json!({ "bytes": u64::MAX })),
        "GenericError"
    );
    assert_eq!(
        error("aerostat-set-target", json!({ "bytes": 1, "x": 1 })),
        "GenericError"
    );
    assert_eq!(error("balloon", json!({ "value": 0 })), "GenericError");
    assert_eq!(error("balloon", json!({ "value": 1 })), "DeviceNotActive");
    assert_eq!(error("query-balloon", json!({})), "DeviceNotActive");
    assert_eq!(error("aerostat-guest-stats", json!({})), "DeviceNotActive");
    assert_eq!(error("aerostat-uninhibit", json!({})), "GenericError");
    for name in ["start", "take", "finish"] {
        let name = format!("aerostat-hints-{name}");
        assert_eq!(error(&name, json!({})), "DeviceNotActive");
        assert_eq!(error(&name, json!({ "x": 1 })), "GenericError");
    }
    assert_eq!(
        error("aerostat-history", json!({ "since": -1 })),
        "GenericError"
    );
    assert_eq!(
        error("aerostat-reset-balloon", json!({})),
        "DeviceNotActive"
    );
    assert_eq!(
        error("qom-get", json!({ "path": "x", "property": "y" })),
        "GenericError"
    );
    assert_eq!(
        error(
            "qom-set",
            json!({ "path": "x", "property": "y", "value": 1 })
        ),
        "GenericError"
    );

    let commands = control.execute("query-commands", json!({})).unwrap();
    let names: Vec<_> = commands
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].clone())
        .collect();
    for name in [
        "balloon",
        "query-balloon",
        "qom-get",
        "qom-set",
        "aerostat-query",
        "aerostat-set-target",
        "aerostat-guest-stats",
        "aerostat-hints-finish",
        "aerostat-hints-start",
        "aerostat-hints-take",
        "aerostat-history",
        "aerostat-inhibit",
        "aerostat-reset-balloon",
        "aerostat-uninhibit",
        "query-status",
    ] {
        assert!(names.contains(&json!(name)), "{name}");
    }
}

#[test]
fn both_views_of_the_balloon_agree() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let guest = Guest::new();
    let mut frontend = Frontend::run(&backend.socket(0), &guest);
    assert_eq!(
        control.execute("query-status", json!({})).unwrap()["status"],
        "running"
    );

    let left = MEMORY_BYTES - (8 << 20);
    control
        .execute("balloon", json!({ "value": left }))
        .unwrap();
    assert_eq!(control.query()["target-bytes"], 8 << 20);
    assert_eq!(frontend.get_config(0, 4), 2048_u32.to_le_bytes());
    assert_eq!(
        control.execute("query-balloon", json!({})).unwrap()["actual"],
        MEMORY_BYTES
    );
    assert!(frontend.set_config(4, &2048_u32.to_le_bytes()));
    assert_eq!(
        control.execute("query-balloon", json!({})).unwrap()["actual"],
        left
    );
    // More than there is means all of it, as in QEMU.
    control
        .execute("balloon", json!({ "value": u64::MAX }))
        .unwrap();
    assert_eq!(control.query()["target-bytes"], 0);
    // Targets are rounded down to pages, and cannot be more than the guest has.
    let set = control
        .execute("aerostat-set-target", json!({ "bytes": 10_000 }))
        .unwrap();
    assert_eq!(set["target-bytes"], 8192);
    let bytes = MEMORY_BYTES + 4096;
    assert!(
        control
            .execute("aerostat-set-target", json!({ "bytes": bytes }))
            .is_err()
    );
}

#[test]
fn inhibited_pages_are_acknowledged_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    // Before there is a guest, and it holds for those that come.
    control.execute("aerostat-inhibit", json!({})).unwrap();
    let mut guest = Guest::new();
    let _frontend = Frontend::run(&backend.socket(0), &guest);
    control.execute("aerostat-inhibit", json!({})).unwrap();
    guest.inflate(0x200..0x210);
    assert_eq!(control.counter("skipped-inhibited-bytes"), 16 * 4096);
    control.execute("aerostat-uninhibit", json!({})).unwrap();
    assert_eq!(control.query()["inhibits"], 1);
    control.execute("aerostat-uninhibit", json!({})).unwrap();
    guest.inflate(0x210..0x220);
    assert_eq!(control.counter("skipped-inhibited-bytes"), 16 * 4096);
}

/// V3: the operator gives the guest everything back; a driver that does not know of it is left alone.
#[test]
fn a_balloon_is_reset_on_command_if_the_driver_can_take_it() {
    let directory = tempfile::tempdir().unwrap();
    let features = ["--features", "default,page-refusal,host-reset"];
    let backend = Backend::start_with(directory.path(), 1, &features);
    let mut control = backend.control(0);
    let stock = Frontend::run(&backend.socket(0), &Guest::new());
    let error = control
        .execute("aerostat-reset-balloon", json!({}))
        .unwrap_err();
    assert_eq!(error["class"], "GenericError");
    assert!(error["desc"].as_str().unwrap().contains("HOST_RESET"));
    drop(stock);
    control.wait_for_state("disconnected");

    let mut guest = Guest::new();
    let mut frontend = Frontend::connect(&backend.socket(0));
    frontend.negotiate();
    let selected = FEATURES | F_PROTOCOL_FEATURES | 1 << 51;
    assert!(frontend.tell(request::SET_FEATURES, &selected.to_ne_bytes()));
    frontend.start(&guest);
    control.wait_for_state("active");
    let names = control.query()["feature-names"].clone();
    assert!(names.as_array().unwrap().contains(&json!("host-reset")));
    guest.inflate(0x200..0x240);
    assert_eq!(control.query()["ballooned-bytes"], 64 * 4096);

    control
        .execute("aerostat-reset-balloon", json!({}))
        .unwrap();

    assert_eq!(control.query()["ballooned-bytes"], 0);
    assert_eq!(frontend.get_config(16, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    guest.inflate(0x200..0x210);
    assert_eq!(control.counter("skipped-late-bytes"), 16 * 4096);
    assert_eq!(control.counter("host-resets-acknowledged"), 0);
    assert!(frontend.set_config(20, &1_u32.to_le_bytes()));
    assert_eq!(control.counter("host-resets-acknowledged"), 1);
    assert_eq!(control.counter("host-reset-bytes"), 64 * 4096);
    guest.inflate(0x200..0x210);
    assert_eq!(control.query()["ballooned-bytes"], 16 * 4096);
}

#[test]
fn changes_are_told_once_a_second_and_the_last_one_always() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let mut not_negotiated = Control::connect(&directory.path().join("0.ctl"));
    not_negotiated.greeting();
    let guest = Guest::new();
    let mut frontend = Frontend::run(&backend.socket(0), &guest);
    let start = Instant::now();
    for pages in 1..=200_u32 {
        assert!(frontend.set_config(4, &pages.to_le_bytes()));
    }
    let burst = start.elapsed();
    let last = MEMORY_BYTES - 200 * 4096;
    let mut count = 0;
    loop {
        let event = control.event();
        assert_eq!(event["event"], "BALLOON_CHANGE");
        assert!(event["timestamp"]["seconds"].is_u64());
        count += 1;
        if event["data"]["actual"] == last {
            break;
        }
    }
    let most = 2 + (start.elapsed().max(burst)).as_secs();
    assert!(count <= most, "{count} events in {:?}", start.elapsed());
    not_negotiated.send(b"{\"execute\":\"qmp_capabilities\"}\n");
    assert_eq!(
        not_negotiated.line(),
        Some(json!({ "return": {} })),
        "no event before"
    );
}

/// A9: what happened is told afterwards, over the sessions.
#[test]
fn history_goes_on_over_sessions() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let history = |control: &mut Control, since: u64| -> Vec<Value> {
        let arguments = json!({ "since": since });
        let answer = control.execute("aerostat-history", arguments).unwrap();
        answer["entries"].as_array().unwrap().clone()
    };
    assert!(history(&mut control, 0).is_empty());
    let guest = Guest::new();
    let mut frontend = Frontend::run(&backend.socket(0), &guest);
    let target = json!({ "bytes": 1 << 20 });
    control.execute("aerostat-set-target", target).unwrap();
    assert!(frontend.set_config(4, &256_u32.to_le_bytes()));
    let entries = history(&mut control, 0);
    let events: Vec<_> = entries
        .iter()
        .map(|entry| entry["event"].as_str().unwrap())
        .collect();
    assert_eq!(events, ["target-set", "actual-written"]);
    assert_eq!(entries[1]["target-bytes"], 1 << 20);
    assert_eq!(entries[1]["actual-bytes"], 1 << 20);
    assert_eq!(entries[1]["ballooned-bytes"], 0);
    assert!(entries[1]["monotonic-ns"].as_u64() >= entries[0]["monotonic-ns"].as_u64());
    drop(frontend);
    let deadline = Instant::now() + Duration::from_secs(10);
    while control.query()["state"] != "disconnected" {
        assert!(Instant::now() < deadline);
    }
    let last = entries[1]["sequence"].as_u64().unwrap();
    let later = history(&mut control, last);
    assert_eq!(later.len(), 1);
    assert_eq!(later[0]["event"], "reset");
    assert!(later[0]["sequence"].as_u64().unwrap() > last);
}

#[test]
fn polling_asks_the_guest_at_its_interval() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let mut guest = Guest::new();
    let _frontend = Frontend::run(&backend.socket(0), &guest);
    guest.write(0x18_0000, &[0; 10]);
    guest.offer(2, 0x18_0000, 10, 0);
    let polling = json!({ "path": "/x", "property": "guest-stats-polling-interval", "value": 1 });
    control.execute("qom-set", polling).unwrap();
    for _ in 0..2 {
        guest.wait_used(2);
        guest.offer(2, 0x18_0000, 10, 0);
    }
    let shown = json!({ "path": "/x", "property": "guest-stats-polling-interval" });
    assert_eq!(control.execute("qom-get", shown).unwrap(), 1);
}

#[test]
fn garbage_and_long_lines_are_answered_and_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let mut backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    for garbage in [
        &b"hello"[..],
        b"{",
        b"[1,2]",
        b"\xff\xfe\x00",
        b"{\"execute\":{}}",
        b"\"\\ud800\"",
        b"{\"execute\":\"balloon\",\"arguments\":{\"value\":1e400}}",
    ] {
        control.send(garbage);
        control.send(b"\n");
        assert_eq!(class(&control.answer()), "GenericError", "{garbage:?}");
    }
    control.send("[".repeat(60_000).as_bytes());
    control.send(b"\n\n  \r\n");
    assert_eq!(class(&control.answer()), "GenericError");
    for _ in 0..64 {
        control.send(&[b'x'; 16 << 10]);
    }
    control.send(b"\n");
    assert_eq!(class(&control.answer()), "GenericError");

    // Half a line is no command until the rest comes, and others are served meanwhile.
    control.send(b"{\"execute\":\"aerostat-");
    assert_eq!(backend.control(0).query()["state"], "disconnected");
    control.send(b"query\",\"id\":9}\n");
    assert_eq!(control.answer()["id"], 9);
    // Several in one piece.
    control.send(b"{\"execute\":\"query-status\"}\n{\"execute\":\"query-version\"}\n");
    assert_eq!(control.answer()["return"]["running"], false);
    assert!(control.answer()["return"]["qemu"].is_object());
    // A client that dies in the middle of a line.
    let mut dying = backend.control(0);
    dying.send(b"{\"exec");
    drop(dying);
    backend.assert_alive();
}

#[test]
fn clients_that_hang_or_flood_hurt_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let path = directory.path().join("0.ctl");
    let guest = Guest::new();
    let mut frontend = Frontend::run(&backend.socket(0), &guest);
    // Never reads its greeting; never reads its answers; asks and waits.
    let _silent = UnixStream::connect(&path).unwrap();
    let flood = UnixStream::connect(&path).unwrap();
    flood.set_nonblocking(true).unwrap();
    let command = b"{\"execute\":\"aerostat-query\"}\n".repeat(1000);
    let deadline = Instant::now() + Duration::from_millis(500);
    while Instant::now() < deadline {
        let _ = std::io::Write::write(&mut &flood, &command);
    }
    let mut waiting = backend.control(0);
    waiting.send(b"{\"execute\":\"aerostat-guest-stats\",\"arguments\":{\"timeout-ms\":5000}}\n");

    let start = Instant::now();
    let mut control = backend.control(0);
    control
        .execute("aerostat-set-target", json!({ "bytes": 4096 }))
        .unwrap();
    assert_eq!(frontend.get_config(0, 4), 1_u32.to_le_bytes());
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "held up by others"
    );
}

#[test]
fn clients_beyond_the_limit_are_told_so() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let path = directory.path().join("0.ctl");
    let clients: Vec<_> = (0..32).map(|_| backend.control(0)).collect();
    let mut late = BufReader::new(UnixStream::connect(&path).unwrap());
    let mut line = String::new();
    late.read_line(&mut line).unwrap();
    assert!(line.contains("32 clients"), "{line}");
    drop(clients);
    let greeted = (0..100).any(|_| {
        thread::sleep(Duration::from_millis(50));
        let mut again = Control::connect(&path);
        again.line().is_some_and(|line| line.get("QMP").is_some())
    });
    assert!(greeted, "a place that became free is not given away");
    drop(backend);
}

/// Requirement J9: whatever there is to see or to call is described.
#[test]
fn every_command_and_every_name_is_documented() {
    let text = include_str!("../../docs/control-socket.md");
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(directory.path(), 1);
    let mut control = backend.control(0);
    let commands = control.execute("query-commands", json!({})).unwrap();
    let query = control.query();
    let property = json!({ "path": "x", "property": "guest-stats" });
    let _frontend = Frontend::run(&backend.socket(0), &Guest::new());
    let stats = control.execute("qom-get", property).unwrap();
    let names = |value: &Value| -> Vec<String> {
        let names = value.as_object().unwrap().keys();
        // The counters of reporting are described as the others with a prefix.
        let stem = |name: &String| match name.strip_prefix("report-") {
            Some(stem) if stem.ends_with("-bytes") => stem.to_owned(),
            _ => name.clone(),
        };
        names.map(stem).collect()
    };
    let commands = commands.as_array().unwrap().iter();
    let mut all: Vec<_> = commands
        .map(|c| c["name"].as_str().unwrap().to_owned())
        .collect();
    all.extend(names(&query));
    all.extend(names(&query["counters"]));
    all.extend(names(&stats["stats"]));
    assert!(all.len() > 50);
    for name in all {
        let described = [
            format!("`{name}`"),
            format!("### {name}"),
            format!(", {name}\n"),
        ];
        assert!(
            described.iter().any(|form| text.contains(form)),
            "{name} is not described"
        );
    }
}
