//! Test support: a VMM and guests in this process, which drive the library as real ones do.

pub mod vmm;
