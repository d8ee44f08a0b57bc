//! Drawing with plotters, into a string.

use std::{fmt::Display, ops::Range};

use plotters::{
    chart::{ChartContext, SeriesLabelPosition},
    coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged},
    prelude::*,
    style::{FontStyle, RGBColor, TextStyle},
};

use super::{Layer, Plot, Shape, ticks};
use crate::display::{Svg, format::escape_html};

const SIZE: (u32, u32) = (640, 360);

// The card has its own light background, so that it reads the same on a light and on a dark page.
const CARD: RGBColor = RGBColor(0xff, 0xff, 0xff);
const INK: RGBColor = RGBColor(0x33, 0x38, 0x40);
const GRID: RGBColor = RGBColor(0xe3, 0xe6, 0xea);
/// Told apart by people with any kind of colour vision (Okabe and Ito).
pub(super) const COLORS: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x66, 0x6c, 0x75),
];

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
pub(super) type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;

/// A range with ticks of our own: plotters' are few on short axes, and it has none for logarithms
/// that stand at the data.
pub(super) struct Axis {
    range: Range<f64>,
    ticks: Vec<f64>,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (low, high): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        // A value far outside the axis is far outside the picture.
        low.saturating_add((f64::from(high - low) * share).round() as i32)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// An axis: what it spans, its ticks and what stands at them, its title.
pub(super) struct Scale<'a> {
    pub range: Range<f64>,
    pub ticks: Vec<f64>,
    pub label: Box<dyn Fn(f64) -> String + 'a>,
    pub title: &'a str,
}

/// Draws a picture and gives it its text alternative.
pub(super) fn to_svg(text: &str, draw: impl FnOnce(&Area<'_>) -> Result<(), String>) -> Svg {
    let mut source = String::new();
    let area = SVGBackend::with_string(&mut source, SIZE).into_drawing_area();
    let drawn = draw(&area).and_then(|()| area.present().map_err(failed));
    drop(area);
    if let Err(detail) = drawn {
        // Drawing into a string has no way to fail that we know of; say so rather than hide it.
        source = format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="640" height="40"><text x="8" y="24">{}</text></svg>"#,
            escape_html(&format!("{text}: could not be drawn: {detail}"))
        );
    }
    Svg::new(with_description(&source, text), text)
}

/// Gives the picture its text alternative, and lets it shrink with a narrow page.
fn with_description(source: &str, text: &str) -> String {
    let Some(end) = source.find('>') else { return source.to_owned() };
    let (tag, rest) = source.split_at(end);
    let text = escape_html(text);
    format!(r#"{tag} role="img" style="max-width:100%"><title>{text}</title>{}"#, &rest[1..])
}

pub(super) fn failed(error: impl Display) -> String {
    error.to_string()
}

pub(super) fn font<'a>(size: u32) -> TextStyle<'a> {
    ("sans-serif", size).into_font().color(&INK)
}

/// Title, mesh and axes; what is drawn next lies above the mesh.
pub(super) fn axes<'a, 'b>(
    area: &'a Area<'b>,
    title: &str,
    x: Scale<'_>,
    y: Scale<'_>,
) -> Result<Chart<'a, 'b>, String> {
    area.fill(&CARD).map_err(failed)?;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20).into_font().style(FontStyle::Bold).color(&INK))
        .margin(10)
        .margin_right(18)
        .x_label_area_size(if x.title.is_empty() { 24 } else { 40 })
        .y_label_area_size(62)
        .build_cartesian_2d(Axis { range: x.range, ticks: x.ticks }, Axis { range: y.range, ticks: y.ticks })
        .map_err(failed)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(INK)
        .label_style(font(15))
        .axis_desc_style(font(16))
        .x_desc(x.title)
        .y_desc(y.title)
        .x_label_formatter(&|v| (x.label)(*v))
        .y_label_formatter(&|v| (y.label)(*v))
        .draw()
        .map_err(failed)?;
    Ok(chart)
}

pub(super) fn legend<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>, position: SeriesLabelPosition) -> Result<(), String> {
    let mut labels = chart.configure_series_labels();
    labels.position(position).margin(8).background_style(CARD.mix(0.85)).border_style(GRID).label_font(font(15));
    labels.draw().map_err(failed)
}

/// What stands for bars in the legend.
pub(super) fn patch((x, y): (i32, i32), color: RGBAColor) -> Rectangle<(i32, i32)> {
    Rectangle::new([(x, y - 5), (x + 18, y + 5)], color.filled())
}

/// A number's place on an axis.
fn place(value: f64, log: bool) -> f64 {
    if log { value.log10() } else { value }
}

/// The x axis (0) or the y axis (1) of a plot.
fn scale<'a>(plot: &'a Plot, axis: usize, range: &Range<f64>) -> Scale<'a> {
    let (range, title) = (range.clone(), plot.labels[axis].as_str());
    if !plot.log[axis] {
        let width = range.end - range.start;
        let ticks = ticks::linear(range.start, range.end);
        return Scale { range, ticks, label: Box::new(move |v| ticks::label(v, width)), title };
    }
    let layers = plot.layers.iter().filter(|l| axis == 0 || l.shape != Shape::Levels);
    let mut values: Vec<f64> = layers.flat_map(|l| &l.points).map(|p| [p.0, p.1][axis]).collect();
    let ticks = ticks::logarithmic(10f64.powf(range.start), 10f64.powf(range.end), &mut values);
    let ticks = ticks.into_iter().map(f64::log10).collect();
    Scale { range, ticks, label: Box::new(|v| ticks::short(10f64.powf(v))), title }
}

pub(super) fn plot(area: &Area<'_>, plot: &Plot) -> Result<(), String> {
    let (x, y) = ranges(plot);
    let mut chart = axes(area, &plot.title, scale(plot, 0, &x), scale(plot, 1, &y))?;
    for (i, l) in plot.layers.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        let points = l.points.iter().map(|p| (place(p.0, plot.log[0]), place(p.1, plot.log[1])));
        layer(&mut chart, l, points.collect(), color, &y)?;
    }
    if plot.layers.len() > 1 {
        legend(&mut chart, emptiest_corner(plot, &x, &y))?;
    }
    Ok(())
}

fn layer<'a, 'b: 'a>(
    chart: &mut Chart<'a, 'b>,
    layer: &Layer,
    points: Vec<(f64, f64)>,
    color: RGBColor,
    y: &Range<f64>,
) -> Result<(), String> {
    let stroke = color.stroke_width(2);
    let drawn = match layer.shape {
        Shape::Line => {
            // A line through one point is invisible: few points get dots.
            let radius = if points.len() <= 40 { 3 } else { 0 };
            chart.draw_series(LineSeries::new(points, stroke).point_size(radius))
        }
        Shape::Dashed => chart.draw_series(DashedLineSeries::new(points, 8, 5, stroke)),
        Shape::Points => chart.draw_series(points.into_iter().map(|p| Circle::new(p, 3, color.filled()))),
        Shape::Histogram(width) => {
            let floor = y.start.max(0.0).min(y.end);
            let bar = |(x, top): (f64, f64)| {
                Rectangle::new([(x - width / 2.0, floor), (x + width / 2.0, top)], color.mix(0.4).filled())
            };
            chart.draw_series(points.into_iter().filter(|p| p.1 > floor).map(bar))
        }
        Shape::Levels => {
            let line = |(x, _): (f64, f64)| PathElement::new([(x, y.start), (x, y.end)], stroke);
            chart.draw_series(points.into_iter().map(line))
        }
    };
    let drawn = drawn.map_err(failed)?;
    let named = drawn.label(&layer.name);
    match layer.shape {
        Shape::Histogram(_) => named.legend(move |at| patch(at, color.mix(0.4))),
        Shape::Points => named.legend(move |(x, y)| Circle::new((x + 9, y), 3, color.filled())),
        Shape::Dashed => named.legend(move |(x, y)| {
            // Two dashes.
            let at = |from: i32, to: i32| PathElement::new([(x + from, y), (x + to, y)], stroke);
            EmptyElement::at((x, y)) + at(0, 7) + at(11, 18)
        }),
        Shape::Line | Shape::Levels => named.legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], stroke)),
    };
    Ok(())
}

/// What the axes span: all points, y with a little air; bars stand on 0.
fn ranges(plot: &Plot) -> (Range<f64>, Range<f64>) {
    let (mut xs, mut ys) = (Vec::new(), Vec::new());
    for Layer { shape, points, .. } in &plot.layers {
        let half = if let Shape::Histogram(width) = shape { width / 2.0 } else { 0.0 };
        let ends = points.iter().flat_map(|p| [p.0 - half, p.0 + half]);
        xs.extend(ends.filter(|x| !plot.log[0] || *x > 0.0).map(|x| place(x, plot.log[0])));
        if *shape != Shape::Levels {
            ys.extend(points.iter().map(|p| place(p.1, plot.log[1])));
        }
        if half > 0.0 && !plot.log[1] {
            ys.push(0.0);
        }
    }
    let floor = plot.layers.iter().any(|l| matches!(l.shape, Shape::Histogram(_))) && ys.iter().all(|y| *y >= 0.0);
    let y = span(&ys, 0.05);
    let y = if floor && !plot.log[1] { 0.0..y.end } else { y };
    let marked = plot.layers.iter().any(|l| matches!(l.shape, Shape::Points | Shape::Levels));
    (span(&xs, if marked { 0.02 } else { 0.0 }), y)
}

pub(super) fn span(values: &[f64], air: f64) -> Range<f64> {
    let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
    match high - low {
        _ if low > high => 0.0..1.0,
        0.0 => low - 0.5..high + 0.5,
        // Numbers near the largest that there are: their distance has no number.
        width if !width.is_finite() => low / 4.0..high / 4.0,
        width => low - width * air..high + width * air,
    }
}

/// The corner where the legend hides the least: the upper right where corners are equal.
fn emptiest_corner(plot: &Plot, x: &Range<f64>, y: &Range<f64>) -> SeriesLabelPosition {
    use SeriesLabelPosition::{LowerLeft, LowerRight, UpperLeft, UpperRight};
    let (width, height) = legend_share(plot);
    let relative = |v: f64, r: &Range<f64>| (v - r.start) / (r.end - r.start);
    let at = |p: &(f64, f64)| (relative(place(p.0, plot.log[0]), x), relative(place(p.1, plot.log[1]), y));
    // What is drawn, and whether it is a bar, which fills what is below it.
    let mut drawn: Vec<((f64, f64), bool)> = Vec::new();
    for layer in plot.layers.iter().filter(|l| l.shape != Shape::Levels) {
        let points: Vec<(f64, f64)> = layer.points.iter().map(at).collect();
        if matches!(layer.shape, Shape::Line | Shape::Dashed) {
            // Between two points there is a line too.
            let between = |a: (f64, f64), b: (f64, f64), t: f64| (a.0 + t * (b.0 - a.0), a.1 + t * (b.1 - a.1));
            let eighths =
                |w: &[(f64, f64)]| [1, 2, 3, 4, 5, 6, 7].map(|i| (between(w[0], w[1], f64::from(i) / 8.0), false));
            drawn.extend(points.windows(2).flat_map(eighths));
        }
        drawn.extend(points.into_iter().map(|point| (point, matches!(layer.shape, Shape::Histogram(_)))));
    }
    let hidden = |right: bool, upper: bool| {
        let covers = |((x, y), bar): &&((f64, f64), bool)| {
            let across = if right { *x > 1.0 - width } else { *x < width };
            across && if upper { *y > 1.0 - height } else { *y < height || *bar }
        };
        drawn.iter().filter(covers).count()
    };
    let corners =
        [(UpperRight, true, true), (UpperLeft, false, true), (LowerRight, true, false), (LowerLeft, false, false)];
    let least = corners.into_iter().min_by_key(|(_, right, upper)| hidden(*right, *upper));
    least.map_or(UpperRight, |(corner, ..)| corner)
}

/// The part of the axes' width and height that the legend takes in a corner, its margin and some air counted.
fn legend_share(plot: &Plot) -> (f64, f64) {
    // Letters; a row; the symbol and its distances; what the axes leave of the picture.
    let name = |l: &Layer| l.name.chars().map(|c| if c.is_ascii() { 8 } else { 13 }).sum::<usize>();
    let width = 39 + plot.layers.iter().map(name).max().unwrap_or(0) + 12;
    let height = 10 + 19 * plot.layers.len() + 12;
    (width as f64 / f64::from(SIZE.0 - 91), height as f64 / f64::from(SIZE.1 - 87))
}
