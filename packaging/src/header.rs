//! aerostat(3), from the C header: its introduction, then each structure, enumeration and function with
//! the comment that describes it.

/// The page in roff (man(7)).
pub(crate) fn page(header: &str) -> Vec<u8> {
    let mut page = String::from(
        ".TH AEROSTAT 3\n.SH NAME\naerostat \\- a virtio balloon device as a library\n\
         .SH SYNOPSIS\n.nf\n.B #include <aerostat.h>\n.sp\n\
         cc ... $(pkg\\-config \\-\\-cflags \\-\\-libs aerostat)\n.fi\n",
    );
    page += &introduction(header);
    page += ".SH REFERENCE\n";
    for entry in entries(header) {
        page += &format!(
            ".PP\n.nf\n{}\n.fi\n.RS\n{}.RE\n",
            escaped(&entry.declaration),
            paragraphs(&entry.description)
        );
    }
    page += ".SH SEE ALSO\n.BR aerostat\\-vhost\\-user (1),\n.BR aerostatd (8)\n";
    page.into_bytes()
}

/// The comment that opens the header; its headings are in capitals.
fn introduction(header: &str) -> String {
    let comment = header.split("*/").nth(1).unwrap_or_default();
    let lines = comment
        .lines()
        .filter_map(|line| line.trim().strip_prefix('*'));
    let mut page = String::from(".SH DESCRIPTION\n");
    let mut verbatim = false;
    for line in lines.map(|line| line.strip_prefix(' ').unwrap_or(line)) {
        let heading = !line.is_empty() && line.chars().all(|c| c.is_ascii_uppercase() || c == ' ');
        let indented = line.starts_with("  ");
        if indented != verbatim && !line.is_empty() {
            page += if indented { ".PP\n.nf\n" } else { ".fi\n.PP\n" };
            verbatim = indented;
        }
        page += &match line {
            "" if verbatim => "\n".to_owned(),
            "" => ".PP\n".to_owned(),
            line if heading => format!(".SS {}\n", capitalized(line)),
            line => format!("{}\n", escaped(line)),
        };
    }
    if verbatim {
        page += ".fi\n";
    }
    page
}

fn capitalized(heading: &str) -> String {
    let lower = heading.trim().to_ascii_lowercase();
    let mut letters = lower.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_ascii_uppercase().to_string() + letters.as_str()
    })
}

/// A declaration and what the header says of it.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    description: String,
    declaration: String,
}

/// Every comment of the form `/** ... */` at the left margin, with what it precedes.
fn entries(header: &str) -> Vec<Entry> {
    let mut found = Vec::new();
    let mut rest = header;
    while let Some((_, after)) = rest.split_once("\n/**") {
        let Some((comment, code)) = after.split_once("*/") else {
            break;
        };
        let code = code.trim_start_matches('\n');
        found.push(Entry {
            description: comment
                .lines()
                .map(|line| line.trim().trim_start_matches('*').trim())
                .collect::<Vec<_>>()
                .join("\n")
                .trim()
                .to_owned(),
            declaration: declaration(code),
        });
        rest = code;
    }
    found
}

/// Up to the end of a declaration: its semicolon, that of its closing brace, or for a macro its line.
fn declaration(code: &str) -> String {
    let mut depth = 0;
    let mut text = String::new();
    for line in code.lines() {
        if line.starts_with("#define") {
            return line.trim_end_matches('\\').trim_end().to_owned();
        }
        text += line;
        text.push('\n');
        depth += line.matches('{').count();
        depth = depth.saturating_sub(line.matches('}').count());
        if depth == 0 && line.trim_end().ends_with(';') {
            break;
        }
    }
    text.trim_end().to_owned()
}

fn paragraphs(description: &str) -> String {
    let lines = description.lines().map(|line| match line {
        "" => ".PP\n".to_owned(),
        line => format!("{}\n", escaped(line)),
    });
    lines.collect()
}

/// Text that roff is to print as it is.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    let guarded = text.lines().map(|line| match line.chars().next() {
        Some('.' | '\'') => format!("\\&{line}"),
        _ => line.to_owned(),
    });
    guarded.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = include_str!("../../include/aerostat.h");

    #[test]
    fn an_entry_is_a_comment_and_what_it_precedes() {
        let found = entries(
            "x\n/**\n * What it does.\n *\n * Returns: 0.\n */\nint f(int a,\n      int b);\n\nint g;\n",
        );
        assert_eq!(
            found,
            [Entry {
                description: "What it does.\n\nReturns: 0.".to_owned(),
                declaration: "int f(int a,\n      int b);".to_owned(),
            }]
        );
    }

    #[test]
    fn every_function_of_the_header_is_on_the_page() {
        let page = String::from_utf8(page(HEADER)).unwrap();
        let functions = entries(HEADER)
            .into_iter()
            .filter(|entry| entry.declaration.contains(");"))
            .collect::<Vec<_>>();
        assert!(functions.len() > 40, "{}", functions.len());
        for entry in functions {
            assert!(page.contains(&escaped(&entry.declaration)), "{entry:?}");
        }
        assert!(page.contains(".SS Rules for all functions"), "{page}");
    }

    #[test]
    fn a_line_that_roff_would_obey_is_text() {
        assert_eq!(escaped(".SH - x\n'y"), "\\&.SH \\- x\n\\&'y");
    }
}
