//! Hostile input: what a guest, a front-end or a C program may do, as data that a fuzzer makes up.
//!
//! Each target is a function from bytes to nothing that panics when an oracle is violated, so the same
//! code runs under libFuzzer (`make fuzz`) and replays the committed corpora on any toolchain
//! (`tests/corpora.rs`). [`guest`] is the guest's memory with a canary in every byte, [`script`] the
//! typed input, [`device`] a whole device driven by it in the calling thread, [`saved`] what it may be
//! restored from; [`session`] talks
//! vhost-user, [`abi`] calls the C interface; [`memballoon`] and [`vmware`] speak the other protocols.

pub mod abi;
pub mod config;
pub mod device;
pub mod driver;
pub mod guest;
pub mod ledger;
pub mod memballoon;
pub mod oracle;
pub mod saved;
pub mod script;
pub mod session;
pub mod vmware;

use script::Layout;

/// A target: its name and what it does with bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All targets, by the names of their corpora.
pub const TARGETS: [Target; 9] = [
    ("split", |bytes| device::run(bytes, Layout::Split)),
    ("packed", |bytes| device::run(bytes, Layout::Packed)),
    ("elements", |bytes| device::run(bytes, Layout::Elements)),
    ("saved", saved::run),
    ("config", config::run),
    ("session", session::run),
    ("abi", abi::run),
    ("memballoon", memballoon::run),
    ("vmware", vmware::run),
];

/// Runs the target called `name` once. Unknown names do nothing.
pub fn run(name: &str, bytes: &[u8]) {
    if let Some((_, target)) = TARGETS.iter().find(|(known, _)| *known == name) {
        target(bytes);
    }
}

/// The body of a target's program: under the fuzzer its entry, otherwise a program that runs the files
/// named on its command line, to look at a crash without a fuzzer.
#[macro_export]
macro_rules! target {
    ($name:ident) => {
        #[cfg(fuzzing)]
        libfuzzer_sys::fuzz_target!(|bytes: &[u8]| $crate::run(stringify!($name), bytes));

        #[cfg(not(fuzzing))]
        fn main() -> std::io::Result<()> {
            for path in std::env::args_os().skip(1) {
                $crate::run(stringify!($name), &std::fs::read(&path)?);
            }
            Ok(())
        }
    };
}
