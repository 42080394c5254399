//! The library as C and C++ programs see it: the programs in `ffi/examples` are compiled against
//! `include/aerostat.h` without a warning, linked to the shared object and to the archive, run, and
//! run again under valgrind.
//!
//! The libraries are looked for in `AEROSTAT_LIB_DIR`, else where cargo built them for this test.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// What an archive of Rust code needs besides (`rustc --print native-static-libs`), and hwloc.
const ARCHIVE_NEEDS: [&str; 6] = ["-lhwloc", "-lgcc_s", "-lpthread", "-ldl", "-lm", "-lc"];

/// A language that the examples are written in.
#[derive(Clone, Copy)]
struct Language {
    compiler: &'static str,
    options: [&'static str; 3],
}

const C11: Language = Language {
    compiler: "gcc",
    options: ["-std=c11", "-x", "c"],
};

const CPP17: Language = Language {
    compiler: "g++",
    options: ["-std=c++17", "-x", "c++"],
};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn header() -> String {
    fs::read_to_string(repository().join("include/aerostat.h")).unwrap()
}

/// The directory that holds libaerostat.so and libaerostat.a.
fn library_dir() -> PathBuf {
    let dir = env::var_os("AEROSTAT_LIB_DIR").map_or_else(
        || env::current_exe().unwrap().parent().unwrap().to_owned(),
        PathBuf::from,
    );
    for file in ["libaerostat.so", "libaerostat.a"] {
        assert!(
            dir.join(file).exists(),
            "{file} is not in {}: run `cargo build -p aerostat-ffi` and set AEROSTAT_LIB_DIR",
            dir.display()
        );
    }
    dir
}

/// Whether all tools are there. If not, a test is skipped, and says so; where a full run is
/// promised (CI=true), it fails.
fn tools(needed: &[&str]) -> bool {
    let missing: Vec<_> = needed
        .iter()
        .filter(|tool| Command::new(tool).arg("--version").output().is_err())
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

/// All example programs, and a place for what is made of them.
struct Examples {
    sources: Vec<PathBuf>,
    /// Holds the library under the names that linking and loading look for.
    dir: TempDir,
}

impl Examples {
    fn find() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shared = library_dir().join("libaerostat.so");
        symlink(&shared, dir.path().join("libaerostat.so")).unwrap();
        symlink(&shared, dir.path().join("libaerostat.so.0")).unwrap();
        let mut sources: Vec<PathBuf> = fs::read_dir(repository().join("ffi/examples"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
            .collect();
        sources.sort();
        assert!(sources.len() >= 3, "{sources:?}");
        Self { sources, dir }
    }

    /// Compiles and links a program to `libraries`, with the search path set for the shared object.
    fn compile(&self, language: Language, source: &Path, libraries: &[&str]) -> PathBuf {
        let program = self.dir.path().join(source.file_stem().unwrap());
        let lib_dir = self.dir.path().display();
        let mut command = Command::new(language.compiler);
        command
            .args(language.options)
            .args(WARNINGS)
            .arg("-g")
            .arg("-I")
            .arg(repository().join("include"))
            .arg(source)
            .args(["-x", "none"])
            .arg(format!("-L{lib_dir}"))
            .arg(format!("-Wl,-rpath,{lib_dir}"))
            .args(libraries)
            .arg("-pthread")
            .arg("-o")
            .arg(&program);
        succeed(&mut command);
        program
    }

    /// Compiles each program and passes it to `run`.
    fn each(&self, language: Language, libraries: &[&str], run: impl Fn(&Path)) {
        for source in &self.sources {
            run(&self.compile(language, source, libraries));
        }
    }
}

/// Runs a command that has to succeed.
fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

fn run_alone(program: &Path) {
    succeed(&mut Command::new(program));
}

/// Every macro that initialises a structure, in a file that knows nothing but the header.
const INITIALIZERS: &str = "
#include <aerostat.h>
#include <aerostat.h>
struct aerostat_runtime_config runtime = AEROSTAT_RUNTIME_CONFIG_INIT;
struct aerostat_memory_region region = AEROSTAT_MEMORY_REGION_INIT;
struct aerostat_device_config device = AEROSTAT_DEVICE_CONFIG_INIT;
struct aerostat_queue_config queue = AEROSTAT_QUEUE_CONFIG_INIT;
struct aerostat_queue_position position = AEROSTAT_QUEUE_POSITION_INIT;
struct aerostat_balloon balloon = AEROSTAT_BALLOON_INIT;
struct aerostat_node_balloon node = AEROSTAT_NODE_BALLOON_INIT;
struct aerostat_guest_stats stats = AEROSTAT_GUEST_STATS_INIT;
struct aerostat_flow flow = AEROSTAT_FLOW_INIT;
struct aerostat_counters counters = AEROSTAT_COUNTERS_INIT;
struct aerostat_cgroup_account account = AEROSTAT_CGROUP_ACCOUNT_INIT;
int main(void) { return aerostat_version() != AEROSTAT_VERSION; }
";

#[test]
fn the_header_needs_nothing_else_and_can_be_included_twice() {
    if tools(&["gcc", "g++"]) {
        let examples = Examples::find();
        let source = examples.dir.path().join("initializers.c");
        fs::write(&source, INITIALIZERS).unwrap();
        let options = ["-laerostat", "-Wconversion", "-Wsign-conversion"];
        for language in [C11, CPP17] {
            run_alone(&examples.compile(language, &source, &options));
        }
        let header = header();
        let macros = header
            .lines()
            .filter(|line| line.starts_with("#define") && line.contains("_INIT "));
        assert_eq!(macros.count(), INITIALIZERS.matches("_INIT;").count());
    }
}

#[test]
fn examples_run_as_c11() {
    if tools(&["gcc"]) {
        Examples::find().each(C11, &["-laerostat"], run_alone);
    }
}

#[test]
fn examples_run_as_cpp17() {
    if tools(&["g++"]) {
        Examples::find().each(CPP17, &["-laerostat"], run_alone);
    }
}

#[test]
fn examples_run_linked_to_the_archive() {
    if tools(&["gcc", "nm"]) {
        let archive = library_dir().join("libaerostat.a");
        let mut libraries = vec![archive.to_str().unwrap()];
        libraries.extend(ARCHIVE_NEEDS);
        Examples::find().each(C11, &libraries, |program| {
            run_alone(program);
            let undefined = succeed(Command::new("nm").arg("-D").arg(program)).stdout;
            let undefined = String::from_utf8(undefined).unwrap();
            assert!(!undefined.contains(" U aerostat_"), "{undefined}");
        });
    }
}

/// No access to what is not the library's, and nothing left behind. Valgrind lacks some of the
/// system calls that the library would like to use; it finds that out and does without them.
#[test]
fn examples_are_clean_under_valgrind() {
    if tools(&["gcc", "valgrind"]) {
        Examples::find().each(C11, &["-laerostat"], |program| {
            succeed(
                Command::new("valgrind")
                    .args(["--quiet", "--error-exitcode=99", "--leak-check=full"])
                    // Threads take turns: otherwise one that locks in a loop may starve the others.
                    .arg("--fair-sched=yes")
                    .arg("--track-fds=no")
                    .arg(program),
            );
        });
    }
}

#[test]
fn bad_arguments_covers_every_function_that_can_refuse() {
    let source = fs::read_to_string(repository().join("ffi/examples/bad_arguments.c")).unwrap();
    let header = header();
    for function in declared_functions(&header) {
        let fallible = header.contains(&format!("int {function}("));
        let tried = source.contains(&format!(", {function}("));
        assert!(!fallible || tried, "{function}");
    }
}

#[test]
fn the_shared_object_exports_what_the_header_declares_and_nothing_else() {
    if !tools(&["nm"]) {
        return;
    }
    let shared = library_dir().join("libaerostat.so");
    let symbols = succeed(
        Command::new("nm")
            .args(["-D", "--defined-only", "--format=posix"])
            .arg(shared),
    );
    let exported: BTreeSet<String> = String::from_utf8(symbols.stdout)
        .unwrap()
        .lines()
        // "name[@@VERSION] type value size"; A is the name of a version.
        .filter(|line| line.split(' ').nth(1) != Some("A"))
        .map(|line| line.split([' ', '@']).next().unwrap().to_owned())
        .collect();
    assert_eq!(exported, declared_functions(&header()));
}

#[test]
fn programs_bind_to_the_abi_and_not_to_a_file_name() {
    if !tools(&["readelf"]) {
        return;
    }
    let shared = library_dir().join("libaerostat.so");
    let dynamic = succeed(Command::new("readelf").arg("-d").arg(shared));
    let dynamic = String::from_utf8(dynamic.stdout).unwrap();
    assert!(dynamic.contains("soname: [libaerostat.so.0]"), "{dynamic}");
}

/// The names of the functions that the header declares.
fn declared_functions(header: &str) -> BTreeSet<String> {
    let outside_comments = header
        .lines()
        .filter(|line| !line.trim_start().starts_with(['*', '/', '#']));
    let functions: BTreeSet<String> = outside_comments
        .filter(|line| !line.starts_with("typedef"))
        .filter_map(|line| line.split_once('(')?.0.split([' ', '*']).next_back())
        .filter(|name| name.starts_with("aerostat_"))
        .map(str::to_owned)
        .collect();
    if functions.is_empty() {
        panic!("no function found in the header");
    }
    functions
}
