//! Plots as SVG on a white background, so that they are legible on a dark page as well. Each limiter has the same
//! colour in all plots.

use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::figures::Unit;
use crate::harness::limiter::Limiter;
use crate::harness::{Context, Failure, Result};

const WIDTH: u32 = 860;
const HEIGHT: u32 = 400;
const LEGEND_WIDTH: u32 = 260;
const BAR_HEIGHT: u32 = 16;
/// The height above and below the bars, for title and axis.
const AROUND_BARS: u32 = 110;
const TEXT: (&str, u32) = ("sans-serif", 13);
const TITLE: (&str, u32) = ("sans-serif", 16);
const GREY: RGBColor = RGBColor(130, 130, 130);
const GRID: RGBColor = RGBColor(228, 228, 228);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// How a scale divides its values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    Linear,
    Logarithmic,
}

/// An axis with its values and their unit.
#[derive(Clone, Debug)]
pub struct Axis {
    pub title: String,
    pub scale: Scale,
    pub least: f64,
    pub most: f64,
    /// The values that have a tick with a number.
    ticks: Vec<f64>,
    pub unit: Unit,
}

impl Axis {
    /// An axis for these values: logarithmic if they span decades, else from zero, or close to the values if they are
    /// all alike. On a logarithmic axis, zero is drawn at the lower end.
    pub fn of(title: &str, values: impl Iterator<Item = f64>, unit: Unit) -> Self {
        const DECADES: f64 = 30.0;
        const ALIKE: f64 = 0.8;
        let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        let most = values.iter().copied().fold(0.0, f64::max);
        let positive = values.iter().copied().filter(|value| *value > 0.0).fold(most, f64::min);
        if most > positive * DECADES {
            return Self::logarithmic(title, positive, most, unit);
        }
        let least = values.iter().copied().fold(most, f64::min);
        let from = if least > most * ALIKE { least - (most - least).max(most * 0.02) * 0.3 } else { 0.0 };
        Self::linear(title, from, most + (most - from).max(1e-9) * 0.06, unit)
    }

    /// An axis with a tick at each of these values.
    pub fn through(title: &str, values: &[f64], unit: Unit) -> Self {
        let axis = if values.contains(&0.0) {
            Self::linear(title, 0.0, values.iter().copied().fold(0.0, f64::max), unit)
        } else {
            Self::of(title, values.iter().copied(), unit)
        };
        axis.with_ticks(values.to_vec())
    }

    pub fn linear(title: &str, least: f64, most: f64, unit: Unit) -> Self {
        let step = step((most - least) / 6.0);
        let first = (least / step).ceil() as i64;
        let ticks = (first..=(most / step).floor() as i64).map(|number| number as f64 * step).collect();
        Self { title: title.to_owned(), scale: Scale::Linear, least, most, ticks, unit }
    }

    /// An axis from one power of ten to another, with ticks at the powers; if there are few powers, also at their
    /// multiples by two and five.
    pub fn logarithmic(title: &str, least: f64, most: f64, unit: Unit) -> Self {
        const FEW: i32 = 2;
        let (from, to) = (least.log10().floor() as i32, most.log10().ceil() as i32);
        let between: &[f64] = if to - from <= FEW { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let (least, most) = (least * 0.9, most * 1.1);
        let powers = (from..=to).flat_map(|power| between.iter().map(move |factor| factor * 10f64.powi(power)));
        let ticks = powers.filter(|tick| (least..=most).contains(tick)).collect();
        Self { title: title.to_owned(), scale: Scale::Logarithmic, least, most, ticks, unit }
    }

    fn with_ticks(self, ticks: Vec<f64>) -> Self {
        Self { ticks, ..self }
    }

    /// The position of a value on the axis.
    fn at(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => value.clamp(self.least, self.most),
            Scale::Logarithmic => value.clamp(self.least, self.most).log10(),
        }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    /// The position of a value on the axis.
    type ValueType = f64;

    fn map(&self, at: &f64, (first, last): (i32, i32)) -> i32 {
        let (least, most) = (self.at(self.least), self.at(self.most));
        first + ((at - least) / (most - least) * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.iter().map(|tick| self.at(*tick)).collect()
    }

    fn range(&self) -> Range<f64> {
        self.at(self.least)..self.at(self.most)
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(at: &f64) -> String {
        at.to_string()
    }

    fn format_ext(&self, at: &f64) -> String {
        match self.scale {
            Scale::Linear => self.unit.tick(*at),
            Scale::Logarithmic => self.unit.tick(10f64.powf(*at)),
        }
    }
}

/// A round number of at least this size: 1, 2 or 5 times a power of ten.
fn step(least: f64) -> f64 {
    let power = 10f64.powf(least.max(1e-12).log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|factor| factor * power).find(|step| *step >= least).unwrap_or(10.0 * power)
}

/// A line of a plot.
#[derive(Clone, Debug)]
pub struct Line {
    pub name: String,
    /// None: an idle pod.
    pub limiter: Option<Limiter>,
    pub points: Vec<(f64, f64)>,
}

/// Lines over two axes.
pub struct Lines {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub lines: Vec<Line>,
    /// Whether each point is a measurement; otherwise only the line is.
    pub has_marks: bool,
    /// The value of the limit on the second axis.
    pub limit: Option<f64>,
}

/// The bars of one category.
pub struct Group {
    pub name: String,
    pub bars: Vec<Bar>,
}

pub struct Bar {
    pub limiter: Limiter,
    pub name: String,
    pub value: f64,
}

/// Horizontal bars.
pub struct Bars {
    pub title: String,
    pub axis: Axis,
    pub groups: Vec<Group>,
    pub limit: Option<f64>,
}

pub fn colour(limiter: Option<Limiter>) -> RGBColor {
    match limiter {
        None => RGBColor(40, 40, 40),
        Some(Limiter::Bare) => RGBColor(150, 150, 150),
        Some(Limiter::Podshaper | Limiter::OwnSockets) => RGBColor(0, 87, 217),
        Some(Limiter::Bandwidth) => RGBColor(230, 85, 13),
        Some(Limiter::BandwidthAsKubelet) => RGBColor(244, 170, 90),
        Some(Limiter::BandwidthNewer) => RGBColor(140, 45, 4),
        Some(Limiter::BandwidthNewerAsKubelet) => RGBColor(200, 130, 150),
        Some(Limiter::Edt) => RGBColor(35, 150, 70),
        Some(Limiter::FqCodel) => RGBColor(117, 90, 177),
        Some(Limiter::Cake) => RGBColor(222, 70, 170),
        Some(Limiter::Policer) => RGBColor(20, 165, 185),
        Some(Limiter::Senders) => RGBColor(95, 95, 95),
    }
}

/// Whether this is no limiter, but a reference.
fn is_reference(limiter: Option<Limiter>) -> bool {
    matches!(limiter, None | Some(Limiter::Bare | Limiter::Senders))
}

fn width(limiter: Option<Limiter>) -> u32 {
    if limiter == Some(Limiter::Podshaper) { 4 } else { 2 }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::new(format_args!("draw a plot: {error}"))
}

pub fn lines(path: &Path, plot: &Lines) -> Result<()> {
    let root = SVGBackend::new(path, (WIDTH, HEIGHT)).into_drawing_area();
    root.fill(&WHITE).map_err(failed)?;
    heading(&root, &plot.title)?;
    let (left, right) = root.split_horizontally(WIDTH - LEGEND_WIDTH);
    let mut chart = ChartBuilder::on(&left)
        .margin(10)
        .margin_top(36)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d(plot.x.clone(), plot.y.clone())
        .map_err(failed)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(GREY)
        .label_style(TEXT)
        .axis_desc_style(TEXT)
        .x_desc(plot.x.title.as_str())
        .y_desc(plot.y.title.as_str())
        .draw()
        .map_err(failed)?;
    let at = |(x, y): &(f64, f64)| (plot.x.at(*x), plot.y.at(*y));
    if let Some(limit) = plot.limit.filter(|limit| (plot.y.least..=plot.y.most).contains(limit)) {
        let ends = [plot.x.least, plot.x.most].map(|x| at(&(x, limit)));
        chart.draw_series(LineSeries::new(ends, BLACK.stroke_width(1))).map_err(failed)?;
    }
    // podshaper is drawn last, above the others.
    let (own, others): (Vec<&Line>, Vec<&Line>) =
        plot.lines.iter().partition(|line| line.limiter == Some(Limiter::Podshaper));
    for line in others.into_iter().chain(own) {
        let (colour, width) = (colour(line.limiter), width(line.limiter));
        let points: Vec<(f64, f64)> = line.points.iter().map(at).collect();
        if is_reference(line.limiter) {
            let dashed = DashedLineSeries::new(points.iter().copied(), 6, 4, colour.stroke_width(width));
            chart.draw_series(dashed).map_err(failed)?;
        } else {
            chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(width))).map_err(failed)?;
        }
        if plot.has_marks {
            let marks = points.iter().map(|point| Circle::new(*point, width + 1, colour.filled()));
            chart.draw_series(marks).map_err(failed)?;
        }
    }
    legend(&right, &plot.lines, plot.limit.is_some())?;
    root.present().context(format_args!("write {}", path.display()))
}

fn heading(root: &Area, title: &str) -> Result<()> {
    let style = TITLE.into_font().style(FontStyle::Bold).color(&BLACK);
    root.draw(&Text::new(title.to_owned(), (12, 10), style)).map_err(failed)
}

fn legend(area: &Area, lines: &[Line], has_limit: bool) -> Result<()> {
    const LINE_HEIGHT: i32 = 22;
    let style = || TEXT.into_font().color(&BLACK);
    let mut y = 46;
    for line in lines {
        let (colour, width) = (colour(line.limiter), width(line.limiter));
        let ends: &[[i32; 2]] = if is_reference(line.limiter) { &[[4, 12], [18, 26]] } else { &[[4, 26]] };
        for [from, to] in ends {
            let stroke = PathElement::new(vec![(*from, y), (*to, y)], colour.stroke_width(width));
            area.draw(&stroke).map_err(failed)?;
        }
        write(area, &line.name, (34, y), style(), HPos::Left)?;
        y += LINE_HEIGHT;
    }
    if has_limit {
        area.draw(&PathElement::new(vec![(4, y), (26, y)], BLACK.stroke_width(1))).map_err(failed)?;
        write(area, "the limit", (34, y), style(), HPos::Left)?;
    }
    Ok(())
}

/// A row of a plot with horizontal bars, from the top.
enum BarRow<'a> {
    Name(&'a str),
    Bar(&'a Bar),
}

pub fn bars(path: &Path, plot: &Bars) -> Result<()> {
    let rows: Vec<BarRow> = plot
        .groups
        .iter()
        .flat_map(|group| std::iter::once(BarRow::Name(&group.name)).chain(group.bars.iter().map(BarRow::Bar)))
        .collect();
    let height = rows.len() as u32 * BAR_HEIGHT + AROUND_BARS;
    let root = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE).map_err(failed)?;
    heading(&root, &plot.title)?;
    let down = Axis::linear("", 0.0, rows.len() as f64, Unit::Count).with_ticks(vec![]);
    let mut chart = ChartBuilder::on(&root)
        .margin(10)
        .margin_top(36)
        .margin_right(80)
        .x_label_area_size(46)
        .y_label_area_size(LEGEND_WIDTH)
        .build_cartesian_2d(plot.axis.clone(), down)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(GREY)
        .label_style(TEXT)
        .axis_desc_style(TEXT)
        .x_desc(plot.axis.title.as_str())
        .draw()
        .map_err(failed)?;
    let from = plot.axis.at(plot.axis.least);
    for (number, row) in rows.iter().enumerate() {
        let y = (rows.len() - number) as f64;
        let (_, middle) = chart.backend_coord(&(from, y - 0.5));
        match row {
            BarRow::Name(name) => {
                let style = TEXT.into_font().style(FontStyle::Bold).color(&BLACK);
                write(&root, name, (12, middle), style, HPos::Left)?;
            }
            BarRow::Bar(Bar { limiter, name, value }) => {
                let to = plot.axis.at(*value);
                let bar = Rectangle::new([(from, y - 0.88), (to, y - 0.12)], colour(Some(*limiter)).filled());
                chart.draw_series([bar]).map_err(failed)?;
                let style = TEXT.into_font().color(&BLACK);
                write(&root, name, (LEGEND_WIDTH as i32 + 2, middle), style.clone(), HPos::Right)?;
                let (end, _) = chart.backend_coord(&(to, y - 0.5));
                write(&root, &plot.axis.unit.write(*value), (end + 6, middle), style, HPos::Left)?;
            }
        }
    }
    if let Some(limit) = plot.limit.filter(|limit| (plot.axis.least..=plot.axis.most).contains(limit)) {
        let x = plot.axis.at(limit);
        let line = LineSeries::new([(x, 0.0), (x, rows.len() as f64)], BLACK.stroke_width(1));
        chart.draw_series(line).map_err(failed)?;
    }
    root.present().context(format_args!("write {}", path.display()))
}

/// Writes text whose vertical middle is at this height.
fn write(area: &Area, text: &str, at: (i32, i32), style: TextStyle, begins: HPos) -> Result<()> {
    area.draw(&Text::new(text.to_owned(), at, style.pos(Pos::new(begins, VPos::Center)))).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(values: &[f64]) -> Axis {
        Axis::of("", values.iter().copied(), Unit::Count)
    }

    #[test]
    fn values_that_span_decades_have_a_logarithmic_axis() {
        assert_eq!(axis(&[0.1, 100.0]).scale, Scale::Logarithmic);
        assert_eq!(axis(&[1.0, 3.0]).scale, Scale::Linear);
        assert_eq!(axis(&[1.0, 3.0]).least, 0.0);
    }

    #[test]
    fn a_parameter_that_is_zero_has_its_place() {
        let axis = Axis::through("", &[0.0, 10.0, 400.0], Unit::Count);
        assert_eq!((axis.scale, axis.least, axis.most), (Scale::Linear, 0.0, 400.0));
        assert_eq!(Axis::through("", &[1.0, 10.0, 400.0], Unit::Count).scale, Scale::Logarithmic);
    }

    #[test]
    fn values_that_are_alike_fill_the_axis() {
        let axis = axis(&[98.0, 100.0]);
        assert!(axis.least > 90.0 && axis.least < 98.0 && axis.most > 100.0 && axis.most < 110.0, "{axis:?}");
        assert!(axis.ticks.len() > 2, "{axis:?}");
    }

    #[test]
    fn a_value_beyond_the_axis_is_at_its_end() {
        let axis = Axis::logarithmic("", 1.0, 1000.0, Unit::Count);
        assert_eq!(axis.at(0.0), axis.at(axis.least));
        assert_eq!(axis.ticks, [1.0, 10.0, 100.0, 1000.0]);
    }

    #[test]
    fn nothing_at_all_is_no_reason_to_fail() {
        assert!(axis(&[]).most > axis(&[]).least);
        assert!(axis(&[0.0]).most > axis(&[0.0]).least);
    }
}
