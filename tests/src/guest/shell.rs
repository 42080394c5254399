//! A guest's shell, however the guest is run.

use std::time::Duration;

use super::{
    GuestError,
    console::{Console, ConsoleLog},
};

/// How long an ordinary command may take. Guests are slow where they start processes.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// Commands in a guest, and their answers.
#[derive(Debug)]
pub struct Shell {
    pub(crate) console: Console,
}

impl Shell {
    pub(crate) fn new(console: Console) -> Self {
        Self { console }
    }

    /// Runs a shell command in the guest and returns what it wrote.
    ///
    /// # Errors
    /// It failed, or took longer than a minute, or the guest ended.
    pub fn run(&mut self, command: &str) -> Result<String, GuestError> {
        self.run_within(command, COMMAND_TIMEOUT)
    }

    /// As [`Self::run`], with another time-out.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_within(&mut self, command: &str, patience: Duration) -> Result<String, GuestError> {
        self.console.run(command, patience)
    }

    /// What the guest's kernel said so far.
    #[must_use]
    pub fn console_log(&self) -> &ConsoleLog {
        self.console.log()
    }
}
