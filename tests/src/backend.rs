//! The vhost-user back-end as a child process: started, asked, killed and started again.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use aerostat_reclaim::vm::{ControlClient, VmError};

/// How long the process may take until its sockets are there.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take to answer a command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// What can go wrong with the back-end process.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The program is not there.
    #[error("there is no vhost-user back-end at {}; build it with: cargo build --workspace", .0.display())]
    Missing(PathBuf),
    /// The program or a file of it cannot be used.
    #[error("{action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// It ended before its sockets were there.
    #[error("the back-end ended with {status} and said:\n{log}")]
    Ended {
        /// How it ended.
        status: ExitStatus,
        /// Its messages.
        log: String,
    },
    /// Its control socket does not answer.
    #[error("the back-end does not answer; it said:\n{log}")]
    Silent {
        /// Its messages.
        log: String,
        /// What the control socket said.
        #[source]
        source: VmError,
    },
}

/// A back-end process with one or more devices.
///
/// It ends when this value is dropped, and no later than the thread that started it.
#[derive(Debug)]
pub struct Backend {
    program: PathBuf,
    directory: tempfile::TempDir,
    devices: usize,
    options: &'static [&'static str],
    process: Child,
}

impl Backend {
    /// Starts the program with this many devices and waits until it answers.
    ///
    /// # Errors
    /// It is not there, ends at once or does not answer.
    pub fn start(program: &Path, devices: usize) -> Result<Self, BackendError> {
        Self::start_with(program, devices, &[])
    }

    /// As [`Self::start`], with further options on the command line.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(
        program: &Path,
        devices: usize,
        options: &'static [&'static str],
    ) -> Result<Self, BackendError> {
        if !program.is_file() {
            return Err(BackendError::Missing(program.to_owned()));
        }
        let directory = tempfile::Builder::new()
            .prefix("aerostat-backend-")
            .tempdir()
            .map_err(failed("making a directory in", &std::env::temp_dir()))?;
        let process = spawn(program, directory.path(), devices, options)?;
        let mut backend = Self {
            program: program.to_owned(),
            directory,
            devices,
            options,
            process,
        };
        backend.wait_until_it_answers()?;
        Ok(backend)
    }

    /// The vhost-user socket of a device.
    #[must_use]
    pub fn socket(&self, device: usize) -> PathBuf {
        socket(self.directory.path(), device)
    }

    /// The control socket of a device.
    #[must_use]
    pub fn control_socket(&self, device: usize) -> PathBuf {
        control_socket(self.directory.path(), device)
    }

    /// Connects to the control socket of a device.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn control(&self, device: usize) -> Result<ControlClient, VmError> {
        ControlClient::connect(&self.control_socket(device), COMMAND_TIMEOUT)
    }

    /// Kills the process as the host's kernel would: without a chance to put anything in order.
    pub fn kill(&mut self) {
        // Failure means that it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Starts the program again on the same sockets, after [`Self::kill`].
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn restart(&mut self) -> Result<(), BackendError> {
        self.kill();
        self.process = spawn(
            &self.program,
            self.directory.path(),
            self.devices,
            self.options,
        )?;
        self.wait_until_it_answers()
    }

    /// Whether the process is still there.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// What the process said so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(log_file(self.directory.path()))
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .unwrap_or_default()
    }

    fn wait_until_it_answers(&mut self) -> Result<(), BackendError> {
        let deadline = Instant::now() + START_TIMEOUT;
        for device in 0..self.devices {
            while let Err(source) = self.control(device) {
                if let Ok(Some(status)) = self.process.try_wait() {
                    return Err(BackendError::Ended {
                        status,
                        log: self.log(),
                    });
                }
                if Instant::now() >= deadline {
                    return Err(BackendError::Silent {
                        log: self.log(),
                        source,
                    });
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.kill();
    }
}

fn socket(directory: &Path, device: usize) -> PathBuf {
    directory.join(format!("vhost-{device}.sock"))
}

fn control_socket(directory: &Path, device: usize) -> PathBuf {
    directory.join(format!("control-{device}.sock"))
}

fn log_file(directory: &Path) -> PathBuf {
    directory.join("backend.log")
}

fn spawn(
    program: &Path,
    directory: &Path,
    devices: usize,
    options: &[&str],
) -> Result<Child, BackendError> {
    let log = log_file(directory);
    let errors = fs::File::options()
        .create(true)
        .append(true)
        .open(&log)
        .map_err(failed("opening", &log))?;
    // `setpriv` asks the kernel to end the back-end when the thread that starts it ends.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program)
        .args(options);
    for device in 0..devices {
        command.arg("--socket-path").arg(socket(directory, device));
        command
            .arg("--control-path")
            .arg(control_socket(directory, device));
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .spawn()
        .map_err(failed("starting", program))
}

fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(std::io::Error) -> BackendError + 'a {
    move |source| BackendError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}
