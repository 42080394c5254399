//! `aerostat-demo`: a guest gives memory back to its host and gets it again, before your eyes.

use std::{error::Error, process::ExitCode};

use aerostat_tests::demo::{self, options::Options};
use clap::Parser;

fn main() -> ExitCode {
    match demo::run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("aerostat-demo: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::from(2)
        }
    }
}
