//! `make install` and the Debian package: what is installed, and that a program needs no more than
//! pkg-config to be built with it.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use aerostat_tests::artifacts;

fn repository() -> PathBuf {
    fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).unwrap()
}

/// Runs a command to its end; returns what it wrote to its output.
fn succeed(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// A script of the repository, for the build that this test belongs to.
fn script(name: &str) -> Command {
    let built = artifacts::directory();
    let mut command = Command::new(repository().join("scripts").join(name));
    command
        .env("PROFILE", built.file_name().unwrap())
        .env("CARGO_TARGET_DIR", built.parent().unwrap())
        .env_remove("PREFIX")
        .env_remove("LIBDIR")
        .env_remove("DESTDIR");
    command
}

/// Whether all tools are there. If not, a test is skipped, and says so; in CI it fails.
fn tools(needed: &[&str]) -> bool {
    let missing: Vec<_> = needed
        .iter()
        .filter(|tool| {
            let path = env::var_os("PATH").unwrap_or_default();
            !env::split_paths(&path)
                .chain(["/usr/sbin".into(), "/sbin".into()])
                .any(|directory| directory.join(tool).is_file())
        })
        .collect();
    if missing.is_empty() {
        return true;
    }
    assert!(
        env::var("CI").as_deref() != Ok("true"),
        "not installed: {missing:?}"
    );
    // The print macros are captured in a test that passes; this has to be seen.
    let _ = writeln!(std::io::stderr(), "SKIPPED: not installed: {missing:?}");
    false
}

#[test]
fn a_program_builds_with_what_pkg_config_says_of_an_installation() {
    if !tools(&["gcc", "pkg-config", "readelf"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let prefix = directory.path().join("opt/aerostat");
    succeed(script("install").env("PREFIX", &prefix));

    for file in [
        "bin/aerostat-vhost-user",
        "bin/aerostatd",
        "lib/systemd/system/aerostatd.service",
        "share/man/man8/aerostatd.8",
        "lib/libaerostat.a",
        "lib/libaerostat.so",
        "lib/libaerostat.so.0",
        "include/aerostat.h",
        "lib/pkgconfig/aerostat.pc",
        "share/man/man1/aerostat-vhost-user.1",
        "share/man/man3/aerostat.3",
        "share/bash-completion/completions/aerostat-vhost-user",
        "share/zsh/site-functions/_aerostat-vhost-user",
        "share/fish/vendor_completions.d/aerostat-vhost-user.fish",
    ] {
        assert!(prefix.join(file).exists(), "{file} is missing");
    }
    let library = prefix.join("lib/libaerostat.so");
    let elf = succeed(Command::new("readelf").args(["-dV", "-W"]).arg(&library));
    assert!(elf.contains("soname: [libaerostat.so.0]"), "{elf}");
    assert!(elf.contains("AEROSTAT_0.1"), "{elf}");

    for linkage in [
        &["--cflags", "--libs"][..],
        &["--cflags", "--libs", "--static"],
    ] {
        let options = succeed(
            Command::new("pkg-config")
                .args(linkage)
                .arg("aerostat")
                .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig")),
        );
        let program = directory.path().join("element");
        let mut compiler = Command::new("gcc");
        compiler
            .arg(repository().join("ffi/examples/element.c"))
            .arg("-o")
            .arg(&program)
            .args(options.split_whitespace());
        succeed(&mut compiler);
        let said = succeed(Command::new(&program).env("LD_LIBRARY_PATH", prefix.join("lib")));
        assert!(said.contains("bytes given"), "{said}");
    }
}

#[test]
fn the_debian_package_serves_a_fresh_system() {
    if !tools(&["dpkg-deb", "debootstrap", "unshare", "chroot"]) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        assert!(env::var("CI").as_deref() != Ok("true"), "root is needed");
        let _ = writeln!(std::io::stderr(), "SKIPPED: a fresh system needs root");
        return;
    }
    let package = succeed(&mut script("build-deb"));
    let root = succeed(&mut script("rootfs"));
    // In mounts of its own: a layer over the fresh system, which is gone with the last process.
    let inside = "
        dpkg -i /tmp/aerostat.deb >/dev/null
        cd /tmp
        gcc element.c -o element $(pkg-config --cflags --libs aerostat)
        ./element
        aerostat-vhost-user --version
        ! ldd ./element | grep 'not found'
        dpkg -r aerostat >/dev/null
        ! ls /usr/lib/*/libaerostat* /usr/include/aerostat.h 2>/dev/null
    ";
    let outside = r#"
        set -e
        layer=$(mktemp -d)
        mount -t tmpfs layer "$layer"
        mkdir "$layer/upper" "$layer/work" "$layer/root"
        mount -t overlay -o "lowerdir=$1,upperdir=$layer/upper,workdir=$layer/work" root "$layer/root"
        mount -t proc proc "$layer/root/proc"
        mount --bind /sys "$layer/root/sys"
        mount --bind /dev "$layer/root/dev"
        cp "$2" "$layer/root/tmp/aerostat.deb"
        cp "$3"/element.c "$3"/check.h "$3"/guest.h "$layer/root/tmp/"
        status=0
        chroot "$layer/root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -ec "$4" || status=$?
        umount -R "$layer"
        rmdir "$layer"
        exit $status
    "#;
    let said = succeed(
        Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                outside,
                "sh",
            ])
            .arg(root.trim())
            .arg(repository().join(package.trim()))
            .arg(repository().join("ffi/examples"))
            .arg(inside),
    );
    assert!(said.contains("bytes given"), "{said}");
    assert!(said.contains("aerostat-vhost-user 0."), "{said}");
}
