//! The experiment of May 2013 (A10) on a small scale, with real guests; `make experiment`.

use std::process::ExitCode;

use aerostat_tests::experiment::{inside, outside, plan::Plan};
use clap::{Parser, Subcommand};

/// Real guests that do not fit on their host, under one rule after the other
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    options: outside::Options,
}

#[derive(Subcommand)]
enum Action {
    /// Runs a round on this host: meant for the host VM, as it fills memory and empties swap
    #[command(hide = true)]
    Inside {
        #[command(flatten)]
        plan: Plan,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let ran = match &arguments.action {
        Some(Action::Inside { plan }) => inside::run(plan),
        None => outside::run(&arguments.options),
    };
    let Err(error) = ran else {
        return ExitCode::SUCCESS;
    };
    eprintln!("aerostat-experiment: {error}");
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        eprintln!("  because: {cause}");
        source = cause.source();
    }
    ExitCode::FAILURE
}
