//! The program: see the library of the same name, which tests use as well.

fn main() -> std::process::ExitCode {
    aerostat_vhost_user::main()
}
