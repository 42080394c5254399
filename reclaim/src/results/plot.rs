//! Results as pictures.

use std::{error::Error, path::Path};

use plotters::prelude::*;

use super::outcome::{Outcome, Runs, Spread};

type Drawn = Result<(), Box<dyn Error>>;

/// A label, its colour, and what it shows of a moment.
type Line = (&'static str, RGBColor, fn(&super::Point) -> f64);

const SIZE: (u32, u32) = (900, 420);

/// Swap traffic by rule, on a logarithmic scale.
pub(super) fn swap(path: &Path, title: &str, results: &[Runs]) -> Drawn {
    let figures: Vec<(String, [Spread; 2])> = results
        .iter()
        .map(|runs| {
            let out = runs.spread(Outcome::swap_out_pages);
            let back = runs.spread(Outcome::swap_in_pages);
            (runs.policy.clone(), [out, back])
        })
        .collect();
    let most = figures
        .iter()
        .flat_map(|(_, spreads)| spreads.map(|spread| spread.most))
        .fold(100.0, f64::max);
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let title = format!("{title}: pages swapped");
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(80)
        .build_cartesian_2d(0.0..figures.len() as f64, (1.0..most * 2.0).log_scale())?;
    let names: Vec<String> = figures.iter().map(|(name, _)| name.clone()).collect();
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_desc("pages (log)")
        .draw()?;
    for (kind, colour, label) in [(0, BLUE, "out"), (1, RED, "in")] {
        let bars = figures.iter().enumerate().map(|(index, (_, spreads))| {
            let left = index as f64 + 0.15 + 0.35 * kind as f64;
            let top = spreads[kind].median.max(1.0);
            Rectangle::new([(left, 1.0), (left + 0.3, top)], colour.mix(0.6).filled())
        });
        chart
            .draw_series(bars)?
            .label(format!("swapped {label}"))
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled()));
        let whiskers = figures.iter().enumerate().map(|(index, (_, spreads))| {
            let middle = index as f64 + 0.3 + 0.35 * kind as f64;
            let ends = [
                (middle, spreads[kind].least.max(1.0)),
                (middle, spreads[kind].most.max(1.0)),
            ];
            PathElement::new(ends.to_vec(), BLACK)
        });
        chart.draw_series(whiskers)?;
    }
    chart.draw_series(names.iter().enumerate().map(|(index, name)| {
        Text::new(
            name.clone(),
            (index as f64 + 0.2, most * 1.7),
            ("sans-serif", 15),
        )
    }))?;
    chart
        .configure_series_labels()
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()?;
    area.present()?;
    Ok(())
}

/// Run times of all guests by rule: the share that had finished after so long.
pub(super) fn runtimes(path: &Path, title: &str, results: &[Runs]) -> Drawn {
    let all: Vec<(String, Vec<f64>)> = results
        .iter()
        .map(|runs| {
            let times = runs
                .outcomes
                .iter()
                .flat_map(|outcome| outcome.runtimes_s.iter());
            let mut times: Vec<f64> = times.copied().collect();
            times.sort_by(f64::total_cmp);
            (runs.policy.clone(), times)
        })
        .collect();
    let ends = all.iter().flat_map(|(_, times)| times.iter().copied());
    let (least, most) = ends.fold((f64::MAX, 1.0_f64), |(low, high), time| {
        (low.min(time), high.max(time))
    });
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let title = format!("{title}: guests finished");
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(least.min(most) * 0.95..most * 1.05, 0.0..100.0)?;
    chart
        .configure_mesh()
        .x_desc("run time, s")
        .y_desc("guests, %")
        .draw()?;
    for (index, (name, times)) in all.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        let count = times.len().max(1) as f64;
        let line = times
            .iter()
            .enumerate()
            .map(|(done, time)| (*time, 100.0 * (done + 1) as f64 / count));
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 12, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()?;
    area.present()?;
    Ok(())
}

/// The first run of each rule over time: free host memory, balloons, what is swapped out.
pub(super) fn memory(path: &Path, title: &str, results: &[Runs]) -> Drawn {
    let rows = results.len().div_ceil(2).max(1);
    let height = u32::try_from(rows).unwrap_or(1).saturating_mul(260);
    let area = SVGBackend::new(path, (1100, height)).into_drawing_area();
    area.fill(&WHITE)?;
    for (runs, cell) in results.iter().zip(area.split_evenly((rows, 2))) {
        let Some(first) = runs.outcomes.first() else {
            continue;
        };
        let lines: [Line; 4] = [
            ("host free", GREEN, |point| point.free_mib),
            ("guests use", BLACK, |point| point.used_mib),
            ("balloons", BLUE, |point| point.balloon_mib),
            ("swapped out", RED, |point| point.swapped_mib),
        ];
        let highest = first
            .points
            .iter()
            .flat_map(|point| lines.map(|(_, _, value)| value(point)))
            .fold(1.0, f64::max);
        let mut chart = ChartBuilder::on(&cell)
            .caption(
                format!("{title}, run 1: {}", runs.policy),
                ("sans-serif", 15),
            )
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..first.end_s.max(1.0), 0.0..highest * 1.05)?;
        chart
            .configure_mesh()
            .x_desc("s")
            .y_desc("MiB")
            .x_labels(8)
            .y_labels(6)
            .draw()?;
        for (label, colour, value) in lines {
            let points = first.points.iter().map(|point| (point.at_s, value(point)));
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
                .label(label)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 12, y)], colour.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .border_style(BLACK)
            .background_style(WHITE.mix(0.8))
            .draw()?;
    }
    area.present()?;
    Ok(())
}
