//! Plots as SVG: curves, points, histograms, levels and bars.
//!
//! ```
//! use qlora_nb::display::{BarChart, Plot};
//! let weights = [0.1, -0.2, 0.05, 0.3, -0.1, 0.02];
//! let plot = Plot::new("Weights", "weight / absmax", "density")
//!     .histogram("weights", weights, 20)
//!     .levels("INT4", (-7..=7).map(|i| f64::from(i) / 7.0));
//! let bars = BarChart::new("Memory", "MiB")
//!     .stack("16 bits", [("weights", 258.0), ("optimizer", 1032.0)])
//!     .stack("4 bits", [("weights", 70.0), ("optimizer", 9.0)]);
//! # assert!(plot.svg().source().starts_with("<svg") && bars.svg().source().starts_with("<svg"));
//! ```
//!
//! A plot that ends a cell is drawn; in the middle of one, `.show()` draws it.

mod bars;
mod draw;
mod ticks;

use super::{Forms, Svg, shown_by_forms};

pub use bars::BarChart;

/// A plot is 640 pixels wide; more points than this make the file larger and show nothing more.
const MOST_POINTS: usize = 600;

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
    let empty = Plot::new(title, x_label, y_label);
    series.iter().fold(empty, |plot, s| plot.line(&s.name, s.points.iter().copied())).svg()
}

/// Layers over two axes; each method adds one, in the next colour. Numbers that are not finite
/// are left out, and on a logarithmic axis those that are not positive.
#[derive(Clone, Debug, PartialEq)]
pub struct Plot {
    title: String,
    labels: [String; 2],
    log: [bool; 2],
    layers: Vec<Layer>,
}

#[derive(Clone, Debug, PartialEq)]
struct Layer {
    name: String,
    shape: Shape,
    points: Vec<(f64, f64)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    Line,
    Dashed,
    Points,
    /// Bars of this width around their x, standing on 0.
    Histogram(f64),
    /// Upright lines; y is not used.
    Levels,
}

impl Plot {
    /// An empty plot. The labels name the quantities and their units.
    pub fn new(title: &str, x_label: &str, y_label: &str) -> Self {
        let labels = [x_label.into(), y_label.into()];
        Self { title: title.into(), labels, log: [false; 2], layers: Vec::new() }
    }

    /// A curve through `(x, y)` points; few points are marked with dots.
    pub fn line(self, name: &str, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        self.with(name, Shape::Line, points.into_iter().collect())
    }

    /// A dashed curve: a bound, or something to compare with.
    pub fn dashed(self, name: &str, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        self.with(name, Shape::Dashed, points.into_iter().collect())
    }

    /// Points that are not joined.
    pub fn points(self, name: &str, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        self.with(name, Shape::Points, points.into_iter().collect())
    }

    /// How `values` are distributed: their density (the bars' areas add up to 1) in `bins` bins of
    /// one width, from the least to the greatest of them. On linear axes.
    pub fn histogram<V: Into<f64>>(self, name: &str, values: impl IntoIterator<Item = V>, bins: usize) -> Self {
        let (width, points) = histogram(values.into_iter().map(Into::into).collect(), bins);
        self.with(name, Shape::Histogram(width), points)
    }

    /// Upright lines at the x values: the levels of a code book.
    pub fn levels<V: Into<f64>>(self, name: &str, xs: impl IntoIterator<Item = V>) -> Self {
        self.with(name, Shape::Levels, xs.into_iter().map(|x| (x.into(), 0.0)).collect())
    }

    /// A logarithmic x axis. At most ten different x values become its ticks themselves.
    pub fn log_x(mut self) -> Self {
        self.log[0] = true;
        self
    }

    /// A logarithmic y axis.
    pub fn log_y(mut self) -> Self {
        self.log[1] = true;
        self
    }

    fn with(mut self, name: &str, shape: Shape, points: Vec<(f64, f64)>) -> Self {
        self.layers.push(Layer { name: name.into(), shape, points });
        self
    }

    /// The picture.
    pub fn svg(&self) -> Svg {
        let plot = Self { layers: self.layers.iter().filter_map(|l| self.clean(l)).collect(), ..self.clone() };
        let text = plot.describe();
        draw::to_svg(&text, |area| draw::plot(area, &plot))
    }

    /// What a notebook shows.
    pub fn forms(&self) -> Forms {
        self.svg().forms()
    }

    /// What of a layer can be drawn.
    fn clean(&self, layer: &Layer) -> Option<Layer> {
        let fits = |v: f64, log: bool| v.is_finite() && (!log || v > 0.0);
        let flat = matches!(layer.shape, Shape::Levels);
        let drawn = |&(x, y): &(f64, f64)| fits(x, self.log[0]) && (flat || fits(y, self.log[1]));
        let mut points: Vec<_> = layer.points.iter().copied().filter(drawn).collect();
        if matches!(layer.shape, Shape::Line | Shape::Dashed) {
            points = thin(points);
        }
        (!points.is_empty()).then(|| Layer { points, ..layer.clone() })
    }

    /// `Loss: training 6.4 to 4.2, 3 points`, for screen readers and plain text.
    fn describe(&self) -> String {
        let one = |layer: &Layer| {
            let (name, n) = (&layer.name, layer.points.len());
            match (layer.shape, layer.points.as_slice()) {
                (Shape::Levels, _) => format!("{name}, {n} levels"),
                (Shape::Histogram(_), _) => format!("{name}, a histogram of {n} bins"),
                (_, [only]) => format!("{name} {:.4}, 1 point", only.1),
                (_, [first, .., last]) => format!("{name} {:.4} to {:.4}, {n} points", first.1, last.1),
                (_, []) => name.clone(),
            }
        };
        match self.layers.as_slice() {
            [] => format!("{}: no points yet", self.title),
            some => format!("{}: {}", self.title, some.iter().map(one).collect::<Vec<_>>().join("; ")),
        }
    }
}

shown_by_forms!(Plot, BarChart);

/// Bin width, and each bin's middle and density.
fn histogram(values: Vec<f64>, bins: usize) -> (f64, Vec<(f64, f64)>) {
    let values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
    let bins = bins.clamp(1, MOST_POINTS);
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (low, width) = match (high - low) / bins as f64 {
        width if width.is_finite() && width > 0.0 => (low, width),
        // All values are one, or there are none.
        _ => (low - 0.5, 1.0 / bins as f64),
    };
    let mut counts = vec![0usize; bins];
    values.iter().for_each(|v| counts[(((v - low) / width) as usize).min(bins - 1)] += 1);
    let density = |count: usize| count as f64 / (values.len().max(1) as f64 * width);
    let middle = |i: usize| low + (i as f64 + 0.5) * width;
    (width, counts.into_iter().enumerate().map(|(i, count)| (middle(i), density(count))).collect())
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
        let all = |points: &[(f64, f64)]| {
            let points = points.to_vec();
            let ys: Vec<f64> = points.iter().map(|p| p.1).collect();
            let plot = Plot::new("t", "x", "y").line("a", points.clone()).dashed("b", points.clone());
            plot.points("c", points).histogram("d", ys.clone(), 7).levels("e", ys)
        };
        for points in [
            &[][..],
            &[(1.0, 2.0)],
            &[(1.0, f64::NAN)],
            &[(0.0, 0.0), (-1.0, -2.0)],
            &[(1.0, 2.0), (2.0, f64::INFINITY), (3.0, 2.0)],
            &[(1.0, 1e300), (2.0, -1e300)],
            &[(1.0, f64::MAX), (2.0, f64::MIN)],
            &[(1.0, 1e-300), (2.0, 2e-300)],
            &[(1e15, 1.0), (1e15 + 1.0, 2.0)],
        ] {
            for plot in [all(points), all(points).log_x(), all(points).log_y(), all(points).log_x().log_y()] {
                let svg = plot.svg();
                assert!(svg.source().contains("</svg>") && !svg.source().contains("could not be drawn"), "{points:?}");
                assert!(!svg.source().contains("NaN"), "{points:?}");
            }
        }
    }

    #[test]
    fn a_plot_says_in_words_what_it_shows() {
        let text = |points: &[(f64, f64)]| Plot::new("Loss", "", "").line("training", points.to_vec()).describe();
        assert_eq!(text(&[(20.0, 4.0617)]), "Loss: training 4.0617, 1 point");
        assert_eq!(text(&[(20.0, 4.0617), (40.0, 2.6)]), "Loss: training 4.0617 to 2.6000, 2 points");
        assert_eq!(Plot::new("Loss", "", "").describe(), "Loss: no points yet");
        let both = Plot::new("Weights", "", "").histogram("layer 0", [1.0, 2.0], 4).levels("INT4", [0.5f32, 1.0]);
        assert_eq!(both.describe(), "Weights: layer 0, a histogram of 4 bins; INT4, 2 levels");
        assert_eq!(both.forms()[1].1, both.describe());
    }

    #[test]
    fn the_bars_of_a_histogram_cover_an_area_of_one() {
        let values: Vec<f64> = (0..1000).map(|i| (f64::from(i) / 1000.0).powi(2)).collect();
        let (width, bars) = histogram(values, 10);
        assert!((width - 0.0998).abs() < 1e-3 && bars.len() == 10);
        assert!((bars.iter().map(|(_, density)| density * width).sum::<f64>() - 1.0).abs() < 1e-12);
        // A third of the squares lie below a tenth: sqrt(0.1).
        assert!((bars[0].1 * width - 0.316).abs() < 2e-3, "{bars:?}");
        let (_, one) = histogram(vec![3.0, 3.0, f64::NAN], 5);
        assert_eq!(one.iter().filter(|(_, density)| *density > 0.0).count(), 1);
    }

    #[test]
    fn the_legend_hides_no_line() {
        let corner = |lines: &[&[(f64, f64)]]| {
            let plot = lines.iter().fold(Plot::new("t", "x", "y"), |plot, line| plot.line("a", line.to_vec()));
            let svg = plot.svg();
            let rect = svg.source().split("<rect ").find(|r| r.contains("opacity=\"0.85\"")).unwrap().to_owned();
            let number =
                |name: &str| rect.split(name).nth(1).unwrap().split('"').next().unwrap().parse::<f64>().unwrap();
            (number("x=\"") > 300.0, number("y=\"") < 150.0)
        };
        let (right, left, upper, lower) = (true, false, true, false);
        let floor: &[(f64, f64)] = &[(0.0, 0.0), (10.0, 0.0)];
        assert_eq!(corner(&[floor, &[(0.0, 1.0), (10.0, 0.5)]]), (right, upper));
        // Below the legend there is room for a line.
        assert_eq!(
            corner(&[floor, &[(0.0, 1.0), (7.0, 0.68), (8.0, 0.68), (9.0, 0.68), (10.0, 0.68)]]),
            (right, upper)
        );
        // A line that crosses a corner between two points hides there too.
        assert_eq!(corner(&[floor, &[(8.8, 1.0), (10.0, 0.65)]]), (left, upper));
        let high = [(0.0, 1.0), (10.0, 1.0)];
        assert_eq!(corner(&[&high, &[(0.0, 0.9), (9.0, 0.9), (10.0, 0.0)]]), (left, lower));
    }

    #[test]
    fn a_logarithmic_axis_has_the_given_points_as_ticks() {
        let errors = [(32.0, 0.067), (64.0, 0.072), (128.0, 0.077), (256.0, 0.080)];
        let source = Plot::new("t", "block", "error").line("NF4", errors).log_x().svg();
        let at = |label: &str| {
            let text = source.source().split("<text").find(|t| t.contains(&format!(">\n{label}\n")));
            let text = text.unwrap_or_else(|| panic!("no tick {label} in {}", source.source()));
            text.split("x=\"").nth(1).unwrap().split('"').next().unwrap().parse::<f64>().unwrap()
        };
        let steps = [at("64") - at("32"), at("128") - at("64"), at("256") - at("128")];
        assert!(steps.iter().all(|s| (s - steps[0]).abs() <= 2.0 && *s > 50.0), "doublings are equal steps: {steps:?}");
    }
}
