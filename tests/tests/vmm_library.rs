//! The shared object is the one that the header describes.

use aerostat_tests::vmm::library;
use aerostat_tests::vmm::{Result, Vmm};
use std::collections::BTreeSet;
use std::ffi::CStr;

/// The harness knows every function of the header, no more and no less: a new one is added to its
/// table, where the compiler checks the signature.
#[test]
fn the_harness_knows_every_function_of_the_header() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../include/aerostat.h");
    let header = std::fs::read_to_string(path).expect("include/aerostat.h");
    // Prototypes begin at the margin with their result; comments and members do not.
    let prototype = |line: &str| {
        let result = ["int ", "void ", "uint32_t ", "const char *"];
        let name = result.iter().find_map(|result| line.strip_prefix(result))?;
        let name = name.split_once('(')?.0;
        name.starts_with("aerostat_").then(|| name.to_owned())
    };
    let declared: BTreeSet<String> = header.lines().filter_map(prototype).collect();
    let known: BTreeSet<String> = library::NAMES
        .iter()
        .map(|name| (*name).to_owned())
        .collect();
    assert_eq!(declared, known);
}

#[test]
#[expect(unsafe_code, reason = "calls the version functions directly")]
fn its_version_is_that_of_the_header() -> Result<()> {
    let symbols = library::symbols()?;
    // SAFETY: both functions take nothing, and the string lives as long as the library.
    let (number, text) = unsafe {
        let text = CStr::from_ptr((symbols.aerostat_version_string)());
        ((symbols.aerostat_version)(), text.to_string_lossy())
    };
    let parts = [number >> 16, number >> 8 & 0xff, number & 0xff];
    assert_eq!(parts.map(|part| part.to_string()).join("."), text);
    assert_eq!(text, env!("CARGO_PKG_VERSION"));
    Ok(())
}

#[test]
fn a_runtime_has_the_workers_that_were_asked_for() -> Result<()> {
    assert!(Vmm::new()?.runtime().workers()? >= 1);
    assert_eq!(Vmm::with_workers(3)?.runtime().workers()? % 3, 0);
    Ok(())
}
