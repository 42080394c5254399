//! The client against peers that answer as prepared.

use std::{
    io::{BufRead, BufReader},
    os::unix::net::UnixListener,
    thread::{self, JoinHandle},
};

use std::{
    io::{Read, Write},
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};

use super::*;

const GREETING: &str = r#"{"QMP":{"version":{"aerostat":"0"},"capabilities":[]}}"#;
const SHORT: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(10);

/// A peer that greets and then gives one prepared answer to each line it reads; it returns the
/// lines it read when the client has gone.
fn peer(path: &Path, answers: Vec<&'static str>) -> JoinHandle<Vec<String>> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        writeln!(stream, "{GREETING}").unwrap();
        let mut answers = answers.into_iter();
        let mut lines = Vec::new();
        for line in BufReader::new(stream.try_clone().unwrap()).lines() {
            lines.push(line.unwrap());
            if let Some(answer) = answers.next() {
                stream.write_all(answer.as_bytes()).unwrap();
            }
        }
        lines
    })
}

fn with_peer(
    answers: Vec<&'static str>,
    timeout: Duration,
    talk: impl FnOnce(&mut ControlClient),
) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let mut all = vec!["{\"return\":{}}\n"];
    all.extend(answers);
    let peer = peer(&path, all);
    let mut client = ControlClient::connect(&path, timeout).unwrap();
    talk(&mut client);
    drop(client);
    peer.join().unwrap()
}

#[test]
fn commands_are_sent_after_the_greeting_in_the_dialect() {
    let answers = vec![
        "{\"return\":{}}\n",
        "{\"return\":{}}\n",
        "{\"return\":{\"actual\":1234}}\n",
        "{\"return\":{\"stats\":{\"stat-total-memory\":9},\"last-update\":1}}\n",
    ];

    let lines = with_peer(answers, LONG, |client| {
        client.set_target(4096).unwrap();
        client.balloon_leave_bytes(8192).unwrap();
        assert_eq!(client.query_balloon_left_bytes().unwrap(), 1234);
        let stats = client.guest_stats(Duration::from_millis(250)).unwrap();
        assert_eq!(stats.total_memory_bytes(), Some(9));
    });

    let lines: Vec<Value> = lines
        .iter()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(
        lines,
        [
            json!({"execute": "qmp_capabilities"}),
            json!({"execute": "aerostat-set-target", "arguments": {"bytes": 4096}}),
            json!({"execute": "balloon", "arguments": {"value": 8192}}),
            json!({"execute": "query-balloon"}),
            json!({"execute": "aerostat-guest-stats", "arguments": {"timeout-ms": 250}}),
        ]
    );
}

#[test]
fn events_between_answers_are_kept_in_order() {
    let answers = vec![concat!(
        r#"{"event":"BALLOON_CHANGE","data":{"actual":1},"timestamp":{"seconds":2,"microseconds":3}}"#,
        "\n",
        r#"{"event":"SOMETHING_ELSE","data":{}}"#,
        "\n",
        r#"{"return":{"actual":7}}"#,
        "\n",
        r#"{"event":"BALLOON_CHANGE","data":{"actual":4}}"#,
        "\n",
    )];

    with_peer(answers, LONG, |client| {
        assert_eq!(client.query_balloon_left_bytes().unwrap(), 7);
        let first = client.next_event(LONG).unwrap().unwrap();
        assert_eq!((first.left_bytes, first.unix_micros), (1, 2_000_003));
        assert_eq!(client.next_event(LONG).unwrap().unwrap().left_bytes, 4);
        assert_eq!(client.next_event(SHORT).unwrap(), None);
    });
}

#[test]
fn a_refusal_carries_socket_command_and_reason() {
    let answers = vec![
        "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no guest\"}}\n",
        "{\"return\":{}}\n",
    ];

    with_peer(answers, LONG, |client| {
        let error = client.set_target(1).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, VmError::Refused { .. }));
        assert!(
            text.contains("control") && text.contains("no guest"),
            "{text}"
        );
        // A refusal is an answer: the conversation goes on.
        client.set_target(2).unwrap();
    });
}

#[test]
fn an_answer_that_does_not_come_breaks_the_conversation() {
    with_peer(vec![], SHORT, |client| {
        assert!(matches!(client.query(), Err(VmError::Timeout { .. })));
        assert!(matches!(client.query(), Err(VmError::Broken { .. })));
    });
}

#[test]
fn an_answer_in_pieces_is_put_together() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let peer = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let text = format!("{GREETING}\n{{\"return\":{{}}}}\n{{\"return\":{{\"actual\":5}}}}\n");
        for piece in text.as_bytes().chunks(7) {
            stream.write_all(piece).unwrap();
            thread::sleep(Duration::from_millis(1));
        }
        let _ = stream.read_to_end(&mut Vec::new());
    });

    let mut client = ControlClient::connect(&path, LONG).unwrap();

    assert_eq!(client.query_balloon_left_bytes().unwrap(), 5);
    drop(client);
    peer.join().unwrap();
}

#[test]
fn a_peer_that_talks_nonsense_or_leaves_is_an_error() {
    with_peer(vec!["][\n"], LONG, |client| {
        assert!(matches!(client.query(), Err(VmError::Malformed { .. })));
    });

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let peer = thread::spawn(move || drop(listener.accept().unwrap()));
    let error = ControlClient::connect(&path, LONG).unwrap_err();
    assert!(matches!(error, VmError::Closed { .. }), "{error}");
    peer.join().unwrap();

    let error = ControlClient::connect(&dir.path().join("absent"), LONG).unwrap_err();
    assert!(
        matches!(
            error,
            VmError::Io {
                action: "connect",
                ..
            }
        ),
        "{error}"
    );
}
