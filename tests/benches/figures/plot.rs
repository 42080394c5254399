//! Pictures of a run.

use super::discard::{self, Method};
use super::latency;
use super::machine::Result;
use super::rivals::Rival;
use super::sample::to_f64;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

// Colours that colour-blind readers can tell apart (Okabe and Ito).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x99, 0x99, 0x99),
    RGBColor(0xcc, 0xcc, 0xcc),
    RGBColor(0xf0, 0xe4, 0x42),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x44, 0x44, 0x44),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0x00, 0x9e, 0x73),
];
const FONT: &str = "Helvetica, Arial, sans-serif";
const MARGIN: u32 = 12;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Speeds as multiples of one call a page, a panel for each kind of memory.
pub(crate) fn discard(cases: &[discard::Case], path: &Path) -> Result<()> {
    let small = cases.iter().filter(|case| !case.kind.is_huge());
    let small: Vec<&discard::Case> = small.collect();
    let panels: Vec<Vec<&discard::Case>> = small
        .chunk_by(|a, b| a.kind == b.kind)
        .map(<[_]>::to_vec)
        .collect();
    if panels.is_empty() {
        return Ok(());
    }
    let height = 360 * u32::try_from(panels.len())?;
    let root = SVGBackend::new(path, (1080, height)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, panel) in root.split_evenly((panels.len(), 1)).iter().zip(&panels) {
        bars(area, panel)?;
    }
    root.present()?;
    Ok(())
}

fn bars(area: &Area<'_>, cases: &[&discard::Case]) -> Result<()> {
    let ratio = |case: &discard::Case, series: &discard::Series| {
        let rival = case.of(Method::Rival(Rival::PerPage));
        series.gib_per_second.over(&rival.gib_per_second)
    };
    let all = cases
        .iter()
        .flat_map(|case| case.series.iter().map(|series| ratio(case, series)));
    let top = all.map(|ratios| ratios.median()).fold(1.0, f64::max) * 1.15;
    let groups = to_f64(cases.len() as u64);
    let kind = cases.first().map_or("", |case| case.kind.name());
    let title =
        format!("{kind}: GiB/s over that of a system call a page (median, lowest, highest)");
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 16))
        .margin(MARGIN)
        .x_label_area_size(28)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..groups, 0.0..top)?;
    let names: Vec<&str> = cases.iter().map(|case| case.trace).collect();
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_labels(6)
        .light_line_style(TRANSPARENT)
        .draw()?;
    let methods = cases.first().map_or(&[][..], |case| &case.series);
    let width = 0.86 / to_f64(methods.len().max(1) as u64);
    for (index, method) in methods.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let mut shapes = Vec::new();
        for (group, case) in cases.iter().enumerate() {
            let ratios = ratio(case, case.of(method.method));
            let left = to_f64(group as u64) + 0.07 + width * to_f64(index as u64);
            shapes.push((left, ratios));
        }
        let bar = |(left, ratios): &(f64, super::sample::Samples)| {
            Rectangle::new(
                [(*left, 0.0), (left + width * 0.9, ratios.median())],
                colour.filled(),
            )
        };
        chart
            .draw_series(shapes.iter().map(bar))?
            .label(method.method.name())
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled()));
        let spread = |(left, ratios): &(f64, super::sample::Samples)| {
            let x = left + width * 0.45;
            let ends = [(x, ratios.lowest()), (x, ratios.highest().min(top))];
            PathElement::new(ends, BLACK.mix(0.6))
        };
        chart.draw_series(shapes.iter().map(spread))?;
    }
    let label = |(group, name): (usize, &&str)| {
        let style = (FONT, 13)
            .into_text_style(area)
            .pos(plotters::style::text_anchor::Pos::new(
                plotters::style::text_anchor::HPos::Center,
                plotters::style::text_anchor::VPos::Top,
            ));
        let place = (to_f64(group as u64) + 0.5, 0.0);
        EmptyElement::at(place) + Text::new((*name).to_owned(), (0, 6), style)
    };
    chart.draw_series(names.iter().enumerate().map(label))?;
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font((FONT, 12))
        .background_style(WHITE.mix(0.85))
        .border_style(TRANSPARENT)
        .draw()?;
    Ok(())
}

/// Which share of the arrays is acknowledged within which time.
pub(crate) fn latency(cases: &[latency::Case], path: &Path) -> Result<()> {
    if cases.is_empty() {
        return Ok(());
    }
    let rows = cases.len().div_ceil(2);
    let height = 300 * u32::try_from(rows)?;
    let root = SVGBackend::new(path, (1080, height)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, case) in root.split_evenly((rows, 2)).iter().zip(cases) {
        let mut chart = ChartBuilder::on(area)
            .caption(format!("{}: us from kick to used", case.name()), (FONT, 14))
            .margin(MARGIN)
            .x_label_area_size(26)
            .y_label_area_size(40)
            .build_cartesian_2d((1.0..20_000.0).log_scale(), 0.0..1.0)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_label_formatter(&|us| format!("{us:.0}"))
            .draw()?;
        for (series, colour) in case.series.iter().zip([COLOURS[3], COLOURS[5], COLOURS[6]]) {
            let steps = (0..=200u32).map(|step| {
                let share = f64::from(step) / 200.0;
                (series.all.quantile(share).max(1.0), share)
            });
            chart
                .draw_series(LineSeries::new(steps, colour.stroke_width(2)))?
                .label(series.device.name())
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 14, y)], colour.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .label_font((FONT, 12))
            .background_style(WHITE.mix(0.85))
            .border_style(TRANSPARENT)
            .draw()?;
    }
    root.present()?;
    Ok(())
}
