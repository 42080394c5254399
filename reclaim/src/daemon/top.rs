//! `aerostatd top`: the VMs, live. Keys: q quits, up and down choose a VM.

use std::{
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use ratatui::{
    Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Paragraph, Wrap},
};

use super::{client, view};
use crate::engine::status::{Condition, Status, VmStatus};

/// How often the daemon is asked.
const INTERVAL: Duration = Duration::from_millis(500);

/// What is on the screen.
#[derive(Debug, Default)]
struct Screen {
    status: Arc<Status>,
    trouble: Option<String>,
    chosen: usize,
}

/// Shows the daemon at `socket` until the user leaves.
///
/// # Errors
/// The terminal cannot be used, or the daemon cannot be reached at first.
pub fn run(socket: &Path) -> io::Result<()> {
    let mut screen = Screen {
        status: client::status(socket).map_err(io::Error::other)?,
        ..Screen::default()
    };
    let mut terminal = ratatui::try_init()?;
    let outcome = (|| -> io::Result<()> {
        let mut next = Instant::now() + INTERVAL;
        loop {
            terminal.draw(|frame| draw(frame, &screen))?;
            let wait = next.saturating_duration_since(Instant::now());
            if event::poll(wait)? {
                if let Event::Key(key) = event::read()?
                    && key.kind == KeyEventKind::Press
                {
                    let control_c =
                        key.code == KeyCode::Char('c') && key.modifiers == KeyModifiers::CONTROL;
                    match key.code {
                        KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                        _ if control_c => return Ok(()),
                        KeyCode::Down | KeyCode::Char('j') => screen.choose(1),
                        KeyCode::Up | KeyCode::Char('k') => screen.choose(-1),
                        _ => {}
                    }
                }
                continue;
            }
            next = Instant::now() + INTERVAL;
            match client::status(socket) {
                Ok(status) => {
                    screen.status = status;
                    screen.trouble = None;
                }
                Err(error) => screen.trouble = Some(error.to_string()),
            }
        }
    })();
    ratatui::restore();
    outcome
}

impl Screen {
    fn choose(&mut self, by: isize) {
        let last = self.status.vms.len().saturating_sub(1);
        self.chosen = self.chosen.saturating_add_signed(by).min(last);
    }
}

fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let [head, list, detail] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Min(4),
        Constraint::Length(12),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(head_lines(screen, head.width)), head);
    draw_list(frame, screen, list);
    let chosen = screen.status.vms.get(screen.chosen);
    let text = chosen.map_or_else(|| "no VMs".to_owned(), view::explain);
    let block = Block::bordered().title(" q quits, up and down choose ");
    frame.render_widget(
        Paragraph::new(text).wrap(Wrap { trim: false }).block(block),
        detail,
    );
}

fn head_lines(screen: &Screen, width: u16) -> Vec<Line<'static>> {
    let host = &screen.status.host;
    let used = host.total_bytes.saturating_sub(host.available_bytes);
    let mut spans = vec![Span::raw("host ")];
    spans.extend(bar(
        usize::from(width.saturating_sub(6)),
        host.total_bytes,
        &[(used, Color::Blue)],
        Some(host.total_bytes.saturating_sub(host.high_bytes)),
    ));
    let line = match &screen.trouble {
        Some(trouble) => Line::styled(trouble.clone(), Style::new().fg(Color::Red)),
        None => Line::raw(view::host_line(&screen.status)),
    };
    vec![line, Line::from(spans)]
}

fn draw_list(frame: &mut Frame<'_>, screen: &Screen, area: Rect) {
    let vms = &screen.status.vms;
    let names = vms
        .iter()
        .map(|vm| vm.name.as_str().len())
        .max()
        .unwrap_or(4)
        .clamp(4, 24);
    let rows = usize::from(area.height).saturating_sub(1);
    // The chosen VM stays in sight.
    let first = screen.chosen.saturating_sub(rows.saturating_sub(1));
    let bar_width = usize::from(area.width)
        .saturating_sub(names + 34)
        .clamp(10, 60);
    let mut lines = vec![Line::styled(
        format!(
            "{:names$} {:<bar_width$}  {:>7} {:>7} {:>6}  {}",
            "VM", "in use, | floor, balloon", "LEFT", "BALLOON", "PSI %", "MODE"
        ),
        Style::new().add_modifier(Modifier::BOLD),
    )];
    for (index, vm) in vms.iter().enumerate().skip(first).take(rows) {
        lines.push(vm_line(vm, index == screen.chosen, names, bar_width));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

fn vm_line(vm: &VmStatus, chosen: bool, names: usize, width: usize) -> Line<'static> {
    let left = vm.memory_bytes.saturating_sub(vm.ballooned_bytes);
    let available = vm.guest.available_bytes.unwrap_or(0).min(left);
    let name: String = vm.name.as_str().chars().take(names).collect();
    let style = match vm.condition {
        Condition::Running if vm.trouble.is_none() => Style::new(),
        Condition::Running => Style::new().fg(Color::Yellow),
        Condition::Idle | Condition::Absent => Style::new().fg(Color::DarkGray),
        Condition::Unreachable => Style::new().fg(Color::Red),
    };
    let style = if chosen {
        style.add_modifier(Modifier::REVERSED)
    } else {
        style
    };
    let mut spans = vec![Span::styled(format!("{name:names$} "), style)];
    spans.extend(bar(
        width,
        vm.memory_bytes,
        &[
            (left - available, Color::Blue),
            (available, Color::Green),
            (vm.ballooned_bytes, Color::Magenta),
        ],
        Some(vm.floor_bytes),
    ));
    let pressure = vm
        .pressure
        .map_or_else(|| "-".to_owned(), |p| format!("{:.1}", p.some_avg10));
    spans.push(Span::raw(format!(
        "  {:>7} {:>7} {pressure:>6}  {}",
        view::size(left),
        view::size(vm.ballooned_bytes),
        view::mode(vm)
    )));
    Line::from(spans)
}

/// A bar of `width` cells for `whole`, with parts in their colours and a mark at `mark`.
fn bar(width: usize, whole: u64, parts: &[(u64, Color)], mark: Option<u64>) -> Vec<Span<'static>> {
    let cell = |bytes: u64| {
        let cells = u128::from(bytes) * width as u128 / u128::from(whole.max(1));
        usize::try_from(cells).unwrap_or(width).min(width)
    };
    let mark = mark.map(|bytes| cell(bytes).min(width.saturating_sub(1)));
    let mut spans = Vec::new();
    let mut sum = 0_u64;
    let mut ends = Vec::new();
    for (bytes, color) in parts {
        sum = sum.saturating_add(*bytes);
        ends.push((cell(sum), *color));
    }
    for at in 0..width {
        let color = ends
            .iter()
            .find(|(end, _)| at < *end)
            .map(|(_, color)| *color);
        let style = color.map_or_else(Style::new, |color| Style::new().fg(color));
        let symbol = match (mark == Some(at), color) {
            (true, _) => "|",
            (false, Some(_)) => "■",
            (false, None) => "·",
        };
        spans.push(Span::styled(symbol, style));
    }
    spans
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::daemon::view::tests::example;

    #[test]
    fn bars_floors_pressure_and_decisions_are_on_the_screen() {
        let mut terminal = Terminal::new(TestBackend::new(100, 24)).unwrap();
        let screen = Screen {
            status: Arc::new(example()),
            ..Screen::default()
        };

        terminal.draw(|frame| draw(frame, &screen)).unwrap();

        let buffer = terminal.backend().buffer().clone();
        let text: Vec<String> = (0..24)
            .map(|y| (0..100).map(|x| buffer[(x, y)].symbol()).collect())
            .collect();
        let web = text.iter().find(|line| line.starts_with("web")).unwrap();
        assert!(
            web.contains('■') && web.contains('|') && web.contains("3G"),
            "{web}"
        );
        assert!(
            text.iter()
                .any(|line| line.contains("decision   gives 256M of 1G"))
        );
        assert!(text[0].contains("4G of 16G available"));
    }

    #[test]
    fn a_bar_is_as_wide_as_it_should_be_whatever_the_numbers() {
        for (whole, part) in [(0, 0), (0, 9), (10, 99), (u64::MAX, u64::MAX), (100, 50)] {
            let spans = bar(
                20,
                whole,
                &[(part, Color::Red), (part, Color::Blue)],
                Some(part),
            );
            assert_eq!(spans.len(), 20);
        }
    }
}
