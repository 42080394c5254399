//! `aerostat-vhost-user`: the balloon device for virtual machine monitors that speak vhost-user.
//!
//! One process serves many virtual machines, each on a socket of its own: `listener` accepts,
//! `session` does what the front-end's messages (`message`, `channel`) say with its memory
//! (`mapping`) and rings (`ring`), `vm` is what stays between sessions, and `control` is how
//! operators and tools get at it. They share one runtime of worker threads; beyond it, each virtual
//! machine has two threads that sleep unless somebody talks to them.

mod books;
mod channel;
mod cli;
mod control;
mod features;
mod listener;
mod mapping;
mod message;
mod quota;
mod ring;
mod session;
mod sigbus;
mod vm;
mod wake;

use crate::channel::ChannelError;
use crate::cli::Arguments;
use crate::listener::Listener;
use crate::session::SessionError;
use crate::vm::Vm;
use crate::wake::{Wake, is_ready, wait};
use aerostat_device::{Runtime, RuntimeConfig};
use clap::{CommandFactory, Parser};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::error::Error;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The program `aerostat-vhost-user`.
#[must_use]
pub fn main() -> ExitCode {
    start(Runtime::new)
}

/// A rival for benchmarks: the same program with a system call a page.
#[cfg(feature = "bench")]
#[doc(hidden)]
#[must_use]
pub fn main_of_rival() -> ExitCode {
    start(Runtime::one_call_a_page)
}

/// How long threads may take to end. One of them may be held up for ever: by a file of the front-end's whose
/// file system, in user space, does not answer.
const END_PATIENCE: Duration = Duration::from_secs(10);

type MakeRuntime = fn(&RuntimeConfig) -> aerostat_device::Result<Arc<Runtime>>;

fn start(runtime: MakeRuntime) -> ExitCode {
    let arguments = Arguments::parse();
    let filter = env_logger::Env::new().filter_or("AEROSTAT_LOG", "info");
    env_logger::Builder::from_env(filter)
        .format_target(false)
        .init();
    if arguments.print_capabilities {
        print_capabilities();
        return ExitCode::SUCCESS;
    }
    let result = arguments
        .check()
        .map_err(Into::into)
        .and_then(|()| run(&arguments, runtime));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// The command line, for its manual page and for completion.
#[must_use]
pub fn command() -> clap::Command {
    Arguments::command()
}

/// One session over `front_end` with a virtual machine of its own, until the other end is closed.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub fn serve_one(runtime: &Arc<Runtime>, front_end: UnixStream) {
    use crate::vm::Offer;
    use aerostat_device::{DeviceKind, WriteBehind};
    use std::sync::OnceLock;
    static SHUTDOWN: OnceLock<Option<Wake>> = OnceLock::new();
    let shutdown = SHUTDOWN.get_or_init(|| {
        let installed = sigbus::install(session::MAX_MAPPINGS);
        installed.and_then(|()| Wake::new()).ok()
    });
    if let Some(shutdown) = shutdown {
        let vm = Vm::new(
            String::from("fuzz"),
            Arc::clone(runtime),
            Offer {
                features: DeviceKind::VirtioBalloon.supported_features(),
                write_behind: WriteBehind::RECOMMENDED,
                ..Offer::default()
            },
            None,
        );
        // Whatever a front-end says ends its session at worst.
        let _ = session::serve(&vm, front_end, shutdown.as_fd());
    }
}

/// "Backend program conventions" of the vhost-user specification.
fn print_capabilities() {
    let features: Vec<_> = features::supported().collect();
    println!(
        "{}",
        serde_json::json!({ "type": "balloon", "features": features })
    );
}

fn run(arguments: &Arguments, runtime: MakeRuntime) -> Result<(), Box<dyn Error>> {
    raise_descriptor_limit();
    // Before there are threads: the socket files' mode goes through the umask.
    let bind = |path: &std::path::PathBuf| Listener::bind(path, arguments.socket_mode);
    let sockets: Vec<_> = arguments
        .socket_path
        .iter()
        .map(bind)
        .collect::<Result<_, _>>()?;
    let controls: Vec<_> = arguments
        .control_path
        .iter()
        .map(bind)
        .collect::<Result<_, _>>()?;
    let mut signals = termination_signals()?;
    // Each virtual machine has room of its own: none can use up another's.
    sigbus::install(arguments.socket_path.len() * session::MAX_MAPPINGS)?;
    let shutdown = Arc::new(Wake::new()?);
    let runtime = runtime(&RuntimeConfig {
        workers_per_node: arguments.workers,
    })?;

    let (mut controls, mut records) = (controls.into_iter(), arguments.record.iter().cloned());
    let mut threads = Vec::new();
    for socket in sockets {
        let name = socket.path().display().to_string();
        let vm = Vm::new(
            name,
            Arc::clone(&runtime),
            arguments.offer(),
            records.next(),
        );
        if let Some(control) = controls.next() {
            let name = control.path().display().to_string();
            let (vm, shutdown) = (Arc::clone(&vm), Arc::clone(&shutdown));
            let body = move || control::serve(&control, &vm, &shutdown);
            threads.push((name, spawn("control", body)?));
        }
        let (name, shutdown) = (vm.name.clone(), Arc::clone(&shutdown));
        let body = move || serve_vm(&socket, &vm, &shutdown);
        threads.push((name, spawn("session", body)?));
    }
    log::info!("listening on {} sockets", arguments.socket_path.len());

    // Returns when a signal came; an error would mean that none can come any more.
    let _ = signals.read(&mut [0]);
    log::info!("shutting down");
    shutdown.raise();
    let deadline = Instant::now() + END_PATIENCE;
    for (socket, thread) in threads {
        end(&socket, thread, deadline);
    }
    Ok(())
}

/// Waits for the thread that serves `socket`. One that has not ended by `deadline` is left to the end of the
/// process, which does not wait for it. Returns whether it ended.
fn end(socket: &str, thread: thread::JoinHandle<()>, deadline: Instant) -> bool {
    while !thread.is_finished() {
        if Instant::now() >= deadline {
            log::error!("{socket}: its thread does not end; leaving without it");
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    if thread.join().is_err() {
        log::error!("{socket}: its thread panicked");
    }
    true
}

fn spawn(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> std::io::Result<thread::JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(body)
}

/// A socket that becomes readable on SIGTERM and SIGINT.
fn termination_signals() -> std::io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
    }
    Ok(read)
}

/// Each region of a guest's memory and each ring holds descriptors; 1024 are soon used up.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::warn!(
            "the limit of file descriptors stays at {:?}: {error}",
            limit.current
        );
    }
}

/// Accepts one front-end after the other until `shutdown`.
fn serve_vm(listener: &Listener, vm: &Vm, shutdown: &Wake) {
    loop {
        let mut fds = [
            PollFd::new(shutdown, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        if let Err(error) = wait(&mut fds, None) {
            log::error!("{}: waiting for a front-end: {error}", vm.name);
            return;
        }
        if is_ready(&fds[0]) {
            return;
        }
        match listener.accept() {
            Ok(None) => {}
            Ok(Some(stream)) => serve_session(vm, stream, shutdown),
            Err(error) => {
                // Out of descriptors or memory: that passes, and must not become a busy loop.
                let level = vm.front_end_log.level(log::Level::Error);
                log::log!(level, "{}: accepting a front-end: {error}", vm.name);
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// One session from its beginning to its end. Even a defect of ours ends no more than the session.
fn serve_session(vm: &Vm, stream: UnixStream, shutdown: &Wake) {
    let level = |level| vm.front_end_log.level(level);
    log::log!(
        level(log::Level::Info),
        "{}: a front-end connected",
        vm.name
    );
    let result = catch_unwind(AssertUnwindSafe(|| {
        session::serve(vm, stream, shutdown.as_fd())
    }));
    match result {
        Ok(
            Ok(()) | Err(SessionError::Channel(ChannelError::Closed | ChannelError::ShuttingDown)),
        ) => {
            log::log!(
                level(log::Level::Info),
                "{}: the front-end is gone",
                vm.name
            );
        }
        Ok(Err(error)) => log::log!(
            level(log::Level::Warn),
            "{}: session ended: {}",
            vm.name,
            chain(&error)
        ),
        Err(_) => log::error!("{}: session ended by a defect of this program", vm.name),
    }
}

/// An error and its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_thread_that_does_not_end_is_left_behind() {
        let (release, held) = channel::<()>();
        let held = spawn("held", move || held.recv().unwrap_or_default()).unwrap();
        let deadline = Instant::now() + Duration::from_millis(50);
        assert!(!end("held", held, deadline));
        drop(release);
        let free = spawn("free", || ()).unwrap();
        let deadline = Instant::now() + END_PATIENCE;
        assert!(end("free", free, deadline));
    }
}
