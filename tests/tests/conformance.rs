//! docs/conformance.md is complete and true: every number has its row, and every test that it names is
//! there.

#![allow(clippy::unwrap_used, reason = "the helpers of a test fail with it")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// How many numbers each letter has.
const NUMBERS: [(char, u32); 7] = [
    ('S', 13),
    ('A', 12),
    ('V', 5),
    ('J', 10),
    ('X', 9),
    ('R', 10),
    ('W', 4),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The cells of every row of every table, without the head.
fn rows() -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join("docs/conformance.md")).unwrap();
    let mut rows = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let rule = |line: &str| line.starts_with("|--") || line.starts_with("|:-");
        let head = lines.peek().is_some_and(|next| rule(next));
        if line.starts_with('|') && !rule(line) && !head {
            let cells = line.trim_matches('|').split('|');
            rows.push(cells.map(|cell| cell.trim().to_owned()).collect());
        }
    }
    rows
}

/// The tests of the tree: their names, by the path of their file without its ending.
fn tests() -> BTreeMap<String, BTreeSet<String>> {
    fn walk(directory: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy();
            if path.is_dir() && !name.starts_with('.') && name != "target" {
                walk(&path, files);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                files.push(path);
            }
        }
    }
    let mut files = Vec::new();
    walk(&root(), &mut files);
    let name = |file: &PathBuf| file.with_extension("").to_string_lossy().into_owned();
    let read = |file: &PathBuf| tests_in(&fs::read_to_string(file).unwrap());
    files.iter().map(|file| (name(file), read(file))).collect()
}

/// The names of the functions behind `#[test]`; other attributes and comments may stand between.
fn tests_in(source: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut marked = false;
    for line in source.lines().map(str::trim_start) {
        let function = line.trim_start_matches("pub ").strip_prefix("fn ");
        if let Some(name) = function.and_then(|rest| rest.split(['(', '<']).next())
            && std::mem::take(&mut marked)
        {
            names.insert(name.to_owned());
        }
        marked |= line.starts_with("#[test]");
    }
    names
}

/// What a cell names in backquotes that looks like `file::test`.
fn named(cell: &str) -> impl Iterator<Item = (&str, &str)> {
    let quoted = cell.split('`').skip(1).step_by(2);
    quoted.filter_map(|text| text.rsplit_once("::"))
}

#[test]
fn every_number_has_one_row() {
    let mut expected = BTreeSet::new();
    for (letter, count) in NUMBERS {
        expected.extend((1..=count).map(|number| format!("{letter}{number}")));
    }
    let mut found = BTreeSet::new();
    for row in rows() {
        let first = row.first().unwrap();
        let mut chars = first.chars();
        let letter = chars.next().is_some_and(|c| c.is_ascii_uppercase());
        if letter && !chars.as_str().is_empty() && chars.all(|c| c.is_ascii_digit()) {
            assert!(found.insert(first.clone()), "{first} has two rows");
        }
    }
    assert_eq!(found, expected);
}

#[test]
fn every_row_names_a_test_or_says_that_there_is_none() {
    for row in rows() {
        let shown = row.last().unwrap();
        let honest = shown.contains("not shown") || shown.starts_with("documentation: ");
        assert!(honest || named(shown).count() > 0, "{row:?}");
    }
}

#[test]
fn every_named_test_exists() {
    let tests = tests();
    let mut missing = Vec::new();
    let text = fs::read_to_string(root().join("docs/conformance.md")).unwrap();
    for (file, test) in text.lines().flat_map(named) {
        let ending = format!("/{file}");
        let mut files = tests.iter().filter(|(path, _)| path.ends_with(&ending));
        if test != "test" && !files.any(|(_, names)| names.contains(test)) {
            missing.push(format!("{file}::{test}"));
        }
    }
    assert_eq!(missing, [] as [String; 0]);
}
