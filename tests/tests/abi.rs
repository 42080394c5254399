//! The ABI that programs were built for: symbols of the shared object, sizes and offsets of structures,
//! values of enumerations and constants. `ffi/libaerostat.map` and `ffi/abi.txt` hold what it is; a
//! difference fails here, and is either a mistake or goes into the changelog, with `make abi`.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use std::{
    collections::BTreeSet,
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(name: &str) -> String {
    fs::read_to_string(repository().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Compares with the file, or writes it where that is asked for (`make abi`).
fn check(name: &str, found: &str) {
    if env::var_os("AEROSTAT_WRITE_ABI").is_some() {
        fs::write(repository().join(name), found).unwrap();
        return;
    }
    let known = read(name);
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let gone: Vec<_> = lines(&known).difference(&lines(found)).cloned().collect();
    let new: Vec<_> = lines(found).difference(&lines(&known)).cloned().collect();
    assert!(
        known == found,
        "the ABI is not that of {name}. What is gone breaks programs: {gone:#?}; new: {new:#?}. If it is \
         meant so, run `make abi` and tell of it in the changelog"
    );
}

/// Functions that the header declares: names before a parenthesis at the start of a declaration.
fn functions(header: &str) -> BTreeSet<String> {
    let code = without_comments(header);
    code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '(')
        .filter_map(|word| word.split_once('(').map(|(name, _)| name))
        .filter(|name| name.starts_with("aerostat_"))
        .map(str::to_owned)
        .collect()
}

fn without_comments(text: &str) -> String {
    let mut code = String::new();
    for (index, part) in text.split("/*").enumerate() {
        code += match index {
            0 => part,
            _ => part.split_once("*/").map_or("", |(_, after)| after),
        };
    }
    code
}

/// The fields of each structure that the header defines.
fn structures(header: &str) -> Vec<(String, Vec<String>)> {
    let code = without_comments(header);
    let mut found = Vec::new();
    for part in code.split("\nstruct ").skip(1) {
        let Some((name, rest)) = part.split_once(" {") else {
            continue;
        };
        if name.contains([';', '(', '\n']) {
            continue;
        }
        let body = rest.split("\n};").next().unwrap();
        let fields = body.split(';').filter_map(|field| {
            let field = field.trim().split('[').next()?;
            let name = field.rsplit([' ', '*']).next()?;
            (!name.is_empty()).then(|| name.to_owned())
        });
        found.push((name.to_owned(), fields.collect()));
    }
    found
}

/// Constants: macros that are a plain value, and members of enumerations.
fn constants(header: &str) -> BTreeSet<String> {
    let code = without_comments(header);
    let defined = code.lines().filter_map(|line| {
        let mut words = line.strip_prefix("#define ")?.split_whitespace();
        let name = words.next()?;
        let value = words.next()?;
        let plain = !name.contains('(') && !name.ends_with("_INIT") && value != "\\";
        plain.then(|| name.to_owned())
    });
    let members = code.lines().filter_map(|line| {
        let (name, _) = line.strip_prefix("    AEROSTAT_")?.split_once(" = ")?;
        Some(format!("AEROSTAT_{name}"))
    });
    defined.chain(members).collect()
}

/// A C program that prints what the compiler makes of the header.
fn program(header: &str) -> String {
    let mut code = "#include <aerostat.h>\n#include <stdio.h>\nint main(void) {\n".to_owned();
    for (name, fields) in structures(header) {
        let _ = writeln!(
            code,
            "printf(\"struct {name}: %zu bytes\\n\", sizeof(struct {name}));"
        );
        for field in fields {
            let _ = writeln!(
                code,
                "printf(\"struct {name}.{field}: at %zu, %zu bytes\\n\", offsetof(struct {name}, \
                 {field}), sizeof(((struct {name} *)0)->{field}));"
            );
        }
    }
    // A version's number is no part of the ABI.
    for name in constants(header)
        .iter()
        .filter(|name| !name.starts_with("AEROSTAT_VERSION"))
    {
        let _ = writeln!(code, "printf(\"{name} = %lld\\n\", (long long)({name}));");
    }
    code + "return 0;\n}\n"
}

#[test]
fn every_function_of_the_header_has_a_symbol_version() {
    let header = read("include/aerostat.h");
    let map = read("ffi/libaerostat.map");
    let listed: BTreeSet<String> = map
        .lines()
        .filter_map(|line| line.trim().strip_suffix(';'))
        .filter(|name| name.starts_with("aerostat_"))
        .map(str::to_owned)
        .collect();
    let declared = functions(&header);
    if env::var_os("AEROSTAT_WRITE_ABI").is_some() {
        let new: String = declared
            .difference(&listed)
            .map(|name| format!("        {name};\n"))
            .collect();
        let changed = map.replacen("    local:", &format!("{new}    local:"), 1);
        fs::write(repository().join("ffi/libaerostat.map"), changed).unwrap();
        return;
    }
    let gone: Vec<_> = listed.difference(&declared).collect();
    let unlisted: Vec<_> = declared.difference(&listed).collect();
    assert!(
        gone.is_empty() && unlisted.is_empty(),
        "ffi/libaerostat.map: gone, which breaks programs: {gone:?}; new: {unlisted:?} (`make abi`)"
    );
}

#[test]
fn sizes_offsets_and_values_are_those_that_programs_were_built_for() {
    if !cfg!(all(target_arch = "x86_64", target_pointer_width = "64")) {
        println!("ffi/abi.txt holds the layout of x86-64; this is another machine");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("abi.c");
    let binary = directory.path().join("abi");
    fs::write(&source, program(&read("include/aerostat.h"))).unwrap();
    let compiled = Command::new("gcc")
        .args(["-std=c11", "-I"])
        .arg(repository().join("include"))
        .arg(&source)
        .arg("-o")
        .arg(&binary)
        .output()
        .unwrap();
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let printed = Command::new(&binary).output().unwrap();
    let found = String::from_utf8(printed.stdout).unwrap();
    assert!(found.lines().count() > 150, "{found}");
    check("ffi/abi.txt", &found);
}
