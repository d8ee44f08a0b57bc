//! Bars with names beneath them.

use plotters::{
    chart::SeriesLabelPosition,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{
    super::{Forms, Svg},
    draw::{Area, COLORS, Scale, axes, failed, font, legend, patch, to_svg},
    ticks,
};

/// Bars side by side, each one number or parts on top of each other; its number, or its sum,
/// stands above it. Numbers that are not finite, or negative, count as 0.
#[derive(Clone, Debug, PartialEq)]
pub struct BarChart {
    title: String,
    y_label: String,
    bars: Vec<Bar>,
}

#[derive(Clone, Debug, PartialEq)]
struct Bar {
    name: String,
    /// (name, value); the name of a bar's only part may be empty.
    parts: Vec<(String, f64)>,
}

impl Bar {
    fn total(&self) -> f64 {
        self.parts.iter().map(|(_, value)| value).sum()
    }
}

impl BarChart {
    /// An empty chart; `y_label` names the quantity and its unit.
    pub fn new(title: &str, y_label: &str) -> Self {
        Self { title: title.into(), y_label: y_label.into(), bars: Vec::new() }
    }

    /// A bar.
    pub fn bar(self, name: &str, value: f64) -> Self {
        self.stack(name, [("", value)])
    }

    /// A bar of parts, the first at the bottom. A part has the same colour in every bar.
    pub fn stack<'a>(mut self, name: &str, parts: impl IntoIterator<Item = (&'a str, f64)>) -> Self {
        let drawable = |value: f64| if value.is_finite() { value.max(0.0) } else { 0.0 };
        let parts = parts.into_iter().map(|(name, value)| (name.to_owned(), drawable(value))).collect();
        self.bars.push(Bar { name: name.into(), parts });
        self
    }

    /// The picture.
    pub fn svg(&self) -> Svg {
        to_svg(&self.describe(), |area| self.draw(area))
    }

    /// What a notebook shows.
    pub fn forms(&self) -> Forms {
        self.svg().forms()
    }

    fn describe(&self) -> String {
        let bar = |b: &Bar| format!("{} {}", b.name, ticks::short(b.total()));
        format!("{}: {}", self.title, self.bars.iter().map(bar).collect::<Vec<_>>().join(", "))
    }

    /// The names of all parts, in the order in which they appear.
    fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for (name, _) in self.bars.iter().flat_map(|b| &b.parts) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        names
    }

    fn draw(&self, area: &Area<'_>) -> Result<(), String> {
        let names = self.names();
        let named = names.iter().any(|n| !n.is_empty());
        let highest = self.bars.iter().map(Bar::total).fold(0.0, f64::max);
        // Air for the numbers above the bars, and for the legend.
        let top = if highest > 0.0 { highest * if named { 1.25 } else { 1.12 } } else { 1.0 };
        let count = self.bars.len().max(1) as f64;
        let name_of = |x: f64| self.bars.get(x.round() as usize).map_or(String::new(), |b| b.name.clone());
        let x = Scale {
            range: -0.6..count - 0.4,
            ticks: (0..self.bars.len()).map(|i| i as f64).collect(),
            label: Box::new(name_of),
            title: "",
        };
        let number = Box::new(move |v: f64| ticks::label(v, top));
        let y = Scale { range: 0.0..top, ticks: ticks::linear(0.0, top), label: number, title: &self.y_label };
        let mut chart = axes(area, &self.title, x, y)?;
        for (i, name) in names.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let mut boxes = Vec::new();
            for (at, bar) in self.bars.iter().enumerate() {
                let mut floor = 0.0;
                for (part, value) in &bar.parts {
                    if part == name && *value > 0.0 {
                        let corners = [(at as f64 - 0.35, floor), (at as f64 + 0.35, floor + value)];
                        boxes.push(Rectangle::new(corners, color.mix(0.85).filled()));
                    }
                    floor += value;
                }
            }
            let drawn = chart.draw_series(boxes).map_err(failed)?;
            if !name.is_empty() {
                drawn.label(*name).legend(move |at| patch(at, color.mix(0.85)));
            }
        }
        let above = font(15).pos(Pos::new(HPos::Center, VPos::Bottom));
        let numbers = self.bars.iter().enumerate().map(|(at, bar)| {
            EmptyElement::at((at as f64, bar.total())) + Text::new(ticks::short(bar.total()), (0, -3), above.clone())
        });
        chart.draw_series(numbers).map_err(failed)?;
        if named {
            let highest_at = self.bars.iter().position(|b| b.total() == highest).unwrap_or(0);
            let left = 2 * highest_at >= self.bars.len();
            let corner = if left { SeriesLabelPosition::UpperLeft } else { SeriesLabelPosition::UpperRight };
            legend(&mut chart, corner)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_is_as_high_as_its_parts_together() {
        let chart = BarChart::new("Memory", "MiB")
            .stack("16 bits", [("weights", 30.0), ("optimizer", 60.0)])
            .stack("4 bits", [("weights", 10.0)]);
        let svg = chart.svg();
        let heights: Vec<i32> = (svg.source().split("<rect").skip(2))
            .filter(|r| r.contains("opacity=\"0.85\"") && r.contains("#0072B2") || r.contains("#D55E00"))
            .map(|r| r.split("height=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap())
            .take(3)
            .collect();
        assert!((heights[0] - 3 * heights[1]).abs() <= 3 && (heights[2] - 6 * heights[1]).abs() <= 6, "{heights:?}");
        for part in ["16 bits", "4 bits", "weights", "optimizer", "\n90\n", "\n10\n", "MiB"] {
            assert!(svg.source().contains(part), "{part} is missing from {}", svg.source());
        }
        assert_eq!(chart.forms()[1].1, "Memory: 16 bits 90, 4 bits 10");
    }

    #[test]
    fn odd_bars_still_draw() {
        let empty = BarChart::new("t", "y");
        for chart in [empty.clone(), empty.clone().bar("a", f64::NAN), empty.bar("b", -1.0).bar("c", 1e300)] {
            let svg = chart.svg();
            assert!(svg.source().contains("</svg>") && !svg.source().contains("could not be drawn"), "{chart:?}");
        }
    }
}
