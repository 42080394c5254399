//! Gives the shared library its SONAME, so that programs bind to an ABI and not to a file name.

/// The ABI's number: it changes when a symbol or structure changes incompatibly.
const ABI: u32 = 0;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libaerostat.so.{ABI}");
}
