//! Lines out of a stream of bytes, with an end to how much is kept.

/// The longest line. Commands are some hundred bytes long.
pub(super) const MAX_LINE_BYTES: usize = 64 << 10;

/// Something that ended with a newline.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    Complete(Vec<u8>),
    /// More than [`MAX_LINE_BYTES`]; what it said is gone.
    TooLong,
}

/// Collects bytes until a line is complete.
#[derive(Debug, Default)]
pub(super) struct Lines {
    partial: Vec<u8>,
    overflow: bool,
}

impl Lines {
    /// Takes bytes in; hands out the lines that they complete.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Vec<Line> {
        let mut lines = Vec::new();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (content, complete) = match part.split_last() {
                Some((b'\n', content)) => (content, true),
                _ => (part, false),
            };
            self.overflow |= self.partial.len() + content.len() > MAX_LINE_BYTES;
            if self.overflow {
                self.partial = Vec::new();
            } else {
                self.partial.extend_from_slice(content);
            }
            if complete {
                let line = std::mem::take(&mut self.partial);
                let overflow = std::mem::take(&mut self.overflow);
                lines.push(if overflow {
                    Line::TooLong
                } else {
                    Line::Complete(line)
                });
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete(text: &str) -> Line {
        Line::Complete(text.into())
    }

    #[test]
    fn lines_come_in_any_pieces() {
        let mut lines = Lines::default();
        assert_eq!(lines.feed(b"on"), []);
        assert_eq!(
            lines.feed(b"e\n\ntwo\nthr"),
            [complete("one"), complete(""), complete("two")]
        );
        assert_eq!(lines.feed(b"ee\n"), [complete("three")]);
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let mut lines = Lines::default();
        for _ in 0..1000 {
            assert_eq!(lines.feed(&[b'x'; 4096]), []);
            assert!(lines.partial.capacity() <= 2 * MAX_LINE_BYTES);
        }
        assert_eq!(lines.feed(b"\nok\n"), [Line::TooLong, complete("ok")]);
    }
}
