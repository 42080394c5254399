//! Fuzz target: see `aerostat_fuzz::run`.
#![cfg_attr(fuzzing, no_main)]

aerostat_fuzz::target!(vmware);
