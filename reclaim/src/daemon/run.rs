//! `aerostatd run`: the engine with its sockets, signals and pressure triggers.

use std::{
    io::{self, Read},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use crossbeam_channel::{Sender, bounded};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    low_level::pipe,
};

use super::{
    control::{ControlServer, ListenError},
    metrics,
};
use crate::{
    cgroup::PressureTrigger,
    config::{Config, ConfigError},
    engine::{Engine, Input, World},
    host::{HostError, HostFiles},
};

/// Inputs that may wait for the engine.
const QUEUE_LIMIT: usize = 64;
/// Pressure is told to the engine at most this often.
const PRESSURE_PAUSE: Duration = Duration::from_millis(200);

/// The daemon could not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its control socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The host's files.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Something else.
    #[error("{action} failed: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Runs until SIGTERM or SIGINT. SIGHUP reads the configuration again.
///
/// # Errors
/// The configuration, the host or the sockets are not as they must be.
pub fn run(path: &Path, dry_run: bool) -> Result<(), RunError> {
    let config = Config::read(path)?;
    let (sender, inputs) = bounded(QUEUE_LIMIT);
    let mut engine = Engine::new(config.clone(), World::default(), dry_run)?;
    let _control = ControlServer::start(
        &config.host.control_socket,
        config.control_mode(),
        engine.status(),
        sender.clone(),
    )?;
    if let Some(address) = config.metrics_address() {
        match metrics::serve(address, engine.status()) {
            Ok(bound) => tracing::info!("metrics at http://{bound}/metrics"),
            // Memory is more important than its metrics.
            Err(error) => tracing::warn!("no metrics at {address}: {error}; set host.metrics"),
        }
    }
    on_signals(path.to_owned(), sender.clone()).map_err(|source| RunError::Io {
        action: "setting up signals",
        source,
    })?;
    watch_pressure(&config, sender);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        policy = config.policy.name,
        dry_run,
        control = %config.host.control_socket.display(),
        "running"
    );
    engine.run(&inputs);
    tracing::info!("stopped; balloons and limits stay as they are");
    Ok(())
}

/// One byte a signal, on a pipe; a thread turns them into inputs.
fn on_signals(path: PathBuf, engine: Sender<Input>) -> io::Result<()> {
    let pipe_for = |signals: &[i32]| -> io::Result<UnixStream> {
        let (read, write) = UnixStream::pair()?;
        for signal in signals {
            pipe::register(*signal, write.try_clone()?)?;
        }
        Ok(read)
    };
    let mut stop = pipe_for(&[SIGTERM, SIGINT])?;
    let mut reload = pipe_for(&[SIGHUP])?;
    let to_stop = engine.clone();
    thread::Builder::new().name("stop".into()).spawn(move || {
        if stop.read(&mut [0]).is_ok() {
            let _ = to_stop.send(Input::Stop);
        }
    })?;
    thread::Builder::new()
        .name("reload".into())
        .spawn(move || {
            while reload.read(&mut [0]).is_ok_and(|count| count > 0) {
                match Config::read(&path) {
                    Ok(config) => {
                        if engine.send(Input::Reload(Box::new(config))).is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        tracing::error!("{error}; the configuration in force stays");
                    }
                }
            }
        })?;
    Ok(())
}

/// Tells the engine of pressure as it arises. A host without PSI is sampled only.
fn watch_pressure(config: &Config, engine: Sender<Input>) {
    let stall = Duration::from_millis(*config.host.pressure_stall_ms.get_ref());
    let window = Duration::from_millis(*config.host.pressure_window_ms.get_ref());
    let path = HostFiles::new(Path::new("/")).pressure_path();
    let trigger = match PressureTrigger::on_file(&path, stall, window) {
        Ok(trigger) => trigger,
        Err(error) => {
            tracing::warn!("no pressure trigger, decisions are made once a period: {error}");
            return;
        }
    };
    let spawned = thread::Builder::new()
        .name("pressure".into())
        .spawn(move || {
            loop {
                match trigger.wait(Duration::from_secs(3600)) {
                    Ok(true) => {
                        if engine.send(Input::Pressure).is_err() {
                            return;
                        }
                        thread::sleep(PRESSURE_PAUSE);
                    }
                    Ok(false) => {}
                    Err(error) => {
                        tracing::warn!("the pressure trigger has ended: {error}");
                        return;
                    }
                }
            }
        });
    if let Err(error) = spawned {
        tracing::warn!("no thread for the pressure trigger: {error}");
    }
}
