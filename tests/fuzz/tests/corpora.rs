//! Replays the committed corpora: what fuzzers found worth keeping, and every input that once showed a
//! bug. No fuzzer is needed, so this runs wherever the other tests do.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Targets count what the process has open: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A panic anywhere fails the test, also one that a worker or the C boundary catches.
fn count_panics() -> &'static std::sync::atomic::AtomicUsize {
    static PANICS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        hook(panic);
    }));
    &PANICS
}

#[test]
fn corpora_replay_without_a_violation() {
    let _alone = alone();
    let panics = count_panics();
    for (name, target) in aerostat_fuzz::TARGETS {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(name);
        let mut files: Vec<_> = std::fs::read_dir(&directory)
            .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        assert!(!files.is_empty(), "{} is empty", directory.display());
        for file in files {
            let bytes = std::fs::read(&file).unwrap();
            target(&bytes);
            let seen = panics.load(std::sync::atomic::Ordering::SeqCst);
            assert_eq!(seen, 0, "{} panicked", file.display());
        }
    }
}

/// A plain random walk besides, so that a change is met by something that is in no corpus.
#[test]
fn random_inputs_do_no_harm() {
    let _alone = alone();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for (name, target) in aerostat_fuzz::TARGETS {
        let rounds = if matches!(name, "session" | "abi") {
            20
        } else {
            150
        };
        for round in 0..rounds {
            let length = 64 << (round % 5);
            let bytes: Vec<u8> = std::iter::repeat_with(|| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[3]
            })
            .take(length)
            .collect();
            target(&bytes);
        }
    }
}
