//! What the tests of the process share: the process itself, a client of its control socket, and a
//! front-end with a guest ([`frontend`]).
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program is built with this module and uses a part of it"
)]

pub mod frontend;

use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take that takes no time unless the machine is busy.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Asks `question` until it has an answer.
pub fn eventually<T>(what: &str, mut question: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A running `aerostat-vhost-user` with some virtual machines.
#[derive(Debug)]
pub struct Backend {
    process: Child,
    directory: PathBuf,
}

impl Backend {
    /// Starts it for `count` virtual machines with sockets in `directory`.
    pub fn start(directory: &Path, count: usize) -> Self {
        Self::start_with(directory, count, &[])
    }

    /// The same with more arguments.
    pub fn start_with(directory: &Path, count: usize, arguments: &[&str]) -> Self {
        Self::start_and(directory, count, |command| {
            command.args(arguments);
        })
    }

    /// The same for one virtual machine, with a file for the log that an operator sees.
    pub fn start_logging(directory: &Path, log: File) -> Self {
        Self::start_and(directory, 1, |command| {
            command.env("AEROSTAT_LOG", "info").stderr(log);
        })
    }

    fn start_and(directory: &Path, count: usize, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aerostat-vhost-user"));
        command
            .args(["--workers", "1"])
            .env("AEROSTAT_LOG", "error")
            .stdin(Stdio::null());
        change(&mut command);
        for vm in 0..count {
            command
                .arg("--socket-path")
                .arg(directory.join(format!("{vm}.sock")))
                .arg("--control-path")
                .arg(directory.join(format!("{vm}.ctl")));
        }
        let backend = Self {
            process: command.spawn().unwrap(),
            directory: directory.to_owned(),
        };
        for vm in 0..count {
            drop(backend.control(vm));
        }
        backend
    }

    /// The socket for front-ends of a virtual machine.
    pub fn socket(&self, vm: usize) -> PathBuf {
        self.directory.join(format!("{vm}.sock"))
    }

    /// A negotiated client of a virtual machine's control socket.
    pub fn control(&self, vm: usize) -> Control {
        let mut control = Control::connect(&self.directory.join(format!("{vm}.ctl")));
        control.greeting();
        control.execute("qmp_capabilities", json!({})).unwrap();
        control
    }

    /// Panics if the process is gone.
    pub fn assert_alive(&mut self) {
        assert_eq!(self.process.try_wait().unwrap(), None, "the process died");
    }

    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Ends it without a chance to tidy up.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Asks it to end.
    pub fn terminate(mut self) -> ExitStatus {
        let pid = i32::try_from(self.process.id()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        eventually("the process ends", || self.process.try_wait().unwrap())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A client of a control socket.
#[derive(Debug)]
pub struct Control {
    stream: BufReader<UnixStream>,
    /// Events that came while something else was waited for.
    pub events: Vec<Value>,
}

impl Control {
    /// Connects, as soon as somebody listens.
    pub fn connect(path: &Path) -> Self {
        let stream = eventually("the control socket listens", || {
            UnixStream::connect(path).ok()
        });
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        }
    }

    /// Reads the greeting.
    pub fn greeting(&mut self) -> Value {
        self.line().unwrap()
    }

    /// The next line; `None` at the end.
    pub fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        let count = self.stream.read_line(&mut line).unwrap();
        (count > 0).then(|| serde_json::from_str(&line).unwrap())
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    /// The next line that is no event.
    pub fn answer(&mut self) -> Value {
        loop {
            let line = self.line().expect("an answer, not the end");
            if line.get("event").is_none() {
                return line;
            }
            self.events.push(line);
        }
    }

    /// Runs a command: its return value, or its error.
    pub fn execute(&mut self, name: &str, arguments: Value) -> Result<Value, Value> {
        let command = json!({ "execute": name, "arguments": arguments, "id": name });
        self.send(format!("{command}\n").as_bytes());
        let mut answer = self.answer();
        assert_eq!(answer["id"], name);
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(answer["error"].take()),
        }
    }

    /// `aerostat-query`.
    pub fn query(&mut self) -> Value {
        self.execute("aerostat-query", json!({})).unwrap()
    }

    /// A counter in total.
    pub fn counter(&mut self, name: &str) -> u64 {
        self.query()["counters"][name].as_u64().unwrap()
    }

    /// Waits for a state.
    pub fn wait_for_state(&mut self, state: &str) {
        eventually(state, || (self.query()["state"] == state).then_some(()));
    }

    /// Waits for an event, among those that came already first.
    pub fn event(&mut self) -> Value {
        if !self.events.is_empty() {
            return self.events.remove(0);
        }
        let line = self.line().expect("an event, not the end");
        assert!(line.get("event").is_some(), "{line}");
        line
    }
}
