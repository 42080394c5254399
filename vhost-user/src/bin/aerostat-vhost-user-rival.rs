//! The program `aerostat-vhost-user-rival`: what `make bench` measures the back-end against.

fn main() -> std::process::ExitCode {
    aerostat_vhost_user::main_of_rival()
}
