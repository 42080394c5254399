//! Commands and their answers over the guest's serial line; `tests/guest/init` is the other end.

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::{ChildStderr, ChildStdin, ChildStdout},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use super::GuestError;

/// What is kept of the kernel's messages: enough for a boot log and an oops.
const LOG_LIMIT_BYTES: usize = 256 << 10;

/// What an error message shows of them.
const TAIL_LINES: usize = 40;

/// The kernel's messages so far.
#[derive(Clone, Debug, Default)]
pub struct ConsoleLog(Arc<Mutex<Vec<u8>>>);

impl ConsoleLog {
    /// Everything that was kept.
    #[must_use]
    pub fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The last lines.
    #[must_use]
    pub fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    fn append(&self, more: &[u8]) {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.extend(more);
        let surplus = bytes.len().saturating_sub(LOG_LIMIT_BYTES);
        bytes.drain(..surplus);
    }
}

/// The host's end of the guest's serial line.
#[derive(Debug)]
pub(crate) struct Console {
    input: ChildStdin,
    lines: Receiver<String>,
    log: ConsoleLog,
    last_id: u64,
}

impl Console {
    /// Takes over the guest's three streams.
    pub(crate) fn new(input: ChildStdin, output: ChildStdout, errors: ChildStderr) -> Self {
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                if sender
                    .send(String::from_utf8_lossy(&line).into_owned())
                    .is_err()
                {
                    break;
                }
            }
        });
        let log = ConsoleLog::default();
        let copy = log.clone();
        thread::spawn(move || {
            let mut errors = errors;
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = errors.read(&mut chunk) {
                copy.append(&chunk[..count]);
            }
        });
        Self {
            input,
            lines,
            log,
            last_id: 0,
        }
    }

    pub(crate) fn log(&self) -> &ConsoleLog {
        &self.log
    }

    /// Waits until the guest accepts commands.
    pub(crate) fn wait_until_ready(&mut self, patience: Duration) -> Result<(), GuestError> {
        let deadline = Instant::now() + patience;
        loop {
            match self.next_line(deadline)? {
                Some(line) if line == "\u{1}READY" => return Ok(()),
                // Whatever init says before that belongs into an error message.
                Some(line) => self.log.append(format!("{line}\n").as_bytes()),
                None => {
                    return Err(GuestError::Boot {
                        waited: patience,
                        console: self.log.tail(),
                    });
                }
            }
        }
    }

    /// Runs one shell command and returns what it wrote, without the end of the last line.
    pub(crate) fn run(&mut self, command: &str, patience: Duration) -> Result<String, GuestError> {
        self.run_watched(command, patience, |_| ())
    }

    /// As [`Self::run`]; `each_line` gets the lines of output as they come.
    pub(crate) fn run_watched(
        &mut self,
        command: &str,
        patience: Duration,
        mut each_line: impl FnMut(&str),
    ) -> Result<String, GuestError> {
        let deadline = Instant::now() + patience;
        let timed_out = |log: &ConsoleLog| GuestError::Timeout {
            command: command.to_owned(),
            waited: patience,
            console: log.tail(),
        };
        let id = self.send(command)?;
        let begin = format!("\u{1}BEGIN {id}");
        let end = format!("\u{1}END {id} ");
        // A command that ran into its time-out may still be talking: skip to this one's beginning.
        loop {
            match self.next_line(deadline)? {
                Some(line) if line == begin => break,
                Some(_) => {}
                None => return Err(timed_out(&self.log)),
            }
        }
        let mut output: Vec<String> = Vec::new();
        let status = loop {
            let line = self
                .next_line(deadline)?
                .ok_or_else(|| timed_out(&self.log))?;
            if let Some(status) = line.strip_prefix(&end) {
                break status.trim().parse().unwrap_or(-1);
            }
            each_line(&line);
            output.push(line);
        };
        let output = output.join("\n").trim_end_matches('\n').to_owned();
        if status == 0 {
            return Ok(output);
        }
        Err(GuestError::Command {
            command: command.to_owned(),
            status,
            output,
        })
    }

    /// Sends a command without waiting for its end; returns its number.
    pub(crate) fn send(&mut self, command: &str) -> Result<u64, GuestError> {
        self.last_id += 1;
        let line = format!("{} {}\n", self.last_id, command.replace('\n', "; "));
        self.input
            .write_all(line.as_bytes())
            .and_then(|()| self.input.flush())
            .map_err(|_| GuestError::Ended {
                console: self.log.tail(),
            })?;
        Ok(self.last_id)
    }

    /// Waits until every process that holds the line has ended; false if they did not in time.
    pub(crate) fn wait_for_end(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            match self.next_line(deadline) {
                Ok(Some(_)) => {}
                Ok(None) => return false,
                Err(_) => return true,
            }
        }
    }

    fn next_line(&mut self, deadline: Instant) -> Result<Option<String>, GuestError> {
        match self
            .lines
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(GuestError::Ended {
                console: self.log.tail(),
            }),
        }
    }
}
