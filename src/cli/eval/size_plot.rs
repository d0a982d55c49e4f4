//! The picture of `--compare`: size against quality, and the models that no other beats in both.

use std::ops::Range;

use plotters::backend::SVGBackend;
use plotters::chart::{ChartBuilder, LabelAreaPosition};
use plotters::coord::combinators::IntoLogRange;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::drawing::IntoDrawingArea;
use plotters::element::{Circle, PathElement, Text};
use plotters::series::LineSeries;
use plotters::style::text_anchor::{HPos, VPos};
use plotters::style::{Color, RGBColor, WHITE};

use crate::error::{Error, Result};

use super::super::plot::{Canvas, DOT, GRID, Labels, QUIET, TEXT, anchored, nearest, reason, style};

/// Pixels of the picture, and of the plot in it.
const SIZE: (u32, u32) = (960, 640);
const LEFT: i32 = 84;
const RIGHT: i32 = 936;
const TOP: i32 = 96;
const BOTTOM: i32 = 572;

const FRONT: RGBColor = RGBColor(0, 114, 178);
const BEATEN: RGBColor = RGBColor(213, 94, 0);

/// Letters of a name.
const LONGEST: usize = 56;

/// One model.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Point {
    pub(super) name: String,
    /// Bits per weight.
    pub(super) bits: f64,
    /// The measure, less being better.
    pub(super) quality: f64,
}

/// What the vertical axis is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Measure {
    Perplexity,
    /// Mean KL divergence.
    Divergence {
        from: String,
    },
}

/// The picture of what can be drawn of `points`: a divergence of 0 has no place on a logarithmic axis.
///
/// # Errors
/// `Text`, should there be nothing to draw or the picture not be drawn.
pub(super) fn svg(points: &[Point], measure: &Measure, conditions: &str) -> Result<String> {
    let failed = |reason: String| Error::Text { what: "the size/quality plot".into(), reason };
    let is_log = matches!(measure, Measure::Divergence { .. });
    let least = if is_log { 1e-12 } else { 0.0 };
    let points: Vec<&Point> =
        points.iter().filter(|p| (0.0..1e6).contains(&p.bits) && (least..1e9).contains(&p.quality)).collect();
    if points.is_empty() {
        return Err(failed("no model has a size and a quality that can be drawn".into()));
    }
    let x = span(points.iter().map(|p| p.bits), 0.25);
    let mut picture = String::new();
    let root = SVGBackend::with_string(&mut picture, SIZE).into_drawing_area();
    let drawn = match is_log {
        true => {
            let y = span(points.iter().map(|p| p.quality.ln()), 0.4);
            let y = y.start.exp()..y.end.exp();
            let ticks = log_ticks(&y);
            draw(&root, x, y.log_scale(), &ticks, &points, measure, conditions)
        }
        false => {
            let y = RangedCoordf64::from(span(points.iter().map(|p| p.quality), 0.05));
            draw(&root, x, y, &[], &points, measure, conditions)
        }
    };
    drawn.and_then(|()| root.present().map_err(|e| e.to_string())).map_err(failed)?;
    drop(root);
    Ok(picture)
}

/// 1, 2 and 5 times powers of ten within a range; of many decades the powers alone.
fn log_ticks(range: &Range<f64>) -> Vec<f64> {
    let (low, high) = (range.start.log10().floor() as i32, range.end.log10().ceil() as i32);
    let steps: &[f64] = if high - low > 4 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let all = (low..=high).flat_map(|decade| steps.iter().map(move |step| step * 10f64.powi(decade)));
    all.filter(|tick| range.contains(tick)).collect()
}

/// All values with a tenth of room around them, at least `room`.
fn span(values: impl Iterator<Item = f64>, room: f64) -> Range<f64> {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
    let room = room.max((high - low) / 10.0);
    low - room..high + room
}

/// Places of the points that no other beats: none is as small and as good, and better in one.
fn front(points: &[&Point]) -> Vec<usize> {
    let beats =
        |a: &Point, b: &Point| a.bits <= b.bits && a.quality <= b.quality && (a.bits < b.bits || a.quality < b.quality);
    let mut front: Vec<usize> = (0..points.len()).filter(|&i| !points.iter().any(|p| beats(p, points[i]))).collect();
    front.sort_by(|&a, &b| points[a].bits.total_cmp(&points[b].bits));
    front
}

fn draw<Y>(
    root: &Canvas<'_>,
    x: Range<f64>,
    y: Y,
    ticks: &[f64],
    points: &[&Point],
    measure: &Measure,
    conditions: &str,
) -> Result<(), String>
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    root.fill(&WHITE).map_err(reason)?;
    let x_start = x.start;
    let mut chart = ChartBuilder::on(root)
        .margin_top(TOP)
        .margin_right(SIZE.0 as i32 - RIGHT)
        .set_label_area_size(LabelAreaPosition::Left, LEFT)
        .set_label_area_size(LabelAreaPosition::Bottom, SIZE.1 as i32 - BOTTOM)
        .build_cartesian_2d(x, y)
        .map_err(reason)?;
    let format_x = |x: &f64| number(*x);
    // Own ticks have own labels.
    let format_y = |y: &f64| if ticks.is_empty() { number(*y) } else { String::new() };
    let mut mesh = chart.configure_mesh();
    mesh.bold_line_style(GRID).light_line_style(WHITE).axis_style(QUIET).label_style(style(13, &TEXT));
    mesh.x_label_formatter(&format_x).y_label_formatter(&format_y);
    if !ticks.is_empty() {
        mesh.disable_y_mesh().y_labels(0);
    }
    mesh.draw().map_err(reason)?;
    for &tick in ticks {
        let y = chart.backend_coord(&(x_start, tick)).1;
        root.draw(&PathElement::new([(LEFT, y), (RIGHT, y)], GRID)).map_err(reason)?;
        let label = anchored(13, &TEXT, HPos::Right, VPos::Center);
        root.draw(&Text::new(number(tick), (LEFT - 8, y), label)).map_err(reason)?;
    }

    let front = front(points);
    let line = front.iter().map(|&i| (points[i].bits, points[i].quality));
    chart.draw_series(LineSeries::new(line, FRONT.mix(0.5).stroke_width(2))).map_err(reason)?;
    for (i, p) in points.iter().enumerate() {
        let at = (p.bits, p.quality);
        let dot = match front.contains(&i) {
            true => Circle::new(at, DOT + 1, FRONT.filled()),
            false => Circle::new(at, DOT + 1, BEATEN.stroke_width(2)),
        };
        chart.draw_series([dot]).map_err(reason)?;
    }

    let at = |p: &Point| chart.backend_coord(&(p.bits, p.quality));
    let places: Vec<(i32, i32)> = points.iter().map(|p| at(p)).collect();
    // The front's line is kept free of labels too.
    let on_line = front.windows(2).flat_map(|pair| {
        let ((a, b), (c, d)) = (places[pair[0]], places[pair[1]]);
        (1..24).map(move |i| (a + (c - a) * i / 24, b + (d - b) * i / 24))
    });
    let mut labels = Labels::new([LEFT, TOP, RIGHT, BOTTOM], places.iter().copied().chain(on_line));
    for (p, &from) in points.iter().zip(&places) {
        let name = shorten(&p.name);
        let letters = name.chars().count() as i32;
        let Some(to) = labels.place_around(from, letters) else { continue };
        let (edge, gap) = nearest(from, to, letters);
        if gap > 3 * DOT {
            root.draw(&PathElement::new([from, edge], QUIET.mix(0.6))).map_err(reason)?;
        }
        root.draw(&Text::new(name, to, anchored(13, &TEXT, HPos::Center, VPos::Top))).map_err(reason)?;
    }

    let text = |at: (i32, i32), words: &str, size: u32, color: &'static RGBColor, h: HPos| {
        root.draw(&Text::new(words.to_owned(), at, anchored(size, color, h, VPos::Center))).map_err(reason)
    };
    let (title, unit) = match measure {
        Measure::Perplexity => ("Size and perplexity".to_owned(), "perplexity (less is better)"),
        Measure::Divergence { from } => {
            (format!("Size and divergence from {from}"), "mean KL divergence in nats, logarithmic (less is better)")
        }
    };
    text((LEFT, 24), &title, 20, &TEXT, HPos::Left)?;
    text((LEFT, 50), conditions, 13, &QUIET, HPos::Left)?;
    text((LEFT, TOP - 18), unit, 13, &QUIET, HPos::Left)?;
    text(((LEFT + RIGHT) / 2, BOTTOM + 42), "bits per weight", 13, &QUIET, HPos::Center)?;
    let y = TOP - 18;
    root.draw(&PathElement::new([(RIGHT - 396, y), (RIGHT - 372, y)], FRONT.mix(0.5).stroke_width(2)))
        .map_err(reason)?;
    root.draw(&Circle::new((RIGHT - 384, y), DOT + 1, FRONT.filled())).map_err(reason)?;
    text((RIGHT - 364, y), "on the Pareto front", 13, &TEXT, HPos::Left)?;
    root.draw(&Circle::new((RIGHT - 222, y), DOT + 1, BEATEN.stroke_width(2))).map_err(reason)?;
    text((RIGHT - 210, y), "another is as small and as good", 13, &TEXT, HPos::Left)
}

/// The end of a name too long for the plot.
fn shorten(name: &str) -> String {
    let letters = name.chars().count();
    if letters <= LONGEST {
        name.to_owned()
    } else {
        format!("…{}", name.chars().skip(letters - LONGEST + 1).collect::<String>())
    }
}

/// A tick: `4`, `4.5`, `0.02`, `3e-5`.
fn number(x: f64) -> String {
    match x.abs() {
        0.0 => "0".into(),
        a if a < 1e-4 => format!("{x:.0e}"),
        a => {
            let decimals = (2.0 - a.log10().floor()).clamp(0.0, 6.0) as usize;
            let text = format!("{x:.decimals$}");
            if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(name: &str, bits: f64, quality: f64) -> Point {
        Point { name: name.into(), bits, quality }
    }

    #[test]
    fn who_is_beaten() {
        let all = [
            point("a", 2.0, 9.0),
            point("b", 3.0, 4.0),
            point("worse than b", 3.0, 4.1),
            point("larger than b", 3.1, 4.0),
            point("like b", 3.0, 4.0),
            point("c", 8.0, 3.0),
        ];
        let front = front(&all.iter().collect::<Vec<_>>());
        assert_eq!(front, [0, 1, 4, 5]);
    }

    #[test]
    fn every_name_is_in_the_picture_once_and_escaped() {
        let mut all: Vec<Point> =
            (0..12).map(|i| point(&format!("model-{i:02}"), 4.0 + 0.001 * f64::from(i), 0.01)).collect();
        all.push(point("<b> & \"c\"", 8.0, 1e-3));
        let divergence = Measure::Divergence { from: "base".into() };
        for (measure, picture) in [
            (&Measure::Perplexity, svg(&all, &Measure::Perplexity, "conditions")),
            (&divergence, svg(&all, &divergence, "conditions")),
        ] {
            let picture = picture.expect("draws");
            for i in 0..12 {
                assert_eq!(picture.matches(&format!("\nmodel-{i:02}\n")).count(), 1, "{measure:?}: {picture}");
            }
            assert!(picture.contains("&lt;b&gt; &amp; ") && !picture.contains("<b>"));
            assert!(picture.contains("bits per weight") && picture.contains("Pareto front"));
        }
    }

    #[test]
    fn long_names() {
        assert_eq!((shorten("short"), shorten(&"x".repeat(LONGEST + 1)).chars().count()), ("short".into(), LONGEST));
    }

    #[test]
    fn ticks() {
        let near = |range: Range<f64>, expected: &[f64]| {
            let found = log_ticks(&range);
            assert_eq!(found.len(), expected.len(), "{found:?}");
            assert!(found.iter().zip(expected).all(|(a, b)| (a / b - 1.0).abs() < 1e-9), "{found:?}");
        };
        near(0.02..0.15, &[0.02, 0.05, 0.1]);
        near(3e-5..2.0, &[1e-4, 1e-3, 1e-2, 1e-1, 1.0]);
    }

    #[test]
    fn what_cannot_be_drawn() {
        let divergence = Measure::Divergence { from: "base".into() };
        for bad in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
            assert!(svg(&[point("a", 4.0, bad)], &divergence, "").is_err(), "{bad}");
        }
        assert!(svg(&[point("a", f64::NAN, 1.0)], &Measure::Perplexity, "").is_err());
        assert!(svg(&[point("one", 4.0, 10.0)], &Measure::Perplexity, "").is_ok());
        assert_eq!([4.0, 4.5, 0.02, 3e-5, 26.25, 1000.0].map(number), ["4", "4.5", "0.02", "3e-5", "26.2", "1000"]);
    }
}
