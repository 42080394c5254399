//! Pairs of bars as SVG.

use std::fmt::Write as _;

const WIDTH: f64 = 900.0;
const LEFT: f64 = 470.0;
const ROW: f64 = 44.0;

/// One pair.
#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) title: String,
    pub(crate) theirs: f64,
    pub(crate) ours: f64,
}

/// The picture: each pair is scaled by its larger bar.
pub(crate) fn draw(bars: &[Bar]) -> String {
    let height = ROW * bars.len() as f64 + 60.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"24\" font-size=\"16\">One QEMU, one guest: virtio-balloon (grey), \
         aerostat-balloon (blue). Shorter is better.</text>\n"
    );
    for (index, bar) in bars.iter().enumerate() {
        let y = 40.0 + ROW * index as f64;
        let scale = (WIDTH - LEFT - 80.0) / bar.theirs.max(bar.ours).max(f64::MIN_POSITIVE);
        let _ = writeln!(
            svg,
            "<text x=\"10\" y=\"{}\">{}</text>",
            y + 20.0,
            bar.title
        );
        for (value, top, colour) in [(bar.theirs, 2.0, "#999"), (bar.ours, 18.0, "#27c")] {
            let _ = writeln!(
                svg,
                "<rect x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" height=\"14\" fill=\"{colour}\"/>\
                 <text x=\"{:.1}\" y=\"{}\" font-size=\"11\">{value:.3}</text>",
                y + top,
                value * scale,
                LEFT + value * scale + 6.0,
                y + top + 11.0
            );
        }
    }
    svg + "</svg>\n"
}
