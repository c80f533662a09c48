//! The result as a picture.

use std::fmt::Write as _;

const BAR: f64 = 14.0;
const WIDTH: f64 = 420.0;

/// Two bars for each name: one at a time, and pipelined. Each kind has its own
/// scale, said by the numbers.
pub fn svg(bars: &[(&str, f64, f64)]) -> String {
    let most = |pick: fn(&(&str, f64, f64)) -> f64| {
        bars.iter()
            .map(pick)
            .filter(|rate| rate.is_finite())
            .fold(1.0, f64::max)
    };
    let (single, piped) = (most(|bar| bar.1), most(|bar| bar.2));
    let height = 40.0 + bars.len() as f64 * (2.0 * BAR + 12.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 680 {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <style>text{{fill:#333}}.a{{fill:#2a7ab0}}.b{{fill:#e08a2c}}\
         @media(prefers-color-scheme:dark){{text{{fill:#ddd}}}}</style>\n\
         <text x=\"120\" y=\"16\">answers a second, 32 connections: \
         <tspan class=\"a\">one at a time</tspan>, <tspan class=\"b\">16 pipelined</tspan> (scales differ)</text>\n"
    );
    for (number, (name, one, many)) in bars.iter().enumerate() {
        let top = 32.0 + number as f64 * (2.0 * BAR + 12.0);
        let _ = writeln!(
            out,
            "<text x=\"112\" y=\"{}\" text-anchor=\"end\">{name}</text>",
            top + BAR + 4.0
        );
        for (class, rate, most, y) in [("a", *one, single, top), ("b", *many, piped, top + BAR)] {
            if rate.is_finite() {
                let width = rate / most * WIDTH;
                let _ = writeln!(
                    out,
                    "<rect class=\"{class}\" x=\"120\" y=\"{y}\" width=\"{width:.0}\" height=\"{}\"/>\
                     <text x=\"{:.0}\" y=\"{}\">{rate:.0}</text>",
                    BAR - 2.0,
                    126.0 + width,
                    y + 10.0
                );
            }
        }
    }
    out + "</svg>\n"
}
