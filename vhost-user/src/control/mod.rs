//! The control socket of a virtual machine: QEMU's monitor dialect for existing tools, and the
//! device's own commands in ballooned bytes (X1). Described in `docs/control-socket.md`.
//!
//! Each client has a thread of its own, so that one that hangs, floods or waits for a guest's
//! answer is nobody else's concern; there is a limit to their number, to the length of a line, and
//! to how long an answer may stay unread.

mod client;
mod commands;
mod lines;
mod qmp;
mod report;

use crate::listener::Listener;
use crate::vm::Vm;
use crate::wake::{Wake, is_ready, wait};
use rustix::event::{PollFd, PollFlags};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// The most clients of one control socket. Tools use one each; the rest is for mistakes.
const MAX_CLIENTS: usize = 32;

/// What the clients of a control socket share.
#[derive(Debug)]
pub(crate) struct Shared {
    vm: Arc<Vm>,
    shutdown: Arc<Wake>,
}

/// Accepts clients until `shutdown`.
pub(crate) fn serve(listener: &Listener, vm: &Arc<Vm>, shutdown: &Arc<Wake>) {
    let shared = Arc::new(Shared {
        vm: Arc::clone(vm),
        shutdown: Arc::clone(shutdown),
    });
    // Each client's thread holds one reference.
    while wait_for_client(listener, &shared) {
        let stream = match listener.accept() {
            Ok(Some(stream)) => stream,
            Ok(None) => continue,
            Err(error) => {
                log::error!("{}: accepting a control client: {error}", vm.name);
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if Arc::strong_count(&shared) > MAX_CLIENTS {
            turn_away(stream);
            continue;
        }
        let shared = Arc::clone(&shared);
        let thread = thread::Builder::new().name("client".to_owned());
        if let Err(error) = thread.spawn(move || client::serve(&stream, &shared)) {
            log::error!("{}: no thread for a control client: {error}", vm.name);
        }
    }
}

/// Tells a client that there are too many, and leaves it. A fresh socket has room for a line.
fn turn_away(mut stream: UnixStream) {
    let line = format!(
        "{{\"error\":{{\"class\":\"GenericError\",\"desc\":\"{MAX_CLIENTS} clients are connected; \
         close one of them first\"}}}}\r\n"
    );
    let _ = stream.set_nonblocking(true);
    let _ = stream.write_all(line.as_bytes());
}

/// Waits for a connection; false when the process is to end.
fn wait_for_client(listener: &Listener, shared: &Shared) -> bool {
    let mut fds = [
        PollFd::new(&*shared.shutdown, PollFlags::IN),
        PollFd::new(listener, PollFlags::IN),
    ];
    if let Err(error) = wait(&mut fds, None) {
        log::error!("{}: waiting for control clients: {error}", shared.vm.name);
        return false;
    }
    !is_ready(&fds[0])
}
