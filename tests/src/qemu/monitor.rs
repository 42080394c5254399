//! QMP, QEMU's monitor: commands, answers and events, each a line of JSON.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::guest::GuestError;

/// How long QEMU may take for a command: it answers from its main loop.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to the monitor of one machine.
#[derive(Debug)]
pub struct Monitor {
    lines: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Monitor {
    /// Connects, as soon as QEMU has made its socket.
    ///
    /// # Errors
    /// There is no monitor within a minute.
    pub fn connect(socket: &Path) -> Result<Self, GuestError> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline => {
                    return Err(GuestError::io("connecting to", socket)(error));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        stream
            .set_read_timeout(Some(PATIENCE))
            .map_err(GuestError::io("setting up", socket))?;
        let mut monitor = Self {
            lines: BufReader::new(stream),
            events: VecDeque::new(),
        };
        monitor.line()?; // the greeting
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Runs a command and returns what it returned.
    ///
    /// # Errors
    /// QEMU refuses it or is gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, GuestError> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.lines
            .get_mut()
            .write_all(line.as_bytes())
            .map_err(GuestError::io("writing to", "QMP"))?;
        loop {
            let mut answer = self.line()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if answer.get("event").is_some() {
                self.events.push_back(answer);
                continue;
            }
            return Err(GuestError::Answer {
                command: line.trim_end().to_owned(),
                output: answer.to_string(),
            });
        }
    }

    /// Reads a property of an object.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn property(&mut self, path: &str, name: &str) -> Result<Value, GuestError> {
        self.execute("qom-get", json!({"path": path, "property": name}))
    }

    /// The next event of this name, which may have come already; earlier ones of others are dropped.
    ///
    /// # Errors
    /// None comes within a minute.
    pub fn event(&mut self, name: &str) -> Result<Value, GuestError> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.line()?,
            };
            if event.get("event").is_some_and(|found| found == name) {
                return Ok(event);
            }
        }
    }

    /// The events that came since they were last asked for.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn events(&mut self) -> Result<Vec<Value>, GuestError> {
        // Whatever came before the answer to a command is read with it.
        self.execute("query-name", json!({}))?;
        Ok(self.events.drain(..).collect())
    }

    /// Waits until the migration from here has ended.
    ///
    /// # Errors
    /// It failed, or took longer than two minutes.
    pub fn wait_for_migration(&mut self) -> Result<Value, GuestError> {
        let deadline = Instant::now() + 2 * PATIENCE;
        loop {
            let answer = self.execute("query-migrate", json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(answer),
                Some("failed" | "cancelled") => {}
                _ if Instant::now() >= deadline => {}
                _ => {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
            }
            return Err(GuestError::Answer {
                command: "query-migrate".to_owned(),
                output: answer.to_string(),
            });
        }
    }

    fn line(&mut self) -> Result<Value, GuestError> {
        let mut line = String::new();
        let count = self
            .lines
            .read_line(&mut line)
            .map_err(GuestError::io("reading from", "QMP"))?;
        if count == 0 {
            return Err(GuestError::Answer {
                command: "QMP".to_owned(),
                output: "QEMU closed its monitor".to_owned(),
            });
        }
        serde_json::from_str(&line).map_err(|_| GuestError::Answer {
            command: "QMP".to_owned(),
            output: line,
        })
    }
}
