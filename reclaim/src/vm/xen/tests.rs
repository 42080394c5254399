//! The keys against a store that speaks the wire protocol. (Debian's xenstored crashes without Xen on the
//! first write.)

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use super::{store::kind, *};
use crate::policy::NodeId;

const LONG: Duration = Duration::from_secs(20);
const GIB: u64 = 1 << 30;

type Keys = Arc<Mutex<BTreeMap<String, String>>>;

/// A xenstored for a domain 7 of 4 GiB with these keys besides.
fn store(more: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf, Keys) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut keys = BTreeMap::from([("memory/static-max".to_owned(), (4 << 20).to_string())]);
    keys.extend(
        more.iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned())),
    );
    let keys = Keys::new(Mutex::new(keys));
    let served = keys.clone();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let keys = served.clone();
            thread::spawn(move || {
                let mut header = [0; 16];
                while stream.read_exact(&mut header).is_ok() {
                    let word =
                        |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
                    let mut payload = vec![0; word(12) as usize];
                    stream.read_exact(&mut payload).unwrap();
                    let (answered, body) = answer(word(0), &payload, &keys);
                    // An event that nobody asked for comes first.
                    for (kind, request, body) in [
                        (kind::WATCH_EVENT, 0, b"x\0t\0".to_vec()),
                        (answered, word(4), body),
                    ] {
                        let length = u32::try_from(body.len()).unwrap();
                        let mut message: Vec<u8> = [kind, request, 0, length]
                            .iter()
                            .flat_map(|word| word.to_ne_bytes())
                            .collect();
                        message.extend(body);
                        if stream.write_all(&message).is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    (dir, path, keys)
}

fn answer(asked: u32, payload: &[u8], keys: &Keys) -> (u32, Vec<u8>) {
    let mut keys = keys.lock().unwrap();
    let text = String::from_utf8(payload.to_vec()).unwrap();
    let (key, value) = text.split_once('\0').unwrap();
    let absent = (kind::ERROR, b"ENOENT\0".to_vec());
    let Some(key) = key.strip_prefix("/local/domain/7/") else {
        return absent;
    };
    match asked {
        kind::READ => keys
            .get(key)
            .map_or(absent, |value| (asked, value.clone().into_bytes())),
        kind::WRITE => {
            keys.insert(key.to_owned(), value.to_owned());
            (asked, b"OK\0".to_vec())
        }
        kind::REMOVE => keys
            .remove(key)
            .map_or(absent, |_| (asked, b"OK\0".to_vec())),
        kind::DIRECTORY => {
            let below = format!("{key}/");
            let mut names: Vec<&str> = keys
                .keys()
                .filter_map(|name| name.strip_prefix(&below)?.split('/').next())
                .collect();
            names.dedup();
            (
                asked,
                names
                    .iter()
                    .flat_map(|name| [name.as_bytes(), b"\0"].concat())
                    .collect(),
            )
        }
        _ => (kind::ERROR, b"EINVAL\0".to_vec()),
    }
}

fn value(keys: &Keys, key: &str) -> Option<String> {
    keys.lock().unwrap().get(key).cloned()
}

#[test]
fn x2_x5_a_guest_with_the_feature_gets_a_target_for_each_vnode_and_the_old_key_goes() {
    let (_dir, path, keys) = store(&[
        ("control/feature-balloon-vnode", "1"),
        ("memory/vnode0/target-balloon-size", "0"),
        ("memory/vnode1/target-balloon-size", "0"),
        ("memory/target", "4194304"),
    ]);
    let mut vm = XenDomain::connect(&path, LONG, 7).unwrap();
    assert!(vm.observe().unwrap().capabilities.per_node_targets);

    vm.set_target_bytes(GIB + 1024).unwrap();

    assert_eq!(
        value(&keys, "memory/vnode0/target-balloon-size").unwrap(),
        "524289"
    );
    assert_eq!(
        value(&keys, "memory/vnode1/target-balloon-size").unwrap(),
        "524288"
    );
    assert_eq!(value(&keys, "memory/target"), None);
    assert_eq!(vm.observe().unwrap().target_bytes, Some(GIB + 1024));

    let target = |node, target_bytes| NodeTarget {
        node: NodeId(node),
        target_bytes,
    };
    vm.set_node_targets(&[target(0, 0), target(1, GIB)])
        .unwrap();
    assert_eq!(
        value(&keys, "memory/vnode0/target-balloon-size").unwrap(),
        "0"
    );
    assert_eq!(
        value(&keys, "memory/vnode1/target-balloon-size").unwrap(),
        "1048576"
    );
}

#[test]
fn x8_a_guest_that_writes_its_balloon_sizes_is_believed_else_its_target_is() {
    let (_dir, path, keys) = store(&[
        ("control/feature-balloon-vnode", "1"),
        ("memory/vnode0/target-balloon-size", "1048576"),
    ]);
    let mut vm = XenDomain::connect(&path, LONG, 7).unwrap();
    assert_eq!(vm.observe().unwrap().ballooned_bytes, GIB);

    keys.lock()
        .unwrap()
        .insert("memory/vnode0/balloon-size".into(), "524288".into());

    let seen = vm.observe().unwrap();
    assert_eq!(
        (seen.target_bytes, seen.ballooned_bytes),
        (Some(GIB), GIB / 2)
    );
}

#[test]
fn x9_a_guest_without_the_feature_is_told_what_is_left_to_it() {
    let (_dir, path, keys) = store(&[("memory/target", "3145728")]);
    let mut vm = XenDomain::connect(&path, LONG, 7).unwrap();
    let seen = vm.observe().unwrap();
    assert_eq!((seen.memory_bytes, seen.target_bytes), (4 * GIB, Some(GIB)));
    assert!(!seen.capabilities.per_node_targets);

    vm.set_target_bytes(2 * GIB).unwrap();

    assert_eq!(value(&keys, "memory/target").unwrap(), "2097152");
    assert_eq!(value(&keys, "memory/vnode0/target-balloon-size"), None);
}

#[test]
fn a_domain_that_is_not_there_or_has_no_size_is_an_error() {
    let (_dir, path, keys) = store(&[]);
    let error = XenDomain::connect(&path, LONG, 8).unwrap_err().to_string();
    assert!(
        error.contains("/local/domain/8/memory/static-max") && error.contains("no such domain"),
        "{error}"
    );
    keys.lock()
        .unwrap()
        .insert("memory/static-max".into(), "much".into());
    let error = XenDomain::connect(&path, LONG, 7).unwrap_err().to_string();
    assert!(error.contains("no number"), "{error}");
}

#[test]
fn a_guest_that_writes_nonsense_is_taken_at_its_target() {
    let (_dir, path, keys) = store(&[
        ("control/feature-balloon-vnode", "1"),
        ("memory/vnode0/target-balloon-size", "1048576"),
        ("memory/vnodeX/balloon-size", "1"),
    ]);
    let mut vm = XenDomain::connect(&path, LONG, 7).unwrap();
    for nonsense in ["", "much", "-1", "18446744073709551615"] {
        keys.lock()
            .unwrap()
            .insert("memory/vnode0/balloon-size".into(), nonsense.into());
        assert_eq!(vm.observe().unwrap().ballooned_bytes, GIB, "{nonsense:?}");
    }
}
