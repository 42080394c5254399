//! `include/aerostat.h` is what the crate says, and says everything (requirement J9).
//!
//! `make header` runs this test with `AEROSTAT_WRITE_HEADER=1`, which writes the file instead of
//! comparing it.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails with the test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The longest line that a header may have.
const LINE_CHARS: usize = 104;

fn crate_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn committed() -> PathBuf {
    crate_dir().join("../include/aerostat.h")
}

fn generated() -> String {
    let text = |name| fs::read_to_string(crate_dir().join("header").join(name)).unwrap();
    let mut config = cbindgen::Config::from_file(crate_dir().join("cbindgen.toml")).unwrap();
    config.header = Some(text("preamble.h"));
    let mut header = Vec::new();
    cbindgen::Builder::new()
        .with_crate(crate_dir())
        .with_config(config)
        .generate()
        .unwrap()
        .write(&mut header);
    let header = one_line_comments(&String::from_utf8(header).unwrap());
    // What cbindgen cannot express stands between the structures and the functions.
    let functions = "#ifdef __cplusplus\nextern";
    assert_eq!(header.matches(functions).count(), 1);
    header.replace(functions, &format!("{}\n{functions}", text("macros.h")))
}

/// Puts comments that have one line of text on one line, so that structures stay readable.
fn one_line_comments(header: &str) -> String {
    let mut short = String::new();
    let mut lines = header.lines().peekable();
    while let Some(line) = lines.next() {
        let rest: Vec<&str> = lines.clone().take(2).collect();
        let text = rest.first().map_or("", |line| line.trim_start());
        if line.trim() == "/**" && rest.get(1).is_some_and(|line| line.trim() == "*/") {
            let indent = line.trim_end_matches("/**");
            short.push_str(&format!(
                "{indent}/** {} */\n",
                text.trim_start_matches("* ")
            ));
            lines.nth(1);
        } else {
            short.push_str(line);
            short.push('\n');
        }
    }
    short
}

/// A thing that the header declares, and the comment above it.
#[derive(Debug)]
struct Declared {
    text: String,
    comment: String,
}

/// Every macro, type, field, enumerator and function that the header declares.
fn declarations(header: &str) -> Vec<Declared> {
    let mut declared = Vec::new();
    let (mut comment, mut inside) = (String::new(), false);
    let mut unfinished = String::new();
    // The preamble is one plain comment; what follows it is declarations.
    let body = &header[header.find("#define AEROSTAT_H").unwrap()..];
    for line in body.lines().skip(1) {
        let text = line.trim();
        if inside || text.starts_with("/**") {
            inside = !text.ends_with("*/");
            comment.push_str(text);
            continue;
        }
        let directive = text.starts_with('#') && !text.starts_with("#define");
        let scaffold = ["", "}", "};", "{", "extern \"C\" {"].contains(&text)
            || text.starts_with("}  //")
            || text.starts_with("sizeof(")
            || text.starts_with('(')
            || text.starts_with("/*");
        let continued = text.ends_with('\\') && !text.starts_with('#');
        if directive || scaffold || continued {
            if text.ends_with("};") {
                comment.clear();
            }
            continue;
        }
        unfinished.push_str(text);
        // A function's arguments may take several lines.
        if unfinished.contains('(') && !unfinished.ends_with(';') && !unfinished.starts_with('#') {
            unfinished.push(' ');
            continue;
        }
        declared.push(Declared {
            text: std::mem::take(&mut unfinished),
            comment: std::mem::take(&mut comment),
        });
    }
    declared
}

#[test]
fn the_committed_header_is_the_generated_one() {
    let generated = generated();
    if std::env::var_os("AEROSTAT_WRITE_HEADER").is_some() {
        fs::write(committed(), generated).unwrap();
        return;
    }
    let committed = fs::read_to_string(committed()).unwrap_or_default();
    let differing = generated
        .lines()
        .zip(committed.lines())
        .position(|(new, old)| new != old);
    assert!(
        generated == committed,
        "include/aerostat.h is out of date (first at line {}); run `make header` and commit it",
        differing.map_or(committed.lines().count(), |line| line) + 1
    );
}

#[test]
fn everything_declared_is_documented() {
    let header = generated();
    let declared = declarations(&header);
    let count = |what: &str| {
        declared
            .iter()
            .filter(|item| item.text.contains(what))
            .count()
    };
    // The scan itself works: it sees what is known to be there.
    assert!(
        count("(struct aerostat_device *device") >= 10,
        "{declared:#?}"
    );
    assert!(count("#define AEROSTAT_FEATURE_") >= 9);
    assert!(count("uint64_t skipped_") == 8);
    assert!(count("AEROSTAT_STAT_") == 16);
    for item in &declared {
        let words = item.comment.trim_matches(|c| "/* ".contains(c));
        assert!(!words.is_empty(), "no comment: {}", item.text);
        let reserved = item.text.contains(" reserved");
        assert!(
            reserved || words.ends_with(['.', ')', ']']),
            "no sentence: {} {words}",
            item.text
        );
    }
}

#[test]
fn every_function_tells_its_result_and_its_threads() {
    let header = generated();
    let functions: Vec<Declared> = declarations(&header)
        .into_iter()
        .filter(|item| item.text.ends_with(");") && !item.text.starts_with("typedef"))
        .collect();
    assert!(functions.len() >= 30, "{}", functions.len());
    for Declared { text, comment } in functions {
        assert!(comment.contains("Threads:"), "threads of {text}");
        assert_eq!(
            comment.contains("Returns:"),
            !text.starts_with("void"),
            "result of {text}"
        );
        // What can be NULL by mistake has its errno.
        let int = text.starts_with("int ") && text.contains('*') && !text.contains("_set_log");
        assert!(!int || comment.contains("-EFAULT"), "-EFAULT of {text}");
    }
}

#[test]
fn units_are_in_the_names_of_numbers() {
    for Declared { text, .. } in declarations(&generated()) {
        for word in ["_kib", "_mib", "_us;", "_sec", "free"] {
            assert!(
                !text.to_lowercase().contains(word)
                    || text.contains("MEMFREE")
                    || text.contains("FREE_PAGE_HINT"),
                "{word}: {text}"
            );
        }
    }
}

/// "requirement S11", "requirements A1, A2", "invariant I2": what is cited is to be found.
#[test]
fn cited_requirements_are_explained() {
    let manual = fs::read_to_string(crate_dir().join("../docs/c-abi.md")).unwrap();
    let is_number = |word: &&str| {
        let mut chars = word.chars();
        chars.next().is_some_and(|first| "AIJRSVWX".contains(first))
            && !chars.as_str().is_empty()
            && chars.all(|rest| rest.is_ascii_digit())
    };
    let header = generated();
    let cited: BTreeSet<&str> = header
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(is_number)
        .collect();
    assert!(cited.len() > 5, "{cited:?}");
    for number in cited {
        assert!(manual.contains(&format!("| {number} |")), "{number}");
    }
}

#[test]
fn lines_are_short_enough_to_read() {
    for line in generated().lines() {
        assert!(line.chars().count() <= LINE_CHARS, "{line}");
    }
}
