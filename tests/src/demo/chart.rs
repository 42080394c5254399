//! The demonstration's timeline as an SVG picture.
//!
//! One panel shows the whole run; the balloon moves within a fraction of a second of it, so two
//! more panels show the inflation and the deflation on a scale of their own.

use std::{fmt::Write as _, time::Duration};

use super::{
    guest::Reading,
    mib,
    recorder::Sample,
    story::{Movement, Outcome, Phase},
};

const WIDTH: f64 = 1080.0;
const HEIGHT: f64 = 690.0;

// A palette that colour-blind readers can tell apart (Okabe and Ito).
const HOST: &str = "#0072b2";
const ACTUAL: &str = "#d55e00";
const TARGET: &str = "#444444";
const INK: &str = "#222222";
const FAINT: &str = "#6b6b6b";
const GRID: &str = "#e4e4e4";

/// Phases narrower than this on the page are marked by a letter instead of their name.
const NARROW: f64 = 70.0;

/// Draws the picture.
#[must_use]
pub fn draw(outcome: &Outcome) -> String {
    let mut page = Page(String::new());
    page.line(&format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, 'DejaVu Sans', sans-serif" font-size="12">"#
    ));
    page.line(&format!(
        r##"<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"##
    ));
    page.text(
        40.0,
        38.0,
        "start",
        20,
        INK,
        "A guest gives memory back to its host",
    );
    let result = format!(
        "{:.0} MiB requested of a guest of {:.0} MiB: {:.2} % of it free on the host, \
         acknowledged at {:.2} GiB/s, returned at {:.2} GiB/s",
        mib(outcome.target_bytes),
        mib(outcome.memory_bytes),
        outcome.freed_share() * 100.0,
        outcome.inflate.gib_per_second(),
        outcome.deflate.gib_per_second(),
    );
    page.text(40.0, 60.0, "start", 13, FAINT, &result);
    legend(&mut page);

    let end = outcome
        .samples
        .last()
        .map_or(1.0, |sample| sample.at.as_secs_f64());
    let whole = Panel {
        frame: Frame {
            left: 76.0,
            top: 136.0,
            width: 964.0,
            height: 206.0,
        },
        from: 0.0,
        to: end,
        origin: 0.0,
        unit: Unit::Seconds,
        top_mib: mib(outcome.memory_bytes) * 1.04,
    };
    whole.bands(&mut page, &outcome.phases);
    whole.draw(&mut page, &outcome.samples);

    let half = |left: f64| Frame {
        left,
        top: 434.0,
        width: 436.0,
        height: 190.0,
    };
    zoom(
        &mut page,
        outcome,
        &outcome.inflate,
        half(76.0),
        "A",
        "Inflate",
    );
    zoom(
        &mut page,
        outcome,
        &outcome.deflate,
        half(604.0),
        "B",
        "Deflate",
    );
    page.line("</svg>");
    page.0
}

fn legend(page: &mut Page) {
    let entries = [
        (HOST, "host memory of the guest", ""),
        (ACTUAL, "balloon: actual, acknowledged by the guest", ""),
        (TARGET, "balloon: target", r#" stroke-dasharray="5 4""#),
    ];
    let mut x = 40.0;
    for (colour, name, dash) in entries {
        page.line(&format!(
            r#"<path d="M{x} 86h26" stroke="{colour}" stroke-width="3" fill="none"{dash}/>"#
        ));
        page.text(x + 33.0, 90.0, "start", 12, INK, name);
        x += if name.len() > 30 { 320.0 } else { 230.0 };
    }
}

/// A movement, from a little before the request until a little after the guest was there.
fn zoom(
    page: &mut Page,
    outcome: &Outcome,
    movement: &Movement,
    frame: Frame,
    letter: &str,
    name: &str,
) {
    let (start, length) = (movement.start.as_secs_f64(), movement.seconds().max(0.005));
    mark(page, frame.left + 8.0, frame.top - 17.0, letter);
    let title = format!(
        "{name}: {:.0} ms from request to last acknowledgement",
        movement.seconds() * 1e3
    );
    page.text(
        frame.left + 24.0,
        frame.top - 12.0,
        "start",
        13,
        INK,
        &title,
    );
    let panel = Panel {
        frame,
        from: start - length * 0.08,
        to: start + length * 1.3,
        origin: start,
        unit: Unit::Milliseconds,
        top_mib: mib(outcome.memory_bytes) * 1.04,
    };
    panel.draw(page, &outcome.samples);
}

/// A letter in a circle.
fn mark(page: &mut Page, x: f64, y: f64, letter: &str) {
    page.line(&format!(
        r#"<circle cx="{x:.1}" cy="{y:.1}" r="8.5" fill="{INK}"/>"#
    ));
    page.text(x, y + 4.0, "middle", 11, "#ffffff", letter);
}

#[derive(Clone, Copy)]
struct Frame {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Seconds,
    Milliseconds,
}

/// A coordinate system: time in seconds to the right, MiB upwards.
struct Panel {
    frame: Frame,
    from: f64,
    to: f64,
    /// The time that the axis calls zero.
    origin: f64,
    unit: Unit,
    top_mib: f64,
}

impl Panel {
    fn x(&self, seconds: f64) -> f64 {
        let share = (seconds - self.from) / (self.to - self.from);
        self.frame.left + share.clamp(0.0, 1.0) * self.frame.width
    }

    fn y(&self, mib: f64) -> f64 {
        self.bottom() - (mib / self.top_mib).clamp(0.0, 1.0) * self.frame.height
    }

    fn bottom(&self) -> f64 {
        self.frame.top + self.frame.height
    }

    /// Shades every other phase and names it, by a letter where the name does not fit.
    fn bands(&self, page: &mut Page, phases: &[Phase]) {
        let mut letters = ["A", "B", "C", "D"].into_iter();
        for (index, phase) in phases.iter().enumerate() {
            let (left, right) = (
                self.x(phase.start.as_secs_f64()),
                self.x(phase.end.as_secs_f64()),
            );
            let fill = if index % 2 == 0 { "#f6f6f6" } else { "#ececec" };
            page.line(&format!(
                r#"<rect x="{left:.1}" y="{:.1}" width="{:.1}" height="{:.1}" fill="{fill}"/>"#,
                self.frame.top,
                right - left,
                self.frame.height
            ));
            let (middle, y) = (left.midpoint(right), self.frame.top - 8.0);
            if matches!(phase.name, "inflate" | "deflate") {
                mark(page, middle, y - 4.0, letters.next().unwrap_or("?"));
            } else if right - left >= NARROW {
                page.text(middle, y, "middle", 11, FAINT, phase.name);
            }
        }
    }

    fn draw(&self, page: &mut Page, samples: &[Sample]) {
        self.grid(page);
        let shown = self.shown(samples);
        let host = self.path(shown, |reading| reading.host_bytes, false);
        let (left, right) = match (shown.first(), shown.last()) {
            (Some(first), Some(last)) => (
                self.x(first.at.as_secs_f64()),
                self.x(last.at.as_secs_f64()),
            ),
            _ => return,
        };
        let bottom = self.bottom();
        page.line(&format!(
            r#"<path d="{host}L{right:.1} {bottom:.1}L{left:.1} {bottom:.1}Z" fill="{HOST}" fill-opacity="0.13"/>"#
        ));
        page.curve(&host, HOST, "2.2", "");
        let target = self.path(shown, |reading| reading.target_bytes, true);
        page.curve(&target, TARGET, "1.6", r#" stroke-dasharray="5 4""#);
        page.curve(
            &self.path(shown, |reading| reading.actual_bytes, false),
            ACTUAL,
            "2.2",
            "",
        );
    }

    /// The samples inside the panel, and one more on each side.
    fn shown<'a>(&self, samples: &'a [Sample]) -> &'a [Sample] {
        let before = |limit: f64| {
            let limit = Duration::try_from_secs_f64(limit).unwrap_or_default();
            samples.partition_point(|sample| sample.at < limit)
        };
        let first = before(self.from).saturating_sub(1);
        let last = (before(self.to) + 1).min(samples.len());
        samples.get(first..last).unwrap_or_default()
    }

    /// A curve through the samples; with `steps` a value holds until the next sample.
    fn path(&self, samples: &[Sample], value: fn(&Reading) -> u64, steps: bool) -> String {
        let mut path = String::new();
        let mut last = None;
        for sample in samples {
            let (x, y) = (
                self.x(sample.at.as_secs_f64()),
                self.y(mib(value(&sample.reading))),
            );
            // Writing to a string cannot fail.
            let _ = match last {
                None => write!(path, "M{x:.1} {y:.1}"),
                Some(before) if steps => write!(path, "L{x:.1} {before:.1}L{x:.1} {y:.1}"),
                Some(_) => write!(path, "L{x:.1} {y:.1}"),
            };
            last = Some(y);
        }
        path
    }

    fn grid(&self, page: &mut Page) {
        let Frame {
            left, top, width, ..
        } = self.frame;
        let bottom = self.bottom();
        let step = tick(self.top_mib, 4.0, 1024.0);
        for index in 0..=32 {
            let value = step * f64::from(index);
            if value > self.top_mib {
                break;
            }
            let y = self.y(value);
            page.line(&format!(
                r#"<path d="M{left} {y:.1}h{width}" stroke="{GRID}" fill="none"/>"#
            ));
            page.text(
                left - 8.0,
                y + 4.0,
                "end",
                11,
                FAINT,
                &format!("{value:.0}"),
            );
        }
        page.text(left - 8.0, top - 8.0, "end", 11, FAINT, "MiB");

        let scale = if self.unit == Unit::Seconds { 1.0 } else { 1e3 };
        let name = if self.unit == Unit::Seconds {
            "seconds"
        } else {
            "ms after the request"
        };
        let step = tick((self.to - self.from) * scale, 8.0, 1.0);
        for index in 0..=64 {
            let value = step * f64::from(index);
            let seconds = self.origin + value / scale;
            if seconds > self.to {
                break;
            }
            let x = self.x(seconds);
            page.line(&format!(
                r#"<path d="M{x:.1} {bottom:.1}v5" stroke="{FAINT}" fill="none"/>"#
            ));
            page.text(x, bottom + 18.0, "middle", 11, FAINT, &format!("{value}"));
        }
        page.text(left + width, bottom + 36.0, "end", 11, FAINT, name);
        page.line(&format!(
            r#"<path d="M{left} {bottom:.1}h{width}" stroke="{FAINT}" fill="none"/>"#
        ));
    }
}

/// A distance between ticks such that there are about `count` of them: 1, 2 or 5 times a power of
/// ten, or for memory, where `base` is 1024, a power of two.
fn tick(range: f64, count: f64, base: f64) -> f64 {
    let rough = (range / count).max(1e-9);
    if base > 1.0 {
        return rough.log2().floor().exp2();
    }
    let power = 10_f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0]
        .into_iter()
        .find(|factor| factor * power >= rough);
    factor.unwrap_or(10.0) * power
}

/// The picture's text under construction.
struct Page(String);

impl Page {
    fn line(&mut self, element: &str) {
        self.0.push_str(element);
        self.0.push('\n');
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, size: u32, colour: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        self.line(&format!(
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{text}</text>"#
        ));
    }

    fn curve(&mut self, path: &str, colour: &str, width: &str, dash: &str) {
        self.line(&format!(
            r#"<path d="{path}" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round" fill="none"{dash}/>"#
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(tick(1065.0, 4.0, 1024.0), 256.0);
        assert_eq!(tick(13.0, 8.0, 1.0), 2.0);
        assert_eq!(tick(350.0, 8.0, 1.0), 50.0);
    }

    #[test]
    fn a_panel_maps_its_corners_and_clips_what_is_outside() {
        let panel = Panel {
            frame: Frame {
                left: 10.0,
                top: 20.0,
                width: 100.0,
                height: 50.0,
            },
            from: 1.0,
            to: 3.0,
            origin: 1.0,
            unit: Unit::Seconds,
            top_mib: 200.0,
        };
        assert_eq!(
            (panel.x(1.0), panel.x(2.0), panel.x(9.0)),
            (10.0, 60.0, 110.0)
        );
        assert_eq!(
            (panel.y(0.0), panel.y(100.0), panel.y(900.0)),
            (70.0, 45.0, 20.0)
        );

        let sample = |seconds, host_bytes| Sample {
            at: Duration::from_secs(seconds),
            reading: Reading {
                host_bytes,
                ..Reading::default()
            },
        };
        let samples = [
            sample(0, 0),
            sample(1, 1),
            sample(2, 2),
            sample(3, 3),
            sample(4, 4),
        ];
        let shown: Vec<u64> = panel
            .shown(&samples)
            .iter()
            .map(|sample| sample.reading.host_bytes)
            .collect();
        assert_eq!(shown, [0, 1, 2, 3]);
    }
}
