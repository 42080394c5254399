//! Which version a program was built for, and which it runs with.
#![allow(unsafe_code, reason = "exports symbols to C")]

use std::ffi::{CStr, c_char};

/// Major version that this header belongs to.
pub const AEROSTAT_VERSION_MAJOR: u32 = 0;

/// Minor version that this header belongs to.
pub const AEROSTAT_VERSION_MINOR: u32 = 1;

/// Patch version that this header belongs to.
pub const AEROSTAT_VERSION_PATCH: u32 = 0;

const VERSION_STRING: &CStr =
    match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"unknown",
    };

/// The version of the library that the program runs with.
///
/// Returns: major << 16 | minor << 8 | patch, to compare with `AEROSTAT_VERSION`, the version that
/// the program was built for. Libraries of the same SONAME serve programs built for older versions.
///
/// Threads: any.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_version() -> u32 {
    AEROSTAT_VERSION_MAJOR << 16 | AEROSTAT_VERSION_MINOR << 8 | AEROSTAT_VERSION_PATCH
}

/// The version of the library that the program runs with, as text: "0.1.0".
///
/// Returns: never NULL.
///
/// Lifetime: valid as long as the library is loaded.
///
/// Threads: any.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_version_string() -> *const c_char {
    VERSION_STRING.as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_headers_version_is_the_packages() {
        let header =
            format!("{AEROSTAT_VERSION_MAJOR}.{AEROSTAT_VERSION_MINOR}.{AEROSTAT_VERSION_PATCH}");
        assert_eq!(header, VERSION_STRING.to_str().unwrap());
    }
}
