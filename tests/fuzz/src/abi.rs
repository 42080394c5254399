//! Stub.
/// Stub.
pub fn run(_bytes: &[u8]) {}
