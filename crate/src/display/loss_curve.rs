//! Line charts as SVG: the loss over the steps of a training run.

use plotters::{
    chart::SeriesLabelPosition,
    prelude::*,
    style::{FontStyle, RGBColor},
};

use super::{Svg, format::escape_html};

const SIZE: (u32, u32) = (640, 360);
/// A chart is 640 pixels wide; more points than this make the file larger and show nothing more.
const MOST_POINTS: usize = 600;

// The card has its own light background, so that it reads the same on a light and on a dark page.
const CARD: RGBColor = RGBColor(0xff, 0xff, 0xff);
const INK: RGBColor = RGBColor(0x33, 0x38, 0x40);
const GRID: RGBColor = RGBColor(0xe3, 0xe6, 0xea);
/// Told apart by people with any kind of colour vision (Okabe and Ito).
const COLORS: [RGBColor; 4] =
    [RGBColor(0x00, 0x72, 0xb2), RGBColor(0xd5, 0x5e, 0x00), RGBColor(0x00, 0x9e, 0x73), RGBColor(0xcc, 0x79, 0xa7)];

/// One line of a chart.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// `(x, y)` in the order of x; points that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// Draws lines over a common x axis. `x_label` and `y_label` name the quantities and units.
///
/// ```
/// use qlora_nb::display::{Series, line_chart};
/// let loss = Series { name: "training".into(), points: vec![(1.0, 6.4), (2.0, 5.1), (3.0, 4.2)] };
/// let svg = line_chart("Loss", "optimizer step", "loss (nats per token)", &[loss]);
/// assert!(svg.source().starts_with("<svg"));
/// ```
pub fn line_chart(title: &str, x_label: &str, y_label: &str, series: &[Series]) -> Svg {
    let finite = |s: &Series| Series {
        name: s.name.clone(),
        points: thin(s.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()),
    };
    let series: Vec<Series> = series.iter().map(finite).filter(|s| !s.points.is_empty()).collect();
    let text = describe(title, &series);
    let mut source = String::new();
    if let Err(detail) = draw(&mut source, title, x_label, y_label, &series) {
        // Drawing into a string has no way to fail that we know of; say so rather than hide it.
        source = format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="640" height="40"><text x="8" y="24">{}</text></svg>"#,
            escape_html(&format!("{title}: the chart could not be drawn: {detail}"))
        );
    }
    Svg::new(with_description(&source, &text), text)
}

fn draw(source: &mut String, title: &str, x_label: &str, y_label: &str, series: &[Series]) -> Result<(), String> {
    let area = SVGBackend::with_string(source, SIZE).into_drawing_area();
    let failed = |e: &dyn std::fmt::Display| e.to_string();
    area.fill(&CARD).map_err(|e| failed(&e))?;
    let font = |size: u32| ("sans-serif", size).into_font().color(&INK);
    let (x, y) = ranges(series);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20).into_font().style(FontStyle::Bold).color(&INK))
        .margin(10)
        .margin_right(18)
        .x_label_area_size(40)
        .y_label_area_size(58)
        .build_cartesian_2d(x.clone(), y.clone())
        .map_err(|e| failed(&e))?;
    let (x_step, y_step) = (x.end - x.start, y.end - y.start);
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(INK)
        .label_style(font(15))
        .axis_desc_style(font(16))
        .x_desc(x_label)
        .y_desc(y_label)
        .x_labels(8)
        .y_labels(7)
        .x_label_formatter(&|v| tick(*v, x_step))
        .y_label_formatter(&|v| tick(*v, y_step))
        .draw()
        .map_err(|e| failed(&e))?;
    for (i, s) in series.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        // A line through one point is invisible: few points get dots.
        let radius = if s.points.len() <= 40 { 3 } else { 0 };
        let line = LineSeries::new(s.points.iter().copied(), color.stroke_width(2)).point_size(radius);
        let drawn = chart.draw_series(line).map_err(|e| failed(&e))?;
        drawn.label(&s.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    if series.len() > 1 {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .margin(8)
            .background_style(CARD)
            .border_style(GRID)
            .label_font(font(15))
            .draw()
            .map_err(|e| failed(&e))?;
    }
    area.present().map_err(|e| failed(&e))
}

/// What the axes span: all points, y with a little air.
fn ranges(series: &[Series]) -> (std::ops::Range<f64>, std::ops::Range<f64>) {
    let span = |values: &mut dyn Iterator<Item = f64>, air: f64| {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        match high - low {
            _ if low > high => 0.0..1.0,
            0.0 => low - 0.5..high + 0.5,
            width => low - width * air..high + width * air,
        }
    };
    let points = || series.iter().flat_map(|s| s.points.iter().copied());
    (span(&mut points().map(|p| p.0), 0.0), span(&mut points().map(|p| p.1), 0.05))
}

/// A tick's number with the decimals that an axis of this width needs.
fn tick(value: f64, width: f64) -> String {
    let decimals = (2.0 - width.log10()).ceil().clamp(0.0, 9.0) as usize;
    let text = format!("{value:.*}", if width >= 20.0 { 0 } else { decimals.min(6) });
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// At most `MOST_POINTS` points: of each stretch its mean, the last point as it is.
fn thin(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points;
    }
    let mean = |chunk: &[(f64, f64)]| {
        let n = chunk.len() as f64;
        (chunk.iter().map(|p| p.0).sum::<f64>() / n, chunk.iter().map(|p| p.1).sum::<f64>() / n)
    };
    let mut thinned: Vec<_> = points.chunks(points.len().div_ceil(MOST_POINTS - 1)).map(mean).collect();
    thinned.extend(points.last());
    thinned
}

/// `Loss: training 6.4 -> 4.2 in 3 points`, for screen readers and plain text.
fn describe(title: &str, series: &[Series]) -> String {
    let one = |s: &Series| match (s.points.as_slice(), s.points.last()) {
        ([only], _) => format!("{} {:.4}, 1 point", s.name, only.1),
        ([first, ..], Some(last)) => {
            format!("{} {:.4} to {:.4}, {} points", s.name, first.1, last.1, s.points.len())
        }
        _ => s.name.clone(),
    };
    match series {
        [] => format!("{title}: no points yet"),
        some => format!("{title}: {}", some.iter().map(one).collect::<Vec<_>>().join("; ")),
    }
}

/// Gives the picture its text alternative, and lets it shrink with a narrow page.
fn with_description(source: &str, text: &str) -> String {
    let Some(end) = source.find('>') else { return source.to_owned() };
    let (tag, rest) = source.split_at(end);
    let text = escape_html(text);
    format!(r#"{tag} role="img" style="max-width:100%"><title>{text}</title>{}"#, &rest[1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(n: usize) -> Series {
        let y = |i: usize| 2.0 + 4.0 * (-(i as f64) / (n as f64 / 4.0)).exp() + 0.05 * (i as f64 * 1.7).sin();
        Series { name: "training".into(), points: (1..=n).map(|i| (i as f64, y(i))).collect() }
    }

    #[test]
    fn a_chart_has_title_axes_and_line() {
        let svg = line_chart("Loss <poet>", "optimizer step", "loss (nats per token)", &[curve(150)]);
        let source = svg.source();
        for part in ["Loss &lt;poet&gt;", "optimizer step", "loss (nats per token)", "<polyline", "#0072B2"] {
            assert!(source.contains(part), "{part} is missing from {source}");
        }
        assert_eq!(source.matches("<svg").count(), 1);
        assert!(source.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn a_long_run_makes_a_small_file_that_keeps_its_last_point() {
        let long = curve(100_000);
        let last = long.points[99_999];
        assert_eq!(*thin(long.points.clone()).last().unwrap(), last);
        assert!(thin(long.points.clone()).len() <= MOST_POINTS);
        let svg = line_chart("Loss", "step", "loss", &[long.clone(), long]);
        assert!(svg.source().len() < 25_000, "{} bytes", svg.source().len());
    }

    #[test]
    fn odd_input_still_draws() {
        let series = |points: &[(f64, f64)]| Series { name: "a".into(), points: points.to_vec() };
        for s in [
            vec![],
            vec![series(&[])],
            vec![series(&[(1.0, 2.0)])],
            vec![series(&[(1.0, f64::NAN)])],
            vec![series(&[(1.0, 2.0), (2.0, f64::INFINITY), (3.0, 2.0)])],
            vec![series(&[(1.0, 1e300), (2.0, -1e300)])],
            vec![series(&[(1.0, 1e-300), (2.0, 2e-300)])],
        ] {
            let svg = line_chart("Loss", "step", "loss", &s);
            assert!(svg.source().contains("</svg>") && !svg.source().contains("could not be drawn"), "{s:?}");
        }
    }

    #[test]
    fn a_chart_says_in_words_what_it_shows() {
        let series = |points: &[(f64, f64)]| [Series { name: "training".into(), points: points.to_vec() }];
        let text = |points: &[(f64, f64)]| describe("Loss", &series(points));
        assert_eq!(text(&[(20.0, 4.0617)]), "Loss: training 4.0617, 1 point");
        assert_eq!(text(&[(20.0, 4.0617), (40.0, 2.6)]), "Loss: training 4.0617 to 2.6000, 2 points");
        assert_eq!(describe("Loss", &[]), "Loss: no points yet");
    }

    #[test]
    fn ticks_have_as_many_decimals_as_they_need() {
        assert_eq!(tick(50.0, 150.0), "50");
        assert_eq!(tick(2.5, 4.0), "2.5");
        assert_eq!(tick(2.0, 4.0), "2");
        assert_eq!(tick(0.0125, 0.04), "0.0125");
    }
}
