//! `aerostatd` as a process, with its configuration and log in a directory of its own.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::artifacts;

/// A running daemon. It is killed when this value is dropped.
#[derive(Debug)]
pub struct Reclaimer {
    directory: tempfile::TempDir,
    process: Child,
}

impl Reclaimer {
    /// Starts it with this configuration; `host` are further lines of `[host]`. Returns when it answers.
    ///
    /// # Errors
    /// It does not start, or does not answer within a minute; the error holds its log.
    pub fn start(host: &str, rest: &str) -> io::Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("control");
        let text = format!(
            "[host]\nmetrics = \"off\"\ncontrol-socket = \"{}\"\n{host}\n{rest}",
            socket.display()
        );
        fs::write(directory.path().join("aerostatd.toml"), text)?;
        let process = Self::spawn(&directory)?;
        let daemon = Self { directory, process };
        daemon.until("answers", |daemon| daemon.ask(&["status"]).is_ok())?;
        Ok(daemon)
    }

    /// Kills it without warning (SIGKILL) and starts it again.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn kill_and_restart(&mut self) -> io::Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        self.process = Self::spawn(&self.directory)?;
        self.until("answers again", |daemon| daemon.ask(&["status"]).is_ok())
    }

    fn spawn(directory: &tempfile::TempDir) -> io::Result<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(directory.path().join("log"))?;
        Command::new(artifacts::aerostatd())
            .args(["run", "--config"])
            .arg(directory.path().join("aerostatd.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
    }

    /// Runs `aerostatd` with these words against the daemon and returns what it says.
    ///
    /// # Errors
    /// It failed; the error holds what it said.
    pub fn ask(&self, words: &[&str]) -> io::Result<String> {
        let output = Command::new(artifacts::aerostatd())
            .args(words)
            .arg("--socket")
            .arg(self.socket())
            .output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(io::Error::other(text(&output.stderr)))
        }
    }

    /// The value of one attribute of a VM, as a number; 0 if there is none.
    #[must_use]
    pub fn number(&self, vm: &str, attribute: &str) -> u64 {
        let text = self.ask(&["get", vm, attribute]).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// The status as JSON.
    #[must_use]
    pub fn status(&self) -> serde_json::Value {
        let text = self.ask(&["status", "--json"]).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// What it logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// Waits until `done`, up to two minutes.
    ///
    /// # Errors
    /// It did not come to pass; the error holds the status and the log.
    pub fn until(&self, what: &str, done: impl Fn(&Self) -> bool) -> io::Result<()> {
        let start = Instant::now();
        while !done(self) {
            if start.elapsed() > Duration::from_secs(120) {
                let status = self
                    .ask(&["status"])
                    .unwrap_or_else(|error| error.to_string());
                let text = format!("not seen: {what}\n{status}\nlog:\n{}", self.log());
                return Err(io::Error::other(text));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Reclaimer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
